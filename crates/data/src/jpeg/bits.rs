//! Entropy-coded bits and Huffman codes (ITU T.81, annexes C and F.2.2).

/// Bits that one look at the table resolves; longer codes are rare.
const FAST: u32 = 10;

/// A coefficient and the zeros before it.
#[derive(Clone, Copy, Default)]
pub(super) struct Coefficient {
    pub(super) value: i16,
    pub(super) run: u8,
    /// Bits that say so; 0 for no coefficient.
    bits: u8,
}

/// A Huffman table, made for decoding.
#[derive(Clone)]
pub(super) struct Huffman {
    /// By the next [`FAST`] bits: the symbol, and the code's length above it; 0 for longer codes.
    fast: [u16; 1 << FAST],
    /// By the next [`FAST`] bits, if they hold a symbol of run and size and the number after it: all of them.
    whole: [Coefficient; 1 << FAST],
    /// By length: one more than the greatest code of it, moved up to 16 bits; 0 if there is none.
    ends: [u32; 17],
    /// By length: what, added to a code, gives the index of its symbol.
    offsets: [i32; 17],
    symbols: Vec<u8>,
}

impl Huffman {
    /// From the number of codes of each length, 1 to 16, and their symbols.
    pub(super) fn new(counts: &[u8; 16], symbols: &[u8]) -> Result<Self, String> {
        let mut table = Self {
            fast: [0; 1 << FAST],
            whole: [Coefficient::default(); 1 << FAST],
            ends: [0; 17],
            offsets: [0; 17],
            symbols: symbols.to_vec(),
        };
        let (mut code, mut index) = (0u32, 0usize);
        for length in 1..=16u32 {
            let count = usize::from(counts[length as usize - 1]);
            table.offsets[length as usize] = index as i32 - code as i32;
            for &symbol in &symbols[index..index + count] {
                // The code of ones alone is never used.
                if code + 1 >= 1 << length {
                    return Err("a Huffman table has more codes than there are".into());
                }
                if length <= FAST {
                    let first = (code << (FAST - length)) as usize;
                    let entry = (length as u16) << 8 | u16::from(symbol);
                    table.fast[first..first + (1 << (FAST - length))].fill(entry);
                }
                code += 1;
            }
            if count > 0 {
                table.ends[length as usize] = code << (16 - length);
            }
            index += count;
            code <<= 1;
        }
        for (next, (whole, entry)) in table.whole.iter_mut().zip(table.fast).enumerate() {
            let (length, run, size) = (entry >> 8, entry >> 4 & 15, entry & 15);
            let bits = u32::from(length + size);
            if size > 0 && bits <= FAST {
                let value = next as u32 >> (FAST - bits) & ((1 << size) - 1);
                *whole = Coefficient {
                    value: signed(value, u32::from(size)) as i16,
                    run: run as u8,
                    bits: bits as u8,
                };
            }
        }
        Ok(table)
    }
}

/// A number of `size` bits: those that begin with a zero are negative.
#[inline]
fn signed(value: u32, size: u32) -> i32 {
    let is_negative = value < 1 << size >> 1;
    value as i32 - if is_negative { (1 << size) - 1 } else { 0 }
}

/// Reads the bits of a scan up to the next marker. Beyond it there are zeros; [`Bits::check`] tells whether any of
/// them was taken.
pub(super) struct Bits<'a> {
    bytes: &'a [u8],
    /// Of the next byte to be taken into `held`.
    at: usize,
    /// The next bits, from the top.
    held: u64,
    /// How many of them there are.
    count: u32,
    /// How many of them, at the end, are not from the file.
    padding: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(bytes: &'a [u8], at: usize) -> Self {
        Self {
            bytes,
            at,
            held: 0,
            count: 0,
            padding: 0,
        }
    }

    /// Makes sure of 32 bits: enough for a code and what follows it.
    #[inline]
    fn fill(&mut self) {
        if self.count >= 32 {
            return;
        }
        if let Some(&[a, b, c, d]) = self.bytes.get(self.at..).and_then(<[u8]>::first_chunk)
            && a < 255
            && b < 255
            && c < 255
            && d < 255
        {
            let next = u64::from(u32::from_be_bytes([a, b, c, d]));
            self.held |= next << (32 - self.count);
            self.count += 32;
            self.at += 4;
        } else {
            self.fill_slowly();
        }
    }

    #[cold]
    fn fill_slowly(&mut self) {
        while self.count < 32 {
            let byte = match (self.bytes.get(self.at), self.bytes.get(self.at + 1)) {
                // A byte of ones is followed by a zero, or it begins a marker.
                (Some(0xff), Some(0)) => {
                    self.at += 2;
                    0xff
                }
                (Some(&byte), _) if byte < 0xff => {
                    self.at += 1;
                    byte
                }
                _ => {
                    self.padding += 8;
                    0
                }
            };
            self.held |= u64::from(byte) << (56 - self.count);
            self.count += 8;
        }
    }

    #[inline]
    fn skip(&mut self, count: u32) {
        self.held <<= count;
        self.count -= count;
    }

    /// The next `count` bits, at most 16.
    #[inline]
    pub(super) fn take(&mut self, count: u32) -> u32 {
        self.fill();
        self.take_filled(count)
    }

    #[inline]
    fn take_filled(&mut self, count: u32) -> u32 {
        // Two steps, because a shift by 64 is none.
        let value = (self.held >> 1 >> (63 - count)) as u32;
        self.skip(count);
        value
    }

    /// The next symbol.
    #[inline]
    pub(super) fn symbol(&mut self, table: &Huffman) -> Result<u8, String> {
        self.fill();
        let entry = table.fast[(self.held >> (64 - FAST)) as usize];
        if entry != 0 {
            self.skip(u32::from(entry >> 8));
            return Ok(entry as u8);
        }
        self.long_symbol(table)
    }

    #[cold]
    fn long_symbol(&mut self, table: &Huffman) -> Result<u8, String> {
        let next = (self.held >> 48) as u32;
        for length in FAST + 1..=16 {
            if next < table.ends[length as usize] {
                let code = (next >> (16 - length)) as i32;
                self.skip(length);
                let index = code + table.offsets[length as usize];
                return Ok(table.symbols[index as usize]);
            }
        }
        Err("a code is in no Huffman table".into())
    }

    /// The next coefficient, if a table knows it at a glance.
    #[inline]
    pub(super) fn coefficient(&mut self, table: &Huffman) -> Option<Coefficient> {
        self.fill();
        let whole = table.whole[(self.held >> (64 - FAST)) as usize];
        self.skip(u32::from(whole.bits));
        (whole.bits > 0).then_some(whole)
    }

    /// The next `size` bits as a signed number, at most 15, right after a symbol.
    #[inline]
    pub(super) fn signed(&mut self, size: u32) -> i32 {
        signed(self.take_filled(size), size)
    }

    /// Fails if more bits were taken than the file has before its next marker.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.count < self.padding {
            Err("the image data are cut off".into())
        } else {
            Ok(())
        }
    }

    /// Steps over the restart marker of this number, which has to come next, and goes on after it.
    pub(super) fn restart(&mut self, number: u8) -> Result<(), String> {
        // A marker may have ones before it.
        while self.bytes.get(self.at..).and_then(<[u8]>::first_chunk) == Some(&[0xff; 2]) {
            self.at += 1;
        }
        match self.bytes.get(self.at..).and_then(<[u8]>::first_chunk) {
            Some(&[0xff, marker]) if marker == 0xd0 + number => {
                *self = Self::new(self.bytes, self.at + 2);
                Ok(())
            }
            _ => Err("a restart marker is missing".into()),
        }
    }

    /// Where the next marker is looked for.
    pub(super) fn position(&self) -> usize {
        self.at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes 0, 10, 110 and 1110000000.
    fn table() -> Huffman {
        Huffman::new(
            &[1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
            &[7, 8, 9, 5],
        )
        .unwrap()
    }

    #[test]
    fn short_and_long_codes() {
        // 0 10 110 1110000000 0, then ones to the byte's end.
        let bytes = [0b0101_1011, 0b1000_0000, 0b0111_1111];
        let mut bits = Bits::new(&bytes, 0);
        for expected in [7, 8, 9, 5, 7] {
            assert_eq!(bits.symbol(&table()).unwrap(), expected);
        }
        assert!(bits.symbol(&table()).is_err(), "ones are no code");
        assert!(bits.check().is_ok());
    }

    #[test]
    fn too_many_codes() {
        let mut counts = [0; 16];
        counts[0] = 2;
        assert!(Huffman::new(&counts, &[1, 2]).is_err());
        counts = [0; 16];
        counts[1] = 3;
        assert!(Huffman::new(&counts, &[1, 2, 3]).is_ok());
        counts[2] = 1;
        assert!(Huffman::new(&counts, &[1, 2, 3, 4]).is_ok());
        counts[2] = 2;
        assert!(Huffman::new(&counts, &[1, 2, 3, 4, 5]).is_err());
    }

    #[test]
    fn stuffed_zeros_vanish_and_a_marker_ends_the_bits() {
        let bytes = [0xff, 0, 0x12, 0xff, 0xd9, 0x55, 0x55];
        let mut bits = Bits::new(&bytes, 0);
        assert_eq!((bits.take(8), bits.take(8)), (0xff, 0x12));
        assert!(bits.check().is_ok());
        assert_eq!(bits.position(), 3);
        assert_eq!(bits.take(1), 0);
        assert!(bits.check().is_err());
    }

    #[test]
    fn signed_numbers() {
        // Size 0: nothing. Size 3: 000 is -7, 011 is -4, 100 is 4, 111 is 7. Size 15: all ones.
        let bytes = [0b0000_1110, 0b0111_1111, 0xfe, 0b1111_0000];
        let mut bits = Bits::new(&bytes, 0);
        bits.fill();
        let sizes = [0, 3, 3, 3, 3];
        assert_eq!(sizes.map(|size| bits.signed(size)), [0, -7, -4, 4, 7]);
    }
}

//! Entropy-coded data, without stuffing: bits, Huffman tables that know two coefficients at a time, and blocks.
//!
//! Indices are masked or checked, bits beyond the end are zeros, and a block ends after 64 symbols at the latest,
//! whatever the bytes.

use super::super::scan::ZIGZAG;

/// Bits that one look at a table resolves; longer codes are rare.
const LOOK: u32 = 11;
/// What the end of a block adds to the position.
const END: u32 = 128;
/// Zeros after the data, so that a whole word can be read up to their last bit.
pub(super) const PADDING: usize = 64;

/// Up to two coefficients that the next bits hold, packed into 32 bits. Of the first: where its number begins (5 bits),
/// the number's size (4), how far it goes (5). Of the second, where the first ends if there is none: where its number
/// begins (5), the number's size (4). How far they go together (8). 0 for a code that is longer than [`LOOK`].
#[derive(Clone, Copy)]
struct Pair(u32);

impl Pair {
    fn new(first: Symbol, second: Option<Symbol>) -> Self {
        let mut at = first.bits();
        let mut goes = first.goes();
        let mut size = 0;
        if let Some(second) = second {
            at += second.length;
            goes += second.goes();
            size = second.size;
        }
        // The end of a block is a zero somewhere further on, where nothing is yet.
        let first_goes = first.goes().min(31);
        Self(first.length | first.size << 5 | at << 9 | size << 14 | first_goes << 18 | goes << 24)
    }

    /// A first coefficient, which goes nowhere.
    fn dc(symbol: Symbol) -> Self {
        Self(symbol.length | symbol.size << 5 | symbol.bits() << 9)
    }

    /// A code that is in no table goes past the end of any block, and past where a block may end.
    const BAD: Self = Self(1 | 1 << 9 | 65 << 24);

    #[inline(always)]
    fn first(self, held: u64) -> i32 {
        number(held, self.0 & 31, self.0 >> 5 & 15)
    }

    #[inline(always)]
    fn second(self, held: u64) -> i32 {
        number(held, self.0 >> 9 & 31, self.0 >> 14 & 15)
    }

    #[inline(always)]
    fn bits(self) -> u32 {
        (self.0 >> 9 & 31) + (self.0 >> 14 & 15)
    }

    /// Whether there is a second one.
    #[inline(always)]
    fn is_pair(self) -> bool {
        self.bits() != (self.0 & 31) + (self.0 >> 5 & 15)
    }

    #[inline(always)]
    fn first_goes(self) -> u32 {
        self.0 >> 18 & 31
    }

    #[inline(always)]
    fn goes(self) -> u32 {
        self.0 >> 24
    }
}

/// A code as a table has it.
#[derive(Clone, Copy)]
struct Symbol {
    /// Of the code, in bits.
    length: u32,
    /// Zeros before the coefficient.
    run: u32,
    /// Of the number that follows, in bits.
    size: u32,
}

impl Symbol {
    fn bits(self) -> u32 {
        self.length + self.size
    }

    /// Coefficients that it stands for.
    fn goes(self) -> u32 {
        match (self.run, self.size) {
            (15, 0) => 16,
            (_, 0) => END,
            (run, _) => run + 1,
        }
    }
}

/// A Huffman table, made for decoding.
pub(super) struct Table {
    /// By the next [`LOOK`] bits. For first coefficients: sizes only, never two.
    pairs: Box<[Pair; 1 << LOOK]>,
    /// By length: one more than the greatest code of it, moved up to 16 bits; 0 if there is none.
    ends: [u32; 17],
    /// By length: what, added to a code, gives the index of its symbol.
    offsets: [i32; 17],
    symbols: [u8; 256],
    is_dc: bool,
}

impl Table {
    /// From 16 counts and the symbols. None for a table that is damaged, or whose numbers are longer than 8-bit samples
    /// can have.
    pub(super) fn new(table: &[u8], is_dc: bool) -> Option<Self> {
        let (counts, listed) = table.split_first_chunk::<16>()?;
        let too_long = |&symbol: &u8| match is_dc {
            true => symbol > 11,
            false => symbol & 15 > 10,
        };
        if listed.len() > 256 || listed.iter().any(too_long) {
            return None;
        }
        let mut symbols = [0; 256];
        symbols[..listed.len()].copy_from_slice(listed);
        let mut table = Self {
            pairs: Box::new([Pair(0); 1 << LOOK]),
            ends: [0; 17],
            offsets: [0; 17],
            symbols,
            is_dc,
        };
        let mut singles: Vec<Option<Symbol>> = vec![None; 1 << LOOK];
        let (mut code, mut index) = (0, 0);
        for length in 1..=16 {
            let count = usize::from(counts[length as usize - 1]);
            table.offsets[length as usize] = index as i32 - code as i32;
            for &symbol in listed.get(index..index + count)? {
                // The code of ones alone is never used.
                if code + 1 >= 1 << length {
                    return None;
                }
                if length <= LOOK {
                    let first = (code << (LOOK - length)) as usize;
                    let symbol = table.symbol(symbol, length);
                    singles[first..first + (1 << (LOOK - length))].fill(Some(symbol));
                }
                code += 1;
            }
            if count > 0 {
                table.ends[length as usize] = code << (16 - length);
            }
            index += count;
            code <<= 1;
        }
        for (next, (pair, first)) in table.pairs.iter_mut().zip(&singles).enumerate() {
            let Some(first) = *first else { continue };
            let used = first.bits();
            let mut second = None;
            if !is_dc && first.goes() != END && used < LOOK {
                // The bits beyond those that are known are zeros here: only a code that fits counts.
                let after = (next << used) & ((1 << LOOK) - 1);
                second = singles[after].filter(|s| used + s.length <= LOOK);
            }
            *pair = match is_dc {
                true => Pair::dc(first),
                false => Pair::new(first, second),
            };
        }
        Some(table)
    }

    fn symbol(&self, symbol: u8, length: u32) -> Symbol {
        let (run, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
        Symbol {
            length,
            run: if self.is_dc { 0 } else { run },
            size,
        }
    }

    #[inline(always)]
    fn look(&self, held: u64) -> Pair {
        let pair = self.pairs[(held >> (64 - LOOK)) as usize];
        if pair.0 == 0 {
            self.one(held, LOOK + 1)
        } else {
            pair
        }
    }

    /// The next symbol alone, whose code has at least so many bits.
    #[cold]
    #[inline(never)]
    fn one(&self, held: u64, least: u32) -> Pair {
        let next = (held >> 48) as u32;
        for length in least..=16 {
            if next < self.ends[length as usize] {
                let index = (next >> (16 - length)) as i32 + self.offsets[length as usize];
                let symbol = self.symbols[(index & 255) as usize];
                let symbol = self.symbol(symbol, length);
                return match self.is_dc {
                    true => Pair::dc(symbol),
                    false => Pair::new(symbol, None),
                };
            }
        }
        Pair::BAD
    }
}

/// The bits of a scan.
pub(super) struct Bits<'a> {
    /// Ends with [`PADDING`] zeros.
    bytes: &'a [u8],
    /// Of the next byte to be taken into `held`.
    at: usize,
    /// The next bits, from the top.
    held: u64,
    /// How many of them there are.
    count: u32,
}

impl<'a> Bits<'a> {
    /// From this bit on.
    #[inline(always)]
    pub(super) fn new(bytes: &'a [u8], bit: usize) -> Self {
        let mut bits = Self {
            bytes,
            at: bit / 8,
            held: 0,
            count: 0,
        };
        bits.fill();
        bits.skip(bit as u32 % 8);
        bits
    }

    /// Makes sure of 56 bits.
    #[inline(always)]
    fn fill(&mut self) {
        let next = match self.bytes.get(self.at..).and_then(<[u8]>::first_chunk) {
            Some(&next) => u64::from_be_bytes(next),
            None => 0,
        };
        self.held |= next >> self.count;
        self.at += (63 - self.count as usize) >> 3;
        self.count |= 56;
    }

    #[inline(always)]
    fn skip(&mut self, count: u32) {
        self.held <<= count;
        self.count -= count;
    }

    /// Of the next bit.
    #[inline(always)]
    pub(super) fn position(&self) -> usize {
        8 * self.at - self.count as usize
    }

    /// Whether bits were taken that the data do not have.
    #[inline(always)]
    pub(super) fn is_over(&self) -> bool {
        self.position() > 8 * (self.bytes.len() - PADDING)
    }
}

/// The number of `size` bits from bit `at` on; those that begin with a zero are negative.
#[inline(always)]
fn number(held: u64, at: u32, size: u32) -> i32 {
    let next = held << at;
    // Two steps, because a shift by 64 is none.
    let value = (next >> 1 >> (63 - size)) as i32;
    let negative = !((next as i64 >> 63) as i32);
    value - (negative & ((1 << size) - 1))
}

/// Where coefficient k - 1 belongs in a [`Group`], by k; whatever is past the end goes to the last.
static PLACES: [u8; 256] = {
    let mut places = [7 * 32 + 7; 256];
    let mut k = 0;
    while k < 64 {
        places[k + 1] = ZIGZAG[k] / 8 * 32 + ZIGZAG[k] % 8;
        k += 1;
    }
    places
};

/// Four blocks side by side: rows of four times eight coefficients.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Group(pub(super) [i16; 256]);

impl Group {
    pub(super) const ZERO: Self = Self([0; 256]);
}

/// Decodes the first coefficient and returns the k of the next: 1, or past the end if the code is in no table.
#[inline(always)]
fn first(bits: &mut Bits<'_>, dc: &Table, previous: &mut i32) -> u32 {
    bits.fill();
    let pair = dc.look(bits.held);
    *previous = previous.wrapping_add(pair.first(bits.held));
    bits.skip(pair.bits());
    1 + pair.goes()
}

/// Whether a block that ended with this k ended well: by its last coefficient or by a code that says so.
#[inline(always)]
fn is_end(k: u32) -> bool {
    k == 64 || k.wrapping_sub(END + 1) < 63
}

/// Decodes a block into column `x` (0, 8, 16 or 24) of a group that is zero there. False if it goes past the end.
#[inline(always)]
pub(super) fn block(
    bits: &mut Bits<'_>,
    (dc, ac): (&Table, &Table),
    previous: &mut i32,
    group: &mut Group,
    x: usize,
) -> bool {
    let mut k = first(bits, dc, previous);
    let x = x & 24;
    group.0[x] = *previous as i16;
    let mut put = |k: u32, value: i32| {
        let place = usize::from(PLACES[(k & 255) as usize]) + x;
        // SAFETY: places end at 7 * 32 + 7, and x at 24: below 256.
        unsafe { *group.0.get_unchecked_mut(place) = value as i16 };
    };
    macro_rules! step {
        () => {{
            let held = bits.held;
            let pair = ac.look(held);
            let after = k + pair.goes();
            let middle = k + pair.first_goes();
            // In this order: where there is no second, the first is at the same place.
            put(after, pair.second(held));
            put(middle, pair.first(held));
            if after >= 64 {
                if middle >= 64 && pair.is_pair() {
                    // The block ended with the first: what looked like a second is of the next block.
                    let pair = ac.one(held, 1);
                    bits.skip(pair.bits());
                    return is_end(k + pair.goes());
                }
                bits.skip(pair.bits());
                return is_end(after);
            }
            bits.skip(pair.bits());
            k = after;
        }};
    }
    step!();
    loop {
        bits.fill();
        step!();
        step!();
    }
}

/// Steps over a block. False if it goes past its end.
#[inline(always)]
pub(super) fn skip(bits: &mut Bits<'_>, (dc, ac): (&Table, &Table), previous: &mut i32) -> bool {
    let mut k = first(bits, dc, previous);
    macro_rules! step {
        () => {{
            let held = bits.held;
            let pair = ac.look(held);
            let after = k + pair.goes();
            if after >= 64 {
                if k + pair.first_goes() >= 64 && pair.is_pair() {
                    let pair = ac.one(held, 1);
                    bits.skip(pair.bits());
                    return is_end(k + pair.goes());
                }
                bits.skip(pair.bits());
                return is_end(after);
            }
            bits.skip(pair.bits());
            k = after;
        }};
    }
    step!();
    loop {
        bits.fill();
        step!();
        step!();
    }
}

/// Takes the entropy-coded data up to the next marker into `out`, without stuffing and with [`PADDING`] zeros at the
/// end. False if the file ends before a marker comes.
pub(super) fn unstuff(data: &[u8], out: &mut Vec<u8>) -> bool {
    out.clear();
    out.reserve(data.len() + PADDING);
    let mut at = 0;
    let is_ended = loop {
        // Most chunks have no byte of ones.
        while let Some(chunk) = data.get(at..).and_then(<[u8]>::first_chunk::<32>)
            && !chunk.iter().fold(false, |any, &byte| any | (byte == 0xff))
        {
            out.extend_from_slice(chunk);
            at += 32;
        }
        let rest = &data[at..];
        let near = &rest[..rest.len().min(32)];
        let Some(ones) = near.iter().position(|&byte| byte == 0xff) else {
            out.extend_from_slice(near);
            break false;
        };
        out.extend_from_slice(&rest[..ones]);
        match rest.get(ones + 1) {
            Some(0) => {
                out.push(0xff);
                at += ones + 2;
            }
            Some(_) => break true,
            None => break false,
        }
    };
    out.extend_from_slice(&[0; PADDING]);
    is_ended
}

//! Scans: entropy-coded blocks, all coefficients at once (sequential) or bit by bit (progressive).

use super::bits::{Bits, Huffman};

/// Where the coefficient that is stored k-th belongs.
pub(super) const ZIGZAG: [u8; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20,
    13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59,
    52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
];

/// What a scan header says, apart from its components.
#[derive(Clone, Copy)]
pub(super) struct Part {
    /// First and last coefficient.
    pub(super) first: usize,
    pub(super) last: usize,
    /// The lowest bit that was sent before, 0 if none was, and the one that is sent now.
    pub(super) high: u32,
    pub(super) low: u32,
}

/// What is known of a block of a progressive file.
pub(super) struct Block<'a> {
    pub(super) coefficients: &'a mut [i16; 64],
    /// Those that are not zero, but for the first, in the order in which they are stored: bit by bit.
    pub(super) seen: &'a mut u64,
}

impl Block<'_> {
    /// Sets the coefficient that is stored k-th.
    fn set(&mut self, k: usize, value: i16) -> Result<(), String> {
        self.coefficients[place(k)?] = value;
        *self.seen = *self.seen & !(1 << k) | u64::from(value != 0) << k;
        Ok(())
    }

    /// Gives each of these its next bit.
    fn correct(&mut self, bits: &mut Bits<'_>, mut which: u64, bit: i16) {
        which &= *self.seen;
        while which != 0 {
            let count = which.count_ones().min(16);
            let mut next = bits.take(count) << (32 - count);
            for _ in 0..count {
                let place = usize::from(ZIGZAG[which.trailing_zeros() as usize]);
                which &= which - 1;
                let coefficient = &mut self.coefficients[place];
                let is_wanted = next >> 31 != 0 && *coefficient & bit == 0;
                next <<= 1;
                let away = if *coefficient > 0 { bit } else { -bit };
                *coefficient = coefficient.wrapping_add(if is_wanted { away } else { 0 });
            }
        }
    }
}

/// A component's tables in a scan, and what goes on from block to block.
pub(super) struct Coder<'a> {
    pub(super) dc: Option<&'a Huffman>,
    pub(super) ac: Option<&'a Huffman>,
    pub(super) previous: i32,
}

/// The place of coefficient `k`, or an error if a run has gone past the end.
#[inline]
fn place(k: usize) -> Result<usize, String> {
    let place = ZIGZAG.get(k).ok_or("a run goes past the end of a block")?;
    Ok(usize::from(*place))
}

fn table(table: Option<&Huffman>) -> Result<&Huffman, String> {
    table.ok_or_else(|| "a Huffman table is missing".into())
}

impl Coder<'_> {
    fn dc(&mut self, bits: &mut Bits<'_>) -> Result<i32, String> {
        let size = u32::from(bits.symbol(table(self.dc)?)?);
        if size > 15 {
            return Err("a coefficient has too many bits".into());
        }
        self.previous = self.previous.wrapping_add(bits.signed(size));
        Ok(self.previous)
    }

    /// Decodes a whole block into `block`, which is zero, and says whether more than the first coefficient is there.
    pub(super) fn sequential(
        &mut self,
        bits: &mut Bits<'_>,
        block: &mut [i16; 64],
    ) -> Result<bool, String> {
        block[0] = self.dc(bits)? as i16;
        let ac = table(self.ac)?;
        let mut k = 1;
        while k < 64 {
            if let Some(next) = bits.coefficient(ac) {
                k += usize::from(next.run);
                block[place(k)?] = next.value;
                k += 1;
                continue;
            }
            let symbol = bits.symbol(ac)?;
            let (run, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
            if size == 0 {
                if run < 15 {
                    break;
                }
                k += 16;
                continue;
            }
            k += run;
            block[place(k)?] = bits.signed(size) as i16;
            k += 1;
        }
        Ok(k > 1)
    }

    /// Adds what this scan says of a block. `skip` counts blocks that the scan has nothing for.
    pub(super) fn progressive(
        &mut self,
        bits: &mut Bits<'_>,
        part: Part,
        skip: &mut u32,
        block: &mut Block<'_>,
    ) -> Result<(), String> {
        let first = &mut block.coefficients[0];
        match (part.first, part.high) {
            (0, 0) => *first = (self.dc(bits)? << part.low) as i16,
            (0, _) => *first |= (bits.take(1) << part.low) as i16,
            (_, 0) => self.begin(bits, part, skip, block)?,
            _ => self.refine(bits, part, skip, block)?,
        }
        Ok(())
    }

    fn begin(
        &mut self,
        bits: &mut Bits<'_>,
        part: Part,
        skip: &mut u32,
        block: &mut Block<'_>,
    ) -> Result<(), String> {
        if *skip > 0 {
            *skip -= 1;
            return Ok(());
        }
        let ac = table(self.ac)?;
        let mut k = part.first;
        while k <= part.last {
            if let Some(next) = bits.coefficient(ac) {
                k += usize::from(next.run);
                block.set(k, next.value << part.low)?;
                k += 1;
                continue;
            }
            let symbol = bits.symbol(ac)?;
            let (run, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
            if size > 0 {
                k += run;
                block.set(k, (bits.signed(size) << part.low) as i16)?;
                k += 1;
            } else if run == 15 {
                k += 16;
            } else {
                *skip = (1 << run) - 1 + bits.take(run as u32);
                break;
            }
        }
        Ok(())
    }

    fn refine(
        &mut self,
        bits: &mut Bits<'_>,
        part: Part,
        skip: &mut u32,
        block: &mut Block<'_>,
    ) -> Result<(), String> {
        let ac = table(self.ac)?;
        let bit = 1i16 << part.low;
        // Coefficients that are still to come.
        let mut rest = u64::MAX << part.first & u64::MAX >> (63 - part.last);
        while *skip == 0 && rest != 0 {
            let symbol = bits.symbol(ac)?;
            let (run, size) = (symbol >> 4, symbol & 15);
            let mut new = 0;
            if size > 0 {
                new = if bits.take(1) == 1 { bit } else { -bit };
            } else if run < 15 {
                *skip = (1 << run) + bits.take(u32::from(run));
                break;
            }
            // `run` counts zeros; the coefficient after them is the new one. What is not zero gets its next bit.
            let mut zeros = rest & !*block.seen;
            for _ in 0..run {
                zeros &= zeros.wrapping_sub(1);
            }
            let found = zeros & zeros.wrapping_neg();
            let passed = rest & found.wrapping_sub(1);
            block.correct(bits, passed, bit);
            if found != 0 {
                block.set(found.trailing_zeros() as usize, new)?;
            }
            rest &= !(passed | found);
        }
        if *skip > 0 {
            block.correct(bits, rest, bit);
            *skip -= 1;
        }
        Ok(())
    }
}

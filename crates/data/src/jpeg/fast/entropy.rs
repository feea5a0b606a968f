//! Entropy-coded data, without stuffing: bits, Huffman tables that know two coefficients at a time, and blocks.
//!
//! Indices are masked or checked, bits beyond the end are zeros, and a block ends after 64 symbols at the latest,
//! whatever the bytes.

use super::super::scan::ZIGZAG;

/// Bits that one look at a table resolves. The more, the more often two coefficients are found at once; but the
/// tables of two components have to stay in the first-level cache, and all entries are as likely.
const LOOK: u32 = 11;
/// What the end of a block adds to the position.
const END: u32 = 128;
/// What an entry adds that has to be looked at more closely.
const CLOSER: u32 = 255;
/// Zeros after the data, so that a whole word can be read up to their last bit.
pub(super) const PADDING: usize = 64;

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
    /// A code that is in no table goes past the end of any block, and past where a block may end.
    const BAD: Self = Self {
        length: 1,
        run: 64,
        size: 1,
    };

    #[inline(always)]
    fn bits(self) -> u32 {
        self.length + self.size
    }

    /// Coefficients that it stands for, where it is not a first one.
    #[inline(always)]
    fn goes(self) -> u32 {
        match (self.run, self.size) {
            (15, 0) => 16,
            (_, 0) => END,
            (run, _) => run + 1,
        }
    }

    /// The number that follows it.
    #[inline(always)]
    fn number(self, held: u64) -> i32 {
        number(held, self.length, self.size)
    }
}

/// The codes of a Huffman table: all that there is to know, slowly.
struct Codes {
    /// By length: one more than the greatest code of it, moved up to 16 bits; 0 if there is none.
    ends: [u32; 17],
    /// By length: what, added to a code, gives the index of its symbol.
    offsets: [i32; 17],
    symbols: [u8; 256],
    is_dc: bool,
}

impl Codes {
    /// From 16 counts and the symbols. None for a table that is damaged, or whose numbers are longer than 8-bit samples
    /// can have.
    fn new(table: &[u8], is_dc: bool) -> Option<Self> {
        let (counts, listed) = table.split_first_chunk::<16>()?;
        let too_long = |&symbol: &u8| match is_dc {
            true => symbol > 11,
            false => symbol & 15 > 10,
        };
        if listed.len() > 256 || listed.iter().any(too_long) {
            return None;
        }
        let mut codes = Self {
            ends: [0; 17],
            offsets: [0; 17],
            symbols: [0; 256],
            is_dc,
        };
        codes.symbols[..listed.len()].copy_from_slice(listed);
        let (mut code, mut index) = (0, 0);
        for length in 1..=16 {
            let count = u32::from(counts[length - 1]);
            codes.offsets[length] = index as i32 - code as i32;
            code += count;
            index += count;
            // The code of ones alone is never used.
            if index as usize > listed.len() || count > 0 && code >= 1 << length {
                return None;
            }
            if count > 0 {
                codes.ends[length] = code << (16 - length);
            }
            code <<= 1;
        }
        Some(codes)
    }

    /// The symbol that the next bits begin with, whose code has at least so many of them.
    fn symbol(&self, held: u64, least: u32) -> Option<Symbol> {
        let next = (held >> 48) as u32;
        let length = (least..=16).find(|&length| next < self.ends[length as usize])?;
        let index = (next >> (16 - length)) as i32 + self.offsets[length as usize];
        let symbol = self.symbols[(index & 255) as usize];
        let (run, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
        let run = if self.is_dc { 0 } else { run };
        Some(Symbol { length, run, size })
    }

    /// The same in the middle of decoding.
    #[cold]
    #[inline(never)]
    fn rare(&self, held: u64, least: u32) -> Symbol {
        self.symbol(held, least).unwrap_or(Symbol::BAD)
    }

    /// What the next [`LOOK`] bits hold, if it is a whole code: by those bits, in order.
    fn singles(&self) -> Vec<Option<Symbol>> {
        let looked = |bits: u64| self.symbol(bits << (64 - LOOK), 1);
        let fits = |symbol: &Symbol| symbol.length <= LOOK;
        (0..1 << LOOK)
            .map(|bits| looked(bits).filter(fits))
            .collect()
    }
}

/// Where in the next [`LOOK`] bits a code can follow so many others, and which one: bits beyond those that are known
/// count as zeros, so only a code that fits means anything.
fn following(singles: &[Option<Symbol>], bits: usize, used: u32) -> Option<Symbol> {
    if used >= LOOK {
        return None;
    }
    singles[(bits << used) & ((1 << LOOK) - 1)].filter(|next| used + next.length <= LOOK)
}

/// A table for first coefficients, which are differences.
pub(super) struct DcTable {
    /// By the next [`LOOK`] bits: the code's length, and 8 bits up the number's size; 0 for a code that is longer.
    sizes: Box<[u16; 1 << LOOK]>,
    codes: Codes,
}

impl DcTable {
    /// As the file has it. None if it is damaged.
    pub(super) fn new(table: &[u8]) -> Option<Self> {
        let codes = Codes::new(table, true)?;
        let mut sizes = Box::new([0; 1 << LOOK]);
        for (size, symbol) in sizes.iter_mut().zip(codes.singles()) {
            *size = symbol.map_or(0, |symbol| (symbol.length | symbol.size << 8) as u16);
        }
        Some(Self { sizes, codes })
    }
}

/// Up to two coefficients that the next [`LOOK`] bits hold, numbers and all. From the lowest: how many bits they take
/// (8 bits), how far they go together (8), how far the first goes (8), whether there are two (8), and their values (16
/// each). Where there is one, the second is at the same place.
///
/// The bits taken are lowest because shifts look at 6 bits of their count and no more: the next look at a table
/// waits for a load and a shift, and for nothing in between.
///
/// What is not all in those bits goes [`CLOSER`]; then the rest is a [`Symbol`], or 0 for a code that is longer.
#[derive(Clone, Copy)]
struct Step(u64);

impl Step {
    fn new(bits: usize, first: Symbol, second: Option<Symbol>) -> Self {
        let held = (bits as u64) << (64 - LOOK);
        let fits = |used: u32, symbol: &Symbol| used + symbol.bits() <= LOOK;
        if !fits(0, &first) {
            let symbol = first.length | first.size << 8 | first.run << 16;
            return Self(u64::from(CLOSER) << 8 | u64::from(symbol) << 32);
        }
        let second = second.filter(|second| fits(first.bits(), second));
        let value = |symbol: Symbol, held: u64| u64::from(symbol.number(held) as i16 as u16);
        // The end of a block is a zero somewhere further on, where nothing is yet.
        let mut step = u64::from(first.goes()) << 16 | value(first, held) << 32;
        let (mut bits, mut goes) = (first.bits(), first.goes());
        if let Some(second) = second {
            step |= 1 << 24 | value(second, held << bits) << 48;
            bits += second.bits();
            goes += second.goes();
        }
        step |= u64::from(bits) | u64::from(goes) << 8;
        Self(step)
    }

    #[inline(always)]
    fn goes(self) -> u32 {
        (self.0 >> 8) as u32 & 255
    }

    #[inline(always)]
    fn first_goes(self) -> u32 {
        (self.0 >> 16) as u32 & 255
    }

    #[inline(always)]
    fn is_pair(self) -> bool {
        self.0 >> 24 & 1 == 1
    }

    #[inline(always)]
    fn first(self) -> i16 {
        (self.0 >> 32) as i16
    }

    #[inline(always)]
    fn second(self) -> i16 {
        (self.0 >> 48) as i16
    }

    /// What goes [`CLOSER`].
    #[inline(always)]
    fn symbol(self) -> Option<Symbol> {
        let field = |at: u32| (self.0 >> at) as u32 & 255;
        let (length, size, run) = (field(32), field(40), field(48));
        (length > 0).then_some(Symbol { length, run, size })
    }
}

/// As many coefficients as begin in the next [`LOOK`] bits, to be stepped over. From the lowest: how many bits they take
/// (8 bits), how far they go (8), and how far all but the last go (8). [`CLOSER`] for a code that is longer.
#[derive(Clone, Copy)]
struct Leap(u32);

impl Leap {
    fn new(singles: &[Option<Symbol>], bits: usize) -> Self {
        let (mut used, mut goes, mut before) = (0, 0, 0);
        while let Some(next) = following(singles, bits, used)
            && goes < END
            && goes + next.goes() < CLOSER
        {
            before = goes;
            goes += next.goes();
            used += next.bits();
        }
        match goes {
            0 => Self(CLOSER << 8),
            _ => Self(used | goes << 8 | before << 16),
        }
    }

    #[inline(always)]
    fn goes(self) -> u32 {
        self.0 >> 8 & 255
    }

    #[inline(always)]
    fn before(self) -> u32 {
        self.0 >> 16
    }
}

/// A table for the coefficients after the first.
pub(super) struct AcTable {
    /// By the next [`LOOK`] bits.
    steps: Box<[Step; 1 << LOOK]>,
    leaps: Box<[Leap; 1 << LOOK]>,
    codes: Codes,
}

impl AcTable {
    /// As the file has it. None if it is damaged.
    pub(super) fn new(table: &[u8]) -> Option<Self> {
        let codes = Codes::new(table, false)?;
        let singles = codes.singles();
        let mut steps = Box::new([Step(u64::from(CLOSER) << 8); 1 << LOOK]);
        let mut leaps = Box::new([Leap(0); 1 << LOOK]);
        for (bits, (step, leap)) in steps.iter_mut().zip(leaps.iter_mut()).enumerate() {
            *leap = Leap::new(&singles, bits);
            if let Some(first) = singles[bits] {
                let second = match first.goes() {
                    END => None,
                    _ => following(&singles, bits, first.bits()),
                };
                *step = Step::new(bits, first, second);
            }
        }
        Some(Self {
            steps,
            leaps,
            codes,
        })
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
    /// How many of them there are, in its lowest 6 bits; what is above means nothing.
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
        let count = self.count & 63;
        self.held |= next >> count;
        self.at += (63 - count as usize) >> 3;
        self.count = count | 56;
    }

    /// Takes as many bits as the lowest 6 of `count` say.
    #[inline(always)]
    fn skip(&mut self, count: u32) {
        self.held = self.held.wrapping_shl(count);
        self.count = self.count.wrapping_sub(count);
    }

    /// Of the next bit.
    #[inline(always)]
    pub(super) fn position(&self) -> usize {
        8 * self.at - (self.count & 63) as usize
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

/// Decodes the first coefficient. False if its code is in no table.
#[inline(always)]
fn first(bits: &mut Bits<'_>, dc: &DcTable, previous: &mut i32) -> bool {
    bits.fill();
    let entry = u32::from(dc.sizes[(bits.held >> (64 - LOOK)) as usize]);
    let symbol = match entry {
        0 => dc.codes.rare(bits.held, LOOK + 1),
        _ => Symbol {
            length: entry & 255,
            run: 0,
            size: entry >> 8,
        },
    };
    *previous = previous.wrapping_add(symbol.number(bits.held));
    bits.skip(symbol.bits());
    symbol.run == 0
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
    (dc, ac): (&DcTable, &AcTable),
    previous: &mut i32,
    group: &mut Group,
    x: usize,
) -> bool {
    let is_good = first(bits, dc, previous);
    let x = x & 24;
    group.0[x] = *previous as i16;
    let mut put = |k: u32, value: i16| {
        let place = usize::from(PLACES[(k & 255) as usize]) + x;
        // SAFETY: places end at 7 * 32 + 7, and x at 24: below 256.
        unsafe { *group.0.get_unchecked_mut(place) = value };
    };
    let mut k = 1;
    'more: loop {
        bits.fill();
        let step = 'ordinary: {
            // Five times at most LOOK bits of 56.
            macro_rules! step {
                () => {{
                    let step = ac.steps[(bits.held >> (64 - LOOK)) as usize];
                    let after = k + step.goes();
                    if after >= 64 {
                        break 'ordinary step;
                    }
                    // In this order: where there is no second, the first is at the same place.
                    put(after, step.second());
                    put(k + step.first_goes(), step.first());
                    bits.skip(step.0 as u32);
                    k = after;
                }};
            }
            step!();
            step!();
            step!();
            step!();
            step!();
            continue 'more;
        };
        bits.fill();
        let symbol = if step.goes() == CLOSER {
            let symbol = step.symbol();
            symbol.unwrap_or_else(|| ac.codes.rare(bits.held, LOOK + 1))
        } else if step.is_pair() && k + step.first_goes() >= 64 {
            // The block ends with the first: what looks like a second is of the next block.
            ac.codes.rare(bits.held, 1)
        } else {
            put(k + step.first_goes(), step.first());
            if k + step.goes() == 64 && step.is_pair() {
                put(64, step.second());
            }
            bits.skip(step.0 as u32);
            return is_good && is_end(k + step.goes());
        };
        k += symbol.goes();
        put(k, symbol.number(bits.held) as i16);
        bits.skip(symbol.bits());
        if k >= 64 {
            return is_good && is_end(k);
        }
    }
}

/// Steps over a block. False if it goes past its end.
#[inline(always)]
pub(super) fn skip(
    bits: &mut Bits<'_>,
    (dc, ac): (&DcTable, &AcTable),
    previous: &mut i32,
) -> bool {
    let is_good = first(bits, dc, previous);
    let mut k = 1;
    'more: loop {
        bits.fill();
        let leap = 'ordinary: {
            // Twice at most LOOK bits and a number's 10, of 56.
            macro_rules! leap {
                () => {{
                    let leap = ac.leaps[(bits.held >> (64 - LOOK)) as usize];
                    let after = k + leap.goes();
                    if after >= 64 {
                        break 'ordinary leap;
                    }
                    bits.skip(leap.0);
                    k = after;
                }};
            }
            leap!();
            leap!();
            continue 'more;
        };
        if leap.goes() != CLOSER && k + leap.before() < 64 {
            bits.skip(leap.0);
            return is_good && is_end(k + leap.goes());
        }
        // A long code, or the block ends before the last of them.
        bits.fill();
        let symbol = ac.codes.rare(bits.held, 1);
        k += symbol.goes();
        bits.skip(symbol.bits());
        if k >= 64 {
            return is_good && is_end(k);
        }
    }
}

/// Takes the entropy-coded data up to the next marker into `out`, without stuffing and with [`PADDING`] zeros at the
/// end. False if the file ends before a marker comes.
pub(super) fn unstuff(data: &[u8], out: &mut Vec<u8>) -> bool {
    out.clear();
    out.reserve(data.len() + PADDING);
    let mut rest = data;
    let is_ended = loop {
        let Some(ones) = memchr::memchr(0xff, rest) else {
            out.extend_from_slice(rest);
            break false;
        };
        match rest.get(ones + 1) {
            Some(0) => {
                out.extend_from_slice(&rest[..=ones]);
                rest = &rest[ones + 2..];
            }
            marker => {
                out.extend_from_slice(&rest[..ones]);
                break marker.is_some();
            }
        }
    };
    out.extend_from_slice(&[0; PADDING]);
    is_ended
}

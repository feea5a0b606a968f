//! Entropy-coded data, without stuffing: bits, Huffman tables that know coefficients with their numbers, and blocks of
//! two images at once.
//!
//! Each look at a table waits for the one before, so two images take turns, and one works while the other waits. And
//! nothing depends on a guess: where a block ends is chosen between two tables, not branched on, so the CPU need not take
//! back what it did, for either of them. Bits beyond the end are zeros, and a block ends after 64 symbols at the latest,
//! whatever the bytes.

use std::hint::select_unpredictable as select;
use std::iter::repeat_n;
use std::mem::replace;
use std::ops::Range;
use std::ptr::null;
use std::sync::Arc;

use super::super::scan::ZIGZAG;
use super::simd::Level;

/// Bits that one look at a table resolves. The more, the more is found at once, and the less of the tables is in the
/// first-level cache.
const LOOK: u32 = 11;
/// Looks between two fills, which make sure of 56 bits.
const LOOKS: u32 = 3;
/// Bits that a look may take beyond its own: the end of a number whose sign is within them.
const TAIL: u32 = 56 / LOOKS - LOOK;
/// In a count, bits that were taken are below this one, and the last coefficient that is known is from it on: one
/// addition counts both.
const UP: u32 = 8;
/// Set in the count of a block whose first coefficient is not known: -1.
const BEFORE: u64 = u64::MAX << UP;
/// The last coefficient.
const LAST: u64 = 63;
/// What the end of a block adds to the index of its last coefficient. It comes after any but the last.
const END: u8 = 129;
/// This bit of an index says that the block is over before what was found, or that a look was not enough.
const ODD: u8 = 64;
/// Zeros after the data, so that a whole word can be read up to their last bit.
pub(super) const PADDING: usize = 64;

/// A code as a table has it.
#[derive(Clone, Copy)]
struct Symbol {
    /// Of the code, in bits.
    length: u8,
    /// Zeros before the coefficient.
    run: u8,
    /// Of the number that follows, in bits.
    size: u8,
}

impl Symbol {
    #[inline(always)]
    fn length(self) -> u32 {
        self.length.into()
    }

    #[inline(always)]
    fn bits(self) -> u32 {
        u32::from(self.length) + u32::from(self.size)
    }

    /// Coefficients that it stands for; none for the end of a block, where it is not a first one.
    #[inline(always)]
    fn goes(self, is_dc: bool) -> Option<u8> {
        match (self.run, self.size) {
            _ if is_dc => Some(1),
            (15, 0) => Some(16),
            (_, 0) => None,
            (run, _) => Some(run + 1),
        }
    }
}

/// The codes of a Huffman table.
struct Codes {
    /// By the next [`LOOK`] bits, where they hold a whole code.
    short: Vec<Option<Symbol>>,
    /// By the next 16 bits, from those on with which longer codes begin.
    long: Vec<Option<Symbol>>,
    begin: usize,
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
        // Codes follow each other by length, so what they begin with does too.
        let (mut short, mut long) = (vec![], vec![]);
        let mut listed = listed;
        let mut code = 0;
        for (length, &count) in (1..=16).zip(counts) {
            let (symbols, rest) = listed.split_at_checked(count.into())?;
            listed = rest;
            code += u32::from(count);
            // The code of ones alone is never used.
            if count > 0 && code >= 1 << length {
                return None;
            }
            code <<= 1;
            for &symbol in symbols {
                let symbol = Symbol {
                    length: length as u8,
                    run: if is_dc { 0 } else { symbol >> 4 },
                    size: symbol & 15,
                };
                match length {
                    ..=LOOK => short.extend(repeat_n(Some(symbol), 1 << (LOOK - length))),
                    _ => long.extend(repeat_n(Some(symbol), 1 << (16 - length))),
                }
            }
        }
        let begin = short.len() << (16 - LOOK);
        short.resize(1 << LOOK, None);
        Some(Self {
            short,
            long,
            begin,
            is_dc,
        })
    }

    /// The symbol that the next bits begin with.
    #[inline]
    fn symbol(&self, held: u64) -> Option<Symbol> {
        let next = (held >> 48) as usize;
        match next.checked_sub(self.begin) {
            None => self.short[next >> (16 - LOOK)],
            Some(next) => self.long.get(next).copied().flatten(),
        }
    }
}

/// What the next [`LOOK`] bits hold: coefficients with their numbers, and the end of a block. Each field is loaded where it
/// is needed, which takes less than shifts.
#[derive(Clone, Copy)]
struct Step {
    way: Way,
    found: Found,
}

/// What the next look waits for, little enough to stay in the first-level cache: what is added to a count, that is bits,
/// and [`UP`] from them coefficients and [`END`].
#[derive(Clone, Copy)]
struct Way(u16);

impl Way {
    const fn new(bits: u8, goes: u8) -> Self {
        Self(bits as u16 | (goes as u16) << UP)
    }
}

/// What nothing waits for.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Found {
    /// To the first and the last coefficient that is found.
    first_goes: u8,
    last_goes: u8,
    /// The bits to be read, moved down by this, and `last` make the last coefficient: bits beyond those that were looked
    /// at belong to it.
    shift: u8,
    /// The first coefficient, if it is not the last.
    first: i8,
    last: i16,
}

impl Step {
    /// What takes nothing, and goes on where nobody reads.
    const STAY: Self = Self {
        way: Way::new(0, 1),
        found: Found {
            first_goes: 1,
            last_goes: 1,
            shift: 0,
            first: 0,
            last: 0,
        },
    };
    /// From wherever in a block, it is [`ODD`].
    const CLOSER: Self = Self {
        way: Way::new(0, ODD + 1),
        ..Self::STAY
    };

    /// These coefficients, as the bits have them.
    fn new(symbols: &Symbols, ends: bool, held: u64) -> Self {
        let shift = 64 - LOOK - symbols.tail;
        Self {
            way: Way::new(
                symbols.used as u8,
                symbols.goes + if ends { END } else { 0 },
            ),
            found: Found {
                // The end alone is a zero where nothing is yet.
                first_goes: symbols.first_goes.max(1),
                last_goes: symbols.last_goes.max(1),
                shift: shift as u8,
                first: symbols.first as i8,
                last: symbols.last.wrapping_sub((held >> shift) as i16),
            },
        }
    }

    /// As many symbols as these bits hold, with two coefficients at most that are needed, or as many as there are, of which
    /// the first means something.
    fn gather(codes: [&Codes; 2], bits: usize, is_needed: bool) -> Self {
        let held = (bits as u64) << (64 - LOOK);
        let mask = (1 << LOOK) - 1;
        let begins = codes[0].is_dc;
        let mut symbols = Symbols::default();
        let mut count = 0;
        while symbols.used < LOOK {
            let used = symbols.used;
            let codes = codes[usize::from(count > 0)];
            let Some(symbol) = codes.short[(bits << used) & mask] else {
                break;
            };
            if used + symbol.length() > LOOK {
                break;
            }
            let Some(goes) = symbol.goes(begins && count == 0) else {
                symbols.used += symbol.length();
                return Self::new(&symbols, true, held);
            };
            let tail = (used + symbol.bits()).saturating_sub(LOOK);
            let has_sign = symbol.size == 0 || used + symbol.length() < LOOK;
            let is_kept = i8::try_from(symbols.first).is_ok();
            let is_full = is_needed && (count == 2 || !is_kept);
            if is_full || symbols.goes + goes > 63 || tail > TAIL || !has_sign {
                break;
            }
            // Bits beyond those looked at count as zeros here, and are added when they are known.
            let value = number(held << used, symbol.length(), symbol.size) as i16;
            if count == 0 {
                (symbols.first_goes, symbols.first) = (goes, value);
            }
            if count == 0 || is_needed {
                (symbols.last, symbols.last_goes, symbols.tail) =
                    (value, symbols.goes + goes, tail);
            }
            symbols.goes += goes;
            symbols.used += symbol.bits();
            count += 1;
        }
        match count {
            0 => Self::CLOSER,
            _ => Self::new(&symbols, false, held),
        }
    }
}

/// What some bits hold, on the way to a [`Step`].
#[derive(Default)]
struct Symbols {
    /// Bits of all symbols.
    used: u32,
    /// And those of them that were not looked at.
    tail: u32,
    goes: u8,
    first_goes: u8,
    last_goes: u8,
    first: i16,
    last: i16,
}

/// A table by the next [`LOOK`] bits.
struct Table {
    ways: [Way; 1 << LOOK],
    found: [Found; 1 << LOOK],
    /// [`PLACES`], at hand.
    places: [u8; 128],
}

/// What leads nowhere, after the last block.
static STAY: Table = Table {
    ways: [Step::STAY.way; 1 << LOOK],
    found: [Step::STAY.found; 1 << LOOK],
    places: PLACES,
};

/// How blocks of a component begin and go on.
struct Tables {
    first: Box<Table>,
    rest: Box<Table>,
}

impl Tables {
    fn new(dc: &Codes, ac: &Codes, is_needed: bool) -> Self {
        let table = |begin| {
            let mut table = Box::new(Table { ..STAY });
            let Table { ways, found, .. } = &mut *table;
            for (bits, (way, found)) in ways.iter_mut().zip(found).enumerate() {
                let step = Step::gather([begin, ac], bits, is_needed);
                (*way, *found) = (step.way, step.found);
            }
            table
        };
        Self {
            first: table(dc),
            rest: table(ac),
        }
    }
}

/// The codes of a component, for first coefficients, which are differences, and the others.
pub(super) struct Pair {
    dc: Codes,
    ac: Codes,
    steps: Tables,
    /// For what is not needed but for its first coefficients: more at once.
    leaps: Tables,
}

impl Pair {
    /// As the file has them. None if they are damaged.
    pub(super) fn new(dc: &[u8], ac: &[u8]) -> Option<Self> {
        let (dc, ac) = (Codes::new(dc, true)?, Codes::new(ac, false)?);
        Some(Self {
            steps: Tables::new(&dc, &ac, true),
            leaps: Tables::new(&dc, &ac, false),
            dc,
            ac,
        })
    }
}

/// A block to come, as it is read.
#[derive(Clone, Copy)]
struct Place {
    first: *const Table,
    rest: *const Table,
    /// Null where reading stays.
    pair: *const Pair,
    /// Where the block's first coefficient goes; the others are at their [`PLACES`] from there.
    at: *mut i16,
}

/// The blocks of a scan, some at a time.
pub(super) struct Stream {
    /// Ends with [`PADDING`] zeros.
    pub(super) data: Vec<u8>,
    /// The byte that `held` goes on with.
    at: usize,
    /// The next bits, from the top: 63, less those that were taken. What is below them is zeros, or comes after them too.
    held: u64,
    /// See [`UP`].
    count: u64,
    /// Tables of each component, to which places point, and its blocks in a unit.
    unit: Vec<(Arc<Pair>, usize)>,
    /// Where the first coefficients go, of blocks that are decoded and of those that are passed over.
    turns: Vec<usize>,
    /// Of those that are passed over, the first.
    passed: usize,
    /// One for each turn, and two more.
    places: Vec<Place>,
    /// Where reading is, and where it stays.
    place: usize,
    end: usize,
    /// What would be there.
    replaced: Option<Place>,
    is_good: bool,
    /// What is decoded, and one more group for what means nothing.
    groups: Vec<Group>,
}

impl Stream {
    /// Of nothing yet.
    pub(super) fn new() -> Self {
        Self {
            data: vec![0; PADDING],
            at: 0,
            held: 0,
            count: BEFORE,
            unit: vec![],
            turns: vec![],
            passed: 0,
            places: vec![],
            place: 0,
            end: 0,
            replaced: None,
            is_good: true,
            groups: vec![],
        }
    }

    /// Begins with the data that have been put here. Blocks come in units, so many of each component with these tables, as
    /// many as there are groups in all: some to be decoded to these groups, one of four there, and as many units as are
    /// passed over at once.
    pub(super) fn start(
        &mut self,
        unit: &[(Arc<Pair>, usize)],
        needed: impl Iterator<Item = (usize, usize)>,
        passed: usize,
    ) {
        self.unit.clear();
        self.unit.extend_from_slice(unit);
        let groups = unit.iter().map(|(_, count)| count).sum::<usize>();
        self.groups.resize(groups + 1, Group::ZERO);
        self.turns.clear();
        let needed = needed.map(|(group, x)| 256 * group + 8 * x);
        self.turns.extend(needed);
        self.passed = self.turns.len();
        // Their first coefficients go side by side, each over what was written of the block before.
        self.turns.extend(0..passed * groups);
        let coefficients: *mut i16 = self.groups.as_mut_ptr().cast();
        self.places.clear();
        let (needed, passed) = self.turns.split_at(self.passed);
        for (turns, is_needed) in [(needed, true), (passed, false)] {
            let blocks = unit.iter().cycle();
            let blocks = blocks.flat_map(|(pair, count)| repeat_n(pair, *count));
            for (&at, pair) in turns.iter().zip(blocks) {
                let tables = match is_needed {
                    true => &pair.steps,
                    false => &pair.leaps,
                };
                assert!(at + usize::from(PLACES[64]) < 256 * self.groups.len());
                self.places.push(Place {
                    first: &raw const *tables.first,
                    rest: &raw const *tables.rest,
                    pair: Arc::as_ptr(pair),
                    // SAFETY: as asserted.
                    at: unsafe { coefficients.add(at) },
                });
            }
        }
        let stay = self.stay();
        self.places.extend([stay; 2]);
        (self.place, self.replaced) = (0, None);
        self.seek(0);
    }

    /// What stands after the last block, and writes to where nobody reads.
    fn stay(&mut self) -> Place {
        let unread = self.groups.len() - 1;
        Place {
            first: &raw const STAY,
            rest: &raw const STAY,
            pair: null(),
            // SAFETY: the last of them.
            at: unsafe { self.groups.as_mut_ptr().add(unread) }.cast(),
        }
    }

    /// Goes on from this bit, where a unit begins.
    pub(super) fn seek(&mut self, bit: usize) {
        let (byte, bits) = (bit / 8, (bit % 8) as u32);
        let next = self.data.get(byte..).and_then(|data| data.first_chunk());
        self.held = u64::from_be_bytes(*next.unwrap_or(&[0; 8])) << bits;
        // As if 56 bits had been held.
        (self.at, self.count) = (byte + 7, BEFORE | (7 + u64::from(bits)));
    }

    /// Of the next bit.
    pub(super) fn position(&self) -> usize {
        8 * self.at + (self.count & 63) as usize - 63
    }

    /// Whether bits were taken that the data do not have.
    pub(super) fn is_over(&self) -> bool {
        self.position() > 8 * (self.data.len() - PADDING)
    }

    /// Blocks that are decoded come from now on, into groups of zeros.
    pub(super) fn clear(&mut self) {
        self.groups.fill(Group::ZERO);
    }

    /// What is to be read next: of the blocks that are decoded or of those that are passed over, these.
    pub(super) fn begin(&mut self, is_needed: bool, blocks: Range<usize>) {
        let from = if is_needed { 0 } else { self.passed };
        self.count |= BEFORE;
        (self.place, self.end) = (from + blocks.start, from + blocks.end);
        let stay = self.stay();
        self.replaced = Some(replace(&mut self.places[self.end], stay));
    }

    /// Whether what is read is decoded.
    #[inline(always)]
    fn is_needed(&self) -> bool {
        self.end <= self.passed
    }

    /// Whether all of that has been read. False as well where it is damaged.
    pub(super) fn is_done(&self) -> bool {
        self.place == self.end || !self.is_good
    }

    /// Adds up the first coefficients of what was read, which are differences. False if it is damaged.
    pub(super) fn finish(&mut self, blocks: usize, previous: &mut [i32; 3]) -> bool {
        if let Some(place) = self.replaced.take() {
            self.places[self.end] = place;
        }
        let coefficients = Group::flat(&mut self.groups);
        let turns = &self.turns[self.end - blocks..self.end];
        let all = self.unit.iter().map(|(_, count)| count).sum();
        let mut first = 0;
        for (&(_, count), previous) in self.unit.iter().zip(previous) {
            let mut value = *previous;
            for unit in turns.chunks_exact(all) {
                for &at in &unit[first..first + count] {
                    value = value.wrapping_add(i32::from(coefficients[at]));
                    coefficients[at] = value as i16;
                }
            }
            *previous = value;
            first += count;
        }
        replace(&mut self.is_good, true)
    }

    pub(super) fn groups(&self) -> &[Group] {
        &self.groups
    }
}

/// A stream while it is read: what changes with every look, and should stay in registers, and what is asked between looks.
struct Reader {
    held: u64,
    count: u64,
    table: *const Table,
    place: *const Place,
    /// See [`Stream::at`], and where the last eight bytes begin.
    at: *const u8,
    last: *const u8,
    /// Before which reading ends.
    end: *const Place,
}

impl Reader {
    #[inline(always)]
    fn new(stream: &Stream) -> Self {
        assert!(stream.place < stream.places.len() && stream.end < stream.places.len());
        // SAFETY: they are there.
        let (place, end) = unsafe {
            let places = stream.places.as_ptr();
            (&*places.add(stream.place), places.add(stream.end))
        };
        Self {
            held: stream.held,
            count: stream.count,
            table: if stream.count >= BEFORE {
                place.first
            } else {
                place.rest
            },
            // From the pointer to all of them, for it moves.
            place: stream.places.as_ptr().wrapping_add(stream.place),
            at: stream.data.as_ptr().wrapping_add(stream.at),
            last: &raw const stream.data[stream.data.len() - 8],
            end,
        }
    }

    /// Leaves the stream where it was read to.
    #[inline(always)]
    fn leave(self, stream: &mut Stream, is_good: bool) {
        (stream.held, stream.count) = (self.held, self.count);
        stream.at = self.at.addr() - stream.data.as_ptr().addr();
        stream.place = (self.place.addr() - stream.places.as_ptr().addr()) / size_of::<Place>();
        stream.is_good &= is_good;
    }

    /// Makes sure of 56 bits. What is added was read from where the last time led, so nothing waits for it.
    #[inline(always)]
    fn fill(&mut self) {
        let next = match self.at <= self.last {
            // SAFETY: eight bytes before the end at least.
            true => unsafe { self.at.cast::<[u8; 8]>().read() },
            false => [0; 8],
        };
        let taken = self.count as u32 & 63;
        self.held |= u64::from_be_bytes(next).wrapping_shr(!taken);
        self.at = self.at.wrapping_add((taken / 8) as usize);
        // Whole bytes are not taken any more.
        self.count &= !(63 - 7);
    }

    /// Whether nothing more is to be read.
    #[inline(always)]
    fn is_done(&self) -> bool {
        self.place == self.end
    }

    /// The last coefficient that is known, or -1.
    #[inline(always)]
    fn k(&self) -> isize {
        self.count as isize >> UP
    }

    /// Takes what the next bits hold. False, and nothing is taken, if a look is not enough.
    #[inline(always)]
    fn look<const IS_NEEDED: bool>(&mut self) -> bool {
        let next = (self.held >> (64 - LOOK)) as usize;
        // SAFETY: it is one of the stream's, and has a step for as many bits, which is one for this place.
        let table = unsafe { &*self.table };
        let way = u64::from(table.ways[next].0);
        let after = self.count.wrapping_add(way);
        if after & u64::from(ODD) << UP != 0 {
            return false;
        }
        let found = &table.found[next];
        // SAFETY: a step that ends a block leads to the next one; there is none where reading stays, behind the last block,
        // and a place after that. Indices are below 64 before, and what steps add to them to find a place is so too.
        // There is room for all `PLACES` wherever blocks begin.
        unsafe {
            let (at, k) = ((*self.place).at, self.k());
            // If there is one alone, it is the last, at the same place.
            let moved = self.held.wrapping_shr(u32::from(found.shift)) as i16;
            let last = found.last.wrapping_add(moved);
            if IS_NEEDED {
                let put = |goes: u8, value: i16| {
                    let place = *table.places.as_ptr().offset(k.wrapping_add(goes.into()));
                    at.add(usize::from(place)).write(value);
                };
                put(found.first_goes, i16::from(found.first));
                put(found.last_goes, last);
            } else {
                // The first of a block is all that is wanted, at the first place; what follows goes after that.
                at.offset(k + 1).write(last);
            }
            let is_end = after >= LAST << UP;
            let next = self.place.add(1);
            let (first, rest) = (known((*next).first), known((*self.place).rest));
            self.table = select(is_end, first, rest);
            self.place = select(is_end, next, self.place);
            self.count = select(is_end, after | BEFORE, after);
        }
        // The lowest six bits of it count.
        self.held = self.held.wrapping_shl(way as u32);
        true
    }

    /// Takes the next symbol, whatever its length. False if there is none, or it goes past the end of its block.
    #[inline(always)]
    fn closer(&mut self) -> bool {
        self.fill();
        // SAFETY: it is one of the stream's.
        let Some(pair) = (unsafe { (*self.place).pair.as_ref() }) else {
            return false;
        };
        let is_dc = self.count >= BEFORE;
        let codes = if is_dc { &pair.dc } else { &pair.ac };
        let Some(symbol) = codes.symbol(self.held) else {
            return false;
        };
        let value = number(self.held, symbol.length(), symbol.size) as i16;
        self.held <<= symbol.bits();
        let goes = symbol.goes(is_dc);
        let after = self.k() + isize::from(goes.unwrap_or(0));
        if after > LAST as isize {
            return false;
        }
        self.count = self
            .count
            .wrapping_add(Way::new(symbol.bits() as u8, goes.unwrap_or(0)).0.into());
        // SAFETY: there is room for all `PLACES` wherever blocks begin; after a block there is another place.
        unsafe {
            if goes.is_some() {
                let place = PLACES[after as usize];
                (*self.place).at.add(usize::from(place)).write(value);
                self.table = (*self.place).rest;
            }
            if after == LAST as isize || goes.is_none() {
                self.place = self.place.add(1);
                self.table = (*self.place).first;
                self.count |= BEFORE;
            }
        }
        true
    }
}

/// The number of `size` bits from bit `at` on; those that begin with a zero are negative.
#[inline(always)]
fn number(held: u64, at: u32, size: u8) -> i32 {
    let next = held << at;
    // Two steps, because a shift by 64 is none.
    let value = (next >> 1 >> (63 - size)) as i32;
    let negative = !((next as i64 >> 63) as i32);
    value - (negative & ((1 << size) - 1))
}

/// Where coefficients belong in a [`Group`]. There is none past the last, but whoever looks for one harms nobody.
const PLACES: [u8; 128] = {
    let mut places = [7 * 32 + 7; 128];
    let mut k = 0;
    while k < 64 {
        places[k] = ZIGZAG[k] / 8 * 32 + ZIGZAG[k] % 8;
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

    /// Of four blocks at most, in rows; the others are zeros.
    #[inline(always)]
    pub(super) fn of<'a>(blocks: impl Iterator<Item = &'a [i16; 64]>) -> Self {
        let mut group = Self::ZERO;
        for (i, block) in blocks.enumerate() {
            for (to, from) in group
                .0
                .as_chunks_mut::<32>()
                .0
                .iter_mut()
                .zip(block.as_chunks().0)
            {
                to.as_chunks_mut::<8>().0[i] = *from;
            }
        }
        group
    }

    /// Coefficients one after the other.
    fn flat(groups: &mut [Self]) -> &mut [i16] {
        // SAFETY: a group is 256 of them and nothing else.
        unsafe { std::slice::from_raw_parts_mut(groups.as_mut_ptr().cast(), 256 * groups.len()) }
    }
}

/// The same, read now: of two that were read one can be chosen at once, while the compiler would rather choose where to
/// read, and wait for that.
#[inline(always)]
fn known<T>(mut x: *const T) -> *const T {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: there is no instruction.
    unsafe {
        std::arch::asm!("/* {0} */", inout(reg) x, options(pure, readonly, nostack, preserves_flags));
    }
    x
}

/// Decodes blocks of two streams, until one has no more to be read or is damaged; or of one alone.
///
/// # Safety
/// The level is available.
pub(super) unsafe fn read(level: Level, first: &mut Stream, second: Option<&mut Stream>) {
    match (level, second) {
        (Level::Portable, None) => read_one(first),
        (Level::Portable, Some(second)) => read_two(first, second),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller's word.
        (Level::Avx2 | Level::Avx512, None) => unsafe { read_one_bmi(first) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        (Level::Avx2 | Level::Avx512, Some(second)) => unsafe { read_two_bmi(first, second) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("no other level is available"),
    }
}

/// With shifts that change no flags.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "bmi1,bmi2")]
fn read_two_bmi(first: &mut Stream, second: &mut Stream) {
    read_two(first, second);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "bmi1,bmi2")]
fn read_one_bmi(stream: &mut Stream) {
    read_one(stream);
}

#[inline(always)]
fn read_two(first: &mut Stream, second: &mut Stream) {
    match (first.is_needed(), second.is_needed()) {
        (true, true) => both::<true, true>(first, second),
        (true, false) => both::<true, false>(first, second),
        (false, true) => both::<true, false>(second, first),
        (false, false) => both::<false, false>(first, second),
    }
}

#[inline(always)]
fn read_one(stream: &mut Stream) {
    match stream.is_needed() {
        true => alone::<true>(stream),
        false => alone::<false>(stream),
    }
}

#[inline(always)]
fn both<const A: bool, const B: bool>(first: &mut Stream, second: &mut Stream) {
    let (mut a, mut b) = (Reader::new(first), Reader::new(second));
    let mut is_good = [true; 2];
    'fill: while !a.is_done() && !b.is_done() {
        a.fill();
        b.fill();
        'b: {
            'a: {
                for _ in 0..LOOKS {
                    if !a.look::<A>() {
                        break 'a;
                    }
                    if !b.look::<B>() {
                        break 'b;
                    }
                }
                continue 'fill;
            }
            if !a.closer() {
                is_good[0] = false;
                break 'fill;
            }
            continue 'fill;
        }
        if !b.closer() {
            is_good[1] = false;
            break;
        }
    }
    a.leave(first, is_good[0]);
    b.leave(second, is_good[1]);
}

#[inline(always)]
fn alone<const A: bool>(stream: &mut Stream) {
    let mut reader = Reader::new(stream);
    let mut is_good = true;
    while is_good && !reader.is_done() {
        reader.fill();
        is_good = (0..LOOKS).all(|_| reader.look::<A>()) || reader.closer();
    }
    reader.leave(stream, is_good);
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

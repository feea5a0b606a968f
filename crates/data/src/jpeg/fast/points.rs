//! Places inside a scan where decoding can begin, so that what lies before a crop need not be read bit by bit.
//!
//! Huffman codes have no landmarks: without these, all that is above and beside a crop is decoded and thrown away. A
//! point is where a unit begins, in bits of the data without stuffing, and what the first coefficients of its blocks
//! are differences from. The points of a file are a by-product of reading it once to its end.

use super::entropy::Stream;

/// Blocks from a point to the next, about: fewer points are smaller, more have less to be read before a crop.
const BLOCKS: usize = 24;

/// Where a unit begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Point {
    bit: u32,
    previous: [i16; 3],
}

impl Point {
    /// None for data that are longer, or values that are greater, than those of any photograph.
    fn new(bit: usize, previous: [i32; 3]) -> Option<Self> {
        let bit = u32::try_from(bit).ok()?;
        let mut point = Self {
            bit,
            ..Self::default()
        };
        for (point, previous) in point.previous.iter_mut().zip(previous) {
            *point = i16::try_from(previous).ok()?;
        }
        Some(point)
    }

    pub(super) fn bit(self) -> usize {
        self.bit as usize
    }

    pub(super) fn previous(self) -> [i32; 3] {
        self.previous.map(i32::from)
    }
}

/// The points of a file: one every so many units, without the first, which is where the data begin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Points(Vec<Point>);

/// Units from a point to the next, where a unit has so many blocks.
pub(super) fn step(blocks: usize) -> usize {
    (BLOCKS / blocks).max(1)
}

impl Points {
    /// As many bytes for each point: its bit, and a value for each of the components.
    pub(crate) fn to_bytes(&self, components: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.0.len() * (4 + 2 * components));
        for point in &self.0 {
            bytes.extend(point.bit.to_le_bytes());
            let previous = point.previous.iter().take(components);
            bytes.extend(previous.flat_map(|value| value.to_le_bytes()));
        }
        bytes
    }

    /// What [`Points::to_bytes`] gave.
    pub(super) fn of_bytes(bytes: &[u8], components: usize) -> Option<Self> {
        let chunks = bytes.chunks_exact(4 + 2 * components);
        if !chunks.remainder().is_empty() {
            return None;
        }
        let point = |chunk: &[u8]| {
            let (bit, values) = chunk.split_first_chunk()?;
            let mut previous = [0; 3];
            for (previous, value) in previous.iter_mut().zip(values.as_chunks().0) {
                *previous = i16::from_le_bytes(*value);
            }
            let bit = u32::from_le_bytes(*bit);
            Some(Point { bit, previous })
        };
        chunks.map(point).collect::<Option<_>>().map(Self)
    }

    /// Whether these can be points of data of so many units and bits.
    pub(super) fn fit(&self, units: usize, step: usize, bits: usize) -> bool {
        self.0.len() == units.saturating_sub(1) / step
            && self.0.is_sorted_by(|a, b| a.bit < b.bit)
            && self.0.last().is_none_or(|last| last.bit() < bits)
    }

    /// The last point at or before a unit, and its unit; none before the second point.
    #[inline(always)]
    pub(super) fn before(&self, unit: usize, step: usize) -> Option<(usize, Point)> {
        let index = unit / step;
        let point = self.0.get(index.checked_sub(1)?)?;
        Some((index * step, *point))
    }
}

/// Makes points while units pass by.
pub(super) struct Maker {
    points: Option<Points>,
    /// The unit of the next point; never reached if none are wanted.
    next: usize,
    step: usize,
}

impl Maker {
    pub(super) fn new(is_wanted: bool, step: usize) -> Self {
        Self {
            points: is_wanted.then(Points::default),
            next: if is_wanted { step } else { usize::MAX },
            step,
        }
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.points.is_some()
    }

    /// The unit where the next point is.
    #[inline(always)]
    pub(super) fn next(&self) -> usize {
        self.next
    }

    /// Unit `at` begins here.
    #[inline(always)]
    pub(super) fn see(&mut self, at: usize, stream: &Stream, previous: [i32; 3]) {
        if at == self.next {
            self.note(stream.position(), previous);
        }
    }

    #[inline(never)]
    fn note(&mut self, bit: usize, previous: [i32; 3]) {
        self.next += self.step;
        match (Point::new(bit, previous), &mut self.points) {
            (Some(point), Some(points)) => points.0.push(point),
            _ => (self.points, self.next) = (None, usize::MAX),
        }
    }

    /// Whether what was noted is worth anything.
    pub(super) fn keep(&mut self, is_good: bool) {
        self.points.take_if(|_| !is_good);
    }

    pub(super) fn finish(&mut self) -> Option<Points> {
        self.points.take()
    }
}

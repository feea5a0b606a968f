//! How convolution weights lie in memory: in panels of as many output channels as a tile has, so that a tile reads
//! them in one stream.

use graph::Geometry;

/// Input channels that are packed together; one panel's depth runs over all taps of a chunk before the next chunk.
pub(crate) const CHUNK: usize = 64;

/// Weights as `[outputs / nr][inputs / CHUNK][taps][CHUNK][nr]`: the last chunk has only the channels that are left,
/// the last panel is filled up with zeros. Masters, momentum and gradients lie like this too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Panels {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) taps: usize,
    pub(crate) nr: usize,
}

impl Panels {
    /// The weights of a convolution.
    pub(crate) fn of(g: &Geometry, nr: usize) -> Self {
        Self {
            inputs: g.input.c,
            outputs: g.output.c,
            taps: g.kernel * g.kernel,
            nr,
        }
    }

    /// Panels of output channels.
    pub(crate) fn count(&self) -> usize {
        self.outputs.div_ceil(self.nr)
    }

    /// Length of a dot product.
    pub(crate) fn depth(&self) -> usize {
        self.inputs * self.taps
    }

    /// Values of one panel.
    pub(crate) fn panel_len(&self) -> usize {
        self.depth() * self.nr
    }

    /// Values in all, the filling included.
    pub(crate) fn len(&self) -> usize {
        self.count() * self.panel_len()
    }

    /// Where the rows of `nr` outputs for one tap and the first input of a chunk start, within a panel.
    pub(crate) fn rows(&self, chunk: usize, tap: usize) -> usize {
        let first = chunk * CHUNK;
        (first * self.taps + tap * (self.inputs - first).min(CHUNK)) * self.nr
    }

    /// Where the weight of output `o`, input `i` and tap `tap` (row-major) lies.
    pub(crate) fn at(&self, o: usize, i: usize, tap: usize) -> usize {
        let row = self.rows(i / CHUNK, tap) + i % CHUNK * self.nr;
        o / self.nr * self.panel_len() + row + o % self.nr
    }
}

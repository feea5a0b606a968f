//! From a graph to a program: fused kernels in order, and a place in one arena for every buffer.
//!
//! Three kinds of values exist at run time. What a convolution, a pool or a sum produces is *stored*. A normalisation
//! (with its ReLU) that only a convolution, a pool or a sum reads is *lazy*: it is applied by whoever reads it, from
//! the stored convolution and two numbers per channel. In inference it is *folded* into the convolution before it.
//!
//! The backward pass visits the operations in reverse. What reads a value hands it a gradient; the last to do so
//! *closes* the value: it adds what the others handed in, zeroes what a ReLU had off, and gathers the two sums per
//! channel that the normalisations before it need (see [`Close`]). So neither pass has a pass of its own for
//! normalisation, ReLU or sum, but for the sum at the end of a residual block.

use crate::{Graph, NormId, Op, ParamId, Plane, ValueId};

/// What an engine can do and wants. Everything is a function of shapes, never of the number of threads.
pub trait Caps {
    /// Alignment of buffers in the arena, bytes.
    fn alignment(&self) -> usize;
    /// Bytes of a stored value of an activation or its gradient. Small tensors (statistics, pooled features, logits)
    /// are f32.
    fn element(&self) -> usize;
    /// Whether convolutions and their gradients normalise what they read. If not, kernels of their own store what they
    /// would read, [`Kernel::Sum`] and [`Kernel::NormBackward`].
    fn normalises_operands(&self) -> bool {
        true
    }
    /// Whether a folded convolution reads the residual that it adds just before it stores the sum, so that the sum may
    /// take its place.
    fn adds_in_place(&self) -> bool {
        false
    }
    /// Channels of the stored image, at least those that it has; the rest is zero. Of more than an image has, as many.
    fn image_channels(&self, channels: usize) -> usize {
        channels
    }
    /// For y = x * w.
    fn forward(&self, geometry: &Geometry, batch: usize) -> Needs;
    /// For the gradient of x.
    fn backward_input(&self, geometry: &Geometry, batch: usize) -> Needs;
    /// For the gradient of w.
    fn backward_weight(&self, geometry: &Geometry, batch: usize) -> Needs;
    /// For a kernel that visits the pixels of a plane and closes a value.
    fn visit(&self, plane: Plane, batch: usize) -> Needs;
    /// Whether a folded convolution of inference runs together with the one that reads its results, which are then
    /// still near.
    fn joins(&self, _first: &Geometry, _second: &Geometry, _batch: usize) -> bool {
        false
    }
}

/// Memory of a kernel besides its tensors, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Sums that its tasks leave behind.
    pub partials: usize,
    /// Weights in the order in which it reads them; 0 if that is the order of the parameters themselves.
    pub weights: usize,
    /// Working memory that its tasks share.
    pub shared: usize,
    /// Memory of each worker.
    pub worker: usize,
}

/// Training keeps what the backward pass reads; inference normalises with running statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// Forward, loss and backward.
    Train,
    /// Forward and loss.
    Infer,
}

/// Index of a buffer in [`Program::buffers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BufferId(pub usize);

/// A piece of the arena, or of the constants.
#[derive(Clone, Debug)]
pub struct Buffer {
    /// Where it starts, bytes.
    pub offset: usize,
    /// Its length, bytes.
    pub bytes: usize,
    /// First kernel that touches it.
    pub first: usize,
    /// Last kernel that touches it.
    pub last: usize,
    /// Lies in memory that is filled before the program runs and kept as long as the parameters are.
    pub constant: bool,
}

/// Sizes of a convolution, one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Input plane.
    pub input: Plane,
    /// Output plane.
    pub output: Plane,
    /// K.
    pub kernel: usize,
    /// Step between windows.
    pub stride: usize,
}

impl Geometry {
    /// Zeros above and left of the input.
    pub fn pad(&self) -> usize {
        (self.kernel - 1) / 2
    }

    /// Length of the dot product of one output element: K * K * C.
    pub fn depth(&self) -> usize {
        self.kernel * self.kernel * self.input.c
    }

    /// Whether the input rows already are the matrix (1 x 1, stride 1).
    pub fn is_matmul(&self) -> bool {
        self.kernel == 1 && self.stride == 1
    }

    /// Multiply-adds of one image.
    pub fn macs(&self) -> usize {
        self.depth() * self.output.elements()
    }
}

/// Rows of `channels` f32 in the state of a normalisation: mean, 1 / sqrt(var + eps), scale, shift, and the constants
/// a, b and c of its gradient, a g + b (z - mean) + c.
pub const STATE_ROWS: usize = 7;

/// A tensor as a kernel reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// As it is stored.
    Stored(BufferId),
    /// A lazy normalisation, with a ReLU perhaps.
    Normed {
        /// What is normalised.
        z: BufferId,
        /// Scale and shift.
        state: BufferId,
        /// max(0, ..).
        relu: bool,
    },
    /// The gradient of what a normalisation reads.
    Gradient {
        /// Gradient of what it produces.
        g: BufferId,
        /// What it reads.
        z: BufferId,
        /// Mean, a, b and c.
        state: BufferId,
    },
}

impl Operand {
    fn buffers(&self) -> Vec<BufferId> {
        match *self {
            Self::Stored(x) => vec![x],
            Self::Normed { z, state, .. } => vec![z, state],
            Self::Gradient { g, z, state } => vec![g, z, state],
        }
    }
}

/// A normalisation whose sums a closing kernel gathers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Normed {
    /// Which one.
    pub norm: NormId,
    /// What it reads.
    pub z: BufferId,
    /// Its state: mean is read, a, b and c are set.
    pub state: BufferId,
}

/// Which branches of images training drops; whoever trains says how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropPath {
    /// Number of the block, so that each draws on its own.
    pub block: usize,
    /// Its probability as a fraction of the network's, numerator and denominator.
    pub share: [usize; 2],
}

/// Which squares training drops; whoever trains says how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropBlock {
    /// Number among the network's, so that each draws on its own.
    pub number: usize,
    /// Side of a square in pixels; where the plane is smaller, the plane's.
    pub side: usize,
    /// The part of values that is dropped as a fraction of the network's, numerator and denominator.
    pub share: [usize; 2],
}

/// What is left of a tensor whose squares are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// A byte for each element: 1, or 0 where it is dropped.
    pub mask: BufferId,
    /// By what the rest is multiplied, one f32.
    pub scale: BufferId,
}

impl Dropped {
    fn buffers(self) -> [BufferId; 2] {
        [self.mask, self.scale]
    }
}

/// Squeeze and excitation: its parameters, and what the backward pass reads, images x channels f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Squeeze {
    /// Weight and bias to the hidden channels.
    pub reduce: [ParamId; 2],
    /// Weight and bias back.
    pub expand: [ParamId; 2],
    /// Channels between the two.
    pub hidden: usize,
    /// Means over the plane.
    pub mean: BufferId,
    /// The hidden channels, after the ReLU.
    pub inner: BufferId,
    /// Behind the sigmoid.
    pub sigmoid: BufferId,
}

impl Squeeze {
    fn buffers(&self) -> Vec<BufferId> {
        vec![self.mean, self.inner, self.sigmoid]
    }
}

/// What becomes of the gradient of a value as a kernel stores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Close {
    /// Others have still to add to it.
    Open {
        /// What was handed in before.
        add: Option<BufferId>,
    },
    /// The value is lazy: the gradient of the sum under the ReLU, with the sums of its normalisation.
    Lazy {
        /// The normalisation.
        normed: Normed,
        /// Whether there is a ReLU.
        relu: bool,
    },
    /// The value is stored: likewise, with the sums of every normalisation that it is the sum of.
    Stored {
        /// What was handed in before.
        add: Option<BufferId>,
        /// The value, if there is a ReLU.
        y: Option<BufferId>,
        /// The normalisations.
        normed: [Option<Normed>; 2],
    },
}

impl Close {
    /// The normalisations whose sums are gathered.
    pub fn normed(&self) -> impl Iterator<Item = Normed> {
        let both = match *self {
            Self::Open { .. } => [None, None],
            Self::Lazy { normed, .. } => [Some(normed), None],
            Self::Stored { normed, .. } => normed,
        };
        both.into_iter().flatten()
    }

    fn buffers(&self) -> Vec<BufferId> {
        let mut out: Vec<_> = self.normed().flat_map(|n| [n.z, n.state]).collect();
        match *self {
            Self::Open { add } => out.extend(add),
            Self::Lazy { .. } => {}
            Self::Stored { add, y, .. } => out.extend(add.into_iter().chain(y)),
        }
        out
    }
}

/// What a convolution does with its results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// Stores them.
    Nothing,
    /// Stores them and sets mean, 1 / std, scale and shift of a normalisation (training).
    Statistics {
        /// Whose.
        norm: NormId,
        /// Where.
        state: BufferId,
        /// Sums that tasks leave behind.
        partials: BufferId,
    },
    /// relu?(y + shift + residual), the normalisation's scale being in the weights (inference).
    Folded {
        /// Per channel; a constant.
        shift: BufferId,
        /// Added.
        residual: Option<BufferId>,
        /// max(0, ..).
        relu: bool,
    },
}

/// Sizes of a max-pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Input plane.
    pub input: Plane,
    /// Output plane.
    pub output: Plane,
    /// Side of the window.
    pub kernel: usize,
    /// Step between windows.
    pub stride: usize,
    /// Rows above and columns to the left that the first window hangs over.
    pub pad_before: usize,
}

/// One fused kernel. `x` is read, `y` is written, `d` is a gradient that is read, `dx` one that is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "the fields are named as in the formula of each variant"
)]
pub enum Kernel {
    /// Fills the constants of a convolution: its weights times the scale of the running normalisation, in the order
    /// in which it reads them, and the shift. `plain` is room for the product in the order of the parameters.
    Fold {
        geometry: Geometry,
        weight: ParamId,
        norm: NormId,
        plain: BufferId,
        weights: BufferId,
        shift: BufferId,
    },
    /// y = (pixels - mean) / std, from the batch that the caller hands in.
    Input { y: BufferId, plane: Plane },
    /// y = x * w. `weights` are those in the order in which the kernel reads them, packed first unless they are
    /// constants; none if the parameters lie like that.
    Conv {
        geometry: Geometry,
        weight: ParamId,
        weights: Option<BufferId>,
        shared: BufferId,
        x: Operand,
        y: BufferId,
        after: After,
    },
    /// The factors of an image's channels, images x channels f32: what squeeze and excitation make of x, times what is
    /// left of a path that may be dropped.
    Gate {
        plane: Plane,
        x: Operand,
        squeeze: Option<Squeeze>,
        path: Option<DropPath>,
        gate: BufferId,
    },
    /// y = relu?(x * gate + side), x as stored or a normalisation without ReLU.
    Sum {
        plane: Plane,
        x: Operand,
        gate: Option<BufferId>,
        side: Option<Operand>,
        relu: bool,
        y: BufferId,
    },
    /// Which squares are dropped of every image.
    DropBlock {
        plane: Plane,
        block: DropBlock,
        dropped: Dropped,
    },
    /// y = relu?(x + side) after squares of both were dropped, or of one.
    DroppedSum {
        plane: Plane,
        x: Operand,
        side: Option<Operand>,
        dropped: [Option<Dropped>; 2],
        relu: bool,
        y: BufferId,
    },
    /// dx = d where it was not dropped, scaled.
    DropBlockBackward {
        plane: Plane,
        dropped: Dropped,
        d: BufferId,
        dx: BufferId,
        close: Close,
        partials: BufferId,
    },
    /// y = window maxima of x; `argmax` keeps the winning tap (0..9), the first in row order on a tie.
    MaxPool {
        window: Window,
        x: Operand,
        y: BufferId,
        argmax: Option<BufferId>,
    },
    /// y = mean over the plane, f32.
    AvgPool {
        plane: Plane,
        x: BufferId,
        y: BufferId,
    },
    /// y = means over 2 x 2 windows of x.
    HalfPool {
        plane: Plane,
        x: BufferId,
        y: BufferId,
    },
    /// y = x w^T + b, all f32.
    Linear {
        inputs: usize,
        outputs: usize,
        weight: ParamId,
        bias: ParamId,
        x: BufferId,
        y: BufferId,
    },
    /// Cross-entropy and its gradient `d`, top-1 and top-5 hits.
    Loss {
        classes: usize,
        logits: BufferId,
        d: Option<BufferId>,
    },
    /// Gradients of weight, bias and x, all f32.
    LinearBackward {
        inputs: usize,
        outputs: usize,
        weight: ParamId,
        bias: ParamId,
        x: BufferId,
        d: BufferId,
        dx: BufferId,
    },
    /// Spreads d over the plane.
    AvgPoolBackward {
        plane: Plane,
        d: BufferId,
        dx: BufferId,
        close: Close,
        partials: BufferId,
    },
    /// Spreads d over the windows of 2 x 2; `plane` is that of dx.
    HalfPoolBackward {
        plane: Plane,
        d: BufferId,
        dx: BufferId,
        close: Close,
        partials: BufferId,
    },
    /// From g, the gradient of gate times a normalisation: the gradients of the gate's and the normalisation's
    /// parameters, and dz. `sums` are images x (5 channels + hidden channels) f32.
    GateBackward {
        plane: Plane,
        norm: NormId,
        g: BufferId,
        z: BufferId,
        state: BufferId,
        squeeze: Option<Squeeze>,
        path: Option<DropPath>,
        gate: BufferId,
        sums: BufferId,
        dz: BufferId,
    },
    /// Sends d to the winners.
    MaxPoolBackward {
        window: Window,
        argmax: BufferId,
        d: BufferId,
        dx: BufferId,
        close: Close,
        partials: BufferId,
    },
    /// dz = a g + b (z - mean) + c, the gradient of what a normalisation reads. `relu`: g counts as zero where
    /// z * scale + shift is not positive, whether or not the kernel that closed it has made it so.
    NormBackward {
        plane: Plane,
        g: BufferId,
        z: BufferId,
        state: BufferId,
        relu: bool,
        dz: BufferId,
    },
    /// Gradient of a convolution's x. `weights` are those turned round, packed first.
    ConvBackwardInput {
        geometry: Geometry,
        weight: ParamId,
        weights: BufferId,
        shared: BufferId,
        d: Operand,
        dx: BufferId,
        close: Close,
        partials: BufferId,
    },
    /// Gradient of a convolution's weight.
    ConvBackwardWeight {
        geometry: Geometry,
        weight: ParamId,
        x: Operand,
        d: Operand,
        shared: BufferId,
    },
}

impl Kernel {
    /// Every buffer that the kernel reads or writes.
    pub fn buffers(&self) -> Vec<BufferId> {
        match *self {
            Kernel::Fold {
                plain,
                weights,
                shift,
                ..
            } => vec![plain, weights, shift],
            Kernel::Input { y, .. } => vec![y],
            Kernel::Conv {
                weights,
                shared,
                x,
                y,
                after,
                ..
            } => {
                let mut out = x.buffers();
                out.extend([shared, y]);
                out.extend(weights);
                match after {
                    After::Nothing => {}
                    After::Statistics {
                        state, partials, ..
                    } => out.extend([state, partials]),
                    After::Folded {
                        shift, residual, ..
                    } => out.extend(residual.into_iter().chain([shift])),
                }
                out
            }
            Kernel::Gate {
                x, squeeze, gate, ..
            } => {
                let mut out = x.buffers();
                out.push(gate);
                out.extend(squeeze.iter().flat_map(Squeeze::buffers));
                out
            }
            Kernel::GateBackward {
                g,
                z,
                state,
                squeeze,
                gate,
                sums,
                dz,
                ..
            } => {
                let mut out = vec![g, z, state, gate, sums, dz];
                out.extend(squeeze.iter().flat_map(Squeeze::buffers));
                out
            }
            Kernel::Sum {
                x, gate, side, y, ..
            } => {
                let mut out = x.buffers();
                out.push(y);
                out.extend(gate);
                out.extend(side.iter().flat_map(Operand::buffers));
                out
            }
            Kernel::DropBlock { dropped, .. } => dropped.buffers().to_vec(),
            Kernel::DroppedSum {
                x,
                side,
                dropped,
                y,
                ..
            } => {
                let mut out = x.buffers();
                out.push(y);
                out.extend(side.iter().flat_map(Operand::buffers));
                out.extend(dropped.iter().flatten().flat_map(|d| d.buffers()));
                out
            }
            Kernel::DropBlockBackward {
                dropped,
                d,
                dx,
                close,
                partials,
                ..
            } => {
                let mut out = close.buffers();
                out.extend([d, dx, partials]);
                out.extend(dropped.buffers());
                out
            }
            Kernel::MaxPool { x, y, argmax, .. } => {
                let mut out = x.buffers();
                out.push(y);
                out.extend(argmax);
                out
            }
            Kernel::AvgPool { x, y, .. }
            | Kernel::HalfPool { x, y, .. }
            | Kernel::Linear { x, y, .. } => vec![x, y],
            Kernel::Loss { logits, d, .. } => {
                let mut out = vec![logits];
                out.extend(d);
                out
            }
            Kernel::LinearBackward { x, d, dx, .. } => vec![x, d, dx],
            Kernel::AvgPoolBackward {
                d,
                dx,
                close,
                partials,
                ..
            }
            | Kernel::HalfPoolBackward {
                d,
                dx,
                close,
                partials,
                ..
            } => {
                let mut out = close.buffers();
                out.extend([d, dx, partials]);
                out
            }
            Kernel::MaxPoolBackward {
                argmax,
                d,
                dx,
                close,
                partials,
                ..
            } => {
                let mut out = close.buffers();
                out.extend([argmax, d, dx, partials]);
                out
            }
            Kernel::NormBackward {
                g, z, state, dz, ..
            } => vec![g, z, state, dz],
            Kernel::ConvBackwardInput {
                weights,
                shared,
                d,
                dx,
                close,
                partials,
                ..
            } => {
                let mut out = close.buffers();
                out.extend(d.buffers());
                out.extend([weights, shared, dx, partials]);
                out
            }
            Kernel::ConvBackwardWeight { x, d, shared, .. } => {
                let mut out = x.buffers();
                out.extend(d.buffers());
                out.push(shared);
                out
            }
        }
    }

    /// Multiply-adds for a batch, as if every tap were multiplied.
    pub fn macs(&self, batch: usize) -> usize {
        let one = match self {
            Kernel::Conv { geometry, .. }
            | Kernel::ConvBackwardInput { geometry, .. }
            | Kernel::ConvBackwardWeight { geometry, .. } => geometry.macs(),
            Kernel::Linear {
                inputs, outputs, ..
            } => inputs * outputs,
            Kernel::LinearBackward {
                inputs, outputs, ..
            } => 2 * inputs * outputs,
            Kernel::Gate {
                plane,
                squeeze: Some(squeeze),
                ..
            } => 2 * plane.c * squeeze.hidden,
            Kernel::GateBackward {
                plane,
                squeeze: Some(squeeze),
                ..
            } => 4 * plane.c * squeeze.hidden,
            _ => 0,
        };
        one * batch
    }
}

/// Fused kernels in order and the memory they need, for one batch size and mode.
#[derive(Clone, Debug)]
pub struct Program {
    /// Images.
    pub batch: usize,
    /// What it is for.
    pub mode: Mode,
    /// Fill the constants; run again whenever parameters have changed.
    pub setup: Vec<Kernel>,
    /// In order of execution.
    pub kernels: Vec<Kernel>,
    /// Kernels that run together with the next one, see [`Caps::joins`].
    pub joined: Vec<usize>,
    /// Placed in the arena, or among the constants.
    pub buffers: Vec<Buffer>,
    /// Length of the arena.
    pub arena_bytes: usize,
    /// Length of the constants. An engine may order weights otherwise for another batch.
    pub constant_bytes: usize,
    /// What each worker needs besides.
    pub worker_bytes: usize,
    /// Where the logits are, `batch x classes` f32.
    pub logits: BufferId,
}

impl Program {
    /// Plans `graph` for `batch` images.
    ///
    /// # Panics
    /// If the graph has a shape that no network of `nn` records: a ReLU or sum that does not follow a normalisation,
    /// a normalisation that does not follow a convolution of its own, a shortcut that is the last reader of a value.
    pub fn new(graph: &Graph, caps: &dyn Caps, batch: usize, mode: Mode) -> Self {
        assert!(batch > 0, "a program needs at least one image");
        let mut planner = Planner::new(graph, caps, batch, mode);
        planner.forward();
        let logits = planner.value(graph.logits());
        if mode == Mode::Train {
            planner.backward();
        }
        let Planner {
            setup,
            kernels,
            mut buffers,
            worker_bytes,
            ..
        } = planner;
        let joined = joined(caps, batch, &kernels);
        // Setup runs before everything else, so what it uses is alive before kernel 0. Kernels that run together use
        // what they use at the same time.
        let steps = setup.iter().map(|k| (0..=0, k));
        let steps = steps.chain(kernels.iter().enumerate().map(|(i, k)| {
            let first = i - usize::from(i > 0 && joined.contains(&(i - 1)));
            (first + 1..=i + 1 + usize::from(joined.contains(&i)), k)
        }));
        for (times, kernel) in steps {
            for id in kernel.buffers() {
                let buffer = &mut buffers[id.0];
                buffer.first = buffer.first.min(*times.start());
                buffer.last = buffer.last.max(*times.end());
            }
        }
        buffers[logits.0].last = kernels.len() + 1; // predictions are read after the last kernel
        let (arena_bytes, constant_bytes) = place(&mut buffers, caps.alignment());
        Self {
            batch,
            mode,
            setup,
            kernels,
            joined,
            buffers,
            arena_bytes,
            constant_bytes,
            worker_bytes,
            logits,
        }
    }
}

/// The kernels that run together with the next one; no kernel is part of two pairs.
fn joined(caps: &dyn Caps, batch: usize, kernels: &[Kernel]) -> Vec<usize> {
    let mut out: Vec<usize> = vec![];
    for (i, pair) in kernels.windows(2).enumerate() {
        if out.last().is_some_and(|last| last + 1 == i) {
            continue;
        }
        let folded = |kernel: &Kernel| match *kernel {
            Kernel::Conv {
                geometry,
                x: Operand::Stored(x),
                y,
                after: After::Folded { .. },
                ..
            } => Some((geometry, x, y)),
            _ => None,
        };
        if let (Some((first, _, y)), Some((second, x, _))) = (folded(&pair[0]), folded(&pair[1]))
            && x == y
            && caps.joins(&first, &second, batch)
        {
            out.push(i);
        }
    }
    out
}

/// Gives every buffer the lowest offset that no buffer alive at the same time covers, largest first; constants come one
/// after another. Returns the lengths of both.
fn place(buffers: &mut [Buffer], alignment: usize) -> (usize, usize) {
    let mut constants = 0;
    for buffer in buffers.iter_mut().filter(|b| b.constant) {
        buffer.offset = constants;
        constants = (constants + buffer.bytes).next_multiple_of(alignment);
    }
    let mut order: Vec<usize> = (0..buffers.len())
        .filter(|&i| !buffers[i].constant)
        .collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(buffers[i].bytes), i));
    let mut placed: Vec<usize> = vec![];
    let mut end = 0;
    for &i in &order {
        let me = &buffers[i];
        let mut taken: Vec<(usize, usize)> = placed
            .iter()
            .map(|&j| &buffers[j])
            .filter(|b| b.first <= me.last && me.first <= b.last)
            .map(|b| (b.offset, b.offset + b.bytes))
            .collect();
        taken.sort_unstable();
        let mut offset = 0;
        for (from, to) in taken {
            if offset + me.bytes <= from {
                break;
            }
            offset = offset.max(to.next_multiple_of(alignment));
        }
        end = end.max(offset + me.bytes);
        buffers[i].offset = offset;
        placed.push(i);
    }
    (end.next_multiple_of(alignment), constants)
}

/// A normalisation and what follows it.
#[derive(Clone, Copy)]
struct Chain {
    norm: NormId,
    /// The convolution that it reads.
    z: ValueId,
    /// What it makes.
    out: ValueId,
    /// The value that others read: after the sum and the ReLU, if there are.
    end: ValueId,
    relu: bool,
    /// What it is the first summand of.
    sum: Option<usize>,
    /// What it is multiplied by before the sum.
    gate: Gate,
    /// What drops squares of it, before the sum and the ReLU.
    block: Option<DropBlock>,
    /// No buffer: its readers apply it.
    lazy: bool,
}

/// The operations between a normalisation and its sum.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Gate {
    /// The node of squeeze and excitation.
    squeeze: Option<usize>,
    path: Option<DropPath>,
}

impl Gate {
    /// Whether there is none.
    fn is_open(&self) -> bool {
        *self == Self::default()
    }
}

/// What the backward pass has to undo, in forward order.
enum Step {
    Conv {
        geometry: Geometry,
        weight: ParamId,
        x: ValueId,
        z: ValueId,
    },
    Sum {
        side: ValueId,
        /// What was dropped of it.
        dropped: Option<Dropped>,
        end: ValueId,
    },
    /// What was dropped of the normalisation of `z`.
    DropBlock {
        z: ValueId,
        dropped: Dropped,
    },
    MaxPool {
        window: Window,
        argmax: BufferId,
        x: ValueId,
        y: ValueId,
    },
    AvgPool {
        x: ValueId,
        y: ValueId,
    },
    HalfPool {
        x: ValueId,
        y: ValueId,
    },
    /// Factors that were applied to the normalisation of `z`.
    Gate {
        z: ValueId,
        squeeze: Option<Squeeze>,
        gate: BufferId,
    },
    Linear {
        weight: ParamId,
        bias: ParamId,
        x: ValueId,
        y: ValueId,
    },
}

struct Planner<'a> {
    graph: &'a Graph,
    caps: &'a dyn Caps,
    batch: usize,
    mode: Mode,
    /// Nodes that read each value.
    readers: Vec<Vec<usize>>,
    /// By the value of the convolution, and by the value that others read.
    chains: Vec<Option<Chain>>,
    ends: Vec<Option<usize>>,
    values: Vec<Option<BufferId>>,
    /// Gradient of a value as far as readers have handed it in.
    grads: Vec<Option<BufferId>>,
    /// Readers that have not handed in yet.
    open: Vec<usize>,
    states: Vec<Option<BufferId>>,
    setup: Vec<Kernel>,
    kernels: Vec<Kernel>,
    buffers: Vec<Buffer>,
    steps: Vec<Step>,
    worker_bytes: usize,
}

const F32: usize = 4;

impl<'a> Planner<'a> {
    fn new(graph: &'a Graph, caps: &'a dyn Caps, batch: usize, mode: Mode) -> Self {
        let n = graph.nodes().len();
        let mut readers = vec![vec![]; n];
        for (i, node) in graph.nodes().iter().enumerate() {
            for input in &node.inputs {
                readers[input.0].push(i);
            }
        }
        let mut planner = Self {
            graph,
            caps,
            batch,
            mode,
            readers,
            chains: vec![None; n],
            ends: vec![None; n],
            values: vec![None; n],
            grads: vec![None; n],
            open: vec![0; n],
            states: vec![None; graph.norms().len()],
            setup: vec![],
            kernels: vec![],
            buffers: vec![],
            steps: vec![],
            worker_bytes: 0,
        };
        planner.find_chains();
        planner
    }

    fn op(&self, index: usize) -> Op {
        self.graph.nodes()[index].op
    }

    /// The one reader of a value, if it has just one.
    fn only_reader(&self, id: ValueId) -> Option<usize> {
        match self.readers[id.0][..] {
            [one] => Some(one),
            _ => None,
        }
    }

    fn find_chains(&mut self) {
        for (i, node) in self.graph.nodes().iter().enumerate() {
            let Op::BatchNorm { norm } = node.op else {
                continue;
            };
            let (out, z) = (ValueId(i), node.inputs[0]);
            let name = &node.name;
            assert!(
                matches!(self.op(z.0), Op::Conv { .. }) && self.only_reader(z) == Some(i),
                "{name}: a normalisation follows a convolution that nothing else reads"
            );
            let (mut branch, mut gate, mut block) = (out, Gate::default(), None);
            while let Some(reader) = self.only_reader(branch) {
                match self.op(reader) {
                    Op::DropBlock(of) if branch == out => block = Some(of),
                    Op::SqueezeExcite { .. } if gate.is_open() => gate.squeeze = Some(reader),
                    Op::DropPath(path) if gate.path.is_none() => gate.path = Some(path),
                    _ => break,
                }
                branch = ValueId(reader);
            }
            let sum = self.only_reader(branch).filter(|&r| self.op(r) == Op::Add);
            let is_main = sum.is_some_and(|r| self.graph.nodes()[r].inputs[0] == branch);
            assert!(
                is_main || gate.is_open(),
                "{name}: what scales or drops a branch is the first summand of a sum"
            );
            assert!(
                block.is_none() || gate.is_open(),
                "{name}: squares are dropped of branches that nothing scales or drops"
            );
            let summed = sum.filter(|_| is_main).map_or(branch, ValueId);
            let (end, relu) = match self.only_reader(summed) {
                Some(r) if self.op(r) == Op::Relu => (ValueId(r), true),
                _ => (summed, false),
            };
            let reader = self.only_reader(end).map(|r| self.op(r));
            let is_side = sum.is_some() && !is_main;
            let read_lazily = match reader {
                Some(Op::Conv { .. }) => self.caps.normalises_operands(),
                reader => matches!(reader, Some(Op::MaxPool { .. })),
            };
            self.chains[z.0] = Some(Chain {
                norm,
                z,
                out,
                end,
                relu,
                sum: sum.filter(|_| is_main),
                gate,
                block,
                lazy: is_side || (read_lazily && !is_main && block.is_none()),
            });
            self.ends[end.0] = Some(z.0);
        }
        for (i, node) in self.graph.nodes().iter().enumerate() {
            let name = &node.name;
            match node.op {
                Op::Add => assert!(
                    self.chains
                        .iter()
                        .flatten()
                        .any(|chain| chain.sum == Some(i)),
                    "{name}: the first summand has to be a normalisation"
                ),
                Op::Relu => assert!(
                    self.ends[i].is_some(),
                    "{name}: a ReLU follows a normalisation or a sum"
                ),
                Op::SqueezeExcite { .. } | Op::DropPath(_) => assert!(
                    self.chains
                        .iter()
                        .flatten()
                        .any(|chain| chain.gate.squeeze == Some(i)
                            || chain
                                .gate
                                .path
                                .is_some_and(|path| node.op == Op::DropPath(path))),
                    "{name}: a normalisation is scaled or dropped"
                ),
                Op::DropBlock(_) => {
                    let x = node.inputs[0];
                    let of_norm = matches!(self.op(x.0), Op::BatchNorm { .. });
                    let reader = self.only_reader(ValueId(i));
                    let of_side = reader.is_some_and(|r| {
                        self.op(r) == Op::Add && self.graph.nodes()[r].inputs[1].0 == i
                    });
                    assert!(
                        of_norm || of_side,
                        "{name}: squares are dropped of a normalisation or a shortcut"
                    );
                }
                _ => {}
            }
        }
    }

    /// The chain whose end a value is.
    fn chain_of(&self, end: ValueId) -> Option<Chain> {
        self.ends[end.0].and_then(|z| self.chains[z])
    }

    fn buffer(&mut self, bytes: usize) -> BufferId {
        self.buffers.push(Buffer {
            offset: 0,
            bytes,
            first: usize::MAX,
            last: 0,
            constant: false,
        });
        BufferId(self.buffers.len() - 1)
    }

    fn constant(&mut self, bytes: usize) -> BufferId {
        let id = self.buffer(bytes);
        self.buffers[id.0].constant = true;
        id
    }

    fn bytes(&self, id: ValueId) -> usize {
        let plane = self.graph.plane(id);
        // What has lost its plane is small and keeps full precision.
        let small = matches!(self.op(id.0), Op::AvgPool | Op::Linear { .. });
        let element = if small { F32 } else { self.caps.element() };
        let channels = match self.op(id.0) {
            Op::Input => self.caps.image_channels(plane.c),
            _ => plane.c,
        };
        plane.pixels() * channels * self.batch * element
    }

    fn value(&mut self, id: ValueId) -> BufferId {
        if let Some(buffer) = self.values[id.0] {
            return buffer;
        }
        let buffer = self.buffer(self.bytes(id));
        self.values[id.0] = Some(buffer);
        buffer
    }

    fn state(&mut self, norm: NormId) -> BufferId {
        if let Some(state) = self.states[norm.0] {
            return state;
        }
        let bytes = STATE_ROWS * self.graph.norms()[norm.0].channels * F32;
        let state = self.buffer(bytes);
        self.states[norm.0] = Some(state);
        state
    }

    /// A value as its readers see it.
    fn operand(&mut self, id: ValueId) -> Operand {
        match self.chain_of(id) {
            Some(chain) if chain.lazy && self.mode == Mode::Train => Operand::Normed {
                z: self.value(chain.z),
                state: self.state(chain.norm),
                relu: chain.relu,
            },
            _ => Operand::Stored(self.value(id)),
        }
    }

    fn needs(&mut self, needs: Needs) -> Needs {
        self.worker_bytes = self.worker_bytes.max(needs.worker);
        needs
    }

    fn geometry(&self, out: ValueId, kernel: usize, stride: usize) -> Geometry {
        let input = self.graph.node(out).inputs[0];
        Geometry {
            input: self.graph.plane(input),
            output: self.graph.plane(out),
            kernel,
            stride,
        }
    }

    fn forward(&mut self) {
        for (i, node) in self.graph.nodes().iter().enumerate() {
            let out = ValueId(i);
            match node.op {
                Op::Input => {
                    let y = self.value(out);
                    let plane = node.plane;
                    self.kernels.push(Kernel::Input { y, plane });
                }
                Op::Conv { .. } => {
                    // Folded, the convolution before a sum runs when the other summand is there.
                    let waits = self.chains[i]
                        .is_some_and(|chain| chain.sum.is_some() && chain.gate.squeeze.is_none());
                    if self.mode == Mode::Train || !waits {
                        self.conv(out, None);
                    }
                }
                Op::BatchNorm { .. } => {
                    let chain = self.chains[node.inputs[0].0].expect("found before");
                    if self.mode == Mode::Train && chain.sum.is_none() && !chain.lazy {
                        self.sum(chain, None, None);
                    }
                }
                Op::Add => {
                    let (side, block) = self.side(i);
                    let mut chains = self.chains.iter().flatten();
                    let chain = *chains
                        .find(|chain| chain.sum == Some(i))
                        .expect("found before");
                    let z = chain.z;
                    if self.mode == Mode::Train {
                        let operand = self.operand(side);
                        let dropped = block.map(|block| self.drop_block(node.plane, block));
                        self.sum(chain, Some(operand), dropped);
                        let end = chain.end;
                        self.steps.push(Step::Sum { side, dropped, end });
                    } else if chain.gate.squeeze.is_some() {
                        let side = self.value(side);
                        self.sum(chain, Some(Operand::Stored(side)), None);
                    } else {
                        let residual = self.value(side);
                        let is_read_again = self.readers[side.0].iter().any(|&r| r > i);
                        if self.caps.adds_in_place() && !is_read_again {
                            self.values[chain.end.0] = Some(residual);
                        }
                        self.conv(z, Some(residual));
                    }
                }
                // Part of the normalisation or the sum before them.
                Op::Relu | Op::SqueezeExcite { .. } | Op::DropPath(_) | Op::DropBlock(_) => {}
                Op::MaxPool {
                    kernel,
                    stride,
                    pad_before,
                } => {
                    let input = node.inputs[0];
                    let (x, y) = (self.operand(input), self.value(out));
                    let bytes = node.plane.elements() * self.batch;
                    let argmax = (self.mode == Mode::Train).then(|| self.buffer(bytes));
                    let window = Window {
                        input: self.graph.plane(input),
                        output: node.plane,
                        kernel,
                        stride,
                        pad_before,
                    };
                    self.kernels.push(Kernel::MaxPool {
                        window,
                        x,
                        y,
                        argmax,
                    });
                    if let Some(argmax) = argmax {
                        let (x, y) = (input, out);
                        self.steps.push(Step::MaxPool {
                            window,
                            argmax,
                            x,
                            y,
                        });
                    }
                }
                Op::AvgPool => {
                    let (input, plane) = (node.inputs[0], self.graph.plane(node.inputs[0]));
                    let (x, y) = (self.value(input), self.value(out));
                    self.kernels.push(Kernel::AvgPool { plane, x, y });
                    let (x, y) = (input, out);
                    self.steps.push(Step::AvgPool { x, y });
                }
                Op::HalfPool => {
                    let (input, plane) = (node.inputs[0], self.graph.plane(node.inputs[0]));
                    let Operand::Stored(x) = self.operand(input) else {
                        unreachable!("only convolutions, max-pools and sums read lazily")
                    };
                    let y = self.value(out);
                    self.kernels.push(Kernel::HalfPool { plane, x, y });
                    let (x, y) = (input, out);
                    self.steps.push(Step::HalfPool { x, y });
                }
                Op::Linear { weight, bias } => {
                    let input = node.inputs[0];
                    let (x, y) = (self.value(input), self.value(out));
                    let (inputs, outputs) = (self.graph.plane(input).c, node.plane.c);
                    self.kernels.push(Kernel::Linear {
                        inputs,
                        outputs,
                        weight,
                        bias,
                        x,
                        y,
                    });
                    let (x, y) = (input, out);
                    self.steps.push(Step::Linear { weight, bias, x, y });
                }
            }
        }
        let logits = self.value(self.graph.logits());
        let bytes = self.bytes(self.graph.logits());
        let d = (self.mode == Mode::Train).then(|| self.buffer(bytes));
        self.grads[self.graph.logits().0] = d;
        self.kernels.push(Kernel::Loss {
            classes: self.graph.classes(),
            logits,
            d,
        });
    }

    /// A convolution; in inference with the normalisation that follows, and `residual`.
    fn conv(&mut self, out: ValueId, residual: Option<BufferId>) {
        let node = self.graph.node(out);
        let Op::Conv {
            weight,
            kernel,
            stride,
        } = node.op
        else {
            unreachable!("the caller looked")
        };
        let geometry = self.geometry(out, kernel, stride);
        let input = node.inputs[0];
        let x = self.operand(input);
        let needs = self.needs(self.caps.forward(&geometry, self.batch));
        let chain = self.chains[out.0];
        let (y, weights, after) = match (self.mode, chain) {
            (Mode::Train, Some(chain)) => {
                let partials = self.buffer(needs.partials);
                let state = self.state(chain.norm);
                let norm = chain.norm;
                let after = After::Statistics {
                    norm,
                    state,
                    partials,
                };
                (self.value(out), None, after)
            }
            (Mode::Infer, Some(chain)) => {
                let plain_bytes = self.weight_bytes(&geometry);
                let bytes = if needs.weights > 0 {
                    needs.weights
                } else {
                    plain_bytes
                };
                let weights = self.constant(bytes);
                let shift = self.constant(geometry.output.c * F32);
                let plain = if needs.weights > 0 {
                    self.buffer(plain_bytes)
                } else {
                    weights
                };
                let norm = chain.norm;
                self.setup.push(Kernel::Fold {
                    geometry,
                    weight,
                    norm,
                    plain,
                    weights,
                    shift,
                });
                // What is still to be scaled is stored as it is.
                let (relu, y) = match chain.gate.squeeze {
                    Some(_) => (false, chain.out),
                    None => (chain.relu, chain.end),
                };
                let after = After::Folded {
                    shift,
                    residual,
                    relu,
                };
                (self.value(y), Some(weights), after)
            }
            (_, None) => (self.value(out), None, After::Nothing),
        };
        let weights = weights.or_else(|| (needs.weights > 0).then(|| self.buffer(needs.weights)));
        let shared = self.buffer(needs.shared);
        self.kernels.push(Kernel::Conv {
            geometry,
            weight,
            weights,
            shared,
            x,
            y,
            after,
        });
        let x = input;
        self.steps.push(Step::Conv {
            geometry,
            weight,
            x,
            z: out,
        });
    }

    /// Room for a weight in the order of the parameters, whatever an engine fills up panels with.
    fn weight_bytes(&self, g: &Geometry) -> usize {
        let depth = g.kernel * g.kernel * self.caps.image_channels(g.input.c);
        depth * g.output.c.next_multiple_of(32) * F32
    }

    /// The second summand of a sum, and what drops squares of it.
    fn side(&self, sum: usize) -> (ValueId, Option<DropBlock>) {
        let side = self.graph.nodes()[sum].inputs[1];
        match (self.chain_of(side), self.op(side.0)) {
            (None, Op::DropBlock(block)) => (self.graph.node(side).inputs[0], Some(block)),
            // Of a value that is stored, squares were dropped before.
            (chain, _) => (side, chain.filter(|c| c.lazy).and_then(|c| c.block)),
        }
    }

    fn drop_block(&mut self, plane: Plane, block: DropBlock) -> Dropped {
        let dropped = Dropped {
            mask: self.buffer(plane.elements() * self.batch),
            scale: self.buffer(F32),
        };
        self.kernels.push(Kernel::DropBlock {
            plane,
            block,
            dropped,
        });
        dropped
    }

    fn sum(&mut self, chain: Chain, side: Option<Operand>, of_side: Option<Dropped>) {
        let x = match self.mode {
            Mode::Train => Operand::Normed {
                z: self.value(chain.z),
                state: self.state(chain.norm),
                relu: false,
            },
            Mode::Infer => Operand::Stored(self.value(chain.out)),
        };
        let (plane, relu) = (self.graph.plane(chain.end), chain.relu);
        let block = chain.block.filter(|_| self.mode == Mode::Train);
        let of_main = block.map(|block| self.drop_block(plane, block));
        if let Some(dropped) = of_main {
            let z = chain.z;
            self.steps.push(Step::DropBlock { z, dropped });
        }
        if of_main.is_some() || of_side.is_some() {
            let y = self.value(chain.end);
            assert!(chain.gate.is_open(), "found before");
            self.kernels.push(Kernel::DroppedSum {
                plane,
                x,
                side,
                dropped: [of_main, of_side],
                relu,
                y,
            });
            return;
        }
        let gate = (!chain.gate.is_open()).then(|| self.gate(&chain, x));
        let y = self.value(chain.end);
        self.kernels.push(Kernel::Sum {
            plane,
            x,
            gate,
            side,
            relu,
            y,
        });
    }

    /// The factors of a branch.
    fn gate(&mut self, chain: &Chain, x: Operand) -> BufferId {
        let plane = self.graph.plane(chain.out);
        let floats = |channels: usize| self.batch * channels * F32;
        let (all, hidden_bytes) = (floats(plane.c), &floats);
        let squeeze = chain.gate.squeeze.map(|node| {
            let Op::SqueezeExcite { reduce, expand } = self.op(node) else {
                unreachable!("found before")
            };
            let hidden = self.graph.params()[reduce[1].0].elements();
            (reduce, expand, hidden, hidden_bytes(hidden))
        });
        let squeeze = squeeze.map(|(reduce, expand, hidden, bytes)| Squeeze {
            reduce,
            expand,
            hidden,
            mean: self.buffer(all),
            inner: self.buffer(bytes),
            sigmoid: self.buffer(all),
        });
        let gate = self.buffer(all);
        self.kernels.push(Kernel::Gate {
            plane,
            x,
            squeeze,
            path: chain.gate.path.filter(|_| self.mode == Mode::Train),
            gate,
        });
        let z = chain.z;
        self.steps.push(Step::Gate { z, squeeze, gate });
        gate
    }

    /// What a reader of `x` does with the gradient that it hands in, and where it stores it.
    fn close(&mut self, x: ValueId) -> (BufferId, Close) {
        self.open[x.0] -= 1;
        let add = self.grads[x.0].take();
        let chain = self.chain_of(x);
        if self.open[x.0] > 0 {
            let dx = self.buffer(self.bytes(x));
            self.grads[x.0] = Some(dx);
            return (dx, Close::Open { add });
        }
        let close = match chain {
            // A normalisation that is stored for one reader: its mask follows from what it reads, too.
            Some(chain) if chain.lazy || self.is_stored_for_a_convolution(&chain) => {
                assert!(add.is_none(), "the value has one reader");
                Close::Lazy {
                    normed: self.normed(chain),
                    relu: chain.relu,
                }
            }
            Some(chain) => {
                let y = self.value(x);
                let side = chain.sum.map(|s| self.graph.nodes()[s].inputs[1]);
                let side = side.and_then(|side| self.chain_of(side).filter(|c| c.lazy));
                // A normalisation behind factors of images needs sums of each image: `Kernel::GateBackward`; one of
                // which squares were dropped, sums of what is left: `Kernel::DropBlockBackward`.
                let main = Some(chain).filter(|chain| chain.gate.is_open());
                let mut normed = main.into_iter().chain(side).filter(|c| c.block.is_none());
                let normed = [normed.next(), normed.next()];
                Close::Stored {
                    add,
                    y: chain.relu.then_some(y),
                    normed: normed.map(|chain| chain.map(|chain| self.normed(chain))),
                }
            }
            None => Close::Stored {
                add,
                y: None,
                normed: [None, None],
            },
        };
        // What was handed in has no other use by now, and each value of it is read just before it is replaced.
        let dx = match add {
            Some(add) => add,
            None => self.buffer(self.bytes(x)),
        };
        self.grads[x.0] = Some(dx);
        (dx, close)
    }

    /// A normalisation that would be lazy if convolutions normalised what they read.
    fn is_stored_for_a_convolution(&self, chain: &Chain) -> bool {
        let reader = self.only_reader(chain.end).map(|r| self.op(r));
        !self.caps.normalises_operands()
            && chain.sum.is_none()
            && chain.block.is_none()
            && matches!(reader, Some(Op::Conv { .. }))
    }

    fn normed(&mut self, chain: Chain) -> Normed {
        Normed {
            norm: chain.norm,
            z: self.value(chain.z),
            state: self.state(chain.norm),
        }
    }

    fn grad(&self, id: ValueId) -> BufferId {
        self.grads[id.0].expect("every value that is read has its gradient by now")
    }

    fn backward(&mut self) {
        let steps = std::mem::take(&mut self.steps);
        for step in &steps {
            match step {
                Step::Conv { x, .. }
                | Step::MaxPool { x, .. }
                | Step::AvgPool { x, .. }
                | Step::HalfPool { x, .. }
                | Step::Linear { x, .. } => self.open[x.0] += 1,
                Step::Gate { .. } | Step::DropBlock { .. } => {}
                Step::Sum { side, .. } => {
                    if !self.chain_of(*side).is_some_and(|c| c.lazy) {
                        self.open[side.0] += 1;
                    }
                }
            }
        }
        for step in steps.into_iter().rev() {
            match step {
                Step::Linear { weight, bias, x, y } => {
                    let (inputs, outputs) = (self.graph.plane(x).c, self.graph.plane(y).c);
                    let d = self.grad(y);
                    let xb = self.value(x);
                    let (dx, _) = self.close(x);
                    self.kernels.push(Kernel::LinearBackward {
                        inputs,
                        outputs,
                        weight,
                        bias,
                        x: xb,
                        d,
                        dx,
                    });
                }
                Step::AvgPool { x, y } => {
                    let (d, plane) = (self.grad(y), self.graph.plane(x));
                    let (dx, close) = self.close(x);
                    let partials = self.visited(plane);
                    self.kernels.push(Kernel::AvgPoolBackward {
                        plane,
                        d,
                        dx,
                        close,
                        partials,
                    });
                }
                Step::HalfPool { x, y } => {
                    let (d, plane) = (self.grad(y), self.graph.plane(x));
                    let (dx, close) = self.close(x);
                    let partials = self.visited(plane);
                    self.kernels.push(Kernel::HalfPoolBackward {
                        plane,
                        d,
                        dx,
                        close,
                        partials,
                    });
                }
                Step::Gate { z, squeeze, gate } => {
                    let chain = self.chains[z.0].expect("found before");
                    let plane = self.graph.plane(z);
                    let (g, zb) = (self.grad(chain.end), self.value(z));
                    let state = self.state(chain.norm);
                    let hidden = squeeze.map_or(0, |s| s.hidden);
                    let sums = self.buffer(self.batch * (5 * plane.c + hidden) * F32);
                    let dz = self.buffer(self.bytes(z));
                    self.kernels.push(Kernel::GateBackward {
                        plane,
                        norm: chain.norm,
                        g,
                        z: zb,
                        state,
                        squeeze,
                        path: chain.gate.path,
                        gate,
                        sums,
                        dz,
                    });
                    self.grads[z.0] = Some(dz);
                }
                Step::MaxPool {
                    window,
                    argmax,
                    x,
                    y,
                } => {
                    let d = self.grad(y);
                    let (dx, close) = self.close(x);
                    let partials = self.visited(window.input);
                    self.kernels.push(Kernel::MaxPoolBackward {
                        window,
                        argmax,
                        d,
                        dx,
                        close,
                        partials,
                    });
                }
                Step::DropBlock { z, dropped } => {
                    let chain = self.chains[z.0].expect("found before");
                    let d = self.grad(chain.end);
                    self.drop_block_backward(z, dropped, d, Some(chain));
                }
                Step::Sum { side, dropped, end } => {
                    let mut g = self.grad(end);
                    let lazy = self.chain_of(side).filter(|c| c.lazy);
                    if let Some(dropped) = dropped {
                        let to = lazy.map_or(side, |chain| chain.z);
                        g = self.drop_block_backward(to, dropped, g, lazy);
                        self.grads[to.0] = None;
                    }
                    match lazy {
                        // Its sums were gathered with those of the sum, or with those of what is left of it.
                        Some(chain) if dropped.is_some() => self.grads[chain.z.0] = Some(g),
                        Some(_) => self.grads[side.0] = Some(g),
                        None => {
                            self.open[side.0] -= 1;
                            let name = &self.graph.node(end).name;
                            assert!(
                                self.open[side.0] > 0 && self.grads[side.0].is_none(),
                                "{name}: a shortcut is read by a convolution too, before the sum"
                            );
                            self.grads[side.0] = Some(g);
                        }
                    }
                }
                Step::Conv {
                    geometry,
                    weight,
                    x,
                    z,
                } => self.conv_backward(geometry, weight, x, z),
            }
        }
    }

    /// Room for the sums of a kernel that visits a plane.
    fn visited(&mut self, plane: Plane) -> BufferId {
        let needs = self.needs(self.caps.visit(plane, self.batch));
        self.buffer(needs.partials)
    }

    /// What reaches `to` of a gradient, closed for a normalisation perhaps.
    fn drop_block_backward(
        &mut self,
        to: ValueId,
        dropped: Dropped,
        d: BufferId,
        chain: Option<Chain>,
    ) -> BufferId {
        let plane = self.graph.plane(to);
        let dx = self.buffer(self.bytes(to));
        let close = match chain {
            Some(chain) => Close::Stored {
                add: None,
                y: None,
                normed: [Some(self.normed(chain)), None],
            },
            None => Close::Open { add: None },
        };
        let partials = self.visited(plane);
        self.kernels.push(Kernel::DropBlockBackward {
            plane,
            dropped,
            d,
            dx,
            close,
            partials,
        });
        self.grads[to.0] = Some(dx);
        dx
    }

    fn conv_backward(&mut self, geometry: Geometry, weight: ParamId, x: ValueId, z: ValueId) {
        let d = match self.chains[z.0] {
            Some(chain) if !chain.gate.is_open() => Operand::Stored(self.grad(z)),
            Some(chain) => {
                // What was dropped has its gradient beside that of the end.
                let of = if chain.block.is_some() { z } else { chain.end };
                let (g, zb) = (self.grad(of), self.value(z));
                let state = self.state(chain.norm);
                if self.caps.normalises_operands() {
                    Operand::Gradient { g, z: zb, state }
                } else {
                    let dz = self.buffer(self.bytes(z));
                    self.kernels.push(Kernel::NormBackward {
                        plane: geometry.output,
                        g,
                        z: zb,
                        state,
                        relu: chain.relu && chain.sum.is_none() && chain.block.is_none(),
                        dz,
                    });
                    Operand::Stored(dz)
                }
            }
            None => Operand::Stored(self.grad(z)),
        };
        let operand = self.operand(x);
        let needs = self.needs(self.caps.backward_weight(&geometry, self.batch));
        let shared = self.buffer(needs.shared);
        let weight_kernel = Kernel::ConvBackwardWeight {
            geometry,
            weight,
            x: operand,
            d,
            shared,
        };
        self.kernels.push(weight_kernel);
        if self.graph.node(x).op == Op::Input {
            return;
        }
        let needs = self.needs(self.caps.backward_input(&geometry, self.batch));
        let weights = self.buffer(needs.weights);
        let shared = self.buffer(needs.shared);
        let partials = self.buffer(needs.partials);
        let (dx, close) = self.close(x);
        self.kernels.push(Kernel::ConvBackwardInput {
            geometry,
            weight,
            weights,
            shared,
            d,
            dx,
            close,
            partials,
        });
    }
}

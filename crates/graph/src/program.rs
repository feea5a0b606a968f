//! From a graph to a program: fused kernels in order, and a place in one arena for every buffer.

use crate::{Graph, NormId, Op, ParamId, Plane, ValueId};

/// What an engine can do and wants; it decides tiling and therefore the summation order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// Alignment of buffers in the arena, bytes.
    pub alignment: usize,
    /// What one worker may use to gather its part of a convolution's input, bytes.
    pub tile_bytes: usize,
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

/// A piece of the arena.
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
}

/// How a matrix of `rows` x `cols` results is cut into tasks. It depends on shapes only, never on the number of
/// threads, so sums have one order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiling {
    /// Rows of the whole.
    pub rows: usize,
    /// Columns of the whole.
    pub cols: usize,
    /// Rows of one task (the last may have fewer).
    pub tile_rows: usize,
    /// Columns of one task (the last may have fewer).
    pub tile_cols: usize,
}

impl Tiling {
    /// Tasks along the rows.
    pub fn row_tasks(&self) -> usize {
        self.rows.div_ceil(self.tile_rows)
    }

    /// Tasks along the columns.
    pub fn col_tasks(&self) -> usize {
        self.cols.div_ceil(self.tile_cols)
    }

    /// All tasks.
    pub fn tasks(&self) -> usize {
        self.row_tasks() * self.col_tasks()
    }

    /// Rows and columns of task `index`.
    pub fn task(&self, index: usize) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
        let (r, c) = (index / self.col_tasks(), index % self.col_tasks());
        let (r, c) = (r * self.tile_rows, c * self.tile_cols);
        (
            r..(r + self.tile_rows).min(self.rows),
            c..(c + self.tile_cols).min(self.cols),
        )
    }
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
}

/// Batch statistics gathered in the epilogue of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statistics {
    /// Whose statistics.
    pub norm: NormId,
    /// Per row task: mean and sum of squared deviations of each channel.
    pub partials: BufferId,
    /// Four rows of `channels`: mean, 1 / sqrt(var + eps), scale, shift.
    pub state: BufferId,
}

/// Where a gradient goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grad {
    /// The buffer.
    pub buffer: BufferId,
    /// Add to what is there instead of replacing it.
    pub accumulate: bool,
}

/// One fused kernel. `x` is read, `y` is written, `d` is a gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "the fields are named as in the formula of each variant"
)]
pub enum Kernel {
    /// y = (pixels - mean) / std, from the batch that the caller hands in.
    Input { y: BufferId, plane: Plane },
    /// y = x * w; with `statistics`, also the batch mean and variance of y.
    Conv {
        geometry: Geometry,
        weight: ParamId,
        x: BufferId,
        y: BufferId,
        statistics: Option<Statistics>,
        tiling: Tiling,
    },
    /// Scale and shift from the running statistics into `state` (inference).
    RunningNorm { norm: NormId, state: BufferId },
    /// y = relu?(z * scale + shift + residual?).
    Normalize {
        channels: usize,
        rows: usize,
        state: BufferId,
        z: BufferId,
        residual: Option<BufferId>,
        relu: bool,
        y: BufferId,
    },
    /// y = window maxima of x; `argmax` keeps the winning tap (0..9), the first in row order on a tie.
    MaxPool {
        input: Plane,
        output: Plane,
        kernel: usize,
        stride: usize,
        pad_before: usize,
        x: BufferId,
        y: BufferId,
        argmax: Option<BufferId>,
    },
    /// y = mean over the plane.
    AvgPool {
        input: Plane,
        x: BufferId,
        y: BufferId,
    },
    /// y = x w^T + b.
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
    /// Gradients of weight, bias and x.
    LinearBackward {
        inputs: usize,
        outputs: usize,
        weight: ParamId,
        bias: ParamId,
        x: BufferId,
        d: BufferId,
        dx: Grad,
    },
    /// Spreads d over the plane.
    AvgPoolBackward { input: Plane, d: BufferId, dx: Grad },
    /// Sends d to the winners.
    MaxPoolBackward {
        input: Plane,
        output: Plane,
        kernel: usize,
        stride: usize,
        pad_before: usize,
        argmax: BufferId,
        d: BufferId,
        dx: Grad,
    },
    /// `d` enters as the gradient of y and leaves as that of z; the masked gradient goes to the residual. `y` is
    /// the mask of the ReLU, where there was one.
    NormalizeBackward {
        norm: NormId,
        state: BufferId,
        z: BufferId,
        y: Option<BufferId>,
        d: BufferId,
        residual: Option<Grad>,
        partials: BufferId,
        tiling: Tiling,
    },
    /// Gradients of the weight (`weight_tiling` over depth x channels) and of x (`x_tiling` over its pixels).
    ConvBackward {
        geometry: Geometry,
        weight: ParamId,
        x: BufferId,
        d: BufferId,
        dx: Option<Grad>,
        packed: Option<BufferId>,
        weight_tiling: Tiling,
        x_tiling: Tiling,
    },
}

impl Kernel {
    /// Every buffer that the kernel reads or writes.
    pub fn buffers(&self) -> Vec<BufferId> {
        let mut out = vec![];
        match *self {
            Kernel::Input { y, .. } => out.push(y),
            Kernel::Conv {
                x, y, statistics, ..
            } => {
                out.extend([x, y]);
                out.extend(statistics.iter().flat_map(|s| [s.partials, s.state]));
            }
            Kernel::RunningNorm { state, .. } => out.push(state),
            Kernel::Normalize {
                state,
                z,
                residual,
                y,
                ..
            } => {
                out.extend([state, z, y]);
                out.extend(residual);
            }
            Kernel::MaxPool { x, y, argmax, .. } => {
                out.extend([x, y]);
                out.extend(argmax);
            }
            Kernel::AvgPool { x, y, .. } | Kernel::Linear { x, y, .. } => out.extend([x, y]),
            Kernel::Loss { logits, d, .. } => {
                out.push(logits);
                out.extend(d);
            }
            Kernel::LinearBackward { x, d, dx, .. } => out.extend([x, d, dx.buffer]),
            Kernel::AvgPoolBackward { d, dx, .. } => out.extend([d, dx.buffer]),
            Kernel::MaxPoolBackward { argmax, d, dx, .. } => out.extend([argmax, d, dx.buffer]),
            Kernel::NormalizeBackward {
                state,
                z,
                y,
                d,
                residual,
                partials,
                ..
            } => {
                out.extend([state, z, d, partials]);
                out.extend(y);
                out.extend(residual.map(|r| r.buffer));
            }
            Kernel::ConvBackward {
                x, d, dx, packed, ..
            } => {
                out.extend([x, d]);
                out.extend(dx.map(|g| g.buffer));
                out.extend(packed);
            }
        }
        out
    }
}

/// Fused kernels in order and the memory they need, for one batch size and mode.
#[derive(Clone, Debug)]
pub struct Program {
    /// Images.
    pub batch: usize,
    /// What it is for.
    pub mode: Mode,
    /// In order of execution.
    pub kernels: Vec<Kernel>,
    /// Placed in the arena.
    pub buffers: Vec<Buffer>,
    /// Length of the arena.
    pub arena_bytes: usize,
    /// What each worker needs besides.
    pub scratch_bytes: usize,
    /// Where the logits are, `batch x classes` f32.
    pub logits: BufferId,
}

impl Program {
    /// Plans `graph` for `batch` images.
    ///
    /// # Panics
    /// If the graph has a shape of fusion that no network of `nn` records: a ReLU or sum that does not follow a
    /// normalisation, or a normalisation that does not follow a convolution.
    pub fn new(graph: &Graph, caps: &Caps, batch: usize, mode: Mode) -> Self {
        assert!(batch > 0, "a program needs at least one image");
        let mut planner = Planner::new(graph, caps, batch, mode);
        planner.forward();
        let logits = planner.values[graph.logits().0].expect("the logits were just computed");
        if mode == Mode::Train {
            planner.backward();
        }
        let Planner {
            kernels,
            mut buffers,
            scratch_bytes,
            ..
        } = planner;
        for (i, kernel) in kernels.iter().enumerate() {
            for id in kernel.buffers() {
                let buffer = &mut buffers[id.0];
                buffer.first = buffer.first.min(i);
                buffer.last = buffer.last.max(i);
            }
        }
        buffers[logits.0].last = kernels.len(); // predictions are read after the last kernel
        let arena_bytes = place(&mut buffers, caps.alignment);
        Self {
            batch,
            mode,
            kernels,
            buffers,
            arena_bytes,
            scratch_bytes,
            logits,
        }
    }
}

/// Gives every buffer the lowest offset that no buffer alive at the same time covers, largest first.
fn place(buffers: &mut [Buffer], alignment: usize) -> usize {
    let mut order: Vec<usize> = (0..buffers.len()).collect();
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
    end.next_multiple_of(alignment)
}

/// What the backward pass has to undo, in forward order.
enum Step {
    Conv {
        geometry: Geometry,
        weight: ParamId,
        x: ValueId,
        z: ValueId,
    },
    Normalize {
        norm: NormId,
        state: BufferId,
        z: ValueId,
        residual: Option<ValueId>,
        relu: bool,
        y: ValueId,
    },
    MaxPool {
        kernel: usize,
        stride: usize,
        pad_before: usize,
        argmax: BufferId,
        x: ValueId,
        y: ValueId,
    },
    AvgPool {
        x: ValueId,
        y: ValueId,
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
    caps: &'a Caps,
    batch: usize,
    mode: Mode,
    /// Readers of each value.
    readers: Vec<Vec<usize>>,
    values: Vec<Option<BufferId>>,
    grads: Vec<Option<BufferId>>,
    states: Vec<Option<BufferId>>,
    kernels: Vec<Kernel>,
    buffers: Vec<Buffer>,
    steps: Vec<Step>,
    scratch_bytes: usize,
}

/// Pixels whose outer products one weight-gradient task sums at a time.
pub const WEIGHT_CHUNK: usize = 1024;
const F32: usize = size_of::<f32>();

impl<'a> Planner<'a> {
    fn new(graph: &'a Graph, caps: &'a Caps, batch: usize, mode: Mode) -> Self {
        let n = graph.nodes().len();
        let mut readers = vec![vec![]; n];
        for (i, node) in graph.nodes().iter().enumerate() {
            for x in &node.inputs {
                readers[x.0].push(i);
            }
        }
        Self {
            graph,
            caps,
            batch,
            mode,
            readers,
            values: vec![None; n],
            grads: vec![None; n],
            states: vec![None; graph.norms().len()],
            kernels: vec![],
            buffers: vec![],
            steps: vec![],
            scratch_bytes: 0,
        }
    }

    fn buffer(&mut self, bytes: usize) -> BufferId {
        self.buffers.push(Buffer {
            offset: 0,
            bytes,
            first: usize::MAX,
            last: 0,
        });
        BufferId(self.buffers.len() - 1)
    }

    fn value(&mut self, id: ValueId) -> BufferId {
        if let Some(buffer) = self.values[id.0] {
            return buffer;
        }
        let buffer = self.buffer(self.graph.plane(id).elements() * self.batch * F32);
        self.values[id.0] = Some(buffer);
        buffer
    }

    /// The gradient of a value as the next writer sees it.
    fn grad(&mut self, id: ValueId) -> Grad {
        if let Some(buffer) = self.grads[id.0] {
            return Grad {
                buffer,
                accumulate: true,
            };
        }
        let buffer = self.buffer(self.graph.plane(id).elements() * self.batch * F32);
        self.grads[id.0] = Some(buffer);
        Grad {
            buffer,
            accumulate: false,
        }
    }

    fn grad_done(&self, id: ValueId) -> BufferId {
        self.grads[id.0].expect("every value that is read has a gradient by now")
    }

    /// The one reader of a value, if it has just one.
    fn only_reader(&self, id: ValueId) -> Option<usize> {
        match self.readers[id.0][..] {
            [one] => Some(one),
            _ => None,
        }
    }

    fn op(&self, index: usize) -> Op {
        self.graph.nodes()[index].op
    }

    /// The value after a ReLU that alone reads `y`.
    fn after_relu(&self, y: ValueId) -> (ValueId, bool) {
        match self.only_reader(y) {
            Some(i) if self.op(i) == Op::Relu => (ValueId(i), true),
            _ => (y, false),
        }
    }

    fn scratch(&mut self, elements: usize) {
        self.scratch_bytes = self.scratch_bytes.max(elements * F32);
    }

    fn rows(&self, plane: Plane) -> usize {
        plane.pixels() * self.batch
    }

    /// Row tiles that fit the worker's share; columns are cut too where rows alone give few tasks.
    fn gather_tiling(&self, rows: usize, depth: usize, cols: usize) -> Tiling {
        let tile_rows = (self.caps.tile_bytes / (depth * F32)).clamp(64, 512);
        let few = rows.div_ceil(tile_rows) < 8;
        Tiling {
            rows,
            cols,
            tile_rows,
            tile_cols: if few { 128 } else { cols },
        }
    }

    fn forward(&mut self) {
        for (i, node) in self.graph.nodes().iter().enumerate() {
            let out = ValueId(i);
            match node.op {
                Op::Input => {
                    let y = self.value(out);
                    self.kernels.push(Kernel::Input {
                        y,
                        plane: node.plane,
                    });
                }
                Op::Conv {
                    weight,
                    kernel,
                    stride,
                } => self.conv(out, weight, kernel, stride),
                Op::BatchNorm { norm } => {
                    let main_of_add = self.only_reader(out).is_some_and(|r| {
                        self.op(r) == Op::Add && self.graph.nodes()[r].inputs[0] == out
                    });
                    if !main_of_add {
                        self.normalize(norm, node.inputs[0], None, out);
                    }
                }
                Op::Add => {
                    let [main, residual] = node.inputs[..] else {
                        unreachable!("a sum reads two values")
                    };
                    let Op::BatchNorm { norm } = self.op(main.0) else {
                        panic!("{}: the first summand has to be a normalisation", node.name)
                    };
                    self.normalize(norm, self.graph.node(main).inputs[0], Some(residual), out);
                }
                Op::Relu => assert!(
                    self.values[i].is_some(),
                    "{}: no normalisation before it",
                    node.name
                ),
                Op::MaxPool {
                    kernel,
                    stride,
                    pad_before,
                } => {
                    let input = node.inputs[0];
                    let (x, y) = (self.value(input), self.value(out));
                    let bytes = node.plane.elements() * self.batch;
                    let argmax = (self.mode == Mode::Train).then(|| self.buffer(bytes));
                    let (from, to) = (self.graph.plane(input), node.plane);
                    self.kernels.push(Kernel::MaxPool {
                        input: from,
                        output: to,
                        kernel,
                        stride,
                        pad_before,
                        x,
                        y,
                        argmax,
                    });
                    if let Some(argmax) = argmax {
                        self.steps.push(Step::MaxPool {
                            kernel,
                            stride,
                            pad_before,
                            argmax,
                            x: input,
                            y: out,
                        });
                    }
                }
                Op::AvgPool => {
                    let (x, y) = (self.value(node.inputs[0]), self.value(out));
                    self.kernels.push(Kernel::AvgPool {
                        input: self.graph.plane(node.inputs[0]),
                        x,
                        y,
                    });
                    self.steps.push(Step::AvgPool {
                        x: node.inputs[0],
                        y: out,
                    });
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
                    self.steps.push(Step::Linear {
                        weight,
                        bias,
                        x: input,
                        y: out,
                    });
                }
            }
        }
        let logits = self.value(self.graph.logits());
        let d = (self.mode == Mode::Train).then(|| self.grad(self.graph.logits()).buffer);
        self.kernels.push(Kernel::Loss {
            classes: self.graph.classes(),
            logits,
            d,
        });
    }

    fn conv(&mut self, out: ValueId, weight: ParamId, kernel: usize, stride: usize) {
        let input = self.graph.node(out).inputs[0];
        let geometry = Geometry {
            input: self.graph.plane(input),
            output: self.graph.plane(out),
            kernel,
            stride,
        };
        let (x, y) = (self.value(input), self.value(out));
        let tiling = self.gather_tiling(
            self.rows(geometry.output),
            geometry.depth(),
            geometry.output.c,
        );
        if !geometry.is_matmul() {
            self.scratch(tiling.tile_rows * geometry.depth());
        }
        let statistics = match (self.mode, self.only_reader(out).map(|r| self.op(r))) {
            (Mode::Train, Some(Op::BatchNorm { norm })) => {
                let partials = self.buffer(tiling.row_tasks() * 2 * geometry.output.c * F32);
                let state = self.state(norm);
                Some(Statistics {
                    norm,
                    partials,
                    state,
                })
            }
            _ => None,
        };
        self.kernels.push(Kernel::Conv {
            geometry,
            weight,
            x,
            y,
            statistics,
            tiling,
        });
        self.steps.push(Step::Conv {
            geometry,
            weight,
            x: input,
            z: out,
        });
    }

    fn state(&mut self, norm: NormId) -> BufferId {
        let bytes = 4 * self.graph.norms()[norm.0].channels * F32;
        let state = self.buffer(bytes);
        self.states[norm.0] = Some(state);
        state
    }

    fn normalize(&mut self, norm: NormId, z: ValueId, residual: Option<ValueId>, out: ValueId) {
        let name = &self.graph.norms()[norm.0].name;
        assert!(
            matches!(self.graph.node(z).op, Op::Conv { .. }),
            "{name}: a normalisation follows a convolution"
        );
        let state = match (self.mode, self.states[norm.0]) {
            (Mode::Train, state) => {
                state.unwrap_or_else(|| panic!("{name}: its convolution has other readers"))
            }
            (Mode::Infer, _) => {
                let state = self.state(norm);
                self.kernels.push(Kernel::RunningNorm { norm, state });
                state
            }
        };
        let (end, relu) = self.after_relu(out);
        let plane = self.graph.plane(out);
        let (zb, rb, y) = (
            self.value(z),
            residual.map(|r| self.value(r)),
            self.value(end),
        );
        let rows = self.rows(plane);
        self.kernels.push(Kernel::Normalize {
            channels: plane.c,
            rows,
            state,
            z: zb,
            residual: rb,
            relu,
            y,
        });
        self.steps.push(Step::Normalize {
            norm,
            state,
            z,
            residual,
            relu,
            y: end,
        });
    }

    fn backward(&mut self) {
        for step in std::mem::take(&mut self.steps).into_iter().rev() {
            match step {
                Step::Linear { weight, bias, x, y } => {
                    let (inputs, outputs) = (self.graph.plane(x).c, self.graph.plane(y).c);
                    let d = self.grad_done(y);
                    let (xb, dx) = (self.value(x), self.grad(x));
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
                    let (d, dx) = (self.grad_done(y), self.grad(x));
                    self.kernels.push(Kernel::AvgPoolBackward {
                        input: self.graph.plane(x),
                        d,
                        dx,
                    });
                }
                Step::MaxPool {
                    kernel,
                    stride,
                    pad_before,
                    argmax,
                    x,
                    y,
                } => {
                    let (input, output) = (self.graph.plane(x), self.graph.plane(y));
                    let (d, dx) = (self.grad_done(y), self.grad(x));
                    self.kernels.push(Kernel::MaxPoolBackward {
                        input,
                        output,
                        kernel,
                        stride,
                        pad_before,
                        argmax,
                        d,
                        dx,
                    });
                }
                Step::Normalize {
                    norm,
                    state,
                    z,
                    residual,
                    relu,
                    y,
                } => {
                    let channels = self.graph.plane(z).c;
                    let d = self.grad_done(y);
                    let residual = residual.map(|r| self.grad(r));
                    self.grads[z.0] = Some(d); // in place
                    let rows = self.rows(self.graph.plane(z));
                    let tile_rows = (131_072 / channels).max(16);
                    let tiling = Tiling {
                        rows,
                        cols: channels,
                        tile_rows,
                        tile_cols: channels,
                    };
                    let partials = self.buffer(tiling.row_tasks() * 2 * channels * F32);
                    let (z, y) = (self.value(z), relu.then(|| self.value(y)));
                    self.kernels.push(Kernel::NormalizeBackward {
                        norm,
                        state,
                        z,
                        y,
                        d,
                        residual,
                        partials,
                        tiling,
                    });
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

    fn conv_backward(&mut self, geometry: Geometry, weight: ParamId, x: ValueId, z: ValueId) {
        let Geometry {
            input,
            output,
            kernel,
            stride,
        } = geometry;
        let d = self.grad_done(z);
        let depth = geometry.depth();
        let weight_tiling = Tiling {
            rows: depth,
            cols: output.c,
            tile_rows: (depth / 8).next_multiple_of(32).clamp(32, 256),
            tile_cols: (output.c / 2).clamp(32, 256),
        };
        self.scratch(WEIGHT_CHUNK * weight_tiling.tile_rows);
        let wants_dx = self.graph.node(x).op != Op::Input;
        let dx = wants_dx.then(|| self.grad(x));
        let packed = wants_dx.then(|| self.buffer(depth * output.c * F32));
        // Each of the stride^2 phases of the input meets at most ceil(K / stride)^2 taps.
        let taps = kernel.div_ceil(stride).pow(2);
        let phase_rows = self.batch * input.h.div_ceil(stride) * input.w.div_ceil(stride);
        let x_tiling = self.gather_tiling(phase_rows, taps * output.c, input.c);
        if wants_dx {
            let gathered = if geometry.is_matmul() {
                0
            } else {
                taps * output.c
            };
            self.scratch(x_tiling.tile_rows * (gathered + input.c));
        }
        let xb = self.value(x);
        self.kernels.push(Kernel::ConvBackward {
            geometry,
            weight,
            x: xb,
            d,
            dx,
            packed,
            weight_tiling,
            x_tiling,
        });
    }
}

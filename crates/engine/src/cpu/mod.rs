//! The CPU engine: f32, NHWC, one planned arena, micro-batches, tasks over a pool of threads.
//!
//! Sums are cut by shape, never by the number of threads, so the bits are the same for any number of threads. After
//! the first step of each batch size no memory of an activation's size is allocated.

#![expect(
    unsafe_code,
    reason = "tasks share one arena; every block says who keeps its precondition"
)]

mod conv;
pub(crate) mod fuse;
mod memory;
mod norm;
mod pool;
pub(crate) mod simd;
mod simple;
pub(crate) mod weights;
pub(crate) mod wino;

use std::collections::BTreeMap;
use std::sync::Arc;

use graph::{BufferId, Caps, Graph, Kernel, Mode, NORM_UPDATE, ParamId, Program};

use crate::state::{self, MOMENTUM_PREFIX, RUNNING_MEAN, RUNNING_VAR, State, Tensor};
use crate::{Batch, Engine, Error, Hyper, Metrics, Pixels};
use memory::{ALIGNMENT, Block, Scratch, Span};
use norm::{NormState, Residual};
use pool::Pool;
use simple::Window;

/// What the engine asks of a program.
pub const CAPS: Caps = Caps {
    alignment: ALIGNMENT,
    tile_bytes: 4 << 20,
};

/// Memory that training takes, known before anything is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Master parameters.
    pub parameters: usize,
    /// Gradients.
    pub gradients: usize,
    /// Momentum.
    pub optimizer: usize,
    /// The larger of the training and the evaluation arena.
    pub arena: usize,
    /// What the workers gather into.
    pub scratch: usize,
}

impl Memory {
    /// The memory of `graph` trained with micro-batches of `micro_batch` images on `threads` threads.
    pub fn plan(graph: &Graph, micro_batch: usize, threads: usize) -> Self {
        let train = Program::new(graph, &CAPS, micro_batch, Mode::Train);
        let infer = Program::new(graph, &CAPS, micro_batch, Mode::Infer);
        let parameters = Layout::new(graph).bytes;
        Self {
            parameters,
            gradients: parameters,
            optimizer: parameters,
            arena: train.arena_bytes.max(infer.arena_bytes),
            scratch: scratch_bytes(&train).max(scratch_bytes(&infer)) * threads,
        }
    }

    /// The sum.
    pub fn total(&self) -> usize {
        self.parameters + self.gradients + self.optimizer + self.arena + self.scratch
    }
}

fn scratch_bytes(program: &Program) -> usize {
    program.scratch_bytes.next_multiple_of(ALIGNMENT)
}

/// Where each parameter lies in the flat arrays.
struct Layout {
    /// Offset and length, bytes.
    slots: Vec<(usize, usize)>,
    bytes: usize,
}

impl Layout {
    fn new(graph: &Graph) -> Self {
        let mut bytes = 0;
        let slot = |p: &graph::Param| {
            let slot = (bytes, p.elements() * size_of::<f32>());
            bytes = (slot.0 + slot.1).next_multiple_of(ALIGNMENT);
            slot
        };
        Self {
            slots: graph.params().iter().map(slot).collect(),
            bytes,
        }
    }

    fn slot<'a>(&self, block: &'a Block, id: ParamId) -> Span<'a, f32> {
        let (offset, bytes) = self.slots[id.0];
        block.span(offset, bytes)
    }
}

/// Running statistics, and this step's sums over micro-batches.
struct Running {
    mean: Vec<f32>,
    var: Vec<f32>,
    mean_sum: Vec<f64>,
    var_sum: Vec<f64>,
}

impl Running {
    /// Moves the running statistics by the mean over `micro_batches` and clears the sums.
    fn update(&mut self, micro_batches: usize) {
        let update = f64::from(NORM_UPDATE);
        for (running, sums) in [
            (&mut self.mean, &mut self.mean_sum),
            (&mut self.var, &mut self.var_sum),
        ] {
            for (r, sum) in running.iter_mut().zip(sums) {
                *r = ((1.0 - update) * f64::from(*r)
                    + update * std::mem::take(sum) / micro_batches as f64)
                    as f32;
            }
        }
    }
}

/// The engine.
pub struct Cpu {
    graph: Graph,
    micro_batch: usize,
    layout: Layout,
    params: Block,
    grads: Block,
    momentum: Block,
    running: Vec<Running>,
    programs: BTreeMap<(usize, Mode), Arc<Program>>,
    arena: Block,
    scratch: Block,
    pool: Pool,
}

/// How one micro-batch takes part in a step.
struct Part {
    /// Add to the gradients of earlier micro-batches.
    accumulate: bool,
    /// One over the images of the global batch.
    scale: f64,
    label_smoothing: f64,
}

impl Part {
    /// Nothing is learned.
    const EVAL: Self = Self {
        accumulate: false,
        scale: 1.0,
        label_smoothing: 0.0,
    };
}

impl Cpu {
    /// An engine for `graph` with `state`, running `micro_batch` images at a time on `threads` threads.
    ///
    /// # Errors
    /// If the state is not one of the graph's, or memory runs out.
    pub fn new(
        graph: &Graph,
        micro_batch: usize,
        threads: usize,
        state: &State,
    ) -> Result<Self, Error> {
        let memory = Memory::plan(graph, micro_batch, threads);
        let running = |n: &graph::Norm| Running {
            mean: vec![0.0; n.channels],
            var: vec![1.0; n.channels],
            mean_sum: vec![0.0; n.channels],
            var_sum: vec![0.0; n.channels],
        };
        let mut cpu = Self {
            graph: graph.clone(),
            micro_batch,
            layout: Layout::new(graph),
            params: Block::new(memory.parameters)?,
            grads: Block::new(memory.gradients)?,
            momentum: Block::new(memory.optimizer)?,
            running: graph.norms().iter().map(running).collect(),
            programs: BTreeMap::new(),
            arena: Block::new(memory.arena)?,
            scratch: Block::new(memory.scratch)?,
            pool: Pool::new(threads),
        };
        cpu.load(state)?;
        Ok(cpu)
    }

    /// Callers hand in whole images of the network's size, and classes that it has.
    fn check(&self, batch: &Batch<'_>) {
        let (images, image) = (batch.images(), self.graph.plane(self.graph.input()));
        assert!(images > 0, "a batch has images");
        assert_eq!(batch.pixels.len(), images * image.elements(), "{image:?}");
        let classes = self.graph.classes();
        assert!(
            batch.labels.iter().all(|&l| (l as usize) < classes),
            "labels below {classes}"
        );
    }

    fn program(&mut self, batch: usize, mode: Mode) -> Result<Arc<Program>, Error> {
        let make = || Arc::new(Program::new(&self.graph, &CAPS, batch, mode));
        let program = Arc::clone(self.programs.entry((batch, mode)).or_insert_with(make));
        if program.arena_bytes > self.arena.bytes() {
            self.arena = Block::new(program.arena_bytes)?;
        }
        let scratch = scratch_bytes(&program) * self.pool.threads();
        if scratch > self.scratch.bytes() {
            self.scratch = Block::new(scratch)?;
        }
        Ok(program)
    }

    fn execute(&mut self, program: &Program, batch: &Batch<'_>, part: &Part) -> Metrics {
        let Self {
            graph,
            layout,
            params,
            grads,
            running,
            arena,
            scratch,
            pool,
            ..
        } = self;
        let n = program.batch;
        let buffer = |id: BufferId| -> Span<'_, f32> {
            let buffer = &program.buffers[id.0];
            arena.span(buffer.offset, buffer.bytes)
        };
        let bytes = |id: BufferId| -> Span<'_, u8> {
            let buffer = &program.buffers[id.0];
            arena.span(buffer.offset, buffer.bytes)
        };
        let slot = |block, id| layout.slot(block, id);
        let share = Scratch {
            all: scratch.all(),
            per_worker: scratch_bytes(program) / size_of::<f32>(),
        };
        let mut metrics = Metrics::default();
        for kernel in &program.kernels {
            match *kernel {
                Kernel::Input { y, .. } => simple::input(pool, batch.pixels, n, buffer(y)),
                Kernel::Conv {
                    geometry,
                    weight,
                    x,
                    y,
                    statistics,
                    tiling,
                } => {
                    let partials = statistics.map(|s| buffer(s.partials));
                    let w = slot(params, weight);
                    conv::forward(
                        pool,
                        share,
                        &geometry,
                        &tiling,
                        buffer(x),
                        w,
                        buffer(y),
                        partials,
                    );
                    if let Some(s) = statistics {
                        let norm = &graph.norms()[s.norm.0];
                        let sums = &mut running[s.norm.0];
                        // SAFETY: no region runs; state, partials and parameters are different memory.
                        let (mut state, partials, gamma, beta) = unsafe {
                            let (gamma, beta) = (
                                slot(params, norm.weight).get(),
                                slot(params, norm.bias).get(),
                            );
                            (
                                NormState::new(buffer(s.state)),
                                buffer(s.partials).get(),
                                gamma,
                                beta,
                            )
                        };
                        let count = tiling.rows as f64;
                        for c in 0..norm.channels {
                            let (mean, var) = norm::combine(partials, &tiling, c);
                            state.set(c, mean, var, gamma[c], beta[c]);
                            sums.mean_sum[c] += mean;
                            sums.var_sum[c] += var * count / (count - 1.0).max(1.0);
                        }
                    }
                }
                Kernel::RunningNorm { norm, state } => {
                    let (running, norm) = (&running[norm.0], &graph.norms()[norm.0]);
                    // SAFETY: no region runs; state and parameters are different memory.
                    let (mut state, gamma, beta) = unsafe {
                        let (gamma, beta) = (
                            slot(params, norm.weight).get(),
                            slot(params, norm.bias).get(),
                        );
                        (NormState::new(buffer(state)), gamma, beta)
                    };
                    for c in 0..norm.channels {
                        state.set(
                            c,
                            f64::from(running.mean[c]),
                            f64::from(running.var[c]),
                            gamma[c],
                            beta[c],
                        );
                    }
                }
                Kernel::Normalize {
                    channels,
                    rows,
                    state,
                    z,
                    residual,
                    relu,
                    y,
                } => {
                    // SAFETY: the kernel only reads the state.
                    let state = unsafe { NormState::new(buffer(state)) };
                    let residual = residual.map(buffer);
                    let (z, y) = (buffer(z), buffer(y));
                    norm::normalize(
                        pool,
                        (rows, channels),
                        state.scale,
                        state.shift,
                        z,
                        residual,
                        relu,
                        y,
                    );
                }
                Kernel::MaxPool {
                    input,
                    output,
                    kernel,
                    stride,
                    pad_before,
                    x,
                    y,
                    argmax,
                } => {
                    let window = Window {
                        from: input,
                        to: output,
                        kernel,
                        stride,
                        pad: pad_before,
                    };
                    simple::max_pool(pool, &window, n, buffer(x), buffer(y), argmax.map(bytes));
                }
                Kernel::AvgPool { input, x, y } => {
                    simple::avg_pool(pool, input, n, buffer(x), buffer(y))
                }
                Kernel::Linear {
                    inputs,
                    outputs,
                    weight,
                    bias,
                    x,
                    y,
                } => {
                    let (w, b) = (slot(params, weight), slot(params, bias));
                    simple::linear(pool, (n, inputs, outputs), buffer(x), w, b, buffer(y));
                }
                Kernel::Loss { classes, logits, d } => {
                    let (logits, d) = (buffer(logits), d.map(buffer));
                    metrics =
                        simple::loss(batch, classes, part.label_smoothing, part.scale, logits, d);
                }
                Kernel::LinearBackward {
                    inputs,
                    outputs,
                    weight,
                    bias,
                    x,
                    d,
                    dx,
                } => simple::linear_backward(
                    pool,
                    (n, inputs, outputs),
                    (buffer(x), slot(params, weight), buffer(d)),
                    (slot(grads, weight), slot(grads, bias), part.accumulate),
                    (buffer(dx.buffer), dx.accumulate),
                ),
                Kernel::AvgPoolBackward { input, d, dx } => {
                    simple::avg_pool_backward(
                        pool,
                        input,
                        n,
                        buffer(d),
                        buffer(dx.buffer),
                        dx.accumulate,
                    );
                }
                Kernel::MaxPoolBackward {
                    input,
                    output,
                    kernel,
                    stride,
                    pad_before,
                    argmax,
                    d,
                    dx,
                } => {
                    let window = Window {
                        from: input,
                        to: output,
                        kernel,
                        stride,
                        pad: pad_before,
                    };
                    let to = buffer(dx.buffer);
                    simple::max_pool_backward(
                        pool,
                        &window,
                        n,
                        bytes(argmax),
                        buffer(d),
                        to,
                        dx.accumulate,
                    );
                }
                Kernel::NormalizeBackward {
                    norm,
                    state,
                    z,
                    y,
                    d,
                    residual,
                    partials,
                    tiling,
                } => {
                    let norm = &graph.norms()[norm.0];
                    // SAFETY: no region runs; state and gradients are different memory.
                    let (state, dgamma, dbeta) = unsafe {
                        let (dgamma, dbeta) = (slot(grads, norm.weight), slot(grads, norm.bias));
                        (
                            NormState::new(buffer(state)),
                            dgamma.get_mut(),
                            dbeta.get_mut(),
                        )
                    };
                    let y = y.map(buffer);
                    let residual = residual.map(|r| Residual {
                        dx: buffer(r.buffer),
                        accumulate: r.accumulate,
                    });
                    let add = |sum: &mut f32, v: f64| {
                        *sum = if part.accumulate { *sum } else { 0.0 } + v as f32;
                    };
                    let done = |c: usize, gamma: f64, beta: f64| {
                        add(&mut dgamma[c], gamma);
                        add(&mut dbeta[c], beta);
                    };
                    norm::backward(
                        pool,
                        &tiling,
                        &state,
                        buffer(z),
                        y,
                        buffer(d),
                        residual,
                        buffer(partials),
                        done,
                    );
                }
                Kernel::ConvBackward {
                    geometry,
                    weight,
                    x,
                    d,
                    dx,
                    packed,
                    weight_tiling,
                    x_tiling,
                } => {
                    let pixels = n * geometry.output.pixels();
                    let (x, d, dw) = (buffer(x), buffer(d), slot(grads, weight));
                    let add = part.accumulate;
                    conv::backward_weight(
                        pool,
                        share,
                        &geometry,
                        &weight_tiling,
                        pixels,
                        x,
                        d,
                        dw,
                        add,
                    );
                    if let (Some(dx), Some(packed)) = (dx, packed) {
                        let (w, packed, to) =
                            (slot(params, weight), buffer(packed), buffer(dx.buffer));
                        let add = dx.accumulate;
                        conv::backward_input(
                            pool, share, &geometry, &x_tiling, n, w, packed, d, to, add,
                        );
                    }
                }
            }
        }
        metrics
    }

    fn update(&mut self, hyper: &Hyper) {
        for (p, &(offset, bytes)) in self.graph.params().iter().zip(&self.layout.slots) {
            let decay = if hyper.decay.covers(p.decay) {
                hyper.weight_decay
            } else {
                0.0
            };
            let [w, a, g] =
                [&self.params, &self.momentum, &self.grads].map(|block| block.span(offset, bytes));
            simple::update(&mut self.pool, w, a, g, hyper, decay);
        }
    }
}

/// Shape of a convolution's weight, outermost first.
type Oihw = [usize; 4];

/// Calls `f(index in OIHW, index in the engine's HWIO)` for every element, sixteen outputs at a time: whole cache
/// lines on one side, sixteen streams on the other.
fn each_weight([o, i, h, w]: Oihw, mut f: impl FnMut(usize, usize)) {
    let (taps, row) = (h * w, i * h * w);
    for block in (0..o).step_by(16) {
        for at in 0..row {
            let hwio = (at % taps * i + at / taps) * o;
            for output in block..(block + 16).min(o) {
                f(output * row + at, hwio + output);
            }
        }
    }
}

fn to_hwio(values: &[f32], shape: Oihw, to: &mut [f32]) {
    each_weight(shape, |oihw, hwio| to[hwio] = values[oihw]);
}

fn to_oihw(values: &[f32], shape: Oihw) -> Vec<f32> {
    let mut to = vec![0.0; values.len()];
    each_weight(shape, |oihw, hwio| to[oihw] = values[hwio]);
    to
}

impl Engine for Cpu {
    fn describe(&self) -> String {
        format!("cpu: f32, {} threads", self.pool.threads())
    }

    fn load(&mut self, state: &State) -> Result<(), Error> {
        state::check(&self.graph, state)?;
        for (p, &(offset, bytes)) in self.graph.params().iter().zip(&self.layout.slots) {
            let momentum = state.get(&format!("{MOMENTUM_PREFIX}{}", p.name));
            for (block, tensor) in [
                (&self.params, Some(&state[&p.name])),
                (&self.momentum, momentum),
            ] {
                // SAFETY: no region runs, and `&mut self` keeps others away.
                let to = unsafe { block.span::<f32>(offset, bytes).get_mut() };
                match (tensor, <Oihw>::try_from(&p.shape[..])) {
                    (Some(tensor), Ok(shape)) => to_hwio(&tensor.values, shape, to),
                    (Some(tensor), Err(_)) => to.copy_from_slice(&tensor.values),
                    (None, _) => to.fill(0.0),
                }
            }
        }
        for (n, running) in self.graph.norms().iter().zip(&mut self.running) {
            running
                .mean
                .copy_from_slice(&state[&format!("{}{RUNNING_MEAN}", n.name)].values);
            running
                .var
                .copy_from_slice(&state[&format!("{}{RUNNING_VAR}", n.name)].values);
        }
        Ok(())
    }

    fn state(&self) -> State {
        let mut state = State::new();
        for (p, &(offset, bytes)) in self.graph.params().iter().zip(&self.layout.slots) {
            for (prefix, block) in [("", &self.params), (MOMENTUM_PREFIX, &self.momentum)] {
                // SAFETY: no region runs; `&self` keeps writers away.
                let values = unsafe { block.span::<f32>(offset, bytes).get() };
                let values = match <Oihw>::try_from(&p.shape[..]) {
                    Ok(shape) => to_oihw(values, shape),
                    Err(_) => values.to_vec(),
                };
                state.insert(
                    format!("{prefix}{}", p.name),
                    Tensor {
                        shape: p.shape.clone(),
                        values,
                    },
                );
            }
        }
        for (n, running) in self.graph.norms().iter().zip(&self.running) {
            for (suffix, values) in [(RUNNING_MEAN, &running.mean), (RUNNING_VAR, &running.var)] {
                let tensor = Tensor {
                    shape: vec![n.channels],
                    values: values.clone(),
                };
                state.insert(format!("{}{suffix}", n.name), tensor);
            }
        }
        state
    }

    fn train_step(&mut self, batch: &Batch<'_>, hyper: &Hyper) -> Result<Metrics, Error> {
        self.check(batch);
        let mut total = Metrics::default();
        let mut micro_batches = 0;
        for micro in batch.micro_batches(self.micro_batch) {
            let program = self.program(micro.images(), Mode::Train)?;
            let part = Part {
                accumulate: micro_batches > 0,
                scale: 1.0 / batch.images() as f64,
                label_smoothing: hyper.label_smoothing,
            };
            total.add(&self.execute(&program, &micro, &part));
            micro_batches += 1;
        }
        self.update(hyper);
        self.running
            .iter_mut()
            .for_each(|r| r.update(micro_batches));
        Ok(total)
    }

    fn eval_step(&mut self, batch: &Batch<'_>) -> Result<Metrics, Error> {
        self.check(batch);
        let mut total = Metrics::default();
        for micro in batch.micro_batches(self.micro_batch) {
            let program = self.program(micro.images(), Mode::Infer)?;
            total.add(&self.execute(&program, &micro, &Part::EVAL));
        }
        Ok(total)
    }

    fn predict(&mut self, pixels: Pixels<'_>) -> Result<Vec<f32>, Error> {
        // The programs score what they infer; class 0 for every image, and the score is dropped.
        let labels = vec![0; pixels.len() / self.graph.plane(self.graph.input()).elements()];
        let batch = Batch {
            pixels,
            labels: &labels,
        };
        let mut all = vec![];
        for micro in batch.micro_batches(self.micro_batch) {
            let program = self.program(micro.images(), Mode::Infer)?;
            self.execute(&program, &micro, &Part::EVAL);
            let Some(&Kernel::Loss { logits, .. }) = program.kernels.last() else {
                unreachable!("inference ends with the loss");
            };
            let logits = &program.buffers[logits.0];
            // SAFETY: no region runs, and `&mut self` keeps writers away.
            all.extend_from_slice(unsafe {
                self.arena.span::<f32>(logits.offset, logits.bytes).get()
            });
        }
        Ok(all)
    }
}

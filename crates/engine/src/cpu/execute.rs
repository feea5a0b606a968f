//! Runs a program: each kernel of the plan becomes a call of its implementation on spans of the arena.

use std::time::Instant;

use graph::{
    After, BufferId, Close, Dropped, Geometry, Graph, Kernel, Mode, Normed, Operand, ParamId,
    Program, Squeeze,
};
use half::bf16;

use super::choose::{CpuCaps, Product, WeightProduct};
use super::direct::Convolution;
use super::fuse::{
    Affine, Centred, Epilogue, Grad, Join, Mask, Norm, Out, Partials, Raw, Source, Stats, Store,
};
use super::gate::Excited;
use super::memory::{ALIGNMENT, Block, Scratch, Span};
use super::norm::{self, Row, State};
use super::pool::Pool;
use super::simd::Element;
use super::squares::Left;
use super::weights::Panels;
use super::{
    Cpu, Layout, Precision, Running, direct, gate, pixels, simple, squares, wgrad, wgrad_tiles,
    wino,
};
use crate::{Batch, Dropout, Metrics};

/// Results of at least this size are stored past the caches: they will have left them before they are read again.
const STREAMED: usize = 8 << 20;

/// A program and how each of its kernels is cut into tasks.
pub(crate) struct Compiled {
    pub(crate) program: Program,
    plans: Vec<Plan>,
}

enum Plan {
    None,
    Product(Product),
    Weight(WeightProduct),
}

impl Compiled {
    pub(crate) fn new(graph: &Graph, caps: &CpuCaps, batch: usize, mode: Mode) -> Self {
        let program = Program::new(graph, caps, batch, mode);
        let plan = |kernel: &Kernel| match kernel {
            Kernel::Conv { geometry, .. } => Plan::Product(caps.forward_product(geometry, batch)),
            Kernel::ConvBackwardInput { geometry, .. } => {
                Plan::Product(caps.backward_product(geometry, batch))
            }
            Kernel::ConvBackwardWeight { geometry, .. } => {
                Plan::Weight(caps.weight_product(geometry, batch))
            }
            _ => Plan::None,
        };
        let mut plans: Vec<Plan> = program.kernels.iter().map(plan).collect();
        for &first in &program.joined {
            let geometry = |i: usize| match &program.kernels[i] {
                Kernel::Conv { geometry, .. } => geometry,
                _ => unreachable!("convolutions are joined"),
            };
            let joined = caps.joined_products(geometry(first), geometry(first + 1), batch);
            let joined = joined.expect("the program asked before");
            for (i, plan) in joined.into_iter().enumerate() {
                plans[first + i] = Plan::Product(Product::Direct(plan));
            }
        }
        Self { program, plans }
    }
}

/// How one micro-batch takes part in a step.
pub(crate) struct Part {
    /// Add to the gradients of earlier micro-batches.
    pub(crate) accumulate: bool,
    /// One over the images of the global batch.
    pub(crate) scale: f64,
    pub(crate) label_smoothing: f64,
    /// What is dropped, and the number of the first image in the global batch.
    pub(crate) dropout: Option<(Dropout, usize)>,
}

impl Part {
    /// Nothing is learned.
    pub(crate) const EVAL: Self = Self {
        accumulate: false,
        scale: 1.0,
        label_smoothing: 0.0,
        dropout: None,
    };
}

/// Buffers by number.
#[derive(Clone, Copy)]
struct Buffers<'a> {
    program: &'a Program,
    arena: &'a Block,
    constants: &'a Block,
    layout: &'a Layout,
    params: &'a Block,
    scratch: Scratch<'a>,
    /// Of a vector.
    lanes: usize,
}

impl<'a> Buffers<'a> {
    fn get<T: super::memory::Plain>(&self, id: BufferId) -> Span<'a, T> {
        let buffer = &self.program.buffers[id.0];
        let block = if buffer.constant {
            self.constants
        } else {
            self.arena
        };
        block.span(buffer.offset, buffer.bytes)
    }

    fn state(&self, id: BufferId) -> State<'a> {
        State::new(self.get(id))
    }

    /// # Safety
    /// Nobody writes the states of normalisations while the source lives.
    unsafe fn source<T: Element>(&self, operand: Operand) -> Source<'a, T> {
        // SAFETY: the caller's word.
        unsafe {
            match operand {
                Operand::Stored(x) => Source::Raw(Raw(self.get(x))),
                Operand::Normed { z, state, relu } => {
                    let state = self.state(state);
                    Source::Norm(Norm {
                        z: self.get(z),
                        scale: state.get(Row::Scale),
                        shift: state.get(Row::Shift),
                        floor: floor(relu),
                    })
                }
                Operand::Gradient { g, z, state } => {
                    let state = self.state(state);
                    Source::Grad(Grad {
                        g: self.get(g),
                        z: self.get(z),
                        mean: state.get(Row::Mean),
                        a: state.get(Row::A),
                        b: state.get(Row::B),
                        c: state.get(Row::C),
                    })
                }
            }
        }
    }

    fn excited(&self, squeeze: &Squeeze) -> Excited<'a> {
        Excited {
            mean: self.get(squeeze.mean),
            inner: self.get(squeeze.inner),
            sigmoid: self.get(squeeze.sigmoid),
            hidden: squeeze.hidden,
        }
    }

    fn left(&self, dropped: Dropped) -> Left<'a> {
        Left {
            mask: self.get(dropped.mask),
            scale: self.get(dropped.scale),
        }
    }

    /// # Safety
    /// As for `source`.
    unsafe fn epilogue<T: Element>(&self, close: Close) -> Epilogue<'a, T> {
        // SAFETY: the caller's word.
        unsafe {
            match close {
                Close::Open { add } => Epilogue::Store(Store {
                    add: add.map(|add| self.get(add)),
                }),
                Close::Lazy { normed, relu } => {
                    let state = self.state(normed.state);
                    Epilogue::Mask(Mask {
                        z: self.get(normed.z),
                        scale: state.get(Row::Scale),
                        shift: state.get(Row::Shift),
                        mean: state.get(Row::Mean),
                        relu,
                    })
                }
                Close::Stored { add, y, normed } => {
                    let centred = |n: Normed| Centred {
                        z: self.get(n.z),
                        mean: self.state(n.state).get(Row::Mean),
                    };
                    Epilogue::Join(Join {
                        add: add.map(|add| self.get(add)),
                        y: y.map(|y| self.get(y)),
                        norms: [normed[0].map(centred), normed[1].map(centred)],
                    })
                }
            }
        }
    }

    /// # Safety
    /// As for `source`.
    unsafe fn finish<T: Element>(&self, after: After) -> Epilogue<'a, T> {
        match after {
            After::Nothing => Epilogue::Store(Store { add: None }),
            After::Statistics { .. } => Epilogue::Stats(Stats),
            After::Folded {
                shift,
                residual,
                relu,
            } => Epilogue::Affine(Affine {
                // SAFETY: the caller's word.
                shift: unsafe { self.get(shift).get() },
                residual: residual.map(|r| self.get(r)),
                floor: floor(relu),
            }),
        }
    }

    /// A folded convolution.
    ///
    /// # Safety
    /// As for `source`.
    unsafe fn folded<T: Element, P: direct::Operand>(
        &self,
        kernel: &Kernel,
        plan: &'a direct::Plan,
    ) -> Convolution<'a, T, P> {
        let &Kernel::Conv {
            geometry,
            weights: Some(weights),
            x,
            y,
            after,
            ..
        } = kernel
        else {
            unreachable!("folded convolutions have weights of their own")
        };
        // SAFETY: the caller's word.
        let (source, epilogue) = unsafe { (self.source(x), self.finish(after)) };
        Convolution {
            plan,
            source,
            weights: self.get(weights),
            out: self.out(y, geometry.output.c, None),
            epilogue,
            partials: None,
        }
    }

    /// Results of `bytes` that a kernel writes; `add`, if they replace what it reads.
    fn out<T: Element>(&self, id: BufferId, channels: usize, add: Option<BufferId>) -> Out<'a, T> {
        let y = self.get::<T>(id);
        let bytes = y.len() * size_of::<T>();
        // In inference the next kernel reads them at once. Part of a cache line must not go past the caches: the other
        // part comes too late to go with it.
        let stream = self.program.mode == Mode::Train
            && bytes >= STREAMED
            && self.lanes * size_of::<T>() == ALIGNMENT
            && channels.is_multiple_of(32)
            && add != Some(id);
        Out {
            y,
            channels,
            stream,
        }
    }
}

/// The workers' memory, cut for a program.
fn share<'a>(program: &Program, scratch: &'a Block) -> Scratch<'a> {
    Scratch {
        all: scratch.all(),
        per_worker: program.worker_bytes.next_multiple_of(ALIGNMENT) / size_of::<f32>(),
    }
}

fn floor(relu: bool) -> f32 {
    if relu { 0.0 } else { f32::NEG_INFINITY }
}

/// What a close adds.
fn added(close: &Close) -> Option<BufferId> {
    match *close {
        Close::Open { add } | Close::Stored { add, .. } => add,
        Close::Lazy { .. } => None,
    }
}

impl Cpu {
    pub(crate) fn run(&mut self, compiled: &Compiled, batch: &Batch<'_>, part: &Part) -> Metrics {
        match self.options.precision {
            Precision::F32 => self.execute::<f32>(compiled, batch, part),
            Precision::Bf16 => self.execute::<bf16>(compiled, batch, part),
        }
    }

    /// Fills the constants.
    pub(crate) fn fold(&mut self, compiled: &Compiled) {
        let program = &compiled.program;
        let buffers = Buffers {
            program,
            arena: &self.arena,
            constants: &self.folded,
            layout: &self.layout,
            params: &self.params,
            scratch: share(program, &self.scratch),
            lanes: self.options.level.lanes(),
        };
        for kernel in &program.setup {
            let Kernel::Fold {
                geometry,
                weight,
                norm,
                plain,
                weights,
                shift,
            } = *kernel
            else {
                unreachable!("setup only folds")
            };
            let running = &self.running[norm.0];
            let norm = &self.graph.norms()[norm.0];
            let panels = Panels::of(&geometry, 2 * self.options.level.lanes());
            let masters = self.layout.slot(&self.params, weight);
            let plain_span = buffers.get::<f32>(plain).part(0..panels.len());
            // SAFETY: no region runs; the spans are different memory.
            unsafe {
                let gamma = self.layout.slot(&self.params, norm.weight).get();
                let beta = self.layout.slot(&self.params, norm.bias).get();
                let shift = buffers.get::<f32>(shift).get_mut();
                let mut scale = vec![0.0f32; panels.count() * panels.nr];
                for c in 0..norm.channels {
                    let var = f64::from(running.var[c]) + f64::from(graph::NORM_EPSILON);
                    let s = f64::from(gamma[c]) / var.sqrt();
                    scale[c] = s as f32;
                    shift[c] = (f64::from(beta[c]) - f64::from(running.mean[c]) * s) as f32;
                }
                let scale = &scale;
                self.pool.run(panels.count(), |_, panel| {
                    let range = panel * panels.panel_len()..(panel + 1) * panels.panel_len();
                    let from = masters.part(range.clone()).get();
                    let to = plain_span.part(range).get_mut();
                    let scale = &scale[panel * panels.nr..(panel + 1) * panels.nr];
                    let rows = to.chunks_exact_mut(panels.nr);
                    for (to, from) in rows.zip(from.chunks_exact(panels.nr)) {
                        for (to, (from, scale)) in to.iter_mut().zip(from.iter().zip(scale)) {
                            *to = from * scale;
                        }
                    }
                });
            }
            if plain != weights {
                let product = self.caps.forward_product(&geometry, program.batch);
                pack(
                    &mut self.pool,
                    &self.caps,
                    &product,
                    &geometry,
                    plain_span,
                    weights,
                    &buffers,
                    false,
                );
            }
        }
    }

    fn execute<T: Element>(
        &mut self,
        compiled: &Compiled,
        batch: &Batch<'_>,
        part: &Part,
    ) -> Metrics {
        let mut metrics = Metrics::default();
        let Compiled { program, plans } = compiled;
        let mut kernels = program.kernels.iter().zip(plans).enumerate();
        while let Some((i, (kernel, plan))) = kernels.next() {
            let start = Instant::now();
            let mut all = vec![kernel];
            if program.joined.contains(&i)
                && let Some((_, (next, next_plan))) = kernels.next()
            {
                all.push(next);
                self.both::<T>(program, [(kernel, plan), (next, next_plan)]);
            } else {
                self.kernel::<T>(program, kernel, plan, batch, part, &mut metrics);
            }
            if self.profile.is_some() {
                let mut ids: Vec<_> = all.iter().flat_map(|k| k.buffers()).collect();
                ids.sort_unstable();
                ids.dedup();
                let bytes = ids.iter().map(|id| program.buffers[id.0].bytes).sum();
                let macs = all.iter().map(|k| k.macs(program.batch)).sum();
                let names = || all.iter().map(|k| name(k)).collect::<Vec<_>>().join(" + ");
                self.measured(names, start, macs, bytes);
            }
        }
        metrics
    }

    /// Two folded convolutions together.
    fn both<T: Element>(&mut self, program: &Program, kernels: [(&Kernel, &Plan); 2]) {
        let buffers = Buffers {
            program,
            arena: &self.arena,
            constants: &self.folded,
            layout: &self.layout,
            params: &self.params,
            scratch: share(program, &self.scratch),
            lanes: self.options.level.lanes(),
        };
        let (pool, scratch) = (&mut self.pool, buffers.scratch);
        let [first, second] = kernels.map(|(kernel, plan)| match plan {
            Plan::Product(Product::Direct(plan)) => (kernel, plan),
            _ => unreachable!("direct products are joined"),
        });
        // SAFETY: inference has no states of normalisations.
        unsafe {
            if first.1.pairs() == 2 {
                let [first, second] = [first, second].map(|(k, p)| buffers.folded::<T, bf16>(k, p));
                direct::convolve_both(pool, scratch, [&first, &second]);
            } else {
                let [first, second] = [first, second].map(|(k, p)| buffers.folded::<T, f32>(k, p));
                direct::convolve_both(pool, scratch, [&first, &second]);
            }
        }
    }

    fn kernel<T: Element>(
        &mut self,
        program: &Program,
        kernel: &Kernel,
        plan: &Plan,
        batch: &Batch<'_>,
        part: &Part,
        metrics: &mut Metrics,
    ) {
        let Self {
            graph,
            options,
            caps,
            layout,
            params,
            grads,
            running,
            arena,
            folded,
            scratch,
            pool,
            ..
        } = self;
        let (n, level) = (program.batch, options.level);
        let buffers = Buffers {
            program,
            arena,
            constants: folded,
            layout,
            params,
            scratch: share(program, scratch),
            lanes: options.level.lanes(),
        };
        let scratch = buffers.scratch;
        let partials = |id: BufferId, channels: usize| Partials {
            all: buffers.get(id),
            columns: caps.columns(channels),
        };
        let slot = |block, id| layout.slot(block, id);
        // SAFETY of the sources and epilogues below: a kernel that reads the state of a normalisation does not write
        // it, but for `close`, which sets a, b and c when the kernel's last region is over.

        // What visits every pixel of a plane and closes a value.
        macro_rules! visit {
            ($plane:expr, $dx:expr, $close:expr, $partials:expr, |$out:ident, $epilogue:ident, $sums:ident| $run:expr) => {{
                let (plane, close) = ($plane, $close);
                let $out = buffers.out($dx, plane.c, added(&close));
                let $sums = partials($partials, plane.c);
                // SAFETY: see above.
                let $epilogue = unsafe { buffers.epilogue::<T>(close) };
                $run;
                let rows = n * plane.pixels();
                set_gradients(
                    pool, layout, grads, graph, close, &buffers, $sums, rows, part,
                );
            }};
        }
        macro_rules! pool_backward {
            ($run:ident, $plane:ident, $d:ident, $dx:ident, $close:ident, $partials:ident) => {
                visit!($plane, $dx, $close, $partials, |out, epilogue, sums| {
                    pixels::$run(pool, level, $plane, n, buffers.get($d), out, epilogue, sums)
                })
            };
        }
        match *kernel {
            Kernel::Fold { .. } => unreachable!("setup is not among the kernels"),
            Kernel::NormBackward { .. } => unreachable!("convolutions normalise what they read"),
            Kernel::Input { y, .. } => {
                pixels::input::<T>(pool, level, batch.pixels, n, buffers.get(y));
            }
            Kernel::Conv {
                geometry,
                weight,
                weights,
                shared,
                x,
                y,
                after,
            } => {
                let Plan::Product(product) = plan else {
                    unreachable!("a convolution is a product")
                };
                let masters = slot(params, weight);
                if let (Some(weights), false) = (weights, matches!(after, After::Folded { .. })) {
                    pack(
                        pool, caps, product, &geometry, masters, weights, &buffers, false,
                    );
                }
                let channels = geometry.output.c;
                let out = buffers.out::<T>(y, channels, None);
                // SAFETY: see above.
                let (source, epilogue) = unsafe { (buffers.source::<T>(x), buffers.finish(after)) };
                let sums = match after {
                    After::Statistics { partials: id, .. } => Some(partials(id, channels)),
                    _ => None,
                };
                let weights = Weights {
                    geometry,
                    backward: false,
                    masters: weight,
                    packed: weights,
                    shared,
                };
                buffers.convolve(pool, caps, product, source, weights, out, epilogue, sums);
                if let After::Statistics { norm, state, .. } = after {
                    let spec = &graph.norms()[norm.0];
                    let state = buffers.state(state);
                    let sums = sums.expect("just made");
                    set_statistics(
                        pool,
                        layout,
                        params,
                        spec,
                        &mut running[norm.0],
                        state,
                        sums,
                    );
                }
            }
            Kernel::Gate {
                plane,
                x,
                squeeze,
                path,
                gate,
            } => {
                let excited = squeeze.map(|squeeze| (squeeze, buffers.excited(&squeeze)));
                if let Some((squeeze, excited)) = excited {
                    // SAFETY: see above.
                    let x = unsafe { buffers.source::<T>(x) };
                    pixels::avg_pool(pool, level, plane, n, x, excited.mean);
                    let layer = |ids: [ParamId; 2]| ids.map(|id| slot(params, id));
                    let (reduce, expand) = (layer(squeeze.reduce), layer(squeeze.expand));
                    gate::excite(pool, (n, plane.c), excited, reduce, expand);
                }
                let factors = gate::factors(part.dropout, path, n);
                let sigmoid = excited.map(|(_, excited)| excited.sigmoid);
                gate::fill(buffers.get(gate), sigmoid, &factors);
            }
            Kernel::GateBackward {
                plane,
                norm,
                g,
                z,
                state,
                squeeze,
                path,
                gate,
                sums,
                dz,
            } => {
                let norm = &graph.norms()[norm.0];
                let (state, gate) = (buffers.state(state), buffers.get(gate));
                let hidden = squeeze.map_or(0, |s| s.hidden);
                let sums = gate::Sums::new(buffers.get(sums), n * plane.c, n * hidden);
                // SAFETY: see above.
                let mean = unsafe { state.get(Row::Mean) };
                let tensors = (buffers.get::<T>(g), buffers.get::<T>(z), mean);
                pixels::gated_sums(pool, level, plane, n, tensors, sums.planes);
                if let Some(squeeze) = squeeze {
                    let layer = |ids: [ParamId; 2]| {
                        (
                            ids.map(|id| slot(params, id)),
                            ids.map(|id| slot(grads, id)),
                        )
                    };
                    gate::excite_backward(
                        pool,
                        (n, plane.c),
                        buffers.excited(&squeeze),
                        sums,
                        (state, slot(params, norm.bias)),
                        &gate::factors(part.dropout, path, n),
                        [layer(squeeze.reduce), layer(squeeze.expand)],
                        part.accumulate,
                    );
                }
                let dgamma = Channels(slot(grads, norm.weight));
                let dbeta = Channels(slot(grads, norm.bias));
                gate::close(
                    plane,
                    n,
                    sums,
                    gate,
                    squeeze.is_some(),
                    state,
                    |c, dg, db| {
                        // SAFETY: no region runs.
                        unsafe {
                            dgamma.add(c, dg, part.accumulate);
                            dbeta.add(c, db, part.accumulate);
                        }
                    },
                );
                let [a, c] = sums.constants();
                // SAFETY: nobody writes them from here on.
                let (a, b, c) = unsafe { (a.get(), state.get(Row::B), c.get()) };
                let dz = buffers.get(dz);
                pixels::gated_gradient(pool, level, plane, n, tensors, (a, b, c), dz);
            }
            Kernel::Sum {
                plane,
                x,
                gate,
                side,
                relu,
                y,
            } => {
                let out = buffers.out::<T>(y, plane.c, None);
                // SAFETY: see above.
                let (x, side) =
                    unsafe { (buffers.source(x), side.map(|side| buffers.source(side))) };
                let size = (n * plane.pixels(), plane.c);
                let gate = gate.map(|gate| (buffers.get(gate), plane.pixels()));
                norm::sum(pool, level, size, x, gate, side, relu, out.y, out.stream);
            }
            Kernel::DropBlock {
                plane,
                block,
                dropped,
            } => {
                let left = buffers.left(dropped);
                squares::draw(pool, part.dropout, (block, plane), n, left);
            }
            Kernel::DroppedSum {
                plane,
                x,
                side,
                dropped,
                relu,
                y,
            } => {
                // SAFETY: see above.
                let (x, side) =
                    unsafe { (buffers.source(x), side.map(|side| buffers.source(side))) };
                let size = (n * plane.pixels(), plane.c);
                let left = dropped.map(|dropped| dropped.map(|dropped| buffers.left(dropped)));
                squares::sum::<T>(pool, level, size, x, side, left, relu, buffers.get(y));
            }
            Kernel::DropBlockBackward {
                plane,
                dropped,
                d,
                dx,
                close,
                partials: id,
            } => visit!(plane, dx, close, id, |out, epilogue, sums| {
                let rest = (buffers.get(d), buffers.left(dropped));
                squares::backward(pool, level, plane, n, rest, out, epilogue, sums)
            }),
            Kernel::MaxPool {
                window,
                x,
                y,
                argmax,
            } => {
                // SAFETY: see above.
                let x = unsafe { buffers.source::<T>(x) };
                let argmax = argmax.map(|a| buffers.get(a));
                pixels::max_pool(pool, level, window, n, x, buffers.get(y), argmax);
            }
            Kernel::AvgPool { plane, x, y } => {
                let x = Source::Raw(Raw(buffers.get::<T>(x)));
                pixels::avg_pool(pool, level, plane, n, x, buffers.get(y));
            }
            Kernel::HalfPool { plane, x, y } => {
                pixels::half_pool::<T>(pool, level, plane, n, buffers.get(x), buffers.get(y));
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
                let size = (n, inputs, outputs);
                // Nobody else reads it, and the gradient of the weight needs it as it was read.
                simple::drop_out(part.dropout, inputs, buffers.get(x));
                simple::linear(pool, size, buffers.get(x), w, b, buffers.get(y));
            }
            Kernel::Loss { classes, logits, d } => {
                let (logits, d) = (buffers.get(logits), d.map(|d| buffers.get(d)));
                *metrics =
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
            } => {
                simple::linear_backward(
                    pool,
                    (n, inputs, outputs),
                    (buffers.get(x), slot(params, weight), buffers.get(d)),
                    (slot(grads, weight), slot(grads, bias), part.accumulate),
                    buffers.get(dx),
                );
                simple::drop_out(part.dropout, inputs, buffers.get(dx));
            }
            Kernel::AvgPoolBackward {
                plane,
                d,
                dx,
                close,
                partials: id,
            } => pool_backward!(avg_pool_backward, plane, d, dx, close, id),
            Kernel::HalfPoolBackward {
                plane,
                d,
                dx,
                close,
                partials: id,
            } => pool_backward!(half_pool_backward, plane, d, dx, close, id),
            Kernel::MaxPoolBackward {
                window,
                argmax,
                d,
                dx,
                close,
                partials: id,
            } => visit!(window.input, dx, close, id, |out, epilogue, sums| {
                let (argmax, d) = (buffers.get(argmax), buffers.get(d));
                pixels::max_pool_backward(pool, level, window, n, argmax, d, out, epilogue, sums)
            }),
            Kernel::ConvBackwardInput {
                geometry,
                weight,
                weights,
                shared,
                d,
                dx,
                close,
                partials: id,
            } => {
                let Plan::Product(product) = plan else {
                    unreachable!("a gradient of an input is a product")
                };
                let masters = slot(params, weight);
                pack(
                    pool, caps, product, &geometry, masters, weights, &buffers, true,
                );
                let channels = geometry.input.c;
                let (out, sums) = (
                    buffers.out::<T>(dx, channels, added(&close)),
                    partials(id, channels),
                );
                // SAFETY: see above.
                let (source, epilogue) = unsafe { (buffers.source(d), buffers.epilogue(close)) };
                let weights = Weights {
                    geometry,
                    backward: true,
                    masters: weight,
                    packed: Some(weights),
                    shared,
                };
                buffers.convolve(
                    pool,
                    caps,
                    product,
                    source,
                    weights,
                    out,
                    epilogue,
                    Some(sums),
                );
                let rows = n * geometry.input.pixels();
                set_gradients(
                    pool, layout, grads, graph, close, &buffers, sums, rows, part,
                );
            }
            Kernel::ConvBackwardWeight {
                geometry: _,
                weight,
                x,
                d,
                shared,
            } => {
                let Plan::Weight(plan) = plan else {
                    unreachable!("a gradient of a weight has its plan")
                };
                // SAFETY: see above.
                let (x, d) = unsafe { (buffers.source::<T>(x), buffers.source::<T>(d)) };
                let (shared, dw) = (buffers.get(shared), slot(grads, weight));
                let add = part.accumulate;
                match plan {
                    WeightProduct::Direct(plan) => {
                        wgrad::backward_weight(pool, scratch, shared, plan, x, d, dw, add);
                    }
                    WeightProduct::Tiled(plan) => {
                        wgrad_tiles::backward_weight(pool, scratch, shared, plan, x, d, dw, add);
                    }
                    WeightProduct::Winograd(plan) => {
                        wino::backward_weight(pool, level, scratch, shared, plan, x, d, dw, add);
                    }
                }
            }
        }
    }
}

/// Brings weights into the order in which a product reads them; `backward`, turned round for the gradient of the input.
fn pack(
    pool: &mut Pool,
    caps: &CpuCaps,
    product: &Product,
    geometry: &Geometry,
    masters: Span<'_, f32>,
    weights: BufferId,
    buffers: &Buffers<'_>,
    backward: bool,
) {
    match product {
        Product::Direct(plan) if !backward => {
            direct::pack_forward(pool, plan, masters, buffers.get(weights));
        }
        Product::Direct(plan) if plan.pairs() == 2 => {
            direct::pack_backward::<bf16>(pool, plan, geometry, masters, buffers.get(weights));
        }
        Product::Direct(plan) => {
            direct::pack_backward::<f32>(pool, plan, geometry, masters, buffers.get(weights));
        }
        Product::Winograd(plan) => {
            let weights = wino::Weights {
                panels: Panels::of(geometry, 2 * caps.level.lanes()),
                w: masters,
                u: buffers.get(weights),
                backward,
            };
            wino::transform(pool, caps.level, plan, weights);
        }
    }
}

/// What a product reads besides its source.
#[derive(Clone, Copy)]
struct Weights {
    geometry: Geometry,
    /// For the gradient of the input.
    backward: bool,
    masters: ParamId,
    /// In the order in which the product reads them, if that is another.
    packed: Option<BufferId>,
    /// Working memory.
    shared: BufferId,
}

impl Buffers<'_> {
    fn convolve<T: Element>(
        &self,
        pool: &mut Pool,
        caps: &CpuCaps,
        product: &Product,
        source: Source<'_, T>,
        weights: Weights,
        out: Out<'_, T>,
        epilogue: Epilogue<'_, T>,
        partials: Option<Partials<'_>>,
    ) {
        let scratch = self.scratch;
        match (product, weights.packed) {
            (Product::Direct(plan), Some(weights)) if plan.pairs() == 2 => {
                let weights = self.get::<bf16>(weights);
                let convolution = Convolution {
                    plan,
                    source,
                    weights,
                    out,
                    epilogue,
                    partials,
                };
                direct::convolve(pool, scratch, &convolution);
            }
            (Product::Direct(plan), packed) => {
                let masters = || self.layout.slot(self.params, weights.masters);
                let weights = packed.map_or_else(masters, |w| self.get(w));
                let convolution = Convolution {
                    plan,
                    source,
                    weights,
                    out,
                    epilogue,
                    partials,
                };
                direct::convolve(pool, scratch, &convolution);
            }
            (Product::Winograd(plan), packed) => {
                let masters = self.layout.slot(self.params, weights.masters);
                let (w, u) = match packed {
                    Some(packed) if plan.weights_len() > 0 => (masters, self.get(packed)),
                    // Tasks transform what they need: masters, or those with the normalisation folded in.
                    Some(folded) if !weights.backward => (self.get(folded), masters.part(0..0)),
                    _ => (masters, masters.part(0..0)),
                };
                let transformed = wino::Weights {
                    panels: Panels::of(&weights.geometry, 2 * caps.level.lanes()),
                    w,
                    u,
                    backward: weights.backward,
                };
                let (level, shared) = (caps.level, self.get(weights.shared));
                wino::convolve(
                    pool,
                    level,
                    scratch,
                    shared,
                    plan,
                    source,
                    transformed,
                    out,
                    epilogue,
                    partials,
                );
            }
        }
    }
}

/// A span that tasks write by channel.
#[derive(Clone, Copy)]
struct Channels<'a>(Span<'a, f32>);

impl Channels<'_> {
    /// # Safety
    /// Nobody else uses channel `c` meanwhile.
    unsafe fn add(self, c: usize, v: f64, accumulate: bool) {
        // SAFETY: the caller's word.
        let to = unsafe { &mut self.0.part(c..c + 1).get_mut()[0] };
        *to = if accumulate { *to } else { 0.0 } + v as f32;
    }
}

/// Statistics of a batch into the state of a normalisation and the sums of the running ones.
fn set_statistics(
    pool: &mut Pool,
    layout: &Layout,
    params: &Block,
    norm: &graph::Norm,
    running: &mut Running,
    state: State<'_>,
    partials: Partials<'_>,
) {
    // SAFETY: nobody writes parameters meanwhile.
    let (gamma, beta) = unsafe {
        let (gamma, beta) = (
            layout.slot(params, norm.weight),
            layout.slot(params, norm.bias),
        );
        (gamma.get(), beta.get())
    };
    let results: Vec<std::sync::OnceLock<(f64, f64)>> = (0..norm.channels)
        .map(|_| std::sync::OnceLock::new())
        .collect();
    norm::statistics(pool, partials, norm.channels, |c, mean, var, count| {
        // SAFETY: each channel is done once, by one task.
        unsafe { state.set_statistics(c, mean, var, gamma[c], beta[c]) };
        let unbiased = var * count / (count - 1.0).max(1.0);
        results[c].set((mean, unbiased)).expect("each channel once");
    });
    for (c, result) in results.into_iter().enumerate() {
        let (mean, var) = result.into_inner().expect("every channel is done");
        running.mean_sum[c] += mean;
        running.var_sum[c] += var;
    }
}

/// The constants of the normalisations that a close has gathered sums for, and the gradients of their parameters.
fn set_gradients(
    pool: &mut Pool,
    layout: &Layout,
    grads: &Block,
    graph: &Graph,
    close: Close,
    buffers: &Buffers<'_>,
    partials: Partials<'_>,
    count: usize,
    part: &Part,
) {
    for (i, normed) in close.normed().enumerate() {
        let norm = &graph.norms()[normed.norm.0];
        let dgamma = Channels(layout.slot(grads, norm.weight));
        let dbeta = Channels(layout.slot(grads, norm.bias));
        let state = buffers.state(normed.state);
        norm::gradient(pool, partials, 1 + i, count, state, |c, gamma, beta| {
            // SAFETY: each channel is done once, by one task.
            unsafe {
                dgamma.add(c, gamma, part.accumulate);
                dbeta.add(c, beta, part.accumulate);
            }
        });
    }
}

/// What a kernel computes, on which shapes.
fn name(kernel: &Kernel) -> String {
    let conv = |g: &Geometry, what: &str| {
        let stride = if g.stride > 1 { "/2" } else { "" };
        format!(
            "conv {k}x{k}{stride} {}->{} at {}x{}, {what}",
            g.input.c,
            g.output.c,
            g.output.h,
            g.output.w,
            k = g.kernel
        )
    };
    match kernel {
        Kernel::Fold { .. } => "fold".into(),
        Kernel::NormBackward { .. } => "gradient of a normalisation".into(),
        Kernel::Input { .. } => "input".into(),
        Kernel::Conv { geometry, .. } => conv(geometry, "forward"),
        Kernel::ConvBackwardInput { geometry, .. } => conv(geometry, "gradient of input"),
        Kernel::ConvBackwardWeight { geometry, .. } => conv(geometry, "gradient of weight"),
        Kernel::Gate { plane, .. } => {
            format!("factors of branch at {}x{}x{}", plane.h, plane.w, plane.c)
        }
        Kernel::GateBackward { plane, .. } => {
            format!(
                "factors of branch at {}x{}x{}, gradient",
                plane.h, plane.w, plane.c
            )
        }
        Kernel::HalfPool { .. } => "mean over 2x2".into(),
        Kernel::HalfPoolBackward { .. } => "mean over 2x2, gradient".into(),
        Kernel::Sum { plane, .. } => format!("sum of block at {}x{}x{}", plane.h, plane.w, plane.c),
        Kernel::DropBlock { plane, .. } => {
            format!("squares to drop at {}x{}x{}", plane.h, plane.w, plane.c)
        }
        Kernel::DroppedSum { plane, .. } => {
            format!("sum of what is left at {}x{}x{}", plane.h, plane.w, plane.c)
        }
        Kernel::DropBlockBackward { plane, .. } => {
            format!(
                "squares dropped at {}x{}x{}, gradient",
                plane.h, plane.w, plane.c
            )
        }
        Kernel::MaxPool { .. } => "max pool".into(),
        Kernel::AvgPool { .. } => "mean over plane".into(),
        Kernel::Linear { .. } => "classifier".into(),
        Kernel::Loss { .. } => "loss".into(),
        Kernel::LinearBackward { .. } => "classifier, gradients".into(),
        Kernel::AvgPoolBackward { .. } => "mean over plane, gradient".into(),
        Kernel::MaxPoolBackward { .. } => "max pool, gradient".into(),
    }
}

//! The CPU engine: NHWC, one planned arena, micro-batches, fused kernels, tasks over a pool of threads.
//!
//! Tensors are stored as f32 or bf16 ([`Precision`]); parameters, momentum, statistics and sums are f32 in any case.
//! Sums are cut by shape, never by the number of threads, so the bits are the same for any number of threads. After
//! the first step of each batch size no memory of an activation's size is allocated. docs/CPU-ENGINE.md tells how it
//! works and why it is fast.

#![expect(
    unsafe_code,
    reason = "tasks share one arena; every block says who keeps its precondition"
)]

mod choose;
mod direct;
mod execute;
mod fuse;
mod gate;
mod memory;
mod norm;
mod peak;
mod pixels;
mod pool;
mod simd;
mod simple;
mod squares;
#[cfg(test)]
mod tests;
mod tiles;
mod weights;
mod wgrad;
mod wgrad_tiles;
mod wino;

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use graph::{Graph, Mode, NORM_UPDATE, Op, ParamId};

use crate::profile::{self, KernelTime, Profile};
use crate::state::{
    self, AVERAGE_PREFIX, MOMENTUM_PREFIX, RUNNING_MEAN, RUNNING_VAR, State, Tensor,
};
use crate::{Batch, Engine, Error, Hyper, Metrics, Pixels, clip};
use choose::CpuCaps;
use execute::{Compiled, Part};
use memory::{ALIGNMENT, Block, Span};
pub use peak::peak;
use pool::Pool;
pub use simd::Level;
use weights::Panels;

/// How activations and their gradients are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 24 bits of mantissa.
    F32,
    /// 8 bits of mantissa and f32's range, in half the memory. Where the CPU has dot products of bf16, convolutions
    /// multiply in bf16 too; sums are f32.
    Bf16,
}

impl Precision {
    /// Both.
    pub const ALL: [Self; 2] = [Self::F32, Self::Bf16];
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

impl FromStr for Precision {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        Self::ALL
            .into_iter()
            .find(|p| p.to_string() == name)
            .ok_or(())
    }
}

/// How an engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Images that run at a time.
    pub micro_batch: usize,
    /// Threads that work.
    pub threads: usize,
    /// How activations are stored.
    pub precision: Precision,
    /// Vector instructions.
    pub level: Level,
    /// Whether 3 x 3 convolutions may be computed with fewer multiplications (Lavin and Gray 2016).
    pub winograd: bool,
    /// Whether a moving average of parameters and running statistics is kept ([`Hyper::average`]).
    pub average: bool,
}

impl Options {
    /// f32 with the best instructions of this CPU.
    pub fn new(micro_batch: usize, threads: usize) -> Self {
        Self {
            micro_batch,
            threads,
            precision: Precision::F32,
            level: Level::detect(),
            winograd: true,
            average: false,
        }
    }
}

/// Memory that training takes, known before anything is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Master parameters.
    pub parameters: usize,
    /// Gradients.
    pub gradients: usize,
    /// Momentum.
    pub optimizer: usize,
    /// Moving average of the parameters, where one is kept.
    pub average: usize,
    /// The larger of the training and the evaluation arena.
    pub arena: usize,
    /// Weights of evaluation, with normalisations folded in.
    pub folded: usize,
    /// What the workers pack into.
    pub scratch: usize,
}

impl Memory {
    /// The memory of `graph` trained with `options`.
    pub fn plan(graph: &Graph, options: &Options) -> Self {
        let caps = CpuCaps::new(options);
        let train = Compiled::new(graph, &caps, options.micro_batch, Mode::Train);
        let infer = Compiled::new(graph, &caps, options.micro_batch, Mode::Infer);
        Self::of(graph, options, &train, &infer)
    }

    fn of(graph: &Graph, options: &Options, train: &Compiled, infer: &Compiled) -> Self {
        let parameters = Layout::new(graph, options.level).bytes;
        let (train, infer) = (&train.program, &infer.program);
        let worker = train.worker_bytes.max(infer.worker_bytes);
        Self {
            parameters,
            gradients: parameters,
            optimizer: parameters,
            average: if options.average { parameters } else { 0 },
            arena: train.arena_bytes.max(infer.arena_bytes),
            folded: infer.constant_bytes,
            scratch: worker.next_multiple_of(ALIGNMENT) * options.threads,
        }
    }

    /// The sum.
    pub fn total(&self) -> usize {
        let owned = self.parameters + self.gradients + self.optimizer + self.average;
        owned + self.arena + self.folded + self.scratch
    }
}

/// Where each parameter lies in the flat arrays, and how.
struct Layout {
    slots: Vec<Slot>,
    bytes: usize,
}

struct Slot {
    offset: usize,
    bytes: usize,
    /// Of a convolution's weight.
    panels: Option<Panels>,
}

impl Layout {
    fn new(graph: &Graph, level: Level) -> Self {
        let mut end = 0;
        let is_conv = |id: ParamId| {
            let is = |op: Op| matches!(op, Op::Conv { weight, .. } if weight == id);
            graph.nodes().iter().any(|node| is(node.op))
        };
        let slot = |(i, p): (usize, &graph::Param)| {
            let panels = match p.shape[..] {
                [outputs, inputs, h, w] if is_conv(ParamId(i)) => Some(Panels {
                    inputs,
                    outputs,
                    taps: h * w,
                    nr: 2 * level.lanes(),
                }),
                _ => None,
            };
            let len = panels.map_or(p.elements(), |panels| panels.len());
            let (offset, bytes) = (end, len * size_of::<f32>());
            end = (offset + bytes).next_multiple_of(ALIGNMENT);
            Slot {
                offset,
                bytes,
                panels,
            }
        };
        Self {
            slots: graph.params().iter().enumerate().map(slot).collect(),
            bytes: end,
        }
    }

    fn slot<'a>(&self, block: &'a Block, id: ParamId) -> Span<'a, f32> {
        let slot = &self.slots[id.0];
        block.span(slot.offset, slot.bytes)
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

/// Moving averages.
struct Average {
    params: Block,
    /// Mean and variance of each normalisation.
    running: Vec<[Vec<f32>; 2]>,
}

/// The engine.
pub struct Cpu {
    graph: Graph,
    options: Options,
    caps: CpuCaps,
    layout: Layout,
    params: Block,
    grads: Block,
    momentum: Block,
    running: Vec<Running>,
    average: Option<Average>,
    programs: BTreeMap<(usize, Mode), Arc<Compiled>>,
    arena: Block,
    folded: Block,
    /// The batch whose program's constants `folded` holds, of the parameters as they are now.
    folded_for: Option<usize>,
    scratch: Block,
    pool: Pool,
    profile: Profile,
}

impl Cpu {
    /// An engine for `graph` with `state`.
    ///
    /// # Errors
    /// If the state is not one of the graph's, or memory runs out.
    ///
    /// # Panics
    /// If the CPU lacks the instructions of the options' level.
    pub fn new(graph: &Graph, options: &Options, state: &State) -> Result<Self, Error> {
        assert!(
            options.level.is_available(),
            "this CPU has no {} instructions",
            options.level
        );
        let caps = CpuCaps::new(options);
        let compile = |mode| {
            let compiled = Compiled::new(graph, &caps, options.micro_batch, mode);
            ((options.micro_batch, mode), Arc::new(compiled))
        };
        let programs = BTreeMap::from([compile(Mode::Train), compile(Mode::Infer)]);
        let of = |mode| &*programs[&(options.micro_batch, mode)];
        let memory = Memory::of(graph, options, of(Mode::Train), of(Mode::Infer));
        let running = |n: &graph::Norm| Running {
            mean: vec![0.0; n.channels],
            var: vec![1.0; n.channels],
            mean_sum: vec![0.0; n.channels],
            var_sum: vec![0.0; n.channels],
        };
        let mut cpu = Self {
            graph: graph.clone(),
            options: *options,
            caps,
            layout: Layout::new(graph, options.level),
            params: Block::new(memory.parameters)?,
            grads: Block::new(memory.gradients)?,
            momentum: Block::new(memory.optimizer)?,
            running: graph.norms().iter().map(running).collect(),
            average: match options.average {
                true => Some(Average {
                    params: Block::new(memory.average)?,
                    running: (graph.norms().iter())
                        .map(|n| [vec![0.0; n.channels], vec![0.0; n.channels]])
                        .collect(),
                }),
                false => None,
            },
            programs,
            arena: Block::new(memory.arena)?,
            folded: Block::new(memory.folded)?,
            folded_for: None,
            scratch: Block::new(memory.scratch)?,
            pool: Pool::new(options.threads),
            profile: None,
        };
        cpu.load(state)?;
        Ok(cpu)
    }

    /// Starts to measure kernels, from zero.
    pub fn start_profile(&mut self) {
        self.profile = Some(BTreeMap::new());
    }

    /// What was measured since, slowest first; measuring ends.
    pub fn take_profile(&mut self) -> Vec<KernelTime> {
        profile::take(&mut self.profile)
    }

    fn program(&mut self, batch: usize, mode: Mode) -> Result<Arc<Compiled>, Error> {
        let make = || Arc::new(Compiled::new(&self.graph, &self.caps, batch, mode));
        let compiled = Arc::clone(self.programs.entry((batch, mode)).or_insert_with(make));
        let program = &compiled.program;
        if program.arena_bytes > self.arena.bytes() {
            self.arena = Block::new(program.arena_bytes)?;
        }
        let scratch = program.worker_bytes.next_multiple_of(ALIGNMENT) * self.pool.threads();
        if scratch > self.scratch.bytes() {
            self.scratch = Block::new(scratch)?;
        }
        if mode == Mode::Infer && self.folded_for != Some(batch) {
            if program.constant_bytes > self.folded.bytes() {
                self.folded = Block::new(program.constant_bytes)?;
            }
            self.fold(&compiled);
            self.folded_for = Some(batch);
        }
        Ok(compiled)
    }

    fn update(&mut self, hyper: &Hyper) {
        let start = std::time::Instant::now();
        let pool = &mut self.pool;
        let mut scale = 1.0;
        if let Some(most) = hyper.clip_norm {
            let mut sum = 0.0;
            for slot in &self.layout.slots {
                let [w, g] =
                    [&self.params, &self.grads].map(|block| block.span(slot.offset, slot.bytes));
                sum += simple::squares(pool, w, g, 1.0, 0.0).1;
            }
            scale = clip(sum.sqrt(), most);
        }
        for (p, slot) in self.graph.params().iter().zip(&self.layout.slots) {
            let [w, a, g] = [&self.params, &self.momentum, &self.grads]
                .map(|block| block.span(slot.offset, slot.bytes));
            let rule = hyper.rule.of_tensor(hyper, p.decay, |decay| {
                let (w, g) = simple::squares(pool, w, g, scale, decay);
                (w.sqrt(), g.sqrt())
            });
            simple::update(pool, w, a, g, rule, (hyper.momentum, hyper.nesterov, scale));
        }
        self.folded_for = None;
        let bytes = 5 * self.layout.bytes;
        self.measured(|| "update".to_owned(), start, 0, bytes);
    }

    /// Moves the average towards what has just been learned.
    fn move_average(&mut self, decay: f64) {
        let start = std::time::Instant::now();
        let average = self
            .average
            .as_mut()
            .expect("an engine that was made to keep an average");
        let rate = (1.0 - decay) as f32;
        let (v, w) = (average.params.all(), self.params.all());
        simple::average(&mut self.pool, v, w, rate);
        for (v, w) in average.running.iter_mut().zip(&self.running) {
            simple::average_values(&mut v[0], &w.mean, rate);
            simple::average_values(&mut v[1], &w.var, rate);
        }
        let bytes = 3 * self.layout.bytes;
        self.measured(|| "moving average".to_owned(), start, 0, bytes);
    }

    /// Adds to the profile, if there is one.
    fn measured(
        &mut self,
        name: impl FnOnce() -> String,
        start: std::time::Instant,
        macs: usize,
        bytes: usize,
    ) {
        let Some(profile) = &mut self.profile else {
            return;
        };
        let time = start.elapsed();
        let name = name();
        let entry = profile.entry(name.clone()).or_insert(KernelTime {
            name,
            calls: 0,
            time: Duration::ZERO,
            fastest: Duration::MAX,
            macs: 0,
            bytes: 0,
        });
        entry.calls += 1;
        entry.time += time;
        entry.fastest = entry.fastest.min(time);
        entry.macs += macs;
        entry.bytes += bytes;
    }
}

/// Puts an OIHW weight into panels.
fn to_panels(values: &[f32], panels: &Panels, to: &mut [f32]) {
    to.fill(0.0);
    for o in 0..panels.outputs {
        for i in 0..panels.inputs {
            for tap in 0..panels.taps {
                to[panels.at(o, i, tap)] = values[(o * panels.inputs + i) * panels.taps + tap];
            }
        }
    }
}

fn from_panels(values: &[f32], panels: &Panels) -> Vec<f32> {
    let mut to = Vec::with_capacity(panels.outputs * panels.depth());
    for o in 0..panels.outputs {
        for i in 0..panels.inputs {
            to.extend((0..panels.taps).map(|tap| values[panels.at(o, i, tap)]));
        }
    }
    to
}

impl Engine for Cpu {
    fn describe(&self) -> String {
        let Options {
            precision, level, ..
        } = self.options;
        let threads = self.pool.threads();
        format!("cpu: {precision}, {level}, {threads} threads")
    }

    fn load(&mut self, state: &State) -> Result<(), Error> {
        state::check(&self.graph, state)?;
        for (p, slot) in self.graph.params().iter().zip(&self.layout.slots) {
            let of = |prefix: &str| state.get(&format!("{prefix}{}", p.name));
            let value = &state[&p.name];
            let mut blocks = vec![
                (&self.params, Some(value)),
                (&self.momentum, of(MOMENTUM_PREFIX)),
            ];
            if let Some(average) = &self.average {
                blocks.push((&average.params, of(AVERAGE_PREFIX).or(Some(value))));
            }
            for (block, tensor) in blocks {
                // SAFETY: no region runs, and `&mut self` keeps others away.
                let to = unsafe { block.span::<f32>(slot.offset, slot.bytes).get_mut() };
                match (tensor, &slot.panels) {
                    (Some(tensor), Some(panels)) => to_panels(&tensor.values, panels, to),
                    (Some(tensor), None) => to.copy_from_slice(&tensor.values),
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
        if let Some(average) = &mut self.average {
            for (n, running) in self.graph.norms().iter().zip(&mut average.running) {
                for (suffix, values) in [RUNNING_MEAN, RUNNING_VAR].iter().zip(running) {
                    let name = format!("{}{suffix}", n.name);
                    let average = state.get(&format!("{AVERAGE_PREFIX}{name}"));
                    values.copy_from_slice(&average.unwrap_or(&state[&name]).values);
                }
            }
        }
        self.folded_for = None;
        Ok(())
    }

    fn state(&self) -> Result<State, Error> {
        let mut state = State::new();
        for (p, slot) in self.graph.params().iter().zip(&self.layout.slots) {
            let mut blocks = vec![("", &self.params), (MOMENTUM_PREFIX, &self.momentum)];
            if let Some(average) = &self.average {
                blocks.push((AVERAGE_PREFIX, &average.params));
            }
            for (prefix, block) in blocks {
                // SAFETY: no region runs; `&self` keeps writers away.
                let values = unsafe { block.span::<f32>(slot.offset, slot.bytes).get() };
                let values = match &slot.panels {
                    Some(panels) => from_panels(values, panels),
                    None => values.to_vec(),
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
        for (i, n) in self.graph.norms().iter().enumerate() {
            let running = &self.running[i];
            let mut all = vec![("", [&running.mean, &running.var])];
            if let Some(average) = &self.average {
                let [mean, var] = &average.running[i];
                all.push((AVERAGE_PREFIX, [mean, var]));
            }
            for (prefix, values) in all {
                for (suffix, values) in [RUNNING_MEAN, RUNNING_VAR].iter().zip(values) {
                    let tensor = Tensor {
                        shape: vec![n.channels],
                        values: values.clone(),
                    };
                    state.insert(format!("{prefix}{}{suffix}", n.name), tensor);
                }
            }
        }
        Ok(state)
    }

    fn train_step(&mut self, batch: &Batch<'_>, hyper: &Hyper) -> Result<Metrics, Error> {
        batch.check(&self.graph);
        let mut total = Metrics::default();
        let mut micro_batches = 0;
        for micro in batch.micro_batches(self.options.micro_batch) {
            let program = self.program(micro.images(), Mode::Train)?;
            let part = Part {
                accumulate: micro_batches > 0,
                scale: 1.0 / batch.images() as f64,
                label_smoothing: hyper.label_smoothing,
                dropout: hyper.dropout.map(|dropout| (dropout, total.images)),
            };
            total.add(&self.run(&program, &micro, &part));
            micro_batches += 1;
        }
        self.update(hyper);
        self.running
            .iter_mut()
            .for_each(|r| r.update(micro_batches));
        if let Some(decay) = hyper.average {
            self.move_average(decay);
        }
        Ok(total)
    }

    fn swap_average(&mut self) -> Result<(), Error> {
        let average = self
            .average
            .as_mut()
            .expect("an engine that was made to keep an average");
        std::mem::swap(&mut self.params, &mut average.params);
        for (running, [mean, var]) in self.running.iter_mut().zip(&mut average.running) {
            std::mem::swap(&mut running.mean, mean);
            std::mem::swap(&mut running.var, var);
        }
        self.folded_for = None;
        Ok(())
    }

    fn score(
        &mut self,
        batch: &Batch<'_>,
        mut logits: Option<&mut Vec<f32>>,
    ) -> Result<Metrics, Error> {
        batch.check(&self.graph);
        let mut total = Metrics::default();
        for micro in batch.micro_batches(self.options.micro_batch) {
            let compiled = self.program(micro.images(), Mode::Infer)?;
            total.add(&self.run(&compiled, &micro, &Part::EVAL));
            if let Some(logits) = &mut logits {
                let program = &compiled.program;
                let found = &program.buffers[program.logits.0];
                // SAFETY: no region runs, and `&mut self` keeps writers away.
                logits.extend_from_slice(unsafe {
                    self.arena.span::<f32>(found.offset, found.bytes).get()
                });
            }
        }
        Ok(total)
    }

    fn predict(&mut self, pixels: Pixels<'_>) -> Result<Vec<f32>, Error> {
        let plane = self.graph.plane(self.graph.input());
        crate::predict(self, plane, pixels)
    }
}

//! The CUDA engine: the same programs as the CPU's, as a recorded graph of launches on one NVIDIA card.
//!
//! Convolutions are cuDNN's, each by the plan that won a race on this card; everything else is kernels.cu, compiled
//! by NVRTC for the card. Every library is found at run time, so the same binary runs without any of them. Tensors
//! are NHWC in f32, bf16 or f16 ([`Precision`]); parameters, momentum, statistics, the classifier and all sums are f32.
//! docs/CUDA-ENGINE.md tells how it works and what was measured.

#![expect(
    unsafe_code,
    reason = "the driver's and cuDNN's functions take addresses; every block says who keeps its precondition"
)]

mod calls;
mod cudnn;
mod driver;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use cudarc::driver::{result, sys};
use graph::{Graph, Mode, Program};

use crate::labels::targets;
use crate::profile::{self, KernelTime, Profile};
use crate::state::{self, LOSS_SCALE, MOMENTUM_PREFIX, RUNNING_MEAN, RUNNING_VAR, State, Tensor};
use crate::{Batch, Cache, Engine, Error, Hyper, Metrics, Pixels, Rule, Started};
use calls::{CHUNK, Call, Calls, CudaCaps, Layout, Places};
use cudnn::{Bound, Device, Plan};
use driver::{Address, Arg, Block, Captured, Event, Gpu, Pinned, failed};
pub use driver::{Card, Libraries, cards, libraries, probe};

/// Bytes at which buffers begin.
const ALIGNMENT: usize = 512;

/// Number format of activations and of the products of convolutions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32 everywhere.
    F32,
    /// f32, whose products keep 10 bits of mantissa on tensor cores.
    Tf32,
    /// 8 bits of mantissa and f32's range.
    Bf16,
    /// 11 bits of mantissa and a small range; the loss is scaled so that gradients stay within it.
    F16,
}

impl Precision {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::F32, Self::Tf32, Self::Bf16, Self::F16];

    /// Bytes of a stored value.
    fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::Tf32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// The kernels' ELEMENT.
    fn element(self) -> u8 {
        match self {
            Self::F32 | Self::Tf32 => 0,
            Self::Bf16 => 1,
            Self::F16 => 2,
        }
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

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Tf32 => "tf32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

/// How an engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Images that run at a time.
    pub micro_batch: usize,
    /// Number format.
    pub precision: Precision,
    /// N in `cuda:N`.
    pub ordinal: usize,
    /// Only convolutions that give the same bits each time.
    pub deterministic: bool,
    /// Most bytes of workspace that a convolution may ask for.
    pub workspace: usize,
}

impl Options {
    /// Deterministic, with up to 256 MiB of workspace, or 2 GiB in f32: without tensor cores cuDNN brings some
    /// convolutions of stride 2 into another order first (1.2 GiB for ResNet-50's at 256 images of 224 px).
    pub fn new(ordinal: usize, micro_batch: usize, precision: Precision) -> Self {
        Self {
            micro_batch,
            precision,
            ordinal,
            deterministic: true,
            workspace: match precision {
                Precision::F32 => 2 << 30,
                _ => 256 << 20,
            },
        }
    }
}

/// Memory of the card that training takes, known before anything is allocated, but for what the driver and cuDNN keep
/// (about half a GiB).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Parameters in f32, and as convolutions read them.
    pub parameters: usize,
    /// Gradients.
    pub gradients: usize,
    /// Momentum.
    pub optimizer: usize,
    /// The larger of the training and the evaluation arena.
    pub arena: usize,
    /// Weights of evaluation, with normalisations folded in.
    pub folded: usize,
    /// Workspace of convolutions.
    pub workspace: usize,
    /// Two batches of input.
    pub input: usize,
}

impl Memory {
    /// The memory of `graph` trained with `options` on `card`, by global batches of `batch` images of u8.
    pub fn plan(graph: &Graph, options: &Options, card: &Card, batch: usize) -> Self {
        let caps = CudaCaps::new(options, card.multiprocessors);
        let train = Program::new(graph, &caps, options.micro_batch, Mode::Train);
        let infer = Program::new(graph, &caps, options.micro_batch, Mode::Infer);
        let len = Layout::new(graph).len;
        let f32s = len * size_of::<f32>();
        let cast = match options.precision.bytes() {
            2 => 2 * len,
            _ => 0,
        };
        let sums = if batch > options.micro_batch { 2 } else { 1 };
        Self {
            parameters: f32s + cast,
            gradients: sums * f32s + cast,
            optimizer: f32s,
            arena: train.arena_bytes.max(infer.arena_bytes),
            folded: infer.constant_bytes,
            workspace: options.workspace,
            input: 2 * batch * (graph.plane(graph.input()).elements() + 4),
        }
    }

    /// The sum.
    pub fn total(&self) -> usize {
        self.parameters
            + self.gradients
            + self.optimizer
            + self.arena
            + self.folded
            + self.workspace
            + self.input
    }
}

/// A program that is ready to run.
struct Compiled {
    image: Address,
    logits: Address,
    setup: Vec<Call>,
    /// Everything but the first kernel, recorded: for the first micro-batch of a step, and for one after another.
    first: Step,
    further: Option<Step>,
}

/// The recorded part of a program, and what it was recorded from.
struct Step {
    calls: Vec<Call>,
    /// For each call that is a convolution, its tensors.
    bound: Vec<Option<Bound>>,
    captured: Captured,
}

/// The kernels' Hyper.
const HYPER_BYTES: usize = 32;
/// The kernels' Totals.
const TOTALS_BYTES: usize = 16;

/// A batch on its way, and what comes back.
struct Slot {
    /// Pixels, labels and hyper-parameters; the totals come back behind them.
    host: Pinned,
    device: Block,
    /// The batch is on the card.
    copied: Event,
    /// The card is done with it.
    done: Event,
    images: usize,
    /// Whether a step that reads it was begun.
    is_used: bool,
}

/// Where things lie in a slot.
#[derive(Clone, Copy)]
struct SlotLayout {
    labels: usize,
    hyper: usize,
    totals: usize,
    end: usize,
}

impl SlotLayout {
    fn new(pixel_bytes: usize, images: usize) -> Self {
        let labels = pixel_bytes.next_multiple_of(256);
        let hyper = (labels + images * size_of::<u32>()).next_multiple_of(256);
        let totals = hyper + HYPER_BYTES;
        Self {
            labels,
            hyper,
            totals,
            end: totals + TOTALS_BYTES,
        }
    }
}

/// The engine. (Fields are dropped in this order: what lies on the card goes before the card.)
pub struct Cuda {
    graph: Graph,
    options: Options,
    caps: CudaCaps,
    layout: Layout,
    programs: BTreeMap<(usize, Mode), Compiled>,
    plans: BTreeMap<String, Plan>,
    device: Device,
    masters: Block,
    cast: Option<Block>,
    momentum: Block,
    fresh: Block,
    /// Gradients as convolutions store them, in 16 bits; none in f32.
    raw: Option<Block>,
    is_raw: Block,
    /// Gradients over micro-batches, once there are several.
    summed: Option<Block>,
    running: Block,
    sums: Block,
    decays: Block,
    decays_for: Option<crate::Decay>,
    control: Block,
    arena: Block,
    constants: Block,
    workspace: Block,
    /// Whether the constants hold the parameters as they are now.
    is_folded: bool,
    slots: Vec<Slot>,
    /// Steps begun and not finished, oldest first: number and slot.
    running_steps: VecDeque<(u64, usize)>,
    steps: u64,
    profile: Profile,
    cache: Box<dyn Cache>,
    gpu: Gpu,
}

/// Where the fixed small things lie in `control`.
struct Control {
    hyper: Address,
    scale: Address,
    totals: Address,
    scored: Address,
    labels: Address,
}

impl Control {
    fn bytes(images: usize) -> usize {
        1024 + images * 16
    }

    fn new(block: &Block, images: usize) -> Self {
        let at = block.address;
        Self {
            hyper: at,
            scale: at + 256,
            totals: at + 512,
            scored: at + 1024,
            labels: at + 1024 + (images * 8) as Address,
        }
    }
}

impl Cuda {
    /// An engine for `graph` with `state`.
    ///
    /// # Errors
    /// If the card or a library is missing or too old, memory does not suffice, or the state is not one of the graph's.
    pub fn new(
        graph: &Graph,
        options: &Options,
        state: &State,
        cache: Box<dyn Cache>,
    ) -> Result<Self, Error> {
        state::check(graph, state)?;
        let card = probe(options.ordinal)?;
        if !calls::fits(graph, options.micro_batch) {
            return Err(Error::device(
                format!(
                    "a batch of {} images is too large for one step",
                    options.micro_batch
                ),
                "a smaller train.bn_batch",
            ));
        }
        let gpu = Gpu::start(&card, options.precision.element(), &*cache)?;
        let device = Device::start(&gpu)?;
        let memory = Memory::plan(graph, options, &card, options.micro_batch);
        check_memory(&memory, gpu.free_bytes()?)?;
        let caps = CudaCaps::new(options, card.multiprocessors);
        let layout = Layout::new(graph);
        let f32s = layout.len * size_of::<f32>();
        let halves = || match options.precision.bytes() {
            2 => gpu.block(2 * layout.len).map(Some),
            _ => Ok(None),
        };
        let (cast, raw) = (halves()?, halves()?);
        let is_raw = gpu.block(layout.convs.len())?;
        gpu.upload(is_raw.address, &layout.convs)?;
        let mut cuda = Self {
            programs: BTreeMap::new(),
            plans: BTreeMap::new(),
            device,
            masters: gpu.block(f32s)?,
            cast,
            momentum: gpu.block(f32s)?,
            fresh: gpu.block(f32s)?,
            raw,
            is_raw,
            summed: None,
            running: gpu.block(2 * layout.channels * size_of::<f32>())?,
            sums: gpu.block(2 * layout.channels * size_of::<f64>())?,
            decays: gpu.block(layout.len / CHUNK)?,
            decays_for: None,
            control: gpu.block(Control::bytes(options.micro_batch))?,
            arena: gpu.block(memory.arena)?,
            constants: gpu.block(memory.folded)?,
            workspace: gpu.block(options.workspace)?,
            is_folded: false,
            slots: vec![],
            running_steps: VecDeque::new(),
            steps: 0,
            profile: None,
            cache,
            graph: graph.clone(),
            options: *options,
            caps,
            layout,
            gpu,
        };
        cuda.load(state)?;
        Ok(cuda)
    }

    /// The card.
    pub fn card(&self) -> &Card {
        &self.gpu.card
    }

    /// The card as cuDNN describes it, JSON: plans can be made for it where it is not.
    ///
    /// # Errors
    /// If cuDNN is older than 9.8.
    pub fn describe_card(&self) -> Result<String, Error> {
        self.device
            .describe()
            .map_err(|e| Error::device(e, "cuDNN 9.8 or newer describes cards"))
    }

    /// Steps in f16 that were left out because a gradient overflowed, since the state was loaded.
    ///
    /// # Errors
    /// If the card fails.
    pub fn skipped_steps(&self) -> Result<usize, Error> {
        self.gpu.enter()?;
        let scale: Vec<u32> = self.gpu.download(self.control().scale, 4)?;
        Ok(scale[3] as usize)
    }

    /// Starts to time kernels, from zero. Steps are not replayed meanwhile but launched one by one, so they take longer.
    pub fn start_profile(&mut self) {
        self.profile = Some(BTreeMap::new());
    }

    /// What was measured since, slowest first; measuring ends.
    pub fn take_profile(&mut self) -> Vec<KernelTime> {
        profile::take(&mut self.profile)
    }

    fn control(&self) -> Control {
        Control::new(&self.control, self.options.micro_batch)
    }

    fn places(&self) -> Places {
        let control = self.control();
        Places {
            arena: self.arena.address,
            constants: self.constants.address,
            masters: self.masters.address,
            cast: self.cast.as_ref().unwrap_or(&self.masters).address,
            fresh: self.fresh.address,
            raw: self.raw.as_ref().unwrap_or(&self.fresh).address,
            is_raw: self.is_raw.address,
            running: self.running.address,
            sums: self.sums.address,
            labels: control.labels,
            hyper: control.hyper,
            scale: control.scale,
            scored: control.scored,
            totals: control.totals,
        }
    }

    fn do_call(&self, call: &Call, bound: Option<&Bound>) -> Result<(), Error> {
        match (call, bound) {
            (
                Call::Launch {
                    name, grid, args, ..
                },
                _,
            ) => self.gpu.launch(name, *grid, &mut args.clone()),
            (Call::Conv { conv, .. }, Some(bound)) => {
                bound.run(&self.device, &self.plans[&conv.name()])
            }
            (Call::Conv { .. }, None) => unreachable!("convolutions are bound"),
        }
    }

    /// The program of a batch size, made at its first use.
    fn compile(&mut self, batch: usize, mode: Mode) -> Result<(), Error> {
        if self.programs.contains_key(&(batch, mode)) {
            return Ok(());
        }
        let program = Program::new(&self.graph, &self.caps, batch, mode);
        self.gpu.wait()?;
        if program.arena_bytes > self.arena.bytes {
            // What was recorded names the old one.
            self.programs.clear();
            self.arena = self.gpu.block(program.arena_bytes)?;
        }
        if program.constant_bytes > self.constants.bytes {
            self.programs.retain(|(_, mode), _| *mode == Mode::Train);
            self.constants = self.gpu.block(program.constant_bytes)?;
            self.is_folded = false;
        }
        if batch > self.options.micro_batch {
            self.programs.clear();
            let scale: Vec<u32> = self.gpu.download(self.control().scale, 4)?;
            self.control = self.gpu.block(Control::bytes(batch))?;
            self.options.micro_batch = batch;
            self.gpu.upload(self.control().scale, &scale)?;
        }
        let calls = |add| {
            let places = self.places();
            calls::calls(
                &self.graph,
                &program,
                &self.caps,
                &self.layout,
                &places,
                add,
            )
        };
        let (first, further) = (calls(false), calls(true));
        self.race(&first)?;
        let (image, logits, setup) = (first.image, first.logits, first.setup);
        let first = self.record(first.body)?;
        let further = match mode {
            Mode::Train => Some(self.record(further.body)?),
            Mode::Infer => None,
        };
        let compiled = Compiled {
            image,
            logits,
            setup,
            first,
            further,
        };
        self.programs.insert((batch, mode), compiled);
        Ok(())
    }

    /// Finds the plans of a program's convolutions, and runs each once, so that nothing is left to load.
    fn race(&mut self, calls: &Calls) -> Result<(), Error> {
        for (conv, at) in calls::convs(calls) {
            let workspace = self.workspace.address;
            let name = conv.name();
            if !self.plans.contains_key(&name) {
                let plan = cudnn::fastest(
                    &conv,
                    &self.options,
                    &self.gpu,
                    &self.device,
                    at,
                    workspace,
                    &*self.cache,
                )?;
                self.plans.insert(name.clone(), plan);
            }
            Bound::new(at, workspace)?.run(&self.device, &self.plans[&name])?;
        }
        self.gpu.wait()
    }

    fn record(&self, calls: Vec<Call>) -> Result<Step, Error> {
        let workspace = self.workspace.address;
        let bound = calls.iter().map(|call| match call {
            Call::Launch { .. } => Ok(None),
            Call::Conv { at, .. } => Bound::new(*at, workspace).map(Some),
        });
        let bound = bound.collect::<Result<Vec<_>, _>>()?;
        let captured = self.gpu.capture(|| {
            let mut both = calls.iter().zip(&bound);
            both.try_for_each(|(call, bound)| self.do_call(call, bound.as_ref()))
        })?;
        Ok(Step {
            calls,
            bound,
            captured,
        })
    }

    /// Brings a batch to the card, beside what runs there; the slot's number.
    fn stage(&mut self, batch: &Batch<'_>, hyper: [f32; 8]) -> Result<usize, Error> {
        let pixels: &[u8] = match batch.pixels {
            Pixels::U8(p) => p,
            // SAFETY: any f32 is four bytes.
            Pixels::F32(p) => unsafe {
                std::slice::from_raw_parts(p.as_ptr().cast(), size_of_val(p))
            },
        };
        let images = batch.images();
        let layout = SlotLayout::new(pixels.len(), images);
        // The older of two; a third is never needed, for only two steps are under way.
        let index = if self.slots.len() < 2 {
            self.slots.len()
        } else {
            (self.steps % 2) as usize
        };
        let fits = |slot: &Slot| slot.host.bytes() >= layout.end;
        if self.slots.get(index).is_none_or(|slot| !fits(slot)) {
            self.gpu.wait()?;
            let slot = Slot {
                host: self.gpu.pinned(layout.end)?,
                device: self.gpu.block(layout.end)?,
                copied: Event::new()?,
                done: Event::new()?,
                images,
                is_used: false,
            };
            match self.slots.get_mut(index) {
                Some(old) => *old = slot,
                None => self.slots.push(slot),
            }
        }
        let slot = &mut self.slots[index];
        if slot.is_used {
            slot.done.wait()?;
        }
        slot.images = images;
        let host = slot.host.get_mut();
        host[..pixels.len()].copy_from_slice(pixels);
        let labels = host[layout.labels..].chunks_exact_mut(size_of::<u32>());
        for (to, label) in labels.zip(batch.labels) {
            to.copy_from_slice(&label.to_ne_bytes());
        }
        let to = host[layout.hyper..].chunks_exact_mut(size_of::<f32>());
        for (to, value) in to.zip(hyper) {
            to.copy_from_slice(&value.to_ne_bytes());
        }
        // SAFETY: both are at least this long; the host's is not written again before `done`.
        unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                slot.device.address,
                slot.host.address(),
                layout.totals,
                self.gpu.copies,
            )
        }
        .result()
        .map_err(|e| failed("copy to the card", e))?;
        slot.copied.record(self.gpu.copies)?;
        slot.copied.hold(self.gpu.stream)?;
        Ok(index)
    }

    /// Copies on the card, in the order of the stream.
    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), Error> {
        // SAFETY: both name memory of the engine of at least this length.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.gpu.stream) }
            .map_err(|e| failed("copy on the card", e))
    }

    /// Runs images `from..to` of what a slot holds.
    fn micro(
        &mut self,
        index: usize,
        is_u8: bool,
        (from, to): (usize, usize),
        program: (usize, Mode),
        add: bool,
    ) -> Result<(), Error> {
        let image = self.graph.plane(self.graph.input());
        let element = if is_u8 { 1 } else { size_of::<f32>() };
        let slot = &self.slots[index];
        let layout = SlotLayout::new(slot.images * image.elements() * element, slot.images);
        let at = slot.device.address;
        let pixels = at + (from * image.elements() * element) as Address;
        let control = self.control();
        let labels = at + (layout.labels + from * size_of::<u32>()) as Address;
        self.copy(control.labels, labels, (to - from) * size_of::<u32>())?;
        self.copy(control.hyper, at + layout.hyper as Address, HYPER_BYTES)?;
        let compiled = &self.programs[&program];
        let count = (to - from) * image.pixels();
        let step = match (&compiled.further, add) {
            (Some(further), true) => further,
            _ => &compiled.first,
        };
        let input = calls::input(pixels, is_u8, count, compiled.image);
        if self.profile.is_some() {
            let calls = [(&input, None)];
            let body = step.calls.iter().zip(step.bound.iter().map(Option::as_ref));
            let times = self.timed(calls.into_iter().chain(body))?;
            self.measured(times);
        } else {
            self.do_call(&input, None)?;
            self.gpu.replay(&step.captured)?;
        }
        self.do_call(&calls::loss_finish(&self.places(), to - from, add), None)
    }

    /// Runs calls one by one, each with its time.
    fn timed<'a>(
        &self,
        calls: impl Iterator<Item = (&'a Call, Option<&'a Bound>)>,
    ) -> Result<Vec<KernelTime>, Error> {
        let mut events = vec![Event::new()?];
        events[0].record(self.gpu.stream)?;
        let mut done = vec![];
        for (call, bound) in calls {
            self.do_call(call, bound)?;
            let event = Event::new()?;
            event.record(self.gpu.stream)?;
            events.push(event);
            done.push(call);
        }
        self.gpu.wait()?;
        let element = self.options.precision.bytes();
        let time = |(call, pair): (&&Call, &[Event])| {
            let milliseconds = pair[0].milliseconds(&pair[1])?;
            let time = Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3);
            Ok(KernelTime {
                name: call.name(),
                calls: 1,
                time,
                fastest: time,
                macs: call.macs(),
                bytes: call.bytes(element),
            })
        };
        done.iter().zip(events.windows(2)).map(time).collect()
    }

    /// Adds to the profile, if there is one.
    fn measured(&mut self, times: Vec<KernelTime>) {
        let Some(profile) = &mut self.profile else {
            return;
        };
        for time in times {
            match profile.get_mut(&time.name) {
                None => {
                    profile.insert(time.name.clone(), time);
                }
                Some(entry) => {
                    entry.calls += 1;
                    entry.time += time.time;
                    entry.fastest = entry.fastest.min(time.fastest);
                    entry.macs += time.macs;
                    entry.bytes += time.bytes;
                }
            }
        }
    }

    /// What ends a step: one update from all gradients.
    fn update(&mut self, micro_batches: usize) -> Result<(), Error> {
        let places = self.places();
        let address = Arg::address;
        let gradients = match &self.summed {
            Some(summed) if micro_batches > 1 => summed.address,
            _ => self.fresh.address,
        };
        let scale = address(places.scale);
        let cast = self.cast.as_ref().map_or(0, |c| c.address);
        let mut calls = vec![];
        let over = |name, args| calls::over_chunks(name, &self.layout, args);
        if self.options.precision == Precision::F16 {
            calls.push(over("check", vec![address(gradients), scale]));
        }
        calls.push(over(
            "update",
            vec![
                address(places.hyper),
                scale,
                address(places.masters),
                address(self.momentum.address),
                address(gradients),
                address(cast),
                address(self.decays.address),
            ],
        ));
        if self.options.precision == Precision::F16 {
            calls.push(Call::Launch {
                name: "rescale",
                grid: (1, 1),
                args: vec![scale],
                bytes: 0,
            });
        }
        calls.push(calls::running_update(&self.layout, &places, micro_batches));
        self.is_folded = false;
        if self.profile.is_some() {
            let times = self.timed(calls.iter().map(|call| (call, None)))?;
            self.measured(times);
            return Ok(());
        }
        calls.iter().try_for_each(|call| self.do_call(call, None))
    }

    /// Says of each chunk whether weight decay acts on it.
    fn set_decays(&mut self, decay: crate::Decay) -> Result<(), Error> {
        if self.decays_for == Some(decay) {
            return Ok(());
        }
        let mut flags = vec![0u8; self.layout.len / CHUNK];
        for (p, slot) in self.graph.params().iter().zip(&self.layout.slots) {
            if decay.covers(p.decay) {
                let chunks = slot.len.div_ceil(CHUNK);
                flags[slot.offset / CHUNK..][..chunks].fill(1);
            }
        }
        self.gpu.upload(self.decays.address, &flags)?;
        self.decays_for = Some(decay);
        Ok(())
    }

    /// Gradients of this micro-batch join those before.
    fn accumulate(&mut self, add: bool) -> Result<(), Error> {
        let summed = match &self.summed {
            Some(summed) => summed.address,
            None => {
                let block = self.gpu.block(self.layout.len * size_of::<f32>())?;
                self.summed.insert(block).address
            }
        };
        let args = vec![
            Arg::address(summed),
            Arg::address(self.fresh.address),
            Arg::int(usize::from(add)),
        ];
        self.do_call(&calls::over_chunks("accumulate", &self.layout, args), None)
    }

    /// Asks for the totals of the step in a slot.
    fn ask_totals(&mut self, index: usize, is_u8: bool) -> Result<(), Error> {
        let totals = self.control().totals;
        let image = self.graph.plane(self.graph.input()).elements();
        let slot = &mut self.slots[index];
        let element = if is_u8 { 1 } else { size_of::<f32>() };
        let layout = SlotLayout::new(slot.images * image * element, slot.images);
        // SAFETY: the host's memory ends behind the totals, and nobody reads it before `done`.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                slot.host.address().cast_mut().byte_add(layout.totals),
                totals,
                TOTALS_BYTES,
                self.gpu.stream,
            )
        }
        .result()
        .map_err(|e| failed("copy from the card", e))?;
        slot.is_used = true;
        slot.done.record(self.gpu.stream)
    }

    /// Waits for the totals of the step in a slot.
    fn totals(&self, index: usize, is_u8: bool) -> Result<Metrics, Error> {
        let image = self.graph.plane(self.graph.input()).elements();
        let slot = &self.slots[index];
        slot.done.wait()?;
        let element = if is_u8 { 1 } else { size_of::<f32>() };
        let layout = SlotLayout::new(slot.images * image * element, slot.images);
        let bytes = &slot.host.get()[layout.totals..layout.end];
        let word = |i: usize| <[u8; 4]>::try_from(&bytes[i..i + 4]).expect("four bytes");
        Ok(Metrics {
            images: slot.images,
            loss_sum: f64::from_ne_bytes(bytes[..8].try_into().expect("eight bytes")),
            top1: u32::from_ne_bytes(word(8)) as usize,
            top5: u32::from_ne_bytes(word(12)) as usize,
        })
    }

    /// The constants of inference, if parameters have changed.
    fn fold(&mut self, batch: usize) -> Result<(), Error> {
        self.compile(batch, Mode::Infer)?;
        if !self.is_folded {
            let setup = &self.programs[&(batch, Mode::Infer)].setup;
            setup.iter().try_for_each(|call| self.do_call(call, None))?;
            self.is_folded = true;
        }
        Ok(())
    }

    /// Scores a batch with the running statistics; `see` gets the logits of each micro-batch.
    fn infer(
        &mut self,
        batch: &Batch<'_>,
        mut all: Option<&mut Vec<f32>>,
    ) -> Result<Metrics, Error> {
        batch.check(&self.graph);
        self.gpu.enter()?;
        assert!(self.running_steps.is_empty(), "every step is finished");
        // A part of a micro-batch runs as a whole one, whose other images are not counted.
        let size = self.options.micro_batch;
        self.fold(size)?;
        let (on, off) = targets(0.0, self.graph.classes());
        let hyper = [0.0, 0.0, 0.0, 0.0, on as f32, off as f32, 1.0, 0.0];
        let index = self.stage(batch, hyper)?;
        self.steps += 1;
        let is_u8 = matches!(batch.pixels, Pixels::U8(_));
        let images = batch.images();
        for from in (0..images).step_by(size) {
            let to = (from + size).min(images);
            self.micro(index, is_u8, (from, to), (size, Mode::Infer), from > 0)?;
            if let Some(all) = &mut all {
                let logits = self.programs[&(size, Mode::Infer)].logits;
                let classes = self.graph.classes();
                let found: Vec<f32> = self.gpu.download(logits, (to - from) * classes)?;
                all.extend(found);
            }
        }
        self.ask_totals(index, is_u8)?;
        self.totals(index, is_u8)
    }

    fn set_scale(&self, scale: f32, good: u32) -> Result<(), Error> {
        let words = [scale.to_bits(), good, 0, 0];
        self.gpu.upload(self.control().scale, &words)
    }

    fn read_state(&self) -> Result<State, Error> {
        self.gpu.enter()?;
        let mut state = State::new();
        for (prefix, block) in [("", &self.masters), (MOMENTUM_PREFIX, &self.momentum)] {
            let all: Vec<f32> = self.gpu.download(block.address, self.layout.len)?;
            for (p, slot) in self.graph.params().iter().zip(&self.layout.slots) {
                let tensor = Tensor {
                    shape: p.shape.clone(),
                    values: slot.gather(&all),
                };
                state.insert(format!("{prefix}{}", p.name), tensor);
            }
        }
        let channels = self.layout.channels;
        let running: Vec<f32> = self.gpu.download(self.running.address, 2 * channels)?;
        for (i, n) in self.graph.norms().iter().enumerate() {
            let from = self.layout.running(graph::NormId(i));
            for (suffix, from) in [(RUNNING_MEAN, from), (RUNNING_VAR, channels + from)] {
                let tensor = Tensor {
                    shape: vec![n.channels],
                    values: running[from..from + n.channels].to_vec(),
                };
                state.insert(format!("{}{suffix}", n.name), tensor);
            }
        }
        if self.options.precision == Precision::F16 {
            let scale: Vec<u32> = self.gpu.download(self.control().scale, 4)?;
            let tensor = Tensor {
                shape: vec![2],
                values: vec![f32::from_bits(scale[0]), scale[1] as f32],
            };
            state.insert(LOSS_SCALE.into(), tensor);
        }
        Ok(state)
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // What is freed is not in use.
        self.gpu.enter().and_then(|()| self.gpu.wait()).ok();
    }
}

/// Says before anything is allocated that memory will not do.
fn check_memory(memory: &Memory, free: usize) -> Result<(), Error> {
    let needed = memory.total();
    if needed <= free {
        return Ok(());
    }
    let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    Err(Error::device(
        format!(
            "the engine needs {:.1} GiB of the card's memory, {:.1} GiB are free",
            gib(needed),
            gib(free)
        ),
        "a smaller train.bn_batch needs less, and so does train.precision = \"bf16\"; other programs may hold some",
    ))
}

/// The loss scale that f16 begins with.
const FIRST_SCALE: f32 = 65536.0;

/// What a step asks for and the kernels do not do.
fn lacks(hyper: &Hyper, batch: &Batch<'_>) -> Option<&'static str> {
    let asked = [
        (hyper.rule != Rule::Sgd, "LARS"),
        (hyper.clip_norm.is_some(), "clipping of gradients"),
        (hyper.average.is_some(), "moving average of parameters"),
        (batch.mixed.is_some(), "mixed labels"),
        (hyper.dropout.is_some(), "dropout"),
    ];
    let what = asked.into_iter().find(|(is_asked, _)| *is_asked);
    what.map(|(_, what)| what)
}

impl Engine for Cuda {
    fn describe(&self) -> String {
        let Options {
            precision, ordinal, ..
        } = self.options;
        let cudnn = libraries().cudnn.unwrap_or_default();
        let cudnn = format!("{}.{}.{}", cudnn / 10_000, cudnn / 100 % 100, cudnn % 100);
        format!(
            "cuda:{ordinal}: {}, {precision}, cuDNN {cudnn}",
            self.gpu.card.name
        )
    }

    fn load(&mut self, state: &State) -> Result<(), Error> {
        state::check(&self.graph, state)?;
        self.gpu.enter()?;
        for (prefix, block) in [("", &self.masters), (MOMENTUM_PREFIX, &self.momentum)] {
            let mut all = vec![0.0f32; self.layout.len];
            for (p, slot) in self.graph.params().iter().zip(&self.layout.slots) {
                if let Some(tensor) = state.get(&format!("{prefix}{}", p.name)) {
                    slot.scatter(&tensor.values, &mut all);
                }
            }
            self.gpu.upload(block.address, &all)?;
        }
        let channels = self.layout.channels;
        let mut running = vec![0.0f32; 2 * channels];
        for (i, n) in self.graph.norms().iter().enumerate() {
            let to = self.layout.running(graph::NormId(i));
            for (suffix, to) in [(RUNNING_MEAN, to), (RUNNING_VAR, channels + to)] {
                let values = &state[&format!("{}{suffix}", n.name)].values;
                running[to..to + n.channels].copy_from_slice(values);
            }
        }
        self.gpu.upload(self.running.address, &running)?;
        let (scale, good) = match (self.options.precision, state.get(LOSS_SCALE)) {
            (Precision::F16, Some(tensor)) => (tensor.values[0], tensor.values[1] as u32),
            (Precision::F16, None) => (FIRST_SCALE, 0),
            _ => (1.0, 0),
        };
        self.set_scale(scale, good)?;
        if let Some(cast) = &self.cast {
            let args = vec![
                Arg::address(self.masters.address),
                Arg::address(cast.address),
            ];
            self.do_call(&calls::over_chunks("cast", &self.layout, args), None)?;
        }
        self.is_folded = false;
        self.gpu.wait()
    }

    fn state(&self) -> State {
        self.read_state()
            .unwrap_or_else(|error| panic!("the state cannot be read from the card: {error}"))
    }

    fn train_step(&mut self, batch: &Batch<'_>, hyper: &Hyper) -> Result<Metrics, Error> {
        let step = self.start_step(batch, hyper)?;
        self.finish_step(step)
    }

    fn start_step(&mut self, batch: &Batch<'_>, hyper: &Hyper) -> Result<Started, Error> {
        batch.check(&self.graph);
        if let Some(what) = lacks(hyper, batch) {
            return Err(Error::device(
                format!("CUDA has no {what}"),
                "the CPU engine has it",
            ));
        }
        self.gpu.enter()?;
        assert!(self.running_steps.len() < 2, "two steps at most are begun");
        let images = batch.images();
        let size = self.options.micro_batch;
        for from in (0..images).step_by(size) {
            self.compile((from + size).min(images) - from, Mode::Train)?;
        }
        self.set_decays(hyper.decay)?;
        let (on, off) = targets(hyper.label_smoothing, self.graph.classes());
        let nesterov = if hyper.nesterov { 1.0 } else { 0.0 };
        let values = [
            hyper.lr as f32,
            hyper.momentum as f32,
            hyper.weight_decay as f32,
            nesterov,
            on as f32,
            off as f32,
            (1.0 / images as f64) as f32,
            0.0,
        ];
        let index = self.stage(batch, values)?;
        let is_u8 = matches!(batch.pixels, Pixels::U8(_));
        let micro_batches = images.div_ceil(size);
        for i in 0..micro_batches {
            let (from, to) = (i * size, ((i + 1) * size).min(images));
            self.micro(index, is_u8, (from, to), (to - from, Mode::Train), i > 0)?;
            if micro_batches > 1 {
                self.accumulate(i > 0)?;
            }
        }
        self.update(micro_batches)?;
        self.ask_totals(index, is_u8)?;
        self.steps += 1;
        // The kind of pixels says where the totals lie.
        let number = self.steps * 2 + u64::from(is_u8);
        self.running_steps.push_back((number, index));
        Ok(Started::Running(number))
    }

    fn finish_step(&mut self, step: Started) -> Result<Metrics, Error> {
        self.gpu.enter()?;
        let (number, index) = self.running_steps.pop_front().expect("a step was begun");
        assert!(
            matches!(step, Started::Running(n) if n == number),
            "steps are finished in their order"
        );
        self.totals(index, number % 2 == 1)
    }

    fn skipped_steps(&self) -> Result<u64, Error> {
        Cuda::skipped_steps(self).map(|steps| steps as u64)
    }

    fn score(
        &mut self,
        batch: &Batch<'_>,
        logits: Option<&mut Vec<f32>>,
    ) -> Result<Metrics, Error> {
        self.infer(batch, logits)
    }

    fn predict(&mut self, pixels: Pixels<'_>) -> Result<Vec<f32>, Error> {
        // The programs score what they infer; class 0 for every image, and the score is dropped.
        let labels = vec![0; pixels.len() / self.graph.plane(self.graph.input()).elements()];
        let batch = Batch {
            pixels,
            labels: &labels,
            mixed: None,
        };
        let mut all = vec![];
        self.infer(&batch, Some(&mut all))?;
        Ok(all)
    }
}

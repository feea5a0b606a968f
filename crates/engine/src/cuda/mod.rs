//! The CUDA engine: the same programs as the CPU's, as recorded graphs of launches on an NVIDIA card, or on several
//! ([`Ranks`]).
//!
//! Convolutions are by plans of cuDNN or by kernels of our own, each by what won a race on this card; everything else is
//! kernels.cu and branches.cu, compiled by NVRTC for the card. Every library is found at run time, so the same binary runs without any of them. Tensors
//! are NHWC in f32, bf16 or f16 ([`Precision`]); parameters, momentum, statistics, the classifier and all sums are f32.
//! docs/CUDA-ENGINE.md tells how it works and what was measured.

#![expect(
    unsafe_code,
    reason = "the driver's and cuDNN's functions take addresses; every block says who keeps its precondition"
)]

mod calls;
mod collective;
mod cudnn;
mod driver;
mod hyper;
mod nccl;
mod own;
mod race;
mod ranks;
#[cfg(test)]
mod tests;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{result, sys};
use graph::{Graph, Mode, Program};

use crate::profile::{self, KernelTime, Profile};
use crate::state::{
    self, AVERAGE_PREFIX, LOSS_SCALE, MOMENTUM_PREFIX, RUNNING_MEAN, RUNNING_VAR, State, Tensor,
};
use crate::{Batch, Cache, Engine, Error, Hyper, Metrics, Pixels, Rule, Started};
use calls::{Call, Calls, CudaCaps, Drops, Layout, Places, Rules};
use collective::{Collective, Peers};
use cudnn::{Bound, Device};
use driver::{Address, Arg, Block, Captured, Event, Gpu, Pinned, failed};
pub use driver::{Card, Libraries, cards, libraries, probe};
use race::{Choice, Race};
pub use ranks::{Ranks, nccl_version, probe_all};

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

impl Convolutions {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Fastest, Self::Cudnn, Self::Own];
}

impl fmt::Display for Convolutions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fastest => "fastest",
            Self::Cudnn => "cudnn",
            Self::Own => "own",
        })
    }
}

impl FromStr for Convolutions {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        Self::ALL
            .into_iter()
            .find(|whose| whose.to_string() == name)
            .ok_or(())
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
    /// Whose convolutions run.
    pub convolutions: Convolutions,
    /// Whether a moving average of parameters and running statistics is kept ([`Hyper::average`]).
    pub average: bool,
}

impl Options {
    /// Deterministic, without a moving average, with up to 256 MiB of workspace, or 2 GiB in f32: without tensor cores cuDNN brings some
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
            convolutions: Convolutions::Fastest,
            average: false,
        }
    }
}

/// Whose convolutions run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Convolutions {
    /// Whichever are the fastest, each; our own where cuDNN is missing or too old.
    Fastest,
    /// cuDNN's, or our own where it is missing or too old.
    Cudnn,
    /// Our own (conv.cu).
    Own,
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
    /// Moving average of the parameters, where one is kept.
    pub average: usize,
    /// The larger of the training and the evaluation arena.
    pub arena: usize,
    /// Weights of evaluation, with normalisations folded in.
    pub folded: usize,
    /// Workspace of convolutions.
    pub workspace: usize,
    /// Two batches of input.
    pub input: usize,
    /// What other cards send.
    pub exchange: usize,
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
            average: if options.average { f32s } else { 0 },
            arena: train.arena_bytes.max(infer.arena_bytes),
            folded: infer.constant_bytes,
            workspace: options.workspace,
            input: 2 * batch * (graph.plane(graph.input()).elements() + 4),
            exchange: 0,
        }
    }

    /// The sum.
    pub fn total(&self) -> usize {
        self.parameters
            + self.gradients
            + self.optimizer
            + self.average
            + self.arena
            + self.folded
            + self.workspace
            + self.input
            + self.exchange
    }
}

/// A program that is ready to run.
struct Compiled {
    image: Address,
    logits: Address,
    setup: Vec<Call>,
    /// Everything but the first kernel, recorded: for the first micro-batch of a step, and for one after another. In
    /// training in parts, one for each bucket of gradients.
    first: Vec<Step>,
    further: Vec<Step>,
}

/// A recorded part of a program, and what it was recorded from.
struct Step {
    calls: Vec<Way>,
    captured: Captured,
}

/// How a call is put on the card.
enum Way {
    /// As it is.
    Launch(Call),
    /// A convolution by cuDNN's plan.
    Plan(Call, Bound),
    /// One by kernels of our own.
    Launches(Call, Vec<Call>),
}

impl Way {
    fn call(&self) -> &Call {
        match self {
            Way::Launch(call) | Way::Plan(call, _) | Way::Launches(call, _) => call,
        }
    }
}

/// The kernels' Totals.
const TOTALS_BYTES: usize = 16;

/// A batch on its way, and what comes back.
struct Slot {
    /// Pixels, labels and hyper-parameters; the totals come back behind them.
    host: Pinned,
    device: Block,
    layout: SlotLayout,
    /// The batch is on the card.
    copied: Event,
    /// The card is done with it.
    done: Event,
    images: usize,
    is_u8: bool,
    /// Whether a step that reads it was begun.
    is_used: bool,
}

/// Where things lie in a slot.
#[derive(Clone, Copy, Default)]
struct SlotLayout {
    labels: usize,
    /// Second labels.
    others: usize,
    /// Those of each micro-batch.
    hypers: usize,
    /// The kernels' Draw of all that is dropped.
    draws: usize,
    totals: usize,
    end: usize,
}

impl SlotLayout {
    /// From one micro-batch's [`hyper::Words`] to the next.
    const HYPER: usize = hyper::BYTES.next_multiple_of(64);

    fn new(pixel_bytes: usize, images: usize, micro_batches: usize, draw_bytes: usize) -> Self {
        let labels = pixel_bytes.next_multiple_of(256);
        let others = labels + images * size_of::<u32>();
        let hypers = (others + images * size_of::<u32>()).next_multiple_of(256);
        let draws = hypers + micro_batches * Self::HYPER;
        let totals = draws + draw_bytes;
        Self {
            labels,
            others,
            hypers,
            draws,
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
    /// Of convolutions by name; none where all are our own.
    choices: BTreeMap<String, Choice>,
    /// cuDNN, where convolutions are its.
    device: Option<Device>,
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
    /// Moving averages of parameters and of running statistics, where they are kept.
    average: Option<[Block; 2]>,
    rules: Block,
    drops: Drops,
    draws: Block,
    kinds_for: Option<crate::Decay>,
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
    /// Other cards that train with this one.
    peers: Option<Peers>,
    gpu: Gpu,
}

/// Where the fixed small things lie in `control`.
struct Control {
    hyper: Address,
    scale: Address,
    totals: Address,
    scored: Address,
    labels: Address,
    others: Address,
    kept: Address,
}

impl Control {
    fn bytes(images: usize) -> usize {
        1024 + images * 20
    }

    fn new(block: &Block, images: usize) -> Self {
        let at = block.address;
        Self {
            hyper: at,
            scale: at + 256,
            totals: at + 512,
            scored: at + 1024,
            labels: at + 1024 + (images * 8) as Address,
            others: at + 1024 + (images * 12) as Address,
            kept: at + 1024 + (images * 16) as Address,
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
        let is_own = options.convolutions == Convolutions::Own || !driver::has_cudnn(&libraries());
        let has_own = is_own || options.convolutions == Convolutions::Fastest;
        let gpu = Gpu::start(&card, options.precision.element(), has_own, &*cache)?;
        let device = match is_own {
            true => None,
            false => Some(Device::start(&gpu)?),
        };
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
        let rules = gpu.block(Rules::new(&layout, 0).1 as usize)?;
        for (at, values) in Rules::new(&layout, rules.address).0.constants(&layout) {
            gpu.upload(at, values)?;
        }
        let running = 2 * layout.channels * size_of::<f32>();
        let drops = Drops::new(graph);
        let mut cuda = Self {
            programs: BTreeMap::new(),
            choices: BTreeMap::new(),
            device,
            masters: gpu.block(f32s)?,
            cast,
            momentum: gpu.block(f32s)?,
            fresh: gpu.block(f32s)?,
            raw,
            is_raw,
            summed: None,
            running: gpu.block(running)?,
            sums: gpu.block(2 * layout.channels * size_of::<f64>())?,
            average: match options.average {
                true => Some([gpu.block(f32s)?, gpu.block(running)?]),
                false => None,
            },
            rules,
            draws: gpu.block(drops.bytes())?,
            drops,
            kinds_for: None,
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
            peers: None,
            graph: graph.clone(),
            options: *options,
            caps,
            layout,
            gpu,
        };
        cuda.load(state)?;
        Ok(cuda)
    }

    /// Makes it one of several: from now on every step is one of all ranks.
    fn join(&mut self, collective: Arc<dyn Collective>) -> Result<(), Error> {
        self.peers = Some(Peers::new(&self.gpu, &self.layout, collective)?);
        Ok(())
    }

    /// Ranks that a step is shared by.
    fn ranks(&self) -> usize {
        let peers = self.peers.as_ref();
        peers.map_or(1, |peers| peers.collective.ranks())
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
        let device = self
            .device
            .as_ref()
            .ok_or("convolutions are our own".to_owned());
        device
            .and_then(Device::describe)
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
            others: control.others,
            hyper: control.hyper,
            scale: control.scale,
            scored: control.scored,
            totals: control.totals,
            draws: self.draws.address,
            kept: control.kept,
            momentum: self.momentum.address,
            average: self.average.as_ref().map_or(0, |[v, _]| v.address),
            running_average: self.average.as_ref().map_or(0, |[_, v]| v.address),
            rules: Rules::new(&self.layout, self.rules.address).0,
        }
    }

    fn launch(&self, call: &Call) -> Result<(), Error> {
        match call {
            Call::Launch {
                name, grid, args, ..
            } => self.gpu.launch(name, *grid, &mut args.clone()),
            Call::Conv { .. } => unreachable!("convolutions go their way"),
        }
    }

    fn go(&self, way: &Way) -> Result<(), Error> {
        match (way, &self.device) {
            (Way::Launch(call), _) => self.launch(call),
            (Way::Launches(_, calls), _) => calls.iter().try_for_each(|call| self.launch(call)),
            (Way::Plan(Call::Conv { conv, .. }, bound), Some(device)) => {
                match &self.choices[&conv.name()] {
                    Choice::Plan(plan) => bound.run(device, plan),
                    Choice::Own => unreachable!("it was bound to a plan"),
                }
            }
            (Way::Plan(..), _) => unreachable!("plans are cuDNN's and of convolutions"),
        }
    }

    /// Parts of the gradients that are complete together.
    fn buckets(&self) -> Vec<Range<usize>> {
        match &self.peers {
            Some(peers) => peers.buckets.clone(),
            None => std::iter::once(0..self.layout.which.len()).collect(),
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
                &self.buckets(),
            )
        };
        let (first, further) = (calls(false), calls(true));
        self.race(&first)?;
        let (image, logits, setup) = (first.image, first.logits, first.setup);
        let record = |parts: Vec<Vec<Call>>| {
            let steps = parts.into_iter().map(|calls| self.record(calls));
            steps.collect::<Result<Vec<Step>, Error>>()
        };
        let first = record(first.body)?;
        let further = match mode {
            Mode::Train => record(further.body)?,
            Mode::Infer => vec![],
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

    /// Finds the fastest way for each of a program's convolutions.
    fn race(&mut self, calls: &Calls) -> Result<(), Error> {
        let Some(device) = &self.device else {
            return Ok(());
        };
        let parameters = self.cast.as_ref().unwrap_or(&self.masters);
        let race = Race {
            options: &self.options,
            gpu: &self.gpu,
            device,
            own: self.launches(),
            cache: &*self.cache,
            parameters: parameters.address..parameters.address + parameters.bytes as Address,
        };
        for (conv, at) in calls::convs(calls) {
            if let Entry::Vacant(choice) = self.choices.entry(conv.name()) {
                choice.insert(race.winner(&conv, at)?);
            }
        }
        // A race leaves random weights where folded ones were.
        self.is_folded = false;
        Ok(())
    }

    /// What convolutions of our own are launched with.
    fn launches(&self) -> own::Launches {
        own::Launches {
            precision: self.options.precision,
            multiprocessors: self.gpu.card.multiprocessors,
            workspace: self.workspace.address,
            workspace_bytes: self.options.workspace,
        }
    }

    /// How a call is put on the card.
    fn way(&self, call: Call) -> Result<Way, Error> {
        let Call::Conv { conv, at } = &call else {
            return Ok(Way::Launch(call));
        };
        if let Some(Choice::Plan(plan)) = self.choices.get(&conv.name()) {
            let bound = Bound::new(*at, self.workspace.address)?;
            // Once, so that nothing is left to load when it is recorded.
            if let Some(device) = &self.device {
                bound.run(device, plan)?;
            }
            return Ok(Way::Plan(call, bound));
        }
        let launches = self.launches().calls(conv, *at);
        Ok(Way::Launches(call, launches))
    }

    fn record(&self, calls: Vec<Call>) -> Result<Step, Error> {
        let calls = calls.into_iter().map(|call| self.way(call));
        let calls = calls.collect::<Result<Vec<Way>, Error>>()?;
        self.gpu.wait()?;
        let captured = self
            .gpu
            .capture(|| calls.iter().try_for_each(|way| self.go(way)))?;
        Ok(Step { calls, captured })
    }

    /// Makes room for two batches of so many bytes, but for those of steps under way.
    fn reserve(&mut self, bytes: usize) -> Result<(), Error> {
        for index in 0..2 {
            let is_under_way = self.running_steps.iter().any(|(_, i)| *i == index);
            let slot = self.slots.get(index);
            if slot.is_some_and(|slot| is_under_way || slot.host.bytes() >= bytes) {
                continue;
            }
            self.gpu.wait()?;
            let slot = Slot {
                host: self.gpu.pinned(bytes)?,
                device: self.gpu.block(bytes)?,
                layout: SlotLayout::default(),
                copied: Event::new()?,
                done: Event::new()?,
                images: 0,
                is_u8: true,
                is_used: false,
            };
            match self.slots.get_mut(index) {
                Some(old) => *old = slot,
                None => self.slots.push(slot),
            }
        }
        Ok(())
    }

    /// Brings a batch to the card, beside what runs there; the slot's number. `hypers`: those of each micro-batch.
    /// `draws`: what is dropped.
    fn stage(
        &mut self,
        batch: &Batch<'_>,
        hypers: &[hyper::Words],
        draws: &[u8],
    ) -> Result<usize, Error> {
        let (pixels, is_u8): (&[u8], bool) = match batch.pixels {
            Pixels::U8(p) => (p, true),
            // SAFETY: any f32 is four bytes.
            Pixels::F32(p) => unsafe {
                let bytes = std::slice::from_raw_parts(p.as_ptr().cast(), size_of_val(p));
                (bytes, false)
            },
        };
        let images = batch.images();
        let layout = SlotLayout::new(pixels.len(), images, hypers.len(), draws.len());
        // The older of two; a third is never needed, for only two steps are under way.
        let index = (self.steps % 2) as usize;
        self.steps += 1;
        self.reserve(layout.end)?;
        let slot = &mut self.slots[index];
        if slot.is_used {
            match &self.peers {
                Some(peers) => peers.wait(&slot.done)?,
                None => slot.done.wait()?,
            }
        }
        (slot.images, slot.is_u8, slot.layout) = (images, is_u8, layout);
        let host = slot.host.get_mut();
        host[..pixels.len()].copy_from_slice(pixels);
        let others = batch.mixed.map_or(batch.labels, |mixed| mixed.labels);
        for (at, labels) in [(layout.labels, batch.labels), (layout.others, others)] {
            let to = host[at..].chunks_exact_mut(size_of::<u32>());
            for (to, label) in to.zip(labels) {
                to.copy_from_slice(&label.to_ne_bytes());
            }
        }
        host[layout.draws..layout.totals].copy_from_slice(draws);
        let to = host[layout.hypers..layout.draws].chunks_exact_mut(SlotLayout::HYPER);
        for (to, words) in to.zip(hypers) {
            to[..hyper::BYTES].copy_from_slice(words.bytes());
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

    /// Runs micro-batch `number`, images `from..to` of what a slot holds, adding to the sums of those before it. `sums`:
    /// in training, of how many micro-batches the gradients are summed.
    fn micro(
        &mut self,
        index: usize,
        number: usize,
        (from, to): (usize, usize),
        program: (usize, Mode),
        sums: Option<usize>,
    ) -> Result<(), Error> {
        let add = number > 0;
        let image = self.graph.plane(self.graph.input());
        let slot = &self.slots[index];
        let is_u8 = slot.is_u8;
        let element = if is_u8 { 1 } else { size_of::<f32>() };
        let at = |offset: usize| slot.device.address + offset as Address;
        let pixels = at(from * image.elements() * element);
        let control = self.control();
        let (labels, layout) = (size_of::<u32>(), slot.layout);
        for (here, of) in [
            (control.labels, layout.labels),
            (control.others, layout.others),
        ] {
            self.copy(here, at(of + from * labels), (to - from) * labels)?;
        }
        let words = at(layout.hypers + number * SlotLayout::HYPER);
        self.copy(control.hyper, words, hyper::BYTES)?;
        let compiled = &self.programs[&program];
        let count = (to - from) * image.pixels();
        let steps = match add && program.1 == Mode::Train {
            true => &compiled.further,
            false => &compiled.first,
        };
        let input = Way::Launch(calls::input(pixels, is_u8, count, compiled.image));
        let mut times = vec![];
        if self.profile.is_some() {
            times.extend(self.timed(std::slice::from_ref(&input))?);
        } else {
            self.go(&input)?;
        }
        for (part, step) in steps.iter().enumerate() {
            if self.profile.is_some() {
                times.extend(self.timed(&step.calls)?);
            } else {
                self.gpu.replay(&step.captured)?;
            }
            if let Some(sums) = sums {
                self.after_part(part, number, sums)?;
            }
        }
        self.measured(times);
        self.launch(&calls::loss_finish(&self.places(), to - from, add))
    }

    /// The gradients of a bucket are complete: they join those of micro-batches before, and at last those of other
    /// ranks.
    fn after_part(&self, part: usize, number: usize, micro_batches: usize) -> Result<(), Error> {
        let bucket = &self.buckets()[part];
        let mut gradients = self.fresh.address;
        if micro_batches > 1 {
            let summed = self.summed.as_ref().expect("made when a step begins");
            gradients = summed.address;
            let call = calls::accumulate(gradients, self.fresh.address, bucket, number > 0);
            self.launch(&call)?;
        }
        match &self.peers {
            Some(peers) if number + 1 == micro_batches => peers.sum(&self.gpu, gradients, bucket),
            _ => Ok(()),
        }
    }

    /// Runs calls one by one, each with its time.
    fn timed(&self, calls: &[Way]) -> Result<Vec<KernelTime>, Error> {
        let mut events = vec![Event::new()?];
        events[0].record(self.gpu.stream)?;
        for way in calls {
            self.go(way)?;
            let event = Event::new()?;
            event.record(self.gpu.stream)?;
            events.push(event);
        }
        self.gpu.wait()?;
        let element = self.options.precision.bytes();
        let time = |(way, pair): (&Way, &[Event])| {
            let call = way.call();
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
        calls.iter().zip(events.windows(2)).map(time).collect()
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
    fn update(&mut self, hyper: &Hyper, micro_batches: usize) -> Result<(), Error> {
        let gradients = match &self.summed {
            Some(summed) if micro_batches > 1 => summed.address,
            _ => self.fresh.address,
        };
        let calls = calls::update(
            &self.layout,
            &self.places(),
            gradients,
            micro_batches * self.ranks(),
            hyper.rule != Rule::Sgd || hyper.clip_norm.is_some(),
            self.options.precision == Precision::F16,
        );
        self.is_folded = false;
        if self.profile.is_some() {
            let ways: Vec<Way> = calls.into_iter().map(Way::Launch).collect();
            let times = self.timed(&ways)?;
            self.measured(times);
            return Ok(());
        }
        calls.iter().try_for_each(|call| self.launch(call))
    }

    /// Says of each tensor what the rule has to know.
    fn set_kinds(&mut self, decay: crate::Decay) -> Result<(), Error> {
        if self.kinds_for == Some(decay) {
            return Ok(());
        }
        let kinds = self.layout.kinds(&self.graph, decay);
        self.gpu.upload(self.places().rules.kinds, &kinds)?;
        self.kinds_for = Some(decay);
        Ok(())
    }

    /// Asks for the totals of the step in a slot.
    fn ask_totals(&mut self, index: usize) -> Result<(), Error> {
        let totals = self.control().totals;
        let slot = &mut self.slots[index];
        // SAFETY: the host's memory ends behind the totals, and nobody reads it before `done`.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                slot.host.address().cast_mut().byte_add(slot.layout.totals),
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
    fn totals(&self, index: usize) -> Result<Metrics, Error> {
        let slot = &self.slots[index];
        match &self.peers {
            Some(peers) => peers.wait(&slot.done)?,
            None => slot.done.wait()?,
        }
        let bytes = &slot.host.get()[slot.layout.totals..slot.layout.end];
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
            setup.iter().try_for_each(|call| self.launch(call))?;
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
        let images = batch.images();
        let words = hyper::Words::of_inference(self.graph.classes());
        let index = self.stage(batch, &vec![words; images.div_ceil(size)], &[])?;
        for (number, from) in (0..images).step_by(size).enumerate() {
            let to = (from + size).min(images);
            self.micro(index, number, (from, to), (size, Mode::Infer), None)?;
            if let Some(all) = &mut all {
                let logits = self.programs[&(size, Mode::Infer)].logits;
                let classes = self.graph.classes();
                let found: Vec<f32> = self.gpu.download(logits, (to - from) * classes)?;
                all.extend(found);
            }
        }
        self.ask_totals(index)?;
        self.totals(index)
    }

    /// The micro-batches of so many images.
    fn parts(&self, images: usize) -> Vec<(usize, usize)> {
        let size = self.options.micro_batch;
        (0..images)
            .step_by(size)
            .map(|from| (from, (from + size).min(images)))
            .collect()
    }

    /// Whether [`Cuda::prepare`] has nothing to do for such a step.
    fn is_prepared(&self, batch: &Batch<'_>, hyper: &Hyper) -> bool {
        let parts = self.parts(batch.images());
        let is_compiled =
            |(from, to): &(usize, usize)| self.programs.contains_key(&(to - from, Mode::Train));
        let bytes = self.slot_layout(batch, parts.len()).end;
        parts.iter().all(is_compiled)
            && self.kinds_for == Some(hyper.decay)
            && (parts.len() == 1 || self.summed.is_some())
            && self.slots.len() == 2
            && self.slots.iter().all(|slot| slot.host.bytes() >= bytes)
    }

    /// Where a batch and what belongs to it lie in a slot.
    fn slot_layout(&self, batch: &Batch<'_>, micro_batches: usize) -> SlotLayout {
        let pixel_bytes = match batch.pixels {
            Pixels::U8(p) => p.len(),
            Pixels::F32(p) => size_of_val(p),
        };
        SlotLayout::new(
            pixel_bytes,
            batch.images(),
            micro_batches,
            self.drops.bytes(),
        )
    }

    /// Makes everything that a step needs, so that the step itself allocates nothing: while ranks exchange gradients, an
    /// allocation on one card may wait for the others.
    fn prepare(&mut self, batch: &Batch<'_>, hyper: &Hyper) -> Result<(), Error> {
        if self.is_prepared(batch, hyper) {
            return Ok(());
        }
        self.gpu.enter()?;
        let parts = self.parts(batch.images());
        for (from, to) in &parts {
            self.compile(to - from, Mode::Train)?;
        }
        self.set_kinds(hyper.decay)?;
        if parts.len() > 1 && self.summed.is_none() {
            self.summed = Some(self.gpu.block(self.layout.len * size_of::<f32>())?);
        }
        self.reserve(self.slot_layout(batch, parts.len()).end)
    }

    /// Starts a step of `images` images in all, of which `batch` is the part that begins with number `first`. It was
    /// prepared.
    fn start_part(
        &mut self,
        batch: &Batch<'_>,
        hyper: &Hyper,
        images: usize,
        first: usize,
    ) -> Result<Started, Error> {
        assert!(
            hyper.average.is_none() || self.average.is_some(),
            "the engine was made to keep an average"
        );
        assert!(self.running_steps.len() < 2, "two steps at most are begun");
        self.gpu.enter()?;
        let parts = self.parts(batch.images());
        let classes = self.graph.classes();
        let words = |(from, _): &(usize, usize)| {
            hyper::Words::of_step(hyper, batch, classes, images, first + from)
        };
        let words: Vec<hyper::Words> = parts.iter().map(words).collect();
        let draws = self.drops.draws(hyper.dropout);
        let index = self.stage(batch, &words, &draws)?;
        let from = self.slots[index].device.address + self.slots[index].layout.draws as Address;
        if !draws.is_empty() {
            self.copy(self.draws.address, from, draws.len())?;
        }
        for (i, (from, to)) in parts.iter().enumerate() {
            let program = (to - from, Mode::Train);
            self.micro(index, i, (*from, *to), program, Some(parts.len()))?;
        }
        if let Some(peers) = &self.peers {
            peers.sum_all(&self.gpu, self.sums.address, 2 * self.layout.channels)?;
            peers.join(&self.gpu)?;
        }
        self.update(hyper, parts.len())?;
        self.ask_totals(index)?;
        self.running_steps.push_back((self.steps, index));
        Ok(Started::Running(self.steps))
    }

    fn set_scale(&self, scale: f32, good: u32) -> Result<(), Error> {
        let words = [scale.to_bits(), good, 0, 0];
        self.gpu.upload(self.control().scale, &words)
    }

    fn read_state(&self) -> Result<State, Error> {
        self.gpu.enter()?;
        let mut state = State::new();
        let mut blocks = vec![("", &self.masters), (MOMENTUM_PREFIX, &self.momentum)];
        let mut runnings = vec![("", &self.running)];
        if let Some([average, running]) = &self.average {
            blocks.push((AVERAGE_PREFIX, average));
            runnings.push((AVERAGE_PREFIX, running));
        }
        for (prefix, block) in blocks {
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
        for (prefix, block) in runnings {
            let running: Vec<f32> = self.gpu.download(block.address, 2 * channels)?;
            for (i, n) in self.graph.norms().iter().enumerate() {
                let from = self.layout.running(graph::NormId(i));
                for (suffix, from) in [(RUNNING_MEAN, from), (RUNNING_VAR, channels + from)] {
                    let tensor = Tensor {
                        shape: vec![n.channels],
                        values: running[from..from + n.channels].to_vec(),
                    };
                    state.insert(format!("{prefix}{}{suffix}", n.name), tensor);
                }
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
        let peers = self.peers.as_ref();
        self.gpu
            .enter()
            .and_then(|()| self.gpu.wait())
            .and_then(|()| peers.map_or(Ok(()), |peers| peers.drain(&self.gpu)))
            .ok();
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

/// 91900 as 9.19.0.
pub fn cudnn_version(version: usize) -> String {
    let (major, minor) = (version / 10_000, version / 100 % 100);
    format!("{major}.{minor}.{}", version % 100)
}

impl Engine for Cuda {
    fn describe(&self) -> String {
        let Options {
            precision, ordinal, ..
        } = self.options;
        let convolutions = match (&self.device, libraries().cudnn) {
            (Some(_), Some(v)) => format!("cuDNN {}", cudnn_version(v)),
            _ => "convolutions of our own".into(),
        };
        format!(
            "cuda:{ordinal}: {}, {precision}, {convolutions}",
            self.gpu.card.name
        )
    }

    fn load(&mut self, state: &State) -> Result<(), Error> {
        state::check(&self.graph, state)?;
        self.gpu.enter()?;
        let mut blocks = vec![("", &self.masters), (MOMENTUM_PREFIX, &self.momentum)];
        let mut runnings = vec![("", &self.running)];
        if let Some([average, running]) = &self.average {
            blocks.push((AVERAGE_PREFIX, average));
            runnings.push((AVERAGE_PREFIX, running));
        }
        // A moving average begins at the values themselves.
        let of = |prefix: &str, name: &str| {
            let tensor = state.get(&format!("{prefix}{name}"));
            tensor.or_else(|| state.get(name).filter(|_| prefix == AVERAGE_PREFIX))
        };
        for (prefix, block) in blocks {
            let mut all = vec![0.0f32; self.layout.len];
            for (p, slot) in self.graph.params().iter().zip(&self.layout.slots) {
                if let Some(tensor) = of(prefix, &p.name) {
                    slot.scatter(&tensor.values, &mut all);
                }
            }
            self.gpu.upload(block.address, &all)?;
        }
        let channels = self.layout.channels;
        for (prefix, block) in runnings {
            let mut running = vec![0.0f32; 2 * channels];
            for (i, n) in self.graph.norms().iter().enumerate() {
                let to = self.layout.running(graph::NormId(i));
                for (suffix, to) in [(RUNNING_MEAN, to), (RUNNING_VAR, channels + to)] {
                    let tensor = of(prefix, &format!("{}{suffix}", n.name));
                    let values = &tensor.expect("a state that was checked").values;
                    running[to..to + n.channels].copy_from_slice(values);
                }
            }
            self.gpu.upload(block.address, &running)?;
        }
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
            self.launch(&calls::over_chunks("cast", &self.layout, args))?;
        }
        self.is_folded = false;
        self.gpu.wait()
    }

    fn state(&self) -> Result<State, Error> {
        self.read_state()
    }

    fn train_step(&mut self, batch: &Batch<'_>, hyper: &Hyper) -> Result<Metrics, Error> {
        let step = self.start_step(batch, hyper)?;
        self.finish_step(step)
    }

    fn start_step(&mut self, batch: &Batch<'_>, hyper: &Hyper) -> Result<Started, Error> {
        batch.check(&self.graph);
        self.prepare(batch, hyper)?;
        self.start_part(batch, hyper, batch.images(), 0)
    }

    fn finish_step(&mut self, step: Started) -> Result<Metrics, Error> {
        self.gpu.enter()?;
        let (number, index) = self.running_steps.pop_front().expect("a step was begun");
        assert!(
            matches!(step, Started::Running(n) if n == number),
            "steps are finished in their order"
        );
        self.totals(index)
    }

    fn swap_average(&mut self) -> Result<(), Error> {
        let [average, running] = self
            .average
            .as_ref()
            .expect("an engine that was made to keep an average");
        let channels = 2 * self.layout.channels;
        // What convolutions read in training stays as it is: nothing trains before the values are back.
        self.gpu.enter()?;
        self.launch(&calls::swap(
            self.masters.address,
            average.address,
            self.layout.len,
        ))?;
        self.launch(&calls::swap(
            self.running.address,
            running.address,
            channels,
        ))?;
        self.is_folded = false;
        Ok(())
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
        let plane = self.graph.plane(self.graph.input());
        crate::predict(self, plane, pixels)
    }
}

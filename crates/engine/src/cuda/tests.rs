//! What can be checked without a card: that every kernel compiles, that the calls of a step compute what the oracle
//! does when the host runs them, that cuDNN has plans for every network, and what is said when something is missing.

use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

use graph::{DropBlock, DropPath, Graph, Init, Mode, Plane, Program, ValueId};
use half::{bf16, f16};

use super::calls::{self, Call, CudaCaps, Drops, Layout, Places, Rules};
use super::cudnn::{self, Conv, Product, Tensors};
use super::driver::{self, Arg, Card, KERNELS, Libraries};
use super::hyper::Words;
use super::own;
use super::{Control, Options, Precision};
use crate::oracle::Oracle;
use crate::{
    AVERAGE_PREFIX, Batch, Decay, Dropout, Engine, Error, Hyper, MOMENTUM_PREFIX, Metrics, Mixed,
    Pixels, RUNNING_MEAN, RUNNING_VAR, Rule, State, Tensor, initial_state,
};

/// Says that a test is skipped; with REQUIRE_CUDA=1 that is a failure.
pub(super) fn skip(why: &str) {
    assert!(
        std::env::var_os("REQUIRE_CUDA").is_none(),
        "REQUIRE_CUDA is set, but {why}"
    );
    eprintln!("skipped: {why}");
}

/// The libraries, also those of the Python that RUNNER_PYTHON names.
pub(super) fn libraries() -> Libraries {
    static LOAD: OnceLock<()> = OnceLock::new();
    LOAD.get_or_init(|| {
        let python = std::env::var_os("RUNNER_PYTHON").filter(|p| !p.is_empty());
        if let Some(prefix) = python
            .as_ref()
            .and_then(|p| Path::new(p).parent()?.parent())
        {
            driver::load_packaged(prefix, |_| true);
        }
    });
    driver::libraries()
}

// ---- kernels compile ----------------------------------------------------------------------------------------------

/// Most registers of a thread; 64 let four blocks run on a multiprocessor, 128 two.
fn register_limit(kernel: &str) -> u32 {
    match kernel {
        "matmul" => 128,
        "norm_backward" | "apply_add_normed" => 104,
        "close_lazy" | "close_2" | "close_2_spread" => 104,
        "close_lazy_pool" => 128,
        "close_1" | "close_1_spread" => 72,
        "close_1_half" | "close_1_rest" => 88,
        "close_2_half" | "close_2_rest" => 112,
        "gated_gradient" | "gated_sum" | "gated_sums" | "dropped_sum" => 104,
        "conv_sum" | "conv_sum_many" => 64,
        conv if conv.starts_with("conv_") => 128,
        _ => 64,
    }
}

/// Registers, and bytes of stack and spills, of each kernel, from the assembler's notes.
fn usage(log: &str) -> BTreeMap<String, (u32, u32)> {
    let mut found = BTreeMap::new();
    let (mut name, mut bytes) = (String::new(), 0);
    let number = |text: &str| {
        let words = text.split_whitespace();
        words.filter_map(|w| w.parse::<u32>().ok()).next_back()
    };
    for line in log.lines() {
        if let Some(rest) = line.split("entry function '").nth(1) {
            name = rest.split('\'').next().unwrap_or_default().to_owned();
        } else if line.contains("bytes stack frame") {
            bytes = line.split(" bytes").filter_map(number).sum();
        } else if let Some(rest) = line.split("Used ").nth(1) {
            let registers = rest.split(' ').next().unwrap_or_default();
            found.insert(name.clone(), (registers.parse().unwrap(), bytes));
        }
    }
    found
}

#[test]
fn kernels_compile_without_spills() {
    if libraries().nvrtc.is_none() {
        return skip("NVRTC is missing (pip install nvidia-cuda-nvrtc, RUNNER_PYTHON)");
    }
    for arch in ["sm_80", "sm_90"] {
        for element in 0..3 {
            let source = driver::SOURCE_WITH_CONVOLUTIONS;
            let (_, log) =
                driver::compile(source, arch, element).unwrap_or_else(|log| panic!("{log}"));
            let usage = usage(&log);
            let mut names: Vec<&str> = KERNELS.to_vec();
            names.extend(own::kernels(element));
            names.sort_unstable();
            assert!(usage.keys().eq(&names), "{:?}", usage.keys());
            for (kernel, (registers, bytes)) in usage {
                let limit = register_limit(&kernel);
                assert_eq!(bytes, 0, "{kernel}, {arch}, {element}: stack and spills");
                assert!(
                    registers <= limit,
                    "{kernel}, {arch}, {element}: {registers} registers, at most {limit}"
                );
            }
        }
    }
}

/// A card that the compiler does not know is no fault of the program.
#[test]
fn a_card_that_is_too_new() {
    let Some(version) = libraries().nvrtc else {
        return skip("NVRTC is missing (pip install nvidia-cuda-nvrtc, RUNNER_PYTHON)");
    };
    let log = driver::compile("", "sm_999", 0).unwrap_err();
    let said = driver::does_not_compile("sm_999", Some(version), &log).to_string();
    assert!(said.contains("does not know cards of sm_999"), "{said}");
}

// ---- calls on the host --------------------------------------------------------------------------------------------

type ShimLaunch = unsafe extern "C" fn(*const c_char, u32, u32, *mut *mut c_void) -> i32;

/// kernels.cu compiled for the host, by element; none without a C++ compiler.
fn shim(element: u8) -> Option<ShimLaunch> {
    static SHIMS: [OnceLock<Option<ShimLaunch>>; 3] = [const { OnceLock::new() }; 3];
    *SHIMS[usize::from(element)].get_or_init(|| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda");
        let out: PathBuf =
            std::env::temp_dir().join(format!("shim-{}-{element}.so", std::process::id()));
        let status = Command::new("c++")
            .args(["-O1", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off"])
            .arg(format!("-DELEMENT={element}"))
            .arg("-o")
            .arg(&out)
            .arg(folder.join("shim.cpp"))
            .status()
            .ok()?;
        assert!(status.success(), "the host's compiler refuses kernels.cu");
        let path = CString::new(out.to_str().unwrap()).unwrap();
        // SAFETY: the library is the one just made; its one function has this type.
        unsafe {
            let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
            assert!(!library.is_null(), "the shim does not load");
            let function = libc::dlsym(library, c"shim_launch".as_ptr());
            assert!(!function.is_null(), "the shim has shim_launch");
            std::fs::remove_file(&out).ok();
            Some(std::mem::transmute::<*mut c_void, ShimLaunch>(function))
        }
    })
}

/// Memory that addresses point into, aligned, poisoned with NaN.
struct Memory(Vec<u128>);

impl Memory {
    fn new(bytes: usize) -> Self {
        Self(vec![u128::MAX; bytes / 16 + 64])
    }

    fn zeros(bytes: usize) -> Self {
        Self(vec![0; bytes / 16 + 64])
    }

    fn at(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// Values from an address in it on.
    fn write<V: Copy>(&mut self, at: u64, values: &[V]) {
        let bytes = (at - self.at()) as usize;
        let from = bytes / size_of::<V>();
        self.values_mut::<V>(from + values.len())[from..].copy_from_slice(values);
    }

    fn values<V: Copy>(&self, len: usize) -> &[V] {
        assert!(len * size_of::<V>() <= self.0.len() * 16);
        // SAFETY: long enough, aligned, and any bits are a value of the types that tests read.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), len) }
    }

    fn values_mut<V: Copy>(&mut self, len: usize) -> &mut [V] {
        assert!(len * size_of::<V>() <= self.0.len() * 16);
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), len) }
    }
}

/// A card of the host: kernels by the shim, convolutions by plain loops or by our own kernels.
struct Host {
    launch: ShimLaunch,
    precision: Precision,
    /// What our own are launched with, and their workspace.
    own: Option<(own::Launches, Memory)>,
}

impl Host {
    fn read(&self, at: u64, i: usize) -> f64 {
        // SAFETY: calls name memory of the test, and shapes that fit it.
        unsafe {
            match self.precision {
                Precision::F32 | Precision::Tf32 => f64::from(*(at as *const f32).add(i)),
                Precision::Bf16 => f64::from((*(at as *const bf16).add(i)).to_f32()),
                Precision::F16 => f64::from((*(at as *const f16).add(i)).to_f32()),
            }
        }
    }

    fn write(&self, at: u64, i: usize, v: f64) {
        // SAFETY: as for `read`.
        unsafe {
            match self.precision {
                Precision::F32 | Precision::Tf32 => *(at as *mut f32).add(i) = v as f32,
                Precision::Bf16 => *(at as *mut bf16).add(i) = bf16::from_f32(v as f32),
                Precision::F16 => *(at as *mut f16).add(i) = f16::from_f32(v as f32),
            }
        }
    }

    fn conv(&self, conv: &Conv, at: Tensors) {
        let g = &conv.geometry;
        let (n, k, pad) = (conv.batch, g.kernel, g.pad());
        let (input, output) = (g.input, g.output);
        let x: Vec<f64> = match conv.product {
            Product::Input => vec![],
            _ => (0..n * input.elements())
                .map(|i| self.read(at.x, i))
                .collect(),
        };
        let w: Vec<f64> = match conv.product {
            Product::Weight => vec![],
            _ => (0..output.c * k * k * input.c)
                .map(|i| self.read(at.w, i))
                .collect(),
        };
        let y: Vec<f64> = match conv.product {
            Product::Forward => vec![],
            _ => (0..n * output.elements())
                .map(|i| self.read(at.y, i))
                .collect(),
        };
        let len = match conv.product {
            Product::Forward => n * output.elements(),
            Product::Input => n * input.elements(),
            Product::Weight => output.c * k * k * input.c,
        };
        let mut sums = vec![0.0f64; len];
        for image in 0..n {
            for (oh, ow) in (0..output.h).flat_map(|h| (0..output.w).map(move |w| (h, w))) {
                for (kh, kw) in (0..k).flat_map(|h| (0..k).map(move |w| (h, w))) {
                    let (h, w_) = (
                        (oh * g.stride + kh).wrapping_sub(pad),
                        (ow * g.stride + kw).wrapping_sub(pad),
                    );
                    if h >= input.h || w_ >= input.w {
                        continue;
                    }
                    let xi = ((image * input.h + h) * input.w + w_) * input.c;
                    let yi = ((image * output.h + oh) * output.w + ow) * output.c;
                    for o in 0..output.c {
                        let wi = ((o * k + kh) * k + kw) * input.c;
                        for c in 0..input.c {
                            match conv.product {
                                Product::Forward => sums[yi + o] += x[xi + c] * w[wi + c],
                                Product::Input => sums[xi + c] += y[yi + o] * w[wi + c],
                                Product::Weight => sums[wi + c] += y[yi + o] * x[xi + c],
                            }
                        }
                    }
                }
            }
        }
        let to = match conv.product {
            Product::Forward => at.y,
            Product::Input => at.x,
            Product::Weight => at.w,
        };
        for (i, sum) in sums.into_iter().enumerate() {
            self.write(to, i, sum);
        }
    }

    fn run(&self, call: &Call) {
        match call {
            Call::Conv { conv, at } => match &self.own {
                None => self.conv(conv, *at),
                Some((own, _)) => own.calls(conv, *at).iter().for_each(|call| self.run(call)),
            },
            Call::Launch {
                name, grid, args, ..
            } => {
                let mut args = args.clone();
                let mut pointers: Vec<_> = args.iter_mut().map(Arg::pointer).collect();
                let c_name = CString::new(*name).unwrap();
                // The coroutines are one set, whatever the number of tests that run.
                static ONE: Mutex<()> = Mutex::new(());
                let _one = ONE.lock();
                // SAFETY: the arguments are those of the kernel; addresses are the test's memory.
                let status = unsafe {
                    (self.launch)(c_name.as_ptr(), grid.0, grid.1, pointers.as_mut_ptr())
                };
                assert_eq!(status, 0, "{name} is a kernel");
            }
        }
    }
}

/// What our own convolutions are launched with, on a card of so many multiprocessors.
fn launches(precision: Precision, multiprocessors: usize) -> (own::Launches, Memory) {
    let bytes = 4 << 20;
    let memory = Memory::new(bytes);
    let own = own::Launches {
        precision,
        multiprocessors,
        workspace: memory.at(),
        workspace_bytes: bytes,
    };
    (own, memory)
}

/// One card's worth of memory and what a step does with it, all on the host.
struct Emulated {
    host: Host,
    graph: Graph,
    layout: Layout,
    caps: CudaCaps,
    micro_batch: usize,
    masters: Memory,
    cast: Memory,
    momentum: Memory,
    fresh: Memory,
    raw: Memory,
    is_raw: Memory,
    summed: Memory,
    running: Memory,
    sums: Memory,
    rules: Memory,
    draws: Memory,
    average: Memory,
    running_average: Memory,
    control: Memory,
}

impl Emulated {
    /// With convolutions by our own kernels.
    fn own(graph: &Graph, micro_batch: usize, precision: Precision, state: &State) -> Option<Self> {
        let mut it = Self::new(graph, micro_batch, precision, state)?;
        it.host.own = Some(launches(precision, 3));
        Some(it)
    }

    fn new(graph: &Graph, micro_batch: usize, precision: Precision, state: &State) -> Option<Self> {
        let launch = shim(precision.element())?;
        let options = Options::new(0, micro_batch, precision);
        let layout = Layout::new(graph);
        let bytes = 4 * layout.len;
        let mut it = Self {
            host: Host {
                launch,
                precision,
                own: None,
            },
            graph: graph.clone(),
            caps: CudaCaps::new(&options, 1),
            micro_batch,
            masters: Memory::zeros(bytes),
            cast: Memory::zeros(bytes),
            momentum: Memory::zeros(bytes),
            // Places between parameters stay zero on the card, too.
            fresh: Memory::zeros(bytes),
            raw: Memory::zeros(bytes),
            is_raw: Memory::zeros(layout.convs.len()),
            summed: Memory::zeros(bytes),
            running: Memory::zeros(8 * layout.channels),
            sums: Memory::new(16 * layout.channels),
            draws: Memory::zeros(Drops::new(graph).bytes()),
            rules: Memory::zeros(Rules::new(&layout, 0).1 as usize),
            average: Memory::zeros(bytes),
            running_average: Memory::zeros(8 * layout.channels),
            control: Memory::zeros(Control::bytes(micro_batch)),
            layout,
        };
        let len = it.layout.len;
        let chunks = it.layout.convs.len();
        it.is_raw
            .values_mut::<u8>(chunks)
            .copy_from_slice(&it.layout.convs);
        for (p, slot) in graph.params().iter().zip(&it.layout.slots) {
            slot.scatter(&state[&p.name].values, it.masters.values_mut(len));
        }
        let channels = it.layout.channels;
        for (i, n) in graph.norms().iter().enumerate() {
            let to = it.layout.running(graph::NormId(i));
            let running = it.running.values_mut::<f32>(2 * channels);
            for (suffix, to) in [(RUNNING_MEAN, to), (RUNNING_VAR, channels + to)] {
                running[to..to + n.channels]
                    .copy_from_slice(&state[&format!("{}{suffix}", n.name)].values);
            }
        }
        let (rules, _) = Rules::new(&it.layout, it.rules.at());
        for (at, values) in rules.constants(&it.layout) {
            it.rules.write(at, values);
        }
        it.average = Memory(it.masters.0.clone());
        it.running_average = Memory(it.running.0.clone());
        let scale = if precision == Precision::F16 {
            1024.0f32
        } else {
            1.0
        };
        it.control.values_mut::<f32>(65)[64] = scale;
        it.cast();
        Some(it)
    }

    fn control(&self) -> Control {
        let block = std::mem::ManuallyDrop::new(driver::Block {
            address: self.control.at(),
            bytes: 0,
        });
        Control::new(&block, self.micro_batch)
    }

    fn places(&self, arena: &Memory, constants: &Memory) -> Places {
        let control = self.control();
        Places {
            arena: arena.at(),
            constants: constants.at(),
            masters: self.masters.at(),
            cast: self.weights(),
            fresh: self.fresh.at(),
            raw: match self.host.precision.bytes() {
                4 => self.fresh.at(),
                _ => self.raw.at(),
            },
            is_raw: self.is_raw.at(),
            running: self.running.at(),
            sums: self.sums.at(),
            labels: control.labels,
            others: control.others,
            hyper: control.hyper,
            scale: control.scale,
            scored: control.scored,
            totals: control.totals,
            draws: self.draws.at(),
            kept: control.kept,
            momentum: self.momentum.at(),
            average: self.average.at(),
            running_average: self.running_average.at(),
            rules: Rules::new(&self.layout, self.rules.at()).0,
        }
    }

    fn weights(&self) -> u64 {
        match self.host.precision.bytes() {
            4 => self.masters.at(),
            _ => self.cast.at(),
        }
    }

    fn cast(&mut self) {
        let args = vec![
            Arg::address(self.masters.at()),
            Arg::address(self.cast.at()),
        ];
        self.host
            .run(&calls::over_chunks("cast", &self.layout, args));
    }

    /// Runs a micro-batch; metrics and, of inference, logits.
    fn micro(
        &mut self,
        batch: &Batch<'_>,
        hyper: Words,
        mode: Mode,
        add: bool,
    ) -> (Metrics, Vec<f32>) {
        let program = Program::new(&self.graph, &self.caps, batch.images(), mode);
        let arena = Memory::new(program.arena_bytes);
        let constants = Memory::new(program.constant_bytes);
        let places = self.places(&arena, &constants);
        let made = calls::calls(
            &self.graph,
            &program,
            &self.caps,
            &self.layout,
            &places,
            add,
            &calls::buckets(&self.layout, 5000),
        );
        self.control.write(places.hyper, hyper.bytes());
        self.control.write(places.labels, batch.labels);
        let others = batch.mixed.map_or(batch.labels, |mixed| mixed.labels);
        self.control.write(places.others, others);
        let (pixels, is_u8) = match batch.pixels {
            Pixels::U8(p) => (p.as_ptr() as u64, true),
            Pixels::F32(p) => (p.as_ptr() as u64, false),
        };
        let count = batch.images() * self.graph.plane(self.graph.input()).pixels();
        // Kernels read pixels by fours.
        let mut copy = Memory::zeros(batch.pixels.len() * 4);
        // SAFETY: as long as the batch says.
        unsafe {
            let bytes = batch.pixels.len() * if is_u8 { 1 } else { 4 };
            let to = copy.values_mut::<u8>(bytes);
            to.copy_from_slice(std::slice::from_raw_parts(pixels as *const u8, bytes));
        }
        self.host
            .run(&calls::input(copy.at(), is_u8, count, made.image));
        made.setup.iter().for_each(|call| self.host.run(call));
        made.body
            .iter()
            .flatten()
            .for_each(|call| self.host.run(call));
        self.host
            .run(&calls::loss_finish(&places, batch.images(), add));
        let totals = self.control.values::<u32>(132)[128..].to_vec();
        let loss = u64::from(totals[1]) << 32 | u64::from(totals[0]);
        let metrics = Metrics {
            images: batch.images(),
            loss_sum: f64::from_bits(loss),
            top1: totals[2] as usize,
            top5: totals[3] as usize,
        };
        let at = (made.logits - arena.at()) as usize / 4;
        let len = at + batch.images() * self.graph.classes();
        let logits = match mode {
            Mode::Infer => arena.values::<f32>(len)[at..].to_vec(),
            Mode::Train => vec![],
        };
        (metrics, logits)
    }

    fn train_step(&mut self, batch: &Batch<'_>, hyper: &Hyper) -> Metrics {
        let kinds = self.layout.kinds(&self.graph, hyper.decay);
        let at = Rules::new(&self.layout, self.rules.at()).0.kinds;
        self.rules.write(at, &kinds);
        let draws = Drops::new(&self.graph).draws(hyper.dropout);
        self.draws.write(self.draws.at(), &draws);
        let mut metrics = Metrics::default();
        let micro: Vec<Batch<'_>> = batch.micro_batches(self.micro_batch).collect();
        for (i, part) in micro.iter().enumerate() {
            let (classes, from) = (self.graph.classes(), i * self.micro_batch);
            let words = Words::of_step(hyper, part, classes, batch.images(), from);
            metrics = self.micro(part, words, Mode::Train, i > 0).0;
            let all = 0..self.layout.which.len();
            let (summed, fresh) = (self.summed.at(), self.fresh.at());
            self.host
                .run(&calls::accumulate(summed, fresh, &all, i > 0));
        }
        metrics.images = batch.images();
        let nothing = Memory::new(0);
        let places = self.places(&nothing, &nothing);
        let calls = calls::update(
            &self.layout,
            &places,
            self.summed.at(),
            micro.len(),
            true,
            true,
        );
        calls.iter().for_each(|call| self.host.run(call));
        metrics
    }

    fn state(&self) -> State {
        let mut state = State::new();
        let len = self.layout.len;
        for (prefix, block) in [
            ("", &self.masters),
            (MOMENTUM_PREFIX, &self.momentum),
            (AVERAGE_PREFIX, &self.average),
        ] {
            for (p, slot) in self.graph.params().iter().zip(&self.layout.slots) {
                let tensor = Tensor {
                    shape: p.shape.clone(),
                    values: slot.gather(block.values(len)),
                };
                state.insert(format!("{prefix}{}", p.name), tensor);
            }
        }
        let channels = self.layout.channels;
        for (prefix, block) in [("", &self.running), (AVERAGE_PREFIX, &self.running_average)] {
            let running = block.values::<f32>(2 * channels);
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
        state
    }
}

// ---- networks -----------------------------------------------------------------------------------------------------

const NORMAL: Init = Init::Normal { std: 0.2 };

fn conv_bn(g: &mut Graph, name: &str, x: ValueId, out: usize, k: usize, s: usize) -> ValueId {
    let z = g.conv(&format!("{name}.conv"), x, out, k, s, NORMAL);
    g.batch_norm(&format!("{name}.bn"), z, 0.8)
}

/// A bottleneck, with a projection where the shape changes.
fn block(g: &mut Graph, name: &str, x: ValueId, out: usize, stride: usize) -> ValueId {
    let a = conv_bn(g, &format!("{name}.a"), x, 8, 1, 1);
    let a = g.relu(&format!("{name}.a.relu"), a);
    let b = conv_bn(g, &format!("{name}.b"), a, 16, 3, stride);
    let b = g.relu(&format!("{name}.b.relu"), b);
    let main = conv_bn(g, &format!("{name}.c"), b, out, 1, 1);
    let side = match stride == 1 && g.plane(x).c == out {
        true => x,
        false => conv_bn(g, &format!("{name}.side"), x, out, 1, stride),
    };
    let sum = g.add(&format!("{name}.add"), main, side);
    g.relu(&format!("{name}.relu"), sum)
}

/// Every kind of kernel once: stem, max-pool or none, projection, identity, head.
fn network(plane: Plane, pool: Option<usize>, classes: usize) -> Graph {
    let mut g = Graph::new(plane);
    let image = g.input();
    let x = conv_bn(&mut g, "stem", image, 24, 7, 2);
    let mut x = g.relu("stem.relu", x);
    if let Some(pad) = pool {
        x = g.max_pool("pool", x, pad);
    }
    x = block(&mut g, "one", x, 32, 1);
    x = block(&mut g, "two", x, 32, 1);
    x = block(&mut g, "three", x, 40, 2);
    let x = g.avg_pool("pooled", x);
    g.linear("fc", x, classes, NORMAL, Init::Uniform { bound: 0.1 });
    g
}

/// What blocks of [`variant`] have.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Extra {
    /// Squeeze and excitation, means in shortcuts.
    Squeezed,
    /// Branches that are dropped.
    Paths,
    /// Both.
    SqueezedPaths,
    /// Squares that are dropped of branch and shortcut.
    Squares,
}

/// A network of blocks with extras: one whose shape changes, two whose does not.
fn variant(plane: Plane, extra: Extra, classes: usize) -> Graph {
    let mut g = Graph::new(plane);
    let image = g.input();
    let x = conv_bn(&mut g, "stem", image, 16, 3, 1);
    let mut x = g.relu("stem.relu", x);
    let mut squares = 0;
    for (number, (out, stride)) in [(24, 1), (40, 2), (40, 1), (40, 1)].into_iter().enumerate() {
        let name = format!("block{number}");
        let mut drop = |g: &mut Graph, v: ValueId| match extra {
            Extra::Squares => {
                let block = DropBlock {
                    number: squares,
                    side: 3,
                    share: [1 + squares, 12],
                };
                squares += 1;
                g.drop_block(&format!("{name}.squares{squares}"), v, block)
            }
            _ => v,
        };
        let a = conv_bn(&mut g, &format!("{name}.a"), x, out, 3, stride);
        let a = drop(&mut g, a);
        let a = g.relu(&format!("{name}.a.relu"), a);
        let mut main = conv_bn(&mut g, &format!("{name}.b"), a, out, 3, 1);
        main = drop(&mut g, main);
        if matches!(extra, Extra::Squeezed | Extra::SqueezedPaths) {
            let init = |_, _| (Init::Normal { std: 0.8 }, NORMAL);
            main = g.squeeze_excite(&format!("{name}.se"), main, 1 + 4 * number, init);
        }
        if matches!(extra, Extra::Paths | Extra::SqueezedPaths) {
            let path = DropPath {
                block: number,
                share: [number, 4],
            };
            main = g.drop_path(&format!("{name}.path"), main, path);
        }
        let mut side = match (stride, g.plane(x).c == out, extra) {
            (1, true, _) => x,
            (2, _, Extra::Squeezed | Extra::Paths) => {
                let mean = g.half_pool(&format!("{name}.mean"), x);
                conv_bn(&mut g, &format!("{name}.side"), mean, out, 1, 1)
            }
            _ => conv_bn(&mut g, &format!("{name}.side"), x, out, 1, stride),
        };
        side = drop(&mut g, side);
        let sum = g.add(&format!("{name}.add"), main, side);
        x = g.relu(&format!("{name}.relu"), sum);
    }
    let x = g.avg_pool("pooled", x);
    g.linear("fc", x, classes, NORMAL, Init::Uniform { bound: 0.1 });
    g
}

struct Data {
    pixels: Vec<u8>,
    labels: Vec<u32>,
}

impl Data {
    fn new(graph: &Graph, images: usize, seed: u64) -> Self {
        let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut below = |n: usize| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 33) as usize % n
        };
        let values = graph.plane(graph.input()).elements() * images;
        Self {
            pixels: (0..values).map(|_| below(256) as u8).collect(),
            labels: (0..images).map(|_| below(graph.classes()) as u32).collect(),
        }
    }

    fn batch(&self) -> Batch<'_> {
        Batch {
            pixels: Pixels::U8(&self.pixels),
            labels: &self.labels,
            mixed: None,
        }
    }
}

/// The relative error of a tensor; values that are zero but for rounding count against 1e-2 each.
fn error(ours: &Tensor, truth: &Tensor) -> f64 {
    assert_eq!(ours.shape, truth.shape);
    let square = |v: f64| v * v;
    let pairs = ours.values.iter().zip(&truth.values);
    let gap: f64 = pairs.map(|(a, b)| square(f64::from(a - b))).sum();
    let size: f64 = truth.values.iter().map(|b| square(f64::from(*b))).sum();
    (gap / size.max(1e-4 * truth.values.len() as f64)).sqrt()
}

const HYPER: Hyper = Hyper {
    rule: Rule::Sgd,
    lr: 0.1,
    momentum: 0.9,
    nesterov: true,
    weight_decay: 1e-2,
    decay: Decay::NoNorm,
    label_smoothing: 0.1,
    clip_norm: None,
    average: None,
    dropout: None,
};

/// A step in two micro-batches, and the logits after it, against the oracle. `steep`: nine in ten tensors, and logits;
/// `usual`: half of the tensors, and the loss; relative.
fn check_step(precision: Precision, steep: f64, usual: f64) {
    check_steps(Emulated::new, precision, steep, usual);
    check_steps(Emulated::own, precision, steep, usual);
}

fn check_steps(
    make: impl Fn(&Graph, usize, Precision, &State) -> Option<Emulated>,
    precision: Precision,
    steep: f64,
    usual: f64,
) {
    let planes = [
        (Plane { h: 18, w: 22, c: 3 }, Some(1), 11),
        (Plane { h: 20, w: 12, c: 3 }, Some(0), 3),
        (Plane { h: 9, w: 13, c: 3 }, None, 70),
    ];
    for (i, (plane, pool, classes)) in planes.into_iter().enumerate() {
        let graph = network(plane, pool, classes);
        let state = initial_state(&graph, i as u64);
        let Some(mut ours) = make(&graph, 3, precision, &state) else {
            return skip("there is no C++ compiler (c++)");
        };
        let mut truth = Oracle::new(&graph, 3, &state).unwrap();
        let data = Data::new(&graph, 6, i as u64);
        let seen = ours.train_step(&data.batch(), &HYPER);
        let told = truth.train_step(&data.batch(), &HYPER).unwrap();
        let gap = (seen.loss() - told.loss()).abs() / told.loss();
        assert!(gap < usual, "{precision}, {i}: loss {seen:?}, {told:?}");
        let (mut a, b) = (ours.state(), truth.state().unwrap());
        // This oracle keeps no average.
        a.retain(|name, _| !name.starts_with(AVERAGE_PREFIX));
        assert!(a.keys().eq(b.keys()));
        let mut errors: Vec<(f64, &String)> = a
            .iter()
            .map(|(name, t)| (error(t, &b[name]), name))
            .collect();
        errors.sort_by(|a, b| a.0.total_cmp(&b.0));
        // Of the few values of these networks some are zero in one number format and not in the other.
        let (worst, name) = errors[errors.len() * 9 / 10];
        let middle = errors[errors.len() / 2].0;
        println!("{precision}, {i}: worst {worst:.1e} ({name}), middle {middle:.1e}");
        assert!(worst < steep, "{precision}, {i}: {name}: {worst}");
        assert!(middle < usual, "{precision}, {i}: middle {middle}");

        // Inference from the same state.
        let mut ours = make(&graph, 6, precision, &b).unwrap();
        let (metrics, logits) = ours.micro(
            &data.batch(),
            Words::of_inference(classes),
            Mode::Infer,
            false,
        );
        let told = truth.eval_step(&data.batch()).unwrap();
        let predicted = truth.predict(data.batch().pixels).unwrap();
        let size = predicted.iter().map(|v| v.abs()).fold(0.0, f32::max);
        for (a, b) in logits.iter().zip(&predicted) {
            let gap = f64::from((a - b).abs() / size);
            assert!(gap < steep, "{precision}, {i}: logit {a} is not {b}");
        }
        let gap = (metrics.loss() - told.loss()).abs() / told.loss();
        assert!(gap < steep, "{precision}, {i}: {metrics:?}, {told:?}");
    }
}

// f32 sums of some thousand terms. Stored values of 8 and 11 bits: half a unit in the last place is 2e-3 and 2.4e-4,
// gathered over a dozen layers and enlarged by normalisations of few values.
#[test]
fn a_step_on_the_host_is_the_oracles_in_f32() {
    check_step(Precision::F32, 1e-5, 1e-6);
}

#[test]
fn a_step_on_the_host_is_near_the_oracles_in_bf16() {
    check_step(Precision::Bf16, 0.5, 3e-2);
}

#[test]
fn a_step_on_the_host_is_near_the_oracles_in_f16() {
    check_step(Precision::F16, 0.15, 1e-2);
}

/// Steps by every rule, with what may be asked for besides, against the oracle's in f32.
#[test]
fn rules_on_the_host_are_the_oracles() {
    let dropout = Dropout {
        rate: 0.4,
        path_rate: 0.0,
        block_rate: 0.0,
        seed: 3,
        step: 5,
    };
    let plain = Hyper {
        average: Some(0.7),
        ..HYPER
    };
    let slow = Hyper {
        nesterov: false,
        ..plain
    };
    let cases = [
        (
            "clipped",
            Hyper {
                clip_norm: Some(0.5),
                ..plain
            },
        ),
        (
            "not clipped",
            Hyper {
                clip_norm: Some(1e4),
                ..slow
            },
        ),
        (
            "dropped",
            Hyper {
                dropout: Some(dropout),
                ..plain
            },
        ),
        (
            "LARS of 2018",
            Hyper {
                rule: Rule::Lars2018 { trust: 0.1 },
                ..slow
            },
        ),
        (
            "LARS",
            Hyper {
                rule: Rule::Lars { trust: 0.1 },
                decay: Decay::All,
                ..slow
            },
        ),
        (
            "LARS, clipped",
            Hyper {
                rule: Rule::Lars2018 { trust: 0.1 },
                clip_norm: Some(0.5),
                ..slow
            },
        ),
    ];
    let graph = network(Plane { h: 18, w: 22, c: 3 }, Some(1), 11);
    let data = Data::new(&graph, 6, 1);
    let others: Vec<u32> = data.labels.iter().rev().copied().collect();
    for (name, hyper) in cases {
        for share in [None, Some(0.3), Some(0.8)] {
            let mut state = initial_state(&graph, 4);
            let Some(mut ours) = Emulated::new(&graph, 3, Precision::F32, &state) else {
                return skip("there is no C++ compiler (c++)");
            };
            // Where an oracle finds an average, it keeps it.
            for (name, tensor) in state.clone() {
                state.insert(format!("{AVERAGE_PREFIX}{name}"), tensor);
            }
            let mut truth = Oracle::new(&graph, 3, &state).unwrap();
            for _ in 0..2 {
                let batch = Batch {
                    mixed: share.map(|share| Mixed {
                        labels: &others,
                        share,
                    }),
                    ..data.batch()
                };
                let seen = ours.train_step(&batch, &hyper);
                let told = truth.train_step(&batch, &hyper).unwrap();
                let gap = (seen.loss() - told.loss()).abs() / told.loss();
                assert!(gap < 1e-5, "{name}: loss {seen:?}, {told:?}");
                assert_eq!((seen.top1, seen.top5), (told.top1, told.top5), "{name}");
            }
            let (a, b) = (ours.state(), truth.state().unwrap());
            assert!(a.keys().eq(b.keys()), "{name}");
            for (tensor, value) in &b {
                let error = error(&a[tensor], value);
                assert!(error < 2e-4, "{name}, {share:?}: {tensor}: {error}");
            }
        }
    }
}

/// Branches with factors, squares and means in shortcuts, in training and in inference, against the oracle in f32.
#[test]
fn branches_on_the_host_are_the_oracles() {
    let dropout = Dropout {
        rate: 0.2,
        path_rate: 0.6,
        block_rate: 0.4,
        seed: 3,
        step: 5,
    };
    let hyper = Hyper {
        dropout: Some(dropout),
        ..HYPER
    };
    for extra in [
        Extra::Squeezed,
        Extra::Paths,
        Extra::SqueezedPaths,
        Extra::Squares,
    ] {
        for (h, w) in [(9, 13), (12, 8)] {
            let graph = variant(Plane { h, w, c: 3 }, extra, 7);
            let state = initial_state(&graph, h as u64);
            let Some(mut ours) = Emulated::new(&graph, 3, Precision::F32, &state) else {
                return skip("there is no C++ compiler (c++)");
            };
            let mut truth = Oracle::new(&graph, 3, &state).unwrap();
            let data = Data::new(&graph, 6, w as u64);
            let seen = ours.train_step(&data.batch(), &hyper);
            let told = truth.train_step(&data.batch(), &hyper).unwrap();
            let gap = (seen.loss() - told.loss()).abs() / told.loss();
            assert!(gap < 1e-5, "{extra:?}: loss {seen:?}, {told:?}");
            let (a, b) = (ours.state(), truth.state().unwrap());
            for (name, value) in &b {
                let error = error(&a[name], value);
                assert!(error < 2e-4, "{extra:?}, {h} x {w}: {name}: {error}");
            }
            let mut ours = Emulated::new(&graph, 6, Precision::F32, &b).unwrap();
            let words = Words::of_inference(7);
            let (_, logits) = ours.micro(&data.batch(), words, Mode::Infer, false);
            let predicted = truth.predict(data.batch().pixels).unwrap();
            let size = predicted.iter().map(|v| v.abs()).fold(0.0, f32::max);
            for (a, b) in logits.iter().zip(&predicted) {
                assert!((a - b).abs() < 1e-5 * size, "{extra:?}: logit {a}, {b}");
            }
        }
    }
}

/// Every product of our own convolutions against plain loops: tiles that are not full, each stride, windows of 1 to 7,
/// the image, sums in parts.
fn check_convolutions(precision: Precision, tolerance: f64) {
    let Some(launch) = shim(precision.element()) else {
        return skip("there is no C++ compiler (c++)");
    };
    let plane = |h, w, c| Plane { h, w, c };
    let cases = [
        (2, plane(18, 22, 4), 24, 7, 2),
        (3, plane(9, 13, 4), 64, 7, 2),
        (1, plane(7, 5, 8), 8, 1, 1),
        (2, plane(9, 13, 16), 40, 3, 1),
        (2, plane(8, 8, 64), 72, 3, 2),
        (3, plane(7, 9, 24), 136, 1, 2),
        (5, plane(5, 5, 136), 64, 3, 1),
        (1, plane(6, 4, 200), 128, 1, 1),
        (2, plane(7, 7, 72), 16, 3, 2),
    ];
    let plain = Host {
        launch,
        precision,
        own: None,
    };
    for (number, (batch, input, outputs, kernel, stride)) in cases.into_iter().enumerate() {
        let output = plane(input.h.div_ceil(stride), input.w.div_ceil(stride), outputs);
        let geometry = graph::Geometry {
            input,
            output,
            kernel,
            stride,
        };
        let lens = [
            batch * input.elements(),
            outputs * kernel * kernel * input.c,
            batch * output.elements(),
        ];
        for multiprocessors in [1, 40] {
            let ours = Host {
                launch,
                precision,
                own: Some(launches(precision, multiprocessors)),
            };
            for product in [Product::Forward, Product::Input, Product::Weight] {
                if product == Product::Input && input.c == 4 {
                    continue;
                }
                let conv = Conv {
                    product,
                    geometry,
                    batch,
                };
                let result = match product {
                    Product::Input => 0,
                    Product::Weight => 1,
                    Product::Forward => 2,
                };
                let mut seed = (number * 3 + result) as u64 + 1;
                let mut random = || {
                    seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                    (seed >> 40) as f64 / f64::from(1 << 23) - 1.0
                };
                let mut tensors = lens.map(|len| Memory::new(len * 4));
                for (i, tensor) in tensors.iter_mut().enumerate() {
                    for j in (0..lens[i]).filter(|_| i != result) {
                        plain.write(tensor.at(), j, random());
                    }
                }
                let run = |host: &Host, to: &Memory| {
                    let mut at = [tensors[0].at(), tensors[1].at(), tensors[2].at()];
                    at[result] = to.at();
                    let [x, w, y] = at;
                    let at = Tensors { x, w, y };
                    host.run(&Call::Conv { conv, at });
                };
                let (a, b) = (Memory::new(lens[result] * 4), Memory::new(lens[result] * 4));
                run(&ours, &a);
                run(&plain, &b);
                let size = (0..lens[result])
                    .map(|i| plain.read(b.at(), i).abs())
                    .fold(0.0, f64::max);
                for i in 0..lens[result] {
                    let (a, b) = (plain.read(a.at(), i), plain.read(b.at(), i));
                    assert!(
                        (a - b).abs() <= tolerance * size,
                        "{precision}, {}: value {i}: {a} is not {b}",
                        conv.name()
                    );
                }
                // Nothing is written behind the result.
                let end = lens[result] * precision.bytes();
                let after = &a.values::<u8>(end + 512)[end..];
                assert!(after.iter().all(|byte| *byte == 0xff), "{}", conv.name());
            }
        }
    }
}

// Half a unit in the last place of what is stored, on a scale of the largest value, and sums of up to 1800 terms in f32.
#[test]
fn own_convolutions_are_exact_in_f32() {
    check_convolutions(Precision::F32, 2e-6);
}

#[test]
fn own_convolutions_are_near_in_tf32() {
    check_convolutions(Precision::Tf32, 2e-3);
}

#[test]
fn own_convolutions_are_near_in_bf16() {
    check_convolutions(Precision::Bf16, 5e-3);
}

#[test]
fn own_convolutions_are_near_in_f16() {
    check_convolutions(Precision::F16, 6e-4);
}

/// An overflow leaves the step out, halves the scale, and the next step goes on.
#[test]
fn a_step_that_overflows_is_left_out() {
    let graph = network(Plane { h: 9, w: 9, c: 3 }, None, 5);
    let state = initial_state(&graph, 3);
    let Some(mut ours) = Emulated::new(&graph, 4, Precision::F16, &state) else {
        return skip("there is no C++ compiler (c++)");
    };
    ours.control.values_mut::<f32>(65)[64] = 1e9;
    let before = ours.state();
    let data = Data::new(&graph, 4, 1);
    let mut scale = 1e9f32;
    for _ in 0..40 {
        ours.train_step(&data.batch(), &HYPER);
        let now = ours.control.values::<f32>(65)[64];
        if now == scale {
            break;
        }
        assert_eq!(now, scale / 2.0);
        assert_eq!(ours.state()["fc.weight"], before["fc.weight"]);
        scale = now;
    }
    assert!(scale < 1e9, "nothing has overflowed");
    assert_ne!(ours.state()["fc.weight"], before["fc.weight"]);
    assert!(
        ours.state()["fc.weight"]
            .values
            .iter()
            .all(|v| v.is_finite())
    );
    let skipped = ours.control.values::<u32>(68)[67];
    assert_eq!(scale, 1e9 / 2f32.powi(skipped as i32));
}

/// Pixels that are not rounded, and rounded ones, are the same image.
#[test]
fn images_of_both_kinds_are_the_same() {
    let graph = network(Plane { h: 9, w: 13, c: 3 }, None, 5);
    let state = initial_state(&graph, 3);
    let Some(mut ours) = Emulated::new(&graph, 2, Precision::F32, &state) else {
        return skip("there is no C++ compiler (c++)");
    };
    let data = Data::new(&graph, 2, 1);
    let pixels: Vec<f32> = data.pixels.iter().map(|p| f32::from(*p)).collect();
    let wide = Batch {
        pixels: Pixels::F32(&pixels),
        labels: &data.labels,
        mixed: None,
    };
    let hyper = Words::of_inference(5);
    let (a, b) = (
        ours.micro(&data.batch(), hyper, Mode::Infer, false),
        ours.micro(&wide, hyper, Mode::Infer, false),
    );
    assert_eq!(a, b);
}

// ---- plans --------------------------------------------------------------------------------------------------------

/// An H100 as cuDNN describes it.
const H100: &str = include_str!("h100.json");

#[test]
fn cudnn_has_a_plan_for_every_convolution() {
    match libraries().cudnn {
        None => return skip("cuDNN is missing (pip install nvidia-cudnn-cu13, RUNNER_PYTHON)"),
        Some(version) if version < 90_800 => {
            return skip("this cuDNN makes no plans for a card that is not there");
        }
        Some(_) => {}
    }
    let device = cudnn::Device::described(H100).unwrap();
    let mut known: Vec<(Precision, Conv)> = vec![];
    for depth in nn::DEPTHS {
        let graph = nn::resnet(depth, 224, 1000, nn::Recipe::Tpu2018).unwrap();
        for precision in Precision::ALL {
            let options = Options::new(0, 256, precision);
            let caps = CudaCaps::new(&options, 132);
            let layout = Layout::new(&graph);
            let program = Program::new(&graph, &caps, 256, Mode::Train);
            let places = Places::default();
            let all = 0..layout.which.len();
            let made = calls::calls(
                &graph,
                &program,
                &caps,
                &layout,
                &places,
                false,
                std::slice::from_ref(&all),
            );
            for (conv, _) in calls::convs(&made) {
                if known.contains(&(precision, conv)) {
                    continue;
                }
                let plans = cudnn::candidates(&conv, &options, &device, 1);
                assert!(plans.is_ok(), "{precision}: {:?}", plans.err());
                known.push((precision, conv));
            }
        }
    }
    assert!(known.len() > 200, "{} convolutions", known.len());
}

// ---- messages -----------------------------------------------------------------------------------------------------

fn says(ordinal: usize, libraries: Libraries, cards: Result<Vec<Card>, Error>) -> String {
    match driver::check(ordinal, &libraries, || cards) {
        Ok(card) => card.to_string(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_is_missing_is_said() {
    let all = Libraries {
        driver: Some(13_000),
        nvrtc: Some((13, 0)),
        cudnn: Some(91_900),
        nccl: None,
    };
    let card = Card {
        ordinal: 0,
        name: "NVIDIA H100 80GB HBM3".into(),
        memory: 79 << 30,
        capability: (9, 0),
        multiprocessors: 132,
    };
    let cards = || Ok(vec![card.clone()]);
    assert_eq!(
        says(0, all.clone(), cards()),
        "cuda:0: NVIDIA H100 80GB HBM3, 79 GiB, compute capability 9.0"
    );
    assert_eq!(
        says(2, all.clone(), cards()),
        "cuda:2: there is one card, cuda:0 (NVIDIA H100 80GB HBM3)\n\
         hint: runner doctor lists them; CUDA_VISIBLE_DEVICES hides some"
    );
    let old = Libraries {
        driver: Some(12_040),
        ..all.clone()
    };
    assert_eq!(
        says(0, old, cards()),
        "the driver knows CUDA 12.4, 13.0 is needed\n\
         hint: driver 580 or newer knows it; train.device = \"cpu\" runs without"
    );
    let without = Libraries {
        nvrtc: None,
        ..all.clone()
    };
    assert_eq!(
        says(0, without, cards()),
        "NVRTC, which compiles the kernels, cannot be loaded (libnvrtc.so.13)\n\
         hint: `pip install nvidia-cuda-nvrtc` brings it; in an active virtual environment it is found, else put its folder into LD_LIBRARY_PATH"
    );
    // Without cuDNN, or with one that is too old, convolutions are our own.
    for (cudnn, has_cudnn) in [(None, false), (Some(8_907), false), (Some(91_900), true)] {
        let libraries = Libraries {
            cudnn,
            ..all.clone()
        };
        assert_eq!(driver::has_cudnn(&libraries), has_cudnn);
        assert_eq!(
            driver::check(0, &libraries, cards).map(|card| card.ordinal),
            Ok(0)
        );
    }
    let volta = Card {
        capability: (7, 0),
        name: "Tesla V100".into(),
        ..card.clone()
    };
    assert_eq!(
        says(0, all, Ok(vec![volta])),
        "cuda:0 (Tesla V100) has compute capability 7.0, 8.0 is needed\n\
         hint: cards from 2020 on (A100, RTX 30) have it; train.device = \"cpu\" runs without"
    );
    let memory = super::Memory {
        parameters: 1 << 30,
        gradients: 1 << 30,
        optimizer: 1 << 30,
        average: 0,
        arena: 20 << 30,
        folded: 1 << 30,
        workspace: 1 << 30,
        input: 0,
        exchange: 0,
    };
    assert_eq!(
        super::check_memory(&memory, 8 << 30)
            .unwrap_err()
            .to_string(),
        "the engine needs 25.0 GiB of the card's memory, 8.0 GiB are free\n\
         hint: a smaller train.bn_batch needs less, and so does train.precision = \"bf16\"; other programs may hold some"
    );
}

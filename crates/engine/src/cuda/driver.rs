//! The driver as this engine uses it: libraries found at run time, one context, memory by address, kernels by name.
//!
//! cudarc's calls panic where a library is missing, so [`libraries`] is asked before anything else.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_void};
use std::fmt;
use std::path::Path;
use std::sync::Once;

use cudarc::driver::{DriverError, result, sys};
use cudarc::nvrtc;

use super::{nccl, own};
use crate::{Cache, Error};

/// What this machine has for the engine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Libraries {
    /// The driver's CUDA version, for example 13000 for 13.0; none without libcuda.
    pub driver: Option<i32>,
    /// NVRTC's (major, minor).
    pub nvrtc: Option<(i32, i32)>,
    /// cuDNN's, for example 91900 for 9.19.0.
    pub cudnn: Option<usize>,
    /// NCCL's, for example 22809 for 2.28.9; several cards need it.
    pub nccl: Option<usize>,
}

/// A card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// N in `cuda:N`.
    pub ordinal: usize,
    /// The vendor's name.
    pub name: String,
    /// Bytes.
    pub memory: usize,
    /// Compute capability, (major, minor).
    pub capability: (i32, i32),
    /// Multiprocessors.
    pub multiprocessors: usize,
}

impl fmt::Display for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = self.memory as f64 / f64::from(1 << 30);
        let (major, minor) = self.capability;
        write!(
            f,
            "cuda:{}: {}, {gib:.0} GiB, compute capability {major}.{minor}",
            self.ordinal, self.name
        )
    }
}

/// The oldest driver that runs what NVRTC 13 makes, and the oldest card whose tensor cores know bf16.
const OLDEST_DRIVER: i32 = 13_000;
const OLDEST_CARD: (i32, i32) = (8, 0);
/// The oldest cuDNN that takes the graphs of this engine.
const OLDEST_CUDNN: usize = 90_000;

/// Where Python's packages keep the libraries, below `<prefix>/lib/python3.N/site-packages`. One that is loaded from
/// there is found by its name from then on; NVRTC looks for its builtins by name, too.
const PACKAGED: [(&str, &str); 4] = [
    ("nvidia/cu13/lib", "libnvrtc-builtins.so.13"),
    ("nvidia/cu13/lib", "libnvrtc.so.13"),
    ("nvidia/cudnn/lib", "libcudnn.so.9"),
    ("nvidia/nccl/lib", "libnccl.so.2"),
];

/// Loads libraries from the packages of the Python below `prefix`: of those that are wanted, those that are there.
pub(crate) fn load_packaged(prefix: &Path, is_wanted: impl Fn(&str) -> bool) {
    let entries = |dir: &Path| {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|e| e.path()).collect::<Vec<_>>()
    };
    let name = |path: &Path| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    };
    let pythons = entries(&prefix.join("lib"));
    for python in pythons.iter().filter(|p| name(p).starts_with("python3")) {
        for (folder, file) in PACKAGED.into_iter().filter(|(_, file)| is_wanted(file)) {
            let files = entries(&python.join("site-packages").join(folder));
            for path in files.iter().filter(|p| name(p).starts_with(file)) {
                let Ok(path) = CString::new(path.as_os_str().as_encoded_bytes()) else {
                    continue;
                };
                // SAFETY: the path is a C string; the library stays loaded, and its initialisers are NVIDIA's.
                unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_LAZY | libc::RTLD_GLOBAL) };
            }
        }
    }
}

/// Loads what the system does not find from the Python environment that is active, once.
pub(crate) fn find_packages() {
    static PACKAGES: Once = Once::new();
    PACKAGES.call_once(|| {
        // SAFETY: these only try to open libraries.
        let [has_nvrtc, has_cudnn, has_nccl] = unsafe {
            let nccl = libc::dlopen(c"libnccl.so.2".as_ptr(), libc::RTLD_LAZY);
            [
                nvrtc::sys::is_culib_present(),
                cudarc::cudnn::sys::is_culib_present(),
                !nccl.is_null(),
            ]
        };
        // What the system has is not mixed with what a package has.
        let is_wanted = |file: &str| match file {
            file if file.starts_with("libnvrtc") => !has_nvrtc,
            file if file.starts_with("libcudnn") => !has_cudnn,
            _ => !has_nccl,
        };
        for variable in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
            if let Some(prefix) = std::env::var_os(variable) {
                load_packaged(Path::new(&prefix), is_wanted);
            }
        }
    });
}

/// Looks for the libraries, without starting anything: where the system looks, and in the Python environment that is
/// active.
pub fn libraries() -> Libraries {
    find_packages();
    let mut found = Libraries::default();
    // SAFETY: these open libraries and ask for their versions; no pointer outlives its call.
    unsafe {
        if sys::is_culib_present() {
            let mut version = 0;
            if sys::cuDriverGetVersion(&mut version).result().is_ok() {
                found.driver = Some(version);
            }
        }
        if nvrtc::sys::is_culib_present() {
            let (mut major, mut minor) = (0, 0);
            if nvrtc::sys::nvrtcVersion(&mut major, &mut minor)
                .result()
                .is_ok()
            {
                found.nvrtc = Some((major, minor));
            }
        }
        if cudarc::cudnn::sys::is_culib_present() {
            found.cudnn = Some(cudarc::cudnn::sys::cudnnGetVersion());
        }
    }
    found.nccl = nccl::version();
    found
}

/// The cards, in the driver's order.
///
/// # Errors
/// If there is no driver, or it does not start.
pub fn cards() -> Result<Vec<Card>, Error> {
    if libraries().driver.is_none() {
        return Err(Error::device(
            "no CUDA driver: libcuda.so.1 cannot be loaded",
            "train.device = \"cpu\" needs none; a driver comes with the graphics card's package",
        ));
    }
    let start = |e| failed("the CUDA driver does not start", e);
    result::init().map_err(start)?;
    let count = result::device::get_count().map_err(start)?;
    (0..count).map(|i| card(i).map_err(start)).collect()
}

fn card(ordinal: i32) -> Result<Card, DriverError> {
    use sys::CUdevice_attribute as Attribute;
    let device = result::device::get(ordinal)?;
    // SAFETY: the device is one of the driver's.
    unsafe {
        let attribute = |a| result::device::get_attribute(device, a);
        Ok(Card {
            ordinal: ordinal as usize,
            name: result::device::get_name(device)?,
            memory: result::device::total_mem(device)?,
            capability: (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?
                as usize,
        })
    }
}

/// Whether everything is there that the engine needs on card `ordinal`, and what to do if not.
///
/// # Errors
/// Names what is missing.
pub fn probe(ordinal: usize) -> Result<Card, Error> {
    check(ordinal, &libraries(), cards)
}

/// [`probe`], told what there is.
pub(crate) fn check(
    ordinal: usize,
    libraries: &Libraries,
    cards: impl FnOnce() -> Result<Vec<Card>, Error>,
) -> Result<Card, Error> {
    let cpu = "train.device = \"cpu\" runs without";
    if let Some(version) = libraries.driver.filter(|v| *v < OLDEST_DRIVER) {
        let (version, oldest) = (dotted(version), dotted(OLDEST_DRIVER));
        return Err(Error::device(
            format!("the driver knows CUDA {version}, {oldest} is needed"),
            format!("driver 580 or newer knows it; {cpu}"),
        ));
    }
    let cards = cards()?;
    let Some(card) = cards.get(ordinal).cloned() else {
        let have = match &cards[..] {
            [] => "there is no card".to_owned(),
            [one] => format!("there is one card, cuda:0 ({})", one.name),
            more => format!("the cards are cuda:0 to cuda:{}", more.len() - 1),
        };
        return Err(Error::device(
            format!("cuda:{ordinal}: {have}"),
            "runner doctor lists them; CUDA_VISIBLE_DEVICES hides some",
        ));
    };
    if card.capability < OLDEST_CARD {
        let (major, minor) = card.capability;
        return Err(Error::device(
            format!(
                "cuda:{ordinal} ({}) has compute capability {major}.{minor}, 8.0 is needed",
                card.name
            ),
            format!("cards from 2020 on (A100, RTX 30) have it; {cpu}"),
        ));
    }
    let path =
        "in an active virtual environment it is found, else put its folder into LD_LIBRARY_PATH";
    if libraries.nvrtc.is_none() {
        return Err(Error::device(
            "NVRTC, which compiles the kernels, cannot be loaded (libnvrtc.so.13)",
            format!("`pip install nvidia-cuda-nvrtc` brings it; {path}"),
        ));
    }
    Ok(card)
}

/// Whether convolutions can be cuDNN's. If not they are our own, which compute the same and take longer.
pub(crate) fn has_cudnn(libraries: &Libraries) -> bool {
    libraries
        .cudnn
        .is_some_and(|version| version >= OLDEST_CUDNN)
}

/// 13000 as 13.0.
pub(crate) fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

pub(crate) fn failed(what: impl fmt::Display, error: DriverError) -> Error {
    let text = error
        .error_string()
        .ok()
        .and_then(|s| s.to_str().ok())
        .unwrap_or("unknown")
        .to_owned();
    Error::Device {
        what: format!("{what}: {text} ({:?})", error.0),
        hint: "runner doctor says what this machine has".into(),
    }
}

/// Device memory by address.
pub(crate) type Address = u64;

/// Something that a kernel is told, at most 32 bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arg([u64; 4]);

impl Arg {
    fn of(bytes: &[u8]) -> Self {
        let mut words = [0u64; 4];
        for (i, byte) in bytes.iter().enumerate() {
            words[i / 8] |= u64::from(*byte) << (i % 8 * 8);
        }
        Self(words)
    }

    pub(crate) fn address(v: Address) -> Self {
        Self([v, 0, 0, 0])
    }

    pub(crate) fn int(v: usize) -> Self {
        let v = i32::try_from(v).expect("sizes are checked when a program is made");
        Self::of(&v.to_ne_bytes())
    }

    pub(crate) fn long(v: usize) -> Self {
        Self([v as u64, 0, 0, 0])
    }

    pub(crate) fn float(v: f32) -> Self {
        Self::of(&v.to_ne_bytes())
    }

    pub(crate) fn double(v: f64) -> Self {
        Self::of(&v.to_ne_bytes())
    }

    pub(crate) fn ints(v: &[usize]) -> Self {
        let bytes: Vec<u8> = v.iter().flat_map(|v| (*v as i32).to_ne_bytes()).collect();
        Self::of(&bytes)
    }

    pub(crate) fn addresses(v: &[Address]) -> Self {
        let bytes: Vec<u8> = v.iter().flat_map(|v| v.to_ne_bytes()).collect();
        Self::of(&bytes)
    }

    pub(crate) fn floats(v: &[f32]) -> Self {
        let bytes: Vec<u8> = v.iter().flat_map(|v| v.to_ne_bytes()).collect();
        Self::of(&bytes)
    }

    /// Where it lies, for a launch.
    pub(crate) fn pointer(&mut self) -> *mut c_void {
        self.0.as_mut_ptr().cast()
    }
}

/// Threads of every block.
pub(crate) const THREADS: u32 = 256;

/// Source of the kernels.
pub(crate) const SOURCE: &str = concat!(include_str!("kernels.cu"), include_str!("branches.cu"));
/// The same, and those of convolutions.
pub(crate) const SOURCE_WITH_CONVOLUTIONS: &str = concat!(
    include_str!("kernels.cu"),
    include_str!("branches.cu"),
    include_str!("conv.cu")
);

/// Compiles kernels to machine code of `arch` (`sm_90`), with activations as `element` (0 f32, 1 bf16, 2 f16); with it
/// the compiler's notes.
///
/// # Errors
/// What the compiler says.
pub(crate) fn compile(source: &str, arch: &str, element: u8) -> Result<(Vec<u8>, String), String> {
    let source = CString::new(source).expect("a source has no zero byte");
    let options = [
        format!("--gpu-architecture={arch}"),
        "--std=c++17".to_owned(),
        format!("-DELEMENT={element}"),
        "--ptxas-options=-v".to_owned(),
    ];
    // SAFETY: the program lives until it is destroyed below; the buffers have the lengths that NVRTC asks for.
    unsafe {
        let program = nvrtc::result::create_program(&source, Some(c"kernels.cu"))
            .map_err(|e| format!("{:?}", e.0))?;
        let compiled = nvrtc::result::compile_program(program, &options);
        let log = nvrtc::result::get_program_log(program).unwrap_or_default();
        let log: String = log
            .iter()
            .map(|c| *c as u8 as char)
            .filter(|c| *c != '\0')
            .collect();
        let code = compiled
            .map_err(|e| format!("{:?}\n{log}", e.0))
            .and_then(|()| {
                let mut len = 0;
                nvrtc::sys::nvrtcGetCUBINSize(program, &mut len)
                    .result()
                    .map_err(|e| format!("{:?}", e.0))?;
                let mut code = vec![0u8; len];
                nvrtc::sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast())
                    .result()
                    .map_err(|e| format!("{:?}", e.0))?;
                Ok(code)
            });
        nvrtc::result::destroy_program(program).ok();
        code.map(|code| (code, log))
    }
}

/// Why a card gets no kernels.
pub(crate) fn does_not_compile(arch: &str, version: Option<(i32, i32)>, log: &str) -> Error {
    if log.contains("--gpu-architecture") {
        let (major, minor) = version.unwrap_or_default();
        return Error::device(
            format!("NVRTC {major}.{minor} does not know cards of {arch}"),
            "`pip install --upgrade nvidia-cuda-nvrtc` brings one that knows newer cards",
        );
    }
    Error::device(
        format!("NVRTC does not compile the kernels for {arch}: {log}"),
        "this is a fault of the program; please report it",
    )
}

/// FNV-1a, 64 bits: names files of a cache.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3)
    })
}

/// With its hash in front, so that what comes back from a cache is known to be whole: the driver is told no length.
fn sealed(code: &[u8]) -> Vec<u8> {
    [&hash(code).to_le_bytes(), code].concat()
}

/// What was sealed; none if it has changed since.
fn unsealed(bytes: Vec<u8>) -> Option<Vec<u8>> {
    let (seal, code) = bytes.split_first_chunk()?;
    (u64::from_le_bytes(*seal) == hash(code)).then(|| code.to_vec())
}

/// A card that is in use: two streams and the kernels.
pub(crate) struct Gpu {
    pub(crate) card: Card,
    context: sys::CUcontext,
    /// Where everything is computed.
    pub(crate) stream: sys::CUstream,
    /// Where the next batch is copied.
    pub(crate) copies: sys::CUstream,
    module: sys::CUmodule,
    kernels: BTreeMap<&'static str, sys::CUfunction>,
}

// SAFETY: the driver's handles may be used from any thread; `Gpu` is not shared between threads (it is not Sync).
unsafe impl Send for Gpu {}

/// The kernels of the source.
pub(crate) const KERNELS: [&str; 59] = [
    "accumulate",
    "apply",
    "apply_add",
    "apply_add_normed",
    "avg_pool",
    "cast",
    "check",
    "close_0",
    "close_0_half",
    "close_0_rest",
    "close_0_spread",
    "close_1",
    "close_1_half",
    "close_1_rest",
    "close_1_spread",
    "close_2",
    "close_2_half",
    "close_2_rest",
    "close_2_spread",
    "close_finish",
    "close_lazy",
    "close_lazy_pool",
    "column_sums",
    "compare",
    "draw_squares",
    "drop",
    "dropped_sum",
    "excite_backward",
    "fill",
    "fold",
    "gate",
    "gate_close",
    "gated_gradient",
    "gated_sum",
    "gated_sums",
    "half_pool",
    "input_f32",
    "input_u8",
    "loss",
    "loss_finish",
    "matmul",
    "max_pool",
    "norm_backward",
    "norms",
    "plane_means",
    "rates",
    "rescale",
    "running_update",
    "squares",
    "squares_scale",
    "squeeze_relu",
    "squeeze_relu_backward",
    "stats",
    "stats_finish",
    "sum_ranks",
    "sum_ranks_f64",
    "swap",
    "update",
    "widen_gradients",
];

impl Gpu {
    /// Takes a card into use; its kernels are those of `element`, with convolutions if they are wanted.
    pub(crate) fn start(
        card: &Card,
        element: u8,
        convolutions: bool,
        cache: &dyn Cache,
    ) -> Result<Self, Error> {
        let start = |e| failed(format!("cuda:{} does not start", card.ordinal), e);
        let (major, minor) = card.capability;
        let arch = format!("sm_{major}{minor}");
        let version = libraries().nvrtc;
        let (source, convolutions) = match convolutions {
            true => (SOURCE_WITH_CONVOLUTIONS, own::kernels(element)),
            false => (SOURCE, &[][..]),
        };
        let key = format!(
            "kernels-{arch}-{element}-{:?}-{:016x}.cubin",
            version.unwrap_or_default(),
            hash(source.as_bytes())
        )
        .replace([' ', '(', ')'], "")
        .replace(',', ".");
        let code = match cache.get(&key).and_then(unsealed) {
            Some(code) => code,
            None => {
                let (code, _) = compile(source, &arch, element)
                    .map_err(|log| does_not_compile(&arch, version, &log))?;
                cache.put(&key, &sealed(&code));
                code
            }
        };
        // SAFETY: the handles stay valid until `drop`; the image is a whole cubin.
        unsafe {
            let device = result::device::get(card.ordinal as i32).map_err(start)?;
            let context = result::primary_ctx::retain(device).map_err(start)?;
            result::ctx::set_current(context).map_err(start)?;
            let stream =
                result::stream::create(result::stream::StreamKind::NonBlocking).map_err(start)?;
            let copies =
                result::stream::create(result::stream::StreamKind::NonBlocking).map_err(start)?;
            let module = result::module::load_data(code.as_ptr().cast())
                .map_err(|e| failed("the kernels do not load", e))?;
            let mut kernels = BTreeMap::new();
            for name in KERNELS.iter().chain(convolutions).copied() {
                let function = CString::new(name).expect("names have no zero byte");
                let function = result::module::get_function(module, function)
                    .map_err(|e| failed(format!("the kernel {name} is missing"), e))?;
                kernels.insert(name, function);
            }
            Ok(Self {
                card: card.clone(),
                context,
                stream,
                copies,
                module,
                kernels,
            })
        }
    }

    /// Makes it the calling thread's card.
    pub(crate) fn enter(&self) -> Result<(), Error> {
        // SAFETY: the context is retained until `drop`.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| failed("cuda", e))
    }

    /// Free bytes on the card.
    pub(crate) fn free_bytes(&self) -> Result<usize, Error> {
        let (free, _) = result::mem_get_info().map_err(|e| failed("cuda", e))?;
        Ok(free)
    }

    /// Zeroed memory.
    pub(crate) fn block(&self, bytes: usize) -> Result<Block, Error> {
        let bytes = bytes.max(256).next_multiple_of(256);
        // SAFETY: the memory is as long as it says, and freed once.
        unsafe {
            let address = result::malloc_sync(bytes).map_err(|e| match e.0 {
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { bytes },
                _ => failed("cannot allocate memory of the card", e),
            })?;
            let block = Block { address, bytes };
            self.clear(address, bytes)?;
            Ok(block)
        }
    }

    /// Sets memory to zero.
    pub(crate) fn clear(&self, from: Address, bytes: usize) -> Result<(), Error> {
        // On the engine's own stream: another is not ordered with it, and clearing would go on behind our back.
        // SAFETY: callers name memory of at least this length.
        unsafe {
            result::memset_d8_async(from, 0, bytes, self.stream)
                .and_then(|()| result::stream::synchronize(self.stream))
        }
        .map_err(|e| failed("cuda", e))
    }

    /// Another stream.
    pub(crate) fn stream(&self) -> Result<Stream, Error> {
        result::stream::create(result::stream::StreamKind::NonBlocking)
            .map(Stream)
            .map_err(|e| failed("cuda", e))
    }

    /// Memory of the host that the card reads by itself.
    pub(crate) fn pinned(&self, bytes: usize) -> Result<Pinned, Error> {
        let bytes = bytes.max(256);
        // SAFETY: freed once, when dropped.
        let start = unsafe { result::malloc_host(bytes, 0) }
            .map_err(|e| failed("cannot pin memory of the host", e))?;
        Ok(Pinned {
            start: start.cast(),
            bytes,
        })
    }

    /// Starts a kernel on the stream where everything is computed.
    pub(crate) fn launch(
        &self,
        name: &str,
        grid: (u32, u32),
        args: &mut [Arg],
    ) -> Result<(), Error> {
        self.start_kernel(self.stream, name, grid, args)
    }

    /// Starts one on another.
    pub(crate) fn launch_on(
        &self,
        stream: &Stream,
        name: &str,
        grid: (u32, u32),
        args: &mut [Arg],
    ) -> Result<(), Error> {
        self.start_kernel(stream.raw(), name, grid, args)
    }

    fn start_kernel(
        &self,
        stream: sys::CUstream,
        name: &str,
        grid: (u32, u32),
        args: &mut [Arg],
    ) -> Result<(), Error> {
        let function = self.kernels[name];
        let mut pointers: Vec<*mut c_void> = args.iter_mut().map(Arg::pointer).collect();
        // SAFETY: the arguments are those of the kernel of this name, as `calls` writes them; what they point to is
        // memory that the engine holds until the stream is done.
        unsafe {
            result::launch_kernel(
                function,
                (grid.0, grid.1, 1),
                (THREADS, 1, 1),
                0,
                stream,
                &mut pointers,
            )
        }
        .map_err(|e| failed(format!("kernel {name}"), e))
    }

    /// Waits for everything.
    pub(crate) fn wait(&self) -> Result<(), Error> {
        // SAFETY: the streams live until `drop`.
        unsafe {
            result::stream::synchronize(self.copies)
                .and_then(|()| result::stream::synchronize(self.stream))
        }
        .map_err(|e| failed("the card has stopped", e))
    }

    /// Waits for another stream.
    pub(crate) fn wait_for(&self, stream: &Stream) -> Result<(), Error> {
        // SAFETY: the stream lives.
        unsafe { result::stream::synchronize(stream.raw()) }
            .map_err(|e| failed("the card has stopped", e))
    }

    /// Writes memory, after everything that was begun before.
    pub(crate) fn upload<V: Copy>(&self, to: Address, values: &[V]) -> Result<(), Error> {
        self.wait()?;
        // SAFETY: callers name memory of at least this length; the values stay until the stream is done.
        unsafe {
            result::memcpy_htod_async(to, values, self.stream)
                .and_then(|()| result::stream::synchronize(self.stream))
        }
        .map_err(|e| failed("copy to the card", e))
    }

    /// Reads memory, after everything that was begun before.
    pub(crate) fn download<V: Copy + Default>(
        &self,
        from: Address,
        len: usize,
    ) -> Result<Vec<V>, Error> {
        self.wait()?;
        let mut values = vec![V::default(); len];
        // SAFETY: callers name memory of at least this length.
        unsafe { result::memcpy_dtoh_sync(&mut values, from) }
            .map_err(|e| failed("copy from the card", e))?;
        Ok(values)
    }

    /// Records what `begin` puts on the stream, without running it.
    pub(crate) fn capture(
        &self,
        begin: impl FnOnce() -> Result<(), Error>,
    ) -> Result<Captured, Error> {
        let fail = |e| failed("a step cannot be recorded", e);
        // SAFETY: the stream lives; the graph is destroyed once instantiated, the executable when dropped.
        unsafe {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            result::stream::begin_capture(self.stream, mode).map_err(fail)?;
            let begun = begin();
            let graph = result::stream::end_capture(self.stream);
            begun?;
            let graph = graph.map_err(fail)?;
            let run = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            result::graph::destroy(graph).ok();
            let captured = Captured(run.map_err(fail)?);
            // So that its first start allocates nothing.
            sys::cuGraphUpload(captured.0, self.stream)
                .result()
                .map_err(fail)?;
            Ok(captured)
        }
    }

    pub(crate) fn replay(&self, captured: &Captured) -> Result<(), Error> {
        // SAFETY: both live.
        unsafe { result::graph::launch(captured.0, self.stream) }
            .map_err(|e| failed("a step does not start", e))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: each handle is given back once; errors mean that the card is gone.
        unsafe {
            result::ctx::set_current(self.context).ok();
            result::stream::synchronize(self.stream).ok();
            result::module::unload(self.module).ok();
            result::stream::destroy(self.copies).ok();
            result::stream::destroy(self.stream).ok();
            if let Ok(device) = result::device::get(self.card.ordinal as i32) {
                result::primary_ctx::release(device).ok();
            }
        }
    }
}

/// A stream.
pub(crate) struct Stream(sys::CUstream);

// SAFETY: as for `Gpu`.
unsafe impl Send for Stream {}

impl Stream {
    pub(crate) fn raw(&self) -> sys::CUstream {
        self.0
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: destroyed once.
        unsafe { result::stream::destroy(self.0).ok() };
    }
}

/// A recorded step.
pub(crate) struct Captured(sys::CUgraphExec);

// SAFETY: as for `Gpu`.
unsafe impl Send for Captured {}

impl Drop for Captured {
    fn drop(&mut self) {
        // SAFETY: destroyed once.
        unsafe { result::graph::exec_destroy(self.0).ok() };
    }
}

/// Memory of the card.
pub(crate) struct Block {
    pub(crate) address: Address,
    pub(crate) bytes: usize,
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: freed once. Engines drop their blocks before their `Gpu`.
        unsafe { result::free_sync(self.address).ok() };
    }
}

/// Page-locked memory of the host.
pub(crate) struct Pinned {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: the memory belongs to the value.
unsafe impl Send for Pinned {}

impl Pinned {
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// All of it.
    pub(crate) fn get(&self) -> &[u8] {
        // SAFETY: allocated with this length; the card writes it only in steps whose end has been waited for.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    /// All of it, for writing.
    pub(crate) fn get_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `get`.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }

    pub(crate) fn address(&self) -> *const c_void {
        self.start.cast_const().cast()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: freed once.
        unsafe { result::free_host(self.start.cast()).ok() };
    }
}

/// A point in a stream.
pub(crate) struct Event(sys::CUevent);

// SAFETY: as for `Gpu`.
unsafe impl Send for Event {}

impl Event {
    /// One that can also be timed.
    pub(crate) fn new() -> Result<Self, Error> {
        result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
            .map(Self)
            .map_err(|e| failed("cuda", e))
    }

    pub(crate) fn record(&self, stream: sys::CUstream) -> Result<(), Error> {
        // SAFETY: both live.
        unsafe { result::event::record(self.0, stream) }.map_err(|e| failed("cuda", e))
    }

    /// Keeps `stream` from going on before this point.
    pub(crate) fn hold(&self, stream: sys::CUstream) -> Result<(), Error> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both live.
        unsafe { result::stream::wait_event(stream, self.0, flags) }.map_err(|e| failed("cuda", e))
    }

    pub(crate) fn wait(&self) -> Result<(), Error> {
        // SAFETY: the event lives.
        unsafe { result::event::synchronize(self.0) }.map_err(|e| failed("the card has stopped", e))
    }

    /// Whether it has passed.
    pub(crate) fn has_passed(&self) -> Result<bool, Error> {
        // SAFETY: the event lives.
        match unsafe { result::event::query(self.0) } {
            Ok(()) => Ok(true),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(e) => Err(failed("the card has stopped", e)),
        }
    }

    /// Milliseconds from this point to `end`, both of which have passed.
    pub(crate) fn milliseconds(&self, end: &Event) -> Result<f32, Error> {
        // SAFETY: both live.
        unsafe { result::event::elapsed(self.0, end.0) }.map_err(|e| failed("cuda", e))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: destroyed once.
        unsafe { result::event::destroy(self.0).ok() };
    }
}

/// The text of a C string that the library owns.
pub(crate) fn text(buffer: &[std::ffi::c_char]) -> String {
    // SAFETY: callers hand in buffers that end with a zero.
    unsafe { CStr::from_ptr(buffer.as_ptr()) }
        .to_string_lossy()
        .into_owned()
}

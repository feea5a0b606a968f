//! Convolutions by cuDNN 9's graphs: one graph of one operation for each product, its fastest plan found by timing.

use std::ffi::{c_char, c_void};
use std::ptr;

use cudarc::cudnn::sys;
use graph::Geometry;
use sys::cudnnBackendAttributeName_t as Attr;
use sys::cudnnBackendAttributeType_t as Type;
use sys::cudnnBackendDescriptorType_t as Kind;
use sys::cudnnDataType_t as DataType;

use super::driver::{Address, Gpu, text};
use super::{Options, Precision};
use crate::Error;

/// What a convolution computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Product {
    /// y = x * w.
    Forward,
    /// The gradient of x.
    Input,
    /// The gradient of w. In 16 bits like everything else: cuDNN 9.19 has no plan that keeps it in f32.
    Weight,
}

/// A convolution of a batch: x is N x H x W x C, w is O x K x K x C, y is N x H x W x O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Conv {
    pub(crate) product: Product,
    pub(crate) geometry: Geometry,
    pub(crate) batch: usize,
}

impl Conv {
    /// Names it, in messages and in the cache.
    pub(crate) fn name(&self) -> String {
        let g = &self.geometry;
        let what = match self.product {
            Product::Forward => "forward",
            Product::Input => "input",
            Product::Weight => "weight",
        };
        format!(
            "{what}-{n}x{h}x{w}x{c}-{o}-{k}x{k}-{s}",
            n = self.batch,
            h = g.input.h,
            w = g.input.w,
            c = g.input.c,
            o = g.output.c,
            k = g.kernel,
            s = g.stride
        )
    }
}

type Checked<T> = Result<T, String>;

fn check(what: &str, status: sys::cudnnStatus_t) -> Checked<()> {
    if status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS {
        return Ok(());
    }
    let mut buffer = [0 as c_char; 512];
    // SAFETY: the buffer has the length that is named, and its last byte stays zero.
    unsafe { sys::cudnnGetLastErrorString(buffer.as_mut_ptr(), buffer.len() - 1) };
    Err(format!("{what}: {status:?} {}", text(&buffer)))
}

/// A descriptor of the library.
pub(crate) struct Desc(sys::cudnnBackendDescriptor_t);

// SAFETY: a descriptor may be used from any thread, by one at a time; it is not Sync.
unsafe impl Send for Desc {}

impl Drop for Desc {
    fn drop(&mut self) {
        // SAFETY: destroyed once; what it was set into keeps a copy.
        unsafe { sys::cudnnBackendDestroyDescriptor(self.0) };
    }
}

impl Desc {
    fn new(kind: Kind) -> Checked<Self> {
        let mut raw = ptr::null_mut();
        // SAFETY: the library writes one handle.
        let status = unsafe { sys::cudnnBackendCreateDescriptor(kind, &mut raw) };
        check(&format!("create {kind:?}"), status)?;
        Ok(Self(raw))
    }

    fn set<V>(self, attr: Attr, ty: Type, values: &[V]) -> Checked<Self> {
        // SAFETY: as many values of the type that the attribute has are read, as each caller makes sure.
        let status = unsafe {
            sys::cudnnBackendSetAttribute(
                self.0,
                attr,
                ty,
                values.len() as i64,
                values.as_ptr().cast::<c_void>(),
            )
        };
        check(&format!("set {attr:?}"), status)?;
        Ok(self)
    }

    fn ints(self, attr: Attr, v: &[i64]) -> Checked<Self> {
        self.set(attr, Type::CUDNN_TYPE_INT64, v)
    }

    fn float(self, attr: Attr, v: f32) -> Checked<Self> {
        self.set(attr, Type::CUDNN_TYPE_FLOAT, &[v])
    }

    fn data_type(self, attr: Attr, v: DataType) -> Checked<Self> {
        self.set(attr, Type::CUDNN_TYPE_DATA_TYPE, &[v])
    }

    fn desc(self, attr: Attr, v: &Self) -> Checked<Self> {
        self.set(attr, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &[v.0])
    }

    fn device(self, handle_attr: Attr, json_attr: Attr, device: &Device) -> Checked<Self> {
        match device {
            Device::Handle(handle) => self.set(handle_attr, Type::CUDNN_TYPE_HANDLE, &[handle.0]),
            Device::Described(desc) => self.desc(json_attr, desc),
        }
    }

    fn finalize(self) -> Checked<Self> {
        // SAFETY: the descriptor lives.
        check("finalize", unsafe { sys::cudnnBackendFinalize(self.0) })?;
        Ok(self)
    }

    /// Reads at most `values.len()` values; how many there were.
    fn get<V>(&self, attr: Attr, ty: Type, values: &mut [V]) -> usize {
        let mut count = 0i64;
        // Without room the library only counts.
        let room = match values.is_empty() {
            true => ptr::null_mut(),
            false => values.as_mut_ptr(),
        };
        // SAFETY: the library writes no more than the number that is asked for.
        unsafe {
            sys::cudnnBackendGetAttribute(
                self.0,
                attr,
                ty,
                values.len() as i64,
                &mut count,
                room.cast(),
            )
        };
        count.max(0) as usize
    }

    fn int(&self, attr: Attr) -> i64 {
        let mut value = [0i64];
        self.get(attr, Type::CUDNN_TYPE_INT64, &mut value);
        value[0]
    }

    fn bytes(&self, attr: Attr) -> Vec<u8> {
        let len = self.get::<u8>(attr, Type::CUDNN_TYPE_CHAR, &mut []);
        let mut bytes = vec![0; len];
        let got = self.get(attr, Type::CUDNN_TYPE_CHAR, &mut bytes);
        bytes.truncate(got);
        bytes
    }

    /// Notes of an engine; none if they cannot be read.
    fn notes(&self, attr: Attr, ty: Type) -> Option<Vec<u32>> {
        let mut notes = [0u32; 32];
        let mut count = 0i64;
        // SAFETY: the library writes no more than the number that is asked for.
        let status = unsafe {
            let room = notes.as_mut_ptr().cast();
            sys::cudnnBackendGetAttribute(self.0, attr, ty, notes.len() as i64, &mut count, room)
        };
        check("notes", status).ok()?;
        Some(notes[..(count.max(0) as usize).min(32)].to_vec())
    }

    /// Descriptors that the library fills in.
    fn descs(&self, attr: Attr, kind: Kind, limit: usize) -> Checked<Vec<Desc>> {
        let made: Vec<Desc> = (0..limit)
            .map(|_| Desc::new(kind))
            .collect::<Checked<_>>()?;
        let mut raw: Vec<_> = made.iter().map(|d| d.0).collect();
        let count = self.get(attr, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &mut raw);
        Ok(made.into_iter().take(count).collect())
    }
}

/// The library's handle.
pub(crate) struct Handle(sys::cudnnHandle_t);

// SAFETY: a handle may be used from any thread, by one at a time; it is not Sync.
unsafe impl Send for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: destroyed once.
        unsafe { sys::cudnnDestroy(self.0) };
    }
}

/// What plans are made for.
pub(crate) enum Device {
    /// The card of a handle.
    Handle(Handle),
    /// A card that is only described.
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "tests make plans for a card that is not there")
    )]
    Described(Desc),
}

impl Device {
    /// Works on the stream of `gpu`.
    pub(crate) fn start(gpu: &Gpu) -> Result<Self, Error> {
        let mut raw = ptr::null_mut();
        // SAFETY: the library writes one handle; the stream lives as long as the engine.
        let started = unsafe {
            check("cudnnCreate", sys::cudnnCreate(&mut raw)).and_then(|()| {
                check(
                    "cudnnSetStream",
                    sys::cudnnSetStream(raw, gpu.stream.cast()),
                )
            })
        };
        started.map_err(|e| {
            Error::device(
                format!("cuDNN does not start: {e}"),
                "its version has to fit the driver's; runner doctor shows both",
            )
        })?;
        Ok(Self::Handle(Handle(raw)))
    }

    /// A card told in JSON, as the library describes one (attribute DEVICEPROP_JSON_REPRESENTATION).
    #[cfg(test)]
    pub(crate) fn described(json: &str) -> Checked<Self> {
        let desc = Desc::new(Kind::CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR)?
            .set(
                Attr::CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION,
                Type::CUDNN_TYPE_CHAR,
                json.as_bytes(),
            )?
            .finalize()?;
        Ok(Self::Described(desc))
    }

    /// The card in JSON.
    pub(crate) fn describe(&self) -> Checked<String> {
        let Self::Handle(handle) = self else {
            return Err("a described card has been told".into());
        };
        let desc = Desc::new(Kind::CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR)?
            .set(
                Attr::CUDNN_ATTR_DEVICEPROP_HANDLE,
                Type::CUDNN_TYPE_HANDLE,
                &[handle.0],
            )?
            .finalize()?;
        let bytes = desc.bytes(Attr::CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION);
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

const F32: DataType = DataType::CUDNN_DATA_FLOAT;
const X: i64 = 1;
const W: i64 = 2;
const Y: i64 = 3;

fn data_type(precision: Precision) -> DataType {
    match precision {
        Precision::F32 | Precision::Tf32 => F32,
        Precision::Bf16 => DataType::CUDNN_DATA_BFLOAT16,
        Precision::F16 => DataType::CUDNN_DATA_HALF,
    }
}

/// N, C, H, W in the order of the library; the strides make it N, H, W, C in memory.
fn tensor(id: i64, [n, c, h, w]: [usize; 4], data: DataType) -> Checked<Desc> {
    let [n, c, h, w] = [n as i64, c as i64, h as i64, w as i64];
    Desc::new(Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR)?
        .data_type(Attr::CUDNN_ATTR_TENSOR_DATA_TYPE, data)?
        .ints(Attr::CUDNN_ATTR_TENSOR_DIMENSIONS, &[n, c, h, w])?
        .ints(Attr::CUDNN_ATTR_TENSOR_STRIDES, &[c * h * w, 1, c * w, c])?
        .ints(Attr::CUDNN_ATTR_TENSOR_UNIQUE_ID, &[id])?
        .ints(Attr::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, &[16])?
        .finalize()
}

/// The graph of one convolution.
fn graph(conv: &Conv, precision: Precision, device: &Device) -> Checked<Desc> {
    let g = &conv.geometry;
    let data = data_type(precision);
    let (input, output) = (g.input, g.output);
    let x = tensor(X, [conv.batch, input.c, input.h, input.w], data)?;
    let w = tensor(W, [output.c, input.c, g.kernel, g.kernel], data)?;
    let y = tensor(Y, [conv.batch, output.c, output.h, output.w], data)?;
    let (pad, stride) = (g.pad() as i64, g.stride as i64);
    let c = Desc::new(Kind::CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR)?
        .data_type(Attr::CUDNN_ATTR_CONVOLUTION_COMP_TYPE, F32)?
        .set(
            Attr::CUDNN_ATTR_CONVOLUTION_CONV_MODE,
            Type::CUDNN_TYPE_CONVOLUTION_MODE,
            &[sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION],
        )?
        .ints(Attr::CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, &[2])?
        .ints(Attr::CUDNN_ATTR_CONVOLUTION_DILATIONS, &[1, 1])?
        .ints(
            Attr::CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES,
            &[stride, stride],
        )?
        .ints(Attr::CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, &[pad, pad])?
        .ints(Attr::CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, &[pad, pad])?
        .finalize()?;
    let op = match conv.product {
        Product::Forward => {
            Desc::new(Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR)?
                .desc(Attr::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X, &x)?
                .desc(Attr::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W, &w)?
                .desc(Attr::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y, &y)?
                .desc(Attr::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC, &c)?
                .float(Attr::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA, 1.0)?
                .float(Attr::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA, 0.0)?
        }
        Product::Input => {
            Desc::new(Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR)?
                .desc(Attr::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX, &x)?
                .desc(Attr::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W, &w)?
                .desc(Attr::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY, &y)?
                .desc(
                    Attr::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC,
                    &c,
                )?
                .float(Attr::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_ALPHA, 1.0)?
                .float(Attr::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_BETA, 0.0)?
        }
        Product::Weight => {
            Desc::new(Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR)?
                .desc(Attr::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X, &x)?
                .desc(Attr::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW, &w)?
                .desc(Attr::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY, &y)?
                .desc(
                    Attr::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC,
                    &c,
                )?
                .float(Attr::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_ALPHA, 1.0)?
                .float(Attr::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_BETA, 0.0)?
        }
    };
    let op = op.finalize()?;
    let graph = Desc::new(Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?
        .desc(Attr::CUDNN_ATTR_OPERATIONGRAPH_OPS, &op)?;
    match device {
        Device::Handle(handle) => graph.set(
            Attr::CUDNN_ATTR_OPERATIONGRAPH_HANDLE,
            Type::CUDNN_TYPE_HANDLE,
            &[handle.0],
        )?,
        Device::Described(_) => graph,
    }
    .finalize()
}

/// A plan that can run.
pub(crate) struct Plan {
    desc: Desc,
    /// Bytes.
    pub(crate) workspace: usize,
}

impl Plan {
    /// A plan that was kept as JSON, where it still loads.
    pub(crate) fn load(device: &Device, json: &[u8]) -> Option<Self> {
        let Device::Handle(handle) = device else {
            unreachable!("a described card runs nothing")
        };
        Desc::new(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)
            .and_then(|desc| {
                desc.set(
                    Attr::CUDNN_ATTR_EXECUTION_PLAN_HANDLE,
                    Type::CUDNN_TYPE_HANDLE,
                    &[handle.0],
                )
            })
            .and_then(|desc| {
                desc.set(
                    Attr::CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION,
                    Type::CUDNN_TYPE_CHAR,
                    json,
                )
            })
            .and_then(Desc::finalize)
            .map(Self::new)
            .ok()
    }

    /// As JSON.
    pub(crate) fn json(&self) -> Vec<u8> {
        self.desc
            .bytes(Attr::CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION)
    }

    fn new(desc: Desc) -> Self {
        let workspace = desc.int(Attr::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE);
        Self {
            desc,
            workspace: workspace.max(0) as usize,
        }
    }
}

/// Whether an engine computes what was asked for: rounds nothing besides, and gives the same bits each time.
fn suits(config: &Desc, precision: Precision, options: &Options) -> bool {
    use sys::cudnnBackendNumericalNote_t as Note;
    let engines = config.descs(
        Attr::CUDNN_ATTR_ENGINECFG_ENGINE,
        Kind::CUDNN_BACKEND_ENGINE_DESCRIPTOR,
        1,
    );
    let Ok([engine]) = engines.as_deref() else {
        return false;
    };
    let notes = engine.notes(
        Attr::CUDNN_ATTR_ENGINE_NUMERICAL_NOTE,
        Type::CUDNN_TYPE_NUMERICAL_NOTE,
    );
    let behaviour = engine.notes(
        Attr::CUDNN_ATTR_ENGINE_BEHAVIOR_NOTE,
        Type::CUDNN_TYPE_BEHAVIOR_NOTE,
    );
    // What cannot be read is no word that it suits.
    let (Some(notes), Some(behaviour)) = (notes, behaviour) else {
        return false;
    };
    let has = |note: Note| notes.contains(&(note as u32));
    let compiles = behaviour.contains(
        &(sys::cudnnBackendBehaviorNote_t::CUDNN_BEHAVIOR_NOTE_RUNTIME_COMPILATION as u32),
    );
    let is_exact = precision != Precision::F32
        || !(has(Note::CUDNN_NUMERICAL_NOTE_TENSOR_CORE)
            || has(Note::CUDNN_NUMERICAL_NOTE_DOWN_CONVERT_INPUTS));
    let is_steady = !options.deterministic || !has(Note::CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC);
    // One that is compiled at run time takes a second or more, at every start.
    let is_ready = !compiles;
    is_exact
        && is_steady
        && is_ready
        && !has(Note::CUDNN_NUMERICAL_NOTE_REDUCED_PRECISION_REDUCTION)
        && !has(Note::CUDNN_NUMERICAL_NOTE_WINOGRAD_TILE_13x13)
}

/// Plans for a convolution, the likely fastest first, at most `limit`; none asks for more workspace than allowed.
pub(crate) fn candidates(
    conv: &Conv,
    options: &Options,
    device: &Device,
    limit: usize,
) -> Checked<Vec<Plan>> {
    use sys::cudnnBackendHeurMode_t as Heuristic;
    let precision = options.precision;
    let graph = graph(conv, precision, device)?;
    let mut plans = vec![];
    let mut last = String::from("no engine");
    for mode in [
        Heuristic::CUDNN_HEUR_MODE_A,
        Heuristic::CUDNN_HEUR_MODE_FALLBACK,
    ] {
        if !plans.is_empty() {
            break;
        }
        let heuristic = Desc::new(Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?
            .desc(Attr::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, &graph)?
            .set(
                Attr::CUDNN_ATTR_ENGINEHEUR_MODE,
                Type::CUDNN_TYPE_HEUR_MODE,
                &[mode],
            )?;
        let heuristic = match device {
            Device::Handle(_) => heuristic,
            Device::Described(desc) => {
                heuristic.desc(Attr::CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, desc)?
            }
        }
        .finalize()?;
        let attr = Attr::CUDNN_ATTR_ENGINEHEUR_RESULTS;
        let count =
            heuristic.get::<*mut c_void>(attr, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &mut []);
        let configs = heuristic.descs(attr, Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, count)?;
        for config in configs
            .iter()
            .filter(|config| suits(config, precision, options))
        {
            let plan = Desc::new(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?
                .device(
                    Attr::CUDNN_ATTR_EXECUTION_PLAN_HANDLE,
                    Attr::CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP,
                    device,
                )?
                .desc(Attr::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, config)?
                .finalize();
            match plan.map(Plan::new) {
                Ok(plan) if plan.workspace <= options.workspace => plans.push(plan),
                Ok(plan) => last = format!("{} MiB of workspace", plan.workspace >> 20),
                Err(e) => last = e,
            }
            if plans.len() == limit {
                return Ok(plans);
            }
        }
    }
    match plans.is_empty() {
        true => Err(format!("cuDNN has no plan for {}: {last}", conv.name())),
        false => Ok(plans),
    }
}

/// Where a convolution's tensors lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tensors {
    pub(crate) x: Address,
    pub(crate) w: Address,
    pub(crate) y: Address,
}

/// A plan with its tensors.
pub(crate) struct Bound {
    pack: Desc,
}

impl Bound {
    pub(crate) fn new(at: Tensors, workspace: Address) -> Result<Self, Error> {
        let pointers = [at.x, at.w, at.y];
        let make = || {
            Desc::new(Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?
                .ints(Attr::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, &[X, W, Y])?
                .set(
                    Attr::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS,
                    Type::CUDNN_TYPE_VOID_PTR,
                    &pointers,
                )?
                .set(
                    Attr::CUDNN_ATTR_VARIANT_PACK_WORKSPACE,
                    Type::CUDNN_TYPE_VOID_PTR,
                    &[workspace],
                )?
                .finalize()
        };
        make()
            .map(|pack| Self { pack })
            .map_err(|e| Error::device(format!("cuDNN: {e}"), REPORT))
    }

    /// Puts it on the stream.
    pub(crate) fn run(&self, device: &Device, plan: &Plan) -> Result<(), Error> {
        let Device::Handle(handle) = device else {
            unreachable!("a described card runs nothing")
        };
        // SAFETY: all descriptors are final; the tensors lie in the engine's memory, with the plan's shapes.
        let status = unsafe { sys::cudnnBackendExecute(handle.0, plan.desc.0, self.pack.0) };
        check("run", status).map_err(|e| Error::device(format!("cuDNN: {e}"), REPORT))
    }
}

const REPORT: &str =
    "this is a fault of the program; please report it with what runner doctor says";

/// Changes when [`graph()`] or [`suits`] do: plans of before are then no longer looked for.
pub(crate) const FORM: u32 = 1;

/// How many plans are timed.
pub(crate) const TIMED: usize = 10;

/// The library's version.
pub(crate) fn version() -> usize {
    // SAFETY: the library is there, and this takes no pointer.
    unsafe { sys::cudnnGetVersion() }
}

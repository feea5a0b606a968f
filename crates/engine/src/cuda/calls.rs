//! From a program to calls: launches of kernels and convolutions, with every address in place.

use std::ops::Range;

use graph::{
    After, BufferId, Caps, Close, DropBlock, DropPath, Dropped, Geometry, Graph, Kernel, Mode,
    NORM_EPSILON, Needs, NormId, Normed, Op, Operand, ParamId, Plane, Program, STATE_ROWS, Squeeze,
    Window,
};

use super::cudnn::{Conv, Product, Tensors};
use super::driver::{Address, Arg, THREADS};
use super::{ALIGNMENT, Options};
use crate::{Decay, Dropout, MEAN, STD};

/// Channels of the stored image: three and a zero, so that a pixel is 8 or 16 bytes.
pub(crate) const IMAGE_CHANNELS: usize = 4;
/// Most channels that a row may have.
const MOST_CHANNELS: usize = 2048;
/// Parameters lie in chunks of so many.
pub(crate) const CHUNK: usize = 1024;

/// What the engine asks of a program.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CudaCaps {
    element: usize,
    multiprocessors: usize,
}

impl CudaCaps {
    pub(crate) fn new(options: &Options, multiprocessors: usize) -> Self {
        Self {
            element: options.precision.bytes(),
            multiprocessors,
        }
    }

    /// Blocks of a kernel that goes over rows: enough to fill the card, each with several rows to do.
    fn blocks(&self, rows: usize, channels: usize) -> usize {
        let lanes = THREADS as usize / (channels / 8);
        (rows.div_ceil(lanes * 8)).clamp(1, self.multiprocessors * 4)
    }

    fn partials(&self, rows: usize, channels: usize, sums: usize) -> usize {
        self.blocks(rows, channels) * sums * channels * size_of::<f32>()
    }
}

impl Caps for CudaCaps {
    fn alignment(&self) -> usize {
        ALIGNMENT
    }

    fn element(&self) -> usize {
        self.element
    }

    fn normalises_operands(&self) -> bool {
        false
    }

    fn image_channels(&self, channels: usize) -> usize {
        channels.max(IMAGE_CHANNELS)
    }

    fn forward(&self, g: &Geometry, batch: usize) -> Needs {
        Needs {
            partials: self.partials(batch * g.output.pixels(), g.output.c, 2),
            ..Needs::default()
        }
    }

    fn backward_input(&self, g: &Geometry, batch: usize) -> Needs {
        Needs {
            partials: self.partials(batch * g.input.pixels(), g.input.c, 3),
            // The product, where its sum with what others handed in replaces that.
            shared: batch * g.input.elements() * self.element,
            ..Needs::default()
        }
    }

    fn backward_weight(&self, _: &Geometry, _: usize) -> Needs {
        Needs::default()
    }

    fn visit(&self, plane: Plane, batch: usize) -> Needs {
        Needs {
            partials: self.partials(batch * plane.pixels(), plane.c, 3),
            ..Needs::default()
        }
    }
}

/// Where each parameter lies in the flat arrays: convolutions O x K x K x C, C filled up for the image.
pub(crate) struct Layout {
    pub(crate) slots: Vec<Slot>,
    /// Values of each array, whole chunks.
    pub(crate) len: usize,
    /// Of each chunk, whether it is a convolution's.
    pub(crate) convs: Vec<u8>,
    /// The parameter that each chunk is of.
    pub(crate) which: Vec<u32>,
    /// First chunk of each parameter, and the end.
    pub(crate) firsts: Vec<u32>,
    /// First channel of each normalisation among those of all.
    norms: Vec<usize>,
    /// Channels of all normalisations.
    pub(crate) channels: usize,
}

pub(crate) struct Slot {
    pub(crate) offset: usize,
    pub(crate) len: usize,
    /// Of a convolution: outputs, inputs, stored inputs, taps.
    conv: Option<[usize; 4]>,
}

impl Slot {
    /// Places of the stored values in the order of the state's; the places between stay zero.
    fn places(&self) -> Box<dyn Iterator<Item = usize> + '_> {
        match self.conv {
            None => Box::new(0..self.len),
            Some([outputs, inputs, stored, taps]) => Box::new((0..outputs).flat_map(move |o| {
                (0..inputs)
                    .flat_map(move |i| (0..taps).map(move |tap| (o * taps + tap) * stored + i))
            })),
        }
    }

    /// From the state's order to ours; `to` is the whole array.
    pub(crate) fn scatter(&self, values: &[f32], to: &mut [f32]) {
        let to = &mut to[self.offset..self.offset + self.len];
        to.fill(0.0);
        for (place, value) in self.places().zip(values) {
            to[place] = *value;
        }
    }

    /// From ours to the state's.
    pub(crate) fn gather(&self, from: &[f32]) -> Vec<f32> {
        let from = &from[self.offset..self.offset + self.len];
        self.places().map(|place| from[place]).collect()
    }
}

impl Layout {
    pub(crate) fn new(graph: &Graph) -> Self {
        let reads_image = |param: ParamId| {
            graph.nodes().iter().any(|node| {
                matches!(node.op, Op::Conv { weight, .. } if weight == param)
                    && node.inputs[0] == graph.input()
            })
        };
        let mut len = 0;
        let slot = |(i, p): (usize, &graph::Param)| {
            let conv = match p.shape[..] {
                [outputs, inputs, h, w] => {
                    let stored = match reads_image(ParamId(i)) {
                        true => inputs.max(IMAGE_CHANNELS),
                        false => inputs,
                    };
                    Some([outputs, inputs, stored, h * w])
                }
                _ => None,
            };
            let values = conv.map_or(p.elements(), |[o, _, stored, taps]| o * stored * taps);
            let offset = len;
            len += values.next_multiple_of(CHUNK);
            Slot {
                offset,
                len: values,
                conv,
            }
        };
        let slots: Vec<Slot> = graph.params().iter().enumerate().map(slot).collect();
        let mut convs = vec![0; len / CHUNK];
        for node in graph.nodes() {
            if let Op::Conv { weight, .. } = node.op {
                let slot = &slots[weight.0];
                convs[slot.offset / CHUNK..][..slot.len.div_ceil(CHUNK)].fill(1);
            }
        }
        let mut which = vec![0; len / CHUNK];
        let mut firsts: Vec<u32> = slots.iter().map(|s| (s.offset / CHUNK) as u32).collect();
        firsts.push((len / CHUNK) as u32);
        for (i, pair) in firsts.windows(2).enumerate() {
            which[pair[0] as usize..pair[1] as usize].fill(i as u32);
        }
        let mut channels = 0;
        let norms = graph
            .norms()
            .iter()
            .map(|n| {
                channels += n.channels;
                channels - n.channels
            })
            .collect();
        Self {
            slots,
            len,
            convs,
            which,
            firsts,
            norms,
            channels,
        }
    }

    /// Of each parameter what [`calls::update`](update) has to know: bit 0, weight decay acts on it; bit 1, LARS gives
    /// it a rate of its own.
    pub(crate) fn kinds(&self, graph: &Graph, decay: Decay) -> Vec<u8> {
        let kind = |p: &graph::Param| {
            let is_weight = p.decay == graph::DecayClass::Weight;
            u8::from(decay.covers(p.decay)) | u8::from(is_weight) << 1
        };
        graph.params().iter().map(kind).collect()
    }

    /// Where the running mean of a normalisation lies among all; the variance lies `channels` further on.
    pub(crate) fn running(&self, norm: NormId) -> usize {
        self.norms[norm.0]
    }
}

/// Memory that calls name.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Places {
    pub(crate) arena: Address,
    pub(crate) constants: Address,
    /// f32 parameters.
    pub(crate) masters: Address,
    /// Parameters as convolutions read them; the masters themselves in f32.
    pub(crate) cast: Address,
    /// Gradients of this micro-batch, f32.
    pub(crate) fresh: Address,
    /// Those of convolutions as cuDNN stores them; `fresh` itself in f32.
    pub(crate) raw: Address,
    /// A byte for each chunk: whether its gradient lies in `raw`.
    pub(crate) is_raw: Address,
    /// Running means, then variances.
    pub(crate) running: Address,
    /// Their sums over micro-batches, f64.
    pub(crate) sums: Address,
    /// Labels of this micro-batch.
    pub(crate) labels: Address,
    /// Its second labels.
    pub(crate) others: Address,
    /// The kernels' Hyper.
    pub(crate) hyper: Address,
    /// The kernels' Scale.
    pub(crate) scale: Address,
    /// Loss and hits of each image.
    pub(crate) scored: Address,
    /// The kernels' Totals.
    pub(crate) totals: Address,
    /// The kernels' Draw of each branch, then of each tensor of which squares are dropped.
    pub(crate) draws: Address,
    /// Elements of each image that are not dropped.
    pub(crate) kept: Address,
    /// Momentum.
    pub(crate) momentum: Address,
    /// Moving average of the parameters and of the running statistics; 0 where none is kept.
    pub(crate) average: Address,
    pub(crate) running_average: Address,
    /// What an update knows of each tensor.
    pub(crate) rules: Rules,
}

/// What training drops of a network besides what its classifier reads: branches, and squares with their planes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Drops {
    pub(crate) paths: Vec<DropPath>,
    pub(crate) squares: Vec<(DropBlock, Plane)>,
}

impl Drops {
    /// Bytes of the kernels' Draw.
    pub(crate) const DRAW: usize = 16;

    pub(crate) fn new(graph: &Graph) -> Self {
        let mut drops = Self::default();
        for node in graph.nodes() {
            match node.op {
                Op::DropPath(path) => drops.paths.push(path),
                Op::DropBlock(block) => drops.squares.push((block, node.plane)),
                _ => {}
            }
        }
        drops
    }

    /// Bytes of all.
    pub(crate) fn bytes(&self) -> usize {
        (self.paths.len() + self.squares.len()) * Self::DRAW
    }

    /// The kernels' Draw of each, in a step; zeros, which drop nothing, without dropout.
    pub(crate) fn draws(&self, dropout: Option<Dropout>) -> Vec<u8> {
        let Some(dropout) = dropout else {
            return vec![0; self.bytes()];
        };
        let paths = self.paths.iter().map(|path| dropout.paths(*path).draw_by());
        let squares = self
            .squares
            .iter()
            .map(|(block, plane)| dropout.squares(*block, *plane).draw_by());
        let all = paths.chain(squares);
        all.flat_map(|(key, value)| [key.to_ne_bytes(), value.to_ne_bytes()])
            .flatten()
            .collect()
    }

    fn path(&self, path: DropPath) -> usize {
        let found = self.paths.iter().position(|p| *p == path);
        found.expect("a branch of the network")
    }

    fn square(&self, block: DropBlock) -> usize {
        let found = self.squares.iter().position(|(b, _)| *b == block);
        self.paths.len() + found.expect("squares of the network")
    }
}

/// What updates know of tensors, in one block.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rules {
    /// The tensor that each chunk is of, u32.
    which: Address,
    /// The first chunk of each tensor and the end, u32.
    firsts: Address,
    /// [`Layout::kinds`].
    pub(crate) kinds: Address,
    /// The kernels' Norms of each chunk, and of each tensor.
    chunks: Address,
    tensors: Address,
    /// The kernels' TensorRule of each tensor.
    rules: Address,
}

impl Rules {
    /// Bytes of the kernels' Norms and TensorRule.
    const NORMS: usize = 24;
    const RULE: usize = 16;

    /// Where everything lies from `at` on, and the end.
    pub(crate) fn new(layout: &Layout, at: Address) -> (Self, Address) {
        let (chunks, tensors) = (layout.which.len(), layout.slots.len());
        let mut at = at;
        let mut place = |bytes: usize| {
            let here = at;
            at += bytes.next_multiple_of(256) as Address;
            here
        };
        let rules = Self {
            which: place(chunks * size_of::<u32>()),
            firsts: place((tensors + 1) * size_of::<u32>()),
            kinds: place(tensors),
            chunks: place(chunks * Self::NORMS),
            tensors: place(tensors * Self::NORMS),
            rules: place(tensors * Self::RULE),
        };
        (rules, at)
    }

    /// What never changes, and where it goes.
    pub(crate) fn constants<'l>(&self, layout: &'l Layout) -> [(Address, &'l [u32]); 2] {
        [(self.which, &layout.which), (self.firsts, &layout.firsts)]
    }
}

/// One thing that the card does.
#[derive(Clone, Debug)]
pub(crate) enum Call {
    /// Starts a kernel.
    Launch {
        name: &'static str,
        grid: (u32, u32),
        args: Vec<Arg>,
        /// What it reads and writes at least.
        bytes: usize,
    },
    /// A convolution.
    Conv { conv: Conv, at: Tensors },
}

/// A program as calls.
pub(crate) struct Calls {
    /// Fill the constants.
    pub(crate) setup: Vec<Call>,
    /// Everything after the first kernel, which reads the pixels: a part for each bucket, after which its gradients are
    /// complete. All in one where there are no gradients.
    pub(crate) body: Vec<Vec<Call>>,
    /// Where that one stores the image.
    pub(crate) image: Address,
    /// Where the logits are.
    pub(crate) logits: Address,
}

/// The first kernel: pixels of a micro-batch to the image at `to`.
pub(crate) fn input(pixels: Address, is_u8: bool, count: usize, to: Address) -> Call {
    let name = if is_u8 { "input_u8" } else { "input_f32" };
    let inverse = STD.map(|s| (1.0 / f64::from(s)) as f32);
    let normal = [
        MEAN[0], MEAN[1], MEAN[2], inverse[0], inverse[1], inverse[2],
    ];
    let args = vec![
        Arg::address(pixels),
        Arg::address(to),
        Arg::int(count),
        Arg::floats(&normal),
    ];
    let element = if is_u8 { 1 } else { size_of::<f32>() };
    let bytes = count * (3 * element + IMAGE_CHANNELS * 2);
    launch(name, count.div_ceil(4 * THREADS as usize), args, bytes)
}

fn launch(name: &'static str, blocks: usize, args: Vec<Arg>, bytes: usize) -> Call {
    Call::Launch {
        name,
        grid: (blocks as u32, 1),
        args,
        bytes,
    }
}

impl Call {
    /// Bytes of what it reads and writes, each once.
    pub(crate) fn bytes(&self, element: usize) -> usize {
        match self {
            Call::Launch { bytes, .. } => *bytes,
            Call::Conv { conv, .. } => {
                let g = &conv.geometry;
                let weights = g.depth() * g.output.c;
                let values = conv.batch * (g.input.elements() + g.output.elements());
                (values + weights) * element
            }
        }
    }

    /// Multiply-adds on tensor cores.
    pub(crate) fn macs(&self) -> usize {
        match self {
            Call::Launch { .. } => 0,
            Call::Conv { conv, .. } => conv.batch * conv.geometry.macs(),
        }
    }

    /// What it computes, on which shapes.
    pub(crate) fn name(&self) -> String {
        match self {
            Call::Launch { name, .. } => (*name).to_owned(),
            Call::Conv { conv, .. } => conv.name(),
        }
    }
}

/// Every parameter's chunk as one block.
pub(crate) fn over_chunks(name: &'static str, layout: &Layout, args: Vec<Arg>) -> Call {
    launch(name, layout.len / CHUNK, args, 0)
}

/// Where values of a chunk lie.
pub(crate) fn chunk_at(base: Address, chunk: usize, element: usize) -> Address {
    base + (chunk * CHUNK * element) as Address
}

/// The gradients of a bucket join, or with `add` are added to, those of micro-batches before.
pub(crate) fn accumulate(
    summed: Address,
    fresh: Address,
    bucket: &Range<usize>,
    add: bool,
) -> Call {
    let at = |base| Arg::address(chunk_at(base, bucket.start, size_of::<f32>()));
    let args = vec![at(summed), at(fresh), Arg::int(usize::from(add))];
    launch("accumulate", bucket.len(), args, 0)
}

/// All chunks in buckets of at least so many values, whole tensors each, from the last to the first: the order in which
/// a backward pass completes their gradients.
pub(crate) fn buckets(layout: &Layout, values: usize) -> Vec<Range<usize>> {
    let mut found = vec![];
    let mut end = layout.len / CHUNK;
    for slot in layout.slots.iter().rev() {
        let start = slot.offset / CHUNK;
        if (end - start) * CHUNK >= values || start == 0 {
            found.push(start..end);
            end = start;
        }
    }
    found
}

/// What ends a step: parameters move by `gradients`, running statistics by the mean over `micro_batches`. `norms`: the
/// rule asks for the length of gradients; `scaled`: gradients may have overflowed.
pub(crate) fn update(
    layout: &Layout,
    places: &Places,
    gradients: Address,
    micro_batches: usize,
    norms: bool,
    scaled: bool,
) -> Vec<Call> {
    let address = Arg::address;
    let (hyper, scale, rules) = (address(places.hyper), address(places.scale), &places.rules);
    let (masters, gradients) = (address(places.masters), address(gradients));
    let cast = match places.cast == places.masters {
        true => 0,
        false => places.cast,
    };
    let tensors = layout.slots.len();
    let mut calls = vec![];
    if scaled {
        calls.push(over_chunks("check", layout, vec![gradients, scale]));
    }
    if norms {
        let args = vec![masters, gradients, scale, address(rules.chunks)];
        calls.push(over_chunks("squares", layout, args));
        let args = [rules.chunks, rules.firsts, rules.tensors].map(address);
        calls.push(launch("norms", tensors, args.to_vec(), 0));
    }
    let mut args = vec![hyper];
    args.extend([rules.tensors, rules.kinds, rules.rules].map(address));
    args.push(Arg::int(tensors));
    calls.push(launch("rates", 1, args, 0));
    let mut args = vec![
        hyper,
        scale,
        masters,
        address(places.momentum),
        gradients,
        address(cast),
    ];
    args.extend([rules.which, rules.rules, places.average].map(address));
    calls.push(over_chunks("update", layout, args));
    if scaled {
        calls.push(launch("rescale", 1, vec![scale], 0));
    }
    let count = 2 * layout.channels;
    let args = vec![
        address(places.running),
        address(places.sums),
        Arg::int(count),
        Arg::double(f64::from(graph::NORM_UPDATE)),
        Arg::double(micro_batches as f64),
        address(places.running_average),
        hyper,
    ];
    calls.push(over_values("running_update", count, args));
    calls
}

/// The second copy of `count` values in parameters and the like takes the place of the first.
pub(crate) fn swap(a: Address, b: Address, count: usize) -> Call {
    let args = vec![Arg::address(a), Arg::address(b), Arg::int(count)];
    over_values("swap", count, args)
}

/// A thread for each value.
fn over_values(name: &'static str, count: usize, args: Vec<Arg>) -> Call {
    launch(name, count.div_ceil(THREADS as usize), args, 0)
}

/// Totals of the first `images` of a micro-batch, added to what is there if `add`.
pub(crate) fn loss_finish(places: &Places, images: usize, add: bool) -> Call {
    let args = vec![
        Arg::address(places.scored),
        Arg::address(places.totals),
        Arg::int(images),
        Arg::int(usize::from(add)),
    ];
    launch("loss_finish", 1, args, 0)
}

/// Makes calls of one program.
struct Writer<'a> {
    graph: &'a Graph,
    program: &'a Program,
    caps: &'a CudaCaps,
    layout: &'a Layout,
    places: &'a Places,
    /// Add to the sums of earlier micro-batches.
    add: bool,
    calls: Vec<Call>,
    /// Number of calls after which the gradient of each parameter is complete.
    complete: Vec<usize>,
    drops: Drops,
}

/// What a program does, `add`ing to the sums of earlier micro-batches or not, in parts that complete the gradients of a
/// bucket each.
pub(crate) fn calls(
    graph: &Graph,
    program: &Program,
    caps: &CudaCaps,
    layout: &Layout,
    places: &Places,
    add: bool,
    buckets: &[Range<usize>],
) -> Calls {
    let mut writer = Writer {
        graph,
        program,
        caps,
        layout,
        places,
        add,
        calls: vec![],
        complete: vec![0; graph.params().len()],
        drops: Drops::new(graph),
    };
    program.setup.iter().for_each(|k| writer.fold(k));
    let setup = std::mem::take(&mut writer.calls);
    let (first, rest) = program
        .kernels
        .split_first()
        .expect("a program reads pixels");
    let Kernel::Input { y, .. } = first else {
        unreachable!("the first kernel reads pixels")
    };
    rest.iter().for_each(|k| writer.kernel(k));
    Calls {
        body: match program.mode {
            Mode::Train => writer.parts(buckets),
            Mode::Infer => vec![std::mem::take(&mut writer.calls)],
        },
        setup,
        image: writer.at(*y),
        logits: writer.at(program.logits),
    }
}

/// Rows of a normalisation's state, as in the kernels.
const MEAN_ROW: usize = 0;
const SCALE_ROW: usize = 2;
const SHIFT_ROW: usize = 3;

impl Writer<'_> {
    /// The calls in parts, at whose ends the gradients of each bucket lie in f32.
    fn parts(&mut self, buckets: &[Range<usize>]) -> Vec<Vec<Call>> {
        let mut calls = std::mem::take(&mut self.calls).into_iter();
        let mut taken = 0;
        let mut part = |bucket: &Range<usize>| {
            let tensors = &self.layout.which[bucket.clone()];
            let complete = tensors.iter().map(|tensor| self.complete[*tensor as usize]);
            let until = complete.max().unwrap_or(0).max(taken);
            let mut part: Vec<Call> = calls.by_ref().take(until - taken).collect();
            taken = until;
            part.extend(self.widen(bucket));
            part
        };
        let parts: Vec<Vec<Call>> = buckets.iter().map(&mut part).collect();
        let rest: Vec<Call> = calls.collect();
        assert!(rest.is_empty(), "a backward pass ends with a gradient");
        parts
    }

    /// Gradients of convolutions in a bucket become f32, where they are not.
    fn widen(&self, bucket: &Range<usize>) -> Option<Call> {
        let places = self.places;
        if places.raw == places.fresh {
            return None;
        }
        let args = vec![
            Arg::address(chunk_at(places.raw, bucket.start, self.caps.element)),
            Arg::address(chunk_at(places.fresh, bucket.start, size_of::<f32>())),
            Arg::address(places.is_raw + bucket.start as Address),
        ];
        Some(launch("widen_gradients", bucket.len(), args, 0))
    }

    /// The gradient of a parameter is what the last call has written.
    fn completes(&mut self, param: ParamId) {
        self.complete[param.0] = self.calls.len();
    }

    fn at(&self, id: BufferId) -> Address {
        let buffer = &self.program.buffers[id.0];
        let base = match buffer.constant {
            true => self.places.constants,
            false => self.places.arena,
        };
        base + buffer.offset as Address
    }

    fn buffer(&self, id: BufferId) -> Arg {
        Arg::address(self.at(id))
    }

    /// Row `row` of a state with so many channels.
    fn row(&self, state: BufferId, row: usize, channels: usize) -> Arg {
        debug_assert!(row < STATE_ROWS);
        Arg::address(self.at(state) + (row * channels * size_of::<f32>()) as Address)
    }

    fn param(&self, base: Address, id: ParamId, element: usize) -> Address {
        base + (self.layout.slots[id.0].offset * element) as Address
    }

    fn master(&self, id: ParamId) -> Arg {
        Arg::address(self.param(self.places.masters, id, size_of::<f32>()))
    }

    fn fresh(&self, id: ParamId) -> Address {
        self.param(self.places.fresh, id, size_of::<f32>())
    }

    fn cast(&self, id: ParamId) -> Address {
        self.param(self.places.cast, id, self.caps.element)
    }

    fn launch(&mut self, name: &'static str, blocks: usize, args: Vec<Arg>) {
        self.calls.push(launch(name, blocks, args, 0));
    }

    /// A kernel that goes over the rows of a plane, whose sizes are its last arguments, and reads or writes so many
    /// tensors of that size.
    fn over_rows(&mut self, name: &'static str, plane: Plane, tensors: usize, mut args: Vec<Arg>) {
        let (rows, channels) = (self.rows(plane), plane.c);
        args.extend([Arg::int(rows), Arg::int(channels)]);
        let bytes = tensors * rows * channels * self.caps.element;
        let call = launch(name, self.caps.blocks(rows, channels), args, bytes);
        self.calls.push(call);
    }

    fn rows(&self, plane: Plane) -> usize {
        assert!(
            plane.c.is_multiple_of(8) && plane.c <= MOST_CHANNELS,
            "{plane:?}: channels come in eights"
        );
        self.program.batch * plane.pixels()
    }

    fn fold(&mut self, kernel: &Kernel) {
        let Kernel::Fold {
            geometry,
            weight,
            norm,
            weights,
            shift,
            ..
        } = *kernel
        else {
            unreachable!("setup only folds")
        };
        let running = self.layout.running(norm);
        let at = |i: usize| Arg::address(self.places.running + (i * size_of::<f32>()) as Address);
        let spec = &self.graph.norms()[norm.0];
        let outputs = geometry.output.c;
        let args = vec![
            self.master(weight),
            self.master(spec.weight),
            self.master(spec.bias),
            at(running),
            at(self.layout.channels + running),
            Arg::float(NORM_EPSILON),
            self.buffer(weights),
            self.buffer(shift),
            Arg::int(self.layout.slots[weight.0].len / outputs),
        ];
        self.launch("fold", outputs, args);
    }

    fn stored(&self, operand: Operand) -> BufferId {
        match operand {
            Operand::Stored(x) => x,
            _ => unreachable!("convolutions read what is stored"),
        }
    }

    /// The image has more channels in memory.
    fn geometry(&self, mut g: Geometry) -> Geometry {
        g.input.c = self.caps.image_channels(g.input.c);
        g
    }

    fn conv(&mut self, product: Product, geometry: Geometry, at: Tensors) {
        let conv = Conv {
            product,
            geometry: self.geometry(geometry),
            batch: self.program.batch,
        };
        self.calls.push(Call::Conv { conv, at });
    }

    fn kernel(&mut self, kernel: &Kernel) {
        match *kernel {
            Kernel::Fold { .. } | Kernel::Input { .. } => unreachable!("done apart"),
            Kernel::Conv {
                geometry,
                weight,
                weights,
                x,
                y,
                after,
                ..
            } => {
                let x = self.at(self.stored(x));
                let w = weights.map_or_else(|| self.cast(weight), |w| self.at(w));
                let tensors = Tensors {
                    x,
                    w,
                    y: self.at(y),
                };
                self.conv(Product::Forward, geometry, tensors);
                self.after(geometry.output, y, after);
            }
            Kernel::Gate {
                plane,
                x,
                squeeze,
                path,
                gate,
            } => self.gate(plane, x, squeeze, path, gate),
            Kernel::GateBackward { .. } => self.gate_backward(kernel),
            Kernel::Sum {
                plane,
                x,
                gate: Some(gate),
                side,
                relu,
                y,
            } => {
                let mut args = self.value(x, plane.c);
                args.truncate(3); // a branch has no ReLU of its own
                args.push(self.buffer(gate));
                args.extend(self.side(side, plane.c));
                args.extend([
                    Arg::int(usize::from(relu)),
                    self.buffer(y),
                    Arg::int(plane.pixels()),
                ]);
                self.over_rows("gated_sum", plane, 2 + usize::from(side.is_some()), args);
            }
            Kernel::DropBlock {
                plane,
                block,
                dropped,
            } => self.draw_squares(plane, block, dropped),
            Kernel::DroppedSum {
                plane,
                x,
                side,
                dropped,
                relu,
                y,
            } => {
                let mut args = self.value(x, plane.c);
                args.truncate(3);
                args.extend(self.side(side, plane.c));
                let masks = dropped
                    .map(|dropped| dropped.map_or([0, 0], |d| [self.at(d.mask), self.at(d.scale)]));
                args.extend([
                    Arg::addresses(masks.as_flattened()),
                    Arg::int(usize::from(relu)),
                    self.buffer(y),
                ]);
                self.over_rows("dropped_sum", plane, 3 + usize::from(side.is_some()), args);
            }
            Kernel::DropBlockBackward {
                plane,
                dropped,
                d,
                dx,
                close,
                partials,
            } => {
                let args = [d, dropped.mask, dropped.scale].map(|id| self.buffer(id));
                self.close(plane, Source::Rest(args.to_vec()), dx, close, partials);
            }
            Kernel::HalfPool { plane, x, y } => {
                let (sizes, halved) = halves(plane);
                let args = vec![self.buffer(x), sizes, self.buffer(y)];
                self.over_rows("half_pool", halved, 5, args);
            }
            Kernel::HalfPoolBackward {
                plane,
                d,
                dx,
                close,
                partials,
            } => {
                let args = vec![self.buffer(d), halves(plane).0];
                self.close(plane, Source::Half(args), dx, close, partials);
            }
            Kernel::Sum {
                plane,
                x,
                gate: None,
                side,
                relu,
                y,
            } => {
                let Operand::Normed { z, state, .. } = x else {
                    unreachable!("inference adds in its convolutions")
                };
                let c = plane.c;
                let mut args = vec![
                    self.buffer(z),
                    self.row(state, SCALE_ROW, c),
                    self.row(state, SHIFT_ROW, c),
                ];
                let name = match side {
                    None => "apply",
                    Some(Operand::Stored(side)) => {
                        args.push(self.buffer(side));
                        "apply_add"
                    }
                    Some(Operand::Normed {
                        z,
                        state,
                        relu: side_relu,
                    }) => {
                        args.extend([
                            self.buffer(z),
                            self.row(state, SCALE_ROW, c),
                            self.row(state, SHIFT_ROW, c),
                            Arg::int(usize::from(side_relu)),
                        ]);
                        "apply_add_normed"
                    }
                    Some(Operand::Gradient { .. }) => unreachable!("a summand is a value"),
                };
                args.extend([Arg::int(usize::from(relu)), self.buffer(y)]);
                self.over_rows(name, plane, 2 + usize::from(side.is_some()), args);
            }
            Kernel::MaxPool {
                window,
                x,
                y,
                argmax,
            } => {
                let none = Arg::address(0);
                let (x, scale, shift, relu) = match x {
                    Operand::Stored(x) => (x, none, none, false),
                    Operand::Normed { z, state, relu } => {
                        let c = window.input.c;
                        let scale = self.row(state, SCALE_ROW, c);
                        (z, scale, self.row(state, SHIFT_ROW, c), relu)
                    }
                    Operand::Gradient { .. } => unreachable!("a pool reads a value"),
                };
                let args = vec![
                    self.buffer(x),
                    scale,
                    shift,
                    Arg::int(usize::from(relu)),
                    sizes(&window),
                    self.buffer(y),
                    argmax.map_or(none, |a| self.buffer(a)),
                ];
                self.over_rows("max_pool", window.output, 6, args);
            }
            Kernel::AvgPool { plane, x, y } => {
                let threads = self.program.batch * plane.c / 8;
                let args = vec![
                    self.buffer(x),
                    self.buffer(y),
                    Arg::int(self.program.batch),
                    Arg::int(plane.pixels()),
                    Arg::int(plane.c),
                    match self.program.mode {
                        Mode::Train => Arg::address(self.places.hyper),
                        Mode::Infer => Arg::address(0),
                    },
                ];
                self.launch("avg_pool", threads.div_ceil(THREADS as usize), args);
            }
            Kernel::Linear {
                inputs,
                outputs,
                weight,
                bias,
                x,
                y,
            } => {
                let (x, w) = (self.buffer(x), self.master(weight));
                let y = self.buffer(y);
                let bias = self.master(bias);
                let n = self.program.batch;
                self.matmul((x, inputs, 1), (w, 1, inputs), bias, y, n, outputs, inputs);
            }
            Kernel::Loss { classes, logits, d } => {
                let places = self.places;
                let args = vec![
                    self.buffer(logits),
                    Arg::address(places.labels),
                    Arg::address(places.others),
                    Arg::address(places.hyper),
                    Arg::address(places.scale),
                    d.map_or(Arg::address(0), |d| self.buffer(d)),
                    Arg::address(places.scored),
                    Arg::int(classes),
                ];
                let images = self.program.batch;
                self.launch("loss", images, args);
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
                let n = self.program.batch;
                let (x, d, dx) = (self.buffer(x), self.buffer(d), self.buffer(dx));
                self.layer_backward([weight, bias], (x, inputs), (d, outputs), dx);
                let hyper = Arg::address(self.places.hyper);
                let args = vec![dx, Arg::int(n), Arg::int(inputs), hyper];
                self.calls.push(over_values("drop", n * inputs, args));
            }
            Kernel::AvgPoolBackward {
                plane,
                d,
                dx,
                close,
                partials,
            } => {
                let pixels = plane.pixels();
                let source = vec![
                    self.buffer(d),
                    Arg::int(pixels),
                    Arg::float(1.0 / pixels as f32),
                ];
                let Close::Stored { add: None, .. } = close else {
                    unreachable!("the mean reads the last value, and nothing else does")
                };
                self.close(plane, Source::Spread(source), dx, close, partials);
            }
            Kernel::MaxPoolBackward {
                window,
                argmax,
                d,
                dx,
                close,
                partials,
            } => {
                let plane = window.input;
                let Close::Lazy { normed, relu } = close else {
                    unreachable!("a max-pool reads a normalisation that nothing else reads")
                };
                let args = vec![
                    self.buffer(d),
                    self.buffer(argmax),
                    sizes(&window),
                    self.buffer(normed.z),
                    self.buffer(normed.state),
                    Arg::int(usize::from(relu)),
                    self.buffer(dx),
                    self.buffer(partials),
                ];
                self.over_rows("close_lazy_pool", plane, 2, args);
                self.finish(plane, normed, partials, 1, 2);
            }
            Kernel::NormBackward {
                plane,
                g,
                z,
                state,
                relu,
                dz,
            } => {
                let args = vec![
                    self.buffer(g),
                    self.buffer(z),
                    self.buffer(state),
                    Arg::int(usize::from(relu)),
                    self.buffer(dz),
                ];
                self.over_rows("norm_backward", plane, 3, args);
            }
            Kernel::ConvBackwardInput {
                geometry,
                weight,
                shared,
                d,
                dx,
                close,
                partials,
                ..
            } => {
                let adds = match close {
                    Close::Open { add } | Close::Stored { add, .. } => add.is_some(),
                    Close::Lazy { .. } => false,
                };
                let raw = if adds { shared } else { dx };
                let tensors = Tensors {
                    x: self.at(raw),
                    w: self.cast(weight),
                    y: self.at(self.stored(d)),
                };
                self.conv(Product::Input, geometry, tensors);
                let source = Source::Stored(vec![self.buffer(raw)]);
                self.close(geometry.input, source, dx, close, partials);
            }
            Kernel::ConvBackwardWeight {
                geometry,
                weight,
                x,
                d,
                ..
            } => {
                let tensors = Tensors {
                    x: self.at(self.stored(x)),
                    w: self.param(self.places.raw, weight, self.caps.element),
                    y: self.at(self.stored(d)),
                };
                self.conv(Product::Weight, geometry, tensors);
                self.completes(weight);
            }
        }
    }

    /// A value as kernels of branches take it: where it lies, its scale and shift or none, whether there is a ReLU.
    fn value(&self, x: Operand, channels: usize) -> Vec<Arg> {
        let none = Arg::address(0);
        match x {
            Operand::Stored(x) => vec![self.buffer(x), none, none, Arg::int(0)],
            Operand::Normed { z, state, relu } => vec![
                self.buffer(z),
                self.row(state, SCALE_ROW, channels),
                self.row(state, SHIFT_ROW, channels),
                Arg::int(usize::from(relu)),
            ],
            Operand::Gradient { .. } => unreachable!("a summand is a value"),
        }
    }

    fn side(&self, side: Option<Operand>, channels: usize) -> Vec<Arg> {
        let none = Arg::address(0);
        match side {
            Some(side) => self.value(side, channels),
            None => vec![none, none, none, Arg::int(0)],
        }
    }

    /// Where the Draw of a branch lies, if it may be dropped, and the Hyper beside it.
    fn path(&self, path: Option<DropPath>) -> [Arg; 2] {
        let at = |path| self.places.draws + (self.drops.path(path) * Drops::DRAW) as Address;
        [path.map_or(0, at), self.places.hyper].map(Arg::address)
    }

    fn gate(
        &mut self,
        plane: Plane,
        x: Operand,
        squeeze: Option<Squeeze>,
        path: Option<DropPath>,
        gate: BufferId,
    ) {
        let (n, c) = (self.program.batch, plane.c);
        if let Some(s) = squeeze {
            let mut args = self.value(x, c);
            args.truncate(3);
            let mean = self.buffer(s.mean);
            args.extend([mean, Arg::int(plane.pixels()), Arg::int(c)]);
            self.launch("plane_means", n, args);
            let (inner, sigmoid) = (self.buffer(s.inner), self.buffer(s.sigmoid));
            let [reduce, expand] =
                [s.reduce, s.expand].map(|layer| layer.map(|id| self.master(id)));
            let [w, b] = reduce;
            self.matmul((mean, c, 1), (w, 1, c), b, inner, n, s.hidden, c);
            let args = vec![inner, Arg::int(n * s.hidden)];
            self.calls
                .push(over_values("squeeze_relu", n * s.hidden, args));
            let [w, b] = expand;
            self.matmul(
                (inner, s.hidden, 1),
                (w, 1, s.hidden),
                b,
                sigmoid,
                n,
                c,
                s.hidden,
            );
        }
        let mut args = vec![squeeze.map_or(Arg::address(0), |s| self.buffer(s.sigmoid))];
        args.extend(self.path(path));
        args.extend([self.buffer(gate), Arg::int(n * c), Arg::int(c)]);
        self.calls.push(over_values("gate", n * c, args));
    }

    fn gate_backward(&mut self, kernel: &Kernel) {
        let Kernel::GateBackward {
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
        } = *kernel
        else {
            unreachable!("it is one")
        };
        let (n, c, pixels) = (self.program.batch, plane.c, plane.pixels());
        let count = n * c;
        let sums = self.at(sums);
        // Three sums of each plane, the gradient of what the sigmoid reads, that of the means, that of hidden channels.
        let part = |i: usize| Arg::address(sums + (i * count * size_of::<f32>()) as Address);
        let tensors = [g, z, state].map(|id| self.buffer(id));
        let mut args = tensors.to_vec();
        args.extend([part(0), Arg::int(pixels), Arg::int(c)]);
        self.launch("gated_sums", n, args);
        let spec = &self.graph.norms()[norm.0];
        let d_mean = squeeze.map_or(Arg::address(0), |_| part(4));
        if let Some(s) = squeeze {
            let (expanded, d_inner) = (part(3), part(5));
            let [mean, inner, sigmoid] = [s.mean, s.inner, s.sigmoid].map(|id| self.buffer(id));
            let mut args = vec![part(0), self.buffer(state), self.master(spec.bias), sigmoid];
            args.extend(self.path(path));
            args.extend([expanded, Arg::int(count), Arg::int(c)]);
            self.calls.push(over_values("excite_backward", count, args));
            let h = s.hidden;
            self.layer_backward(s.expand, (inner, h), (expanded, c), d_inner);
            let args = vec![d_inner, inner, Arg::int(n * h)];
            self.calls
                .push(over_values("squeeze_relu_backward", n * h, args));
            self.layer_backward(s.reduce, (mean, c), (d_inner, h), d_mean);
        }
        let args = vec![
            part(0),
            self.buffer(gate),
            d_mean,
            self.buffer(state),
            Arg::address(self.fresh(spec.weight)),
            Arg::address(self.fresh(spec.bias)),
            Arg::int(n),
            Arg::int(pixels),
            Arg::int(c),
        ];
        let (weight, bias) = (spec.weight, spec.bias);
        self.launch("gate_close", c.div_ceil(8), args);
        self.completes(weight);
        self.completes(bias);
        let mut args = tensors.to_vec();
        args.extend([self.buffer(gate), d_mean, self.buffer(dz), Arg::int(pixels)]);
        self.over_rows("gated_gradient", plane, 3, args);
    }

    /// The gradients of a layer's weight (outputs x inputs), bias and input, all f32: x is images x inputs, d images x
    /// outputs.
    fn layer_backward(
        &mut self,
        [weight, bias]: [ParamId; 2],
        (x, inputs): (Arg, usize),
        (d, outputs): (Arg, usize),
        dx: Arg,
    ) {
        let (n, none) = (self.program.batch, Arg::address(0));
        let (w, dw) = (self.master(weight), Arg::address(self.fresh(weight)));
        self.matmul(
            (d, 1, outputs),
            (x, inputs, 1),
            none,
            dw,
            outputs,
            inputs,
            n,
        );
        self.matmul(
            (d, outputs, 1),
            (w, inputs, 1),
            none,
            dx,
            n,
            inputs,
            outputs,
        );
        let args = vec![
            d,
            Arg::address(self.fresh(bias)),
            Arg::int(n),
            Arg::int(outputs),
        ];
        self.calls.push(over_values("column_sums", outputs, args));
        self.completes(weight);
        self.completes(bias);
    }

    fn draw_squares(&mut self, plane: Plane, block: DropBlock, dropped: Dropped) {
        let images = self.program.batch;
        let draw = self.drops.square(block) * Drops::DRAW;
        let (rows, columns) = (block.side.min(plane.h), block.side.min(plane.w));
        let kept = Arg::address(self.places.kept);
        let args = vec![
            Arg::address(self.places.draws + draw as Address),
            Arg::address(self.places.hyper),
            Arg::ints(&[plane.h, plane.w, plane.c, rows, columns]),
            self.buffer(dropped.mask),
            kept,
        ];
        self.launch("draw_squares", images, args);
        let args = vec![
            kept,
            Arg::int(images),
            Arg::double((images * plane.elements()) as f64),
            self.buffer(dropped.scale),
        ];
        self.launch("squares_scale", 1, args);
    }

    /// What follows a convolution forward.
    fn after(&mut self, plane: Plane, y: BufferId, after: After) {
        match after {
            After::Nothing => {}
            After::Statistics {
                norm,
                state,
                partials,
            } => {
                let (rows, channels) = (self.rows(plane), plane.c);
                let args = vec![self.buffer(y), self.buffer(partials)];
                self.over_rows("stats", plane, 1, args);
                let spec = &self.graph.norms()[norm.0];
                let sums = self.layout.running(norm) * size_of::<f64>();
                let args = vec![
                    self.buffer(partials),
                    Arg::int(self.caps.blocks(rows, channels)),
                    self.buffer(y),
                    Arg::int(rows),
                    Arg::int(channels),
                    self.master(spec.weight),
                    self.master(spec.bias),
                    self.buffer(state),
                    Arg::address(self.places.sums + sums as Address),
                    Arg::int(self.layout.channels),
                    Arg::float(NORM_EPSILON),
                    Arg::int(usize::from(self.add)),
                ];
                self.launch("stats_finish", channels.div_ceil(8), args);
            }
            After::Folded {
                shift,
                residual,
                relu,
            } => {
                let mut args = vec![self.buffer(y), Arg::address(0), self.buffer(shift)];
                args.extend(residual.map(|r| self.buffer(r)));
                args.extend([Arg::int(usize::from(relu)), self.buffer(y)]);
                let name = match residual {
                    Some(_) => "apply_add",
                    None => "apply",
                };
                self.over_rows(name, plane, 2 + usize::from(residual.is_some()), args);
            }
        }
    }

    /// The gradient from `source` becomes that of the value.
    fn close(
        &mut self,
        plane: Plane,
        source: Source,
        dx: BufferId,
        close: Close,
        partials: BufferId,
    ) {
        match close {
            Close::Open { add: None } if matches!(source, Source::Stored(_)) => {}
            Close::Lazy { normed, relu } => {
                let Source::Stored(mut args) = source else {
                    unreachable!("only convolutions and max-pools read lazily")
                };
                args.extend([
                    self.buffer(normed.z),
                    self.buffer(normed.state),
                    Arg::int(usize::from(relu)),
                    self.buffer(partials),
                ]);
                self.over_rows("close_lazy", plane, 2, args);
                self.finish(plane, normed, partials, 1, 2);
            }
            Close::Open { add } => self.closes(plane, source, add, None, [None; 2], dx, partials),
            Close::Stored {
                add: None,
                y: None,
                normed: [None, None],
            } if matches!(source, Source::Stored(_)) => {} // what the convolution has stored is the gradient
            Close::Stored { add, y, normed } => {
                self.closes(plane, source, add, y, normed, dx, partials);
                let count = normed.iter().flatten().count();
                for (i, normed) in normed.into_iter().flatten().enumerate() {
                    self.finish(plane, normed, partials, 1 + i, 1 + count);
                }
            }
        }
    }

    fn closes(
        &mut self,
        plane: Plane,
        source: Source,
        add: Option<BufferId>,
        y: Option<BufferId>,
        normed: [Option<Normed>; 2],
        dx: BufferId,
        partials: BufferId,
    ) {
        let none = Arg::address(0);
        let norms: Vec<Normed> = normed.into_iter().flatten().collect();
        let takes_more = !matches!(source, Source::Spread(_));
        let (mut args, names) = match source {
            Source::Stored(args) => (args, ["close_0", "close_1", "close_2"]),
            Source::Spread(args) => {
                let names = ["close_0_spread", "close_1_spread", "close_2_spread"];
                (args, names)
            }
            Source::Rest(args) => (args, ["close_0_rest", "close_1_rest", "close_2_rest"]),
            Source::Half(args) => (args, ["close_0_half", "close_1_half", "close_2_half"]),
        };
        if takes_more {
            args.push(add.map_or(none, |a| self.buffer(a)));
        }
        args.push(y.map_or(none, |y| self.buffer(y)));
        for i in 0..2 {
            match norms.get(i) {
                Some(n) => {
                    let mean = self.row(n.state, MEAN_ROW, plane.c);
                    args.extend([self.buffer(n.z), mean]);
                }
                None => args.extend([none, none]),
            }
        }
        args.extend([self.buffer(dx), self.buffer(partials)]);
        let given = usize::from(names[0] == "close_0") + usize::from(add.is_some());
        let tensors = 1 + given + usize::from(y.is_some()) + norms.len();
        self.over_rows(names[norms.len()], plane, tensors, args);
    }

    /// From the sums of a close to the constants of a normalisation's gradient.
    fn finish(
        &mut self,
        plane: Plane,
        normed: Normed,
        partials: BufferId,
        which: usize,
        count: usize,
    ) {
        let (rows, channels) = (self.rows(plane), plane.c);
        let spec = &self.graph.norms()[normed.norm.0];
        let args = vec![
            self.buffer(partials),
            Arg::int(self.caps.blocks(rows, channels)),
            Arg::int(which),
            Arg::int(count),
            Arg::int(rows),
            Arg::int(channels),
            self.buffer(normed.state),
            Arg::address(self.fresh(spec.weight)),
            Arg::address(self.fresh(spec.bias)),
        ];
        self.launch("close_finish", channels.div_ceil(8), args);
        self.completes(spec.weight);
        self.completes(spec.bias);
    }

    /// c = a b + bias: a is m x k and b k x n, with (row, column) strides.
    fn matmul(
        &mut self,
        (a, a_m, a_k): (Arg, usize, usize),
        (b, b_k, b_n): (Arg, usize, usize),
        bias: Arg,
        c: Arg,
        m: usize,
        n: usize,
        k: usize,
    ) {
        let args = vec![
            a,
            Arg::int(a_m),
            Arg::int(a_k),
            b,
            Arg::int(b_k),
            Arg::int(b_n),
            bias,
            c,
            Arg::int(m),
            Arg::int(n),
            Arg::int(k),
        ];
        self.calls.push(Call::Launch {
            name: "matmul",
            grid: (n.div_ceil(64) as u32, m.div_ceil(64) as u32),
            args,
            bytes: (m * k + k * n + m * n) * size_of::<f32>(),
        });
    }
}

/// Where a gradient comes from, and its arguments.
enum Source {
    Stored(Vec<Arg>),
    Spread(Vec<Arg>),
    /// What squares have left.
    Rest(Vec<Arg>),
    /// Means of 2 by 2.
    Half(Vec<Arg>),
}

/// The kernels' Halves of a plane, and its plane of means.
fn halves(plane: Plane) -> (Arg, Plane) {
    let halved = Plane {
        h: plane.h.div_ceil(2),
        w: plane.w.div_ceil(2),
        c: plane.c,
    };
    (Arg::ints(&[plane.h, plane.w, halved.h, halved.w]), halved)
}

/// The kernels' Window.
fn sizes(w: &Window) -> Arg {
    assert_eq!((w.kernel, w.stride), (3, 2), "the window of every ResNet");
    Arg::ints(&[w.input.h, w.input.w, w.output.h, w.output.w, w.pad_before])
}

/// Whether sizes fit the kernels' integers.
pub(crate) fn fits(graph: &Graph, batch: usize) -> bool {
    let most = graph.nodes().iter().map(|n| n.plane.pixels()).max();
    most.unwrap_or(0)
        .checked_mul(batch)
        .is_some_and(|rows| rows < 1 << 30)
}

/// Convolutions of a program's calls, each once.
pub(crate) fn convs(calls: &Calls) -> Vec<(Conv, Tensors)> {
    let mut found: Vec<(Conv, Tensors)> = vec![];
    for call in calls.body.iter().flatten() {
        if let Call::Conv { conv, at } = call
            && !found.iter().any(|(c, _)| c == conv)
        {
            found.push((*conv, *at));
        }
    }
    found
}

//! Where a spec meets its network and its engine.

use std::path::PathBuf;

use engine::cpu::{Cpu, Level, Memory, Options, Precision};
use engine::cuda::{self, Card, Cuda, Ranks};
use engine::{Cache, Engine, State};
use graph::{Graph, Op};
use spec::{Device, Run};

use crate::doctor;
use crate::failure::Failure;
use crate::plan;

/// The network that a spec describes.
pub(crate) fn network(run: &Run) -> Graph {
    let recipe = match run.model.recipe {
        spec::Recipe::Tpu2018 => nn::Recipe::Tpu2018,
        spec::Recipe::Torchvision => nn::Recipe::Torchvision,
    };
    let stem = nn::Stem {
        is_deep: run.model.stem == spec::Stem::Deep,
        has_conv_pool: run.model.stem_pool == spec::StemPool::Conv,
    };
    let blocks = nn::Blocks {
        has_mean_shortcut: run.model.shortcut == spec::Shortcut::Mean,
        squeeze: Some(run.model.se_ratio).filter(|ratio| *ratio > 0.0),
        are_dropped: run.model.drop_connect > 0.0,
        squares: (run.model.drop_block > 0.0).then(|| nn::Squares {
            side: run.model.drop_block_size,
            groups: [1, 2, 3, 4].map(|group| run.model.drop_block_groups.contains(&group)),
        }),
    };
    nn::resnet_with(
        nn::Variant { stem, blocks },
        run.model.depth,
        run.model.resolution,
        run.model.classes,
        recipe,
    )
    .expect("a checked spec names a depth and a resolution that are compiled in")
}

/// Threads that compute: what the spec says, or all cores.
pub(crate) fn threads(run: &Run) -> usize {
    match run.train.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    }
}

/// What a run computes on.
enum Target {
    /// The CPU.
    Cpu,
    /// One card or several, together.
    Cuda(Vec<Card>),
}

/// What the spec's device is on this machine. `auto` is the first card if it and its libraries can be used; where
/// there is a driver and yet they cannot, the text says why.
fn target(run: &Run) -> Result<(Target, Option<String>), Failure> {
    let named = |ordinals: Option<&[usize]>| match cuda::probe_all(ordinals) {
        Ok(cards) => Ok((Target::Cuda(cards), None)),
        Err(e) => Err(Failure::Run(format!("train.device: {e}"))),
    };
    match run.train.device {
        Device::Cpu => Ok((Target::Cpu, None)),
        Device::Cuda(ordinal) => named(Some(&[ordinal])),
        Device::Cards(cards) => named(Some(&cards.numbers().collect::<Vec<_>>())),
        Device::AllCards => named(None),
        Device::Auto if cuda::libraries().driver.is_none() => Ok((Target::Cpu, None)),
        Device::Auto => match cuda::probe(0) {
            Ok(card) => Ok((Target::Cuda(vec![card]), None)),
            Err(e) => {
                let why = format!("train.device = \"auto\" takes the CPU: {e}");
                Ok((Target::Cpu, Some(why)))
            }
        },
    }
}

/// Whether the device that the spec names is there and knows its number format, and on the CPU whether memory will do
/// for training.
pub(crate) fn check(run: &Run, graph: &Graph) -> Result<(), Failure> {
    match target(run)? {
        (Target::Cpu, _) => {
            check_precision(run)?;
            let input = plan::batches_in_flight(run, run.train.batch_size);
            check_memory(run, graph, input)
        }
        (Target::Cuda(cards), _) => {
            let card = &cards[0];
            check_deal(run, cards.len())?;
            let least = cards.iter().min_by_key(|card| card.memory).unwrap_or(card);
            let memory = cuda_memory(run, graph, least, cards.len());
            if memory.total() <= least.memory {
                return Ok(());
            }
            let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
            Err(Failure::Run(format!(
                "train.bn_batch = {}: the engine needs {:.1} GiB, {least} has {:.1} GiB\n\
                 hint: a smaller train.bn_batch needs less; runner plan says what takes how much",
                run.train.bn_batch(),
                gib(memory.total()),
                gib(least.memory),
            )))
        }
    }
}

/// Memory of each of `ranks` cards like `card`.
pub(crate) fn cuda_memory(run: &Run, graph: &Graph, card: &Card, ranks: usize) -> cuda::Memory {
    let options = cuda_options(run, card);
    cuda::Memory::plan_rank(graph, &options, card, run.train.batch_size, ranks)
}

/// Says that a batch cannot be dealt to so many cards, and how it could.
fn check_deal(run: &Run, ranks: usize) -> Result<(), Failure> {
    let (batch, micro) = (run.train.batch_size, run.train.bn_batch());
    if batch.is_multiple_of(micro * ranks) {
        return Ok(());
    }
    let hint = match (1..=micro).rev().find(|n| batch.is_multiple_of(n * ranks)) {
        Some(n) if n > 1 => format!("train.bn_batch = {n} does"),
        _ => format!(
            "train.batch_size = {} does",
            batch.next_multiple_of(micro * ranks)
        ),
    };
    Err(Failure::Spec(format!(
        "train.device: {ranks} cards cannot share train.batch_size = {batch} in micro-batches of train.bn_batch = {micro}: \
         it is no multiple of {}\nhint: {hint}",
        micro * ranks
    )))
}

/// The engine that a spec asks for, with `state`, or with initial values where there is none.
pub(crate) fn engine(
    run: &Run,
    graph: &Graph,
    state: Option<State>,
) -> Result<Box<dyn Engine>, Failure> {
    let state = state.unwrap_or_else(|| engine::initial_state(graph, run.seed));
    let (target, why) = target(run)?;
    if let Some(why) = why {
        eprintln!("{why}");
    }
    match target {
        Target::Cpu => Ok(Box::new(cpu(run, graph, &state)?)),
        Target::Cuda(cards) => {
            let options = cuda_options(run, &cards[0]);
            let ordinals: Vec<usize> = cards.iter().map(|card| card.ordinal).collect();
            Ok(match ordinals.len() {
                1 => Box::new(Cuda::new(graph, &options, &state, cache())?),
                _ => Box::new(Ranks::new(graph, &ordinals, &options, &state, cache())?),
            })
        }
    }
}

/// The cards that a run would use, and whether they are there; those that are named and not there count as H100s.
pub(crate) fn cards(run: &Run) -> Option<(Vec<Card>, bool)> {
    let here = cuda::cards().unwrap_or_default();
    let named: Vec<usize> = match (run.train.device, target(run)) {
        (_, Ok((Target::Cuda(cards), _))) => return Some((cards, true)),
        (Device::Cuda(ordinal), Err(_)) => vec![ordinal],
        (Device::Cards(cards), Err(_)) => cards.numbers().collect(),
        (Device::AllCards, Err(_)) => (0..here.len().max(1)).collect(),
        _ => return None,
    };
    // Cards may be there that cannot be used as they are.
    let found = named.iter().map(|ordinal| here.get(*ordinal).cloned());
    if let Some(cards) = found.collect() {
        return Some((cards, true));
    }
    let card = |ordinal| Card {
        ordinal,
        name: "not on this machine".into(),
        memory: 80 << 30,
        capability: (9, 0),
        multiprocessors: 132,
    };
    Some((named.into_iter().map(card).collect(), false))
}

pub(crate) fn cuda_options(run: &Run, card: &Card) -> cuda::Options {
    let precision = match run.train.precision {
        spec::Precision::F32 => cuda::Precision::F32,
        spec::Precision::Tf32 => cuda::Precision::Tf32,
        spec::Precision::Bf16 => cuda::Precision::Bf16,
        spec::Precision::F16 => cuda::Precision::F16,
    };
    cuda::Options {
        convolutions: match run.train.convolutions {
            spec::Convolutions::Fastest => cuda::Convolutions::Fastest,
            spec::Convolutions::Cudnn => cuda::Convolutions::Cudnn,
            spec::Convolutions::Own => cuda::Convolutions::Own,
        },
        average: run.ema.half_life.is_some(),
        ..cuda::Options::new(card.ordinal, run.train.bn_batch(), precision)
    }
}

/// Files in the user's cache, each beside the program's version of it in the name that the engine gives; nothing is
/// kept where there is no home, or it cannot be written.
struct Files(PathBuf);

impl Cache for Files {
    fn get(&self, name: &str) -> Option<Vec<u8>> {
        std::fs::read(self.0.join(name)).ok()
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        // What is not kept is made again.
        let _ = std::fs::create_dir_all(&self.0)
            .map_err(|_| ())
            .and_then(|()| store::write_atomic(&self.0.join(name), &[bytes]).map_err(|_| ()));
    }

    fn put_first(&self, name: &str, bytes: &[u8]) {
        // Another process may look for the same. A link to a whole file is made only where there is none.
        let mine = format!("{name}.{}", std::process::id());
        self.put(&mine, bytes);
        let mine = self.0.join(mine);
        let to = self.0.join(name);
        let linked = std::fs::hard_link(&mine, &to);
        let _ = std::fs::remove_file(mine);
        // Where there are no links, as near as can be had.
        if linked.is_err() && !to.exists() {
            self.put(name, bytes);
        }
    }
}

/// `$XDG_CACHE_HOME/runner`, or `~/.cache/runner`.
pub(crate) fn cache() -> Box<dyn Cache> {
    let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty());
    let base = variable("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")));
    match base {
        Some(base) => Box::new(Files(base.join("runner"))),
        None => Box::new(engine::NoCache),
    }
}

fn cpu(run: &Run, graph: &Graph, state: &State) -> Result<Cpu, Failure> {
    check_precision(run)?;
    let options = options(run);
    if !options.level.is_available() {
        let (level, best) = (options.level, Level::detect());
        return Err(Failure::Spec(format!(
            "train.instructions: this CPU has no {level} instructions\nhint: \"auto\" takes the best there is, {best} here"
        )));
    }
    check_memory(run, graph, 0)?;
    Ok(Cpu::new(graph, &options, state)?)
}

/// The CPU engine does not know every number format.
fn check_precision(run: &Run) -> Result<(), Failure> {
    let name = match run.train.precision {
        spec::Precision::F32 | spec::Precision::Bf16 => return Ok(()),
        spec::Precision::F16 => "f16",
        spec::Precision::Tf32 => "tf32",
    };
    Err(Failure::Spec(format!(
        "train.precision = {name:?} needs a card, and this run computes on the CPU\n\
         hint: \"f32\" and \"bf16\" run on both; runner doctor says what a card lacks"
    )))
}

/// Says before anything is allocated that memory will not do for the engine and `besides` bytes, and what would.
fn check_memory(run: &Run, graph: &Graph, besides: usize) -> Result<(), Failure> {
    let needed = Memory::plan(graph, &options(run)).total() + besides;
    let Some(available) = doctor::memory_available().filter(|a| *a < needed as u64) else {
        return Ok(());
    };
    let fitting = largest_bn_batch(run, graph, |bytes| (bytes + besides) as u64 <= available);
    let hint = match fitting {
        Some(n) => format!("train.bn_batch = {n} would fit"),
        None => {
            "no train.bn_batch would fit; a smaller model.resolution or train.batch_size needs less"
                .into()
        }
    };
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    Err(Failure::Run(format!(
        "train.bn_batch = {}: the engine and its input need {:.1} GiB of memory, {:.1} GiB are available\nhint: {hint}; runner plan says what takes how much",
        run.train.bn_batch(),
        gib(needed as u64),
        gib(available),
    )))
}

/// The largest `train.bn_batch` that divides the batch and whose engine fits.
pub(crate) fn largest_bn_batch(
    run: &Run,
    graph: &Graph,
    fits: impl Fn(usize) -> bool,
) -> Option<usize> {
    let batch_size = run.train.batch_size;
    let divisors = (1..=batch_size.min(1024)).rev();
    let divisors = divisors.filter(|n| batch_size.is_multiple_of(*n));
    let engine = |micro_batch| {
        let options = Options {
            micro_batch,
            ..options(run)
        };
        Memory::plan(graph, &options).total()
    };
    divisors.into_iter().find(|&n| fits(engine(n)))
}

/// How the engine runs what a spec asks for.
pub(crate) fn options(run: &Run) -> Options {
    Options {
        precision: match run.train.precision {
            spec::Precision::F32 => Precision::F32,
            spec::Precision::Bf16 => Precision::Bf16,
            // Refused before an engine is made; what `plan` costs is that of the nearest.
            spec::Precision::F16 => Precision::Bf16,
            spec::Precision::Tf32 => Precision::F32,
        },
        level: match run.train.instructions {
            spec::Instructions::Auto => Level::detect(),
            spec::Instructions::Portable => Level::Portable,
            spec::Instructions::Avx2 => Level::Avx2,
            spec::Instructions::Avx512 => Level::Avx512,
            spec::Instructions::Avx512Bf16 => Level::Avx512Bf16,
            spec::Instructions::Amx => Level::Amx,
        },
        winograd: run.train.winograd,
        average: run.ema.half_life.is_some(),
        ..Options::new(run.train.bn_batch(), threads(run))
    }
}

/// `resnet50 (tpu2018), 224 px, 1000 classes`.
pub(crate) fn title(run: &Run) -> String {
    let recipe = match run.model.recipe {
        spec::Recipe::Tpu2018 => "tpu2018",
        spec::Recipe::Torchvision => "torchvision",
    };
    let m = &run.model;
    format!(
        "resnet{} ({recipe}), {} px, {} classes",
        m.depth, m.resolution, m.classes
    )
}

/// Names of the classes, from the file that the spec names.
pub(crate) fn labels(run: &Run) -> Result<Option<Vec<String>>, Failure> {
    let Some(path) = &run.model.labels else {
        return Ok(None);
    };
    let text = std::fs::read_to_string(path).map_err(|e| {
        Failure::Spec(format!(
            "{path}: cannot read the labels: {e}\nhint: model.labels names a text file"
        ))
    })?;
    let labels: Vec<String> = text.lines().map(str::to_owned).collect();
    if labels.len() == run.model.classes {
        return Ok(Some(labels));
    }
    let (found, classes) = (labels.len(), run.model.classes);
    Err(Failure::Spec(format!(
        "{path}: {found} labels, but model.classes is {classes}\nhint: one line for each class, in the order of the classes"
    )))
}

/// The graph as TensorBoard shows it.
pub(crate) fn nodes(graph: &Graph) -> Vec<track::GraphNode> {
    let named = |i: usize| {
        let name = &graph.nodes()[i].name;
        // Names of parameters are unique; an operation without any may share its name.
        let is_first = graph.nodes()[..i].iter().all(|node| node.name != *name);
        match (name.as_str(), is_first) {
            ("", _) => format!("node{i}"),
            (name, true) => name.to_string(),
            (name, false) => format!("{name}_{i}"),
        }
    };
    let names: Vec<String> = (0..graph.nodes().len()).map(named).collect();
    let node = |(i, node): (usize, &graph::Node)| {
        let plane = node.plane;
        let op = match node.op {
            Op::Input => "Placeholder",
            Op::Conv { .. } => "Conv2D",
            Op::BatchNorm { .. } => "BatchNorm",
            Op::Relu => "Relu",
            Op::Add => "Add",
            Op::MaxPool { .. } => "MaxPool",
            Op::AvgPool | Op::HalfPool => "AvgPool",
            Op::SqueezeExcite { .. } => "SqueezeExcite",
            Op::DropPath(_) | Op::DropBlock(_) => "Dropout",
            Op::Linear { .. } => "MatMul",
        };
        track::GraphNode {
            name: names[i].clone(),
            op: op.into(),
            inputs: node.inputs.iter().map(|id| names[id.0].clone()).collect(),
            shape: [plane.h, plane.w, plane.c].map(|n| n as u64).to_vec(),
        }
    };
    graph.nodes().iter().enumerate().map(node).collect()
}

#[cfg(test)]
mod tests {
    fn is_accepted(key: &str, value: usize) -> bool {
        let text = "name = \"t\"\ndata.source = \"fake\"";
        spec::parse(text, "t.toml", &[format!("{key}={value}")]).is_ok()
    }

    #[test]
    fn a_batch_is_dealt_to_cards() {
        let say = |sets: &[&str], ranks: usize| {
            let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
            let text = "name = \"t\"\ndata.source = \"fake\"";
            let run = spec::parse(text, "t.toml", &sets).unwrap_or_else(|e| panic!("{e}"));
            super::check_deal(&run, ranks).err().map(|e| e.to_string())
        };
        let of = ["train.batch_size=256", "train.bn_batch=128"];
        assert_eq!(say(&of, 2), None);
        assert_eq!(
            say(&of, 4).unwrap(),
            "train.device: 4 cards cannot share train.batch_size = 256 in micro-batches of train.bn_batch = 128: it is no \
             multiple of 512\nhint: train.bn_batch = 64 does"
        );
        assert_eq!(
            say(&of, 3).unwrap(),
            "train.device: 3 cards cannot share train.batch_size = 256 in micro-batches of train.bn_batch = 128: it is no \
             multiple of 384\nhint: train.batch_size = 384 does"
        );
    }

    /// The spec may not know `nn`, so it has its own list.
    #[test]
    fn the_spec_accepts_what_is_compiled_in() {
        for depth in 1..=420 {
            assert_eq!(
                is_accepted("model.depth", depth),
                nn::DEPTHS.contains(&depth),
                "depth {depth}"
            );
        }
        for resolution in 1..=512 {
            let compiled_in = nn::RESOLUTIONS.contains(&resolution);
            assert_eq!(
                is_accepted("model.resolution", resolution),
                compiled_in,
                "{resolution} px"
            );
        }
    }
}

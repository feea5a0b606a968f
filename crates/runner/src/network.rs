//! Where a spec meets its network and its engine.

use engine::State;
use engine::cpu::{Cpu, Level, Memory, Options, Precision};
use graph::{Graph, Op};
use spec::Run;

use crate::doctor;
use crate::failure::Failure;

/// The network that a spec describes.
pub(crate) fn network(run: &Run) -> Graph {
    let recipe = match run.model.recipe {
        spec::Recipe::Tpu2018 => nn::Recipe::Tpu2018,
        spec::Recipe::Torchvision => nn::Recipe::Torchvision,
    };
    nn::resnet(
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

/// The engine that a spec asks for, with `state`, or with initial values where there is none.
pub(crate) fn engine(run: &Run, graph: &Graph, state: Option<State>) -> Result<Cpu, Failure> {
    let state = state.unwrap_or_else(|| engine::initial_state(graph, run.seed));
    let options = options(run);
    if !options.level.is_available() {
        let (level, best) = (options.level, Level::detect());
        return Err(Failure::Spec(format!(
            "train.instructions: this CPU has no {level} instructions\nhint: \"auto\" takes the best there is, {best} here"
        )));
    }
    check_memory(run, graph, Memory::plan(graph, &options).total())?;
    Ok(Cpu::new(graph, &options, &state)?)
}

/// Says before anything is allocated that memory will not do, and what would.
fn check_memory(run: &Run, graph: &Graph, needed: usize) -> Result<(), Failure> {
    let Some(available) = doctor::memory_available().filter(|a| *a < needed as u64) else {
        return Ok(());
    };
    let fitting = largest_bn_batch(run, graph, |bytes| bytes as u64 <= available);
    let hint = match fitting {
        Some(n) => format!("train.bn_batch = {n} would fit"),
        None => "no train.bn_batch would fit; a smaller model.resolution needs less".into(),
    };
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    Err(Failure::Run(format!(
        "train.bn_batch = {}: the engine needs {:.1} GiB of memory, {:.1} GiB are available\nhint: {hint}; runner plan says what takes how much",
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
        },
        level: match run.train.instructions {
            spec::Instructions::Auto => Level::detect(),
            spec::Instructions::Portable => Level::Portable,
            spec::Instructions::Avx2 => Level::Avx2,
            spec::Instructions::Avx512 => Level::Avx512,
            spec::Instructions::Avx512Bf16 => Level::Avx512Bf16,
        },
        winograd: run.train.winograd,
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
            Op::AvgPool => "AvgPool",
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

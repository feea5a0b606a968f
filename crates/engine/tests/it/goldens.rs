//! The engines on whole networks against PyTorch in float64; ../goldens/torch_goldens.py says what the files hold.

use std::collections::HashMap;

use engine::cpu::Cpu;
use engine::oracle::Oracle;
use engine::{
    Batch, Decay, Engine, Hyper, MOMENTUM_PREFIX, Pixels, RUNNING_MEAN, RUNNING_VAR, State,
    initial_state,
};
use graph::{Graph, Init, Plane};
use safetensors::SafeTensors;

/// The seed of every golden.
const SEED: u64 = 1;
/// Samples of a tensor.
const SAMPLES: usize = 64;

/// A file of ../goldens.
struct Golden {
    metadata: HashMap<String, String>,
    arrays: HashMap<String, Vec<u8>>,
}

impl Golden {
    fn read(name: &str) -> Self {
        let path = format!(
            "{}/tests/goldens/{name}.safetensors",
            env!("CARGO_MANIFEST_DIR")
        );
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let arrays = SafeTensors::deserialize(&bytes).unwrap();
        Self {
            metadata: header.metadata().clone().unwrap(),
            arrays: arrays
                .iter()
                .map(|(key, array)| (key.into(), array.data().to_vec()))
                .collect(),
        }
    }

    fn array<T, const W: usize>(&self, key: &str, from: fn([u8; W]) -> T) -> Vec<T> {
        let values = self.arrays[key].chunks_exact(W);
        values.map(|v| from(v.try_into().unwrap())).collect()
    }

    fn number(&self, key: &str) -> usize {
        self.metadata[key].parse().unwrap()
    }

    fn graph(&self) -> Graph {
        let recipe = match self.metadata["recipe"].as_str() {
            "torchvision" => nn::Recipe::Torchvision,
            _ => nn::Recipe::Tpu2018,
        };
        let [depth, resolution, classes] =
            ["depth", "resolution", "classes"].map(|key| self.number(key));
        nn::resnet(depth, resolution, classes, recipe).unwrap()
    }

    /// Names of the tensors.
    fn names(&self) -> impl Iterator<Item = &str> {
        self.metadata["names"].lines()
    }
}

/// `n` values of each of the streams `name.weight` and `name.bias`, uniform within `bound` of 0. The generator serves
/// networks, so this is the start of one that has nothing but a classifier.
fn draw(name: &str, n: usize, bound: f64) -> [Vec<f32>; 2] {
    let mut graph = Graph::new(Plane { h: 1, w: 1, c: 1 });
    let (input, init) = (graph.input(), Init::Uniform { bound });
    graph.linear(name, input, n, init, init);
    let state = initial_state(&graph, SEED);
    ["weight", "bias"].map(|leaf| state[&format!("{name}.{leaf}")].values.clone())
}

/// `n` integers below `count`.
fn levels(name: &str, n: usize, count: usize) -> Vec<u32> {
    let [values, _] = draw(name, n, 1.0);
    let level = |v: f32| ((v + 1.0) * (count as f32 / 2.0)) as u32;
    values
        .into_iter()
        .map(|v| level(v).min(count as u32 - 1))
        .collect()
}

/// Images and labels.
struct Inputs {
    pixels: Vec<u8>,
    labels: Vec<u32>,
}

impl Inputs {
    fn new(graph: &Graph, images: usize) -> Self {
        let values = images * graph.plane(graph.input()).elements();
        let pixels = levels("images", values, 256);
        Self {
            pixels: pixels.into_iter().map(|v| v as u8).collect(),
            labels: levels("labels", images, graph.classes()),
        }
    }

    fn batch(&self) -> Batch<'_> {
        Batch {
            pixels: Pixels::U8(&self.pixels),
            labels: &self.labels,
        }
    }
}

/// As torch_goldens.py's `checksum`.
fn checksum(bits: impl Iterator<Item = u32>) -> u64 {
    let odd = (0..).map(|i: u64| 2 * i + 1);
    bits.zip(odd).fold(0, |sum, (bits, odd)| {
        sum.wrapping_add(u64::from(bits).wrapping_mul(odd))
    })
}

/// The network's start with normalisations that have something to say.
fn start(graph: &Graph) -> State {
    let mut state = initial_state(graph, SEED);
    let mut set = |name: String, values: Vec<f32>| state.get_mut(&name).unwrap().values = values;
    let above_one = |values: Vec<f32>| values.into_iter().map(|v| v + 1.0).collect();
    for norm in graph.norms() {
        let [gamma, beta] = draw(&norm.name, norm.channels, 0.5);
        set(format!("{}.weight", norm.name), above_one(gamma));
        set(format!("{}.bias", norm.name), beta);
        let [var, mean] = draw(&format!("{}.running", norm.name), norm.channels, 0.5);
        set(format!("{}{RUNNING_VAR}", norm.name), above_one(var));
        set(format!("{}{RUNNING_MEAN}", norm.name), mean);
    }
    state
}

/// Network, start and inputs, the same as PyTorch's to the bit.
fn begin(golden: &Golden) -> (Graph, State, Inputs) {
    let graph = golden.graph();
    let state = start(&graph);
    let sums = golden.array("start", u64::from_le_bytes);
    for (name, sum) in golden.names().zip(sums) {
        let bits = state[name].values.iter().map(|v| v.to_bits());
        assert_eq!(checksum(bits), sum, "{name} starts differently");
    }
    assert_eq!(golden.names().count(), state.len());
    let inputs = Inputs::new(&graph, golden.number("images"));
    let sums = [
        checksum(inputs.pixels.iter().map(|&v| v.into())),
        checksum(inputs.labels.iter().copied()),
    ];
    assert_eq!(golden.array("inputs", u64::from_le_bytes), sums);
    (graph, state, inputs)
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|v| v * v).sum::<f64>().sqrt()
}

/// Relative error of a whole array.
fn error(ours: &[f32], truth: &[f32]) -> f64 {
    assert_eq!(ours.len(), truth.len());
    let gap = ours
        .iter()
        .zip(truth)
        .map(|(a, b)| f64::from(*a) - f64::from(*b));
    norm(gap) / norm(truth.iter().map(|&v| v.into()))
}

/// Relative error of a tensor, from its norm and from its samples: they lie where torch_goldens.py's `positions` are.
fn sampled_error(ours: &[f32], size: f64, samples: &[f32]) -> f64 {
    let n = ours.len() as u64;
    let fraction = |s: u64| s.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let gaps = (0..)
        .zip(samples)
        .map(|(s, truth)| f64::from(ours[((fraction(s) * n) >> 32) as usize]) - f64::from(*truth));
    let mean_square = |sum: f64, n: usize| sum / (n as f64).sqrt();
    let by_samples = mean_square(norm(gaps), samples.len()) / mean_square(size, ours.len());
    let by_norm = (norm(ours.iter().map(|&v| v.into())) / size - 1.0).abs();
    by_samples.max(by_norm)
}

/// What an engine may be off by, given PyTorch's own error in float32.
type Bound = fn(f64) -> f64;

/// The same arithmetic in another order.
const ROUNDING: Bound = |yardstick| f64::max(3.0 * yardstick, 1e-5);
/// f64, stored as f32 here and there.
const EXACT: Bound = |_| 1e-6;

/// Collects errors, and in the end fails with the worst.
struct Verdict<'a> {
    golden: &'a str,
    bound: Bound,
    /// Share of the bound, error, what.
    seen: Vec<(f64, f64, String)>,
}

impl Verdict<'_> {
    fn see(&mut self, what: &str, error: f64, yardstick: f64) {
        let share = error / (self.bound)(yardstick);
        self.seen
            .push((share, error, format!("{what} (yardstick {yardstick:.1e})")));
    }

    fn end(mut self) {
        self.seen.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (share, error, what) in self.seen.iter().take(5) {
            println!(
                "{}: {what} is off by {error:.1e}, {share:.2} of what is allowed",
                self.golden
            );
        }
        let (share, error, what) = &self.seen[0];
        assert!(
            share.total_cmp(&1.0).is_lt(),
            "{}: {what} is off by {error:.1e}, {share:.1} times what is allowed",
            self.golden
        );
    }
}

/// Builds an engine for micro-batches of this many images.
type Make = fn(&Graph, usize, &State) -> Box<dyn Engine>;

const CPU: Make = |graph, images, state| Box::new(Cpu::new(graph, images, 2, state).unwrap());
const ORACLE: Make = |graph, images, state| Box::new(Oracle::new(graph, images, state).unwrap());

/// Logits, and loss, gradients and statistics of one training step.
fn check_network(name: &str, make: Make, bound: Bound) {
    let golden = Golden::read(name);
    let (graph, state, inputs) = begin(&golden);
    let mut engine = make(&graph, golden.number("images"), &state);
    let yardsticks = golden.array("yardstick", f64::from_le_bytes);
    let mut verdict = Verdict {
        golden: name,
        bound,
        seen: vec![],
    };
    let logits = engine.predict(inputs.batch().pixels).unwrap();
    let truth = golden.array("logits", f32::from_le_bytes);
    verdict.see("logits", error(&logits, &truth), yardsticks[0]);
    // Without momentum and decay, what is kept as momentum is the gradient.
    let hyper = Hyper {
        lr: 0.0,
        momentum: 0.0,
        nesterov: false,
        weight_decay: 0.0,
        decay: Decay::NoNorm,
        label_smoothing: 0.1,
    };
    let metrics = engine.train_step(&inputs.batch(), &hyper).unwrap();
    let truth = golden.array("loss", f64::from_le_bytes)[0];
    verdict.see("loss", (metrics.loss() / truth - 1.0).abs(), yardsticks[1]);
    let (norms, samples) = (
        golden.array("norms", f64::from_le_bytes),
        golden.array("samples", f32::from_le_bytes),
    );
    let after = engine.state();
    for (i, tensor) in golden.names().enumerate() {
        let ours = after
            .get(&format!("{MOMENTUM_PREFIX}{tensor}"))
            .unwrap_or(&after[tensor]);
        let samples = &samples[i * SAMPLES..(i + 1) * SAMPLES];
        let error = sampled_error(&ours.values, norms[i], samples);
        verdict.see(tensor, error, yardsticks[2 + i]);
    }
    verdict.end();
}

#[test]
fn resnet18_64_torchvision_cpu() {
    check_network("resnet18-64-torchvision", CPU, ROUNDING);
}

#[test]
fn resnet18_64_torchvision_oracle() {
    check_network("resnet18-64-torchvision", ORACLE, EXACT);
}

#[test]
fn resnet18_64_tpu2018_cpu() {
    check_network("resnet18-64-tpu2018", CPU, ROUNDING);
}

#[test]
fn resnet18_64_tpu2018_oracle() {
    check_network("resnet18-64-tpu2018", ORACLE, EXACT);
}

#[test]
fn resnet50_64_torchvision_cpu() {
    check_network("resnet50-64-torchvision", CPU, ROUNDING);
}

#[test]
fn resnet50_64_tpu2018_cpu() {
    check_network("resnet50-64-tpu2018", CPU, ROUNDING);
}

#[test]
fn resnet50_224_torchvision_cpu() {
    check_network("resnet50-224-torchvision", CPU, ROUNDING);
}

#[test]
fn resnet50_224_tpu2018_cpu() {
    check_network("resnet50-224-tpu2018", CPU, ROUNDING);
}

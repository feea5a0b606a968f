//! The engines on whole networks against PyTorch in float64; ../goldens/torch_goldens.py says what the files hold.

use std::collections::HashMap;

use engine::cpu::{Cpu, Options, Precision};
use engine::oracle::Oracle;
use engine::{
    Batch, Decay, Engine, Hyper, MOMENTUM_PREFIX, Pixels, RUNNING_MEAN, RUNNING_VAR, Rule, State,
    initial_state,
};
use graph::{Graph, Init, Plane};
use safetensors::SafeTensors;

/// Samples of a tensor.
const SAMPLES: usize = 64;

const RESNET_RS: nn::Variant = nn::Variant {
    stem: nn::Stem {
        is_deep: true,
        has_conv_pool: true,
    },
    blocks: nn::Blocks {
        has_mean_shortcut: true,
        squeeze: Some(0.25),
        are_dropped: false,
        squares: None,
    },
};

/// A file of ../goldens.
struct Golden {
    metadata: HashMap<String, String>,
    arrays: HashMap<String, Vec<u8>>,
}

impl Golden {
    fn read(name: &str) -> Self {
        // Where the test was carried to another machine, it is told where they are.
        let folder = std::env::var("RUNNER_GOLDENS")
            .unwrap_or_else(|_| format!("{}/tests/goldens", env!("CARGO_MANIFEST_DIR")));
        let path = format!("{folder}/{name}.safetensors");
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
        let (recipe, variant) = match self.metadata["recipe"].as_str() {
            "torchvision" => (nn::Recipe::Torchvision, nn::Variant::default()),
            "rs" => (nn::Recipe::Torchvision, RESNET_RS),
            _ => (nn::Recipe::Tpu2018, nn::Variant::default()),
        };
        let [depth, resolution, classes] =
            ["depth", "resolution", "classes"].map(|key| self.number(key));
        nn::resnet_with(variant, depth, resolution, classes, recipe).unwrap()
    }

    /// Names of the tensors.
    fn names(&self) -> impl Iterator<Item = &str> {
        self.metadata["names"].lines()
    }
}

/// `n` values of each of the streams `name.weight` and `name.bias`, uniform within `bound` of 0. The generator serves
/// networks, so this is the start of one that has nothing but a classifier.
fn draw(seed: u64, name: &str, n: usize, bound: f64) -> [Vec<f32>; 2] {
    let mut graph = Graph::new(Plane { h: 1, w: 1, c: 1 });
    let (input, init) = (graph.input(), Init::Uniform { bound });
    graph.linear(name, input, n, init, init);
    let state = initial_state(&graph, seed);
    ["weight", "bias"].map(|leaf| state[&format!("{name}.{leaf}")].values.clone())
}

/// `n` integers below `count`.
fn levels(seed: u64, name: &str, n: usize, count: usize) -> Vec<u32> {
    let [values, _] = draw(seed, name, n, 1.0);
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
    fn new(graph: &Graph, images: usize, seed: u64) -> Self {
        let values = images * graph.plane(graph.input()).elements();
        let pixels = levels(seed, "images", values, 256);
        Self {
            pixels: pixels.into_iter().map(|v| v as u8).collect(),
            labels: levels(seed, "labels", images, graph.classes()),
        }
    }

    fn batch(&self) -> Batch<'_> {
        self.part(0, 1)
    }

    /// Part `index` of `count`.
    fn part(&self, index: usize, count: usize) -> Batch<'_> {
        let part = |len: usize| len / count * index..len / count * (index + 1);
        Batch {
            pixels: Pixels::U8(&self.pixels[part(self.pixels.len())]),
            labels: &self.labels[part(self.labels.len())],
            mixed: None,
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
fn start(graph: &Graph, seed: u64) -> State {
    let mut state = initial_state(graph, seed);
    let mut set = |name: String, values: Vec<f32>| state.get_mut(&name).unwrap().values = values;
    let above_one = |values: Vec<f32>| values.into_iter().map(|v| v + 1.0).collect();
    for norm in graph.norms() {
        let [gamma, beta] = draw(seed, &norm.name, norm.channels, 0.5);
        set(format!("{}.weight", norm.name), above_one(gamma));
        set(format!("{}.bias", norm.name), beta);
        let [var, mean] = draw(seed, &format!("{}.running", norm.name), norm.channels, 0.5);
        set(format!("{}{RUNNING_VAR}", norm.name), above_one(var));
        set(format!("{}{RUNNING_MEAN}", norm.name), mean);
    }
    state
}

/// Network, start and inputs, the same as PyTorch's to the bit.
fn begin(golden: &Golden) -> (Graph, State, Inputs) {
    let (graph, seed) = (golden.graph(), golden.number("seed") as u64);
    let state = start(&graph, seed);
    let sums = golden.array("start", u64::from_le_bytes);
    for (name, sum) in golden.names().zip(sums) {
        let bits = state[name].values.iter().map(|v| v.to_bits());
        assert_eq!(checksum(bits), sum, "{name} starts differently");
    }
    assert_eq!(golden.names().count(), state.len());
    let inputs = Inputs::new(&graph, golden.number("images"), seed);
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

/// Where samples of a tensor of `n` values lie: as torch_goldens.py's `positions`.
fn sample_positions(n: usize) -> impl Iterator<Item = usize> {
    let fraction = |s: u64| s.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    (0..).map(move |s| ((fraction(s) * n as u64) >> 32) as usize)
}

/// Relative error of a tensor, from its norm and from its samples.
fn sampled_error(ours: &[f32], size: f64, samples: &[f32]) -> f64 {
    let gaps = sample_positions(ours.len())
        .zip(samples)
        .map(|(at, truth)| f64::from(ours[at]) - f64::from(*truth));
    let root_mean_square = |norm: f64, n: usize| norm / (n as f64).sqrt();
    let by_samples =
        root_mean_square(norm(gaps), samples.len()) / root_mean_square(size, ours.len());
    let by_norm = (norm(ours.iter().map(|&v| v.into())) / size - 1.0).abs();
    assert!(by_norm.is_finite(), "a value is not finite");
    by_samples.max(by_norm)
}

/// What an engine may be off by, given PyTorch's own error in float32.
pub(crate) type Bound = fn(f64) -> f64;

/// The same arithmetic in another order. An error that jumps to 1e-3 or more in all layers before one, while those
/// behind it are good to 1e-5, is a ReLU that rounding has switched: not a wrong term.
pub(crate) const ROUNDING: Bound = |yardstick| f64::max(3.0 * yardstick, 1e-5);
/// The same with a ReLU switched: Winograd's rounding errors are about three times those of a direct sum, and the seeds
/// that keep all signs in PyTorch do not keep them all there. One switched sign of a million moves the gradients of
/// ResNet-18 before it by less than this; a wrong term moves them by 1e-1 or more.
pub(crate) const SWITCHED: Bound = |yardstick| f64::max(3.0 * yardstick, 2e-2);
/// f64, stored as f32 here and there.
const EXACT: Bound = |_| 1e-6;

/// Collects errors, and in the end fails with the worst.
struct Verdict {
    golden: &'static str,
    bound: Bound,
    /// Share of the bound, error, what.
    seen: Vec<(f64, f64, String)>,
}

impl Verdict {
    fn new(golden: &'static str, bound: Bound) -> Self {
        let seen = vec![];
        Self {
            golden,
            bound,
            seen,
        }
    }

    fn see(&mut self, what: &str, error: f64, yardstick: f64) {
        let share = error / (self.bound)(yardstick);
        assert!(share.is_finite(), "{what} is not finite");
        self.seen
            .push((share, error, format!("{what} (yardstick {yardstick:.1e})")));
    }

    fn end(mut self) {
        self.seen.sort_by(|a, b| b.0.total_cmp(&a.0));
        let say = |(share, error, what): &(f64, f64, String)| {
            format!("{what} is off by {error:.1e}, {share:.2} of what is allowed")
        };
        let worst: Vec<_> = self.seen.iter().take(5).map(say).collect();
        println!("{}:\n  {}", self.golden, worst.join("\n  "));
        assert!(self.seen[0].0 <= 1.0, "{}: {}", self.golden, worst[0]);
    }
}

/// Builds an engine for micro-batches of this many images.
pub(crate) type Make = fn(&Graph, usize, &State) -> Box<dyn Engine>;

const CPU: Make = |graph, images, state| {
    let options = Options {
        winograd: false,
        ..Options::new(images, 2)
    };
    Box::new(Cpu::new(graph, &options, state).unwrap())
};
const WINOGRAD: Make =
    |graph, images, state| Box::new(Cpu::new(graph, &Options::new(images, 2), state).unwrap());
const BF16: Make = |graph, images, state| {
    let options = Options {
        precision: Precision::Bf16,
        ..Options::new(images, 2)
    };
    Box::new(Cpu::new(graph, &options, state).unwrap())
};
const ORACLE: Make = |graph, images, state| Box::new(Oracle::new(graph, images, state).unwrap());

/// Without momentum and decay, what is kept as momentum is the gradient.
const LEARNS_NOTHING: Hyper = Hyper {
    rule: Rule::Sgd,
    lr: 0.0,
    momentum: 0.0,
    nesterov: false,
    weight_decay: 0.0,
    decay: Decay::NoNorm,
    label_smoothing: 0.1,
    clip_norm: None,
    average: None,
    dropout: None,
};

/// Logits, and loss, gradients and statistics of one training step.
pub(crate) fn check_network(name: &'static str, make: Make, bound: Bound) {
    let golden = Golden::read(name);
    let (graph, state, inputs) = begin(&golden);
    let mut engine = make(&graph, golden.number("images"), &state);
    let yardsticks = golden.array("yardstick", f64::from_le_bytes);
    let mut verdict = Verdict::new(name, bound);
    let logits = engine.predict(inputs.batch().pixels).unwrap();
    let truth = golden.array("logits", f32::from_le_bytes);
    verdict.see("logits", error(&logits, &truth), yardsticks[0]);
    let metrics = engine.train_step(&inputs.batch(), &LEARNS_NOTHING).unwrap();
    let truth = golden.array("loss", f64::from_le_bytes)[0];
    verdict.see("loss", (metrics.loss() / truth - 1.0).abs(), yardsticks[1]);
    let (norms, samples) = (
        golden.array("norms", f64::from_le_bytes),
        golden.array("samples", f32::from_le_bytes),
    );
    let after = engine.state().unwrap();
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

/// The first steps with warm-up, Nesterov momentum and decay on batches in turn, loss by loss.
///
/// Where a rounding switches a ReLU the drift grows up to tenfold in a step, on any machine sooner or later. `lead` is by how
/// many steps we may be ahead of PyTorch in that: a step's yardstick is that of so many steps later.
fn check_steps(name: &'static str, make: Make, bound: Bound, steps: usize, lead: usize) {
    let golden = Golden::read(name);
    let (graph, state, inputs) = begin(&golden);
    let batches = golden.number("batches");
    let mut engine = make(&graph, golden.number("images") / batches, &state);
    let yardsticks = golden.array("yardstick", f64::from_le_bytes);
    let mut verdict = Verdict::new(name, bound);
    let [lrs, losses] = ["lr", "loss"].map(|key| golden.array(key, f64::from_le_bytes));
    for (step, (&lr, truth)) in lrs.iter().zip(losses).enumerate().take(steps) {
        let hyper = Hyper {
            rule: Rule::Sgd,
            lr,
            momentum: 0.9,
            nesterov: true,
            weight_decay: 0.1,
            decay: Decay::NoNorm,
            label_smoothing: 0.1,
            clip_norm: None,
            average: None,
            dropout: None,
        };
        let batch = inputs.part(step % batches, batches);
        let loss = engine.train_step(&batch, &hyper).unwrap().loss();
        let error = (loss / truth - 1.0).abs();
        let yardstick = yardsticks[(step + lead).min(yardsticks.len() - 1)];
        verdict.see(&format!("loss of step {step}"), error, yardstick);
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
fn resnet18_64_rs_oracle() {
    check_network("resnet18-64-rs", ORACLE, EXACT);
}

#[test]
fn resnet18_64_rs_winograd() {
    check_network("resnet18-64-rs", WINOGRAD, SWITCHED);
}

/// PyTorch's own error here is that of a switched ReLU; which ones switch depends on the level.
#[test]
fn resnet50_64_rs_cpu() {
    check_network("resnet50-64-rs", CPU, SWITCHED);
}

/// Where every batch switches some ReLU, in PyTorch too, Winograd stays within PyTorch's own errors.
#[test]
fn resnet50_64_torchvision_winograd() {
    check_network("resnet50-64-torchvision", WINOGRAD, ROUNDING);
}

#[test]
fn resnet50_64_tpu2018_winograd() {
    check_network("resnet50-64-tpu2018", WINOGRAD, ROUNDING);
}

#[test]
fn resnet50_224_torchvision_winograd() {
    check_network("resnet50-224-torchvision", WINOGRAD, ROUNDING);
}

#[test]
fn resnet50_224_tpu2018_winograd() {
    check_network("resnet50-224-tpu2018", WINOGRAD, ROUNDING);
}

#[test]
fn resnet18_64_torchvision_winograd() {
    check_network("resnet18-64-torchvision", WINOGRAD, SWITCHED);
}

#[test]
fn resnet18_64_tpu2018_winograd() {
    check_network("resnet18-64-tpu2018", WINOGRAD, SWITCHED);
}

fn check_bf16(name: &'static str) {
    check_half(name, BF16);
}

/// In 16 bits all tensors together are as near to float64 as PyTorch's autocast to bfloat16 is, within half as much again.
pub(crate) fn check_half(name: &'static str, make: Make) {
    let golden = Golden::read(name);
    let (graph, state, inputs) = begin(&golden);
    let mut engine = make(&graph, golden.number("images"), &state);
    let autocast = golden.array("autocast", f64::from_le_bytes);
    let mut verdict = Verdict::new(name, |yardstick| 1.5 * yardstick);
    let logits = engine.predict(inputs.batch().pixels).unwrap();
    let truth = golden.array("logits", f32::from_le_bytes);
    verdict.see("logits", error(&logits, &truth), autocast[0]);
    // In f16 a step whose gradients overflow is left out, and the next has a smaller loss scale.
    for skipped in 1..20 {
        engine.train_step(&inputs.batch(), &LEARNS_NOTHING).unwrap();
        if engine.skipped_steps().unwrap() < skipped {
            break;
        }
    }
    let after = engine.state().unwrap();
    let norms = golden.array("norms", f64::from_le_bytes);
    let samples = golden.array("samples", f32::from_le_bytes);
    let (mut gap, mut size) = (0.0, 0.0);
    for (i, tensor) in golden.names().enumerate() {
        let Some(ours) = after.get(&format!("{MOMENTUM_PREFIX}{tensor}")) else {
            continue;
        };
        let n = ours.values.len();
        let samples = &samples[i * SAMPLES..(i + 1) * SAMPLES];
        let gaps = sample_positions(n)
            .zip(samples)
            .map(|(at, truth)| f64::from(ours.values[at]) - f64::from(*truth));
        gap += norm(gaps).powi(2) * n as f64 / SAMPLES as f64;
        size += norms[i].powi(2);
    }
    verdict.see("gradients", (gap / size).sqrt(), autocast[1]);
    verdict.end();
}

#[test]
fn resnet18_64_torchvision_bf16() {
    check_bf16("resnet18-64-torchvision");
}

#[test]
fn resnet18_64_tpu2018_bf16() {
    check_bf16("resnet18-64-tpu2018");
}

#[test]
fn resnet50_64_torchvision_bf16() {
    check_bf16("resnet50-64-torchvision");
}

#[test]
fn resnet50_64_tpu2018_bf16() {
    check_bf16("resnet50-64-tpu2018");
}

#[test]
fn resnet50_224_torchvision_cpu() {
    check_network("resnet50-224-torchvision", CPU, ROUNDING);
}

#[test]
fn resnet50_224_tpu2018_cpu() {
    check_network("resnet50-224-tpu2018", CPU, ROUNDING);
}

#[test]
fn ten_steps_cpu() {
    check_steps("steps", CPU, ROUNDING, 10, 0);
}

#[test]
fn hundred_steps_cpu() {
    check_steps("hundred-steps", CPU, ROUNDING, 100, 1);
}

#[test]
fn three_steps_oracle() {
    // Ten take a minute and a half, and are as good.
    check_steps("steps", ORACLE, EXACT, 3, 0);
}

//! The engines against dfdx's tape in f64: a 1x1 convolution, batch normalisation, ReLU, mean, classifier and
//! cross-entropy. The tape knows nothing of graphs, programs and layouts.

use std::collections::BTreeMap;

use dfdx::prelude::*;
use engine::cpu::{Cpu, Options};
use engine::oracle::Oracle;
use engine::{
    Batch, Decay, Engine, Hyper, MEAN, MOMENTUM_PREFIX, RUNNING_MEAN, RUNNING_VAR, Rule, STD,
    State, initial_state,
};
use graph::{Graph, Init, Plane};

const N: usize = 6;
const H: usize = 4;
const W: usize = 5;
const C: usize = 16;
const CLASSES: usize = 7;
const PIXELS: usize = N * H * W;
const SMOOTHING: f64 = 0.1;

type Device = dfdx::tensor::Cpu;

fn network() -> Graph {
    let mut g = Graph::new(Plane { h: H, w: W, c: 3 });
    let (image, init) = (g.input(), Init::Normal { std: 0.5 });
    let x = g.conv("conv", image, C, 1, 1, init);
    let x = g.batch_norm("bn", x, 0.8);
    let x = g.relu("relu", x);
    let x = g.avg_pool("pooled", x);
    g.linear("fc", x, CLASSES, init, init);
    g
}

/// Loss, and by name the gradients and the running statistics after one step, all by the tape.
fn by_tape(state: &State, pixels: &[f32], labels: &[u32]) -> (f64, BTreeMap<String, Vec<f64>>) {
    let device = Device::default();
    let wide = |name: &str| -> Vec<f64> {
        let values = &state[name].values;
        values.iter().copied().map(f64::from).collect()
    };
    let normal =
        |(i, v): (usize, &f32)| (f64::from(*v) - f64::from(MEAN[i % 3])) / f64::from(STD[i % 3]);
    let x: Vec<f64> = pixels.iter().enumerate().map(normal).collect();
    let x: Tensor<Rank2<PIXELS, 3>, f64, Device> = device.tensor(x);
    let conv: Tensor<Rank2<C, 3>, f64, Device> = device.tensor(wide("conv.weight"));
    let mut bn = device.build_module::<builders::BatchNorm2D<C>, f64>();
    bn.scale = device.tensor(wide("bn.weight"));
    bn.bias = device.tensor(wide("bn.bias"));
    let fc: Tensor<Rank2<CLASSES, C>, f64, Device> = device.tensor(wide("fc.weight"));
    let bias: Tensor<Rank1<CLASSES>, f64, Device> = device.tensor(wide("fc.bias"));
    let spread = SMOOTHING / CLASSES as f64;
    let target = |i: usize| {
        let hit = labels[i / CLASSES] as usize == i % CLASSES;
        spread + if hit { 1.0 - SMOOTHING } else { 0.0 }
    };
    let targets: Vec<f64> = (0..N * CLASSES).map(target).collect();
    let targets: Tensor<Rank2<N, CLASSES>, f64, Device> = device.tensor(targets);

    let z = x
        .leaky_traced()
        .matmul(conv.retaped::<OwnedTape<_, _>>().permute());
    // The rows are pixels; dfdx normalises N x C x H x W.
    let z = z
        .reshape::<Rank4<N, H, W, C>>()
        .permute::<Rank4<N, C, H, W>, Axes4<0, 3, 1, 2>>();
    let y = bn.forward_mut(z).relu().mean::<Rank2<N, C>, _>();
    let logits = y.matmul(fc.retaped::<OwnedTape<_, _>>().permute())
        + bias.retaped::<OwnedTape<_, _>>().broadcast();
    let loss = cross_entropy_with_logits_loss(logits, targets);
    let value = loss.array();
    let gradients = loss.backward();
    let tensors = [
        ("conv.weight", gradients.get(&conv).as_vec()),
        ("bn.weight", gradients.get(&bn.scale).as_vec()),
        ("bn.bias", gradients.get(&bn.bias).as_vec()),
        ("fc.weight", gradients.get(&fc).as_vec()),
        ("fc.bias", gradients.get(&bias).as_vec()),
    ];
    let mut tensors: BTreeMap<String, Vec<f64>> =
        tensors.into_iter().map(|(k, v)| (k.into(), v)).collect();
    tensors.insert(format!("bn{RUNNING_MEAN}"), bn.running_mean.as_vec());
    tensors.insert(format!("bn{RUNNING_VAR}"), bn.running_var.as_vec());
    (value, tensors)
}

/// Compares every tensor, relative to its largest element.
fn check(make: impl Fn(&Graph, &State) -> Box<dyn Engine>, tolerance: f64) {
    let graph = network();
    let state = initial_state(&graph, 3);
    let pixels: Vec<f32> = (0..PIXELS * 3).map(|i| (i * i % 251) as f32).collect();
    let labels: Vec<u32> = (0..N as u32).map(|i| i * 3 % CLASSES as u32).collect();
    let (loss, truth) = by_tape(&state, &pixels, &labels);
    let mut engine = make(&graph, &state);
    let batch = Batch {
        pixels: engine::Pixels::F32(&pixels),
        labels: &labels,
        mixed: None,
    };
    // Without momentum and decay, what is kept as momentum is the gradient.
    let hyper = Hyper {
        rule: Rule::Sgd,
        lr: 0.0,
        momentum: 0.0,
        nesterov: false,
        weight_decay: 0.0,
        decay: Decay::All,
        label_smoothing: SMOOTHING,
        clip_norm: None,
        average: None,
        dropout: None,
    };
    let ours = engine.train_step(&batch, &hyper).unwrap().loss();
    assert!((ours / loss - 1.0).abs() < tolerance, "{ours}, not {loss}");
    let after = engine.state().unwrap();
    for (name, truth) in truth {
        let ours = after
            .get(&format!("{MOMENTUM_PREFIX}{name}"))
            .unwrap_or(&after[&name]);
        assert_eq!(ours.values.len(), truth.len(), "{name}");
        let scale = truth.iter().fold(0.0, |max: f64, v| max.max(v.abs()));
        for (i, (a, b)) in ours.values.iter().zip(&truth).enumerate() {
            let error = (f64::from(*a) - b).abs() / scale;
            assert!(error < tolerance, "{name}[{i}]: {a}, not {b}");
        }
    }
}

#[test]
fn oracle_equals_dfdx() {
    // The engine's state is f32, and so are its constants 0.1 and 1e-5.
    check(|g, s| Box::new(Oracle::new(g, N, s).unwrap()), 2e-7);
}

#[test]
fn cpu_equals_dfdx() {
    check(
        |g, s| Box::new(Cpu::new(g, &Options::new(N, 2), s).unwrap()),
        1e-5,
    );
}

//! The slow truth: every node of the graph by itself, plain loops, f64 throughout.
//!
//! It shares no kernel, no layout and no planning with the other engines. Parameters are rounded to f32 only when
//! they leave as a [`State`].

use graph::{
    DropBlock, DropPath, Graph, NORM_EPSILON, NORM_UPDATE, NormId, Op, ParamId, Plane, ValueId,
};

use crate::dropout::make_up;
use crate::labels::{Target, hits, targets};
use crate::state::{
    self, AVERAGE_PREFIX, MOMENTUM_PREFIX, RUNNING_MEAN, RUNNING_VAR, State, Tensor,
};
use crate::{Batch, Dropout, Engine, Error, Hyper, MEAN, Metrics, Pixels, STD, clip};

/// Running statistics of a normalisation.
#[derive(Clone)]
struct Running {
    mean: Vec<f64>,
    var: Vec<f64>,
}

/// Batch statistics of a normalisation.
#[derive(Clone, Default)]
struct Moments {
    mean: Vec<f64>,
    var: Vec<f64>,
    count: usize,
}

/// The engine.
pub struct Oracle {
    graph: Graph,
    micro_batch: usize,
    params: Vec<Vec<f64>>,
    momentum: Vec<Vec<f64>>,
    running: Vec<Running>,
    /// Of parameters and running statistics, once there is one.
    average: Option<(Vec<Vec<f64>>, Vec<Running>)>,
    /// What the step under way drops, and the number of its micro-batch's first image.
    dropout: Option<(Dropout, usize)>,
}

/// Squeeze and excitation, images x channels.
struct Gates {
    mean: Vec<f64>,
    /// After the ReLU.
    inner: Vec<f64>,
    /// After the sigmoid.
    gates: Vec<f64>,
}

/// What a forward pass leaves for the backward pass.
struct Pass {
    /// Every node's value, N x H x W x C.
    values: Vec<Vec<f64>>,
    moments: Vec<Moments>,
}

impl Oracle {
    /// An engine for `graph` with `state`, running `micro_batch` images at a time.
    ///
    /// # Errors
    /// If the state is not one of the graph's.
    pub fn new(graph: &Graph, micro_batch: usize, state: &State) -> Result<Self, Error> {
        let params: Vec<_> = graph
            .params()
            .iter()
            .map(|p| vec![0.0; p.elements()])
            .collect();
        let running = graph.norms().iter().map(|n| Running {
            mean: vec![0.0; n.channels],
            var: vec![1.0; n.channels],
        });
        let running = running.collect();
        let mut oracle = Self {
            graph: graph.clone(),
            micro_batch,
            momentum: params.clone(),
            params,
            running,
            average: None,
            dropout: None,
        };
        oracle.load(state)?;
        Ok(oracle)
    }

    /// Mean loss of one batch in training mode; nothing changes. For finite differences.
    pub fn training_loss(&self, batch: &Batch<'_>, label_smoothing: f64) -> f64 {
        let pass = self.forward(batch, true);
        self.loss(&pass, batch, label_smoothing).0.loss()
    }

    /// Gradient of the mean loss over `batch`, run as one micro-batch, for every parameter.
    pub fn gradients(&self, batch: &Batch<'_>, label_smoothing: f64) -> Vec<Vec<f64>> {
        let pass = self.forward(batch, true);
        let (_, d) = self.loss(&pass, batch, label_smoothing);
        self.backward(&pass, d, batch.images())
    }

    /// What [`Oracle::training_loss`] and [`Oracle::gradients`] drop. For finite differences.
    pub fn drop_out(&mut self, dropout: Option<Dropout>) {
        self.dropout = dropout.map(|dropout| (dropout, 0));
    }

    /// The factors of dropout on what the classifier reads, where they are not all 1.
    fn masked(&self, node: usize, pooled: &mut [f64], channels: usize) {
        let Some((dropout, first)) = self.dropout else {
            return;
        };
        if self.graph.node(self.graph.logits()).inputs != [ValueId(node)] {
            return;
        }
        let mask = dropout.mask(channels);
        for (i, v) in pooled.iter_mut().enumerate() {
            *v *= mask.factor(first + i / channels, i % channels);
        }
    }

    /// Changes one element of a parameter. For finite differences.
    pub fn nudge(&mut self, param: ParamId, element: usize, by: f64) {
        self.params[param.0][element] += by;
    }

    fn forward(&self, batch: &Batch<'_>, train: bool) -> Pass {
        let n = batch.images();
        let mut pass = Pass {
            values: vec![],
            moments: vec![Moments::default(); self.graph.norms().len()],
        };
        for (index, node) in self.graph.nodes().iter().enumerate() {
            let x = node
                .inputs
                .first()
                .map(|x| (&pass.values[x.0], self.graph.plane(*x)));
            let y = match (node.op, x) {
                (Op::Input, _) => (0..batch.pixels.len())
                    .map(|i| {
                        (f64::from(batch.pixels.get(i)) - f64::from(MEAN[i % 3]))
                            / f64::from(STD[i % 3])
                    })
                    .collect(),
                (
                    Op::Conv {
                        weight,
                        kernel,
                        stride,
                    },
                    Some((x, from)),
                ) => {
                    let mut y = vec![0.0; n * node.plane.elements()];
                    let w = &self.params[weight.0];
                    each_tap(n, from, node.plane, kernel, stride, |xi, yi, wi| {
                        y[yi] += x[xi] * w[wi]
                    });
                    y
                }
                (Op::BatchNorm { norm }, Some((x, plane))) => {
                    let moments = if train {
                        moments(x, plane.c)
                    } else {
                        self.running_moments(norm)
                    };
                    let y = self.normalize(norm, &moments, x);
                    pass.moments[norm.0] = moments;
                    y
                }
                (Op::Relu, Some((x, _))) => {
                    x.iter().map(|&v| if v < 0.0 { 0.0 } else { v }).collect()
                }
                (Op::Add, Some((a, _))) => a
                    .iter()
                    .zip(&pass.values[node.inputs[1].0])
                    .map(|(a, b)| a + b)
                    .collect(),
                (
                    Op::MaxPool {
                        kernel,
                        stride,
                        pad_before,
                    },
                    Some((x, from)),
                ) => {
                    let winners = winners(n, x, from, node.plane, kernel, stride, pad_before);
                    winners.into_iter().map(|i| x[i]).collect()
                }
                (Op::AvgPool, Some((x, plane))) => {
                    let mut y = vec![0.0; n * plane.c];
                    for (i, v) in x.iter().enumerate() {
                        y[i / plane.elements() * plane.c + i % plane.c] +=
                            v / plane.pixels() as f64;
                    }
                    if train {
                        self.masked(index, &mut y, plane.c);
                    }
                    y
                }
                (Op::HalfPool, Some((x, from))) => {
                    let mut y = vec![0.0; n * node.plane.elements()];
                    each_of_window(n, from, node.plane, |xi, yi, share| y[yi] += share * x[xi]);
                    y
                }
                (Op::SqueezeExcite { reduce, expand }, Some((x, plane))) => {
                    let Gates { gates, .. } = self.gates(reduce, expand, x, plane);
                    let gate = |i: usize| gates[i / plane.elements() * plane.c + i % plane.c];
                    (0..x.len()).map(|i| x[i] * gate(i)).collect()
                }
                (Op::DropPath(path), Some((x, plane))) => match self.dropout {
                    Some(dropout) if train => {
                        let factors = path_factors(dropout, path, n);
                        let each = x.iter().enumerate();
                        each.map(|(i, x)| x * factors[i / plane.elements()])
                            .collect()
                    }
                    _ => x.clone(),
                },
                (Op::DropBlock(block), Some((x, plane))) => match self.dropout {
                    Some(dropout) if train => {
                        let factors = block_factors(dropout, block, plane, n);
                        x.iter().zip(factors).map(|(x, f)| x * f).collect()
                    }
                    _ => x.clone(),
                },
                (Op::Linear { weight, bias }, Some((x, plane))) => {
                    let (w, b) = (&self.params[weight.0], &self.params[bias.0]);
                    let classes = node.plane.c;
                    let dot = |i: usize, o: usize| {
                        (0..plane.c)
                            .map(|c| x[i * plane.c + c] * w[o * plane.c + c])
                            .sum::<f64>()
                    };
                    (0..n * classes)
                        .map(|j| b[j % classes] + dot(j / classes, j % classes))
                        .collect()
                }
                (_, None) => unreachable!("only the input reads nothing"),
            };
            pass.values.push(y);
        }
        pass
    }

    /// Squeeze and excitation up to the sigmoid.
    fn gates(&self, reduce: [ParamId; 2], expand: [ParamId; 2], x: &[f64], plane: Plane) -> Gates {
        let mut mean = vec![0.0; x.len() / plane.pixels()];
        for (i, v) in x.iter().enumerate() {
            mean[i / plane.elements() * plane.c + i % plane.c] += v / plane.pixels() as f64;
        }
        let layer = |[weight, bias]: [ParamId; 2], x: &[f64]| -> Vec<f64> {
            let (w, b) = (&self.params[weight.0], &self.params[bias.0]);
            let inputs = w.len() / b.len();
            let rows = x.chunks(inputs).flat_map(|x| {
                let dot = move |w: &[f64]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
                w.chunks(inputs).zip(b).map(move |(w, b)| b + dot(w))
            });
            rows.collect()
        };
        let inner: Vec<f64> = layer(reduce, &mean).iter().map(|v| v.max(0.0)).collect();
        let gates = layer(expand, &inner);
        let gates = gates.iter().map(|v| 1.0 / (1.0 + (-v).exp())).collect();
        Gates { mean, inner, gates }
    }

    fn running_moments(&self, norm: NormId) -> Moments {
        let Running { mean, var } = self.running[norm.0].clone();
        Moments {
            mean,
            var,
            count: 0,
        }
    }

    fn normalize(&self, norm: NormId, m: &Moments, x: &[f64]) -> Vec<f64> {
        let norm = &self.graph.norms()[norm.0];
        let (gamma, beta) = (&self.params[norm.weight.0], &self.params[norm.bias.0]);
        let at = |i: usize| i % norm.channels;
        let normal =
            |i: usize| (x[i] - m.mean[at(i)]) / (m.var[at(i)] + f64::from(NORM_EPSILON)).sqrt();
        (0..x.len())
            .map(|i| normal(i) * gamma[at(i)] + beta[at(i)])
            .collect()
    }

    /// Sums over the batch, and the gradient of the mean loss by the logits.
    fn loss(&self, pass: &Pass, batch: &Batch<'_>, smoothing: f64) -> (Metrics, Vec<f64>) {
        let classes = self.graph.classes();
        let images = batch.images();
        let mut metrics = Metrics {
            images,
            ..Metrics::default()
        };
        let mut d = vec![];
        let rows = pass.values[self.graph.logits().0].chunks(classes);
        for (i, row) in rows.enumerate() {
            let targets = Target::new(batch, i, targets(smoothing, classes));
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = row.iter().map(|v| (v - max).exp()).sum();
            for (class, v) in row.iter().enumerate() {
                let target = targets.of(class);
                metrics.loss_sum -= target * (v - max - sum.ln());
                d.push(((v - max).exp() / sum - target) / images as f64);
            }
            let (first, fifth) = hits(row, targets.label);
            metrics.top1 += usize::from(first);
            metrics.top5 += usize::from(fifth);
        }
        (metrics, d)
    }

    fn backward(&self, pass: &Pass, d_logits: Vec<f64>, n: usize) -> Vec<Vec<f64>> {
        let nodes = self.graph.nodes();
        let mut grads: Vec<Vec<f64>> = self.params.iter().map(|p| vec![0.0; p.len()]).collect();
        let mut d: Vec<Vec<f64>> = pass.values.iter().map(|v| vec![0.0; v.len()]).collect();
        d[self.graph.logits().0] = d_logits;
        for (i, node) in nodes.iter().enumerate().rev() {
            let dy = std::mem::take(&mut d[i]);
            let Some(&ValueId(input)) = node.inputs.first() else {
                continue;
            };
            let (x, from) = (&pass.values[input], nodes[input].plane);
            let dx = &mut d[input];
            match node.op {
                Op::Input => {}
                Op::Conv {
                    weight,
                    kernel,
                    stride,
                } => {
                    let (w, dw) = (&self.params[weight.0], &mut grads[weight.0]);
                    each_tap(n, from, node.plane, kernel, stride, |xi, yi, wi| {
                        dx[xi] += dy[yi] * w[wi];
                        dw[wi] += dy[yi] * x[xi];
                    });
                }
                Op::BatchNorm { norm } => {
                    self.norm_backward(norm, &pass.moments[norm.0], x, &dy, dx, &mut grads)
                }
                Op::Relu => (0..dy.len())
                    .filter(|&j| x[j] > 0.0 || x[j].is_nan())
                    .for_each(|j| dx[j] += dy[j]),
                Op::Add => {
                    for input in &node.inputs {
                        d[input.0]
                            .iter_mut()
                            .zip(&dy)
                            .for_each(|(dx, dy)| *dx += dy);
                    }
                }
                Op::MaxPool {
                    kernel,
                    stride,
                    pad_before,
                } => {
                    let winners = winners(n, x, from, node.plane, kernel, stride, pad_before);
                    winners.into_iter().zip(&dy).for_each(|(j, dy)| dx[j] += dy);
                }
                Op::AvgPool => {
                    let mut dy = dy;
                    self.masked(i, &mut dy, from.c);
                    for (j, dx) in dx.iter_mut().enumerate() {
                        *dx += dy[j / from.elements() * from.c + j % from.c] / from.pixels() as f64;
                    }
                }
                Op::HalfPool => each_of_window(n, from, node.plane, |xi, yi, share| {
                    dx[xi] += share * dy[yi]
                }),
                Op::SqueezeExcite { reduce, expand } => {
                    let Gates { mean, inner, gates } = self.gates(reduce, expand, x, from);
                    let at = |i: usize| i / from.elements() * from.c + i % from.c;
                    let mut d_gates = vec![0.0; gates.len()];
                    for (j, dy) in dy.iter().enumerate() {
                        d_gates[at(j)] += dy * x[j];
                        dx[j] += dy * gates[at(j)];
                    }
                    let slope = |(d, g): (&f64, &f64)| d * g * (1.0 - g);
                    let d = d_gates.iter().zip(&gates).map(slope).collect();
                    let mut d = self.layer_backward(expand, &inner, d, &mut grads);
                    d.iter_mut()
                        .zip(&inner)
                        .filter(|(_, inner)| **inner <= 0.0)
                        .for_each(|(d, _)| *d = 0.0);
                    let d = self.layer_backward(reduce, &mean, d, &mut grads);
                    for (j, dx) in dx.iter_mut().enumerate() {
                        *dx += d[at(j)] / from.pixels() as f64;
                    }
                }
                Op::DropPath(path) => {
                    let factors = self.dropout.map(|d| path_factors(d, path, n));
                    for (j, dy) in dy.iter().enumerate() {
                        let factor = factors.as_ref().map_or(1.0, |f| f[j / from.elements()]);
                        dx[j] += factor * dy;
                    }
                }
                Op::DropBlock(block) => {
                    let factors = self.dropout.map(|d| block_factors(d, block, from, n));
                    for (j, dy) in dy.iter().enumerate() {
                        dx[j] += factors.as_ref().map_or(1.0, |f| f[j]) * dy;
                    }
                }
                Op::Linear { weight, bias } => {
                    let (classes, channels) = (node.plane.c, from.c);
                    for (j, dy) in dy.iter().enumerate() {
                        let (image, class) = (j / classes, j % classes);
                        grads[bias.0][class] += dy;
                        for c in 0..channels {
                            grads[weight.0][class * channels + c] += dy * x[image * channels + c];
                            dx[image * channels + c] +=
                                dy * self.params[weight.0][class * channels + c];
                        }
                    }
                }
            }
        }
        grads
    }

    /// Gradients of a layer of squeeze and excitation; returns that of what it reads.
    fn layer_backward(
        &self,
        [weight, bias]: [ParamId; 2],
        x: &[f64],
        d: Vec<f64>,
        grads: &mut [Vec<f64>],
    ) -> Vec<f64> {
        let outputs = self.params[bias.0].len();
        let inputs = self.params[weight.0].len() / outputs;
        let mut dx = vec![0.0; x.len()];
        for (j, d) in d.iter().enumerate() {
            let (image, output) = (j / outputs, j % outputs);
            grads[bias.0][output] += d;
            for i in 0..inputs {
                let w = output * inputs + i;
                grads[weight.0][w] += d * x[image * inputs + i];
                dx[image * inputs + i] += d * self.params[weight.0][w];
            }
        }
        dx
    }

    /// Ioffe and Szegedy 2015, section 3: with z the normalised x,
    /// dx = gamma / sigma * (dy - mean(dy) - z * mean(dy * z)).
    fn norm_backward(
        &self,
        norm: NormId,
        m: &Moments,
        x: &[f64],
        dy: &[f64],
        dx: &mut [f64],
        grads: &mut [Vec<f64>],
    ) {
        let norm = &self.graph.norms()[norm.0];
        let channels = norm.channels;
        for (c, gamma) in self.params[norm.weight.0].iter().enumerate() {
            let inv_std = 1.0 / (m.var[c] + f64::from(NORM_EPSILON)).sqrt();
            let z = |i: usize| (x[i] - m.mean[c]) * inv_std;
            let mine = || (c..x.len()).step_by(channels);
            let sum: f64 = mine().map(|i| dy[i]).sum();
            let sum_z: f64 = mine().map(|i| dy[i] * z(i)).sum();
            grads[norm.bias.0][c] += sum;
            grads[norm.weight.0][c] += sum_z;
            let count = m.count as f64;
            for i in mine() {
                dx[i] += gamma * inv_std * (dy[i] - sum / count - z(i) * sum_z / count);
            }
        }
    }

    fn update(&mut self, grads: &[Vec<f64>], hyper: &Hyper) {
        let norm =
            |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let all = norm(&mut grads.iter().flatten().copied());
        let scale = hyper.clip_norm.map_or(1.0, |most| clip(all, most));
        for (i, p) in self.graph.params().iter().enumerate() {
            let (w, m) = (&mut self.params[i], hyper.momentum);
            let gradient = |w: &[f64], j: usize, decay: f64| scale * grads[i][j] + decay * w[j];
            let rule = hyper.rule.of_tensor(hyper, p.decay, |decay| {
                let of_gradient = norm(&mut (0..w.len()).map(|j| gradient(w, j, decay)));
                (norm(&mut w.iter().copied()), of_gradient)
            });
            for j in 0..w.len() {
                let (g, a) = (gradient(w, j, rule.decay), &mut self.momentum[i][j]);
                if rule.is_rate_inside {
                    *a = m * *a + rule.rate * g;
                    w[j] -= *a;
                } else {
                    *a = m * *a + g;
                    w[j] -= rule.rate * if hyper.nesterov { g + m * *a } else { *a };
                }
            }
        }
    }

    fn move_average(&mut self, decay: f64) {
        let (params, running) = self.average.as_mut().expect("made before the first update");
        let to = |v: &mut Vec<f64>, w: &[f64]| {
            v.iter_mut()
                .zip(w)
                .for_each(|(v, w)| *v = decay * *v + (1.0 - decay) * w);
        };
        for (v, w) in params.iter_mut().zip(&self.params) {
            to(v, w);
        }
        for (v, w) in running.iter_mut().zip(&self.running) {
            to(&mut v.mean, &w.mean);
            to(&mut v.var, &w.var);
        }
    }
}

/// What is left of each image's branch.
fn path_factors((dropout, first): (Dropout, usize), path: DropPath, images: usize) -> Vec<f64> {
    let paths = dropout.paths(path);
    (first..first + images).map(|i| paths.factor(i)).collect()
}

/// What is left of each element.
fn block_factors(
    (dropout, first): (Dropout, usize),
    block: DropBlock,
    plane: Plane,
    images: usize,
) -> Vec<f64> {
    let squares = dropout.squares(block, plane);
    let mut mask = vec![0; images * plane.elements()];
    let each = mask.chunks_mut(plane.elements()).enumerate();
    let kept = each.map(|(i, mask)| squares.draw(first + i, mask)).sum();
    let scale = make_up(mask.len(), kept);
    mask.iter().map(|&kept| f64::from(kept) * scale).collect()
}

/// Calls `f(input index, output index, share)` for every pixel of the 2 x 2 windows of a mean.
fn each_of_window(n: usize, from: Plane, to: Plane, mut f: impl FnMut(usize, usize, f64)) {
    for image in 0..n {
        for (h, w) in pixels(from) {
            let rows = 2.min(from.h - h / 2 * 2);
            let columns = 2.min(from.w - w / 2 * 2);
            for c in 0..from.c {
                let x = ((image * from.h + h) * from.w + w) * from.c + c;
                let y = ((image * to.h + h / 2) * to.w + w / 2) * to.c + c;
                f(x, y, 1.0 / (rows * columns) as f64);
            }
        }
    }
}

/// Calls `f(input index, output index, weight index)` for every product of a convolution; the weight is OIHW.
fn each_tap(
    n: usize,
    from: Plane,
    to: Plane,
    kernel: usize,
    stride: usize,
    mut f: impl FnMut(usize, usize, usize),
) {
    let pad = (kernel - 1) / 2;
    for image in 0..n {
        for (oh, ow) in pixels(to) {
            for (kh, kw) in pixels(Plane {
                h: kernel,
                w: kernel,
                c: 1,
            }) {
                let (h, w) = (
                    (oh * stride + kh).wrapping_sub(pad),
                    (ow * stride + kw).wrapping_sub(pad),
                );
                if h >= from.h || w >= from.w {
                    continue;
                }
                for c in 0..from.c {
                    let x = ((image * from.h + h) * from.w + w) * from.c + c;
                    for o in 0..to.c {
                        let y = ((image * to.h + oh) * to.w + ow) * to.c + o;
                        f(x, y, ((o * from.c + c) * kernel + kh) * kernel + kw);
                    }
                }
            }
        }
    }
}

fn pixels(plane: Plane) -> impl Iterator<Item = (usize, usize)> {
    (0..plane.h).flat_map(move |h| (0..plane.w).map(move |w| (h, w)))
}

/// Mean and biased variance of each channel.
fn moments(x: &[f64], channels: usize) -> Moments {
    let count = x.len() / channels;
    let mean: Vec<f64> = (0..channels)
        .map(|c| x[c..].iter().step_by(channels).sum::<f64>() / count as f64)
        .collect();
    let var = |c: usize| {
        x[c..]
            .iter()
            .step_by(channels)
            .map(|v| (v - mean[c]).powi(2))
            .sum::<f64>()
            / count as f64
    };
    Moments {
        var: (0..channels).map(var).collect(),
        mean,
        count,
    }
}

/// For each output of a max-pool the index of the input that wins; the first in row order on a tie.
fn winners(
    n: usize,
    x: &[f64],
    from: Plane,
    to: Plane,
    kernel: usize,
    stride: usize,
    pad: usize,
) -> Vec<usize> {
    let mut out = vec![];
    for image in 0..n {
        for (oh, ow) in pixels(to) {
            for c in 0..to.c {
                let mut best: Option<usize> = None;
                for (kh, kw) in pixels(Plane {
                    h: kernel,
                    w: kernel,
                    c: 1,
                }) {
                    let (h, w) = (
                        (oh * stride + kh).wrapping_sub(pad),
                        (ow * stride + kw).wrapping_sub(pad),
                    );
                    if h < from.h && w < from.w {
                        let i = ((image * from.h + h) * from.w + w) * from.c + c;
                        if best.is_none_or(|b| x[i] > x[b] || x[i].is_nan()) {
                            best = Some(i);
                        }
                    }
                }
                out.push(best.expect("every window covers a pixel"));
            }
        }
    }
    out
}

impl Engine for Oracle {
    fn describe(&self) -> String {
        "oracle: f64, one thread".into()
    }

    fn load(&mut self, state: &State) -> Result<(), Error> {
        state::check(&self.graph, state)?;
        let wide = |t: &Tensor| t.values.iter().copied().map(f64::from).collect::<Vec<_>>();
        for (i, p) in self.graph.params().iter().enumerate() {
            self.params[i] = wide(&state[&p.name]);
            let zero = || vec![0.0; p.elements()];
            self.momentum[i] = state
                .get(&format!("{MOMENTUM_PREFIX}{}", p.name))
                .map_or_else(zero, wide);
        }
        for (i, n) in self.graph.norms().iter().enumerate() {
            let get = |suffix: &str| wide(&state[&format!("{}{suffix}", n.name)]);
            self.running[i] = Running {
                mean: get(RUNNING_MEAN),
                var: get(RUNNING_VAR),
            };
        }
        let has_average = state.keys().any(|name| name.starts_with(AVERAGE_PREFIX));
        self.average = has_average.then(|| {
            let get = |name: String| {
                let average = state.get(&format!("{AVERAGE_PREFIX}{name}"));
                wide(average.unwrap_or_else(|| &state[&name]))
            };
            let params = self.graph.params().iter();
            let norms = self.graph.norms().iter();
            let running = norms.map(|n| Running {
                mean: get(format!("{}{RUNNING_MEAN}", n.name)),
                var: get(format!("{}{RUNNING_VAR}", n.name)),
            });
            (
                params.map(|p| get(p.name.clone())).collect(),
                running.collect(),
            )
        });
        Ok(())
    }

    fn state(&self) -> Result<State, Error> {
        let tensor = |shape: &[usize], values: &[f64]| Tensor {
            shape: shape.to_vec(),
            values: values.iter().map(|&v| v as f32).collect(),
        };
        let mut state = State::new();
        for (i, p) in self.graph.params().iter().enumerate() {
            state.insert(p.name.clone(), tensor(&p.shape, &self.params[i]));
            state.insert(
                format!("{MOMENTUM_PREFIX}{}", p.name),
                tensor(&p.shape, &self.momentum[i]),
            );
        }
        for (i, n) in self.graph.norms().iter().enumerate() {
            state.insert(
                format!("{}{RUNNING_MEAN}", n.name),
                tensor(&[n.channels], &self.running[i].mean),
            );
            state.insert(
                format!("{}{RUNNING_VAR}", n.name),
                tensor(&[n.channels], &self.running[i].var),
            );
        }
        if let Some((params, running)) = &self.average {
            for (p, values) in self.graph.params().iter().zip(params) {
                let name = format!("{AVERAGE_PREFIX}{}", p.name);
                state.insert(name, tensor(&p.shape, values));
            }
            for (n, r) in self.graph.norms().iter().zip(running) {
                for (suffix, values) in [(RUNNING_MEAN, &r.mean), (RUNNING_VAR, &r.var)] {
                    let name = format!("{AVERAGE_PREFIX}{}{suffix}", n.name);
                    state.insert(name, tensor(&[n.channels], values));
                }
            }
        }
        Ok(state)
    }

    fn train_step(&mut self, batch: &Batch<'_>, hyper: &Hyper) -> Result<Metrics, Error> {
        let mut total = Metrics::default();
        let mut grads: Vec<Vec<f64>> = self.params.iter().map(|p| vec![0.0; p.len()]).collect();
        let micro_batches: Vec<_> = batch.micro_batches(self.micro_batch).collect();
        let mut seen: Vec<Vec<Moments>> = vec![];
        for micro in &micro_batches {
            self.dropout = hyper.dropout.map(|dropout| (dropout, total.images));
            let pass = self.forward(micro, true);
            let (metrics, d) = self.loss(&pass, micro, hyper.label_smoothing);
            let share = micro.images() as f64 / batch.images() as f64;
            for (sum, grad) in grads
                .iter_mut()
                .zip(self.backward(&pass, d, micro.images()))
            {
                sum.iter_mut().zip(grad).for_each(|(s, g)| *s += share * g);
            }
            total.add(&metrics);
            seen.push(pass.moments);
        }
        self.dropout = None;
        if hyper.average.is_some() && self.average.is_none() {
            self.average = Some((self.params.clone(), self.running.clone()));
        }
        self.update(&grads, hyper);
        let (keep, update) = (
            1.0 - f64::from(NORM_UPDATE),
            f64::from(NORM_UPDATE) / micro_batches.len() as f64,
        );
        for (i, running) in self.running.iter_mut().enumerate() {
            for c in 0..running.mean.len() {
                let unbiased =
                    |m: &Moments| m.var[c] * m.count as f64 / (m.count as f64 - 1.0).max(1.0);
                running.mean[c] = keep * running.mean[c]
                    + update * seen.iter().map(|m| m[i].mean[c]).sum::<f64>();
                running.var[c] = keep * running.var[c]
                    + update * seen.iter().map(|m| unbiased(&m[i])).sum::<f64>();
            }
        }
        if let Some(decay) = hyper.average {
            self.move_average(decay);
        }
        Ok(total)
    }

    fn swap_average(&mut self) -> Result<(), Error> {
        let (params, running) = self.average.as_mut().expect("there is an average");
        std::mem::swap(params, &mut self.params);
        std::mem::swap(running, &mut self.running);
        Ok(())
    }

    fn score(
        &mut self,
        batch: &Batch<'_>,
        logits: Option<&mut Vec<f32>>,
    ) -> Result<Metrics, Error> {
        let pass = self.forward(batch, false);
        if let Some(logits) = logits {
            let found = &pass.values[self.graph.logits().0];
            logits.extend(found.iter().map(|&v| v as f32));
        }
        Ok(self.loss(&pass, batch, 0.0).0)
    }

    fn predict(&mut self, pixels: Pixels<'_>) -> Result<Vec<f32>, Error> {
        let labels = vec![0; pixels.len() / self.graph.plane(self.graph.input()).elements()];
        let batch = Batch {
            pixels,
            labels: &labels,
            mixed: None,
        };
        let mut logits = vec![];
        self.score(&batch, Some(&mut logits))?;
        Ok(logits)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::{Decay, Mixed, Rule, initial_state};

    /// A classifier alone: its weight has this shape, and a bias for each row.
    fn classifier(classes: usize, channels: usize) -> Oracle {
        let plane = Plane {
            h: 1,
            w: 1,
            c: channels,
        };
        let mut graph = Graph::new(plane);
        let pooled = graph.avg_pool("pooled", graph.input());
        let init = graph::Init::Uniform { bound: 0.1 };
        graph.linear("fc", pooled, classes, init, init);
        Oracle::new(&graph, 8, &initial_state(&graph, 0)).unwrap_or_else(|e| panic!("{e}"))
    }

    fn numbers(value: &Value) -> Vec<f64> {
        let numbers = value.as_array().expect("a list").iter();
        numbers.map(|v| v.as_f64().expect("a number")).collect()
    }

    fn check(what: &str, ours: &[f64], theirs: &[f64], tolerance: f64) {
        assert_eq!(ours.len(), theirs.len(), "{what}");
        for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
            let is_near = (a - b).abs() <= tolerance * (1.0 + b.abs());
            assert!(is_near, "{what}: number {i} is {a}, not {b}");
        }
    }

    const PLAIN: Hyper = Hyper {
        rule: Rule::Sgd,
        lr: 0.1,
        momentum: 0.9,
        nesterov: false,
        weight_decay: 0.0,
        decay: Decay::NoNormNoBias,
        label_smoothing: 0.0,
        clip_norm: None,
        average: None,
        dropout: None,
    };

    /// tests/goldens/update_goldens.py
    fn goldens() -> Value {
        serde_json::from_str(include_str!("../tests/goldens/updates.json"))
            .unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn ten_updates_by_every_rule_are_pytorchs_and_numpys() {
        let golden = goldens();
        let number = |key: &str| golden[key].as_f64().expect("a number");
        let (trust, base) = (
            number("trust"),
            Hyper {
                lr: number("lr"),
                momentum: number("momentum"),
                weight_decay: number("weight_decay"),
                ..PLAIN
            },
        );
        let nesterov = Hyper {
            nesterov: true,
            ..base
        };
        let ruled = |rule| Hyper { rule, ..base };
        let cases = [
            ("sgd", base),
            ("nesterov", nesterov),
            (
                "clipped",
                Hyper {
                    clip_norm: Some(number("clip_norm")),
                    ..base
                },
            ),
            (
                "averaged",
                Hyper {
                    average: Some(number("average")),
                    ..nesterov
                },
            ),
            ("lars2018", ruled(Rule::Lars2018 { trust })),
            ("lars", ruled(Rule::Lars { trust })),
        ];
        let split = |all: Vec<f64>| vec![all[..24].to_vec(), all[24..].to_vec()];
        for (name, hyper) in cases {
            let mut oracle = classifier(8, 3);
            oracle.params = split(numbers(&golden["start"]));
            oracle.average = Some((oracle.params.clone(), vec![]));
            let gradients = golden["gradients"].as_array().expect("a list");
            let after = golden["updates"][name].as_array().expect("a list");
            assert_eq!(after.len(), 10);
            for (step, (gradient, after)) in gradients.iter().zip(after).enumerate() {
                oracle.update(&split(numbers(gradient)), &hyper);
                if let Some(decay) = hyper.average {
                    oracle.move_average(decay);
                    oracle.swap_average().unwrap();
                }
                let ours = oracle.params.concat();
                check(
                    &format!("{name}, step {step}"),
                    &ours,
                    &numbers(after),
                    1e-12,
                );
                if hyper.average.is_some() {
                    oracle.swap_average().unwrap();
                }
            }
        }
    }

    #[test]
    fn losses_of_mixed_labels_are_pytorchs() {
        let golden = goldens();
        let cases = golden["losses"].as_array().expect("a list");
        assert_eq!(cases.len(), 4);
        for case in cases {
            let labels = |key: &str| numbers(&case[key]).iter().map(|&v| v as u32).collect();
            let (first, second): (Vec<u32>, Vec<u32>) = (labels("first"), labels("second"));
            let oracle = classifier(5, 3);
            let mut values = vec![vec![]; oracle.graph.nodes().len()];
            values[oracle.graph.logits().0] = numbers(&case["logits"]);
            let pass = Pass {
                values,
                moments: vec![],
            };
            let batch = Batch {
                pixels: Pixels::U8(&[]),
                labels: &first,
                mixed: Some(Mixed {
                    labels: &second,
                    share: case["share"].as_f64().expect("a number"),
                }),
            };
            let smoothing = case["smoothing"].as_f64().expect("a number");
            let (metrics, d) = oracle.loss(&pass, &batch, smoothing);
            let loss = case["loss"].as_f64().expect("a number");
            check("loss", &[metrics.loss()], &[loss], 1e-12);
            check("gradient", &d, &numbers(&case["gradient"]), 1e-12);
        }
    }

    /// docs/reference/vectors.json: `nesterov` and `lars_first_step`.
    #[test]
    fn first_updates_are_the_references() {
        let vectors: Value =
            serde_json::from_str(include_str!("../../../docs/reference/vectors.json"))
                .unwrap_or_else(|e| panic!("{e}"));
        let mut oracle = classifier(2, 1);
        let bias = vec![0.0; 2];
        oracle.params[0] = vec![1.0; 2];
        let nesterov = Hyper {
            nesterov: true,
            ..PLAIN
        };
        for step in vectors["nesterov"]["steps"].as_array().expect("a list") {
            oracle.update(&[vec![0.5; 2], bias.clone()], &nesterov);
            let (w, a) = (&step["w"], &step["accumulator"]);
            let theirs = [w, a].map(|v| v.as_f64().expect("a number"));
            check(
                "nesterov",
                &[oracle.params[0][0], oracle.momentum[0][0]],
                &theirs,
                1e-12,
            );
        }
        let first = &vectors["lars_first_step"];
        let number = |key: &str| first[key].as_f64().expect("a number");
        let trust = number("eta");
        // With decay in the loss the vector's gradient has it already.
        for (key, rule) in [
            ("decay_in_loss", Rule::Lars2018 { trust }),
            ("decay_in_update", Rule::Lars { trust }),
        ] {
            let mut oracle = classifier(2, 1);
            oracle.params[0] = numbers(&first["w"]);
            let decay = number("weight_decay");
            let mut gradient = numbers(&first["grad"]);
            if key == "decay_in_loss" {
                for (g, w) in gradient.iter_mut().zip(&oracle.params[0]) {
                    *g -= decay * w;
                }
            }
            let hyper = Hyper {
                rule,
                lr: number("lr"),
                weight_decay: decay,
                ..PLAIN
            };
            oracle.update(&[gradient, bias.clone()], &hyper);
            check(key, &oracle.params[0], &numbers(&first[key]["w"]), 1e-12);
        }
    }

    /// LARS: a tensor that is 0, or whose gradient is, has no ratio of norms.
    #[test]
    fn a_norm_of_zero_leaves_the_plain_rate() {
        for rule in [Rule::Lars2018 { trust: 0.001 }, Rule::Lars { trust: 0.001 }] {
            let mut oracle = classifier(2, 1);
            oracle.params[0] = vec![0.0; 2];
            let hyper = Hyper { rule, ..PLAIN };
            oracle.update(&[vec![0.5, -0.5], vec![0.0; 2]], &hyper);
            check("weight", &oracle.params[0], &[-0.05, 0.05], 1e-12);
        }
    }
}

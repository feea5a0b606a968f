//! The slow truth: every node of the graph by itself, plain loops, f64 throughout.
//!
//! It shares no kernel, no layout and no planning with the other engines. Parameters are rounded to f32 only when
//! they leave as a [`State`].

use graph::{Graph, NORM_EPSILON, NORM_UPDATE, NormId, Op, ParamId, Plane, ValueId};

use crate::labels::{hits, targets};
use crate::state::{self, MOMENTUM_PREFIX, RUNNING_MEAN, RUNNING_VAR, State, Tensor};
use crate::{Batch, Engine, Error, Hyper, MEAN, Metrics, Pixels, STD};

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
        };
        oracle.load(state)?;
        Ok(oracle)
    }

    /// Mean loss of one batch in training mode; nothing changes. For finite differences.
    pub fn training_loss(&self, batch: &Batch<'_>, label_smoothing: f64) -> f64 {
        let pass = self.forward(batch, true);
        self.loss(&pass, batch.labels, label_smoothing).0.loss()
    }

    /// Gradient of the mean loss over `batch`, run as one micro-batch, for every parameter.
    pub fn gradients(&self, batch: &Batch<'_>, label_smoothing: f64) -> Vec<Vec<f64>> {
        let pass = self.forward(batch, true);
        let (_, d) = self.loss(&pass, batch.labels, label_smoothing);
        self.backward(&pass, d, batch.images())
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
        for node in self.graph.nodes() {
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
                    y
                }
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
    fn loss(&self, pass: &Pass, labels: &[u32], smoothing: f64) -> (Metrics, Vec<f64>) {
        let classes = self.graph.classes();
        let (on, off) = targets(smoothing, classes);
        let mut metrics = Metrics {
            images: labels.len(),
            ..Metrics::default()
        };
        let mut d = vec![];
        for (row, &label) in pass.values[self.graph.logits().0]
            .chunks(classes)
            .zip(labels)
        {
            let label = label as usize;
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = row.iter().map(|v| (v - max).exp()).sum();
            for (class, v) in row.iter().enumerate() {
                let target = if class == label { on } else { off };
                metrics.loss_sum -= target * (v - max - sum.ln());
                d.push(((v - max).exp() / sum - target) / labels.len() as f64);
            }
            let (first, fifth) = hits(row, label);
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
                    for (j, dx) in dx.iter_mut().enumerate() {
                        *dx += dy[j / from.elements() * from.c + j % from.c] / from.pixels() as f64;
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
        for (i, p) in self.graph.params().iter().enumerate() {
            let decay = if hyper.decay.covers(p.decay) {
                hyper.weight_decay
            } else {
                0.0
            };
            for (j, grad) in grads[i].iter().enumerate() {
                let (w, a) = (&mut self.params[i][j], &mut self.momentum[i][j]);
                let g = grad + decay * *w;
                *a = hyper.momentum * *a + g;
                *w -= hyper.lr
                    * if hyper.nesterov {
                        g + hyper.momentum * *a
                    } else {
                        *a
                    };
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
        Ok(())
    }

    fn state(&self) -> State {
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
        state
    }

    fn train_step(&mut self, batch: &Batch<'_>, hyper: &Hyper) -> Result<Metrics, Error> {
        let mut total = Metrics::default();
        let mut grads: Vec<Vec<f64>> = self.params.iter().map(|p| vec![0.0; p.len()]).collect();
        let micro_batches: Vec<_> = batch.micro_batches(self.micro_batch).collect();
        let mut seen: Vec<Vec<Moments>> = vec![];
        for micro in &micro_batches {
            let pass = self.forward(micro, true);
            let (metrics, d) = self.loss(&pass, micro.labels, hyper.label_smoothing);
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
        Ok(total)
    }

    fn eval_step(&mut self, batch: &Batch<'_>) -> Result<Metrics, Error> {
        let pass = self.forward(batch, false);
        Ok(self.loss(&pass, batch.labels, 0.0).0)
    }

    fn predict(&mut self, pixels: Pixels<'_>) -> Result<Vec<f32>, Error> {
        // A pass without a loss looks at the number of labels only.
        let labels = vec![0; pixels.len() / self.graph.plane(self.graph.input()).elements()];
        let batch = Batch {
            pixels,
            labels: &labels,
        };
        let logits = &self.forward(&batch, false).values[self.graph.logits().0];
        Ok(logits.iter().map(|&v| v as f32).collect())
    }
}

//! Factors of a branch's channels in each image: squeeze and excitation, and branches that training drops.
//!
//! With u = gamma xhat + beta the normalisation, s the sigmoid and k what dropping leaves, the branch is k s u. What the
//! backward pass needs of g, the gradient of the branch, are three sums over each image's plane: of g, of g (z - mean) and
//! of z - mean. From them follow the gradient of s, by way of the two layers that of the mean m of u, and so all of
//! that of u, k s g + dm / pixels, with its sums over the batch; then dz is linear in g and z, as for a normalisation
//! without factors (see [`super::fuse`]), with constants that differ by image.

use graph::{DropPath, Plane};

use super::memory::Span;
use super::norm::{Row, State};
use super::pool::Pool;
use super::simple;
use crate::Dropout;

/// Weight and bias of a layer, or their gradients.
pub(crate) type Layer<'a> = [Span<'a, f32>; 2];

/// What dropping leaves of each image's branch.
pub(crate) fn factors(
    dropout: Option<(Dropout, usize)>,
    path: Option<DropPath>,
    images: usize,
) -> Vec<f32> {
    let Some(((dropout, first), path)) = dropout.zip(path) else {
        return vec![1.0; images];
    };
    let paths = dropout.paths(path);
    let images = first..first + images;
    images.map(|image| paths.factor(image) as f32).collect()
}

/// The tensors of squeeze and excitation, images x channels.
#[derive(Clone, Copy)]
pub(crate) struct Excited<'a> {
    pub(crate) mean: Span<'a, f32>,
    pub(crate) inner: Span<'a, f32>,
    pub(crate) sigmoid: Span<'a, f32>,
    pub(crate) hidden: usize,
}

/// From the means over the plane to the sigmoid.
pub(crate) fn excite(
    pool: &mut Pool,
    (images, channels): (usize, usize),
    excited: Excited<'_>,
    reduce: Layer<'_>,
    expand: Layer<'_>,
) {
    let Excited {
        mean,
        inner,
        sigmoid,
        hidden,
    } = excited;
    let [w, b] = reduce;
    simple::linear(pool, (images, channels, hidden), mean, w, b, inner);
    // SAFETY: no region runs.
    unsafe { inner.get_mut().iter_mut().for_each(|v| *v = v.max(0.0)) };
    let [w, b] = expand;
    simple::linear(pool, (images, hidden, channels), inner, w, b, sigmoid);
    // SAFETY: no region runs.
    let values = unsafe { sigmoid.get_mut() };
    for v in values {
        *v = (1.0 / (1.0 + (-f64::from(*v)).exp())) as f32;
    }
}

/// gate = sigmoid, if there is one, times the factors of images.
pub(crate) fn fill(gate: Span<'_, f32>, sigmoid: Option<Span<'_, f32>>, factors: &[f32]) {
    // SAFETY: no region runs, and the two are different buffers.
    let (gate, sigmoid) = unsafe { (gate.get_mut(), sigmoid.map(|s| s.get())) };
    let channels = gate.len() / factors.len();
    for (i, gate) in gate.iter_mut().enumerate() {
        *gate = factors[i / channels] * sigmoid.map_or(1.0, |s| s[i]);
    }
}

/// Working memory of the backward pass: images x channels each, but for `inner`, images x hidden channels.
#[derive(Clone, Copy)]
pub(crate) struct Sums<'a> {
    /// Of g, of g (z - mean) and of z - mean, over planes.
    pub(crate) planes: [Span<'a, f32>; 3],
    /// The gradient of what the sigmoid reads.
    expanded: Span<'a, f32>,
    /// That of the means over planes; zero without squeeze and excitation.
    mean: Span<'a, f32>,
    /// That of the hidden channels.
    inner: Span<'a, f32>,
}

impl<'a> Sums<'a> {
    pub(crate) fn new(all: Span<'a, f32>, plane: usize, hidden: usize) -> Self {
        let part = |i: usize| all.part(i * plane..(i + 1) * plane);
        Self {
            planes: [part(0), part(1), part(2)],
            expanded: part(3),
            mean: part(4),
            inner: all.part(5 * plane..5 * plane + hidden),
        }
    }

    /// The constants of dz that differ by image: the factor of g, and what is added.
    pub(crate) fn constants(self) -> [Span<'a, f32>; 2] {
        [self.planes[0], self.planes[1]]
    }
}

/// The gradients of the two layers, and of the means over planes. `beta` is the normalisation's, `layers` are weights and
/// gradients of reduce and expand.
pub(crate) fn excite_backward(
    pool: &mut Pool,
    (images, channels): (usize, usize),
    excited: Excited<'_>,
    sums: Sums<'_>,
    (state, beta): (State<'_>, Span<'_, f32>),
    factors: &[f32],
    layers: [(Layer<'_>, Layer<'_>); 2],
    accumulate: bool,
) {
    // SAFETY: no region runs, and these are different buffers.
    unsafe {
        let (scale, beta) = (state.get(Row::Scale), beta.get());
        let [g, gz] = [sums.planes[0].get(), sums.planes[1].get()];
        let (sigmoid, d) = (excited.sigmoid.get(), sums.expanded.get_mut());
        for (i, d) in d.iter_mut().enumerate() {
            let c = i % channels;
            // The sum of g u.
            let by_gate = scale[c] * gz[i] + beta[c] * g[i];
            *d = factors[i / channels] * by_gate * sigmoid[i] * (1.0 - sigmoid[i]);
        }
    }
    let hidden = excited.hidden;
    let [
        ([reduce, _], reduce_gradients),
        ([expand, _], expand_gradients),
    ] = layers;
    simple::linear_backward(
        pool,
        (images, hidden, channels),
        (excited.inner, expand, sums.expanded),
        (expand_gradients[0], expand_gradients[1], accumulate),
        sums.inner,
    );
    // SAFETY: no region runs, and these are different buffers.
    unsafe {
        let of = sums.inner.get_mut().iter_mut().zip(excited.inner.get());
        of.filter(|(_, inner)| **inner <= 0.0)
            .for_each(|(d, _)| *d = 0.0);
    }
    simple::linear_backward(
        pool,
        (images, channels, hidden),
        (excited.mean, reduce, sums.inner),
        (reduce_gradients[0], reduce_gradients[1], accumulate),
        sums.mean,
    );
}

/// From the sums over planes to the normalisation's gradients and the constants of dz; `done(channel, dgamma, dbeta)`.
/// `squeezed`: the gradient of the means over planes is there.
pub(crate) fn close(
    plane: Plane,
    images: usize,
    sums: Sums<'_>,
    gate: Span<'_, f32>,
    squeezed: bool,
    state: State<'_>,
    mut done: impl FnMut(usize, f64, f64),
) {
    let (channels, pixels) = (plane.c, plane.pixels() as f64);
    // SAFETY: no region runs, these are different buffers, and channels of the state are set one by one.
    unsafe {
        let gate = gate.get();
        let mean = sums.mean.get();
        let d_mean = |i: usize| if squeezed { f64::from(mean[i]) } else { 0.0 };
        let [first, second, third] = sums.planes;
        let (g, gz, z) = (first.get_mut(), second.get_mut(), third.get());
        for c in 0..channels {
            let (mut sum_g, mut sum_gz) = (0.0, 0.0);
            for i in (c..images * channels).step_by(channels) {
                let (k, dm) = (f64::from(gate[i]), d_mean(i));
                sum_g += k * f64::from(g[i]) + dm;
                sum_gz += k * f64::from(gz[i]) + dm / pixels * f64::from(z[i]);
            }
            let dgamma = state.set_gradient(c, sum_g, sum_gz, images * plane.pixels());
            done(c, dgamma, sum_g);
            let (a, rest) = (
                f64::from(state.at(Row::A, c)),
                f64::from(state.at(Row::C, c)),
            );
            for i in (c..images * channels).step_by(channels) {
                g[i] = (a * f64::from(gate[i])) as f32;
                gz[i] = (a * d_mean(i) / pixels + rest) as f32;
            }
        }
    }
}

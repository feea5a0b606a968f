//! Which algorithm computes a convolution, and the memory that it needs: functions of shapes and options only.

use graph::{Caps, Geometry, Needs, Plane};
use half::bf16;

use super::direct::Arithmetic;
use super::fuse::Partials;
use super::memory::ALIGNMENT;
use super::simd::Level;
use super::{Options, Precision, direct, pixels, wgrad, wgrad_tiles, wino};

/// What the engine asks of a program.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuCaps {
    pub(crate) level: Level,
    pub(crate) precision: Precision,
    winograd: bool,
}

/// A convolution's product, forward or for the gradient of its input.
#[derive(Clone, Debug)]
pub(crate) enum Product {
    Direct(direct::Plan),
    Winograd(wino::Plan),
}

/// The gradient of a convolution's weight.
#[derive(Clone, Debug)]
pub(crate) enum WeightProduct {
    Direct(wgrad::Plan),
    Tiled(wgrad_tiles::Plan),
    Winograd(wino::Plan),
}

impl CpuCaps {
    pub(crate) fn new(options: &Options) -> Self {
        Self {
            level: options.level,
            precision: options.precision,
            winograd: options.winograd,
        }
    }

    /// How direct convolutions multiply.
    pub(crate) fn arithmetic(&self) -> Arithmetic {
        match (self.precision, self.level) {
            (Precision::Bf16, Level::Avx512Bf16 | Level::Amx) => Arithmetic::Bf16,
            (Precision::F32, Level::Amx) => Arithmetic::Split,
            _ => Arithmetic::F32,
        }
    }

    /// Whether Winograd's transforms can be used, and pay, where at least `tiles` tiles share the transform of a large
    /// weight.
    fn transforms(&self, g: &Geometry, batch: usize, tiles: usize) -> bool {
        let is_3x3 = g.kernel == 3 && g.stride == 1;
        // A tile has 4 x 4 results.
        let has_tiles = g.output.h >= 4 && g.output.w >= 4;
        let has_channels = g.input.c.min(g.output.c) >= 32;
        let is_large = g.input.c * g.output.c >= 128 * 256;
        let shared = batch * g.output.h.div_ceil(4) * g.output.w.div_ceil(4);
        let pays = has_tiles && has_channels && (!is_large || shared >= tiles);
        self.winograd && self.arithmetic() != Arithmetic::Bf16 && is_3x3 && pays
    }

    pub(crate) fn forward_product(&self, g: &Geometry, batch: usize) -> Product {
        if self.transforms(g, batch, 16) {
            let (h, w, inputs, outputs) = (g.output.h, g.output.w, g.input.c, g.output.c);
            return Product::Winograd(wino::Plan::new(self.level, h, w, inputs, outputs, batch));
        }
        Product::Direct(direct::Plan::forward(
            self.level,
            self.arithmetic(),
            g,
            batch,
        ))
    }

    /// Two folded convolutions that run together, if they do.
    pub(crate) fn joined_products(
        &self,
        first: &Geometry,
        second: &Geometry,
        batch: usize,
    ) -> Option<[direct::Plan; 2]> {
        direct::Plan::joined(self.level, self.arithmetic(), [first, second], batch)
    }

    pub(crate) fn backward_product(&self, g: &Geometry, batch: usize) -> Product {
        if self.transforms(g, batch, 32) {
            let (h, w, inputs, outputs) = (g.output.h, g.output.w, g.output.c, g.input.c);
            return Product::Winograd(wino::Plan::new(self.level, h, w, inputs, outputs, batch));
        }
        // What is read is the sum of two tensors, and is cut into pieces for every result of a pixel.
        let depth = g.kernel * g.kernel * g.output.c;
        let pays = depth >= 256 && (g.kernel > 1 || g.input.c >= 256);
        let arithmetic = self.arithmetic().split_if(pays);
        Product::Direct(direct::Plan::backward(self.level, arithmetic, g, batch))
    }

    pub(crate) fn weight_product(&self, g: &Geometry, batch: usize) -> WeightProduct {
        // On fewer channels the transforms cost more than they save.
        if g.input.c.min(g.output.c) >= 64 && self.transforms(g, batch, 16) {
            let (h, w, inputs, outputs) = (g.output.h, g.output.w, g.input.c, g.output.c);
            return WeightProduct::Winograd(wino::Plan::new(
                self.level, h, w, inputs, outputs, batch,
            ));
        }
        // x is cut and transposed piece by piece, all of it for each of its channels.
        let is_wide = g.output.c >= 256 && (128..=2 * g.output.c).contains(&g.input.c);
        let arithmetic = self.arithmetic().split_if(g.kernel == 1 && is_wide);
        match wgrad_tiles::Plan::new(self.level, arithmetic, g, batch) {
            Some(plan) => WeightProduct::Tiled(plan),
            None => WeightProduct::Direct(wgrad::Plan::new(self.level, g, batch)),
        }
    }

    /// Channels rounded up to whole panels.
    pub(crate) fn columns(&self, channels: usize) -> usize {
        channels.next_multiple_of(2 * self.level.lanes())
    }

    fn product_needs(&self, product: &Product, reads_masters: bool) -> Needs {
        let f32s = |len: usize| len * size_of::<f32>();
        match product {
            Product::Direct(plan) => Needs {
                partials: f32s(plan.tasks() * Partials::record_len(plan.columns())),
                weights: if plan.pairs() == 2 {
                    plan.weights_len() * size_of::<bf16>()
                } else if reads_masters {
                    0
                } else {
                    f32s(plan.weights_len())
                },
                shared: 0,
                worker: f32s(plan.worker_len()),
            },
            Product::Winograd(plan) => Needs {
                partials: f32s(plan.tasks() * Partials::record_len(plan.columns())),
                weights: f32s(plan.weights_len()),
                shared: f32s(plan.shared_len()),
                worker: f32s(plan.worker_len()),
            },
        }
    }
}

impl Caps for CpuCaps {
    fn alignment(&self) -> usize {
        ALIGNMENT
    }

    fn element(&self) -> usize {
        match self.precision {
            Precision::F32 => size_of::<f32>(),
            Precision::Bf16 => size_of::<bf16>(),
        }
    }

    fn adds_in_place(&self) -> bool {
        true
    }

    fn forward(&self, g: &Geometry, batch: usize) -> Needs {
        self.product_needs(&self.forward_product(g, batch), true)
    }

    fn backward_input(&self, g: &Geometry, batch: usize) -> Needs {
        self.product_needs(&self.backward_product(g, batch), false)
    }

    fn backward_weight(&self, g: &Geometry, batch: usize) -> Needs {
        let (shared, worker) = match self.weight_product(g, batch) {
            WeightProduct::Direct(plan) => (plan.shared_len(), plan.worker_len()),
            WeightProduct::Tiled(plan) => (plan.shared_len(), plan.worker_len()),
            WeightProduct::Winograd(plan) => (plan.weight_shared_len(), plan.weight_worker_len()),
        };
        Needs {
            shared: shared * size_of::<f32>(),
            worker: worker * size_of::<f32>(),
            ..Needs::default()
        }
    }

    fn joins(&self, first: &Geometry, second: &Geometry, batch: usize) -> bool {
        self.joined_products(first, second, batch).is_some()
    }

    fn visit(&self, plane: Plane, batch: usize) -> Needs {
        let record = Partials::record_len(self.columns(plane.c));
        Needs {
            partials: pixels::visits(plane, batch) * record * size_of::<f32>(),
            ..Needs::default()
        }
    }
}

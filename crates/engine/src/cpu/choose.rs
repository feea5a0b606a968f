//! Which algorithm computes a convolution, and the memory that it needs: functions of shapes and options only.

use graph::{Caps, Geometry, Needs, Plane};
use half::bf16;

use super::fuse::Partials;
use super::memory::ALIGNMENT;
use super::simd::Level;
use super::{Options, Precision, direct, pixels, wgrad};

/// What the engine asks of a program.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuCaps {
    pub(crate) level: Level,
    pub(crate) precision: Precision,
}

/// A convolution's product, forward or for the gradient of its input.
#[derive(Clone, Debug)]
pub(crate) enum Product {
    Direct(direct::Plan),
}

impl CpuCaps {
    pub(crate) fn new(options: &Options) -> Self {
        Self {
            level: options.level,
            precision: options.precision,
        }
    }

    /// Whether convolutions multiply pairs of bf16.
    pub(crate) fn multiplies_bf16(&self) -> bool {
        self.precision == Precision::Bf16 && self.level == Level::Avx512Bf16
    }

    pub(crate) fn forward_product(&self, g: &Geometry, batch: usize) -> Product {
        Product::Direct(direct::Plan::forward(self.level, g, batch))
    }

    pub(crate) fn backward_product(&self, g: &Geometry, batch: usize) -> Product {
        Product::Direct(direct::Plan::backward(self.level, g, batch))
    }

    pub(crate) fn weight_product(&self, g: &Geometry, batch: usize) -> wgrad::Plan {
        wgrad::Plan::new(self.level, g, batch)
    }

    /// Channels rounded up to whole panels.
    pub(crate) fn columns(&self, channels: usize) -> usize {
        channels.next_multiple_of(2 * self.level.lanes())
    }

    fn product_needs(&self, product: &Product, reads_masters: bool) -> Needs {
        let Product::Direct(plan) = product;
        let weights = if self.multiplies_bf16() {
            plan.weights_len::<bf16>() * size_of::<bf16>()
        } else if reads_masters {
            0
        } else {
            plan.weights_len::<f32>() * size_of::<f32>()
        };
        Needs {
            partials: plan.tasks() * Partials::record_len(plan.columns()) * size_of::<f32>(),
            weights,
            shared: 0,
            worker: plan.worker_len() * size_of::<f32>(),
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

    fn forward(&self, g: &Geometry, batch: usize) -> Needs {
        self.product_needs(&self.forward_product(g, batch), true)
    }

    fn backward_input(&self, g: &Geometry, batch: usize) -> Needs {
        self.product_needs(&self.backward_product(g, batch), false)
    }

    fn backward_weight(&self, g: &Geometry, batch: usize) -> Needs {
        let plan = self.weight_product(g, batch);
        Needs {
            shared: plan.shared_len() * size_of::<f32>(),
            worker: plan.worker_len() * size_of::<f32>(),
            ..Needs::default()
        }
    }

    fn visit(&self, plane: Plane, batch: usize) -> Needs {
        let record = Partials::record_len(self.columns(plane.c));
        Needs {
            partials: pixels::visits(plane, batch) * record * size_of::<f32>(),
            ..Needs::default()
        }
    }
}

//! What a micro-batch depends on besides its images, as the kernels read it.

use crate::labels::targets;
use crate::{Batch, Hyper, Rule};

/// The kernels' Hyper.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Words {
    lr: f32,
    momentum: f32,
    weight_decay: f32,
    nesterov: f32,
    on: f32,
    off: f32,
    share: f32,
    mix: f32,
    trust: f32,
    clip: f32,
    average: f32,
    rule: u32,
    drop_key: u64,
    drop_rate: f64,
    first_image: u32,
    is_mixed: u32,
}

/// Bytes of it.
pub(crate) const BYTES: usize = size_of::<Words>();

impl Words {
    /// Those of a step of `images` images in all, for the micro-batch that begins with number `first`.
    pub(crate) fn of_step(
        hyper: &Hyper,
        batch: &Batch<'_>,
        classes: usize,
        images: usize,
        first: usize,
    ) -> Self {
        let (on, off) = targets(hyper.label_smoothing, classes);
        let (rule, trust) = match hyper.rule {
            Rule::Sgd => (0, 0.0),
            Rule::Lars2018 { trust } => (1, trust),
            Rule::Lars { trust } => (2, trust),
        };
        let dropout = hyper.dropout.filter(|dropout| dropout.rate > 0.0);
        Self {
            lr: hyper.lr as f32,
            momentum: hyper.momentum as f32,
            weight_decay: hyper.weight_decay as f32,
            nesterov: if hyper.nesterov { 1.0 } else { 0.0 },
            on: on as f32,
            off: off as f32,
            share: (1.0 / images as f64) as f32,
            mix: batch.mixed.map_or(1.0, |mixed| mixed.share as f32),
            trust: trust as f32,
            clip: hyper.clip_norm.unwrap_or(0.0) as f32,
            average: hyper.average.map_or(0.0, |decay| (1.0 - decay) as f32),
            rule,
            drop_key: dropout.map_or(0, |dropout| dropout.key()),
            drop_rate: dropout.map_or(0.0, |dropout| dropout.rate),
            first_image: first as u32,
            is_mixed: u32::from(batch.mixed.is_some()),
        }
    }

    /// Those of an evaluation.
    pub(crate) fn of_inference(classes: usize) -> Self {
        let (on, off) = targets(0.0, classes);
        Self {
            on: on as f32,
            off: off as f32,
            share: 1.0,
            mix: 1.0,
            ..Self::default()
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: every byte of it is a field's; there are no gaps between them.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), BYTES) }
    }
}

//! Convolutions by conv.cu, where cuDNN is not: each product as one or two launches.

use super::Precision;
use super::calls::{CHUNK, Call, IMAGE_CHANNELS};
use super::cudnn::{Conv, Product, Tensors};
use super::driver::{Address, Arg};

/// Rows of a block's result.
const ROWS: usize = 128;
/// Values that a block of conv_sum, and of conv_sum_many, adds up.
const SUMMED: usize = CHUNK;
const SUMMED_BY_MANY: usize = 128;
/// Parts from which conv_sum_many is the one to take.
const MANY: usize = 16;
/// Most parts of a sum.
const MOST_PARTS: usize = 256;
/// What a block costs besides its stages, in stages: it fills and stores its tile.
const BLOCK: usize = 10;

/// The kernels of conv.cu for a number format.
pub(crate) fn kernels(element: u8) -> &'static [&'static str] {
    match element {
        0 => &F32,
        _ => &HALF,
    }
}

const F32: [&str; 16] = [
    "conv_forward_128",
    "conv_forward_128_tf32",
    "conv_forward_64",
    "conv_forward_64_tf32",
    "conv_input_128",
    "conv_input_128_tf32",
    "conv_input_64",
    "conv_input_64_tf32",
    "conv_sum",
    "conv_sum_many",
    "conv_weight_128",
    "conv_weight_128_tf32",
    "conv_weight_64",
    "conv_weight_64_tf32",
    "conv_weight_turned",
    "conv_weight_turned_tf32",
];

const HALF: [&str; 11] = [
    "conv_forward_128",
    "conv_forward_64",
    "conv_forward_image",
    "conv_input_128",
    "conv_input_64",
    "conv_sum",
    "conv_sum_many",
    "conv_weight_128",
    "conv_weight_64",
    "conv_weight_image",
    "conv_weight_turned",
];

/// What convolutions are launched with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launches {
    pub(crate) precision: Precision,
    pub(crate) multiprocessors: usize,
    pub(crate) workspace: Address,
    /// Bytes.
    pub(crate) workspace_bytes: usize,
}

/// Whether tiles of 64 leave less of a block idle than tiles of 128 do.
fn is_narrow(width: usize) -> bool {
    width <= 64 || (width < 256 && (1..=64).contains(&(width % 128)))
}

impl Launches {
    /// Changes when what is launched does, besides the kernels themselves.
    pub(crate) const FORM: u32 = 1;

    /// The name of a kernel in this number format.
    fn name(&self, plain: &'static str) -> &'static str {
        match self.precision {
            Precision::Tf32 => F32
                .into_iter()
                .find(|name| name.strip_suffix("_tf32") == Some(plain))
                .unwrap_or(plain),
            _ => plain,
        }
    }

    /// Whether there is room for what a convolution leaves behind in between.
    pub(crate) fn fits(&self, conv: &Conv) -> bool {
        let weights = conv.geometry.depth() * conv.geometry.output.c;
        conv.product != Product::Weight || weights * size_of::<f32>() <= self.workspace_bytes
    }

    /// A convolution of a batch, which fits.
    pub(crate) fn calls(&self, conv: &Conv, at: Tensors) -> Vec<Call> {
        assert!(self.fits(conv), "the workspace holds one part");
        let g = &conv.geometry;
        let sizes = [
            conv.batch, g.input.h, g.input.w, g.input.c, g.output.h, g.output.w, g.output.c,
            g.kernel,
        ];
        let args = |from: Address, with: Address, to: Address| {
            vec![
                Arg::address(from),
                Arg::address(with),
                Arg::address(to),
                Arg::ints(&sizes),
                Arg::int(g.stride),
            ]
        };
        let launch = |name, x: usize, y: usize, args| Call::Launch {
            name: self.name(name),
            grid: (x as u32, y as u32),
            args,
            bytes: 0,
        };
        // An image has too few channels for whole pieces of 16 bytes.
        let is_image = g.input.c == IMAGE_CHANNELS && self.precision.bytes() == 2;
        let (pixels, outputs) = (conv.batch * g.output.pixels(), g.output.c);
        let width = |is_narrow: bool| if is_narrow { 64 } else { ROWS };
        match conv.product {
            Product::Forward => {
                let is_narrow = is_image || is_narrow(outputs);
                let name = match (is_image, is_narrow) {
                    (true, _) => "conv_forward_image",
                    (_, true) => "conv_forward_64",
                    (_, false) => "conv_forward_128",
                };
                let blocks = pixels.div_ceil(ROWS) * outputs.div_ceil(width(is_narrow));
                vec![launch(name, blocks, 1, args(at.x, at.w, at.y))]
            }
            Product::Input => {
                assert!(!is_image, "nothing asks for an image's gradient");
                let is_narrow = is_narrow(g.input.c);
                let name = match is_narrow {
                    true => "conv_input_64",
                    false => "conv_input_128",
                };
                // Pixels that the same taps reach are computed together.
                let s = g.stride;
                let rows = conv.batch * g.input.h.div_ceil(s) * g.input.w.div_ceil(s);
                let blocks = rows.div_ceil(ROWS) * g.input.c.div_ceil(width(is_narrow));
                vec![launch(name, blocks, s * s, args(at.y, at.w, at.x))]
            }
            Product::Weight => {
                let depth = g.kernel * g.kernel * g.input.c;
                let (name, tiles) = if is_image || is_narrow(outputs) {
                    let name = match is_image {
                        true => "conv_weight_image",
                        false => "conv_weight_turned",
                    };
                    (name, depth.div_ceil(ROWS) * outputs.div_ceil(64))
                } else {
                    let is_narrow = is_narrow(depth);
                    let name = match is_narrow {
                        true => "conv_weight_64",
                        false => "conv_weight_128",
                    };
                    (
                        name,
                        outputs.div_ceil(ROWS) * depth.div_ceil(width(is_narrow)),
                    )
                };
                let count = outputs * depth;
                let parts = self.parts(pixels, tiles, count);
                let partials = match self.precision.bytes() {
                    4 if parts == 1 => at.w,
                    _ => self.workspace,
                };
                let mut calls = vec![launch(name, tiles, parts, args(at.x, at.y, partials))];
                if partials != at.w {
                    let (name, block) = match parts >= MANY {
                        true => ("conv_sum_many", SUMMED_BY_MANY),
                        false => ("conv_sum", SUMMED),
                    };
                    let args = vec![
                        Arg::address(partials),
                        Arg::address(at.w),
                        Arg::int(count),
                        Arg::int(parts),
                    ];
                    calls.push(launch(name, count.div_ceil(block), 1, args));
                }
                calls
            }
        }
    }

    /// In how many parts the pixels of a weight's gradient are summed: as many as fill the card with the least to do for
    /// the blocks that are done last. (An estimate; it has not been measured.)
    fn parts(&self, pixels: usize, tiles: usize, count: usize) -> usize {
        let deep = 64 / self.precision.bytes();
        let steps = pixels.div_ceil(deep);
        let most = (steps / 8).min(MOST_PARTS);
        let most = most.min(self.workspace_bytes / (count * size_of::<f32>()));
        let slots = 2 * self.multiprocessors;
        let cost = |parts: &usize| {
            let rounds = (tiles * parts).div_ceil(slots);
            rounds * (steps.div_ceil(*parts) + BLOCK)
        };
        (1..=most.max(1)).min_by_key(cost).unwrap_or(1)
    }
}

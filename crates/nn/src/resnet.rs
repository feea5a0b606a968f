//! The depths as types, and the one `match` from configuration to types.

use std::fmt;

use graph::Graph;

use crate::layers::{Basic, Bottleneck, Head, Identity, Projection, Stage, Stem};
use crate::recorder::{Blocks, Recipe, record_with};

/// A bottleneck that keeps its shape: `O` to `M` to `O` channels.
type Keep<const M: usize, const O: usize> = Bottleneck<O, M, O, 1, Identity>;
/// A bottleneck that changes its shape.
type Change<const I: usize, const M: usize, const O: usize, const S: usize> =
    Bottleneck<I, M, O, S, Projection<I, O, S>>;
/// A basic block that keeps its shape.
type BasicKeep<const O: usize> = Basic<O, O, 1, Identity>;
/// A basic block that changes its shape.
type BasicChange<const I: usize, const O: usize, const S: usize> =
    Basic<I, O, S, Projection<I, O, S>>;

/// A network of basic blocks; `F` is the first block of group 1, the others follow from the numbers of blocks
/// after the first of each group.
type BasicNet<F, const A: usize, const B: usize, const C: usize, const D: usize> = (
    Stem,
    Stage<F, BasicKeep<64>, A, 1>,
    Stage<BasicChange<64, 128, 2>, BasicKeep<128>, B, 2>,
    Stage<BasicChange<128, 256, 2>, BasicKeep<256>, C, 3>,
    Stage<BasicChange<256, 512, 2>, BasicKeep<512>, D, 4>,
    Head<512>,
);
/// A network of bottlenecks.
type BottleneckNet<const A: usize, const B: usize, const C: usize, const D: usize> = (
    Stem,
    Stage<Change<64, 64, 256, 1>, Keep<64, 256>, A, 1>,
    Stage<Change<256, 128, 512, 2>, Keep<128, 512>, B, 2>,
    Stage<Change<512, 256, 1024, 2>, Keep<256, 1024>, C, 3>,
    Stage<Change<1024, 512, 2048, 2>, Keep<512, 2048>, D, 4>,
    Head<2048>,
);

/// Group 1 of ResNet-18/34 begins with a projection in the reference and with an identity in torchvision.
type ProjectFirst = BasicChange<64, 64, 1>;
type KeepFirst = BasicKeep<64>;

fn basic_net<F: Default, const A: usize, const B: usize, const C: usize, const D: usize>(
    classes: usize,
    stem: Stem,
) -> BasicNet<F, A, B, C, D> {
    (
        stem,
        Default::default(),
        Default::default(),
        Default::default(),
        Default::default(),
        Head(classes),
    )
}

fn bottleneck_net<const A: usize, const B: usize, const C: usize, const D: usize>(
    classes: usize,
    stem: Stem,
) -> BottleneckNet<A, B, C, D> {
    (
        stem,
        Default::default(),
        Default::default(),
        Default::default(),
        Default::default(),
        Head(classes),
    )
}

/// The depths that are compiled in.
pub const DEPTHS: [usize; 9] = [18, 34, 50, 101, 152, 200, 270, 350, 420];

/// A depth or resolution that is not compiled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsupported {
    /// No such depth.
    Depth(usize),
    /// No such resolution.
    Resolution(usize),
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unsupported::Depth(d) => write!(f, "depth {d} is not one of {DEPTHS:?}"),
            Unsupported::Resolution(r) => {
                write!(f, "resolution {r} is not a multiple of 32 from 32 to 448")
            }
        }
    }
}

impl std::error::Error for Unsupported {}

/// What a ResNet may have besides what its depth says. Shapes do not depend on it, so it is a value.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Variant {
    /// The stem.
    pub stem: Stem,
    /// The blocks.
    pub blocks: Blocks,
}

/// Records one depth at one resolution; a macro, because `R` is a type of its own to every layer.
macro_rules! at {
    ($r:literal, $depth:expr, $classes:expr, $recipe:expr, $variant:expr) => {{
        let Variant { stem, blocks } = $variant;
        match ($depth, $recipe) {
            (18, Recipe::Tpu2018) => record_with::<_, $r>(
                &basic_net::<ProjectFirst, 1, 1, 1, 1>($classes, stem),
                $recipe,
                blocks,
            ),
            (18, Recipe::Torchvision) => record_with::<_, $r>(
                &basic_net::<KeepFirst, 1, 1, 1, 1>($classes, stem),
                $recipe,
                blocks,
            ),
            (34, Recipe::Tpu2018) => record_with::<_, $r>(
                &basic_net::<ProjectFirst, 2, 3, 5, 2>($classes, stem),
                $recipe,
                blocks,
            ),
            (34, Recipe::Torchvision) => record_with::<_, $r>(
                &basic_net::<KeepFirst, 2, 3, 5, 2>($classes, stem),
                $recipe,
                blocks,
            ),
            (50, _) => record_with::<_, $r>(
                &bottleneck_net::<2, 3, 5, 2>($classes, stem),
                $recipe,
                blocks,
            ),
            (101, _) => record_with::<_, $r>(
                &bottleneck_net::<2, 3, 22, 2>($classes, stem),
                $recipe,
                blocks,
            ),
            (152, _) => record_with::<_, $r>(
                &bottleneck_net::<2, 7, 35, 2>($classes, stem),
                $recipe,
                blocks,
            ),
            (200, _) => record_with::<_, $r>(
                &bottleneck_net::<2, 23, 35, 2>($classes, stem),
                $recipe,
                blocks,
            ),
            // The depths of ResNet-RS (Bello et al. 2021, appendix C).
            (270, _) => record_with::<_, $r>(
                &bottleneck_net::<3, 28, 52, 3>($classes, stem),
                $recipe,
                blocks,
            ),
            (350, _) => record_with::<_, $r>(
                &bottleneck_net::<3, 35, 71, 3>($classes, stem),
                $recipe,
                blocks,
            ),
            (420, _) => record_with::<_, $r>(
                &bottleneck_net::<3, 43, 86, 3>($classes, stem),
                $recipe,
                blocks,
            ),
            _ => return Err(Unsupported::Depth($depth)),
        }
    }};
}

macro_rules! resolutions {
    ($($r:literal)*) => {
        /// The resolutions that are compiled in: the multiples of 32 from 32 to 448.
        pub const RESOLUTIONS: &[usize] = &[$($r),*];

        /// The ResNet of a depth, for square images of `resolution` pixels.
        ///
        /// # Errors
        /// If the depth or the resolution is not compiled in.
        pub fn resnet(depth: usize, resolution: usize, classes: usize, recipe: Recipe) -> Result<Graph, Unsupported> {
            resnet_with(Variant::default(), depth, resolution, classes, recipe)
        }

        /// The same with another stem or other blocks.
        ///
        /// # Errors
        /// If the depth or the resolution is not compiled in.
        pub fn resnet_with(
            variant: Variant,
            depth: usize,
            resolution: usize,
            classes: usize,
            recipe: Recipe,
        ) -> Result<Graph, Unsupported> {
            Ok(match resolution {
                $($r => at!($r, depth, classes, recipe, variant),)*
                _ => return Err(Unsupported::Resolution(resolution)),
            })
        }
    };
}

resolutions!(32 64 96 128 160 192 224 256 288 320 352 384 416 448);

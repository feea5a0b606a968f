//! Layers whose shapes are types, and the ResNets made of them.
//!
//! A layer is a zero-sized type that implements [`dfdx::nn::Module`] for the activations it accepts; dfdx's tuples
//! and [`Repeated`] compose layers. A wrong channel count, a missing projection or a resolution that cannot be
//! halved is a compile error. Running the typed forward once records a [`graph::Graph`]; from there on nothing is generic.
//!
//! The layers hold no parameters and compute nothing: engines execute the graph (docs/decisions/0001).
//!
//! [`Repeated`]: dfdx::nn::modules::Repeated

mod layers;
mod recorder;
mod resnet;
mod shape;

pub use layers::{Basic, Bottleneck, Head, Identity, Projection, Shortcut, Stage, Stem};
pub use recorder::{Act, Blocks, Recipe, Squares, record};
pub use resnet::{DEPTHS, RESOLUTIONS, Unsupported, Variant, resnet, resnet_with};
pub use shape::{Channels, Strided};

/// Fixed side lengths, channel counts and shapes, from dfdx.
pub use dfdx::shapes::Const;

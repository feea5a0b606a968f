//! The one spatial rule, and the one rule of channels.

use dfdx::shapes::{Const, Dim};

/// A side of an image that a window of stride `S` can walk along.
///
/// Every stride-2 window of a ResNet has K = 2P + 1 (7x7 with padding 3, 3x3 with 1, 1x1 with 0), so the result is
/// half as long. Only even lengths implement it, so a resolution that cannot be halved does not compile.
#[diagnostic::on_unimplemented(
    message = "a side of `{Self}` pixels cannot be halved",
    label = "no rule for stride {S} here",
    note = "a ResNet halves the image five times: use a resolution that is a multiple of 32 from 32 to 448"
)]
pub trait Strided<const S: usize>: Dim {
    /// The length after the window.
    type Out: Dim;

    /// The value of [`Strided::Out`].
    fn strided(self) -> Self::Out;
}

impl<D: Dim> Strided<1> for D {
    type Out = D;

    fn strided(self) -> D {
        self
    }
}

macro_rules! halved {
    ($($n:literal)*) => { $(
        impl Strided<2> for Const<$n> {
            type Out = Const<{ $n / 2 }>;

            fn strided(self) -> Self::Out {
                Const
            }
        }
    )* };
}

// Multiples of 32 up to 448, and their halves, quarters, eighths and sixteenths.
halved!(
    2 4 6 8 10 12 14 16 18 20 22 24 26 28 32 36 40 44 48 52 56 64 72 80 88 96 104 112
    128 144 160 176 192 208 224 256 288 320 352 384 416 448
);

/// The channels of an activation that a layer for `C` channels reads; only `Const<C>` implements it.
///
/// Layers ask for it instead of writing `Const<C>` in their input, so that the compiler can say what to change.
#[diagnostic::on_unimplemented(
    message = "a layer for {C} channels cannot read `{Self}`",
    label = "the layer before this one gives another number of channels",
    note = "make the layer's input channels those of the layer before it, or put a `Projection` between"
)]
pub trait Channels<const C: usize>: Dim {}

impl<const C: usize> Channels<C> for Const<C> {}

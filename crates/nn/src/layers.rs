//! The layers. Each is a type of no size; a generic method is a shell around one un-generic recording.

use std::convert::Infallible;

use dfdx::nn::modules::Repeated;
use dfdx::nn::{Module, NonMutableModule};
use dfdx::shapes::{Const, Dim, Shape};
use graph::ValueId;

use crate::recorder::{Act, Recorder};
use crate::shape::{Channels, Strided};

/// What joins the input of a block to its output.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not lead from `{In}` to `{Out}`",
    label = "this shortcut does not fit its block",
    note = "a block that changes channels or resolution needs `Projection<I, O, S>`; `Identity` keeps the shape"
)]
pub trait Shortcut<In, Out> {
    /// Records the shortcut.
    fn shortcut(&self, x: In) -> Out;
}

/// The input itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Identity;

impl<X> Shortcut<X, X> for Identity {
    fn shortcut(&self, x: X) -> X {
        x
    }
}

/// A 1x1 convolution of stride `S` from `I` to `O` channels, or a mean and one of stride 1 ([`Blocks`]), and a
/// normalisation.
///
/// [`Blocks`]: crate::Blocks
#[derive(Clone, Copy, Debug, Default)]
pub struct Projection<const I: usize, const O: usize, const S: usize>;

impl<H: Strided<S>, W: Strided<S>, C: Channels<I>, const I: usize, const O: usize, const S: usize>
    Shortcut<Act<(usize, H, W, C)>, Act<(usize, H::Out, W::Out, Const<O>)>>
    for Projection<I, O, S>
{
    fn shortcut(&self, x: Act<(usize, H, W, C)>) -> Act<(usize, H::Out, W::Out, Const<O>)> {
        let (n, h, w, _) = x.shape;
        let id = x.recorder().projection(x.id, O, S);
        x.then((n, h.strided(), w.strided(), Const), id)
    }
}

/// Two 3x3 convolutions, the first of stride `S` (He et al. 2016, figure 2, left).
#[derive(Clone, Copy, Debug, Default)]
pub struct Basic<const I: usize, const O: usize, const S: usize, P>(P);

/// 1x1, 3x3 and 1x1 convolutions by way of `M` channels. The stride is on the 3x3, as in v1.5 and the TPU
/// reference; He et al. put it on the first 1x1.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bottleneck<const I: usize, const M: usize, const O: usize, const S: usize, P>(P);

fn basic(r: &mut Recorder, x: ValueId, out: usize, stride: usize) -> ValueId {
    let y = r.conv_bn(("conv1", "bn1"), x, out, (3, stride), false);
    let y = r.relu(y);
    r.conv_bn(("conv2", "bn2"), y, out, (3, 1), true)
}

fn bottleneck(r: &mut Recorder, x: ValueId, mid: usize, out: usize, stride: usize) -> ValueId {
    let y = r.conv_bn(("conv1", "bn1"), x, mid, (1, 1), false);
    let y = r.relu(y);
    let y = r.conv_bn(("conv2", "bn2"), y, mid, (3, stride), false);
    let y = r.relu(y);
    r.conv_bn(("conv3", "bn3"), y, out, (1, 1), true)
}

/// Records `branch`, the shortcut and their sum as the next block of the stage.
fn block<X, Y, P>(
    x: Act<X>,
    shortcut: &P,
    branch: impl FnOnce(&mut Recorder, ValueId) -> ValueId,
) -> Act<Y>
where
    X: Shape,
    Y: Shape,
    P: Shortcut<Act<X>, Act<Y>>,
{
    x.recorder().open_block();
    let main = branch(&mut x.recorder(), x.id);
    let main = x.recorder().end_branch(main);
    let side = shortcut.shortcut(x);
    let id = side.recorder().join(main, side.id);
    side.recorder().close();
    let shape = side.shape;
    side.then(shape, id)
}

impl<
    H: Strided<S>,
    W: Strided<S>,
    C: Channels<I>,
    P,
    const I: usize,
    const O: usize,
    const S: usize,
> Module<Act<(usize, H, W, C)>> for Basic<I, O, S, P>
where
    P: Shortcut<Act<(usize, H, W, C)>, Act<(usize, H::Out, W::Out, Const<O>)>>,
{
    type Output = Act<(usize, H::Out, W::Out, Const<O>)>;
    type Error = Infallible;

    fn try_forward(&self, x: Act<(usize, H, W, C)>) -> Result<Self::Output, Infallible> {
        Ok(block(x, &self.0, |r, x| basic(r, x, O, S)))
    }
}

impl<
    H: Strided<S>,
    W: Strided<S>,
    C: Channels<I>,
    P,
    const I: usize,
    const M: usize,
    const O: usize,
    const S: usize,
> Module<Act<(usize, H, W, C)>> for Bottleneck<I, M, O, S, P>
where
    P: Shortcut<Act<(usize, H, W, C)>, Act<(usize, H::Out, W::Out, Const<O>)>>,
{
    type Output = Act<(usize, H::Out, W::Out, Const<O>)>;
    type Error = Infallible;

    fn try_forward(&self, x: Act<(usize, H, W, C)>) -> Result<Self::Output, Infallible> {
        Ok(block(x, &self.0, |r, x| bottleneck(r, x, M, O, S)))
    }
}

/// From an image to 64 channels of a quarter of its sides: a convolution of stride 2 with normalisation and ReLU, then a
/// pool of stride 2. Whatever the two are, the shapes are the same, so they are values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stem {
    /// Three 3x3 convolutions to 32, 32 and 64 channels, each with normalisation and ReLU, instead of one 7x7 (ResNet-C
    /// and -D: He et al. 2019, "Bag of tricks for image classification", section 4.2).
    pub is_deep: bool,
    /// A 3x3 convolution of stride 2 with normalisation and ReLU instead of the 3x3 max-pool (ResNet-RS: Bello et al.
    /// 2021, appendix B).
    pub has_conv_pool: bool,
}

impl<H: Strided<2, Out: Strided<2>>, W: Strided<2, Out: Strided<2>>, C: Channels<3>>
    Module<Act<(usize, H, W, C)>> for Stem
{
    type Output = Act<(
        usize,
        <H::Out as Strided<2>>::Out,
        <W::Out as Strided<2>>::Out,
        Const<64>,
    )>;
    type Error = Infallible;

    fn try_forward(&self, x: Act<(usize, H, W, C)>) -> Result<Self::Output, Infallible> {
        let (n, h, w, _) = x.shape;
        let id = stem(&mut x.recorder(), x.id, *self);
        Ok(x.then((n, h.strided().strided(), w.strided().strided(), Const), id))
    }
}

/// Names are torchvision's, and timm's where torchvision has no such stem.
fn stem(r: &mut Recorder, x: ValueId, kind: Stem) -> ValueId {
    let convs: &[_] = match kind.is_deep {
        false => &[(("conv1", "bn1"), 64, (7, 2))],
        true => &[
            (("conv1.0", "conv1.1"), 32, (3, 2)),
            (("conv1.3", "conv1.4"), 32, (3, 1)),
            (("conv1.6", "bn1"), 64, (3, 1)),
        ],
    };
    let mut y = x;
    for &(names, out, window) in convs {
        y = r.conv_bn(names, y, out, window, false);
        y = r.relu(y);
    }
    if !kind.has_conv_pool {
        return r.max_pool(y);
    }
    let y = r.conv_bn(("maxpool.0", "maxpool.1"), y, 64, (3, 2), false);
    r.relu(y)
}

/// Group `L` of a ResNet: a first block `F`, which may change the shape, and `N` blocks `R`, which keep it.
#[derive(Clone, Debug)]
pub struct Stage<F, R, const N: usize, const L: usize>(F, Repeated<R, N>);

impl<F: Default, R: Default + Clone, const N: usize, const L: usize> Default for Stage<F, R, N, L> {
    fn default() -> Self {
        Self(
            F::default(),
            Repeated {
                modules: vec![R::default(); N],
            },
        )
    }
}

impl<X, F, R, const N: usize, const L: usize> Module<Act<X>> for Stage<F, R, N, L>
where
    X: Shape,
    F: Module<Act<X>, Error = Infallible>,
    Repeated<R, N>: Module<F::Output, Output = F::Output, Error = Infallible>,
{
    type Output = F::Output;
    type Error = Infallible;

    fn try_forward(&self, x: Act<X>) -> Result<Self::Output, Infallible> {
        let stage = x.clone();
        stage.recorder().open_stage(L);
        let y = self.1.try_forward(self.0.try_forward(x)?)?;
        stage.recorder().close();
        Ok(y)
    }
}

/// Mean over the plane, and a classifier from `I` channels to as many classes as it is told.
#[derive(Clone, Copy, Debug)]
pub struct Head<const I: usize>(pub usize);

impl<H: Dim, W: Dim, C: Channels<I>, const I: usize> Module<Act<(usize, H, W, C)>> for Head<I> {
    type Output = Act<(usize, usize)>;
    type Error = Infallible;

    fn try_forward(&self, x: Act<(usize, H, W, C)>) -> Result<Self::Output, Infallible> {
        let id = x.recorder().head(x.id, self.0);
        let shape = (x.shape.0, self.0);
        Ok(x.then(shape, id))
    }
}

impl<const I: usize, const O: usize, const S: usize, P> NonMutableModule for Basic<I, O, S, P> {}
impl<const I: usize, const M: usize, const O: usize, const S: usize, P> NonMutableModule
    for Bottleneck<I, M, O, S, P>
{
}

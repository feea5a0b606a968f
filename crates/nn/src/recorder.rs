//! What a typed forward leaves behind: a graph, with names from a scope and initial values from the recipe.

use std::cell::{RefCell, RefMut};
use std::rc::Rc;

use dfdx::nn::Module;
use dfdx::shapes::{Const, Shape};
use graph::{DropBlock, DropPath, Graph, Init, Op, Plane, ValueId};

/// Which of the two well-known ResNets is meant; it decides initial values, the max-pool's padding and whether
/// the first group of the basic networks projects its shortcut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipe {
    /// The 2018 TPU reference: variance scaling without the factor 2, last scale of each block 0, max-pool padded
    /// at the bottom and right only, every group begins with a projection.
    Tpu2018,
    /// torchvision's `resnetN` at default arguments (He et al., with the stride on the 3x3 of a bottleneck).
    Torchvision,
}

impl Recipe {
    /// Initial values of a convolution.
    fn conv(self, inputs: usize, outputs: usize, kernel: usize) -> Init {
        let window = (kernel * kernel) as f64;
        match self {
            // TensorFlow <= 1.9: scale 1, fan-in, cut at two deviations without correction.
            Recipe::Tpu2018 => Init::TruncatedNormal {
                std: (1.0 / (window * inputs as f64)).sqrt(),
            },
            // kaiming_normal_(mode="fan_out", nonlinearity="relu").
            Recipe::Torchvision => Init::Normal {
                std: (2.0 / (window * outputs as f64)).sqrt(),
            },
        }
    }

    /// Initial scale of the last normalisation of a block.
    fn last_gamma(self) -> f32 {
        match self {
            Recipe::Tpu2018 => 0.0,
            Recipe::Torchvision => 1.0,
        }
    }

    /// Initial weight and bias of the classifier.
    fn linear(self, inputs: usize) -> (Init, Init) {
        match self {
            Recipe::Tpu2018 => (Init::Normal { std: 0.01 }, Init::Constant(0.0)),
            Recipe::Torchvision => {
                let uniform = Init::Uniform {
                    bound: (1.0 / inputs as f64).sqrt(),
                };
                (uniform, uniform)
            }
        }
    }

    /// Initial weight and bias of a layer of squeeze and excitation; torch's biases start as those of its convolutions.
    fn squeeze(self, inputs: usize, outputs: usize) -> (Init, Init) {
        let bias = match self {
            Recipe::Tpu2018 => Init::Constant(0.0),
            Recipe::Torchvision => Init::Uniform {
                bound: (1.0 / inputs as f64).sqrt(),
            },
        };
        (self.conv(inputs, outputs, 1), bias)
    }

    /// Rows above the image that the first max-pool window covers.
    fn pool_pad(self) -> usize {
        match self {
            Recipe::Tpu2018 => 0,
            Recipe::Torchvision => 1,
        }
    }
}

/// What residual blocks have besides convolutions. Shapes do not depend on it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Blocks {
    /// A shortcut that halves the sides takes the mean over 2x2 windows before a 1x1 convolution of stride 1, so that
    /// it reads every pixel (ResNet-D: He et al. 2019, "Bag of tricks for image classification", section 4.2).
    pub has_mean_shortcut: bool,
    /// Squeeze and excitation at the end of the branch (Hu et al. 2018) by way of this share of its channels, at
    /// least one. As in the TPU reference; timm rounds to multiples of 8.
    pub squeeze: Option<f64>,
    /// Branches may be dropped in training (stochastic depth, Huang et al. 2016); those of group g of 4 with (g + 1) / 5
    /// of the rate that the engine is given, as in the TPU reference. timm's rate grows by the block.
    pub are_dropped: bool,
    /// In training, squares of channels are dropped after every normalisation of a block and of its shortcut (DropBlock:
    /// Ghiasi et al. 2018), as in the TPU reference.
    pub squares: Option<Squares>,
}

/// The squares that training drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Squares {
    /// Side in pixels.
    pub side: usize,
    /// Which groups of blocks have them; group g of 4 has 1 / 4^(4 - g) of the rate that the engine is given.
    pub groups: [bool; 4],
}

/// The graph under construction and the name scope.
#[derive(Debug)]
pub(crate) struct Recorder {
    graph: Graph,
    recipe: Recipe,
    blocks: Blocks,
    scope: Vec<String>,
    /// The open stage.
    stage: usize,
    /// Number of the next block in the open stage.
    block: usize,
    /// Blocks that have been closed.
    closed: usize,
    /// Tensors that squares are dropped of.
    dropped: usize,
}

impl Recorder {
    fn name(&self, leaf: &str) -> String {
        let scope = self.scope.iter().map(String::as_str);
        scope.chain([leaf]).collect::<Vec<_>>().join(".")
    }

    pub(crate) fn open_stage(&mut self, index: usize) {
        self.scope.push(format!("layer{index}"));
        self.stage = index;
        self.block = 0;
    }

    pub(crate) fn open_block(&mut self) {
        self.scope.push(self.block.to_string());
        self.block += 1;
    }

    pub(crate) fn close(&mut self) {
        self.scope.pop();
    }

    /// A convolution and its normalisation.
    pub(crate) fn conv_bn(
        &mut self,
        (conv, bn): (&str, &str),
        x: ValueId,
        out: usize,
        (kernel, stride): (usize, usize),
        last: bool,
    ) -> ValueId {
        let init = self.recipe.conv(self.graph.plane(x).c, out, kernel);
        let gamma = if last { self.recipe.last_gamma() } else { 1.0 };
        let (conv, bn) = (self.name(conv), self.name(bn));
        let z = self.graph.conv(&conv, x, out, kernel, stride, init);
        let x = self.graph.batch_norm(&bn, z, gamma);
        self.drop_block(x)
    }

    /// What is left of a tensor of a block.
    fn drop_block(&mut self, x: ValueId) -> ValueId {
        let has = |squares: &Squares| self.stage > 0 && squares.groups[self.stage - 1];
        let Some(Squares { side, .. }) = self.blocks.squares.filter(has) else {
            return x;
        };
        let block = DropBlock {
            number: self.dropped,
            side,
            share: [1, 1 << (2 * (4 - self.stage))],
        };
        self.dropped += 1;
        let name = self.name("drop_block");
        self.graph.drop_block(&name, x, block)
    }

    pub(crate) fn relu(&mut self, x: ValueId) -> ValueId {
        let name = self.name("relu");
        self.graph.relu(&name, x)
    }

    /// A 1x1 convolution with its normalisation, which leads a shortcut to another shape. Names are torchvision's, and
    /// timm's where torchvision has no such shortcut.
    pub(crate) fn projection(&mut self, x: ValueId, out: usize, stride: usize) -> ValueId {
        if !self.blocks.has_mean_shortcut {
            return self.conv_bn(("downsample.0", "downsample.1"), x, out, (1, stride), false);
        }
        let x = match stride {
            1 => x,
            _ => {
                let name = self.name("downsample.0");
                self.graph.half_pool(&name, x)
            }
        };
        self.conv_bn(("downsample.1", "downsample.2"), x, out, (1, 1), false)
    }

    /// What comes between the last normalisation of a block's branch and the sum.
    pub(crate) fn end_branch(&mut self, mut x: ValueId) -> ValueId {
        if let Some(share) = self.blocks.squeeze {
            let channels = self.graph.plane(x).c;
            let hidden = ((channels as f64 * share) as usize).max(1);
            let (name, recipe) = (self.name("se"), self.recipe);
            let init = |inputs, outputs| recipe.squeeze(inputs, outputs);
            x = self.graph.squeeze_excite(&name, x, hidden, init);
        }
        if self.blocks.are_dropped {
            let path = DropPath {
                block: self.closed,
                share: [self.stage + 1, 5],
            };
            let name = self.name("drop_path");
            x = self.graph.drop_path(&name, x, path);
        }
        self.closed += 1;
        x
    }

    /// relu(main + shortcut).
    pub(crate) fn join(&mut self, main: ValueId, shortcut: ValueId) -> ValueId {
        let shortcut = match self.graph.node(shortcut).op {
            // The end of the block before.
            Op::Relu => self.drop_block(shortcut),
            _ => shortcut,
        };
        let name = self.name("add");
        let sum = self.graph.add(&name, main, shortcut);
        self.relu(sum)
    }

    pub(crate) fn max_pool(&mut self, x: ValueId) -> ValueId {
        self.graph.max_pool("maxpool", x, self.recipe.pool_pad())
    }

    pub(crate) fn head(&mut self, x: ValueId, classes: usize) -> ValueId {
        let pooled = self.graph.avg_pool("avgpool", x);
        let (weight, bias) = self.recipe.linear(self.graph.plane(pooled).c);
        self.graph.linear("fc", pooled, classes, weight, bias)
    }
}

/// An activation: its shape as a type, and its place in the graph being recorded.
///
/// # Shapes
/// `(usize, H, W, Const<C>)`, NHWC; the batch is a run-time number, H, W and C are known to the compiler.
#[derive(Clone, Debug)]
pub struct Act<S: Shape> {
    pub(crate) shape: S,
    pub(crate) id: ValueId,
    recorder: Rc<RefCell<Recorder>>,
}

impl<S: Shape> Act<S> {
    /// The same recording, another value.
    pub(crate) fn then<T: Shape>(self, shape: T, id: ValueId) -> Act<T> {
        Act {
            shape,
            id,
            recorder: self.recorder,
        }
    }

    pub(crate) fn recorder(&self) -> RefMut<'_, Recorder> {
        self.recorder.borrow_mut()
    }
}

/// Runs the typed forward of `net` on one image of `R` x `R` pixels and returns what it recorded.
pub fn record<N, const R: usize>(net: &N, recipe: Recipe) -> Graph
where
    N: Module<Act<(usize, Const<R>, Const<R>, Const<3>)>, Output = Act<(usize, usize)>>,
{
    record_with(net, recipe, Blocks::default())
}

/// The same with other blocks.
pub(crate) fn record_with<N, const R: usize>(net: &N, recipe: Recipe, blocks: Blocks) -> Graph
where
    N: Module<Act<(usize, Const<R>, Const<R>, Const<3>)>, Output = Act<(usize, usize)>>,
{
    let graph = Graph::new(Plane { h: R, w: R, c: 3 });
    let id = graph.input();
    let recorder = Rc::new(RefCell::new(Recorder {
        graph,
        recipe,
        blocks,
        scope: vec![],
        stage: 0,
        block: 0,
        closed: 0,
        dropped: 0,
    }));
    let image = Act {
        shape: (1, Const, Const, Const),
        id,
        recorder: Rc::clone(&recorder),
    };
    drop(net.forward(image));
    Rc::into_inner(recorder)
        .expect("the activations are gone")
        .into_inner()
        .graph
}

//! What a typed forward leaves behind: a graph, with names from a scope and initial values from the recipe.

use std::cell::{RefCell, RefMut};
use std::rc::Rc;

use dfdx::nn::Module;
use dfdx::shapes::{Const, Shape};
use graph::{Graph, Init, Plane, ValueId};

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

    /// Rows above the image that the first max-pool window covers.
    fn pool_pad(self) -> usize {
        match self {
            Recipe::Tpu2018 => 0,
            Recipe::Torchvision => 1,
        }
    }
}

/// The graph under construction and the name scope.
#[derive(Debug)]
pub(crate) struct Recorder {
    graph: Graph,
    recipe: Recipe,
    scope: Vec<String>,
    /// Number of the next block in the open stage.
    block: usize,
}

impl Recorder {
    fn name(&self, leaf: &str) -> String {
        let scope = self.scope.iter().map(String::as_str);
        scope.chain([leaf]).collect::<Vec<_>>().join(".")
    }

    pub(crate) fn open_stage(&mut self, index: usize) {
        self.scope.push(format!("layer{index}"));
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
        self.graph.batch_norm(&bn, z, gamma)
    }

    pub(crate) fn relu(&mut self, x: ValueId) -> ValueId {
        let name = self.name("relu");
        self.graph.relu(&name, x)
    }

    /// relu(main + shortcut).
    pub(crate) fn join(&mut self, main: ValueId, shortcut: ValueId) -> ValueId {
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
    let graph = Graph::new(Plane { h: R, w: R, c: 3 });
    let id = graph.input();
    let recorder = Rc::new(RefCell::new(Recorder {
        graph,
        recipe,
        scope: vec![],
        block: 0,
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

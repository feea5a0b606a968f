//! A network as a value: a flat list of operations with static shapes, recorded per image.
//!
//! From one [`Graph`] come the parameter and multiply-add counts, the summary table, and each engine's
//! [`Program`]: fused kernels in order, forward and backward, with every buffer placed in one arena.
//!
//! This crate does no arithmetic on tensors, touches no device and depends on nothing.

mod program;
mod summary;

pub use program::{
    After, Buffer, BufferId, Caps, Close, DropBlock, DropPath, Dropped, Geometry, Kernel, Mode,
    Needs, Normed, Operand, Program, STATE_ROWS, Squeeze, Window,
};
pub use summary::{Counts, Row};

/// Height, width and channels of one image's activation (NHWC without the N).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Plane {
    /// Height in pixels.
    pub h: usize,
    /// Width in pixels.
    pub w: usize,
    /// Channels.
    pub c: usize,
}

impl Plane {
    /// Pixels times channels.
    pub fn elements(self) -> usize {
        self.h * self.w * self.c
    }

    /// Height times width.
    pub fn pixels(self) -> usize {
        self.h * self.w
    }
}

/// The value a node produces; node and value share the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub usize);

/// Index of a trainable parameter in [`Graph::params`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParamId(pub usize);

/// Index of a batch normalisation in [`Graph::norms`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NormId(pub usize);

/// One operation on one image. Convolutions have no bias; every window is square.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// The normalised image.
    Input,
    /// Cross-correlation with zero padding (K - 1) / 2 on every side; weight is OIHW.
    Conv {
        /// The weight.
        weight: ParamId,
        /// K, odd.
        kernel: usize,
        /// 1 or 2.
        stride: usize,
    },
    /// Batch normalisation over N, H and W with scale and shift.
    BatchNorm {
        /// Which one.
        norm: NormId,
    },
    /// max(x, 0).
    Relu,
    /// Sum of two values of the same shape.
    Add,
    /// Maximum over a K x K window; padding never wins.
    MaxPool {
        /// K.
        kernel: usize,
        /// Step between windows.
        stride: usize,
        /// Rows above and columns to the left that the first window hangs over.
        pad_before: usize,
    },
    /// Mean over H and W.
    AvgPool,
    /// Mean over 2 x 2 windows that do not overlap; at the end of an odd side over what there is.
    HalfPool,
    /// x times sigmoid(E relu(R mean + r) + e) with the mean over H and W, a factor for each channel (Hu et al. 2018,
    /// "Squeeze-and-excitation networks", section 3). It reads a normalisation, and a sum or [`Op::DropPath`] reads it.
    SqueezeExcite {
        /// R, `[hidden, channels, 1, 1]`, and r.
        reduce: [ParamId; 2],
        /// E, `[channels, hidden, 1, 1]`, and e.
        expand: [ParamId; 2],
    },
    /// In training, x of an image is 0 with some probability, and else 1 / (1 - probability) times itself (Huang et al.
    /// 2016, "Deep networks with stochastic depth", section 3). A sum reads it.
    DropPath(DropPath),
    /// In training, squares of channels are 0, and what is left of the batch's tensor is scaled to make up for them
    /// (Ghiasi et al. 2018, "DropBlock", algorithm 1). It reads a normalisation, or what a sum takes as its shortcut.
    DropBlock(DropBlock),
    /// `x W^T + b`; weight is `[classes, channels]`.
    Linear {
        /// The weight.
        weight: ParamId,
        /// The bias.
        bias: ParamId,
    },
}

/// An operation, what it reads, and the shape of what it produces.
#[derive(Clone, Debug)]
pub struct Node {
    /// The operation.
    pub op: Op,
    /// What it reads; one value, or two for [`Op::Add`].
    pub inputs: Vec<ValueId>,
    /// Shape of the result.
    pub plane: Plane,
    /// Dotted name, torchvision's where torchvision has one.
    pub name: String,
}

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Every element the same.
    Constant(f32),
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// Normal with mean 0, redrawn outside two standard deviations; `std` is that of the uncut normal
    /// (TensorFlow up to 1.9 applies no correction, so the true deviation is 0.8796 times it).
    TruncatedNormal {
        /// Standard deviation before the cut.
        std: f64,
    },
    /// Uniform in [-bound, bound).
    Uniform {
        /// Half the width.
        bound: f64,
    },
}

/// What weight decay makes of a parameter; the optimizer's `decay` key chooses the classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecayClass {
    /// Convolution and linear weights.
    Weight,
    /// The linear bias.
    Bias,
    /// Scale and shift of a batch normalisation.
    Norm,
}

/// A trainable tensor.
#[derive(Clone, Debug)]
pub struct Param {
    /// torchvision's name, for example `layer1.0.conv1.weight`.
    pub name: String,
    /// Shape as torchvision stores it (OIHW, `[out, in]`, `[channels]`).
    pub shape: Vec<usize>,
    /// Initial values.
    pub init: Init,
    /// Weight-decay class.
    pub decay: DecayClass,
}

impl Param {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A batch normalisation: two parameters and two running statistics.
#[derive(Clone, Debug)]
pub struct Norm {
    /// Prefix of `.weight`, `.bias`, `.running_mean` and `.running_var`.
    pub name: String,
    /// Channels.
    pub channels: usize,
    /// Scale (gamma).
    pub weight: ParamId,
    /// Shift (beta).
    pub bias: ParamId,
}

/// Added to the variance (reference and torchvision agree).
pub const NORM_EPSILON: f32 = 1e-5;
/// Weight of the new statistics in the running ones (TensorFlow's momentum 0.9, PyTorch's 0.1).
pub const NORM_UPDATE: f32 = 0.1;

/// A recorded network. The last node is the logits.
#[derive(Clone, Debug)]
pub struct Graph {
    nodes: Vec<Node>,
    params: Vec<Param>,
    norms: Vec<Norm>,
}

impl Graph {
    /// A graph that holds only its input.
    pub fn new(input: Plane) -> Self {
        let node = Node {
            op: Op::Input,
            inputs: vec![],
            plane: input,
            name: "input".into(),
        };
        Self {
            nodes: vec![node],
            params: vec![],
            norms: vec![],
        }
    }

    /// The image.
    pub fn input(&self) -> ValueId {
        ValueId(0)
    }

    /// The operations in order of execution.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The trainable tensors in order of creation.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// The batch normalisations in order of creation.
    pub fn norms(&self) -> &[Norm] {
        &self.norms
    }

    /// The node that produces a value.
    pub fn node(&self, id: ValueId) -> &Node {
        &self.nodes[id.0]
    }

    /// Shape of a value.
    pub fn plane(&self, id: ValueId) -> Plane {
        self.nodes[id.0].plane
    }

    /// The last value.
    pub fn logits(&self) -> ValueId {
        ValueId(self.nodes.len() - 1)
    }

    /// Number of classes, that is the channels of the logits.
    pub fn classes(&self) -> usize {
        self.plane(self.logits()).c
    }

    fn push(&mut self, op: Op, inputs: &[ValueId], plane: Plane, name: &str) -> ValueId {
        self.nodes.push(Node {
            op,
            inputs: inputs.to_vec(),
            plane,
            name: name.into(),
        });
        self.logits()
    }

    fn param(&mut self, name: String, shape: &[usize], init: Init, decay: DecayClass) -> ParamId {
        self.params.push(Param {
            name,
            shape: shape.to_vec(),
            init,
            decay,
        });
        ParamId(self.params.len() - 1)
    }

    /// Records a convolution; the output has ceil(H / stride) x ceil(W / stride) x `out` elements.
    pub fn conv(
        &mut self,
        name: &str,
        x: ValueId,
        out: usize,
        kernel: usize,
        stride: usize,
        init: Init,
    ) -> ValueId {
        let p = self.plane(x);
        let weight = self.param(
            format!("{name}.weight"),
            &[out, p.c, kernel, kernel],
            init,
            DecayClass::Weight,
        );
        let plane = Plane {
            h: p.h.div_ceil(stride),
            w: p.w.div_ceil(stride),
            c: out,
        };
        self.push(
            Op::Conv {
                weight,
                kernel,
                stride,
            },
            &[x],
            plane,
            name,
        )
    }

    /// Records a batch normalisation whose scale starts at `gamma` and whose shift starts at 0.
    pub fn batch_norm(&mut self, name: &str, x: ValueId, gamma: f32) -> ValueId {
        let plane = self.plane(x);
        let shape = [plane.c];
        let weight = self.param(
            format!("{name}.weight"),
            &shape,
            Init::Constant(gamma),
            DecayClass::Norm,
        );
        let bias = self.param(
            format!("{name}.bias"),
            &shape,
            Init::Constant(0.0),
            DecayClass::Norm,
        );
        let norm = NormId(self.norms.len());
        self.norms.push(Norm {
            name: name.into(),
            channels: plane.c,
            weight,
            bias,
        });
        self.push(Op::BatchNorm { norm }, &[x], plane, name)
    }

    /// Records max(x, 0).
    pub fn relu(&mut self, name: &str, x: ValueId) -> ValueId {
        self.push(Op::Relu, &[x], self.plane(x), name)
    }

    /// Records a sum; both shapes are equal.
    pub fn add(&mut self, name: &str, a: ValueId, b: ValueId) -> ValueId {
        assert_eq!(
            self.plane(a),
            self.plane(b),
            "{name}: only equal shapes can be added"
        );
        self.push(Op::Add, &[a, b], self.plane(a), name)
    }

    /// Records a 3x3 max-pool of stride 2; `pad_before` is 1 (torchvision: one row on every side) or 0
    /// (TensorFlow's SAME on an even size: one row at the bottom and right only).
    pub fn max_pool(&mut self, name: &str, x: ValueId, pad_before: usize) -> ValueId {
        let p = self.plane(x);
        let plane = Plane {
            h: p.h.div_ceil(2),
            w: p.w.div_ceil(2),
            c: p.c,
        };
        self.push(
            Op::MaxPool {
                kernel: 3,
                stride: 2,
                pad_before,
            },
            &[x],
            plane,
            name,
        )
    }

    /// Records the mean over all pixels.
    pub fn avg_pool(&mut self, name: &str, x: ValueId) -> ValueId {
        let plane = Plane {
            h: 1,
            w: 1,
            c: self.plane(x).c,
        };
        self.push(Op::AvgPool, &[x], plane, name)
    }

    /// Records the mean over 2 x 2 windows.
    pub fn half_pool(&mut self, name: &str, x: ValueId) -> ValueId {
        let p = self.plane(x);
        let plane = Plane {
            h: p.h.div_ceil(2),
            w: p.w.div_ceil(2),
            c: p.c,
        };
        self.push(Op::HalfPool, &[x], plane, name)
    }

    /// Records squeeze and excitation by way of `hidden` channels; `init` is that of weight and bias, by the channels
    /// that a layer reads and makes.
    pub fn squeeze_excite(
        &mut self,
        name: &str,
        x: ValueId,
        hidden: usize,
        init: impl Fn(usize, usize) -> (Init, Init),
    ) -> ValueId {
        let plane = self.plane(x);
        let mut layer = |name: String, inputs: usize, outputs: usize| {
            let (weight, bias) = init(inputs, outputs);
            let (shape, class) = ([outputs, inputs, 1, 1], DecayClass::Weight);
            let weight = self.param(format!("{name}.weight"), &shape, weight, class);
            let bias = self.param(format!("{name}.bias"), &[outputs], bias, DecayClass::Bias);
            [weight, bias]
        };
        let op = Op::SqueezeExcite {
            reduce: layer(format!("{name}.fc1"), plane.c, hidden),
            expand: layer(format!("{name}.fc2"), hidden, plane.c),
        };
        self.push(op, &[x], plane, name)
    }

    /// Records what drops a branch of an image in training.
    pub fn drop_path(&mut self, name: &str, x: ValueId, path: DropPath) -> ValueId {
        self.push(Op::DropPath(path), &[x], self.plane(x), name)
    }

    /// Records what drops squares of channels in training.
    pub fn drop_block(&mut self, name: &str, x: ValueId, block: DropBlock) -> ValueId {
        self.push(Op::DropBlock(block), &[x], self.plane(x), name)
    }

    /// Records a classifier on a 1 x 1 plane.
    pub fn linear(
        &mut self,
        name: &str,
        x: ValueId,
        out: usize,
        weight: Init,
        bias: Init,
    ) -> ValueId {
        let p = self.plane(x);
        assert_eq!(p.pixels(), 1, "{name}: a linear layer reads a pooled plane");
        let weight = self.param(
            format!("{name}.weight"),
            &[out, p.c],
            weight,
            DecayClass::Weight,
        );
        let bias = self.param(format!("{name}.bias"), &[out], bias, DecayClass::Bias);
        self.push(
            Op::Linear { weight, bias },
            &[x],
            Plane { h: 1, w: 1, c: out },
            name,
        )
    }
}

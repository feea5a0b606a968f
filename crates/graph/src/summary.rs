//! What a graph costs: counts and the table that `runner plan` prints.

use crate::{Graph, Op, ParamId};

/// Totals over a graph, per image where it says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Trainable elements.
    pub params: usize,
    /// Trainable elements of convolutions.
    pub conv_params: usize,
    /// Trainable elements of batch normalisations.
    pub norm_params: usize,
    /// Trainable elements of the classifier.
    pub linear_params: usize,
    /// Trainable elements of squeeze and excitation.
    pub squeeze_params: usize,
    /// Elements under weight decay in the reference's rule (everything but the normalisations).
    pub decayed_params: usize,
    /// Elements of running means and variances.
    pub running_statistics: usize,
    /// Trainable tensors.
    pub tensors: usize,
    /// Convolutions.
    pub convs: usize,
    /// Multiply-adds of convolutions, squeeze and excitation, and classifier, for one image forward.
    pub macs: usize,
    /// Multiply-adds of them for one image forward and backward: a product for the output, one for the gradient of the
    /// weight, and one for the gradient of the input, but for the image's, which nobody needs.
    pub training_macs: usize,
    /// Elements of all activations, for one image.
    pub activations: usize,
}

/// A line of the summary table: one stage of the network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// First part of the names, for example `layer1`.
    pub name: String,
    /// Shape at its end, H x W x C.
    pub output: [usize; 3],
    /// Trainable elements.
    pub params: usize,
    /// Multiply-adds for one image forward.
    pub macs: usize,
}

impl Graph {
    /// The trainable tensors of an operation.
    fn params_of(&self, op: Op) -> Vec<ParamId> {
        match op {
            Op::Conv { weight, .. } => vec![weight],
            Op::Linear { weight, bias } => vec![weight, bias],
            Op::SqueezeExcite { reduce, expand } => [reduce, expand].concat(),
            Op::BatchNorm { norm } => {
                let norm = &self.norms()[norm.0];
                vec![norm.weight, norm.bias]
            }
            Op::Input
            | Op::Relu
            | Op::Add
            | Op::MaxPool { .. }
            | Op::AvgPool
            | Op::HalfPool
            | Op::DropPath(_)
            | Op::DropBlock(_) => vec![],
        }
    }

    /// Multiply-adds of one node for one image.
    fn macs(&self, index: usize) -> usize {
        let node = &self.nodes()[index];
        match node.op {
            Op::Conv { weight, .. } | Op::Linear { weight, .. } => {
                node.plane.pixels() * self.params()[weight.0].elements()
            }
            Op::SqueezeExcite { reduce, expand } => [reduce[0], expand[0]]
                .map(|weight| self.params()[weight.0].elements())
                .iter()
                .sum(),
            _ => 0,
        }
    }

    /// Totals.
    pub fn counts(&self) -> Counts {
        let of = |keep: &dyn Fn(&Op) -> bool| -> usize {
            let ops = self.nodes().iter().map(|node| node.op).filter(keep);
            let params = ops.flat_map(|op| self.params_of(op));
            params.map(|id| self.params()[id.0].elements()).sum()
        };
        let products = |node: &crate::Node| match node.inputs.contains(&self.input()) {
            true => 2,
            false => 3,
        };
        let norm_params = of(&|op| matches!(op, Op::BatchNorm { .. }));
        let params = of(&|_| true);
        Counts {
            params,
            conv_params: of(&|op| matches!(op, Op::Conv { .. })),
            norm_params,
            linear_params: of(&|op| matches!(op, Op::Linear { .. })),
            squeeze_params: of(&|op| matches!(op, Op::SqueezeExcite { .. })),
            decayed_params: params - norm_params,
            running_statistics: self.norms().iter().map(|n| 2 * n.channels).sum(),
            tensors: self.params().len(),
            convs: self
                .nodes()
                .iter()
                .filter(|n| matches!(n.op, Op::Conv { .. }))
                .count(),
            macs: (0..self.nodes().len()).map(|i| self.macs(i)).sum(),
            training_macs: (0..self.nodes().len())
                .map(|i| products(&self.nodes()[i]) * self.macs(i))
                .sum(),
            activations: self.nodes().iter().map(|n| n.plane.elements()).sum(),
        }
    }

    /// The table: one row for each first part of the names, in order; normalisations and ReLUs belong to the row
    /// before them.
    pub fn summary(&self) -> Vec<Row> {
        let stage = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
        let mut rows: Vec<Row> = vec![];
        for (i, node) in self.nodes().iter().enumerate().skip(1) {
            let name = stage(&node.name);
            let is_part = matches!(node.op, Op::BatchNorm { .. } | Op::Relu);
            if !is_part && rows.last().is_none_or(|r| r.name != name) {
                rows.push(Row {
                    name: name.clone(),
                    output: [0; 3],
                    params: 0,
                    macs: 0,
                });
            }
            let row = rows.last_mut().expect("a row was just pushed");
            row.output = [node.plane.h, node.plane.w, node.plane.c];
            row.macs += self.macs(i);
            let params = self.params_of(node.op).into_iter();
            row.params += params
                .map(|id| self.params()[id.0].elements())
                .sum::<usize>();
        }
        rows
    }
}

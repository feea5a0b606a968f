//! Named tensors, as checkpoints hold them.

use std::collections::BTreeMap;

use graph::Graph;

use crate::Error;

/// Momentum of parameter `p` is named `optimizer.momentum.p`.
pub const MOMENTUM_PREFIX: &str = "optimizer.momentum.";
/// The moving average of `p`, a parameter or a running statistic, is named `ema.p`.
pub const AVERAGE_PREFIX: &str = "ema.";
/// Suffix of a normalisation's running mean.
pub const RUNNING_MEAN: &str = ".running_mean";
/// Suffix of a normalisation's running (unbiased) variance.
pub const RUNNING_VAR: &str = ".running_var";

/// Loss scale of f16 and the steps since it changed, if the state comes from a run in f16; others pass over it.
pub const LOSS_SCALE: &str = "optimizer.loss_scale";

/// f32 values and their shape, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// As many values as the product of the sizes.
    pub values: Vec<f32>,
}

/// Everything that training changes in a network, by torchvision's names (`conv1.weight` OIHW, `fc.weight`
/// `[classes, channels]`, `bn1.running_mean`, ..), [`MOMENTUM_PREFIX`] and [`AVERAGE_PREFIX`].
pub type State = BTreeMap<String, Tensor>;

/// Checks that `state` is one of `graph`'s: all parameters and statistics, momentum and averages at will, nothing
/// else.
pub(crate) fn check(graph: &Graph, state: &State) -> Result<(), Error> {
    let mut known: BTreeMap<String, (Vec<usize>, bool)> = BTreeMap::new();
    for p in graph.params() {
        known.insert(p.name.clone(), (p.shape.clone(), true));
        for prefix in [MOMENTUM_PREFIX, AVERAGE_PREFIX] {
            known.insert(format!("{prefix}{}", p.name), (p.shape.clone(), false));
        }
    }
    for n in graph.norms() {
        for suffix in [RUNNING_MEAN, RUNNING_VAR] {
            let name = format!("{}{suffix}", n.name);
            known.insert(format!("{AVERAGE_PREFIX}{name}"), (vec![n.channels], false));
            known.insert(name, (vec![n.channels], true));
        }
    }
    known.insert(LOSS_SCALE.into(), (vec![2], false));
    for (name, (shape, required)) in &known {
        match state.get(name) {
            Some(tensor) if tensor.shape != *shape => {
                let (expected, found) = (shape.clone(), tensor.shape.clone());
                return Err(Error::Shape {
                    name: name.clone(),
                    expected,
                    found,
                });
            }
            None if *required => return Err(Error::MissingTensor { name: name.clone() }),
            _ => {}
        }
    }
    match state.keys().find(|name| !known.contains_key(*name)) {
        Some(name) => Err(Error::UnknownTensor { name: name.clone() }),
        None => Ok(()),
    }
}

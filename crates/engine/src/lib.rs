//! Executes networks. One trait, [`Engine`]; [`cpu`] and [`cuda`] are fast, [`oracle`] is slow and obviously right.
//!
//! From the first step an engine owns the f32 master parameters, the momentum and the batch-norm statistics; it
//! gives them back by name as a [`State`], which is the same on every engine. An engine knows nothing of files,
//! schedules or epochs. `cpu` and `cuda` are the only places in the workspace where `unsafe` is allowed.

pub mod cpu;
pub mod cuda;
mod dropout;
mod init;
mod labels;
pub mod oracle;
mod profile;
mod state;

use std::fmt;

pub use dropout::Dropout;
pub use init::initial_state;
pub use labels::hits;
pub use profile::KernelTime;
pub use state::{
    AVERAGE_PREFIX, LOSS_SCALE, MOMENTUM_PREFIX, RUNNING_MEAN, RUNNING_VAR, State, Tensor,
};

/// Mean of each channel over ImageNet, 0..255 scale: 255 * (0.485, 0.456, 0.406).
pub const MEAN: [f32; 3] = [123.675, 116.28, 103.53];
/// Standard deviation of each channel over ImageNet, 0..255 scale: 255 * (0.229, 0.224, 0.225).
pub const STD: [f32; 3] = [58.395, 57.12, 57.375];

/// RGB images on the 0..255 scale, N x H x W x 3 without gaps. The engine subtracts [`MEAN`] and divides by [`STD`].
#[derive(Clone, Copy, Debug)]
pub enum Pixels<'a> {
    /// Rounded to levels.
    U8(&'a [u8]),
    /// Not rounded, possibly a little below 0 or above 255.
    F32(&'a [f32]),
}

impl Pixels<'_> {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Pixels::U8(p) => p.len(),
            Pixels::F32(p) => p.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A part of them.
    fn slice(&self, range: std::ops::Range<usize>) -> Self {
        match self {
            Pixels::U8(p) => Pixels::U8(&p[range]),
            Pixels::F32(p) => Pixels::F32(&p[range]),
        }
    }

    fn get(&self, index: usize) -> f32 {
        match self {
            Pixels::U8(p) => f32::from(p[index]),
            Pixels::F32(p) => p[index],
        }
    }
}

/// Images and the class of each.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The images.
    pub pixels: Pixels<'a>,
    /// Classes, each below the number of classes.
    pub labels: &'a [u32],
    /// The other class of each image, where the images are mixtures.
    pub mixed: Option<Mixed<'a>>,
}

/// What images are besides their first class: each shows two, all in the same proportion (mixup, cutmix).
#[derive(Clone, Copy, Debug)]
pub struct Mixed<'a> {
    /// The second class of each image, below the number of classes.
    pub labels: &'a [u32],
    /// Share of the first class in the target, from 0 to 1; the second has the rest.
    pub share: f64,
}

impl<'a> Batch<'a> {
    /// Number of images.
    pub fn images(&self) -> usize {
        self.labels.len()
    }

    /// Callers hand in whole images of the network's size, and classes that it has.
    fn check(&self, graph: &graph::Graph) {
        let (images, image) = (self.images(), graph.plane(graph.input()));
        assert!(images > 0, "a batch has images");
        assert_eq!(self.pixels.len(), images * image.elements(), "{image:?}");
        let classes = graph.classes();
        assert!(
            self.labels.iter().all(|&l| (l as usize) < classes),
            "labels below {classes}"
        );
        if let Some(mixed) = self.mixed {
            assert_eq!(mixed.labels.len(), images, "a second label for each image");
            let are_classes = mixed.labels.iter().all(|&l| (l as usize) < classes);
            assert!(are_classes, "second labels below {classes}");
        }
    }

    /// The images of a range.
    fn part(&self, range: std::ops::Range<usize>) -> Batch<'a> {
        let per_image = self.pixels.len() / self.images().max(1);
        let mixed = |mixed: Mixed<'a>| Mixed {
            labels: &mixed.labels[range.clone()],
            ..mixed
        };
        Batch {
            pixels: self
                .pixels
                .slice(range.start * per_image..range.end * per_image),
            labels: &self.labels[range.clone()],
            mixed: self.mixed.map(mixed),
        }
    }

    /// The micro-batches of at most `size` images, in order.
    fn micro_batches(self, size: usize) -> impl Iterator<Item = Batch<'a>> {
        (0..self.images())
            .step_by(size)
            .map(move |from| self.part(from..(from + size).min(self.images())))
    }
}

/// Which parameters weight decay acts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    /// Every parameter (torch.optim.SGD on all parameters).
    All,
    /// Everything but the normalisations, so the classifier's bias too (the reference).
    NoNorm,
    /// Convolution and classifier weights only.
    NoNormNoBias,
}

impl Decay {
    /// Whether it acts on parameters of this class.
    pub fn covers(self, class: graph::DecayClass) -> bool {
        match self {
            Decay::All => true,
            Decay::NoNorm => class != graph::DecayClass::Norm,
            Decay::NoNormNoBias => class == graph::DecayClass::Weight,
        }
    }
}

/// How a gradient becomes an update; m is the momentum, a what momentum keeps.
///
/// LARS (You, Gitman and Ginsburg 2017, "Large batch training of convolutional networks", section 4) gives each tensor
/// a rate of its own: the learning rate times trust |w| / (|g| + weight_decay |w|), without the factor where |w| or
/// |g| is 0. Here it acts on convolution and classifier weights; normalisations and biases take the plain rate. It has
/// no Nesterov. There are two generations, which differ in where decay and rate enter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// SGD with momentum, which TensorFlow and PyTorch define alike: g = gradient + weight_decay * w; a = m a + g;
    /// w = w - lr a, or w = w - lr (g + m a) with Nesterov. The learning rate stays outside of a.
    Sgd,
    /// The TPU reference of 2018. Decay is part of the loss: g = gradient + weight_decay * w wherever decay acts, so
    /// |g| has it too; a = m a + g; w = w - rate a.
    Lars2018 {
        /// The trust coefficient (eta).
        trust: f64,
    },
    /// The reference since 2019, and the paper. |g| is of the gradient alone, and decay acts only where the rate is
    /// a tensor's own: a = m a + rate (gradient + weight_decay * w); w = w - a.
    Lars {
        /// The trust coefficient (eta).
        trust: f64,
    },
}

/// What an update of one tensor comes to, once its norms are known.
#[derive(Clone, Copy, Debug, PartialEq)]
struct TensorRule {
    /// Coefficient of w in g.
    decay: f64,
    /// Learning rate of the tensor.
    rate: f64,
    /// Whether the rate is inside of a.
    is_rate_inside: bool,
}

impl Rule {
    /// How a tensor of `class` is updated. `norms` gives |w| and |g|, g with the decay that it is called with; it is
    /// called where the rule needs them only.
    fn of_tensor(
        self,
        hyper: &Hyper,
        class: graph::DecayClass,
        norms: impl FnOnce(f64) -> (f64, f64),
    ) -> TensorRule {
        let has_own_rate = class == graph::DecayClass::Weight;
        let decay = match hyper.decay.covers(class) {
            true => hyper.weight_decay,
            false => 0.0,
        };
        let rate = |trust: f64, (w, g): (f64, f64)| {
            let is_defined = w > 0.0 && g > 0.0;
            let factor = if is_defined {
                trust * w / (g + decay * w)
            } else {
                1.0
            };
            hyper.lr * factor
        };
        match self {
            Rule::Lars2018 { trust } if has_own_rate => TensorRule {
                decay,
                rate: rate(trust, norms(decay)),
                is_rate_inside: false,
            },
            Rule::Lars { trust } if has_own_rate => TensorRule {
                decay,
                rate: rate(trust, norms(0.0)),
                is_rate_inside: true,
            },
            Rule::Lars { .. } => TensorRule {
                decay: 0.0,
                rate: hyper.lr,
                is_rate_inside: true,
            },
            Rule::Sgd | Rule::Lars2018 { .. } => TensorRule {
                decay,
                rate: hyper.lr,
                is_rate_inside: false,
            },
        }
    }
}

/// What a gradient of the norm `norm` is multiplied by so that it is at most `most` long. As PyTorch's
/// `clip_grad_norm_`, which adds 1e-6 to the norm.
fn clip(norm: f64, most: f64) -> f64 {
    (most / (norm + 1e-6)).min(1.0)
}

/// What one update depends on besides the gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    /// How the gradient becomes an update.
    pub rule: Rule,
    /// Learning rate.
    pub lr: f64,
    /// m.
    pub momentum: f64,
    /// Look ahead.
    pub nesterov: bool,
    /// Coefficient of w in the gradient (of half the squared norm in the loss).
    pub weight_decay: f64,
    /// Where it acts.
    pub decay: Decay,
    /// Share of the target spread over all classes (Szegedy et al. 2016, section 7).
    pub label_smoothing: f64,
    /// The longest that the gradient of all parameters together may be, without weight decay; a longer one is scaled
    /// down (Pascanu, Mikolov and Bengio 2013, section 3.2).
    pub clip_norm: Option<f64>,
    /// d of the moving average v of parameters and running statistics, v = d v + (1 - d) w after the update. The
    /// engine keeps the average only if it was made to.
    pub average: Option<f64>,
    /// Dropout of what the classifier reads.
    pub dropout: Option<Dropout>,
}

/// What a step saw. Sums, not means, so that partial batches add up exactly.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Metrics {
    /// Images.
    pub images: usize,
    /// Sum of the cross-entropies, without weight decay.
    pub loss_sum: f64,
    /// Images whose class scored highest; the lowest class wins a tie.
    pub top1: usize,
    /// Images whose class had fewer than five classes strictly above it.
    pub top5: usize,
}

impl Metrics {
    /// Adds another step's sums.
    pub fn add(&mut self, other: &Metrics) {
        self.images += other.images;
        self.loss_sum += other.loss_sum;
        self.top1 += other.top1;
        self.top5 += other.top5;
    }

    /// Mean cross-entropy.
    pub fn loss(&self) -> f64 {
        self.loss_sum / self.images as f64
    }

    /// Share of top-1 hits.
    pub fn top1(&self) -> f64 {
        self.top1 as f64 / self.images as f64
    }

    /// Share of top-5 hits.
    pub fn top5(&self) -> f64 {
        self.top5 as f64 / self.images as f64
    }
}

/// What an engine cannot do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// A tensor that the network has is not in the state.
    MissingTensor {
        /// Its name.
        name: String,
    },
    /// A tensor of another shape than the network's.
    Shape {
        /// Its name.
        name: String,
        /// What the network has.
        expected: Vec<usize>,
        /// What was found.
        found: Vec<usize>,
    },
    /// A tensor that the network does not have.
    UnknownTensor {
        /// Its name.
        name: String,
    },
    /// The machine refused memory.
    OutOfMemory {
        /// How much was asked for.
        bytes: usize,
    },
    /// A card, its driver or one of its libraries is missing, too old or fails.
    Device {
        /// What, and what it says.
        what: String,
        /// What to do about it.
        hint: String,
    },
}

impl Error {
    pub(crate) fn device(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Device {
            what: what.into(),
            hint: hint.into(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::MissingTensor { name } => write!(f, "tensor {name} is missing"),
            Error::Shape {
                name,
                expected,
                found,
            } => {
                write!(
                    f,
                    "tensor {name} has shape {found:?}, the network has {expected:?}"
                )
            }
            Error::UnknownTensor { name } => {
                write!(f, "tensor {name} does not belong to the network")
            }
            Error::OutOfMemory { bytes } => {
                write!(
                    f,
                    "no memory for {} MiB more\nhint: a smaller train.bn_batch needs less; runner plan says how much",
                    bytes >> 20
                )
            }
            Error::Device { what, hint } => write!(f, "{what}\nhint: {hint}"),
        }
    }
}

impl std::error::Error for Error {}

/// Things that take time to make and can be made again, by name: compiled kernels, the fastest plans. A cache may
/// forget.
pub trait Cache: Send {
    /// What was put there.
    fn get(&self, name: &str) -> Option<Vec<u8>>;

    /// Keeps it, if it can, in the place of what is there.
    fn put(&self, name: &str, bytes: &[u8]);

    /// Keeps it, if it can, unless something is there: whoever asks next gets what came first.
    fn put_first(&self, name: &str, bytes: &[u8]) {
        if self.get(name).is_none() {
            self.put(name, bytes);
        }
    }
}

/// Keeps nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoCache;

impl Cache for NoCache {
    fn get(&self, _: &str) -> Option<Vec<u8>> {
        None
    }

    fn put(&self, _: &str, _: &[u8]) {}
}

/// A step that was started.
#[derive(Debug)]
#[must_use = "a step has to be finished"]
pub enum Started {
    /// It is done already.
    Done(Metrics),
    /// It runs on a device of its own; the number is the engine's.
    Running(u64),
}

/// [`Engine::predict`] by [`Engine::score`]: class 0 for every image of `plane`, and the score is dropped.
fn predict(
    engine: &mut impl Engine,
    plane: graph::Plane,
    pixels: Pixels<'_>,
) -> Result<Vec<f32>, Error> {
    let labels = vec![0; pixels.len() / plane.elements()];
    let batch = Batch {
        pixels,
        labels: &labels,
        mixed: None,
    };
    let mut all = vec![];
    engine.score(&batch, Some(&mut all))?;
    Ok(all)
}

/// A device that executes one network.
pub trait Engine {
    /// What it runs on, for people.
    fn describe(&self) -> String;

    /// Takes over parameters and running statistics; momentum starts at zero where the state has none, and the average
    /// at the values themselves.
    ///
    /// # Errors
    /// If a tensor is missing, unknown or of another shape. The engine is then unchanged.
    fn load(&mut self, state: &State) -> Result<(), Error>;

    /// Parameters, running statistics, momentum and the average, if one is kept, as they are now.
    ///
    /// # Errors
    /// If the device fails.
    fn state(&self) -> Result<State, Error>;

    /// Exchanges parameters and running statistics with their moving average, to score that; the next call changes
    /// them back.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Panics
    /// If the engine keeps no average.
    fn swap_average(&mut self) -> Result<(), Error> {
        unreachable!("this engine keeps no average")
    }

    /// One update from one global batch. The batch runs as micro-batches of the engine's normalisation batch, the
    /// gradient is the mean over all images, and running statistics move once, by the mean over the micro-batches.
    ///
    /// # Errors
    /// If memory runs out.
    fn train_step(&mut self, batch: &Batch<'_>, hyper: &Hyper) -> Result<Metrics, Error>;

    /// Starts a step as [`Engine::train_step`] does it. The batch may go as soon as this returns; another step may be
    /// started before this one is finished, and steps are finished in their order. Before anything else is asked of
    /// the engine, every step is finished.
    ///
    /// # Errors
    /// If memory runs out, or the device fails.
    fn start_step(&mut self, batch: &Batch<'_>, hyper: &Hyper) -> Result<Started, Error> {
        Ok(Started::Done(self.train_step(batch, hyper)?))
    }

    /// Waits for a step.
    ///
    /// # Errors
    /// If the device fails.
    fn finish_step(&mut self, step: Started) -> Result<Metrics, Error> {
        match step {
            Started::Done(metrics) => Ok(metrics),
            Started::Running(_) => unreachable!("this engine runs nothing by itself"),
        }
    }

    /// Updates that were left out because a gradient overflowed, since the state was loaded; only in f16 are there any.
    ///
    /// # Errors
    /// If the device fails.
    fn skipped_steps(&self) -> Result<u64, Error> {
        Ok(0)
    }

    /// Scores a batch of any size with the running statistics; the loss is without label smoothing.
    ///
    /// # Errors
    /// If memory runs out.
    fn eval_step(&mut self, batch: &Batch<'_>) -> Result<Metrics, Error> {
        self.score(batch, None)
    }

    /// The same, and the logits of every image, images x classes, behind those that are there.
    ///
    /// # Errors
    /// If memory runs out.
    fn score(&mut self, batch: &Batch<'_>, logits: Option<&mut Vec<f32>>)
    -> Result<Metrics, Error>;

    /// The logits of any number of images, images x classes, with the running statistics.
    ///
    /// # Errors
    /// If memory runs out.
    fn predict(&mut self, pixels: Pixels<'_>) -> Result<Vec<f32>, Error>;
}

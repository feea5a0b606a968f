//! What was written: the sections of a spec, their keys and defaults.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::json;

use crate::device::Device;
use crate::length::{Length, Unit};

/// The depths a network can have.
pub(crate) const DEPTHS: [usize; 9] = [18, 34, 50, 101, 152, 200, 270, 350, 420];

/// A checked run, as written; lengths are not yet steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Name of the run: at most 200 letters, digits, `.`, `_` and `-`.
    #[schemars(
        regex(pattern = r"^\.*[A-Za-z0-9_-][A-Za-z0-9._-]*$"),
        length(max = 200)
    )]
    pub name: String,
    /// What to do.
    #[serde(default)]
    pub mode: Mode,
    /// Where every random choice comes from.
    #[serde(default)]
    pub seed: u64,
    /// Directory of checkpoints and metrics; `runs/<name>` if absent.
    #[serde(default)]
    pub run_dir: Option<String>,
    /// The network.
    #[serde(default)]
    pub model: Model,
    /// The images and what is done to them.
    #[serde(default)]
    pub data: Data,
    /// How long, in what batches and on what.
    #[serde(default)]
    pub train: Train,
    /// From gradients to parameters.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// The learning rate over time.
    #[serde(default)]
    pub schedule: Schedule,
    /// What is minimised.
    #[serde(default)]
    pub loss: Loss,
    /// Images that are mixtures of two.
    #[serde(default)]
    pub mixup: Mixup,
    /// The moving average of the parameters.
    #[serde(default)]
    pub ema: Ema,
    /// Images that grow while the run goes on.
    #[serde(default)]
    pub progressive: Progressive,
    /// Evaluation.
    #[serde(default)]
    pub eval: Eval,
    /// Checkpoints.
    #[serde(default)]
    pub checkpoint: Checkpoint,
    /// Where numbers are kept besides the run directory's `metrics.jsonl`.
    #[serde(default)]
    pub track: Track,
}

/// What a run does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Train, and evaluate on the way and at the end.
    #[default]
    TrainAndEval,
    /// Train only.
    Train,
    /// Evaluate the latest checkpoint.
    Eval,
}

/// `[model]`: the network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Model {
    /// Layers with weights: 18, 34, 50, 101, 152, 200, 270, 350 or 420.
    #[schemars(extend("enum" = DEPTHS))]
    pub depth: usize,
    /// Side of the square images in pixels: a multiple of 32 from 32 to 448.
    #[schemars(range(min = 32, max = 448), extend("multipleOf" = 32))]
    pub resolution: usize,
    /// Number of classes, from 2 to 1000000.
    #[schemars(range(min = 2, max = 1_000_000))]
    pub classes: usize,
    /// Whose details to follow where the well-known implementations differ.
    pub recipe: Recipe,
    /// How the network begins.
    pub stem: Stem,
    /// What brings the stem's result to half its sides.
    pub stem_pool: StemPool,
    /// What a shortcut that halves the sides does.
    pub shortcut: Shortcut,
    /// Channels between the two layers of squeeze and excitation, as a share of a block's, up to 1; 0 for none.
    #[schemars(range(min = 0, max = 1))]
    pub se_ratio: f64,
    /// Chance of an image to go by a block of the last group in a training step, from 0 to below 1; 4/5, 3/5 and 2/5 of it
    /// in the groups before (stochastic depth).
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub drop_connect: f64,
    /// The part of values that is dropped in squares at the end of training, from 0 to below 1; it grows from 0 with the
    /// steps, and group g has 1 / 4^(4 - g) of it (DropBlock).
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub drop_block: f64,
    /// Side of a square of `drop_block` in pixels, from 1 to 65536; where a plane is smaller, the plane's.
    #[schemars(range(min = 1, max = 65_536))]
    pub drop_block_size: usize,
    /// The groups of blocks that have `drop_block`, of 1 to 4.
    #[schemars(extend("items" = json!({ "type": "integer", "minimum": 1, "maximum": 4 })))]
    pub drop_block_groups: Vec<usize>,
    /// Chance of each channel before the classifier to be dropped in a training step, from 0 to below 1.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub dropout: f64,
    /// Text file with one label per line, in the order of the classes.
    pub labels: Option<String>,
    /// File of the initial weights: a checkpoint, safetensors or a state dict of torch. Drawn from the seed if absent.
    pub weights: Option<String>,
}

/// Whose padding, shortcuts and initial values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Recipe {
    /// The TPU reference of 2018.
    Tpu2018,
    /// torchvision.
    Torchvision,
}

/// How a network begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Stem {
    /// A 7x7 convolution to 64 channels.
    Plain,
    /// Three 3x3 convolutions to 32, 32 and 64 channels (ResNet-D).
    Deep,
}

/// The second half of a stem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StemPool {
    /// The maximum of 3x3 pixels.
    Max,
    /// A 3x3 convolution with normalisation and ReLU (ResNet-RS).
    Conv,
}

/// How a shortcut halves the sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Shortcut {
    /// A 1x1 convolution of stride 2.
    Conv,
    /// The mean of 2x2 pixels, then a 1x1 convolution (ResNet-D).
    Mean,
}

/// `[data]`: the images and what is done to them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    /// Where images come from.
    pub source: Source,
    /// Glob of the training shards: files, or objects of a bucket (gs://, s3://, az://).
    pub train: Option<String>,
    /// Glob of the evaluation shards: files, or objects of a bucket (gs://, s3://, az://).
    pub eval: Option<String>,
    /// The stored label of class 0.
    pub label_offset: i64,
    /// How a training crop is chosen.
    pub crop: Crop,
    /// Smallest and largest area of a training crop, as a fraction of the image.
    #[serde(deserialize_with = "pair")]
    #[schemars(extend("items" = json!({ "type": "number", "exclusiveMinimum": 0, "maximum": 1 })))]
    pub crop_area: [f64; 2],
    /// Smallest and largest width over height of a training crop, at most 1000.
    #[serde(deserialize_with = "pair")]
    #[schemars(extend("items" = json!({ "type": "number", "exclusiveMinimum": 0, "maximum": 1000 })))]
    pub crop_aspect: [f64; 2],
    /// Whether half of the training images are mirrored.
    pub flip: bool,
    /// Whose resampling.
    pub resize: Resize,
    /// How training images are decoded; evaluation is always exact.
    pub decode: Decode,
    /// Shards read side by side, from 1 to 65536.
    #[schemars(range(min = 1, max = 65_536))]
    pub lanes: usize,
    /// Records of a lane that are shuffled among themselves, from 1 to 10000000; they are held in memory.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub shuffle_window: usize,
    /// Number of training examples; needed only where it cannot be counted. Of shards in a bucket it is taken on trust:
    /// to count them is to read them.
    #[schemars(range(min = 1, max = 1_000_000_000_000u64))]
    pub train_examples: Option<u64>,
    /// Number of evaluation examples; needed only where it cannot be counted. The made-up sources use at most 256.
    #[schemars(range(min = 1, max = 1_000_000_000_000u64))]
    pub eval_examples: Option<u64>,
    /// Unreadable records that are counted and passed over before the run stops.
    #[schemars(range(max = 1_000_000_000_000u64))]
    pub max_bad_records: u64,
    /// Directory that keeps what was read from a bucket, for the next epoch and the next run; none if absent.
    pub cache: Option<String>,
    /// Size of that directory in gigabytes (10^9 bytes), from 1 to 1000000; what was used least recently goes first.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub cache_gb: u64,
    /// Directory that keeps where the images of shards can be entered, 3 % of their size: written in the first epoch,
    /// or by `runner data index`; later ones decode a fifth faster, to the same pixels. For `decode = "fast"`. None if absent.
    pub index: Option<String>,
    /// What is done to the colours and the geometry of training images after the crop.
    pub augment: Augment,
    /// Operations of RandAugment for each image, from 1 to 16.
    #[schemars(range(min = 1, max = 16))]
    pub augment_ops: usize,
    /// Strength of RandAugment's operations, from 0 to 30; 10 is AutoAugment's strongest.
    #[schemars(range(max = 30))]
    pub augment_magnitude: usize,
    /// Largest changes of brightness, contrast, saturation and hue of training images, as torchvision's `ColorJitter`:
    /// factors from 1 - x to 1 + x, and a part of the circle of hues, at most 0.5.
    #[serde(deserialize_with = "four")]
    #[schemars(extend("items" = json!({ "type": "number", "minimum": 0 })))]
    pub color_jitter: [f64; 4],
    /// How many of the training images lose a rectangle, from 0 to 1, as torchvision's `RandomErasing`.
    #[schemars(range(min = 0, max = 1))]
    pub random_erasing: f64,
}

/// Exactly two numbers; serde alone would take the first two of more.
fn pair<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[f64; 2], D::Error> {
    numbers(deserializer, "two")
}

/// Exactly four numbers.
fn four<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[f64; 4], D::Error> {
    numbers(deserializer, "four")
}

fn numbers<'de, D: Deserializer<'de>, const N: usize>(
    deserializer: D,
    count: &str,
) -> Result<[f64; N], D::Error> {
    let numbers = Vec::deserialize(deserializer)?;
    numbers.try_into().map_err(|numbers: Vec<f64>| {
        D::Error::custom(format_args!(
            "expected {count} numbers, not {}",
            numbers.len()
        ))
    })
}

/// What is done to the colours and the geometry of training images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Augment {
    /// Nothing.
    None,
    /// RandAugment: `augment_ops` operations drawn for each image, of strength `augment_magnitude`.
    Randaugment,
    /// AutoAugment's policy v0, which was found for ImageNet.
    Autoaugment,
}

/// Where images come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// TFRecord shards of images: JPEG, PNG or WebP.
    Tfrecord,
    /// WebDataset shards: tar archives in which `NAME.jpg` and `NAME.cls` are a sample. Mind `label_offset`, which is
    /// usually 0 for them.
    Webdataset,
    /// Rows of Cloud Bigtable; `train` and `eval` name them: `bigtable://PROJECT/INSTANCE/TABLE/PREFIX`.
    Bigtable,
    /// Directories with one folder of image files for each class; `train` and `eval` name them. Classes are the folders
    /// sorted by name, and `label_offset`, `lanes` and `shuffle_window` mean nothing: an epoch is a shuffle of all.
    Folder,
    /// Noise with labels.
    Fake,
    /// Black images, all of class 0.
    Zeros,
}

/// How a training crop is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Crop {
    /// As TensorFlow's `sample_distorted_bounding_box`.
    Tf,
    /// As torchvision's `RandomResizedCrop`.
    Torchvision,
    /// None is chosen: the crop of evaluation, the central square of `eval.crop_ratio`.
    None,
}

/// Whose resampling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Resize {
    /// Pillow's, which smooths when it shrinks and rounds to whole values.
    Pillow,
    /// TensorFlow 2's.
    Tf,
    /// TensorFlow 1's, with its corner convention.
    Tf1,
}

/// How training images are decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Decode {
    /// The crop alone, resampled before its colours are converted; a level or so from exact.
    Fast,
    /// The whole image, to the bit as the library that `resize` names.
    Exact,
}

/// `[train]`: how long, in what batches and on what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Train {
    /// Images of a step, over all devices, from 1 to 65536.
    #[schemars(range(min = 1, max = 65_536))]
    pub batch_size: usize,
    /// Images that a batch normalisation sees together; divides `batch_size`. 128, or `batch_size` when that is less,
    /// if absent. At a resolution of 32 at least 2.
    #[schemars(range(min = 1, max = 65_536))]
    pub bn_batch: Option<usize>,
    /// How long to train, from the first step of the run.
    pub length: Length,
    /// The largest mean loss of a step; a larger one counts as divergence, as one that is not finite always does. No
    /// limit if absent.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub max_loss: Option<f64>,
    /// How often a run goes back to its last checkpoint when a step diverges, and on without the images of that step,
    /// before it fails; from 0 to 1000.
    #[schemars(range(max = 1000))]
    pub max_rewinds: u64,
    /// Number format of activations.
    pub precision: Precision,
    /// Where to compute: "auto" takes the first card that can be used, or the CPU; "cuda:1" is the second card, "cuda:0,1"
    /// are the first two and "cuda:all" all cards together, which share each batch. `batch_size` is a multiple of
    /// `bn_batch` times their number.
    pub device: Device,
    /// CPU threads, at most 1024; 0 means all cores.
    #[schemars(range(max = 1024))]
    pub threads: usize,
    /// Vector instructions of the CPU engine. Runs on different ones differ in their last bits.
    pub instructions: Instructions,
    /// Whether the CPU engine may compute 3 x 3 convolutions with fewer multiplications (Winograd's minimal
    /// filtering): faster, with about three times the rounding error of f32, far below that of bf16.
    pub winograd: bool,
    /// Whose convolutions run on cards. Runs with different ones differ in their last bits.
    pub convolutions: Convolutions,
}

/// Whose convolutions run on cards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Convolutions {
    /// The fastest of cuDNN's and our own, each; our own where cuDNN is missing.
    Fastest,
    /// cuDNN's, or our own where it is missing.
    Cudnn,
    /// Our own.
    Own,
}

/// Vector instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Instructions {
    /// The best that the CPU has.
    Auto,
    /// What every CPU of the architecture has.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with dot products of bf16.
    Avx512Bf16,
    /// AVX-512 with matrix tiles of bf16 (AMX).
    Amx,
}

/// Number format of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32 bits.
    F32,
    /// 16 bits with f32's range, in half the memory. Parameters, statistics and sums stay f32.
    Bf16,
    /// 16 bits with more mantissa and a smaller range; the loss is scaled so that gradients stay in it. CUDA only.
    F16,
    /// 32 bits whose products keep 10 bits of mantissa, on tensor cores. CUDA only.
    Tf32,
}

/// `[optimizer]`: from gradients to parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Optimizer {
    /// The rule.
    pub kind: OptimizerKind,
    /// Share of the last update kept in the next, from 0 to below 1.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub momentum: f64,
    /// Whether the gradient is taken ahead (Nesterov); LARS has none.
    pub nesterov: bool,
    /// Factor of half the squared parameters in the loss, 0 or more.
    #[schemars(range(min = 0))]
    pub weight_decay: f64,
    /// Which parameters decay.
    pub decay: Decay,
    /// LARS's coefficient (eta) of the ratio of norms, above 0.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub trust: f64,
    /// The longest that the gradient of all parameters together may be, weight decay not counted, above 0; a longer one
    /// is scaled down. Any if absent.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub clip_norm: Option<f64>,
}

/// The rule of an optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    /// Stochastic gradient descent with momentum.
    Sgd,
    /// LARS as the TPU reference of 2018 has it: decay in the gradient, the learning rate outside of the momentum.
    Lars2018,
    /// LARS as the paper and the reference since 2019 have it: decay beside the gradient, the learning rate inside of the
    /// momentum.
    Lars,
}

/// Which parameters decay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Every parameter, as in torchvision's training script.
    All,
    /// All but scale and shift of batch normalisations, as in the reference.
    NoNorm,
    /// Convolution and linear weights only.
    NoNormNoBias,
}

/// `[schedule]`: the learning rate over time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// The shape after the warmup.
    pub kind: ScheduleKind,
    /// Learning rate per 256 images of the batch, above 0.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub base_lr: f64,
    /// Linear rise from 0 to the full rate.
    pub warmup: Length,
    /// When a step schedule multiplies the rate by `factor`; increasing.
    pub milestones: Vec<Length>,
    /// What a step schedule multiplies by, above 0.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub factor: f64,
    /// Exponent of a polynomial schedule, above 0.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub power: f64,
    /// Learning rate at the end of a cosine or polynomial schedule, whatever the batch, 0 or more.
    #[schemars(range(min = 0))]
    pub end_lr: f64,
}

/// The shape of the learning rate after the warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Constant between milestones.
    Step,
    /// Half a cosine from the full rate to `end_lr` at the end of the run.
    Cosine,
    /// From the full rate to `end_lr` at the end of the run, by the part of the run that is left to the power of `power`.
    Polynomial,
    /// The full rate throughout.
    Constant,
}

/// `[loss]`: what is minimised.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Loss {
    /// Share of the target that is spread over all classes, from 0 to below 1.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub label_smoothing: f64,
}

/// `[mixup]`: training images that are mixtures of two, an image and the one after it in the batch; all of a batch in the
/// same proportion. Their targets are mixed alike.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Mixup {
    /// Both parameters of the beta distribution of the proportion in which pixels are averaged, at most 1000;
    /// 0 is never.
    #[schemars(range(min = 0, max = 1000))]
    pub alpha: f64,
    /// The same of the area that is pasted (CutMix), at most 1000; 0 is never. Where both are above 0, a batch has
    /// either, with equal chance.
    #[schemars(range(min = 0, max = 1000))]
    pub cutmix_alpha: f64,
}

/// `[progressive]`: images that grow (or shrink) while the run goes on; the parameters are the same throughout.
///
/// An evaluation has the resolution of the steps before it, and there is one where the resolution changes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Progressive {
    /// Until when each resolution of the list lasts; increasing. After the last one it is `model.resolution`.
    pub until: Vec<Length>,
    /// Side of the images until then, in pixels: multiples of 32 from 32 to 448, one for each of `until`.
    #[schemars(extend("items" = json!({ "type": "integer", "minimum": 32, "maximum": 448, "multipleOf": 32 })))]
    pub resolution: Vec<usize>,
}

/// `[ema]`: the moving average of parameters and running statistics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Ema {
    /// How long until what was learned has half of its weight; a decay of 0.9999 a step is "6931 steps". None is kept if
    /// absent.
    pub half_life: Option<Length>,
    /// Whether the decay is at most (1 + t) / (10 + t) after t steps, so that the first steps are soon forgotten.
    pub warmup: bool,
    /// What an evaluation scores where an average is kept.
    pub eval: EmaEval,
}

/// What an evaluation scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EmaEval {
    /// The parameters and, as `eval/ema_top1` and so on, the average; the best checkpoint is the average's.
    Both,
    /// The average instead of the parameters.
    Average,
    /// The parameters.
    Raw,
}

/// `[eval]`: evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Eval {
    /// How often.
    pub every: Length,
    /// Side of the central crop over the shorter side of the image, above 0 and at most 1.
    #[schemars(range(max = 1), extend("exclusiveMinimum" = 0))]
    pub crop_ratio: f64,
    /// Mode `eval` only: score every checkpoint once, and wait for new ones, at most so many seconds for each, until the
    /// one of the last step has been scored. Absent: score the latest and stop.
    #[schemars(range(max = 100_000_000))]
    pub wait: Option<u64>,
}

/// `[checkpoint]`: checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Checkpoint {
    /// How often.
    pub every: Length,
    /// How many of the latest are kept, from 1 to 1000000; the best is kept besides.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub keep: usize,
    /// By which number of an evaluation the best is the best.
    pub best: BestMetric,
    /// Where in a bucket (gs://, s3://, az://) each checkpoint and the run's files are copied to, and from where a run goes
    /// on that finds nothing later on this machine. One run writes there.
    pub mirror: Option<String>,
}

/// A number of an evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BestMetric {
    /// Share of the images whose likeliest class is right.
    Top1,
    /// Share of the images whose five likeliest classes have the right one.
    Top5,
    /// Mean loss; the least is the best.
    Loss,
}

/// `[track]`: where numbers are kept besides the run directory's `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Track {
    /// MLflow's store.
    pub mlflow: Mlflow,
    /// The MLflow experiment that the run belongs to; not empty.
    #[schemars(length(min = 1))]
    pub experiment: String,
    /// Whether scalars are also written for TensorBoard, to the run directory.
    pub tensorboard: bool,
    /// Whether MLflow and TensorBoard are told every 10 s how busy CPU, memory, disk, network and GPUs are.
    pub system_metrics: bool,
    /// Name of a registered model of MLflow's server: at its end a run that is done makes its best checkpoint a
    /// version of it. None if absent.
    #[schemars(length(min = 1))]
    pub register_model: Option<String>,
}

/// MLflow's store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mlflow {
    /// The server that the environment variable `MLFLOW_TRACKING_URI` names; where there is none, as [`Mlflow::Sqlite`].
    Auto,
    /// `mlflow.db` and `mlruns/` in the working directory; no server.
    Sqlite,
    /// None.
    Off,
    /// A server, by its URL.
    Server(String),
}

/// What `track.mlflow` may be.
const MLFLOW: [&str; 5] = ["auto", "sqlite", "off", "http://host:port", "https://host"];

impl Mlflow {
    fn as_str(&self) -> &str {
        match self {
            Self::Auto => MLFLOW[0],
            Self::Sqlite => MLFLOW[1],
            Self::Off => MLFLOW[2],
            Self::Server(url) => url,
        }
    }
}

impl Serialize for Mlflow {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Mlflow {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let named = [Self::Auto, Self::Sqlite, Self::Off];
        if let Some(named) = named.into_iter().find(|named| named.as_str() == text) {
            return Ok(named);
        }
        let host = ["http://", "https://"]
            .iter()
            .find_map(|scheme| text.strip_prefix(scheme));
        match host {
            // The resolved spec goes into checkpoints, reports and the server's artifacts. A password may hold a slash,
            // and what is no URL at all may hold one too.
            _ if text.contains('@') => Err(D::Error::custom(
                "a login would be written to every checkpoint; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD hold it",
            )),
            Some(host) if !host.is_empty() => Ok(Self::Server(text)),
            _ => Err(D::Error::unknown_variant(&text, &MLFLOW)),
        }
    }
}

impl JsonSchema for Mlflow {
    fn schema_name() -> Cow<'static, str> {
        "Mlflow".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "MLflow's store: the server at a URL; `sqlite`, a file in the working directory; `off`; or `auto`, the server that MLFLOW_TRACKING_URI names, else the file.",
            "oneOf": [
                { "enum": MLFLOW[..3] },
                { "type": "string", "pattern": "^https?://." },
            ],
        })
    }
}

const fn epochs(value: f64) -> Length {
    Length {
        value,
        unit: Unit::Epochs,
    }
}

impl Default for Model {
    fn default() -> Self {
        Self {
            depth: 50,
            resolution: 224,
            classes: 1000,
            recipe: Recipe::Tpu2018,
            stem: Stem::Plain,
            stem_pool: StemPool::Max,
            shortcut: Shortcut::Conv,
            se_ratio: 0.0,
            drop_connect: 0.0,
            drop_block: 0.0,
            drop_block_size: 7,
            drop_block_groups: vec![3, 4],
            dropout: 0.0,
            labels: None,
            weights: None,
        }
    }
}

impl Default for Data {
    fn default() -> Self {
        Self {
            source: Source::Tfrecord,
            train: None,
            eval: None,
            label_offset: 1,
            crop: Crop::Tf,
            crop_area: [0.08, 1.0],
            crop_aspect: [0.75, 1.333_333_3],
            flip: true,
            resize: Resize::Pillow,
            decode: Decode::Fast,
            lanes: 64,
            shuffle_window: 64,
            train_examples: None,
            eval_examples: None,
            max_bad_records: 0,
            cache: None,
            cache_gb: 100,
            index: None,
            augment: Augment::None,
            augment_ops: 2,
            augment_magnitude: 10,
            color_jitter: [0.0; 4],
            random_erasing: 0.0,
        }
    }
}

impl Default for Train {
    fn default() -> Self {
        Self {
            batch_size: 1024,
            bn_batch: None,
            length: Length {
                value: 112_590.0,
                unit: Unit::Steps,
            },
            max_loss: None,
            max_rewinds: 3,
            precision: Precision::F32,
            device: Device::Auto,
            threads: 0,
            instructions: Instructions::Auto,
            convolutions: Convolutions::Fastest,
            winograd: true,
        }
    }
}

impl Default for Optimizer {
    fn default() -> Self {
        Self {
            kind: OptimizerKind::Sgd,
            momentum: 0.9,
            nesterov: true,
            weight_decay: 1e-4,
            decay: Decay::NoNorm,
            trust: 0.001,
            clip_norm: None,
        }
    }
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            kind: ScheduleKind::Step,
            base_lr: 0.1,
            warmup: epochs(5.0),
            milestones: vec![epochs(30.0), epochs(60.0), epochs(80.0)],
            factor: 0.1,
            power: 2.0,
            end_lr: 0.0,
        }
    }
}

impl Default for Ema {
    fn default() -> Self {
        Self {
            half_life: None,
            warmup: true,
            eval: EmaEval::Both,
        }
    }
}

impl Default for Eval {
    fn default() -> Self {
        Self {
            every: epochs(1.0),
            crop_ratio: 0.875,
            wait: None,
        }
    }
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self {
            every: epochs(1.0),
            keep: 3,
            best: BestMetric::Top1,
            mirror: None,
        }
    }
}

impl Default for Track {
    fn default() -> Self {
        Self {
            mlflow: Mlflow::Auto,
            experiment: "runner".into(),
            tensorboard: true,
            system_metrics: true,
            register_model: None,
        }
    }
}

impl Data {
    /// Number of training examples, where the spec says it; the made-up sources have ImageNet's 1281167.
    pub fn train_examples(&self) -> Option<u64> {
        self.train_examples
            .or(self.is_made_up().then_some(1_281_167))
    }

    /// Number of evaluation examples, where the spec says it. Noise has no accuracy: of the made-up sources 256 at
    /// most are scored, which shows that evaluation runs and what it costs.
    pub fn eval_examples(&self) -> Option<u64> {
        match self.is_made_up() {
            true => Some(self.eval_examples.unwrap_or(256).min(256)),
            false => self.eval_examples,
        }
    }

    fn is_made_up(&self) -> bool {
        matches!(self.source, Source::Fake | Source::Zeros)
    }
}

impl Train {
    /// Images that a batch normalisation sees together.
    pub fn bn_batch(&self) -> usize {
        self.bn_batch.unwrap_or(self.batch_size.min(128))
    }
}

/// Keys that may change between a run and its resume: they move, watch or limit it, but compute nothing.
const FREE: [&str; 28] = [
    "name",
    "mode",
    "run_dir",
    "model.labels",
    "data.train",
    "data.eval",
    "data.eval_examples",
    "data.max_bad_records",
    "data.cache",
    "data.cache_gb",
    "data.index",
    "train.device",
    "train.threads",
    "train.instructions",
    "train.convolutions",
    "ema.eval",
    "eval.every",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.best",
    "checkpoint.mirror",
    "eval.wait",
    "train.max_rewinds",
    "track.mlflow",
    "track.experiment",
    "track.tensorboard",
    "track.system_metrics",
    "track.register_model",
];

impl Run {
    /// A run that says nothing but its name.
    pub(crate) fn named(name: String) -> Self {
        Self {
            name,
            mode: Mode::default(),
            seed: 0,
            run_dir: None,
            model: Model::default(),
            data: Data::default(),
            train: Train::default(),
            optimizer: Optimizer::default(),
            schedule: Schedule::default(),
            loss: Loss::default(),
            mixup: Mixup::default(),
            ema: Ema::default(),
            progressive: Progressive::default(),
            eval: Eval::default(),
            checkpoint: Checkpoint::default(),
            track: Track::default(),
        }
    }

    /// The whole spec, defaults included, as TOML; [`crate::parse`] makes an equal run of it.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("keys are strings, and plain keys come before sections")
    }

    /// The directory of checkpoints and metrics.
    pub fn run_dir(&self) -> PathBuf {
        match &self.run_dir {
            Some(dir) => dir.into(),
            None => ["runs", &self.name].iter().collect(),
        }
    }

    /// Every key that changes what is computed, dotted, with its value as text (`unset` where there is none): two
    /// runs may share checkpoints only if these are equal.
    pub fn computation(&self) -> BTreeMap<String, String> {
        // Only the schedule and the average can make the first steps depend on how many follow.
        let in_percent = [self.schedule.warmup]
            .iter()
            .chain(&self.schedule.milestones)
            .chain(&self.ema.half_life)
            .chain(&self.progressive.until)
            .any(|length| length.unit == Unit::Percent);
        let ends = [ScheduleKind::Cosine, ScheduleKind::Polynomial];
        let length_matters = in_percent || ends.contains(&self.schedule.kind);

        let mut resolved = self.clone();
        resolved.train.bn_batch = Some(self.train.bn_batch());
        resolved.data.train_examples = self.data.train_examples();
        let tree = serde_json::to_value(resolved).expect("keys are strings");
        let mut keys = BTreeMap::new();
        flatten("", &tree, &mut keys);
        keys.retain(|key, _| {
            let is_free = FREE.contains(&key.as_str()) || key == "train.length" && !length_matters;
            !is_free
        });
        keys
    }
}

fn flatten(path: &str, value: &serde_json::Value, keys: &mut BTreeMap<String, String>) {
    match value {
        serde_json::Value::Object(section) => {
            for (key, value) in section {
                let path = match path {
                    "" => key.clone(),
                    section => format!("{section}.{key}"),
                };
                flatten(&path, value, keys);
            }
        }
        serde_json::Value::Null => {
            keys.insert(path.into(), "unset".into());
        }
        value => {
            keys.insert(path.into(), value.to_string());
        }
    }
}

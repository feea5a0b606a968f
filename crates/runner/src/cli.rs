//! The command line.

use std::fmt::Display;
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{PossibleValue, PossibleValuesParser, RangedU64ValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use engine::cpu::{Level, Precision};
use engine::cuda;
use serde::Serialize;
use spec::{Length, LengthError};

const EXAMPLES: &str = "\
Examples:
  runner configs/quickstart.toml                          train on the digits in this repository
  runner configs/quickstart.toml --set train.length=\"20 epochs\"
                                                          go on from where it ended
  runner plan configs/resnet50.toml                       what it would cost; touches nothing
  runner config configs/resnet50.toml --origins           every key, and which file, variable or argument said it
  runner eval runs/quickstart                             score its latest checkpoint
  runner predict runs/quickstart photo.jpg                what it sees in an image
  runner configs/resnet50.toml --set data.source=fake     train on noise, for a first look at the speed
  runner sweep experiments/lr.toml                        many variants of a spec, ranked
  runner report runs/a runs/b                             compare them on one page
  runner bench engine --by-kernel                         how fast this machine computes, and where the time goes

A run lives in runs/NAME. Starting it again resumes it; on the same kind of CPU the resumed run computes the
same bits as one that never stopped.

Exit codes: 0 done, 2 the spec or the arguments are wrong, 3 the input data is wrong, 4 the run failed,
75 interrupted and resumable (start it again).";

/// Trains, evaluates and costs ResNet-18 to ResNet-200 on ImageNet-style data, driven by one TOML file.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Cli {
    /// The TOML file that says everything about the run; it does what its `mode` says
    #[arg(required = true, value_name = "CONFIG")]
    pub(crate) config: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) changes: Changes,

    /// Put an earlier run of this name aside (runs/NAME.1, .2, ..) and start anew
    #[arg(long)]
    pub(crate) fresh: bool,

    /// Show a dashboard instead of a bar: curves, speed, machine, events; plain lines where stderr is no terminal
    #[arg(long)]
    pub(crate) tui: bool,

    /// Stop after so much of the run, such as "5 epochs", as if by a signal, but evaluated; the next start goes on
    #[arg(long, value_name = "LENGTH", value_parser = length)]
    pub(crate) until: Option<Length>,

    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

fn length(text: &str) -> Result<Length, String> {
    text.parse().map_err(|error: LengthError| error.to_string())
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Say what a run would be and cost: parameters, multiply-adds, steps, memory; touch nothing
    Plan(PlanArgs),
    /// Print the resolved spec, defaults included, as TOML
    Config(ConfigArgs),
    /// Score a checkpoint on the evaluation set of its spec
    ///
    /// RUNNER__A__B variables and --set lie over the spec in the checkpoint. That spec is resolved: the profile that it
    /// was trained with is applied, and there is none to choose.
    Eval(EvalArgs),
    /// Say what a checkpoint sees in images: the likeliest classes and their probabilities
    ///
    /// Images are prepared as in the evaluation of the checkpoint's spec. One that cannot be read gets a line that says
    /// why; the exit code is then 3.
    Predict(PredictArgs),
    /// Make a checkpoint of weights of torchvision, timm or the 2018 reference
    Import(ImportArgs),
    /// Make a state dict of a checkpoint, in safetensors, that torch loads strictly into the network of the same depth
    Export(ExportArgs),
    /// Prove on this machine that a killed run, resumed, ends with the same bits as one that was not
    VerifyResume(VerifyArgs),
    /// Say what this machine has, and what is missing
    Doctor(DoctorArgs),
    /// Make, convert and audit shards of images
    #[command(subcommand)]
    Data(DataArgs),
    /// Measure how fast something is on this machine
    #[command(subcommand)]
    Bench(BenchArgs),
    /// Train many variants of a spec: a grid, a list or random draws
    ///
    /// The table `[sweep]` of the file says which. Each run is a process of its own in runs/NAME/HASH, where HASH stands for
    /// what it computes: started again, the sweep passes over what is done and goes on with the rest.
    Sweep(SweepArgs),
    /// List runs: status, step, best accuracy, speed
    Runs(RunsArgs),
    /// Compare runs on one self-contained HTML page, with its curves as PNG images beside it
    Report(ReportArgs),
    /// Tell an MLflow server what it has missed of a run
    #[command(subcommand)]
    Track(TrackArgs),
}

/// What a command line changes in a spec.
#[derive(Debug, Args)]
pub(crate) struct Changes {
    /// Change a key of the spec, for example --set train.batch_size=256; may be given often
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,

    /// Apply the table [profile.NAME] of the spec
    #[arg(long, value_name = "NAME")]
    pub(crate) profile: Option<String>,
}

/// A spec and what changes it.
#[derive(Debug, Args)]
pub(crate) struct Spec {
    /// The TOML file
    #[arg(value_name = "CONFIG")]
    pub(crate) config: PathBuf,

    #[command(flatten)]
    pub(crate) changes: Changes,
}

#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    /// The TOML file
    #[arg(value_name = "CONFIG", required_unless_present = "schema")]
    pub(crate) config: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) changes: Changes,

    /// Say behind each key where its value comes from
    #[arg(long)]
    pub(crate) origins: bool,

    /// Print the JSON Schema of specs instead, for editors
    #[arg(long, conflicts_with_all = ["config", "set", "profile", "origins"])]
    pub(crate) schema: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) spec: Spec,

    /// Reckon the time at this rate instead of that of the last run
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) images_per_s: Option<f64>,

    /// Also open everything that the run would open, and fail as it would
    #[arg(long)]
    pub(crate) check: bool,

    /// Print one JSON document instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if rate > 0.0 && f64::is_finite(rate) => Ok(rate),
        _ => Err("expected a number above 0".into()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    pub(crate) spec: Spec,

    /// Steps to train, twice; the second time the run is killed half-way
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(2..))]
    pub(crate) steps: u64,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print one JSON document instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SweepArgs {
    #[command(flatten)]
    pub(crate) spec: Spec,

    /// Runs at a time; they share the cores
    #[arg(long, value_name = "N", default_value = "1", value_parser = RangedU64ValueParser::<usize>::new().range(1..=256))]
    pub(crate) jobs: usize,

    /// Start at most so many processes now; the next start of the sweep goes on
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub(crate) max_runs: Option<usize>,

    /// Also write a JUnit report, a test case for each run, for CI servers
    #[arg(long, value_name = "FILE")]
    pub(crate) junit: Option<PathBuf>,

    /// Print one JSON document instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RunsArgs {
    /// Where to look, three levels deep
    #[arg(value_name = "DIR", default_value = "runs")]
    pub(crate) dirs: Vec<PathBuf>,

    /// Print one JSON document instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// Run directories, or directories of them
    #[arg(value_name = "RUN", required = true)]
    pub(crate) runs: Vec<PathBuf>,

    /// The page; its images are called after it
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    pub(crate) out: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TrackArgs {
    /// Send what the journals of runs hold and a server has not got; whatever it has already is not sent twice
    ///
    /// A run on a server writes everything into mlflow.journal in its directory first. While the server is away the run
    /// goes on. MLFLOW_TRACKING_USERNAME, _PASSWORD, _TOKEN and MLflow's other variables count here too.
    Sync(TrackSyncArgs),
}

#[derive(Debug, Args)]
pub(crate) struct TrackSyncArgs {
    /// Run directories
    #[arg(value_name = "RUN", required = true)]
    pub(crate) runs: Vec<PathBuf>,

    /// The server [default: MLFLOW_TRACKING_URI, or the track.mlflow of the run's spec]
    #[arg(long, value_name = "URL")]
    pub(crate) to: Option<String>,

    /// Print one JSON document instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DataArgs {
    /// Make shards of photographs that nobody took, with the sizes and the code lengths of ImageNet's
    Fake(DataFakeArgs),
    /// Make shards of images that lie in folders or tars, or that a list names
    ///
    /// Records are shuffled by the seed. A conversion that was cut off goes on where it was, and ends with the same bytes.
    Convert(DataConvertArgs),
    /// Write the records of shards as rows of a table of Bigtable
    ///
    /// Keys are the prefix and the record's number in ten digits. A load that was cut off is started again; it writes the same
    /// rows. The table and its column family have to be there: cbt -project P -instance I createtable T families=tfexample
    LoadBigtable(DataLoadArgs),
    /// Read and decode everything: checksums, labels, sizes, duplicates; exit code 3 if anything is wrong
    Check(DataCheckArgs),
    /// Note where images can be entered, so that a run with `data.index` decodes faster from its first epoch on
    ///
    /// What is known is kept: it can be stopped and started again, and a second time it has nothing to do.
    Index(DataIndexArgs),
}

#[derive(Debug, Args)]
pub(crate) struct DataLoadArgs {
    /// Glob of the TFRecord shards, read in the order of their names: files, or objects of a bucket
    #[arg(value_name = "GLOB")]
    pub(crate) data: String,

    /// Where to: bigtable://PROJECT/INSTANCE/TABLE/PREFIX, with ?column=FAMILY:QUALIFIER unless it is tfexample:example
    #[arg(value_name = "URL", value_parser = table)]
    pub(crate) to: String,
}

fn table(text: &str) -> Result<String, String> {
    match text.starts_with("bigtable://") {
        true => Ok(text.into()),
        false => Err("expected bigtable://PROJECT/INSTANCE/TABLE/PREFIX".into()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct DataFakeArgs {
    /// Directory of the shards; it may be in a bucket (gs://, s3://, az://)
    #[arg(value_name = "DIR")]
    pub(crate) out: PathBuf,

    /// Photographs to make
    #[arg(long, value_name = "N", default_value = "1000", value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    pub(crate) examples: u64,

    /// Files to put them in
    #[arg(long, value_name = "N", default_value = "4", value_parser = RangedU64ValueParser::<usize>::new().range(1..=99_999))]
    pub(crate) shards: usize,

    /// Classes that they have, at random
    #[arg(long, value_name = "N", default_value = "1000", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(crate) classes: u64,

    /// What the files' names begin with
    #[arg(long, value_name = "NAME", default_value = "train", value_parser = split)]
    pub(crate) split: String,

    /// Other seeds make other photographs
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Debug, Args)]
pub(crate) struct DataConvertArgs {
    /// Directory with one folder for each class; or a tar of one, or of one tar for each class, as ImageNet comes
    #[arg(long, value_name = "PATH")]
    pub(crate) from: PathBuf,

    /// The class of each image, which then need not be in folders
    ///
    /// Lines of PATH,CLASS with the path in --from; or of classes alone, for the images in the order of their names, as
    /// imagenet_2012_validation_synset_labels.txt has them. Where all classes are whole numbers they are their own places.
    #[arg(long, value_name = "FILE")]
    pub(crate) labels: Option<PathBuf>,

    /// All classes in their order, one a line: name, and words for it
    ///
    /// The labels.txt of another split (names alone), or ImageNet's LOC_synset_mapping.txt; without it classes are in the order
    /// of their names.
    #[arg(long, value_name = "FILE")]
    pub(crate) classes: Option<PathBuf>,

    /// Boxes of objects, one a line: NAME (or PATH),XMIN,YMIN,XMAX,YMAX, as fractions of width and height
    #[arg(long, value_name = "FILE")]
    pub(crate) boxes: Option<PathBuf>,

    /// Write PNG, WebP and CMYK images anew, as RGB JPEG of quality 100
    ///
    /// This program reads them as they are; others may not.
    #[arg(long)]
    pub(crate) rgb_jpeg: bool,

    /// Directory of the shards; it may be in a bucket (gs://, s3://, az://)
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,

    /// Files to put them in
    #[arg(long, value_name = "N", default_value = "16", value_parser = RangedU64ValueParser::<usize>::new().range(1..=99_999))]
    pub(crate) shards: usize,

    /// What the files' names begin with
    #[arg(long, value_name = "NAME", default_value = "train", value_parser = split)]
    pub(crate) split: String,

    /// The label that the first class gets; the others follow by name
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) label_offset: i64,

    /// Other seeds give other orders
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Debug, Args)]
pub(crate) struct DataIndexArgs {
    /// Glob of the TFRecord shards, in quotes
    #[arg(value_name = "GLOB")]
    pub(crate) data: String,

    /// The directory to keep it in, a run's `data.index`; about 3 % of the shards' size
    #[arg(value_name = "DIR")]
    pub(crate) out: PathBuf,

    /// Print one JSON document instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DataCheckArgs {
    /// Glob of the TFRecord shards, in quotes
    #[arg(value_name = "GLOB")]
    pub(crate) data: String,

    /// Labels less the offset have to be below it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 31))]
    pub(crate) classes: Option<u64>,

    /// The stored label of class 0
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) label_offset: i64,

    /// Take an image that is there twice for a problem
    #[arg(long)]
    pub(crate) no_duplicates: bool,

    /// Print one JSON document instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

/// The beginning of a file's name.
fn split(name: &str) -> Result<String, String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    match !name.is_empty() && name.chars().all(is_plain) {
        true => Ok(name.into()),
        false => Err("expected letters, digits, dots, dashes and underscores".into()),
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchArgs {
    /// Time the engine on a ResNet and made-up images: images/s, fraction of the peak, memory
    Engine(BenchEngineArgs),
    /// Time a card on a ResNet and made-up images: images/s, and a time line by kernel
    Cuda(BenchCudaArgs),
    /// Time the input on real shards, from files to batches: images/s, per CPU-second, and where the time goes
    Input(BenchInputArgs),
}

#[derive(Debug, Args)]
pub(crate) struct BenchInputArgs {
    /// Glob of the TFRecord shards, in quotes
    #[arg(long, value_name = "GLOB")]
    pub(crate) data: String,

    /// Threads that decode [default: all cores]
    #[arg(long, value_name = "T", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024))]
    pub(crate) threads: Option<usize>,

    /// Pixels of a side of the crops
    #[arg(long, value_name = "R", default_value = "224", value_parser = RangedU64ValueParser::<usize>::new().range(1..=4096))]
    pub(crate) resolution: usize,

    /// Images of a batch
    #[arg(long, value_name = "B", default_value = "100", value_parser = RangedU64ValueParser::<usize>::new().range(1..=65_536))]
    pub(crate) batch: usize,

    /// How images are decoded, as `data.decode`
    #[arg(long, default_value = "fast")]
    pub(crate) decode: DecodeArg,

    /// Whose resampling, as `data.resize`
    #[arg(long, default_value = "pillow")]
    pub(crate) resize: ResizeArg,

    /// Directory that knows where images can be entered, as `data.index`; made by `runner data index`
    #[arg(long, value_name = "DIR")]
    pub(crate) index: Option<PathBuf>,

    /// Seconds to count batches for; one at least is counted
    #[arg(long, value_name = "S", default_value = "5", value_parser = clap::value_parser!(u64).range(..=3600))]
    pub(crate) seconds: u64,

    /// Print one JSON document instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

/// `data.decode` as an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DecodeArg {
    /// The crop alone
    Fast,
    /// The whole image, to the bit
    Exact,
}

/// `data.resize` as an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ResizeArg {
    /// Pillow's
    Pillow,
    /// TensorFlow 2's
    Tf,
    /// TensorFlow 1's
    Tf1,
}

/// What a step of the engine is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum BenchMode {
    /// Forward, backward, update
    Train,
    /// Logits, with the running statistics
    Infer,
}

#[derive(Debug, Args)]
pub(crate) struct BenchEngineArgs {
    /// Layers of the ResNet (torchvision's recipe, 1000 classes)
    #[arg(long, value_name = "D", default_value = "50", value_parser = one_of(&nn::DEPTHS))]
    pub(crate) depth: usize,

    /// Pixels of a side of the images: a multiple of 32, at most 448
    #[arg(long, value_name = "R", default_value = "224", value_parser = one_of(nn::RESOLUTIONS), hide_possible_values = true)]
    pub(crate) resolution: usize,

    /// Images of a step
    #[arg(long, value_name = "B", default_value = "16", value_parser = RangedU64ValueParser::<usize>::new().range(1..=65_536))]
    pub(crate) batch: usize,

    /// How activations are stored
    #[arg(long, value_name = "P", default_value = "f32", value_parser = one_of(&Precision::ALL))]
    pub(crate) precision: Precision,

    /// What a step does
    #[arg(long, default_value = "train")]
    pub(crate) mode: BenchMode,

    /// Threads that compute [default: all cores]
    #[arg(long, value_name = "T", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024))]
    pub(crate) threads: Option<usize>,

    /// Vector instructions [default: the highest of this CPU]
    #[arg(long, value_name = "LEVEL", value_parser = one_of(&Level::ALL))]
    pub(crate) level: Option<Level>,

    /// Do every multiply-add of 3 x 3 convolutions
    #[arg(long)]
    pub(crate) no_winograd: bool,

    /// Steps to time at least; steps are added until 3 s are full
    #[arg(long, value_name = "N", default_value = "5", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub(crate) steps: usize,

    /// Also say where the time goes: a line for each kind and shape of kernel
    #[arg(long)]
    pub(crate) by_kernel: bool,

    /// Print one JSON document instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BenchCudaArgs {
    /// Layers of the ResNet (torchvision's recipe, 1000 classes)
    #[arg(long, value_name = "D", default_value = "50", value_parser = one_of(&nn::DEPTHS))]
    pub(crate) depth: usize,

    /// Pixels of a side of the images: a multiple of 32, at most 448
    #[arg(long, value_name = "R", default_value = "224", value_parser = one_of(nn::RESOLUTIONS), hide_possible_values = true)]
    pub(crate) resolution: usize,

    /// Images of a step
    #[arg(long, value_name = "B", default_value = "256", value_parser = RangedU64ValueParser::<usize>::new().range(1..=65_536))]
    pub(crate) batch: usize,

    /// Number format
    #[arg(long, value_name = "P", default_value = "bf16", value_parser = one_of(&cuda::Precision::ALL))]
    pub(crate) precision: cuda::Precision,

    /// What a step does
    #[arg(long, default_value = "train")]
    pub(crate) mode: BenchMode,

    /// The card, as in cuda:N
    #[arg(long, value_name = "N", default_value = "0", value_parser = RangedU64ValueParser::<usize>::new().range(..=999))]
    pub(crate) card: usize,

    /// Cards that share each step, from --card on; each has --batch images
    #[arg(long, value_name = "N", default_value = "1", value_parser = RangedU64ValueParser::<usize>::new().range(1..=64))]
    pub(crate) cards: usize,

    /// Whose convolutions run: the fastest, each, or all of one
    #[arg(long, value_name = "WHOSE", default_value = "fastest", value_parser = one_of(&cuda::Convolutions::ALL))]
    pub(crate) convolutions: cuda::Convolutions,

    /// Also take convolutions that need not give the same bits each time
    #[arg(long)]
    pub(crate) any_bits: bool,

    /// Steps to time at least; steps are added until 3 s are full
    #[arg(long, value_name = "N", default_value = "20", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub(crate) steps: usize,

    /// Also say where the time of one card goes: a line for each kind and shape of kernel
    #[arg(long, conflicts_with = "cards")]
    pub(crate) by_kernel: bool,

    /// Print one JSON document instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

/// Accepts the values of a list, as they print.
fn one_of<T>(values: &[T]) -> impl TypedValueParser<Value = T> + use<T>
where
    T: Copy + Display + FromStr + Send + Sync + 'static,
{
    let names = values.iter().map(ToString::to_string);
    PossibleValuesParser::new(names.map(PossibleValue::new)).map(|name| match name.parse() {
        Ok(value) => value,
        Err(_) => unreachable!("a value of a list reads back from what it prints"),
    })
}

#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// A run directory, a .safetensors file, or a run's checkpoints/latest or checkpoints/best
    #[arg(value_name = "CHECKPOINT")]
    pub(crate) checkpoint: PathBuf,

    /// Change a key of the checkpoint's spec, for example --set data.eval='photos/val-*'; may be given often
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,

    /// Also write accuracy by class and the confusion matrix there: classes.csv, confusion.csv, confusion.json
    #[arg(long, value_name = "DIR")]
    pub(crate) details: Option<PathBuf>,

    /// Print one JSON document instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PredictArgs {
    /// A run directory, a .safetensors file, or a run's checkpoints/latest or checkpoints/best
    #[arg(value_name = "CHECKPOINT")]
    pub(crate) checkpoint: PathBuf,

    /// JPEG files, TFRecord shards of them, or globs of either, in quotes
    #[arg(value_name = "IMAGE", required = true)]
    pub(crate) inputs: Vec<String>,

    /// Classes to name for each image
    #[arg(long, value_name = "K", default_value = "5", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub(crate) top: usize,

    /// Images to look at in one go [default: the run's train.bn_batch]
    #[arg(long, value_name = "B", value_parser = RangedU64ValueParser::<usize>::new().range(1..=65_536))]
    pub(crate) batch: Option<usize>,

    /// Change a key of the checkpoint's spec, for example --set train.device=cpu; may be given often
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,

    /// Print a line of JSON for each image instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// A .safetensors file, or a state dict as torch.save writes it
    #[arg(value_name = "WEIGHTS")]
    pub(crate) weights: PathBuf,

    #[command(flatten)]
    pub(crate) spec: Spec,

    /// The checkpoint to write
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// A run directory, a .safetensors file, or a run's checkpoints/latest or checkpoints/best
    #[arg(value_name = "CHECKPOINT")]
    pub(crate) checkpoint: PathBuf,

    /// The state dict to write
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

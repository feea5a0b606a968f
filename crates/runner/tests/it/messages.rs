//! Every message about wrong data and wrong specs, as a user meets it: all of stderr from the message on, and the exit
//! code. A wrong word here is a wrong word there; snapshots/ is the list to read.
//!
//! After a change: `INSTA_UPDATE=always cargo test -p runner messages`, and read the difference.

use std::fs;
use std::path::PathBuf;

use insta::assert_snapshot;
use tempfile::TempDir;

use crate::{runner, text};

/// A spec of ten little images, five to a step; what a case wants otherwise stands before or below it.
const SPEC: &str = r#"name = "x"
[model]
depth = 18
resolution = 32
classes = 10
[data]
train = "shards/train-*"
eval = "shards/eval-*"
[train]
batch_size = 5
length = "4 steps"
threads = 1
[schedule]
warmup = "1 step"
milestones = []
[track]
mlflow = "off"
"#;

/// A working directory of its own, so that messages name no other path.
struct Here {
    dir: TempDir,
}

impl Here {
    /// With a spec, and ten good records in each of two shards.
    fn new() -> Self {
        let here = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::create_dir(here.path("shards")).unwrap();
        here.write("x.toml", SPEC);
        here.write("shards/train-0", framed(&good()));
        here.write("shards/eval-0", framed(&good()));
        here
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// What is said about it: the exit code, and stderr from the message on.
    fn say_with(&self, args: &[&str], environment: &[(&str, &str)], message: &str) -> String {
        let mut command = runner(args);
        let output = command
            .current_dir(self.dir.path())
            .envs(environment.iter().copied())
            .output()
            .unwrap();
        let (out, said) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(out, "", "{said}");
        let start = said
            .find(message)
            .unwrap_or_else(|| panic!("{message} is missing in\n{said}"));
        let code = output.status.code().unwrap();
        format!("exit {code}\n{}", &said[start..])
    }

    /// The same of the spec with arguments, all of stderr.
    fn say(&self, sets: &[&str]) -> String {
        let mut args = vec!["x.toml"];
        sets.iter().for_each(|set| args.extend(["--set", set]));
        self.say_with(&args, &[], "")
    }

    /// Of a record, from the name of its shard on: a run has said more before.
    fn say_of_record(&self, sets: &[&str]) -> String {
        let mut args = vec!["x.toml"];
        sets.iter().for_each(|set| args.extend(["--set", set]));
        self.say_with(&args, &[], "shards/")
    }
}

/// The bytes of the first ten digits' JPEG files.
fn jpegs() -> Vec<Vec<u8>> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let shard = root.join("data/digits/validation-00000-of-00002");
    let mut reader = store::tfrecord::Reader::open(&shard).unwrap();
    let find = |bytes: &[u8], mark: [u8; 2]| bytes.windows(2).position(|pair| pair == mark);
    let jpeg = |record: &[u8]| {
        let file = &record[find(record, [0xff, 0xd8]).unwrap()..];
        file[..find(file, [0xff, 0xd9]).unwrap() + 2].to_vec()
    };
    (0..10)
        .map(|_| jpeg(&reader.next().unwrap().unwrap().bytes))
        .collect()
}

/// A field of a protocol buffer that holds bytes.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length > 127 {
        out.push(length as u8 | 128);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend(bytes);
    out
}

/// A feature by name; 1 is the kind of a list of bytes, 3 of whole numbers.
fn feature(name: &str, kind: u8, value: &[u8]) -> Vec<u8> {
    let list = field(kind, &field(1, value));
    field(1, &[field(1, name.as_bytes()), field(2, &list)].concat())
}

fn image(jpeg: &[u8]) -> Vec<u8> {
    feature("image/encoded", 1, jpeg)
}

/// A label below 128.
fn label(label: u8) -> Vec<u8> {
    feature("image/class/label", 3, &[label])
}

fn example(features: &[Vec<u8>]) -> Vec<u8> {
    field(1, &features.concat())
}

/// Ten records with the labels 1 to 10.
fn good() -> Vec<Vec<u8>> {
    let jpegs = jpegs().into_iter().zip(1..);
    jpegs
        .map(|(jpeg, n)| example(&[image(&jpeg), label(n)]))
        .collect()
}

fn framed(records: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = vec![];
    for record in records {
        store::tfrecord::write(&mut bytes, record).unwrap();
    }
    bytes
}

/// Where record 6 of the good ones starts.
fn sixth() -> usize {
    framed(&good()[..6]).len()
}

/// With training shards of ten records, of which record 6 is another.
fn with_sixth(record: Vec<u8>) -> Here {
    let here = Here::new();
    let mut records = good();
    records[6] = record;
    here.write("shards/train-0", framed(&records));
    here
}

/// With other bytes from a place in the training shard on.
fn spoilt(at: usize, with: &[u8]) -> Here {
    let here = Here::new();
    let mut bytes = framed(&good());
    bytes[at..at + with.len()].copy_from_slice(with);
    here.write("shards/train-0", &bytes);
    here
}

#[test]
fn the_spec_of_these_tests_is_right() {
    let here = Here::new();
    let output = runner(&["x.toml"])
        .current_dir(here.dir.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[test]
fn damaged_shard() {
    assert_snapshot!(spoilt(sixth(), &[0; 100]).say(&[]));
}

#[test]
fn wrong_length_crc() {
    let crc = framed(&good())[sixth() + 8];
    assert_snapshot!(spoilt(sixth() + 8, &[crc ^ 1]).say(&[]));
}

#[test]
fn wrong_data_crc() {
    let byte = framed(&good())[sixth() + 100];
    assert_snapshot!(spoilt(sixth() + 100, &[byte ^ 1]).say_of_record(&[]));
}

#[test]
fn truncated_record() {
    let here = Here::new();
    here.write("shards/train-0", &framed(&good())[..sixth() + 200]);
    assert_snapshot!(here.say(&[]));
}

#[test]
fn truncated_header() {
    let here = Here::new();
    here.write("shards/train-0", &framed(&good())[..sixth() + 5]);
    assert_snapshot!(here.say(&[]));
}

#[test]
fn not_a_shard() {
    let here = Here::new();
    here.write("shards/train-0", SPEC);
    assert_snapshot!(here.say(&[]));
}

#[test]
fn missing_label() {
    let here = with_sixth(example(&[image(&jpegs()[6])]));
    assert_snapshot!(here.say_of_record(&[]));
}

#[test]
fn missing_image() {
    let here = with_sixth(example(&[label(7)]));
    assert_snapshot!(here.say_of_record(&[]));
}

#[test]
fn a_label_that_is_text() {
    let named = feature("image/class/label", 1, b"seven");
    let here = with_sixth(example(&[image(&jpegs()[6]), named]));
    assert_snapshot!(here.say_of_record(&[]));
}

#[test]
fn not_an_example() {
    assert_snapshot!(with_sixth(b"no protocol buffer".to_vec()).say_of_record(&[]));
}

#[test]
fn bad_jpeg() {
    let here = with_sixth(example(&[image(b"\x89PNG\r\n\x1a\n"), label(7)]));
    assert_snapshot!(here.say_of_record(&[]));
}

#[test]
fn truncated_jpeg() {
    let half = &jpegs()[6][..400];
    let here = with_sixth(example(&[image(half), label(7)]));
    assert_snapshot!(here.say_of_record(&[]));
}

#[test]
fn label_out_of_range() {
    let here = with_sixth(example(&[image(&jpegs()[6]), label(11)]));
    assert_snapshot!(here.say_of_record(&[]));
}

#[test]
fn label_below_the_offset() {
    let here = with_sixth(example(&[image(&jpegs()[6]), label(0)]));
    assert_snapshot!(here.say_of_record(&[]));
}

#[test]
fn more_bad_records_than_allowed() {
    let here = Here::new();
    let bad = example(&[image(&jpegs()[0]), label(11)]);
    here.write("shards/train-0", framed(&vec![bad; 10]));
    assert_snapshot!(here.say_of_record(&["data.max_bad_records=2"]));
}

#[test]
fn bad_record_of_an_evaluation() {
    let here = Here::new();
    let mut records = good();
    records[6] = example(&[image(&jpegs()[6])]);
    here.write("shards/eval-0", framed(&records));
    assert_snapshot!(here.say_of_record(&["train.length=1 step"]));
    // The checkpoint was written before its evaluation.
    let args = ["eval", "runs/x"];
    assert_snapshot!("bad_record_of_runner_eval", here.say_with(&args, &[], ""));
}

#[test]
fn empty_glob() {
    assert_snapshot!(Here::new().say(&["data.train=elsewhere/train-*"]));
}

#[test]
fn empty_absolute_glob() {
    assert_snapshot!(Here::new().say(&["data.eval=/no/such/folder/eval-*"]));
}

#[test]
fn malformed_glob() {
    assert_snapshot!(Here::new().say(&["data.train=shards/train-[0"]));
}

#[test]
fn a_shard_without_records() {
    let here = Here::new();
    here.write("shards/train-0", "");
    assert_snapshot!(here.say(&[]));
}

#[test]
fn wrong_number_of_training_examples() {
    let here = Here::new();
    here.write("shards/train-1", framed(&good()[..3]));
    assert_snapshot!(here.say(&["data.train_examples=20"]));
}

#[test]
fn wrong_number_of_evaluation_examples() {
    assert_snapshot!(Here::new().say(&["data.eval_examples=9"]));
}

#[test]
fn plan_check_says_the_same() {
    let here = spoilt(sixth(), &[0; 100]);
    assert_snapshot!(here.say_with(&["plan", "x.toml", "--check"], &[], ""));
}

#[test]
fn buckets() {
    let sets = [
        "data.train=gs://bucket/train-*",
        "data.eval=s3://bucket/eval-*",
        "run_dir=az://container/run",
        "model.labels=https://example/labels.txt",
    ];
    assert_snapshot!(Here::new().say(&sets));
}

#[test]
fn a_spec_in_a_bucket() {
    assert_snapshot!(Here::new().say_with(&["gs://bucket/x.toml"], &[], ""));
}

#[test]
fn a_checkpoint_in_a_bucket() {
    assert_snapshot!(Here::new().say_with(&["eval", "gs://bucket/runs/x"], &[], ""));
}

/// An unknown key, a wrong type and a value out of range, in every layer there is.
#[test]
fn every_layer_at_once() {
    let here = Here::new();
    here.write(
        "base.toml",
        "sed = 1\n\n[model]\nclasses = \"ten\"\n\n[optimizer]\nmomentum = 1.5\n",
    );
    let layered = "name = \"x\"\nextends = \"base.toml\"\n\n\
                   [data]\nsource = \"fake\"\nlane = 4\nflip = 1\nshuffle_window = 0\n\n\
                   [profile.small.train]\nbatchsize = 8\nlength = 90\nthreads = 4096\n";
    here.write("layered.toml", layered);
    let args = [
        "layered.toml",
        "--profile",
        "small",
        "--set",
        "schedule.lr=0.1",
        "--set",
        "schedule.factor=tenth",
        "--set",
        "loss.label_smoothing=2",
    ];
    let environment = [
        ("RUNNER__EVAL__OFTEN", "1"),
        ("RUNNER__DATA__LABEL_OFFSET", "none"),
        ("RUNNER__EVAL__CROP_RATIO", "1.5"),
    ];
    assert_snapshot!(here.say_with(&args, &environment, ""));
}

/// Each is answered with what can be.
#[test]
fn absurd_values() {
    let sets = [
        "name=a/b",
        "seed=-1",
        "model.depth=51",
        "model.resolution=225",
        "model.classes=10000000000",
        "data.crop_area=[0.5, 2]",
        "data.crop_aspect=[1, 1e7]",
        "data.lanes=1000000",
        "data.shuffle_window=100000000000000000000",
        "data.train_examples=18446744073709551615",
        "data.eval_examples=0",
        "data.max_bad_records=18446744073709551615",
        "train.batch_size=1000000000",
        "train.bn_batch=0",
        "train.length=99999999999999999999 steps",
        "train.threads=100000",
        "optimizer.momentum=1",
        "optimizer.weight_decay=-1",
        "schedule.base_lr=0",
        "schedule.factor=1e999",
        "schedule.warmup=-5 epochs",
        "loss.label_smoothing=1",
        "eval.every=0 steps",
        "eval.crop_ratio=0",
        "checkpoint.every=0 epochs",
        "checkpoint.keep=0",
        "track.experiment=",
    ];
    assert_snapshot!(Here::new().say(&sets));
}

#[test]
fn one_value_has_no_variance() {
    assert_snapshot!(Here::new().say(&["train.bn_batch=1"]));
}

#[test]
fn a_batch_that_does_not_divide() {
    assert_snapshot!(Here::new().say(&["train.batch_size=300", "train.bn_batch=64"]));
}

#[test]
fn a_number_format_that_needs_a_card() {
    assert_snapshot!(Here::new().say(&["train.device=cpu", "train.precision=f16"]));
}

#[test]
fn a_card_that_is_not_there() {
    if engine::cuda::libraries().driver.is_some() {
        eprintln!("skipped: there is a CUDA driver");
        return;
    }
    assert_snapshot!(Here::new().say(&["train.device=cuda:1"]));
}

#[test]
fn names_that_are_not_known() {
    let sets = ["data.source=kafka", "track.mlflow=databricks"];
    assert_snapshot!(Here::new().say(&sets));
}

#[test]
fn flags_of_the_reference() {
    let sets = [
        "train_batch_size=1024",
        "resnet_depth=50",
        "tpu=grpc://10.0.0.1",
        "train.iterations_per_loop=100",
    ];
    assert_snapshot!(Here::new().say(&sets));
}

#[test]
fn not_toml() {
    let here = Here::new();
    here.write("x.toml", SPEC.replace("classes = 10", "classes = ten"));
    assert_snapshot!(here.say(&[]));
}

#[test]
fn a_spec_that_says_nothing() {
    let here = Here::new();
    here.write("x.toml", "");
    assert_snapshot!(here.say(&[]));
}

#[test]
fn a_missing_spec() {
    assert_snapshot!(Here::new().say_with(&["y.toml"], &[], ""));
}

#[test]
fn a_missing_base() {
    let here = Here::new();
    here.write(
        "x.toml",
        format!("extends = [\"a.toml\", \"gs://b/c.toml\"]\n{SPEC}"),
    );
    assert_snapshot!(here.say(&[]));
}

#[test]
fn a_directory_for_a_spec() {
    assert_snapshot!(Here::new().say_with(&["shards"], &[], ""));
}

#[test]
fn an_unknown_profile() {
    let here = Here::new();
    here.write("x.toml", format!("{SPEC}[profile.small]\nseed = 1\n"));
    let args = ["x.toml", "--profile", "smal"];
    assert_snapshot!(here.say_with(&args, &[], ""));
}

#[test]
fn labels_that_do_not_fit() {
    let here = Here::new();
    here.write("labels.txt", "cat\ndog\n");
    assert_snapshot!(here.say(&["model.labels=labels.txt"]));
    let set = ["model.labels=names.txt"];
    assert_snapshot!("labels_that_are_not_there", here.say(&set));
}

//! The program as its users meet it: the binary, real shards, kills and resumes.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic and write specs"
)]

mod bench;
mod buckets;
mod cards;
mod data;
mod fake_bucket;
mod longrun;
mod messages;
mod real_stores;
mod resume;
#[path = "../../../track/tests/it/served.rs"]
mod served;
mod sweep;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

/// The binary at the root of the repository, where the configs' paths start.
fn runner(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_runner"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    command.args(args).current_dir(root);
    command
}

fn output(args: &[&str]) -> Output {
    runner(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Runs to the expected exit code and returns what was printed: (stdout, stderr).
fn check(args: &[&str], code: i32) -> (String, String) {
    let output = output(args);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{args:?}\n{out}{err}");
    (out, err)
}

/// A directory for one run, and the arguments that send the quickstart there.
struct Home {
    dir: TempDir,
}

impl Home {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    fn args<'a>(&self, sets: &[&'a str]) -> Vec<std::borrow::Cow<'a, str>> {
        let run_dir = format!("run_dir={}", self.path().display());
        let mut args = vec![
            "configs/quickstart.toml".into(),
            "--set".into(),
            run_dir.into(),
            "--set".into(),
            "track.mlflow=off".into(),
        ];
        for set in sets {
            args.extend(["--set".into(), (*set).into()]);
        }
        args
    }

    fn check(&self, sets: &[&str], code: i32) -> (String, String) {
        let args = self.args(sets);
        check(&args.iter().map(AsRef::as_ref).collect::<Vec<&str>>(), code)
    }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// Three steps of eight images, and after each an evaluation of 359.
#[test]
fn a_run_says_what_limits_it_and_what_to_change() {
    let home = Home::new();
    let sets = [
        "train.batch_size=8",
        "train.bn_batch=8",
        "train.length=3 steps",
        "schedule.warmup=1 steps",
        "schedule.milestones=[\"50 steps\"]",
        "eval.every=1 steps",
    ];
    let (out, _) = home.check(&sets, 0);
    let time = &json(&out)["time"];
    // Which part it is depends on the machine; here an evaluation, or a slow disk's checkpoint.
    let seconds = time["seconds"].as_object().unwrap().iter();
    let seconds = seconds.map(|(name, value)| (value.as_f64().unwrap(), name.as_str()));
    let (_, largest) = seconds.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
    let largest = if largest == "read" {
        "input read"
    } else {
        largest
    };
    assert_eq!(time["limited_by"], largest, "{time}");
    let change = time["change"][0].as_str().unwrap();
    assert!(change.starts_with(&format!("{largest} takes ")), "{change}");
    assert!(change.contains("% of the time: "), "{change}");
    let page = home.dir.path().join("page.html");
    let run = home.path();
    let args = [
        "report",
        run.to_str().unwrap(),
        "--out",
        page.to_str().unwrap(),
    ];
    check(&args, 0);
    let html = std::fs::read_to_string(&page).unwrap();
    assert!(html.contains("Where the time went") && html.contains(largest));
}

#[test]
fn the_quickstart_learns_ends_goes_on_and_refuses_another_network() {
    let home = Home::new();
    let (out, _) = home.check(&[], 0);
    let summary = json(&out);
    assert_eq!(
        summary,
        json(&std::fs::read_to_string(home.path().join("summary.json")).unwrap())
    );
    assert_eq!(
        (&summary["status"], &summary["step"]),
        (&"done".into(), &338.into())
    );
    assert_eq!(summary["best"]["metric"], "top1");
    assert!(
        summary["best"]["value"].as_f64().unwrap() >= 0.97,
        "{summary}"
    );
    assert!(summary["best"]["step"].as_u64().unwrap() <= 338);
    for key in ["top1", "top5", "loss"] {
        assert!(summary["eval"][key].is_f64(), "{summary}");
    }
    assert!(summary["images_per_s"].as_f64().unwrap() > 0.0);
    let spent = summary["time"]["seconds"].as_object().unwrap();
    let parts: Vec<&String> = spent.keys().collect();
    let expected = [
        "checkpoint",
        "decode",
        "engine",
        "evaluation",
        "read",
        "tracking",
    ];
    assert_eq!(parts, expected);
    assert!(
        spent.values().all(|s| s.as_f64().unwrap() > 0.0),
        "{summary}"
    );

    let (again, said) = home.check(&[], 0);
    assert!(
        said.contains("is finished: 338 of 338 steps done"),
        "{said}"
    );
    assert_eq!(again, out, "nothing is trained or lost");

    let (longer, said) = home.check(&["train.length=340 steps"], 0);
    assert!(said.contains("resuming at step 338 of 340"), "{said}");
    assert_eq!(json(&longer)["step"], 340);

    let (_, said) = home.check(&["model.depth=34"], 2);
    let differs = format!(
        "{}: holds a run that computes something else\n  model.depth is 18 there and 34 here\n",
        home.path().display()
    );
    assert!(said.starts_with(&differs), "{said}");
}

fn plan(args: &[&str]) -> Value {
    json(&check(&[&["plan", "--json"], args].concat(), 0).0)
}

#[test]
fn plan_knows_the_reference_regime() {
    let plan = plan(&["configs/resnet50.toml"]);
    assert_eq!(plan["model"]["params"], 25_557_032);
    assert_eq!(plan["model"]["macs_per_image"], 4_089_184_256_u64);
    assert_eq!(plan["steps"]["total"], 112_590);
    assert_eq!(plan["steps"]["peak_lr"], 0.4);
    assert_eq!(plan["data"]["train_examples"], 1_281_167);
    let memory = plan["memory"].as_object().unwrap();
    let is_part =
        |key: &str| !["peak_bytes", "available_bytes", "fits", "largest_bn_batch"].contains(&key);
    let parts = memory.iter().filter(|(key, _)| is_part(key));
    let sum: u64 = parts.map(|(_, bytes)| bytes.as_u64().unwrap()).sum();
    assert_eq!(memory["peak_bytes"], sum);
    assert_eq!(
        plan["time"]["seconds"],
        serde_json::Value::Null,
        "no rate is known"
    );
}

#[test]
fn plan_counts_every_config() {
    for (depth, params) in [
        (18, 11_693_736),
        (34, 21_801_896),
        (101, 44_549_160),
        (152, 60_192_808),
        (200, 64_673_832),
    ] {
        let config = format!("configs/resnet{depth}.toml");
        assert_eq!(plan(&[&config])["model"]["params"], params);
    }
    for (name, params) in [("resnetrs50", 35_691_912), ("resnetrs200", 93_209_992)] {
        let config = format!("configs/{name}.toml");
        assert_eq!(plan(&[&config])["model"]["params"], params);
    }
    let torchvision = plan(&["configs/resnet18.toml", "--set", "model.recipe=torchvision"]);
    assert_eq!(torchvision["model"]["params"], 11_689_512);
}

#[test]
fn plan_as_text_is_a_table() {
    let (out, _) = check(
        &["plan", "configs/resnet18.toml", "--set", "train.threads=2"],
        0,
    );
    let expected = "\
resnet18: resnet18 (tpu2018), 224 px, 1000 classes

                       output   parameters    multiply-adds
  conv1        112 x 112 x 64        9,536      118,013,952
  maxpool        56 x 56 x 64            0                0
  layer1         56 x 56 x 64      152,192      475,267,072
  layer2        28 x 28 x 128      525,568      411,041,792
  layer3        14 x 14 x 256    2,099,712      411,041,792
  layer4          7 x 7 x 512    8,393,728      411,041,792
  avgpool         1 x 1 x 512            0                0
  fc             1 x 1 x 1000      513,000          512,000
  total                         11,693,736    1,826,918,400

steps       112590 of 1024 images, 89.99 epochs of 1281167 examples
batches     normalised 128 images at a time, 8 to a step
rate        to 0.4 in 6256 steps
evaluated   90 times on 50000 examples
checkpoint  89 MiB, written 90 times to runs/resnet18
";
    assert!(out.starts_with(expected), "{out}");
    let rest: Vec<_> = out[expected.len()..].lines().collect();
    assert!(rest[0].starts_with("memory      "), "{out}");
    // Not every system says what is available.
    assert!(
        rest.get(1)
            .is_none_or(|line| line.starts_with("fits        ")),
        "{out}"
    );
}

#[test]
fn plan_reckons_the_time_at_a_stated_rate_and_what_would_fit() {
    let (out, _) = check(
        &["plan", "configs/resnet50.toml", "--images-per-s", "1000"],
        0,
    );
    assert!(
        out.contains("time        32 h 01 min at 1000.0 images/s (stated)"),
        "{out}"
    );
    // 1024 images at once take 85 GiB and more; 1 image takes little.
    let plan = plan(&[
        "configs/resnet50.toml",
        "--set",
        "train.bn_batch=1024",
        "--set",
        "train.batch_size=1024",
    ]);
    if plan["memory"]["fits"] == false {
        let fitting = plan["memory"]["largest_bn_batch"].as_u64().unwrap();
        assert!(1024 % fitting == 0 && fitting < 1024, "{fitting}");
    }
}

#[test]
fn plan_checks_on_request_only() {
    let nowhere = ["plan", "configs/resnet50.toml"];
    check(&nowhere, 0);
    let (_, said) = check(&[&nowhere[..], &["--check"]].concat(), 3);
    assert!(
        said.starts_with("data.train: imagenet/train-*: no file matches\nhint: "),
        "{said}"
    );
    let home = Home::new();
    let dir = format!("run_dir={}", home.path().display());
    let (_, said) = check(
        &["plan", "configs/quickstart.toml", "--check", "--set", &dir],
        0,
    );
    assert!(
        said.starts_with("checked: 1438 training examples"),
        "{said}"
    );
    assert!(!home.path().exists(), "nothing is left");
}

#[test]
fn plan_of_data_that_is_not_there_says_what_to_set() {
    let sets = [
        "plan",
        "configs/quickstart.toml",
        "--set",
        "data.train=nowhere/train-*",
    ];
    check(&sets, 0); // the numbers are in the spec
    let mut text = std::fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/quickstart.toml"),
    )
    .unwrap();
    text = text
        .replace("train_examples = 1438\n", "")
        .replace("data/digits/train-*", "nowhere/train-*");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("spec.toml");
    std::fs::write(&path, text).unwrap();
    let (_, said) = check(&["plan", path.to_str().unwrap()], 3);
    assert!(
        said.starts_with("data.train: nowhere/train-*: no file matches\nhint: "),
        "{said}"
    );
}

#[test]
fn config_prints_a_spec_that_reads_back() {
    let (out, _) = check(
        &[
            "config",
            "configs/quickstart.toml",
            "--set",
            "train.batch_size=128",
            "--set",
            "train.bn_batch=32",
        ],
        0,
    );
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("spec.toml");
    std::fs::write(&path, &out).unwrap();
    assert_eq!(check(&["config", path.to_str().unwrap()], 0).0, out);
    assert!(out.contains("batch_size = 128"), "{out}");
}

#[test]
fn a_wrong_spec_exits_2_with_every_problem() {
    let home = Home::new();
    let (out, said) = home.check(
        &[
            "train.batchsize=3",
            "model.depth=51",
            "schedule.factor=high",
        ],
        2,
    );
    assert_eq!(out, "");
    for problem in [
        "--set train.batchsize=3: train.batchsize: unknown key",
        "hint: did you mean train.batch_size?",
        "model.depth",
        "schedule.factor",
    ] {
        assert!(said.contains(problem), "{problem} is missing in\n{said}");
    }
    assert!(!home.path().exists(), "nothing was touched");
}

/// ResNet-200 at 448 px needs about a gibibyte an image.
#[test]
fn a_batch_that_does_not_fit_is_told_which_would() {
    let home = Home::new();
    let dir = format!("run_dir={}", home.path().display());
    let sets = |bn_batch: &str| {
        let sets = [
            "data.source=fake",
            "model.resolution=448",
            "train.device=cpu",
            "track.mlflow=off",
            "train.batch_size=4096",
            "model.depth=200",
            bn_batch,
            &dir,
        ];
        sets.map(str::to_owned)
    };
    let sets = |command: &[&str], bn_batch: &str, code| {
        let sets = sets(bn_batch);
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let args: Vec<&str> = command.iter().copied().chain(sets).collect();
        check(&args, code)
    };
    let config = "configs/resnet50.toml";
    let (_, said) = sets(&[config], "train.bn_batch=4096", 4);
    assert!(
        said.contains("train.bn_batch = 4096: the engine and its input need ")
            && said.contains(" GiB are available"),
        "{said}"
    );
    assert!(!home.path().exists(), "nothing was started");
    let fits = said.split("hint: train.bn_batch = ").nth(1).expect(&said);
    let (fits, _) = fits.split_once(" would fit").expect(&said);
    let fits: usize = fits.parse().unwrap();
    assert!(fits >= 1 && 4096 % fits == 0, "{fits}");
}

#[test]
fn made_up_data_needs_no_files() {
    for source in ["fake", "zeros"] {
        let home = Home::new();
        let dir = format!("run_dir={}", home.path().display());
        let source = format!("data.source={source}");
        let sets = [
            &source,
            "model.depth=18",
            "track.mlflow=off",
            "model.resolution=32",
            "train.length=2 steps",
            "train.batch_size=8",
            "train.bn_batch=4",
            &dir,
        ];
        let mut args = vec!["configs/resnet50.toml"];
        sets.iter().for_each(|set| args.extend(["--set", set]));
        assert_eq!(json(&check(&args, 0).0)["step"], 2);
    }
}

#[test]
fn help_teaches() {
    let (out, _) = check(&["--help"], 0);
    for line in [
        "runner configs/quickstart.toml",
        "Exit codes:",
        "resumes it",
        "--set <KEY=VALUE>",
        "--fresh",
        "plan",
        "eval",
    ] {
        assert!(out.contains(line), "{line} is missing in\n{out}");
    }
}

#[test]
fn config_says_where_values_come_from() {
    let args = [
        "config",
        "configs/quickstart.toml",
        "--origins",
        "--set",
        "train.threads=1",
    ];
    let out = runner(&args)
        .env("RUNNER__SEED", "7")
        .output()
        .map(|output| text(&output.stdout))
        .unwrap();
    let origin = |key: &str| {
        let line = out.lines().find(|line| line.starts_with(key));
        line.and_then(|line| line.split_once("  # ")).unwrap().1
    };
    assert_eq!(origin("seed = 7 "), "environment variable RUNNER__SEED");
    assert_eq!(origin("threads = 1 "), "--set train.threads=1");
    assert_eq!(origin("max_bad_records = 0 "), "default");
    let depth = origin("depth = 18 ");
    assert!(depth.starts_with("configs/quickstart.toml:"), "{depth}");
}

#[test]
fn a_spec_is_layered() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("spec.toml");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let base = root.join("configs/resnet18.toml");
    let text = format!(
        "extends = {:?}\n[profile.small.train]\nbatch_size = 32\nbn_batch = 16\nlength = \"90 epochs\"\n",
        base.canonicalize().unwrap()
    );
    std::fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap();
    assert_eq!(plan(&[path])["steps"]["batch_size"], 1024);
    assert_eq!(
        plan(&[path, "--profile", "small"])["steps"]["batch_size"],
        32
    );
    let (_, said) = check(&[path, "--profile", "large"], 2);
    assert!(
        said.starts_with("--profile large: unknown profile\nhint: the profiles of "),
        "{said}"
    );
}

#[test]
fn config_prints_the_schema() {
    let (out, _) = check(&["config", "--schema"], 0);
    assert_eq!(json(&out)["additionalProperties"], false);
    let (_, said) = check(&["config"], 2);
    assert!(said.contains("<CONFIG>"), "{said}");
}

#[test]
fn doctor_knows_the_machine() {
    let report = json(&check(&["doctor", "--json"], 0).0);
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    assert!(report["cores"].as_u64().unwrap() >= 1);
    let level = report["level"].as_str().unwrap();
    assert!(
        ["portable", "avx2", "avx512", "avx512_bf16", "amx"].contains(&level),
        "{level}"
    );
    let (text, _) = check(&["doctor"], 0);
    assert!(
        text.contains(&format!("\nengine       cpu at level {level}\n")),
        "{text}"
    );
    for name in [
        "runner", "system", "cpu", "vector", "engine", "memory", "gpu", "git", "mlflow",
    ] {
        assert!(
            text.lines().any(|line| line.starts_with(name)),
            "{name} is missing in\n{text}"
        );
    }
}

/// The spec in a checkpoint lies below the environment, as a file does.
#[test]
fn eval_knows_the_environment() {
    let home = Home::new();
    let small = [
        "data.source=fake",
        "data.eval_examples=8",
        "train.length=1 step",
        "train.batch_size=8",
        "train.bn_batch=4",
    ];
    home.check(&small, 0);
    let path = home.path();
    let eval = |environment: &[(&str, &str)], more: &[&str]| {
        let args = [&["eval", path.to_str().unwrap(), "--json"], more].concat();
        runner(&args)
            .envs(environment.iter().copied())
            .output()
            .unwrap()
    };
    let images = |output: Output| json(&text(&output.stdout))["images"].clone();
    let environment = [("RUNNER__DATA__EVAL_EXAMPLES", "6")];
    assert_eq!(images(eval(&[], &[])), 8);
    assert_eq!(images(eval(&environment, &[])), 6);
    let set = ["--set", "data.eval_examples=5"];
    assert_eq!(images(eval(&environment, &set)), 5);

    let said = |environment: &[(&str, &str)], more: &[&str]| {
        let output = eval(environment, more);
        assert_eq!(output.status.code(), Some(2));
        text(&output.stderr)
    };
    assert_eq!(
        said(&[("RUNNER__DATA__EVAL_EXAMPLE", "6")], &[]),
        "environment variable RUNNER__DATA__EVAL_EXAMPLE: data.eval_example: unknown key\n\
         hint: did you mean data.eval_examples?\n"
    );
    let other = said(&[("RUNNER__MODEL__DEPTH", "34")], &[]);
    assert!(
        other.contains("model.depth is 18 there and 34 here"),
        "{other}"
    );
    // A resolved spec has no profiles, and the help says so.
    let refused = said(&[], &["--profile", "small"]);
    assert!(refused.contains("'--profile'"), "{refused}");
    let (help, _) = check(&["eval", "--help"], 0);
    assert!(help.contains("That spec is resolved"), "{help}");
}

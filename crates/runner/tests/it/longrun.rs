//! What long runs meet: signals, full disks, damaged files, evaluation beside training.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::{Home, check, json, runner, text};

/// Short steps, a checkpoint after every second one.
const SETS: [&str; 8] = [
    "data.train=data/digits/train-00000-*",
    "data.train_examples=359",
    "train.batch_size=16",
    "train.bn_batch=16",
    "schedule.warmup=1 steps",
    "eval.every=100 steps",
    "checkpoint.every=2 steps",
    "checkpoint.keep=2",
];

fn sets<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&SETS[..], more].concat()
}

fn start(home: &Home, sets: &[&str]) -> Child {
    let args = home.args(sets);
    let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
    runner(&args)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn log(dir: &Path) -> String {
    fs::read_to_string(dir.join("log.txt")).unwrap_or_default()
}

/// Waits until the log says something; what it says then.
fn wait_for(child: &mut Child, dir: &Path, what: &str) -> bool {
    loop {
        if log(dir).contains(what) {
            return true;
        }
        if child.try_wait().unwrap().is_some() {
            return log(dir).contains(what);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn assert_same(a: &Path, b: &Path) {
    let found = train::compare(a, b).unwrap();
    assert_eq!(found.differences, Vec::<String>::new());
    assert!(found.tensors > 160, "{found:?}");
}

#[test]
fn a_second_signal_ends_the_process_at_once() {
    let home = Home::new();
    // A step of 8192 images takes far longer than two signals.
    let sets = ["train.batch_size=8192", "train.bn_batch=32"];
    let mut child = start(&home, &sets);
    assert!(wait_for(&mut child, &home.path(), " steps of 8192 images"));
    std::thread::sleep(Duration::from_millis(200));
    for _ in 0..2 {
        let pid = child.id().to_string();
        let sent = Command::new("kill").args(["-s", "TERM", &pid]).status();
        assert!(sent.unwrap().success());
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143), "{}", text(&output.stderr));
    assert!(
        !home.path().join("checkpoints").exists(),
        "nothing was done yet"
    );
}

#[test]
fn a_damaged_checkpoint_is_put_aside_and_the_one_before_goes_on() {
    let (straight, home) = (Home::new(), Home::new());
    straight.check(&sets(&["train.length=6 steps"]), 0);
    home.check(&sets(&["train.length=4 steps"]), 0);
    let checkpoints = home.path().join("checkpoints");
    let latest = checkpoints.join("step-0000000004.safetensors");
    let mut bytes = fs::read(&latest).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 0x10;
    fs::write(&latest, bytes).unwrap();
    let (_, said) = check(&["eval", home.path().to_str().unwrap()], 4);
    assert!(
        said.contains("not a whole checkpoint: the values of tensor ") && said.contains("\nhint: "),
        "{said}"
    );
    let (_, said) = home.check(&sets(&["train.length=6 steps"]), 0);
    let expected = format!("{}: not a whole checkpoint: ", latest.display());
    assert!(said.contains(&expected), "{said}");
    assert!(
        said.contains("and the run goes on from step 2, the checkpoint before"),
        "{said}"
    );
    assert!(
        checkpoints
            .join("step-0000000004.safetensors.damaged")
            .exists()
    );
    assert_same(&home.path(), &straight.path());
}

/// A file system in memory; none where this process may not mount one.
struct Mount<'a>(&'a Path);

impl<'a> Mount<'a> {
    fn new(at: &'a Path, options: &str) -> Option<Self> {
        let args = ["-t", "tmpfs", "-o", options, "tmpfs"];
        let mounted = Command::new("mount").args(args).arg(at).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(at)),
            _ => {
                eprintln!("skipped: a file system in memory cannot be mounted here");
                None
            }
        }
    }

    fn enlarge(&self, size: &str) {
        let options = format!("remount,size={size}");
        let status = Command::new("mount")
            .args(["-o", &options])
            .arg(self.0)
            .status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

/// There is room for one checkpoint of 86 MiB; then for all.
#[test]
fn a_full_disk_stops_no_run() {
    let (straight, home) = (Home::new(), Home::new());
    let Some(mount) = Mount::new(home.dir.path(), "size=120m") else {
        return;
    };
    let length = sets(&["train.length=40 steps", "checkpoint.every=8 steps"]);
    straight.check(&length, 0);
    let mut child = start(&home, &length);
    let is_full = wait_for(
        &mut child,
        &home.path(),
        "training goes on, and the checkpoint is tried again",
    );
    assert!(is_full, "{}", log(&home.path()));
    let said = log(&home.path());
    assert!(said.contains("No space left on device"), "{said}");
    mount.enlarge("500m");
    let output = child.wait_with_output().unwrap();
    // A machine that was slow to make room has lost what came after the last checkpoint, and no more.
    if output.status.code() == Some(0) {
        let said = log(&home.path());
        assert!(
            said.contains("checkpoints can be written again; "),
            "{said}"
        );
    } else {
        home.check(&length, 0);
    }
    // While nothing can be written, metrics are lost and counted; what is computed is not.
    let found = train::compare(&home.path(), &straight.path()).unwrap();
    let computed: Vec<_> = found
        .differences
        .iter()
        .filter(|d| !d.starts_with("metrics"))
        .collect();
    assert!(computed.is_empty() && found.tensors > 160, "{found:?}");
}

#[test]
fn a_directory_that_cannot_be_written_is_refused_at_once() {
    let home = Home::new();
    let Some(_mount) = Mount::new(home.dir.path(), "size=1m,ro") else {
        return;
    };
    let (_, said) = home.check(&SETS, 4);
    let expected = format!("{}: cannot create: ", home.path().display());
    assert!(
        said.starts_with(&expected) && said.contains("Read-only file system"),
        "{said}"
    );
}

/// Stands between a program and the clock on the wall, which is set by a day forwards or back at every eighth reading.
const JUMPS: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>

int clock_gettime(clockid_t which, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    static unsigned readings;
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int answer = real(which, at);
    if (answer == 0 && which == CLOCK_REALTIME) {
        unsigned seen = __sync_fetch_and_add(&readings, 1);
        at->tv_sec += seen / 8 % 2 ? 86400 : -86400;
    }
    return answer;
}
"#;

/// Nothing that is computed, counted or resumed depends on the time of day.
#[test]
fn a_clock_that_jumps_changes_nothing() {
    let (straight, home) = (Home::new(), Home::new());
    let (code, library) = (
        home.dir.path().join("jumps.c"),
        home.dir.path().join("jumps.so"),
    );
    fs::write(&code, JUMPS).unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(&code)
        .arg("-ldl");
    if !cc.status().is_ok_and(|status| status.success()) {
        eprintln!("skipped: there is no C compiler for a clock that jumps");
        return;
    }
    let jumping = |mut command: Command| {
        command.env("LD_PRELOAD", &library);
        command
    };
    let mut date = Command::new("date");
    date.arg("+%s");
    let told = jumping(date).output().unwrap().stdout;
    let told: u64 = text(&told).trim().parse().unwrap();
    let now = std::time::SystemTime::now();
    let now = now.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!((now - told).abs_diff(86_400) < 60, "{told} {now}");

    let length = sets(&["train.length=12 steps"]);
    straight.check(&length, 0);
    let args = home.args(&length);
    let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
    let begin = || {
        let mut command = jumping(runner(&args));
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let mut child = begin();
    let checkpoint = home.path().join("checkpoints/step-0000000004.safetensors");
    while !checkpoint.exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let output = begin().wait_with_output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(!said.contains("failed"), "{said}");
    assert_same(&home.path(), &straight.path());
}

#[test]
fn a_run_that_diverges_goes_back_names_the_images_and_gives_up() {
    let home = Home::new();
    // The loss of ten classes begins near 2.3: nothing is below this limit.
    let (_, said) = home.check(
        &sets(&[
            "train.length=4 steps",
            "train.max_loss=0.001",
            "train.max_rewinds=2",
        ]),
        4,
    );
    assert!(
        said.contains("above train.max_loss = 0.001, after step 1; it saw\n"),
        "{said}"
    );
    assert!(
        said.contains("data/digits/train-00000-of-00004: records "),
        "{said}"
    );
    for n in 1..=2 {
        let back = format!("back to step 0, and on without these images (rewind {n} of at most 2)");
        assert!(said.contains(&back), "{said}");
    }
    assert!(
        said.contains("after step 1; the run had gone back to a checkpoint 2 times before\nhint: "),
        "{said}"
    );
}

#[test]
fn eval_waits_for_checkpoints_and_scores_each_once() {
    let home = Home::new();
    let args = sets(&["train.length=6 steps", "checkpoint.keep=9", "mode=train"]);
    home.check(
        &sets(&["train.length=4 steps", "checkpoint.keep=9", "mode=train"]),
        0,
    );
    let dir = home.path();
    let evaluate = |length| sets(&["mode=eval", "eval.wait=600", length]);
    let lines = || fs::read_to_string(dir.join("evaluations.jsonl")).unwrap_or_default();
    // What is there is scored, and a finished run is not waited for.
    for _ in 0..2 {
        home.check(&evaluate("train.length=4 steps"), 0);
    }
    let steps = |text: &str| -> Vec<u64> {
        text.lines()
            .map(|line| json(line)["step"].as_u64().unwrap())
            .collect()
    };
    let first = lines();
    assert_eq!(steps(&first), [2, 4]);
    // A longer run writes another one meanwhile.
    let mut waiting = start(&home, &evaluate("train.length=6 steps"));
    home.check(&args, 0);
    assert_eq!(waiting.wait().unwrap().code(), Some(0));
    let second = lines();
    assert!(second.starts_with(&first), "no checkpoint is scored twice");
    assert_eq!(steps(&second), [2, 4, 6]);
    let table = fs::read_to_string(dir.join("evaluations.tsv")).unwrap();
    let rows: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split('\t').collect())
        .collect();
    assert_eq!(rows[0], ["epoch", "hours", "top1Accuracy", "top5Accuracy"]);
    assert_eq!(rows.len(), 4);
    assert_eq!(rows[3][0], format!("{:.2}", 6.0 * 16.0 / 359.0));
    let (scored, _) = check(
        &[
            "eval",
            "--json",
            "--set",
            "data.eval=data/digits/validation-*",
            dir.to_str().unwrap(),
        ],
        0,
    );
    assert_eq!(
        json(second.lines().last().unwrap())["top1"],
        json(&scored)["top1"]
    );
    // A run that is not at its end is waited for, but not for ever.
    let mut last: Vec<&str> = second.lines().collect();
    last.pop();
    fs::write(dir.join("evaluations.jsonl"), last.join("\n") + "\n").unwrap();
    fs::remove_file(dir.join("checkpoints/step-0000000006.safetensors")).unwrap();
    let (_, said) = home.check(
        &sets(&["mode=eval", "eval.wait=0", "train.length=6 steps"]),
        75,
    );
    assert!(said.contains("no new checkpoint for 0 s"), "{said}");
}

#[test]
fn a_checkpoint_sees_scores_leaves_and_comes_back() {
    let home = Home::new();
    // Of the parameters' average, which is another network than theirs.
    let args = [
        "train.length=30 steps",
        "eval.every=30 steps",
        "ema.half_life=5 steps",
        "ema.eval=average",
    ];
    let (out, _) = home.check(&args, 0);
    let summary = json(&out);
    let dir = home.path();
    let run = dir.to_str().unwrap();
    let raw = check(&["eval", run, "--json", "--set", "ema.eval=raw"], 0).0;
    assert_ne!(json(&raw)["loss"], summary["eval"]["loss"]);
    let top1 = summary["eval"]["top1"].as_f64().unwrap();
    let results = fs::read_to_string(dir.join("results.tsv")).unwrap();
    let row: Vec<&str> = results.lines().nth(1).unwrap().split('\t').collect();
    assert_eq!(row[2], format!("{:.2}", 100.0 * top1));

    // The shards' images, one line each, hit as often as the evaluation said.
    let (out, _) = check(
        &[
            "predict",
            run,
            "data/digits/validation-*",
            "--json",
            "--top",
            "2",
            "--batch",
            "100",
        ],
        0,
    );
    let lines: Vec<_> = out.lines().map(json).collect();
    assert_eq!(lines.len(), 359);
    let hits = lines
        .iter()
        .filter(|l| l["top"][0]["class"] == l["true_class"])
        .count();
    assert_eq!(hits as f64 / 359.0, top1);
    assert_eq!(lines[0]["top"].as_array().unwrap().len(), 2);
    assert!(lines[0]["top"][0]["label"].is_string(), "{}", lines[0]);

    // An image of a shard as a file of its own is the same image; what is none is said, and the others are seen.
    let shard = &store::glob("../../data/digits/validation-*").unwrap()[0];
    let record = store::tfrecord::Reader::open(shard)
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let (jpeg, none) = (home.dir.path().join("a.jpg"), home.dir.path().join("b.jpg"));
    fs::write(&jpeg, data::parse(&record.bytes).unwrap().0).unwrap();
    fs::write(&none, "no image").unwrap();
    let glob = home.dir.path().join("?.jpg");
    let (out, said) = check(
        &[
            "predict",
            run,
            glob.to_str().unwrap(),
            "--json",
            "--top",
            "2",
        ],
        3,
    );
    let files: Vec<_> = out.lines().map(json).collect();
    assert_eq!(files[0]["top"][0]["class"], lines[0]["top"][0]["class"]);
    let (a, b) = (
        &files[0]["top"][0]["probability"],
        &lines[0]["top"][0]["probability"],
    );
    assert!(
        (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-5,
        "{a} {b}"
    );
    assert!(
        files[1]["error"].is_string() && said.contains("1 of the images cannot be read\nhint: "),
        "{out}{said}"
    );
    let (out, _) = check(&["predict", run, jpeg.to_str().unwrap()], 0);
    assert!(out.starts_with(&format!("{}  ", jpeg.display())), "{out}");

    // By class, and in sum the same.
    let details = home.dir.path().join("details");
    let (out, _) = check(
        &[
            "eval",
            run,
            "--json",
            "--details",
            details.to_str().unwrap(),
        ],
        0,
    );
    assert_eq!(json(&out)["top1"], top1);
    let loss = json(&out)["loss"].as_f64().unwrap();
    assert!((loss - summary["eval"]["loss"].as_f64().unwrap()).abs() < 1e-5);
    let classes = fs::read_to_string(details.join("classes.csv")).unwrap();
    assert_eq!(classes.lines().count(), 11, "{classes}");
    let confusion = json(&fs::read_to_string(details.join("confusion.json")).unwrap());
    let diagonal: u64 = (0..10)
        .map(|i| confusion["confusion"][i][i].as_u64().unwrap())
        .sum();
    assert_eq!(diagonal as usize, hits);

    // Out as a state dict, in again, and to another number of classes.
    let (dict, back) = (
        home.dir.path().join("dict.safetensors"),
        home.dir.path().join("back.safetensors"),
    );
    let (dict, back) = (dict.to_str().unwrap(), back.to_str().unwrap());
    check(&["export", run, "--out", dict], 0);
    check(
        &["import", dict, "configs/quickstart.toml", "--out", back],
        0,
    );
    let (out, _) = check(&["eval", back, "--json"], 0);
    for key in ["top1", "top5", "loss"] {
        assert_eq!(json(&out)[key], summary["eval"][key], "{key}");
    }
    let (_, said) = check(
        &[
            "import",
            dict,
            "configs/quickstart.toml",
            "--out",
            back,
            "--set",
            "model.depth=34",
        ],
        2,
    );
    assert!(
        said.contains("tensor layer1.2.bn1.bias is missing\nhint: "),
        "{said}"
    );
    let weights = format!("model.weights={dict}");
    let transfer = Home::new();
    let (_, said) = transfer.check(
        &[
            &weights,
            "model.classes=12",
            "model.labels=/dev/null",
            "train.length=1 steps",
        ],
        2,
    );
    assert!(said.contains("0 labels, but model.classes is 12"), "{said}");
    let spec = fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/quickstart.toml"),
    )
    .unwrap();
    let config = home.dir.path().join("transfer.toml");
    fs::write(
        &config,
        spec.replace(
            "labels = \"data/digits/labels.txt\"\n",
            &format!("weights = {dict:?}\n"),
        ),
    )
    .unwrap();
    let into = format!("run_dir={}", transfer.path().display());
    let args = [
        config.to_str().unwrap(),
        "--set",
        &into,
        "--set",
        "model.classes=12",
        "--set",
        "train.length=1 steps",
        "--set",
        "track.mlflow=off",
    ];
    let (_, said) = check(&args, 0);
    assert!(
        said.contains("its classifier has 10 classes; the one of 12 starts anew"),
        "{said}"
    );
}

//! Shards in buckets: the same bytes as from files, whatever the network does.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;

use insta::assert_snapshot;
use serde_json::Value;

use crate::fake_bucket::Fake;
use crate::{Home, json, runner, text};

/// Two epochs of 719 digits, an evaluation after each.
const SETS: [&str; 5] = [
    "train.batch_size=64",
    "train.bn_batch=64",
    "train.length=2 epochs",
    "schedule.warmup=2 steps",
    "checkpoint.every=1 epoch",
];

pub(crate) fn digits() -> Vec<(String, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/digits");
    let mut shards = vec![];
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        if name.contains("-of-") {
            shards.push((name, fs::read(path).unwrap()));
        }
    }
    shards.sort();
    shards
}

fn with_digits() -> Fake {
    let fake = Fake::start();
    for (name, bytes) in digits() {
        fake.put(&format!("bkt/digits/{name}"), bytes);
    }
    fake.put("bkt/digits/labels.txt", b"not a shard".to_vec());
    fake.put("bkt/digits/deeper/train-9", b"not this one".to_vec());
    fake
}

/// Trains the digits with these settings and this environment.
pub(crate) fn train(home: &Home, sets: &[&str], environment: &[(&str, String)]) -> String {
    let args = home.args(&[&SETS[..], sets].concat());
    let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
    let mut command = runner(&args);
    command.envs(environment.iter().map(|(k, v)| (*k, v)));
    run(&mut command, 0)
}

/// What it says on stdout, then on stderr.
fn run(command: &mut Command, code: i32) -> String {
    let output = command.output().unwrap();
    let (out, said) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{out}{said}");
    out + &said
}

pub(crate) fn assert_equal(ours: &Home, straight: &Home) {
    let found = train::compare(&ours.path(), &straight.path()).unwrap();
    assert_eq!(found.differences, Vec::<String>::new());
    assert!(found.tensors > 160, "{found:?}");
}

const LOCAL: [&str; 2] = [
    "data.train=data/digits/train-0000[01]-*",
    "data.train_examples=719",
];

#[test]
fn two_epochs_over_connections_that_break_end_with_the_bits_of_local_files() {
    let straight = Home::new();
    train(&straight, &LOCAL, &[]);

    let fake = with_digits();
    fake.state.cut_every.store(2, Ordering::SeqCst);
    let cache = tempfile::tempdir().unwrap();
    let cache = format!("data.cache={}", cache.path().display());
    let sets = [
        "data.train=gs://bkt/digits/train-0000[01]-*",
        "data.train_examples=719",
        "data.eval=s3://bkt/digits/validation-*",
        &cache,
    ];
    let ours = Home::new();
    train(&ours, &sets, &fake.environment());
    assert_equal(&ours, &straight);
    let (bodies, cuts) = (&fake.state.bodies, &fake.state.cuts);
    // Two shards each; what was cut off was asked for again, the rest of it only once.
    assert!(cuts.load(Ordering::SeqCst) >= 2, "{cuts:?}");
    assert!(
        bodies.load(Ordering::SeqCst) <= 4 + cuts.load(Ordering::SeqCst) + 2,
        "{bodies:?} {cuts:?}"
    );

    // The cache knows everything: only listings are asked for.
    bodies.store(0, Ordering::SeqCst);
    let again = Home::new();
    train(&again, &sets, &fake.environment());
    assert_equal(&again, &straight);
    assert_eq!(bodies.load(Ordering::SeqCst), 0);
}

fn audit(pattern: &str, fake: Option<&Fake>) -> Value {
    let mut command = runner(&["data", "check", pattern, "--json"]);
    if let Some(fake) = fake {
        command.envs(fake.environment());
    }
    json(text(&command.output().unwrap().stdout).as_str())
}

#[test]
fn an_audit_of_a_bucket_is_that_of_its_files() {
    let fake = with_digits();
    fake.state.cut_every.store(3, Ordering::SeqCst);
    let local = audit("data/digits/*-of-*", None);
    assert_eq!(local["records"], 1797);
    for pattern in ["s3://bkt/digits/*-of-*", "gs://bkt/d*s/*-of-*"] {
        assert_eq!(audit(pattern, Some(&fake)), local, "{pattern}");
    }
}

#[test]
fn shards_are_written_to_a_bucket() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start();
    // One of them is larger than what goes over in one request.
    let make = |out: &str| {
        let args = [
            "data",
            "fake",
            out,
            "--examples=110",
            "--shards=1",
            "--classes=5",
        ];
        run(runner(&args).envs(fake.environment()), 0);
    };
    make(dir.path().to_str().unwrap());
    make("s3://bkt/made");
    let local = fs::read(dir.path().join("train-00000-of-00001")).unwrap();
    assert!(local.len() > 8 << 20, "{}", local.len());
    assert!(fake.get("bkt/made/train-00000-of-00001") == local);

    for (class, index) in [("a", 0), ("b", 1), ("b", 2)] {
        let folder = dir.path().join("images").join(class);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("{index}.jpg")), data::photo(0, index)).unwrap();
    }
    let from = dir.path().join("images");
    let convert = |out: &str| {
        let mut command = runner(&["data", "convert", "--shards=2", "--out", out, "--from"]);
        run(command.arg(&from).envs(fake.environment()), 0)
    };
    let local = dir.path().join("out");
    convert(local.to_str().unwrap());
    let first = convert("gs://bkt/out");
    assert!(
        first.contains("data.train = \"gs://bkt/out/train-*-of-*\""),
        "{first}"
    );
    let mut objects = 0;
    for name in fake.names() {
        if let Some(name) = name.strip_prefix("bkt/out/") {
            let file = fs::read(local.join(name)).unwrap();
            assert!(fake.get(&format!("bkt/out/{name}")) == file, "{name}");
            objects += 1;
        }
    }
    assert_eq!(
        objects, 4,
        "two shards, the labels, what they were made from"
    );
    // One shard is lost: only that one is made again.
    let lost = "bkt/out/train-00001-of-00002";
    let bytes = fake.state.objects.lock().unwrap().remove(lost).unwrap().0;
    assert!(convert("gs://bkt/out").contains("1 of them from before"));
    assert!(fake.get(lost) == bytes);
}

const HINT: &str = "hint: check the network, the names of the bucket and the object, and the credentials (docs/BUCKETS.md)";

/// Without what differs from run to run.
fn said(fake: &Fake, args: &[&str], code: i32) -> String {
    let said = run(runner(args).envs(fake.environment()), code);
    let url = &fake.environment()[1].1;
    let said = said.replace(url, "http://STORE");
    let mut lines: Vec<&str> = said.lines().collect();
    // The library counts tries and milliseconds.
    for line in &mut lines {
        if let Some(at) = line.find(" in ").filter(|_| line.contains("after")) {
            *line = &line[..at];
        }
    }
    lines.join("\n")
}

#[test]
fn what_a_bucket_does_not_hold() {
    let fake = with_digits();
    let check = |pattern| said(&fake, &["data", "check", pattern], 3);
    assert_snapshot!(check("gs://bkt/digits/none-*"));
}

#[test]
fn a_store_that_refuses() {
    let fake = with_digits();
    fake.state.refusal.store(403, Ordering::SeqCst);
    let said = said(&fake, &["data", "check", "s3://bkt/digits/train-*"], 4);
    assert!(
        said.starts_with("s3://bkt/digits/train-*: cannot list the objects: "),
        "{said}"
    );
    assert!(said.ends_with(HINT), "{said}");
}

#[test]
fn a_bucket_that_is_not_there() {
    let fake = with_digits();
    let said = said(&fake, &["data", "check", "gs://other/train-*"], 4);
    assert!(
        said.starts_with("gs://other/train-*: cannot list the objects: "),
        "{said}"
    );
    assert!(said.ends_with(HINT), "{said}");
}

#[test]
fn an_object_that_is_replaced_while_it_is_read() {
    let fake = with_digits();
    fake.state.is_stale.store(true, Ordering::SeqCst);
    let said = said(&fake, &["data", "check", "gs://bkt/digits/train-*"], 4);
    assert!(
        said.starts_with("gs://bkt/digits/train-00000-of-00004: cannot read: "),
        "{said}"
    );
    assert!(
        said.contains("hint: the object was replaced since it was listed"),
        "{said}"
    );
}

/// Six steps of 32 digits with a checkpoint after every second one.
const MIRRORED: [&str; 8] = [
    "train.batch_size=32",
    "train.bn_batch=32",
    "train.length=6 steps",
    "schedule.warmup=2 steps",
    "schedule.milestones=[\"5 steps\"]",
    "eval.every=3 steps",
    "checkpoint.every=2 steps",
    "checkpoint.keep=1",
];

/// Runs on a machine with that home, with these arguments too.
fn mirrored(home: &Home, fake: &Fake, more: &[&str], code: i32) -> String {
    let args = home.args(&[&MIRRORED[..], &["checkpoint.mirror=gs://bkt/runs/a"]].concat());
    let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
    let args = [&args[..], more].concat();
    run(runner(&args).envs(fake.environment()), code)
}

/// A machine that does not come back costs the steps since the last checkpoint, and no bit.
#[test]
fn a_run_goes_on_from_its_mirror_on_another_machine() {
    let straight = Home::new();
    straight.check(&MIRRORED, 0);

    let fake = Fake::start();
    fake.put("bkt/else", vec![]); // or there would be no bucket
    let first = Home::new();
    // Where there is an evaluation anyway.
    mirrored(&first, &fake, &["--until", "3 steps"], 75);
    let names = |fake: &Fake| {
        let names = fake.names().into_iter();
        let of = names.filter_map(|name| name.strip_prefix("bkt/runs/a/").map(str::to_owned));
        of.filter(|name| !name.ends_with("tsv")).collect::<Vec<_>>()
    };
    let at = |step: u64| format!("checkpoints/step-{step:010}.safetensors");
    let files = ["log.txt", "metrics.jsonl", "spec.toml"].map(str::to_owned);
    let pointers = ["checkpoints/best", "checkpoints/latest"].map(str::to_owned);
    let expected = [&pointers[..], &[at(3)], &files].concat();
    assert_eq!(names(&fake), expected);
    drop(first);

    let second = Home::new();
    let said = mirrored(&second, &fake, &[], 0);
    let from = "the checkpoint of step 3 comes from gs://bkt/runs/a";
    assert!(said.contains(from), "{said}");
    assert_equal(&second, &straight);
    let metrics = |home: &Home| {
        let text = fs::read_to_string(home.path().join("metrics.jsonl")).unwrap();
        text.lines()
            .map(|line| json(line)["step"].clone())
            .collect::<Vec<Value>>()
    };
    assert_eq!(metrics(&second), metrics(&straight));
    let there = names(&fake);
    assert!(
        there.contains(&at(6)) && !there.contains(&at(4)),
        "{there:?}"
    );

    // It is another run's place now.
    let said = mirrored(&second, &fake, &["--fresh"], 2);
    let holds = "gs://bkt/runs/a holds a run that has come to step 6";
    assert!(said.contains(holds), "{said}");
}

/// A store that refuses is told, and training goes on; in the end the run says that its copy is not whole.
#[test]
fn a_mirror_that_refuses_stops_no_run() {
    let fake = Fake::start();
    fake.put("bkt/else", vec![]);
    let home = Home::new();
    mirrored(&home, &fake, &["--until", "2 steps"], 75);
    let refused = {
        let args = home.args(&[&MIRRORED[..], &["checkpoint.mirror=gs://bkt/runs/a"]].concat());
        let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
        let mut command = runner(&args);
        command.envs(fake.environment());
        let child = command
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // It has asked at the start, and refuses from the first checkpoint on.
        let log = home.path().join("log.txt");
        while !fs::read_to_string(&log)
            .unwrap()
            .contains("resuming at step 2")
        {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        fake.state.refusal.store(403, Ordering::SeqCst);
        child.wait_with_output().unwrap()
    };
    let said = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(4), "{said}");
    assert!(said.contains("gs://bkt/runs/a/"), "{said}");
    let latest = fs::read_to_string(home.path().join("checkpoints/latest")).unwrap();
    assert_eq!(latest, "step-0000000006.safetensors\n", "{said}");
}

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

//! The same numbers in every place, each once, whatever happened to the process.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use track::{Config, Resume, Terminal, Trackers};

use crate::mlflow::Home;
use crate::{eval, step, summary};

/// Steps by metric, in the order of the file.
pub(crate) type Points = BTreeMap<String, Vec<u64>>;

fn add(points: &mut Points, name: &str, step: u64) {
    points.entry(name.into()).or_default().push(step);
}

fn in_metrics(dir: &Path) -> Points {
    let mut points = Points::new();
    for line in crate::metrics(dir).lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let named = line.as_object().unwrap().keys();
        for name in named.filter(|name| name.contains('/')) {
            add(&mut points, name, line["step"].as_u64().unwrap());
        }
    }
    points
}

fn in_mlflow(home: &Home) -> Points {
    let db = home.db();
    let mut query = db
        .prepare("SELECT key, step FROM metrics ORDER BY step")
        .unwrap();
    let mut rows = query.query([]).unwrap();
    let mut points = Points::new();
    while let Some(row) = rows.next().unwrap() {
        let (name, step): (String, i64) = (row.get(0).unwrap(), row.get(1).unwrap());
        add(&mut points, &name, step as u64);
    }
    points
}

fn take<'a>(bytes: &mut &'a [u8], length: u64) -> &'a [u8] {
    let (taken, rest) = bytes.split_at(length as usize);
    *bytes = rest;
    taken
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let byte = take(bytes, 1)[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    value
}

/// The numbers in event files, which hold events of a time, a step and values that begin with a tag.
fn in_events(dir: &Path) -> Points {
    let mut points = Points::new();
    for path in event_files(dir) {
        let bytes = fs::read(path).unwrap();
        let mut rest = &bytes[..];
        let mut is_first = true;
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let event = &rest[12..12 + length];
            rest = &rest[16 + length..];
            if is_first {
                assert!(event.ends_with(b"\x1a\x0dbrain.Event:2"));
                is_first = false;
                continue;
            }
            let mut event = &event[9..]; // behind the time
            assert_eq!(take(&mut event, 1), [0x10]);
            let step = varint(&mut event);
            assert_eq!(take(&mut event, 1), [0x2a]);
            let length = varint(&mut event);
            let mut values = take(&mut event, length);
            while !values.is_empty() {
                assert_eq!(take(&mut values, 1), [0x0a]);
                let length = varint(&mut values);
                let mut value = take(&mut values, length);
                assert_eq!(take(&mut value, 1), [0x0a]);
                let length = varint(&mut value);
                let tag = str::from_utf8(take(&mut value, length)).unwrap();
                // A number; texts and the like are TensorBoard's own affair, see `clients`.
                if value[0] == 0x15 {
                    add(&mut points, tag, step);
                }
            }
        }
    }
    points
}

fn event_files(dir: &Path) -> Vec<std::path::PathBuf> {
    let files = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = files
        .filter(|path| path.to_string_lossy().contains("tfevents"))
        .collect();
    files.sort();
    files
}

/// Every place has these steps of training and of evaluations.
fn check(home: &Home, train: &[u64], evals: &[u64]) {
    let names = |room: &str, names: &[&str], steps: &[u64]| {
        let names = names.iter().map(|name| format!("{room}/{name}"));
        names.map(|name| (name, steps.to_vec())).collect::<Points>()
    };
    let names_of_steps = ["loss", "top1", "lr", "images_per_s", "input_wait_fraction"];
    let mut expected = names("train", &names_of_steps, train);
    expected.extend(names("eval", &["loss", "top1", "top5", "images"], evals));
    expected.retain(|_, steps| !steps.is_empty());
    assert_eq!(in_metrics(&home.run()), expected);
    assert_eq!(in_events(&home.run()), expected);
    assert_eq!(in_mlflow(home), expected);
}

fn steps(trackers: &mut Trackers, numbers: std::ops::RangeInclusive<u64>) {
    for number in numbers {
        trackers.step(&step(number));
    }
}

fn sync(trackers: &mut Trackers, step: u64) -> Resume {
    Resume {
        step,
        is_evaluated: false,
        metrics_bytes: trackers.sync(),
    }
}

/// Nothing of the first process is written after this; its thread idles until the test ends.
fn kill(mut trackers: Trackers) {
    trackers.sync();
    std::mem::forget(trackers);
}

#[test]
fn a_kill_doubles_and_loses_no_point() {
    let home = Home::new();
    let mut trackers = home.open(None);
    steps(&mut trackers, 1..=5);
    trackers.eval(&eval(5));
    steps(&mut trackers, 6..=10);
    let resume = sync(&mut trackers, 10);
    trackers.eval(&eval(10));
    steps(&mut trackers, 11..=14);
    kill(trackers);
    check(&home, &(1..=14).collect::<Vec<_>>(), &[5, 10]);

    // Twice from the same checkpoint, the second time to a later one.
    let mut trackers = home.open(Some(resume));
    trackers.eval(&eval(10));
    steps(&mut trackers, 11..=12);
    kill(trackers);
    check(&home, &(1..=12).collect::<Vec<_>>(), &[5, 10]);

    let mut trackers = home.open(Some(resume));
    trackers.sync();
    check(&home, &(1..=10).collect::<Vec<_>>(), &[5]);
    trackers.eval(&eval(10));
    steps(&mut trackers, 11..=15);
    let resume = sync(&mut trackers, 15);
    steps(&mut trackers, 16..=17);
    kill(trackers);

    let mut trackers = home.open(Some(resume));
    trackers.sync();
    check(&home, &(1..=15).collect::<Vec<_>>(), &[5, 10]);
    steps(&mut trackers, 16..=20);
    trackers.eval(&eval(20));
    trackers.finish(&summary());
    check(&home, &(1..=20).collect::<Vec<_>>(), &[5, 10, 20]);
    assert_eq!(trackers.failures(), 0);
}

/// As after a failure of the input: what was done is saved when the evaluation is behind it.
#[test]
fn a_checkpoint_after_its_evaluation_keeps_it() {
    let home = Home::new();
    let mut trackers = home.open(None);
    steps(&mut trackers, 1..=5);
    sync(&mut trackers, 5);
    trackers.eval(&eval(5));
    let resume = Resume {
        is_evaluated: true,
        ..sync(&mut trackers, 5)
    };
    steps(&mut trackers, 6..=7);
    kill(trackers);
    let mut trackers = home.open(Some(resume));
    steps(&mut trackers, 6..=6);
    trackers.finish(&summary());
    check(&home, &[1, 2, 3, 4, 5, 6], &[5]);
}

#[test]
fn a_run_that_begins_anew_has_no_old_points() {
    let home = Home::new();
    let mut trackers = home.open(None);
    steps(&mut trackers, 1..=3);
    kill(trackers);
    let mut trackers = home.open(None);
    steps(&mut trackers, 1..=2);
    trackers.finish(&summary());
    check(&home, &[1, 2], &[]);
    assert_eq!(event_files(&home.run()).len(), 1);
}

#[test]
fn event_files_are_cut_also_when_there_are_no_new_ones() {
    let home = Home::new();
    let mut trackers = home.open(None);
    steps(&mut trackers, 1..=2);
    let resume = sync(&mut trackers, 2);
    steps(&mut trackers, 3..=4);
    kill(trackers);
    let run = home.run();
    Trackers::open(&run, Some(resume), &Config::default(), Terminal::Quiet);
    assert_eq!(in_events(&run)["train/loss"], [1, 2]);
    assert_eq!(event_files(&run).len(), 1);
}

#[test]
fn without_a_wish_there_is_no_tracker() {
    let dir = tempfile::tempdir().unwrap();
    let mut trackers = Trackers::open(dir.path(), None, &Config::default(), Terminal::Quiet);
    trackers.step(&step(1));
    trackers.finish(&summary());
    let files = fs::read_dir(dir.path()).unwrap();
    let mut files: Vec<_> = files.map(|entry| entry.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["log.txt", "metrics.jsonl", "summary.json"]);
}

#[test]
fn an_event_file_that_vanishes_is_a_failure_and_is_followed_by_another() {
    let home = Home::new();
    let config = Config {
        system: false,
        mlflow: None,
        tensorboard: true,
    };
    let run = home.run();
    let mut trackers = Trackers::open(&run, None, &config, Terminal::Quiet);
    trackers.step(&step(1));
    fs::remove_file(&event_files(&run)[0]).unwrap();
    trackers.step(&step(2));
    trackers.sync();
    assert_eq!(trackers.failures(), 1);
    trackers.step(&step(3));
    trackers.finish(&summary());
    assert_eq!(trackers.failures(), 1);
    assert_eq!(in_events(&run)["train/loss"], [3]);
}

//! What the trackers' files hold, and what happens when they cannot be written.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may stop, and spoils files on purpose"
)]

mod clients;
mod mlflow;
mod rest;
mod served;
#[cfg(feature = "mlflow_rs")]
mod server;
mod sinks;

use std::fs;
use std::path::Path;

use track::{
    Best, Config, EvalMetrics, EvalSummary, Resume, Spent, StepMetrics, Summary, Terminal,
    Trackers, read_summary,
};

fn step(step: u64) -> StepMetrics {
    StepMetrics {
        step,
        total: 100,
        epoch: 0.53,
        loss: 1.25,
        top1: 0.5,
        lr: 1e-5,
        images_per_s: 100.0,
        input_wait_fraction: 0.0,
        spent: Spent::default(),
    }
}

fn eval(step: u64) -> EvalMetrics {
    EvalMetrics {
        step,
        epoch: 0.1 + 0.2,
        loss: 0.1203,
        top1: 0.9611,
        top5: 1.0,
        ema_loss: None,
        ema_top1: None,
        ema_top5: None,
        images: 359,
        seconds: 0.4,
    }
}

fn step_text(step: u64) -> String {
    format!(
        "{{\"step\":{step},\"epoch\":0.53,\"train/loss\":1.25,\"train/top1\":0.5,\"train/lr\":0.00001,\
         \"train/images_per_s\":100.0,\"train/input_wait_fraction\":0.0}}\n"
    )
}

fn steps_text(steps: &[u64]) -> String {
    steps.iter().map(|&step| step_text(step)).collect()
}

fn summary() -> Summary {
    Summary {
        status: "done".into(),
        step: 345,
        eval: Some(EvalSummary {
            top1: 0.96,
            top5: 0.99,
            loss: 0.12,
            ema_top1: None,
        }),
        best: Some(Best {
            metric: "top1".into(),
            value: 0.97,
            step: 300,
        }),
        images_per_s: 812.5,
        input_wait_fraction: 0.01,
        time: Spent {
            engine: 2.5,
            decode: 0.5,
            ..Spent::default()
        }
        .time(),
        reason: None,
    }
}

fn open(dir: &Path, metrics_bytes: Option<u64>) -> Trackers {
    let resume = metrics_bytes.map(|metrics_bytes| Resume {
        step: 2,
        is_evaluated: false,
        metrics_bytes,
    });
    Trackers::open(dir, resume, &Config::default(), Terminal::Quiet)
}

fn metrics(dir: &Path) -> String {
    fs::read_to_string(dir.join("metrics.jsonl")).unwrap()
}

fn log(dir: &Path) -> String {
    fs::read_to_string(dir.join("log.txt")).unwrap()
}

#[test]
fn steps_and_evaluations_are_lines_of_json() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("runs/x");
    let mut trackers = open(&run, None);
    trackers.step(&step(12));
    trackers.eval(&eval(12));
    let expected = step_text(12)
        + "{\"step\":12,\"epoch\":0.30000000000000004,\"eval/loss\":0.1203,\"eval/top1\":0.9611,\
           \"eval/top5\":1.0,\"eval/images\":359}\n";
    assert_eq!(metrics(&run), expected);
    assert_eq!(trackers.sync(), expected.len() as u64);
    assert_eq!(trackers.failures(), 0);
}

#[test]
fn numbers_that_are_not_finite_are_strings() {
    let dir = tempfile::tempdir().unwrap();
    let mut trackers = open(dir.path(), None);
    trackers.step(&StepMetrics {
        loss: f64::NAN,
        lr: f64::NEG_INFINITY,
        images_per_s: f64::INFINITY,
        ..step(1)
    });
    assert_eq!(
        metrics(dir.path()),
        "{\"step\":1,\"epoch\":0.53,\"train/loss\":\"NaN\",\"train/top1\":0.5,\"train/lr\":\"-Infinity\",\
         \"train/images_per_s\":\"Infinity\",\"train/input_wait_fraction\":0.0}\n"
    );
    assert_eq!(trackers.failures(), 0);
}

#[test]
fn a_resume_cuts_what_came_after_the_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let mut trackers = open(dir.path(), None);
    trackers.step(&step(1));
    trackers.step(&step(2));
    let offset = trackers.sync();
    trackers.step(&step(3));
    trackers.note("first");
    drop(trackers);

    let mut trackers = open(dir.path(), Some(offset));
    assert_eq!(metrics(dir.path()), steps_text(&[1, 2]));
    trackers.step(&step(30));
    trackers.note("second");
    assert_eq!(metrics(dir.path()), steps_text(&[1, 2, 30]));
    assert_eq!(trackers.sync(), metrics(dir.path()).len() as u64);
    assert_eq!(log(dir.path()), "first\nsecond\n");
    assert_eq!(trackers.failures(), 0);
}

#[test]
fn a_run_that_begins_anew_forgets_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut trackers = open(dir.path(), None);
    trackers.step(&step(1));
    trackers.note("old");
    let mut trackers = open(dir.path(), None);
    trackers.step(&step(2));
    trackers.note("new");
    assert_eq!(metrics(dir.path()), step_text(2));
    assert_eq!(log(dir.path()), "new\n");
}

#[test]
fn a_file_shorter_than_the_checkpoint_says_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let kept = step_text(1);
    // The second line was cut off in the middle.
    fs::write(dir.path().join("metrics.jsonl"), format!("{kept}{{\"st")).unwrap();
    let mut trackers = open(dir.path(), Some(10_000));
    assert_eq!(
        log(dir.path()),
        format!(
            "metrics.jsonl has {} bytes, less than the 10000 of the checkpoint: the steps between are missing\n",
            kept.len() + 4
        )
    );
    trackers.step(&step(9));
    assert_eq!(metrics(dir.path()), steps_text(&[1, 9]));
    assert_eq!(trackers.sync(), steps_text(&[1, 9]).len() as u64);
    assert_eq!(trackers.failures(), 0);
}

#[test]
fn a_resume_without_a_file_is_noted() {
    let dir = tempfile::tempdir().unwrap();
    let mut trackers = open(dir.path(), Some(7));
    assert!(log(dir.path()).starts_with("metrics.jsonl has 0 bytes"));
    trackers.step(&step(9));
    assert_eq!(metrics(dir.path()), step_text(9));
}

#[test]
fn a_file_that_vanishes_is_a_failure_and_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let mut trackers = open(dir.path(), None);
    trackers.step(&step(1));
    fs::remove_file(dir.path().join("metrics.jsonl")).unwrap();
    trackers.step(&step(2));
    assert_eq!(trackers.sync(), 0);
    assert_eq!(trackers.failures(), 1);

    trackers.step(&step(3));
    assert_eq!(trackers.sync(), step_text(3).len() as u64);
    assert_eq!(metrics(dir.path()), step_text(3));
    assert_eq!(trackers.failures(), 1);
}

#[test]
fn a_directory_that_vanishes_stops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("x");
    let mut trackers = open(&run, None);
    fs::remove_dir_all(&run).unwrap();
    trackers.sync();
    trackers.step(&step(1));
    trackers.sync();
    trackers.finish(&summary());
    assert!(trackers.failures() >= 2, "{}", trackers.failures());
    assert_eq!(read_summary(&run), None);
}

/// A directory below a file can be made by nobody, root included.
#[test]
fn a_directory_that_cannot_be_made_stops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let mut trackers = open(&file.join("x"), Some(500));
    // The directory, log.txt, metrics.jsonl.
    assert_eq!(trackers.failures(), 3);
    trackers.step(&step(1));
    assert_eq!(trackers.failures(), 4);
    trackers.note("unheard");
    assert_eq!(trackers.failures(), 5);
    // The checkpoint keeps its offset, so that a later resume cuts nothing that was good.
    assert_eq!(trackers.sync(), 500);
    assert_eq!(trackers.failures(), 6);
    trackers.finish(&summary());
    assert!(trackers.failures() >= 7);
}

#[test]
fn a_file_that_is_a_directory_stops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("metrics.jsonl")).unwrap();
    let mut trackers = open(dir.path(), None);
    trackers.step(&step(1));
    assert_eq!(trackers.failures(), 2);
    trackers.finish(&summary()); // which forces the numbers to the disk once more
    assert_eq!(trackers.failures(), 3);
    assert_eq!(read_summary(dir.path()), Some(summary()));
    let log = log(dir.path());
    let path = dir.path().join("metrics.jsonl");
    let told = format!(
        "3 writes of the trackers failed, first {}: ",
        path.display()
    );
    assert!(log.starts_with(&told), "{log}");
}

#[test]
fn a_summary_has_its_shape() {
    let dir = tempfile::tempdir().unwrap();
    let mut trackers = open(dir.path(), None);
    trackers.finish(&summary());
    let text = fs::read_to_string(dir.path().join("summary.json")).unwrap();
    assert_eq!(
        text,
        "{\"status\":\"done\",\"step\":345,\"eval\":{\"top1\":0.96,\"top5\":0.99,\"loss\":0.12},\
         \"best\":{\"metric\":\"top1\",\"value\":0.97,\"step\":300},\"images_per_s\":812.5,\
         \"input_wait_fraction\":0.01,\"time\":{\"seconds\":{\"read\":0.0,\"decode\":0.5,\"engine\":2.5,\
         \"evaluation\":0.0,\"checkpoint\":0.0,\"tracking\":0.0},\"limited_by\":\"engine\",\"change\":[\
         \"engine takes 83% of the time: try train.precision = \\\"bf16\\\", or a faster device\",\
         \"decode takes 17% of the time: give it more cores (train.threads), set data.decode = \\\"fast\\\" \
         and data.index, or store smaller images\"]}}\n"
    );
    assert_eq!(read_summary(dir.path()), Some(summary()));
    let files = fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(files, 3, "nothing temporary stays");
}

#[test]
fn a_summary_of_a_failure_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let failed = Summary {
        status: "failed".into(),
        eval: None,
        best: None,
        images_per_s: f64::INFINITY,
        reason: Some("the loss is not finite".into()),
        ..summary()
    };
    open(dir.path(), None).finish(&failed);
    assert_eq!(read_summary(dir.path()), Some(failed));
}

#[test]
fn a_new_summary_replaces_the_old() {
    let dir = tempfile::tempdir().unwrap();
    let interrupted = Summary {
        status: "interrupted".into(),
        ..summary()
    };
    open(dir.path(), None).finish(&interrupted);
    open(dir.path(), Some(0)).finish(&summary());
    assert_eq!(read_summary(dir.path()), Some(summary()));
}

#[test]
fn no_summary() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(read_summary(dir.path()), None);
}

#[test]
fn half_a_summary() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("summary.json"), "{\"status\":\"do").unwrap();
    assert_eq!(read_summary(dir.path()), None);
}

//! `runner CONFIG`: the run itself.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use engine::Engine;
use spec::Mode;
use store::Lease;
use track::{Summary, Terminal, Trackers, read_summary};
use train::{Checkpoints, Input, Job, Meta, Plan};

use crate::cli::Spec;
use crate::config;
use crate::evaluate;
use crate::failure::{Failure, INTERRUPTED};
use crate::network;

/// Does what the spec's `mode` says.
pub(crate) fn run(args: &Spec, fresh: bool) -> Result<ExitCode, Failure> {
    let run = config::load(args)?;
    if run.mode == Mode::Eval {
        return evaluate::latest(&run);
    }
    let labels = network::labels(&run)?;
    let input = Input::open(&run)?;
    let plan = Plan::new(&run, input.train_examples)
        .expect("a checked spec has lengths that become steps");
    let mut meta = Meta::new(&run, input.computation(&run), labels);

    let dir = run.run_dir();
    if fresh {
        put_aside(&dir)?;
    }
    std::fs::create_dir_all(&dir)
        .map_err(|e| Failure::Run(format!("{}: cannot create: {e}", dir.display())))?;
    let _lease = Lease::take(&dir)?;
    let start = train::resume(&dir, &meta)?;
    if let Some(summary) = start
        .as_ref()
        .and_then(|(progress, _)| finished(&dir, &plan, progress))
    {
        eprintln!(
            "{} is finished: {} of {} steps done\nhint: a longer --set train.length=... goes on, --fresh starts anew",
            dir.display(),
            summary.step,
            plan.steps
        );
        print(&summary);
        return Ok(ExitCode::SUCCESS);
    }
    store::write_atomic(&dir.join("spec.toml"), &[run.to_toml().as_bytes()])?;

    let metrics_bytes = start.as_ref().map(|(progress, _)| progress.metrics_bytes);
    let mut trackers = Trackers::open(&dir, metrics_bytes, Terminal::Auto);
    let graph = network::network(&run);
    trackers.note(&format!(
        "{}: {}, {} parameters",
        run.name,
        network::title(&run),
        graph.counts().params
    ));
    let state = start.map(|(progress, state)| {
        trackers.note(&format!(
            "resuming at step {} of {}",
            progress.step, plan.steps
        ));
        meta.progress = progress;
        state
    });
    let mut engine = network::engine(&run, &graph, state)?;
    trackers.note(&format!(
        "{}, {} steps of {} images",
        engine.describe(),
        plan.steps,
        plan.batch_size
    ));

    let stop = stop_on_signals();
    let checkpoints = Checkpoints::of(&dir);
    let job = Job {
        plan: &plan,
        input: &input,
        checkpoints: &checkpoints,
        keep: run.checkpoint.keep,
        meta,
        stop: &stop,
    };
    let summary = train::train(job, &mut engine, &mut trackers)?;
    trackers.finish(&summary);
    print(&summary);
    if summary.status == "done" {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!(
        "interrupted at step {} of {}; start it again to go on",
        summary.step, plan.steps
    );
    Ok(ExitCode::from(INTERRUPTED))
}

/// The summary of a run that has nothing left to do.
fn finished(dir: &Path, plan: &Plan, progress: &train::Progress) -> Option<Summary> {
    let is_at_end = progress.step >= plan.steps;
    read_summary(dir).filter(|s| is_at_end && s.status == "done" && s.step == progress.step)
}

/// One line of JSON, the same as in summary.json.
fn print(summary: &Summary) {
    println!(
        "{}",
        serde_json::to_string(summary).expect("a summary has string keys")
    );
}

/// Renames the directory of an earlier run to the first free `<dir>.N`.
fn put_aside(dir: &Path) -> Result<(), Failure> {
    if !dir.exists() {
        return Ok(());
    }
    let lease = Lease::take(dir)?;
    let name = |n: u32| PathBuf::from(format!("{}.{n}", dir.display()));
    let aside = (1..)
        .map(name)
        .find(|p| !p.exists())
        .expect("some number is free");
    store::rename(dir, &aside)?;
    drop(lease);
    eprintln!("the earlier run is now {}", aside.display());
    Ok(())
}

/// The first SIGTERM or SIGINT asks the run to stop after its step; a second one ends the process.
fn stop_on_signals() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        let code = 128 + signal;
        signal_hook::flag::register_conditional_shutdown(signal, code, Arc::clone(&stop))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
            .expect("SIGTERM and SIGINT may be handled");
    }
    stop
}

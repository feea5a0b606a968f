//! `runner CONFIG`: the run itself.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use spec::{Length, Mode};
use store::Lease;
use track::{Resume, Summary, Terminal, Trackers, read_summary};
use train::{Checkpoints, Ended, Input, Job, Limits, Meta, Mirror, Pace, Plan, Progress};

use crate::cli::Spec;
use crate::config;
use crate::evaluate;
use crate::failure::{Failure, INTERRUPTED};
use crate::{network, output, tracking, weights};

/// What a command line says beside the spec.
pub(crate) struct How {
    /// Put an earlier run aside.
    pub(crate) fresh: bool,
    /// Stop there.
    pub(crate) until: Option<Length>,
    /// Show a dashboard.
    pub(crate) tui: bool,
}

/// Does what the spec's `mode` says.
pub(crate) fn run(args: &Spec, how: &How) -> Result<ExitCode, Failure> {
    let run = config::load(args)?;
    if run.mode == Mode::Eval {
        return evaluate::latest(&run, how.fresh);
    }
    let graph = network::network(&run);
    let sides = run.progressive.resolution.iter();
    for &side in sides.chain([&run.model.resolution]) {
        let run = at_resolution(&run, side);
        network::check(&run, &network::network(&run))?;
    }
    let labels = network::labels(&run)?;
    let input = Input::open(&run)?;
    let plan = Plan::new(&run, input.train_examples)
        .expect("a checked spec has lengths that become steps");
    let until = match how.until {
        None => plan.steps,
        Some(length) => length
            .steps(plan.examples, plan.batch_size, Some(plan.steps))
            .map_or(plan.steps, |steps| steps.clamp(1, plan.steps)),
    };
    let meta = Meta::new(&run, input.computation(&run), labels);

    let dir = run.run_dir();
    let mirror = run.checkpoint.mirror.as_deref().map(Mirror::new);
    if how.fresh {
        check_is_new(&run, mirror.as_ref())?;
        put_aside(&dir)?;
    }
    std::fs::create_dir_all(&dir)
        .map_err(|e| Failure::Run(format!("{}: cannot create: {e}", dir.display())))?;
    let _lease = Lease::take(&dir)?;
    let mut said = vec![];
    if let Some(mirror) = &mirror {
        let here = Checkpoints::of(&dir).latest_step()?;
        if let Some(step) = mirror.fetch(&dir, here)? {
            let url = run.checkpoint.mirror.as_deref().unwrap_or_default();
            said.push(format!("the checkpoint of step {step} comes from {url}"));
        }
    }
    let start = train::resume(&dir, &meta, |note| said.push(note.to_owned()))?;
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
    let config = tracking::config(&args.config, &run, &dir, &input, &meta)?;
    store::write_atomic(&dir.join("spec.toml"), &[run.to_toml().as_bytes()])?;

    let weights = match start {
        Some(_) => None,
        None => Some(weights::initial(&run, &graph)?),
    };
    let resume = start.as_ref().map(|(at, _)| place(at));
    let terminal = if how.tui {
        Terminal::Tui
    } else {
        Terminal::Auto
    };
    let mut trackers = Trackers::open(&dir, resume, &config, terminal);
    said.iter().for_each(|note| trackers.note(note));
    let (title, params) = (network::title(&run), graph.counts().params);
    trackers.note(&format!("{}: {title}, {params} parameters", run.name));
    let (mut at, mut state) = match start {
        Some((progress, state)) => {
            trackers.note(&format!(
                "resuming at step {} of {}",
                progress.step, plan.steps
            ));
            (progress, Some(state))
        }
        None => {
            let nodes = network::nodes(&graph);
            trackers.describe(&tracking::params(&meta), &run.to_toml(), &nodes);
            let (state, said) = weights.expect("read where there is no checkpoint");
            said.iter().for_each(|note| trackers.note(note));
            (Progress::default(), Some(state))
        }
    };
    let checkpoints = Checkpoints::of(&dir).mirrored(mirror);
    let (stop, mut pace) = (stop_on_signals(), Pace::default());
    // Every resolution has an engine of its own, which takes over from the one before.
    let ended = 'phases: loop {
        let (end, side) = plan.phase(&at);
        let here = at_resolution(&run, side);
        let mut engine = network::engine(&here, &network::network(&here), state.take())?;
        let (what, steps, images) = (engine.describe(), plan.steps, plan.batch_size);
        let grows = match plan.phases().len() {
            1 => String::new(),
            _ => format!(", {side} px until step {end}"),
        };
        trackers.note(&format!("{what}, {steps} steps of {images} images{grows}"));
        let input = input.at(side);
        loop {
            let job = Job {
                plan: &plan,
                input: &input,
                checkpoints: &checkpoints,
                keep: run.checkpoint.keep,
                meta: meta.clone(),
                until: until.min(end),
                limits: Limits::of(&run),
                best: run.checkpoint.best,
                stop: &stop,
            };
            let ended = train::train(job, &mut at, &mut *engine, &mut trackers, &mut pace);
            let is_stopped = stop.load(Ordering::Relaxed);
            match ended {
                Ok(Ended::Rewound) => {
                    // A resume that the process survives: the trackers forget what it takes back.
                    drop(trackers);
                    trackers = Trackers::open(&dir, Some(place(&at)), &config, terminal);
                }
                Ok(Ended::Interrupted) if !is_stopped && at.step == end && end < until => {
                    match engine.state() {
                        Ok(found) => state = Some(found),
                        Err(e) => break 'phases Err(e.into()),
                    }
                    continue 'phases;
                }
                ended => break 'phases ended,
            }
        }
    };
    let (status, reason) = match &ended {
        Ok(Ended::Rewound) => unreachable!("a run that was rewound goes on"),
        Ok(Ended::Done) => ("done", None),
        Ok(Ended::Interrupted) if stop.load(Ordering::Relaxed) => {
            ("interrupted", Some("a signal".into()))
        }
        Ok(Ended::Interrupted) => ("interrupted", Some("--until".into())),
        Err(error) => ("failed", Some(error.to_string())),
    };
    if let (Ok(Ended::Done), Some(name)) = (&ended, &run.track.register_model) {
        match checkpoints.best(&at) {
            Ok((file, step)) => trackers.model(&file, name, step),
            Err(error) => trackers.note(&format!("no model is registered: {error}")),
        }
    }
    let summary = pace.summary(status, &at, reason);
    trackers.finish(&summary);
    match ended? {
        Ended::Rewound => unreachable!("as above"),
        Ended::Done => {
            print(&summary);
            Ok(ExitCode::SUCCESS)
        }
        Ended::Interrupted => {
            let (step, steps) = (at.step, plan.steps);
            eprintln!(
                "interrupted at step {step} of {steps}, all of them saved; start it again (without --fresh) to go on"
            );
            print(&summary);
            Ok(ExitCode::from(INTERRUPTED))
        }
    }
}

/// A run that starts anew cannot leave its checkpoints among those of another.
fn check_is_new(run: &spec::Run, mirror: Option<&Mirror>) -> Result<(), Failure> {
    let (Some(url), Some(mirror)) = (&run.checkpoint.mirror, mirror) else {
        return Ok(());
    };
    match mirror.latest()? {
        None => Ok(()),
        Some(step) => Err(Failure::Spec(format!(
            "checkpoint.mirror: {url} holds a run that has come to step {step}\n\
             hint: --fresh starts anew; name another place, or remove that one"
        ))),
    }
}

/// The same run with images of another size.
fn at_resolution(run: &spec::Run, resolution: usize) -> spec::Run {
    let mut run = run.clone();
    run.model.resolution = resolution;
    run
}

/// Where the trackers of a run that has come to `at` go on.
fn place(at: &Progress) -> Resume {
    Resume {
        step: at.step,
        is_evaluated: at.is_evaluated(),
        metrics_bytes: at.metrics_bytes,
    }
}

/// The summary of a run that has nothing left to do.
fn finished(dir: &Path, plan: &Plan, progress: &Progress) -> Option<Summary> {
    let is_at_end = progress.step >= plan.steps;
    let summary = read_summary(dir).filter(|s| s.status == "done" && s.step == progress.step)?;
    let is_evaluated = summary.eval.is_some() || !plan.is_eval_due(progress.step);
    (is_at_end && is_evaluated).then_some(summary)
}

/// One line of JSON, the same as in summary.json.
fn print(summary: &Summary) {
    let text = serde_json::to_string(summary).expect("a summary has string keys");
    output::print(&format!("{text}\n"));
}

/// Renames the directory of an earlier run to the first free `<dir>.N`.
fn put_aside(dir: &Path) -> Result<(), Failure> {
    if !dir.exists() {
        return Ok(());
    }
    let lease = Lease::take(dir)?;
    let dir: &Path = &dir.components().collect::<PathBuf>(); // without a slash at the end
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
pub(crate) fn stop_on_signals() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        let code = 128 + signal;
        signal_hook::flag::register_conditional_shutdown(signal, code, Arc::clone(&stop))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
            .expect("SIGTERM and SIGINT may be handled");
    }
    stop
}

//! `runner eval`: the score of a checkpoint.

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use engine::State;
use serde_json::json;
use spec::Run;
use train::Meta;

use crate::cli::EvalArgs;
use crate::failure::Failure;
use crate::{config, network, output};

/// `runner eval`.
pub(crate) fn evaluate(args: &EvalArgs) -> Result<ExitCode, Failure> {
    let path = train::find(&args.checkpoint)?;
    let (meta, state) = train::load(&path)?;
    let origin = format!("{} (spec)", path.display());
    // A run that only trained need not have said what to evaluate on.
    let sets: Vec<String> = args
        .set
        .iter()
        .cloned()
        .chain(["mode=eval".into()])
        .collect();
    let run = spec::parse_over(&meta.spec, &origin, &config::environment(), &sets)?;
    train::check_network(&path, &meta, &run)?;
    score(&path, &meta, state, &run, args.json)
}

/// A run whose mode is `eval`: the latest checkpoint of its directory, on the evaluation set of its own spec.
pub(crate) fn latest(run: &Run, fresh: bool) -> Result<ExitCode, Failure> {
    if fresh {
        let what = "mode: a run that only evaluates has nothing to start anew";
        return Err(Failure::Spec(format!("{what}\nhint: leave --fresh out")));
    }
    let path = train::find(&run.run_dir())?;
    let (meta, state) = train::load(&path)?;
    train::check_network(&path, &meta, run)?;
    score(&path, &meta, state, run, false)
}

fn score(
    path: &Path,
    meta: &Meta,
    state: State,
    run: &Run,
    json: bool,
) -> Result<ExitCode, Failure> {
    let config = train::eval_config(run)?;
    // The optimizer's tensors are of no use here.
    let is_needed = |name: &String| !name.starts_with(engine::MOMENTUM_PREFIX);
    let state = state
        .into_iter()
        .filter(|(name, _)| is_needed(name))
        .collect();
    let mut engine = network::engine(run, &network::network(run), Some(state))?;
    let started = Instant::now();
    let m = train::score(&config, &mut *engine, &AtomicBool::new(false), |bad| {
        eprintln!("{bad}");
    })?;
    let m = m.expect("nobody stops it");
    let (step, seconds) = (meta.progress.step, started.elapsed().as_secs_f64());
    let (checkpoint, images) = (path.display(), m.images);
    let (top1, top5, loss) = (m.top1(), m.top5(), m.loss());
    output::print(&if json {
        let checkpoint = checkpoint.to_string();
        let report = json!({ "checkpoint": checkpoint, "step": step, "images": images, "top1": top1, "top5": top5, "loss": loss });
        format!("{report}\n")
    } else {
        format!(
            "{checkpoint} at step {step}\n\
             top1 {top1:.4}  top5 {top5:.4}  loss {loss:.4}  {images} images in {seconds:.1} s\n"
        )
    });
    Ok(ExitCode::SUCCESS)
}

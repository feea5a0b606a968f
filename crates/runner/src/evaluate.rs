//! `runner eval`: the score of a checkpoint.

use std::path::Path;
use std::process::ExitCode;

use serde_json::json;
use spec::Run;

use crate::cli::EvalArgs;
use crate::failure::Failure;
use crate::network;

/// `runner eval`.
pub(crate) fn evaluate(args: &EvalArgs) -> Result<ExitCode, Failure> {
    let path = train::find(&args.checkpoint)?;
    let (meta, state) = train::load(&path)?;
    let run = spec::parse(&meta.spec, &format!("{} (spec)", path.display()), &args.set)?;
    score(&path, &meta, state, &run, args.json)
}

/// A run whose mode is `eval`: the latest checkpoint of its directory, with its own spec.
pub(crate) fn latest(run: &Run) -> Result<ExitCode, Failure> {
    let path = train::find(&run.run_dir())?;
    let (meta, state) = train::load(&path)?;
    score(&path, &meta, state, run, false)
}

fn score(
    path: &Path,
    meta: &train::Meta,
    state: engine::State,
    run: &Run,
    json: bool,
) -> Result<ExitCode, Failure> {
    let config = train::eval_config(run)?;
    // The optimizer's tensors are of no use here.
    let state = state
        .into_iter()
        .filter(|(name, _)| !name.starts_with(engine::MOMENTUM_PREFIX))
        .collect();
    let mut engine = network::engine(run, &network::network(run), Some(state))?;
    let started = std::time::Instant::now();
    let m = train::score(&config, &mut engine, |bad| eprintln!("{bad}"))?;
    let (step, seconds) = (meta.progress.step, started.elapsed().as_secs_f64());
    if json {
        let (top1, top5, loss) = (m.top1(), m.top5(), m.loss());
        let checkpoint = path.display().to_string();
        println!(
            "{}",
            json!({ "checkpoint": checkpoint, "step": step, "images": m.images, "top1": top1, "top5": top5, "loss": loss })
        );
    } else {
        println!("{} at step {step}", path.display());
        println!(
            "top1 {:.4}  top5 {:.4}  loss {:.4}  {} images in {seconds:.1} s",
            m.top1(),
            m.top5(),
            m.loss(),
            m.images
        );
    }
    Ok(ExitCode::SUCCESS)
}

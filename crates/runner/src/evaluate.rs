//! `runner eval`: the score of a checkpoint.

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use engine::{AVERAGE_PREFIX, Metrics, State};
use serde_json::json;
use spec::{EmaEval, Run};
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
    let state = state.into_iter().filter(|(name, _)| is_needed(name));
    let (average, raw): (State, State) =
        state.partition(|(name, _)| name.starts_with(AVERAGE_PREFIX));
    let bare = |name: &str| name.strip_prefix(AVERAGE_PREFIX).map(str::to_owned);
    let average: State = (average.into_iter())
        .filter_map(|(name, tensor)| Some((bare(&name)?, tensor)))
        .collect();
    // What a training run would score: the parameters, their average, or both.
    let has_average = !average.is_empty() && run.ema.half_life.is_some();
    let (states, has_both) = match run.ema.eval {
        EmaEval::Average if has_average => (vec![average], false),
        EmaEval::Both if has_average => (vec![raw, average], true),
        _ => (vec![raw], false),
    };
    let mut engine = network::engine(run, &network::network(run), Some(states[0].clone()))?;
    let started = Instant::now();
    let mut scores: Vec<Metrics> = vec![];
    for state in &states {
        engine.load(state)?;
        let m = train::score(&config, &mut *engine, &AtomicBool::new(false), |bad| {
            eprintln!("{bad}");
        })?;
        scores.push(m.expect("nobody stops it"));
    }
    let (step, seconds) = (meta.progress.step, started.elapsed().as_secs_f64());
    let m = &scores[0];
    let (checkpoint, images) = (path.display(), m.images);
    let (top1, top5, loss) = (m.top1(), m.top5(), m.loss());
    let average = scores.get(1).filter(|_| has_both);
    output::print(&if json {
        let checkpoint = checkpoint.to_string();
        let mut report = json!({ "checkpoint": checkpoint, "step": step, "images": images, "top1": top1, "top5": top5, "loss": loss });
        if let Some(m) = average {
            report["ema_top1"] = m.top1().into();
            report["ema_top5"] = m.top5().into();
            report["ema_loss"] = m.loss().into();
        }
        format!("{report}\n")
    } else {
        let average = average.map_or(String::new(), |m| {
            let (top1, top5, loss) = (m.top1(), m.top5(), m.loss());
            format!("average: top1 {top1:.4}  top5 {top5:.4}  loss {loss:.4}\n")
        });
        format!(
            "{checkpoint} at step {step}\n\
             top1 {top1:.4}  top5 {top5:.4}  loss {loss:.4}  {images} images in {seconds:.1} s\n{average}"
        )
    });
    Ok(ExitCode::SUCCESS)
}

//! `runner verify-resume`: the promise of an exact resume, put to the test on this machine with this spec.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use crate::cli::VerifyArgs;
use crate::failure::Failure;
use crate::{config, output};

/// Trains a few steps twice, in processes of their own: once straight, once killed in the middle and started again.
/// Both have to end with the same bits.
pub(crate) fn verify(args: &VerifyArgs) -> Result<ExitCode, Failure> {
    config::load(&args.spec)?; // a wrong spec is reported once, and before anything starts
    let scratch = Scratch::new()?;
    let (straight, broken) = (scratch.0.join("straight"), scratch.0.join("killed"));
    let steps = args.steps;

    eprintln!("training {steps} steps straight");
    finish(args, &straight)?;
    let at = (steps / 2 + 1).min(steps - 1); // not at a checkpoint, where little would be proven
    eprintln!("training {steps} steps, to be killed after step {at}");
    let killed_at = kill_at(args, &broken, at)?;
    eprintln!("killed after step {killed_at}; resuming");
    finish(args, &broken)?;

    let found = train::compare(&straight, &broken)?;
    if found.differences.is_empty() {
        output::print(&format!(
            "the resume is exact: killed after step {killed_at} of {steps}, then equal in every bit of {} tensors \
             ({} values), in the position in the data, and in {} lines of metrics\n",
            found.tensors, found.values, found.lines
        ));
        return Ok(ExitCode::SUCCESS);
    }
    let text = found.differences.join("\n  ");
    Err(Failure::Run(format!(
        "the resume is not exact: the run that was killed after step {killed_at} of {steps} differs in\n  {text}\n\
         hint: this is a fault of the program or of the machine's memory; please report it with the spec"
    )))
}

/// A run of the same spec in `dir`, without evaluations, with a checkpoint every few steps.
fn start(args: &VerifyArgs, dir: &Path) -> Result<Child, Failure> {
    let failed = |e: std::io::Error| Failure::Run(format!("cannot start a run of its own: {e}"));
    let mut command = Command::new(std::env::current_exe().map_err(failed)?);
    command.arg(&args.spec.config);
    let every = (args.steps / 4).max(1);
    let own = [
        format!("run_dir={}", dir.display()),
        format!("train.length={} steps", args.steps),
        format!("checkpoint.every={every} steps"),
        "mode=train".into(),
        "track.mlflow=off".into(),
        "track.tensorboard=false".into(),
    ];
    for set in args.spec.changes.set.iter().chain(&own) {
        command.arg("--set").arg(set);
    }
    if let Some(profile) = &args.spec.changes.profile {
        command.arg("--profile").arg(profile);
    }
    command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)
}

fn finish(args: &VerifyArgs, dir: &Path) -> Result<(), Failure> {
    let ended = start(args, dir)?.wait_with_output();
    let ended = ended.map_err(|e| Failure::Run(format!("cannot wait for a run: {e}")))?;
    if ended.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&ended.stderr);
    Err(Failure::Run(format!(
        "a run of its own failed:\n{}",
        said.trim_end()
    )))
}

/// Kills a run as soon as it has logged step `at`; the last step it logged.
fn kill_at(args: &VerifyArgs, dir: &Path, at: u64) -> Result<u64, Failure> {
    let mut child = start(args, dir)?;
    let logged = || {
        let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap_or_default();
        text.lines().count() as u64
    };
    loop {
        let is_over = child.try_wait().is_ok_and(|status| status.is_some());
        if is_over || logged() >= at {
            // A run that is over already cannot be killed; the comparison is then one of two straight runs.
            let _ = child.kill();
            let _ = child.wait();
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    match logged() {
        step if step < args.steps => Ok(step),
        step => Err(Failure::Run(format!(
            "all {step} steps were over before the run could be killed\nhint: more steps with --steps"
        ))),
    }
}

/// A directory of our own that goes when we go.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, Failure> {
        let dir = std::env::temp_dir().join(format!("runner-verify-{}", std::process::id()));
        let failed = |e| Failure::Run(format!("{}: cannot create: {e}", dir.display()));
        std::fs::create_dir_all(&dir).map_err(failed)?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("{}: cannot remove: {error}", self.0.display());
        }
    }
}

//! `runner config`, and how every command comes by its spec.

use std::path::Path;
use std::process::ExitCode;

use spec::{Layers, Loaded, Run};

use crate::cli::{Changes, ConfigArgs, Spec};
use crate::failure::Failure;
use crate::output;

/// The spec that a command line names, with the environment over it.
pub(crate) fn load(args: &Spec) -> Result<Run, Failure> {
    Ok(layered(&args.config, &args.changes)?.run)
}

/// `runner config`.
pub(crate) fn config(args: &ConfigArgs) -> Result<ExitCode, Failure> {
    let Some(file) = &args.config else {
        output::print(&spec::schema());
        return Ok(ExitCode::SUCCESS);
    };
    let loaded = layered(file, &args.changes)?;
    output::print(&match args.origins {
        true => with_origins(&loaded),
        false => loaded.run.to_toml(),
    });
    Ok(ExitCode::SUCCESS)
}

/// Every environment variable. One that is not text has no name that a spec knows, or a value that it refuses.
pub(crate) fn environment() -> Vec<(String, String)> {
    std::env::vars_os()
        .map(|(name, value)| [name, value].map(|text| text.to_string_lossy().into_owned()))
        .map(|[name, value]| (name, value))
        .collect()
}

fn layered(file: &Path, changes: &Changes) -> Result<Loaded, Failure> {
    let environment = environment();
    let mut loaded = spec::load(&Layers {
        file,
        profile: changes.profile.as_deref(),
        environment: &environment,
        sets: &changes.set,
    })?;
    // MLflow's own variable, as strong as ours but for ours.
    let variable = environment.iter().find(|(name, _)| name == EXPERIMENT);
    if let Some((_, name)) = variable.filter(|(_, name)| !name.is_empty()) {
        let said = loaded.origins.entry("track.experiment".into()).or_default();
        if !["--set ", "environment "]
            .iter()
            .any(|by| said.starts_with(by))
        {
            *said = format!("environment variable {EXPERIMENT}");
            loaded.run.track.experiment = name.clone();
        }
    }
    Ok(loaded)
}

/// MLflow's name for our `track.experiment`.
pub(crate) const EXPERIMENT: &str = "MLFLOW_EXPERIMENT_NAME";

/// The resolved spec, and behind each key where its value was said.
fn with_origins(loaded: &Loaded) -> String {
    let text = loaded.run.to_toml();
    let width = text.lines().map(|line| line.chars().count()).max();
    let width = width.unwrap_or(0);
    let (mut section, mut out) = (String::new(), String::new());
    for line in text.lines() {
        let header = line.strip_prefix('[').and_then(|l| l.strip_suffix(']'));
        if let Some(name) = header {
            section = format!("{name}.");
        }
        let key = line
            .split_once(" = ")
            .map(|(key, _)| format!("{section}{key}"));
        match key.and_then(|key| loaded.origins.get(&key)) {
            Some(origin) => out += &format!("{line:width$}  # {origin}\n"),
            None => out += &format!("{line}\n"),
        }
    }
    out
}

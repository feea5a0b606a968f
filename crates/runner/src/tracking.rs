//! Which trackers a run has, and `runner track`.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use serde_json::json;
use spec::Run;
use store::Lease;
use track::{Access, Config, Dataset, Mlflow, Place, without_login};
use train::{Input, Meta};

use crate::cli::TrackSyncArgs;
use crate::failure::Failure;
use crate::output;

/// The variable by which MLflow's own programs find their store.
const URI: &str = "MLFLOW_TRACKING_URI";
/// In the environment of a sweep's runs: what their parent's `mlflow-run` holds.
pub(crate) const PARENT: &str = "RUNNER_MLFLOW_PARENT";

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|text| !text.is_empty())
}

/// The trackers that the spec asks for.
///
/// # Errors
/// If the spec or the environment names a server that is none.
pub(crate) fn config(
    file: &Path,
    run: &Run,
    dir: &Path,
    input: &Input,
    meta: &Meta,
) -> Result<Config, Failure> {
    let place = place(run)?;
    let mlflow = place.map(|place| Mlflow {
        place,
        experiment: run.track.experiment.clone(),
        run: run.name.clone(),
        source: file.display().to_string(),
        params: params(meta),
        tags: BTreeMap::from([("runner.version".into(), env!("CARGO_PKG_VERSION").into())]),
        datasets: datasets(run, input),
        parent: variable(PARENT),
        artifacts: vec![dir.join("spec.toml")],
    });
    Ok(Config {
        mlflow,
        tensorboard: run.track.tensorboard,
        system: run.track.system_metrics,
    })
}

/// Where MLflow's store is, if the run is to be in one.
pub(crate) fn place(run: &Run) -> Result<Option<Place>, Failure> {
    let here = || Place::Directory(".".into());
    Ok(match &run.track.mlflow {
        spec::Mlflow::Off => None,
        spec::Mlflow::Sqlite => Some(here()),
        spec::Mlflow::Server(url) => Some(server("track.mlflow", url)?),
        spec::Mlflow::Auto => Some(match variable(URI) {
            None => here(),
            Some(uri) => named(&uri)?,
        }),
    })
}

/// The store that `MLFLOW_TRACKING_URI` names.
fn named(uri: &str) -> Result<Place, Failure> {
    if uri.starts_with("http://") || uri.starts_with("https://") {
        return server(URI, uri);
    }
    let file = uri.strip_prefix("sqlite:///").map(Path::new);
    match file.filter(|file| file.file_name().is_some_and(|name| name == "mlflow.db")) {
        Some(file) => Ok(Place::Directory(match file.parent() {
            Some(dir) if dir != Path::new("") => dir.into(),
            _ => ".".into(),
        })),
        None => Err(Failure::Spec(format!(
            "environment variable {URI}: {:?} is no store that a run can be tracked in\n\
             hint: http://host:port, https://host or sqlite:///directory/mlflow.db; or say track.mlflow = \"sqlite\" \
             or \"off\"",
            without_login(uri)
        ))),
    }
}

fn server(origin: &str, url: &str) -> Result<Place, Failure> {
    let access =
        Access::new(url, variable).map_err(|what| Failure::Spec(format!("{origin}: {what}")))?;
    Ok(Place::Server(Box::new(access)))
}

/// What was computed, under names that MLflow takes.
pub(crate) fn params(meta: &Meta) -> BTreeMap<String, String> {
    let keys = meta.computation.iter();
    keys.map(|(key, value)| {
        let key = match key.split_once(' ') {
            Some((key, _)) => format!("{key}.fingerprint"),
            None => key.clone(),
        };
        let text = value.strip_prefix('"').and_then(|v| v.strip_suffix('"'));
        (key, text.unwrap_or(value).to_string())
    })
    .collect()
}

/// What the run reads.
fn datasets(run: &Run, input: &Input) -> Vec<Dataset> {
    let source = serde_json::to_value(run.data.source).unwrap_or_default();
    let made_up = format!("made up: {}", source.as_str().unwrap_or_default());
    let dataset = |context: &str, glob: &Option<String>, digest: String, examples| Dataset {
        name: glob.clone().unwrap_or_else(|| made_up.clone()),
        digest: digest.chars().take(36).collect(),
        context: context.into(),
        source: glob.clone().unwrap_or_else(|| made_up.clone()),
        examples,
    };
    let mut datasets = vec![];
    if input.train.is_some() {
        datasets.push(dataset(
            "training",
            &run.data.train,
            input.fingerprint.clone(),
            input.train_examples,
        ));
    }
    if input.eval.is_some() {
        datasets.push(dataset(
            "evaluation",
            &run.data.eval,
            input.eval_fingerprint.clone(),
            input.eval_examples,
        ));
    }
    datasets
}

/// `runner track sync`.
pub(crate) fn sync(args: &TrackSyncArgs) -> Result<ExitCode, Failure> {
    let uri = args.to.clone().or_else(|| variable(URI));
    let mut reports = vec![];
    for dir in &args.runs {
        let uri = match uri.clone().or_else(|| server_of(dir)) {
            Some(uri) => uri,
            None => {
                return Err(Failure::Spec(format!(
                    "{}: which server?\nhint: set {URI}, or say --to http://host:port",
                    dir.display()
                )));
            }
        };
        let access = Access::new(&uri, variable).map_err(Failure::Spec)?;
        // A run that is alive sends for itself.
        let _lease = match dir.exists() {
            true => Some(Lease::take(dir)?),
            false => None,
        };
        let synced = track::sync(dir, &access, |said| eprintln!("{said}")).map_err(Failure::Run)?;
        let (run, url) = (dir.display().to_string(), &access.url);
        if args.json {
            reports.push(json!({ "run": run, "server": url, "sent": synced.sent, "dropped": synced.dropped }));
        } else {
            let dropped = match synced.dropped {
                0 => String::new(),
                n => format!(", {n} refused"),
            };
            output::print(&format!(
                "{run}: {} events sent to {url}{dropped}\n",
                synced.sent
            ));
        }
    }
    if args.json {
        output::print(&format!("{}\n", json!(reports)));
    }
    Ok(ExitCode::SUCCESS)
}

/// The server that the spec of a run directory names.
fn server_of(dir: &Path) -> Option<String> {
    let text = std::fs::read_to_string(dir.join("spec.toml")).ok()?;
    match spec::parse(&text, "spec.toml", &[]).ok()?.track.mlflow {
        spec::Mlflow::Server(url) => Some(url),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tracking_uri_is_a_store() {
        let directory = |uri: &str| match named(uri) {
            Ok(Place::Directory(dir)) => dir.display().to_string(),
            other => panic!("{uri}: {other:?}"),
        };
        assert_eq!(directory("sqlite:///mlflow.db"), ".");
        assert_eq!(directory("sqlite:////data/mlflow.db"), "/data");
        assert!(matches!(named("http://host:5000"), Ok(Place::Server(_))));
        for uri in [
            "databricks",
            "file:///tmp/mlruns",
            "sqlite:///other.db",
            "http://a b",
            "postgresql://me:secret@host/db",
            "http://me:secret@host:port",
        ] {
            let Err(Failure::Spec(text)) = named(uri) else {
                panic!("{uri} is no store");
            };
            assert!(!text.contains("secret"), "{text}");
            assert!(text.contains("\nhint: "), "{text}");
        }
    }
}

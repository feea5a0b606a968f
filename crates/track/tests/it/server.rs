//! The crate mlflow_rs, which knows nothing of ours, reads a run from a real `mlflow server`, which serves a copy of the
//! embedded store. The crate reads no metrics, so those are asked for in plain HTTP.

use std::fs;
use std::process::Command;

use mlflow_rs::experiment::Experiment;
use mlflow_rs::run::Run;
use serde_json::{Value, json};

use crate::mlflow::Home;
use crate::served::Server;

/// Steps and values of a metric, in the order in which the server gives them.
fn history(server: &Server, run: &str, metric: &str) -> Vec<(u64, f64)> {
    let path = format!("/api/2.0/mlflow/metrics/get-history?run_id={run}&metric_key={metric}");
    let (status, body) = server.get(&path).unwrap();
    assert_eq!(status, 200, "{body}");
    let found: Value = serde_json::from_str(&body).unwrap();
    let points = found["metrics"].as_array().unwrap().iter();
    points
        .map(|point| {
            assert_eq!(point["key"], metric);
            let step = point["step"].as_u64().unwrap();
            (step, point["value"].as_f64().unwrap())
        })
        .collect()
}

/// Asks for the run of `home`, which was written between `begin` and `end`, and of which the server has a copy.
pub(crate) fn check(server: &Server, home: &Home, (begin, end): (u64, u64)) {
    let (root, id) = (server.url(), home.id());

    let experiment = Experiment::search_with_name(&root, "digits").unwrap();
    assert_eq!(experiment.get_experiment_id(), "1");
    assert_eq!(experiment.get_name(), "digits");
    assert_eq!(experiment.get_lifecycle_stage(), "active");
    let runs = home.root.path().join("store/mlruns/1");
    assert_eq!(
        experiment.get_artifact_location(),
        runs.display().to_string()
    );
    assert!((begin..=end).contains(&experiment.get_creating_time()));
    assert!((begin..=end).contains(&experiment.get_last_update_time()));

    let run = Run::get_run(&root, &id).unwrap();
    assert_eq!((run.get_run_uuid(), run.get_run_name()), (&*id, "x"));
    assert_eq!(run.get_experiment_id(), "1");
    assert_eq!(run.get_status(), "FINISHED");
    assert_eq!(run.get_lifecycle_stage(), "active");
    assert!((begin..=end).contains(&run.get_start_time()));
    let artifacts = runs.join(&id).join("artifacts");
    assert_eq!(run.get_artifact_uri(), artifacts.display().to_string());

    let params = run.get_parameters().iter();
    let params: Value = params.map(|p| (p.key.clone(), json!(p.value))).collect();
    assert_eq!(
        params,
        json!({"train.batch_size": "64", "data.train": "[\"a\", \"ä\"]"})
    );
    let tags = run.get_tags().iter();
    let tags: Value = tags.map(|t| (t.key.clone(), json!(t.value))).collect();
    assert_eq!(tags["mlflow.runName"], "x");
    assert_eq!(tags["mlflow.user"], run.get_user_id());
    assert_eq!(tags["mlflow.source.name"], "configs/x.toml");
    assert_eq!(tags["mlflow.source.type"], "LOCAL");
    let head = Command::new("git").args(["rev-parse", "HEAD"]).output();
    let head = head.ok().filter(|output| output.status.success());
    let commit = head.map(|output| String::from_utf8(output.stdout).unwrap());
    assert_eq!(
        tags["mlflow.source.git.commit"].as_str(),
        commit.as_deref().map(str::trim)
    );

    let files = run.list_artifacts("").unwrap();
    let mut names: Vec<&str> = files.iter().map(|file| &*file.path).collect();
    names.sort();
    assert_eq!(names, ["spec.toml", "summary.json"]);
    let told = fs::read_to_string(home.run().join("summary.json")).unwrap();
    assert_eq!(run.get_artifact_as_string("summary.json").unwrap(), told);
    let spec = run.get_artifact_as_string("spec.toml").unwrap();
    assert_eq!(spec, "name = \"x\"\n");

    for (metric, steps, value) in [
        ("train/loss", &[1, 2, 3][..], 1.25),
        ("train/top1", &[1, 2, 3], 0.5),
        ("train/lr", &[1, 2, 3], 1e-5),
        ("train/images_per_s", &[1, 2, 3], 100.0),
        ("eval/loss", &[3], 0.1203),
        ("eval/top1", &[3], 0.9611),
        ("eval/images", &[3], 359.0),
    ] {
        let expected: Vec<_> = steps.iter().map(|&step| (step, value)).collect();
        assert_eq!(history(server, &id, metric), expected, "{metric}");
    }
}

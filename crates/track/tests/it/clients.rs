//! The real MLflow and the real TensorBoard read what was written.

use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};
use std::{env, fs};

use serde_json::{Value, json};
use track::{Config, GraphNode, Resume, StepMetrics, Terminal, Trackers};

use crate::mlflow::Home;
use crate::{eval, step, summary};

/// The Python that has MLflow and TensorBoard, or nothing and a word about it.
pub(crate) fn python() -> Option<String> {
    let python = env::var("RUNNER_PYTHON").unwrap_or_default();
    if python.is_empty() {
        eprintln!(
            "SKIP: MLflow and TensorBoard read nothing, because RUNNER_PYTHON does not name a Python that has them; \
             see tests/clients.py for how to make one"
        );
        return None;
    }
    Some(python)
}

/// What the clients find, or nothing where there are none.
fn read(db: &Path, home: &Home) -> Option<Value> {
    let python = python()?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients.py");
    let mut command = Command::new(python);
    command.arg(script).arg(db).arg(home.id()).arg(home.run());
    let output = command.current_dir(home.root.path()).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

pub(crate) fn milliseconds() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    since.as_millis() as u64
}

/// What is expected of a run.
struct Expected<'a> {
    status: &'a str,
    /// Steps of training. From step 6 on the loss is not a number.
    train: &'a [u64],
    /// Steps of evaluations.
    evals: &'a [u64],
    artifacts: Value,
    begin: u64,
}

/// A metric's points: step and value.
fn points(steps: &[u64], value: impl Fn(u64) -> Value) -> Value {
    steps
        .iter()
        .map(|&step| json!([step, value(step)]))
        .collect()
}

/// Points without their times, which have to be in order, and between the beginning of the test and now.
fn history(found: &Value, begin: u64, units_per_second: f64) -> Value {
    let mut last = begin as f64 / 1000.0;
    let untimed = found.as_array().unwrap().iter().map(|point| {
        let time = point[2].as_f64().unwrap() / units_per_second;
        assert!(
            last <= time && time <= milliseconds() as f64 / 1000.0,
            "{time}"
        );
        last = time;
        json!([point[0], point[1]])
    });
    untimed.collect()
}

/// Compares all that the clients find with what was written.
fn check(found: &Value, home: &Home, expected: &Expected<'_>) {
    let loss = |step| if step < 6 { json!(1.25) } else { json!("NaN") };
    // TensorBoard has f32. In MLflow infinity is the largest number.
    let in_f32 = |value: f64| json!(f64::from(value as f32));
    let both = |steps, value: f64| {
        (
            points(steps, |_| json!(value)),
            points(steps, |_| in_f32(value)),
        )
    };
    let (train, evals) = (expected.train, expected.evals);
    let mut metrics = vec![
        ("train/loss", (points(train, loss), points(train, loss))),
        ("train/top1", both(train, 0.5)),
        ("train/lr", both(train, 1e-5)),
        (
            "train/images_per_s",
            (
                points(train, |_| json!(f64::MAX)),
                points(train, |_| json!("Infinity")),
            ),
        ),
        ("train/input_wait_fraction", both(train, 0.0)),
    ];
    if !evals.is_empty() {
        metrics.extend([
            ("eval/loss", both(evals, 0.1203)),
            ("eval/top1", both(evals, 0.9611)),
            ("eval/top5", both(evals, 1.0)),
            ("eval/images", both(evals, 359.0)),
        ]);
    }
    let (mlflow, events) = (&found["mlflow"], &found["tensorboard"]);
    for metrics_found in [&mlflow["history"], &mlflow["latest"], events] {
        assert_eq!(metrics_found.as_object().unwrap().len(), metrics.len());
    }
    for (name, (in_mlflow, in_events)) in metrics {
        let latest = in_mlflow.as_array().unwrap().last().unwrap();
        assert_eq!(mlflow["latest"][name], latest[1], "{name}");
        let history_found = history(&mlflow["history"][name], expected.begin, 1000.0);
        assert_eq!(history_found, in_mlflow, "{name}");
        assert_eq!(
            history(&events[name], expected.begin, 1.0),
            in_events,
            "{name}"
        );
    }

    let id = home.id();
    assert_eq!(
        mlflow["experiment"],
        json!({"id": "1", "name": "digits", "stage": "active"})
    );
    assert_eq!(mlflow["runs"], json!([id]));
    let run = &mlflow["run"];
    assert_eq!(run["name"], "x");
    assert_eq!(run["stage"], "active");
    assert_eq!(run["status"], expected.status);
    let start = run["start_time"].as_u64().unwrap();
    assert!((expected.begin..=milliseconds()).contains(&start));
    match expected.status {
        "RUNNING" => assert_eq!(run["end_time"], Value::Null),
        _ => assert!((start..=milliseconds()).contains(&run["end_time"].as_u64().unwrap())),
    }
    let uri = home
        .root
        .path()
        .join(format!("store/mlruns/1/{id}/artifacts"));
    assert_eq!(run["artifact_uri"], uri.display().to_string());
    assert_eq!(mlflow["artifacts"], expected.artifacts);
    assert_eq!(
        mlflow["params"],
        json!({"train.batch_size": "64", "data.train": "[\"a\", \"ä\"]", "long": "ä".repeat(6000)})
    );

    let tags = &mlflow["tags"];
    assert_eq!(tags["mlflow.runName"], "x");
    assert_eq!(tags["mlflow.user"], run["user"]);
    assert_eq!(tags["mlflow.source.name"], "configs/x.toml");
    assert_eq!(tags["mlflow.source.type"], "LOCAL");
    let head = Command::new("git").args(["rev-parse", "HEAD"]).output();
    let head = head.ok().filter(|output| output.status.success());
    let commit = head.map(|output| String::from_utf8(output.stdout).unwrap());
    assert_eq!(
        tags["mlflow.source.git.commit"].as_str(),
        commit.as_deref().map(str::trim)
    );
}

/// MLflow migrates the file while a run writes to it, and again reads it after a resume.
#[test]
fn mlflow_and_tensorboard_read_everything_back() {
    let begin = milliseconds();
    let mut home = Home::new();
    let params = &mut home.config.mlflow.as_mut().unwrap().params;
    params.insert("long".into(), "ä".repeat(7000));
    let numbers = |number: u64| StepMetrics {
        images_per_s: f64::INFINITY,
        loss: if number < 6 { 1.25 } else { f64::NAN },
        ..step(number)
    };
    let mut trackers = home.open(None);
    for number in 1..=5 {
        trackers.step(&numbers(number));
    }
    let resume = Resume {
        step: 5,
        is_evaluated: false,
        metrics_bytes: trackers.sync(),
    };
    let spec = json!({"spec.toml": "name = \"x\"\n"});
    let mut expected = Expected {
        status: "RUNNING",
        train: &[1, 2, 3, 4, 5],
        evals: &[],
        artifacts: spec.clone(),
        begin,
    };

    // A copy, as somebody might look at who does not want the file migrated.
    let copy = home.root.path().join("copy.db");
    let into = copy.to_str().unwrap();
    home.db().execute("VACUUM INTO ?1", [into]).unwrap();
    let Some(found) = read(&copy, &home) else {
        return;
    };
    eprintln!("read by {}", found["versions"]);
    check(&found, &home, &expected);

    // The file itself, with the run in the middle of it.
    let revision = || {
        let query = "SELECT version_num FROM alembic_version";
        home.db()
            .query_row(query, [], |row| row.get::<_, String>(0))
            .unwrap()
    };
    let before = revision();
    check(&read(&home.path(), &home).unwrap(), &home, &expected);
    assert_ne!(revision(), before, "it was to be migrated");
    trackers.eval(&eval(5));
    for number in 6..=9 {
        trackers.step(&numbers(number));
    }
    drop(trackers);
    expected.status = "FAILED";
    expected.train = &[1, 2, 3, 4, 5, 6, 7, 8, 9];
    expected.evals = &[5];
    check(&read(&home.path(), &home).unwrap(), &home, &expected);

    let mut trackers = home.open(Some(resume));
    trackers.eval(&eval(5));
    for number in 6..=7 {
        trackers.step(&numbers(number));
    }
    trackers.finish(&summary());
    assert_eq!(trackers.failures(), 0);
    let told = fs::read_to_string(home.run().join("summary.json")).unwrap();
    expected.status = "FINISHED";
    expected.train = &[1, 2, 3, 4, 5, 6, 7];
    expected.artifacts = spec;
    expected.artifacts["summary.json"] = told.into();
    check(&read(&home.path(), &home).unwrap(), &home, &expected);

    // A new run in a store that MLflow has migrated.
    fs::remove_file(home.run().join("mlflow-run")).unwrap();
    home.config.mlflow.as_mut().unwrap().experiment = "later".into();
    let mut trackers = home.open(None);
    trackers.step(&numbers(1));
    trackers.finish(&summary());
    assert_eq!(trackers.failures(), 0);
    let found = read(&home.path(), &home).unwrap();
    assert_eq!(found["mlflow"]["experiment"]["name"], "later");
    assert_eq!(found["mlflow"]["runs"], json!([home.id()]));
    assert_eq!(found["mlflow"]["run"]["status"], "FINISHED");
}

/// TensorBoard's own server, asked as its page asks it.
fn tensorboard(root: &Path) -> Option<Value> {
    let python = python()?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/boards.py");
    let output = Command::new(python).arg(script).arg(root).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
fn tensorboard_lists_what_a_run_tells_it() {
    let root = tempfile::tempdir().unwrap();
    let config = Config {
        tensorboard: true,
        ..Config::default()
    };
    let mut trackers = Trackers::open(&root.path().join("x"), None, &config, Terminal::Quiet);
    let params = [
        ("schedule.base_lr", "0.1"),
        ("model.recipe", "tpu2018"),
        ("data.flip", "true"),
    ];
    let params = params.map(|(k, v)| (k.to_string(), v.to_string())).into();
    let node = |name: &str, op: &str, inputs: &[&str]| GraphNode {
        name: name.into(),
        op: op.into(),
        inputs: inputs.iter().map(|input| input.to_string()).collect(),
        shape: vec![32, 32, 3],
    };
    let graph = [
        node("input", "Placeholder", &[]),
        node("layer1.0.conv1", "Conv2D", &["input"]),
        node("layer1.0.add", "Add", &["layer1.0.conv1", "input"]),
    ];
    trackers.describe(&params, "name = \"x\"\n", &graph);
    let pixels: Vec<u8> = (0..2 * 32 * 32 * 3u32).map(|i| i as u8).collect();
    trackers.images(0, 32, &pixels);
    let values: Vec<f32> = (0..1000u16).map(f32::from).collect();
    for number in 1..=3 {
        trackers.step(&step(number));
        trackers.tensors(
            number,
            [("weights/conv1.weight".to_string(), &values[..])].into_iter(),
        );
    }
    trackers.eval(&eval(3));
    trackers.finish(&summary());
    assert_eq!(trackers.failures(), 0);
    // A file that was torn by a kill loads all the same.
    let torn = root.path().join("torn");
    fs::create_dir(&torn).unwrap();
    let file = fs::read_dir(root.path().join("x")).unwrap().flatten();
    let file = file
        .map(|entry| entry.path())
        .find(|path| path.display().to_string().contains("tfevents"))
        .unwrap();
    let bytes = fs::read(&file).unwrap();
    fs::write(
        torn.join(file.file_name().unwrap()),
        &bytes[..bytes.len() - 300],
    )
    .unwrap();

    let Some(found) = tensorboard(root.path()) else {
        return;
    };
    assert_eq!(found["runs"], json!(["torn", "x"]));
    let scalars: Vec<&str> = found["scalars"]["x"]
        .as_array()
        .unwrap()
        .iter()
        .map(|tag| tag.as_str().unwrap())
        .collect();
    assert!(
        scalars.contains(&"train/loss") && scalars.contains(&"eval/top1"),
        "{scalars:?}"
    );
    assert_eq!(found["histograms"]["x"], json!(["weights/conv1.weight"]));
    let buckets = found["buckets"]["weights/conv1.weight"].as_array().unwrap();
    assert_eq!(buckets.len(), 3, "one for each step");
    let counts = buckets[0][2].as_array().unwrap().iter();
    let count: f64 = counts.map(|bucket| bucket[2].as_f64().unwrap()).sum();
    assert_eq!(count, 1000.0);
    assert_eq!(found["images"]["x"], json!(["train/images"]));
    let png = b"\x89PNG\r\n\x1a\n".map(u64::from);
    assert!(
        found["image"]
            .as_array()
            .unwrap()
            .contains(&json!([32, 32, png])),
        "{}",
        found["image"]
    );
    assert_eq!(found["text"]["x"], json!(["eval/results", "spec"]));
    let words = found["words"]["x"].to_string();
    assert!(words.contains("name = "), "{words}");
    let graph = found["graph"]["x"].as_str().unwrap();
    assert!(
        graph.contains("layer1/0/conv1") && graph.contains("Conv2D"),
        "{graph}"
    );
    let groups = found["hparams"].as_array().unwrap();
    let params = groups
        .iter()
        .find(|group| group["sessions"][0]["name"] == "x")
        .unwrap();
    assert_eq!(params["hparams"]["schedule.base_lr"], 0.1);
    assert_eq!(params["hparams"]["model.recipe"], "tpu2018");
    assert_eq!(params["hparams"]["data.flip"], true);
    assert_eq!(params["sessions"][0]["status"], "STATUS_SUCCESS");
    let torn = found["scalars"]["torn"].as_array().unwrap();
    assert!(torn.contains(&json!("train/loss")));
}

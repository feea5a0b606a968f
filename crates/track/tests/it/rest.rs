//! Runs on a real MLflow server, as MLflow's own client reads them back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;
use std::{env, fs};

use serde_json::{Value, json};
use track::{Access, Config, Dataset, Mlflow, Place, Resume, StepMetrics, Terminal, Trackers};

use crate::clients::{milliseconds, python};
use crate::served::{Server, free_port};
use crate::{eval, log, metrics, step, summary};

/// A place for a server's database and some runs.
struct Home {
    root: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        Self {
            root: tempfile::tempdir().unwrap(),
        }
    }

    fn db(&self) -> PathBuf {
        self.root.path().join("server.db")
    }

    fn dir(&self, run: &str) -> PathBuf {
        self.root.path().join("runs").join(run)
    }

    /// Of a run in an experiment of its own name.
    fn config(&self, run: &str, access: Access) -> Config {
        let dir = self.dir(run);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("spec.toml"), "name = \"x\"\n").unwrap();
        Config {
            mlflow: Some(Mlflow {
                place: Place::Server(Box::new(access)),
                experiment: run.into(),
                run: run.into(),
                source: "configs/x.toml".into(),
                params: [("train.batch_size".to_string(), "64".to_string())].into(),
                tags: BTreeMap::new(),
                datasets: vec![],
                parent: None,
                artifacts: vec![dir.join("spec.toml")],
            }),
            tensorboard: false,
            system: false,
        }
    }

    fn open(&self, run: &str, config: &Config, resume: Option<Resume>) -> Trackers {
        Trackers::open(&self.dir(run), resume, config, Terminal::Quiet)
    }
}

/// A server that is tried but once more when a run ends.
fn access(url: &str) -> Access {
    let once = |name: &str| (name == "MLFLOW_HTTP_REQUEST_MAX_RETRIES").then(|| "1".to_string());
    Access::new(url, once).unwrap()
}

fn client(python: &str, script: &str, args: &[&str], variables: &[(&str, &str)]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests")
        .join(script);
    let mut command = Command::new(python);
    command
        .arg(script)
        .args(args)
        .envs(variables.iter().copied());
    command.output().unwrap()
}

/// The runs of experiments, the oldest first.
fn read_with(python: &str, url: &str, names: &[&str], variables: &[(&str, &str)]) -> Value {
    let args: Vec<&str> = [&[url], names].concat();
    let output = client(python, "served.py", &args, variables);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn read(python: &str, url: &str, names: &[&str]) -> Value {
    read_with(python, url, names, &[])
}

/// The only run of an experiment.
fn only<'a>(found: &'a Value, experiment: &str) -> &'a Value {
    let runs = found[experiment].as_array().unwrap();
    assert_eq!(runs.len(), 1, "{experiment}");
    &runs[0]
}

/// Steps of a metric, in the order of the server.
fn steps(run: &Value, metric: &str) -> Vec<u64> {
    let points = run["history"][metric].as_array().unwrap();
    points.iter().map(|p| p[0].as_u64().unwrap()).collect()
}

fn until(mut is_so: impl FnMut() -> bool) {
    for _ in 0..600 {
        if is_so() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("it did not become so in a minute");
}

/// How much of the journal a server has.
fn sent(dir: &Path) -> u64 {
    let text = fs::read_to_string(dir.join("mlflow.sent")).unwrap_or_default();
    let all: Value = serde_json::from_str(&text).unwrap_or_default();
    let mut servers = all.as_object().into_iter().flat_map(|all| all.values());
    servers
        .next()
        .map_or(0, |sent| sent["bytes"].as_u64().unwrap())
}

fn journal(dir: &Path) -> u64 {
    fs::metadata(dir.join("mlflow.journal")).unwrap().len()
}

/// One server for all of it: starting one takes longer than all that is asked of it. Its database is a copy of an
/// embedded store, as when somebody moves to a server.
#[test]
fn a_real_server_knows_what_it_was_told() {
    let home = Home::new();
    let port = free_port();
    let url = format!("http://127.0.0.1:{port}");
    without_a_server(&home, &url);
    let Some(python) = python() else {
        return;
    };
    let begin = milliseconds();
    let embedded = embedded();
    let end = milliseconds();
    let into = home.db();
    let into = into.to_str().unwrap();
    embedded.db().execute("VACUUM INTO ?1", [into]).unwrap();
    let before = fs::read(embedded.path()).unwrap();

    let server = Server::start_at(&python, &home.db(), port, &[]);
    sent_later(&home, &url);
    let (large, server) = large(&home, &python, port, server);
    nested(&home, &url);
    deleted(&home, &server);
    certificates(&home, &python, &url);

    let names = [
        "later", "large", "nested", "deleted", "gone", "both", "insecure", "digits",
    ];
    let found = read(&python, &url, &names);
    let later = only(&found, "later");
    assert!(steps(later, "train/loss").into_iter().eq(1..=40));
    assert_eq!(later["status"], "FINISHED");
    check_large(&home, only(&found, "large"));
    check_nested(&found);
    for name in ["deleted", "gone"] {
        let run = only(&found, name);
        assert!(steps(run, "train/loss").into_iter().eq(1..=9), "{name}");
        assert_eq!(run["status"], "FINISHED");
        assert_eq!(run["tags"]["mlflow.note.content"], "| words |");
        let files = run["artifacts"].as_object().unwrap();
        let files: Vec<&String> = files.keys().collect();
        assert_eq!(files, ["spec.toml", "summary.json"]);
    }
    for name in ["both", "insecure"] {
        assert_eq!(only(&found, name)["status"], "FINISHED");
    }
    for name in ["stranger", "nobody"] {
        let path = format!("/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}");
        assert_eq!(server.get(&path).unwrap().0, 404, "{name} came in");
    }
    // What the embedded store told is served as it was told.
    let run = only(&found, "digits");
    assert_eq!(run["id"], embedded.id());
    assert_eq!(steps(run, "train/loss"), [1, 2, 3]);
    assert_eq!(run["latest"]["eval/top1"], 0.9611);
    assert_eq!(run["tags"]["mlflow.note.content"], "| words |");
    let files = run["artifacts"].as_object().unwrap();
    assert!(files.contains_key("spec.toml") && files.contains_key("summary.json"));

    // All of it again, as after a lost note of how far it was: nothing is there twice.
    fs::remove_file(home.dir("large").join("mlflow.sent")).unwrap();
    let said = |said: &str| eprintln!("{said}");
    let synced = track::sync(&home.dir("large"), &large, said).unwrap();
    assert_eq!(synced.dropped, 0);
    assert!(synced.sent > 2000, "{synced:?}");
    let again = read(&python, &url, &["large"]);
    assert_eq!(again["large"], found["large"]);
    #[cfg(feature = "mlflow_rs")]
    {
        let id = only(&found, "large")["id"].as_str().unwrap();
        let theirs = mlflow_rs::run::Run::get_run(&url, id).unwrap();
        assert_eq!(theirs.get_status(), "FINISHED");
        assert_eq!(theirs.get_parameters().len(), 201);
        crate::server::check(&server, &embedded, (begin, end));
    }
    drop(server);
    assert!(begin <= end);
    assert_eq!(
        fs::read(embedded.path()).unwrap(),
        before,
        "only the copy was migrated"
    );
}

/// A run in an embedded store.
fn embedded() -> crate::mlflow::Home {
    let home = crate::mlflow::Home::new();
    let mut trackers = home.open(None);
    (1..=3).for_each(|number| trackers.step(&step(number)));
    trackers.eval(&eval(3));
    trackers.tag("mlflow.note.content", "| words |");
    trackers.finish(&summary());
    assert_eq!(trackers.failures(), 0);
    home
}

/// Ten thousand points, 200 parameters, 50 MB, a dataset, a model; the server is killed in the middle.
fn large(home: &Home, python: &str, port: u16, server: Server) -> (Access, Server) {
    // As many tries as MLflow's client makes.
    let access = Access::new(&server.url(), |_| None).unwrap();
    let mut config = home.config("large", access.clone());
    let dir = home.dir("large");
    let large: Vec<u8> = (0..50_000_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    fs::write(dir.join("large.bin"), &large).unwrap();
    fs::create_dir(dir.join("checkpoints")).unwrap();
    let checkpoint = dir.join("checkpoints/step-0000002000.safetensors");
    fs::write(&checkpoint, "tensors").unwrap();
    let mlflow = config.mlflow.as_mut().unwrap();
    mlflow.artifacts.push(dir.join("large.bin"));
    let params = (0..200).map(|i| (format!("p.{i:03}"), i.to_string()));
    mlflow.params = params
        .chain([("long (ä)".to_string(), "ä".repeat(7000))])
        .collect();
    mlflow.datasets = vec![Dataset {
        name: "data/digits/train-*".into(),
        digest: "0123456789abcdef".into(),
        context: "training".into(),
        source: "data/digits/train-*".into(),
        examples: 1438,
    }];
    let numbers = |number: u64| StepMetrics {
        loss: match number {
            7 => f64::NAN,
            8 => f64::INFINITY,
            _ => 1.0 / number as f64,
        },
        ..step(number)
    };

    let mut trackers = home.open("large", &config, None);
    (1..=1000).for_each(|number| trackers.step(&numbers(number)));
    until(|| sent(&dir) == journal(&dir));
    drop(server);
    (1001..=1500).for_each(|number| trackers.step(&numbers(number)));
    // It notices, and the run goes on.
    until(|| {
        trackers.sync();
        log(&dir).contains("waits in")
    });
    assert!(sent(&dir) < journal(&dir));
    let server = Server::start_at(python, &home.db(), port, &[]);
    (1501..=2000).for_each(|number| trackers.step(&numbers(number)));
    trackers.eval(&eval(2000));
    trackers.model(&checkpoint, "digits-model", 2000);
    trackers.finish(&summary());
    assert_eq!(trackers.failures(), 0, "{}", log(&dir));
    assert_eq!(sent(&dir), journal(&dir));
    let said = log(&dir);
    assert!(said.contains("digits-model version 1"), "{said}");

    (access, server)
}

fn check_large(home: &Home, run: &Value) {
    let dir = home.dir("large");
    assert_eq!(
        (&run["name"], &run["status"]),
        (&"large".into(), &"FINISHED".into())
    );
    let history = run["history"].as_object().unwrap();
    let points: usize = history.values().map(|p| p.as_array().unwrap().len()).sum();
    assert_eq!(points, 10_000 + 4);
    for metric in ["train/loss", "train/top1", "train/lr", "train/images_per_s"] {
        let mut found = steps(run, metric);
        found.sort_unstable();
        assert!(found.into_iter().eq(1..=2000), "{metric}");
    }
    let loss = run["history"]["train/loss"].as_array().unwrap();
    let at = |step: u64| &loss.iter().find(|p| p[0] == step).unwrap()[1];
    assert_eq!(*at(7), "NaN");
    assert_eq!(*at(8), f64::MAX, "as MLflow stores infinity");
    assert_eq!(*at(3), 1.0 / 3.0);
    assert_eq!(run["latest"]["train/loss"], 1.0 / 2000.0);
    assert_eq!(run["latest"]["eval/top1"], 0.9611);
    let params = run["params"].as_object().unwrap();
    assert_eq!(params.len(), 201);
    assert_eq!(params["p.199"], "199");
    assert_eq!(params["long _ä_"], "ä".repeat(6000));
    let tags = &run["tags"];
    assert_eq!(tags["mlflow.source.name"], "configs/x.toml");
    let head = Command::new("git").args(["rev-parse", "HEAD"]).output();
    if let Some(head) = head.ok().filter(|o| o.status.success()) {
        let commit = String::from_utf8(head.stdout).unwrap();
        assert_eq!(tags["mlflow.source.git.commit"], commit.trim());
        assert!(tags["mlflow.source.git.dirty"].is_string());
    }
    let key = fs::read_to_string(dir.join("mlflow-run")).unwrap();
    assert_eq!(tags["runner.key"], key.trim());
    let dataset = &run["datasets"][0];
    assert_eq!(dataset["digest"], "0123456789abcdef");
    assert_eq!(dataset["tags"]["mlflow.data.context"], "training");
    assert_eq!(dataset["profile"], "{\"num_rows\":1438}");
    let artifacts = run["artifacts"].as_object().unwrap();
    let names: Vec<&String> = artifacts.keys().collect();
    assert_eq!(names, ["large.bin", "spec.toml", "summary.json"]);
    assert_eq!(artifacts["large.bin"]["bytes"], 50_000_000);
    assert_eq!(
        artifacts["large.bin"]["sha256"],
        // python -c "import hashlib, numpy; i = numpy.arange(50_000_000, dtype=numpy.uint32);
        //   print(hashlib.sha256(((i * numpy.uint32(2654435761)) >> 24).astype('u1').tobytes()).hexdigest())"
        LARGE_SHA256
    );
    let models = run["models"].as_array().unwrap();
    assert_eq!(models.len(), 1);
    let model = &models[0];
    assert_eq!(model["name"], "digits-model");
    assert_eq!(model["status"], "READY");
    assert_eq!(model["run_id"], run["id"]);
    assert_eq!(
        model["files"],
        json!(["MLmodel", "step-0000002000.safetensors"])
    );
    assert_eq!(model["checkpoint"]["bytes"], 7);
    assert_eq!(
        model["versions"],
        json!([{"name": "digits-model", "version": "1", "status": "READY"}])
    );
}

/// See [`large`].
const LARGE_SHA256: &str = "b098ef6c2af308889552ec207d6a067a0aa6021d37c3213b6bb9ae0f6c883e06";

/// A run that is killed and resumed while there is no server at all.
fn without_a_server(home: &Home, url: &str) {
    let config = home.config("later", access(url));
    let dir = home.dir("later");
    let mut trackers = home.open("later", &config, None);
    (1..=30).for_each(|number| trackers.step(&step(number)));
    trackers.sync();
    // Killed, and resumed at a checkpoint.
    drop(trackers);
    let resume = Resume {
        step: 20,
        is_evaluated: false,
        metrics_bytes: metrics(&dir).len() as u64,
    };
    let mut trackers = home.open("later", &config, Some(resume));
    (21..=40).for_each(|number| trackers.step(&step(number)));
    trackers.finish(&summary());
    assert_eq!(trackers.failures(), 1);
    let said = log(&dir);
    let hint = format!(
        "hint: when the server is back: runner track sync {}",
        dir.display()
    );
    assert!(said.contains(&hint), "{said}");
    assert!(
        said.contains("1 writes of the trackers failed, first "),
        "{said}"
    );

    let mut told = vec![];
    let error = track::sync(&dir, &access(url), |said| told.push(said.to_string())).unwrap_err();
    assert!(error.contains("Connection refused"), "{error}");
    assert!(error.contains("events wait in "), "{error}");
    assert_eq!(told.len(), 1, "{told:?}");
}

fn sent_later(home: &Home, url: &str) {
    let dir = home.dir("later");
    let synced = track::sync(&dir, &access(url), |said| panic!("{said}")).unwrap();
    // Two starts with their files, 40 steps, the files and statuses of two ends but one file.
    assert_eq!((synced.sent, synced.dropped), (40 + 4 + 3, 0));
    let synced = track::sync(&dir, &access(url), |said| panic!("{said}")).unwrap();
    assert_eq!((synced.sent, synced.dropped), (0, 0));
}

/// Whichever of a run and its parent comes first.
fn nested(home: &Home, url: &str) {
    let key = |run: &str| {
        let key = fs::read_to_string(home.dir(run).join("mlflow-run")).unwrap();
        key.trim().to_string()
    };
    let finish = |run: &str, parent: Option<String>| {
        let mut config = home.config(run, access(url));
        let mlflow = config.mlflow.as_mut().unwrap();
        (mlflow.parent, mlflow.experiment) = (parent, "nested".into());
        let mut trackers = home.open(run, &config, None);
        trackers.step(&step(1));
        trackers.finish(&summary());
        assert_eq!(trackers.failures(), 0);
    };
    // A parent that the server does not know yet, by the key that it will have.
    let early = "0123456789abcdef0123456789abcdef".to_string();
    finish("early", Some(early.clone()));
    fs::create_dir_all(home.dir("parent")).unwrap();
    fs::write(home.dir("parent").join("mlflow-run"), &early).unwrap();
    finish("parent", None);
    finish("late", Some(key("parent")));
}

fn check_nested(found: &Value) {
    let runs = found["nested"].as_array().unwrap();
    let find = |name: &str| runs.iter().find(|run| run["name"] == name).unwrap();
    let id = &find("parent")["id"];
    assert_eq!(&find("early")["tags"]["mlflow.parentRunId"], id);
    assert_eq!(&find("late")["tags"]["mlflow.parentRunId"], id);
    assert_eq!(find("parent")["tags"]["mlflow.parentRunId"], Value::Null);
}

/// Runs that somebody deletes on the server while they go on: nothing is lost, and the run goes on.
fn deleted(home: &Home, server: &Server) {
    let begin = |name: &str| {
        let config = home.config(name, access(&server.url()));
        let mut trackers = home.open(name, &config, None);
        (1..=4).for_each(|number| trackers.step(&step(number)));
        until(|| sent(&home.dir(name)) == journal(&home.dir(name)));
        trackers
    };
    let id = |name: &str| {
        let text = fs::read_to_string(home.dir(name).join("mlflow.sent")).unwrap();
        let all: Value = serde_json::from_str(&text).unwrap();
        all[server.url()]["run"].as_str().unwrap().to_string()
    };
    let change = |what: &str, id: &str| {
        let body = json!({ "run_id": id }).to_string();
        let path = format!("/api/2.0/mlflow/runs/{what}");
        assert_eq!(server.ask("POST", &path, &body).unwrap().0, 200);
    };
    let end = |mut trackers: Trackers| {
        (5..=9).for_each(|number| trackers.step(&step(number)));
        trackers.tag("mlflow.note.content", "| words |");
        trackers.finish(&summary());
        assert_eq!(trackers.failures(), 1);
    };
    let sync = |name: &str| track::sync(&home.dir(name), &access(&server.url()), |_| {});

    let trackers = begin("deleted");
    let run = id("deleted");
    change("delete", &run);
    end(trackers);
    let said = log(&home.dir("deleted"));
    let hint = format!("hint: `mlflow runs restore --run-id {run}`");
    assert!(said.contains(&hint), "{said}");
    assert!(sync("deleted").unwrap_err().contains("is deleted there"));
    change("restore", &run);
    // Five steps, the words, the summary and the status.
    let synced = sync("deleted").unwrap();
    assert_eq!((synced.sent, synced.dropped), (8, 0));

    // One that the server has never had, as after its database was lost.
    let trackers = begin("gone");
    let run = id("gone");
    change("delete", &run);
    let note = home.dir("gone").join("mlflow.sent");
    let other = fs::read_to_string(&note).unwrap();
    end(trackers);
    let unknown = other.replace(&run, &"0".repeat(32));
    fs::write(&note, unknown).unwrap();
    let error = sync("gone").unwrap_err();
    assert!(error.contains("is gone there\nhint: remove "), "{error}");
    fs::remove_file(&note).unwrap();
    change("restore", &run);
    let synced = sync("gone").unwrap();
    assert_eq!((synced.sent, synced.dropped), (14, 0));
}

/// A relay of our own in front of the server, which wants to see a certificate and shows one of its own authority.
fn certificates(home: &Home, python: &str, url: &str) {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;
    let (_, port) = url.rsplit_once(':').unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls.py");
    let mut command = Command::new(python);
    command.arg(script).arg(home.root.path()).arg(port);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut relay = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(relay.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    let url = format!("https://127.0.0.1:{}", line.trim());
    let path = |name: &str| home.root.path().join(name).display().to_string();
    let finish = |run: &str, variables: &[(&str, String)]| {
        let once = [("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0".to_string())];
        let variables: Vec<_> = variables.iter().cloned().chain(once).collect();
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name);
        let access = Access::new(&url, |name| find(name).map(|(_, v)| v.clone())).unwrap();
        let mut trackers = home.open(run, &home.config(run, access), None);
        trackers.step(&step(1));
        trackers.finish(&summary());
        (trackers.failures(), log(&home.dir(run)))
    };
    let authorities = ("MLFLOW_TRACKING_SERVER_CERT_PATH", path("ca.pem"));
    let certificate = ("MLFLOW_TRACKING_CLIENT_CERT_PATH", path("client.pem"));
    let insecure = ("MLFLOW_TRACKING_INSECURE_TLS", "true".to_string());
    assert_eq!(
        finish("both", &[authorities.clone(), certificate.clone()]).0,
        0
    );
    assert_eq!(finish("insecure", &[insecure, certificate.clone()]).0, 0);
    let (failures, said) = finish("stranger", &[certificate]);
    assert_eq!(failures, 1);
    assert!(
        said.contains("certificate"),
        "an authority that nobody knows: {said}"
    );
    assert_eq!(
        finish("nobody", &[authorities]).0,
        1,
        "it shows no certificate"
    );
    drop(relay.stdin.take());
    relay.wait().unwrap();
}

/// MLflow's own basic-auth app, which needs the package Flask-WTF.
#[test]
fn a_password_opens_the_server() {
    let Some(python) = python() else {
        return;
    };
    let has = Command::new(&python)
        .args(["-c", "import flask_wtf"])
        .output()
        .unwrap();
    if !has.status.success() {
        eprintln!(
            "SKIP: MLflow's basic-auth app does not start, because the Python of RUNNER_PYTHON has no Flask-WTF; \
             ci/requirements.txt names it"
        );
        return;
    }
    let home = Home::new();
    let config = home.root.path().join("auth.ini");
    let users = home.root.path().join("users.db");
    fs::write(
        &config,
        format!(
            "[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{}\nadmin_username = admin\n\
             admin_password = correct horse battery\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n",
            users.display()
        ),
    )
    .unwrap();
    let wrapper = home.root.path().join("python");
    fs::write(
        &wrapper,
        format!(
            "#!/bin/sh\nexport MLFLOW_AUTH_CONFIG_PATH='{}' MLFLOW_FLASK_SERVER_SECRET_KEY=x\nexec '{python}' \"$@\"\n",
            config.display()
        ),
    )
    .unwrap();
    Command::new("chmod")
        .arg("+x")
        .arg(&wrapper)
        .status()
        .unwrap();
    let server = Server::start(
        wrapper.to_str().unwrap(),
        &home.db(),
        &["--app-name", "basic-auth"],
    );
    let url = server.url();
    let variables = |password: &str| {
        let user = ("MLFLOW_TRACKING_USERNAME", "admin".to_string());
        [user, ("MLFLOW_TRACKING_PASSWORD", password.to_string())]
    };
    let access = |password: &str| {
        let variables = variables(password);
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name);
        Access::new(&url, |name| find(name).map(|(_, value)| value.clone())).unwrap()
    };
    let mut trackers = home.open("x", &home.config("x", access("wrong")), None);
    trackers.step(&step(1));
    trackers.finish(&summary());
    assert_eq!(trackers.failures(), 1);
    let said = log(&home.dir("x"));
    assert!(said.contains("401"), "{said}");
    assert!(
        said.contains("hint: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        "{said}"
    );
    assert!(!said.contains("wrong"), "no secrets: {said}");

    let right = "correct horse battery";
    track::sync(&home.dir("x"), &access(right), |said| panic!("{said}")).unwrap();
    let variables = variables(right);
    let variables: Vec<(&str, &str)> = variables.iter().map(|(k, v)| (*k, v.as_str())).collect();
    let runs = read_with(&python, &url, &["x"], &variables);
    let run = only(&runs, "x");
    assert_eq!(steps(run, "train/loss"), [1]);
    assert_eq!(run["status"], "FINISHED");
}

/// A machine that takes connections and answers as told by method, path and body; its URL.
fn fake(answer: impl Fn(&str, &str, &str) -> (u16, String) + Send + 'static) -> String {
    use std::io::{BufRead, BufReader, Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (mut lines, mut length) = (vec![], 0);
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                if line.trim().is_empty() {
                    break;
                }
                if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
                lines.push(line);
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let Some((method, path)) = lines.first().and_then(|line| line.split_once(' ')) else {
                continue;
            };
            let path = path.split(' ').next().unwrap();
            let (status, text) = answer(method, path, &String::from_utf8_lossy(&body));
            let text = format!(
                "HTTP/1.1 {status} Said\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}",
                text.len()
            );
            let _ = stream.write_all(text.as_bytes());
        }
    });
    url
}

/// Files that are not let in (403), or that break the server (500), wait; numbers and status do not.
#[test]
fn a_file_that_is_refused_holds_up_nothing() {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex};
    let heard = Arc::new(Mutex::new(vec![]));
    let is_open = Arc::new(AtomicBool::new(false));
    let (told, opened) = (Arc::clone(&heard), Arc::clone(&is_open));
    let url = fake(move |method, path, body| {
        let is_refused = method == "PUT" && !opened.load(Ordering::Relaxed);
        if !is_refused {
            let mut told = told.lock().unwrap();
            told.push(format!("{method} {path} {body}"));
        }
        let run = json!({
            "info": { "run_id": "r", "experiment_id": "1", "artifact_uri": "mlflow-artifacts:/1/r" }
        });
        match path.rsplit('/').next().unwrap() {
            "spec.toml" if is_refused => (403, "not for you".into()),
            "summary.json" if is_refused => (500, "no room".into()),
            "search" => (200, json!({ "runs": [] }).to_string()),
            "create" => (200, json!({ "run": run }).to_string()),
            name if name.starts_with("get?") => (200, json!({ "run": run }).to_string()),
            name if name.starts_with("get-by-name") => {
                let experiment = json!({ "experiment_id": "1", "lifecycle_stage": "active" });
                (200, json!({ "experiment": experiment }).to_string())
            }
            _ => (200, "{}".into()),
        }
    });
    let home = Home::new();
    let mut trackers = home.open("x", &home.config("x", access(&url)), None);
    trackers.step(&step(1));
    trackers.finish(&summary());
    assert_eq!(trackers.failures(), 1);
    let said = log(&home.dir("x"));
    assert!(
        said.contains("a file is not taken, and is tried again later"),
        "{said}"
    );
    assert!(said.contains("2 events wait in "), "{said}");
    let has = |what: &str| {
        let heard = heard.lock().unwrap();
        heard
            .iter()
            .filter(|request| request.contains(what))
            .count()
    };
    assert_eq!(has("\"train/loss\""), 1, "the numbers are there");
    assert_eq!(has("\"FINISHED\""), 1, "and the end");
    assert_eq!(has("PUT "), 0);

    let error = track::sync(&home.dir("x"), &access(&url), |_| {}).unwrap_err();
    assert!(error.contains("2 events wait in "), "{error}");
    is_open.store(true, Ordering::Relaxed);
    let synced = track::sync(&home.dir("x"), &access(&url), |_| {}).unwrap();
    assert_eq!((synced.sent, synced.dropped), (2, 0));
    assert_eq!(
        has("PUT /api/2.0/mlflow-artifacts/artifacts/1/r/spec.toml"),
        1
    );
    assert_eq!(
        has("PUT /api/2.0/mlflow-artifacts/artifacts/1/r/summary.json"),
        1
    );
    assert_eq!(has("\"train/loss\""), 1, "nothing is sent again");
}

#[test]
fn what_is_no_mlflow_server_is_told() {
    let url = fake(|_, _, _| (404, "<html>hello</html>".into()));
    let home = Home::new();
    let mut trackers = home.open("x", &home.config("x", access(&url)), None);
    trackers.step(&step(1));
    trackers.finish(&summary());
    assert_eq!(trackers.failures(), 1);
    let said = log(&home.dir("x"));
    let hint =
        format!("404 Not Found: <html>hello</html>\nhint: is {url} the root of an MLflow server?");
    assert!(said.contains(&hint), "{said}");
}

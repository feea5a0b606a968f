//! Runs on a real MLflow server, as MLflow's own client reads them back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;
use std::{env, fs};

use serde_json::{Value, json};
use track::{Access, Config, Dataset, Mlflow, Place, Resume, StepMetrics, Terminal, Trackers};

use crate::clients::python;
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

    fn config(&self, run: &str, access: Access) -> Config {
        let dir = self.dir(run);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("spec.toml"), "name = \"x\"\n").unwrap();
        Config {
            mlflow: Some(Mlflow {
                place: Place::Server(Box::new(access)),
                experiment: "digits".into(),
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

/// The runs of the experiment, the oldest first.
fn read_with(python: &str, url: &str, variables: &[(&str, &str)]) -> Vec<Value> {
    let output = client(python, "served.py", &[url, "digits"], variables);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn read(python: &str, url: &str) -> Vec<Value> {
    read_with(python, url, &[])
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

/// Ten thousand points, 200 parameters, 50 MB, a dataset, a model; the server is killed in the middle.
#[test]
fn a_large_run_outlives_its_server() {
    let Some(python) = python() else {
        return;
    };
    let home = Home::new();
    let port = free_port();
    let server = Server::start_at(&python, &home.db(), port, &[]);
    let url = server.url();
    // As many tries as MLflow's client makes.
    let mut config = home.config("x", Access::new(&url, |_| None).unwrap());
    let dir = home.dir("x");
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

    let mut trackers = home.open("x", &config, None);
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
    let server = Server::start_at(&python, &home.db(), port, &[]);
    (1501..=2000).for_each(|number| trackers.step(&numbers(number)));
    trackers.eval(&eval(2000));
    trackers.model(&checkpoint, "digits-model", 2000);
    trackers.finish(&summary());
    assert_eq!(trackers.failures(), 0, "{}", log(&dir));
    assert_eq!(sent(&dir), journal(&dir));
    let said = log(&dir);
    assert!(said.contains("digits-model version 1"), "{said}");

    let runs = read(&python, &url);
    assert_eq!(runs.len(), 1);
    let run = &runs[0];
    assert_eq!(
        (&run["name"], &run["status"]),
        (&"x".into(), &"FINISHED".into())
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

    // All of it again, as after a lost note of how far it was: nothing is there twice.
    fs::remove_file(dir.join("mlflow.sent")).unwrap();
    let Some(Mlflow {
        place: Place::Server(access),
        ..
    }) = &config.mlflow
    else {
        unreachable!("it is a server")
    };
    let synced = track::sync(&dir, access, |said| eprintln!("{said}")).unwrap();
    assert_eq!(synced.dropped, 0);
    assert!(synced.sent > 2000, "{synced:?}");
    let again = read(&python, &url);
    assert_eq!(again, runs);
    #[cfg(feature = "mlflow_rs")]
    {
        let id = run["id"].as_str().unwrap();
        let theirs = mlflow_rs::run::Run::get_run(&url, id).unwrap();
        assert_eq!(theirs.get_status(), "FINISHED");
        assert_eq!(theirs.get_parameters().len(), 201);
    }
    drop(server);
}

/// See [`a_large_run_outlives_its_server`].
const LARGE_SHA256: &str = "b098ef6c2af308889552ec207d6a067a0aa6021d37c3213b6bb9ae0f6c883e06";

#[test]
fn a_run_without_its_server_is_sent_later() {
    let home = Home::new();
    let port = free_port();
    let url = format!("http://127.0.0.1:{port}");
    let config = home.config("x", access(&url));
    let dir = home.dir("x");
    let mut trackers = home.open("x", &config, None);
    (1..=30).for_each(|number| trackers.step(&step(number)));
    trackers.sync();
    // Killed, and resumed at a checkpoint.
    drop(trackers);
    let resume = Resume {
        step: 20,
        is_evaluated: false,
        metrics_bytes: metrics(&dir).len() as u64,
    };
    let mut trackers = home.open("x", &config, Some(resume));
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
    let error = track::sync(&dir, &access(&url), |said| told.push(said.to_string())).unwrap_err();
    assert!(error.contains("Connection refused"), "{error}");
    assert!(error.contains("events wait in "), "{error}");
    assert_eq!(told.len(), 1, "{told:?}");

    let Some(python) = python() else {
        return;
    };
    let server = Server::start_at(&python, &home.db(), port, &[]);
    let synced = track::sync(&dir, &access(&url), |said| panic!("{said}")).unwrap();
    // Two starts with their files, 40 steps, the files and statuses of two ends but one file.
    assert_eq!((synced.sent, synced.dropped), (40 + 4 + 3, 0));
    let runs = read(&python, &url);
    assert_eq!(runs.len(), 1);
    assert!(steps(&runs[0], "train/loss").into_iter().eq(1..=40));
    assert_eq!(runs[0]["status"], "FINISHED");
    let synced = track::sync(&dir, &access(&url), |said| panic!("{said}")).unwrap();
    assert_eq!((synced.sent, synced.dropped), (0, 0));
    drop(server);
}

#[test]
fn runs_are_nested_whoever_comes_first() {
    let Some(python) = python() else {
        return;
    };
    let home = Home::new();
    let server = Server::start(&python, &home.db(), &[]);
    let url = server.url();
    let key = |run: &str| {
        let key = fs::read_to_string(home.dir(run).join("mlflow-run")).unwrap();
        key.trim().to_string()
    };
    let finish = |run: &str, parent: Option<String>| {
        let mut config = home.config(run, access(&url));
        config.mlflow.as_mut().unwrap().parent = parent;
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
    let runs = read(&python, &url);
    let find = |name: &str| runs.iter().find(|run| run["name"] == name).unwrap();
    let id = &find("parent")["id"];
    assert_eq!(&find("early")["tags"]["mlflow.parentRunId"], id);
    assert_eq!(&find("late")["tags"]["mlflow.parentRunId"], id);
    assert_eq!(find("parent")["tags"]["mlflow.parentRunId"], Value::Null);
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
    let runs = read_with(&python, &url, &variables);
    assert_eq!(runs.len(), 1);
    assert_eq!(steps(&runs[0], "train/loss"), [1]);
    assert_eq!(runs[0]["status"], "FINISHED");
}

/// A machine that takes connections and answers nonsense.
#[test]
fn what_is_no_mlflow_server_is_told() {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let body = "<html>hello</html>";
            let answer = format!(
                "HTTP/1.1 404 Not Found\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
            let _ = stream.write_all(answer.as_bytes());
        }
    });
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

/// A relay of our own in front of the server, which wants to see a certificate and shows one of its own authority.
#[test]
fn certificates_open_the_server() {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;
    let Some(python) = python() else {
        return;
    };
    let home = Home::new();
    let server = Server::start(&python, &home.db(), &[]);
    let url = server.url();
    let (_, port) = url.rsplit_once(':').unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls.py");
    let mut command = Command::new(&python);
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
    let runs = read(&python, &server.url());
    let names: Vec<&str> = runs
        .iter()
        .map(|run| run["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["both", "insecure"]);
    drop(relay.stdin.take());
    relay.wait().unwrap();
}

//! Sweeps, `runner runs`, `runner report` and `runner track`, as their users meet them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::served::Server;
use crate::{json, runner, text};

/// A directory with a sweep of the quickstart, whose data is found from the root of the repository.
struct Place {
    dir: tempfile::TempDir,
}

fn root() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    root.canonicalize().unwrap()
}

/// Twelve steps of 24 images, evaluated every three on half of the images that there are.
const BASE: &str = "\
train_examples = 359
eval = 'data/digits/validation-00000-*'
eval_examples = 179
[train]
batch_size = 24
bn_batch = 24
length = \"12 steps\"
threads = 1
[schedule]
warmup = \"2 steps\"
milestones = [\"50 steps\"]
[eval]
every = \"3 steps\"
[checkpoint]
every = \"3 steps\"
[track]
mlflow = \"off\"
";

impl Place {
    fn new(sweep: &str) -> Self {
        Self::with(BASE, sweep)
    }

    fn with(base: &str, sweep: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            "extends = '{0}/configs/quickstart.toml'\nname = \"s\"\nrun_dir = '{1}/runs/s'\n\
             [data]\ntrain = 'data/digits/train-00000-*'\n{base}{sweep}",
            root().display(),
            dir.path().display()
        );
        fs::write(dir.path().join("s.toml"), text).unwrap();
        Self { dir }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("runs/s")
    }

    fn command(&self, more: &[&str]) -> Command {
        let file = self.dir.path().join("s.toml");
        let mut command = runner(&["sweep", file.to_str().unwrap(), "--json"]);
        command.args(more);
        command
    }

    fn output(&self, more: &[&str]) -> Output {
        self.command(more).output().unwrap()
    }

    fn check(&self, more: &[&str], code: i32) -> Value {
        let output = self.output(more);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{out}{err}");
        json(&out)
    }

    /// Starts of a run so far, and steps that it has been through.
    fn starts(&self, hash: &str) -> usize {
        let path = self.root().join(hash).join("output.txt");
        let said = fs::read_to_string(path).unwrap_or_default();
        said.matches(" steps of ").count()
    }
}

const GRID: &str = "
[sweep.axes]
\"schedule.base_lr\" = [0.1, 0.4, 1.6]
\"optimizer.weight_decay\" = [1e-4, 1e-3]
";

/// Enough where the ranking does not matter.
const THREE: &str = "
[sweep.axes]
\"schedule.base_lr\" = [0.1, 0.4, 1.6]
";

const HALVING: &str = "[sweep]\nhalving = { rungs = 3, factor = 2 }\n";

/// Hashes and best values in their rank, less those that were stopped.
fn ranking(report: &Value) -> Vec<(String, f64)> {
    let runs = report["runs"].as_array().unwrap().iter();
    runs.filter(|run| run["status"] == "done")
        .map(|run| {
            let best = run["summary"]["best"]["value"].as_f64().unwrap();
            (run["hash"].as_str().unwrap().to_string(), best)
        })
        .collect()
}

fn steps(place: &Place, report: &Value) -> u64 {
    let runs = report["runs"].as_array().unwrap().iter();
    runs.map(|run| {
        let dir = place.root().join(run["hash"].as_str().unwrap());
        let lines = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
        lines.matches("train/loss").count() as u64
    })
    .sum()
}

#[test]
fn a_sweep_that_was_killed_ends_as_one_that_was_not() {
    let straight = Place::new(GRID);
    let report = straight.check(&[], 0);
    let expected = ranking(&report);
    assert_eq!(expected.len(), 6);
    assert!(expected.windows(2).all(|pair| pair[0].1 >= pair[1].1));
    assert_eq!(steps(&straight, &report), 6 * 12);
    // Again: nothing is run.
    assert_eq!(ranking(&straight.check(&[], 0)), expected);
    assert!(expected.iter().all(|(hash, _)| straight.starts(hash) == 1));

    let killed = Place::new(GRID);
    let done = || {
        let dirs = fs::read_dir(killed.root()).into_iter().flatten().flatten();
        let is_done = |dir: &PathBuf| {
            let summary = fs::read_to_string(dir.join("summary.json"));
            summary.is_ok_and(|text| text.contains("\"done\""))
        };
        dirs.map(|entry| entry.path()).filter(is_done).count()
    };
    // The sweep alone is killed, and so outlived by the run it is at.
    for count in [1, 3] {
        let mut child = killed
            .command(&["--jobs", "2"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while done() < count {
            assert_eq!(child.try_wait().unwrap(), None, "it was to be killed");
            std::thread::sleep(Duration::from_millis(5));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let report = killed.check(&[], 0);
    assert_eq!(ranking(&report), expected);
    assert_eq!(steps(&killed, &report), 6 * 12, "no step is there twice");
    let starts: usize = expected.iter().map(|(hash, _)| killed.starts(hash)).sum();
    assert!(
        starts <= 6 + 4,
        "{starts}: of each kill at most the two runs at work"
    );
}

#[test]
fn a_sweep_with_halving_takes_the_best_of_each_round_to_the_end() {
    let halved = Place::new(&format!("{HALVING}{GRID}"));
    let fewer = halved.check(&[], 0);
    let done = ranking(&fewer);
    // Of six three go on, of those two.
    assert_eq!(done.len(), 2);
    let stopped = fewer["runs"].as_array().unwrap().iter();
    let stopped: Vec<&Value> = stopped.filter(|r| r["status"] == "stopped early").collect();
    assert_eq!(stopped.len(), 4);
    assert_eq!(steps(&halved, &fewer), 3 * 3 + 6 + 2 * 12);
    // Again, and with its memory of the rounds: the same, and nothing is run.
    let before: Vec<usize> = done.iter().map(|(hash, _)| halved.starts(hash)).collect();
    assert_eq!(before, [3, 3]);
    assert_eq!(halved.check(&[], 0)["runs"], fewer["runs"]);
    let after: Vec<usize> = done.iter().map(|(hash, _)| halved.starts(hash)).collect();
    assert_eq!(after, before);
}

#[test]
fn a_run_that_fails_fails_alone() {
    let place = Place::new(
        "
[[sweep.runs]]
\"schedule.base_lr\" = 0.1
[[sweep.runs]]
\"data.train\" = \"nowhere/train-*\"
",
    );
    let xml = place.dir.path().join("sweep.xml");
    let report = place.check(&["--junit", xml.to_str().unwrap()], 4);
    assert_eq!(ranking(&report).len(), 1);
    assert_eq!(report["status"], "failed");
    let reason = report["runs"][1]["reason"].as_str().unwrap();
    assert!(
        reason.starts_with("exit code 3: data.train: nowhere/train-*: no file matches\nhint: "),
        "{reason}"
    );
    let xml = fs::read_to_string(&xml).unwrap();
    assert!(xml.contains("tests=\"2\" failures=\"1\""), "{xml}");
    assert!(
        xml.contains("<failure message=\"exit code 3: data.train"),
        "{xml}"
    );
}

#[test]
fn a_sweep_goes_on_where_it_was_told_to_stop() {
    let place = Place::new(THREE);
    let report = place.check(&["--max-runs", "2"], 75);
    assert_eq!(report["status"], "interrupted");
    assert_eq!(ranking(&report).len(), 2);
    let report = place.check(&["--max-runs", "1"], 0);
    assert_eq!(ranking(&report).len(), 3);
    let path = place.root();
    let (out, _) = crate::check(&["runs", path.to_str().unwrap(), "--json"], 0);
    let runs = json(&out);
    let runs = runs.as_array().unwrap();
    assert_eq!(runs.len(), 3);
    assert!(
        runs.iter()
            .all(|run| run["status"] == "done" && run["step"] == 12)
    );

    let page = place.dir.path().join("page.html");
    let args = [
        "report",
        path.to_str().unwrap(),
        "--out",
        page.to_str().unwrap(),
    ];
    let (out, _) = crate::check(&args, 0);
    let html = fs::read_to_string(&page).unwrap();
    assert!(html.starts_with("<!doctype html>"));
    assert!(
        !html.contains("http") && !html.contains("<script"),
        "it needs nothing else"
    );
    assert!(html.contains("schedule.base_lr") && html.contains("What differs"));
    assert_eq!(html.matches("<svg ").count(), 6);
    let written: Vec<&str> = out.lines().collect();
    assert_eq!(written.len(), 7);
    for image in &written[1..] {
        let bytes = fs::read(image).unwrap();
        assert!(
            bytes.starts_with(b"\x89PNG\r\n") && bytes.len() > 5000,
            "{image}"
        );
    }
}

#[test]
fn a_signal_ends_a_sweep_that_goes_on_later() {
    let place = Place::new(THREE);
    let begun = || {
        let dirs = fs::read_dir(place.root()).into_iter().flatten().flatten();
        dirs.filter(|dir| dir.path().join("metrics.jsonl").exists() && dir.path().is_dir())
            .count()
    };
    let mut child = place.command(&[]);
    let child = child.stdin(Stdio::null()).stdout(Stdio::piped());
    let child = child.stderr(Stdio::null()).spawn().unwrap();
    let root = place.root();
    let (mut seen, mut is_running) = (0, false);
    while begun() < 2 {
        // Whoever looks at a run is never in its way: no run fails because its directory was looked at.
        if begun() > 0 && seen < 5 {
            let (out, _) = crate::check(&["runs", root.to_str().unwrap(), "--json"], 0);
            let runs = json(&out);
            let mut runs = runs.as_array().unwrap().iter();
            is_running |= runs.any(|run| run["status"] == "running");
            seen += 1;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(is_running, "a run was to be seen at work, in {seen} looks");
    let id = child.id().to_string();
    Command::new("kill")
        .args(["-s", "TERM", &id])
        .status()
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(75));
    let report = json(&text(&output.stdout));
    assert_eq!(report["status"], "interrupted");
    // The run that it was at has been told too: none goes on behind our back.
    let (out, _) = crate::check(&["runs", root.to_str().unwrap(), "--json"], 0);
    let runs = json(&out);
    let mut runs = runs.as_array().unwrap().iter();
    assert!(runs.all(|run| run["status"] != "running"), "{out}");
    let report = place.check(&[], 0);
    assert_eq!(ranking(&report).len(), 3);
    assert_eq!(steps(&place, &report), 3 * 12);
}

/// A terminal's signals go to all of its foreground processes. Runs are not among them: the sweep alone tells them, once.
#[test]
fn runs_have_a_process_group_of_their_own() {
    let place = Place::new(THREE);
    let mut child = place.command(&["--max-runs", "1"]);
    let child = child.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = child.stderr(Stdio::null()).spawn().unwrap();
    let group = |pid: &str| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let (parent, group) = (fields.nth(1)?.to_string(), fields.next()?.to_string());
        Some((parent, group))
    };
    let sweep = child.id().to_string();
    let found = loop {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let names = processes.map(|p| p.file_name().to_string_lossy().into_owned());
        let mut runs = names.filter(|pid| group(pid).is_some_and(|(parent, _)| parent == sweep));
        let is_run = |pid: &String| {
            let said = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&said).contains("cell.toml")
        };
        if let Some(run) = runs.find(is_run) {
            break run;
        }
        assert_eq!(child.try_wait().unwrap(), None, "it was to be seen at work");
        std::thread::sleep(Duration::from_millis(2));
    };
    assert_eq!(group(&found).unwrap().1, found, "it leads its own group");
    assert_ne!(group(&sweep).unwrap().1, found);
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(75));
}

#[test]
fn a_wrong_sweep_says_what_is_wrong() {
    let say = |sweep: &str| {
        let place = Place::new(sweep);
        let output = place.output(&[]);
        assert_eq!(output.status.code(), Some(2));
        let dir = format!("{}/", place.dir.path().display());
        text(&output.stderr).replace(&dir, "")
    };
    let missing = say("");
    assert!(
        missing.starts_with("s.toml: sweep: missing\nhint: write [sweep.axes]"),
        "{missing}"
    );
    let said = say("[sweep]\nkind = \"all\"\nruns = 3\nextra = 1\nhalving = { rungs = 1 }\n");
    for problem in [
        "sweep.kind: expected one of \"grid\", \"list\", \"random\"",
        "sweep.runs: expected a list of tables\nhint: ",
        "sweep.extra: unknown key\nhint: the keys of [sweep] are ",
        "sweep.halving: expected rungs from 2 to 10",
    ] {
        assert!(said.contains(problem), "{problem} is missing in\n{said}");
    }
    let said = say(
        "[sweep.axes]\n\"schedule.base_lrs\" = [1]\n\"model.depth\" = [18, 19]\n\"seed\" = 5\n",
    );
    assert!(
        said.contains("sweep.axes.\"seed\": expected a list of values\nhint: "),
        "{said}"
    );
    let said = say("[sweep.axes]\n\"schedule.base_lrs\" = [1]\n\"model.depth\" = [18, 19]\n");
    assert!(
        said.contains("hint: did you mean schedule.base_lr?"),
        "{said}"
    );
    assert!(
        said.contains("model.depth: expected one of 18, 34"),
        "{said}"
    );
    let said = say("[sweep]\nkind = \"random\"\n[sweep.axes]\n\"seed\" = { min = 1, max = 0 }\n");
    assert!(said.contains("expected min below max"), "{said}");
    assert!(said.contains("sweep.count: missing"), "{said}");

    let place = Place::new(GRID);
    let file = place.dir.path().join("s.toml");
    let (_, said) = crate::check(&[file.to_str().unwrap()], 2);
    assert!(
        said.contains("hint: a file with [sweep] says many runs: runner sweep FILE"),
        "{said}"
    );
}

#[test]
fn a_run_stops_where_it_is_told_and_goes_on() {
    let home = crate::Home::new();
    let sets = [
        "data.train=data/digits/train-00000-*",
        "data.train_examples=359",
        "data.eval=data/digits/validation-00000-*",
        "data.eval_examples=179",
        "train.batch_size=24",
        "train.bn_batch=24",
        "train.length=12 steps",
        "schedule.warmup=2 steps",
        "eval.every=5 steps",
        "checkpoint.every=5 steps",
    ];
    let straight = crate::Home::new();
    straight.check(&sets, 0);
    let args = home.args(&sets);
    let mut args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
    args.extend(["--until", "50%"]);
    for _ in 0..2 {
        let (out, _) = crate::check(&args, 75);
        let summary = json(&out);
        assert_eq!(summary["step"], 6);
        assert_eq!(summary["reason"], "--until");
        assert!(summary["eval"]["top1"].is_f64(), "it is evaluated");
    }
    let (out, _) = home.check(&sets, 0);
    assert_eq!(json(&out)["step"], 12);
    let weights = |home: &crate::Home| train::load(&train::find(&home.path()).unwrap()).unwrap().1;
    assert!(weights(&home) == weights(&straight), "the same bits");
}

#[test]
fn a_run_without_a_journal_cannot_be_sent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let (_, said) = crate::check(&["track", "sync", path, "--to", "http://127.0.0.1:9"], 4);
    assert!(
        said.contains("there is no mlflow.journal\nhint: "),
        "{said}"
    );
    let (_, said) = crate::check(&["track", "sync", path, "--to", "databricks"], 2);
    assert!(
        said.starts_with("\"databricks\" is no MLflow server\nhint: "),
        "{said}"
    );
    let output = runner(&["configs/quickstart.toml"])
        .env("MLFLOW_TRACKING_URI", "databricks")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = text(&output.stderr);
    assert!(
        said.starts_with("environment variable MLFLOW_TRACKING_URI: \"databricks\" is no store"),
        "{said}"
    );
}

/// The binary, a real server, a sweep nested in a run of its own, datasets, a registered model.
#[test]
fn a_sweep_is_nested_on_a_server() {
    let python = std::env::var("RUNNER_PYTHON").unwrap_or_default();
    if python.is_empty() {
        eprintln!(
            "SKIP: no MLflow server is started, because RUNNER_PYTHON does not name a Python that has it; see ci/test"
        );
        return;
    }
    let base = BASE.replace(
        "mlflow = \"off\"\n",
        "mlflow = \"auto\"\nregister_model = \"digits\"\n",
    );
    let place = Place::with(&base, "[sweep.axes]\n\"schedule.base_lr\" = [0.1, 0.4]\n");
    let server = Server::start(&python, &place.dir.path().join("server.db"), &[]);
    let output = place
        .command(&[])
        .env("MLFLOW_TRACKING_URI", server.url())
        .env("MLFLOW_EXPERIMENT_NAME", "sweeps")
        .output()
        .unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    let script = root().join("crates/track/tests/served.py");
    let mut command = Command::new(&python);
    command.arg(script).args([&server.url(), "sweeps"]);
    let read = command.output().unwrap();
    assert!(read.status.success(), "{}", text(&read.stderr));
    let runs = json(&text(&read.stdout));
    let runs = runs["sweeps"].as_array().unwrap();
    assert_eq!(runs.len(), 3);
    let parent = runs.iter().find(|run| run["name"] == "s").unwrap();
    assert_eq!(parent["status"], "FINISHED");
    assert_eq!(parent["params"]["schedule.base_lr"], "0.1, 0.4");
    let words = parent["tags"]["mlflow.note.content"].as_str().unwrap();
    assert!(
        words.starts_with("| rank | schedule.base_lr | best top1 |"),
        "{words}"
    );
    let winner = parent["tags"]["runner.winner"].as_str().unwrap();
    let (_, rest) = words.split_once("| 1 |").unwrap();
    assert!(rest.lines().next().unwrap().contains(winner), "{words}");
    // A step of the sweep's own curve is a run that is done.
    assert_eq!(parent["history"]["eval/top1"][0][0], 2);
    for run in runs.iter().filter(|run| run["name"] != "s") {
        assert_eq!(run["tags"]["mlflow.parentRunId"], parent["id"]);
        assert_eq!(run["status"], "FINISHED");
        assert_eq!(run["history"]["train/loss"].as_array().unwrap().len(), 12);
        assert_eq!(run["history"]["eval/top1"].as_array().unwrap().len(), 4);
        assert!(
            run["history"]
                .get("system/cpu_utilization_percentage")
                .is_some()
        );
        assert_eq!(run["params"]["model.recipe"], "tpu2018");
        let datasets = run["datasets"].as_array().unwrap();
        assert_eq!(datasets.len(), 2);
        let fingerprint = run["params"]["data.train.fingerprint"].as_str().unwrap();
        let digests: Vec<&str> = datasets
            .iter()
            .map(|d| d["digest"].as_str().unwrap())
            .collect();
        assert!(
            digests.iter().any(|d| fingerprint.starts_with(d)),
            "{digests:?}"
        );
        let model = &run["models"][0];
        assert_eq!(model["versions"][0]["name"], "digits");
        assert!(model["checkpoint"]["bytes"].as_u64().unwrap() > 40_000_000);
    }
}

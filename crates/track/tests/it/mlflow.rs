//! The MLflow store: what is in it, and what happens when it cannot be written.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use rusqlite::{Connection, Params};
use track::{Config, Mlflow, Place, Resume, StepMetrics, Summary, Terminal, Trackers};

use crate::{eval, log, metrics, step, summary};

/// A place for one store and one run.
pub(crate) struct Home {
    pub(crate) root: tempfile::TempDir,
    pub(crate) config: Config,
}

impl Home {
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("runs/x");
        fs::create_dir_all(&run).unwrap();
        fs::write(run.join("spec.toml"), "name = \"x\"\n").unwrap();
        let params = [("train.batch_size", "64"), ("data.train", "[\"a\", \"ä\"]")];
        let mlflow = Mlflow {
            place: Place::Directory(root.path().join("store")),
            experiment: "digits".into(),
            run: "x".into(),
            source: "configs/x.toml".into(),
            params: params.map(|(k, v)| (k.into(), v.into())).into(),
            tags: BTreeMap::new(),
            datasets: vec![],
            parent: None,
            artifacts: vec![run.join("spec.toml")],
        };
        let config = Config {
            mlflow: Some(mlflow),
            tensorboard: true,
            system: false,
        };
        Self { root, config }
    }

    pub(crate) fn run(&self) -> PathBuf {
        self.root.path().join("runs/x")
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.root.path().join("store/mlflow.db")
    }

    pub(crate) fn open(&self, resume: Option<Resume>) -> Trackers {
        Trackers::open(&self.run(), resume, &self.config, Terminal::Quiet)
    }

    fn mlflow(&mut self) -> &mut Mlflow {
        self.config.mlflow.as_mut().unwrap()
    }

    pub(crate) fn db(&self) -> Connection {
        Connection::open(self.path()).unwrap()
    }

    /// The identifier of the run, as the run directory keeps it.
    pub(crate) fn id(&self) -> String {
        let id = fs::read_to_string(self.run().join("mlflow-run")).unwrap();
        id.trim().into()
    }

    /// Rows as text, columns joined by spaces.
    fn rows(&self, query: &str) -> Vec<String> {
        rows(&self.db(), query, [])
    }

    fn statuses(&self) -> Vec<String> {
        self.rows("SELECT status, end_time IS NULL FROM runs")
    }

    /// Steps of a metric in their order, doubles included.
    fn steps(&self, key: &str) -> Vec<u64> {
        let query = "SELECT step FROM metrics WHERE key = ?1 ORDER BY step";
        let rows = rows(&self.db(), query, [key]);
        rows.iter().map(|step| step.parse().unwrap()).collect()
    }

    fn latest(&self, key: &str) -> String {
        let query = "SELECT step, value, is_nan FROM latest_metrics WHERE key = ?1";
        rows(&self.db(), query, [key]).join("; ")
    }
}

fn rows(db: &Connection, query: &str, params: impl Params) -> Vec<String> {
    let mut statement = db.prepare(query).unwrap();
    let columns = statement.column_count();
    let mut rows = statement.query(params).unwrap();
    let mut texts = vec![];
    while let Some(row) = rows.next().unwrap() {
        let cell = |i| match row.get_ref(i).unwrap() {
            rusqlite::types::ValueRef::Null => "-".into(),
            rusqlite::types::ValueRef::Integer(i) => i.to_string(),
            rusqlite::types::ValueRef::Real(r) => format!("{r:?}"),
            value => value.as_str().unwrap().to_string(),
        };
        texts.push((0..columns).map(cell).collect::<Vec<_>>().join(" "));
    }
    texts
}

#[test]
fn a_run_is_a_run_of_mlflow() {
    let home = Home::new();
    let mut trackers = home.open(None);
    trackers.step(&step(1));
    trackers.step(&step(2));
    trackers.eval(&eval(2));
    trackers.sync();
    assert_eq!(home.statuses(), ["RUNNING 1"]);
    trackers.finish(&summary());
    assert_eq!(trackers.failures(), 0);

    let id = home.id();
    let store = home.root.path().join("store");
    let runs = store.join("mlruns");
    assert_eq!(
        home.rows(
            "SELECT experiment_id, name, artifact_location, lifecycle_stage FROM experiments"
        ),
        [
            format!("0 Default {}/0 active", runs.display()),
            format!("1 digits {}/1 active", runs.display()),
        ]
    );
    let artifacts = runs.join(format!("1/{id}/artifacts"));
    assert_eq!(
        home.rows("SELECT run_uuid, name, source_type, source_name, status, lifecycle_stage, artifact_uri, experiment_id,
                          end_time >= start_time FROM runs"),
        [format!("{id} x LOCAL configs/x.toml FINISHED active {} 1 1", artifacts.display())]
    );
    assert_eq!(
        home.rows("SELECT key, value FROM params ORDER BY key"),
        ["data.train [\"a\", \"ä\"]", "train.batch_size 64"]
    );
    assert_eq!(
        home.rows("SELECT key, value FROM tags WHERE key NOT LIKE '%.git.%' AND key != 'mlflow.user' ORDER BY key"),
        [
            "mlflow.runName x",
            "mlflow.source.name configs/x.toml",
            "mlflow.source.type LOCAL"
        ]
    );
    assert_eq!(
        home.rows(
            "SELECT key, step, value, is_nan, run_uuid FROM metrics WHERE step = 2 ORDER BY key"
        ),
        [
            format!("eval/images 2 359.0 0 {id}"),
            format!("eval/loss 2 0.1203 0 {id}"),
            format!("eval/top1 2 0.9611 0 {id}"),
            format!("eval/top5 2 1.0 0 {id}"),
            format!("train/images_per_s 2 100.0 0 {id}"),
            format!("train/input_wait_fraction 2 0.0 0 {id}"),
            format!("train/loss 2 1.25 0 {id}"),
            format!("train/lr 2 1e-5 0 {id}"),
            format!("train/top1 2 0.5 0 {id}"),
        ]
    );
    assert_eq!(home.steps("train/loss"), [1, 2]);
    assert_eq!(
        home.rows("SELECT key, step FROM latest_metrics WHERE key LIKE '%/loss' ORDER BY key"),
        ["eval/loss 2", "train/loss 2"]
    );
    let spec = fs::read_to_string(artifacts.join("spec.toml")).unwrap();
    assert_eq!(spec, "name = \"x\"\n");
    let told = fs::read_to_string(artifacts.join("summary.json")).unwrap();
    assert!(told.starts_with("{\"status\":\"done\""), "{told}");
    let mut files: Vec<_> = fs::read_dir(&store)
        .unwrap()
        .map(|f| f.unwrap().file_name())
        .collect();
    files.sort();
    assert_eq!(files, ["mlflow.db", "mlruns"], "no log is left beside it");
}

/// The working directory of a test is its crate's.
#[test]
fn a_run_has_the_commit_of_the_working_directory() {
    let head = std::process::Command::new("git")
        .args(["rev-parse", "HEAD"])
        .output();
    let Some(head) = head.ok().filter(|o| o.status.success()) else {
        eprintln!("SKIP: this is no git checkout, so runs have no commit");
        return;
    };
    let home = Home::new();
    home.open(None).finish(&summary());
    assert_eq!(
        home.rows("SELECT value FROM tags WHERE key = 'mlflow.source.git.commit'"),
        [String::from_utf8(head.stdout).unwrap().trim()]
    );
}

#[test]
fn numbers_that_are_not_finite() {
    let home = Home::new();
    let mut trackers = home.open(None);
    trackers.step(&StepMetrics {
        loss: f64::NAN,
        lr: f64::INFINITY,
        top1: f64::NEG_INFINITY,
        ..step(1)
    });
    trackers.finish(&summary());
    assert_eq!(home.latest("train/loss"), "1 0.0 1");
    assert_eq!(home.latest("train/lr"), "1 1.7976931348623157e308 0");
    assert_eq!(home.latest("train/top1"), "1 -1.7976931348623157e308 0");
    assert_eq!(trackers.failures(), 0);
}

#[test]
fn a_resume_cuts_what_came_after_the_checkpoint() {
    let home = Home::new();
    let mut trackers = home.open(None);
    trackers.step(&step(1));
    trackers.step(&step(2));
    let resume = Resume {
        step: 2,
        is_evaluated: false,
        metrics_bytes: trackers.sync(),
    };
    trackers.eval(&eval(2));
    trackers.step(&step(3));
    trackers.step(&StepMetrics {
        loss: f64::NAN,
        ..step(4)
    });
    drop(trackers);
    assert_eq!(home.steps("train/loss"), [1, 2, 3, 4]);
    assert_eq!(home.statuses(), ["FAILED 0"]);
    let id = home.id();

    let mut trackers = home.open(Some(resume));
    trackers.sync();
    assert_eq!(home.id(), id);
    assert_eq!(home.statuses(), ["RUNNING 1"]);
    assert_eq!(home.steps("train/loss"), [1, 2]);
    assert_eq!(home.steps("eval/loss"), [0; 0]);
    assert_eq!(home.latest("train/loss"), "2 1.25 0");
    assert_eq!(home.latest("eval/loss"), "");
    trackers.eval(&eval(2));
    trackers.step(&step(3));
    trackers.finish(&summary());
    assert_eq!(home.steps("train/loss"), [1, 2, 3]);
    assert_eq!(home.steps("eval/loss"), [2]);
    assert_eq!(home.statuses(), ["FINISHED 0"]);
    assert_eq!(trackers.failures(), 0);
}

#[test]
fn a_resume_tells_what_changed_and_keeps_what_users_changed() {
    let mut home = Home::new();
    home.open(None).finish(&summary());
    let edits = "UPDATE tags SET value = 'best' WHERE key = 'mlflow.runName';
                 INSERT INTO tags SELECT 'mlflow.note.content', 'mine', run_uuid FROM runs;
                 UPDATE runs SET lifecycle_stage = 'deleted', deleted_time = 1";
    home.db().execute_batch(edits).unwrap();
    home.mlflow().params = [("train.length".into(), "20 epochs".into())].into();
    home.mlflow().experiment = "another".into();
    let resume = Resume {
        step: 345,
        is_evaluated: false,
        metrics_bytes: 0,
    };
    home.open(Some(resume)).finish(&summary());
    assert_eq!(
        home.rows("SELECT key, value FROM params"),
        ["train.length 20 epochs"]
    );
    let tags =
        "SELECT value FROM tags WHERE key IN ('mlflow.runName', 'mlflow.note.content') ORDER BY 1";
    assert_eq!(home.rows(tags), ["best", "mine"]);
    let run = "SELECT experiment_id, lifecycle_stage FROM runs";
    assert_eq!(home.rows(run), ["1 active"]);
}

#[test]
fn a_run_that_begins_anew_is_the_same_run() {
    let home = Home::new();
    let mut trackers = home.open(None);
    trackers.step(&step(1));
    trackers.step(&step(2));
    drop(trackers);
    let id = home.id();
    home.db()
        .execute("UPDATE runs SET start_time = 1", [])
        .unwrap();
    let mut trackers = home.open(None);
    trackers.step(&step(1));
    trackers.finish(&summary());
    assert_eq!(home.id(), id);
    assert_eq!(home.rows("SELECT start_time > 1 FROM runs"), ["1"]);
    assert_eq!(home.steps("train/loss"), [1]);
    assert_eq!(home.latest("train/loss"), "1 1.25 0");
}

#[test]
fn a_resume_in_an_empty_store_is_the_same_run() {
    let home = Home::new();
    home.open(None).finish(&summary());
    let id = home.id();
    fs::remove_dir_all(home.root.path().join("store")).unwrap();
    let resume = Resume {
        step: 2,
        is_evaluated: false,
        metrics_bytes: 0,
    };
    let mut trackers = home.open(Some(resume));
    trackers.step(&step(3));
    trackers.finish(&summary());
    assert_eq!(home.rows("SELECT run_uuid FROM runs"), [id]);
    assert_eq!(home.steps("train/loss"), [3]);
    assert_eq!(trackers.failures(), 0);
}

#[test]
fn an_identifier_that_was_spoilt_is_replaced() {
    let home = Home::new();
    fs::write(home.run().join("mlflow-run"), "../../x\n").unwrap();
    home.open(None).finish(&summary());
    assert_eq!(home.id().len(), 32);
    assert_eq!(home.rows("SELECT run_uuid FROM runs"), [home.id()]);
}

#[test]
fn runs_share_a_store_and_an_experiment() {
    let homes = [Home::new(), Home::new(), Home::new()];
    let shared = homes[0].root.path().join("store");
    // All at once: they race for making the file.
    let mut trackers: Vec<_> = homes
        .iter()
        .map(|home| {
            let mut config = home.config.clone();
            config.mlflow.as_mut().unwrap().place = Place::Directory(shared.clone());
            Trackers::open(&home.run(), None, &config, Terminal::Quiet)
        })
        .collect();
    for number in 1..=50 {
        for trackers in &mut trackers {
            trackers.step(&step(number));
        }
    }
    for trackers in &mut trackers {
        trackers.finish(&summary());
        assert_eq!(trackers.failures(), 0, "{}", log(&homes[0].run()));
    }
    let mut ids: Vec<_> = homes
        .iter()
        .map(|home| format!("{} 1 50", home.id()))
        .collect();
    ids.sort();
    ids.dedup();
    let query = "SELECT run_uuid, experiment_id, (SELECT count(*) FROM metrics
                 WHERE run_uuid = runs.run_uuid AND key = 'train/loss') FROM runs ORDER BY run_uuid";
    assert_eq!(homes[0].rows(query), ids);
    assert_eq!(homes[0].rows("SELECT count(*) FROM experiments"), ["2"]);
}

#[test]
fn values_beyond_the_limit_are_cut() {
    let mut home = Home::new();
    home.mlflow().params = BTreeMap::from([("long".into(), "ä".repeat(7000))]);
    let mut trackers = home.open(None);
    trackers.finish(&summary());
    assert_eq!(
        home.rows("SELECT length(value), replace(value, 'ä', '') FROM params"),
        ["6000 "]
    );
    assert_eq!(trackers.failures(), 0);
}

#[test]
fn a_status_for_every_end() {
    let check = |status: &str, expected: &str| {
        let home = Home::new();
        home.open(None).finish(&Summary {
            status: status.into(),
            ..summary()
        });
        assert_eq!(home.statuses(), [format!("{expected} 0")]);
    };
    check("done", "FINISHED");
    check("interrupted", "KILLED");
    check("failed", "FAILED");
}

/// This thread holds the lock, so any wait for it would be for ever, or a failure after 30 s.
#[test]
fn a_locked_database_does_not_stop_the_loop() {
    let home = Home::new();
    let mut trackers = home.open(None);
    trackers.sync();
    let db = home.db();
    db.execute_batch("BEGIN EXCLUSIVE").unwrap();
    for number in 1..=2000 {
        trackers.step(&step(number));
    }
    assert_eq!(trackers.failures(), 0);
    let length = trackers.sync();
    assert_eq!(trackers.failures(), 1, "the checkpoint waited once");
    assert_eq!(length, metrics(&home.run()).len() as u64);
    trackers.step(&step(2001));
    trackers.sync();
    assert_eq!(trackers.failures(), 2, "and not again");
    db.execute_batch("COMMIT").unwrap();
    trackers.finish(&summary());
    assert_eq!(trackers.failures(), 2);
    assert_eq!(home.steps("train/loss"), (1..=2001).collect::<Vec<_>>());
    assert_eq!(home.statuses(), ["FINISHED 0"]);
    let told = log(&home.run());
    let expected = format!(
        "2 writes of the trackers failed, first {}: locked for more than 5 s; what was measured waits in memory\n",
        home.path().display()
    );
    assert_eq!(told, expected);
}

#[test]
fn what_waits_for_a_lock_is_bounded() {
    let home = Home::new();
    let mut trackers = home.open(None);
    trackers.sync();
    let db = home.db();
    db.execute_batch("BEGIN EXCLUSIVE").unwrap();
    for number in 1..=40_000 {
        trackers.step(&step(number));
    }
    let dropped = trackers.failures();
    assert!((1..40_000).contains(&dropped), "{dropped}");
    db.execute_batch("COMMIT").unwrap();
    trackers.finish(&summary());
    let kept = home.steps("train/loss").len() as u64;
    assert_eq!(kept + trackers.failures(), 40_000, "all others are told");
    assert_eq!(metrics(&home.run()).lines().count(), 40_000);
}

/// A directory below a file can be made by nobody, root included.
#[test]
fn a_store_that_cannot_be_made_stops_nothing() {
    let mut home = Home::new();
    let file = home.root.path().join("file");
    fs::write(&file, "").unwrap();
    home.mlflow().place = Place::Directory(file.join("store"));
    let mut trackers = home.open(None);
    trackers.step(&step(1));
    trackers.sync();
    assert!(trackers.failures() >= 1);
    trackers.step(&step(2));
    trackers.finish(&summary());
    assert!(trackers.failures() >= 2);
    assert_eq!(metrics(&home.run()).lines().count(), 2);
    let told = log(&home.run());
    let path = file.join("store/mlflow.db");
    assert!(
        told.contains(&format!("failed, first {}: ", path.display())),
        "{told}"
    );
}

#[test]
fn a_run_directory_that_cannot_be_made_leaves_mlflow_alone() {
    let home = Home::new();
    let file = home.root.path().join("file");
    fs::write(&file, "").unwrap();
    let mut trackers = Trackers::open(&file.join("x"), None, &home.config, Terminal::Quiet);
    trackers.step(&step(1));
    trackers.finish(&summary());
    assert!(trackers.failures() > 0);
    assert_eq!(home.steps("train/loss"), [1]);
    assert_eq!(home.statuses(), ["FINISHED 0"]);
}

#[test]
fn an_artifact_that_is_missing_is_told() {
    let home = Home::new();
    fs::remove_file(home.run().join("spec.toml")).unwrap();
    let mut trackers = home.open(None);
    trackers.step(&step(1));
    trackers.finish(&summary());
    assert_eq!(trackers.failures(), 1);
    assert!(log(&home.run()).contains("spec.toml is missing: "));
    assert_eq!(home.steps("train/loss"), [1]);
    assert_eq!(home.statuses(), ["FINISHED 0"]);
}

#[test]
fn a_database_of_something_else_is_left_alone() {
    let home = Home::new();
    fs::create_dir_all(home.path().parent().unwrap()).unwrap();
    home.db().execute_batch("CREATE TABLE mine (x)").unwrap();
    let mut trackers = home.open(None);
    trackers.step(&step(1));
    trackers.finish(&summary());
    assert!(trackers.failures() >= 1);
    assert!(
        log(&home.run()).contains("it is a database, but not one of MLflow\nhint: move it away")
    );
    assert_eq!(home.rows("SELECT name FROM sqlite_master"), ["mine"]);
}

#[test]
fn a_file_that_is_no_database_is_left_alone() {
    let home = Home::new();
    fs::create_dir_all(home.path().parent().unwrap()).unwrap();
    let text = "a text that somebody wrote ".repeat(100);
    fs::write(home.path(), &text).unwrap();
    let mut trackers = home.open(None);
    trackers.step(&step(1));
    trackers.finish(&summary());
    assert!(log(&home.run()).contains("file is not a database"));
    assert_eq!(fs::read_to_string(home.path()).unwrap(), text);
}

#[test]
fn a_deleted_experiment_is_told() {
    let home = Home::new();
    home.open(None).finish(&summary());
    home.db()
        .execute(
            "UPDATE experiments SET lifecycle_stage = 'deleted' WHERE name = 'digits'",
            [],
        )
        .unwrap();
    fs::remove_file(home.run().join("mlflow-run")).unwrap();
    let mut trackers = home.open(None);
    trackers.finish(&summary());
    assert!(log(&home.run()).contains(
        "the experiment \"digits\" is deleted\nhint: name another, or `mlflow experiments restore -x 1`"
    ));
}

#[test]
fn a_database_that_vanishes_is_a_failure_and_is_made_anew() {
    let home = Home::new();
    let mut trackers = home.open(None);
    trackers.step(&step(1));
    trackers.sync();
    assert_eq!(trackers.failures(), 0);
    fs::remove_dir_all(home.path().parent().unwrap()).unwrap();
    trackers.step(&step(2));
    trackers.sync();
    assert_eq!(trackers.failures(), 1);
    trackers.finish(&summary());
    assert_eq!(trackers.failures(), 1);
    assert_eq!(home.steps("train/loss"), [2]);
    assert_eq!(home.statuses(), ["FINISHED 0"]);
}

/// What later versions of MLflow do to the file, in short; tests/it/clients.rs has the real one do it.
#[test]
fn columns_that_mlflow_adds_do_not_matter() {
    let home = Home::new();
    let mut trackers = home.open(None);
    trackers.step(&step(1));
    let resume = Resume {
        step: 1,
        is_evaluated: false,
        metrics_bytes: trackers.sync(),
    };
    let migration = "UPDATE alembic_version SET version_num = 'later';
                     ALTER TABLE experiments ADD COLUMN workspace VARCHAR(63) NOT NULL DEFAULT 'default';
                     ALTER TABLE metrics ADD COLUMN later TEXT;
                     CREATE TABLE traces (x)";
    home.db().execute_batch(migration).unwrap();
    trackers.step(&step(2));
    drop(trackers);
    let mut trackers = home.open(Some(resume));
    trackers.step(&step(2));
    trackers.finish(&summary());
    assert_eq!(home.steps("train/loss"), [1, 2]);
    assert_eq!(
        home.rows("SELECT version_num FROM alembic_version"),
        ["later"]
    );
    assert_eq!(trackers.failures(), 0);
}

#[test]
fn other_runs_are_untouched() {
    let home = Home::new();
    home.open(None).finish(&summary());
    let other = "INSERT INTO runs (run_uuid, status, lifecycle_stage, experiment_id)
                 VALUES ('other', 'FINISHED', 'active', 0);
                 INSERT INTO metrics (key, value, timestamp, run_uuid, step) VALUES ('loss', 1, 1, 'other', 9);
                 INSERT INTO latest_metrics VALUES ('loss', 1, 1, 9, 0, 'other');
                 INSERT INTO params VALUES ('lr', '1', 'other')";
    home.db().execute_batch(other).unwrap();
    home.open(None).finish(&summary());
    for table in ["metrics", "latest_metrics", "params"] {
        let query = format!("SELECT count(*) FROM {table} WHERE run_uuid = 'other'");
        assert_eq!(home.rows(&query), ["1"], "{table}");
    }
}

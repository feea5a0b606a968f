//! The loop on a small network: a resume is exact, and one that is not is caught.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

use engine::cpu::{Cpu, Options};
use engine::{Batch, Engine, Error, Hyper, MOMENTUM_PREFIX, Metrics, Pixels, State, initial_state};
use graph::{Graph, Init, Plane};
use spec::Run;
use track::{Config, Resume, Terminal, Trackers};
use train::{Checkpoints, Ended, Input, Job, Limits, Meta, Pace, Plan, Progress};

const SPEC: &str = "
name = \"t\"
mode = \"train\"
model = { resolution = 32, classes = 10 }
data = { source = \"fake\", train_examples = 50 }
train = { batch_size = 8, bn_batch = 4 }
schedule = { kind = \"constant\", warmup = \"0 steps\" }
checkpoint.every = \"2 steps\"
";

fn spec(steps: u64) -> Run {
    let sets = [format!("train.length={steps} steps")];
    spec::parse(SPEC, "t.toml", &sets).unwrap_or_else(|e| panic!("{e}"))
}

fn network() -> Graph {
    let init = Init::Normal { std: 0.2 };
    let mut g = Graph::new(Plane { h: 32, w: 32, c: 3 });
    let image = g.input();
    let x = g.conv("conv1", image, 8, 3, 2, init);
    let x = g.batch_norm("bn1", x, 1.0);
    let x = g.relu("relu", x);
    let x = g.avg_pool("avgpool", x);
    g.linear("fc", x, 10, init, Init::Constant(0.0));
    g
}

/// Trains in `dir` from its last checkpoint, if it has one, up to `steps`.
fn run(dir: &Path, steps: u64, wrap: &dyn Fn(Cpu) -> Box<dyn Engine>) -> Ended {
    run_from(dir, steps, Progress::default(), wrap).unwrap()
}

/// The same, where a new run starts as `first` says.
fn run_from(
    dir: &Path,
    steps: u64,
    first: Progress,
    wrap: &dyn Fn(Cpu) -> Box<dyn Engine>,
) -> Result<Ended, train::Error> {
    let (run, graph) = (spec(steps), network());
    let input = Input::open(&run).unwrap();
    let plan = Plan::new(&run, input.train_examples).unwrap();
    let meta = Meta::new(&run, input.computation(&run), None);
    let start = train::resume(dir, &meta, |_| ()).unwrap();
    let place = |at: &Progress| Resume {
        step: at.step,
        is_evaluated: at.is_evaluated(),
        metrics_bytes: at.metrics_bytes,
    };
    let resume = start.as_ref().map(|(at, _)| place(at));
    let open = |resume| Trackers::open(dir, resume, &Config::default(), Terminal::Quiet);
    let mut trackers = open(resume);
    let mut engine =
        wrap(Cpu::new(&graph, &Options::new(4, 1), &initial_state(&graph, 0)).unwrap());
    let mut at = first;
    if let Some((progress, state)) = start {
        at = progress;
        engine.load(&state).unwrap();
    }
    let (checkpoints, stop) = (Checkpoints::of(dir), AtomicBool::new(false));
    let mut pace = Pace::default();
    loop {
        let job = Job {
            plan: &plan,
            input: &input,
            checkpoints: &checkpoints,
            keep: 2,
            meta: meta.clone(),
            until: plan.steps,
            limits: Limits::of(&run),
            best: run.checkpoint.best,
            stop: &stop,
        };
        let ended = train::train(job, &mut at, &mut *engine, &mut trackers, &mut pace)?;
        if ended != Ended::Rewound {
            return Ok(ended);
        }
        drop(trackers);
        trackers = open(Some(place(&at)));
    }
}

/// What differs between a straight run of 7 steps and one that ended after 3 and was resumed.
fn differences(wrap: &dyn Fn(Cpu) -> Box<dyn Engine>) -> Vec<String> {
    let (straight, resumed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    assert_eq!(run(straight.path(), 7, wrap), Ended::Done);
    for steps in [3, 7] {
        assert_eq!(run(resumed.path(), steps, wrap), Ended::Done);
    }
    train::compare(straight.path(), resumed.path())
        .unwrap()
        .differences
}

#[test]
fn a_resume_is_exact() {
    assert_eq!(differences(&|cpu| Box::new(cpu)), Vec::<String>::new());
}

/// An engine that does not take momentum over, as a careless resume would.
struct Forgetful(Cpu);

impl Engine for Forgetful {
    fn describe(&self) -> String {
        self.0.describe()
    }

    fn load(&mut self, state: &State) -> Result<(), Error> {
        let kept = state
            .iter()
            .filter(|(name, _)| !name.starts_with(MOMENTUM_PREFIX));
        self.0.load(
            &kept
                .map(|(name, tensor)| (name.clone(), tensor.clone()))
                .collect(),
        )
    }

    fn state(&self) -> Result<State, Error> {
        self.0.state()
    }

    fn train_step(&mut self, batch: &Batch<'_>, hyper: &Hyper) -> Result<Metrics, Error> {
        self.0.train_step(batch, hyper)
    }

    fn score(
        &mut self,
        batch: &Batch<'_>,
        logits: Option<&mut Vec<f32>>,
    ) -> Result<Metrics, Error> {
        self.0.score(batch, logits)
    }

    fn predict(&mut self, pixels: Pixels<'_>) -> Result<Vec<f32>, Error> {
        self.0.predict(pixels)
    }
}

#[test]
fn a_resume_that_forgets_momentum_is_caught() {
    let found = differences(&|cpu| Box::new(Forgetful(cpu)));
    let names = |text: &str| found.iter().any(|line| line.contains(text));
    assert!(
        names("tensor conv1.weight: ") && names("metrics, line "),
        "{found:?}"
    );
}

/// An engine whose loss is not a number on some batches, which it knows by their labels; a step on one of them breaks
/// the parameters too.
struct Poisoned {
    cpu: Cpu,
    bad: Vec<Vec<u32>>,
    /// Labels of each step.
    seen: Rc<RefCell<Vec<Vec<u32>>>>,
}

impl Engine for Poisoned {
    fn describe(&self) -> String {
        self.cpu.describe()
    }

    fn load(&mut self, state: &State) -> Result<(), Error> {
        self.cpu.load(state)
    }

    fn state(&self) -> Result<State, Error> {
        self.cpu.state()
    }

    fn train_step(&mut self, batch: &Batch<'_>, hyper: &Hyper) -> Result<Metrics, Error> {
        self.seen.borrow_mut().push(batch.labels.to_vec());
        let mut metrics = self.cpu.train_step(batch, hyper)?;
        if self.bad.iter().any(|bad| bad == batch.labels) {
            let mut state = self.cpu.state()?;
            state.values_mut().for_each(|t| t.values.fill(f32::NAN));
            self.cpu.load(&state)?;
            metrics.loss_sum = f64::NAN;
        }
        Ok(metrics)
    }

    fn skipped_steps(&self) -> Result<u64, Error> {
        Ok(3)
    }

    fn score(
        &mut self,
        batch: &Batch<'_>,
        logits: Option<&mut Vec<f32>>,
    ) -> Result<Metrics, Error> {
        self.cpu.score(batch, logits)
    }

    fn predict(&mut self, pixels: Pixels<'_>) -> Result<Vec<f32>, Error> {
        self.cpu.predict(pixels)
    }
}

/// The labels of the batches of the first steps, in order.
fn labels(steps: u64) -> Vec<Vec<u32>> {
    let (dir, seen) = (tempfile::tempdir().unwrap(), Rc::new(RefCell::new(vec![])));
    let wrap = |cpu| -> Box<dyn Engine> {
        let (bad, seen) = (vec![], Rc::clone(&seen));
        Box::new(Poisoned { cpu, bad, seen })
    };
    run(dir.path(), steps, &wrap);
    seen.take()
}

#[test]
fn a_step_that_diverges_is_taken_back_and_its_batch_passed_over() {
    let batches = labels(8);
    let wrap = |cpu| -> Box<dyn Engine> {
        let (bad, seen) = (vec![batches[3].clone()], Rc::default());
        Box::new(Poisoned { cpu, bad, seen })
    };
    // A run that knows from its start what to pass over never meets the batch.
    let (clean, straight, resumed) = (
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
    );
    let first = Progress {
        skip: [3].into(),
        ..Progress::default()
    };
    run_from(clean.path(), 7, first, &wrap).unwrap();
    run(straight.path(), 7, &wrap);
    for steps in [3, 7] {
        run(resumed.path(), steps, &wrap);
    }
    let differences = |a: &tempfile::TempDir, b: &tempfile::TempDir| {
        train::compare(a.path(), b.path()).unwrap().differences
    };
    assert_eq!(differences(&straight, &resumed), Vec::<String>::new());
    let found = differences(&straight, &clean);
    assert!(
        matches!(&found[..], [only] if only.starts_with("progress: ")),
        "but for the counts of rewinds: {found:?}"
    );
    let at = |dir: &tempfile::TempDir| {
        let path = train::find(dir.path()).unwrap();
        train::load(&path).unwrap().0.progress
    };
    let (straight_at, clean_at) = (at(&straight), at(&clean));
    assert_eq!((straight_at.step, straight_at.drawn), (7, 8));
    assert_eq!(straight_at.cursor, clean_at.cursor);
    assert_eq!((straight_at.rewinds, straight_at.bad_step), (1, Some(4)));
    let log = std::fs::read_to_string(straight.path().join("log.txt")).unwrap();
    for line in [
        "the loss is not finite after step 4; it saw\n  made-up examples: records 24, 25, 26, 27, 28, 29, 30, 31\n",
        "back to step 2, and on without these images (rewind 1 of at most 3)\n",
        "3 updates since the last checkpoint were left out: in f16 ",
    ] {
        assert!(log.contains(line), "{line} is missing in {log}");
    }
}

#[test]
fn a_run_that_diverges_on_everything_gives_up() {
    let batches = labels(7);
    let wrap = |cpu| -> Box<dyn Engine> {
        let (bad, seen) = (batches.clone(), Rc::default());
        Box::new(Poisoned { cpu, bad, seen })
    };
    let dir = tempfile::tempdir().unwrap();
    let error = run_from(dir.path(), 7, Progress::default(), &wrap).unwrap_err();
    assert!(
        error.to_string().starts_with(
            "the loss is not finite after step 1; the run had gone back to a checkpoint 3 times before\nhint: "
        ),
        "{error}"
    );
}

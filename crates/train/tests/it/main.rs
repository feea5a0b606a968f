//! The loop on a small network: a resume is exact, and one that is not is caught.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;
use std::sync::atomic::AtomicBool;

use engine::cpu::{Cpu, Options};
use engine::{Batch, Engine, Error, Hyper, MOMENTUM_PREFIX, Metrics, Pixels, State, initial_state};
use graph::{Graph, Init, Plane};
use spec::Run;
use track::{Config, Resume, Terminal, Trackers};
use train::{Checkpoints, Ended, Input, Job, Meta, Pace, Plan, Progress};

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
    let (run, graph) = (spec(steps), network());
    let input = Input::open(&run).unwrap();
    let plan = Plan::new(&run, input.train_examples).unwrap();
    let meta = Meta::new(&run, input.computation(&run), None);
    let start = train::resume(dir, &meta).unwrap();
    let resume = start.as_ref().map(|(at, _)| Resume {
        step: at.step,
        is_evaluated: at.is_evaluated(),
        metrics_bytes: at.metrics_bytes,
    });
    let mut trackers = Trackers::open(dir, resume, &Config::default(), Terminal::Quiet);
    let mut engine =
        wrap(Cpu::new(&graph, &Options::new(4, 1), &initial_state(&graph, 0)).unwrap());
    let mut at = Progress::default();
    if let Some((progress, state)) = start {
        at = progress;
        engine.load(&state).unwrap();
    }
    let (checkpoints, stop) = (Checkpoints::of(dir), AtomicBool::new(false));
    let job = Job {
        plan: &plan,
        input: &input,
        checkpoints: &checkpoints,
        keep: 2,
        meta,
        until: plan.steps,
        stop: &stop,
    };
    train::train(
        job,
        &mut at,
        &mut *engine,
        &mut trackers,
        &mut Pace::default(),
    )
    .unwrap()
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

    fn state(&self) -> State {
        self.0.state()
    }

    fn train_step(&mut self, batch: &Batch<'_>, hyper: &Hyper) -> Result<Metrics, Error> {
        self.0.train_step(batch, hyper)
    }

    fn eval_step(&mut self, batch: &Batch<'_>) -> Result<Metrics, Error> {
        self.0.eval_step(batch)
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

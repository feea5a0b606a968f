//! A run that was killed, in the middle of whatever, ends with the bits of one that was not.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::{Home, json, runner, text};

/// Three epochs of 359 images; checkpoints and evaluations at unequal steps, neither at the end of an epoch.
const SETS: [&str; 9] = [
    "data.train=data/digits/train-00000-*",
    "data.train_examples=359",
    "train.batch_size=48",
    "train.bn_batch=24",
    "train.length=23 steps",
    "schedule.warmup=2 steps",
    "eval.every=7 steps",
    "checkpoint.every=3 steps",
    "data.flip=true",
];

fn assert_equal(ours: &Home, straight: &Home) {
    let found = train::compare(&ours.path(), &straight.path()).unwrap();
    assert_eq!(found.differences, Vec::<String>::new());
    assert_eq!(
        found.lines,
        23 + 4,
        "a line for each step and each evaluation"
    );
    assert!(
        found.tensors > 160 && found.values > 22_000_000,
        "{found:?}"
    );
}

/// The run that nobody disturbed, on one thread.
fn straight() -> Home {
    let home = Home::new();
    home.check(&[&SETS[..], &["train.threads=1"]].concat(), 0);
    home
}

fn start(home: &Home, threads: usize) -> Child {
    let threads = format!("train.threads={threads}");
    let args = home.args(&[&SETS[..], &[&threads]].concat());
    let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
    runner(&args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Waits until `is_time`, then kills; false if the run ended by itself before.
fn kill_when(mut child: Child, is_time: impl Fn() -> bool) -> bool {
    loop {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        if is_time() {
            child.kill().unwrap();
            child.wait().unwrap();
            return true;
        }
        std::thread::sleep(Duration::from_micros(300));
    }
}

fn lines(home: &Home) -> usize {
    fs::read_to_string(home.path().join("metrics.jsonl")).map_or(0, |t| t.lines().count())
}

#[test]
fn killed_between_checkpoints_at_any_step() {
    let straight = straight();
    for threads in [1, 2] {
        let home = Home::new();
        // In mid-epoch, right after an evaluation's line, and again before the next checkpoint.
        for at in [2, 5, 9, 10, 17, 24] {
            assert!(
                kill_when(start(&home, threads), || lines(&home) >= at),
                "the run was killed at line {at}"
            );
        }
        home.check(&SETS, 0);
        assert_equal(&home, &straight);
    }
}

#[test]
fn killed_while_a_checkpoint_is_written() {
    let straight = straight();
    let home = Home::new();
    let mut torn = 0;
    for step in [3, 7, 9, 14, 18] {
        let name = format!("checkpoints/.step-{step:010}.safetensors.tmp");
        let half = home.path().join(name);
        if kill_when(start(&home, 2), || half.exists()) && half.exists() {
            torn += 1;
        }
    }
    assert!(torn > 0, "no run was killed before its file was renamed");
    home.check(&SETS, 0);
    assert_equal(&home, &straight);
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill")
        .args(["-s", name, &child.id().to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn a_signal_ends_the_step_saves_and_exits_75() {
    let straight = straight();
    let home = Home::new();
    for (name, at) in [("TERM", 4), ("INT", 12)] {
        let child = start(&home, 2);
        while lines(&home) < at {
            std::thread::sleep(Duration::from_millis(1));
        }
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(75), "{}", text(&output.stderr));
        let summary = track::read_summary(&home.path()).unwrap();
        assert_eq!(summary.status, "interrupted");
        let (meta, _) = train::load(&train::find(&home.path()).unwrap()).unwrap();
        assert_eq!(
            meta.progress.step, summary.step,
            "the step that was done is saved"
        );
    }
    home.check(&SETS, 0);
    assert_equal(&home, &straight);
}

#[test]
fn a_directory_has_one_writer() {
    let home = Home::new();
    let mut child = start(&home, 1);
    while lines(&home) < 1 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let (_, said) = home.check(&SETS, 4);
    assert!(
        said.contains("another process is writing to this directory\nhint: "),
        "{said}"
    );
    child.kill().unwrap();
    child.wait().unwrap();
    home.check(&[&SETS[..], &["train.length=4 steps"]].concat(), 0);
}

#[test]
fn fresh_puts_the_earlier_run_aside() {
    let home = Home::new();
    let sets = [&SETS[..], &["train.length=2 steps"]].concat();
    home.check(&sets, 0);
    let mut args = home.args(&[&sets[..], &["seed=1"]].concat());
    args.push("--fresh".into());
    let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
    let (_, said) = crate::check(&args, 0);
    let aside = format!("{}.1", home.path().display());
    assert!(
        said.starts_with(&format!("the earlier run is now {aside}\n")),
        "{said}"
    );
    for (dir, seed) in [(aside, 0), (home.path().display().to_string(), 1)] {
        let (meta, _) = train::load(&train::find(dir.as_ref()).unwrap()).unwrap();
        assert!(meta.spec.contains(&format!("seed = {seed}\n")));
    }
}

#[test]
fn eval_scores_a_checkpoint_as_the_run_did() {
    let home = Home::new();
    let (out, _) = home.check(&[&SETS[..], &["train.length=3 steps"]].concat(), 0);
    let dir = home.path();
    for path in [
        dir.clone(),
        dir.join("checkpoints/latest"),
        dir.join("checkpoints/best"),
    ] {
        let (scored, _) = crate::check(&["eval", "--json", path.to_str().unwrap()], 0);
        let (scored, summary) = (json(&scored), json(&out));
        for key in ["top1", "top5", "loss"] {
            assert_eq!(scored[key], summary["eval"][key], "{key}");
        }
        assert_eq!(scored["images"], 359);
    }
    let (_, said) = crate::check(&["eval", "no/such/run"], 2);
    assert!(
        said.starts_with("no/such/run: no checkpoint here\nhint: "),
        "{said}"
    );
}

#[test]
fn an_evaluation_that_is_owed_is_made_up_for() {
    let home = Home::new();
    let child = start(&home, 2);
    while lines(&home) < 4 {
        std::thread::sleep(Duration::from_millis(1));
    }
    signal(&child, "TERM");
    child.wait_with_output().unwrap();
    let step = track::read_summary(&home.path()).unwrap().step;
    // The run now ends where it was interrupted; a finished run is an evaluated run.
    let length = format!("train.length={step} steps");
    let (out, _) = home.check(&[&SETS[..], &[&length]].concat(), 0);
    assert!(json(&out)["eval"]["top1"].is_f64(), "{out}");
    // What the old end scored is not lost when the run goes on.
    let best = home.path().join("checkpoints/best");
    let kept = fs::read_to_string(&best).unwrap();
    assert!(kept.contains(&format!("{step:010}")), "{kept}");
    // Training alone goes on from there, and leaves evaluation alone.
    let longer = format!("train.length={} steps", step + 1);
    let (out, _) = home.check(&[&SETS[..], &["mode=train", &longer]].concat(), 0);
    assert_eq!(json(&out)["step"], step + 1);
    assert_eq!(fs::read_to_string(&best).unwrap(), kept);
    // The evaluation that training alone left out is made up for by a start that evaluates.
    fs::remove_file(home.path().join("summary.json")).unwrap();
    let (out, _) = home.check(&[&SETS[..], &[&longer]].concat(), 0);
    let metrics = fs::read_to_string(home.path().join("metrics.jsonl")).unwrap();
    let scored = metrics
        .lines()
        .map(json)
        .filter(|l| l["eval/top1"].is_f64());
    assert_eq!(
        scored
            .map(|l| l["step"].as_u64().unwrap())
            .collect::<Vec<_>>(),
        [step + 1]
    );
    assert_eq!(json(&out)["status"], "done");
}

#[test]
fn eval_of_a_run_that_only_trained_asks_for_data() {
    let dir = tempfile::tempdir().unwrap();
    let spec = fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../configs/quickstart.toml"
    ))
    .unwrap();
    let config = dir.path().join("spec.toml");
    let without = spec.replace("eval = \"data/digits/validation-*\"\n", "");
    fs::write(&config, without.replace("train_and_eval", "train")).unwrap();
    let run_dir = format!("run_dir={}", dir.path().join("run").display());
    let args = [
        config.to_str().unwrap(),
        "--set",
        &run_dir,
        "--set",
        "train.length=1 steps",
        "--set",
        "track.mlflow=off",
    ];
    crate::check(&args, 0);
    let run = dir.path().join("run");
    let run = run.to_str().unwrap();
    let (_, said) = crate::check(&["eval", run], 2);
    assert!(said.contains("data.eval"), "{said}");
    crate::check(
        &["eval", run, "--set", "data.eval=data/digits/validation-*"],
        0,
    );
}

#[test]
fn a_run_that_fails_says_so_in_its_summary() {
    let home = Home::new();
    let sets = [
        &SETS[..],
        &["schedule.base_lr=1e30", "schedule.warmup=1 steps"],
    ]
    .concat();
    let (_, said) = home.check(&sets, 4);
    assert!(said.contains("is not finite after step"), "{said}");
    let summary = track::read_summary(&home.path()).unwrap();
    assert_eq!(summary.status, "failed");
    assert!(summary.reason.unwrap().contains("is not finite after step"));
}

#[test]
fn mode_eval_scores_the_latest_checkpoint_of_the_same_network_only() {
    let home = Home::new();
    let (out, _) = home.check(&[&SETS[..], &["train.length=2 steps"]].concat(), 0);
    let (said, _) = home.check(&[&SETS[..], &["mode=eval"]].concat(), 0);
    let top1 = format!("top1 {:.4}", json(&out)["eval"]["top1"].as_f64().unwrap());
    assert!(said.contains(&top1), "{top1} is missing in {said}");
    let (_, said) = home.check(
        &[&SETS[..], &["mode=eval", "model.recipe=torchvision"]].concat(),
        2,
    );
    assert!(
        said.contains("model.recipe is \"tpu2018\" there and \"torchvision\" here"),
        "{said}"
    );
}

#[test]
fn verify_resume_proves_it() {
    let args = ["verify-resume", "configs/quickstart.toml", "--steps", "8"];
    let sets = ["--set", "train.batch_size=32", "--set", "train.bn_batch=16"];
    let (out, said) = crate::check(&[&args[..], &sets].concat(), 0);
    assert!(
        out.starts_with("the resume is exact: killed after step "),
        "{out}{said}"
    );
    assert!(
        out.contains("of 8, then equal in every bit of 172 tensors"),
        "{out}"
    );
}

/// Every part of the regime that a resume could get wrong, at once: the average, mixtures by the number of the step,
/// LARS's momentum, a schedule that counts from the end.
const REGIME: [&str; 13] = [
    "optimizer.kind=lars",
    "optimizer.nesterov=false",
    "optimizer.clip_norm=1",
    "schedule.kind=polynomial",
    "schedule.base_lr=4",
    "schedule.end_lr=1e-4",
    "ema.half_life=3 steps",
    "model.dropout=0.2",
    "model.shortcut=mean",
    "model.se_ratio=0.25",
    "model.drop_connect=0.2",
    "mixup.alpha=0.2",
    "mixup.cutmix_alpha=1",
];

#[test]
fn verify_resume_proves_it_for_the_whole_regime() {
    let mut args = vec!["verify-resume", "configs/quickstart.toml", "--steps", "8"];
    let sets = [
        "train.batch_size=32",
        "train.bn_batch=16",
        "progressive.until=['4 steps']",
        "progressive.resolution=[64]",
    ];
    for set in REGIME.iter().chain(&sets) {
        args.extend(["--set", set]);
    }
    let (out, said) = crate::check(&args, 0);
    // Those of the network, 139 of them with an average.
    assert!(
        out.contains("of 8, then equal in every bit of 375 tensors"),
        "{out}{said}"
    );
}

#[test]
fn an_average_is_scored_beside_the_parameters_or_in_their_place() {
    let home = Home::new();
    let both = [&SETS[..], &REGIME, &["train.length=4 steps"]].concat();
    let (out, said) = home.check(&both, 0);
    let summary = json(&out);
    let average = summary["eval"]["ema_top1"].as_f64().unwrap();
    assert_eq!(summary["best"]["metric"], "ema_top1");
    assert_eq!(summary["best"]["value"], average);
    assert!(said.contains("ema top1"), "{said}");
    let metrics = fs::read_to_string(home.path().join("metrics.jsonl")).unwrap();
    let last = json(metrics.lines().last().unwrap());
    assert_eq!(last["eval/ema_top1"], average);

    // `runner eval` says the same of the checkpoint, and of either alone.
    let run = home.path();
    let run = run.to_str().unwrap();
    let score = |set: &str| json(&crate::check(&["eval", run, "--json", "--set", set], 0).0);
    let scored = score("ema.eval=both");
    assert_eq!(scored["top1"], summary["eval"]["top1"]);
    assert_eq!(scored["ema_top1"], average);
    assert_eq!(scored["ema_loss"], last["eval/ema_loss"]);
    let alone = score("ema.eval=average");
    assert_eq!(alone["loss"], scored["ema_loss"]);
    assert!(alone["ema_loss"].is_null());
    let raw = score("ema.eval=raw");
    assert_eq!(raw["loss"], scored["loss"]);
    assert_ne!(raw["loss"], alone["loss"]);
}

/// Killed where the resolution changes: before the evaluation there, after it, and in the steps around.
#[test]
fn images_that_grow_go_on_where_they_were() {
    let grows = [
        "progressive.until=['5 steps']",
        "progressive.resolution=[64]",
        "train.length=9 steps",
    ];
    let sets = [&SETS[..], &grows].concat();
    let straight = Home::new();
    let (_, said) = straight.check(&sets, 0);
    for phase in ["64 px until step 5", "32 px until step 9"] {
        assert!(said.contains(phase), "{phase} is missing in {said}");
    }
    let metrics = fs::read_to_string(straight.path().join("metrics.jsonl")).unwrap();
    let scored = metrics
        .lines()
        .map(json)
        .filter(|l| l["eval/top1"].is_f64());
    let scored: Vec<u64> = scored.map(|l| l["step"].as_u64().unwrap()).collect();
    assert_eq!(scored, [5, 7, 9]);
    let home = Home::new();
    for at in [5, 6] {
        let args = home.args(&sets);
        let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
        let child = runner(&args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        kill_when(child, || lines(&home) >= at);
    }
    home.check(&sets, 0);
    let found = train::compare(&home.path(), &straight.path()).unwrap();
    assert_eq!(found.differences, Vec::<String>::new());
    assert_eq!(found.lines, 9 + 3);
}

/// The moments are spread over the run by a low-discrepancy sequence: 5 of them, or as many as `KILLS` says.
#[test]
fn killed_at_any_moment() {
    let kills = std::env::var("KILLS").map_or(5, |n| n.parse().expect("KILLS is a number"));
    let begun = std::time::Instant::now();
    let straight = straight();
    let whole = begun.elapsed();
    let (mut home, mut killed) = (Home::new(), 0);
    for i in 1..=kills {
        let part = (f64::from(i) * 0.618_033_988_75).fract();
        let begun = std::time::Instant::now();
        if kill_when(start(&home, 2), || begun.elapsed() >= whole.mul_f64(part)) {
            killed += 1;
            continue;
        }
        // It came to its end first: that one is compared, and the next begins.
        assert_equal(&home, &straight);
        home = Home::new();
    }
    assert!(killed > 0, "no run was killed");
    home.check(&SETS, 0);
    assert_equal(&home, &straight);
}

//! What a spec means, and the exact text of what is said about a wrong one.

#![expect(clippy::unwrap_used, reason = "a test may stop")]

mod layers;
mod schema;

use std::path::Path;

use layers::load;
use spec::{
    Crop, Decay, Device, Instructions, Length, Mlflow, Mode, OptimizerKind, Precision, Recipe,
    Resize, Run,
};
use spec::{ScheduleKind, Source, parse};

/// A spec of noise: the shortest that is right.
const FAKE: &str = "name = \"x\"\n[data]\nsource = \"fake\"\n";

fn sets(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| text.to_string()).collect()
}

fn fake(set: &[&str]) -> Run {
    parse(FAKE, "x.toml", &sets(set)).unwrap_or_else(|errors| panic!("{set:?}: {errors}"))
}

/// What is said about a text and arguments.
fn check(text: &str, set: &[&str], expected: &str) {
    let errors = parse(text, "x.toml", &sets(set)).unwrap_err();
    assert_eq!(errors.to_string(), expected.trim_end(), "{text}{set:?}");
}

/// What is said about a single argument over a right spec, less the argument and the key themselves.
fn check_set(set: &str, expected: &str) {
    let errors = parse(FAKE, "x.toml", &sets(&[set])).unwrap_err();
    let key = set.split('=').next().unwrap();
    let said = format!("--set {set}: {key}: {expected}");
    assert_eq!(errors.to_string(), said);
}

/// The same, where the schema refuses the argument as well.
fn check_range(set: &str, expected: &str) {
    check_set(set, expected);
    assert!(schema::refusal_of_set(set).is_some(), "{set}");
}

fn length(text: &str) -> Length {
    text.parse().unwrap()
}

#[test]
fn defaults() {
    let run = fake(&[]);
    assert_eq!(run.name, "x");
    assert_eq!(run.mode, Mode::TrainAndEval);
    assert_eq!(run.seed, 0);
    assert_eq!(run.run_dir, None);
    assert_eq!(run.run_dir(), Path::new("runs/x"));

    assert_eq!(run.model.depth, 50);
    assert_eq!(run.model.resolution, 224);
    assert_eq!(run.model.classes, 1000);
    assert_eq!(run.model.recipe, Recipe::Tpu2018);
    assert_eq!(run.model.labels, None);

    assert_eq!(run.data.train, None);
    assert_eq!(run.data.eval, None);
    assert_eq!(run.data.label_offset, 1);
    assert_eq!(run.data.crop, Crop::Tf);
    assert_eq!(run.data.crop_area, [0.08, 1.0]);
    assert_eq!(run.data.crop_aspect, [0.75, 1.3333333]);
    assert!(run.data.flip);
    assert_eq!(run.data.resize, Resize::Pillow);
    assert_eq!(run.data.lanes, 64);
    assert_eq!(run.data.shuffle_window, 64);
    assert_eq!(run.data.train_examples, None);
    assert_eq!(run.data.eval_examples, None);
    assert_eq!(run.data.max_bad_records, 0);

    assert_eq!(run.train.batch_size, 1024);
    assert_eq!(run.train.bn_batch, None);
    assert_eq!(run.train.bn_batch(), 128);
    assert_eq!(run.train.length, length("112590 steps"));
    assert_eq!(run.train.precision, Precision::F32);
    assert_eq!(run.train.device, Device::Auto);
    assert_eq!(run.train.threads, 0);
    assert_eq!(run.train.instructions, Instructions::Auto);
    assert!(run.train.winograd);

    assert_eq!(run.optimizer.kind, OptimizerKind::Sgd);
    assert_eq!(run.optimizer.momentum, 0.9);
    assert!(run.optimizer.nesterov);
    assert_eq!(run.optimizer.weight_decay, 1e-4);
    assert_eq!(run.optimizer.decay, Decay::NoNorm);

    assert_eq!(run.schedule.kind, ScheduleKind::Step);
    assert_eq!(run.schedule.base_lr, 0.1);
    assert_eq!(run.schedule.warmup, length("5 epochs"));
    let milestones = ["30 epochs", "60 epochs", "80 epochs"].map(length);
    assert_eq!(run.schedule.milestones, milestones);
    assert_eq!(run.schedule.factor, 0.1);

    assert_eq!(run.loss.label_smoothing, 0.0);
    assert_eq!(run.eval.every, length("1 epoch"));
    assert_eq!(run.eval.crop_ratio, 0.875);
    assert_eq!(run.checkpoint.every, length("1 epoch"));
    assert_eq!(run.checkpoint.keep, 3);

    assert_eq!(run.track.mlflow, Mlflow::Auto);
    assert_eq!(run.track.experiment, "runner");
    assert!(run.track.tensorboard);
    assert!(run.track.system_metrics);
    assert_eq!(run.track.register_model, None);
}

#[test]
fn the_default_source_is_tfrecord() {
    let text = "name = \"x\"\n[data]\ntrain = \"a-*\"\neval = \"b-*\"\n";
    assert_eq!(
        parse(text, "x.toml", &[]).unwrap().data.source,
        Source::Tfrecord
    );
}

#[test]
fn only_made_up_sources_have_a_default_size() {
    let examples = |set: &[&str]| {
        let data = fake(set).data;
        (data.train_examples(), data.eval_examples())
    };
    assert_eq!(examples(&[]), (Some(1_281_167), Some(256)));
    assert_eq!(
        examples(&["data.source=zeros"]),
        (Some(1_281_167), Some(256))
    );
    assert_eq!(
        examples(&["data.train_examples=7", "data.eval_examples=8"]),
        (Some(7), Some(8))
    );
    let tfrecord = ["data.source=tfrecord", "data.train=a", "data.eval=b"];
    assert_eq!(examples(&tfrecord), (None, None));
}

#[test]
fn bn_batch_follows_a_small_batch() {
    let small = ["train.batch_size=32", "train.length=90 epochs"];
    assert_eq!(fake(&small).train.bn_batch(), 32);
    let set = [&small[..], &["train.bn_batch=8"]].concat();
    assert_eq!(fake(&set).train.bn_batch(), 8);
}

#[test]
fn arguments_win_over_the_file_and_the_last_wins() {
    let text = format!("{FAKE}lanes = 2\nshuffle_window = 3\n");
    let set = sets(&["data.lanes=4", "data.lanes=5", "seed = 0xff"]);
    let run = parse(&text, "x.toml", &set).unwrap();
    assert_eq!(
        (run.data.lanes, run.data.shuffle_window, run.seed),
        (5, 3, 255)
    );
}

#[test]
fn arguments_need_no_quotes() {
    let run = fake(&[
        "train.length=90 epochs",
        "schedule.milestones=['1 epoch', \"50%\"]",
        "data.train=path with spaces/*",
        "model.recipe='torchvision'",
        "schedule.base_lr=1",
        "data.lanes=1_000",
    ]);
    assert_eq!(run.data.lanes, 1000);
    assert_eq!(run.train.length, length("90 epochs"));
    assert_eq!(
        run.schedule.milestones,
        [length("1 epoch"), length("50 percent")]
    );
    assert_eq!(run.data.train.as_deref(), Some("path with spaces/*"));
    assert_eq!(run.model.recipe, Recipe::Torchvision);
    assert_eq!(run.schedule.base_lr, 1.0);
}

#[test]
fn every_way_to_write_a_section_is_read() {
    for text in [
        "name = 'x'\ndata.source = 'fake'\n",
        "name = 'x'\ndata = { source = 'fake' }\n",
        "name = 'x'\n[data]\nsource = 'fake'\n",
    ] {
        assert_eq!(parse(text, "x.toml", &[]).unwrap(), fake(&[]));
    }
    assert_eq!(fake(&["data={flip=false}"]), fake(&["data.flip=false"]));
}

#[test]
fn a_resolved_spec_parses_back_to_an_equal_run() {
    let seed = format!("seed={}", u64::MAX);
    for set in [
        &[][..],
        &[
            &seed,
            "run_dir=elsewhere",
            "mode=train",
            "data.crop_area=[0.1, 0.3]",
            "data.train_examples=12",
            "train.bn_batch=64",
            "optimizer.weight_decay=5e-5",
            "schedule.milestones=[]",
            "schedule.warmup=0.5 epochs",
            "eval.every=50%",
        ],
    ] {
        let run = fake(set);
        assert_eq!(parse(&run.to_toml(), "spec.toml", &[]).unwrap(), run);
    }
    assert!(fake(&[]).to_toml().contains("every = \"1 epoch\"\n"));
}

#[test]
fn unknown_key() {
    check(
        "name = \"x\"\n[data]\nsource = \"fake\"\n\n[train]\n  batchsize = 3\n",
        &[],
        "x.toml:6:3: train.batchsize: unknown key\nhint: did you mean train.batch_size?",
    );
}

#[test]
fn unknown_key_at_the_top() {
    check(
        &format!("sed = 1\n{FAKE}"),
        &[],
        "x.toml:1:1: sed: unknown key\nhint: did you mean seed?",
    );
}

#[test]
fn unknown_key_of_another_section() {
    check(
        &format!("{FAKE}[train]\nmomentum = 0.5\n"),
        &[],
        "x.toml:5:1: train.momentum: unknown key\nhint: did you mean optimizer.momentum?",
    );
    check(
        &format!("base_lr = 0.5\n{FAKE}[train]\nseed = 1\n"),
        &[],
        "x.toml:1:1: base_lr: unknown key\nhint: did you mean schedule.base_lr?\n\
         x.toml:6:1: train.seed: unknown key\nhint: did you mean seed, above all sections?",
    );
}

#[test]
fn unknown_key_like_no_other() {
    check(
        &format!("{FAKE}[checkpoint]\nzzz = 1\n"),
        &[],
        "x.toml:5:1: checkpoint.zzz: unknown key\nhint: the keys of [checkpoint] are best, every, keep, mirror",
    );
    check_set(
        "zzz=1",
        "unknown key\nhint: the keys outside sections are mode, name, run_dir, seed",
    );
}

#[test]
fn unknown_section() {
    check(
        &format!("{FAKE}[optim]\nmomentum = 0.5\nlr = 1\n[zzz]\n"),
        &[],
        "x.toml:4:2: optim: unknown section\nhint: did you mean [optimizer]?\n\
         x.toml:7:2: zzz: unknown section\n\
         hint: the sections are checkpoint, data, ema, eval, loss, mixup, model, optimizer, progressive, schedule, track, train",
    );
}

#[test]
fn wrong_type() {
    check(
        &format!("{FAKE}[train]\nbatch_size = \"abc\"\n"),
        &[],
        "x.toml:5:1: train.batch_size: expected a whole number from 1 to 65536, not \"abc\"",
    );
}

#[test]
fn every_type_has_its_words() {
    check_set(
        "train.batch_size=1024.0",
        "expected a whole number from 1 to 65536, not 1024.0",
    );
    check_set(
        "seed=-1",
        "expected a whole number from 0 to 18446744073709551615, not -1",
    );
    check_set(
        "data.train_examples=-1",
        "expected a whole number from 1 to 1000000000000, not -1",
    );
    check_set(
        "model.depth=deep",
        "expected one of 18, 34, 50, 101, 152, 200, 270, 350, 420, not \"deep\"",
    );
    check_set("data.label_offset=0.5", "expected a whole number, not 0.5");
    check_set("schedule.base_lr=fast", "expected a number, not \"fast\"");
    check_set("data.flip=1", "expected true or false, not 1");
    check_set("data.crop_area=0.1", "expected a list, not 0.1");
    check_set("data.crop_area=[0.1]", "expected two numbers, not 1");
    check_set(
        "data.crop_area=[0.1, 0.2, 0.3]",
        "expected two numbers, not 3",
    );
    check_set(
        "data.crop_area=[0.1, 'x']",
        "element 2: expected a number, not \"x\"",
    );
    check_set("run_dir=['a']", "expected a string, not a list");
    check_set(
        "seed={a = 1}",
        "expected a whole number from 0 to 18446744073709551615, not a table",
    );
    check_set("seed=1979-05-27", "no key is a date such as 1979-05-27");
    check_set(
        "seed=99999999999999999999",
        "expected a whole number from 0 to 18446744073709551615, not 99999999999999999999",
    );
    check_set(
        "data.label_offset=99999999999999999999",
        "99999999999999999999 is too large",
    );
    check_set("schedule.base_lr=1e999", "1e999 is too large");
    check_set(
        "train=5",
        "expected the section [train], not 5\nhint: write train.x = .., or x = .. below [train]",
    );
}

#[test]
fn text_without_quotes() {
    check(
        "name = 2018\n[data]\nsource = \"fake\"\n",
        &[],
        "x.toml:1:1: name: expected a string, not 2018\nhint: text is written in quotes",
    );
    check_set(
        "name=2018",
        "expected a string, not 2018\nhint: quote it for TOML and for the shell: --set 'name=\"..\"'",
    );
}

#[test]
fn numbers_in_quotes() {
    check(
        &format!(
            "{FAKE}flip = \"true\"\n[train]\nbatch_size = \"256\"\n[schedule]\nbase_lr = \"0.1\"\n"
        ),
        &[],
        "x.toml:4:1: data.flip: expected true or false, not \"true\"\nhint: write it without quotes\n\
         x.toml:6:1: train.batch_size: expected a whole number from 1 to 65536, not \"256\"\n\
         hint: write it without quotes\n\
         x.toml:8:1: schedule.base_lr: expected a number, not \"0.1\"\nhint: write it without quotes",
    );
}

#[test]
fn wrong_choice() {
    check(
        &format!("{FAKE}crop = \"torch\"\n"),
        &[],
        "x.toml:4:1: data.crop: expected one of \"tf\", \"torchvision\", \"none\", not \"torch\"\n\
         hint: did you mean \"torchvision\"?",
    );
    for (set, shown) in [
        ("mode=3", "3"),
        ("mode=true", "true"),
        ("mode={eval = 1}", "a table"),
    ] {
        check_set(
            set,
            &format!("expected one of \"train_and_eval\", \"train\", \"eval\", not {shown}"),
        );
    }
}

#[test]
fn wrong_length() {
    const FORMS: &str = "expected a length such as \"90 epochs\", \"112590 steps\", \"1000 examples\" or \"50 percent\"";
    check_set("train.length=90", &format!("{FORMS}, not 90"));
    check_set("train.length=90 days", &format!("{FORMS}, not \"90 days\""));
    check_set(
        "schedule.milestones=['1 epoch', 2]",
        &format!("element 2: {FORMS}, not 2"),
    );
}

#[test]
fn out_of_range() {
    check(
        &format!("{FAKE}[optimizer]\nmomentum = 1.0\n"),
        &[],
        "x.toml:5:1: optimizer.momentum: expected at least 0 and below 1, not 1.0",
    );
}

#[test]
fn every_range_is_checked() {
    let plain = "at most 200 letters, digits, '.', '_' and '-'";
    check_range("name=a b", &format!("expected {plain}, not \"a b\""));
    check_range("name=", &format!("expected {plain}, not \"\""));
    for name in [".", "..", "..."] {
        check_range(
            &format!("name={name}"),
            &format!("expected {plain}, not {name:?}"),
        );
    }
    check_range("name=ä", &format!("expected {plain}, not \"ä\""));
    let long = "x".repeat(201);
    check_range(
        &format!("name={long}"),
        &format!("expected {plain}, not {long:?}"),
    );
    check_range(
        "model.depth=51",
        "expected one of 18, 34, 50, 101, 152, 200, 270, 350, 420, not 51",
    );
    for resolution in ["0", "31", "100", "480"] {
        check_range(
            &format!("model.resolution={resolution}"),
            &format!("expected a multiple of 32 from 32 to 448, not {resolution}"),
        );
    }
    for area in ["[0.0, 1.0]", "[0.1, 1.5]"] {
        check_range(
            &format!("data.crop_area={area}"),
            &format!("expected two increasing numbers above 0 and at most 1, not {area}"),
        );
    }
    for aspect in ["[0.0, 1.0]", "[1.0, 1001.0]"] {
        check_range(
            &format!("data.crop_aspect={aspect}"),
            &format!("expected two increasing numbers above 0 and at most 1000, not {aspect}"),
        );
    }
    for (key, least, most) in WHOLE {
        let range = format!("a whole number from {least} to {most}");
        let outside = [(least > 0).then(|| least - 1), Some(most + 1)];
        for value in outside.into_iter().flatten() {
            check_range(
                &format!("{key}={value}"),
                &format!("expected {range}, not {value}"),
            );
        }
        // What fits no integer at all is answered with the range as well.
        let huge = u128::MAX;
        check_set(
            &format!("{key}={huge}"),
            &format!("expected {range}, not {huge}"),
        );
        for value in [least, most] {
            let set = format!("{key}={value}");
            assert_eq!(schema::refusal_of_set(&set), None, "{set}");
        }
    }
    for key in ["optimizer.momentum", "loss.label_smoothing"] {
        for (toml, shown) in [("-0.1", "-0.1"), ("1", "1.0")] {
            check_range(
                &format!("{key}={toml}"),
                &format!("expected at least 0 and below 1, not {shown}"),
            );
        }
    }
    check_range(
        "optimizer.weight_decay=-1.0",
        "expected at least 0, not -1.0",
    );
    for key in ["schedule.base_lr", "schedule.factor"] {
        for (toml, shown) in [("0", "0.0"), ("-1.5", "-1.5")] {
            check_range(
                &format!("{key}={toml}"),
                &format!("expected above 0, not {shown}"),
            );
        }
    }
    for ratio in ["0.0", "1.1"] {
        check_range(
            &format!("eval.crop_ratio={ratio}"),
            &format!("expected above 0 and at most 1, not {ratio}"),
        );
    }
    check_range("data.random_erasing=1.5", "expected from 0 to 1, not 1.5");
    check_range("track.experiment=", "expected a name, not \"\"");
}

/// Keys of whole numbers, and the ends of their ranges.
const WHOLE: [(&str, u64, u64); 16] = [
    ("model.classes", 2, 1_000_000),
    ("data.lanes", 1, 65_536),
    ("data.shuffle_window", 1, 10_000_000),
    ("data.train_examples", 1, 1_000_000_000_000),
    ("data.eval_examples", 1, 1_000_000_000_000),
    ("data.max_bad_records", 0, 1_000_000_000_000),
    ("data.cache_gb", 1, 1_000_000),
    ("data.augment_ops", 1, 16),
    ("data.augment_magnitude", 0, 30),
    ("model.drop_block_size", 1, 65_536),
    ("train.batch_size", 1, 65_536),
    ("train.bn_batch", 1, 65_536),
    ("train.threads", 0, 1024),
    ("train.max_rewinds", 0, 1000),
    ("eval.wait", 0, 100_000_000),
    ("checkpoint.keep", 1, 1_000_000),
];

/// A key that is added without a range would be found here.
#[test]
fn every_whole_number_ends_somewhere() {
    for (path, rule) in schema::whole_numbers() {
        let listed = WHOLE.iter().any(|(key, ..)| *key == path);
        let others = ["seed", "model.depth", "data.label_offset"];
        assert!(
            listed || others.contains(&&*path) || rule.get("multipleOf").is_some(),
            "{path}"
        );
    }
}

#[test]
fn ranges_that_no_schema_can_say() {
    for area in ["[0.5, 0.1]", "[NaN, 1.0]"] {
        let toml = area.to_lowercase();
        check_set(
            &format!("data.crop_area={toml}"),
            &format!("expected two increasing numbers above 0 and at most 1, not {area}"),
        );
    }
    for jitter in [
        "[-0.1, 0.0, 0.0, 0.0]",
        "[0.0, 0.0, 0.0, 0.6]",
        "[0.0, NaN, 0.0, 0.0]",
    ] {
        check_set(
            &format!("data.color_jitter={}", jitter.to_lowercase()),
            &format!(
                "expected four numbers, the first three from 0 to 10 and the last from 0 to 0.5, not {jitter}"
            ),
        );
    }
    for aspect in ["[2.0, 1.0]", "[1.0, inf]"] {
        check_set(
            &format!("data.crop_aspect={aspect}"),
            &format!("expected two increasing numbers above 0 and at most 1000, not {aspect}"),
        );
    }
    for key in ["optimizer.momentum", "loss.label_smoothing"] {
        check_set(
            &format!("{key}=nan"),
            "expected at least 0 and below 1, not NaN",
        );
    }
    check_set("optimizer.weight_decay=inf", "expected at least 0, not inf");
    for key in ["schedule.base_lr", "schedule.factor"] {
        for (toml, shown) in [("nan", "NaN"), ("inf", "inf")] {
            check_set(
                &format!("{key}={toml}"),
                &format!("expected above 0, not {shown}"),
            );
        }
    }
    for key in ["eval.every", "checkpoint.every"] {
        check_set(
            &format!("{key}=0 epochs"),
            "expected a length above 0, not \"0 epochs\"",
        );
    }
    check_set(
        "train.length=0 steps",
        "expected a length above 0, not \"0 steps\"\n\
         hint: mode = \"eval\" scores the latest checkpoint without training",
    );
    check_set(
        "train.length=50%",
        "expected steps, epochs or examples, of which the other lengths can be a percentage, not \"50 percent\"",
    );
}

#[test]
fn the_ends_of_ranges_are_inside() {
    for set in [
        "model.depth=200",
        "model.resolution=32",
        "model.resolution=448",
        "model.classes=2",
        "model.classes=1000000",
        "data.crop_area=[1, 1]",
        "data.crop_aspect=[1, 1]",
        "data.crop_aspect=[0.001, 1000]",
        "data.lanes=1",
        "data.lanes=65536",
        "data.shuffle_window=10000000",
        "data.train_examples=1000000000000",
        "data.max_bad_records=0",
        "data.augment_magnitude=0",
        "data.color_jitter=[10, 0, 0, 0.5]",
        "data.random_erasing=1",
        "train.batch_size=65536",
        "train.threads=0",
        "train.threads=1024",
        "optimizer.momentum=0",
        "optimizer.weight_decay=0",
        "schedule.warmup=0 epochs",
        "schedule.milestones=[]",
        "loss.label_smoothing=0",
        "optimizer.clip_norm=0.5",
        "schedule.end_lr=0",
        "mixup.alpha=0",
        "mixup.cutmix_alpha=1000",
        "ema.half_life=0.5 epochs",
        "eval.crop_ratio=1",
        "eval.every=100%",
        "checkpoint.keep=1",
        "name=A.b_c-9",
    ] {
        fake(&[set]);
        assert_eq!(schema::refusal_of_set(set), None, "{set}");
    }
    fake(&["train.batch_size=1", "train.length=90 epochs"]);
}

#[test]
fn milestones_increase() {
    let refused = |set: &str, later: &str, earlier: &str| {
        check_set(
            &format!("schedule.milestones={set}"),
            &format!("expected increasing lengths, but \"{later}\" follows \"{earlier}\""),
        );
    };
    refused("['2 epochs', '1 epoch']", "1 epoch", "2 epochs");
    refused("['2 epochs', '2 epochs']", "2 epochs", "2 epochs");
    // Units are compared in steps where the number of examples is known.
    refused("['2 epochs', '3 steps']", "3 steps", "2 epochs");
    refused("['90%', '2 epochs']", "2 epochs", "90 percent");
    fake(&["schedule.milestones=['3 steps', '2 epochs', '90%']"]);
    // Only a step schedule has milestones.
    fake(&[
        "schedule.milestones=['2 epochs', '1 epoch']",
        "schedule.kind=cosine",
    ]);
}

#[test]
fn three_at_once() {
    check(
        "name = \"x\"\n[model]\ndepth = 51\n[data]\nsource = \"fake\"\nlane = 3\n[loss]\nlabel_smoothing = \"much\"\n",
        &["train.batch_size=0"],
        "x.toml:3:1: model.depth: expected one of 18, 34, 50, 101, 152, 200, 270, 350, 420, not 51\n\
         x.toml:6:1: data.lane: unknown key\nhint: did you mean data.lanes?\n\
         x.toml:8:1: loss.label_smoothing: expected a number, not \"much\"\n\
         --set train.batch_size=0: train.batch_size: expected a whole number from 1 to 65536, not 0",
    );
}

#[test]
fn set_with_an_unknown_key() {
    check(
        FAKE,
        &[
            "trian.batch_size=3",
            "train.batchsize=4",
            "train.batch_size.x=5",
        ],
        "--set trian.batch_size=3: trian: unknown section\nhint: did you mean [train]?\n\
         --set train.batchsize=4: train.batchsize: unknown key\nhint: did you mean train.batch_size?\n\
         --set train.batch_size.x=5: train.batch_size.x: unknown key\nhint: did you mean train.batch_size?",
    );
}

#[test]
fn set_without_a_value() {
    check(
        FAKE,
        &["train.batch_size"],
        "--set train.batch_size: no value\nhint: write section.key=value, such as train.batch_size=512",
    );
}

#[test]
fn set_without_a_key() {
    check(
        FAKE,
        &["=3", "train.=3"],
        "--set =3: unknown key\nhint: the keys outside sections are mode, name, run_dir, seed\n\
         --set train.=3: train.: unknown key\n\
         hint: the keys of [train] are batch_size, bn_batch, convolutions, device, instructions, length, max_loss, max_rewinds, \
         precision, threads, winograd",
    );
}

#[test]
fn a_wrong_value_that_an_argument_replaces_does_not_matter() {
    let text = format!("{FAKE}lanes = \"many\"\n");
    let run = parse(&text, "x.toml", &sets(&["data.lanes=2"])).unwrap();
    assert_eq!(run.data.lanes, 2);
}

#[test]
fn syntax_error() {
    check(
        "name = \"x\"\n[data\nsource = \"fake\"\n",
        &["train.batch_size"],
        "x.toml:2:6: not TOML: unclosed table, expected `]`\n\
         hint: text is written in quotes, lists as [a, b], sections as [name]\n\
         --set train.batch_size: no value\nhint: write section.key=value, such as train.batch_size=512",
    );
}

#[test]
fn the_same_key_twice() {
    check(
        "name = \"x\"\nname = \"y\"\n",
        &[],
        "x.toml:2:1: not TOML: duplicate key\nhint: take one of the two out",
    );
}

#[test]
fn columns_count_characters() {
    check(
        "name = \"ä\" [\n",
        &[],
        "x.toml:1:12: not TOML: unexpected key or value, expected newline, `#`\n\
         hint: text is written in quotes, lists as [a, b], sections as [name]",
    );
}

#[test]
fn bn_batch_that_does_not_divide() {
    check(
        &format!("{FAKE}[train]\nbatch_size = 100\nbn_batch = 32\n"),
        &[],
        "x.toml:6:1: train.bn_batch: 32 does not divide train.batch_size = 100\n\
         hint: train.bn_batch = 25 or 50 does",
    );
    check_set(
        "train.batch_size=1000",
        "1000 is no multiple of the default train.bn_batch = 128\n\
         hint: train.bn_batch = 125 or 200 does",
    );
    check_set(
        "train.batch_size=131",
        "131 is no multiple of the default train.bn_batch = 128\nhint: train.bn_batch = 131 does",
    );
    check_set(
        "train.bn_batch=2048",
        "2048 does not divide train.batch_size = 1024\nhint: train.bn_batch = 1024 does",
    );
}

/// At 32 px the last planes are 1 x 1: one image is one value of a channel.
#[test]
fn one_value_has_no_variance() {
    const WHAT: &str = "1 image at a time cannot be normalised at model.resolution = 32: the last planes are 1 x 1, \
                        and one value has no variance";
    let small = format!("{FAKE}[model]\nresolution = 32\n[train]\nlength = \"9 epochs\"\n");
    let more = |hint: &str| format!("{WHAT}\nhint: {hint}, or model.resolution = 64 or more");
    check(
        &format!("{small}batch_size = 64\nbn_batch = 1\n"),
        &[],
        &format!(
            "x.toml:9:1: train.bn_batch: {}",
            more("train.bn_batch = 2 or more")
        ),
    );
    check(
        &format!("{small}batch_size = 35\n"),
        &["train.bn_batch=1"],
        &format!(
            "--set train.bn_batch=1: train.bn_batch: {}",
            more("train.bn_batch = 5 or more")
        ),
    );
    // The default of bn_batch follows the batch.
    check(
        &format!("{small}batch_size = 1\n"),
        &[],
        &format!(
            "x.toml:8:1: train.batch_size: {}",
            more("train.batch_size = 2 or more")
        ),
    );
    check(
        &format!("{small}batch_size = 1\nbn_batch = 1\n"),
        &[],
        &format!(
            "x.toml:9:1: train.bn_batch: {}",
            more("train.batch_size = 2 or more")
        ),
    );
    let one = ["train.batch_size=1", "train.length=9 epochs"];
    fake(&[&one[..], &["model.resolution=64"]].concat());
    fake(&[
        "train.batch_size=2",
        "train.length=9 epochs",
        "model.resolution=32",
    ]);
    // An evaluation normalises by running statistics.
    fake(&[&one[..], &["model.resolution=32", "mode=eval"]].concat());
}

#[test]
fn a_wrong_key_is_not_held_against_others() {
    check(
        &format!("{FAKE}[train]\nbatch_size = \"100\"\nbn_batch = 3\n"),
        &[],
        "x.toml:5:1: train.batch_size: expected a whole number from 1 to 65536, not \"100\"\n\
         hint: write it without quotes",
    );
}

#[test]
fn missing_name() {
    check(
        "[data]\nsource = \"fake\"\n",
        &[],
        "x.toml: name: missing\nhint: write name = \"..\"; the run then lives in runs/<name>",
    );
    parse("data.source = 'fake'", "x.toml", &sets(&["name=y"])).unwrap();
}

#[test]
fn missing_shards() {
    let missing = |key: &str| {
        format!(
            "x.toml: {key}: missing\nhint: write {key} = \"path/to/shards-*\", or data.source = \"fake\" to do without data"
        )
    };
    let both = format!("{}\n{}", missing("data.train"), missing("data.eval"));
    check("name = 'x'", &[], &both);
    check("name = 'x'", &["mode=train"], &missing("data.train"));
    check("name = 'x'", &["mode=eval"], &missing("data.eval"));
    check("name = 'x'", &["data.eval=a"], &missing("data.train"));
}

#[test]
fn only_shards_can_be_in_a_bucket() {
    let run = fake(&["data.train=gs://bucket/train-*", "data.eval=az://b/v-*"]);
    assert_eq!(run.data.train.as_deref(), Some("gs://bucket/train-*"));
    check(
        "name = 'x'\n[data]\nsource = 'folder'\ntrain = 'gs://b/train'\neval = 'e'",
        &[],
        "x.toml:4:1: data.train: gs:// is not supported yet\nhint: give a path on this machine",
    );
    check(
        "name = \"x\"\n[data]\ntrain = \"gcs://bucket/train-*\"\neval = \"https://b/v-*\"\ncache = \"s3://b/c\"",
        &["run_dir=s3://b/c"],
        "x.toml:3:1: data.train: gcs:// is not supported\nhint: give a path on this machine, or gs://, s3:// or az://\n\
         x.toml:4:1: data.eval: https:// is not supported\nhint: give a path on this machine, or gs://, s3:// or az://\n\
         x.toml:5:1: data.cache: s3:// is not supported yet\nhint: give a path on this machine\n\
         --set run_dir=s3://b/c: run_dir: s3:// is not supported yet\nhint: give a path on this machine",
    );
    check_set(
        "model.labels=https://x/labels.txt",
        "https:// is not supported\nhint: give a path on this machine",
    );
    check(
        "extends = 'gs://b/base.toml'\n",
        &[],
        "x.toml:1:11: extends: gs:// is not supported yet\nhint: give a path on this machine",
    );
    let errors = load(Path::new("gs://b/x.toml"), None, &[], &[]).unwrap_err();
    assert_eq!(
        errors.to_string(),
        "gs://b/x.toml: gs:// is not supported yet\n\
         hint: give the path of a spec, relative to the working directory; configs/ has examples"
    );
}

#[test]
fn devices() {
    for (text, device) in [
        ("auto", Device::Auto),
        ("cpu", Device::Cpu),
        ("cuda", Device::Cuda(0)),
        ("cuda:0", Device::Cuda(0)),
        ("cuda:12", Device::Cuda(12)),
        ("cuda:all", Device::AllCards),
    ] {
        let run = parse(FAKE, "x.toml", &sets(&[&format!("train.device={text}")])).unwrap();
        assert_eq!(run.train.device, device);
        let again = parse(&run.to_toml(), "x.toml", &[]).unwrap();
        assert_eq!(again, run);
    }
    let run = parse(FAKE, "x.toml", &sets(&["train.device=cuda:3,0,63"])).unwrap();
    let Device::Cards(cards) = run.train.device else {
        panic!("{:?}", run.train.device)
    };
    assert_eq!(cards.numbers().collect::<Vec<_>>(), [0, 3, 63]);
    assert_eq!(run.train.device.to_string(), "cuda:0,3,63");
    assert_eq!(parse(&run.to_toml(), "x.toml", &[]).unwrap(), run);
    let said = |text: &str| {
        let forms = r#""auto", "cpu", "cuda", "cuda:N", "cuda:N,M" or "cuda:all""#;
        format!("expected {forms}, not {text:?}")
    };
    // The schema cannot say that none comes twice.
    check_set("train.device=cuda:1,0,1", &said("cuda:1,0,1"));
    for text in [
        "gpu",
        "cuda:1,",
        "cuda:1,64",
        "cuda:0-3",
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "cuda:+1",
        "cuda:1234",
        "CUDA",
        "tpu",
    ] {
        check_range(&format!("train.device={text}"), &said(text));
    }
}

#[test]
fn what_is_not_supported_yet() {
    check_set(
        "optimizer.kind=adam",
        "expected one of \"sgd\", \"lars2018\", \"lars\", not \"adam\"",
    );
}

#[test]
fn numbers_of_the_regime() {
    check_range(
        "model.dropout=1",
        "expected at least 0 and below 1, not 1.0",
    );
    check_range(
        "model.drop_connect=1",
        "expected at least 0 and below 1, not 1.0",
    );
    check_range(
        "model.drop_block=1",
        "expected at least 0 and below 1, not 1.0",
    );
    check_range(
        "model.drop_block_groups=[3,5]",
        "expected from 1 to 4, not 5",
    );
    check_range("model.se_ratio=1.5", "expected from 0 to 1, not 1.5");
    check_range("optimizer.trust=0", "expected above 0, not 0.0");
    check_range("optimizer.clip_norm=0", "expected above 0, not 0.0");
    check_range("schedule.power=0", "expected above 0, not 0.0");
    check_range("schedule.end_lr=-1", "expected at least 0, not -1.0");
    for key in ["mixup.alpha", "mixup.cutmix_alpha"] {
        let range = "expected at least 0 and at most 1000";
        check_range(&format!("{key}=-0.5"), &format!("{range}, not -0.5"));
        check_range(&format!("{key}=1001"), &format!("{range}, not 1001.0"));
    }
    check_set(
        "ema.half_life=0 epochs",
        "expected a length above 0, not \"0 epochs\"",
    );
}

#[test]
fn images_grow_by_a_list_of_lengths() {
    let refused = |set: &[&str], said: &str| {
        let errors = parse(FAKE, "x.toml", &sets(set)).unwrap_err().to_string();
        assert!(errors.contains(said), "{errors}");
    };
    refused(
        &[
            "progressive.until=['1 epoch', '2 epochs']",
            "progressive.resolution=[64]",
        ],
        "expected a length for each of progressive.resolution: 1, not 2",
    );
    refused(
        &[
            "progressive.until=['2 epochs', '1 epoch']",
            "progressive.resolution=[64, 96]",
        ],
        "expected increasing lengths, but \"1 epoch\" follows \"2 epochs\"",
    );
    refused(
        &[
            "progressive.until=['2 epochs']",
            "progressive.resolution=[65]",
        ],
        "expected multiples of 32 from 32 to 448, not [65]",
    );
    fake(&[
        "progressive.until=['18 epochs', '41 epochs']",
        "progressive.resolution=[128, 224]",
    ]);
}

#[test]
fn lars_has_no_nesterov() {
    let set = ["optimizer.kind=lars2018"];
    let errors = parse(FAKE, "x.toml", &sets(&set)).unwrap_err().to_string();
    let said = "optimizer.nesterov: LARS has no Nesterov\nhint: write optimizer.nesterov = false";
    assert!(errors.contains(said), "{errors}");
    fake(&["optimizer.kind=lars2018", "optimizer.nesterov=false"]);
}

#[test]
fn mlflow_is_a_server_or_a_word() {
    for text in [
        "auto",
        "sqlite",
        "off",
        "http://localhost:5000",
        "https://mlflow.example",
    ] {
        let run = fake(&[&format!("track.mlflow={text}")]);
        let again = spec::parse(&run.to_toml(), "x.toml", &[]).unwrap();
        assert_eq!(again.track.mlflow, run.track.mlflow);
        let is_server = matches!(&run.track.mlflow, Mlflow::Server(url) if url == text);
        assert_eq!(is_server, text.contains("://"), "{text}");
    }
    let names = "\"auto\", \"sqlite\", \"off\", \"http://host:port\", \"https://host\"";
    for text in ["databricks", "file:///tmp/mlruns", "localhost:5000"] {
        check_set(
            &format!("track.mlflow={text}"),
            &format!("expected one of {names}, not \"{text}\""),
        );
    }
    check_set(
        "track.mlflow=sqlit",
        &format!("expected one of {names}, not \"sqlit\"\nhint: did you mean \"sqlite\"?"),
    );
    assert!(schema::refusal_of_set("track.mlflow=localhost:5000").is_some());
    assert!(schema::refusal_of_set("track.mlflow=http://localhost:5000").is_none());
    check_range("track.register_model=", "expected a name, not \"\"");
    for url in [
        "http://me:secret@host",
        "https://me:se/secret@host:5000",
        "postgresql://me:secret@host/runs",
    ] {
        let text = format!("{FAKE}[track]\nmlflow = \"{url}\"\n");
        let said = parse(&text, "x.toml", &[]).unwrap_err().to_string();
        assert!(!said.contains("secret"), "{said}");
        assert!(said.contains("MLFLOW_TRACKING_PASSWORD hold it"), "{said}");
    }
}

#[test]
fn missing_file() {
    let errors = load(Path::new("no/such.toml"), None, &[], &[]).unwrap_err();
    assert_eq!(
        errors.to_string(),
        "no/such.toml: there is no file no/such.toml\n\
         hint: give the path of a spec, relative to the working directory; configs/ has examples"
    );
}

/// Every key, another value than its default, and whether it changes what is computed.
const KEYS: [(&str, &str, bool); 87] = [
    ("name", "y", false),
    ("mode", "train", false),
    ("seed", "1", true),
    ("run_dir", "d", false),
    ("model.depth", "18", true),
    ("model.resolution", "32", true),
    ("model.classes", "10", true),
    ("model.recipe", "torchvision", true),
    ("model.stem", "deep", true),
    ("model.stem_pool", "conv", true),
    ("model.shortcut", "mean", true),
    ("model.se_ratio", "0.25", true),
    ("model.drop_connect", "0.1", true),
    ("model.drop_block", "0.1", true),
    ("model.drop_block_size", "5", true),
    ("model.drop_block_groups", "[4]", true),
    ("model.dropout", "0.25", true),
    ("model.labels", "l", false),
    ("model.weights", "w", true),
    ("data.source", "zeros", true),
    ("data.train", "t", false),
    ("data.eval", "e", false),
    ("data.label_offset", "0", true),
    ("data.crop", "none", true),
    ("data.crop_area", "[0.5, 1.0]", true),
    ("data.crop_aspect", "[1.0, 1.0]", true),
    ("data.flip", "false", true),
    ("data.resize", "tf1", true),
    ("data.decode", "exact", true),
    ("data.lanes", "1", true),
    ("data.shuffle_window", "1", true),
    ("data.train_examples", "5", true),
    ("data.eval_examples", "5", false),
    ("data.max_bad_records", "5", false),
    ("data.cache", "c", false),
    ("data.cache_gb", "5", false),
    ("data.index", "i", false),
    ("data.augment", "randaugment", true),
    ("data.augment_ops", "1", true),
    ("data.augment_magnitude", "5", true),
    ("data.color_jitter", "[0.4, 0.4, 0.4, 0.1]", true),
    ("data.random_erasing", "0.1", true),
    ("train.batch_size", "512", true),
    ("train.bn_batch", "64", true),
    ("train.length", "50 epochs", false),
    ("train.max_loss", "50", true),
    ("train.max_rewinds", "0", false),
    ("train.precision", "bf16", true),
    ("train.device", "cpu", false),
    ("train.threads", "1", false),
    ("train.instructions", "avx2", false),
    ("train.convolutions", "own", false),
    ("train.winograd", "false", true),
    ("optimizer.kind", "lars", true),
    ("optimizer.momentum", "0", true),
    ("optimizer.nesterov", "false", true),
    ("optimizer.weight_decay", "0", true),
    ("optimizer.decay", "all", true),
    ("optimizer.trust", "0.01", true),
    ("optimizer.clip_norm", "1", true),
    ("schedule.kind", "constant", true),
    ("schedule.base_lr", "1", true),
    ("schedule.warmup", "0 steps", true),
    ("schedule.milestones", "[]", true),
    ("schedule.factor", "0.5", true),
    ("schedule.power", "1", true),
    ("schedule.end_lr", "1e-4", true),
    ("loss.label_smoothing", "0.1", true),
    ("mixup.alpha", "0.2", true),
    ("mixup.cutmix_alpha", "1", true),
    ("progressive.until", "['1 epoch']", true),
    ("progressive.resolution", "[64]", true),
    ("ema.half_life", "1 epoch", true),
    ("ema.warmup", "false", true),
    ("ema.eval", "raw", false),
    ("eval.every", "5 steps", false),
    ("eval.crop_ratio", "1", true),
    ("eval.wait", "60", false),
    ("checkpoint.every", "5 steps", false),
    ("checkpoint.keep", "5", false),
    ("checkpoint.mirror", "gs://b/k", false),
    ("checkpoint.best", "loss", false),
    ("track.mlflow", "off", false),
    ("track.experiment", "e", false),
    ("track.tensorboard", "false", false),
    ("track.system_metrics", "false", false),
    ("track.register_model", "m", false),
];

#[test]
fn every_key_is_computed_or_free() {
    let tree = serde_json::to_value(fake(&[])).unwrap();
    let mut written = vec![];
    for (name, value) in tree.as_object().unwrap() {
        match value.as_object() {
            Some(section) => written.extend(section.keys().map(|key| format!("{name}.{key}"))),
            None => written.push(name.clone()),
        }
    }
    let mut listed: Vec<&str> = KEYS.iter().map(|(key, ..)| *key).collect();
    written.sort();
    listed.sort();
    assert_eq!(
        written, listed,
        "classify the new key in KEYS and run::FREE"
    );
}

#[test]
fn the_computation_changes_with_what_is_computed_only() {
    let base = fake(&[]).computation();
    for (key, value, is_computed) in KEYS {
        assert_eq!(base.contains_key(key), is_computed, "{key}");
        // LARS has no Nesterov.
        let nesterov = match key {
            "optimizer.kind" => "optimizer.nesterov=false",
            _ => "optimizer.nesterov=true",
        };
        // As many lengths as resolutions.
        let phases = match key {
            "progressive.until" => [
                "progressive.until=['2 epochs']",
                "progressive.resolution=[32]",
            ],
            "progressive.resolution" => [
                "progressive.until=['2 epochs']",
                "progressive.resolution=[32]",
            ],
            _ => ["progressive.until=[]", "progressive.resolution=[]"],
        };
        let [until, sides] = phases;
        let base = fake(&[nesterov, until, sides]).computation();
        let changed = fake(&[nesterov, until, sides, &format!("{key}={value}")]).computation();
        assert_eq!(changed != base, is_computed, "{key}");
    }
}

#[test]
fn the_computation_is_resolved() {
    let base = fake(&[]).computation();
    assert_eq!(base["train.bn_batch"], "128");
    assert_eq!(base["data.train_examples"], "1281167");
    assert_eq!(base["data.source"], "\"fake\"");
    assert_eq!(fake(&["train.bn_batch=128"]).computation(), base);
}

#[test]
fn the_length_is_computed_where_the_schedule_depends_on_it() {
    let has_length = |set: &[&str]| fake(set).computation().contains_key("train.length");
    assert!(!has_length(&[]));
    assert!(!has_length(&["schedule.kind=constant"]));
    assert!(has_length(&["schedule.kind=cosine"]));
    assert!(has_length(&["schedule.kind=polynomial"]));
    assert!(has_length(&["schedule.warmup=5%"]));
    assert!(has_length(&["ema.half_life=5%"]));
    assert!(has_length(&[
        "progressive.until=['5%']",
        "progressive.resolution=[64]"
    ]));
    assert!(!has_length(&["ema.half_life=5 epochs"]));
    assert!(has_length(&["schedule.milestones=['1 epoch', '50%']"]));
    assert!(!has_length(&["eval.every=5%"]));
}

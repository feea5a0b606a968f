//! What is said where: files, profiles, the environment and arguments, which of them wins, and what is said about each.

use std::path::{Path, PathBuf};

use spec::{Errors, Layers, Loaded};

use crate::{FAKE, fake, sets};

/// Loads a file with the other layers over it.
pub(crate) fn load(
    file: &Path,
    profile: Option<&str>,
    environment: &[(&str, &str)],
    set: &[&str],
) -> Result<Loaded, Errors> {
    let environment: Vec<(String, String)> = environment
        .iter()
        .map(|(name, value)| (name.to_string(), value.to_string()))
        .collect();
    spec::load(&Layers {
        file,
        profile,
        environment: &environment,
        sets: &sets(set),
    })
}

/// Spec files in a directory of their own.
struct Files {
    dir: PathBuf,
}

impl Files {
    #[expect(
        clippy::disallowed_methods,
        reason = "a test's own files, in the build directory"
    )]
    fn new(test: &str, files: &[(&str, &str)]) -> Self {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("spec-{test}"));
        for (name, text) in files {
            let path = dir.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Self { dir }
    }

    /// A text without the directory.
    fn bare(&self, text: &str) -> String {
        text.replace(&format!("{}/", self.dir.display()), "")
    }

    fn load(
        &self,
        profile: Option<&str>,
        environment: &[(&str, &str)],
        set: &[&str],
    ) -> Result<Loaded, Errors> {
        load(&self.dir.join("x.toml"), profile, environment, set)
    }

    /// Where some keys of x.toml come from.
    fn check_origins(
        &self,
        profile: Option<&str>,
        environment: &[(&str, &str)],
        set: &[&str],
        expected: &[(&str, &str)],
    ) {
        let loaded = self.load(profile, environment, set);
        let loaded = loaded.unwrap_or_else(|errors| panic!("{errors}"));
        for (key, origin) in expected {
            assert_eq!(self.bare(&loaded.origins[*key]), *origin, "{key}");
        }
    }

    /// What is said about x.toml.
    fn check(&self, profile: Option<&str>, environment: &[(&str, &str)], set: &[&str], said: &str) {
        let errors = self.load(profile, environment, set).unwrap_err();
        assert_eq!(self.bare(&errors.to_string()), said);
    }
}

#[test]
fn a_file_is_read() {
    let files = Files::new("a_file_is_read", &[("x.toml", FAKE)]);
    assert_eq!(files.load(None, &[], &[]).unwrap().run, fake(&[]));
}

#[test]
fn the_stronger_layer_wins() {
    let files = Files::new(
        "the_stronger_layer_wins",
        &[
            (
                "base/low.toml",
                "name = 'low'\nseed = 1\n[data]\nsource = 'zeros'\nlanes = 1\n",
            ),
            (
                "base/high.toml",
                "extends = 'low.toml'\nseed = 2\ndata.lanes = 2\ndata.shuffle_window = 2\n\
                 [profile.p]\ndata.flip = false\ntrain.threads = 2",
            ),
            (
                "x.toml",
                "extends = ['base/high.toml']\nname = 'x'\n[data]\nsource = 'fake'\nlanes = 3\n\
                 [profile.p]\ntrain.threads = 3\n[profile.p.data]\nlabel_offset = 3\n\
                 [profile.q]\nname = 'unused'\n",
            ),
        ],
    );
    let environment = [
        ("RUNNER__DATA__LABEL_OFFSET", " 4 "),
        ("RUNNER__MODEL__CLASSES", "4"),
        ("RUNNER__RUN_DIR", "some where"),
        ("OTHER__SEED", "4"),
        ("RUNNER_SEED", "4"),
    ];
    let set = ["model.classes=5", "model.classes=6"];
    let run = files.load(Some("p"), &environment, &set).unwrap().run;
    let data = &run.data;
    assert_eq!((run.seed, &*run.name), (2, "x"));
    assert_eq!((data.lanes, data.shuffle_window, data.flip), (3, 2, false));
    assert_eq!((data.source, data.label_offset), (spec::Source::Fake, 4));
    assert_eq!((run.train.threads, run.model.classes), (3, 6));
    assert_eq!(run.run_dir.as_deref(), Some("some where"));
    assert!(files.load(None, &[], &[]).unwrap().run.data.flip);

    files.check_origins(
        Some("p"),
        &environment,
        &set,
        &[
            ("name", "x.toml:2:1"),
            ("seed", "base/high.toml:2:1"),
            ("mode", "default"),
            ("run_dir", "environment variable RUNNER__RUN_DIR"),
            ("data.source", "x.toml:4:1"),
            ("data.shuffle_window", "base/high.toml:4:6"),
            ("data.flip", "base/high.toml:6:6"),
            (
                "data.label_offset",
                "environment variable RUNNER__DATA__LABEL_OFFSET",
            ),
            ("train.threads", "x.toml:7:7"),
            ("train.bn_batch", "default"),
            ("model.classes", "--set model.classes=6"),
        ],
    );
}

#[test]
fn every_key_has_an_origin() {
    let files = Files::new("every_key_has_an_origin", &[("x.toml", FAKE)]);
    let origins = files.load(None, &[], &[]).unwrap().origins;
    let listed: Vec<&str> = origins.keys().map(String::as_str).collect();
    let mut known: Vec<&str> = crate::KEYS.iter().map(|(key, ..)| *key).collect();
    known.sort();
    assert_eq!(listed, known);
}

#[test]
fn what_two_files_extend_lies_below_both() {
    let files = Files::new(
        "what_two_files_extend_lies_below_both",
        &[
            ("base.toml", "seed = 1\ndata.source = 'fake'\ndata.lane = 1"),
            ("a.toml", "extends = 'base.toml'\nseed = 2"),
            ("b.toml", "extends = './base.toml'"),
            ("x.toml", "extends = ['a.toml', 'b.toml']\nname = 'x'"),
        ],
    );
    // And what is wrong with it is said once.
    files.check(
        None,
        &[],
        &[],
        "base.toml:3:6: data.lane: unknown key\nhint: did you mean data.lanes?",
    );
    let base = "seed = 1\ndata.source = 'fake'";
    let files = Files::new(
        "what_two_files_extend_lies_below_both",
        &[("base.toml", base)],
    );
    assert_eq!(files.load(None, &[], &[]).unwrap().run.seed, 2);
}

#[test]
fn three_problems_in_one_file() {
    let text = "name = \"x\"\n\n[data]\nsource = \"fake\"\nlane = 4\n\n[train]\n\
                batch_size = \"many\"\n\n[optimizer]\nmomentum = 1.5\n";
    Files::new("three_problems_in_one_file", &[("x.toml", text)]).check(
        None,
        &[],
        &[],
        "x.toml:5:1: data.lane: unknown key\nhint: did you mean data.lanes?\n\
         x.toml:8:1: train.batch_size: expected a whole number from 1 to 65536, not \"many\"\n\
         x.toml:11:1: optimizer.momentum: expected at least 0 and below 1, not 1.5",
    );
}

/// An unknown key, a wrong type and a value out of range, each in a layer of its own.
#[test]
fn every_layer_is_told_apart() {
    let files = Files::new(
        "every_layer_is_told_apart",
        &[
            (
                "base.toml",
                "seed = 'one'\n[data]\nsource = 'fake'\n[modle]\n",
            ),
            (
                "x.toml",
                "extends = 'base.toml'\nname = 'x'\n[profile.p.train]\nbatchsize = 3\nprecision = 'f64'\n\
                 [profile.p]\nmodel.depth = 20\n",
            ),
        ],
    );
    files.check(
        Some("p"),
        &[
            ("RUNNER__TRAIN__THREADS", "all"),
            ("RUNNER__DATA__LANES", "0"),
            ("RUNNER__DATA__LANES__X", "0"),
            ("RUNNER__OPTIMISER__KIND", "sgd"),
        ],
        &["loss.label_smoothing=2", "eval.often=1", "data.flip=maybe"],
        "base.toml:1:1: seed: expected a whole number from 0 to 18446744073709551615, not \"one\"\n\
         base.toml:4:2: modle: unknown section\nhint: did you mean [model]?\n\
         x.toml:4:1: train.batchsize: unknown key\nhint: did you mean train.batch_size?\n\
         x.toml:5:1: train.precision: expected one of \"f32\", \"bf16\", \"f16\", \"tf32\", not \"f64\"\n\
         x.toml:7:7: model.depth: expected one of 18, 34, 50, 101, 152, 200, 270, 350, 420, not 20\n\
         environment variable RUNNER__DATA__LANES: data.lanes: expected a whole number from 1 to 65536, not 0\n\
         environment variable RUNNER__DATA__LANES__X: data.lanes.x: unknown key\nhint: did you mean data.lanes?\n\
         environment variable RUNNER__OPTIMISER__KIND: optimiser: unknown section\nhint: did you mean [optimizer]?\n\
         environment variable RUNNER__TRAIN__THREADS: train.threads: expected a whole number from 0 to 1024, not \"all\"\n\
         --set loss.label_smoothing=2: loss.label_smoothing: expected at least 0 and below 1, not 2.0\n\
         --set eval.often=1: eval.often: unknown key\nhint: the keys of [eval] are crop_ratio, every, wait\n\
         --set data.flip=maybe: data.flip: expected true or false, not \"maybe\"",
    );
}

#[test]
fn text_in_the_environment() {
    let files = Files::new("text_in_the_environment", &[("x.toml", FAKE)]);
    files.check(
        None,
        &[("RUNNER__NAME", "2018")],
        &[],
        "environment variable RUNNER__NAME: name: expected a string, not 2018\n\
         hint: quote it for TOML and for the shell: '\"..\"'",
    );
}

#[test]
fn a_text_lies_below_the_environment_and_the_arguments() {
    let environment = |value: &str| {
        let variable = |name: &str| (name.to_string(), value.to_string());
        [variable("RUNNER__SEED"), variable("RUNNER__DATA__LANES")]
    };
    let set = sets(&["data.lanes=3"]);
    let run = spec::parse_over(FAKE, "spec", &environment("2"), &set).unwrap();
    assert_eq!((run.seed, run.data.lanes), (2, 3));
    let errors = spec::parse_over(FAKE, "spec", &environment("x"), &set).unwrap_err();
    assert_eq!(
        errors.to_string(),
        "environment variable RUNNER__SEED: seed: expected a whole number from 0 to 18446744073709551615, not \"x\""
    );
}

#[test]
fn a_cycle_of_extends() {
    let files = Files::new(
        "a_cycle_of_extends",
        &[
            ("x.toml", "extends = 'a.toml'\nname = 'x'\n"),
            ("a.toml", "extends = 'b.toml'\n"),
            (
                "b.toml",
                "seed = 1\nextends = [\n  'a.toml',\n]\nsede = 1\n",
            ),
        ],
    );
    files.check(
        None,
        &[],
        &[],
        "b.toml:3:3: extends: a file cannot extend itself: a.toml -> b.toml -> a.toml\n\
         hint: take one of these out\n\
         b.toml:5:1: sede: unknown key\nhint: did you mean seed?",
    );
}

#[test]
fn a_missing_base() {
    let text = "name = 'x'\nextends = ['there.toml', 'not/there.toml']\ndata.sorce = 'fake'\n";
    let files = Files::new("a_missing_base", &[("x.toml", text), ("there.toml", "")]);
    files.check(
        None,
        &[],
        &[],
        "x.toml:2:26: extends: there is no file not/there.toml\n\
         hint: a path in extends starts at the directory of the file that says it\n\
         x.toml:3:6: data.sorce: unknown key\nhint: did you mean data.source?",
    );
}

#[test]
fn a_base_that_is_not_toml() {
    let files = Files::new(
        "a_base_that_is_not_toml",
        &[("x.toml", "extends = 'a.toml'"), ("a.toml", "seed = \n")],
    );
    files.check(
        None,
        &[],
        &[],
        "a.toml:1:8: not TOML: string values must be quoted, expected literal string\n\
         hint: text is written in quotes, lists as [a, b], sections as [name]",
    );
}

#[test]
fn extends_that_are_no_paths() {
    let files = Files::new("extends_that_are_no_paths", &[("x.toml", "extends = [3]")]);
    files.check(
        None,
        &[],
        &[],
        "x.toml:1:12: extends: expected a path or a list of paths, not 3",
    );
    let errors = spec::parse("extends = 'a.toml'", "spec.toml", &[]).unwrap_err();
    assert_eq!(
        errors.to_string(),
        "spec.toml:1:11: extends: only a file can extend another"
    );
}

#[test]
fn an_unknown_profile() {
    let text = format!("{FAKE}[profile.small]\nseed = 1\n[profile.large]\n");
    let files = Files::new("an_unknown_profile", &[("x.toml", &text)]);
    files.check(
        Some("smal"),
        &[],
        &["data.lanes=0"],
        "--profile smal: unknown profile\nhint: the profiles of x.toml are large, small\n\
         --set data.lanes=0: data.lanes: expected a whole number from 1 to 65536, not 0",
    );
    Files::new("an_unknown_profile", &[("x.toml", FAKE)]).check(
        Some("small"),
        &[],
        &[],
        "--profile small: unknown profile\nhint: x.toml has no [profile.NAME]",
    );
}

#[test]
fn a_profile_that_is_not_applied_has_right_keys_all_the_same() {
    let text = format!("{FAKE}[profile.p]\nsede = 1\nmodel.depth = 20\n");
    Files::new("a_profile_that_is_not_applied", &[("x.toml", &text)]).check(
        None,
        &[],
        &[],
        "x.toml:5:1: sede: unknown key\nhint: did you mean seed?",
    );
}

#[test]
fn what_belongs_elsewhere() {
    let check = |text: &str, set: &[&str], said: &str| {
        Files::new("what_belongs_elsewhere", &[("x.toml", text)]).check(None, &[], set, said);
    };
    check(
        &format!("profile = 'p'\n{FAKE}"),
        &["profile=p", "extends=a", "profile.p.seed=1"],
        "x.toml:1:1: profile: expected tables [profile.NAME], not \"p\"\n\
         hint: which one is applied is said by --profile NAME\n\
         --set profile=p: profile: unknown key\nhint: which profile is applied is said by --profile NAME\n\
         --set extends=a: extends: unknown key\nhint: extends stands at the top of a file\n\
         --set profile.p.seed=1: profile: unknown section\nhint: which profile is applied is said by --profile NAME",
    );
    check(
        &format!("profile.p = 3\n{FAKE}[profile.q]\nextends = 'a'\n"),
        &[],
        "x.toml:1:9: profile.p: expected a table [profile.p], not 3\n\
         x.toml:6:1: extends: unknown key\nhint: extends stands at the top of a file",
    );
}

#[test]
fn an_old_flag() {
    let text =
        format!("train_batch_size = 256\n{FAKE}data_dir = \"d\"\n[train]\ntrain_steps = 3\n");
    Files::new("an_old_flag", &[("x.toml", &text)]).check(
        None,
        &[("RUNNER__USE_TPU", "false")],
        &["iterations_per_loop=100", "optimizer.enable_lars=true", "resnet_depth=50"],
        "x.toml:1:1: train_batch_size: unknown key\n\
         hint: the 2018 reference's train_batch_size is train.batch_size here\n\
         x.toml:5:1: data.data_dir: unknown key\n\
         hint: the 2018 reference's data_dir is data.train and data.eval here: globs, \"DIR/train-*\" and \
         \"DIR/validation-*\"; for an empty one, data.source = \"zeros\"\n\
         x.toml:7:1: train.train_steps: unknown key\n\
         hint: the 2018 reference's train_steps is train.length here: with a unit, \"112590 steps\" or \"90 epochs\", \
         from the start of the run\n\
         environment variable RUNNER__USE_TPU: use_tpu: unknown key\n\
         hint: the 2018 reference's use_tpu is train.device here: \"auto\", \"cpu\", \"cuda\", \"cuda:N\", \"cuda:N,M\" or \"cuda:all\"; TPUs are not supported\n\
         --set iterations_per_loop=100: iterations_per_loop: unknown key\n\
         hint: the 2018 reference's iterations_per_loop is not needed here: checkpoint.every and eval.every say when \
         something happens between steps\n\
         --set optimizer.enable_lars=true: optimizer.enable_lars: unknown key\n\
         hint: the 2018 reference's enable_lars is optimizer.kind here: \"lars2018\", or \"lars\" for the reference since \
         2019, with any batch; with schedule.kind = \"polynomial\" and optimizer.nesterov = false\n\
         --set resnet_depth=50: resnet_depth: unknown key\n\
         hint: the 2018 reference's resnet_depth is model.depth here",
    );
}

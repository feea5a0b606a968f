//! The spec's `[data]` resolved: shards found and counted.

use std::collections::BTreeMap;
use std::path::PathBuf;

use spec::{Crop, Decode, Mode, Resize, Run, Source};

use crate::Error;

/// What is read, and how much of it there is.
#[derive(Clone, Debug)]
pub struct Input {
    /// For training; none in mode `eval`.
    pub train: Option<data::Config>,
    /// For evaluation; none in mode `train`.
    pub eval: Option<data::Config>,
    /// Examples in an epoch.
    pub train_examples: u64,
    /// Stands for the training shards.
    pub fingerprint: String,
    /// Examples of an evaluation.
    pub eval_examples: u64,
    /// Stands for the evaluation shards.
    pub eval_fingerprint: String,
}

impl Input {
    /// Finds the shards and counts their records.
    ///
    /// # Errors
    /// If a glob matches nothing, a shard is damaged, or a number of examples in the spec is wrong.
    pub fn open(run: &Run) -> Result<Self, Error> {
        let mut input = Self {
            train: None,
            eval: None,
            train_examples: 0,
            fingerprint: "made up".into(),
            eval_examples: 0,
            eval_fingerprint: "made up".into(),
        };
        if run.mode != Mode::Eval {
            let glob = Glob {
                key: "data.train",
                pattern: run.data.train.as_deref(),
            };
            let expected = run.data.train_examples();
            let config = config(run, &glob, run.train.batch_size, expected)?;
            input.train_examples = examples("data.train_examples", &glob, &config, expected)?;
            if let data::Source::TfRecord { shards, .. } = &config.source {
                input.fingerprint = data::fingerprint(shards)?;
            }
            input.train = Some(config);
        }
        if run.mode != Mode::Train {
            let (config, examples) = eval_input(run)?;
            if let data::Source::TfRecord { shards, .. } = &config.source {
                input.eval_fingerprint = data::fingerprint(shards)?;
            }
            input.eval_examples = examples;
            input.eval = Some(config);
        }
        Ok(input)
    }

    /// Everything that decides the numbers of a run on this input.
    pub fn computation(&self, run: &Run) -> BTreeMap<String, String> {
        let mut keys = run.computation();
        keys.insert(
            "data.train_examples".into(),
            self.train_examples.to_string(),
        );
        keys.insert(
            "data.train (names and sizes of the shards)".into(),
            self.fingerprint.clone(),
        );
        keys
    }
}

/// The evaluation set of `run`.
///
/// # Errors
/// As [`Input::open`].
pub fn eval_config(run: &Run) -> Result<data::Config, Error> {
    eval_input(run).map(|(config, _)| config)
}

/// The evaluation set, and how many examples it has.
fn eval_input(run: &Run) -> Result<(data::Config, u64), Error> {
    let glob = Glob {
        key: "data.eval",
        pattern: run.data.eval.as_deref(),
    };
    let expected = run.data.eval_examples();
    let config = config(run, &glob, run.train.bn_batch(), expected)?;
    let examples = examples("data.eval_examples", &glob, &config, expected)?;
    Ok((config, examples))
}

/// Where shards are named.
struct Glob<'a> {
    key: &'static str,
    pattern: Option<&'a str>,
}

impl Glob<'_> {
    fn pattern(&self) -> &str {
        let pattern = self.pattern;
        pattern.expect("a checked spec names the shards it needs")
    }

    fn shards(&self) -> Result<Vec<PathBuf>, Error> {
        store::glob(self.pattern()).map_err(|source| Error::Shards {
            key: self.key,
            source,
        })
    }
}

/// How images that are in no shard are prepared for a network: as those of an evaluation.
pub fn image_config(run: &Run) -> data::Config {
    let source = data::Source::TfRecord {
        shards: vec![],
        label_offset: run.data.label_offset,
        lanes: run.data.lanes,
        shuffle_window: run.data.shuffle_window,
    };
    with_source(run, source, run.train.bn_batch())
}

fn config(
    run: &Run,
    glob: &Glob<'_>,
    batch_size: usize,
    made_up: Option<u64>,
) -> Result<data::Config, Error> {
    let d = &run.data;
    let examples = made_up.unwrap_or_default();
    let source = match d.source {
        Source::Tfrecord => data::Source::TfRecord {
            shards: glob.shards()?,
            label_offset: d.label_offset,
            lanes: d.lanes,
            shuffle_window: d.shuffle_window,
        },
        Source::Fake => data::Source::Fake { examples },
        Source::Zeros => data::Source::Zeros { examples },
    };
    Ok(with_source(run, source, batch_size))
}

fn with_source(run: &Run, source: data::Source, batch_size: usize) -> data::Config {
    let d = &run.data;
    let (area, aspect) = (d.crop_area, d.crop_aspect);
    data::Config {
        source,
        resolution: run.model.resolution,
        batch_size,
        seed: run.seed,
        classes: run.model.classes,
        crop: match d.crop {
            Crop::Tf => data::Crop::Tf { area, aspect },
            Crop::Torchvision => data::Crop::Torchvision { area, aspect },
            Crop::None => data::Crop::None,
        },
        resize: match d.resize {
            Resize::Pillow => data::Resize::Pillow,
            Resize::Tf => data::Resize::Tf,
            Resize::Tf1 => data::Resize::Tf1,
        },
        decode: match d.decode {
            Decode::Fast => data::Decode::Fast,
            Decode::Exact => data::Decode::Exact,
        },
        flip: d.flip,
        crop_ratio: run.eval.crop_ratio,
        max_bad_records: d.max_bad_records,
        threads: run.train.threads,
    }
}

/// Counts the examples and holds the spec's number against them.
fn examples(
    key: &'static str,
    glob: &Glob<'_>,
    config: &data::Config,
    expected: Option<u64>,
) -> Result<u64, Error> {
    let shards = match &config.source {
        data::Source::TfRecord { shards, .. } => shards,
        data::Source::Fake { examples } | data::Source::Zeros { examples } => return Ok(*examples),
    };
    match (data::count(shards)?, expected) {
        (found, Some(expected)) if expected != found => Err(Error::Examples {
            key,
            expected,
            found,
            pattern: glob.pattern().into(),
            shards: shards.len(),
        }),
        (0, _) => Err(Error::Data(data::Error::NoRecords {
            shards: shards.clone(),
        })),
        (found, _) => Ok(found),
    }
}

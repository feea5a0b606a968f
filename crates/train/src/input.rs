//! The spec's `[data]` resolved: shards found and counted.

use std::collections::BTreeMap;
use std::path::PathBuf;

use spec::{Augment, Crop, Decode, Mode, Resize, Run, Source};

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
        // One for both, which keeps one count of what it holds.
        let cache = cache(run)?;
        if run.mode != Mode::Eval {
            let glob = Glob {
                key: "data.train",
                pattern: run.data.train.as_deref(),
            };
            let expected = run.data.train_examples();
            let config = config(run, &glob, run.train.batch_size, expected, cache.clone())?;
            input.train_examples = examples("data.train_examples", &glob, &config, expected)?;
            input.fingerprint = fingerprint(&config.source)?;
            input.train = Some(config);
        }
        if run.mode != Mode::Train {
            let (config, examples) = eval_input(run, cache)?;
            input.eval_fingerprint = fingerprint(&config.source)?;
            input.eval_examples = examples;
            input.eval = Some(config);
        }
        Ok(input)
    }

    /// The same input in another resolution.
    pub fn at(&self, resolution: usize) -> Self {
        let resized = |config: &data::Config| data::Config {
            resolution,
            ..config.clone()
        };
        Self {
            train: self.train.as_ref().map(resized),
            eval: self.eval.as_ref().map(resized),
            ..self.clone()
        }
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

fn fingerprint(source: &data::Source) -> Result<String, Error> {
    Ok(match source {
        data::Source::Shards { shards, .. } => data::fingerprint(shards)?,
        data::Source::Folder(folder) => folder.fingerprint(),
        data::Source::Fake { .. } | data::Source::Zeros { .. } => "made up".into(),
    })
}

/// The evaluation set of `run`.
///
/// # Errors
/// As [`Input::open`].
pub fn eval_config(run: &Run) -> Result<data::Config, Error> {
    eval_input(run, cache(run)?).map(|(config, _)| config)
}

/// The evaluation set, and how many examples it has.
fn eval_input(run: &Run, cache: Option<store::Cache>) -> Result<(data::Config, u64), Error> {
    let glob = Glob {
        key: "data.eval",
        pattern: run.data.eval.as_deref(),
    };
    let expected = run.data.eval_examples();
    let config = config(run, &glob, run.train.bn_batch(), expected, cache)?;
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
    let source = data::Source::Shards {
        format: data::Format::TfRecord,
        shards: vec![],
        label_offset: run.data.label_offset,
        lanes: run.data.lanes,
        shuffle_window: run.data.shuffle_window,
    };
    with_source(run, source, run.train.bn_batch(), None)
}

fn config(
    run: &Run,
    glob: &Glob<'_>,
    batch_size: usize,
    made_up: Option<u64>,
    cache: Option<store::Cache>,
) -> Result<data::Config, Error> {
    let d = &run.data;
    let examples = made_up.unwrap_or_default();
    let source = match d.source {
        Source::Tfrecord | Source::Webdataset | Source::Bigtable => data::Source::Shards {
            format: match d.source {
                Source::Webdataset => data::Format::WebDataset,
                Source::Bigtable => data::Format::Bigtable,
                _ => data::Format::TfRecord,
            },
            shards: glob.shards()?,
            label_offset: d.label_offset,
            lanes: d.lanes,
            shuffle_window: d.shuffle_window,
        },
        Source::Folder => {
            store::check_local(glob.pattern())?;
            data::Source::Folder(data::Folder::open(glob.pattern().as_ref())?)
        }
        Source::Fake => data::Source::Fake { examples },
        Source::Zeros => data::Source::Zeros { examples },
    };
    Ok(with_source(run, source, batch_size, cache))
}

fn with_source(
    run: &Run,
    source: data::Source,
    batch_size: usize,
    cache: Option<store::Cache>,
) -> data::Config {
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
        cache,
        index: (d.index.as_deref())
            .filter(|_| d.decode == Decode::Fast)
            .map(|dir| data::Index::new(dir.as_ref())),
        augment: data::Augment {
            policy: match d.augment {
                Augment::None => data::Policy::None,
                Augment::Randaugment => data::Policy::RandAugment {
                    ops: d.augment_ops,
                    magnitude: d.augment_magnitude,
                },
                Augment::Autoaugment => data::Policy::AutoAugment,
            },
            jitter: d.color_jitter,
            erasing: d.random_erasing,
        },
    }
}

/// The directory that keeps parts of shards in buckets; none is opened for others.
fn cache(run: &Run) -> Result<Option<store::Cache>, Error> {
    let d = &run.data;
    let is_url = |glob: &Option<String>| glob.as_deref().is_some_and(store::is_url);
    match &d.cache {
        _ if d.source == Source::Bigtable => Ok(None),
        Some(dir) if is_url(&d.train) || is_url(&d.eval) => {
            let limit = d.cache_gb * 1_000_000_000;
            Ok(Some(store::Cache::open(dir.as_ref(), limit)?))
        }
        _ => Ok(None),
    }
}

/// Counts the examples and holds the spec's number against them. Of objects in a bucket that number is taken on trust,
/// for to count them is to read them.
fn examples(
    key: &'static str,
    glob: &Glob<'_>,
    config: &data::Config,
    expected: Option<u64>,
) -> Result<u64, Error> {
    let shards: &[PathBuf] = match &config.source {
        data::Source::Shards { shards, .. } => shards,
        data::Source::Folder(_) => &[],
        data::Source::Fake { examples } | data::Source::Zeros { examples } => return Ok(*examples),
    };
    // Rows of a table are counted as they are listed.
    if let Some(expected) = expected
        && shards.iter().any(store::is_url)
        && !matches!(
            config.source,
            data::Source::Shards {
                format: data::Format::Bigtable,
                ..
            }
        )
    {
        return Ok(expected);
    }
    let found = match &config.source {
        data::Source::Folder(folder) => folder.len(),
        data::Source::Shards { format, .. } => data::count(*format, shards, config.cache.as_ref())?,
        data::Source::Fake { examples } | data::Source::Zeros { examples } => *examples,
    };
    match (found, expected) {
        (found, Some(expected)) if expected != found => Err(Error::Examples {
            key,
            expected,
            found,
            pattern: glob.pattern().into(),
            shards: match &config.source {
                data::Source::Folder(_) => found as usize,
                _ => shards.len(),
            },
        }),
        (0, _) => Err(Error::Data(data::Error::NoRecords {
            shards: shards.to_vec(),
        })),
        (found, _) => Ok(found),
    }
}

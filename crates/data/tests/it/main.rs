//! Order, resume, errors and sources through the public door. Shards are written by the `tfrecord` crate, which knows
//! nothing of ours; their images are those of data/digits.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod errors;
mod folders;
mod index;
mod order;
mod photos;
mod sources;

use std::fs::File;
use std::path::{Path, PathBuf};

use data::{Batch, Config, Crop, Cursor, Decode, Loader, Resize, Source};
use tempfile::TempDir;
use tfrecord::{Example, ExampleIter, ExampleWriter, Feature};

/// Images in the shards of [`Shards::new`]: odd numbers, and one empty shard.
const SIZES: [usize; 5] = [7, 0, 3, 11, 2];
const RECORDS: usize = 23;

fn digits(pattern: &str) -> Vec<PathBuf> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../data/digits/");
    store::glob(&format!("{dir}{pattern}")).unwrap()
}

/// The JPEG files of the first `count` digits.
fn jpegs(count: usize) -> Vec<Vec<u8>> {
    let shard = &digits("train-*")[0];
    ExampleIter::open(shard, Default::default())
        .unwrap()
        .take(count)
        .map(|example| {
            let mut features = example.unwrap().into_hash_map();
            let encoded = features.remove("image/encoded").unwrap();
            encoded.into_bytes_list().unwrap().remove(0)
        })
        .collect()
}

fn example(jpeg: &[u8], label: i64) -> Example {
    [
        ("image/class/label", Feature::from_i64_iter([label])),
        ("image/encoded", Feature::from_bytes_iter([jpeg.to_vec()])),
        ("image/format", Feature::from_bytes_iter([b"jpeg".to_vec()])),
    ]
    .map(|(key, feature)| (key.to_string(), feature))
    .into_iter()
    .collect()
}

fn write(path: &Path, examples: impl IntoIterator<Item = Example>) {
    let mut writer = ExampleWriter::create(path).unwrap();
    for example in examples {
        writer.send(example).unwrap();
    }
    writer.flush().unwrap();
}

/// Shards whose record number i, counted through all of them, has the label i (stored as i + 1).
struct Shards {
    _dir: TempDir,
    paths: Vec<PathBuf>,
}

impl Shards {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let jpegs = jpegs(RECORDS);
        let mut next = 0;
        let mut paths = Vec::new();
        for (i, size) in SIZES.into_iter().enumerate() {
            let path = dir.path().join(format!("train-{i}"));
            write(
                &path,
                (next..next + size).map(|id| example(&jpegs[id], id as i64 + 1)),
            );
            next += size;
            paths.push(path);
        }
        assert_eq!(next, RECORDS);
        Self { _dir: dir, paths }
    }

    fn config(&self, lanes: usize, shuffle_window: usize) -> Config {
        config(&self.paths, lanes, shuffle_window)
    }
}

fn config(shards: &[PathBuf], lanes: usize, shuffle_window: usize) -> Config {
    Config {
        source: Source::Shards {
            format: data::Format::TfRecord,
            shards: shards.to_vec(),
            label_offset: 1,
            lanes,
            shuffle_window,
        },
        resolution: 16,
        batch_size: 4,
        seed: 5,
        classes: RECORDS,
        crop: Crop::Tf {
            area: [0.08, 1.0],
            aspect: [0.75, 4.0 / 3.0],
        },
        resize: Resize::Pillow,
        decode: Decode::Exact,
        flip: true,
        crop_ratio: 0.875,
        max_bad_records: 0,
        threads: 2,
        cache: None,
        index: None,
        augment: data::Augment::default(),
    }
}

fn train(config: &Config) -> Loader {
    data::train(config, Cursor::default()).unwrap()
}

fn take(loader: Loader, batches: usize) -> Vec<Batch> {
    loader.take(batches).map(Result::unwrap).collect()
}

fn labels(batches: &[Batch]) -> Vec<u32> {
    batches
        .iter()
        .flat_map(|batch| batch.labels.clone())
        .collect()
}

/// What was written by them is read by us, and the other way round.
#[test]
fn the_tfrecord_crate_agrees_on_framing() {
    let dir = tempfile::tempdir().unwrap();
    let payloads: Vec<Vec<u8>> = [0, 1, 5, 70_000].map(|n| vec![n as u8; n]).to_vec();

    let theirs = dir.path().join("theirs");
    let mut writer = tfrecord::BytesWriter::create(&theirs).unwrap();
    for payload in &payloads {
        writer.send(payload.clone()).unwrap();
    }
    writer.flush().unwrap();
    let mut reader = store::tfrecord::Reader::open(&theirs).unwrap();
    for payload in &payloads {
        let record = reader.next().unwrap().unwrap();
        assert!(record.verify());
        assert_eq!(&record.bytes, payload);
    }
    assert_eq!(reader.next().unwrap(), None);

    let mut bytes = Vec::new();
    for payload in &payloads {
        store::tfrecord::write(&mut bytes, payload).unwrap();
    }
    assert_eq!(bytes, std::fs::read(&theirs).unwrap());
    let ours = dir.path().join("ours");
    store::write_atomic(&ours, &[&bytes]).unwrap();
    let file = File::open(&ours).unwrap();
    let read: Vec<Vec<u8>> = tfrecord::BytesIter::from_reader(file, Default::default())
        .map(Result::unwrap)
        .collect();
    assert_eq!(read, payloads);
}

//! What is wrong with the data is said, with the place.

use std::path::{Path, PathBuf};

use data::{BadRecord, Config, Crop, Cursor, Error, Reason, Resize, Source};
use tempfile::TempDir;
use tfrecord::{Example, Feature};

use crate::{config, example, jpegs, labels, train, write};

/// A shard of ten digits, labels 0 to 9, of which those at `places` are spoilt.
fn spoilt(spoil: impl Fn(Example) -> Example, places: &[usize]) -> (TempDir, Config) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("train-0");
    let examples = jpegs(10).into_iter().enumerate().map(|(i, jpeg)| {
        let good = example(&jpeg, i as i64 + 1);
        if places.contains(&i) {
            spoil(good)
        } else {
            good
        }
    });
    write(&path, examples);
    let config = config(&[path], 1, 1);
    (dir, config)
}

fn replace(mut example: Example, key: &str, feature: Option<Feature>) -> Example {
    let features = &mut example.features.as_mut().unwrap().feature;
    features.remove(key);
    features.extend(feature.map(|feature| (key.to_string(), feature)));
    example
}

fn label(label: i64) -> impl Fn(Example) -> Example {
    move |good| {
        replace(
            good,
            "image/class/label",
            Some(Feature::from_i64_iter([label])),
        )
    }
}

fn first_error(loader: data::Loader) -> Error {
    loader.map(Result::err).find_map(|error| error).unwrap()
}

/// Training and evaluation stop at record 6 and say where that is and why.
fn check(config: &Config, reason: impl Fn(&Reason) -> bool, message: &str) {
    for loader in [train(config), data::eval(config).unwrap()] {
        let error = first_error(loader);
        let text = error.to_string();
        let Error::Record(BadRecord {
            shard,
            record,
            offset,
            reason: said,
            ..
        }) = error
        else {
            panic!("{error}")
        };
        assert_eq!(shard, shards(config)[0]);
        assert_eq!(record, 6);
        assert!(reason(&said), "{said}");
        let place = format!("{}: record 6 at byte {offset}: {message}", shard.display());
        assert!(text.starts_with(&place), "{text}");
        assert!(text.contains("\nhint: "), "{text}");
        let mut reader = store::tfrecord::Reader::open_at(&shard, offset, record, None).unwrap();
        assert!(reader.next().unwrap().is_some());
    }
}

fn shards(config: &Config) -> &[PathBuf] {
    match &config.source {
        Source::Shards { shards, .. } => shards,
        _ => unreachable!(),
    }
}

#[test]
fn label_out_of_range() {
    for (stored, classes) in [(0, 10), (11, 10), (-7, 10), (i64::MIN, 10), (1 << 40, 10)] {
        let (_dir, mut config) = spoilt(label(stored), &[6]);
        config.classes = classes;
        check(
            &config,
            |reason| {
                *reason
                    == Reason::Label {
                        stored,
                        offset: 1,
                        classes,
                    }
            },
            &format!(
                "the stored label {stored} less the offset 1 is no class from 0 to 9\nhint: check"
            ),
        );
    }
}

#[test]
fn missing_feature() {
    let (_dir, config) = spoilt(|good| replace(good, "image/class/label", None), &[6]);
    check(
        &config,
        |reason| matches!(reason, Reason::Example(_)),
        "not a usable tf.Example: image/class/label is missing",
    );
}

#[test]
fn bad_jpeg() {
    let (_dir, config) = spoilt(
        |good| {
            let noise = Feature::from_bytes_iter([b"\xff\xd8 no".to_vec()]);
            replace(good, "image/encoded", Some(noise))
        },
        &[6],
    );
    check(
        &config,
        |reason| matches!(reason, Reason::Image(_)),
        "the image cannot be decoded: ",
    );
}

fn flip_bit(path: &Path, at: u64) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at as usize] ^= 1;
    store::write_atomic(path, &[&bytes]).unwrap();
}

/// Where record 6 starts.
fn offset(config: &Config) -> u64 {
    let mut reader = store::tfrecord::Reader::open(&shards(config)[0]).unwrap();
    for _ in 0..6 {
        reader.next().unwrap();
    }
    reader.offset()
}

#[test]
fn bad_data_crc() {
    let (_dir, config) = spoilt(|good| good, &[]);
    flip_bit(&shards(&config)[0], offset(&config) + 200);
    check(
        &config,
        |reason| *reason == Reason::Checksum,
        "the checksum of the payload is wrong",
    );
}

/// What follows a damaged length cannot be found, so no number of allowed bad records helps.
#[test]
fn bad_framing_stops_in_any_case() {
    let (_dir, mut config) = spoilt(|good| good, &[]);
    config.max_bad_records = 100;
    flip_bit(&shards(&config)[0], offset(&config));
    let error = first_error(data::eval(&config).unwrap());
    assert!(
        matches!(error, Error::Store(store::Error::Corrupt { record: 6, .. })),
        "{error}"
    );
}

#[test]
fn allowed_bad_records_are_replaced_and_counted() {
    let (_dir, mut config) = spoilt(label(77), &[1, 2, 9]);
    config.max_bad_records = 3;

    let batches: Vec<_> = data::eval(&config).unwrap().map(Result::unwrap).collect();
    assert_eq!(labels(&batches), [0, 3, 4, 5, 6, 7, 8]);
    // The first batch takes records 0 to 5; the second runs to the end.
    let bad = |batch: usize| &batches[batch].bad_records[..];
    let shard = shards(&config)[0].display();
    let mut reader = store::tfrecord::Reader::open(&shards(&config)[0]).unwrap();
    reader.next().unwrap();
    let offset = reader.offset();
    let first = format!(
        "{shard}: record 1 at byte {offset}: the stored label 77 less the offset 1 is no class from 0 to 22 \
         (bad record 1, of 3 allowed)"
    );
    assert_eq!((bad(0).len(), &bad(0)[0]), (2, &first));
    assert!(bad(0)[1].contains(": record 2 at byte "), "{}", bad(0)[1]);
    assert_eq!(bad(1).len(), 1);
    assert!(bad(1)[0].contains(": record 9 at byte "), "{}", bad(1)[0]);
    assert!(bad(1)[0].ends_with("(bad record 3, of 3 allowed)"));

    // What is left is the same as if the bad ones had never been there.
    let (_dir, clean) = {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train-0");
        let kept = [0, 3, 4, 5, 6, 7, 8];
        let jpegs = jpegs(10);
        write(&path, kept.map(|i| example(&jpegs[i], i as i64 + 1)));
        let config = config_like(&config, path);
        (dir, config)
    };
    let expected: Vec<_> = data::eval(&clean).unwrap().map(Result::unwrap).collect();
    for (ours, expected) in batches.iter().zip(&expected) {
        assert_eq!(ours.pixels, expected.pixels);
    }

    // Training meets them again in the second epoch: the fourth time is one too many.
    let mut seen = Vec::new();
    let mut loader = train(&config);
    let error = loop {
        match loader.next().unwrap() {
            Ok(batch) => seen.extend(batch.labels),
            Err(error) => break error,
        }
    };
    assert_eq!(seen, [0, 3, 4, 5, 6, 7, 8, 0][..seen.len()]);
    let Error::Record(BadRecord {
        record: 1,
        bad: 4,
        allowed: 3,
        ..
    }) = error
    else {
        panic!("{error}")
    };
    assert!(error.to_string().contains("(bad record 4, of 3 allowed)"));
    assert!(loader.next().is_none(), "nothing comes after an error");
}

#[test]
fn bad_records_at_the_very_end_are_told_too() {
    let (_dir, mut config) = spoilt(label(77), &[8, 9]);
    config.max_bad_records = 2;
    let batches: Vec<_> = data::eval(&config).unwrap().map(Result::unwrap).collect();
    let images: Vec<usize> = batches.iter().map(|batch| batch.labels.len()).collect();
    let bad: Vec<usize> = batches
        .iter()
        .map(|batch| batch.bad_records.len())
        .collect();
    assert_eq!((images, bad), (vec![4, 4, 0], vec![0, 0, 2]));
    assert_eq!(batches[2].pixels, data::Pixels::U8(vec![]));
}

fn config_like(config: &Config, shard: PathBuf) -> Config {
    let mut config = config.clone();
    config.source = Source::Shards {
        format: data::Format::TfRecord,
        shards: vec![shard],
        label_offset: 1,
        lanes: 1,
        shuffle_window: 1,
    };
    config
}

#[test]
fn no_records() {
    let dir = tempfile::tempdir().unwrap();
    let empty: Vec<PathBuf> = ["train-0", "train-1"]
        .map(|name| dir.path().join(name))
        .to_vec();
    for path in &empty {
        write(path, []);
    }
    let config = config(&empty, 2, 2);
    for loader in [train(&config), data::eval(&config).unwrap()] {
        let error = first_error(loader);
        let expected = format!(
            "{} and 1 more: the shards hold no records\n\
             hint: copy or convert again, or name other shards in data.train or data.eval",
            empty[0].display()
        );
        assert_eq!(error.to_string(), expected);
    }
    let none = crate::config(&[], 2, 2);
    assert!(matches!(
        data::eval(&none).unwrap_err(),
        Error::NoRecords { .. }
    ));
}

#[test]
fn a_missing_shard() {
    let config = config(&[PathBuf::from("absent")], 1, 1);
    let error = first_error(train(&config));
    assert!(
        error.to_string().starts_with("absent: cannot open: "),
        "{error}"
    );
}

#[test]
fn zeros_and_absurd_numbers_in_the_configuration() {
    let (_dir, good) = spoilt(|good| good, &[]);
    let (area, aspect) = ([0.08, 1.0], [0.75, 1.5]);
    let spoilers: [fn(&mut Config); 15] = [
        |config| config.batch_size = 0,
        |config| config.batch_size = usize::MAX,
        |config| config.batch_size = 1 << 40,
        |config| config.resolution = 0,
        |config| config.resolution = usize::MAX,
        |config| config.resolution = 1 << 20,
        |config| config.classes = 0,
        |config| config.classes = usize::MAX,
        |config| config.threads = usize::MAX,
        |config| config.crop_ratio = 0.0,
        |config| config.crop_ratio = -1.0,
        |config| config.crop_ratio = 1.1,
        |config| config.crop_ratio = f64::NAN,
        |config| config.crop_ratio = f64::INFINITY,
        |config| config.crop_ratio = f64::NEG_INFINITY,
    ];
    for range in [
        [0.0, 0.5],
        [0.5, 0.1],
        [-1.0, 0.5],
        [0.1, f64::INFINITY],
        [f64::NAN, 0.5],
        [0.1, f64::NAN],
    ] {
        for crop in [
            Crop::Tf {
                area: range,
                aspect,
            },
            Crop::Tf {
                area,
                aspect: range,
            },
            Crop::Torchvision {
                area: range,
                aspect,
            },
            Crop::Torchvision {
                area,
                aspect: range,
            },
        ] {
            let mut config = good.clone();
            config.crop = crop;
            assert!(matches!(data::eval(&config).unwrap_err(), Error::Config(_)));
        }
    }
    for spoil in spoilers {
        let mut config = good.clone();
        spoil(&mut config);
        assert!(matches!(data::eval(&config).unwrap_err(), Error::Config(_)));
    }
    for (lanes, window) in [(0, 1), (1, 0)] {
        let config = config(shards(&good), lanes, window);
        assert!(matches!(data::eval(&config).unwrap_err(), Error::Config(_)));
    }
}

/// As many values as a batch may hold, and more than any machine has memory for them.
#[test]
fn no_memory_for_a_batch() {
    let (_dir, mut config) = spoilt(|good| good, &[]);
    config.resize = Resize::Tf;
    config.resolution = 4096;
    config.batch_size = (1 << 36) / (3 * 4096 * 4096);
    let bytes = config.batch_size * 3 * 4096 * 4096 * 4;
    match data::eval(&config) {
        Err(error) => assert_eq!(
            error.to_string(),
            format!(
                "no memory for a batch of {} MiB\n\
                 hint: a smaller train.batch_size or model.resolution needs less; runner plan says how much",
                bytes >> 20
            )
        ),
        // A system may promise memory that it does not have.
        Ok(loader) => drop(loader),
    }
}

/// One pixel, and the thinnest images: every crop, every filter, a crop ratio near 0, more lanes than shards.
#[test]
fn images_of_a_pixel_or_a_line() {
    let shapes: [&[u8]; 3] = [
        include_bytes!("../photos/420-1x1.jpg"),
        include_bytes!("../photos/422-1x300.jpg"),
        include_bytes!("../photos/420-300x1.jpg"),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("train-0");
    write(&path, shapes.map(|jpeg| example(jpeg, 1)));
    let mut config = config(&[path], 1000, usize::MAX);
    config.batch_size = 3;
    let wide = ([1e-9, 1.0], [1e-6, 1e6]);
    let narrow = ([1.0, 1.0], [1e-6, 1e-6]);
    for (area, aspect) in [([0.08, 1.0], [0.75, 4.0 / 3.0]), wide, narrow] {
        for crop in [
            Crop::Tf { area, aspect },
            Crop::Torchvision { area, aspect },
            Crop::None,
        ] {
            for resize in [Resize::Pillow, Resize::Tf, Resize::Tf1] {
                for (crop_ratio, resolution) in [(1e-300, 1), (0.875, 33), (1.0, 7)] {
                    config.crop = crop;
                    config.resize = resize;
                    config.crop_ratio = crop_ratio;
                    config.resolution = resolution;
                    let batches: Vec<_> = train(&config).take(20).map(Result::unwrap).collect();
                    assert_eq!(batches.len(), 20);
                    let count = data::eval(&config).unwrap().map(Result::unwrap).count();
                    assert_eq!(count, 1);
                }
            }
        }
    }
}

/// A window that no file fills, more lanes than shards, an epoch of one record.
#[test]
fn more_lanes_than_shards_and_an_endless_window() {
    let (_dir, good) = spoilt(|good| good, &[]);
    let config = config(shards(&good), usize::MAX, usize::MAX);
    let batches: Vec<_> = data::train(&config, Cursor::default())
        .unwrap()
        .take(10)
        .map(Result::unwrap)
        .collect();
    assert_eq!(labels(&batches).len(), 40);
}

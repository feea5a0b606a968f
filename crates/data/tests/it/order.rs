//! Which samples come when.

use std::collections::HashMap;

use data::{Crop, Cursor, Error, Pixels};

use crate::{RECORDS, Shards, config, digits, labels, take, train};

fn sorted(mut labels: Vec<u32>) -> Vec<u32> {
    labels.sort_unstable();
    labels
}

fn every_label() -> Vec<u32> {
    (0..RECORDS as u32).collect()
}

#[test]
fn every_record_comes_once_an_epoch() {
    let shards = Shards::new();
    for lanes in [1, 2, 3, 64] {
        for window in [1, 2, 5, 100] {
            // Three epochs are 69 samples.
            let seen = labels(&take(train(&shards.config(lanes, window)), 18));
            let epochs: Vec<&[u32]> = seen.chunks_exact(RECORDS).collect();
            for epoch in &epochs {
                let context = format!("{lanes} lanes, window {window}: {epoch:?}");
                assert_eq!(sorted(epoch.to_vec()), every_label(), "{context}");
            }
            assert_ne!(epochs[0], epochs[1], "{lanes} lanes, window {window}");
            assert_ne!(epochs[1], epochs[2], "{lanes} lanes, window {window}");
        }
    }
}

#[test]
fn one_lane_with_a_window_of_one_reads_whole_shards_in_sequence() {
    let shards = Shards::new();
    let mut config = shards.config(1, 1);
    config.batch_size = RECORDS;
    let seen = labels(&take(train(&config), 1));
    let jumps = seen
        .windows(2)
        .filter(|pair| pair[1] != pair[0] + 1)
        .count();
    assert!((1..=3).contains(&jumps), "{seen:?}");
}

#[test]
fn the_order_of_the_list_of_shards_does_not_matter() {
    let shards = Shards::new();
    let mut reversed = shards.paths.clone();
    reversed.reverse();
    let expected = take(train(&shards.config(2, 3)), 6);
    assert_eq!(take(train(&config(&reversed, 2, 3)), 6), expected);
}

/// Two directories hold shards of the same names, and one of them is renamed past the other; and the whole is moved.
#[test]
fn the_names_of_directories_do_not_matter() {
    let shards = Shards::new();
    let place = |left: &str, right: &str| {
        let dir = tempfile::tempdir().unwrap();
        let mut placed = Vec::new();
        for (i, path) in shards.paths.iter().enumerate() {
            let parent = dir.path().join(if i % 2 == 0 { left } else { right });
            std::fs::create_dir_all(&parent).unwrap();
            let to = parent.join(path.file_name().unwrap());
            std::fs::copy(path, &to).unwrap();
            placed.push(to);
        }
        let fingerprint = data::fingerprint(&placed).unwrap();
        let config = config(&placed, 2, 3);
        let evaluated: Vec<_> = data::eval(&config).unwrap().map(Result::unwrap).collect();
        (fingerprint, take(train(&config), 6), evaluated)
    };
    let reference = place("a", "b");
    assert_eq!(place("z", "b"), reference);
    assert_eq!(labels(&reference.2), every_label());
}

/// The fingerprint notices whatever the order notices.
#[test]
fn swapped_directories_of_equal_names_change_the_fingerprint_with_the_order() {
    let shards = Shards::new();
    let place = |first: &str, second: &str| {
        let dir = tempfile::tempdir().unwrap();
        let placed = [(first, 0), (second, 2)].map(|(parent, i)| {
            let parent = dir.path().join(parent);
            std::fs::create_dir(&parent).unwrap();
            let to = parent.join("train-0");
            std::fs::copy(&shards.paths[i], &to).unwrap();
            to
        });
        let evaluated: Vec<_> = data::eval(&config(&placed, 1, 1))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        (data::fingerprint(&placed).unwrap(), labels(&evaluated))
    };
    let (one, other) = (place("a", "b"), place("z", "b"));
    assert_ne!(one.1, other.1);
    assert_ne!(one.0, other.0);
}

#[test]
fn threads_change_nothing() {
    let shards = digits("train-*");
    let mut config = config(&shards, 3, 7);
    config.batch_size = 50;
    config.threads = 1;
    let one = take(train(&config), 4);
    config.threads = 2;
    assert_eq!(take(train(&config), 4), one);
}

#[test]
fn seeds_differ_in_order_and_in_crops() {
    let shards = Shards::new();
    let mut config = shards.config(2, 5);
    config.batch_size = RECORDS;
    let first = take(train(&config), 1).remove(0);
    config.seed += 1;
    let second = take(train(&config), 1).remove(0);
    assert_ne!(first.labels, second.labels);
    assert_eq!(sorted(first.labels), sorted(second.labels));

    let mut config = config_of_one_shard(&shards);
    let first = take(train(&config), 1).remove(0);
    config.seed += 1;
    let second = take(train(&config), 1).remove(0);
    assert_eq!(first.labels, second.labels);
    assert_ne!(first.pixels, second.pixels);
}

/// Only one order is possible.
fn config_of_one_shard(shards: &Shards) -> data::Config {
    config(&shards.paths[..1], 1, 1)
}

#[test]
fn crops_differ_from_epoch_to_epoch() {
    let shards = Shards::new();
    let mut config = config_of_one_shard(&shards);
    config.batch_size = 7;
    let batches = take(train(&config), 2);
    assert_eq!(batches[0].labels, batches[1].labels);
    assert_ne!(batches[0].pixels, batches[1].pixels);
}

#[test]
fn a_resume_after_any_batch_goes_on_exactly() {
    let shards = Shards::new();
    for (lanes, window) in [(1, 1), (2, 3), (3, 100), (64, 2)] {
        let config = shards.config(lanes, window);
        // 72 samples: past three epochs.
        let expected = take(train(&config), 18);
        for (i, batch) in expected.iter().enumerate() {
            let text = serde_json::to_string(&batch.cursor).unwrap();
            let cursor: Cursor = serde_json::from_str(&text).unwrap();
            let resumed = take(data::train(&config, cursor).unwrap(), 18 - i - 1);
            assert_eq!(
                resumed,
                expected[i + 1..],
                "{lanes} lanes, window {window}, batch {i}"
            );
        }
    }
}

#[test]
fn evaluation_is_in_file_order_with_a_partial_last_batch() {
    let shards = Shards::new();
    let batches: Vec<_> = data::eval(&shards.config(2, 5))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(labels(&batches), every_label());
    let sizes: Vec<usize> = batches.iter().map(|batch| batch.labels.len()).collect();
    assert_eq!(sizes, [4, 4, 4, 4, 4, 3]);
    for batch in batches {
        let Pixels::U8(pixels) = batch.pixels else {
            panic!("pillow gives u8")
        };
        assert_eq!(pixels.len(), batch.labels.len() * 16 * 16 * 3);
    }
}

#[test]
fn training_without_crop_and_flip_sees_what_evaluation_sees() {
    let shards = Shards::new();
    let mut config = shards.config(3, 5);
    config.batch_size = 1;
    config.crop = Crop::None;
    config.flip = false;
    let trained: HashMap<u32, Pixels> = take(train(&config), RECORDS)
        .into_iter()
        .map(|batch| (batch.labels[0], batch.pixels))
        .collect();
    assert_eq!(trained.len(), RECORDS);
    for batch in data::eval(&config).unwrap() {
        let batch = batch.unwrap();
        assert_eq!(trained[&batch.labels[0]], batch.pixels);
    }
}

#[test]
fn half_of_the_images_are_flipped() {
    let shards = Shards::new();
    let mut config = shards.config(1, 1);
    config.batch_size = 1;
    config.crop = Crop::None;
    let flipped = |batch: &data::Batch| {
        let Pixels::U8(pixels) = &batch.pixels else {
            panic!("pillow gives u8")
        };
        let mirrored: Vec<u8> = pixels
            .chunks(16 * 3)
            .flat_map(|row| row.chunks(3).rev().flatten().copied())
            .collect();
        Pixels::U8(mirrored)
    };
    let straight: HashMap<u32, Pixels> = data::eval(&config)
        .unwrap()
        .map(|batch| batch.unwrap())
        .map(|batch| (batch.labels[0], batch.pixels))
        .collect();
    let samples = 20 * RECORDS;
    let mut flips = 0;
    for batch in take(train(&config), samples) {
        if batch.pixels != straight[&batch.labels[0]] {
            assert_eq!(flipped(&batch), straight[&batch.labels[0]]);
            flips += 1;
        }
    }
    // Five standard deviations of a fair coin.
    let half = samples as f64 / 2.0;
    assert!(
        (f64::from(flips) - half).abs() < 5.0 * (half / 2.0).sqrt(),
        "{flips} of {samples}"
    );
}

#[test]
fn a_cursor_of_other_data_is_refused() {
    let shards = Shards::new();
    let cursor = take(train(&shards.config(2, 3)), 3).remove(2).cursor;
    let refused = |config: &data::Config| data::train(config, cursor.clone()).unwrap_err();

    let error = refused(&shards.config(3, 3));
    assert!(matches!(error, Error::Cursor(_)));
    assert_eq!(
        error.to_string(),
        "the saved position does not fit the data: it has 2 lanes, the data 3\n\
         hint: the shards, data.lanes or data.shuffle_window have changed; start another run"
    );
    // No lane is there, or no such record, or fewer samples in the window.
    let early = take(train(&shards.config(2, 3)), 1).remove(0).cursor;
    let text = serde_json::to_string(&early).unwrap();
    for (key, absurd) in [
        ("next", "2"),
        ("shard", "99"),
        ("offset", "18446744073709551615"),
        ("record", "18446744073709551615"),
        ("taken", "18446744073709551615"),
    ] {
        let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let place = match key {
            "next" => &mut value["next"],
            key => &mut value["lanes"][0][key],
        };
        *place = serde_json::from_str(absurd).unwrap();
        let cursor: Cursor = serde_json::from_value(value).unwrap();
        let first = data::train(&shards.config(2, 3), cursor).and_then(|mut l| l.next().unwrap());
        assert!(
            matches!(first, Err(Error::Cursor(_) | Error::Store(_))),
            "{key}"
        );
    }
    // The lane is in a record that the shorter list does not have there, or the file is too short.
    assert!(matches!(
        refused(&config(&shards.paths[3..], 2, 1)),
        Error::Cursor(_) | Error::Store(_)
    ));
}

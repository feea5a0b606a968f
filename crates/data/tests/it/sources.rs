//! Real digits, noise, zeros, and what is known about shards without reading them.

use data::{Config, Cursor, Error, Pixels, Source};

use crate::{config, digits, labels, take, train};

fn digits_config(pattern: &str) -> Config {
    Config {
        resolution: 32,
        batch_size: 100,
        classes: 10,
        ..config(&digits(pattern), 64, 64)
    }
}

#[test]
fn digits_are_all_there() {
    assert_eq!(
        data::count(data::Format::TfRecord, &digits("train-*"), None).unwrap(),
        1438
    );
    assert_eq!(
        data::count(data::Format::TfRecord, &digits("validation-*"), None).unwrap(),
        359
    );
    let batches: Vec<_> = data::eval(&digits_config("validation-*"))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(batches.len(), 4);
    let labels = labels(&batches);
    assert_eq!(labels.len(), 359);
    assert!((0..10).all(|class| labels.contains(&class)));
    // An epoch and a half with random crops: every image decodes.
    assert_eq!(take(train(&digits_config("train-*")), 21).len(), 21);
}

fn made_up(source: Source) -> Config {
    Config {
        source,
        ..config(&[], 1, 1)
    }
}

#[test]
fn noise_is_uniform_and_the_same_in_every_epoch() {
    let config = made_up(Source::Fake { examples: 10 });
    let batches = take(train(&config), 5);
    let labels = labels(&batches);
    assert_eq!(labels[..10], labels[10..]);
    let Pixels::U8(first) = &batches[0].pixels else {
        panic!("noise is u8")
    };
    let Pixels::U8(second) = &batches[1].pixels else {
        panic!("noise is u8")
    };
    assert_eq!(first.len(), 4 * 16 * 16 * 3);
    assert_ne!(first, second);
    let mean = first.iter().map(|&v| f64::from(v)).sum::<f64>() / first.len() as f64;
    // The deviation of one value is 74, that of the mean of 3072 is 1.33.
    assert!((mean - 127.5).abs() < 6.7, "{mean}");
    assert!(first.contains(&0) && first.contains(&255));
}

#[test]
fn a_loader_knows_how_long_it_read() {
    let mut batches = train(&digits_config("train-*"));
    for batch in batches.by_ref().take(5) {
        assert_eq!(batch.unwrap().labels.len(), 100);
    }
    let share = batches.reading_share();
    assert!(share > 0.0 && share <= 1.0, "{share}");
}

#[test]
fn noise_of_evaluation_is_not_that_of_training() {
    let config = made_up(Source::Fake { examples: 40 });
    let trained = take(train(&config), 10);
    let evaluated: Vec<_> = data::eval(&config).unwrap().map(Result::unwrap).collect();
    assert_ne!(labels(&trained), labels(&evaluated));
    for (trained, evaluated) in trained.iter().zip(&evaluated) {
        assert_ne!(trained.pixels, evaluated.pixels);
    }
    let again: Vec<_> = data::eval(&config).unwrap().map(Result::unwrap).collect();
    assert_eq!(again, evaluated);
}

#[test]
fn an_epoch_that_cannot_be_counted_does_no_harm() {
    let config = made_up(Source::Zeros { examples: 2 });
    let text = format!("{{\"epoch\":{},\"next\":0,\"lanes\":[]}}", u64::MAX);
    let cursor = serde_json::from_str(&text).unwrap();
    assert_eq!(take(data::train(&config, cursor).unwrap(), 2).len(), 2);
}

#[test]
fn zeros_are_zero() {
    let batch = take(train(&made_up(Source::Zeros { examples: 3 })), 1).remove(0);
    assert_eq!(batch.pixels, Pixels::U8(vec![0; 4 * 16 * 16 * 3]));
    assert_eq!(batch.labels, vec![0; 4]);
}

#[test]
fn made_up_data_resumes_and_ends_as_records_do() {
    for source in [
        Source::Fake { examples: 10 },
        Source::Zeros { examples: 10 },
    ] {
        let config = made_up(source);
        let expected = take(train(&config), 6);
        for (i, batch) in expected.iter().enumerate() {
            let resumed = data::train(&config, batch.cursor.clone()).unwrap();
            assert_eq!(take(resumed, 5 - i), expected[i + 1..]);
        }
        let sizes: Vec<usize> = data::eval(&config)
            .unwrap()
            .map(|batch| batch.unwrap().labels.len())
            .collect();
        assert_eq!(sizes, [4, 4, 2]);
    }
    let none = made_up(Source::Fake { examples: 0 });
    let error = data::train(&none, Cursor::default()).unwrap_err();
    assert_eq!(error.to_string(), "the dataset holds no examples");
    let far = take(train(&made_up(Source::Zeros { examples: 10 })), 2).remove(1);
    let few = made_up(Source::Zeros { examples: 5 });
    assert!(matches!(
        data::train(&few, far.cursor).unwrap_err(),
        Error::Cursor(_)
    ));
}

#[test]
fn a_loader_dropped_early_stops() {
    for batches in [0, 1] {
        let loader = train(&made_up(Source::Fake { examples: 10 }));
        drop(take(loader, batches));
    }
}

#[test]
fn fingerprints_notice_names_and_lengths_only() {
    let write = |names: [&str; 2], bytes: &[u8]| {
        let dir = tempfile::tempdir().unwrap();
        let paths = names.map(|name| dir.path().join(name));
        store::write_atomic(&paths[0], &[bytes]).unwrap();
        store::write_atomic(&paths[1], &[b"x"]).unwrap();
        let [a, b] = paths;
        let fingerprint = data::fingerprint(&[a.clone(), b.clone()]).unwrap();
        assert_eq!(data::fingerprint(&[b, a]).unwrap(), fingerprint);
        assert_eq!(fingerprint.len(), 16);
        fingerprint
    };
    let reference = write(["a", "b"], b"12");
    assert_eq!(write(["a", "b"], b"34"), reference);
    assert_ne!(write(["a", "c"], b"12"), reference);
    assert_ne!(write(["a", "b"], b"123"), reference);
    assert!(data::fingerprint(&["absent".into()]).is_err());
}

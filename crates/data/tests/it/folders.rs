//! Directories of image files, tar archives, compressed shards, and augmentation under resume.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use data::{Augment, Batch, Config, Cursor, Error, Folder, Format, Policy, Reason, Source};

use crate::{RECORDS, Shards, config, jpegs, labels, take, train};

/// Three classes of 5, 1 and 4 digits; files are not made in the order of their names.
fn tree() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut jpegs = jpegs(10).into_iter();
    for (class, count) in [("n02", 5), ("n01", 1), ("n10", 4)] {
        let folder = dir.path().join(class);
        fs::create_dir(&folder).unwrap();
        for i in (0..count).rev() {
            put(&folder.join(format!("{i}.JPEG")), &jpegs.next().unwrap());
        }
    }
    put(&dir.path().join("n01/.hidden"), b"no image");
    dir
}

fn put(path: &Path, bytes: &[u8]) {
    store::write_atomic(path, &[bytes]).unwrap();
}

fn folder_config(root: &Path) -> Config {
    Config {
        source: Source::Folder(Folder::open(root).unwrap()),
        ..config(&[], 1, 1)
    }
}

#[test]
fn a_folder_is_evaluated_in_the_order_of_its_names() {
    let dir = tree();
    let folder = Folder::open(dir.path()).unwrap();
    assert_eq!(folder.classes(), ["n01", "n02", "n10"]);
    assert_eq!((folder.len(), folder.is_empty()), (10, false));
    let config = folder_config(dir.path());
    let batches: Vec<_> = data::eval(&config).unwrap().map(Result::unwrap).collect();
    assert_eq!(labels(&batches), [0, 1, 1, 1, 1, 1, 2, 2, 2, 2]);
    // The same pixels as from a shard of the same files in this order.
    let shard = dir.path().join("shard");
    let files = [("n01", 1), ("n02", 5), ("n10", 4)]
        .into_iter()
        .enumerate()
        .flat_map(|(class, (name, count))| {
            (0..count).map(move |i| (class as i64, format!("{name}/{i}.JPEG")))
        })
        .map(|(class, file)| crate::example(&fs::read(dir.path().join(file)).unwrap(), class + 1));
    crate::write(&shard, files);
    let of_shard = data::eval(&crate::config(&[shard], 1, 1)).unwrap();
    let pixels = |batches: &[Batch]| batches.iter().map(|b| b.pixels.clone()).collect::<Vec<_>>();
    let of_shard: Vec<_> = of_shard.map(Result::unwrap).collect();
    assert_eq!(pixels(&of_shard), pixels(&batches));
}

/// Every stream that is resumed after any of its batches is the stream itself.
fn check_resume(config: &Config, batches: usize) -> Vec<Batch> {
    let straight = take(train(config), batches);
    for at in 0..batches {
        // By way of the checkpoint's JSON.
        let cursor = serde_json::to_string(&straight[at].cursor).unwrap();
        let cursor: Cursor = serde_json::from_str(&cursor).unwrap();
        let rest = take(data::train(config, cursor).unwrap(), batches - at - 1);
        assert_eq!(rest, straight[at + 1..], "after batch {at}");
    }
    straight
}

#[test]
fn every_epoch_of_a_folder_holds_each_image_once_and_resumes_anywhere() {
    let dir = tree();
    let mut config = folder_config(dir.path());
    config.batch_size = 5;
    let batches = check_resume(&config, 8);
    let labels = labels(&batches);
    for epoch in labels.chunks(10) {
        let count = |class| epoch.iter().filter(|&&label| label == class).count();
        assert_eq!([0, 1, 2].map(count), [1, 5, 4]);
    }
    assert_ne!(labels[..10], labels[10..20]);
    let far = serde_json::from_str(r#"{"epoch":0,"next":11,"lanes":[]}"#).unwrap();
    let error = data::train(&config, far).unwrap_err();
    assert!(matches!(error, Error::Cursor(_)), "{error}");
}

#[test]
fn a_folder_has_a_fingerprint_of_names_and_lengths() {
    let dir = tree();
    let of = |dir: &tempfile::TempDir| Folder::open(dir.path()).unwrap().fingerprint();
    let before = of(&dir);
    assert_eq!(of(&tree()), before, "wherever it lies");
    put(&dir.path().join("n01/1.JPEG"), b"one more");
    let more = of(&dir);
    assert_ne!(more, before);
    put(&dir.path().join("n01/1.JPEG"), b"another length");
    assert_ne!(of(&dir), more);
}

#[test]
fn what_does_not_belong_in_a_folder_is_named() {
    let dir = tree();
    put(&dir.path().join("README"), b"text");
    let error = Folder::open(dir.path()).unwrap_err();
    assert!(matches!(error, Error::Misplaced { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains("README: a file beside the classes' folders\nhint: ")
    );
    fs::remove_file(dir.path().join("README")).unwrap();
    fs::create_dir(dir.path().join("n01/deeper")).unwrap();
    let error = Folder::open(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("n01/deeper: not a file, in a class's folder"),
        "{error}"
    );
    let empty = tempfile::tempdir().unwrap();
    fs::create_dir(empty.path().join("n01")).unwrap();
    let error = Folder::open(empty.path()).unwrap_err();
    assert!(matches!(error, Error::NoRecords { .. }), "{error}");
    let error = Folder::open(&empty.path().join("absent")).unwrap_err();
    assert!(
        matches!(error, Error::Store(store::Error::Io { .. })),
        "{error}"
    );
}

#[test]
fn a_bad_file_of_a_folder_is_named_counted_and_replaced() {
    let dir = tree();
    put(&dir.path().join("n02/3.JPEG"), b"no image");
    let mut config = folder_config(dir.path());
    let error = data::eval(&config).unwrap().find_map(Result::err).unwrap();
    let Error::Record(bad) = &error else {
        panic!("{error}")
    };
    assert_eq!(bad.shard, dir.path().join("n02/3.JPEG"));
    assert!(matches!(bad.reason, Reason::Image(_)), "{error}");
    config.max_bad_records = 1;
    let batches: Vec<_> = data::eval(&config).unwrap().map(Result::unwrap).collect();
    assert_eq!(labels(&batches), [0, 1, 1, 1, 1, 2, 2, 2, 2]);
    // A network of two classes has no third.
    config.classes = 2;
    let error = data::eval(&config).unwrap().find_map(Result::err).unwrap();
    let error = error.to_string();
    assert!(
        error.contains("the stored label 2 less the offset 0 is no class from 0 to 1"),
        "{error}"
    );
}

#[test]
fn compressed_shards_give_the_same_batches_and_resume() {
    let shards = Shards::new();
    let plain = check_resume(&shards.config(2, 5), 9);
    let compressed = tempfile::tempdir().unwrap();
    let mut paths = vec![];
    for (i, path) in shards.paths.iter().enumerate() {
        let bytes = fs::read(path).unwrap();
        let level = flate2::Compression::default();
        let packed = if i.is_multiple_of(2) {
            let mut out = flate2::write::GzEncoder::new(vec![], level);
            out.write_all(&bytes).unwrap();
            out.finish().unwrap()
        } else {
            let mut out = flate2::write::ZlibEncoder::new(vec![], level);
            out.write_all(&bytes).unwrap();
            out.finish().unwrap()
        };
        let path = compressed.path().join(path.file_name().unwrap());
        put(&path, &packed);
        paths.push(path);
    }
    assert_eq!(
        data::count(data::Format::TfRecord, &paths, None).unwrap(),
        RECORDS as u64
    );
    let config = config(&paths, 2, 5);
    assert_eq!(check_resume(&config, 9), plain);
}

#[test]
fn augmentation_is_exact_under_resume_and_threads_and_leaves_evaluation_alone() {
    let shards = Shards::new();
    let mut config = shards.config(2, 5);
    let plain = take(train(&config), 1);
    let scored = take(data::eval(&config).unwrap(), 9);
    for resize in [data::Resize::Pillow, data::Resize::Tf] {
        config.resize = resize;
        config.augment = Augment {
            policy: Policy::RandAugment {
                ops: 2,
                magnitude: 9,
            },
            jitter: [0.4, 0.4, 0.4, 0.1],
            erasing: 0.5,
        };
        let many = check_resume(&config, 9);
        config.threads = 1;
        assert_eq!(take(train(&config), 9), many);
        config.threads = 2;
        config.augment.policy = Policy::AutoAugment;
        assert_ne!(take(train(&config), 9), many);
    }
    config.resize = data::Resize::Pillow;
    let changed = take(train(&config), 1);
    assert_eq!(changed[0].labels, plain[0].labels);
    assert_ne!(changed[0].pixels, plain[0].pixels);
    assert_eq!(take(data::eval(&config).unwrap(), 9), scored);
}

/// A member of a tar archive (POSIX.1-1988).
fn member(name: &str, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0; 512];
    out[..name.len()].copy_from_slice(name.as_bytes());
    out[124..136].copy_from_slice(format!("{:011o}\0", bytes.len()).as_bytes());
    out[148..156].fill(b' ');
    out[156] = b'0';
    let sum: u32 = out.iter().map(|&b| u32::from(b)).sum();
    out[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    out.extend(bytes);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

/// The records of the shards, as tar archives of the same names in another directory.
fn archives(shards: &Shards, dir: &Path) -> Vec<std::path::PathBuf> {
    let mut id = 0;
    let write = |path: &std::path::PathBuf| {
        let mut archive = vec![];
        let mut reader = store::tfrecord::Reader::open(path).unwrap();
        while let Some(record) = reader.next().unwrap() {
            let (jpeg, label) = data::parse(&record.bytes).unwrap();
            archive.extend(member(
                &format!("a/{id:04}.cls"),
                label.to_string().as_bytes(),
            ));
            archive.extend(member(&format!("a/{id:04}.json"), b"{}"));
            archive.extend(member(&format!("a/{id:04}.jpg"), jpeg));
            id += 1;
        }
        archive.extend([0; 1024]);
        let path = dir.join(path.file_name().unwrap());
        put(&path, &archive);
        path
    };
    shards.paths.iter().map(write).collect()
}

fn of_format(config: Config, is: Format) -> Config {
    let mut config = config;
    let Source::Shards { format, .. } = &mut config.source else {
        unreachable!()
    };
    *format = is;
    config
}

#[test]
fn tar_archives_give_the_same_batches_and_resume() {
    let shards = Shards::new();
    let dir = tempfile::tempdir().unwrap();
    let paths = archives(&shards, dir.path());
    assert_eq!(
        data::count(Format::WebDataset, &paths, None).unwrap(),
        RECORDS as u64
    );
    let tar = of_format(config(&paths, 2, 5), Format::WebDataset);
    assert_eq!(
        labels(&check_resume(&tar, 9)),
        labels(&check_resume(&shards.config(2, 5), 9))
    );
    let pixels = |config: &Config| {
        let batches = data::eval(config).unwrap().map(Result::unwrap);
        batches
            .map(|batch| (batch.pixels, batch.labels))
            .collect::<Vec<_>>()
    };
    assert_eq!(pixels(&tar), pixels(&shards.config(2, 5)));
    // Compressed as a whole.
    for path in &paths {
        let mut out = flate2::write::GzEncoder::new(vec![], flate2::Compression::default());
        out.write_all(&fs::read(path).unwrap()).unwrap();
        put(path, &out.finish().unwrap());
    }
    assert_eq!(pixels(&tar), pixels(&shards.config(2, 5)));
    assert_eq!(labels(&check_resume(&tar, 3)).len(), 12);
}

#[test]
fn samples_of_an_archive_that_are_not_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("train-0.tar");
    let jpeg = jpegs(1).remove(0);
    for (files, what) in [
        (vec![member("7.jpg", &jpeg)], "7 has no cls"),
        (
            vec![member("7.cls", b"1")],
            "7 has no jpg, jpeg, png or webp",
        ),
        (
            vec![member("7.jpg", &jpeg), member("7.cls", b"cat")],
            "7.cls: not a whole number in digits",
        ),
    ] {
        let good = [member("0.jpg", &jpeg), member("0.cls", b"1\n")];
        put(&path, &[good.concat(), files.concat()].concat());
        let config = of_format(
            config(std::slice::from_ref(&path), 1, 1),
            Format::WebDataset,
        );
        let error = data::eval(&config)
            .unwrap()
            .find_map(Result::err)
            .unwrap()
            .to_string();
        let expected = format!("{}: record 1 at byte ", path.display());
        assert!(error.starts_with(&expected), "{error}");
        assert!(
            error.contains(&format!(": not a usable sample: {what}\nhint: ")),
            "{error}"
        );
    }
    put(&path, b"no archive");
    let config = of_format(config(&[path], 1, 1), Format::WebDataset);
    let error = data::eval(&config).unwrap().find_map(Result::err).unwrap();
    assert!(
        matches!(error, Error::Store(store::Error::Corrupt { .. })),
        "{error}"
    );
}

//! `data.index`: what it changes, which is no pixel, and what it keeps.

use std::path::Path;

use data::{Config, Decode, Index};

use super::{Shards, take, train};

fn indexed(shards: &Shards, dir: &Path) -> Config {
    Config {
        decode: Decode::Fast,
        index: Some(Index::new(dir)),
        ..shards.config(2, 3)
    }
}

/// Names and sizes of what is there.
fn listed(dir: &Path) -> Vec<(String, u64)> {
    let entries = std::fs::read_dir(dir).unwrap().map(Result::unwrap);
    let mut listed: Vec<_> = entries
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, entry.metadata().unwrap().len())
        })
        .filter(|(name, _)| name != ".lock")
        .collect();
    listed.sort();
    listed
}

#[test]
fn an_index_is_written_once_and_changes_no_batch() {
    let (shards, dir) = (Shards::new(), tempfile::tempdir().unwrap());
    let dir = dir.path().join("index");
    let plain = Config {
        index: None,
        ..indexed(&shards, &dir)
    };
    let epochs = 3 * super::RECORDS / plain.batch_size;
    let expected = take(train(&plain), epochs);
    let first = indexed(&shards, &dir);
    assert!(take(train(&first), epochs) == expected);
    drop(first);
    let written = listed(&dir);
    // One shard has no record.
    let held = super::SIZES.iter().filter(|&&size| size > 0).count();
    assert_eq!(written.len(), held);
    assert!(written.iter().all(|(_, bytes)| *bytes > 8), "{written:?}");
    // Another start finds everything there.
    let second = indexed(&shards, &dir);
    assert!(take(train(&second), epochs) == expected);
    assert_eq!(listed(&dir), written);
    // Made beforehand it is the same, in another order. Of so few records some were read again before the first were
    // written, and so were noted twice.
    let index = Index::new(&dir.join("ahead"));
    for shard in &shards.paths {
        let filled = index.fill(shard).unwrap();
        assert_eq!((filled.known, filled.others), (0, 0));
        let again = index.fill(shard).unwrap();
        assert_eq!(again.known, filled.images);
    }
    drop(index);
    let ahead = listed(&dir.join("ahead"));
    assert_eq!(ahead.len(), written.len());
    for ((name, bytes), (written_name, written)) in ahead.iter().zip(&written) {
        assert_eq!(name, written_name);
        assert!(
            bytes <= written && *written < 3 * bytes,
            "{name}: {bytes}, {written}"
        );
    }
}

/// A directory that cannot be made is told once and stops nothing.
#[test]
fn an_index_that_cannot_be_written() {
    let shards = Shards::new();
    let dir = shards.paths[0].join("under a file");
    let config = indexed(&shards, &dir);
    let batches = take(train(&config), 6);
    let notes: Vec<&String> = batches.iter().flat_map(|batch| &batch.notes).collect();
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert!(notes[0].starts_with("data.index is not added to any more: "));
    assert!(notes[0].contains("under a file"), "{notes:?}");
}

/// Two processes share one: the first writes, the other reads.
#[test]
fn an_index_that_another_process_writes() {
    let (shards, dir) = (Shards::new(), tempfile::tempdir().unwrap());
    let mine = Index::new(dir.path());
    mine.fill(&shards.paths[0]).unwrap();
    let theirs = Index::new(dir.path());
    let error = theirs.fill(&shards.paths[1]).unwrap_err().to_string();
    assert!(
        error.ends_with(
            "another process adds to this index\nhint: wait for it, or name another directory"
        ),
        "{error}"
    );
    let config = indexed(&shards, dir.path());
    let plain = Config {
        index: None,
        ..config.clone()
    };
    let batches = take(train(&config), 6);
    assert!(batches == take(train(&plain), 6));
}

/// An archive says nothing of its bytes, so points are of an image by what it is.
#[test]
fn an_archive_that_was_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let shard = dir.path().join("train-0.tar");
    // Of the same length: what follows the end of an image is not read.
    let mut jpeg = include_bytes!("../photos/420-500x375.jpg").to_vec();
    let mut other = include_bytes!("../photos/420-optimised.jpg").to_vec();
    let length = jpeg.len().max(other.len());
    jpeg.resize(length, 0);
    other.resize(length, 0);
    let write = |jpeg: &[u8]| {
        let mut tar = Vec::new();
        for (name, bytes) in [("a.jpg", jpeg), ("a.cls", b"0")] {
            let mut header = [0; 512];
            header[..name.len()].copy_from_slice(name.as_bytes());
            header[100..107].copy_from_slice(b"0000644");
            let size = format!("{:011o}", bytes.len());
            header[124..135].copy_from_slice(size.as_bytes());
            header[148..156].fill(b' ');
            header[156] = b'0';
            header[257..262].copy_from_slice(b"ustar");
            let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
            header[148..154].copy_from_slice(format!("{sum:06o}").as_bytes());
            header[154] = 0;
            tar.extend(header);
            tar.extend(bytes);
            tar.resize(tar.len().next_multiple_of(512), 0);
        }
        tar.resize(tar.len() + 1024, 0);
        store::write_atomic(&shard, &[&tar]).unwrap();
    };
    let config = |index: Option<Index>| Config {
        source: data::Source::Shards {
            format: data::Format::WebDataset,
            shards: vec![shard.clone()],
            label_offset: 0,
            lanes: 1,
            shuffle_window: 1,
        },
        decode: Decode::Fast,
        index,
        ..super::config(&[], 1, 1)
    };
    let at = dir.path().join("index");
    let indexed = || config(Some(Index::new(&at)));
    let pixels = |config: Config| take(train(&config), 4).into_iter().map(|b| b.pixels);
    write(&jpeg);
    let before: Vec<_> = pixels(indexed()).collect();
    assert!(before == pixels(config(None)).collect::<Vec<_>>());
    let known = listed(&at);
    assert_eq!(known.len(), 1);
    write(&other);
    let after: Vec<_> = pixels(indexed()).collect();
    assert!(after == pixels(config(None)).collect::<Vec<_>>() && after != before);
    // Nothing of what was known is of this image.
    assert!(listed(&at)[0].1 > known[0].1);
}

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
    assert!(error.contains("another process"), "{error}");
    let config = indexed(&shards, dir.path());
    let plain = Config {
        index: None,
        ..config.clone()
    };
    let batches = take(train(&config), 6);
    assert!(batches == take(train(&plain), 6));
}

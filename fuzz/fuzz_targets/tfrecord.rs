//! A shard: TFRecord framing, plain, GZIP or ZLIB, and a tar archive.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // Readers take paths. A file in memory is quick enough.
    let path = format!("/dev/shm/runner-fuzz-{}", std::process::id());
    let path = Path::new(&path);
    std::fs::write(path, bytes).expect("there is room");
    if let Ok(mut reader) = store::tfrecord::Reader::open(path) {
        while let Ok(Some(record)) = reader.next() {
            let _ = record.verify();
        }
        let _ = store::tfrecord::Reader::open_at(path, reader.offset(), reader.record(), None);
    }
    let _ = store::tfrecord::count(path, None);
    let members = store::tar::Reader::open_at(path, 0, None);
    if let Ok(mut reader) = members {
        while let Ok(Some(_)) = reader.next() {}
    }
});

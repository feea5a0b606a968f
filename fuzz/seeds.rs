//! Writes the files that fuzzing starts from: `seeds DIR`, where DIR gets a folder for each target.

#![expect(clippy::disallowed_methods, reason = "what is half written is written again")]

use std::fs;
use std::path::{Path, PathBuf};

fn main() {
    let dir = PathBuf::from(std::env::args().nth(1).expect("seeds DIR"));
    let write = |target: &str, name: &str, bytes: &[u8]| {
        let folder = dir.join(target);
        fs::create_dir_all(&folder).expect("the folder can be made");
        fs::write(folder.join(name), bytes).expect("there is room");
    };
    let digits = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/digits");
    for entry in fs::read_dir(&digits).expect("the digits are there") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if !name.contains("-of-") {
            continue;
        }
        let mut reader = store::tfrecord::Reader::open(&path).expect("a shard");
        let mut shard = vec![];
        for number in 0..8 {
            let record = reader.next().expect("readable").expect("there are more");
            store::tfrecord::write(&mut shard, &record.bytes).expect("memory takes all");
            write("example", &format!("{name}-{number}"), &record.bytes);
            let (encoded, _) = data::parse(&record.bytes).expect("an example");
            write("jpeg", &format!("{name}-{number}"), encoded);
        }
        write("tfrecord", &name, &shard);
    }
    // Photographs; the smallest of some, for speed.
    let mut photos: Vec<Vec<u8>> = (0..40).map(|i| data::photo(0, i)).collect();
    photos.sort_by_key(Vec::len);
    for (number, photo) in photos.iter().take(4).enumerate() {
        write("jpeg", &format!("photo-{number}"), photo);
    }
}

//! `runner data` and `runner bench input`, on shards that are made here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::{check, json};

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Made-up photographs: 12 in 3 shards, and the pattern that names them.
fn fake(dir: &Path) -> String {
    let out = dir.join("fake");
    check(
        &[
            "data",
            "fake",
            path(&out),
            "--examples=12",
            "--shards=3",
            "--classes=5",
        ],
        0,
    );
    format!("{}/train-*", out.display())
}

#[test]
fn made_up_shards_pass_the_check_and_feed_the_bench() {
    let dir = tempfile::tempdir().unwrap();
    let pattern = fake(dir.path());
    let audit = json(
        &check(
            &[
                "data",
                "check",
                &pattern,
                "--classes=5",
                "--no-duplicates",
                "--json",
            ],
            0,
        )
        .0,
    );
    for (key, expected) in [
        ("shards", 3),
        ("records", 12),
        ("duplicates", 0),
        ("problem_count", 0),
    ] {
        assert_eq!(audit[key], expected, "{audit}");
    }
    let labels = audit["labels"].as_object().unwrap();
    assert!(
        labels
            .keys()
            .all(|label| (1..=5).contains(&label.parse::<i64>().unwrap())),
        "{audit}"
    );
    assert_eq!(
        labels.values().map(|n| n.as_u64().unwrap()).sum::<u64>(),
        12
    );

    for decode in ["fast", "exact"] {
        let args = [
            "bench",
            "input",
            "--data",
            &pattern,
            "--batch=4",
            "--resolution=32",
            "--threads=2",
            "--seconds=0",
            "--decode",
            decode,
            "--json",
        ];
        let report = json(&check(&args, 0).0);
        assert_eq!(
            (&report["records"], &report["decode"]),
            (&12.into(), &decode.into()),
            "{report}"
        );
        assert!(report["images_per_s"].as_f64().unwrap() > 0.0, "{report}");
        let stages = report["stages"].as_object().unwrap();
        let shares = stages.iter().filter(|(name, _)| *name != "us_per_image");
        let sum: f64 = shares.map(|(_, share)| share.as_f64().unwrap()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{report}");
        assert_eq!(
            stages["exact"].as_f64().unwrap() == 0.0,
            decode == "fast",
            "{report}"
        );
    }
}

/// Every problem is told with its place, and the exit code is that of wrong data.
#[test]
fn the_check_finds_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let pattern = fake(dir.path());
    let shard = |i: usize| dir.path().join(format!("fake/train-{i:05}-of-00003"));
    // A payload that was changed, and a shard that was cut off.
    let mut bytes = std::fs::read(shard(0)).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(shard(0), bytes).unwrap();
    let bytes = std::fs::read(shard(1)).unwrap();
    std::fs::write(shard(1), &bytes[..bytes.len() - 10]).unwrap();
    std::fs::copy(shard(2), dir.path().join("fake/train-again")).unwrap();

    let (out, err) = check(&["data", "check", &pattern, "--no-duplicates", "--json"], 3);
    let audit = json(&out);
    assert_eq!(
        (&audit["shards"], &audit["records"], &audit["duplicates"]),
        (&4.into(), &14.into(), &4.into())
    );
    let problems: Vec<&str> = audit["problems"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p.as_str().unwrap())
        .collect();
    for what in [
        "record 0 at byte 0: the checksum of the payload",
        "do not fit in the",
        "the same image as",
    ] {
        assert!(
            problems.iter().any(|problem| problem.contains(what)),
            "{what}: {problems:?}"
        );
    }
    assert!(
        err.contains("6 problems") && err.contains("hint: "),
        "{err}"
    );
    let (out, _) = check(&["data", "check", path(&shard(2)), "--classes=1"], 3);
    assert!(out.contains("is no class from 0 to 0"), "{out}");
}

/// The photographs of `data`'s tests in folders.
fn folders(dir: &Path) -> PathBuf {
    let photos = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/tests/photos");
    let from = dir.join("images");
    let mut count = 0;
    for entry in std::fs::read_dir(photos).unwrap() {
        let entry = entry.unwrap().path();
        if entry.extension().is_some_and(|e| e == "jpg") {
            let name = entry.file_name().unwrap();
            let class = from.join(format!("class-{}", name.len() % 3));
            std::fs::create_dir_all(&class).unwrap();
            std::fs::copy(&entry, class.join(name)).unwrap();
            count += 1;
        }
    }
    assert_eq!(count, 22);
    from
}

/// What `data convert` says with these arguments.
fn convert_with(from: &Path, out: &Path, more: &[&str], code: i32) -> (String, String) {
    let args = ["data", "convert", "--from", path(from), "--out", path(out)];
    check(&[&args[..], more].concat(), code)
}

fn convert(from: &Path, out: &Path, code: i32) -> (String, String) {
    convert_with(from, out, &["--shards=5"], code)
}

fn shards(out: &Path) -> Vec<Vec<u8>> {
    let shard = |i| std::fs::read(out.join(format!("train-{i:05}-of-00005"))).unwrap();
    (0..5).map(shard).collect()
}

#[test]
fn a_conversion_that_was_cut_off_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let from = folders(dir.path());
    let (once, twice) = (dir.path().join("once"), dir.path().join("twice"));
    let (out, _) = convert(&from, &once, 0);
    assert!(
        out.starts_with("22 images of 3 classes in 5 shards;"),
        "{out}"
    );
    assert_eq!(
        std::fs::read_to_string(once.join("labels.txt")).unwrap(),
        "class-0\nclass-1\nclass-2\n"
    );
    let pattern = format!("{}/train-*-of-*", once.display());
    let audit = json(&check(&["data", "check", &pattern, "--classes=3", "--json"], 0).0);
    assert_eq!(audit["records"], 22, "{audit}");

    // What a kill leaves: some shards, and one that was being written.
    convert(&from, &twice, 0);
    for i in 2..5 {
        std::fs::remove_file(twice.join(format!("train-{i:05}-of-00005"))).unwrap();
    }
    std::fs::write(twice.join(".train-00002-of-00005.tmp"), b"half").unwrap();
    let (out, _) = convert(&from, &twice, 0);
    assert!(out.contains("2 of them from before"), "{out}");
    assert_eq!(shards(&once), shards(&twice));

    // Other files are refused rather than mixed in.
    std::fs::remove_file(
        from.join("class-0")
            .read_dir()
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path(),
    )
    .unwrap();
    let (_, err) = convert(&from, &twice, 2);
    assert!(
        err.contains("other files or other arguments") && err.contains("hint: "),
        "{err}"
    );
}

/// `data convert` with more arguments; the shards.
fn converted(from: &Path, out: &Path, more: &[&str]) -> Vec<Vec<u8>> {
    convert_with(from, out, &[&["--shards=5"], more].concat(), 0);
    shards(out)
}

/// Image, label, and the whole record, sorted.
fn records(out: &Path) -> Vec<(Vec<u8>, i64, Vec<u8>)> {
    let mut records = vec![];
    for i in 0..5 {
        let shard = out.join(format!("train-{i:05}-of-00005"));
        let mut reader = store::tfrecord::Reader::open(&shard).unwrap();
        while let Some(record) = reader.next().unwrap() {
            let (image, label) = data::parse(&record.bytes).unwrap();
            records.push((image.to_vec(), label, record.bytes.clone()));
        }
    }
    records.sort();
    records
}

fn holds(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|window| window == what)
}

#[test]
fn tars_of_folders_and_of_tars_are_converted_as_the_folders_are() {
    let dir = tempfile::tempdir().unwrap();
    let from = folders(dir.path());
    let expected = converted(&from, &dir.path().join("folders"), &[]);

    let plain = dir.path().join("plain.tar");
    let mut tar = tar::Builder::new(std::fs::File::create(&plain).unwrap());
    tar.append_dir_all(".", &from).unwrap();
    tar.finish().unwrap();
    let out = dir.path().join("of-folders");
    assert_eq!(converted(&plain, &out, &[]), expected);

    // As ImageNet comes: a tar for each class, in a tar.
    let nested = dir.path().join("nested.tar");
    let mut outer = tar::Builder::new(std::fs::File::create(&nested).unwrap());
    for class in 0..3 {
        let class = format!("class-{class}");
        let mut tar = tar::Builder::new(vec![]);
        tar.append_dir_all("", from.join(&class)).unwrap();
        let bytes = tar.into_inner().unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_cksum();
        let name = format!("{class}.tar");
        outer.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    outer.finish().unwrap();
    let out = dir.path().join("of-tars");
    assert_eq!(converted(&nested, &out, &[]), expected);

    // One that was not fetched to its end.
    let bytes = std::fs::read(&nested).unwrap();
    std::fs::write(&nested, &bytes[..bytes.len() / 2]).unwrap();
    let (_, err) = convert(&nested, &dir.path().join("cut"), 3);
    assert!(
        err.contains("not a whole tar") && err.contains("hint: "),
        "{err}"
    );
}

/// A tar of these files: what their paths are and what they hold; those that hold nothing are links to the first.
fn tar_of(path: &Path, files: &[(&str, &[u8])]) {
    let mut tar = tar::Builder::new(std::fs::File::create(path).unwrap());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        if bytes.is_empty() {
            header.set_entry_type(tar::EntryType::Link);
            tar.append_link(&mut header, name, files[0].0).unwrap();
        } else {
            tar.append_data(&mut header, name, *bytes).unwrap();
        }
    }
    tar.finish().unwrap();
}

#[test]
fn what_could_be_taken_for_something_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let photo = |index| data::photo(0, index);
    let (a, b) = (photo(1), photo(2));
    let file = dir.path().join("images.tar");
    let out = dir.path().join("out");
    let refused = |more: &[&str], code: i32, what: &str| {
        let (_, err) = convert_with(&file, &out, more, code);
        assert!(
            err.contains(what) && err.contains("hint: "),
            "{what}: {err}"
        );
    };

    // Two splits in one archive.
    tar_of(&file, &[("train/cat/a.jpg", &a), ("val/cat/b.jpg", &b)]);
    refused(&[], 3, "lie in two places, \"train/\" and \"val/\"");

    // Cut off where a member begins: what is there is in order.
    tar_of(&file, &[("cat/a.jpg", &a), ("dog/b.jpg", &b)]);
    let whole = std::fs::read(&file).unwrap();
    let second = 512 + a.len().next_multiple_of(512);
    std::fs::write(&file, &whole[..second]).unwrap();
    refused(&[], 3, "its end is missing");

    // A link to a file is that file, and the last of two of a name counts; hidden files are none.
    let files: [(&str, &[u8]); 5] = [
        ("cat/a.jpg", &a),
        ("dog/link.jpg", b""),
        ("dog/b.jpg", b"old"),
        ("dog/b.jpg", &b),
        ("dog/._b.jpg", b"resources"),
    ];
    tar_of(&file, &files);
    converted(&file, &out, &[]);
    let images: Vec<(Vec<u8>, i64)> = records(&out).into_iter().map(|r| (r.0, r.1)).collect();
    let mut expected = vec![(a.clone(), 1), (a.clone(), 2), (b.clone(), 2)];
    expected.sort();
    assert!(images == expected);

    // A split that lacks a class would give others their numbers.
    tar_of(&file, &[("dog/b.jpg", &b)]);
    let validation = ["--split", "validation", "--shards=1"];
    refused(&validation, 2, "another split has other classes");
    let labels = out.join("labels.txt");
    let more = [&validation[..], &["--classes", path(&labels)]].concat();
    let (said, err) = convert_with(&file, &out, &more, 0);
    assert!(err.contains("1 of 2 classes have no image"), "{err}");
    assert!(said.contains("use: data.eval = "), "{said}");

    // Boxes of one of two images with the same name, and of none.
    tar_of(&file, &[("cat/1.jpg", &a), ("dog/1.jpg", &b)]);
    let boxes = dir.path().join("boxes.csv");
    for (text, what) in [
        ("1.jpg,0,0,1,1\n", "1.jpg may be "),
        ("1,0,0,1,1\n", "no image has any of these names"),
        ("1.jpg,0,0,2,1\n", "line 1: not NAME,XMIN"),
    ] {
        std::fs::write(&boxes, text).unwrap();
        refused(&["--boxes", path(&boxes), "--split=boxes"], 3, what);
    }
    let list = dir.path().join("list.csv");
    for (text, what) in [
        ("cat/1.jpg,1\ndog/1.jpg,\n", "line 2: no class"),
        ("cat/1.jpg,1\ndog/1.jpg,-1\n", "\"-1\" is not"),
        (
            "cat/1.jpg,1\ndog/1.jpg,4000000000\n",
            "beyond 1000000 classes",
        ),
    ] {
        std::fs::write(&list, text).unwrap();
        refused(&["--labels", path(&list), "--split=list"], 3, what);
    }
}

#[test]
fn lists_say_what_images_are() {
    let dir = tempfile::tempdir().unwrap();
    let from = folders(dir.path());
    let flat = dir.path().join("flat");
    std::fs::create_dir(&flat).unwrap();
    let (mut names, mut list) = (vec![], String::new());
    for class in 0..3 {
        for entry in std::fs::read_dir(from.join(format!("class-{class}"))).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let source = from.join(format!("class-{class}/{name}"));
            std::fs::copy(source, flat.join(&name)).unwrap();
            list += &format!("{name},{}\n", 10 * class);
            names.push((name, class));
        }
    }
    names.sort();
    let file = |name: &str, text: &str| {
        let file = dir.path().join(name);
        std::fs::write(&file, text).unwrap();
        path(&file).to_string()
    };
    let labels_of = |out: &Path| -> BTreeMap<Vec<u8>, i64> {
        let records = records(out).into_iter();
        records.map(|(image, label, _)| (image, label)).collect()
    };
    let expected = |label: fn(i64) -> i64| -> BTreeMap<Vec<u8>, i64> {
        let read = |(name, class): &(String, i64)| {
            (std::fs::read(flat.join(name)).unwrap(), label(*class))
        };
        names.iter().map(read).collect()
    };

    // Numbers are their own places, and the first is 1 unless it is said.
    let labels = file("numbers.csv", &list);
    let out = dir.path().join("numbers");
    converted(&flat, &out, &["--labels", &labels]);
    assert_eq!(labels_of(&out), expected(|class| 10 * class + 1));
    let written = std::fs::read_to_string(out.join("labels.txt")).unwrap();
    assert_eq!(written.lines().count(), 21);

    // Words, boxes and an order of its own, a class a line in the order of names.
    let by_name: String = names
        .iter()
        .map(|(_, class)| format!("n{class}\n"))
        .collect();
    let labels = file("by-name.txt", &by_name);
    let classes = file("classes.txt", "n2 the last, the least\nn0 the first\nn1\n");
    let boxes = file(
        "boxes.csv",
        "420-500x375.jpg,0.5,0.25,0.75,1\nnobody.jpg,0,0,1,1\n",
    );
    let out = dir.path().join("words");
    let more = [
        "--labels",
        &labels,
        "--classes",
        &classes,
        "--boxes",
        &boxes,
    ];
    converted(&flat, &out, &more);
    assert_eq!(labels_of(&out), expected(|class| (class + 1) % 3 + 1));
    for (_, label, bytes) in records(&out) {
        let words = ["the last, the least", "the first", "n1"][label as usize - 1];
        assert!(holds(&bytes, words.as_bytes()));
        let corner = |side: &str, value: f32| {
            let key = format!("image/object/bbox/{side}");
            // Key, feature, list of floats, packed.
            let value = value.to_le_bytes();
            let mut entry = key.into_bytes();
            entry.extend([2 << 3 | 2, 8, 2 << 3 | 2, 6, 1 << 3 | 2, 4]);
            entry.extend(value);
            holds(&bytes, &entry)
        };
        let has_box = holds(&bytes, b"420-500x375.jpg");
        let sides = [("xmin", 0.5), ("ymin", 0.25), ("xmax", 0.75), ("ymax", 1.0)];
        for (side, value) in sides {
            assert_eq!(corner(side, value), has_box, "{side}");
        }
    }

    // What is wrong is said by line.
    for (text, what) in [
        (
            "420-500x375.jpg,1\nnobody.jpg,2\n",
            "line 2: nobody.jpg is not there",
        ),
        (
            "420-500x375.jpg,1\n420-500x375.jpg,2\n",
            "line 2: 420-500x375.jpg comes twice",
        ),
        ("420-500x375.jpg,1\nanother\n", "line 2: no comma"),
        ("one\ntwo\n", "2 classes for 22 images"),
    ] {
        let labels = file("wrong.csv", text);
        let out = dir.path().join("wrong");
        let (_, err) = convert_with(&flat, &out, &["--labels", &labels], 3);
        assert!(err.contains(what) && err.contains("hint: "), "{err}");
    }
}

/// For readers that take nothing but RGB in JPEG.
#[test]
fn inks_and_other_formats_are_written_anew_where_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let from = folders(dir.path());
    let png = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/tests/goldens/rgb.png");
    std::fs::copy(png, from.join("class-0/a.png")).unwrap();
    let (as_they_are, anew) = (dir.path().join("as-they-are"), dir.path().join("anew"));
    converted(&from, &as_they_are, &[]);
    converted(&from, &anew, &["--rgb-jpeg"]);
    let odd = |out: &Path| {
        let records = records(out);
        let is_odd = |image: &[u8]| data::rgb_jpeg(image).unwrap().is_some();
        assert_eq!(records.len(), 23);
        records.iter().filter(|(image, ..)| is_odd(image)).count()
    };
    assert_eq!((odd(&as_they_are), odd(&anew)), (3, 0));
    let bytes: Vec<u8> = records(&anew).into_iter().flat_map(|r| r.2).collect();
    assert!(!holds(&bytes, b"PNG"));
}

/// The 1797 digits of data/digits, in a folder for each.
fn digits(dir: &Path) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/digits");
    let from = dir.join("digits");
    let mut count = 0;
    for shard in store::glob(&format!("{}/*-of-*", root.display())).unwrap() {
        let mut reader = store::tfrecord::Reader::open(&shard).unwrap();
        while let Some(record) = reader.next().unwrap() {
            let (jpeg, label) = data::parse(&record.bytes).unwrap();
            let class = from.join(format!("digit-{label:02}"));
            std::fs::create_dir_all(&class).unwrap();
            std::fs::write(class.join(format!("{count:04}.jpg")), jpeg).unwrap();
            count += 1;
        }
    }
    assert_eq!(count, 1797);
    from
}

#[test]
fn a_conversion_that_is_killed_and_started_again_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let from = digits(dir.path());
    let args = |out: &Path| {
        let out = format!("--out={}", out.display());
        let from = format!("--from={}", from.display());
        [
            "data".into(),
            "convert".into(),
            "--shards=40".into(),
            from,
            out,
        ]
    };
    let run = |out: &Path| {
        let args = args(out);
        check(&args.iter().map(String::as_str).collect::<Vec<_>>(), 0).0
    };
    let (once, twice) = (dir.path().join("once"), dir.path().join("twice"));
    run(&once);
    let shards = |dir: &Path| -> Vec<(std::ffi::OsString, Vec<u8>)> {
        let read = |entry: std::io::Result<std::fs::DirEntry>| {
            let entry = entry.unwrap();
            (entry.file_name(), std::fs::read(entry.path()).unwrap())
        };
        let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(read).collect();
        files.retain(|(name, _)| !name.to_str().unwrap().starts_with('.'));
        files.sort();
        files
    };
    let mut killed = 0;
    for wanted in [1, 5, 20] {
        let args = args(&twice);
        let mut command = crate::runner(&args.each_ref().map(String::as_str));
        let (out, err) = (std::process::Stdio::null(), std::process::Stdio::null());
        let mut child = command.stdout(out).stderr(err).spawn().unwrap();
        let held = || std::fs::read_dir(&twice).map_or(0, Iterator::count);
        while held() < wanted && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            killed += 1;
        }
        child.wait().unwrap();
    }
    assert!(killed > 0, "every conversion ended before it was killed");
    run(&twice);
    let made = shards(&once);
    assert_eq!(
        made.len(),
        40 + 2,
        "the labels and what they were made from"
    );
    assert!(made == shards(&twice));
}

#[test]
fn a_conversion_says_what_it_passes_over_and_is_alone_in_its_directory() {
    let dir = tempfile::tempdir().unwrap();
    let from = folders(dir.path());
    std::fs::create_dir(from.join("class-0/deeper")).unwrap();
    std::fs::write(from.join("README"), "text").unwrap();
    std::os::unix::fs::symlink("nowhere", from.join("class-1/dead.jpg")).unwrap();
    let out = dir.path().join("out");
    let (done, said) = convert(&from, &out, 0);
    assert!(done.starts_with("22 images of 3 classes"), "{done}");
    for (name, what) in [
        ("class-0/deeper", "a folder in a class's folder"),
        ("README", "a file beside the classes' folders"),
        ("class-1/dead.jpg", "a link to nothing, or not readable"),
    ] {
        let line = format!("{}: passed over: {what}", from.join(name).display());
        assert!(said.contains(&line), "{said}");
    }
    assert!(said.contains("3 passed over: "), "{said}");

    let lease = store::Lease::take(&out).unwrap();
    let (_, said) = convert(&from, &out, 4);
    assert!(
        said.contains("another process is writing to this directory"),
        "{said}"
    );
    drop(lease);
    convert(&from, &out, 0);
}

#[test]
fn a_conversion_names_every_file_that_is_no_image() {
    let dir = tempfile::tempdir().unwrap();
    let from = folders(dir.path());
    for name in ["a.txt", "b.jpg"] {
        std::fs::write(from.join("class-1").join(name), b"no image").unwrap();
    }
    let out = dir.path().join("out");
    let (_, err) = check(
        &[
            "data",
            "convert",
            "--from",
            path(&from),
            "--out",
            path(&out),
            "--shards=1",
        ],
        3,
    );
    for name in ["a.txt", "b.jpg", "2 files of shard 0"] {
        assert!(err.contains(name), "{err}");
    }
    let (_, err) = check(
        &["data", "convert", "--from", path(&out), "--out", path(&out)],
        3,
    );
    assert!(err.contains("one folder for each class"), "{err}");
}

/// Made beforehand or by the first epoch, an index leads to the same bits as none.
#[test]
fn an_index_changes_nothing_but_time() {
    let dir = tempfile::tempdir().unwrap();
    let (pattern, at) = (fake(dir.path()), dir.path().join("index"));
    let index = |json: &str| check(&["data", "index", &pattern, path(&at), json], 0).0;
    let first = json(&index("--json"));
    for (key, expected) in [("shards", 3), ("images", 12), ("known", 0), ("others", 0)] {
        assert_eq!(first[key], expected, "{first}");
    }
    assert_eq!(json(&index("--json"))["known"], 12);
    let trained = |name: &str, index: &str| {
        let run_dir = dir.path().join(name);
        let mut sets = vec![
            "data.source=tfrecord".to_string(),
            format!("run_dir={}", run_dir.display()),
            format!("data.train={pattern}"),
            "mode=train".into(),
            "train.batch_size=4".into(),
            "train.bn_batch=4".into(),
            "data.train_examples=12".into(),
            "data.decode=fast".into(),
            "train.batch_size=4".into(),
            "train.length=6 steps".into(),
            "track.mlflow=off".into(),
        ];
        if !index.is_empty() {
            sets.push(format!("data.index={index}"));
        }
        let mut args = vec!["configs/quickstart.toml"];
        args.extend(sets.iter().flat_map(|set| ["--set", set]));
        check(&args, 0);
        run_dir
    };
    let new = dir.path().join("new");
    let plain = trained("plain", "");
    for run in [trained("ahead", path(&at)), trained("first", path(&new))] {
        let found = train::compare(&run, &plain).unwrap();
        assert_eq!(found.differences, Vec::<String>::new());
        assert_eq!(found.lines, 6);
    }
    let held = |dir: &Path| -> u64 {
        let entries = std::fs::read_dir(dir).unwrap();
        entries.map(|e| e.unwrap().metadata().unwrap().len()).sum()
    };
    assert!(held(&new) >= held(&at));
}

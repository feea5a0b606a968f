//! TensorBoard's event files: TFRecords of `tensorflow.Event` messages (`tensorflow/core/util/event.proto`,
//! `tensorflow/core/framework/summary.proto`), encoded by hand.
//!
//! Of an event we write wall_time (1), step (2), file_version (3) and summary (5); of a summary its values (1); of a
//! value tag (1) and simple_value (2), an f32, which is all that TensorBoard shows of a number. All else is a tensor (8)
//! with metadata (9) that names the plugin which shows it; the graph is a `GraphDef` in the event (4).

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use crate::metrics::Scalar;
use crate::{Point, Resume, milliseconds};

/// TensorBoard reads any file with `tfevents` in its name, those of a directory in the order of their names.
const PREFIX: &str = "events.out.tfevents.";

/// An event file of this process.
pub(crate) struct EventFile {
    dir: PathBuf,
    path: PathBuf,
    /// None while it cannot be opened.
    file: Option<File>,
    /// Bytes, all of them whole records.
    length: u64,
}

impl EventFile {
    /// A file in `dir`; not opened yet.
    pub(crate) fn new(dir: &Path) -> Self {
        Self {
            dir: dir.into(),
            path: PathBuf::new(),
            file: None,
            length: 0,
        }
    }

    /// Makes a file of its own and begins it. An old one is never continued: a TensorBoard that has it open and is
    /// behind the cut would go on reading in the middle of a record.
    pub(crate) fn open(&mut self) -> io::Result<()> {
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = match host.trim() {
            "" => "localhost",
            host => host,
        };
        let mut seconds = milliseconds() / 1000;
        let file = loop {
            self.path = self.dir.join(format!("{PREFIX}{seconds:010}.{host}"));
            let mut options = OpenOptions::new();
            let opened = options.create_new(true).append(true).open(&self.path);
            match opened {
                // Of a start in the same second.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => seconds += 1,
                opened => break opened?,
            }
        };
        self.file = Some(file);
        self.length = 0;
        let version = Message::default()
            .double(1, milliseconds() as f64 / 1000.0)
            .bytes(3, b"brain.Event:2");
        self.append(&version)
    }

    /// Appends one event with all numbers of a step.
    pub(crate) fn write(&mut self, point: &Point) -> io::Result<()> {
        let seconds = point.milliseconds as f64 / 1000.0;
        self.append(&scalar_event(seconds, point.step, &point.scalars))
    }

    /// Appends a text, in Markdown.
    pub(crate) fn text(&mut self, tag: &str, step: u64, text: &str) -> io::Result<()> {
        self.append(&tensor_event(
            tag,
            step,
            &strings(&[text.as_bytes()]),
            "text",
            &[],
        ))
    }

    /// Appends encoded images of one size.
    pub(crate) fn images(
        &mut self,
        tag: &str,
        step: u64,
        (width, height): (usize, usize),
        encoded: &[Vec<u8>],
    ) -> io::Result<()> {
        let (width, height) = (width.to_string(), height.to_string());
        let mut values = vec![width.as_bytes(), height.as_bytes()];
        values.extend(encoded.iter().map(Vec::as_slice));
        self.append(&tensor_event(tag, step, &strings(&values), "images", &[]))
    }

    /// Appends how the values of a tensor are spread.
    pub(crate) fn histogram(&mut self, tag: &str, step: u64, values: &[f32]) -> io::Result<()> {
        let buckets = buckets(values);
        let raw: Vec<u8> = buckets
            .iter()
            .flatten()
            .flat_map(|x| x.to_le_bytes())
            .collect();
        // TensorProto: dtype (1) 2 is double, shape (2), content (4).
        let tensor = Message::default()
            .uint(1, 2)
            .bytes(2, &shape(&[buckets.len() as u64, 3]).0)
            .bytes(4, &raw);
        self.append(&tensor_event(tag, step, &tensor, "histograms", &[]))
    }

    /// Appends the network: `NodeDef`s of name (1), op (2), inputs (3) and the shape that comes out, an attribute (5).
    pub(crate) fn graph(&mut self, nodes: &[GraphNode]) -> io::Result<()> {
        let graph = nodes.iter().fold(Message::default(), |graph, node| {
            // Dots separate names of ours, slashes those of TensorFlow, by which it folds the graph.
            let name = |text: &str| text.replace('.', "/");
            let def = Message::default()
                .bytes(1, name(&node.name).as_bytes())
                .bytes(2, node.op.as_bytes());
            let inputs = node.inputs.iter();
            let def = inputs.fold(def, |def, input| def.bytes(3, name(input).as_bytes()));
            // AttrValue: list (1) of shapes (7).
            let shapes = Message::default().bytes(7, &shape(&node.shape).0);
            let value = Message::default().bytes(1, &shapes.0);
            let entry = Message::default()
                .bytes(1, b"_output_shapes")
                .bytes(2, &value.0);
            graph.bytes(1, &def.bytes(5, &entry.0).0)
        });
        // VersionDef (4): producer (1).
        let graph = graph.bytes(4, &Message::default().uint(1, 22).0);
        self.append(&now().bytes(4, &graph.0))
    }

    /// Appends what the hparams table shows: parameters, and which metrics to show beside them.
    pub(crate) fn hparams<'a>(
        &mut self,
        params: impl Iterator<Item = (&'a str, &'a str)>,
        metrics: &[&str],
    ) -> io::Result<()> {
        let (mut experiment, mut session) = (Message::default(), Message::default());
        for (name, text) in params {
            // DataType: 1 string, 2 bool, 3 number. google.protobuf.Value: 2 number, 3 string, 4 bool.
            let number = text.parse::<f64>().ok().filter(|x| x.is_finite());
            let value = Message::default();
            let (kind, value) = match (number, text) {
                (Some(number), _) => (3, value.double(2, number)),
                (None, "true" | "false") => (2, value.uint(4, u64::from(text == "true"))),
                (None, text) => (1, value.bytes(3, text.as_bytes())),
            };
            let info = Message::default().bytes(1, name.as_bytes()).uint(4, kind);
            experiment = experiment.bytes(4, &info.0);
            let entry = Message::default()
                .bytes(1, name.as_bytes())
                .bytes(2, &value.0);
            session = session.bytes(1, &entry.0);
        }
        for tag in metrics {
            let name = Message::default().bytes(2, tag.as_bytes());
            experiment = experiment.bytes(5, &Message::default().bytes(1, &name.0).0);
        }
        self.hparam("experiment", Message::default().bytes(2, &experiment.0))?;
        let session = session.double(5, milliseconds() as f64 / 1000.0);
        self.hparam(
            "session_start_info",
            Message::default().bytes(3, &session.0),
        )
    }

    /// Appends that the run has ended, well or not.
    pub(crate) fn hparams_end(&mut self, is_done: bool) -> io::Result<()> {
        let end = Message::default()
            .uint(1, if is_done { 1 } else { 2 })
            .double(2, milliseconds() as f64 / 1000.0);
        self.hparam("session_end_info", Message::default().bytes(4, &end.0))
    }

    fn hparam(&mut self, name: &str, data: Message) -> io::Result<()> {
        // What counts travels in the metadata; the tensor stands for nothing.
        let nothing = Message::default().uint(1, 1).bytes(2, b"").float(5, 0.0);
        let tag = format!("_hparams_/{name}");
        self.append(&tensor_event(&tag, 0, &nothing, "hparams", &data.0))
    }

    /// Forces the events to the disk. A file that was lost since the last time is followed by a new one.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        let Some(file) = &self.file else {
            return self.open();
        };
        file.sync_data()?;
        // Writing to a file that someone removed succeeds, so ask for it by name.
        let found = self.path.metadata().map(|m| m.len()).unwrap_or(0);
        if found == self.length {
            return Ok(());
        }
        let lost = format!("it has {found} bytes where {} were written", self.length);
        self.file = None;
        self.open()?;
        Err(io::Error::other(lost))
    }

    fn append(&mut self, event: &Message) -> io::Result<()> {
        let Some(file) = &mut self.file else {
            return Err(io::Error::other("it could not be opened"));
        };
        let record = record(&event.0);
        let written = file.write_all(&record);
        match written {
            Ok(()) => self.length += record.len() as u64,
            // A full disk may have taken half a record. Should this fail too, the failure is already counted.
            Err(_) => drop(file.set_len(self.length)),
        }
        written
    }
}

/// Leaves in the event files of a directory what came before the checkpoint, or, without one, no file.
///
/// A process writes its numbers in order, so what has to go is a tail of each file.
pub(crate) fn cut(dir: &Path, resume: Option<Resume>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        match resume {
            None => fs::remove_file(entry.path())?,
            Some(resume) => {
                let mut options = OpenOptions::new();
                let file = options.read(true).write(true).open(entry.path())?;
                let end = kept(&file, resume)?;
                if end < file.metadata()?.len() {
                    file.set_len(end)?;
                    file.sync_data()?;
                }
            }
        }
    }
    Ok(())
}

/// Length of a file up to the first event that came after the checkpoint, or up to damage: TensorBoard reads nothing
/// behind that.
fn kept(file: &File, resume: Resume) -> io::Result<u64> {
    let size = file.metadata()?.len();
    let mut file = BufReader::new(file);
    let mut end = 0;
    while let Some(payload) = next(&mut file, size - end)? {
        match first_scalar(&payload) {
            None => break,
            Some(Some((tag, step))) if !resume.keeps(tag, step) => break,
            Some(_) => end += payload.len() as u64 + 16,
        }
    }
    Ok(end)
}

/// The payload of the next record; none where the file ends or is damaged.
fn next(file: &mut impl Read, remaining: u64) -> io::Result<Option<Vec<u8>>> {
    if remaining < 16 {
        return Ok(None);
    }
    let (mut length, mut crc) = ([0; 8], [0; 4]);
    file.read_exact(&mut length)?;
    file.read_exact(&mut crc)?;
    let size = u64::from_le_bytes(length);
    if masked_crc(&length) != u32::from_le_bytes(crc) || size > remaining - 16 {
        return Ok(None);
    }
    let mut payload = vec![0; size as usize];
    file.read_exact(&mut payload)?;
    file.read_exact(&mut crc)?;
    Ok((masked_crc(&payload) == u32::from_le_bytes(crc)).then_some(payload))
}

/// A node of a network, for TensorBoard's graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GraphNode {
    /// Dotted, and no other's.
    pub name: String,
    /// What it does, such as `Conv2D`.
    pub op: String,
    /// The names of what it reads.
    pub inputs: Vec<String>,
    /// Sizes of what it produces.
    pub shape: Vec<u64>,
}

/// Buckets of a histogram.
const BUCKETS: usize = 30;
/// Values of a tensor that are looked at; of more, every so-manyth.
const SAMPLE: usize = 1 << 14;

/// Equal buckets from the least to the greatest value: left, right, count. Of many values a sample is counted; what is
/// not finite is left out.
fn buckets(values: &[f32]) -> Vec<[f64; 3]> {
    let step = values.len().div_ceil(SAMPLE).max(1);
    let sample = values.iter().step_by(step).copied();
    let finite: Vec<f32> = sample.filter(|v| v.is_finite()).collect();
    let ends = (f32::INFINITY, f32::NEG_INFINITY);
    let (low, high) = (finite.iter()).fold(ends, |(low, high), &v| (low.min(v), high.max(v)));
    let (low, high) = (f64::from(low), f64::from(high));
    if low > high {
        return vec![]; // there are none
    }
    if low == high {
        return vec![[low, high, finite.len() as f64]];
    }
    let width = (high - low) / BUCKETS as f64;
    let mut counts = [0u64; BUCKETS];
    let per_width = 1.0 / width;
    for value in finite {
        let at = ((f64::from(value) - low) * per_width) as usize;
        counts[at.min(BUCKETS - 1)] += 1;
    }
    let edge = |i: usize| {
        if i == BUCKETS {
            high
        } else {
            low + width * i as f64
        }
    };
    let bucket = |(i, &count): (usize, &u64)| [edge(i), edge(i + 1), count as f64];
    counts.iter().enumerate().map(bucket).collect()
}

/// An event of this moment.
fn now() -> Message {
    Message::default().double(1, milliseconds() as f64 / 1000.0)
}

/// TensorShapeProto: a dim (2) of a size (1) for each.
fn shape(sizes: &[u64]) -> Message {
    sizes.iter().fold(Message::default(), |shape, &size| {
        shape.bytes(2, &Message::default().uint(1, size).0)
    })
}

/// TensorProto of strings: dtype (1) 7, shape (2), values (8).
fn strings(values: &[&[u8]]) -> Message {
    let head = Message::default()
        .uint(1, 7)
        .bytes(2, &shape(&[values.len() as u64]).0);
    values
        .iter()
        .fold(head, |tensor, value| tensor.bytes(8, value))
}

/// An event of one tensor. SummaryMetadata: plugin_data (1) of plugin_name (1) and content (2).
fn tensor_event(tag: &str, step: u64, tensor: &Message, plugin: &str, content: &[u8]) -> Message {
    let plugin = Message::default().bytes(1, plugin.as_bytes());
    let plugin = match content {
        [] => plugin,
        content => plugin.bytes(2, content),
    };
    let metadata = Message::default().bytes(1, &plugin.0);
    let value = Message::default()
        .bytes(1, tag.as_bytes())
        .bytes(8, &tensor.0)
        .bytes(9, &metadata.0);
    let summary = Message::default().bytes(1, &value.0);
    now().uint(2, step).bytes(5, &summary.0)
}

fn scalar_event(seconds: f64, step: u64, scalars: &[Scalar]) -> Message {
    let summary = scalars.iter().fold(Message::default(), |summary, scalar| {
        let (tag, value) = scalar;
        let value = Message::default()
            .bytes(1, tag.as_bytes())
            .float(2, *value as f32);
        summary.bytes(1, &value.0)
    });
    Message::default()
        .double(1, seconds)
        .uint(2, step)
        .bytes(5, &summary.0)
}

/// TFRecord framing: length, its checksum, payload, its checksum.
fn record(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut record = length.to_vec();
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(payload);
    record.extend(masked_crc(payload).to_le_bytes());
    record
}

/// CRC-32C, rotated and offset (TensorFlow, `tensorflow/core/lib/hash/crc32c.h`).
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

/// The tag of an event's first value and the event's step, if it has values; None if it is no message.
fn first_scalar(event: &[u8]) -> Option<Option<(&str, u64)>> {
    let mut step = 0;
    let mut tag = None;
    let mut event = Fields(event);
    while !event.0.is_empty() {
        match event.next()? {
            (2, Field::Uint(value)) => step = value,
            (5, Field::Bytes(summary)) => tag = tag.or(first_tag(summary)?),
            _ => {}
        }
    }
    Some(tag.map(|tag| (tag, step)))
}

fn first_tag(summary: &[u8]) -> Option<Option<&str>> {
    let mut summary = Fields(summary);
    while !summary.0.is_empty() {
        let (1, Field::Bytes(value)) = summary.next()? else {
            continue;
        };
        let mut value = Fields(value);
        while !value.0.is_empty() {
            if let (1, Field::Bytes(tag)) = value.next()? {
                return Some(Some(str::from_utf8(tag).ok()?));
            }
        }
    }
    Some(None)
}

/// A protocol buffer that is being written.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn uint(mut self, field: u64, value: u64) -> Self {
        self.varint(field << 3);
        self.varint(value);
        self
    }

    fn double(mut self, field: u64, value: f64) -> Self {
        self.varint(field << 3 | 1);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(mut self, field: u64, value: &[u8]) -> Self {
        self.varint(field << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
        self
    }

    fn float(mut self, field: u64, value: f32) -> Self {
        self.varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

/// What is left of a protocol buffer that is being read.
struct Fields<'a>(&'a [u8]);

enum Field<'a> {
    Uint(u64),
    Bytes(&'a [u8]),
    /// A number of fixed size.
    Fixed,
}

impl<'a> Fields<'a> {
    fn next(&mut self) -> Option<(u64, Field<'a>)> {
        let key = self.varint()?;
        let field = match key & 7 {
            0 => Field::Uint(self.varint()?),
            1 => self.take(8).map(|_| Field::Fixed)?,
            2 => {
                let length = self.varint()?;
                Field::Bytes(self.take(length)?)
            }
            5 => self.take(4).map(|_| Field::Fixed)?,
            _ => return None,
        };
        Some((key >> 3, field))
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, length: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(length).ok()?)?;
        self.0 = rest;
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESUME: Resume = Resume {
        step: 2,
        is_evaluated: false,
        metrics_bytes: 0,
    };

    fn event(step: u64, tag: &'static str) -> Vec<u8> {
        record(&scalar_event(1.5, step, &[(tag.into(), 0.5)]).0)
    }

    fn version() -> Vec<u8> {
        let event = Message::default().double(1, 1.5).bytes(3, b"brain.Event:2");
        record(&event.0)
    }

    /// Cuts a file of these records at [`RESUME`] and compares it with the first so many of them.
    fn check(records: &[Vec<u8>], expected: usize) {
        check_at(RESUME, records, expected);
    }

    fn check_at(resume: Resume, records: &[Vec<u8>], expected: usize) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.out.tfevents.1.x");
        fs::write(&path, records.concat()).unwrap();
        cut(dir.path(), Some(resume)).unwrap();
        let kept = fs::read(&path).unwrap();
        assert_eq!(kept, records[..expected].concat());
    }

    fn train(step: u64) -> Vec<u8> {
        event(step, "train/loss")
    }

    fn eval(step: u64) -> Vec<u8> {
        event(step, "eval/loss")
    }

    /// Written by the `RecordWriter` and the `Event` of the Python package tensorboard 2.21.0:
    /// `Event(wall_time=1.5, step=300, summary=Summary(value=[Value(tag="train/loss", simple_value=0.5),
    /// Value(tag="train/lr", simple_value=inf)]))`, `Event(wall_time=1.5, file_version="brain.Event:2")`.
    #[test]
    fn events_are_those_of_tensorboard() {
        let hex = |bytes: Vec<u8>| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let scalars = [
            ("train/loss".into(), 0.5),
            ("train/lr".into(), f64::INFINITY),
        ];
        assert_eq!(
            hex(record(&scalar_event(1.5, 300, &scalars).0)),
            "3200000000000000241956ec09000000000000f83f10ac022a240a110a0a747261696e2f6c6f7373150000003f0a0f0a08747261\
             696e2f6c72150000807f7682dbd2"
        );
        assert_eq!(
            hex(version()),
            "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c"
        );
    }

    #[test]
    fn values_are_counted_in_buckets() {
        let values: Vec<f32> = (0..=300u16).map(f32::from).chain([f32::NAN]).collect();
        let found = buckets(&values);
        assert_eq!(found.len(), 30);
        assert_eq!(found[0], [0.0, 10.0, 10.0]);
        assert_eq!(found[29], [290.0, 300.0, 11.0]);
        assert_eq!(buckets(&[2.0, 2.0]), [[2.0, 2.0, 2.0]]);
        assert_eq!(buckets(&[f32::NAN]), Vec::<[f64; 3]>::new());
        let many = vec![1.0; 1 << 20];
        assert_eq!(buckets(&many), [[1.0, 1.0, 16_384.0]]);
    }

    #[test]
    fn a_cut_keeps_what_came_before_the_checkpoint() {
        check(&[version(), train(1), eval(1), train(2)], 4);
        check(&[version(), train(1), train(2), eval(2), train(3)], 3);
        check(&[version(), train(1), train(2), train(3), train(4)], 3);
        check(&[version(), train(3)], 1);
        check(&[], 0);
        let evaluated = Resume {
            is_evaluated: true,
            ..RESUME
        };
        check_at(evaluated, &[version(), train(2), eval(2), train(3)], 3);
        check_at(evaluated, &[version(), train(2), eval(3)], 2);
    }

    #[test]
    fn events_without_scalars_are_kept() {
        let other = record(&Message::default().double(1, 1.5).uint(2, 9).0);
        check(&[version(), other, train(2), train(3)], 3);
    }

    #[test]
    fn a_torn_record_is_cut_off() {
        for kept in 1..train(2).len() {
            let torn = train(2)[..kept].to_vec();
            check(&[version(), train(1), torn], 2);
        }
    }

    #[test]
    fn a_damaged_record_is_cut_off() {
        // In the length, its checksum, the payload, its checksum.
        for place in [0, 7, 9, 20, train(2).len() - 1] {
            let mut damaged = train(2);
            damaged[place] ^= 1;
            check(&[version(), train(1), damaged, train(2)], 2);
        }
    }

    #[test]
    fn a_payload_that_is_no_event_is_cut_off() {
        let cases: [&[u8]; 6] = [
            b"\x80",                                         // a key without an end
            b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", // longer than any number
            b"\x0b",                                         // a kind of field that is not used
            b"\x09\x00",                                     // half a double
            b"\x2a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",     // a summary of absurd length
            b"\x2a\x05\x0a\x03\x0a\x01\xff",                 // a tag that is no text
        ];
        for payload in cases {
            check(&[version(), record(payload), train(1)], 1);
        }
    }

    #[test]
    fn only_event_files_are_touched() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["events.out.tfevents.1.x", "metrics.jsonl"] {
            fs::write(dir.path().join(name), train(3)).unwrap();
        }
        cut(dir.path(), Some(RESUME)).unwrap();
        let length = |name: &str| fs::metadata(dir.path().join(name)).unwrap().len();
        assert_eq!(length("events.out.tfevents.1.x"), 0);
        assert_eq!(length("metrics.jsonl"), train(3).len() as u64);

        cut(dir.path(), None).unwrap();
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(left.len(), 1);
    }

    #[test]
    fn two_starts_in_a_second_have_two_files() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..3 {
            EventFile::new(dir.path()).open().unwrap();
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
    }
}

//! `mlflow.journal`: everything that a server is to be told about a run, in order, a line of JSON each.
//!
//! It is written before anything is sent, so what a server misses, because it or we died, is in it; sending reads it.
//! Lines are only ever appended. See docs/decisions/0011.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Tag;
use super::rest::Dataset;
use crate::metrics::{append_line, number};
use crate::{Resume, milliseconds};

/// The journal's name in a run directory.
pub(crate) const JOURNAL: &str = "mlflow.journal";

/// A number that may be `NaN` or infinite, which MLflow and we write as strings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Number(#[serde(with = "number")] pub(crate) f64);

/// A line of the journal. Times are milliseconds since 1970.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    /// A process begins or continues a run.
    Start(Box<Start>),
    /// Numbers at a step.
    Metrics {
        time: i64,
        step: u64,
        values: BTreeMap<String, Number>,
    },
    /// Words about the run.
    Tags { tags: BTreeMap<String, String> },
    /// A file of the run directory.
    Artifact { file: PathBuf },
    /// A checkpoint that is to be a logged model, and a version of a registered one.
    Model {
        file: PathBuf,
        name: String,
        step: u64,
        time: i64,
    },
    /// The run is over, or this process of it.
    End { time: i64, status: String },
}

/// What a process knows about its run when it begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Start {
    /// The run, whoever stores it: what `mlflow-run` holds.
    pub(crate) key: String,
    pub(crate) time: i64,
    pub(crate) experiment: String,
    pub(crate) run: String,
    pub(crate) source: String,
    pub(crate) user: String,
    /// The key of the run that this one is part of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) parent: Option<String>,
    pub(crate) params: BTreeMap<String, String>,
    pub(crate) tags: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) datasets: Vec<Dataset>,
}

impl Start {
    pub(crate) fn tag(&mut self, tags: Vec<Tag>) {
        let tags = tags.into_iter();
        self.tags
            .extend(tags.map(|(key, value)| (key.into(), value)));
    }
}

/// The loop's end of the journal.
pub(crate) struct Journal {
    path: PathBuf,
    file: Option<File>,
    /// Bytes, all of them whole lines.
    length: u64,
    /// The last step of each metric that an earlier process has told: what is computed again is the same, and is not
    /// told again.
    told: BTreeMap<String, u64>,
}

impl Journal {
    /// Opens the journal of a run directory and says that a run begins, or goes on.
    ///
    /// Without a checkpoint it is the same run only if it computes the same; else the earlier one ends, and `renew` is
    /// asked for another key.
    pub(crate) fn open(
        dir: &Path,
        resume: Option<Resume>,
        mut start: Start,
        renew: impl FnOnce() -> io::Result<String>,
    ) -> io::Result<Self> {
        let path = dir.join(JOURNAL);
        let mut options = OpenOptions::new();
        let mut file = options.create(true).read(true).append(true).open(&path)?;
        let before = Before::read(&mut file, &start.key)?;
        // What was being written when it was cut off is no line, and would spoil the next.
        file.set_len(before.length)?;
        let mut journal = Self {
            path,
            file: Some(file),
            length: before.length,
            told: before.told,
        };
        if let Some(params) = before.params
            && resume.is_none()
            && params != start.params
        {
            if !before.is_ended {
                journal.append(&Event::End {
                    time: milliseconds(),
                    status: "KILLED".into(),
                })?;
            }
            start.key = renew()?;
            journal.told.clear();
        }
        journal.append(&Event::Start(Box::new(start)))?;
        Ok(journal)
    }

    /// Appends the numbers of a step, less those that have been told; false if there are none.
    pub(crate) fn metrics(
        &mut self,
        time: i64,
        step: u64,
        scalars: impl Iterator<Item = (String, f64)>,
    ) -> io::Result<bool> {
        let is_new = |name: &String| self.told.get(name).is_none_or(|last| *last < step);
        let values: BTreeMap<_, _> = scalars
            .filter(|(name, _)| is_new(name))
            .map(|(name, value)| (name, Number(value)))
            .collect();
        if values.is_empty() {
            return Ok(false);
        }
        self.append(&Event::Metrics { time, step, values })?;
        Ok(true)
    }

    /// Appends an event.
    pub(crate) fn append(&mut self, event: &Event) -> io::Result<()> {
        append_line(self.file.as_mut(), &mut self.length, event)
    }

    /// Forces the events to the disk.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        self.file.as_ref().map_or(Ok(()), File::sync_data)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// What a journal holds about a run.
#[derive(Default)]
struct Before {
    /// Up to the end of the last whole line.
    length: u64,
    /// Of the last start of this run; none if it has not begun.
    params: Option<BTreeMap<String, String>>,
    is_ended: bool,
    told: BTreeMap<String, u64>,
}

impl Before {
    fn read(file: &mut File, key: &str) -> io::Result<Self> {
        let mut before = Self::default();
        file.seek(SeekFrom::Start(0))?;
        let mut lines = BufReader::new(file);
        let mut line = vec![];
        let mut is_this = false;
        loop {
            line.clear();
            lines.read_until(b'\n', &mut line)?;
            if line.last() != Some(&b'\n') {
                return Ok(before);
            }
            before.length += line.len() as u64;
            match serde_json::from_slice(&line) {
                Ok(Event::Start(start)) => {
                    is_this = start.key == key;
                    if is_this {
                        before.params = Some(start.params);
                        before.is_ended = false;
                    }
                }
                Ok(Event::End { .. }) if is_this => before.is_ended = true,
                Ok(Event::Metrics { step, values, .. }) if is_this => {
                    for name in values.into_keys() {
                        let last = before.told.entry(name).or_default();
                        *last = step.max(*last);
                    }
                }
                _ => {}
            }
        }
    }
}

/// Most that is read at once.
const CHUNK: u64 = 1 << 20;

/// The events behind `offset`, at most about a mebibyte of them, each with the offset behind it. A line that is none
/// of ours is nothing. What is half written is left for later.
pub(crate) fn read(path: &Path, offset: u64) -> io::Result<Vec<(Option<Event>, u64)>> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut lines = BufReader::new(file.take(1 << 32));
    let (mut events, mut end) = (vec![], offset);
    let mut line = vec![];
    while end - offset < CHUNK {
        line.clear();
        lines.read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            break;
        }
        end += line.len() as u64;
        events.push((serde_json::from_slice(&line).ok(), end));
    }
    Ok(events)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(key: &str, batch: &str) -> Start {
        Start {
            key: key.into(),
            time: 1,
            experiment: "e".into(),
            run: "r".into(),
            source: "s".into(),
            user: "u".into(),
            parent: None,
            params: [("train.batch_size".to_string(), batch.to_string())].into(),
            tags: BTreeMap::new(),
            datasets: vec![],
        }
    }

    fn open(dir: &Path, resume: Option<u64>, batch: &str) -> Journal {
        let resume = resume.map(|step| Resume {
            step,
            is_evaluated: false,
            metrics_bytes: 0,
        });
        Journal::open(dir, resume, start("one", batch), || Ok("two".into())).unwrap()
    }

    fn loss(journal: &mut Journal, step: u64) -> bool {
        let scalars = [("loss".to_string(), f64::NAN)].into_iter();
        journal.metrics(5, step, scalars).unwrap()
    }

    /// The events of a journal, in short.
    fn events(dir: &Path) -> Vec<String> {
        let events = read(&dir.join(JOURNAL), 0).unwrap();
        let told = |event: &Event| match event {
            Event::Start(start) => format!("start {}", start.key),
            Event::Metrics { step, .. } => step.to_string(),
            Event::Tags { .. } => "tags".into(),
            Event::Artifact { .. } | Event::Model { .. } => "file".into(),
            Event::End { status, .. } => status.clone(),
        };
        let text = |event: &Option<Event>| event.as_ref().map_or("?".into(), told);
        events.iter().map(|(event, _)| text(event)).collect()
    }

    #[test]
    fn a_resume_tells_nothing_twice() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = open(dir.path(), None, "64");
        assert!((1..=5).all(|step| loss(&mut journal, step)));
        let mut journal = open(dir.path(), Some(3), "64");
        assert!(!loss(&mut journal, 4));
        assert!(!loss(&mut journal, 5));
        assert!(loss(&mut journal, 6));
        assert!(loss(&mut journal, 6), "what this process says is said");
        let expected = ["start one", "1", "2", "3", "4", "5", "start one", "6", "6"];
        assert_eq!(events(dir.path()), expected);
    }

    #[test]
    fn a_start_without_a_checkpoint_is_the_same_run_if_it_computes_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = open(dir.path(), None, "64");
        loss(&mut journal, 1);
        let mut journal = open(dir.path(), None, "64");
        assert!(!loss(&mut journal, 1));
        assert!(loss(&mut journal, 2));
        let mut journal = open(dir.path(), None, "32");
        assert!(loss(&mut journal, 1));
        let expected = [
            "start one",
            "1",
            "start one",
            "2",
            "KILLED",
            "start two",
            "1",
        ];
        assert_eq!(events(dir.path()), expected);
    }

    #[test]
    fn half_a_line_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(JOURNAL);
        loss(&mut open(dir.path(), None, "64"), 1);
        let whole = std::fs::read(&path).unwrap();
        for cut in 1..20 {
            std::fs::write(&path, &whole[..whole.len() - cut]).unwrap();
            assert_eq!(events(dir.path()), ["start one"]);
        }
        loss(&mut open(dir.path(), None, "64"), 1);
        assert_eq!(events(dir.path()), ["start one", "start one", "1"]);
    }

    #[test]
    fn a_line_that_is_none_of_ours_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(JOURNAL);
        std::fs::write(&path, "{\"event\":\"later\"}\nnoise\n").unwrap();
        open(dir.path(), None, "64");
        assert_eq!(events(dir.path()), ["?", "?", "start one"]);
    }

    #[test]
    fn events_come_back_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = open(dir.path(), None, "64");
        let values = [("a", f64::INFINITY), ("b", 0.1 + 0.2)];
        let event = Event::Metrics {
            time: -1,
            step: u64::MAX,
            values: values.map(|(k, v)| (k.to_string(), Number(v))).into(),
        };
        journal.append(&event).unwrap();
        let found = read(journal.path(), 0).unwrap();
        assert_eq!(found[1].0, Some(event));
        let length = std::fs::metadata(journal.path()).unwrap().len();
        assert_eq!(found[1].1, length);
        assert_eq!(read(journal.path(), length).unwrap(), []);
    }
}

//! `metrics.jsonl`: one JSON object per line.

use std::borrow::Cow;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::PathBuf;

use serde::Serialize;

use crate::Spent;

/// The numbers of one training step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepMetrics {
    /// Steps done, this one included.
    pub step: u64,
    /// Steps of the whole run.
    #[serde(skip)]
    pub total: u64,
    /// Passes over the training set, as a fraction.
    #[serde(with = "number")]
    pub epoch: f64,
    /// Mean loss of the batch.
    #[serde(rename = "train/loss", with = "number")]
    pub loss: f64,
    /// Share of the batch whose likeliest class is right, from 0 to 1.
    #[serde(rename = "train/top1", with = "number")]
    pub top1: f64,
    /// Learning rate of the step.
    #[serde(rename = "train/lr", with = "number")]
    pub lr: f64,
    /// Images per second of the step.
    #[serde(rename = "train/images_per_s", with = "number")]
    pub images_per_s: f64,
    /// Share of the step's time spent waiting for images, from 0 to 1.
    #[serde(rename = "train/input_wait_fraction", with = "number")]
    pub input_wait_fraction: f64,
    /// Where the time of the process went so far.
    #[serde(skip)]
    pub spent: Spent,
}

impl StepMetrics {
    /// What MLflow and TensorBoard get: every number with a room in its name.
    pub(crate) fn scalars(&self) -> Vec<Scalar> {
        vec![
            ("train/loss".into(), self.loss),
            ("train/top1".into(), self.top1),
            ("train/lr".into(), self.lr),
            ("train/images_per_s".into(), self.images_per_s),
            ("train/input_wait_fraction".into(), self.input_wait_fraction),
        ]
    }
}

/// The numbers of one evaluation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EvalMetrics {
    /// Training steps done before it.
    pub step: u64,
    /// Passes over the training set before it, as a fraction.
    #[serde(with = "number")]
    pub epoch: f64,
    /// Mean loss of the images.
    #[serde(rename = "eval/loss", with = "number")]
    pub loss: f64,
    /// Share of the images whose likeliest class is right, from 0 to 1.
    #[serde(rename = "eval/top1", with = "number")]
    pub top1: f64,
    /// Share of the images whose five likeliest classes have the right one, from 0 to 1.
    #[serde(rename = "eval/top5", with = "number")]
    pub top5: f64,
    /// `loss` of the moving average of the parameters, where that is scored beside them.
    #[serde(
        rename = "eval/ema_loss",
        with = "number::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub ema_loss: Option<f64>,
    /// Its `top1`.
    #[serde(
        rename = "eval/ema_top1",
        with = "number::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub ema_top1: Option<f64>,
    /// Its `top5`.
    #[serde(
        rename = "eval/ema_top5",
        with = "number::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub ema_top5: Option<f64>,
    /// Number of images.
    #[serde(rename = "eval/images")]
    pub images: u64,
    /// How long it took.
    #[serde(skip)]
    pub seconds: f64,
}

impl EvalMetrics {
    /// What MLflow and TensorBoard get: every number with a room in its name.
    pub(crate) fn scalars(&self) -> Vec<Scalar> {
        let average = [
            ("eval/ema_loss", self.ema_loss),
            ("eval/ema_top1", self.ema_top1),
            ("eval/ema_top5", self.ema_top5),
        ];
        let mut scalars = vec![
            ("eval/loss".into(), self.loss),
            ("eval/top1".into(), self.top1),
            ("eval/top5".into(), self.top5),
        ];
        for (name, value) in average {
            scalars.extend(value.map(|value| (name.into(), value)));
        }
        scalars.push(("eval/images".into(), self.images as f64));
        scalars
    }
}

/// A metric's name and its value.
pub(crate) type Scalar = (Cow<'static, str>, f64);

/// Numbers that JSON does not know, as the strings that most languages read.
pub(crate) mod number {
    use std::fmt;

    use serde::de::{self, Visitor};
    use serde::{Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        if value.is_nan() {
            serializer.serialize_str("NaN")
        } else if value.is_infinite() {
            let is_positive = *value > 0.0;
            serializer.serialize_str(if is_positive { "Infinity" } else { "-Infinity" })
        } else {
            serializer.serialize_f64(*value)
        }
    }

    /// The same of numbers that may be missing; a number that is missing is not written.
    pub(crate) mod optional {
        use serde::Serializer;

        pub(crate) fn serialize<S: Serializer>(
            value: &Option<f64>,
            serializer: S,
        ) -> Result<S::Ok, S::Error> {
            match value {
                Some(value) => super::serialize(value, serializer),
                None => serializer.serialize_none(),
            }
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        struct Number;

        impl Visitor<'_> for Number {
            type Value = f64;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number, \"NaN\", \"Infinity\" or \"-Infinity\"")
            }

            fn visit_f64<E: de::Error>(self, value: f64) -> Result<f64, E> {
                Ok(value)
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<f64, E> {
                Ok(value as f64)
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<f64, E> {
                Ok(value as f64)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<f64, E> {
                match text {
                    "NaN" => Ok(f64::NAN),
                    "Infinity" => Ok(f64::INFINITY),
                    "-Infinity" => Ok(f64::NEG_INFINITY),
                    other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
                }
            }
        }

        deserializer.deserialize_any(Number)
    }
}

/// A file of lines that may come and go.
pub(crate) struct MetricsFile {
    path: PathBuf,
    /// None while it cannot be opened.
    file: Option<File>,
    /// Bytes, all of them whole lines; the promise to a checkpoint, so it holds even while the file cannot be opened.
    length: u64,
}

impl MetricsFile {
    /// A file of which the first `length` bytes count; not opened yet.
    pub(crate) fn new(path: PathBuf, length: u64) -> Self {
        Self {
            path,
            file: None,
            length,
        }
    }

    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Opens or makes the file and cuts it to its length; how long it was, if it was shorter.
    pub(crate) fn open(&mut self) -> io::Result<Option<u64>> {
        let mut options = OpenOptions::new();
        let mut file = options
            .create(true)
            .read(true)
            .append(true)
            .open(&self.path)?;
        let found = file.metadata()?.len();
        let is_short = found < self.length;
        let length = match is_short {
            // What was being written when it was cut off is no line, and would spoil the next.
            true => whole_lines(&mut file)?,
            false => self.length,
        };
        file.set_len(length)?;
        self.length = length;
        self.file = Some(file);
        Ok(is_short.then_some(found))
    }

    /// Appends a line.
    pub(crate) fn write(&mut self, line: &impl Serialize) -> io::Result<()> {
        append_line(self.file.as_mut(), &mut self.length, line)
    }

    /// Forces the lines to the disk. A file that was lost since the last time is made anew.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        let Some(file) = &self.file else {
            return self.open().map(|_| ());
        };
        file.sync_data()?;
        // Writing to a file that someone removed succeeds, so ask for it by name.
        let found = self.path.metadata().map(|m| m.len()).unwrap_or(0);
        if found == self.length {
            return Ok(());
        }
        let lost = format!("it has {found} bytes where {} were written", self.length);
        self.file = None;
        self.length = found;
        self.open()?;
        Err(io::Error::other(lost))
    }
}

/// Length up to and with the last line's end.
fn whole_lines(file: &mut File) -> io::Result<u64> {
    let mut text = vec![];
    file.read_to_end(&mut text)?;
    let end = text.iter().rposition(|&byte| byte == b'\n');
    Ok(end.map_or(0, |end| end as u64 + 1))
}

/// Appends a line to a file of lines, `length` bytes long so far.
pub(crate) fn append_line(
    file: Option<&mut File>,
    length: &mut u64,
    line: &impl Serialize,
) -> io::Result<()> {
    let mut text = serde_json::to_string(line)?;
    text.push('\n');
    let Some(file) = file else {
        return Err(io::Error::other("it could not be opened"));
    };
    let written = file.write_all(text.as_bytes());
    match written {
        Ok(()) => *length += text.len() as u64,
        // A full disk may have taken half a line. Should this fail too, the failure is already counted.
        Err(_) => drop(file.set_len(*length)),
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares the scalars with the numbers of the line in metrics.jsonl that have a `/` in their names.
    fn check(metrics: &impl Serialize, scalars: &[Scalar]) {
        let line = serde_json::to_value(metrics).unwrap();
        let line = line.as_object().unwrap();
        let named = line.iter().filter(|(name, _)| name.contains('/'));
        let mut expected: Vec<Scalar> = named
            .map(|(name, value)| (name.clone().into(), value.as_f64().unwrap()))
            .collect();
        let mut found: Vec<_> = scalars.to_vec();
        expected.sort_by(|a, b| a.0.cmp(&b.0));
        found.sort_by(|a, b| a.0.cmp(&b.0));
        assert_eq!(found, expected);
    }

    #[test]
    fn every_sink_uses_the_same_names() {
        let step = StepMetrics {
            step: 1,
            total: 2,
            epoch: 3.0,
            loss: 4.0,
            top1: 5.0,
            lr: 6.0,
            images_per_s: 7.0,
            input_wait_fraction: 8.0,
            spent: Spent::default(),
        };
        check(&step, &step.scalars());
        let eval = EvalMetrics {
            step: 1,
            epoch: 2.0,
            loss: 3.0,
            top1: 4.0,
            top5: 5.0,
            ema_loss: None,
            ema_top1: None,
            ema_top5: None,
            images: 6,
            seconds: 7.0,
        };
        check(&eval, &eval.scalars());
    }
}

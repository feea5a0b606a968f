//! `summary.json`: how a run ended.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::metrics::number;
use crate::{Time, replace};

/// How a run ended, and what it reached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// `done`, `interrupted` or `failed`.
    pub status: String,
    /// Steps done.
    pub step: u64,
    /// The last evaluation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval: Option<EvalSummary>,
    /// The best evaluation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<Best>,
    /// Images per second of training.
    #[serde(with = "number")]
    pub images_per_s: f64,
    /// Share of the training time spent waiting for images, from 0 to 1.
    #[serde(with = "number")]
    pub input_wait_fraction: f64,
    /// Where the time went, and what limits the run; none if it did nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<Time>,
    /// Why the run ended, if it is not done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What an evaluation found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalSummary {
    /// Share of the images whose likeliest class is right, from 0 to 1.
    #[serde(with = "number")]
    pub top1: f64,
    /// Share of the images whose five likeliest classes have the right one, from 0 to 1.
    #[serde(with = "number")]
    pub top5: f64,
    /// Mean loss of the images.
    #[serde(with = "number")]
    pub loss: f64,
    /// `top1` of the moving average of the parameters, where that is scored beside them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema_top1: Option<f64>,
}

/// The best evaluation of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// By what it is the best: `top1`, or `ema_top1` where that is there.
    pub metric: String,
    /// The value of that.
    #[serde(with = "number")]
    pub value: f64,
    /// Training steps done before it.
    pub step: u64,
}

pub(crate) const NAME: &str = "summary.json";

/// The summary in a run directory; none if there is none that can be read.
pub fn read_summary(dir: &Path) -> Option<Summary> {
    let text = fs::read_to_string(dir.join(NAME)).ok()?;
    serde_json::from_str(&text).ok()
}

pub(crate) fn write(dir: &Path, summary: &Summary) -> io::Result<()> {
    let text = serde_json::to_string(summary)?;
    replace(&dir.join(NAME), &format!("{text}\n"))
}

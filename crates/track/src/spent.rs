//! Where the time of a run went, what limits it, and what to change.

use serde::{Deserialize, Serialize};

/// Below this share of the time a part is not worth a word.
const NOTABLE: f64 = 0.1;

/// Seconds of a process, by what the loop spent them on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Spent {
    /// Waiting for images of which the records were still being read.
    pub read: f64,
    /// Waiting for images that were being decoded, cropped and resized.
    pub decode: f64,
    /// Training steps, less what they waited.
    pub engine: f64,
    /// Evaluations, their input included.
    pub evaluation: f64,
    /// Writing checkpoints.
    pub checkpoint: f64,
    /// Telling the trackers, the terminal among them.
    pub tracking: f64,
}

/// What is in `summary.json` about [`Spent`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Time {
    /// Of the process that wrote the summary.
    pub seconds: Spent,
    /// The part that took most.
    pub limited_by: String,
    /// What to change, a sentence for each part that is worth it, the largest first.
    pub change: Vec<String>,
}

impl Spent {
    /// What the parts are called.
    pub const PARTS: [&'static str; 6] = [
        "engine",
        "decode",
        "input read",
        "evaluation",
        "checkpoint",
        "tracking",
    ];

    /// Names and seconds, the largest first.
    fn parts(&self) -> [(&'static str, f64); 6] {
        let seconds = [
            self.engine,
            self.decode,
            self.read,
            self.evaluation,
            self.checkpoint,
            self.tracking,
        ];
        let mut parts = std::array::from_fn(|i| (Self::PARTS[i], seconds[i]));
        parts.sort_by(|a, b| b.1.total_cmp(&a.1));
        parts
    }

    /// All of it.
    pub fn total(&self) -> f64 {
        self.parts().iter().map(|part| part.1).sum()
    }

    /// Names and shares of the whole, the largest first; none if nothing was spent.
    pub fn shares(&self) -> Vec<(&'static str, f64)> {
        let total = self.total();
        if total <= 0.0 || !total.is_finite() {
            return vec![];
        }
        let shares = self.parts().into_iter().map(|(name, s)| (name, s / total));
        shares.collect()
    }

    /// What limits the run, in a few words: `engine 72%, decode 21%`; empty if nothing was spent.
    pub fn limit(&self) -> String {
        let shares = self.shares().into_iter().take(2).enumerate();
        let worth = shares.filter(|(i, (_, share))| *i == 0 || *share >= NOTABLE);
        let texts: Vec<String> = worth
            .map(|(_, (name, share))| format!("{name} {:.0}%", 100.0 * share))
            .collect();
        texts.join(", ")
    }

    /// For the summary; none if nothing was spent.
    pub fn time(&self) -> Option<Time> {
        let shares = self.shares();
        let (limit, _) = *shares.first()?;
        let worth = shares
            .iter()
            .filter(|(name, share)| *name == limit || *name != "engine" && *share >= NOTABLE);
        let change = worth.map(|(name, share)| {
            let percent = 100.0 * share;
            format!("{name} takes {percent:.0}% of the time: {}", change(name))
        });
        Some(Time {
            seconds: *self,
            limited_by: limit.into(),
            change: change.collect(),
        })
    }
}

/// What makes a part shorter.
fn change(part: &str) -> &'static str {
    match part {
        "input read" => "put the shards on a faster or a nearer disk",
        "decode" => {
            "give it more cores (train.threads), set data.decode = \"fast\" and data.index, or store smaller images"
        }
        "evaluation" => "evaluate less often (eval.every), or fewer images",
        "checkpoint" => "save less often (checkpoint.every), or to a faster disk",
        "tracking" => "save less often (checkpoint.every), or set track.tensorboard = false",
        _ => "try train.precision = \"bf16\", or a faster device",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_part_limits() {
        let spent = Spent {
            read: 1.0,
            decode: 21.0,
            engine: 72.0,
            evaluation: 4.0,
            checkpoint: 1.5,
            tracking: 0.5,
        };
        assert_eq!(spent.limit(), "engine 72%, decode 21%");
        let time = spent.time().unwrap();
        assert_eq!(time.limited_by, "engine");
        assert_eq!(time.change.len(), 2);
        assert!(time.change[1].starts_with("decode takes 21% of the time: give it more cores"));

        let spent = Spent {
            read: 60.0,
            engine: 40.0,
            ..Spent::default()
        };
        assert_eq!(spent.limit(), "input read 60%, engine 40%");
        let time = spent.time().unwrap();
        assert_eq!(time.limited_by, "input read");
        assert_eq!(time.change.len(), 1, "an engine that waits is fast enough");
        assert!(time.change[0].contains("disk"));
    }

    #[test]
    fn every_part_can_be_the_limit_and_says_what_to_change() {
        let all = [
            "engine",
            "decode",
            "input read",
            "evaluation",
            "checkpoint",
            "tracking",
        ];
        for name in all {
            let of = |part: &str| if part == name { 3.0 } else { 0.01 };
            let spent = Spent {
                read: of("input read"),
                decode: of("decode"),
                engine: of("engine"),
                evaluation: of("evaluation"),
                checkpoint: of("checkpoint"),
                tracking: of("tracking"),
            };
            let time = spent.time().unwrap();
            assert_eq!(time.limited_by, name);
            assert_eq!(time.change.len(), 1);
            assert_eq!(spent.limit(), format!("{name} 98%"));
        }
    }

    #[test]
    fn no_time_has_no_limit() {
        assert_eq!(Spent::default().limit(), "");
        assert_eq!(Spent::default().time(), None);
    }
}

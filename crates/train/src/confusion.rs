//! What a network takes for what.

use std::fmt::Write;
use std::path::Path;

use engine::{Metrics, hits};
use serde_json::{Value, json};

/// Counts of (class, prediction).
#[derive(Clone, Debug, PartialEq)]
pub struct Confusion {
    classes: usize,
    /// classes x classes, a row for each true class.
    counts: Vec<u64>,
    /// Of each true class, how often fewer than five classes scored strictly higher.
    top5: Vec<u64>,
}

impl Confusion {
    /// Of no image yet.
    pub fn new(classes: usize) -> Self {
        Self {
            classes,
            counts: vec![0; classes * classes],
            top5: vec![0; classes],
        }
    }

    /// Adds images by their logits, images x classes, and their classes.
    pub fn add(&mut self, logits: &[f32], labels: &[u32]) {
        assert_eq!(logits.len(), labels.len() * self.classes, "a row an image");
        for (row, &label) in logits.chunks_exact(self.classes).zip(labels) {
            let label = label as usize;
            // The lowest class wins a tie; a score that is not a number wins nothing.
            let mut best = 0;
            for (class, &value) in row.iter().enumerate() {
                if value > row[best] || row[best].is_nan() {
                    best = class;
                }
            }
            self.counts[label * self.classes + best] += 1;
            self.top5[label] += u64::from(hits(row, label).1);
        }
    }

    fn row(&self, class: usize) -> &[u64] {
        &self.counts[class * self.classes..][..self.classes]
    }

    /// A line for each class: its number, its label, its images, the share of hits among them, how often it was
    /// predicted, and the share of hits among those (recall, recall of five, precision); nothing where there is no image.
    pub fn classes_csv(&self, labels: Option<&[String]>) -> String {
        let mut text = "class,label,images,top1,top5,predicted,precision\n".to_owned();
        for class in 0..self.classes {
            let images: u64 = self.row(class).iter().sum();
            let predicted: u64 = (0..self.classes).map(|c| self.row(c)[class]).sum();
            let (hits, label) = (self.row(class)[class], quoted(labels, class));
            let (top1, top5) = (share(hits, images), share(self.top5[class], images));
            let precision = share(hits, predicted);
            writeln!(
                text,
                "{class},{label},{images},{top1},{top5},{predicted},{precision}"
            )
            .expect("text takes any text");
        }
        text
    }

    /// The counts: a row for each true class, a column for each predicted one.
    pub fn matrix_csv(&self) -> String {
        let names: Vec<String> = (0..self.classes).map(|c| c.to_string()).collect();
        let mut text = format!("true,{}\n", names.join(","));
        for (class, name) in names.iter().enumerate() {
            let counts: Vec<String> = self.row(class).iter().map(u64::to_string).collect();
            writeln!(text, "{name},{}", counts.join(",")).expect("text takes any text");
        }
        text
    }

    /// Writes `classes.csv` and `confusion.csv` into a directory.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn write(&self, dir: &Path, labels: Option<&[String]>) -> Result<(), store::Error> {
        let files = [
            ("classes.csv", self.classes_csv(labels)),
            ("confusion.csv", self.matrix_csv()),
        ];
        for (name, text) in files {
            store::write_atomic(&dir.join(name), &[text.as_bytes()])?;
        }
        Ok(())
    }

    /// The counts, the score and labels as one document.
    pub fn json(&self, m: &Metrics, labels: Option<&[String]>) -> Value {
        let rows: Vec<&[u64]> = (0..self.classes).map(|c| self.row(c)).collect();
        json!({
            "images": m.images, "top1": m.top1(), "top5": m.top5(), "loss": m.loss(),
            "labels": labels, "top5_hits": self.top5, "confusion": rows,
        })
    }
}

fn share(part: u64, whole: u64) -> String {
    match whole {
        0 => String::new(),
        whole => format!("{:.4}", part as f64 / whole as f64),
    }
}

/// A label as a field of CSV (RFC 4180).
fn quoted(labels: Option<&[String]>, class: usize) -> String {
    let label = labels
        .and_then(|labels| labels.get(class))
        .map_or("", |l| l);
    match label.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", label.replace('"', "\"\"")),
        false => label.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_shares() {
        let mut found = Confusion::new(3);
        // Right; a tie, which the lower class wins; wrong, twice the same way.
        found.add(&[0.0, 2.0, 1.0, 5.0, 5.0, 0.0], &[1, 1]);
        found.add(&[0.0, 0.0, 3.0, 0.0, 0.0, 3.0], &[0, 0]);
        assert_eq!(
            found.matrix_csv(),
            "true,0,1,2\n0,0,0,2\n1,1,1,0\n2,0,0,0\n"
        );
        let labels = ["cat", "dog, small", "a \"b\""].map(String::from);
        assert_eq!(
            found.classes_csv(Some(&labels)),
            "class,label,images,top1,top5,predicted,precision\n\
             0,cat,2,0.0000,1.0000,1,0.0000\n\
             1,\"dog, small\",2,0.5000,1.0000,1,1.0000\n\
             2,\"a \"\"b\"\"\",0,,,2,0.0000\n"
        );
        let json = found.json(&Metrics::default(), None);
        assert_eq!(
            (&json["confusion"][0][2], &json["top5_hits"][1]),
            (&2.into(), &2.into())
        );
    }
}

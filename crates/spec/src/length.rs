//! Lengths of training: a number with a unit.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What a [`Length`] counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Optimizer steps.
    Steps,
    /// Passes over the training examples.
    Epochs,
    /// Training examples.
    Examples,
    /// Hundredths of the whole run.
    Percent,
}

/// A stretch of training, written `"90 epochs"`, `"112590 steps"`, `"1000 examples"` or `"50 percent"` (or `"50%"`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Length {
    /// How many; finite, not negative, and whole if the unit is steps or examples.
    pub value: f64,
    /// Of what.
    pub unit: Unit,
}

/// What a length looks like, for messages.
const FORMS: &str =
    r#"a length such as "90 epochs", "112590 steps", "1000 examples" or "50 percent""#;

/// Beyond this, f64 skips whole numbers.
const MAX_WHOLE: f64 = (1u64 << 53) as f64;

/// Why a text is no length, or a length no number of steps.
#[derive(Clone, Debug, PartialEq)]
pub enum LengthError {
    /// The text has none of the four forms.
    Form(String),
    /// A number beyond 2^53, where doubles skip whole numbers.
    TooLong(String),
    /// A percentage where there is no whole to take it of.
    NoTotal(Length),
}

impl fmt::Display for LengthError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LengthError::Form(text) => write!(f, "expected {FORMS}, not {text:?}"),
            LengthError::TooLong(text) => {
                write!(f, "expected a length of at most {MAX_WHOLE}, not {text:?}")
            }
            LengthError::NoTotal(length) => {
                write!(f, "\"{length}\" of a run whose length is not known")
            }
        }
    }
}

impl std::error::Error for LengthError {}

impl Length {
    /// Optimizer steps: ceil(epochs x examples / batch_size); every length of a run becomes steps here.
    ///
    /// `examples` is the size of the training set, `batch_size` (at least 1) is global, and `total`, in steps, is what
    /// percentages are of.
    ///
    /// # Errors
    /// A percentage without a `total`.
    pub fn steps(
        &self,
        examples: u64,
        batch_size: u64,
        total: Option<u64>,
    ) -> Result<u64, LengthError> {
        let steps = self.exact_steps(examples, batch_size, total)?;
        // 1.1 epochs of 10 examples are 11 steps of 1, but 1.1 * 10.0 is the next number after 11: what is within
        // the error of the two operations of a whole number is that number.
        let nearest = steps.round();
        let is_whole = (steps - nearest).abs() <= 4.0 * f64::EPSILON * nearest;
        Ok(if is_whole { nearest } else { steps.ceil() } as u64)
    }

    /// The same, not rounded: what is linear in epochs, such as a warmup, needs the fraction.
    ///
    /// # Errors
    /// A percentage without a `total`.
    pub fn exact_steps(
        &self,
        examples: u64,
        batch_size: u64,
        total: Option<u64>,
    ) -> Result<f64, LengthError> {
        Ok(match self.unit {
            Unit::Steps => self.value,
            Unit::Epochs => self.value * examples as f64 / batch_size as f64,
            Unit::Examples => self.value / batch_size as f64,
            Unit::Percent => {
                let total = total.ok_or(LengthError::NoTotal(*self))?;
                self.value * total as f64 / 100.0
            }
        })
    }
}

impl FromStr for Length {
    type Err = LengthError;

    fn from_str(text: &str) -> Result<Self, LengthError> {
        let form = || LengthError::Form(text.into());
        let trimmed = text.trim();
        let end = trimmed
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(form)?;
        let (number, unit) = trimmed.split_at(end);
        let unit = match unit.trim_start() {
            "step" | "steps" => Unit::Steps,
            "epoch" | "epochs" => Unit::Epochs,
            "example" | "examples" => Unit::Examples,
            "percent" | "%" => Unit::Percent,
            _ => return Err(form()),
        };
        let value: f64 = number.parse().map_err(|_| form())?;
        let is_counted = matches!(unit, Unit::Steps | Unit::Examples);
        if value > MAX_WHOLE {
            return Err(LengthError::TooLong(text.into()));
        }
        if is_counted && value.fract() != 0.0 {
            return Err(form());
        }
        Ok(Self { value, unit })
    }
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.unit {
            Unit::Percent => return write!(f, "{} percent", self.value),
            Unit::Steps => "step",
            Unit::Epochs => "epoch",
            Unit::Examples => "example",
        };
        let plural = if self.value == 1.0 { "" } else { "s" };
        write!(f, "{} {unit}{plural}", self.value)
    }
}

impl Serialize for Length {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Length {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl Visitor<'_> for Text {
            type Value = Length;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(FORMS)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Length, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_str(Text)
    }
}

impl JsonSchema for Length {
    fn schema_name() -> Cow<'static, str> {
        "Length".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let number = r"(\d+\.?\d*|\.\d+)";
        let whole = r"\d+(\.0*)?";
        json_schema!({
            "type": "string",
            "examples": ["90 epochs", "112590 steps", "1000 examples", "50 percent"],
            "pattern": format!(r"^\s*({number}\s*(epochs?|percent|%)|{whole}\s*(steps?|examples?))\s*$"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, value: f64, unit: Unit, shown: &str) {
        let length: Length = text.parse().unwrap();
        assert_eq!(length, Length { value, unit }, "{text}");
        assert_eq!(length.to_string(), shown);
        assert_eq!(shown.parse(), Ok(length));
    }

    #[test]
    fn lengths_are_read_and_shown() {
        check("90 epochs", 90.0, Unit::Epochs, "90 epochs");
        check("1 epoch", 1.0, Unit::Epochs, "1 epoch");
        check("0.5 epochs", 0.5, Unit::Epochs, "0.5 epochs");
        check("0 epochs", 0.0, Unit::Epochs, "0 epochs");
        check("2 steps", 2.0, Unit::Steps, "2 steps");
        check("112590 steps", 112_590.0, Unit::Steps, "112590 steps");
        check("1 step", 1.0, Unit::Steps, "1 step");
        check("1000 examples", 1000.0, Unit::Examples, "1000 examples");
        check("50 percent", 50.0, Unit::Percent, "50 percent");
        check("50%", 50.0, Unit::Percent, "50 percent");
        check(" 12.5  % ", 12.5, Unit::Percent, "12.5 percent");
    }

    fn check_refused(text: &str) {
        assert_eq!(
            text.parse::<Length>(),
            Err(LengthError::Form(text.into())),
            "{text}"
        );
    }

    #[test]
    fn no_unit() {
        check_refused("90");
    }

    #[test]
    fn no_number() {
        check_refused("epochs");
    }

    #[test]
    fn empty() {
        check_refused("");
    }

    #[test]
    fn unknown_unit() {
        check_refused("90 hours");
    }

    #[test]
    fn negative() {
        check_refused("-1 epochs");
    }

    #[test]
    fn two_points() {
        check_refused("1.2.3 epochs");
    }

    #[test]
    fn a_fraction_of_a_step() {
        check_refused("2.5 steps");
    }

    #[test]
    fn not_finite() {
        check_refused("inf epochs");
        check_refused("NaN epochs");
    }

    #[test]
    fn too_long() {
        for number in ["9007199254740994".to_string(), "9".repeat(400)] {
            let text = format!("{number} epochs");
            let error = text.parse::<Length>().unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("expected a length of at most 9007199254740992, not {text:?}")
            );
        }
    }

    #[test]
    fn an_error_shows_the_four_forms() {
        assert_eq!(
            "soon".parse::<Length>().unwrap_err().to_string(),
            r#"expected a length such as "90 epochs", "112590 steps", "1000 examples" or "50 percent", not "soon""#
        );
    }

    fn check_steps(text: &str, examples: u64, batch_size: u64, total: Option<u64>, steps: u64) {
        let length: Length = text.parse().unwrap();
        assert_eq!(
            length.steps(examples, batch_size, total),
            Ok(steps),
            "{text}"
        );
    }

    #[test]
    fn lengths_become_steps() {
        check_steps("7 steps", 100, 10, None, 7);
        check_steps("0 epochs", 100, 10, None, 0);
        check_steps("1 epoch", 100, 10, None, 10);
        check_steps("1 epoch", 101, 10, None, 11);
        check_steps("90 epochs", 1_281_167, 1024, None, 112_603);
        check_steps("1 example", 100, 10, None, 1);
        check_steps("20 examples", 100, 10, None, 2);
        check_steps("50%", 100, 10, Some(9), 5);
        check_steps("100%", 100, 10, Some(9), 9);
    }

    #[test]
    fn rounding_errors_add_no_step() {
        check_steps("1.1 epochs", 10, 1, None, 11);
        check_steps("7%", 1, 1, Some(100), 7);
        check_steps("1.1%", 1, 1, Some(1000), 11);
    }

    #[test]
    fn percent_needs_a_total() {
        let half: Length = "50%".parse().unwrap();
        let error = half.steps(100, 10, None).unwrap_err();
        assert_eq!(
            error.to_string(),
            r#""50 percent" of a run whose length is not known"#
        );
    }
}

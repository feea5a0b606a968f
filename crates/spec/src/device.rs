//! Where to compute: a name, and for cards their numbers.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Where to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The first card, or the CPU where there is none that can be used.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA card, by its number.
    Cuda(usize),
    /// Several, together.
    Cards(Cards),
    /// Every card that there is, together.
    AllCards,
}

/// Numbers of at least two cards, each below 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cards(u64);

impl Cards {
    /// The numbers, smallest first.
    pub fn numbers(self) -> impl Iterator<Item = usize> {
        (0..64).filter(move |card| self.0 >> card & 1 == 1)
    }

    /// From `0,1,3`: at least two, none twice (which a schema cannot say).
    fn parse(list: &str) -> Option<Self> {
        let mut all = 0u64;
        for text in list.split(',') {
            let card = number(text).filter(|card| *card < 64)?;
            let bit = 1 << card;
            if all & bit != 0 {
                return None;
            }
            all |= bit;
        }
        (all.count_ones() > 1).then_some(Self(all))
    }
}

fn number(text: &str) -> Option<usize> {
    let is_plain = text.len() <= 3 && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|_| is_plain)
}

const FORMS: &str = "\"auto\", \"cpu\", \"cuda\", \"cuda:N\", \"cuda:N,M\" or \"cuda:all\"";

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(0) => f.write_str("cuda"),
            Device::Cuda(card) => write!(f, "cuda:{card}"),
            Device::Cards(cards) => {
                let numbers: Vec<String> = cards.numbers().map(|n| n.to_string()).collect();
                write!(f, "cuda:{}", numbers.join(","))
            }
            Device::AllCards => f.write_str("cuda:all"),
        }
    }
}

impl Serialize for Device {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Device {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl Visitor<'_> for Text {
            type Value = Device;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(FORMS)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Device, E> {
                let cards = |list: &str| {
                    let one = number(list).map(Device::Cuda);
                    one.or_else(|| Cards::parse(list).map(Device::Cards))
                };
                match text {
                    "auto" => Ok(Device::Auto),
                    "cpu" => Ok(Device::Cpu),
                    "cuda" => Ok(Device::Cuda(0)),
                    "cuda:all" => Ok(Device::AllCards),
                    _ => text
                        .strip_prefix("cuda:")
                        .and_then(cards)
                        .ok_or_else(|| E::custom(format_args!("expected {FORMS}, not {text:?}"))),
                }
            }
        }

        deserializer.deserialize_str(Text)
    }
}

impl JsonSchema for Device {
    fn schema_name() -> Cow<'static, str> {
        "Device".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "examples": ["auto", "cpu", "cuda", "cuda:1", "cuda:0,1", "cuda:all"],
            "pattern": r"^(auto|cpu|cuda(:(all|\d{1,3}|([1-5]?\d|6[0-3])(,([1-5]?\d|6[0-3]))+))?)$",
        })
    }
}

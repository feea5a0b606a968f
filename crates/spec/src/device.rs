//! Where to compute: a name, and for cards a number.

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
}

const FORMS: &str = "\"auto\", \"cpu\", \"cuda\" or \"cuda:N\"";

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(0) => f.write_str("cuda"),
            Device::Cuda(card) => write!(f, "cuda:{card}"),
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
                let card = || {
                    let number = text.strip_prefix("cuda:")?;
                    let is_plain = number.len() <= 3 && number.bytes().all(|b| b.is_ascii_digit());
                    number.parse().ok().filter(|_| is_plain)
                };
                match text {
                    "auto" => Ok(Device::Auto),
                    "cpu" => Ok(Device::Cpu),
                    "cuda" => Ok(Device::Cuda(0)),
                    _ => card()
                        .map(Device::Cuda)
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
            "examples": ["auto", "cpu", "cuda", "cuda:1"],
            "pattern": r"^(auto|cpu|cuda(:\d{1,3})?)$",
        })
    }
}

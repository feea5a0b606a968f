//! `tf.Example` on the wire: the two features that training needs, found by walking the protocol buffer.
//!
//! The nesting is Example { features = 1 }, Features { feature = 1, a map }, entry { key = 1, value = 2 },
//! Feature { bytes_list = 1, float_list = 2, int64_list = 3 }, and each list { value = 1 } (TensorFlow,
//! `tensorflow/core/example/feature.proto`). As protocol buffers ask, a later value replaces an earlier one and
//! unknown fields are stepped over. TensorFlow would give a missing label the value -1; here it is an error.

const ENCODED: &str = "image/encoded";
const LABEL: &str = "image/class/label";

/// What a record says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Example<'a> {
    /// The JPEG file.
    pub(crate) encoded: &'a [u8],
    /// The label as stored, before `label_offset`.
    pub(crate) label: i64,
}

pub(crate) fn parse(bytes: &[u8]) -> Result<Example<'_>, String> {
    let (mut encoded, mut label) = (None, None);
    let mut example = Fields(bytes);
    while let Some((number, value)) = example.next()? {
        if number != 1 {
            continue;
        }
        let mut features = Fields(value.message("features")?);
        while let Some((number, value)) = features.next()? {
            if number != 1 {
                continue;
            }
            let (key, feature) = entry(value.message("a feature")?)?;
            if key == ENCODED.as_bytes() {
                encoded = Some(feature);
            } else if key == LABEL.as_bytes() {
                label = Some(feature);
            }
        }
    }
    let encoded = encoded.ok_or_else(|| format!("{ENCODED} is missing"))?;
    let label = label.ok_or_else(|| format!("{LABEL} is missing"))?;
    Ok(Example {
        encoded: one_bytes(list(encoded, ENCODED, 1)?)?,
        label: one_int64(list(label, LABEL, 3)?)?,
    })
}

fn entry(bytes: &[u8]) -> Result<(&[u8], &[u8]), String> {
    let (mut key, mut feature) = (&[][..], &[][..]);
    let mut fields = Fields(bytes);
    while let Some((number, value)) = fields.next()? {
        match number {
            1 => key = value.message("a feature's name")?,
            2 => feature = value.message("a feature's value")?,
            _ => {}
        }
    }
    Ok((key, feature))
}

/// The list inside a feature, which must be of the kind with this field number.
fn list<'a>(feature: &'a [u8], name: &str, kind: u64) -> Result<&'a [u8], String> {
    let mut found = None;
    let mut fields = Fields(feature);
    while let Some((number, value)) = fields.next()? {
        if (1..=3).contains(&number) {
            found = Some((number, value.message(name)?));
        }
    }
    let kinds = ["", "a bytes", "a float", "an int64"];
    match found {
        None => Err(format!("{name} is empty")),
        Some((number, list)) if number == kind => Ok(list),
        Some((number, _)) => Err(format!(
            "{name} holds {} list where {} list is needed",
            kinds[number as usize], kinds[kind as usize]
        )),
    }
}

fn one_bytes(list: &[u8]) -> Result<&[u8], String> {
    let mut values = Vec::new();
    let mut fields = Fields(list);
    while let Some((number, value)) = fields.next()? {
        if number == 1 {
            values.push(value.message(ENCODED)?);
        }
    }
    one(&values, ENCODED)
}

fn one_int64(list: &[u8]) -> Result<i64, String> {
    let mut values = Vec::new();
    let mut fields = Fields(list);
    while let Some((number, value)) = fields.next()? {
        match (number, value) {
            (1, Value::Varint(value)) => values.push(value as i64),
            (1, Value::Bytes(bytes)) => {
                let mut packed = Fields(bytes);
                while !packed.0.is_empty() {
                    values.push(packed.varint()? as i64);
                }
            }
            (1, Value::Fixed) => return Err(format!("{LABEL} has the wrong wire type")),
            _ => {}
        }
    }
    one(&values, LABEL)
}

fn one<T: Copy>(values: &[T], name: &str) -> Result<T, String> {
    match values {
        [] => Err(format!("{name} is empty")),
        [value] => Ok(*value),
        _ => Err(format!(
            "{name} holds {} values instead of one",
            values.len()
        )),
    }
}

enum Value<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    /// 32 or 64 bits; nothing that we read is stored so.
    Fixed,
}

impl<'a> Value<'a> {
    fn message(self, name: &str) -> Result<&'a [u8], String> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            _ => Err(format!("{name} has the wrong wire type")),
        }
    }
}

/// What is left of a message.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn next(&mut self) -> Result<Option<(u64, Value<'a>)>, String> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => self.take(8).map(|_| Value::Fixed)?,
            2 => {
                let length = self.varint()?;
                Value::Bytes(self.take(length)?)
            }
            5 => self.take(4).map(|_| Value::Fixed)?,
            wire => {
                return Err(format!(
                    "field {} has the unknown wire type {wire}",
                    tag >> 3
                ));
            }
        };
        Ok(Some((tag >> 3, value)))
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], String> {
        let (taken, rest) = usize::try_from(length)
            .ok()
            .and_then(|length| self.0.split_at_checked(length))
            .ok_or_else(|| {
                format!(
                    "the message is cut off: {length} bytes needed, {} left",
                    self.0.len()
                )
            })?;
        self.0 = rest;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("an integer has more than 64 bits".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field `number` of wire type 2.
    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        assert!(bytes.len() < 128);
        [&[number << 3 | 2, bytes.len() as u8], bytes].concat()
    }

    fn feature(name: &str, kind: u8, list: &[u8]) -> Vec<u8> {
        let entry = [field(1, name.as_bytes()), field(2, &field(kind, list))].concat();
        field(1, &entry)
    }

    fn example(features: &[Vec<u8>]) -> Vec<u8> {
        field(1, &features.concat())
    }

    fn encoded() -> Vec<u8> {
        feature(ENCODED, 1, &field(1, &[0xff, 0xd8]))
    }

    fn label() -> Vec<u8> {
        feature(LABEL, 3, &field(1, &[7]))
    }

    fn check(bytes: &[u8]) {
        let expected = Example {
            encoded: &[0xff, 0xd8],
            label: 7,
        };
        assert_eq!(parse(bytes), Ok(expected));
    }

    fn check_error(bytes: &[u8], what: &str) {
        assert_eq!(parse(bytes).unwrap_err(), what);
    }

    /// notes/reference-vectors.json, `tf_example_hex`.
    #[test]
    fn the_reference_vector() {
        let hex = "0a350a1a0a11696d6167652f636c6173732f6c6162656c12051a030a01070a170a0d\
                   696d6167652f656e636f64656412060a040a02ffd8";
        let bytes: Vec<u8> = (0..hex.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap())
            .collect();
        assert_eq!(bytes.len(), 55);
        check(&bytes);
        assert_eq!(bytes, example(&[label(), encoded()]));
    }

    #[test]
    fn unpacked_labels_and_either_order() {
        check(&example(&[encoded(), feature(LABEL, 3, &[1 << 3, 7])]));
    }

    #[test]
    fn negative_labels() {
        let mut minus_one = vec![0xff; 9];
        minus_one.push(1);
        let bytes = example(&[encoded(), feature(LABEL, 3, &field(1, &minus_one))]);
        assert_eq!(parse(&bytes).unwrap().label, -1);
    }

    #[test]
    fn other_features_and_unknown_fields_are_stepped_over() {
        let fixed64 = [9 << 3 | 1, 0, 0, 0, 0, 0, 0, 0, 0];
        let fixed32 = [9 << 3 | 5, 0, 0, 0, 0];
        let unknown = [&field(9, b"x")[..], &[9 << 3, 1], &fixed64, &fixed32].concat();
        let other = feature("image/format", 1, &field(1, b"jpeg"));
        let bytes = example(&[unknown.clone(), encoded(), other, label()]);
        check(&[unknown, bytes].concat());
    }

    #[test]
    fn a_later_feature_replaces_an_earlier_one() {
        let earlier = feature(LABEL, 3, &field(1, &[1]));
        check(&[example(&[earlier]), example(&[encoded(), label()])].concat());
    }

    #[test]
    fn truncated() {
        let bytes = example(&[label(), encoded()]);
        for end in 1..bytes.len() {
            let error = parse(&bytes[..end]).unwrap_err();
            assert!(error.contains("cut off"), "{end}: {error}");
        }
    }

    #[test]
    fn missing_feature() {
        check_error(&[], "image/encoded is missing");
        check_error(&example(&[label()]), "image/encoded is missing");
        check_error(&example(&[encoded()]), "image/class/label is missing");
    }

    #[test]
    fn wrong_kind() {
        check_error(
            &example(&[encoded(), feature(LABEL, 1, &field(1, b"7"))]),
            "image/class/label holds a bytes list where an int64 list is needed",
        );
        check_error(
            &example(&[feature(ENCODED, 2, &[]), label()]),
            "image/encoded holds a float list where a bytes list is needed",
        );
    }

    #[test]
    fn empty_list() {
        check_error(
            &example(&[encoded(), feature(LABEL, 3, &[])]),
            "image/class/label is empty",
        );
        let hollow = field(1, &field(1, LABEL.as_bytes()));
        check_error(&example(&[encoded(), hollow]), "image/class/label is empty");
    }

    #[test]
    fn two_values() {
        check_error(
            &example(&[encoded(), feature(LABEL, 3, &field(1, &[7, 8]))]),
            "image/class/label holds 2 values instead of one",
        );
    }

    #[test]
    fn wrong_wire_type() {
        check_error(&[1 << 3, 5], "features has the wrong wire type");
        check_error(
            &example(&[encoded(), feature(LABEL, 3, &[1 << 3 | 5, 0, 0, 0, 7])]),
            "image/class/label has the wrong wire type",
        );
        check_error(&[1 << 3 | 3], "field 1 has the unknown wire type 3");
    }

    #[test]
    fn duplicate_feature() {
        let other = feature(ENCODED, 1, &field(1, b"other"));
        check(&example(&[other, label(), encoded()]));
    }

    #[test]
    fn oversized() {
        // A message, a feature and a value that say they are far longer than what follows.
        let mut endless = vec![0x0a];
        endless.extend([0xff; 9]);
        endless.push(0x01);
        for bytes in [
            endless.clone(),
            example(&[label(), endless.clone()]),
            example(&[label(), feature(ENCODED, 1, &endless)]),
        ] {
            let error = parse(&bytes).unwrap_err();
            assert!(
                error.contains("cut off: 18446744073709551615 bytes needed"),
                "{error}"
            );
        }
    }

    #[test]
    fn endless_integer() {
        check_error(&[0xff; 11], "an integer has more than 64 bits");
    }
}

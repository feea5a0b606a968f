//! TOML values as figment's, and as text for messages.

use figment::value::{Dict, Value};
use toml::de::{DeInteger, DeValue};

/// A TOML value as figment's, or why a spec cannot hold it.
pub(crate) fn convert(value: &DeValue<'_>) -> Result<Value, String> {
    let too_large = || format!("{} is too large", shown(value));
    Ok(match value {
        DeValue::String(text) => text.as_ref().into(),
        DeValue::Integer(number) => integer(number).ok_or_else(too_large)?,
        DeValue::Float(number) => {
            let text = number.as_str();
            let value: f64 = text.parse().map_err(|_| too_large())?;
            if value.is_infinite() && !text.contains("inf") {
                return Err(too_large());
            }
            value.into()
        }
        DeValue::Boolean(value) => (*value).into(),
        DeValue::Datetime(date) => return Err(format!("no key is a date such as {date}")),
        DeValue::Array(array) => {
            let values = array.iter().map(|value| convert(value.get_ref()));
            values.collect::<Result<Vec<Value>, String>>()?.into()
        }
        DeValue::Table(table) => {
            let entries = table.iter().map(|(key, value)| {
                let value = convert(value.get_ref())?;
                Ok((key.get_ref().to_string(), value))
            });
            entries.collect::<Result<Dict, String>>()?.into()
        }
    })
}

fn integer(number: &DeInteger<'_>) -> Option<Value> {
    let (text, radix) = (number.as_str(), number.radix());
    let signed = i64::from_str_radix(text, radix).map(Value::from);
    // Seeds use all 64 bits.
    let unsigned = || u64::from_str_radix(text, radix).map(Value::from);
    signed.or_else(|_| unsigned()).ok()
}

/// A TOML value for a message.
pub(crate) fn shown(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("{text:?}"),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(value) => value.to_string(),
        DeValue::Datetime(date) => date.to_string(),
        DeValue::Array(_) => "a list".into(),
        DeValue::Table(_) => "a table".into(),
    }
}

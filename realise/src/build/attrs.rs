//! Structured attributes as a builder reads them: `.attrs.json` and `.attrs.sh`.
//!
//! Source: modern, section 7; formats, section 5.9; `modern.json`, `builder_environment.json`.
//! The JSON is written as the reference's library writes it, byte for byte, since builders copy
//! it into outputs: keys in order of their bytes, compact, floats in the shortest form that C++
//! programs print.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Map, Number, Value};

/// The object that the builder gets: `outputs` replaced, graphs added, keys sorted.
pub fn complete(
    map: &Map<String, Value>,
    outputs: BTreeMap<String, String>,
    graphs: &BTreeMap<String, Value>,
) -> BTreeMap<String, Value> {
    let mut all: BTreeMap<String, Value> = map.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
    let outputs = outputs.into_iter().map(|(name, path)| (name, Value::String(path))).collect();
    all.insert("outputs".into(), Value::Object(outputs));
    all.extend(graphs.iter().map(|(key, value)| (key.clone(), value.clone())));
    all
}

/// The text of `.attrs.json`.
pub fn to_json(all: &BTreeMap<String, Value>) -> Vec<u8> {
    let mut out = String::new();
    write_object(&mut out, all.iter());
    out.into_bytes()
}

fn write_object<'a>(out: &mut String, entries: impl Iterator<Item = (&'a String, &'a Value)>) {
    out.push('{');
    for (n, (key, value)) in entries.enumerate() {
        if n > 0 {
            out.push(',');
        }
        write_string(out, key);
        out.push(':');
        write(out, value);
    }
    out.push('}');
}

fn write(out: &mut String, value: &Value) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
        Value::Number(number) => write_number(out, number),
        Value::String(text) => write_string(out, text),
        Value::Array(items) => {
            out.push('[');
            for (n, item) in items.iter().enumerate() {
                if n > 0 {
                    out.push(',');
                }
                write(out, item);
            }
            out.push(']');
        }
        Value::Object(map) => {
            let sorted: BTreeMap<&String, &Value> = map.iter().collect();
            write_object(out, sorted.into_iter());
        }
    }
}

fn write_string(out: &mut String, text: &str) {
    // Both escape the same characters in the same way.
    out.push_str(&Value::String(text.to_owned()).to_string());
}

fn write_number(out: &mut String, number: &Number) {
    match number.as_f64().filter(|_| number.is_f64()) {
        Some(float) => write_float(out, float),
        None => out.push_str(&number.to_string()),
    }
}

/// The shortest digits that read back the same; positional for exponents from -4 to 14.
fn write_float(out: &mut String, float: f64) {
    let text = format!("{float:e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..15).contains(&exponent) {
        // Rust's positional form has the shortest digits too.
        let plain = float.to_string();
        out.push_str(&plain);
        if !plain.contains('.') {
            out.push_str(".0");
        }
        return;
    }
    out.push_str(mantissa);
    out.push('e');
    out.push(if exponent < 0 { '-' } else { '+' });
    let _ = write!(out, "{:02}", exponent.unsigned_abs());
}

/// The text of `.attrs.sh`: a line for each value that a shell can hold.
pub fn to_shell(all: &BTreeMap<String, Value>) -> Vec<u8> {
    let mut out = String::new();
    for (key, value) in all.iter().filter(|(key, _)| is_name(key)) {
        if let Some(line) = declare(key, value) {
            out.push_str(&line);
            out.push('\n');
        }
    }
    out.into_bytes()
}

fn is_name(key: &str) -> bool {
    let mut bytes = key.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

fn declare(key: &str, value: &Value) -> Option<String> {
    match value {
        Value::Array(items) => {
            let items: Option<String> = items.iter().map(|item| simple(item).map(|text| text + " ")).collect();
            Some(format!("declare -a {key}=({})", items?))
        }
        Value::Object(map) => {
            let sorted: BTreeMap<&String, &Value> = map.iter().collect();
            let pair = |(key, value): (&String, &Value)| Some(format!("[{}]={} ", quote(key), simple(value)?));
            let pairs: Option<String> = sorted.into_iter().map(pair).collect();
            Some(format!("declare -A {key}=({})", pairs?))
        }
        other => Some(format!("declare {key}={}", simple(other)?)),
    }
}

/// A value that is no collection, if the shell can hold it.
fn simple(value: &Value) -> Option<String> {
    match value {
        Value::Null => Some("''".into()),
        Value::Bool(flag) => Some(if *flag { "1" } else { "" }.into()),
        Value::String(text) => Some(quote(text)),
        Value::Number(number) => integer(number).map(|n| n.to_string()),
        Value::Array(_) | Value::Object(_) => None,
    }
}

/// As the reference's C code has it: of integers the low 32 bits, of floats those that single
/// precision calls integral. Large floats, for which its conversion is undefined, are left out.
#[expect(clippy::cast_possible_truncation, reason = "that is what is asked for")]
fn integer(number: &Number) -> Option<i32> {
    if let Some(n) = number.as_i64() {
        return Some(n as i32);
    }
    if let Some(n) = number.as_u64() {
        return Some(n as i32);
    }
    let float = number.as_f64()? as f32;
    (float.fract() == 0.0 && float.abs() < 2_147_483_648.0).then_some(float as i32)
}

fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_as_the_reference_prints_them() {
        for (float, text) in [
            (1e20, "1e+20"),
            (3.0, "3.0"),
            (0.1, "0.1"),
            (1.5, "1.5"),
            (-2.0, "-2.0"),
            (1e15, "1e+15"),
            (123_456_789_012_345.0, "123456789012345.0"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (2.5e-7, "2.5e-07"),
            (1e-300, "1e-300"),
            (0.0, "0.0"),
        ] {
            let mut out = String::new();
            write_float(&mut out, float);
            assert_eq!(out, text);
        }
    }

    #[test]
    fn numbers_go_through_c() {
        let int = |text: &str| integer(&serde_json::from_str(text).unwrap());
        for (text, expected) in [
            ("2147483648", Some(i32::MIN)),
            ("9007199254740993", Some(1)),
            ("3.0", Some(3)),
            ("1.5", None),
            ("-7", Some(-7)),
            ("1e20", None),
        ] {
            assert_eq!(int(text), expected, "{text}");
        }
    }
}

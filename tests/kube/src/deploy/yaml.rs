//! YAML to the values that JSON has, as Kubernetes reads it. Aliases, tags and repeated keys are refused.

use anyhow::{Context as _, Result, bail, ensure};
use saphyr_parser::{Event, Parser, ScalarStyle};
use serde_json::{Map, Value};

/// A collection whose end has not been seen.
enum Open {
    List(Vec<Value>),
    /// With the key whose value comes next.
    Map(Map<String, Value>, Option<String>),
}

/// The documents of a text.
pub(super) fn documents(text: &str) -> Result<Vec<Value>> {
    let mut documents = Vec::new();
    let mut open: Vec<Open> = Vec::new();
    for event in Parser::new_from_str(text) {
        let (event, span) =
            event.map_err(|error| anyhow::anyhow!("line {}: {}", error.marker().line(), error.info()))?;
        let line = span.start.line();
        let finished = match event {
            Event::Scalar(text, style, _, None) => Some(scalar(&text, style)),
            Event::SequenceStart(_, None) => {
                open.push(Open::List(Vec::new()));
                None
            }
            Event::MappingStart(_, None) => {
                open.push(Open::Map(Map::new(), None));
                None
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(Open::List(items)) => Some(Value::Array(items)),
                Some(Open::Map(fields, _)) => Some(Value::Object(fields)),
                None => bail!("line {line}: an end without a beginning"),
            },
            Event::Alias(_) | Event::Scalar(..) | Event::SequenceStart(..) | Event::MappingStart(..) => {
                bail!("line {line}: aliases and tags are not supported: write the value out")
            }
            _ => None,
        };
        if let Some(value) = finished {
            place(&mut documents, open.last_mut(), value).with_context(|| format!("line {line}"))?;
        }
    }
    Ok(documents)
}

fn place(documents: &mut Vec<Value>, open: Option<&mut Open>, value: Value) -> Result<()> {
    match open {
        None => documents.push(value),
        Some(Open::List(items)) => items.push(value),
        Some(Open::Map(fields, key)) => match key.take() {
            None => *key = Some(value.as_str().context("a key that is no text")?.to_owned()),
            Some(name) => {
                ensure!(!fields.contains_key(&name), "`{name}` stands there twice");
                fields.insert(name, value);
            }
        },
    }
    Ok(())
}

/// Returns the value of a scalar (YAML 1.2.2 section 10.3.2). `yes`, `on` and similar words are text.
fn scalar(text: &str, style: ScalarStyle) -> Value {
    if style != ScalarStyle::Plain {
        return Value::String(text.to_owned());
    }
    match text {
        "" | "~" | "null" => Value::Null,
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        _ => match text.parse::<i64>() {
            Ok(number) => number.into(),
            Err(_) => number(text).unwrap_or_else(|| Value::String(text.to_owned())),
        },
    }
}

fn number(text: &str) -> Option<Value> {
    let is_number = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E'));
    let parsed = text.parse::<f64>().ok().filter(|_| is_number)?;
    serde_json::Number::from_f64(parsed).map(Value::Number)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_what_kubernetes_takes_them_for() {
        let text = "a: 1\nb: \"1\"\nc: [x, {d: true, e: 1.5}]\nf:\ng: 0.1.0\nh: |\n  x: 1\n";
        let expected = json!({"a": 1, "b": "1", "c": ["x", {"d": true, "e": 1.5}], "f": null, "g": "0.1.0", "h": "x: 1\n"});
        assert_eq!(documents(text).expect("yaml"), [expected]);
    }

    #[test]
    fn documents_are_kept_apart() {
        assert_eq!(documents("a: 1\n---\nb: 2\n").expect("yaml"), [json!({"a": 1}), json!({"b": 2})]);
    }

    #[test]
    fn what_kubectl_would_lose_is_refused() {
        for text in ["a: 1\na: 2\n", "a: &x 1\nb: *x\n", "a: !!str 1\n", "a: [1\n"] {
            assert!(documents(text).is_err(), "{text}");
        }
    }
}

//! Single values: what YAML takes them for, how they are shown in a message, which known name is nearest.

use std::fmt;

/// Longest part of a value repeated in a message, in characters.
const SEEN_MAX_CHARS: usize = 80;
/// Longest Kubernetes object name, in bytes (RFC 1123 subdomain).
const NAME_MAX_BYTES: usize = 253;

/// The type of a plain (unquoted) scalar in the YAML 1.2 core schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ScalarType {
    Null,
    Boolean,
    Number,
    Text,
}

impl ScalarType {
    /// The kind of an unquoted scalar (YAML 1.2.2 section 10.3.2).
    pub(super) fn of(text: &str) -> Self {
        match text {
            "" | "~" | "null" | "Null" | "NULL" => Self::Null,
            "true" | "True" | "TRUE" | "false" | "False" | "FALSE" => Self::Boolean,
            text if is_number(text) => Self::Number,
            _ => Self::Text,
        }
    }
}

impl fmt::Display for ScalarType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Null => "nothing",
            Self::Boolean => "a truth value",
            Self::Number => "a number",
            Self::Text => "text",
        })
    }
}

fn is_number(text: &str) -> bool {
    let radix = |prefix, radix| {
        text.strip_prefix(prefix)
            .is_some_and(|rest: &str| !rest.is_empty() && rest.chars().all(|c| c.is_digit(radix)))
    };
    if radix("0x", 16) || radix("0o", 8) {
        return true;
    }
    match text.trim_start_matches(['+', '-']) {
        ".inf" | ".Inf" | ".INF" | ".nan" | ".NaN" | ".NAN" => true,
        // Rust reads `inf` and `nan` as numbers too, YAML does not.
        _ => {
            text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E'))
                && text.parse::<f64>().is_ok()
        }
    }
}

/// A value as messages show it: quoted, control characters escaped, shortened.
pub(super) fn quoted(text: &str) -> impl fmt::Display {
    match text.char_indices().nth(SEEN_MAX_CHARS) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// Returns true if `text` is a Kubernetes object name.
pub fn is_object_name(text: &str) -> bool {
    let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    let clean = bytes.iter().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-'));
    clean && bytes.len() <= NAME_MAX_BYTES && edge(bytes.first()) && edge(bytes.last())
}

/// The known name that `text` was probably meant to be: at most a third of its letters differ, case aside.
pub(super) fn nearest<'n>(text: &str, known: &[&'n str]) -> Option<&'n str> {
    if text.len() > NAME_MAX_BYTES {
        return None;
    }
    let text: Vec<char> = text.to_lowercase().chars().collect();
    let distance_to = |name: &str| distance(&text, &name.to_lowercase().chars().collect::<Vec<_>>());
    let (distance, name) =
        known.iter().map(|name| (distance_to(name), *name)).min_by_key(|(distance, _)| *distance)?;
    (distance <= (name.chars().count() / 3).max(1)).then_some(name)
}

/// Number of letters to insert, drop, replace or swap with their neighbour (optimal string alignment).
fn distance(a: &[char], b: &[char]) -> usize {
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = above[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut least = replaced.min(above[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(before[j - 2] + 1);
            }
            row.push(least);
        }
        before = std::mem::replace(&mut above, row);
    }
    above[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_scalars_have_the_kinds_of_the_core_schema() {
        for (text, kind) in [
            ("", ScalarType::Null),
            ("~", ScalarType::Null),
            ("null", ScalarType::Null),
            ("true", ScalarType::Boolean),
            ("False", ScalarType::Boolean),
            ("1", ScalarType::Number),
            ("-1.5e3", ScalarType::Number),
            ("1.0", ScalarType::Number),
            ("0x1f", ScalarType::Number),
            ("0o17", ScalarType::Number),
            ("-.inf", ScalarType::Number),
            (".nan", ScalarType::Number),
            ("yes", ScalarType::Text),
            ("inf", ScalarType::Text),
            ("nan", ScalarType::Text),
            ("e", ScalarType::Text),
            ("1.2.3", ScalarType::Text),
            ("10s", ScalarType::Text),
            ("0x", ScalarType::Text),
            ("10.77.0.0/16", ScalarType::Text),
        ] {
            assert_eq!(ScalarType::of(text), kind, "{text:?}");
        }
    }

    #[test]
    fn the_nearest_name_is_suggested_only_when_it_is_near() {
        let known = ["meshRanges", "metrics", "node"];
        for (text, name) in [
            ("meshranges", Some("meshRanges")),
            ("meshRange", Some("meshRanges")),
            ("metric", Some("metrics")),
            ("nod", Some("node")),
            ("nodes", Some("node")),
            ("noed", Some("node")),
            ("hode", Some("node")),
            ("mode1", None),
            ("colour", None),
            ("", None),
        ] {
            assert_eq!(nearest(text, &known), name, "{text:?}");
        }
    }

    #[test]
    fn a_long_value_is_shortened_at_a_character() {
        assert_eq!(quoted(&"ü".repeat(81)).to_string(), format!("\"{}\"…", "ü".repeat(80)));
        assert_eq!(quoted("a\u{1b}[31m").to_string(), "\"a\\u{1b}[31m\"");
    }
}

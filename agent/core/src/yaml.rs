//! From YAML text to typed values, with every mistake of the file reported together.
//!
//! A decoder walks `Value`s; whatever is wrong is recorded with line, field path, the value seen and what
//! to do, and decoding goes on, so that an operator corrects a file once. `decode` gives a value only when
//! nothing was recorded. Unknown and repeated fields are mistakes: a misspelt field of a security setting
//! must not be skipped.
//!
//! Hostile files are bounded: depth, number of nodes and aliases in `tree`, number of
//! mistakes in `mistakes`.

use std::{
    collections::HashMap, fmt::Display, net::SocketAddr, ops::RangeInclusive, path::Path, time::Duration,
};

mod duration;
mod mistakes;
mod scalar;
mod tree;

pub use mistakes::{Mistake, Mistakes};

pub use scalar::is_object_name;

use mistakes::Collector;
use scalar::{ScalarType, nearest, quoted};
use tree::{Node, NodeContent};

/// Decodes a file of exactly one document (an empty file counts as one empty document).
///
/// # Errors
/// All [`Mistakes`] of the file.
pub fn decode<T>(
    text: &str,
    file: &Path,
    decoder: impl FnOnce(&Value<'_>) -> Option<T>,
) -> Result<T, Mistakes> {
    decode_documents(text, file, |documents| {
        if let Some(second) = documents.get(1) {
            second.refuse("the file holds a second document: remove it and the `---` before it");
        }
        decoder(documents.first()?)
    })
}

/// Decodes a file of any number of documents; at least one [`Value`] is passed, null for an empty file.
///
/// # Errors
/// All [`Mistakes`] of the file.
pub fn decode_documents<T>(
    text: &str,
    file: &Path,
    decoder: impl FnOnce(&[Value<'_>]) -> Option<T>,
) -> Result<T, Mistakes> {
    let mistakes = Collector::default();
    let decoded = tree::parse(text, &mistakes).and_then(|nodes| {
        let value = |node| Value { node, path: String::new(), mistakes: &mistakes };
        let documents: Vec<_> = nodes.iter().map(value).collect();
        decoder(&documents)
    });
    mistakes.finish(decoded, file)
}

/// One value of the file, with the path that leads to it.
#[derive(Clone)]
pub struct Value<'a> {
    node: &'a Node<'a>,
    path: String,
    mistakes: &'a Collector,
}

impl<'a> Value<'a> {
    /// Line it starts in, counted from 1.
    pub fn line(&self) -> usize {
        self.node.line
    }

    /// Records that this value is refused. The problem names the value seen and what to do.
    pub fn refuse(&self, problem: impl Display) {
        self.mistakes.add(self.node.line, &self.path, problem);
    }

    /// Returns true if the value is null or left out (`field:`, `~` or `null`), which Kubernetes reads as an absent
    /// field.
    pub fn is_null(&self) -> bool {
        matches!(&self.node.content, NodeContent::Scalar { text, quoted: false } if ScalarType::of(text) == ScalarType::Null)
    }

    /// A field of a mapping, looked at before all fields are decoded; nothing is recorded.
    pub fn peek(&self, name: &str) -> Option<Value<'a>> {
        let NodeContent::Map(pairs) = &self.node.content else {
            return None;
        };
        #[cfg(test)]
        visits::add(pairs.len());
        let pair = pairs.iter().find(|pair| pair.key == name)?;
        Some(Value { node: &pair.value, path: join(&self.path, name), mistakes: self.mistakes })
    }

    /// The fields of a mapping; fields outside `known` and repeated ones are recorded.
    pub fn fields(&self, known: &[&str]) -> Option<Fields<'a>> {
        let fields = self.entries()?;
        for Entry { name, line, value } in fields.iter().filter(|field| !known.contains(&field.name)) {
            let hint = match nearest(name, known) {
                Some(name) => format!("did you mean `{name}`?"),
                None => format!("known here: {}", known.join(", ")),
            };
            self.mistakes.add(*line, &value.path, format_args!("unknown field: {hint}"));
        }
        let by_name = fields.into_iter().map(|field| (field.name, field.value)).collect();
        Some(Fields { by_name, line: self.node.line, path: self.path.clone(), mistakes: self.mistakes })
    }

    /// The entries of a mapping with free names, in the order of the file; repeated ones are recorded.
    pub fn entries(&self) -> Option<Vec<Entry<'a>>> {
        let NodeContent::Map(entries) = &self.node.content else {
            return self.wrong_type("a mapping (`name: value` lines)");
        };
        #[cfg(test)]
        visits::add(entries.len());
        let mut first_lines: HashMap<&str, usize> = HashMap::with_capacity(entries.len());
        let mut list = Vec::with_capacity(entries.len());
        for entry in entries {
            let path = join(&self.path, &entry.key);
            if let Some(first) = first_lines.insert(&entry.key, entry.line) {
                let problem = format_args!("written twice, first in line {first}: keep one of them");
                self.mistakes.add(entry.line, &path, problem);
                continue;
            }
            let value = Value { node: &entry.value, path, mistakes: self.mistakes };
            list.push(Entry { name: &entry.key, line: entry.line, value });
        }
        Some(list)
    }

    /// The items of a list.
    pub fn items(&self) -> Option<Vec<Value<'a>>> {
        let NodeContent::List(nodes) = &self.node.content else {
            return self.wrong_type("a list (`- item` lines or `[a, b]`)");
        };
        #[cfg(test)]
        visits::add(nodes.len());
        let item =
            |(index, node)| Value { node, path: format!("{}[{index}]", self.path), mistakes: self.mistakes };
        Some(nodes.iter().enumerate().map(item).collect())
    }

    /// The text of a scalar, whatever YAML takes it for: for values that have a parser of their own.
    pub fn scalar(&self) -> Option<&'a str> {
        match &self.node.content {
            NodeContent::Scalar { text, .. } if !self.is_null() => Some(text),
            _ => self.wrong_type("a single value"),
        }
    }

    /// A scalar that YAML takes for text, not empty. `1.0` or `true` without quotes is refused, as Kubernetes
    /// does.
    pub fn text(&self) -> Option<&'a str> {
        let text = self.text_or_empty()?;
        if text.is_empty() {
            self.refuse("the text is empty: write a value");
            return None;
        }
        Some(text)
    }

    /// Like [`Self::text`], but `""` is accepted.
    pub fn text_or_empty(&self) -> Option<&'a str> {
        let text = self.scalar()?;
        let plain = matches!(self.node.content, NodeContent::Scalar { quoted: false, .. });
        if plain && ScalarType::of(text) != ScalarType::Text {
            self.refuse(format_args!(
                "{text} is {} where text is expected: write \"{text}\"",
                ScalarType::of(text)
            ));
            return None;
        }
        Some(text)
    }

    /// A scalar read by `parser`; its error says what is wrong and what to do, the value seen is put before
    /// it.
    pub fn parse<T, E: Display>(&self, parser: impl FnOnce(&str) -> Result<T, E>) -> Option<T> {
        let text = self.scalar()?;
        parser(text).map_err(|error| self.refuse(format_args!("{}: {error}", quoted(text)))).ok()
    }

    /// A Kubernetes object name (RFC 1123 subdomain).
    pub fn name(&self) -> Option<&'a str> {
        let text = self.text()?;
        if scalar::is_object_name(text) {
            return Some(text);
        }
        let rule =
            "1 to 253 characters of a-z, 0-9, '-' and '.', beginning and ending with a letter or digit";
        self.refuse(format_args!("{} is no Kubernetes name: write {rule}", quoted(text)));
        None
    }

    /// One of a few words, written exactly so.
    pub fn choice<T: Copy>(&self, choices: &[(&str, T)]) -> Option<T> {
        let text = self.scalar()?;
        if let Some((_, value)) = choices.iter().find(|(name, _)| *name == text) {
            return Some(*value);
        }
        let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
        let list = names.join(", ");
        match nearest(text, &names) {
            Some(name) => {
                self.refuse(format_args!("{} is none of {list}: did you mean {name}?", quoted(text)))
            }
            None => self.refuse(format_args!("{} is none of {list}: write one of them", quoted(text))),
        }
        None
    }

    /// A duration such as `1h30m`, within `range`.
    #[must_use]
    pub fn duration(&self, range: RangeInclusive<Duration>) -> Option<Duration> {
        self.parse(|text| duration::duration(text, range))
    }

    /// An address to listen on, with a port that is not 0.
    #[must_use]
    pub fn listen_address(&self) -> Option<SocketAddr> {
        let address: Option<SocketAddr> = self.parse(|text| {
            text.parse().map_err(|_| "no address with a port: write it as 127.0.0.1:15020 or \"[::1]:15020\"")
        });
        if address?.port() == 0 {
            self.refuse("port 0: write a port from 1 to 65535");
            return None;
        }
        address
    }

    /// Records that something else than `expected` is written here, unless that was recorded already.
    fn wrong_type<T>(&self, expected: &str) -> Option<T> {
        let found = match &self.node.content {
            NodeContent::Refused => return None,
            NodeContent::Scalar { .. } if self.is_null() => "is empty".to_owned(),
            NodeContent::Scalar { text, .. } => format!("is the single value {}", quoted(text)),
            NodeContent::List(_) => "is a list".to_owned(),
            NodeContent::Map(_) => "is a mapping".to_owned(),
        };
        self.refuse(format_args!("{found}: write {expected}"));
        None
    }
}

/// A named value of a mapping with free names.
pub struct Entry<'a> {
    /// The name as it is written.
    pub name: &'a str,
    /// Line of the name, counted from 1.
    pub line: usize,
    /// The value.
    pub value: Value<'a>,
}

/// The fields of a mapping with known names.
pub struct Fields<'a> {
    by_name: HashMap<&'a str, Value<'a>>,
    line: usize,
    path: String,
    mistakes: &'a Collector,
}

impl<'a> Fields<'a> {
    /// A field that must be there; `what` says what to write when it is not.
    pub fn required(&mut self, name: &str, what: &str) -> Option<Value<'a>> {
        let found = self.optional(name);
        if found.is_none() {
            self.mistakes.add(self.line, &join(&self.path, name), format_args!("missing: write {what}"));
        }
        found
    }

    /// A field that may be left out; a null counts as left out. `None` means absent, never refused.
    pub fn optional(&mut self, name: &str) -> Option<Value<'a>> {
        self.written(name).filter(|value| !value.is_null())
    }

    /// The default for an absent field; a refused one stays `None`, so a mistake never becomes a default.
    pub fn or<T>(
        &mut self,
        name: &str,
        default: T,
        decoder: impl FnOnce(&Value<'a>) -> Option<T>,
    ) -> Option<T> {
        self.optional(name).map_or(Some(default), |value| decoder(&value))
    }

    /// A field that may be left out, where a null is not the same as that.
    pub fn written(&mut self, name: &str) -> Option<Value<'a>> {
        self.by_name.remove(name)
    }
}

/// Counts the values that decoders visit, for tests of the work that a text causes.
#[cfg(test)]
pub(crate) mod visits {
    use std::cell::Cell;

    thread_local! {
        static COUNT: Cell<usize> = const { Cell::new(0) };
    }

    pub(super) fn add(values: usize) {
        COUNT.set(COUNT.get() + values);
    }

    /// Returns the number of values that `decode` visits.
    pub(crate) fn during<T>(decode: impl FnOnce() -> T) -> (T, usize) {
        let before = COUNT.get();
        let decoded = decode();
        (decoded, COUNT.get() - before)
    }
}

/// The path of a field in a mapping: `a.b`, or `a["x/y"]` when the name would not read well after a dot.
fn join(path: &str, name: &str) -> String {
    let plain = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    match (path, plain) {
        (path, false) => format!("{path}[{}]", quoted(name)),
        ("", true) => name.to_owned(),
        (path, true) => format!("{path}.{name}"),
    }
}

#[cfg(test)]
mod tests;

//! YAML text to a tree of nodes that remember their lines.
//!
//! Built from the parser's events, not from a ready-made document: repeated keys stay visible, and depth and
//! number of nodes are checked before memory is taken. Aliases are refused: a few of them expand without
//! bound ("billion laughs"), and a reader of a policy sees better what is written out.

use std::borrow::Cow;

use saphyr_parser::{Event, Parser, ScalarStyle, Tag};

use super::Collector;

/// Deepest nesting. Kubernetes objects with their `managedFields` stay below 20.
const DEPTH_MAX: usize = 64;
/// Most nodes of a file (about 60 MB of memory); 10,000 workloads with labels need 250,000.
const NODES_MAX: usize = 1_000_000;

pub(super) struct Node<'t> {
    /// Counted from 1.
    pub(super) line: usize,
    pub(super) content: NodeContent<'t>,
}

pub(super) enum NodeContent<'t> {
    Scalar {
        text: Cow<'t, str>,
        quoted: bool,
    },
    List(Vec<Node<'t>>),
    Map(Vec<MapEntry<'t>>),
    /// A mistake was recorded for it; decoding says nothing more about it.
    Refused,
}

/// One `key: value` of a mapping.
pub(super) struct MapEntry<'t> {
    pub(super) key: Cow<'t, str>,
    pub(super) line: usize,
    pub(super) value: Node<'t>,
}

/// The documents of a file, at least one. `None` when the text is no YAML or beyond the bounds (recorded).
pub(super) fn parse<'t>(text: &'t str, mistakes: &Collector) -> Option<Vec<Node<'t>>> {
    let mut builder = Builder { documents: Vec::new(), open: Vec::new(), nodes: 0, mistakes };
    // The parser reports the end of a text in the line below it.
    let last = lines(text);
    for event in Parser::new_from_str(text) {
        let (event, span) = event
            .map_err(|error| {
                let line = error.marker().line().clamp(1, last);
                mistakes.add(line, "", format_args!("no YAML: {}", error.info()));
            })
            .ok()?;
        let line = span.start.line().clamp(1, last);
        if builder.open.len() > DEPTH_MAX {
            mistakes.add(
                line,
                "",
                format_args!("nested more than {DEPTH_MAX} levels deep: flatten the file"),
            );
            return None;
        }
        if builder.nodes > NODES_MAX {
            mistakes.add(
                line,
                "",
                format_args!("more than {NODES_MAX} values in one file: make the file smaller"),
            );
            return None;
        }
        builder.take(event, line);
    }
    if builder.documents.is_empty() {
        builder.documents.push(empty(1));
    }
    Some(builder.documents)
}

/// Returns the number of lines of a text, at least 1. The line breaks are those of YAML 1.2 (section 5.4).
fn lines(text: &str) -> usize {
    let bytes = text.as_bytes();
    let is_break =
        |at: usize| bytes[at] == b'\n' || (bytes[at] == b'\r' && bytes.get(at + 1) != Some(&b'\n'));
    let breaks = (0..bytes.len()).filter(|&at| is_break(at)).count();
    (breaks + usize::from(!text.ends_with(['\n', '\r']))).max(1)
}

fn empty<'t>(line: usize) -> Node<'t> {
    Node { line, content: NodeContent::Scalar { text: Cow::Borrowed(""), quoted: false } }
}

struct Builder<'t, 'm> {
    documents: Vec<Node<'t>>,
    open: Vec<OpenCollection<'t>>,
    nodes: usize,
    mistakes: &'m Collector,
}

/// A collection whose end has not been seen.
struct OpenCollection<'t> {
    line: usize,
    tagged: bool,
    items: Items<'t>,
}

enum Items<'t> {
    List(Vec<Node<'t>>),
    Map(Vec<MapEntry<'t>>, NextNode<'t>),
}

/// The role of the next node in a mapping.
enum NextNode<'t> {
    Key,
    Value {
        key: Cow<'t, str>,
        line: usize,
    },
    /// The value of a key that was refused.
    Dropped,
}

impl<'t> Builder<'t, '_> {
    fn take(&mut self, event: Event<'t>, line: usize) {
        match event {
            Event::Scalar(text, style, _, tag) => {
                let quoted = style != ScalarStyle::Plain;
                let tagged = self.tagged(tag.as_deref(), line);
                self.place(line, tagged, NodeContent::Scalar { text, quoted });
            }
            Event::SequenceStart(_, tag) => self.begin(line, tag.as_deref(), Items::List(Vec::new())),
            Event::MappingStart(_, tag) => {
                self.begin(line, tag.as_deref(), Items::Map(Vec::new(), NextNode::Key))
            }
            Event::SequenceEnd | Event::MappingEnd => self.end(),
            Event::Alias(_) => {
                self.mistakes.add(line, "", "aliases (`*name`) are not supported: write the value out");
                self.place(line, true, NodeContent::Refused);
            }
            Event::DocumentStart(_)
            | Event::DocumentEnd
            | Event::StreamStart
            | Event::StreamEnd
            | Event::Nothing => {}
        }
    }

    fn begin(&mut self, line: usize, tag: Option<&Tag>, items: Items<'t>) {
        let tagged = self.tagged(tag, line);
        self.open.push(OpenCollection { line, tagged, items });
    }

    fn end(&mut self) {
        // The parser pairs starts and ends; an end without a start would have been its error.
        let Some(OpenCollection { line, tagged, items }) = self.open.pop() else {
            return;
        };
        let content = match items {
            Items::List(nodes) => NodeContent::List(nodes),
            Items::Map(pairs, _) => NodeContent::Map(pairs),
        };
        self.place(line, tagged, content);
    }

    /// Puts a finished node where it belongs.
    fn place(&mut self, line: usize, refused: bool, content: NodeContent<'t>) {
        self.nodes += 1;
        let node = Node { line, content: if refused { NodeContent::Refused } else { content } };
        match self.open.last_mut().map(|open| &mut open.items) {
            None => self.documents.push(node),
            Some(Items::List(nodes)) => nodes.push(node),
            Some(Items::Map(pairs, next)) => {
                *next = match (std::mem::replace(next, NextNode::Key), node.content) {
                    (NextNode::Key, NodeContent::Scalar { text: key, .. }) => NextNode::Value { key, line },
                    (NextNode::Key, content) => {
                        if !matches!(content, NodeContent::Refused) {
                            self.mistakes.add(
                                line,
                                "",
                                "the name of a field is a list or mapping: write plain text",
                            );
                        }
                        NextNode::Dropped
                    }
                    (NextNode::Value { key, line: key_line }, content) => {
                        pairs.push(MapEntry { key, line: key_line, value: Node { line, content } });
                        NextNode::Key
                    }
                    (NextNode::Dropped, _) => NextNode::Key,
                };
            }
        }
    }

    fn tagged(&self, tag: Option<&Tag>, line: usize) -> bool {
        if let Some(tag) = tag {
            self.mistakes.add(
                line,
                "",
                format_args!("tag {tag} is not supported: remove it, quote text instead"),
            );
        }
        tag.is_some()
    }
}

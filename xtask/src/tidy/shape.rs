//! Rules for the shape and the place of files.

use super::{Finding, Severity, source::Source};

/// A file of this many lines wants its missing idea found.
const LONG_LINES: usize = 450;

/// A file of this many lines is refused.
const TOO_LONG_LINES: usize = 600;

/// Top-level folders. Those with a dot belong to tools.
const FOLDERS: [&str; 5] = ["agent", "ebpf", "xtask", "tests", "deploy"];

/// Names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 9] =
    ["util", "utils", "common", "type", "types", "helper", "helpers", "misc", "shared"];

/// Generated, however long.
const BINDINGS: &str = "ebpf/src/bindings";

/// Marks of unfinished work; in two parts, since this file is checked as well.
const LEFT_FOR_LATER: [&str; 3] = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
const STUBS: [&str; 2] = [concat!("unimple", "mented!"), concat!("to", "do!")];

pub(super) fn check(source: &Source) -> Vec<Finding> {
    let mut findings = left_for_later(source);
    if source.is_rust() {
        findings.extend(first_line(source));
        findings.extend(names(source));
        findings.extend(length(source));
    }
    findings
}

/// Folders at the top that do not belong there.
pub(super) fn folders(sources: &[Source]) -> Vec<Finding> {
    let tops = sources.iter().filter_map(|source| Some((source, source.path.split_once('/')?.0)));
    let strange = tops.filter(|(_, top)| !top.starts_with('.') && !FOLDERS.contains(top));
    let known = FOLDERS.join(", ");
    strange
        .map(|(source, top)| Finding::error(source, 0, format!("`{top}` is none of the folders {known}")))
        .collect()
}

fn first_line(source: &Source) -> Option<Finding> {
    let first = source.numbered().next().map_or("", |(_, line)| line);
    let problem = "the first line is no `//!`: say what the file is, promises and does not do";
    (!first.starts_with("//! ")).then(|| Finding::error(source, 1, problem))
}

fn names(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    if source.path.ends_with("/mod.rs") {
        findings.push(Finding::error(source, 0, "`foo.rs` beside `foo/`, never `foo/mod.rs`"));
    }
    let empty = source.path.trim_end_matches(".rs").split('/').find(|part| EMPTY_NAMES.contains(part));
    findings.extend(
        empty.map(|name| Finding::error(source, 0, format!("`{name}` says nothing: name what is inside"))),
    );
    findings
}

fn length(source: &Source) -> Option<Finding> {
    let lines = source.lines.len();
    if lines <= LONG_LINES || source.path.starts_with(BINDINGS) {
        return None;
    }
    let severity = if lines > TOO_LONG_LINES { Severity::Error } else { Severity::Warning };
    let problem = format!("{lines} lines: find the missing idea and give it a file (limit {TOO_LONG_LINES})");
    Some(Finding { severity, ..Finding::error(source, 0, problem) })
}

fn left_for_later(source: &Source) -> Vec<Finding> {
    // Lock files and licences are not ours to word.
    if source.path.ends_with("Cargo.lock") || source.path.contains("LICENSE") {
        return Vec::new();
    }
    let mut findings = Vec::new();
    for (line, text) in source.numbered() {
        let mark = LEFT_FOR_LATER
            .iter()
            .find(|mark| text.split(|c: char| !c.is_alphanumeric()).any(|word| word == **mark));
        findings.extend(
            mark.map(|mark| Finding::error(source, line, format!("{mark}: do it now, or write an issue"))),
        );
    }
    for (index, line) in source.lines.iter().enumerate() {
        let stub = STUBS.iter().find(|stub| line.code.contains(*stub));
        findings.extend(stub.map(|stub| Finding::error(source, index + 1, format!("`{stub}` is a stub"))));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(path: &str, text: &str) -> usize {
        check(&Source::sample(path, text)).len()
    }

    #[test]
    fn every_file_says_first_what_it_is() {
        assert_eq!(problems("agent/src/relay.rs", "//! Moves bytes.\n"), 0);
        assert_eq!(problems("agent/src/relay.rs", "use std::io;\n"), 1);
        assert_eq!(problems("agent/src/relay.rs", ""), 1);
        assert_eq!(problems("agent/src/relay.rs", "// Moves bytes.\n"), 1);
    }

    #[test]
    fn names_say_what_is_inside() {
        assert_eq!(problems("agent/src/kernel/mod.rs", "//! x"), 1);
        assert_eq!(problems("agent/src/utils.rs", "//! x"), 1);
        assert_eq!(problems("agent/src/common/bytes.rs", "//! x"), 1);
        assert_eq!(problems("agent/src/types.rs", "//! x"), 1);
        assert_eq!(problems("agent/src/tunnel/frame.rs", "//! x"), 0);
    }

    #[test]
    fn long_files_are_warned_of_and_then_refused() {
        let of = |lines| {
            length(&Source::sample("agent/src/a.rs", &"x\n".repeat(lines))).map(|finding| finding.severity)
        };
        assert_eq!(of(LONG_LINES), None);
        assert_eq!(of(LONG_LINES + 1), Some(Severity::Warning));
        assert_eq!(of(TOO_LONG_LINES + 1), Some(Severity::Error));
        assert!(length(&Source::sample("ebpf/src/bindings.rs", &"x\n".repeat(9_000))).is_none());
    }

    #[test]
    fn nothing_is_left_for_later() {
        let mark = LEFT_FOR_LATER[0];
        assert_eq!(problems("README.md", &format!("{mark}: write this")), 1);
        assert_eq!(problems("agent/src/a.rs", &format!("//! x\n// {mark}\n{}()", STUBS[0])), 2);
        assert_eq!(
            problems("agent/src/a.rs", &format!("//! x\nlet {mark}_LIST = 1;\nlet a = \"{}\";", STUBS[1])),
            1
        );
        assert_eq!(problems("agent/src/a.rs", "//! x\nlet todos = method();"), 0);
    }

    #[test]
    fn only_known_folders_stand_at_the_top() {
        let of = |path| folders(&[Source::sample(path, "")]).len();
        for known in ["agent/src/a.rs", "deploy/README.md", "README.md", ".ci/run"] {
            assert_eq!(of(known), 0, "{known}");
        }
        assert_eq!(of("scripts/build.sh"), 1);
    }
}

//! Rust source, line by line, with code, comments and literals told apart, and the paths that code mentions.
//!
//! A scanner, not a parser: it knows nested block comments, (raw, byte, C) strings, characters and lifetimes. What
//! a macro expands to is not seen.

/// One line.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Line {
    /// Code with comments removed and the content of literals left out (`""`).
    pub(super) code: String,
    /// Text of comments on this line, markers included.
    pub(super) comment: String,
}

enum State {
    Code,
    /// Depth: block comments nest in Rust.
    Block(u32),
    Text,
    /// Number of `#` that end it.
    Raw(usize),
}

/// Splits `text` into scanned lines.
pub(super) fn lines(text: &str) -> Vec<Line> {
    let mut state = State::Code;
    let mut lines = Vec::new();
    for raw in text.lines() {
        let mut line = Line::default();
        state = scan(raw, state, &mut line);
        lines.push(line);
    }
    lines
}

fn scan(raw: &str, mut state: State, line: &mut Line) -> State {
    let mut rest = raw;
    while !rest.is_empty() {
        let (used, next) = match state {
            State::Code => code(rest, line),
            State::Block(depth) => block(rest, depth, line),
            State::Text => literal(rest),
            State::Raw(hashes) => raw_literal(rest, hashes, line),
        };
        rest = &rest[used..];
        state = next;
    }
    state
}

/// One token of code: how many bytes it has and what follows.
fn code(rest: &str, line: &mut Line) -> (usize, State) {
    if rest.starts_with("//") {
        line.comment.push_str(rest);
        return (rest.len(), State::Code);
    }
    if rest.starts_with("/*") {
        line.comment.push_str("/*");
        return (2, State::Block(1));
    }
    if rest.starts_with('"') {
        line.code.push_str("\"\"");
        return (1, State::Text);
    }
    let after_word = line.code.ends_with(|c: char| c.is_alphanumeric() || c == '_');
    if !after_word && let Some((used, hashes)) = raw_opening(rest) {
        line.code.push_str("\"\"");
        return (used, State::Raw(hashes));
    }
    if rest.starts_with('\'') {
        let used = character(rest);
        line.code.push_str(if used > 1 { "' '" } else { "'" });
        return (used, State::Code);
    }
    let first = rest.chars().next().map_or(1, char::len_utf8);
    line.code.push_str(&rest[..first]);
    (first, State::Code)
}

fn block(rest: &str, depth: u32, line: &mut Line) -> (usize, State) {
    if rest.starts_with("/*") {
        return (2, State::Block(depth + 1));
    }
    if rest.starts_with("*/") {
        return (2, if depth == 1 { State::Code } else { State::Block(depth - 1) });
    }
    let first = rest.chars().next().map_or(1, char::len_utf8);
    line.comment.push_str(&rest[..first]);
    (first, State::Block(depth))
}

fn literal(rest: &str) -> (usize, State) {
    let mut characters = rest.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (at + 1, State::Code),
            '\\' => drop(characters.next()),
            _ => {}
        }
    }
    (rest.len(), State::Text)
}

fn raw_literal(rest: &str, hashes: usize, _line: &mut Line) -> (usize, State) {
    let end = format!("\"{}", "#".repeat(hashes));
    match rest.find(&end) {
        Some(at) => (at + end.len(), State::Code),
        None => (rest.len(), State::Raw(hashes)),
    }
}

/// `r"`, `r#"`, `br"`, `cr#"` and so on: bytes of the opening and number of `#`.
fn raw_opening(rest: &str) -> Option<(usize, usize)> {
    let prefix = ["br", "cr", "r"].into_iter().find(|prefix| rest.starts_with(prefix))?;
    let after = &rest[prefix.len()..];
    let hashes = after.len() - after.trim_start_matches('#').len();
    after[hashes..].starts_with('"').then_some((prefix.len() + hashes + 1, hashes))
}

/// Bytes of a character literal, or 1 when the quote begins a lifetime.
fn character(rest: &str) -> usize {
    let mut characters = rest.char_indices().skip(1);
    let Some((_, first)) = characters.next() else {
        return 1;
    };
    if first == '\\' {
        // The escaped character may be a quote itself.
        characters.next();
        return characters.find(|(_, c)| *c == '\'').map_or(1, |(at, _)| at + 1);
    }
    match characters.next() {
        Some((at, '\'')) => at + 1,
        _ => 1,
    }
}

/// Paths the code mentions (`use` trees flattened, inline paths as written), each with its 1-based line.
pub(super) fn paths(lines: &[Line]) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut statement: Option<(usize, String)> = None;
    for (index, line) in lines.iter().enumerate() {
        let code = line.code.trim();
        if let Some((_, open)) = &mut statement {
            open.push_str(code);
        } else if let Some(tree) = use_tree(code) {
            statement = Some((index + 1, tree.to_owned()));
        } else {
            found.extend(inline_paths(code).into_iter().map(|path| (index + 1, path)));
        }
        if let Some((begin, tree)) = statement.take_if(|(_, open)| open.contains(';')) {
            let tree = tree.split(';').next().unwrap_or_default();
            found.extend(flatten(tree).into_iter().map(|path| (begin, path)));
        }
    }
    found
}

/// Returns the text after `use`, whatever the visibility before it.
fn use_tree(code: &str) -> Option<&str> {
    let rest = match code.strip_prefix("pub") {
        Some(after) => {
            after.trim_start().strip_prefix('(').map_or(after, |v| v.split_once(')').map_or("", |(_, r)| r))
        }
        None => code,
    };
    rest.trim_start().strip_prefix("use ")
}

/// `a::{b, c::{d, e}}` as `a::b`, `a::c::d`, `a::c::e`.
fn flatten(tree: &str) -> Vec<String> {
    let tree = tree.trim().trim_start_matches("::");
    let Some(open) = tree.find('{') else {
        let path = tree.split(" as ").next().unwrap_or_default().trim();
        return if path.is_empty() { Vec::new() } else { vec![path.to_owned()] };
    };
    let prefix = &tree[..open];
    let inner =
        tree[open + 1..].rfind('}').map_or(&tree[open + 1..], |close| &tree[open + 1..open + 1 + close]);
    members(inner).into_iter().flat_map(flatten).map(|path| format!("{prefix}{path}")).collect()
}

/// Members of a brace, split at commas that stand in no inner brace.
fn members(inner: &str) -> Vec<&str> {
    let (mut depth, mut begin, mut found) = (0_i32, 0, Vec::new());
    for (at, character) in inner.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                found.push(&inner[begin..at]);
                begin = at + 1;
            }
            _ => {}
        }
    }
    found.push(&inner[begin..]);
    found
}

fn inline_paths(code: &str) -> Vec<String> {
    let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    code.split(|c| !is_part(c))
        .map(|word| word.trim_matches(':'))
        .filter(|word| word.contains("::"))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code_of(text: &str) -> Vec<String> {
        lines(text).into_iter().map(|line| line.code).collect()
    }

    #[test]
    fn comments_and_literals_are_no_code() {
        assert_eq!(code_of(r#"let a = "unsafe \" // x"; // unsafe"#), [r#"let a = ""; "#]);
        assert_eq!(code_of("a /* b /* c */ d */ e"), ["a  e"]);
        assert_eq!(code_of("r#\"unsafe \" quoted\"# ; br\"x\"; b\"y\""), ["\"\" ; \"\"; b\"\""]);
        assert_eq!(code_of("for\"x\""), ["for\"\""]);
    }

    #[test]
    fn literals_and_comments_may_span_lines() {
        assert_eq!(code_of("a = \"one\ntwo\"; b"), ["a = \"\"", "; b"]);
        assert_eq!(code_of("a /* one\ntwo */ b"), ["a ", " b"]);
    }

    #[test]
    fn quotes_of_characters_and_lifetimes_open_no_string() {
        assert_eq!(
            code_of("match c { '\"' => x, '\\'' => y, 'é' => z }"),
            ["match c { ' ' => x, ' ' => y, ' ' => z }"]
        );
        assert_eq!(code_of("fn f<'a>(x: &'a str) {} // it's"), ["fn f<'a>(x: &'a str) {} "]);
    }

    #[test]
    fn comments_are_kept() {
        assert_eq!(lines("x // SAFETY: y")[0].comment, "// SAFETY: y");
    }

    #[test]
    fn use_trees_are_flattened_over_lines() {
        let scanned = lines("pub(crate) use a::{\n    b, c::{self, d as e},\n};\nlet x = f::g(h::I);");
        let paths: Vec<_> =
            paths(&scanned).into_iter().map(|(line, path)| format!("{line} {path}")).collect();
        assert_eq!(paths, ["1 a::b", "1 a::c::self", "1 a::c::d", "4 f::g", "4 h::I"]);
    }
}

//! `unsafe` in its places and explained; lints silenced with a reason; tests that wait for conditions.

use super::{
    Finding,
    scan::{self, Line},
    source::Source,
};

/// Files that may contain `unsafe`: those that touch the kernel.
const UNSAFE_PLACES: [&str; 3] = ["agent/kernel/", "ebpf/", "tests/attack/"];

/// Lines of code that may stand between the comment and the `unsafe` that it explains.
const SAFETY_REACH: usize = 4;

/// Generated from kernel headers, lint attributes included.
const BINDINGS: &str = "ebpf/src/bindings";

/// Code below `tests/` that may sleep: between two looks at a condition, with a deadline; in programs that tests start, as
/// clients that pause; and in the bench, which measures over a time.
const SLEEPING: [&str; 3] = ["tests/topology/src/wait.rs", "tests/src/bin/", "tests/bench/"];

pub(super) fn check(source: &Source) -> Vec<Finding> {
    let mut findings = unsafe_code(source);
    findings.extend(silenced_lints(source));
    findings.extend(sleeping_tests(source));
    findings
}

fn unsafe_code(source: &Source) -> Vec<Finding> {
    let allowed = UNSAFE_PLACES.iter().any(|place| source.path.starts_with(place));
    let mut findings = Vec::new();
    for (index, line) in source.lines.iter().enumerate() {
        if !has_word(&line.code, "unsafe") {
            continue;
        }
        if !allowed {
            let problem = "`unsafe` outside `agent/kernel`, `ebpf` and the attacks: move the operation there";
            findings.push(Finding::error(source, index + 1, problem));
        } else if needs_reason(&line.code) && !is_explained(&source.lines, index) {
            let problem = "`unsafe` without a `// SAFETY:` comment that says what is true here";
            findings.push(Finding::error(source, index + 1, problem));
        }
    }
    findings
}

/// Blocks and impls promise something; `unsafe fn` and `unsafe extern` ask for it, and `#[unsafe(..)]` is neither.
fn needs_reason(code: &str) -> bool {
    let after = code.split("unsafe").skip(1).map(str::trim_start);
    after.into_iter().any(|rest| rest.starts_with('{') || rest.starts_with("impl") || rest.is_empty())
}

fn is_explained(lines: &[Line], index: usize) -> bool {
    let above = lines[..index].iter().rev();
    let is_reason = |line: &&Line| line.comment.contains("SAFETY:");
    // Lines of a long comment do not count as distance.
    let mut distance = 0;
    let near = above.take_while(|line| {
        distance += usize::from(!line.code.trim().is_empty() || line.comment.is_empty());
        distance <= SAFETY_REACH
    });
    std::iter::once(&lines[index]).chain(near).any(|line| is_reason(&line))
}

fn silenced_lints(source: &Source) -> Vec<Finding> {
    if source.path.starts_with(BINDINGS) {
        return Vec::new();
    }
    let numbered = source.lines.iter().enumerate();
    let silenced = numbered.filter(|(_, line)| {
        let code = line.code.trim_start();
        (code.starts_with("#[") || code.starts_with("#![") || code.contains(" #[")) && has_call(code, "allow")
    });
    let problem =
        "`allow`: write `#[expect(.., reason = \"..\")]`, which also says when it is no longer needed";
    silenced.map(|(index, _)| Finding::error(source, index + 1, problem)).collect()
}

fn sleeping_tests(source: &Source) -> Vec<Finding> {
    if !source.path.starts_with("tests/") || SLEEPING.iter().any(|place| source.path.starts_with(place)) {
        return Vec::new();
    }
    let sleeps = |path: &str| path.ends_with("thread::sleep") || path.ends_with("time::sleep");
    let used = scan::paths(&source.lines).into_iter().filter(|(_, path)| sleeps(path));
    let problem = "a test that sleeps is slow or flaky: wait for the condition with a deadline";
    used.map(|(line, _)| Finding::error(source, line, problem)).collect()
}

/// Returns true if `word` is a whole word in the code.
fn has_word(code: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word)
        .any(|(at, _)| !code[..at].ends_with(is_part) && !code[at + word.len()..].starts_with(is_part))
}

fn has_call(code: &str, word: &str) -> bool {
    has_word(code, word) && code.split(word).skip(1).any(|rest| rest.trim_start().starts_with('('))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: &str = "agent/kernel/src/socket.rs";

    fn problems(path: &str, text: &str) -> usize {
        check(&Source::sample(path, text)).len()
    }

    #[test]
    fn unsafe_stays_where_the_kernel_is_touched() {
        let text = "// SAFETY: the descriptor is open.\nunsafe { close(fd) };";
        assert_eq!(problems(KERNEL, text), 0);
        assert_eq!(problems("ebpf/abi/src/lib.rs", text), 0);
        assert_eq!(problems("agent/src/relay.rs", text), 1);
        assert_eq!(
            problems("agent/src/relay.rs", "#![forbid(unsafe_code)]\n// unsafe\nlet x = \"unsafe\";"),
            0
        );
    }

    #[test]
    fn unsafe_is_explained_nearby() {
        assert_eq!(problems(KERNEL, "let x = unsafe { f() }; // SAFETY: f has no condition."), 0);
        assert_eq!(problems(KERNEL, "let x = unsafe { f() };"), 1);
        assert_eq!(
            problems(KERNEL, "// SAFETY: one\n// two\n// three\n// four\n// five\n// six\nunsafe { f() }"),
            0
        );
        assert_eq!(problems(KERNEL, "// SAFETY: one\na;\nb;\nc;\nunsafe { f() }"), 0);
        assert_eq!(problems(KERNEL, "// SAFETY: one\na;\nb;\nc;\nd;\ne;\nunsafe { f() }"), 1);
        assert_eq!(problems(KERNEL, "unsafe impl Pod for Key {}"), 1);
    }

    #[test]
    fn what_asks_for_a_promise_needs_no_reason() {
        assert_eq!(problems(KERNEL, "unsafe fn f() {}\nunsafe extern \"C\" {}\n#[unsafe(no_mangle)]"), 0);
    }

    #[test]
    fn lints_are_silenced_with_a_reason() {
        assert_eq!(problems("agent/src/relay.rs", "#[allow(dead_code)]"), 1);
        assert_eq!(problems("agent/src/relay.rs", "#![allow(dead_code)]"), 1);
        assert_eq!(problems("agent/src/relay.rs", "#[cfg_attr(test, allow(dead_code))]"), 1);
        assert_eq!(
            problems("agent/src/relay.rs", "#[expect(dead_code, reason = \"allow(x)\")]\nallow(flow);"),
            0
        );
        assert_eq!(problems("ebpf/src/bindings.rs", "#![allow(dead_code)]"), 0);
    }

    #[test]
    fn tests_do_not_sleep() {
        assert_eq!(
            problems("tests/tests/modes.rs", "std::thread::sleep(d);\ntokio::time::sleep(d).await;"),
            2
        );
        assert_eq!(problems("tests/tests/modes.rs", "use std::thread::sleep;"), 1);
        assert_eq!(problems("tests/topology/src/wait.rs", "std::thread::sleep(POLL);"), 0);
        assert_eq!(problems("tests/bench/src/cases.rs", "std::thread::sleep(SILENCE);"), 0);
        assert_eq!(problems("tests/src/bin/tacit-peer/flows.rs", "std::thread::sleep(PAUSE);"), 0);
        assert_eq!(problems("tests/src/mesh.rs", "std::thread::sleep(PAUSE);"), 1);
        assert_eq!(
            problems("tests/tests/modes.rs", "wait::until(what, deadline, || x); command(\"sleep\");"),
            0
        );
        assert_eq!(problems("agent/src/reload.rs", "tokio::time::sleep(d).await;"), 0);
    }
}

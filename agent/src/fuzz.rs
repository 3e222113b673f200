//! Entry points of the fuzz targets in `tests/fuzz`. The tests replay the committed corpus.
//!
//! Each entry point takes any bytes and panics when a promise is broken: a value that is decoded and encoded again is the
//! same, a parser returns the same result twice, and every mistake names its line. Nothing else calls this module.

use std::path::Path;

use tacit_core::yaml::Mistakes;

use crate::config::Config;

/// Longest text that is looked at, in bytes: files of an operator are shorter, and a fuzzer should not spend its time on
/// length alone.
const TEXT_MAX: usize = 1 << 16;

/// A configuration file.
pub fn config(input: &[u8]) {
    let Some(text) = text(input) else { return };
    let parse = || Config::parse(text, Path::new("/etc/tacit/tacit.yaml"));
    let parsed = parse();
    assert_eq!(parsed, parse());
    mistakes(text, parsed.err());
}

fn text(input: &[u8]) -> Option<&str> {
    std::str::from_utf8(input).ok().filter(|text| text.len() <= TEXT_MAX)
}

/// A refusal says something, and about lines that there are.
fn mistakes(text: &str, mistakes: Option<Mistakes>) {
    let Some(mistakes) = mistakes else { return };
    assert!(!mistakes.list.is_empty());
    // To YAML a carriage return alone ends a line as well.
    let lines = text.split_terminator(['\n', '\r']).count() + 1;
    for mistake in &mistakes.list {
        assert!((1..=lines).contains(&mistake.line), "{mistake} of {lines} lines");
        assert!(!mistake.problem.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replay(target: &str, run: fn(&[u8])) {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus");
        tacit_testing::replay(&corpus.join(target), run);
    }

    #[test]
    fn the_corpus_of_configurations_is_replayed() {
        replay("config", config);
    }
}

//! Damaged files: a valid text with pieces cut out, repeated or replaced.

use proptest::{collection::vec, prelude::*, sample::Index, sample::select};
use tacit_core::yaml::Mistakes;

/// Pieces that mean something to YAML, and some that no parser likes.
const PIECES: [&str; 28] = [
    "",
    "\n",
    "\r",
    "\r\n",
    "\n\n  ",
    " ",
    "\t",
    ":",
    ": ",
    "- ",
    "{",
    "}",
    "[",
    "]",
    ",",
    "#",
    "&a ",
    "*a",
    "'",
    "\"",
    "|",
    "---\n",
    "...\n",
    "!!str ",
    "%",
    "~",
    "0",
    "\u{85}\u{2028}é",
];

/// `text` after one to five changes.
pub(crate) fn damaged(text: &'static str) -> impl Strategy<Value = String> {
    let change = (any::<Index>(), 0..12_usize, select(&PIECES), any::<bool>());
    vec(change, 1..=5).prop_map(move |changes| {
        let mut chars: Vec<char> = text.chars().collect();
        for (at, length, piece, is_repeated) in changes {
            let from = at.index(chars.len() + 1);
            let to = (from + length).min(chars.len());
            let mut new: Vec<char> = piece.chars().collect();
            if is_repeated {
                new.extend_from_slice(&chars[from..to]);
                new.extend_from_slice(&chars[from..to]);
            }
            chars.splice(from..to, new);
        }
        chars.into_iter().collect()
    })
}

/// Every mistake names a line of the text and a problem.
pub(crate) fn assert_lines(text: &str, mistakes: &Mistakes) -> Result<(), TestCaseError> {
    // The line breaks of YAML 1.2 (section 5.4).
    let lines = text.replace("\r\n", "\n").replace('\r', "\n").lines().count().max(1);
    prop_assert!(!mistakes.list.is_empty());
    for mistake in &mistakes.list {
        prop_assert!((1..=lines).contains(&mistake.line), "{} of {} lines in {:?}", mistake, lines, text);
        prop_assert!(!mistake.problem.is_empty());
    }
    Ok(())
}

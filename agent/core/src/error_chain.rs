//! An error with what caused it: the outermost text of some libraries names the call only, or "cannot connect".

use std::error::Error;

/// Returns the text of `error` and of its causes, outermost first.
#[must_use]
pub fn format_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Most messages have that of their source in them.
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        source: Option<Box<Layer>>,
    }

    #[test]
    fn each_cause_is_said_once() {
        for (texts, expected) in [
            (&["reset"][..], "reset"),
            (&["reset", "cannot connect", "no answer"], "no answer: cannot connect: reset"),
            (&["reset", "cannot connect: reset"], "cannot connect: reset"),
        ] {
            let layers = texts.iter().fold(None, |source, text| Some(Box::new(Layer { text, source })));
            assert_eq!(format_chain(&*layers.expect("one at least")), expected);
        }
    }
}

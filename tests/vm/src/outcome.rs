//! Results of the machines: as a table for people, as JSON for programs.

use std::time::Duration;

use serde_json::{Value, json};
use xtask_support::progress::{Style, Tone, seconds};

/// The result of a kernel, or of a pair of kernels.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) label: String,
    pub(super) release: String,
    /// Time to the first process, as the guest told it, such as `2.11 s`; `?` when it never came so far.
    pub(super) boot: String,
    pub(super) passed: u64,
    pub(super) failed: u64,
    pub(super) skipped: u64,
    pub(super) note: String,
    pub(super) took: Duration,
}

impl Outcome {
    /// The counts alone: the difference of two totals (passed, failed, skipped).
    pub(super) fn counted(before: (u64, u64, u64), after: (u64, u64, u64)) -> Self {
        Self {
            passed: after.0 - before.0,
            failed: after.1 - before.1,
            skipped: after.2 - before.2,
            ..Self::default()
        }
    }

    fn value(&self) -> Value {
        json!({
            "kernel": self.label,
            "release": self.release,
            "boot": self.boot,
            "passed": self.passed,
            "failed": self.failed,
            "skipped": self.skipped,
            "seconds": self.took.as_secs_f64(),
            "note": self.note,
        })
    }
}

/// An array with an object for each machine, in the order they ran.
pub(super) fn json(outcomes: &[Outcome]) -> String {
    format!("{:#}\n", Value::Array(outcomes.iter().map(Outcome::value).collect()))
}

/// A line for each machine.
pub(super) fn table(outcomes: &[Outcome], style: Style) -> String {
    let head = format!(
        "{:<12} {:<46} {:>7} {:>7} {:>7} {:>8} {:>13}  {}",
        "kernel", "release", "boot", "passed", "failed", "skipped", "whole run", "note"
    );
    let mut text = format!("\n{}\n", style.paint(Tone::Strong, &head));
    for o in outcomes {
        let failed = format!("{:>7}", o.failed);
        let failed = if o.failed > 0 { style.paint(Tone::Bad, &failed) } else { failed };
        text += &format!(
            "{:<12} {:<46} {:>7} {:>7} {failed} {:>8} {:>13}  {}\n",
            o.label,
            o.release,
            o.boot,
            o.passed,
            o.skipped,
            seconds(o.took),
            o.note
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_programs_read_is_what_people_read() {
        let outcome = Outcome {
            label: "6.1".to_owned(),
            boot: "2.11 s".to_owned(),
            note: "a \"quoted\" note".to_owned(),
            ..Outcome::counted((1, 0, 2), (128, 1, 2))
        };
        let parsed: Value = serde_json::from_str(&json(&[outcome])).expect("valid");
        assert_eq!(parsed[0]["kernel"], "6.1");
        assert_eq!((&parsed[0]["passed"], &parsed[0]["failed"]), (&127.into(), &1.into()));
        assert_eq!(parsed[0]["note"], "a \"quoted\" note");
    }
}

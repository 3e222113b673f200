//! Results of the scenarios: the table, and the success of the command.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use xtask_support::progress::{Style, Tone, seconds};

/// Results in the order in which they came.
#[derive(Default)]
pub(super) struct Verdict {
    rows: Vec<Row>,
}

struct Row {
    name: &'static str,
    took: Duration,
    /// The measurement, or the error.
    outcome: Result<String, String>,
}

impl Verdict {
    /// Runs one test, which says what it measured, if anything; returns whether it passed.
    pub(super) fn run(&mut self, name: &'static str, test: impl FnOnce() -> Result<String>) -> bool {
        let begin = Instant::now();
        let outcome = test().map_err(|error| format!("{error:#}"));
        let passed = outcome.is_ok();
        self.rows.push(Row { name, took: begin.elapsed(), outcome });
        passed
    }

    /// A line for each test with what it measured, then why those failed that did, then a sentence.
    pub(super) fn table(&self, style: Style) -> String {
        let mut table =
            format!("\n{}\n", style.paint(Tone::Strong, &format!("{:<30} {:<8} {:>8}", "test", "", "took")));
        for Row { name, took, outcome } in &self.rows {
            let (tone, word) = if outcome.is_ok() { (Tone::Good, "passed") } else { (Tone::Bad, "FAILED") };
            let measured = outcome.as_deref().unwrap_or_default();
            let word = style.paint(tone, &format!("{word:<8}"));
            table += format!("{name:<30} {word} {:>8}  {measured}", seconds(*took)).trim_end();
            table += "\n";
        }
        for Row { name, outcome, .. } in &self.rows {
            if let Err(why) = outcome {
                table += &format!("\n{} {name}: {why}\n", style.paint(Tone::Bad, "failed:"));
            }
        }
        let failed = self.failed();
        table + &format!("\n{} passed, {failed} failed", self.rows.len() - failed)
    }

    /// An error when anything failed, or when nothing was tried.
    pub(super) fn result(&self) -> Result<()> {
        ensure!(self.failed() == 0, "{} failed", self.failed());
        ensure!(!self.rows.is_empty(), "no test ran");
        Ok(())
    }

    fn failed(&self) -> usize {
        self.rows.iter().filter(|row| row.outcome.is_err()).count()
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn one_failure_fails_the_command_and_is_told() {
        let mut verdict = Verdict::default();
        assert!(verdict.run("install", || Ok("2 agents".to_owned())));
        assert!(verdict.result().is_ok());
        assert!(!verdict.run("enrol", || bail!("no pod")));
        assert!(verdict.result().is_err());
        let table = verdict.table(Style::Plain);
        assert!(
            table.contains("  2 agents\n")
                && table.contains("failed: enrol: no pod")
                && table.ends_with("1 passed, 1 failed"),
            "{table}"
        );
    }

    #[test]
    fn nothing_tried_is_no_success() {
        assert!(Verdict::default().result().is_err());
    }
}

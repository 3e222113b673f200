//! Report of the tests: reads the lines of cargo and of the test harness, counts, and writes a table and one sentence.
//!
//! Recognised lines: cargo's `Running ..` and `Doc-tests ..`, which name a suite; the harness's `test NAME ... FAILED`,
//! `test NAME ... ignored` and `test result: ..`. A suite that ends without a result has crashed and counts as failed.

use std::{fmt::Write as _, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};

use crate::progress::{Style, Tone};

/// One test program's, or one check's, result.
#[derive(Clone, Debug, Default, PartialEq)]
struct Suite {
    name: String,
    passed: u64,
    failed: u64,
    skipped: u64,
    seconds: f64,
    state: State,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Named by cargo, no result yet.
    #[default]
    Running,
    Reported,
}

/// Everything that was run.
#[derive(Debug, Default)]
pub struct Report {
    suites: Vec<Suite>,
    failures: Vec<String>,
    notes: Vec<String>,
    /// The steps, in their order, and how long each took.
    parts: Vec<(String, Duration)>,
    /// Index of the running command's first suite.
    command: usize,
}

impl Report {
    /// A command begins.
    pub fn begin(&mut self) {
        self.command = self.suites.len();
    }

    /// One line of a `cargo test`.
    pub fn line(&mut self, raw: &str) {
        let line = without_escapes(raw);
        let line = line.trim();
        if let Some(name) = suite_name(line) {
            self.close_crashed();
            self.suites.push(Suite { name, ..Suite::default() });
        } else if let Some(result) = line.strip_prefix("test result: ") {
            self.result(result);
        } else if let Some(name) =
            line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            let suite = self.suites.last().map_or("", |suite| &suite.name);
            self.failures.push(format!("{suite}: {name}"));
        }
    }

    /// The command ended. A failed one leaves at least one failure behind: when no suite can be blamed (it did not
    /// even build, for example), the command itself, as `name`.
    pub fn end(&mut self, name: &str, succeeded: bool) {
        if succeeded {
            return;
        }
        self.close_crashed();
        if self.suites[self.command..].iter().all(|suite| suite.failed == 0) {
            self.failed_check(name);
        }
    }

    /// A step that has no tests of its own failed.
    pub fn failed_check(&mut self, name: &str) {
        self.failures.push(name.to_owned());
        self.suites.push(Suite {
            name: name.to_owned(),
            failed: 1,
            state: State::Reported,
            ..Suite::default()
        });
    }

    /// A step took so long.
    pub fn part(&mut self, name: &str, took: Duration) {
        self.parts.push((name.to_owned(), took));
    }

    /// Something to know beside the numbers.
    pub fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// An error when anything failed, or when there was nothing that could have.
    pub fn verdict(&self) -> Result<()> {
        let (passed, failed, skipped) = self.totals();
        ensure!(failed == 0, "{failed} failed");
        ensure!(passed > 0, "no test ran ({skipped} skipped)");
        Ok(())
    }

    /// `N passed, M failed, K skipped`.
    pub fn summary(&self) -> String {
        let (passed, failed, skipped) = self.totals();
        format!("{passed} passed, {failed} failed, {skipped} skipped")
    }

    /// A line for each suite that had something to run, then what failed and what to know.
    pub fn table(&self, style: Style) -> String {
        let shown: Vec<&Suite> = self.suites.iter().filter(|suite| suite.count() > 0).collect();
        let names = shown.iter().map(|suite| &suite.name).chain(self.parts.iter().map(|(name, _)| name));
        let width = names.map(|name| name.chars().count()).max().unwrap_or(0).max("suite".len());
        let head =
            format!("{:<width$}  {:>7} {:>7} {:>7} {:>9}", "suite", "passed", "failed", "skipped", "seconds");
        let mut table = format!("\n{}\n", style.paint(Tone::Strong, &head));
        for suite in shown {
            let failed = format!("{:>7}", suite.failed);
            let failed = if suite.failed > 0 { style.paint(Tone::Bad, &failed) } else { failed };
            let Suite { name, passed, skipped, seconds, .. } = suite;
            table += &format!("{name:<width$}  {passed:>7} {failed} {skipped:>7} {seconds:>9.2}\n");
        }
        table += &self.times(width, style);
        for failure in &self.failures {
            table += &format!("{} {failure}\n", style.paint(Tone::Bad, "failed:"));
        }
        for note in &self.notes {
            table += &format!("{} {note}\n", style.paint(Tone::Warning, "note:"));
        }
        table + "\n"
    }

    /// A line for each step, and their sum.
    fn times(&self, width: usize, style: Style) -> String {
        if self.parts.is_empty() {
            return String::new();
        }
        let line = |name: &str, took: Duration| format!("{name:<width$}  {:>33.1}\n", took.as_secs_f64());
        let head = format!("{:<width$}  {:>33}", "part", "seconds");
        let mut text = format!("\n{}\n", style.paint(Tone::Strong, &head));
        text.extend(self.parts.iter().map(|(name, took)| line(name, *took)));
        text + &line("all", self.parts.iter().map(|(_, took)| *took).sum()) + "\n"
    }

    /// Adds what another report has.
    pub fn append(&mut self, other: Self) {
        self.suites.extend(other.suites);
        self.failures.extend(other.failures);
        self.notes.extend(other.notes);
        self.parts.extend(other.parts);
    }

    /// The report for another process, which reads it with [`Report::parse`]: a suite, a failure or a note a line.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for Suite { name, passed, failed, skipped, seconds, .. } in &self.suites {
            let _ = writeln!(text, "suite\t{passed}\t{failed}\t{skipped}\t{seconds}\t{name}");
        }
        for (kind, lines) in [("failure", &self.failures), ("note", &self.notes)] {
            for line in lines {
                let _ = writeln!(text, "{kind}\t{}", line.replace('\n', " "));
            }
        }
        text
    }

    /// Parses the output of [`Report::to_text`].
    ///
    /// # Errors
    /// When a line is none of a report.
    pub fn parse(text: &str) -> Result<Self> {
        let mut report = Self::default();
        for line in text.lines() {
            match line.split_once('\t') {
                Some(("suite", rest)) => report.suites.push(Suite::parse(rest).context(line.to_owned())?),
                Some(("failure", rest)) => report.failures.push(rest.to_owned()),
                Some(("note", rest)) => report.notes.push(rest.to_owned()),
                _ => bail!("not a line of a report: {line:?}"),
            }
        }
        Ok(report)
    }

    /// Passed, failed, skipped so far.
    pub fn totals(&self) -> (u64, u64, u64) {
        let add = |sum: (u64, u64, u64), suite: &Suite| {
            (sum.0 + suite.passed, sum.1 + suite.failed, sum.2 + suite.skipped)
        };
        self.suites.iter().fold((0, 0, 0), add)
    }

    fn result(&mut self, result: &str) {
        let Some(suite) = self.suites.last_mut() else {
            return;
        };
        let count = |what: &str| field(result, what).and_then(|value| value.parse::<u64>().ok()).unwrap_or(0);
        let seconds =
            result.rsplit("finished in ").next().and_then(|rest| rest.trim_end_matches('s').parse().ok());
        let new = Suite {
            name: suite.name.clone(),
            passed: count("passed"),
            failed: count("failed"),
            skipped: count("ignored"),
            seconds: seconds.unwrap_or(0.0),
            state: State::Reported,
        };
        // Documentation tests come in several batches. A second result of another suite is the real one: the first
        // was in the captured output of a failed test that started the test program again.
        *suite = if suite.name.ends_with(DOCUMENTATION) { suite.clone().plus(new) } else { new };
    }

    fn close_crashed(&mut self) {
        if let Some(suite) = self.suites.last_mut().filter(|suite| suite.state == State::Running) {
            suite.state = State::Reported;
            suite.failed = 1;
            self.failures.push(format!("{}: ended without a result", suite.name));
        }
    }
}

impl Suite {
    fn count(&self) -> u64 {
        self.passed + self.failed + self.skipped
    }

    fn parse(fields: &str) -> Result<Self> {
        let fields: Vec<&str> = fields.splitn(5, '\t').collect();
        let [passed, failed, skipped, seconds, name] = fields[..] else { bail!("not five fields") };
        Ok(Self {
            name: name.to_owned(),
            passed: passed.parse()?,
            failed: failed.parse()?,
            skipped: skipped.parse()?,
            seconds: seconds.parse()?,
            state: State::Reported,
        })
    }

    fn plus(mut self, other: Self) -> Self {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.seconds += other.seconds;
        self.state = other.state;
        self
    }
}

const DOCUMENTATION: &str = " (documentation)";

/// `Running unittests src/lib.rs (target/debug/deps/tacit-0f3c)` and `Doc-tests tacit`.
fn suite_name(line: &str) -> Option<String> {
    if let Some(package) = line.strip_prefix("Doc-tests ") {
        return Some(format!("{package}{DOCUMENTATION}"));
    }
    let (what, program) = line.strip_prefix("Running ")?.rsplit_once(" (")?;
    let file = program.strip_suffix(')')?.rsplit('/').next()?;
    let name = file.rsplit_once('-').map_or(file, |(name, _)| name);
    Some(match what.strip_prefix("unittests ") {
        None | Some("src/lib.rs") => name.to_owned(),
        Some(source) => format!("{name} ({source})"),
    })
}

/// The number before `what` in `ok. 3 passed; 0 failed; ..`.
fn field<'a>(result: &'a str, what: &str) -> Option<&'a str> {
    let part = result.split([';', '.']).map(str::trim).find_map(|part| part.strip_suffix(what))?;
    part.split_whitespace().last()
}

/// The text without ANSI colour sequences.
fn without_escapes(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut parts = text.split("\x1b[");
    plain.push_str(parts.next().unwrap_or_default());
    for part in parts {
        plain.push_str(part.split_once(|c: char| c.is_ascii_alphabetic()).map_or("", |(_, rest)| rest));
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(lines: &str, succeeded: bool) -> Report {
        let mut report = Report::default();
        report.begin();
        lines.lines().for_each(|line| report.line(line));
        report.end("unit tests", succeeded);
        report
    }

    const GOOD: &str = "     Running unittests src/lib.rs (target/debug/deps/tacit-0f3c)\n\
        test policy::strict ... ok\n\
        test result: ok. 12 passed; 0 failed; 2 ignored; 0 measured; 0 filtered out; finished in 1.25s\n\
        \x1b[1m\x1b[32m   Doc-tests\x1b[0m tacit\n\
        test result: \x1b[32mok\x1b[0m. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s\n\
        test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s\n";

    #[test]
    fn suites_are_summed() {
        let report = report(GOOD, true);
        assert_eq!(report.summary(), "15 passed, 0 failed, 2 skipped");
        assert!(report.verdict().is_ok());
    }

    #[test]
    fn a_failed_test_fails_the_run_and_is_named() {
        let lines = "Running tests/modes.rs (target/release/deps/modes-ab)\n\
            test strict_refuses_plaintext ... FAILED\n\
            test result: FAILED. 3 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 4.00s";
        let report = report(lines, false);
        assert_eq!(report.summary(), "3 passed, 1 failed, 0 skipped");
        assert!(report.verdict().is_err());
        assert!(report.table(Style::Plain).contains("failed: modes: strict_refuses_plaintext\n"));
    }

    #[test]
    fn a_suite_that_crashes_counts_as_failed() {
        let report = report(
            &format!("{GOOD}Running tests/modes.rs (target/release/deps/modes-ab)\nrunning 3 tests"),
            false,
        );
        assert_eq!(report.summary(), "15 passed, 1 failed, 2 skipped");
        assert!(report.table(Style::Plain).contains("modes: ended without a result"));
    }

    #[test]
    fn a_build_that_fails_counts_as_failed() {
        let report = report("error[E0425]: cannot find value", false);
        assert_eq!(report.summary(), "0 passed, 1 failed, 0 skipped");
        assert!(report.verdict().is_err());
    }

    #[test]
    fn an_earlier_failure_does_not_hide_a_later_one() {
        let mut report = Report::default();
        report.failed_check("format");
        report.begin();
        report.line("error: could not compile `tacit` (lib test)");
        report.end("unit tests", false);
        assert_eq!(report.summary(), "0 passed, 2 failed, 0 skipped");
    }

    #[test]
    fn nothing_run_is_no_success() {
        assert!(report("", true).verdict().is_err());
        let skipped =
            "Running a (a-1)\ntest result: ok. 0 passed; 0 failed; 9 ignored; 0 measured; finished in 0.00s";
        assert!(report(skipped, true).verdict().is_err());
    }

    #[test]
    fn a_failed_check_counts_once() {
        let mut report = report(GOOD, true);
        report.failed_check("format");
        assert_eq!(report.summary(), "15 passed, 1 failed, 2 skipped");
    }

    #[test]
    fn results_inside_captured_output_do_not_count() {
        let lines = "Running a (a-1)\ntest result: ok. 1 passed; 0 failed; 0 ignored; finished in 0.01s\n\
            test result: FAILED. 4 passed; 1 failed; 0 ignored; finished in 0.50s";
        assert_eq!(report(lines, false).summary(), "4 passed, 1 failed, 0 skipped");
    }

    #[test]
    fn suites_are_named_for_their_program() {
        assert_eq!(
            suite_name("Running unittests src/main.rs (t/tacit-1)").as_deref(),
            Some("tacit (src/main.rs)")
        );
        assert_eq!(suite_name("Running tests/half-close.rs (t/half_close-1)").as_deref(), Some("half_close"));
        assert_eq!(suite_name("running 3 tests"), None);
    }

    #[test]
    fn another_process_reads_the_same_counts_failures_and_notes() {
        let lines = "Running tests/modes.rs (target/release/deps/modes-ab)\n\
            test strict_refuses_plaintext ... FAILED\n\
            test result: FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 4.25s";
        let mut written = report(lines, false);
        written.note("two\nlines".to_owned());
        let read = Report::parse(&written.to_text()).expect("a report");
        assert_eq!(read.summary(), "3 passed, 1 failed, 2 skipped");
        assert_eq!(read.table(Style::Plain), written.table(Style::Plain).replace("two\nlines", "two lines"));
        assert!(Report::parse("suite\t1\tx").is_err() && Report::parse("nothing").is_err());
    }

    #[test]
    fn the_time_of_each_part_is_told() {
        let mut report = report(GOOD, true);
        assert!(!report.table(Style::Plain).contains("part"));
        report.part("lints", Duration::from_millis(1500));
        report.part("unit tests", Duration::from_millis(2500));
        let table = report.table(Style::Plain);
        let seconds = |part: &str| {
            let line = table.lines().find(|line| line.starts_with(part)).expect("its line");
            line.split_whitespace().last().expect("a number").to_owned()
        };
        assert_eq!(
            (seconds("lints"), seconds("unit tests"), seconds("all")),
            ("1.5".into(), "2.5".into(), "4.0".into())
        );
    }

    #[test]
    fn suites_without_tests_are_not_shown() {
        let lines = "Running a (a-1)\ntest result: ok. 0 passed; 0 failed; 0 ignored; finished in 0.00s";
        assert!(!report(lines, true).table(Style::Plain).contains("\na "));
    }
}

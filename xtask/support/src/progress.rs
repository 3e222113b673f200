//! Progress of a command, for the person who waits: one line when a step begins, one when it has ended.
//!
//! Everything here goes to standard error; standard output belongs to results (`demo --json`, the last line of
//! `test`). Colour on a terminal only, and not when `NO_COLOR` is set.

use std::{
    env,
    io::{IsTerminal as _, stderr, stdout},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Result;

/// Colours, or none of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// ANSI escapes.
    Terminal,
    /// For logs and pipes.
    Plain,
}

/// The meaning of a piece of text. The style decides on its looks.
#[derive(Clone, Copy, Debug)]
pub enum Tone {
    /// Headings and the steps of a command.
    Strong,
    /// A success.
    Good,
    /// A failure.
    Bad,
    /// Something to look at.
    Warning,
    /// Details.
    Faint,
}

impl Style {
    /// For text that goes to standard error.
    pub fn of_stderr() -> Self {
        Self::of(stderr().is_terminal())
    }

    /// For text that goes to standard output.
    pub fn of_stdout() -> Self {
        Self::of(stdout().is_terminal())
    }

    fn of(terminal: bool) -> Self {
        let refused = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        if terminal && !refused { Self::Terminal } else { Self::Plain }
    }

    /// The text in its tone.
    pub fn paint(self, tone: Tone, text: &str) -> String {
        if self == Self::Plain {
            return text.to_owned();
        }
        let code = match tone {
            Tone::Strong => "1",
            Tone::Good => "32",
            Tone::Bad => "1;31",
            Tone::Warning => "33",
            Tone::Faint => "2",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

/// The steps of one command.
pub struct Progress {
    style: Style,
    current: usize,
    total: usize,
}

impl Progress {
    /// `total`: how many times `step` will be called.
    pub fn new(total: usize) -> Self {
        Self { style: Style::of_stderr(), current: 0, total }
    }

    /// Runs one step and says how it ended and how long it took.
    pub fn step<T>(&mut self, what: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
        self.current += 1;
        let number = format!("[{}/{}]", self.current, self.total);
        eprintln!("{} {}", self.style.paint(Tone::Strong, &number), self.style.paint(Tone::Strong, what));
        let begin = Instant::now();
        let result = run();
        let (tone, word) = if result.is_ok() { (Tone::Good, "done") } else { (Tone::Bad, "failed") };
        eprintln!(
            "{} {} {}",
            self.style.paint(Tone::Strong, &number),
            self.style.paint(tone, word),
            self.style.paint(Tone::Faint, &seconds(begin.elapsed())),
        );
        result
    }
}

/// The exit code of a command, whose error is printed.
pub fn exit_code(outcome: Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            error(&problem);
            ExitCode::FAILURE
        }
    }
}

/// Prints an error with its causes, without a backtrace: what failed is another program or a file, not this code.
pub fn error(error: &anyhow::Error) {
    eprintln!("{} {error:#}", Style::of_stderr().paint(Tone::Bad, "error:"));
}

/// One line about something that takes a while or that the reader should know.
pub fn note(text: &str) {
    eprintln!("{}", Style::of_stderr().paint(Tone::Faint, &format!("  {text}")));
}

/// A duration as people read it.
pub fn seconds(elapsed: Duration) -> String {
    if elapsed < Duration::from_secs(60) {
        return format!("{:.1} s", elapsed.as_secs_f64());
    }
    format!("{} min {:02} s", elapsed.as_secs() / 60, elapsed.as_secs() % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_carries_no_escapes() {
        assert_eq!(Style::Plain.paint(Tone::Bad, "failed"), "failed");
    }

    #[test]
    fn a_colour_ends_where_the_text_ends() {
        assert_eq!(Style::Terminal.paint(Tone::Good, "done"), "\x1b[32mdone\x1b[0m");
    }

    #[test]
    fn long_steps_are_told_in_minutes() {
        assert_eq!(seconds(Duration::from_millis(1_240)), "1.2 s");
        assert_eq!(seconds(Duration::from_secs(125)), "2 min 05 s");
    }
}

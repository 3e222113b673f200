//! Log output: standard error, for people or as JSON, filtered by level and target.
//!
//! A thread of its own writes them, many at a time: no flow waits for a reader of the log that is slow or gone, and a line
//! of the access log costs no system call. What does not fit is lost, and counted.

use std::{
    io::{self, BufWriter, IsTerminal, Stderr, Write},
    sync::OnceLock,
    thread,
    time::Duration,
};

use tracing::subscriber::SetGlobalDefaultError;
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{EnvFilter, filter::ParseError};

/// Environment variable with the filter, used when no flag gives one.
const FILTER_VARIABLE: &str = "TACIT_LOG";
/// State changes, warnings, errors and the access log.
const FILTER_DEFAULT: &str = "info";

/// Lines that may wait to be written; some 4 MB.
const LINES_MAX: usize = 8192;
/// Size of one write.
const WRITE_BYTES: usize = 64 << 10;
/// Time that lines are gathered before a write.
const GATHER: Duration = Duration::from_millis(10);

/// Counts lines that were lost.
static LOST: OnceLock<ErrorCounter> = OnceLock::new();

/// Format of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// One line of text, in colour on a terminal unless `NO_COLOR` is set.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// A failure to set up logging.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is no list of directives.
    #[error(
        "log filter {filter:?} is not understood; write a level (error, warn, info, debug, trace, off) or a list such as info,access=off"
    )]
    Filter {
        /// As given.
        filter: String,
        /// The parser's error.
        #[source]
        source: ParseError,
    },
    /// A bug: called twice.
    #[error("logging is set up already")]
    Twice(#[from] SetGlobalDefaultError),
}

/// Sends log lines to standard error from now on; dropping the answer writes those that wait. `filter` comes from the
/// command line; without one, `TACIT_LOG` counts, else `info`. Call it once.
///
/// # Errors
/// [`LogError`] when the filter is not understood or logging is set up already.
pub fn init(format: Format, filter: Option<&str>) -> Result<WorkerGuard, LogError> {
    let variable = std::env::var(FILTER_VARIABLE).ok();
    let filter = parse(choose(filter, variable.as_deref()))?;
    let (lines, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(LINES_MAX)
        .lossy(true)
        .thread_name("tacit-log")
        .finish(Gathering(BufWriter::with_capacity(WRITE_BYTES, io::stderr())));
    let _ = LOST.set(lines.error_counter());
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(lines);
    match format {
        Format::Human => {
            let colour =
                io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
            tracing::subscriber::set_global_default(builder.with_ansi(colour).finish())?;
        }
        Format::Json => tracing::subscriber::set_global_default(builder.json().flatten_event(true).finish())?,
    }
    Ok(guard)
}

/// Lines that were lost because standard error did not take them in time.
#[must_use]
pub fn lost_lines() -> u64 {
    LOST.get().map_or(0, |lost| lost.dropped_lines() as u64)
}

/// A writer that is flushed when no line waits, and then lets some gather.
struct Gathering(BufWriter<Stderr>);

impl Write for Gathering {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()?;
        thread::sleep(GATHER);
        Ok(())
    }
}

/// The flag, else the variable, else the default; an empty one counts as not given.
fn choose<'a>(flag: Option<&'a str>, variable: Option<&'a str>) -> &'a str {
    [flag, variable].into_iter().flatten().find(|text| !text.trim().is_empty()).unwrap_or(FILTER_DEFAULT)
}

fn parse(filter: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::builder()
        .parse(filter)
        .map_err(|source| LogError::Filter { filter: filter.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_wins_over_the_variable_and_both_over_the_default() {
        assert_eq!(choose(Some("debug"), Some("warn")), "debug");
        assert_eq!(choose(None, Some("warn")), "warn");
        assert_eq!(choose(Some(""), Some(" ")), FILTER_DEFAULT);
    }

    #[test]
    fn a_filter_that_is_not_understood_is_refused_by_name() {
        let error = parse("tacit=lots").expect_err("lots is no level");
        assert!(error.to_string().contains("\"tacit=lots\""), "{error}");
        parse("info,access=off").expect("valid");
    }
}

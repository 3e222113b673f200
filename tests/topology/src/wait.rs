//! Polling of a condition until a deadline, with an error that names the condition.

use anyhow::{Context as _, Result};
use std::time::{Duration, Instant};

/// Time between two evaluations of a condition; short compared to every awaited condition.
const POLL: Duration = Duration::from_millis(5);

/// Longest wait in a test, which only ends hangs: an emulated machine under load needs a tenth of it. A test of a
/// duration compares it with another duration of the same run, never with this constant.
pub const HANG: Duration = Duration::from_secs(300);

/// Polls `condition` until it returns `Some`, and returns its value.
///
/// # Errors
/// Fails if [`HANG`] passes first, with `what` in the message, or if `condition` fails.
pub fn until<T>(what: &str, condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    within(HANG, condition)?.with_context(|| format!("{what}: not within {HANG:?}"))
}

/// Polls `condition` until it returns `Some`, and returns its value, or `None` when `limit` passes first.
///
/// # Errors
/// Fails if `condition` fails.
pub fn within<T>(limit: Duration, mut condition: impl FnMut() -> Result<Option<T>>) -> Result<Option<T>> {
    let start = Instant::now();
    loop {
        let begin = Instant::now();
        let value = condition()?;
        let took = begin.elapsed();
        if value.is_some() || start.elapsed() >= limit {
            return Ok(value);
        }
        // Most conditions start a program: on a slow machine that must not take the time of what is waited for.
        std::thread::sleep(POLL.max(took * 2));
    }
}

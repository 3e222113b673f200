//! Waiting for a condition: polled, and an error that names the condition when it never comes.

use anyhow::{Context as _, Result};
use std::time::{Duration, Instant};

/// Time between two looks at a condition; short against everything waited for here.
const POLL: Duration = Duration::from_millis(5);

/// The longest wait for anything in a test. It only ends hangs: an emulated machine under load needs a tenth of it. A test
/// that promises a time compares it with another time of the same run, never with this.
pub const HANG: Duration = Duration::from_secs(300);

/// Polls `condition` until it returns `Some`, and returns its value.
///
/// # Errors
/// When [`HANG`] passes first (the message names `what`), or as soon as `condition` itself fails.
pub fn until<T>(what: &str, condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    within(HANG, condition)?.with_context(|| format!("{what}: not within {HANG:?}"))
}

/// Polls `condition` until it returns `Some`, and returns its value, or `None` when `limit` passes first.
///
/// # Errors
/// As soon as `condition` itself fails.
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

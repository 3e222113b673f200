//! Waiting for a condition: polled, with a deadline, and an error that says what never came.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// Time between two looks at a condition; short against everything waited for here.
const POLL: Duration = Duration::from_millis(5);

/// Asks `condition` until it answers `Some`, and returns that.
///
/// # Errors
/// When `deadline` passes first (the message names `what`), or as soon as `condition` itself fails.
pub fn until<T>(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if start.elapsed() >= deadline {
            bail!("{what}: not within {deadline:?}");
        }
        std::thread::sleep(POLL);
    }
}

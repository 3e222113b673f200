//! The scale of tests: an emulated machine is slower than a real one.

use anyhow::{Result, bail};

/// Returns the divisor of sizes and counts, `TACIT_TEST_SCALE`: 1 on a real machine, which is the default, and more on an
/// emulated one, which is about twenty times slower.
///
/// # Errors
/// Fails if the variable is not a positive whole number.
pub fn scale() -> Result<u32> {
    let Ok(text) = std::env::var("TACIT_TEST_SCALE") else { return Ok(1) };
    match text.parse() {
        Ok(divisor) if divisor > 0 => Ok(divisor),
        _ => bail!("invalid TACIT_TEST_SCALE {text:?}: expected a positive whole number"),
    }
}

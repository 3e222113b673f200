//! Where the programs under test are, and how large the large tests may be.

use anyhow::{Context, Result, bail};
use std::path::PathBuf;

/// The agent: `TACIT_BIN`, or the build of this workspace for tests.
///
/// # Errors
/// When it is not there.
pub fn agent_program() -> Result<PathBuf> {
    let built = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/fast/tacit");
    let path = std::env::var_os("TACIT_BIN").map_or_else(built, PathBuf::from);
    if !path.exists() {
        bail!("no agent at {}: build it (cargo xtask build) or name it in TACIT_BIN", path.display());
    }
    Ok(path)
}

/// `tacit-peer`, which cargo builds beside the tests.
///
/// # Errors
/// When it is not there.
pub fn peer_program() -> Result<PathBuf> {
    let test = std::env::current_exe().context("path of the test program")?;
    let path = test
        .parent()
        .and_then(|deps| deps.parent())
        .context("folder of the test program")?
        .join("tacit-peer");
    if !path.exists() {
        bail!("no tacit-peer at {}: build it (cargo build -p tacit-tests)", path.display());
    }
    Ok(path)
}

/// A size or count divided by `TACIT_TEST_SCALE` (1 when not set), at least 1: an emulated machine is some twenty times
/// slower than a real one.
///
/// # Errors
/// When the variable is no positive number.
pub fn scaled(full: u64) -> Result<u64> {
    Ok((full / u64::from(scale()?)).max(1))
}

fn scale() -> Result<u32> {
    let Ok(text) = std::env::var("TACIT_TEST_SCALE") else { return Ok(1) };
    match text.parse() {
        Ok(divisor) if divisor > 0 => Ok(divisor),
        _ => bail!("TACIT_TEST_SCALE is {text:?}: give a positive whole number to divide sizes by"),
    }
}

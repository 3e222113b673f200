//! Paths of the programs under test, and the scale of tests with large sizes.

use anyhow::{Context, Result, bail};
use std::path::PathBuf;

/// Returns the path of the agent: `TACIT_BIN`, or the build of this workspace for tests.
///
/// # Errors
/// Fails if it is not there.
pub fn agent_program() -> Result<PathBuf> {
    let built = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/fast/tacit");
    let path = std::env::var_os("TACIT_BIN").map_or_else(built, PathBuf::from);
    if !path.exists() {
        bail!(
            "no agent at {}: build it with `cargo xtask build`, or set TACIT_BIN to its path",
            path.display()
        );
    }
    Ok(path)
}

/// Returns the path of `tacit-peer`, which cargo builds next to the tests.
///
/// # Errors
/// Fails if it is not there.
pub fn peer_program() -> Result<PathBuf> {
    let program = std::env::current_exe().context("path of the test program")?;
    // A test is in `deps`, a program that tries something beside the others.
    let folders = program.ancestors().skip(1).take(2).map(|folder| folder.join("tacit-peer"));
    let path = folders.into_iter().find(|path| path.exists()).with_context(|| {
        format!("no tacit-peer near {}: build it with `cargo build -p tacit-tests`", program.display())
    })?;
    Ok(path)
}

/// Returns a size or count divided by `TACIT_TEST_SCALE` (default 1), at least 1. An emulated machine is about twenty
/// times slower than a real one.
///
/// # Errors
/// Fails if the variable is not a positive whole number.
pub fn scaled(full: u64) -> Result<u64> {
    Ok((full / u64::from(tacit_topology::scale()?)).max(1))
}

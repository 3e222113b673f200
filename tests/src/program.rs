//! Where the programs under test are.

use anyhow::{Context, Result, bail};
use std::path::PathBuf;

/// The agent: `TACIT_BIN`, or the release build of this workspace.
///
/// # Errors
/// When it is not there.
pub fn agent_program() -> Result<PathBuf> {
    let built = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/release/tacit");
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

//! Programs that a testbed starts.

use std::path::PathBuf;

/// The agent and the load.
#[derive(Clone)]
pub(super) struct Programs {
    pub(super) agent: PathBuf,
    /// nginx, which may not be on `PATH`.
    pub(super) nginx: PathBuf,
    /// `tacit-load`.
    pub(super) load: PathBuf,
}

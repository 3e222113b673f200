//! Watched files and the Kubernetes API, as snapshots that decisions read. The last good snapshot stays in use.
//!
//! | module | content |
//! |---|---|
//! | `file`, `reload` | a file read once, and a file that is watched |
//! | `kubernetes` | the Kubernetes API: access, one watcher for each kind, the reflector that publishes a value |
//! | `directory` | workloads, services and ranges from the Kubernetes API |
//! | `policy` | policies from the Kubernetes API, and Events for unreadable ones |
//!
//! The parsers of the files are in `tacit-core`.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod directory;
pub mod file;
pub mod kubernetes;
pub mod policy;
pub mod reload;

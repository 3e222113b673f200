//! Watched files and the Kubernetes API as snapshots. The last valid snapshot stays in use.
//!
//! | module | content |
//! |---|---|
//! | `file`, `reload` | reads a file once, or watches it |
//! | `kubernetes` | the Kubernetes API: access, one watcher for each resource, the reflector that publishes a value |
//! | `directory` | workloads, services and ranges from the Kubernetes API |
//! | `istiod` | the control plane of Istio: one delta xDS connection that feeds `directory` and policies |
//! | `policy` | policies from the Kubernetes API, and Events for unreadable ones |
//! | `roots` | the authority's roots from a ConfigMap |
//!
//! The parsers of the files are in `tacit-core`.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod directory;
pub mod file;
pub mod istiod;
pub mod kubernetes;
pub mod policy;
pub mod reload;
pub mod roots;

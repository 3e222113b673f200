//! Watched files and the Kubernetes API, as snapshots that decisions read.

pub mod directory;
pub mod file;
pub mod kubernetes;
pub mod policy;
pub mod reload;

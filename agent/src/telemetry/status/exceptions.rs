//! Exceptions in a status: plaintext of and to held pods that the kernel programs let pass.

use serde::{Deserialize, Serialize};

/// The count of one exception at one hook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExceptionStatus {
    /// A stable name: the metric's label.
    pub name: String,
    /// The hook: `connect`, `egress`, `ingress` or `link`.
    pub hook: String,
    /// A description of the plaintext that passes.
    pub help: String,
    /// Number of connections at `connect`, else of packets, since the programs were loaded.
    pub value: u64,
}

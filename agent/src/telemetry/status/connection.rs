//! The connection to istiod in a status.

use serde::{Deserialize, Serialize};

use super::Timestamp;

/// The connection to istiod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionStatus {
    /// Time of the first response of the connection; `None` without a connection.
    pub connected_since: Option<Timestamp>,
    /// Connections since the agent started.
    pub connections: u64,
    /// Resources that istiod has sent, by type.
    pub resources: Vec<ResourcesStatus>,
    /// Responses that were rejected since the agent started.
    pub rejections: u64,
    /// The latest rejection.
    pub last_rejection: Option<RejectionStatus>,
}

/// The known resources of a type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourcesStatus {
    /// `Address` or `Authorization`.
    pub kind: String,
    /// Number of resources.
    pub count: u64,
    /// Services among them.
    pub services: u64,
    /// Version of the latest response.
    pub version: String,
    /// Nonce of the latest response.
    pub nonce: String,
}

/// A rejected response of istiod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejectionStatus {
    /// Time of the rejection.
    pub at: Timestamp,
    /// The resources that cannot be read, with the reasons.
    pub error: String,
}

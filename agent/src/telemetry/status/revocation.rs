//! Revocation lists in a status.

use serde::{Deserialize, Serialize};

use super::Timestamp;

/// One revocation list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevocationListStatus {
    /// Name of the issuer.
    pub issuer: String,
    /// Number of revoked certificates.
    pub revoked: u64,
    /// When it was made.
    pub this_update: Timestamp,
    /// When it expires.
    pub next_update: Timestamp,
    /// Until it expires; negative when it has.
    pub seconds_left: i64,
    /// True if the key of an issuer in a peer's chain has signed it, false if such an issuer has its name and another key. `None` until a
    /// certificate of an issuer with its name was seen.
    pub is_signed: Option<bool>,
}

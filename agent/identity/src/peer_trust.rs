//! What peers are held to beside the roots that came with the own certificate. It is the same for all identities of a node.

use crate::revocation::RevocationCheck;

/// The conditions of trust in peers.
#[derive(Debug, Default)]
pub struct PeerTrust {
    /// Revocation lists.
    pub revocation: RevocationCheck,
}

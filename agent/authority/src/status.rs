//! The state of the authority for metrics and readiness.

use std::time::SystemTime;

/// A snapshot of the authority's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthorityStatus {
    /// Readiness to sign.
    pub readiness: Readiness,
    /// Certificates issued since it started.
    pub issued: u64,
    /// Refused requests since the start, by reason.
    pub refused: Vec<(&'static str, u64)>,
    /// True if the latest reconciliation failed, or a file of tokens or workloads is invalid.
    pub upkeep_failing: bool,
    /// Expiry of the signing root.
    pub root_not_after: Option<SystemTime>,
    /// Expiry of the intermediate.
    pub intermediate_not_after: Option<SystemTime>,
    /// Number of trusted roots, more than one during a rotation.
    pub roots: u64,
}

/// Readiness to sign.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// The authority can sign.
    Ready,
    /// There is no root yet, because of this error.
    NoRoot(Option<String>),
    /// The root store could not be read for too long.
    Stale(Option<String>),
}

impl AuthorityStatus {
    /// Returns the reason why the authority is not ready, or `None` if it is.
    #[must_use]
    pub fn unready(&self) -> Option<String> {
        let because = |why: &Option<String>| why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        match &self.readiness {
            Readiness::Ready => None,
            Readiness::NoRoot(why) => Some(format!("there is no root yet{}", because(why))),
            Readiness::Stale(why) => {
                Some(format!("the root store could not be read for too long{}", because(why)))
            }
        }
    }
}

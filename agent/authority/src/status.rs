//! The authority's state at one moment: what its metrics and its readiness say.

use std::time::SystemTime;

/// The whole authority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthorityStatus {
    /// Whether it signs.
    pub readiness: Readiness,
    /// Certificates issued since it started.
    pub issued: u64,
    /// Requests refused since then, by reason.
    pub refused: Vec<(&'static str, u64)>,
    /// The store of the root could not be read or written, the bundle not published, or the file of tokens or workloads not
    /// read, at the latest look.
    pub upkeep_failing: bool,
    /// Last moment of the root that signs.
    pub root_not_after: Option<SystemTime>,
    /// Last moment of the intermediate in use.
    pub intermediate_not_after: Option<SystemTime>,
    /// Roots trusted: more than one while a root is replaced.
    pub roots: u64,
}

/// Whether the authority signs, and why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// It does.
    Ready,
    /// It has no root yet, and this is in the way.
    NoRoot(Option<String>),
    /// The store of the root could not be read for too long.
    Stale(Option<String>),
}

impl AuthorityStatus {
    /// Why it is not ready; `None` when it is.
    #[must_use]
    pub fn unready(&self) -> Option<String> {
        let because = |why: &Option<String>| why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        match &self.readiness {
            Readiness::Ready => None,
            Readiness::NoRoot(why) => Some(format!("there is no root yet{}", because(why))),
            Readiness::Stale(why) => {
                Some(format!("the store of the root could not be read for too long{}", because(why)))
            }
        }
    }
}

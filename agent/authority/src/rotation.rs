//! Decides when a root is created, replaced and removed. Pure. `reconciler` writes each step to the store, and only one replica
//! succeeds.
//!
//! ```text
//!            half of its life, or requested      one leaf life, and the bundle is published      one leaf life
//!   signing ───────────────────────────────> next created ───────────────────────────> next signs ──────────> old removed
//!                                            both trusted                              both trusted
//! ```
//!
//! A rotation breaks no connection, because each certificate is delivered with the trusted roots. One leaf life after the next
//! root is published, no certificate with an older bundle is in use, and only then does the next root sign. The same holds in
//! reverse for the old root. `slack` is added to both waits for replicas that have not read the store yet. A replica that has
//! not read the store for longer does not sign (see `reconciler`).
//!
//! If an operator replaces the root, the previous key is lost. Replicas then sign with the intermediate they have for one more
//! leaf life (`signs_from`), while both roots are trusted.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The state of the rotation, stored as `tacit.json` beside the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Rotation {
    /// True if the authority created the root and may replace it.
    pub(super) own: bool,
    /// Fingerprint of the root.
    pub(super) fingerprint: String,
    /// The root's trust anchors, in PEM.
    pub(super) anchors: String,
    /// Seconds since 1970. Until then, replicas sign with an intermediate of the previous root if they have one.
    pub(super) signs_from: u64,
    /// The next root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) next: Option<Next>,
    /// Previous roots.
    pub(super) retired: Vec<Retired>,
    /// The last rotation request that was executed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) followed: Option<String>,
}

/// The next root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Next {
    /// In PEM.
    pub(super) certificate: String,
    /// In PEM.
    pub(super) key: String,
    /// Seconds since 1970.
    pub(super) trusted_since: u64,
}

/// A previous root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Retired {
    /// In PEM.
    pub(super) anchors: String,
    /// Seconds since 1970.
    pub(super) trusted_until: u64,
}

/// The content of the store that affects the decision.
pub(super) struct Observed<'a> {
    /// Fingerprint of the stored root.
    pub(super) fingerprint: &'a str,
    /// Validity of the stored root, in seconds since 1970.
    pub(super) not_before: u64,
    pub(super) not_after: u64,
    /// The stored rotation, absent for a new root of an operator.
    pub(super) rotation: Option<&'a Rotation>,
    /// A rotation request.
    pub(super) request: Option<&'a str>,
}

/// The waits of a rotation, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Waits {
    pub(super) leaf: u64,
    pub(super) slack: u64,
}

/// Maximum number of trusted previous roots. An operator who replaces roots faster breaks trust between some peers, but an
/// unbounded bundle would break all of them.
const RETIRED_MAX: usize = 8;
/// Maximum time that replicas may lag behind the store.
const SLACK_MAX: Duration = Duration::from_secs(600);

impl Waits {
    pub(super) fn new(leaf: Duration) -> Self {
        let slack = (leaf / 4).min(SLACK_MAX);
        Self { leaf: leaf.as_secs(), slack: slack.as_secs().max(1) }
    }

    /// Seconds after which no older certificate is in use. One second is added for rounding.
    fn total(self) -> u64 {
        self.leaf + self.slack + 1
    }
}

/// The next write to the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// None.
    Keep,
    /// Adopt a root that an operator has stored.
    Adopt,
    /// Create the next root.
    Begin,
    /// Sign with the next root.
    Promote,
    /// Remove a previous root from the trusted roots.
    Forget,
}

/// Decides the step at `now`. `published` is true if the current bundle is published.
pub(super) fn decide(observed: &Observed<'_>, waits: Waits, now: u64, published: bool) -> Step {
    let Some(rotation) = observed.rotation.filter(|known| known.fingerprint == observed.fingerprint) else {
        return Step::Adopt;
    };
    if let Some(next) = &rotation.next {
        // A clock that was set back only lengthens the wait.
        let known = now >= next.trusted_since.saturating_add(waits.total());
        return if known && published { Step::Promote } else { Step::Keep };
    }
    if rotation.retired.iter().any(|old| now > old.trusted_until) {
        return Step::Forget;
    }
    let half = observed.not_before + observed.not_after.saturating_sub(observed.not_before) / 2;
    let asked = observed.request.is_some() && observed.request != rotation.followed.as_deref();
    // One rotation at a time, so that at most two roots are in use.
    if rotation.own && rotation.retired.is_empty() && (now >= half || asked) {
        Step::Begin
    } else {
        Step::Keep
    }
}

impl Rotation {
    /// Returns the state of a new root at `now`; `before` is the previous state.
    pub(super) fn adopt(
        own: bool,
        fingerprint: String,
        anchors: String,
        before: Option<&Self>,
        waits: Waits,
        now: u64,
    ) -> Self {
        let mut retired = before.map(|before| before.retired.clone()).unwrap_or_default();
        // Intermediates of the previous root sign for one more period, and their certificates live for another.
        retired.extend(before.map(|before| Retired {
            anchors: before.anchors.clone(),
            trusted_until: now + 2 * waits.total(),
        }));
        let surplus = retired.len().saturating_sub(RETIRED_MAX);
        retired.drain(..surplus);
        let signs_from = if before.is_some() { now + waits.total() } else { now };
        Self { own, fingerprint, anchors, signs_from, next: None, retired, followed: None }
    }

    /// Returns the state with a next root, at `now`.
    pub(super) fn begin(&self, certificate: String, key: String, request: Option<&str>, now: u64) -> Self {
        let next = Some(Next { certificate, key, trusted_since: now });
        let followed = request.map(str::to_owned).or_else(|| self.followed.clone());
        Self { next, followed, ..self.clone() }
    }

    /// Returns the state after the next root has become the signing root, at `now`.
    pub(super) fn promote(&self, fingerprint: String, waits: Waits, now: u64) -> Self {
        let Some(next) = &self.next else { return self.clone() };
        let mut retired = self.retired.clone();
        retired.push(Retired { anchors: self.anchors.clone(), trusted_until: now + waits.total() });
        Self {
            own: self.own,
            fingerprint,
            anchors: next.certificate.clone(),
            signs_from: now,
            next: None,
            retired,
            followed: self.followed.clone(),
        }
    }

    /// Returns the state without expired previous roots.
    pub(super) fn forget(&self, now: u64) -> Self {
        let mut left = self.clone();
        left.retired.retain(|old| now <= old.trusted_until);
        left
    }

    /// Returns all trusted roots in PEM, the signing root first.
    pub(super) fn bundle(&self) -> String {
        let next = self.next.iter().map(|next| next.certificate.as_str());
        let retired = self.retired.iter().map(|old| old.anchors.as_str());
        let mut bundle = String::new();
        for pem in [self.anchors.as_str()].into_iter().chain(next).chain(retired) {
            if !bundle.contains(pem.trim_end()) {
                bundle.push_str(pem.trim_end());
                bundle.push('\n');
            }
        }
        bundle
    }
}

#[cfg(test)]
mod tests;

//! When a root is made, replaced and forgotten: pure. What it decides is written to the store by `keeper`, in one step
//! that only one replica wins.
//!
//! ```text
//!            half of its life, or asked for      one leaf life, and the bundle is published      one leaf life
//!   signing ───────────────────────────────> next made ──────────────────────────────> next signs ──────────> old forgotten
//!                                            both trusted                              both trusted
//! ```
//!
//! Why no connection notices: roots come with each certificate. A certificate from before the next root was known is gone
//! one leaf life later, and only then does the next root sign: whoever meets its first certificate trusts it. The same
//! holds backwards for the old root. `slack` is added to both waits, for replicas that have not read the store yet; a
//! replica that has not for longer than that does not sign (see `keeper`).
//!
//! A root that somebody else replaced gives no notice: its predecessor's key is gone. Replicas go on signing with the
//! intermediate they hold for one leaf life (`signs_from`), while both are trusted.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What is remembered beside the root itself; `tacit.json` in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Rotation {
    /// Whether the root is one that Tacit made, and so may replace.
    pub(super) own: bool,
    /// Fingerprint of the root that this is about.
    pub(super) fingerprint: String,
    /// What must be trusted for it, in PEM.
    pub(super) anchors: String,
    /// Seconds since 1970: until then, a replica that holds an intermediate of its predecessor uses that.
    pub(super) signs_from: u64,
    /// The root that will replace it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) next: Option<Next>,
    /// Roots that signed before.
    pub(super) retired: Vec<Retired>,
    /// The latest request to rotate that was followed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) followed: Option<String>,
}

/// The root that will replace the one that signs.
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

/// A root that signed before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Retired {
    /// In PEM.
    pub(super) anchors: String,
    /// Seconds since 1970.
    pub(super) trusted_until: u64,
}

/// What the store holds, as far as it decides.
pub(super) struct Held<'a> {
    /// Fingerprint of the root found.
    pub(super) fingerprint: &'a str,
    /// Validity of the root found, in seconds since 1970.
    pub(super) not_before: u64,
    pub(super) not_after: u64,
    /// What is remembered; absent for a root that was brought and not seen before.
    pub(super) rotation: Option<&'a Rotation>,
    /// A request to rotate.
    pub(super) request: Option<&'a str>,
}

/// The waits of a rotation, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Waits {
    pub(super) leaf: u64,
    pub(super) slack: u64,
}

/// Roots trusted beside the one that signs: somebody who replaces the root more often than that within a turn leaves peers
/// behind, but a bundle that grows without end would take all of them along.
const RETIRED_MAX: usize = 8;
/// Longest that replicas may differ in what they know.
const SLACK_MAX: Duration = Duration::from_secs(600);

impl Waits {
    pub(super) fn new(leaf: Duration) -> Self {
        let slack = (leaf / 4).min(SLACK_MAX);
        Self { leaf: leaf.as_secs(), slack: slack.as_secs().max(1) }
    }

    /// After this, nobody has a certificate from before. The second more is what is lost by counting whole ones.
    fn turn(self) -> u64 {
        self.leaf + self.slack + 1
    }
}

/// What is to be written now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing.
    Keep,
    /// Take notice of a root that somebody else put there.
    Adopt,
    /// Make the next root.
    Begin,
    /// Let the next root sign.
    Promote,
    /// Trust a retired root no more.
    Forget,
}

/// What is to be written at `now`; `published` when the bundle as it should be is where agents read it.
pub(super) fn decide(held: &Held<'_>, waits: Waits, now: u64, published: bool) -> Step {
    let Some(rotation) = held.rotation.filter(|known| known.fingerprint == held.fingerprint) else {
        return Step::Adopt;
    };
    if let Some(next) = &rotation.next {
        // A clock that was set back only makes the wait longer.
        let known = now >= next.trusted_since.saturating_add(waits.turn());
        return if known && published { Step::Promote } else { Step::Keep };
    }
    if rotation.retired.iter().any(|old| now > old.trusted_until) {
        return Step::Forget;
    }
    let half = held.not_before + held.not_after.saturating_sub(held.not_before) / 2;
    let asked = held.request.is_some() && held.request != rotation.followed.as_deref();
    // One at a time: the number of roots in use stays at two.
    if rotation.own && rotation.retired.is_empty() && (now >= half || asked) {
        Step::Begin
    } else {
        Step::Keep
    }
}

impl Rotation {
    /// Of a root seen for the first time, at `now`; `before` is what was known until then.
    pub(super) fn adopt(
        own: bool,
        fingerprint: String,
        anchors: String,
        before: Option<&Self>,
        waits: Waits,
        now: u64,
    ) -> Self {
        let mut retired = before.map(|before| before.retired.clone()).unwrap_or_default();
        // Its intermediates sign for one turn more, and what they sign lives for another.
        retired.extend(before.map(|before| Retired {
            anchors: before.anchors.clone(),
            trusted_until: now + 2 * waits.turn(),
        }));
        let surplus = retired.len().saturating_sub(RETIRED_MAX);
        retired.drain(..surplus);
        let signs_from = if before.is_some() { now + waits.turn() } else { now };
        Self { own, fingerprint, anchors, signs_from, next: None, retired, followed: None }
    }

    /// With a next root, at `now`.
    pub(super) fn begin(&self, certificate: String, key: String, request: Option<&str>, now: u64) -> Self {
        let next = Some(Next { certificate, key, trusted_since: now });
        let followed = request.map(str::to_owned).or_else(|| self.followed.clone());
        Self { next, followed, ..self.clone() }
    }

    /// With the next root signing, from `now` on.
    pub(super) fn promote(&self, fingerprint: String, waits: Waits, now: u64) -> Self {
        let Some(next) = &self.next else { return self.clone() };
        let mut retired = self.retired.clone();
        retired.push(Retired { anchors: self.anchors.clone(), trusted_until: now + waits.turn() });
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

    /// Without the retired roots whose time has passed.
    pub(super) fn forget(&self, now: u64) -> Self {
        let mut left = self.clone();
        left.retired.retain(|old| now <= old.trusted_until);
        left
    }

    /// All roots to trust, in PEM: the one that signs first.
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

//! Is a flow admitted to a pod, and is it still? The pod's modes and authorization policies decide (`policy`); this asks
//! them when a flow opens and again whenever they change, and tells what they say.
//!
//! A live flow waits for changes beside its relay: it costs nothing while bytes pass. What policy no longer allows is
//! reset at both ends; what it still allows does not notice.

use std::{
    future::{Future, pending},
    sync::Arc,
};

use tacit_core::policy::{Flow, Verdict};
use tokio::sync::watch;

use crate::{
    enrol::{Pod, PodPolicy},
    telemetry::{LiveFlow, Party, Refusal, Reporter, Telemetry},
};

/// Tells of each change of a pod's policies since a flow was decided on.
pub type Changes = watch::Receiver<Arc<PodPolicy>>;

/// Why a flow is not, or no longer, admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// Stable label.
    pub label: &'static str,
    /// For people: which policy, which rule.
    pub detail: String,
}

/// Decides on a flow to `pod` and tells which audits it matched. What is returned is for [`revoked`].
///
/// # Errors
/// [`Denial`] when it is not to be.
pub fn admit(
    telemetry: &Telemetry,
    pod: &Pod,
    flow: &Flow<'_>,
    ends: impl Fn() -> (Reporter, Party, Party),
) -> Result<Changes, Denial> {
    // Marks the snapshot as seen that is decided by: a later one is not missed.
    let mut changes = pod.policy_changes();
    let policy = Arc::clone(&changes.borrow_and_update());
    for audit in policy.authorization.audits(flow) {
        let (reporter, source, destination) = ends();
        let detail = audit.to_string();
        telemetry.audited(&Refusal { reporter, source, destination, reason: "audited", detail });
    }
    verdict(&policy, flow).map(|()| changes)
}

fn verdict(policy: &PodPolicy, flow: &Flow<'_>) -> Result<(), Denial> {
    match policy.decide(flow) {
        Verdict::Allow => Ok(()),
        Verdict::Deny(reason) => Err(Denial { label: reason.label(), detail: reason.to_string() }),
    }
}

/// Waits until policy no longer allows a flow that was admitted. `flow` tells it when it is needed.
#[expect(
    clippy::manual_async_fn,
    reason = "an async fn keeps its arguments twice, and waiting flows are many"
)]
pub fn revoked<'a>(
    pod: &'a Pod,
    flow: impl Fn() -> Flow<'a> + Send + 'a,
    mut changes: Changes,
) -> impl Future<Output = Denial> + Send + 'a {
    async move {
        while changes.changed().await.is_ok() {
            if let Err(denial) = verdict(&pod.policy(), &flow()) {
                return denial;
            }
        }
        pending().await
    }
}

/// Ends a flow that policy no longer allows; its sockets were reset by then.
pub fn revoke(telemetry: &Telemetry, live: LiveFlow, denial: Denial) {
    let spec = live.spec();
    telemetry.revoked(&Refusal {
        reporter: spec.reporter,
        source: spec.source.clone(),
        destination: spec.destination.clone(),
        reason: denial.label,
        detail: denial.detail,
    });
    live.close("revoked");
}

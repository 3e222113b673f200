//! Is a flow admitted to a pod, and is it still? The pod's modes and authorization policies decide (`policy`); this asks
//! them when a flow opens and again whenever they change, and tells what they say.
//!
//! A live flow waits for changes beside its relay: it costs nothing while bytes pass. What policy no longer allows is
//! reset at both ends; what it still allows does not notice.

use std::{
    future::{Future, pending},
    sync::Arc,
};

use tacit_core::{
    policy::{Authorization, Flow, Verdict, decide},
    refusal::Refusal,
};
use tokio::sync::watch;

use crate::{
    enrol::Pod,
    telemetry::{Ends, LiveFlow, Telemetry},
};

/// Tells of each change of a pod's policies since a flow was decided on.
pub type Changes = watch::Receiver<Arc<Authorization>>;

/// Decides on a flow to `pod` and tells which audits it matched. What is returned is for [`revoked`].
///
/// # Errors
/// [`Refusal`] if policy does not admit the flow.
pub fn admit(
    telemetry: &Telemetry,
    pod: &Pod,
    flow: &Flow<'_>,
    ends: impl Fn() -> Ends,
) -> Result<Changes, Refusal> {
    // Before the decision: a change that comes meanwhile is not missed.
    let changes = pod.policy_changes();
    for audit in pod.authorization().audits(flow) {
        telemetry.audited(&ends(), &audit.to_string());
    }
    verdict(pod, flow).map(|()| changes)
}

fn verdict(pod: &Pod, flow: &Flow<'_>) -> Result<(), Refusal> {
    match decide(&pod.modes.load(), &pod.authorization(), flow) {
        Verdict::Allow => Ok(()),
        Verdict::Deny(denial) => Err(Refusal::new(denial.reason(), denial)),
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
) -> impl Future<Output = Refusal> + Send + 'a {
    async move {
        while changes.changed().await.is_ok() {
            if let Err(refusal) = verdict(pod, &flow()) {
                return refusal;
            }
        }
        pending().await
    }
}

/// Ends a flow that policy no longer allows; its sockets were reset by then.
pub fn revoke(telemetry: &Telemetry, live: LiveFlow, refusal: &Refusal) {
    telemetry.revoked(&live.spec().ends, refusal);
    live.close("revoked");
}

//! Admission of a flow to a pod. The pod's modes and authorization policies decide (`policy`), when a flow opens and again
//! whenever they change.
//!
//! A live flow waits for changes beside its relay: it costs nothing while bytes pass. What policy no longer allows is
//! reset at both ends; what it still allows does not notice.

use std::{
    future::{Future, pending},
    sync::Arc,
};

use tacit_core::{
    policy::{Flow, PolicyVerdict},
    refusal::Refusal,
};
use tokio::sync::watch;

use crate::{
    enrol::{Pod, PodPolicy},
    telemetry::{Ends, LiveFlow, Telemetry},
};

/// A flow that policy admits to a pod. It keeps the proof that the flow arrived with for every later decision.
#[derive(Debug)]
pub struct Admitted {
    flow: Flow,
    /// Changes of the pod's policy since the decision.
    changes: watch::Receiver<Arc<PodPolicy>>,
}

/// Decides on a flow to `pod`, and reports the audits that it matches.
///
/// # Errors
/// [`Refusal`] if policy does not admit the flow.
pub fn admit(telemetry: &Telemetry, pod: &Pod, flow: Flow, ends: &Ends) -> Result<Admitted, Refusal> {
    // Marks the snapshot as seen that is decided by: a later one is not missed.
    let mut changes = pod.policy_changes();
    let policy = Arc::clone(&changes.borrow_and_update());
    for audit in policy.authorization.audits(&flow) {
        telemetry.audited(ends, &audit.to_string());
    }
    verdict(&policy, &flow)?;
    Ok(Admitted { flow, changes })
}

fn verdict(policy: &PodPolicy, flow: &Flow) -> Result<(), Refusal> {
    match policy.decide(flow) {
        PolicyVerdict::Allow => Ok(()),
        PolicyVerdict::Deny(denial) => {
            let source = flow.source.identity().cloned();
            Err(Refusal { source, ..Refusal::new(denial.reason(), denial) })
        }
    }
}

impl Admitted {
    /// Waits until the policy of `pod` no longer allows the flow.
    #[expect(
        clippy::manual_async_fn,
        reason = "an async fn keeps its arguments twice, and waiting flows are many"
    )]
    pub fn revoked(mut self, pod: &Pod) -> impl Future<Output = Refusal> + Send {
        async move {
            while self.changes.changed().await.is_ok() {
                if let Err(refusal) = verdict(&pod.policy(), &self.flow) {
                    return refusal;
                }
            }
            pending().await
        }
    }
}

/// Ends a flow that policy no longer allows; its sockets were reset by then.
pub fn revoke(telemetry: &Telemetry, live: LiveFlow, refusal: &Refusal) {
    telemetry.revoked(&live.spec().ends, refusal);
    live.close("revoked");
}

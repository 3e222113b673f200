//! Admission of a flow to a pod. The pod's modes and authorization policies decide (`policy`), when a flow opens and again
//! whenever they change.
//!
//! A live flow is decided on again by `recheck`: it costs its worker nothing while policy allows it. What policy no longer
//! allows is reset at both ends.

use std::sync::Arc;

use tacit_core::{
    policy::{Flow, PolicyVerdict},
    refusal::Refusal,
};

use crate::{
    enrol::{Pod, PodPolicy},
    recheck::{Depends, Rechecks, Revoked},
    telemetry::{Ends, LiveFlow, Telemetry},
};

/// A flow that policy admits to a pod. It keeps the proof that the flow arrived with for every later decision.
#[derive(Debug)]
pub struct Admitted {
    flow: Flow,
}

/// Decides on a flow to `pod`, and reports the audits that it matches.
///
/// # Errors
/// [`Refusal`] if policy does not admit the flow.
pub fn admit(telemetry: &Telemetry, pod: &Pod, flow: Flow, ends: &Ends) -> Result<Admitted, Refusal> {
    let policy = pod.policy();
    for audit in policy.authorization.audits(&flow) {
        telemetry.audited(ends, &audit.to_string());
    }
    verdict(&policy, &flow)?;
    Ok(Admitted { flow })
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
    /// Waits until the policy of `pod` no longer allows the flow. The policy may have changed since the flow was admitted.
    pub fn revoked(self, rechecks: &Arc<Rechecks>, pod: &Pod) -> Revoked {
        let (policy, flow) = (pod.policy_in_force(), self.flow);
        rechecks.revoked(pod.cgroup, Depends::OnPolicy, move || verdict(&policy.load(), &flow).err())
    }
}

/// Ends a flow that policy no longer allows; its sockets were reset by then.
pub fn revoke(telemetry: &Telemetry, live: LiveFlow, refusal: &Refusal) {
    telemetry.revoked(&live.spec().ends, refusal);
    live.close("revoked");
}

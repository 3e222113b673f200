//! Admission of a flow to a pod. The pod's modes and authorization policies decide (`policy`), when a flow opens and again
//! whenever they change.
//!
//! A live flow is decided on again by `recheck`: it costs its worker nothing while policy allows it. What policy no longer
//! allows is reset at both ends.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::SystemTime,
};

use tacit_core::{
    policy::{Flow, FlowSource, PolicyVerdict},
    refusal::{Refusal, RefusalReason},
};

use tacit_identity::peer_trust::{Distrust, PeerChain};

use crate::{
    enrol::{Pod, PodPolicy},
    proxy::not_connected,
    recheck::{Depends, Rechecks, Revoked},
    telemetry::{Ends, LiveFlow, Telemetry},
};

/// A flow that policy admits to a pod. It keeps the proof that the flow arrived with for every later decision.
#[derive(Debug)]
pub struct Admitted {
    flow: Flow,
    /// The certificates that prove it. Empty if none does.
    chain: PeerChain,
    /// The policy that allowed it.
    by: Arc<PodPolicy>,
}

/// Decides on a flow to `pod`, which `chain` proves, and reports the audits that it matches.
///
/// # Errors
/// [`Refusal`] if policy does not admit the flow.
pub fn admit(
    telemetry: &Telemetry,
    pod: &Pod,
    (flow, chain): (Flow, PeerChain),
    ends: &Ends,
) -> Result<Admitted, Refusal> {
    let policy = pod.policy();
    for audit in policy.authorization.audits(&flow) {
        telemetry.audited(ends, &audit.to_string());
    }
    verdict(&policy, &flow)?;
    Ok(Admitted { flow, chain, by: policy })
}

/// Returns the reason for which peers must reach a destination in `pod` as plaintext, if they must and its mode and policies admit
/// that.
pub fn plaintext_alone(pod: &Pod, client: IpAddr, destination: SocketAddr) -> Option<&'static str> {
    if !pod.rewrites_arrivals() {
        return None;
    }
    let flow = Flow { source: FlowSource::Plaintext, client, destination };
    let is_admitted = pod.policy().decide(&flow) == PolicyVerdict::Allow;
    is_admitted.then_some("rules of the pod rewrite what arrives")
}

/// Returns the refusal of a flow to an application of `pod` that could not be connected to.
pub fn not_delivered(pod: &Pod, error: &io::Error) -> Refusal {
    let refusal = not_connected(error);
    if refusal.reason == RefusalReason::ConnectionRefused && pod.rewrites_arrivals() {
        let detail =
            "nobody listens there in the pod itself, and the pod's own rules do not run for a tunnel";
        return Refusal::new(RefusalReason::OwnRules, detail);
    }
    refusal
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
    /// Waits until the policy of `pod` no longer allows the flow, or a certificate that proves it is revoked. Either may have changed
    /// since the flow was admitted.
    pub fn revoked(self, rechecks: &Arc<Rechecks>, pod: &Pod) -> Revoked {
        let Self { flow, chain, by } = self;
        let in_force = pod.policy_in_force();
        let is_decided = || Arc::ptr_eq(&in_force.load(), &by) && chain.revoked(SystemTime::now()).is_none();
        let check = {
            let (in_force, chain) = (Arc::clone(&in_force), chain.clone());
            move || revoked_peer(&chain, &flow).or_else(|| verdict(&in_force.load(), &flow).err())
        };
        rechecks.revoked((pod.cgroup, Depends::OnPolicy), is_decided, check)
    }
}

/// Returns the refusal of a peer that is not trusted any more.
pub fn untrusted(found: &Distrust) -> Refusal {
    Refusal::new(found.reason(), found)
}

fn revoked_peer(chain: &PeerChain, flow: &Flow) -> Option<Refusal> {
    let revoked = chain.revoked(SystemTime::now())?;
    Some(Refusal { source: flow.source.identity().cloned(), ..untrusted(&revoked) })
}

/// Waits until a peer of `pod` is not trusted any more, which may have happened before. For ever if nothing can end the trust.
pub async fn peer_revoked(rechecks: &Arc<Rechecks>, pod: &Pod, chain: &PeerChain) -> Refusal {
    if chain.is_unchecked() {
        return std::future::pending().await;
    }
    let chain = chain.clone();
    let check = move || chain.revoked(SystemTime::now()).map(|revoked| untrusted(&revoked));
    rechecks.revoked((pod.cgroup, Depends::OnTrust), || false, check).await
}

/// Ends a flow that policy no longer allows; its sockets were reset by then.
pub fn revoke(telemetry: &Telemetry, live: LiveFlow, refusal: &Refusal) {
    telemetry.revoked(&live.spec().ends, refusal);
    live.close("revoked");
}

//! The policy in force for one pod: modes and authorization, replaced as one.
//!
//! A flow that opens and a flow that is decided on again read one snapshot. No decision mixes the modes of one version
//! with the authorization of another. Pure: no I/O, no clock, no logging.

use tacit_core::{
    directory::Workload,
    policy::{self, Authorization, Flow, Mode, Modes, Policies, Verdict},
};

/// The policy in force for a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodPolicy {
    /// The modes that inbound plaintext meets.
    pub modes: Modes,
    /// The authorization policies that select the pod.
    pub authorization: Authorization,
    /// Why the configured policy is not in force: its namespace exceeds its share, or the kernel rejected it. All ports are
    /// STRICT then.
    pub not_applied: Option<String>,
}

impl PodPolicy {
    /// Returns the policy that `policies` configures for `workload`.
    #[must_use]
    pub fn configured(policies: &Policies, workload: &Workload) -> Self {
        Self {
            modes: policies.modes(workload),
            authorization: policies.authorization(workload),
            not_applied: policies.why_not_applied(&workload.namespace).map(str::to_owned),
        }
    }

    /// Returns what holds instead of this policy after the kernel rejected it: STRICT at all ports, with the configured
    /// authorization. Nothing is admitted that this policy denies.
    #[must_use]
    pub fn fail_closed(self, error: String) -> Self {
        let modes = Modes { default: Mode::Strict, ports: std::collections::BTreeMap::new() };
        Self { modes, not_applied: Some(error), ..self }
    }

    /// Returns true if the agent has to see plaintext that the mode admits, because the kernel cannot decide on it.
    #[must_use]
    pub fn authorizes_plaintext(&self) -> bool {
        !self.authorization.is_empty() || self.not_applied.is_some()
    }

    /// Returns the verdict on a flow to the pod.
    #[must_use]
    pub fn decide(&self, flow: &Flow) -> Verdict<'_> {
        policy::decide(&self.modes, &self.authorization, flow)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tacit_core::policy::{FlowSource, PolicyDenial};

    use super::*;
    use crate::enrol::testing::workload;

    const POLICIES: &str = "\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: ports, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  mtls: {mode: PERMISSIVE}
  portLevelMtls: {8080: {mode: DISABLE}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: api-only, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/api]}}]
";

    fn configured(text: &str) -> PodPolicy {
        let policies = Policies::parse(text, Path::new("policy.yaml"), "istio-system").expect("valid");
        let mut web = workload("web", &["10.77.1.2"]);
        web.labels = [("app", "web")].into_iter().collect();
        PodPolicy::configured(&policies, &web)
    }

    fn plaintext(port: u16) -> Flow {
        let client = [10, 77, 2, 9].into();
        Flow { source: FlowSource::Plaintext, client, destination: ([10, 77, 1, 2], port).into() }
    }

    #[test]
    fn a_policy_that_the_kernel_rejects_denies_plaintext_at_all_ports() {
        let open = configured("");
        assert_eq!(open.decide(&plaintext(80)), Verdict::Allow);
        assert!(!open.authorizes_plaintext());
        for text in ["", POLICIES] {
            let closed = configured(text).fail_closed("map full".to_owned());
            for port in [80, 8080] {
                assert_eq!(closed.decide(&plaintext(port)), Verdict::Deny(PolicyDenial::PlaintextInStrict));
            }
            assert!(closed.authorizes_plaintext());
            assert_eq!(closed.not_applied.as_deref(), Some("map full"));
        }
    }

    #[test]
    fn a_policy_that_the_kernel_rejects_keeps_its_authorization() {
        let closed = configured(POLICIES).fail_closed("map full".to_owned());
        let identities = ["api", "web"].map(|account| workload(account, &[]).identity);
        let allowed = identities.each_ref().map(|identity| {
            let flow = Flow { source: FlowSource::Tunnel(identity.clone()), ..plaintext(80) };
            closed.decide(&flow) == Verdict::Allow
        });
        assert_eq!(allowed, [true, false]);
    }
}

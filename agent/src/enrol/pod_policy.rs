//! The policy in force for one pod: modes and authorization, replaced as one.
//!
//! A flow that opens and a flow that is decided on again read one snapshot. No decision mixes the modes of one version
//! with the authorization of another. Pure: no I/O, no clock, no logging.

use tacit_core::{
    directory::{Egress, Udp, Workload},
    policy::{self, Authorization, Flow, Mode, Modes, Policies, PolicyVerdict},
};
use tacit_kernel::PlaintextEgress;

/// The policy in force for a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodPolicy {
    /// The modes that inbound plaintext meets.
    pub modes: Modes,
    /// The authorization policies that select the pod.
    pub authorization: Authorization,
    /// The reason for which the configured policy is not in force: its namespace or the pod exceeds a share, or the kernel rejected
    /// the policy. All ports are STRICT then.
    pub not_applied: Option<String>,
}

/// Ports of one pod that can have a mode of their own. The kernel's table has room for as many of every pod.
const PORT_MODES_MAX: usize = tacit_abi::limits::PORT_MODES_PER_POD as usize;

impl PodPolicy {
    /// Returns the policy that `policies` configures for `workload`. A policy that needs more than the pod's share of the
    /// kernel's table is replaced by [`PodPolicy::fail_closed`].
    #[must_use]
    pub fn configured(policies: &Policies, workload: &Workload) -> Self {
        let configured = Self {
            modes: policies.modes(workload),
            authorization: policies.authorization(workload),
            not_applied: policies.why_not_applied(&workload.namespace).map(str::to_owned),
        };
        match configured.modes.exceptions().count() {
            0..=PORT_MODES_MAX => configured,
            ports => configured.fail_closed(format!(
                "{ports} ports have a mode that differs from the pod's, a pod can have {PORT_MODES_MAX}: remove ports from portLevelMtls"
            )),
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
    pub fn decide(&self, flow: &Flow) -> PolicyVerdict<'_> {
        policy::decide(&self.modes, &self.authorization, flow)
    }

    /// Returns the plaintext that `workload` may send into the mesh: as its entry says, else by its mode.
    #[must_use]
    pub fn plaintext_egress(&self, workload: &Workload) -> PlaintextEgress {
        let is_strict = self.modes.default == Mode::Strict;
        let default = if is_strict { Egress::Strict } else { Egress::Open };
        let egress = workload.egress.unwrap_or(default);
        let default = if is_strict || egress == Egress::Strict { Udp::Deny } else { Udp::Allow };
        match (egress, workload.udp.unwrap_or(default)) {
            (Egress::Strict, Udp::Deny) => PlaintextEgress::Nothing,
            (Egress::Strict, Udp::Allow) => PlaintextEgress::Udp,
            (Egress::Open, Udp::Deny) => PlaintextEgress::AllButUdp,
            (Egress::Open, Udp::Allow) => PlaintextEgress::All,
        }
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

    #[test]
    fn a_policy_with_more_ports_than_a_pods_share_is_strict_and_does_not_change_others() {
        let ports = |count: usize, mode: &str| {
            let all: Vec<_> = (1..=count).map(|port| format!("{port}: {{mode: {mode}}}")).collect();
            format!(
                "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: ports, namespace: shop}}\n\
                 spec: {{selector: {{matchLabels: {{app: web}}}}, portLevelMtls: {{{}}}}}\n",
                all.join(", ")
            )
        };
        for (count, mode, is_applied) in [
            (PORT_MODES_MAX, "DISABLE", true),
            (PORT_MODES_MAX + 1, "DISABLE", false),
            (16_384, "DISABLE", false),
            (65_535, "DISABLE", false),
            // These ports say nothing of their own.
            (16_384, "PERMISSIVE", true),
        ] {
            let policy = configured(&ports(count, mode));
            assert_eq!(policy.not_applied.is_none(), is_applied, "{count} {mode}");
            if is_applied {
                assert_eq!(policy.decide(&plaintext(1)), PolicyVerdict::Allow, "{count} {mode}");
                continue;
            }
            assert!(policy.authorizes_plaintext() && policy.modes.ports.is_empty(), "{count}");
            for port in [1, 65_535] {
                assert_eq!(
                    policy.decide(&plaintext(port)),
                    PolicyVerdict::Deny(PolicyDenial::PlaintextInStrict)
                );
            }
        }
        let policies = Policies::parse(&ports(16_384, "DISABLE"), Path::new("policy.yaml"), "istio-system");
        let victim = Workload { namespace: "bank".into(), ..workload("web", &["10.77.1.3"]) };
        assert_eq!(
            PodPolicy::configured(&policies.expect("valid"), &victim),
            PodPolicy::configured(&Policies::default(), &victim)
        );
    }

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
        assert_eq!(open.decide(&plaintext(80)), PolicyVerdict::Allow);
        assert!(!open.authorizes_plaintext());
        for text in ["", POLICIES] {
            let closed = configured(text).fail_closed("map full".to_owned());
            for port in [80, 8080] {
                assert_eq!(
                    closed.decide(&plaintext(port)),
                    PolicyVerdict::Deny(PolicyDenial::PlaintextInStrict)
                );
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
            closed.decide(&flow) == PolicyVerdict::Allow
        });
        assert_eq!(allowed, [true, false]);
    }
}

//! A workload for the tests of policies.

use tacit_core::{
    directory::{Protocol, Workload},
    spiffe::{SpiffeId, TrustDomain},
};

/// Returns the pod `web` of `namespace` with these labels.
pub(super) fn workload(namespace: &str, labels: &[(&str, &str)]) -> Workload {
    let trust_domain = TrustDomain::parse("cluster.local").expect("valid");
    Workload {
        name: "web".into(),
        namespace: namespace.into(),
        identity: SpiffeId::new(&trust_domain, namespace, "web").expect("valid"),
        addresses: Vec::new(),
        node: "a".into(),
        labels: labels.iter().copied().collect(),
        cgroup: "web".into(),
        protocol: Protocol::Tacit,
        egress: None,
        udp: None,
        connect: Default::default(),
    }
}

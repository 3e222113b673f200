//! A workload for the unit tests of enrolment.

use tacit_core::{
    directory::{Labels, Protocol, Workload},
    spiffe::{SpiffeId, TrustDomain},
};

/// Returns a workload of node `a` with the service account `account`, in the cgroup `burstable/pod1`.
pub(super) fn workload(account: &str, addresses: &[&str]) -> Workload {
    let trust_domain = TrustDomain::parse("cluster.local").expect("valid");
    Workload {
        name: "web".into(),
        namespace: "shop".into(),
        identity: SpiffeId::new(&trust_domain, "shop", account).expect("valid"),
        addresses: addresses.iter().map(|text| text.parse().expect("an address")).collect(),
        node: "a".into(),
        labels: Labels::default(),
        cgroup: "burstable/pod1".into(),
        protocol: Protocol::Tacit,
        egress: None,
        udp: None,
        connect: Default::default(),
    }
}

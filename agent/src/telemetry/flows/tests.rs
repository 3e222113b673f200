//! The flow and the workloads that the tests around use.

use std::path::PathBuf;

use tacit_core::{directory::Protocol, spiffe::TrustDomain};

use super::*;

pub(in crate::telemetry) fn workload(name: &str) -> Workload {
    let trust_domain = TrustDomain::parse("cluster.local").expect("valid");
    Workload {
        name: name.into(),
        namespace: "shop".into(),
        identity: SpiffeId::new(&trust_domain, "shop", name).expect("valid"),
        addresses: vec![[10, 77, 1, 2].into()],
        node: "a".into(),
        labels: tacit_core::directory::Labels::default(),
        cgroup: PathBuf::from(format!("shop_{name}")),
        protocol: Protocol::Tacit,
        egress: None,
        udp: None,
        connect: Default::default(),
    }
}

/// `web` to `api`, as the agent of `web` sees it.
pub(in crate::telemetry) fn spec(security: Security) -> FlowSpec {
    FlowSpec { ends: ends(Reporter::Source), security, trace: [0xab; 16] }
}

/// `web` and `api`, as seen by the agent of `reporter`.
pub(in crate::telemetry) fn ends(reporter: Reporter) -> Ends {
    Ends { reporter, source: party("web", "10.77.1.2:40000"), destination: party("api", "10.77.2.3:80") }
}

pub(in crate::telemetry) fn party(name: &str, address: &str) -> Party {
    let workload = Arc::new(workload(name));
    let identity = Some(workload.identity.clone());
    Party { address: address.parse().expect("valid"), workload: Some(workload), identity }
}

pub(in crate::telemetry) fn mutual_tls() -> Security {
    Security::MutualTls {
        version: "TLSv1.3",
        cipher: "TLS13_AES_256_GCM_SHA384",
        key_exchange: "X25519MLKEM768",
        alpn: "tacit/1.1",
    }
}

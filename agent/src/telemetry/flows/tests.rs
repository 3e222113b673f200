//! Tests of live flows, and the flow and workloads that the tests around use.

use std::path::PathBuf;

use tacit_core::{directory::Protocol, spiffe::TrustDomain};

use super::*;

#[test]
fn bytes_of_a_live_flow_show_at_each_scrape_and_once_only() {
    let table = Arc::new(FlowTable::default());
    let now = Instant::now();
    let flow = FlowTable::open(&table, spec(mutual_tls()), now);
    let bytes = || table.totals(now).0.iter().map(|s| (s.sent_bytes, s.received_bytes)).collect::<Vec<_>>();

    flow.counters().sent.fetch_add(100, Ordering::Relaxed);
    assert_eq!(bytes(), [(100, 0)]);
    assert_eq!(bytes(), [(100, 0)], "a second scrape adds nothing");
    flow.counters().received.fetch_add(7, Ordering::Relaxed);
    flow.counters().sent.fetch_add(1, Ordering::Relaxed);
    flow.close("clean");
    assert_eq!(bytes(), [(101, 7)]);
}

#[test]
fn a_flow_dropped_without_a_word_is_closed() {
    let table = Arc::new(FlowTable::default());
    let now = Instant::now();
    drop(FlowTable::open(&table, spec(Security::SameNode), now));
    let (series, _) = table.totals(now);
    assert_eq!((series[0].opened, series[0].closed), (1, 1));
    assert_eq!(table.status(now).live, 0);
}

#[test]
fn scrapes_at_the_same_time_count_every_byte_once() {
    const BYTES: u64 = 20_000;
    let table = Arc::new(FlowTable::default());
    let flow = FlowTable::open(&table, spec(mutual_tls()), Instant::now());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..200).for_each(|_| drop(table.totals(Instant::now()))));
        }
        for _ in 0..BYTES {
            flow.counters().sent.fetch_add(1, Ordering::Relaxed);
        }
    });
    drop(flow);
    assert_eq!(table.totals(Instant::now()).0[0].sent_bytes, BYTES);
}

#[test]
fn the_list_is_bounded_and_starts_with_the_newest() {
    let table = Arc::new(FlowTable::default());
    let now = Instant::now();
    let mut flows: Vec<_> =
        (0..=FLOWS_LISTED_MAX).map(|_| FlowTable::open(&table, spec(Security::Plaintext), now)).collect();
    flows.push(FlowTable::open(&table, spec(mutual_tls()), now));
    let status = table.status(now);
    assert_eq!((status.live, status.list.len()), (FLOWS_LISTED_MAX as u64 + 2, FLOWS_LISTED_MAX));
    assert_eq!(status.list[0].security, "mutual_tls");
    assert_eq!(status.list[0].trace.as_deref(), Some("abababababababababababababababab"));
}

#[test]
fn a_flow_in_clear_is_reported_without_identities() {
    let table = Arc::new(FlowTable::default());
    let flow = FlowTable::open(&table, spec(Security::Plaintext), Instant::now());
    let ends = &flow.spec().ends;
    assert!(ends.source.identity.is_none() && ends.destination.identity.is_none());
}

#[test]
fn live_flows_are_counted_for_the_pods_that_are_here() {
    let table = Arc::new(FlowTable::default());
    let inbound = FlowSpec { ends: ends(Reporter::Destination), ..spec(mutual_tls()) };
    let _flows = [spec(mutual_tls()), spec(Security::SameNode), inbound]
        .map(|spec| FlowTable::open(&table, spec, Instant::now()));
    let counts: Vec<_> =
        table.live_by_pod().into_iter().map(|((_, name), flows)| (name.to_string(), flows)).collect();
    assert_eq!(counts, [("api".to_owned(), 2), ("web".to_owned(), 2)]);
}

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
    }
}

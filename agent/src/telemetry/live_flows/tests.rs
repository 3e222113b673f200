//! Tests of the table of live flows.

use super::*;
use crate::telemetry::flows::{
    Reporter,
    tests::{mutual_tls, spec},
};

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
    assert!(flow.spec().source.identity.is_none() && flow.spec().destination.identity.is_none());
}

#[test]
fn live_flows_are_counted_for_the_pods_that_are_here() {
    let table = Arc::new(FlowTable::default());
    let inbound = FlowSpec { reporter: Reporter::Destination, ..spec(mutual_tls()) };
    let _flows = [spec(mutual_tls()), spec(Security::SameNode), inbound]
        .map(|spec| FlowTable::open(&table, spec, Instant::now()));
    let counts: Vec<_> =
        table.live_by_pod().into_iter().map(|((_, name), flows)| (name.to_string(), flows)).collect();
    assert_eq!(counts, [("api".to_owned(), 2), ("web".to_owned(), 2)]);
}

//! Tests of the table of series: what is one series, and what its bound does.

use super::*;
use crate::telemetry::flows::tests::workload;

#[test]
fn a_reloaded_directory_continues_the_series() {
    let mut series = Series::default();
    let now = Instant::now();
    let before = series.pair(traffic("web", &[]), now);
    let after = series.pair(traffic("web", &[]), now);
    let other = series.pair(traffic("web", &[("version", "v2")]), now);
    assert!(Arc::ptr_eq(&before, &after), "same labels, other Arc<Workload>");
    assert!(!Arc::ptr_eq(&before, &other), "another revision is another series");
}

#[test]
fn canonical_names_follow_istio() {
    for (labels, service, revision) in [
        (&[][..], "web-1", "latest"),
        (&[("app", "a")], "a", "latest"),
        (&[("app", "a"), ("app.kubernetes.io/name", "b"), ("version", "v1")], "b", "v1"),
        (&[("app.kubernetes.io/name", "b"), ("service.istio.io/canonical-name", "c")], "c", "latest"),
        (&[("app.kubernetes.io/version", "v2"), ("version", "v1")], "web-1", "v2"),
        (&[("service.istio.io/canonical-revision", "v3"), ("version", "v1")], "web-1", "v3"),
    ] {
        let workload = labelled("web-1", labels);
        assert_eq!((canonical_service(&workload), canonical_revision(&workload)), (service, revision));
    }
}

#[test]
fn a_full_table_forgets_idle_series_only_and_counts_the_rest() {
    let mut series = Series::default();
    let start = Instant::now();
    let live = series.pair(traffic("live", &[]), start);
    for n in 1..SERIES_MAX {
        series.pair(traffic(&format!("w{n}"), &[]), start);
    }
    let refused = series.pair(traffic("new", &[]), start);
    assert_eq!((series.overflowed(), series.entries.len()), (1, SERIES_MAX + 1));
    assert!(Arc::ptr_eq(&refused, &series.pair(traffic("newer", &[]), start)), "one series for the overflow");
    drop(refused);

    series.pair(traffic("newest", &[]), start + SERIES_IDLE + SWEEP_PAUSE);
    assert_eq!((series.overflowed(), series.entries.len()), (2, 3), "live, newest and the overflow");
    assert!(Arc::ptr_eq(&live, &series.pair(traffic("live", &[]), start)), "a live flow keeps its series");
}

fn traffic(source: &str, labels: &[(&str, &str)]) -> Traffic {
    let source = End { workload: Some(Arc::new(labelled(source, labels))), identity: None };
    Traffic {
        reporter: Reporter::Source,
        source,
        destination: End::NOBODY,
        policy: SecurityPolicy::MutualTls,
    }
}

fn labelled(name: &str, labels: &[(&str, &str)]) -> Workload {
    Workload { labels: labels.iter().copied().collect(), ..workload(name) }
}

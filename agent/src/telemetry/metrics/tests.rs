//! Tests of the exposition: names, labels and values as a scraper sees them.

use std::{sync::atomic::Ordering, time::Duration};

use tacit_core::refusal::{Refusal, RefusalReason};

use crate::telemetry::{
    Telemetry,
    flows::tests::{ends, mutual_tls, spec},
    flows::{Reporter, Security},
    status::tests::sample,
};

const WEB_TO_API: &str = concat!(
    r#"reporter="source",source_workload="web",source_canonical_service="web",source_canonical_revision="latest","#,
    r#"source_workload_namespace="shop",source_principal="spiffe://cluster.local/ns/shop/sa/web","#,
    r#"source_app="web",source_version="latest",source_cluster="unknown",destination_service="unknown","#,
    r#"destination_service_namespace="unknown",destination_service_name="unknown",destination_workload="api","#,
    r#"destination_canonical_service="api",destination_canonical_revision="latest","#,
    r#"destination_workload_namespace="shop",destination_principal="spiffe://cluster.local/ns/shop/sa/api","#,
    r#"destination_app="api",destination_version="latest",destination_cluster="unknown",request_protocol="tcp","#,
    r#"response_flags="-",connection_security_policy="mutual_tls""#
);

#[test]
fn a_flow_has_istios_names_labels_and_direction() {
    let telemetry = Telemetry::new();
    let flow = telemetry.open_flow(spec(mutual_tls()));
    flow.counters().sent.fetch_add(100, Ordering::Relaxed);
    flow.counters().received.fetch_add(7, Ordering::Relaxed);
    for (name, value) in [
        ("istio_tcp_connections_opened_total", 1),
        ("istio_tcp_connections_closed_total", 0),
        ("istio_tcp_received_bytes_total", 100),
        ("istio_tcp_sent_bytes_total", 7),
    ] {
        has(&telemetry, &format!("{name}{{{WEB_TO_API}}} {value}"));
    }
    flow.close("clean");
    has(&telemetry, &format!("istio_tcp_connections_closed_total{{{WEB_TO_API}}} 1"));
}

#[test]
fn a_flow_in_clear_names_no_principal() {
    let telemetry = Telemetry::new();
    drop(telemetry.open_flow(spec(Security::Plaintext)));
    let text = telemetry.metrics_text(sample()).expect("encodes");
    assert!(text.contains(r#"source_principal="unknown""#) && !text.contains("ns/shop/sa/web\",source_app"));
    assert!(text.contains(r#"connection_security_policy="unknown""#), "{text}");
}

#[test]
fn what_the_status_knows_is_exposed() {
    let telemetry = Telemetry::new();
    telemetry.refused(&ends(Reporter::Destination), &Refusal::new(RefusalReason::PlaintextInStrict, ""));
    telemetry.revoked(&ends(Reporter::Source), &Refusal::new(RefusalReason::DeniedByPolicy, ""));
    telemetry.audited(&ends(Reporter::Destination), "AUDIT policy shop/all");
    [4, 50, 51, 9000].map(Duration::from_millis).iter().for_each(|took| telemetry.enrolled(*took));
    for line in [
        r#"tacit_connections_refused_total{reporter="destination",reason="plaintext_in_strict"} 1"#,
        r#"tacit_connections_revoked_total{reporter="source",reason="denied_by_policy"} 1"#,
        r#"tacit_connections_audited_total{reporter="destination"} 1"#,
        r#"tacit_build_info{version="0.1.0"} 1"#,
        "tacit_pods_enrolled 1",
        "tacit_pods_waiting 1",
        "tacit_unnamed_pods{state=\"held\"} 2",
        "tacit_unnamed_pods{state=\"left_alone\"} 1",
        "tacit_node_state_unusable{operation=\"read\"} 0",
        "tacit_node_state_unusable{operation=\"write\"} 1",
        "tacit_flows_live 1200",
        "tacit_flows_opening 2",
        "tacit_pool_idle_sessions 5",
        r#"tacit_share_used{resource="connections",scope="total"} 64"#,
        r#"tacit_share_used{resource="connections",scope="holder"} 64"#,
        r#"tacit_share_limit{resource="connections",scope="total"} 90"#,
        r#"tacit_share_limit{resource="connections",scope="holder"} 64"#,
        r#"tacit_share_refused_total{resource="handshakes"} 7"#,
        r#"tacit_kernel_verdicts_total{reason="deny_stale_agent"} 3"#,
        r#"tacit_kernel_exceptions_total{exception="allow_clear",hook="egress"} 9"#,
        r#"tacit_certificate_expiry_timestamp_seconds{identity="spiffe://cluster.local/ns/shop/sa/web"} 1767323045"#,
        r#"tacit_certificate_last_renewal_timestamp_seconds{identity="spiffe://cluster.local/ns/shop/sa/web"} 1767236645"#,
        r#"tacit_certificate_renewal_failures_total{identity="spiffe://cluster.local/ns/shop/sa/api"} 1"#,
        r#"tacit_config_reloads_total{source="policy",result="loaded"} 2"#,
        r#"tacit_config_reloads_total{source="policy",result="refused"} 1"#,
        r#"tacit_config_stale_seconds{source="policy"} 61"#,
        r#"tacit_enrolment_seconds_bucket{le="0.005"} 1"#,
        r#"tacit_enrolment_seconds_bucket{le="0.05"} 2"#,
        r#"tacit_enrolment_seconds_bucket{le="5.0"} 3"#,
        r#"tacit_enrolment_seconds_bucket{le="+Inf"} 4"#,
        "tacit_enrolment_seconds_count 4",
        "tacit_enrolment_seconds_sum 9.105",
        "tacit_flow_series_overflowed_total 0",
        "tacit_log_lines_lost_total 0",
        "tacit_mesh_ranges{origin=\"configured\"} 1",
        "tacit_mesh_ranges{origin=\"detected\"} 2",
        "tacit_nodes_not_applied{kind=\"addresses\"} 0",
        "tacit_nodes_not_applied{kind=\"ports\"} 1",
        "tacit_mesh_uncovered{kind=\"pod\"} 0",
        "tacit_mesh_uncovered{kind=\"service\"} 1",
        "# TYPE istio_tcp_sent_bytes counter",
        "# UNIT istio_tcp_sent_bytes bytes",
        "# EOF",
    ] {
        has(&telemetry, line);
    }
}

fn has(telemetry: &Telemetry, line: &str) {
    let text = telemetry.metrics_text(sample()).expect("encodes");
    assert!(text.lines().any(|l| l == line), "{line:?} is missing in\n{text}");
}

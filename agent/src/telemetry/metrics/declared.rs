//! Every metric that the agent exposes: name, unit, help and labels.

use prometheus_client::{metrics::MetricType, registry::Unit};

/// One metric as declared.
pub(super) struct Metric {
    pub(super) name: &'static str,
    pub(super) unit: Option<Unit>,
    pub(super) kind: MetricType,
    /// Each bounded: by the directory, by the node's service accounts, or by literals of this program.
    pub(super) labels: &'static [&'static str],
    pub(super) help: &'static str,
}

/// Istio's labels of a flow, in ztunnel's order; what is not known is `unknown`.
pub(super) const TRAFFIC: &[&str] = &[
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
];

pub(super) static OPENED: Metric = Metric {
    name: "istio_tcp_connections_opened",
    unit: None,
    kind: MetricType::Counter,
    labels: TRAFFIC,
    help: "Connections opened.",
};
pub(super) static CLOSED: Metric = Metric {
    name: "istio_tcp_connections_closed",
    unit: None,
    kind: MetricType::Counter,
    labels: TRAFFIC,
    help: "Connections closed.",
};
pub(super) static RECEIVED: Metric = Metric {
    name: "istio_tcp_received",
    unit: Some(Unit::Bytes),
    kind: MetricType::Counter,
    labels: TRAFFIC,
    help: "Payload from source to destination.",
};
pub(super) static SENT: Metric = Metric {
    name: "istio_tcp_sent",
    unit: Some(Unit::Bytes),
    kind: MetricType::Counter,
    labels: TRAFFIC,
    help: "Payload from destination to source.",
};
pub(super) static SERIES_OVERFLOWED: Metric = Metric {
    name: "tacit_flow_series_overflowed",
    unit: None,
    kind: MetricType::Counter,
    labels: &[],
    help: "Connections counted with unknown ends because there were too many different pairs.",
};
pub(super) static LOG_LINES_LOST: Metric = Metric {
    name: "tacit_log_lines_lost",
    unit: None,
    kind: MetricType::Counter,
    labels: &[],
    help: "Log lines that were lost because standard error did not take them in time.",
};
pub(super) static REFUSED: Metric = Metric {
    name: "tacit_connections_refused",
    unit: None,
    kind: MetricType::Counter,
    labels: &["reporter", "reason"],
    help: "Connections this agent refused.",
};
pub(super) static REVOKED: Metric = Metric {
    name: "tacit_connections_revoked",
    unit: None,
    kind: MetricType::Counter,
    labels: &["reporter", "reason"],
    help: "Open connections this agent closed because policy no longer allowed them.",
};
pub(super) static AUDITED: Metric = Metric {
    name: "tacit_connections_audited",
    unit: None,
    kind: MetricType::Counter,
    labels: &["reporter"],
    help: "Matches of connections with AUDIT policies and policies of a dry run.",
};
pub(super) static BUILD: Metric = Metric {
    name: "tacit_build",
    unit: None,
    kind: MetricType::Info,
    labels: &["version"],
    help: "The agent's version.",
};
pub(super) static PODS_ENROLLED: Metric = Metric {
    name: "tacit_pods_enrolled",
    unit: None,
    kind: MetricType::Gauge,
    labels: &[],
    help: "Pods of this node that are protected.",
};
pub(super) static PODS_WAITING: Metric = Metric {
    name: "tacit_pods_waiting",
    unit: None,
    kind: MetricType::Gauge,
    labels: &[],
    help: "Pods of this node that are not protected yet; the status says why.",
};
pub(super) static PODS_LEFT_ALONE: Metric = Metric {
    name: "tacit_pods_left_alone",
    unit: None,
    kind: MetricType::Gauge,
    labels: &[],
    help: "Pods of this node that are left alone: with the node's network, or with a proxy of their own; the status says why.",
};
pub(super) static PODS_REWRITING: Metric = Metric {
    name: "tacit_pods_rewriting",
    unit: None,
    kind: MetricType::Gauge,
    labels: &[],
    help: "Enrolled pods whose own rules rewrite what arrives: peers reach them as plaintext where mode and policies admit that.",
};
pub(super) static CERTIFICATE_EXPIRY: Metric = Metric {
    name: "tacit_certificate_expiry_timestamp",
    unit: Some(Unit::Seconds),
    kind: MetricType::Gauge,
    labels: &["identity"],
    help: "When the certificate expires, since 1970.",
};
pub(super) static CRL_NEXT_UPDATE: Metric = Metric {
    name: "tacit_crl_next_update_timestamp",
    unit: Some(Unit::Seconds),
    kind: MetricType::Gauge,
    labels: &["issuer"],
    help: "When the latest revocation list of the issuer expires, since 1970.",
};
pub(super) static CRL_REVOKED: Metric = Metric {
    name: "tacit_crl_revoked_certificates",
    unit: None,
    kind: MetricType::Gauge,
    labels: &["issuer"],
    help: "Certificates in the revocation lists of the issuer.",
};
pub(super) static CERTIFICATE_RENEWED: Metric = Metric {
    name: "tacit_certificate_last_renewal_timestamp",
    unit: Some(Unit::Seconds),
    kind: MetricType::Gauge,
    labels: &["identity"],
    help: "When the certificate was last renewed, since 1970; absent before the first renewal.",
};
pub(super) static CERTIFICATE_FAILURES: Metric = Metric {
    name: "tacit_certificate_renewal_failures",
    unit: None,
    kind: MetricType::Counter,
    labels: &["identity"],
    help: "Renewals that failed.",
};
pub(super) static CERTIFICATES_OVERDUE: Metric = Metric {
    name: "tacit_certificates_overdue",
    unit: None,
    kind: MetricType::Gauge,
    labels: &[],
    help: "Certificates past half of their life that could not be renewed yet; in use until they expire.",
};
pub(super) static ISSUER_ANSWERED: Metric = Metric {
    name: "tacit_issuer_last_answer_timestamp",
    unit: Some(Unit::Seconds),
    kind: MetricType::Gauge,
    labels: &[],
    help: "When the authority last answered, since 1970.",
};
pub(super) static ISSUER_SKEW: Metric = Metric {
    name: "tacit_issuer_clock_skew",
    unit: Some(Unit::Seconds),
    kind: MetricType::Gauge,
    labels: &["clock"],
    help: "How far this node's clock is ahead of the authority's, or behind it; certificates allow 60 s.",
};
pub(super) static KERNEL_VERDICTS: Metric = Metric {
    name: "tacit_kernel_verdicts",
    unit: None,
    kind: MetricType::Counter,
    labels: &["reason"],
    help: "Decisions of the kernel programs.",
};
pub(super) static KERNEL_EXCEPTIONS: Metric = Metric {
    name: "tacit_kernel_exceptions",
    unit: None,
    kind: MetricType::Counter,
    labels: &["exception", "hook"],
    help: "Plaintext of and to STRICT or unknown pods, and UDP of pods with `udp: deny`, that passed by an exception: connections at hook connect, packets at the others. A packet that leaves a pod is counted at its socket and on its link.",
};
pub(super) static DETACHED: Metric = Metric {
    name: "tacit_detached",
    unit: None,
    kind: MetricType::Gauge,
    labels: &[],
    help: "1 while the programs are not attached to the pods' cgroup, so that no pod is captured.",
};
pub(super) static RANGES: Metric = Metric {
    name: "tacit_mesh_ranges",
    unit: None,
    kind: MetricType::Gauge,
    labels: &["origin"],
    help: "Ranges of the mesh, as they were configured or found in the cluster.",
};
pub(super) static UNCOVERED: Metric = Metric {
    name: "tacit_mesh_uncovered",
    unit: None,
    kind: MetricType::Gauge,
    labels: &["kind"],
    help: "Enrolled pods and their services in no range of the mesh: traffic to them is plaintext.",
};
pub(super) static NODES_NOT_APPLIED: Metric = Metric {
    name: "tacit_nodes_not_applied",
    unit: None,
    kind: MetricType::Gauge,
    labels: &["kind"],
    help: "1 if the kernel lacks addresses of nodes, or ports of load balancers at nodes: STRICT pods send nothing to what may be one.",
};
pub(super) static UNNAMED: Metric = Metric {
    name: "tacit_unnamed_pods",
    unit: None,
    kind: MetricType::Gauge,
    labels: &["state"],
    help: "Cgroups of pods that no source names: held to STRICT, or left alone after unnamedPodTimeout.",
};
pub(super) static NODE_STATE_ERRORS: Metric = Metric {
    name: "tacit_node_state_unusable",
    unit: None,
    kind: MetricType::Gauge,
    labels: &["operation"],
    help: "1 if the state for the start after a reboot could not be read at this start, or could not be written last.",
};
pub(super) static CNI_PLUGIN: Metric = Metric {
    name: "tacit_cni_plugin_installed",
    unit: None,
    kind: MetricType::Gauge,
    labels: &[],
    help: "1 if the CNI configuration of this node names the plugin with which pods wait for the agent. Absent if it is not to.",
};
pub(super) static RESETS_AT_ENROLMENT: Metric = Metric {
    name: "tacit_enrolment_resets",
    unit: None,
    kind: MetricType::Counter,
    labels: &[],
    help: "Plaintext connections from before a pod's enrolment that were reset.",
};
pub(super) static ENROLMENT: Metric = Metric {
    name: "tacit_enrolment",
    unit: Some(Unit::Seconds),
    kind: MetricType::Histogram,
    labels: &[],
    help: "From the first look that found a process in a pod's cgroup until the pod was enrolled.",
};
pub(super) static FLOWS_LIVE: Metric = Metric {
    name: "tacit_flows_live",
    unit: None,
    kind: MetricType::Gauge,
    labels: &[],
    help: "Flows that are open.",
};
pub(super) static FLOWS_OPENING: Metric = Metric {
    name: "tacit_flows_opening",
    unit: None,
    kind: MetricType::Gauge,
    labels: &[],
    help: "Connections of pods whose connect() waits for the destination.",
};
pub(super) static POOL_IDLE: Metric = Metric {
    name: "tacit_pool_idle_sessions",
    unit: None,
    kind: MetricType::Gauge,
    labels: &[],
    help: "Tunnel sessions kept for reuse.",
};
pub(super) static SHARE_USED: Metric = Metric {
    name: "tacit_share_used",
    unit: None,
    kind: MetricType::Gauge,
    labels: &["resource", "scope"],
    help: "Units of a shared resource in use: of all holders (scope total), and of the holder with the most (scope holder).",
};
pub(super) static SHARE_LIMIT: Metric = Metric {
    name: "tacit_share_limit",
    unit: None,
    kind: MetricType::Gauge,
    labels: &["resource", "scope"],
    help: "Most units of a shared resource: of all holders (scope total), and of each (scope holder).",
};
pub(super) static SHARE_REFUSED: Metric = Metric {
    name: "tacit_share_refused",
    unit: None,
    kind: MetricType::Counter,
    labels: &["resource"],
    help: "Uses of a shared resource that were refused, or made to give way, because the holder had its share.",
};
pub(super) static STALE: Metric = Metric {
    name: "tacit_config_stale",
    unit: Some(Unit::Seconds),
    kind: MetricType::Gauge,
    labels: &["source"],
    help: "For how long the content in force may be outdated; 0 when it is not.",
};
pub(super) static RELOADS: Metric = Metric {
    name: "tacit_config_reloads",
    unit: None,
    kind: MetricType::Counter,
    labels: &["source", "result"],
    help: "Contents of a configuration source that were loaded or refused.",
};

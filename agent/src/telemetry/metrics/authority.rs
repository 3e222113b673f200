//! Every metric the authority exposes.

use std::{
    fmt,
    time::{SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, text::encode},
    metrics::MetricType,
    registry::{Registry, Unit},
};
use tacit_authority::status::AuthorityStatus;

use super::{BUILD, Metric, Value, Writer};

static ISSUED: Metric = Metric {
    name: "tacit_authority_certificates_issued",
    unit: None,
    kind: MetricType::Counter,
    labels: &[],
    help: "Certificates issued.",
};
static REFUSED: Metric = Metric {
    name: "tacit_authority_requests_refused",
    unit: None,
    kind: MetricType::Counter,
    labels: &["reason"],
    help: "Requests for a certificate that were refused, and connections (reason `connections`).",
};
static READY: Metric = Metric {
    name: "tacit_authority_ready",
    unit: None,
    kind: MetricType::Gauge,
    labels: &[],
    help: "1 when this replica signs.",
};
static UPKEEP_FAILING: Metric = Metric {
    name: "tacit_authority_upkeep_failing",
    unit: None,
    kind: MetricType::Gauge,
    labels: &[],
    help: "1 when the root could not be read or written, the bundle not published, or the file of tokens or workloads not read, at the latest attempt.",
};
static ROOT_EXPIRY: Metric = Metric {
    name: "tacit_authority_root_expiry_timestamp",
    unit: Some(Unit::Seconds),
    kind: MetricType::Gauge,
    labels: &[],
    help: "When the root that signs expires, since 1970.",
};
static INTERMEDIATE_EXPIRY: Metric = Metric {
    name: "tacit_authority_intermediate_expiry_timestamp",
    unit: Some(Unit::Seconds),
    kind: MetricType::Gauge,
    labels: &[],
    help: "When the intermediate of this replica expires, since 1970.",
};
static ROOTS: Metric = Metric {
    name: "tacit_authority_roots_trusted",
    unit: None,
    kind: MetricType::Gauge,
    labels: &[],
    help: "Roots that are trusted; more than one while a root is replaced.",
};

/// The exposition of the authority in the `OpenMetrics` 1.0 text format.
pub(in crate::telemetry) fn text(status: AuthorityStatus) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Exposition(status)));
    let mut out = String::new();
    encode(&mut out, &registry)?;
    Ok(out)
}

#[derive(Debug)]
struct Exposition(AuthorityStatus);

impl Collector for Exposition {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (mut writer, status) = (Writer(encoder), &self.0);
        writer.family(&BUILD, [([Value::Text(env!("CARGO_PKG_VERSION"))], 1)])?;
        writer.single(&READY, u64::from(status.unready().is_none()))?;
        writer.single(&ISSUED, status.issued)?;
        writer.family(&REFUSED, status.refused.iter().map(|(reason, n)| ([Value::Text(reason)], *n)))?;
        writer.single(&UPKEEP_FAILING, u64::from(status.upkeep_failing))?;
        writer.single(&ROOTS, status.roots)?;
        writer.family(&ROOT_EXPIRY, status.root_not_after.map(|at| ([], seconds(at))))?;
        writer.family(&INTERMEDIATE_EXPIRY, status.intermediate_not_after.map(|at| ([], seconds(at))))
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tacit_authority::status::Readiness;

    #[test]
    fn the_exposition_has_what_the_status_says() {
        let status = AuthorityStatus {
            readiness: Readiness::Ready,
            issued: 7,
            refused: vec![("not_on_node", 2), ("rate", 1)],
            upkeep_failing: true,
            root_not_after: Some(UNIX_EPOCH + std::time::Duration::from_secs(1000)),
            intermediate_not_after: None,
            roots: 2,
        };
        let text = text(status).expect("encodes");
        for line in [
            "tacit_authority_ready 1",
            "tacit_authority_certificates_issued_total 7",
            "tacit_authority_requests_refused_total{reason=\"not_on_node\"} 2",
            "tacit_authority_upkeep_failing 1",
            "tacit_authority_root_expiry_timestamp_seconds 1000",
            "tacit_authority_roots_trusted 2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(!text.lines().any(|line| line.starts_with("tacit_authority_intermediate_expiry")));
    }
}

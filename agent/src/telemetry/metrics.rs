//! Encoder of the agent's metrics. `declared` has their names, `authority` the authority's.
//!
//! The flow metrics are Istio's TCP metrics with the label set of ztunnel, so dashboards made for Istio work.
//! Mind their direction: Istio counts as *received* what the source sends and as *sent* what the destination
//! answers, whoever reports (istio/istio issue 32399). What is derived from [`Status`] is read when scraped,
//! never kept twice.
//!
//! Names are given without the suffix the format adds: the unit, then `_total` for counters and `_info`.

pub(super) mod authority;
mod declared;

use std::{collections::BTreeMap, fmt, fmt::Write};

use prometheus_client::{
    collector::Collector,
    encoding::{
        DescriptorEncoder, EncodeLabel, EncodeLabelSet, EncodeLabelValue, LabelSetEncoder, LabelValueEncoder,
        NoLabelSet, text::encode,
    },
    metrics::MetricType,
    registry::Registry,
};
use tacit_core::{refusal::RefusalReason, spiffe::SpiffeId};

use super::{
    enrolments::Durations,
    flows::Reporter,
    series::{End, SeriesTotals, Traffic, UNKNOWN},
    status::{AgentState, PodState, Status},
};
use declared::*;

/// Content type of [`text()`], for scrapers.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Everything a scrape reports.
#[derive(Debug)]
pub(super) struct Exposition {
    pub(super) series: Vec<SeriesTotals>,
    /// Flows counted with unknown ends because the table of series was full.
    pub(super) overflowed: u64,
    pub(super) log_lines_lost: u64,
    pub(super) refusals: Vec<((Reporter, RefusalReason), u64)>,
    pub(super) revocations: Vec<((Reporter, RefusalReason), u64)>,
    pub(super) audits: Vec<((Reporter, ()), u64)>,
    pub(super) enrolments: Durations,
    pub(super) status: Status,
}

/// The exposition in the `OpenMetrics` 1.0 text format.
pub(super) fn text(exposition: Exposition) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(exposition));
    let mut out = String::new();
    encode(&mut out, &registry)?;
    Ok(out)
}

impl Collector for Exposition {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut writer = Writer(encoder);
        self.flows(&mut writer)?;
        self.agent(&mut writer)?;
        self.shares(&mut writer)?;
        self.certificates(&mut writer)?;
        self.revocation_lists(&mut writer)?;
        self.configuration(&mut writer)
    }
}

impl Exposition {
    fn flows(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let by_pair = |value: fn(&SeriesTotals) -> u64| {
            self.series.iter().map(move |series| (traffic(&series.traffic), value(series)))
        };
        writer.family(&OPENED, by_pair(|series| series.opened))?;
        writer.family(&CLOSED, by_pair(|series| series.closed))?;
        // Istio's direction, see the head of this file.
        writer.family(&RECEIVED, by_pair(|series| series.sent_bytes))?;
        writer.family(&SENT, by_pair(|series| series.received_bytes))?;
        writer.single(&SERIES_OVERFLOWED, self.overflowed)?;
        writer.single(&LOG_LINES_LOST, self.log_lines_lost)?;
        for (metric, totals) in [(&REFUSED, &self.refusals), (&REVOKED, &self.revocations)] {
            let totals = totals.iter();
            writer.family(
                metric,
                totals.map(|((by, reason), count)| ([by.label(), reason.label()].map(Value::Text), *count)),
            )?;
        }
        let audited = self.audits.iter();
        writer.family(&AUDITED, audited.map(|((by, ()), count)| ([Value::Text(by.label())], *count)))
    }

    fn agent(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let status = &self.status;
        writer.family(&BUILD, [([Value::Text(&status.version)], 1)])?;
        writer.single(&DETACHED, u64::from(status.state == AgentState::Detached))?;
        let enrolled = status.pods.iter().filter(|pod| pod.state == PodState::Enrolled).count();
        writer.single(&PODS_ENROLLED, enrolled as u64)?;
        let waiting = status.pods.iter().filter(|pod| matches!(pod.state, PodState::Waiting(_))).count();
        writer.single(&PODS_WAITING, waiting as u64)?;
        let left = status.pods.iter().filter(|pod| matches!(pod.state, PodState::LeftAlone(_))).count();
        writer.single(&PODS_LEFT_ALONE, left as u64)?;
        let rewriting = status.pods.iter().filter(|pod| pod.rewrites_arrivals).count();
        writer.single(&PODS_REWRITING, rewriting as u64)?;
        writer.single(&FLOWS_LIVE, status.flows.live)?;
        writer.single(&FLOWS_OPENING, status.flows.opening)?;
        writer.single(&POOL_IDLE, status.pool.idle_sessions)?;
        writer.single(&RESETS_AT_ENROLMENT, status.guard.resets_at_enrolment)?;
        let uncovered = [("pod", status.uncovered.pods), ("service", status.uncovered.services)];
        writer.family(&UNCOVERED, uncovered.map(|(kind, count)| ([Value::Text(kind)], count)))?;
        let nodes =
            [("addresses", &status.nodes.addresses_not_applied), ("ports", &status.nodes.ports_not_applied)];
        let nodes = nodes.map(|(kind, error)| ([Value::Text(kind)], u64::from(error.is_some())));
        writer.family(&NODES_NOT_APPLIED, nodes)?;
        let unnamed = [("held", status.unnamed.held), ("left_alone", status.unnamed.left_alone)];
        writer.family(&UNNAMED, unnamed.map(|(state, count)| ([Value::Text(state)], count)))?;
        let node_state = [("read", &status.node_state.read_error), ("write", &status.node_state.write_error)];
        let node_state =
            node_state.map(|(operation, error)| ([Value::Text(operation)], u64::from(error.is_some())));
        writer.family(&NODE_STATE_ERRORS, node_state)?;
        if let Some(cni) = status.cni.as_ref().filter(|cni| cni.is_enabled) {
            writer.single(&CNI_PLUGIN, u64::from(cni.configuration.is_some()))?;
        }
        let ranges = [("configured", status.mesh.configured), ("detected", status.mesh.detected)];
        writer.family(&RANGES, ranges.map(|(origin, count)| ([Value::Text(origin)], count)))?;
        writer.histogram(&ENROLMENT, &self.enrolments)?;
        let verdicts = status.kernel.iter();
        writer.family(
            &KERNEL_VERDICTS,
            verdicts.map(|verdict| ([Value::Text(&verdict.name)], verdict.value)),
        )?;
        let exceptions = status.exceptions.iter();
        let exceptions = exceptions
            .map(|passed| ([&passed.name, &passed.hook].map(|text| Value::Text(text)), passed.value));
        writer.family(&KERNEL_EXCEPTIONS, exceptions)
    }

    fn shares(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let all = || self.status.shares.iter();
        let used = all().flat_map(|share| {
            let labels = |scope| [share.resource.as_str(), scope].map(Value::Text);
            [(labels("total"), share.used), (labels("holder"), share.fullest_used)]
        });
        writer.family(&SHARE_USED, used)?;
        let limits = all().flat_map(|share| {
            let labels = |scope| [share.resource.as_str(), scope].map(Value::Text);
            let total = share.limit.map(|limit| (labels("total"), limit));
            total.into_iter().chain([(labels("holder"), share.holder_limit)])
        });
        writer.family(&SHARE_LIMIT, limits)?;
        writer.family(&SHARE_REFUSED, all().map(|share| ([Value::Text(&share.resource)], share.refused)))
    }

    fn certificates(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let all = || self.status.certificates.iter().map(|held| ([Value::Text(&held.identity)], held));
        writer.family(&CERTIFICATE_EXPIRY, all().map(|(id, held)| (id, held.not_after.unix_seconds())))?;
        let renewed = all().filter_map(|(id, held)| Some((id, held.last_renewal?.unix_seconds())));
        writer.family(&CERTIFICATE_RENEWED, renewed)?;
        writer.family(&CERTIFICATE_FAILURES, all().map(|(id, held)| (id, held.renewal_failures)))?;
        let overdue = all().filter(|(_, held)| held.renewal_failures > 0).count();
        writer.single(&CERTIFICATES_OVERDUE, overdue as u64)?;
        let issuer = &self.status.issuer;
        writer.family(&ISSUER_ANSWERED, issuer.last_answer.map(|at| ([], at.unix_seconds())))?;
        let skew = |clock, sign: i64| {
            let millis = issuer.clock_ahead_ms.map(|ahead| u64::try_from(ahead * sign).unwrap_or(0));
            millis.map(|millis| ([Value::Text(clock)], millis.div_ceil(1000)))
        };
        writer.family(&ISSUER_SKEW, skew("ahead", 1).into_iter().chain(skew("behind", -1)))
    }

    /// Of several lists of one issuer the latest counts.
    fn revocation_lists(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let mut issuers: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
        for list in &self.status.revocation_lists {
            let (next_update, revoked) = issuers.entry(&list.issuer).or_default();
            *next_update = list.next_update.unix_seconds().max(*next_update);
            *revoked += list.revoked;
        }
        let all = || issuers.iter().map(|(issuer, of)| ([Value::Text(issuer)], of));
        writer.family(&CRL_NEXT_UPDATE, all().map(|(issuer, (next_update, _))| (issuer, *next_update)))?;
        writer.family(&CRL_REVOKED, all().map(|(issuer, (_, revoked))| (issuer, *revoked)))
    }

    fn configuration(&self, writer: &mut Writer<'_>) -> fmt::Result {
        // Several federated trust domains are one source.
        let mut kinds: BTreeMap<&str, (u64, u64, u64)> = BTreeMap::new();
        for source in &self.status.sources {
            let (loads, refusals, age) = kinds.entry(source.kind.label()).or_default();
            *loads += source.loads;
            *refusals += source.refusals;
            *age = source.stale_seconds.max(*age);
        }
        let reloads = kinds.iter().flat_map(|(kind, (loads, refusals, _))| {
            let labels = |result| [*kind, result].map(Value::Text);
            [(labels("loaded"), *loads), (labels("refused"), *refusals)]
        });
        writer.family(&RELOADS, reloads)?;
        let ages = kinds.iter();
        writer.family(&STALE, ages.map(|(kind, (.., age))| ([Value::Text(kind)], *age)))
    }
}

/// The values of [`TRAFFIC`].
fn traffic(traffic: &Traffic) -> [Value<'_>; TRAFFIC.len()] {
    let (source, destination) = (traffic.source.labels(), traffic.destination.labels());
    let unknown = Value::Text(UNKNOWN);
    [
        Value::Text(traffic.reporter.label()),
        Value::Text(source.workload),
        Value::Text(source.canonical_service),
        Value::Text(source.canonical_revision),
        Value::Text(source.namespace),
        principal(&traffic.source),
        Value::Text(source.canonical_service),
        Value::Text(source.canonical_revision),
        unknown,
        unknown,
        unknown,
        unknown,
        Value::Text(destination.workload),
        Value::Text(destination.canonical_service),
        Value::Text(destination.canonical_revision),
        Value::Text(destination.namespace),
        principal(&traffic.destination),
        Value::Text(destination.canonical_service),
        Value::Text(destination.canonical_revision),
        unknown,
        Value::Text("tcp"),
        Value::Text("-"),
        Value::Text(traffic.policy.label()),
    ]
}

fn principal(end: &End) -> Value<'_> {
    end.identity.as_ref().map_or(Value::Text(UNKNOWN), Value::Identity)
}

/// The value of a label.
#[derive(Debug, Clone, Copy)]
enum Value<'a> {
    Text(&'a str),
    Identity(&'a SpiffeId),
}

impl EncodeLabelValue for Value<'_> {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => encoder.write_str(text),
            Self::Identity(identity) => write!(encoder, "{identity}"),
        }
    }
}

/// The labels of one sample: the names of its metric with their values.
struct Labels<'a> {
    names: &'static [&'static str],
    values: &'a [Value<'a>],
}

impl EncodeLabelSet for Labels<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.names
            .iter()
            .zip(self.values)
            .try_for_each(|(name, value)| (*name, *value).encode(encoder.encode_label()))
    }
}

/// Writes metrics as declared.
struct Writer<'a>(DescriptorEncoder<'a>);

impl Writer<'_> {
    /// A metric without labels.
    fn single(&mut self, metric: &Metric, value: u64) -> fmt::Result {
        self.family(metric, [([], value)])
    }

    /// A histogram without labels.
    fn histogram(&mut self, metric: &Metric, durations: &Durations) -> fmt::Result {
        let Durations { sum_seconds, count, buckets } = durations;
        self.0
            .encode_descriptor(metric.name, metric.help, metric.unit.as_ref(), metric.kind)?
            .encode_histogram::<NoLabelSet>(*sum_seconds, *count, buckets, None)
    }

    /// A metric with a sample for each item; the values stand in the order of the metric's labels.
    fn family<'s, const LABELS: usize>(
        &mut self,
        metric: &Metric,
        samples: impl IntoIterator<Item = ([Value<'s>; LABELS], u64)>,
    ) -> fmt::Result {
        debug_assert_eq!(metric.labels.len(), LABELS, "{}", metric.name);
        let mut family =
            self.0.encode_descriptor(metric.name, metric.help, metric.unit.as_ref(), metric.kind)?;
        for (values, number) in samples {
            let labels = Labels { names: metric.labels, values: &values };
            match (metric.kind, LABELS) {
                (MetricType::Info, _) => family.encode_info(&labels)?,
                (MetricType::Counter, 0) => family.encode_counter::<NoLabelSet, _, u64>(&number, None)?,
                (MetricType::Counter, _) => {
                    family.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&number, None)?;
                }
                (_, 0) => family.encode_gauge(&number)?,
                (_, _) => family.encode_family(&labels)?.encode_gauge(&number)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

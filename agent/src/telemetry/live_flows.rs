//! Live flows: who talks to whom, how it is secured, how many bytes have passed.
//!
//! A flow is counted when it opens and when it closes; its bytes are carried into the series of its pair at
//! each scrape and at close, so the metrics of a flow that lives for days progress all the time. The table
//! holds one entry for each flow that holds sockets, so the limit on the agent's descriptors bounds it. One
//! mutex guards it: a flow takes it twice.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use tacit_core::spiffe::SpiffeId;
use tacit_tunnel::relay::FlowCounters;

use super::{
    access_log,
    flows::{FlowSpec, Party, Security},
    series::{Pair, Series, SeriesTotals, Traffic},
    status::{FLOWS_LISTED_MAX, FlowStatus, FlowsStatus, PartyStatus},
};

/// The end of a flow whose [`LiveFlow`] was dropped without [`LiveFlow::close`].
const ABORTED: &str = "aborted";

/// A flow that is open. Close it with [`LiveFlow::close`]; dropped without, it ends as `aborted`.
#[derive(Debug)]
pub struct LiveFlow {
    record: Arc<Record>,
    id: u64,
    table: Arc<FlowTable>,
    end: &'static str,
}

impl LiveFlow {
    /// The counters the relay adds to.
    #[must_use]
    pub fn counters(&self) -> &FlowCounters {
        &self.record.counters
    }

    /// Returns the facts of the flow when it opened.
    #[must_use]
    pub fn spec(&self) -> &FlowSpec {
        &self.record.spec
    }

    /// Ends the flow; `end` is a stable label that says how.
    pub fn close(mut self, end: &'static str) {
        self.end = end;
    }
}

impl Drop for LiveFlow {
    fn drop(&mut self) {
        let now = Instant::now();
        self.table.lock().live.remove(&self.id);
        self.record.carry();
        self.record.pair.close();
        access_log::closed(&self.record.closed(self.end, now));
    }
}

/// The table's entry of a flow.
#[derive(Debug)]
struct Record {
    spec: FlowSpec,
    counters: FlowCounters,
    /// The part of `counters` that is already in `pair`.
    carried: FlowCounters,
    pair: Arc<Pair>,
    opened: Instant,
}

impl Record {
    /// Adds the bytes since the last call to the pair's series. Each byte is added once, whoever calls at the
    /// same time:
    /// `fetch_max` hands every range of the counter to exactly one caller.
    fn carry(&self) {
        let carry = |count: &AtomicU64, carried: &AtomicU64| {
            let now = count.load(Ordering::Relaxed);
            now.saturating_sub(carried.fetch_max(now, Ordering::Relaxed))
        };
        let sent = carry(&self.counters.sent, &self.carried.sent);
        let received = carry(&self.counters.received, &self.carried.received);
        self.pair.add_bytes(sent, received);
    }

    fn closed(&self, end: &'static str, now: Instant) -> access_log::Closed<'_> {
        access_log::Closed {
            spec: &self.spec,
            sent_bytes: self.counters.sent.load(Ordering::Relaxed),
            received_bytes: self.counters.received.load(Ordering::Relaxed),
            duration: now.saturating_duration_since(self.opened),
            end,
        }
    }

    fn status(&self, now: Instant) -> FlowStatus {
        let spec = &self.spec;
        FlowStatus {
            reporter: spec.ends.reporter.label().to_owned(),
            source: PartyStatus::from(&spec.ends.source),
            destination: PartyStatus::from(&spec.ends.destination),
            security: spec.security.label().to_owned(),
            key_exchange: match &spec.security {
                Security::MutualTls { key_exchange, .. } => Some(key_exchange.to_string()),
                Security::SameNode | Security::Plaintext => None,
            },
            wire: match &spec.security {
                Security::MutualTls { alpn, .. } => Some((*alpn).to_owned()),
                Security::SameNode | Security::Plaintext => None,
            },
            trace: spec.trace_text().map(|trace| trace.to_string()),
            age_seconds: now.saturating_duration_since(self.opened).as_secs(),
            sent_bytes: self.counters.sent.load(Ordering::Relaxed),
            received_bytes: self.counters.received.load(Ordering::Relaxed),
        }
    }
}

/// All live flows, and the series their bytes go to.
#[derive(Debug, Default)]
pub(super) struct FlowTable(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Ordered by age: ids only grow.
    live: BTreeMap<u64, Arc<Record>>,
    next_id: u64,
    series: Series,
}

impl FlowTable {
    pub(super) fn open(table: &Arc<Self>, spec: FlowSpec, now: Instant) -> LiveFlow {
        let spec = spec.without_unproven();
        let traffic = Traffic::of(&spec);
        let mut inner = table.lock();
        let pair = inner.series.pair(traffic, now);
        pair.open();
        let (counters, carried) = (FlowCounters::default(), FlowCounters::default());
        let record = Arc::new(Record { spec, counters, carried, pair, opened: now });
        let id = inner.next_id;
        inner.next_id += 1;
        inner.live.insert(id, Arc::clone(&record));
        drop(inner);
        LiveFlow { record, id, table: Arc::clone(table), end: ABORTED }
    }

    pub(super) fn status(&self, now: Instant) -> FlowsStatus {
        let inner = self.lock();
        let live = inner.live.len() as u64;
        let newest: Vec<_> = inner.live.values().rev().take(FLOWS_LISTED_MAX).cloned().collect();
        drop(inner);
        FlowsStatus { live, opening: 0, list: newest.iter().map(|record| record.status(now)).collect() }
    }

    pub(super) fn live_by_pod(&self) -> BTreeMap<(Arc<str>, Arc<str>), u64> {
        let mut pods = BTreeMap::new();
        for record in self.records() {
            for workload in record.spec.here().filter_map(|party| party.workload.as_ref()) {
                let pod = (Arc::clone(&workload.namespace), Arc::clone(&workload.name));
                *pods.entry(pod).or_default() += 1;
            }
        }
        pods
    }

    /// Every series with its totals, the bytes of live flows included, and how many flows the bound of series
    /// kept out.
    pub(super) fn totals(&self, now: Instant) -> (Vec<SeriesTotals>, u64) {
        for record in self.records() {
            record.carry();
        }
        let mut inner = self.lock();
        (inner.series.totals(now), inner.series.overflowed())
    }

    /// The live flows, so that nothing is computed under the lock that opening flows wait for.
    fn records(&self) -> Vec<Arc<Record>> {
        self.lock().live.values().cloned().collect()
    }

    /// A panic while the lock is held leaves at most one flow uncounted, so a poisoned lock is still good.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<&Party> for PartyStatus {
    fn from(party: &Party) -> Self {
        Self {
            address: party.address,
            workload: party
                .workload
                .as_ref()
                .map(|workload| format!("{}/{}", workload.namespace, workload.name)),
            identity: party.identity.as_ref().map(SpiffeId::to_string),
        }
    }
}

#[cfg(test)]
mod tests;

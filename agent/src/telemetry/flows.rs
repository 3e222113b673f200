//! Live flows: who talks to whom, how it is secured, how many bytes have passed.
//!
//! A flow is counted when it opens and when it closes; its bytes are carried into the series of its pair at
//! each scrape and at close, so the metrics of a flow that lives for days progress all the time. The table
//! holds one entry for each flow that holds sockets, so the limit on the agent's descriptors bounds it. One
//! mutex guards it: a flow takes it twice.

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use tacit_core::{directory::Workload, spiffe::SpiffeId};
use tacit_tunnel::relay::FlowCounters;

use super::{
    access_log,
    series::{Pair, Series, SeriesTotals, Traffic},
    status::{FLOWS_LISTED_MAX, FlowStatus, FlowsStatus, PartyStatus},
};

/// How a flow ended when its [`LiveFlow`] was dropped without a word.
const ABORTED: &str = "aborted";

/// Which end of a flow this agent looks after. Both agents report the same flow, each from its side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reporter {
    /// The workload here opened the connection.
    Source,
    /// The workload here accepted it.
    Destination,
}

impl Reporter {
    /// Istio's label value.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }

    /// The direction as seen from the workload here, as ztunnel logs it.
    #[must_use]
    pub fn direction(self) -> &'static str {
        match self {
            Self::Source => "outbound",
            Self::Destination => "inbound",
        }
    }
}

/// One end of a connection.
#[derive(Debug, Clone)]
pub struct Party {
    /// Its address as the applications see it.
    pub address: SocketAddr,
    /// Who the directory says has this address; `None` when it knows nobody.
    pub workload: Option<Arc<Workload>>,
    /// The identity proven for this flow (certificate, or the kernel for a pod of this node); `None` when
    /// none was. A flow in clear is reported without, whatever stands here.
    pub identity: Option<SpiffeId>,
}

/// Both ends of a connection, and which of them is here.
#[derive(Debug, Clone)]
pub struct Ends {
    /// Which end is here.
    pub reporter: Reporter,
    /// Who opened the connection.
    pub source: Party,
    /// Who accepted it, or was to.
    pub destination: Party,
}

/// How a flow is protected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Security {
    /// Both ends authenticated by TLS.
    MutualTls {
        /// Protocol version, such as `TLSv1.3`.
        version: &'static str,
        /// Cipher suite, such as `TLS13_AES_256_GCM_SHA384`.
        cipher: &'static str,
        /// Key exchange group, such as `X25519MLKEM768`.
        key_exchange: &'static str,
    },
    /// Handed over inside this agent: identities hold, nothing touches a wire.
    SameNode,
    /// In clear; nobody was authenticated.
    Plaintext,
}

impl Security {
    /// A stable name for logs and status.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::MutualTls { .. } => "mutual_tls",
            Self::SameNode => "same_node",
            Self::Plaintext => "plaintext",
        }
    }
}

/// What is known of a flow when it opens.
#[derive(Debug, Clone)]
pub struct FlowSpec {
    /// Its two ends.
    pub ends: Ends,
    /// How it is protected.
    pub security: Security,
    /// The trace id both agents log; all zero when the flow crossed no tunnel.
    pub trace: [u8; 16],
}

impl FlowSpec {
    /// The trace id in lower-case hex; `None` when the flow has none.
    #[must_use]
    pub fn trace_text(&self) -> Option<Hex> {
        (self.trace != [0; 16]).then_some(Hex(self.trace))
    }

    /// The ends on this node.
    fn here(&self) -> impl Iterator<Item = &Party> {
        let both = self.security == Security::SameNode;
        let Ends { reporter, source, destination } = &self.ends;
        let source = (both || *reporter == Reporter::Source).then_some(source);
        let destination = (both || *reporter == Reporter::Destination).then_some(destination);
        source.into_iter().chain(destination)
    }

    /// In clear nobody proved anything: an identity that was only expected must not be reported as one that
    /// held.
    fn without_unproven(mut self) -> Self {
        if self.security == Security::Plaintext {
            self.ends.source.identity = None;
            self.ends.destination.identity = None;
        }
        self
    }
}

/// Sixteen bytes, printed as lower-case hex.
#[derive(Debug, Clone, Copy)]
pub struct Hex([u8; 16]);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

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

    /// What was known when it opened.
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

/// What the table keeps of a flow.
#[derive(Debug)]
struct Record {
    spec: FlowSpec,
    counters: FlowCounters,
    /// What of `counters` is already in `pair`.
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
        FlowsStatus { live, list: newest.iter().map(|record| record.status(now)).collect() }
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
pub(super) mod tests;

//! The sums behind Istio's TCP metrics: one series for each reporter, pair of workloads and security policy.
//!
//! A series is looked up once when a flow opens; flows keep the handle. The key is the flow's own handles on
//! its workloads, hashed and compared by what they print as labels: opening a flow builds no string, and a
//! directory that was reloaded unchanged continues the series it had. The number of series is bounded.

use std::{
    collections::HashMap,
    hash::{Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tacit_core::{directory::Workload, spiffe::SpiffeId};

use super::flows::{FlowSpec, Party, Reporter, Security};

/// Series kept, a number. A node of 110 pods with 70 peers each fits; at 800 bytes a line and four lines
/// each, a full scrape is some 26 MB.
const SERIES_MAX: usize = 8192;
/// A series without a live flow is kept at least this long: several scrapes, even at an interval of two
/// minutes.
const SERIES_IDLE: Duration = Duration::from_secs(600);
/// Least time between two searches for idle series, while the table is full.
const SWEEP_PAUSE: Duration = Duration::from_secs(1);
/// Istio's value of a label without a known value.
pub(super) const UNKNOWN: &str = "unknown";

/// The labels that distinguish one series from another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Traffic {
    pub(super) reporter: Reporter,
    pub(super) source: End,
    pub(super) destination: End,
    pub(super) policy: SecurityPolicy,
}

/// Istio's `connection_security_policy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum SecurityPolicy {
    MutualTls,
    /// No TLS: clear text, or handed over on one node.
    Unknown,
}

impl SecurityPolicy {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::Unknown => UNKNOWN,
        }
    }
}

/// One end of the traffic.
#[derive(Debug, Clone)]
pub(super) struct End {
    workload: Option<Arc<Workload>>,
    pub(super) identity: Option<SpiffeId>,
}

/// The labels of an [`End`]. Ends with equal labels are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct EndLabels<'a> {
    pub(super) workload: &'a str,
    pub(super) namespace: &'a str,
    pub(super) canonical_service: &'a str,
    pub(super) canonical_revision: &'a str,
}

impl End {
    fn of(party: &Party) -> Self {
        Self { workload: party.workload.clone(), identity: party.identity.clone() }
    }

    const NOBODY: Self = Self { workload: None, identity: None };

    pub(super) fn labels(&self) -> EndLabels<'_> {
        let Some(workload) = &self.workload else {
            return EndLabels {
                workload: UNKNOWN,
                namespace: UNKNOWN,
                canonical_service: UNKNOWN,
                canonical_revision: UNKNOWN,
            };
        };
        EndLabels {
            workload: &workload.name,
            namespace: &workload.namespace,
            canonical_service: canonical_service(workload),
            canonical_revision: canonical_revision(workload),
        }
    }
}

/// Istio's canonical service (istio/istio `pkg/labels`): the first label there is, else the workload's name.
fn canonical_service(workload: &Workload) -> &str {
    const KEYS: [&str; 3] = ["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"];
    KEYS.iter().find_map(|key| workload.labels.get(key)).unwrap_or(&workload.name)
}

/// Istio's canonical revision: the first label there is, else `latest`.
fn canonical_revision(workload: &Workload) -> &str {
    const KEYS: [&str; 3] = ["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"];
    KEYS.iter().find_map(|key| workload.labels.get(key)).unwrap_or("latest")
}

impl PartialEq for End {
    fn eq(&self, other: &Self) -> bool {
        let same_workload = match (&self.workload, &other.workload) {
            (Some(one), Some(two)) if Arc::ptr_eq(one, two) => true,
            _ => self.labels() == other.labels(),
        };
        same_workload && self.identity == other.identity
    }
}

impl Eq for End {}

impl Hash for End {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.labels().hash(state);
        self.identity.hash(state);
    }
}

impl Traffic {
    pub(super) fn of(spec: &FlowSpec) -> Self {
        Self {
            reporter: spec.ends.reporter,
            source: End::of(&spec.ends.source),
            destination: End::of(&spec.ends.destination),
            policy: match spec.security {
                Security::MutualTls { .. } => SecurityPolicy::MutualTls,
                Security::SameNode | Security::Plaintext => SecurityPolicy::Unknown,
            },
        }
    }

    /// Returns the series for flows that found no room for a series of their own.
    fn overflow(&self) -> Self {
        Self { reporter: self.reporter, source: End::NOBODY, destination: End::NOBODY, policy: self.policy }
    }
}

/// The sums of one series.
#[derive(Debug, Default)]
pub(super) struct Pair {
    opened: AtomicU64,
    closed: AtomicU64,
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
}

impl Pair {
    pub(super) fn open(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn close(&self) {
        self.closed.fetch_add(1, Ordering::Relaxed);
    }

    /// Adds what passed from source to destination (`sent`) and back (`received`).
    pub(super) fn add_bytes(&self, sent: u64, received: u64) {
        self.sent_bytes.fetch_add(sent, Ordering::Relaxed);
        self.received_bytes.fetch_add(received, Ordering::Relaxed);
    }
}

/// The sums of one series at one moment.
#[derive(Debug)]
pub(super) struct SeriesTotals {
    pub(super) traffic: Arc<Traffic>,
    pub(super) opened: u64,
    pub(super) closed: u64,
    /// Bytes from source to destination.
    pub(super) sent_bytes: u64,
    /// Bytes from destination to source.
    pub(super) received_bytes: u64,
}

/// A series and since when no flow of it was seen.
#[derive(Debug)]
struct Entry {
    pair: Arc<Pair>,
    idle_since: Option<Instant>,
}

impl Entry {
    /// Live flows hold the pair too; alone, the entry is idle.
    fn observe(&mut self, now: Instant) {
        let idle = Arc::strong_count(&self.pair) == 1;
        self.idle_since = idle.then(|| self.idle_since.unwrap_or(now));
    }

    fn is_idle_for(&self, limit: Duration, now: Instant) -> bool {
        self.idle_since.is_some_and(|since| now.saturating_duration_since(since) >= limit)
    }
}

/// All series. Full, it forgets those that have been idle longer than [`SERIES_IDLE`]; with none such,
/// further flows are counted together as unknown, and how many is counted too.
#[derive(Debug, Default)]
pub(super) struct Series {
    entries: HashMap<Arc<Traffic>, Entry>,
    overflowed: u64,
    swept: Option<Instant>,
}

impl Series {
    /// The series of this traffic, made when it is new.
    pub(super) fn pair(&mut self, traffic: Traffic, now: Instant) -> Arc<Pair> {
        if let Some(entry) = self.entries.get_mut(&traffic) {
            entry.idle_since = None;
            return Arc::clone(&entry.pair);
        }
        if self.entries.len() >= SERIES_MAX {
            self.sweep(now);
        }
        if self.entries.len() < SERIES_MAX {
            return self.insert(traffic);
        }
        self.overflowed += 1;
        self.insert(traffic.overflow())
    }

    /// At most one overflow series for each reporter and policy stands above the bound.
    fn insert(&mut self, traffic: Traffic) -> Arc<Pair> {
        let new = || Entry { pair: Arc::default(), idle_since: None };
        let entry = self.entries.entry(Arc::new(traffic)).or_insert_with(new);
        entry.idle_since = None;
        Arc::clone(&entry.pair)
    }

    /// Forgets idle series. It walks them all, so no more than once in [`SWEEP_PAUSE`].
    fn sweep(&mut self, now: Instant) {
        if self.swept.is_some_and(|swept| now.saturating_duration_since(swept) < SWEEP_PAUSE) {
            return;
        }
        self.swept = Some(now);
        self.entries.retain(|_, entry| {
            entry.observe(now);
            !entry.is_idle_for(SERIES_IDLE, now)
        });
    }

    /// The sums of every series; also notes which are idle.
    pub(super) fn totals(&mut self, now: Instant) -> Vec<SeriesTotals> {
        let total = |(traffic, entry): (&Arc<Traffic>, &mut Entry)| {
            entry.observe(now);
            let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
            SeriesTotals {
                traffic: Arc::clone(traffic),
                opened: read(&entry.pair.opened),
                closed: read(&entry.pair.closed),
                sent_bytes: read(&entry.pair.sent_bytes),
                received_bytes: read(&entry.pair.received_bytes),
            }
        };
        self.entries.iter_mut().map(total).collect()
    }

    /// Flows counted as unknown because the bound was reached.
    pub(super) fn overflowed(&self) -> u64 {
        self.overflowed
    }
}

#[cfg(test)]
mod tests;

//! Telemetry: metrics, access log, refusals, status.
//!
//! ```text
//! outbound, inbound --open_flow--> LiveFlow --close--> access log
//!        |                            '-- counters --> series per pair --\
//!        '-----refused--> counter + rate-limited WARN -------------------+--> /metrics (admin)
//! app: Fn() -> Status ---------------------------------------------------+--> /status, `tacit status`
//! ```
//!
//! Promises: the data path pays two short lock operations for a flow and one atomic addition for a record,
//! never a look-up by labels for each record; every table is bounded and what a bound drops is counted.
//!
//! | module | job |
//! |---|---|
//! | `flows` | a flow: its ends, its protection |
//! | `live_flows` | live flows, byte counters |
//! | `series` | what Istio's TCP metrics sum up for each pair of workloads |
//! | `metrics` | every metric's name, unit, help and labels; the exposition |
//! | `refusals` | refused, revoked and audited connections, counted and logged at a bounded rate |
//! | `enrolments` | how long enrolments took |
//! | `access_log` | one line for each closed flow |
//! | `status`, `table` | the agent's state as data, and as text |
//! | `doctor` | what the kernel can do, as text |
//! | `admin` | the metrics port and the operator's socket |
//! | `log` | where log lines go |

mod access_log;
pub mod admin;
pub mod doctor;
mod enrolments;
pub mod flows;
mod live_flows;
pub mod log;
mod metrics;
pub mod refusals;
mod series;
pub mod status;
mod table;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

pub use flows::{Ends, FlowSpec, Party, Reporter, Security};
pub use live_flows::LiveFlow;

use tacit_core::{
    refusal::{Refusal, RefusalReason},
    shares::ShareUse,
};

use enrolments::Enrolments;
use live_flows::FlowTable;
use refusals::{Event, Tally};
use status::{FlowsStatus, Status};

/// Handle to everything that counts; cheap to clone, all clones share one state.
#[derive(Debug, Clone, Default)]
pub struct Telemetry {
    flows: Arc<FlowTable>,
    refusals: Arc<Tally<RefusalReason>>,
    revocations: Arc<Tally<RefusalReason>>,
    audits: Arc<Tally<()>>,
    resets: Arc<AtomicU64>,
    /// Connections to the metrics port.
    admin: Arc<admin::connections::Connections>,
    enrolments: Arc<Enrolments>,
}

impl Telemetry {
    /// A handle with nothing counted yet. One for each agent.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts a flow as open and lists it as live until the answer is closed or dropped.
    #[must_use]
    pub fn open_flow(&self, spec: FlowSpec) -> LiveFlow {
        FlowTable::open(&self.flows, spec, Instant::now())
    }

    /// Counts a refused connection and logs it, at a bounded rate for each reason.
    pub fn refused(&self, ends: &Ends, refusal: &Refusal) {
        let line = self.refusals.record(ends.reporter, refusal.reason, Instant::now());
        line.write(ends, Event::Refused(refusal));
    }

    /// Counts an open connection that policy no longer allows and logs it, at a bounded rate for each reason.
    pub fn revoked(&self, ends: &Ends, refusal: &Refusal) {
        let line = self.revocations.record(ends.reporter, refusal.reason, Instant::now());
        line.write(ends, Event::Revoked(refusal));
    }

    /// Counts a connection that an AUDIT policy matches and logs it, at a bounded rate. `policy` names the policy.
    pub fn audited(&self, ends: &Ends, policy: &str) {
        let line = self.audits.record(ends.reporter, (), Instant::now());
        line.write(ends, Event::Audited { policy });
    }

    /// Counts connections from before a pod's enrolment that were reset.
    pub fn reset_at_enrolment(&self, connections: usize) {
        self.resets.fetch_add(connections as u64, Ordering::Relaxed);
    }

    /// Connections from before enrolment that were reset since the agent started.
    #[must_use]
    pub fn resets_at_enrolment(&self) -> u64 {
        self.resets.load(Ordering::Relaxed)
    }

    /// The use of the metrics port, by source address.
    #[must_use]
    pub fn admin_connections(&self) -> ShareUse<String> {
        self.admin.usage()
    }

    /// Counts a pod that was enrolled, and how long after its first process was seen.
    pub fn enrolled(&self, took: Duration) {
        self.enrolments.record(took);
    }

    /// The live flows: how many, and the newest of them up to [`status::FLOWS_LISTED_MAX`].
    #[must_use]
    pub fn live_flows(&self) -> FlowsStatus {
        self.flows.status(Instant::now())
    }

    /// Live flows by the (namespace, name) of the pods of this node; a flow between two of them counts for both.
    #[must_use]
    pub fn live_by_pod(&self) -> BTreeMap<(Arc<str>, Arc<str>), u64> {
        self.flows.live_by_pod()
    }

    /// All metrics in the `OpenMetrics` 1.0 text format; what `status` knows is reported as of now.
    ///
    /// # Errors
    /// [`fmt::Error`] when a metric cannot be encoded, which is a bug.
    pub fn metrics_text(&self, status: Status) -> Result<String, fmt::Error> {
        let (series, overflowed) = self.flows.totals(Instant::now());
        metrics::text(metrics::Exposition {
            series,
            overflowed,
            log_lines_lost: log::lost_lines(),
            refusals: self.refusals.totals(),
            revocations: self.revocations.totals(),
            audits: self.audits.totals(),
            enrolments: self.enrolments.totals(),
            status,
        })
    }
}

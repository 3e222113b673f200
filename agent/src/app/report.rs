//! The agent's state as `tacit status` and the metrics show it, gathered when asked.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Instant, SystemTime},
};

use tacit_core::{
    directory::{Directory, Ranges, Uncovered, Workload},
    policy::{
        Mode,
        explain::{self, ExplainContext, ExplainError, Explanation, WorkloadRef},
    },
    spiffe::TrustDomain,
};
use tacit_identity::{issuer::Issuer, istio::Skew, manager::CertificateState};
use tacit_kernel::{DropCount, GuardedLink, Kernel, PlaintextEgress, host};
use tacit_sources::reload::ReloadState;

use crate::{
    config::Config,
    enrol::{PodPolicy, in_clear},
    proxy::Proxy,
    telemetry::status::{
        AgentState, CertificateStatus, DropStatus, FlowsStatus, GuardStatus, IssuerStatus, KernelCounter,
        MeshStatus, PodState, PodStatus, PoolStatus, ProgramStatus, RANGES_LISTED_MAX, SourceKind,
        SourceStatus, Status, UncoveredStatus,
    },
};

/// Gathers a [`Status`].
pub(super) struct Report {
    kernel: Arc<Kernel>,
    proxy: Arc<Proxy>,
    trust_domain: TrustDomain,
    node: Arc<str>,
    pods_cgroup: PathBuf,
    started: Instant,
    /// Who was in no range of the mesh, in that directory with those ranges.
    uncovered: Mutex<(Arc<Directory>, Arc<Ranges>, UncoveredStatus)>,
}

impl Report {
    pub(super) fn new(config: &Config, kernel: Arc<Kernel>, proxy: Arc<Proxy>, started: Instant) -> Self {
        Self {
            kernel,
            proxy,
            trust_domain: config.trust_domain.clone(),
            node: config.node.clone(),
            pods_cgroup: config.pods_cgroup.clone(),
            started,
            uncovered: Mutex::default(),
        }
    }

    pub(super) fn status(&self, state: AgentState) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.node.to_string(),
            trust_domain: self.trust_domain.to_string(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            state,
            pods: self.pods(),
            programs: self.programs(),
            kernel: self.kernel(),
            guard: self.guard(),
            mesh: mesh(&self.proxy.snapshots.mesh.ranges()),
            uncovered: self.uncovered(),
            issuer: issuer(self.proxy.snapshots.identities.issuer()),
            certificates: self
                .proxy
                .snapshots
                .identities
                .certificates()
                .iter()
                .filter_map(certificate)
                .collect(),
            sources: vec![
                source(SourceKind::Directory, &self.proxy.snapshots.directory.state()),
                source(SourceKind::Policy, &self.proxy.snapshots.policies.state()),
            ],
            flows: FlowsStatus {
                opening: self.proxy.openings.count() as u64,
                ..self.proxy.telemetry.live_flows()
            },
            pool: PoolStatus { idle_sessions: self.proxy.sessions.count_idle() as u64 },
        }
    }

    /// Who is in no range of the mesh. All are looked at once for each version of the directory and the ranges.
    pub(super) fn uncovered(&self) -> UncoveredStatus {
        let directory = self.proxy.snapshots.directory.current();
        let mut known = self.uncovered.lock().unwrap_or_else(PoisonError::into_inner);
        let ranges = self.proxy.snapshots.mesh.ranges();
        if !Arc::ptr_eq(&known.0, &directory) || !Arc::ptr_eq(&known.1, &ranges) {
            let Uncovered { workloads, services, example } = directory.uncovered(&ranges);
            let found = UncoveredStatus { pods: workloads as u64, services: services as u64, example };
            *known = (directory, ranges, found);
        }
        known.2.clone()
    }

    /// What policy says about a connection.
    pub(super) fn explain(
        &self,
        from: &WorkloadRef,
        to: &WorkloadRef,
        port: u16,
    ) -> Result<Explanation, ExplainError> {
        let addresses = host::addresses().unwrap_or_default();
        let known = ExplainContext {
            directory: &self.proxy.snapshots.directory.current(),
            policies: &self.proxy.snapshots.policies.current(),
            node: &self.node,
            is_node: &|address| addresses.iter().any(|own| *own == address && host::is_probe_source(own)),
        };
        explain::explain(known, from, to, port)
    }

    fn pods(&self) -> Vec<PodStatus> {
        let table = self.proxy.pods.load();
        let live = self.proxy.telemetry.live_by_pod();
        let policies = self.proxy.snapshots.policies.current();
        let pod = |workload: &Workload, policy: &PodPolicy, links: &[GuardedLink], state| PodStatus {
            name: workload.name.to_string(),
            namespace: workload.namespace.to_string(),
            cgroup: self.pods_cgroup.join(&workload.cgroup).display().to_string(),
            addresses: workload.addresses.clone(),
            identity: workload.identity.to_string(),
            mode: mode(policy.modes.default).to_owned(),
            port_modes: policy
                .modes
                .ports
                .iter()
                .map(|(p, m)| (*p, mode(*m).to_owned()))
                .collect::<BTreeMap<_, _>>(),
            policies: policy.authorization.names().map(str::to_owned).collect(),
            in_clear: in_clear_text(in_clear(workload, &policy.modes)).to_owned(),
            guarded_links: links.iter().map(|link| format!("{} ({})", link.interface, link.by)).collect(),
            policy_not_applied: policy.not_applied.clone(),
            state,
            flows: live.get(&(workload.namespace.clone(), workload.name.clone())).copied().unwrap_or(0),
        };
        let enrolled = table.pods.iter().map(|p| pod(&p.workload, &p.policy(), &p.links, PodState::Enrolled));
        let waiting = table.waiting.iter().map(|w| {
            let policy = PodPolicy::configured(&policies, &w.workload);
            pod(&w.workload, &policy, &[], PodState::Waiting(w.reason.clone()))
        });
        let directory = self.proxy.snapshots.directory.current();
        let left_alone = directory.host_network().map(|workload| {
            let reason = "it has the node's network (hostNetwork)".to_owned();
            let policy = PodPolicy::configured(&policies, workload);
            pod(workload, &policy, &[], PodState::LeftAlone(reason))
        });
        let mut all: Vec<PodStatus> = enrolled.chain(waiting).chain(left_alone).collect();
        all.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        all
    }

    fn programs(&self) -> Vec<ProgramStatus> {
        let states = self.kernel.programs().states();
        let status = |p: tacit_kernel::ProgramState| ProgramStatus {
            name: p.name,
            attached_to: p.attached_to,
            id: p.id,
            pinned: p.pinned.map(|path| path.display().to_string()),
        };
        states.into_iter().map(status).collect()
    }

    fn kernel(&self) -> Vec<KernelCounter> {
        let counters = self.kernel.maps.counters();
        let counter = |c: tacit_kernel::KernelCounter| KernelCounter {
            name: c.name.to_owned(),
            help: c.help.to_owned(),
            value: c.value,
        };
        counters.into_iter().map(counter).collect()
    }

    fn guard(&self) -> GuardStatus {
        let table = self.proxy.pods.load();
        let name = |cgroup: u64| match table.pods.iter().find(|pod| pod.cgroup == cgroup) {
            Some(pod) => format!("{}/{}", pod.workload.namespace, pod.workload.name),
            None => format!("cgroup {cgroup}"),
        };
        let status = |drops: DropCount| DropStatus {
            pod: name(drops.cgroup),
            remote: drops.remote,
            protocol: drops.protocol,
            reason: drops.reason.to_owned(),
            packets: drops.packets,
        };
        GuardStatus {
            resets_at_enrolment: self.proxy.telemetry.resets_at_enrolment(),
            drops: self.kernel.maps.drops().into_iter().map(status).collect(),
        }
    }
}

fn in_clear_text(what: PlaintextEgress) -> &'static str {
    match what {
        PlaintextEgress::Nothing => "nothing",
        PlaintextEgress::Udp => "udp",
        PlaintextEgress::AllButUdp => "all but udp",
        PlaintextEgress::All => "everything",
    }
}

fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Disable => "DISABLE",
        Mode::Permissive => "PERMISSIVE",
        Mode::Strict => "STRICT",
    }
}

fn mesh(ranges: &Ranges) -> MeshStatus {
    MeshStatus {
        configured: ranges.count_configured() as u64,
        detected: ranges.count_detected() as u64,
        ranges: ranges.iter().take(RANGES_LISTED_MAX).map(ToString::to_string).collect(),
    }
}

fn issuer(issuer: &Issuer) -> IssuerStatus {
    let Issuer::Istio(issuer) = issuer else {
        return IssuerStatus { address: "embedded".to_owned(), ..IssuerStatus::default() };
    };
    let contact = issuer.contact();
    IssuerStatus {
        address: issuer.address().to_owned(),
        last_answer: contact.answered.map(Into::into),
        clock_ahead_ms: contact.skew.map(Skew::ahead_ms),
    }
}

/// An identity that has never had a certificate is seen as its pod waiting.
fn certificate(state: &CertificateState) -> Option<CertificateStatus> {
    let not_after = state.not_after?;
    let left = match not_after.duration_since(SystemTime::now()) {
        Ok(left) => i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        Err(past) => i64::try_from(past.duration().as_secs()).map_or(i64::MIN, |s| -s),
    };
    Some(CertificateStatus {
        identity: state.identity.to_string(),
        serial: state.serial.clone(),
        not_before: state.not_before?.into(),
        not_after: not_after.into(),
        seconds_left: left,
        last_renewal: state.last_renewal.map(Into::into),
        renewal_failures: u64::from(state.renewal_failures),
        last_error: state.last_error.clone(),
    })
}

pub(super) fn source(kind: SourceKind, state: &ReloadState) -> SourceStatus {
    SourceStatus {
        kind,
        file: state.file.display().to_string(),
        loaded_at: state.loaded_at.into(),
        loads: state.loads,
        refusals: state.refusals,
        last_error: state.last_error.clone(),
        unreadable: state.unreadable.clone(),
        stale_seconds: state.stale_since.map_or(0, |since| since.elapsed().map_or(0, |age| age.as_secs())),
    }
}

//! The agent's state as `tacit status` and the metrics show it, gathered when asked.

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use tacit_core::{
    directory::{Directory, Ranges, Uncovered, Workload},
    policy::{
        Mode,
        explain::{self, ExplainContext, ExplainError, Explanation, PolicyInForce, WorkloadRef},
    },
    shares::{SHARES, ShareUse},
    spiffe::TrustDomain,
};
use tacit_identity::{issuer::Issuer, istio::Skew, manager::CertificateState, revocation::ListState};
use tacit_kernel::{
    DropCount, ExceptionCounter, GuardedLink, HookProgram, Kernel, KernelCounter, PlaintextEgress,
    connect_programs, host,
};
use tacit_sources::{directory::AnnounceState, istiod::ConnectionState, reload::ReloadState};
use tokio::sync::watch;

use crate::{
    app::kernel_shares,
    config::Config,
    control_state::Snapshots,
    enrol::{PodPolicy, Pods, Unnamed},
    mesh::NodesNotApplied,
    proxy::Proxy,
    telemetry::status::{
        AgentState, AnnounceStatus, CertificateStatus, CniStatus, ConnectionStatus, CounterStatus,
        DropStatus, ExceptionStatus, FlowsStatus, GuardStatus, HookProgramStatus, IssuerStatus, MeshStatus,
        NodeStateStatus, NodesStatus, PodState, PodStatus, PoolStatus, ProgramStatus, RANGES_LISTED_MAX,
        RejectionStatus, ResourcesStatus, RevocationListStatus, ShareStatus, SourceKind, SourceStatus,
        Status, UncoveredStatus, UnnamedStatus,
    },
};

/// Namespaces listed whose policies are not applied, a number. All of them are logged.
const NOT_APPLIED_LISTED_MAX: usize = 20;

/// Gathers a [`Status`].
pub(super) struct Report {
    kernel: Arc<Kernel>,
    proxy: Arc<Proxy>,
    trust_domain: TrustDomain,
    node: Arc<str>,
    pods_cgroup: PathBuf,
    started: Instant,
    node_state: watch::Receiver<NodeStateStatus>,
    cni: Option<watch::Receiver<CniStatus>>,
    announced: Option<watch::Receiver<AnnounceState>>,
    unnamed_pod_timeout: Duration,
    /// The pods and services outside the mesh's ranges, for that directory and those ranges.
    uncovered: Mutex<(Arc<Directory>, Arc<Ranges>, UncoveredStatus)>,
}

impl Report {
    pub(super) fn new(
        config: &Config,
        pods_cgroup: &Path,
        kernel: Arc<Kernel>,
        proxy: Arc<Proxy>,
        (started, node_state): (Instant, watch::Receiver<NodeStateStatus>),
        (cni, announced): (Option<watch::Receiver<CniStatus>>, Option<watch::Receiver<AnnounceState>>),
    ) -> Self {
        Self {
            node_state,
            cni,
            announced,
            unnamed_pod_timeout: config.unnamed_pod_timeout,
            kernel,
            proxy,
            trust_domain: config.trust_domain.clone(),
            node: config.node.clone(),
            pods_cgroup: pods_cgroup.to_owned(),
            started,
            uncovered: Mutex::default(),
        }
    }

    pub(super) fn pods_cgroup(&self) -> &Path {
        &self.pods_cgroup
    }

    pub(super) fn status(&self, state: AgentState) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.node.to_string(),
            trust_domain: self.trust_domain.to_string(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            state,
            pods: self.pods(state),
            programs: self.programs(),
            connect_hooks: self.connect_hooks(),
            kernel: self.kernel(),
            exceptions: self.exceptions(),
            guard: self.guard(),
            node_state: self.node_state.borrow().clone(),
            cni: self.cni.as_ref().map(|cni| cni.borrow().clone()),
            announced: self.announced.as_ref().map(|announced| announce_status(&announced.borrow())),
            unnamed: self.unnamed(),
            mesh: mesh(&self.proxy.snapshots.mesh.ranges()),
            uncovered: self.uncovered(),
            nodes: nodes(self.proxy.snapshots.mesh.nodes_not_applied()),
            issuer: issuer(self.proxy.snapshots.identities.issuer()),
            certificates: self
                .proxy
                .snapshots
                .identities
                .certificates()
                .iter()
                .filter_map(certificate)
                .collect(),
            revocation_lists: self.revocation_lists(),
            sources: self.sources(),
            flows: FlowsStatus {
                opening: self.proxy.openings.count() as u64,
                ..self.proxy.telemetry.live_flows()
            },
            pool: PoolStatus { idle_sessions: self.proxy.sessions.count_idle() as u64 },
            shares: self.shares(),
        }
    }

    fn directory_source(&self) -> SourceStatus {
        let directory = &self.proxy.snapshots.directory;
        let connection = directory.connection().map(connection);
        SourceStatus { connection, ..source(SourceKind::Directory, &directory.state()) }
    }

    /// Returns the pods and services outside the mesh's ranges. The result is kept until the directory or the ranges
    /// change.
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

    fn sources(&self) -> Vec<SourceStatus> {
        let Snapshots { revocation, federation, .. } = &self.proxy.snapshots;
        let federation =
            federation.iter().map(|domain| source(SourceKind::Federation, &domain.roots.state()));
        let revocation = revocation.iter().map(|lists| source(SourceKind::Crl, &lists.state()));
        [self.directory_source(), self.policy_source()]
            .into_iter()
            .chain(revocation)
            .chain(federation)
            .collect()
    }

    fn revocation_lists(&self) -> Vec<RevocationListStatus> {
        let lists = self.proxy.snapshots.revocation.as_ref().map(|lists| lists.current().states());
        let status = |list: ListState| RevocationListStatus {
            issuer: list.issuer,
            revoked: list.revoked,
            this_update: list.this_update.into(),
            next_update: list.next_update.into(),
            seconds_left: seconds_left(list.next_update),
            is_signed: list.is_signed,
        };
        lists.unwrap_or_default().into_iter().map(status).collect()
    }

    /// The source of policies, with the namespaces whose policies are not applied.
    fn policy_source(&self) -> SourceStatus {
        let mut status = source(SourceKind::Policy, &self.proxy.snapshots.policies.state());
        let policies = self.proxy.snapshots.policies.current();
        let not_applied = policies.not_applied().take(NOT_APPLIED_LISTED_MAX);
        status.unreadable.extend(not_applied.map(|(namespace, why)| {
            format!("policies of namespace {namespace} are not applied, and all connections to its pods are denied: {why}")
        }));
        status
    }

    /// Explains the policy decision on a connection.
    pub(super) fn explain(
        &self,
        from: &WorkloadRef,
        to: &WorkloadRef,
        port: u16,
    ) -> Result<Explanation, ExplainError> {
        let addresses = host::addresses().unwrap_or_default();
        let pods = self.proxy.pods.load();
        let known = ExplainContext {
            directory: &self.proxy.snapshots.directory.current(),
            policies: &self.proxy.snapshots.policies.current(),
            in_force: &|workload| in_force(&pods, workload),
            node: &self.node,
            is_node: &|address| addresses.iter().any(|own| *own == address && host::is_probe_source(own)),
        };
        explain::explain(known, from, to, port)
    }

    fn pods(&self, agent: AgentState) -> Vec<PodStatus> {
        let table = self.proxy.pods.load();
        let live = self.proxy.telemetry.live_by_pod();
        let policies = self.proxy.snapshots.policies.current();
        let pod = |workload: &Workload, policy: Option<&PodPolicy>, links: &[GuardedLink], state| PodStatus {
            name: workload.name.to_string(),
            namespace: workload.namespace.to_string(),
            cgroup: self.pods_cgroup.join(&workload.cgroup).display().to_string(),
            addresses: workload.addresses.clone(),
            identity: workload.identity.to_string(),
            mode: policy.map_or(NO_POLICY, |policy| mode(policy.modes.default)).to_owned(),
            port_modes: policy.map_or_else(BTreeMap::new, |policy| {
                policy.modes.exceptions().map(|(p, m)| (p, mode(m).to_owned())).collect()
            }),
            policies: policy.map_or_else(Vec::new, |policy| policy.authorization.first_names()),
            in_clear: policy
                .map_or(NO_POLICY, |policy| in_clear_text(policy.plaintext_egress(workload)))
                .to_owned(),
            guarded_links: links.iter().map(|link| format!("{} ({})", link.interface, link.by)).collect(),
            policy_not_applied: policy.and_then(|policy| policy.not_applied.clone()),
            rewrites_arrivals: false,
            raised_by_minimum: policy.is_some() && policies.is_raised(workload),
            state,
            flows: live.get(&(workload.namespace.clone(), workload.name.clone())).copied().unwrap_or(0),
        };
        let enrolled = table.pods.iter().map(|p| PodStatus {
            rewrites_arrivals: p.rewrites_arrivals(),
            ..pod(&p.workload, Some(&p.policy()), &p.links, enrolled_under(agent))
        });
        let waiting = table
            .waiting
            .iter()
            .chain(&table.absent.listed)
            .map(|w| pod(&w.workload, w.policy.as_deref(), &[], PodState::Waiting(w.reason.clone())));
        let directory = self.proxy.snapshots.directory.current();
        let left_alone = directory.host_network().map(|workload| {
            let reason = "it has the node's network (hostNetwork)".to_owned();
            pod(workload, None, &[], PodState::LeftAlone(reason))
        });
        let of_proxies = table.left_alone.iter().map(|left| {
            pod(&left.workload, Some(&left.policy), &[], PodState::LeftAlone(left.reason.clone()))
        });
        let mut all: Vec<PodStatus> = enrolled.chain(waiting).chain(left_alone).chain(of_proxies).collect();
        all.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        all
    }

    fn unnamed(&self) -> UnnamedStatus {
        let table = self.proxy.pods.load();
        let Unnamed { held, left_alone, example } = table.unnamed.clone();
        let is_held = self.kernel.maps.default_mode().is_ok_and(|mode| mode == Some(tacit_abi::Mode::Strict));
        let held = if is_held { held } else { 0 };
        UnnamedStatus { held, left_alone, example, limit_seconds: self.unnamed_pod_timeout.as_secs() }
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

    fn connect_hooks(&self) -> Vec<HookProgramStatus> {
        let own: HashSet<u32> = self.kernel.programs().states().iter().map(|program| program.id).collect();
        let found = connect_programs(&self.pods_cgroup).unwrap_or_else(|error| {
            tracing::debug!(%error, "programs at the connect hooks are not known");
            Vec::new()
        });
        let status = |HookProgram { hook, id, name }| HookProgramStatus {
            hook: hook.to_owned(),
            id,
            name,
            is_tacit: own.contains(&id),
        };
        found.into_iter().map(status).collect()
    }

    fn kernel(&self) -> Vec<CounterStatus> {
        let counters = self.kernel.maps.counters();
        let counter = |c: KernelCounter| CounterStatus {
            name: c.name.to_owned(),
            help: c.help.to_owned(),
            value: c.value,
        };
        counters.into_iter().map(counter).collect()
    }

    fn exceptions(&self) -> Vec<ExceptionStatus> {
        let counter = |c: ExceptionCounter| ExceptionStatus {
            name: c.name.to_owned(),
            hook: c.hook.to_owned(),
            help: c.help.to_owned(),
            value: c.value,
        };
        self.kernel.maps.exceptions().into_iter().map(counter).collect()
    }

    /// Every share of the node. Which rows there are is stated in `tacit_core::shares`.
    fn shares(&self) -> Vec<ShareStatus> {
        let table = self.proxy.pods.load();
        let name = |pod| pod_name(&table, pod);
        let mut all = self.proxy.shares.usage(&name);
        all.push(self.proxy.sessions.usage().named(name));
        all.push(self.proxy.hbone.usage().named(name));
        all.push(self.proxy.telemetry.admin_connections());
        let policies = self.proxy.snapshots.policies.current();
        let of_kernel = kernel_shares::usage(&self.kernel.maps, &table, &policies);
        all.extend(of_kernel.map(|usage| usage.named(name)));
        all.extend(policies.share_uses());
        all.push(table.absent.share_use());
        all.extend(self.proxy.snapshots.mesh.node_services_use());
        let row = |usage: &ShareUse<String>| SHARES.iter().position(|row| row.resource == usage.resource);
        all.sort_by_key(row);
        all.into_iter().map(ShareStatus::of).collect()
    }

    fn guard(&self) -> GuardStatus {
        let table = self.proxy.pods.load();
        let name = |cgroup: u64| pod_name(&table, cgroup);
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

/// Returns the state of an enrolled pod.
fn enrolled_under(agent: AgentState) -> PodState {
    match agent {
        AgentState::Detached => {
            PodState::Waiting("nothing of it is captured: the pods' cgroup is gone or another one".to_owned())
        }
        _ => PodState::Enrolled,
    }
}

fn nodes(not_applied: NodesNotApplied) -> NodesStatus {
    let NodesNotApplied { addresses, ports } = not_applied;
    NodesStatus { addresses_not_applied: addresses, ports_not_applied: ports }
}

/// Mode of a pod for which neither the kernel nor the agent holds a policy.
const NO_POLICY: &str = "none";

/// The policy that connections to a workload of this node meet.
fn announce_status(state: &AnnounceState) -> AnnounceStatus {
    AnnounceStatus {
        pods: state.announced as u64,
        pending: state.pending as u64,
        patches: state.patches,
        failures: state.failures,
        last_error: state.last_error.clone(),
    }
}

fn in_force(pods: &Pods, workload: &Workload) -> PolicyInForce {
    let (policy, waits_for) = pods.policy_of(workload).unwrap_or((None, None));
    let waits_for = waits_for.map(str::to_owned);
    match policy {
        Some(policy) => PolicyInForce::Held {
            modes: policy.modes.clone(),
            authorization: policy.authorization.clone(),
            not_applied: policy.not_applied.clone(),
            waits_for,
        },
        None => {
            PolicyInForce::Nothing { waits_for: waits_for.unwrap_or_else(|| "not looked at yet".to_owned()) }
        }
    }
}

fn pod_name(table: &Pods, cgroup: u64) -> String {
    match table.pods.iter().find(|pod| pod.cgroup == cgroup) {
        Some(pod) => format!("{}/{}", pod.workload.namespace, pod.workload.name),
        None => format!("cgroup {cgroup}"),
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
    let issuer = match issuer {
        Issuer::Istio(issuer) => issuer,
        Issuer::Spire(issuer) => {
            return IssuerStatus {
                address: format!("spire:{}", issuer.socket().display()),
                last_answer: issuer.answered().map(Into::into),
                clock_ahead_ms: None,
            };
        }
        _ => return IssuerStatus { address: "embedded".to_owned(), ..IssuerStatus::default() },
    };
    let contact = issuer.contact();
    IssuerStatus {
        address: issuer.address().to_owned(),
        last_answer: contact.answered.map(Into::into),
        clock_ahead_ms: contact.skew.map(Skew::ahead_ms),
    }
}

/// Returns the whole seconds until `time`, negative ones since.
fn seconds_left(time: SystemTime) -> i64 {
    match time.duration_since(SystemTime::now()) {
        Ok(left) => i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        Err(past) => i64::try_from(past.duration().as_secs()).map_or(i64::MIN, |s| -s),
    }
}

/// An identity that has never had a certificate is seen as its pod waiting.
fn certificate(state: &CertificateState) -> Option<CertificateStatus> {
    let not_after = state.not_after?;
    Some(CertificateStatus {
        identity: state.identity.to_string(),
        serial: state.serial.clone(),
        not_before: state.not_before?.into(),
        not_after: not_after.into(),
        seconds_left: seconds_left(not_after),
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
        connection: None,
    }
}

fn connection(state: ConnectionState) -> ConnectionStatus {
    let resources = state.types.into_iter().map(|of| ResourcesStatus {
        kind: of.name.to_owned(),
        count: of.resources as u64,
        services: of.services as u64,
        version: of.version,
        nonce: of.nonce,
    });
    ConnectionStatus {
        connected_since: state.connected_since.map(Into::into),
        connections: state.connections,
        resources: resources.collect(),
        rejections: state.rejections,
        last_rejection: state.last_rejection.map(|(at, error)| RejectionStatus { at: at.into(), error }),
    }
}

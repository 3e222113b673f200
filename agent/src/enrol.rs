//! A pod appears, changes or goes: its cgroup is found, its network namespace opened, its listeners started, and the
//! kernel told, in an order that never leaves an enrolled pod uncovered.
//!
//! ```text
//! cgroup exists ──> PODS entry (mesh connections fail: nobody listens yet; the guard holds)
//!   └ process ──> certificate ──> the pod's addresses ──> listeners ──> modes ──> steering ──> guard on its links ──>
//!       PODS entry with the pod's namespace: connections are captured ──> those from before are reset
//! processes gone ──> listeners closed, entry stays (mesh connections fail)
//! cgroup gone    ──> everything removed
//! ```
//! Pods are found by cgroup, as the directory names it; events come from inotify, with a slow rescan behind it.
//!
//! | module | content |
//! |---|---|
//! | `node_pods` | the directory's pods of this node, and which of them have a cgroup; pure |
//! | `plan` | the next steps, from what is observed and wanted; pure |
//! | `observe` | looks at cgroups, processes and network namespaces |
//! | `kernel_state` | writes and removes what the kernel has of a pod |
//! | `policy_publisher` | the only writer of policy, to the kernel and to pods |
//! | `pod_policy` | the policy in force for a pod, as one snapshot; pure |
//! | `pods` | the pods of this node for the proxy and the status |
//! | `unnamed` | pods that no source names, each held for a bounded time |
//! | `left_alone` | pods with a proxy of their own |
//! | `own_rules` | pods whose own rules rewrite what arrives, or with links to containers inside |
//! | `events` | inotify on cgroups |
//!
//! This file has the driver: on a thread of its own it observes, plans, and acts.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Weak, atomic::AtomicBool},
    thread,
    time::{Duration, Instant},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use tacit_abi::limits;
use tacit_core::{
    directory::{Ranges, Workload},
    policy::Policies,
    spiffe::SpiffeId,
};
use tacit_identity::issuer::IssueError;
use tacit_kernel::{
    GuardedLink, Kernel,
    cgroup::{self, Cgroup},
    netns::{HostNetns, Netns},
    socket::Listeners,
};
use tokio::{
    runtime::Handle,
    sync::{Notify, oneshot},
};
use tokio_util::sync::CancellationToken;

use crate::{control_state::Snapshots, recheck::Rechecks, telemetry::Telemetry};

mod events;
mod kernel_state;
mod left_alone;
mod node_pods;
mod observe;
mod own_rules;
mod plan;
mod pod_policy;
mod pods;
mod policy_publisher;
#[cfg(test)]
mod testing;
mod unnamed;

use events::{CgroupChanges, CgroupEvents};
use kernel_state::entry;
use left_alone::TakenPorts;
pub use left_alone::{Answer, LeftAlone};
pub use node_pods::Absent;
use node_pods::NodePods;
use plan::{Action, NotYet, plan, taken_address};
pub use pod_policy::PodPolicy;
pub use pods::{Pod, Pods, Waiting};
pub use policy_publisher::publish_mesh_default;
pub use unnamed::Unnamed;
use unnamed::UnnamedCgroups;

/// Rescan without any event: covers what inotify can miss (an overflow, a cgroup made before its watch).
const RESCAN: Duration = Duration::from_secs(1);
/// Soonest that a pod with processes is looked at again.
const SOONEST: Duration = Duration::from_millis(5);
/// Starts serving a pod's listeners until the pod's `closed` token is cancelled.
pub type Serve = Arc<dyn Fn(Arc<Pod>, Listeners) + Send + Sync>;

/// The driver of enrolment.
pub struct Enroller {
    /// The kernel side.
    pub kernel: Arc<Kernel>,
    /// The node's own namespace.
    pub host: Arc<HostNetns>,
    /// This node's name in the directory.
    pub node: Arc<str>,
    /// Directory, policies, ranges of the mesh and certificates.
    pub snapshots: Snapshots,
    /// Counts connections from before enrolment that were reset.
    pub telemetry: Telemetry,
    /// Another agent serves the pods until all were looked at once.
    pub takes_over: bool,
    /// The cgroup that holds all pods.
    pub pods_cgroup: Cgroup,
    /// Time for which a pod that no source names is held.
    pub unnamed_pod_timeout: Duration,
    /// Receives the snapshot of this node's pods.
    pub table: Arc<ArcSwap<Pods>>,
    /// Notified after each snapshot.
    pub published: Arc<Notify>,
    /// Decides again on live flows.
    pub rechecks: Arc<Rechecks>,
    /// Starts the accept loops of a pod.
    pub serve: Serve,
    /// Starts to answer the peers of a pod that is left alone.
    pub answer: Answer,
    /// Told after every look at all pods, once the issuer has answered for each or was given up.
    pub reconciled: Arc<dyn Fn() + Send + Sync>,
}

impl Enroller {
    /// Enrols pods until `stop`, and returns once nothing is changed any more. The driver has a thread of its own, because
    /// it enters network namespaces and waits for netlink, /proc and the kernel's maps.
    ///
    /// # Errors
    /// If the thread or the watch of cgroups cannot be started, or the thread panicked.
    pub async fn run(self, stop: CancellationToken) -> io::Result<()> {
        let (tell, ended) = oneshot::channel();
        let runtime = Handle::current();
        // The receiver is dropped only if the agent ends without waiting.
        let drive = move || drop(tell.send(runtime.block_on(self.drive(stop))));
        let started = thread::Builder::new().name("tacit-enrol".to_owned()).spawn(drive);
        let result = match started {
            Ok(_) => ended.await.unwrap_or_else(|_| Err(io::Error::other("the thread panicked"))),
            Err(error) => Err(error),
        };
        result.inspect_err(|error| {
            tracing::error!(%error, "enrolment stopped: changes of pods and policies are not applied; restart the agent");
        })
    }

    async fn drive(self, stop: CancellationToken) -> io::Result<()> {
        let mut events = CgroupEvents::new()?;
        let mut directory = self.snapshots.directory.subscribe();
        let mut policies = self.snapshots.policies.subscribe();
        let mut certificates = self.snapshots.identities.changes();
        let mut state = State::default();
        state.known.extend(self.kernel.maps.pods());
        state.exempt.extend(self.kernel.maps.exempt());
        if !self.kernel.programs().were_attached() {
            state.uncaptured.extend(state.known.keys());
        }
        state.attached.extend(self.attached());
        state.unnamed = UnnamedCgroups::left_alone(state.exempt.keys().copied());
        let mut wake = Wake::Look;
        while !stop.is_cancelled() {
            self.publish_new_policies(&mut state);
            let is_due = state.next_look.is_none_or(|at| at <= Instant::now());
            if self.take_in(&mut state, &mut events, wake) || is_due {
                self.reconcile(&mut state, &mut events);
            }
            let next_look = state.next_look.unwrap_or_else(Instant::now);
            wake = tokio::select! {
                () = stop.cancelled() => Wake::Policies,
                changes = events.changed() => Wake::Cgroups(changes),
                _ = directory.changed() => Wake::Directory,
                _ = policies.changed() => Wake::Policies,
                _ = certificates.changed() => Wake::Look,
                () = tokio::time::sleep_until(next_look.into()) => Wake::Look,
            };
        }
        Ok(())
    }

    /// Takes in what woke the driver. Returns true if the pods must be looked at.
    fn take_in(&self, state: &mut State, events: &mut CgroupEvents, wake: Wake) -> bool {
        match wake {
            Wake::Look => {}
            // Published before.
            Wake::Policies => return false,
            Wake::Directory => {
                let directory = self.snapshots.directory.current();
                self.grow(state, &directory);
                // Another node's pods are no reason to look at this node's.
                return state.pods.follow(&directory, &self.node) || state.ranges_changed;
            }
            Wake::Cgroups(changes) => {
                if changes.is_incomplete {
                    state.pods.rescan_all();
                }
                for created in changes.created {
                    if let Ok(cgroup) = created.strip_prefix(self.pods_cgroup.path())
                        && state.pods.created(cgroup)
                    {
                        events.watch(&created);
                    }
                }
            }
        }
        true
    }

    /// Looks at the pods that have a cgroup, and at a bounded number of others. Nothing waits here: a certificate that comes
    /// later leads to the next look.
    fn reconcile(&self, state: &mut State, events: &mut CgroupEvents) {
        let directory = self.snapshots.directory.current();
        self.grow(state, &directory);
        state.ranges_changed = false;
        state.pods.follow(&directory, &self.node);
        if state.rescanned.is_none_or(|at| at.elapsed() >= RESCAN) {
            state.rescanned = Some(Instant::now());
            state.pods.rescan_some();
        }
        let root = self.pods_cgroup.path();
        // Watched before they are looked at: no event is missed.
        events.watch(root);
        let has_more = state.pods.look(|cgroup| {
            let path = root.join(cgroup);
            events.watch_for(&path, root);
            cgroup::id_at(&path).is_some()
        });
        let mut wanted = state.pods.wanted();
        let watched = wanted.pods.iter().chain(&wanted.bystanders);
        watched.for_each(|w| events.watch_pod(&root.join(&w.cgroup)));
        let absent = state.pods.waiting(root);
        // Before a pod has processes, and all at once: less to wait for later.
        let expected = wanted.pods.iter().chain(absent.listed.iter().map(|waiting| &waiting.workload));
        expected.for_each(|workload| self.snapshots.identities.prepare(&workload.identity));
        self.look_for_unnamed(state, &directory);
        state.has_seen_all |= !has_more;
        self.look_for_taken_ports(state, &wanted);
        let policies = self.snapshots.policies.current();
        let left_alone = self.leave_alone(state, &policies, &mut wanted);
        let observed = self.observe(state, &wanted);
        if state.has_seen_all {
            state.attached.clear();
        }
        let mut look = Look::default();
        for action in plan(&observed, &wanted) {
            // Enrolling takes milliseconds a pod; a policy of others must not wait for all of them.
            if matches!(action, Action::Enrol(..)) {
                self.publish_new_policies(state);
            }
            self.act(state, &mut look, action);
        }
        state.populated.retain(|cgroup, _| state.known.contains_key(cgroup));
        state.policy_entries.retain(|cgroup, _| state.known.contains_key(cgroup));
        let present: HashSet<u64> = observed.cgroups.values().map(|cgroup| cgroup.id).collect();
        state.guarded.retain(|cgroup| present.contains(cgroup));
        state.taken_ports.retain(|cgroup| present.contains(&cgroup));
        self.answer_peers(state, left_alone);
        state.pods.keep_present(observed.cgroups.keys());
        self.publish_policies(state);
        self.publish(state, look.waiting.into_values().collect());
        if state.has_seen_all {
            self.forget_identities(state, &wanted.pods);
        }
        let is_current = Arc::ptr_eq(&policies, &self.snapshots.policies.current());
        let pause = if has_more || !is_current {
            Duration::ZERO
        } else {
            pause(state.populated.values().map(Instant::elapsed))
        };
        state.next_look = Some(Instant::now() + pause);
        if !has_more && !observed.uncertified.values().any(|error| matches!(error, IssueError::Awaited)) {
            state.took_over = true;
            (self.reconciled)();
        }
    }

    fn act(&self, state: &mut State, look: &mut Look, action: Action) {
        let at = match &action {
            Action::Cover(_, cgroup) | Action::Exempt(_, cgroup) | Action::Enrol(_, cgroup) => Some(*cgroup),
            Action::Wait(workload, _) => cgroup::id_at(&self.pods_cgroup.path().join(&workload.cgroup)),
            Action::Release(_) | Action::Remove(_) | Action::LeaveUnnamed(_) | Action::Guard(..) => None,
        };
        let done = match action {
            Action::Release(path) => return Self::release(state, look, &path),
            Action::Remove(cgroup) => {
                let links = look.released.remove(&cgroup).unwrap_or_default();
                state.exempt.remove(&cgroup);
                state.guarded.remove(&cgroup);
                state.held.remove(&cgroup);
                return self.remove(cgroup, state.known.remove(&cgroup), &links);
            }
            Action::Cover(workload, cgroup) => {
                state.exempt.remove(&cgroup);
                // A pod that was left alone is not steered.
                state.guarded.remove(&cgroup);
                self.cover(state, cgroup, &workload).map(drop).map_err(|reason| (workload, reason))
            }
            Action::Exempt(workload, cgroup) => {
                let told = self.kernel.maps.set_exempt(cgroup, &workload.addresses);
                let told = told.inspect(|()| {
                    state.known.remove(&cgroup);
                    state.held.remove(&cgroup);
                    state.exempt.insert(cgroup, workload.addresses.clone());
                });
                told.map_err(|error| (workload, NotYet::Kernel(error.to_string())))
            }
            Action::LeaveUnnamed(cgroup) => return self.leave_unnamed(state, cgroup),
            Action::Guard(workload, cgroup) => return self.guard_early(state, &workload, cgroup),
            Action::Wait(workload, reason) => {
                if let Some(cgroup) = at.filter(|_| reason.is_running()) {
                    state.populated.entry(cgroup).or_insert_with(Instant::now);
                }
                if let (Some(cgroup), NotYet::PortTaken(_)) = (at, &reason) {
                    self.refuse_connections(state, cgroup, &workload);
                }
                Err((workload, reason))
            }
            Action::Enrol(workload, cgroup) => {
                state.populated.entry(cgroup).or_insert_with(Instant::now);
                self.enrol(state, &workload, cgroup).map_err(|reason| (workload, reason))
            }
        };
        if let Err((workload, reason)) = done {
            // However far it got: policies change while it waits.
            if let Some(cgroup) = at {
                self.hold_policy(state, cgroup, &workload);
            }
            // Listed with the absent pods.
            if matches!(reason, NotYet::NoCgroup(_)) {
                return;
            }
            let reason = reason.to_string();
            let policy = at.and_then(|cgroup| state.held.get(&cgroup).map(|held| Arc::clone(&held.policy)));
            // A pod that cannot be covered waits for that first.
            look.waiting.entry(workload.cgroup.clone()).or_insert(Waiting { workload, reason, policy });
        }
    }

    /// Closes the listeners of a pod. Modes, steering and entry without a listener deny. They stay as long as a process
    /// could still appear behind them, and the next enrolment replaces them.
    fn release(state: &mut State, look: &mut Look, path: &Path) {
        let Some(pod) = state.current.remove(path) else { return };
        pod.closed.cancel();
        look.released.insert(pod.cgroup, pod.links.clone());
        tracing::info!(pod = %pod.workload.name, namespace = %pod.workload.namespace, "no longer enrolled");
    }

    fn enrol(&self, state: &mut State, workload: &Arc<Workload>, cgroup: u64) -> Result<(), NotYet> {
        let slot = self.cover(state, cgroup, workload)?;
        state.guarded.remove(&cgroup);
        let path = self.pods_cgroup.path().join(&workload.cgroup);
        let processes = cgroup::processes(&path).unwrap_or_default();
        if processes.is_empty() {
            return Err(NotYet::NoProcess);
        }
        let (netns, workload) = self.find_netns(processes, workload)?;
        // Replaced since the plan was made: its processes are not those of the planned cgroup.
        if cgroup::id_at(&path) != Some(cgroup) {
            return Err(NotYet::NoCgroup(path));
        }
        // Its namespace may have told addresses that the plan did not know.
        let others = state.current.values().map(|pod| &*pod.workload);
        if let Some(taken) = taken_address(&workload.addresses, others) {
            return Err(NotYet::AddressTaken(taken));
        }
        self.check_ports(state, cgroup, &netns, &workload.addresses)?;
        self.check_programs(&path)?;
        let pod = self.start(state, workload, (cgroup, slot), netns)?;
        let took = state.populated.remove(&cgroup).map_or(Duration::ZERO, |since| since.elapsed());
        self.telemetry.enrolled(took);
        let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        tracing::info!(pod = %pod.workload.name, namespace = %pod.workload.namespace, took_ms, "enrolled");
        state.unsettled.insert(cgroup, Instant::now());
        state.current.insert(pod.workload.cgroup.clone(), pod);
        Ok(())
    }

    /// Asks the kernel whether the programs run for sockets of the pod. Nothing of a pod may be shown as enrolled before.
    fn check_programs(&self, cgroup: &Path) -> Result<(), NotYet> {
        let missing = self.kernel.programs().missing_in(cgroup);
        match missing {
            Ok(missing) if missing.is_empty() => Ok(()),
            Ok(missing) => Err(NotYet::NotCaptured(missing.join(", "))),
            Err(error) => Err(NotYet::NotCaptured(format!("which ones is not known: {error}"))),
        }
    }

    /// Opens the pod's listeners, has the kernel use them, and serves them.
    fn start(
        &self,
        state: &mut State,
        workload: Arc<Workload>,
        (cgroup, slot): (u64, u32),
        netns: Netns,
    ) -> Result<Arc<Pod>, NotYet> {
        let policy = PodPolicy::configured(&self.snapshots.policies.current(), &workload);
        let listeners = match Listeners::open(&netns, &self.host) {
            Ok(listeners) => listeners,
            Err(error) => {
                return Err(match error.taken_port() {
                    Some(port) => Self::note_taken(state, cgroup, &netns, &workload.addresses, port),
                    None => NotYet::Kernel(error.to_string()),
                });
            }
        };
        let capture_port = listeners.capture_port().map_err(|e| NotYet::Kernel(e.to_string()))?;
        let was_enrolled_here = !state.uncaptured.contains(&cgroup)
            && self.kernel.maps.enrolled_in(cgroup) == Some(netns.cookie());
        let at = (netns.cookie(), capture_port);
        let entry = |policy: &PodPolicy| entry(&workload, cgroup, slot, at, policy);
        let (policy, links) =
            self.tell_kernel(entry, &netns, &listeners, policy).map_err(|e| NotYet::Kernel(e.to_string()))?;
        state.held.remove(&cgroup);
        // The policies may be later ones than those that were published last.
        state.policy_entries.remove(&cgroup);
        state.uncaptured.remove(&cgroup);
        if !was_enrolled_here {
            self.reset_plaintext(&netns, &workload, |address| self.snapshots.mesh.contains(address));
        }
        let pod = Arc::new(Pod {
            workload,
            cgroup,
            netns,
            links,
            closed: CancellationToken::new(),
            policy: state.policy_of(cgroup, policy),
            slot,
            since: Instant::now(),
            capture_port,
            not_tunnelled: ArcSwapOption::empty(),
            rewrites_arrivals: AtomicBool::new(false),
            inner_ranges: ArcSwap::default(),
        });
        self.look_into(&pod);
        // Flows of an earlier enrolment in the same cgroup may live.
        self.rechecks.policy_changed(cgroup);
        (self.serve)(pod.clone(), listeners);
        Ok(pod)
    }

    /// Identities of no pod of this node are not renewed any more.
    fn forget_identities(&self, state: &mut State, wanted: &[Arc<Workload>]) {
        let absent = state.pods.waiting(self.pods_cgroup.path());
        let enrolled = state.current.values().map(|pod| &pod.workload);
        let left_alone = state.left_alone.values().map(|left| &left.workload);
        let expected = wanted.iter().chain(absent.listed.iter().map(|waiting| &waiting.workload));
        let in_use: HashSet<&SpiffeId> =
            expected.chain(enrolled).chain(left_alone).map(|w| &w.identity).collect();
        for certificate in self.snapshots.identities.certificates() {
            if !in_use.contains(&certificate.identity) {
                self.snapshots.identities.forget(&certificate.identity);
            }
        }
    }

    fn publish(&self, state: &mut State, waiting: Vec<Waiting>) {
        let absent = state.pods.waiting(self.pods_cgroup.path());
        let unnamed = state.unnamed.shown(|cgroup| state.exempt.contains_key(&cgroup));
        let (enrolled, left) = (state.current.values(), state.left_alone.values());
        let (enrolled, left) = (enrolled.cloned().collect(), left.cloned().collect());
        let table = Arc::new(Pods::new(enrolled, waiting, absent, unnamed, left));
        let before = self.table.swap(Arc::clone(&table));
        self.published.notify_one();
        log_new(&before.waiting, &table.waiting);
        if !Arc::ptr_eq(&before.absent, &table.absent) {
            log_new(&before.absent.listed, &table.absent.listed);
        }
    }
}

/// Logs the pods that wait for a reason for which they did not wait before.
fn log_new(before: &[Waiting], now: &[Waiting]) {
    // A set: thousands of pods may wait.
    let known: HashSet<(&Path, &str)> =
        before.iter().map(|w| (w.workload.cgroup.as_path(), w.reason.as_str())).collect();
    for Waiting { workload, reason, .. } in now {
        if !known.contains(&(workload.cgroup.as_path(), reason.as_str())) {
            tracing::info!(pod = %workload.name, namespace = %workload.namespace, reason, "not enrolled yet");
        }
    }
}

/// The event that woke the driver.
enum Wake {
    /// The time, or a certificate.
    Look,
    Policies,
    Directory,
    Cgroups(CgroupChanges),
}

/// Time until the next look without any event. Nothing tells when a process enters the pod's network, or when that has
/// its addresses: pods that have had processes for `waiting` are looked at again after half as long.
fn pause(waiting: impl Iterator<Item = Duration>) -> Duration {
    waiting.map(|waited| (waited / 2).clamp(SOONEST, RESCAN)).min().unwrap_or(RESCAN)
}

#[derive(Default)]
struct State {
    /// Enrolled pods by the directory's cgroup path.
    current: HashMap<PathBuf, Arc<Pod>>,
    /// Pods in the kernel's map: cgroup id to slot.
    known: HashMap<u64, u32>,
    /// Policies in force of pods that the kernel has an entry of and that this agent does not serve, by cgroup id.
    held: HashMap<u64, HeldPolicy>,
    /// Policies of pods by cgroup id, while anybody looks at them.
    policies: HashMap<u64, Weak<ArcSwap<PodPolicy>>>,
    /// The policies that were published last.
    published: Option<Arc<Policies>>,
    /// Pods whose policy changed a short time ago, by cgroup id, with when.
    unsettled: HashMap<u64, Instant>,
    /// Pods that have processes and are not enrolled yet, by cgroup id, with when that was first seen.
    populated: HashMap<u64, Instant>,
    /// Pods that the kernel leaves alone: cgroup id to the addresses it has for them.
    exempt: HashMap<u64, Vec<IpAddr>>,
    /// Cgroups that no source names.
    unnamed: UnnamedCgroups,
    /// Pods with a port that another program has.
    taken_ports: TakenPorts,
    /// Pods that are left alone because of such a port, by the directory's cgroup path.
    left_alone: HashMap<PathBuf, LeftAlone>,
    /// Pods, by cgroup id, whose links are guarded though they are not enrolled, or cannot be guarded.
    guarded: HashSet<u64>,
    /// Pods, by cgroup id, that programs of an earlier agent are attached for; empty once all pods were looked at.
    attached: HashSet<u64>,
    /// Pods of an earlier agent, by cgroup id, of which connections may have passed while a program was not attached. Empty if all were.
    uncaptured: HashSet<u64>,
    /// True once each pod of the directory was looked at. Entries of an earlier agent are kept until then.
    has_seen_all: bool,
    /// True once all pods were reconciled.
    took_over: bool,
    /// The ranges of the mesh at the last look.
    ranges: Option<Arc<Ranges>>,
    /// True if the ranges have changed since the last look.
    ranges_changed: bool,
    /// The pods of the directory.
    pods: NodePods,
    /// The directory's workloads of enrolled pods, by cgroup id, that their policies were published for.
    policy_entries: HashMap<u64, Arc<Workload>>,
    /// The time of the next look. `None` before the first.
    next_look: Option<Instant>,
    /// The time of the last look at absent pods without an event.
    rescanned: Option<Instant>,
}

/// The policy in force of a pod that this agent does not serve.
struct HeldPolicy {
    /// The directory's workload that the policy was built for.
    workload: Arc<Workload>,
    /// The policies that the policy was built from, or later ones with the same content for the workload.
    policies: Arc<Policies>,
    policy: Arc<PodPolicy>,
}

/// Results of one pass over all pods, for later steps and for the operator.
#[derive(Default)]
struct Look {
    /// Pods that are not enrolled, by the directory's cgroup path.
    waiting: BTreeMap<PathBuf, Waiting>,
    /// Guarded links of pods that were released, by cgroup id.
    released: HashMap<u64, Vec<GuardedLink>>,
}

impl State {
    /// Puts the policy of a pod in force, for flows of an earlier enrolment in the same cgroup too.
    fn policy_of(&mut self, cgroup: u64, policy: PodPolicy) -> Arc<ArcSwap<PodPolicy>> {
        let policy = Arc::new(policy);
        if let Some(known) = self.policies.get(&cgroup).and_then(Weak::upgrade) {
            known.store(policy);
            return known;
        }
        let in_force = Arc::new(ArcSwap::new(policy));
        self.policies.retain(|_, known| known.strong_count() > 0);
        self.policies.insert(cgroup, Arc::downgrade(&in_force));
        in_force
    }

    /// Returns a slot that no pod has, if possible one of which `is_clean` is true.
    fn free_slot(&self, is_clean: impl Fn(u32) -> bool) -> u32 {
        let used: HashSet<u32> = self.known.values().copied().collect();
        let free = || (0..limits::SLOTS).filter(|slot| !used.contains(slot));
        free().find(|slot| is_clean(*slot)).or_else(|| free().next()).unwrap_or(limits::SLOTS)
    }
}

#[cfg(test)]
mod tests;

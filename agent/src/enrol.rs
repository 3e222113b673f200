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

use std::{
    collections::{HashMap, HashSet},
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use tacit_core::{
    directory::{Directory, Protocol, Ranges, Workload},
    policy::Policies,
    spiffe::SpiffeId,
};
use tacit_identity::{issuer::IssueError, manager::Identities};
use tacit_kernel::{
    Kernel,
    cgroup::{self, Cgroup},
    netns::{HostNetns, Netns},
    socket::{Listeners, Ports},
};
use tacit_sources::reload::Watched;
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{mesh::Mesh, telemetry::Telemetry};

mod events;
mod kernel_state;
mod pods;

use events::CgroupEvents;
use kernel_state::entry;
pub use kernel_state::{in_clear, kernel_mode};
pub use pods::{Pod, Pods, Waiting};

/// Rescan without any event: covers what inotify can miss (an overflow, a cgroup made before its watch).
const RESCAN: Duration = Duration::from_secs(1);
/// Soonest that a pod with processes is looked at again.
const SOONEST: Duration = Duration::from_millis(5);
/// Levels below the pods' cgroup at which the connect hooks look for a pod.
const POD_LEVELS: std::ops::RangeInclusive<u32> = 1..=2;

/// Starts serving a pod's listeners until the pod's `closed` token is cancelled.
pub type Serve = Arc<dyn Fn(Arc<Pod>, Listeners) + Send + Sync>;

/// What the driver works with.
pub struct Enroller {
    /// The kernel side.
    pub kernel: Arc<Kernel>,
    /// The node's own namespace.
    pub host: Arc<HostNetns>,
    /// This node's name in the directory.
    pub node: Arc<str>,
    /// Ranges of the mesh.
    pub mesh: Arc<Mesh>,
    /// Counts connections from before enrolment that were reset.
    pub telemetry: Telemetry,
    /// Another agent serves the pods until all were looked at once.
    pub takes_over: bool,
    /// The cgroup that holds all pods.
    pub pods_cgroup: Cgroup,
    /// Who is where.
    pub directory: Arc<Watched<Directory>>,
    /// Modes.
    pub policies: Arc<Watched<Policies>>,
    /// Certificates.
    pub identities: Arc<Identities>,
    /// Where the snapshot is published.
    pub table: Arc<ArcSwap<Pods>>,
    /// Starts the accept loops of a pod.
    pub serve: Serve,
    /// Told after every look at all pods, once the issuer has answered for each or was given up.
    pub reconciled: Arc<dyn Fn() + Send + Sync>,
}

/// Why a pod cannot be enrolled now. All of them are tried again.
#[derive(Debug, thiserror::Error)]
enum NotYet {
    #[error("its cgroup {0} does not exist yet")]
    NoCgroup(PathBuf),
    #[error("its cgroup is {0} levels below podsCgroup; pods are looked for 1 or 2 levels below")]
    Depth(u32),
    #[error("no process in its cgroup")]
    NoProcess,
    #[error("no process of its cgroup is in a network namespace that has {0}")]
    NoAddress(String),
    #[error("neither the directory nor its network namespace has an address of it yet")]
    AddressUnknown,
    #[error("its address {0} is in no range of the mesh; what it sends there would go in clear")]
    OutsideMesh(IpAddr),
    #[error("the address {0} that its network namespace has is another pod's")]
    AddressTaken(IpAddr),
    #[error("no certificate: {0}")]
    NoCertificate(String),
    #[error("{0}")]
    Kernel(String),
}

impl Enroller {
    /// Keeps enrolment true until `stop`.
    ///
    /// # Errors
    /// When cgroup events cannot be watched at all.
    pub async fn run(self, stop: CancellationToken) -> io::Result<()> {
        let mut events = CgroupEvents::new()?;
        let mut directory = self.directory.subscribe();
        let mut policies = self.policies.subscribe();
        let mut certificates = self.identities.changes();
        let mut state = State::default();
        state.known.extend(self.kernel.maps.pods());
        while !stop.is_cancelled() {
            self.reconcile(&mut state, &events);
            if !self.awaits_first_answer() {
                state.took_over = true;
                (self.reconciled)();
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = events.changed() => {}
                _ = directory.changed() => {}
                _ = policies.changed() => {}
                _ = certificates.changed() => {}
                () = tokio::time::sleep(pause(state.populated.values().map(Instant::elapsed))) => {}
            }
        }
        Ok(())
    }

    /// Waits for nobody: a certificate that is there later leads to the next look.
    fn reconcile(&self, state: &mut State, events: &CgroupEvents) {
        let directory = self.directory.current();
        self.grow(state, &directory);
        let wanted: Vec<Arc<Workload>> =
            directory.on_node(&self.node).filter(|w| w.protocol == Protocol::Tacit).cloned().collect();
        events.watch(self.pods_cgroup.path());
        // What the source lost sight of stays covered until its last process is gone.
        // One that is wanted again is what it is wanted as.
        let kept: HashMap<&Path, &Arc<Workload>> =
            directory.departed().chain(&wanted).map(|w| (w.cgroup.as_path(), w)).collect();
        self.release_gone(state, &kept);
        self.remove_leftovers(state, &kept);
        // Before a pod has processes, and all at once: less to wait for later.
        wanted.iter().for_each(|workload| self.identities.prepare(&workload.identity));
        let mut waiting = Vec::new();
        for workload in &wanted {
            // Enrolling takes milliseconds a pod; a policy of others must not wait for all of them.
            if state.applied.as_ref().is_none_or(|applied| !Arc::ptr_eq(applied, &self.policies.current())) {
                self.apply_policies(state, &kept);
            }
            let path = self.pods_cgroup.path().join(&workload.cgroup);
            events.watch_pod(&path);
            if state.current.contains_key(&workload.cgroup) {
                continue;
            }
            match self.enrol(state, workload) {
                Ok(pod) => {
                    let took =
                        state.populated.remove(&pod.cgroup).map_or(Duration::ZERO, |since| since.elapsed());
                    self.telemetry.enrolled(took);
                    let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
                    tracing::info!(pod = %workload.name, namespace = %workload.namespace, took_ms, "enrolled");
                    state.unsettled.insert(pod.cgroup, Instant::now());
                    state.current.insert(workload.cgroup.clone(), pod);
                }
                Err(reason) => {
                    waiting.push(Waiting { workload: workload.clone(), reason: reason.to_string() })
                }
            }
        }
        state.populated.retain(|cgroup, _| state.known.contains_key(cgroup));
        self.apply_policies(state, &kept);
        self.publish(state, waiting);
        self.forget_identities(state, &wanted);
    }

    /// Whether the issuer may yet answer for an identity that it was not asked for before.
    fn awaits_first_answer(&self) -> bool {
        let directory = self.directory.current();
        let mut wanted = directory.on_node(&self.node).filter(|w| w.protocol == Protocol::Tacit);
        wanted.any(|w| matches!(self.identities.ready(&w.identity), Err(IssueError::Awaited)))
    }

    /// Ends what is no longer true: another identity or address, another cgroup, no process left.
    fn release_gone(&self, state: &mut State, kept: &HashMap<&Path, &Arc<Workload>>) {
        let stays = |path: &PathBuf, pod: &Pod| {
            kept.get(path.as_path()).is_some_and(|w| is_same(w, &pod.workload)) && self.is_alive(path, pod)
        };
        let gone: Vec<PathBuf> = state
            .current
            .iter()
            .filter(|(path, pod)| !stays(path, pod))
            .map(|(path, _)| path.clone())
            .collect();
        for path in gone {
            let Some(pod) = state.current.remove(&path) else { continue };
            pod.closed.cancel();
            let still_wanted = kept.contains_key(path.as_path());
            let same_cgroup = cgroup::id_at(&self.pods_cgroup.path().join(&path)) == Some(pod.cgroup);
            // Modes, steering and entry without a listener deny; they stay as long as a process could still appear
            // behind them, and the next enrolment replaces them.
            if !(still_wanted && same_cgroup) {
                self.kernel.programs().unsteer(pod.cgroup);
                self.kernel.programs().unguard_links(pod.cgroup, &pod.links);
                self.kernel.maps.remove_links(pod.cgroup);
                self.kernel.maps.remove_modes(pod.slot);
                self.kernel.maps.remove_pod(pod.cgroup);
                state.known.remove(&pod.cgroup);
            }
            tracing::info!(pod = %pod.workload.name, namespace = %pod.workload.namespace, "no longer enrolled");
        }
    }

    fn is_alive(&self, path: &Path, pod: &Pod) -> bool {
        let path = self.pods_cgroup.path().join(path);
        cgroup::id_at(&path) == Some(pod.cgroup) && cgroup::is_populated(&path)
    }

    fn enrol(&self, state: &mut State, workload: &Arc<Workload>) -> Result<Arc<Pod>, NotYet> {
        let path = self.pods_cgroup.path().join(&workload.cgroup);
        let cgroup = Cgroup::open(&path).map_err(|_| NotYet::NoCgroup(path.clone()))?;
        let below = cgroup.level().saturating_sub(self.pods_cgroup.level());
        if !POD_LEVELS.contains(&below) {
            return Err(NotYet::Depth(below));
        }
        let policies = self.policies.current();
        let policy = (&policies.modes(workload), &policies.authorization(workload));
        let slot = self.cover(state, cgroup.id(), workload, policy)?;
        // Its packets to others with such an address are outside of what Tacit keeps.
        if let Some(outside) = workload.addresses.iter().find(|address| !self.mesh.contains(**address)) {
            return Err(NotYet::OutsideMesh(*outside));
        }
        let processes = cgroup::processes(&path).unwrap_or_default();
        if processes.is_empty() {
            return Err(NotYet::NoProcess);
        }
        state.populated.entry(cgroup.id()).or_insert_with(Instant::now);
        // Before the network is looked at: pods that wait for an authority are looked at each time it gives a certificate.
        self.identities.ready(&workload.identity).map_err(|e| NotYet::NoCertificate(e.to_string()))?;
        let (netns, workload) = self.find_netns(processes, workload)?;
        // A pod that may change its addresses must not get a neighbour's connections by it.
        let mut others = state.current.values().flat_map(|pod| &pod.workload.addresses);
        if let Some(taken) = others.find(|address| workload.addresses.contains(address)) {
            return Err(NotYet::AddressTaken(*taken));
        }
        let policies = self.policies.current();
        let (modes, authorization) = (policies.modes(&workload), policies.authorization(&workload));
        // Those of the agent that this one takes over from are still open.
        let ports = if self.takes_over && !state.took_over { Ports::OrSpare } else { Ports::Default };
        let listeners =
            Listeners::open(&netns, &self.host, ports).map_err(|e| NotYet::Kernel(e.to_string()))?;
        let capture_port = listeners.capture_port().map_err(|e| NotYet::Kernel(e.to_string()))?;
        let was_enrolled_here = self.kernel.maps.enrolled_in(cgroup.id()) == Some(netns.cookie());
        let at = (netns.cookie(), capture_port);
        let entry = entry(&workload, cgroup.id(), slot, at, (&modes, &authorization));
        let links = self
            .tell_kernel(&entry, &netns, &listeners, (&modes, &authorization))
            .map_err(|e| NotYet::Kernel(e.to_string()))?;
        if !was_enrolled_here {
            self.reset_plaintext(&netns, &workload, |address| self.mesh.contains(address));
        }
        let pod = Arc::new(Pod {
            workload: workload.clone(),
            cgroup: cgroup.id(),
            netns,
            modes: ArcSwap::from_pointee(modes),
            links,
            closed: CancellationToken::new(),
            authorization: watch::Sender::new(Arc::new(authorization)),
            slot,
            capture_port,
        });
        (self.serve)(pod.clone(), listeners);
        Ok(pod)
    }

    /// The pod's namespace, that of the first process with all the pod's addresses: a namespace nested in a pod has not.
    /// Addresses that the directory does not have yet are those of the one namespace in which all the pod's processes are.
    fn find_netns(
        &self,
        processes: Vec<u32>,
        workload: &Arc<Workload>,
    ) -> Result<(Netns, Arc<Workload>), NotYet> {
        let away = processes.into_iter().filter(|pid| !self.host.is_home_of(*pid).unwrap_or(true));
        let mut found: Vec<Netns> = Vec::new();
        for netns in away.filter_map(|pid| Netns::of_process(pid, &self.host).ok()) {
            if found.iter().all(|known| known.inode() != netns.inode()) {
                found.push(netns);
            }
        }
        let listed = |netns: &Netns| netns.addresses(&self.host).unwrap_or_default();
        if workload.addresses.is_empty() {
            let only = found.pop().filter(|_| found.is_empty()).ok_or(NotYet::AddressUnknown)?;
            let addresses = mesh_addresses(&listed(&only), &self.mesh.ranges());
            if addresses.is_empty() {
                return Err(NotYet::AddressUnknown);
            }
            // The pod may have written them itself.
            let directory = self.directory.current();
            if let Some(taken) =
                addresses.iter().find(|address| is_given_away(&directory, **address, workload))
            {
                return Err(NotYet::AddressTaken(*taken));
            }
            return Ok((only, Arc::new(Workload { addresses, ..(**workload).clone() })));
        }
        let has_all = |netns: &Netns| {
            let listed = listed(netns);
            workload.addresses.iter().all(|address| listed.contains(address))
        };
        match found.into_iter().find(has_all) {
            Some(netns) => Ok((netns, Arc::clone(workload))),
            None => {
                let addresses: Vec<String> = workload.addresses.iter().map(ToString::to_string).collect();
                Err(NotYet::NoAddress(addresses.join(" and ")))
            }
        }
    }

    /// Identities of no pod of this node are not renewed any more.
    fn forget_identities(&self, state: &State, wanted: &[Arc<Workload>]) {
        let enrolled = state.current.values().map(|pod| &pod.workload);
        let in_use: HashSet<&SpiffeId> = wanted.iter().chain(enrolled).map(|w| &w.identity).collect();
        for certificate in self.identities.certificates() {
            if !in_use.contains(&certificate.identity) {
                self.identities.forget(&certificate.identity);
            }
        }
    }

    fn publish(&self, state: &State, waiting: Vec<Waiting>) {
        let table = Pods::new(state.current.values().cloned().collect(), waiting.clone());
        let before = self.table.swap(Arc::new(table));
        // A set: thousands of pods may wait.
        let known: HashSet<(&Path, &str)> =
            before.waiting.iter().map(|w| (w.workload.cgroup.as_path(), w.reason.as_str())).collect();
        for Waiting { workload, reason } in waiting {
            if !known.contains(&(workload.cgroup.as_path(), reason.as_str())) {
                tracing::info!(pod = %workload.name, namespace = %workload.namespace, reason, "not enrolled yet");
            }
        }
    }
}

/// Time until the next look without any event. Nothing tells when a process enters the pod's network, or when that has
/// its addresses: pods that have had processes for `waiting` are looked at again after half as long.
fn pause(waiting: impl Iterator<Item = Duration>) -> Duration {
    waiting.map(|waited| (waited / 2).clamp(SOONEST, RESCAN)).min().unwrap_or(RESCAN)
}

/// The first address of each family that lies in the mesh.
fn mesh_addresses(listed: &[IpAddr], ranges: &Ranges) -> Vec<IpAddr> {
    let of_mesh = |address: &&IpAddr| ranges.contains(**address);
    let first = |is_ipv4| listed.iter().filter(of_mesh).find(|address| address.is_ipv4() == is_ipv4);
    [first(true), first(false)].into_iter().flatten().copied().collect()
}

/// Returns true if the directory gives `address` to somebody else than `workload`, or to nobody because it is unclear.
fn is_given_away(directory: &Directory, address: IpAddr, workload: &Workload) -> bool {
    let is_others = directory.at(address).is_some_and(|known| known.full_name() != workload.full_name());
    is_others
        || directory.is_unclear(address)
        || directory.service_at(address).is_some()
        || directory.is_node(address)
}

/// Is what is wanted the enrolled pod, to the data path? Name and labels may change under a running pod, these may not.
/// Addresses that the directory does not have yet were found in the pod.
fn is_same(wanted: &Workload, enrolled: &Workload) -> bool {
    let found = &enrolled.addresses;
    let all_found = wanted.addresses.iter().all(|address| found.contains(address));
    wanted.cgroup == enrolled.cgroup
        && wanted.identity == enrolled.identity
        && (wanted.addresses.is_empty() || all_found && wanted.addresses.len() == found.len())
        && (wanted.egress, wanted.udp) == (enrolled.egress, enrolled.udp)
}

#[derive(Default)]
struct State {
    /// Enrolled pods by the directory's cgroup path.
    current: HashMap<PathBuf, Arc<Pod>>,
    /// Pods in the kernel's map: cgroup id to slot.
    known: HashMap<u64, u32>,
    /// The policies that all enrolled pods were last looked at by.
    applied: Option<Arc<Policies>>,
    /// Pods whose policy changed a short time ago, by cgroup id, with when.
    unsettled: HashMap<u64, Instant>,
    /// Pods that have processes and are not enrolled yet, by cgroup id, with when that was first seen.
    populated: HashMap<u64, Instant>,
    /// Whether what an earlier agent left was looked through.
    swept: bool,
    /// Whether all pods were looked at once.
    took_over: bool,
    /// The ranges of the mesh at the last look.
    ranges: Option<Arc<Ranges>>,
}

impl State {
    fn free_slot(&self) -> u32 {
        let used: HashSet<u32> = self.known.values().copied().collect();
        (0_u32..).find(|slot| !used.contains(slot)).unwrap_or(u32::MAX)
    }
}

/// The directory once it knows `address`, or as it is after `limit`.
pub async fn discover(
    directory: &Arc<Watched<Directory>>,
    address: IpAddr,
    limit: Duration,
) -> Arc<Directory> {
    let mut changes = directory.subscribe();
    // Unknown still, or the source ended: what there is has to do.
    let _ = timeout(limit, changes.wait_for(|known| known.knows(address))).await;
    directory.current()
}

#[cfg(test)]
mod tests;

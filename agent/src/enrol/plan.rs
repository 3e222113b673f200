//! Plans what enrolment does next, from what is there and what is wanted. Pure: no I/O, no clock, no logging.
//!
//! | observed | planned |
//! |---|---|
//! | a wanted pod has a cgroup | cover it: the kernel sends nothing past the agent |
//! | it has a process and a certificate too | enrol it |
//! | something is missing | wait, with the reason |
//! | a served pod lost its last process | release it; the kernel keeps its entry |
//! | its identity or addresses changed | release it, and enrol it again |
//! | its cgroup was replaced | release it, remove the old cgroup, enrol it in the new one |
//! | the directory dropped it, and it has a process | nothing: it is served until its last process is gone |
//! | another program has a port of it, and its policies do not let it be left alone | release it; the kernel refuses |
//! | the kernel has a cgroup of no pod of the directory | remove it: an earlier agent left it, or the pod is gone |
//! | the same, and not all pods of the directory were looked at yet | nothing: it can be the cgroup of one of them |
//! | the directory has a pod that is not to be enrolled | tell the kernel to leave it alone, whatever the mesh's mode |
//! | the directory does not name a cgroup, for long enough | tell the kernel to leave it alone too |
//! | a pod that is not to be enrolled, or one without a certificate, has a process | guard its links: it sends from its own addresses only |
//!
//! All pods are covered before the first is enrolled, because enrolling takes milliseconds for each pod.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use tacit_core::{
    directory::{Ranges, Workload},
    spiffe::SpiffeId,
};
use tacit_identity::issuer::IssueError;

/// The state of the node.
#[derive(Debug, Default)]
pub(super) struct Observed {
    /// The cgroup that holds all pods.
    pub pods_cgroup: PathBuf,
    /// The cgroups of wanted and departed pods that exist, by the directory's path.
    pub cgroups: HashMap<PathBuf, ObservedCgroup>,
    /// The pods that this agent serves, by the directory's path.
    pub served: BTreeMap<PathBuf, Served>,
    /// Ids of the cgroups that the kernel has an entry of.
    pub covered: BTreeSet<u64>,
    /// Ids of the cgroups that the kernel leaves alone, with the addresses it has for them.
    pub exempt: BTreeMap<u64, Vec<IpAddr>>,
    /// Ids of the cgroups that no source has named for long enough.
    pub unnamed: BTreeSet<u64>,
    /// True until each pod of the directory was looked at. The kernel can have entries of pods that are not wanted yet.
    pub is_partial: bool,
    /// Ids of the cgroups whose links were guarded before enrolment, or cannot be.
    pub guarded: BTreeSet<u64>,
    /// Ids of cgroups for which an earlier agent attached programs.
    pub attached: BTreeSet<u64>,
    /// Identities of wanted pods that have no certificate, with the reason.
    pub uncertified: HashMap<SpiffeId, IssueError>,
    /// Reasons for which wanted pods cannot be enrolled because another program has their ports, by cgroup id.
    pub taken_ports: BTreeMap<u64, String>,
    /// The ranges of the mesh.
    pub ranges: Arc<Ranges>,
}

/// The state of a pod's cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ObservedCgroup {
    /// Its id.
    pub id: u64,
    /// Its level below the cgroup that holds all pods.
    pub level: Level,
    /// True if it has a process.
    pub populated: bool,
}

/// The level of a cgroup below the one that holds all pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    /// The connect hooks look for pods there.
    Hooked,
    /// They do not.
    Other(u32),
}

/// A pod that this agent serves.
#[derive(Debug, Clone)]
pub(super) struct Served {
    /// Id of its cgroup at enrolment.
    pub cgroup: u64,
    /// The workload it was enrolled as.
    pub workload: Arc<Workload>,
}

/// The pods that the directory has for this node, as far as they have a cgroup.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    /// The pods to enrol.
    pub pods: Vec<Arc<Workload>>,
    /// Pods that the source lost sight of. They are served until their last process is gone.
    pub departed: Vec<Arc<Workload>>,
    /// Pods that are known and not to be enrolled: outside the mesh, or with the node's network.
    pub bystanders: Vec<Arc<Workload>>,
}

impl Wanted {
    /// Returns all workloads by cgroup. A wanted pod comes before a departed one, and an earlier one before a later one.
    pub(super) fn kept(&self) -> HashMap<&Path, &Arc<Workload>> {
        self.departed.iter().chain(self.pods.iter().rev()).map(|w| (w.cgroup.as_path(), w)).collect()
    }
}

/// A step of the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// Stop to serve the pod. The kernel keeps its entry, so that connections of a process that appears fail.
    Release(PathBuf),
    /// Remove all that the kernel has for a cgroup.
    Remove(u64),
    /// Give the kernel an entry of the pod.
    Cover(Arc<Workload>, u64),
    /// Have the kernel leave a pod alone.
    Exempt(Arc<Workload>, u64),
    /// Have the kernel leave a cgroup alone that no source names.
    LeaveUnnamed(u64),
    /// Hold a pod that is not enrolled, or not yet, to its own addresses, and steer what arrives at one that is to be.
    Guard(Arc<Workload>, u64),
    /// Report why the pod is not enrolled.
    Wait(Arc<Workload>, NotYet),
    /// Open the pod's network namespace and listeners, and serve it.
    Enrol(Arc<Workload>, u64),
}

/// An obstacle to the enrolment of a pod. It is tried again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotYet {
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
    #[error("its address {0} is in no range of the mesh; traffic to it would be plaintext")]
    OutsideMesh(IpAddr),
    #[error("the address {0} that its network namespace has is another pod's")]
    AddressTaken(IpAddr),
    #[error("{0}")]
    PortTaken(String),
    #[error("no certificate: {0}")]
    NoCertificate(String),
    #[error(
        "the kernel does not run all programs for its sockets, so nothing of it would be captured; missing: {0}"
    )]
    NotCaptured(String),
    #[error("{0}")]
    Kernel(String),
}

impl NotYet {
    /// Returns true if the pod runs, and lacks what may come without an event.
    pub(super) fn is_running(&self) -> bool {
        !matches!(self, Self::NoCgroup(_) | Self::Depth(_) | Self::NoProcess | Self::OutsideMesh(_))
    }
}

/// Returns the steps that lead from `observed` to `wanted`, in the order in which no pod is left uncovered.
pub(super) fn plan(observed: &Observed, wanted: &Wanted) -> Vec<Action> {
    let kept = wanted.kept();
    let stays = |path: &Path, served: &Served| {
        let workload = kept.get(path).is_some_and(|workload| is_same(workload, &served.workload));
        let cgroup = observed.cgroups.get(path);
        let is_free = !observed.taken_ports.contains_key(&served.cgroup);
        workload && is_free && cgroup.is_some_and(|cgroup| cgroup.id == served.cgroup && cgroup.populated)
    };
    let (staying, gone): (Vec<_>, Vec<_>) =
        observed.served.iter().partition(|(path, served)| stays(path, served));
    let mut actions: Vec<Action> = gone.into_iter().map(|(path, _)| Action::Release(path.clone())).collect();

    let ids: HashSet<u64> =
        kept.keys().filter_map(|path| observed.cgroups.get(*path)).map(|cgroup| cgroup.id).collect();
    let left_alone: HashMap<u64, &Arc<Workload>> = wanted
        .bystanders
        .iter()
        .filter_map(|workload| Some((hooked(observed, workload)?.id, workload)))
        .filter(|(id, _)| !ids.contains(id))
        .collect();
    let in_kernel = observed.covered.iter().chain(&observed.attached).chain(observed.exempt.keys());
    let is_named = |id: &u64| ids.contains(id) || left_alone.contains_key(id);
    // A pod that the kernel has an entry of was named once. Its entry goes first, and its time to be held begins.
    let is_unnamed =
        |id: &u64| observed.unnamed.contains(id) && !is_named(id) && !observed.covered.contains(id);
    let is_foreign = |id: &u64| !observed.is_partial && !is_named(id) && !is_unnamed(id);
    let was_enrolled = |id: &u64| left_alone.contains_key(id) && observed.covered.contains(id);
    let removed: BTreeSet<u64> = in_kernel.copied().filter(|id| is_foreign(id) || was_enrolled(id)).collect();
    actions.extend(removed.iter().map(|id| Action::Remove(*id)));
    actions.extend(leave_alone(observed, &wanted.bystanders, &left_alone, &removed));
    let is_told = |id: &u64| !removed.contains(id) && observed.exempt.get(id).is_some_and(Vec::is_empty);
    let unnamed = observed.unnamed.iter().filter(|id| is_unnamed(id) && !is_told(id));
    actions.extend(unnamed.map(|id| Action::LeaveUnnamed(*id)));

    let mut planned: HashSet<&Path> = staying.iter().map(|(path, _)| path.as_path()).collect();
    let new = wanted.pods.iter().filter(|workload| planned.insert(&workload.cgroup));
    let mut steps = Vec::new();
    for workload in new {
        let id = observed.cgroups.get(&workload.cgroup).map_or(0, |cgroup| cgroup.id);
        let step = match obstacle(observed, workload, staying.iter().map(|(_, served)| &*served.workload)) {
            None => Action::Enrol(workload.clone(), id),
            Some(reason) => Action::Wait(workload.clone(), reason),
        };
        let has_no_place = matches!(step, Action::Wait(_, NotYet::NoCgroup(_) | NotYet::Depth(_)));
        if !has_no_place && !observed.covered.contains(&id) {
            actions.push(Action::Cover(workload.clone(), id));
        }
        // The guard stands before certificate and listeners; what needs the agent is refused until those are there.
        let is_refused = matches!(step, Action::Wait(_, NotYet::NoCertificate(_) | NotYet::PortTaken(_)));
        if is_refused && !observed.guarded.contains(&id) {
            steps.push(Action::Guard(workload.clone(), id));
        }
        steps.push(step);
    }
    actions.extend(steps);
    actions
}

/// Returns the steps for pods that are not to be enrolled.
fn leave_alone<'a>(
    observed: &'a Observed,
    bystanders: &'a [Arc<Workload>],
    left_alone: &'a HashMap<u64, &'a Arc<Workload>>,
    removed: &'a BTreeSet<u64>,
) -> impl Iterator<Item = Action> + 'a {
    bystanders.iter().flat_map(move |workload| {
        let cgroup = hooked(observed, workload)
            .filter(|cgroup| left_alone.get(&cgroup.id).is_some_and(|chosen| Arc::ptr_eq(chosen, workload)));
        let known = cgroup.is_some_and(|cgroup| {
            !removed.contains(&cgroup.id) && observed.exempt.get(&cgroup.id) == Some(&workload.addresses)
        });
        let exempt = cgroup.filter(|_| !known).map(|cgroup| Action::Exempt(workload.clone(), cgroup.id));
        let guard = cgroup.filter(|cgroup| {
            cgroup.populated && !workload.addresses.is_empty() && !observed.guarded.contains(&cgroup.id)
        });
        exempt.into_iter().chain(guard.map(|cgroup| Action::Guard(workload.clone(), cgroup.id)))
    })
}

/// Returns the pod's cgroup if the kernel's hooks look for pods at its level. An entry above that level would speak for
/// all pods below.
fn hooked<'a>(observed: &'a Observed, workload: &Workload) -> Option<&'a ObservedCgroup> {
    observed.cgroups.get(&workload.cgroup).filter(|cgroup| cgroup.level == Level::Hooked)
}

/// Returns the first reason that keeps a pod from being enrolled, as far as it is seen from outside the pod.
fn obstacle<'a>(
    observed: &Observed,
    workload: &Workload,
    others: impl Iterator<Item = &'a Workload>,
) -> Option<NotYet> {
    let Some(cgroup) = observed.cgroups.get(&workload.cgroup) else {
        return Some(NotYet::NoCgroup(observed.pods_cgroup.join(&workload.cgroup)));
    };
    if let Level::Other(level) = cgroup.level {
        return Some(NotYet::Depth(level));
    }
    // The guard and the capture know addresses of the mesh only.
    if let Some(outside) = workload.addresses.iter().find(|address| !observed.ranges.contains(**address)) {
        return Some(NotYet::OutsideMesh(*outside));
    }
    if !cgroup.populated {
        return Some(NotYet::NoProcess);
    }
    if let Some(reason) = observed.taken_ports.get(&cgroup.id) {
        return Some(NotYet::PortTaken(reason.clone()));
    }
    // Before the pod's network is entered: all pods are planned again with each certificate.
    if let Some(error) = observed.uncertified.get(&workload.identity) {
        return Some(NotYet::NoCertificate(error.to_string()));
    }
    taken_address(&workload.addresses, others).map(NotYet::AddressTaken)
}

/// Returns an address that is one of `others` already. A pod that can change its addresses must not get the connections
/// of a neighbour that way.
pub(super) fn taken_address<'a>(
    addresses: &[IpAddr],
    mut others: impl Iterator<Item = &'a Workload>,
) -> Option<IpAddr> {
    others.find_map(|other| other.addresses.iter().copied().find(|address| addresses.contains(address)))
}

/// Returns true if the wanted workload is the enrolled one to the data path. Name and labels may change under a running
/// pod. Addresses that the directory does not have yet were found in the pod.
pub(super) fn is_same(wanted: &Workload, enrolled: &Workload) -> bool {
    let found = &enrolled.addresses;
    let all_found = wanted.addresses.iter().all(|address| found.contains(address));
    wanted.cgroup == enrolled.cgroup
        && wanted.identity == enrolled.identity
        && (wanted.addresses.is_empty() || all_found && wanted.addresses.len() == found.len())
        && (wanted.egress, wanted.udp) == (enrolled.egress, enrolled.udp)
        && wanted.connect == enrolled.connect
}

#[cfg(test)]
mod tests;

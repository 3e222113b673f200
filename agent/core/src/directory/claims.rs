//! Claims of workloads to addresses and cgroups. Pure.
//!
//! A source reports claims, and a claim is no proof: a compromised node can report any address, and a static pod's cgroup comes
//! from an annotation. So all claims are kept, and an entry that goes leaves the others as they were.
//!
//! | claimed | more than one claimant |
//! |---|---|
//! | an address | live claimants win over yielding ones; with more than one left, the address is unclear and nobody has it |
//! | a cgroup | the first claimant keeps the cgroup; later ones, also of cgroups above or below it, wait until it goes |

use std::{
    fmt,
    net::IpAddr,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use super::{AddressConflict, Service, Workload};
use crate::cow_map::CowMap;

/// Workloads that contradict each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Conflict {
    /// More than one workload claims the address. Connections to it are refused.
    Address {
        /// The address.
        address: IpAddr,
        /// The workloads.
        claimants: Vec<Arc<Workload>>,
    },
    /// The workload's cgroup is, contains or is inside the cgroup of an earlier workload. It is not enrolled.
    Cgroup {
        /// The workload.
        workload: Arc<Workload>,
        /// `namespace/name` of the earlier workload.
        holder: Arc<str>,
    },
    /// An external or load balancer address of a service is also that of a workload, a node, or another service at the same port.
    ServiceAddress {
        /// The address.
        address: IpAddr,
        /// The services.
        services: Vec<Arc<Service>>,
        /// The workload. Connections to it are refused if the address is that of a load balancer.
        workload: Option<Arc<Workload>>,
    },
    /// The workload's cgroup is not a relative path without `.` and `..`. It is not enrolled.
    CgroupPath {
        /// The workload.
        workload: Arc<Workload>,
    },
}

impl Conflict {
    /// Returns a namespace of the conflict, by which a report gives every namespace a share.
    #[must_use]
    pub fn namespace(&self) -> Option<&str> {
        match self {
            Self::Address { claimants, .. } => claimants.iter().map(|workload| &*workload.namespace).min(),
            Self::ServiceAddress { services, .. } => services.iter().map(|service| &*service.namespace).min(),
            Self::Cgroup { workload, .. } | Self::CgroupPath { workload } => Some(&workload.namespace),
        }
    }
}

/// Maximum number of names in a message. One address may have thousands of claimants.
const NAMES_MAX: usize = 4;

/// Joins the first names in order.
fn joined(names: impl Iterator<Item = String>) -> String {
    let mut names: Vec<String> = names.collect();
    names.sort_unstable();
    let more = names.len().saturating_sub(NAMES_MAX);
    names.truncate(NAMES_MAX);
    if more > 0 {
        names.push(format!("{more} more"));
    }
    names.join(" and ")
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { address, claimants } => {
                let names = joined(claimants.iter().map(|w| format!("{} on node {}", w.full_name(), w.node)));
                write!(
                    f,
                    "address {address} is claimed by {names}: connections to it are refused; delete the pods that do not have it"
                )
            }
            Self::Cgroup { workload, holder } => write!(
                f,
                "pod {} is not enrolled: its cgroup {:?} is, contains or is inside that of {holder}; delete one of them",
                workload.full_name(),
                workload.cgroup
            ),
            Self::ServiceAddress { address, services, workload } => {
                let names = services.iter().map(|service| format!("{}/{}", service.namespace, service.name));
                let others = workload.as_ref().map(|w| format!(" and of pod {}", w.full_name()));
                write!(
                    f,
                    "external address {address} of service {}{} is also that of a pod, a node or another service at the same \
                     port: it is not used for a service; correct the services",
                    joined(names),
                    others.unwrap_or_default()
                )
            }
            Self::CgroupPath { workload } => write!(
                f,
                "pod {} is not enrolled: its cgroup {:?} is not a relative path without `.` and `..`",
                workload.full_name(),
                workload.cgroup
            ),
        }
    }
}

/// The claim of a workload to one of its addresses.
#[derive(Debug, Clone)]
struct Claim {
    workload: Arc<Workload>,
    claim: AddressConflict,
}

/// The claims to an address that more than one workload claims.
#[derive(Debug, Clone)]
struct Contest {
    /// In the order in which they were made.
    claims: Vec<Claim>,
    /// Derived from the claims at each change, because lookups are on the path of connections and claimants are many.
    outcome: Outcome,
}

/// The result of a contest.
#[derive(Debug, Clone)]
enum Outcome {
    /// No claim is valid.
    Nobody,
    /// More than one claim is valid.
    Unclear,
    Held(Arc<Workload>),
}

/// All claims to addresses.
#[derive(Debug, Default, Clone)]
pub(super) struct AddressClaims {
    sole: CowMap<IpAddr, Claim>,
    /// Addresses with more than one claim.
    several: CowMap<IpAddr, Arc<Contest>>,
    /// The nodes that list an address as their own.
    nodes: CowMap<IpAddr, Arc<Vec<Arc<str>>>>,
    /// The node whose addresses no workload can have.
    own_node: Option<Arc<str>>,
}

impl AddressClaims {
    /// Returns the workload that has `address`, or `None` if it is unclear or nobody has it.
    pub(super) fn holder(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        if let Some(claim) = self.sole.get(&address) {
            return self.is_valid(address, claim).then_some(&claim.workload);
        }
        match &self.several.get(&address)?.outcome {
            Outcome::Held(workload) => Some(workload),
            Outcome::Nobody | Outcome::Unclear => None,
        }
    }

    /// Returns true if workloads claim `address` and none of them has it.
    pub(super) fn is_unclear(&self, address: IpAddr) -> bool {
        self.several.get(&address).is_some_and(|contest| matches!(contest.outcome, Outcome::Unclear))
    }

    /// Returns the unclear addresses with their claimants.
    pub(super) fn unclear(&self) -> impl Iterator<Item = (IpAddr, Vec<Arc<Workload>>)> + use<'_> {
        let unclear = self.several.iter().filter(|(_, contest)| matches!(contest.outcome, Outcome::Unclear));
        unclear.map(|(address, contest)| {
            (*address, contest.claims.iter().map(|claim| Arc::clone(&claim.workload)).collect())
        })
    }

    /// Replaces the claims of `before` with those of `workload`, which keeps its place among the claimants of an address.
    pub(super) fn replace(
        &mut self,
        before: Option<&Arc<Workload>>,
        workload: &Arc<Workload>,
        claim: AddressConflict,
    ) {
        if let Some(before) = before {
            let gone = before.addresses.iter().filter(|address| !workload.addresses.contains(address));
            gone.for_each(|address| self.remove_at(*address, before));
        }
        let new = Claim { workload: Arc::clone(workload), claim };
        for address in &workload.addresses {
            let is_before = |claim: &Claim| before.is_some_and(|old| Arc::ptr_eq(old, &claim.workload));
            if let Some(mut contest) = self.several.remove(address) {
                let claims = &mut Arc::make_mut(&mut contest).claims;
                match claims.iter_mut().find(|claim| is_before(claim)) {
                    Some(known) => *known = new.clone(),
                    None => claims.push(new.clone()),
                }
                self.settle(*address, contest);
                continue;
            }
            match self.sole.remove(address) {
                Some(other) if !is_before(&other) => {
                    let claims = vec![other, new.clone()];
                    self.settle(*address, Arc::new(Contest { claims, outcome: Outcome::Unclear }));
                }
                _ => self.sole.insert(*address, new.clone()),
            }
        }
    }

    /// Removes the claims of a workload.
    pub(super) fn remove(&mut self, workload: &Arc<Workload>) {
        workload.addresses.iter().for_each(|address| self.remove_at(*address, workload));
    }

    fn remove_at(&mut self, address: IpAddr, workload: &Arc<Workload>) {
        let is_it = |claim: &Claim| Arc::ptr_eq(&claim.workload, workload);
        if self.sole.get(&address).is_some_and(is_it) {
            self.sole.remove(&address);
        }
        let Some(mut contest) = self.several.remove(&address) else { return };
        let claims = &mut Arc::make_mut(&mut contest).claims;
        claims.retain(|claim| !is_it(claim));
        match claims.as_slice() {
            [] => {}
            [only] => self.sole.insert(address, only.clone()),
            _ => self.settle(address, contest),
        }
    }

    /// Decides a contest and stores it.
    fn settle(&mut self, address: IpAddr, mut contest: Arc<Contest>) {
        let is_live = |claim: &&Claim| claim.claim == AddressConflict::Replace;
        let outcome = {
            let valid = || contest.claims.iter().filter(|claim| self.is_valid(address, claim));
            let mut live = valid().filter(is_live);
            let mut ending = valid();
            match (live.next(), live.next()) {
                (Some(only), None) => Outcome::Held(Arc::clone(&only.workload)),
                (Some(_), Some(_)) => Outcome::Unclear,
                (None, _) => match (ending.next(), ending.next()) {
                    (Some(only), None) => Outcome::Held(Arc::clone(&only.workload)),
                    (Some(_), Some(_)) => Outcome::Unclear,
                    (None, _) => Outcome::Nobody,
                },
            }
        };
        Arc::make_mut(&mut contest).outcome = outcome;
        self.several.insert(address, contest);
    }

    fn settle_again<'a>(&mut self, addresses: impl IntoIterator<Item = &'a IpAddr>) {
        for address in addresses {
            if let Some(contest) = self.several.remove(address) {
                self.settle(*address, contest);
            }
        }
    }

    /// Sets the node whose addresses no workload can have.
    pub(super) fn set_own_node(&mut self, node: Arc<str>) {
        self.own_node = Some(node);
        let contested: Vec<IpAddr> = self.several.iter().map(|(address, _)| *address).collect();
        self.settle_again(&contested);
    }

    /// Replaces the addresses of a node.
    pub(super) fn set_node(&mut self, node: &Arc<str>, before: &[IpAddr], addresses: &[IpAddr]) {
        for address in before {
            let Some(mut nodes) = self.nodes.remove(address) else { continue };
            Arc::make_mut(&mut nodes).retain(|other| other != node);
            if !nodes.is_empty() {
                self.nodes.insert(*address, nodes);
            }
        }
        for address in addresses {
            let mut nodes = self.nodes.remove(address).unwrap_or_default();
            if !nodes.contains(node) {
                Arc::make_mut(&mut nodes).push(Arc::clone(node));
            }
            self.nodes.insert(*address, nodes);
        }
        self.settle_again(before.iter().chain(addresses));
    }

    /// Returns the addresses that nodes list as their own.
    pub(super) fn of_nodes(&self) -> impl Iterator<Item = IpAddr> + use<'_> {
        self.nodes.iter().map(|(address, _)| *address)
    }

    /// Returns true if a node lists `address` as its own.
    pub(super) fn is_node(&self, address: IpAddr) -> bool {
        self.nodes.get(&address).is_some()
    }

    /// Returns true if `address` is one of the own node.
    pub(super) fn is_own_node(&self, address: IpAddr) -> bool {
        let own = self.own_node.as_ref();
        own.is_some_and(|own| self.nodes.get(&address).is_some_and(|nodes| nodes.contains(own)))
    }

    /// A pod in its own network has no address of its node. What another node lists proves nothing about the pod's.
    fn is_valid(&self, address: IpAddr, claim: &Claim) -> bool {
        let of_its_node = self.nodes.get(&address).is_some_and(|nodes| nodes.contains(&claim.workload.node));
        !of_its_node && !self.is_own_node(address)
    }
}

/// A cgroup: the node, and the path below the cgroup of all pods.
type Place = (Arc<str>, PathBuf);

/// A reason for which a workload does not get its cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum CgroupRefusal {
    /// Held by the workload of this name.
    Held(Arc<str>),
    /// Not a relative path of plain names.
    Path,
}

/// The workload of each cgroup. No cgroup in it contains another one.
#[derive(Debug, Default, Clone)]
pub(super) struct CgroupClaims {
    /// `namespace/name` of the holder.
    holders: CowMap<Place, Arc<str>>,
    /// Number of holders below each cgroup.
    below: CowMap<Place, usize>,
}

impl CgroupClaims {
    /// Claims a cgroup. An empty path claims nothing: the source does not know the cgroups of other nodes.
    pub(super) fn claim(&mut self, workload: &Workload, name: &Arc<str>) -> Result<(), CgroupRefusal> {
        let path = &workload.cgroup;
        if path.as_os_str().is_empty() {
            return Ok(());
        }
        if !path.components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(CgroupRefusal::Path);
        }
        let place = |path: &Path| (Arc::clone(&workload.node), path.to_owned());
        // The workload itself holds nothing else: it releases its cgroup before it claims another.
        for at in path.ancestors().filter(|at| !at.as_os_str().is_empty()) {
            match self.holders.get(&place(at)) {
                Some(holder) if at == path && holder == name => return Ok(()),
                Some(holder) => return Err(CgroupRefusal::Held(Arc::clone(holder))),
                None => {}
            }
        }
        if self.below.get(&place(path)).is_some() {
            let is_below = |at: &Place| *at.0 == *workload.node && at.1.starts_with(path);
            let inner = self.holders.iter().find(|(at, _)| is_below(at));
            return Err(CgroupRefusal::Held(
                inner.map_or_else(|| "?".into(), |(_, holder)| Arc::clone(holder)),
            ));
        }
        self.holders.insert(place(path), Arc::clone(name));
        for above in above(path) {
            let count = self.below.get(&place(above)).copied().unwrap_or(0);
            self.below.insert(place(above), count + 1);
        }
        Ok(())
    }

    /// Releases the cgroup of a workload, if the workload holds it.
    pub(super) fn release(&mut self, workload: &Workload, name: &str) {
        let place = |path: &Path| (Arc::clone(&workload.node), path.to_owned());
        let at = place(&workload.cgroup);
        if self.holders.get(&at).is_none_or(|holder| **holder != *name) {
            return;
        }
        self.holders.remove(&at);
        for above in above(&workload.cgroup) {
            match self.below.get(&place(above)).copied() {
                Some(count @ 2..) => self.below.insert(place(above), count - 1),
                _ => drop(self.below.remove(&place(above))),
            }
        }
    }

    /// Returns `namespace/name` of the workload that has a cgroup.
    pub(super) fn holder(&self, node: &Arc<str>, path: &Path) -> Option<&Arc<str>> {
        self.holders.get(&(Arc::clone(node), path.to_owned()))
    }
}

/// The cgroups above `path`, up to the cgroup of all pods.
fn above(path: &Path) -> impl Iterator<Item = &Path> {
    path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty())
}

//! Builds the directory from API objects, one change at a time. Pure.
//!
//! Objects of a list are merged into the store. Objects that the list did not contain are removed at its end, so the directory
//! never has fewer entries than the cluster. Most pod updates (conditions, container states) do not affect the directory and are
//! not published.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    net::IpAddr,
    sync::Arc,
};

use tacit_core::directory::{Directory, Protocol, Workload};

use super::{
    EnrolLabel, LocalNode,
    announce::OwnPod,
    objects::{Meta, Object, ResourceKind},
};
use crate::{
    istiod::address::{AddressContent, AddressObject},
    kubernetes::{self, InvalidObjects},
};

mod addresses;
mod interner;
mod own_pods;
mod pods;
mod problems;
mod range_discovery;
mod services;

use addresses::Addresses;
use interner::Interner;
use own_pods::OwnPods;
use pods::Mirror;
use problems::Problems;
use range_discovery::RangeDiscovery;
use services::{ServiceRecord, SliceRecord};

/// Maximum number of deleted pods of this node that are kept until their last process exits. More than run on a node.
const DEPARTED_MAX: usize = 512;

/// Label of a node with the name of its zone.
const ZONE: &str = "topology.kubernetes.io/zone";

pub use addresses::MeshPlace;

/// The source of workloads elsewhere, and of endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MeshSource {
    /// The Kubernetes API, as all else.
    Kubernetes,
    /// istiod.
    Istiod,
}

impl MeshSource {
    fn kinds(self) -> &'static [ResourceKind] {
        match self {
            Self::Kubernetes => &ResourceKind::KUBERNETES,
            Self::Istiod => &ResourceKind::ISTIOD,
        }
    }
}

/// A change in the cluster.
pub(super) type Change = kubernetes::Change<ResourceKind, Object>;

/// The state of the cluster, from which the directory is published.
#[derive(Debug)]
pub(super) struct DirectoryStore {
    enrol: EnrolLabel,
    local_node: LocalNode,
    source: MeshSource,
    /// Of istiod.
    addresses: Addresses,
    directory: Directory,
    /// True if the namespace's label enrols its pods.
    namespaces: HashMap<String, bool>,
    services: HashMap<String, ServiceRecord>,
    slices: HashMap<String, SliceRecord>,
    slices_of: HashMap<String, BTreeSet<String>>,
    /// Names seen in the current list.
    seen: HashMap<ResourceKind, HashSet<String>>,
    listed: BTreeSet<ResourceKind>,
    /// Deleted pods of this node. Those that were not enrolled are kept because no mirror pod gets their cgroups.
    departed: VecDeque<Arc<Workload>>,
    interner: Interner,
    range_discovery: RangeDiscovery,
    /// Zone of this node.
    zone: Option<String>,
    /// Pods with the cgroup that an annotation names.
    mirrors: HashMap<String, Mirror>,
    /// Pods that a ztunnel serves, as istio-cni notes on them.
    redirected: HashSet<String>,
    /// Pods of this node for the announcer; `None` without one.
    own_pods: Option<OwnPods>,
    problems: Problems,
    changed: bool,
}

impl DirectoryStore {
    pub(super) fn new(enrol: EnrolLabel, local_node: LocalNode) -> Self {
        let mut directory = Directory::default().within(Arc::clone(&local_node.ranges));
        directory.set_own_node(Arc::clone(&local_node.node));
        Self {
            enrol,
            source: MeshSource::Kubernetes,
            addresses: Addresses::default(),
            directory,
            range_discovery: RangeDiscovery::new(Arc::clone(&local_node.ranges)),
            local_node,
            namespaces: HashMap::new(),
            services: HashMap::new(),
            slices: HashMap::new(),
            slices_of: HashMap::new(),
            seen: HashMap::new(),
            listed: BTreeSet::new(),
            departed: VecDeque::new(),
            interner: Interner::default(),
            zone: None,
            mirrors: HashMap::new(),
            redirected: HashSet::new(),
            own_pods: None,
            problems: Problems::default(),
            changed: true,
        }
    }

    /// A store whose workloads elsewhere come from istiod.
    pub(super) fn with_istiod(enrol: EnrolLabel, local_node: LocalNode, place: MeshPlace) -> Self {
        let (source, addresses) = (MeshSource::Istiod, Addresses::new(place));
        Self { source, addresses, ..Self::new(enrol, local_node) }
    }

    /// Keeps the annotations of this node's pods from now on. Pods that were applied before are not among them.
    pub(super) fn follow_own_pods(&mut self) {
        self.own_pods = Some(OwnPods::default());
    }

    /// Returns the pods of this node if the store is complete, and they or the directory have changed since the last call.
    pub(super) fn take_own_pods(&mut self, directory_has_changed: bool) -> Option<Vec<OwnPod>> {
        let is_complete = self.is_complete();
        self.own_pods.as_mut().filter(|_| is_complete)?.take_changed(&self.directory, directory_has_changed)
    }

    /// Returns true if all kinds of objects were listed.
    fn is_complete(&self) -> bool {
        self.source.kinds().iter().all(|kind| self.listed.contains(kind))
    }

    fn apply(&mut self, object: Object) {
        match object {
            Object::Namespace(namespace) => {
                let enrols = self.label(&namespace.metadata) == Some(true);
                self.namespace(namespace.metadata.name, enrols);
            }
            Object::Pod(pod) => {
                let name = full_name(&pod.metadata);
                let is_own = self.source == MeshSource::Istiod;
                if is_own {
                    self.own_pod(&name);
                }
                self.pod(*pod);
                if is_own {
                    self.set_own_detour(&name);
                }
            }
            Object::Address(address) => self.address(*address),
            Object::Service(service) => self.service(*service),
            Object::Slice(slice) => self.slice(*slice),
            Object::Node(node) => {
                let name = node.metadata.name.clone();
                if *name == *self.local_node.node {
                    self.set_zone(node.metadata.labels.get(ZONE));
                    self.set_locality(Some(&node.metadata.labels));
                }
                let (before, now) = self.range_discovery.node(*node);
                self.node_addresses(&name, &before, &now);
            }
            Object::ServiceCidr(cidr) => self.range_discovery.service_cidr(*cidr),
        }
    }

    fn delete(&mut self, kind: ResourceKind, name: &str) {
        match kind {
            ResourceKind::Namespaces => {
                self.namespace(name.to_owned(), false);
                self.namespaces.remove(name);
            }
            ResourceKind::Pods => {
                self.end_pod(name);
                self.own_pod_gone(name);
            }
            ResourceKind::Services => {
                self.services.remove(name);
                self.rebuild(name);
                self.service_outdated(name);
            }
            ResourceKind::Addresses => {
                self.address(AddressObject { name: name.into(), content: AddressContent::Removed });
            }
            ResourceKind::EndpointSlices => self.remove_slice(name),
            ResourceKind::Nodes => {
                if *name == *self.local_node.node {
                    self.set_zone(None);
                    self.set_locality(None);
                }
                let before = self.range_discovery.remove(kind, name);
                self.node_addresses(name, &before, &[]);
            }
            ResourceKind::ServiceCidrs => drop(self.range_discovery.remove(kind, name)),
        }
    }

    /// Removes the objects that were not in the list.
    fn end_list(&mut self, kind: ResourceKind) {
        let seen = self.seen.remove(&kind).unwrap_or_default();
        let gone: Vec<String> = match kind {
            ResourceKind::Namespaces => not_in(&seen, self.namespaces.keys().cloned()),
            ResourceKind::Pods if self.source == MeshSource::Istiod => {
                not_in(&seen, self.addresses.own_pods().cloned())
            }
            // istiod says which resources are gone.
            ResourceKind::Addresses => Vec::new(),
            ResourceKind::Pods => {
                let pods = self.directory.iter().chain(self.directory.host_network());
                let names = pods.map(|workload| workload.full_name());
                not_in(&seen, names.chain(self.problems.pods().cloned()))
            }
            ResourceKind::Services => not_in(&seen, self.services.keys().cloned()),
            ResourceKind::EndpointSlices => not_in(&seen, self.slices.keys().cloned()),
            ResourceKind::Nodes | ResourceKind::ServiceCidrs => {
                not_in(&seen, self.range_discovery.names(kind).into_iter())
            }
        };
        for name in gone {
            self.delete(kind, &name);
        }
        if self.listed.insert(kind) {
            self.changed = true;
        }
        self.interner.sweep();
    }

    /// Returns whether the enrolment label enrols, or `None` if the label is absent.
    fn label(&self, meta: &Meta) -> Option<bool> {
        meta.labels.get(&self.enrol.name).map(|value| *value == self.enrol.value)
    }

    /// Returns the protocol of a pod. A pod that this mesh enrols is served by its agent, whatever istio-cni notes.
    fn protocol(&self, name: &str, enrols: bool) -> Protocol {
        match enrols {
            true => Protocol::Tacit,
            false if self.redirected.contains(name) => Protocol::Hbone,
            false => Protocol::None,
        }
    }

    fn namespace(&mut self, name: String, enrols: bool) {
        let before = self.namespaces.insert(name.clone(), enrols).unwrap_or(false);
        if before == enrols {
            return;
        }
        // istiod knows which workloads elsewhere are enrolled.
        let is_labelled = |workload: &Workload| {
            self.source == MeshSource::Kubernetes || workload.node == self.local_node.node
        };
        let pods =
            self.directory.iter().filter(|workload| *workload.namespace == *name && is_labelled(workload));
        let pods: Vec<Arc<Workload>> = pods.cloned().collect();
        for workload in pods {
            let own = workload.labels.get(&self.enrol.name).map(|value| value == self.enrol.value);
            let protocol = self.protocol(&workload.full_name(), own.unwrap_or(enrols));
            if protocol != workload.protocol {
                let claim = self.directory.claim_of(&workload.namespace, &workload.name);
                self.insert(Workload { protocol, ..(*workload).clone() }, claim);
                if self.source == MeshSource::Istiod {
                    self.set_own_detour(&workload.full_name());
                }
            }
        }
    }

    fn node_addresses(&mut self, node: &str, before: &[IpAddr], now: &[IpAddr]) {
        if before != now {
            self.directory.set_node_addresses(&self.interner.intern(node), before, now);
            self.range_discovery.node_addresses_changed(self.directory.ranges());
            self.changed = true;
        }
    }
}

impl kubernetes::ObjectStore for DirectoryStore {
    type Kind = ResourceKind;
    type Object = Object;
    type Value = Directory;

    fn apply_change(&mut self, change: Change) {
        match change {
            Change::Listing(kind) => {
                self.seen.insert(kind, HashSet::new());
            }
            Change::Applied(object) => {
                if let Some(seen) = self.seen.get_mut(&object.kind()) {
                    seen.insert(object.full_name());
                }
                self.apply(object);
            }
            Change::Deleted(object) => self.delete(object.kind(), &object.full_name()),
            Change::Listed(kind) => self.end_list(kind),
        }
        self.interner.sweep_if_grown();
    }

    fn take_changed(&mut self) -> Option<Directory> {
        if !self.is_complete() {
            return None;
        }
        self.update_mesh_services();
        // Publish a new range together with the pod or service that requires it.
        self.changed |= self.range_discovery.update(&mut self.directory);
        self.changed |= self.problems.update(&self.directory);
        std::mem::take(&mut self.changed).then(|| self.directory.clone())
    }

    fn warnings(&mut self) -> Vec<String> {
        self.problems.warnings().into_iter().chain(self.range_discovery.warnings()).collect()
    }

    fn invalid_objects(&self) -> InvalidObjects {
        let mut all = self.problems.invalid_objects();
        let ranges = self.range_discovery.invalid_objects();
        all.list.extend(ranges.list);
        all.total += ranges.total;
        all
    }
}

fn not_in(seen: &HashSet<String>, known: impl Iterator<Item = String>) -> Vec<String> {
    known.filter(|name| !seen.contains(name)).collect()
}

/// Returns `namespace/name`, or the name of a namespace.
pub(super) fn full_name(meta: &Meta) -> String {
    if meta.namespace.is_empty() { meta.name.clone() } else { format!("{}/{}", meta.namespace, meta.name) }
}

#[cfg(test)]
mod tests;

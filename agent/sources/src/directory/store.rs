//! Builds the directory from API objects, one change at a time. Pure.
//!
//! Objects of a list are merged into the store. Objects that the list did not contain are removed at its end, so the directory
//! never has fewer entries than the cluster. Most pod updates (conditions, container states) do not affect the directory and are
//! not published.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
};

use tacit_core::directory::{AddressConflict, Directory, Protocol, Workload};

use super::{
    EnrolLabel, LocalNode,
    objects::{Meta, Object, Pod, ResourceKind},
};
use crate::kubernetes::{self, InvalidObjects};

mod interner;
mod range_discovery;
mod services;

use interner::Interner;
use range_discovery::RangeDiscovery;
use services::{ServiceRecord, SliceRecord};

/// Maximum number of deleted pods of this node that are kept until their last process exits. More than run on a node.
const DEPARTED_MAX: usize = 512;
const DEFAULT_ACCOUNT: &str = "default";

/// A change in the cluster.
pub(super) type Change = kubernetes::Change<ResourceKind, Object>;

/// The state of the cluster, from which the directory is published.
#[derive(Debug)]
pub(super) struct DirectoryStore {
    enrol: EnrolLabel,
    local_node: LocalNode,
    directory: Directory,
    /// True if the namespace's label enrols its pods.
    namespaces: HashMap<String, bool>,
    services: HashMap<String, ServiceRecord>,
    slices: HashMap<String, SliceRecord>,
    slices_of: HashMap<String, BTreeSet<String>>,
    /// Names seen in the current list.
    seen: HashMap<ResourceKind, HashSet<String>>,
    listed: BTreeSet<ResourceKind>,
    departed: VecDeque<Arc<Workload>>,
    interner: Interner,
    range_discovery: RangeDiscovery,
    changed: bool,
}

impl DirectoryStore {
    pub(super) fn new(enrol: EnrolLabel, local_node: LocalNode) -> Self {
        Self {
            enrol,
            directory: Directory::default().within(Arc::clone(&local_node.ranges)),
            local_node,
            namespaces: HashMap::new(),
            services: HashMap::new(),
            slices: HashMap::new(),
            slices_of: HashMap::new(),
            seen: HashMap::new(),
            listed: BTreeSet::new(),
            departed: VecDeque::new(),
            interner: Interner::default(),
            range_discovery: RangeDiscovery::default(),
            changed: true,
        }
    }

    fn apply(&mut self, object: Object) {
        match object {
            Object::Namespace(namespace) => {
                let enrols = self.label(&namespace.metadata) == Some(true);
                self.namespace(namespace.metadata.name, enrols);
            }
            Object::Pod(pod) => self.pod(*pod),
            Object::Service(service) => self.service(*service),
            Object::Slice(slice) => self.slice(*slice),
            Object::Node(node) => self.range_discovery.node(*node),
            Object::ServiceCidr(cidr) => self.range_discovery.service_cidr(*cidr),
        }
    }

    fn delete(&mut self, kind: ResourceKind, name: &str) {
        match kind {
            ResourceKind::Namespaces => {
                self.namespace(name.to_owned(), false);
                self.namespaces.remove(name);
            }
            ResourceKind::Pods => self.end_pod(name),
            ResourceKind::Services => {
                self.services.remove(name);
                self.rebuild(name);
            }
            ResourceKind::EndpointSlices => self.remove_slice(name),
            ResourceKind::Nodes | ResourceKind::ServiceCidrs => self.range_discovery.remove(kind, name),
        }
    }

    /// Removes the objects that were not in the list.
    fn end_list(&mut self, kind: ResourceKind) {
        let seen = self.seen.remove(&kind).unwrap_or_default();
        let gone: Vec<String> = match kind {
            ResourceKind::Namespaces => not_in(&seen, self.namespaces.keys().cloned()),
            ResourceKind::Pods => {
                let pods = self.directory.iter().chain(self.directory.host_network());
                not_in(&seen, pods.map(|workload| workload.full_name()))
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

    fn namespace(&mut self, name: String, enrols: bool) {
        let before = self.namespaces.insert(name.clone(), enrols).unwrap_or(false);
        if before == enrols {
            return;
        }
        let pods: Vec<Arc<Workload>> =
            self.directory.iter().filter(|workload| *workload.namespace == *name).cloned().collect();
        for workload in pods {
            let own = workload.labels.get(&self.enrol.name).map(|value| value == self.enrol.value);
            let protocol = protocol(own.unwrap_or(enrols));
            if protocol != workload.protocol {
                // An address that another pod took over stays with that pod.
                self.insert(Workload { protocol, ..(*workload).clone() }, AddressConflict::Keep);
            }
        }
    }

    fn pod(&mut self, pod: Pod) {
        let name = full_name(&pod.metadata);
        if pod.has_ended() || pod.spec.node_name.is_empty() {
            return self.end_pod(&name);
        }
        let is_ending = pod.metadata.deletion_timestamp.is_some();
        let host_network = pod.spec.host_network;
        let Some(workload) = self.workload(pod) else { return self.end_pod(&name) };
        let is_here = workload.node == self.local_node.node;
        if host_network {
            self.directory.remove(&workload.namespace, &workload.name);
            if is_here && self.directory.set_host_network(workload) {
                self.changed = true;
            }
            return;
        }
        // A pod of another node is unreachable until it has an address. A pod of this node must be covered before.
        if workload.addresses.is_empty() && !is_here {
            return self.end_pod(&name);
        }
        if self.directory.named(&workload.namespace, &workload.name).is_some_and(|known| **known == workload)
        {
            return;
        }
        let claim = if is_ending { AddressConflict::Keep } else { AddressConflict::Replace };
        self.insert(workload, claim);
    }

    fn insert(&mut self, workload: Workload, claim: AddressConflict) {
        if workload.protocol == Protocol::Tacit {
            self.range_discovery.enrolled(&workload.addresses, self.directory.ranges());
        }
        self.directory.insert(workload, claim);
        self.changed = true;
    }

    /// Returns `None` if the pod's names cannot form an identity. Such a pod is unknown to the mesh.
    fn workload(&mut self, pod: Pod) -> Option<Workload> {
        let enrols = self.label(&pod.metadata);
        let enrols = enrols.unwrap_or_else(|| self.namespaces.get(&pod.metadata.namespace) == Some(&true));
        let uid = pod.metadata.annotations.mirror.as_ref().unwrap_or(&pod.metadata.uid);
        // Only the agent of its node uses the cgroup.
        let is_here = *pod.spec.node_name == *self.local_node.node;
        let cgroup =
            if is_here { self.local_node.cgroups.pod(uid, pod.status.qos_class) } else { Default::default() };
        let account = match pod.spec.service_account_name.as_str() {
            "" => DEFAULT_ACCOUNT,
            account => account,
        };
        let identity = self.interner.identity(&self.local_node, &pod.metadata.namespace, account)?;
        Some(Workload {
            namespace: self.interner.intern(&pod.metadata.namespace),
            node: self.interner.intern(&pod.spec.node_name),
            addresses: pod.addresses(),
            name: pod.metadata.name.into(),
            labels: self.interner.labels(&pod.metadata.labels),
            identity,
            cgroup,
            protocol: protocol(enrols),
            egress: None,
            udp: None,
        })
    }

    fn end_pod(&mut self, name: &str) {
        let Some((namespace, name)) = name.split_once('/') else { return };
        if self.directory.unset_host_network(namespace, name) {
            self.changed = true;
        }
        let Some(workload) = self.directory.remove(namespace, name) else { return };
        self.changed = true;
        if workload.node == self.local_node.node && workload.protocol == Protocol::Tacit {
            self.departed.push_back(workload);
            if self.departed.len() > DEPARTED_MAX {
                self.departed.pop_front();
            }
            self.directory.set_departed(self.departed.iter().cloned().collect());
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
                    seen.insert(full_name(object.meta()));
                }
                self.apply(object);
            }
            Change::Deleted(object) => self.delete(object.kind(), &full_name(object.meta())),
            Change::Listed(kind) => self.end_list(kind),
        }
        self.interner.sweep_if_grown();
    }

    fn take_changed(&mut self) -> Option<Directory> {
        if self.listed.len() < ResourceKind::ALL.len() {
            return None;
        }
        // Publish a new range together with the pod or service that requires it.
        self.changed |= self.range_discovery.add_pending(&mut self.directory);
        std::mem::take(&mut self.changed).then(|| self.directory.clone())
    }

    fn warnings(&mut self) -> Vec<String> {
        self.range_discovery.warnings()
    }

    fn invalid_objects(&self) -> InvalidObjects {
        self.range_discovery.invalid_objects()
    }
}

fn not_in(seen: &HashSet<String>, known: impl Iterator<Item = String>) -> Vec<String> {
    known.filter(|name| !seen.contains(name)).collect()
}

fn protocol(enrols: bool) -> Protocol {
    if enrols { Protocol::Tacit } else { Protocol::None }
}

/// Returns `namespace/name`, or the name of a namespace.
fn full_name(meta: &Meta) -> String {
    if meta.namespace.is_empty() { meta.name.clone() } else { format!("{}/{}", meta.namespace, meta.name) }
}

#[cfg(test)]
mod tests;

//! From objects of the API to the directory, one change at a time. Pure.
//!
//! A list is merged into what is known, and what it did not hold is removed at its end: the directory is never emptier
//! than the cluster. Most changes of a pod (conditions, container states) change nothing here and are not published.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
};

use tacit_core::directory::{AddressConflict, Directory, Protocol, Workload};

use super::{
    EnrolLabel, Place,
    objects::{Kind, Meta, Object, Pod},
};
use crate::kubernetes::{self, Complaints};

mod interner;
mod range_discovery;
mod services;

use interner::Interner;
use range_discovery::RangeDiscovery;
use services::{ServiceRecord, SliceRecord};

/// Pods of this node that are kept after their end, until their last process is gone; more than run on a node.
const DEPARTED_MAX: usize = 512;
const DEFAULT_ACCOUNT: &str = "default";

/// What happened in the cluster.
pub(super) type Change = kubernetes::Change<Kind, Object>;

/// All that is known, ready to be published.
#[derive(Debug)]
pub(super) struct Store {
    enrol: EnrolLabel,
    place: Place,
    directory: Directory,
    /// Whether a namespace's label enrols its pods.
    namespaces: HashMap<String, bool>,
    services: HashMap<String, ServiceRecord>,
    slices: HashMap<String, SliceRecord>,
    slices_of: HashMap<String, BTreeSet<String>>,
    /// Names seen in a list that is under way.
    seen: HashMap<Kind, HashSet<String>>,
    listed: BTreeSet<Kind>,
    departed: VecDeque<Arc<Workload>>,
    interner: Interner,
    range_discovery: RangeDiscovery,
    changed: bool,
}

impl Store {
    pub(super) fn new(enrol: EnrolLabel, place: Place) -> Self {
        Self {
            enrol,
            directory: Directory::default().within(Arc::clone(&place.ranges)),
            place,
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

    fn delete(&mut self, kind: Kind, name: &str) {
        match kind {
            Kind::Namespaces => {
                self.namespace(name.to_owned(), false);
                self.namespaces.remove(name);
            }
            Kind::Pods => self.end_pod(name),
            Kind::Services => {
                self.services.remove(name);
                self.rebuild(name);
            }
            Kind::EndpointSlices => self.remove_slice(name),
            Kind::Nodes | Kind::ServiceCidrs => self.range_discovery.forget(kind, name),
        }
    }

    /// Removes what was not in the list.
    fn end_list(&mut self, kind: Kind) {
        let seen = self.seen.remove(&kind).unwrap_or_default();
        let gone: Vec<String> = match kind {
            Kind::Namespaces => not_in(&seen, self.namespaces.keys().cloned()),
            Kind::Pods => {
                let pods = self.directory.iter().chain(self.directory.host_network());
                not_in(&seen, pods.map(|workload| workload.full_name()))
            }
            Kind::Services => not_in(&seen, self.services.keys().cloned()),
            Kind::EndpointSlices => not_in(&seen, self.slices.keys().cloned()),
            Kind::Nodes | Kind::ServiceCidrs => not_in(&seen, self.range_discovery.names(kind).into_iter()),
        };
        for name in gone {
            self.delete(kind, &name);
        }
        if self.listed.insert(kind) {
            self.changed = true;
        }
        self.interner.forget_unused();
    }

    /// What the enrolling label says; `None` when it is not there.
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
                // An address that was lost to another before stays lost.
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
        let is_here = workload.node == self.place.node;
        if host_network {
            self.directory.remove(&workload.namespace, &workload.name);
            if is_here && self.directory.set_host_network(workload) {
                self.changed = true;
            }
            return;
        }
        // A pod of another node cannot be reached before it has an address; one of this node has to be covered.
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

    /// `None` for a pod whose names no identity can have: it is nobody known.
    fn workload(&mut self, pod: Pod) -> Option<Workload> {
        let enrols = self.label(&pod.metadata);
        let enrols = enrols.unwrap_or_else(|| self.namespaces.get(&pod.metadata.namespace) == Some(&true));
        let uid = pod.metadata.annotations.mirror.as_ref().unwrap_or(&pod.metadata.uid);
        // Only the agent of its node looks for its processes.
        let is_here = *pod.spec.node_name == *self.place.node;
        let cgroup =
            if is_here { self.place.cgroups.pod(uid, pod.status.qos_class) } else { Default::default() };
        let account = match pod.spec.service_account_name.as_str() {
            "" => DEFAULT_ACCOUNT,
            account => account,
        };
        let identity = self.interner.identity(&self.place, &pod.metadata.namespace, account)?;
        Some(Workload {
            namespace: self.interner.word(&pod.metadata.namespace),
            node: self.interner.word(&pod.spec.node_name),
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
        if workload.node == self.place.node && workload.protocol == Protocol::Tacit {
            self.departed.push_back(workload);
            if self.departed.len() > DEPARTED_MAX {
                self.departed.pop_front();
            }
            self.directory.set_departed(self.departed.iter().cloned().collect());
        }
    }
}

impl kubernetes::Store for Store {
    type Kind = Kind;
    type Object = Object;
    type Value = Directory;

    fn take(&mut self, change: Change) {
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
        self.interner.forget_when_many();
    }

    fn news(&mut self) -> Option<Directory> {
        if self.listed.len() < Kind::ALL.len() {
            return None;
        }
        // Nobody sees a pod or a service before the range that it brought along.
        self.changed |= self.range_discovery.grow(&mut self.directory);
        std::mem::take(&mut self.changed).then(|| self.directory.clone())
    }

    fn warnings(&mut self) -> Vec<String> {
        self.range_discovery.warnings()
    }

    fn complaints(&self) -> Complaints {
        self.range_discovery.complaints()
    }
}

fn not_in(seen: &HashSet<String>, known: impl Iterator<Item = String>) -> Vec<String> {
    known.filter(|name| !seen.contains(name)).collect()
}

fn protocol(enrols: bool) -> Protocol {
    if enrols { Protocol::Tacit } else { Protocol::None }
}

/// `namespace/name`; of a namespace its name.
fn full_name(meta: &Meta) -> String {
    if meta.namespace.is_empty() { meta.name.clone() } else { format!("{}/{}", meta.namespace, meta.name) }
}

#[cfg(test)]
mod tests;

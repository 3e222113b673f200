//! Who is who: the workloads and services of the mesh and the addresses they have, as one immutable snapshot.
//!
//! Pure: no clock, no I/O, no logging. An address that is not in it belongs to nobody known; what that means is for the
//! caller to decide by mode. A source changes a copy of its own and publishes it: copies share all that did not change
//! (see `cow_map`), so a change costs some ten microseconds whatever the size of the mesh.
//!
//! Sources: `file` refuses contradictions; `kubernetes` has to live with those of a cluster, where the address of a pod
//! that ends may be another's already.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    spiffe::{SpiffeId, TrustDomain},
    yaml::Mistakes,
};

mod cow_map;
mod file;
mod labels;
mod range;
mod ranges;
mod service;

use cow_map::CowMap;

pub use labels::Labels;
pub use range::{RangeError, discovered_range, mesh_range};
pub use ranges::{RangeAddition, Ranges};
pub use service::{
    Affinity, Endpoint, EndpointCondition, EndpointQuery, Endpoints, InternalTrafficPolicy, NoEndpoint,
    Service, ServicePort, choose,
};

/// One pod of the mesh, or one known neighbour without a tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Name of the pod.
    pub name: Arc<str>,
    /// Its Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Who it is: its service account in the trust domain.
    pub identity: SpiffeId,
    /// Its addresses: one or two, at most one of each family, never IPv4-mapped.
    pub addresses: Vec<IpAddr>,
    /// Name of the node it runs on.
    pub node: Arc<str>,
    /// Its Kubernetes labels, which policies select by.
    pub labels: Labels,
    /// Its cgroup, relative to the directory that holds all pods of the node.
    pub cgroup: PathBuf,
    /// How it is reached.
    pub protocol: Protocol,
    /// What it may send in clear into the mesh; `None` follows its mode.
    pub egress: Option<Egress>,
    /// Whether its UDP may pass in clear; `None` follows mode and egress.
    pub udp: Option<Udp>,
}

/// What a workload may send in clear into the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Egress {
    /// What is not tunnelled passes, and is counted.
    Open,
    /// Nothing.
    Strict,
}

/// Whether a workload's UDP may pass in clear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Udp {
    /// It passes, and is counted.
    Allow,
    /// It is dropped.
    Deny,
}

impl Workload {
    /// `namespace/name`.
    #[must_use]
    pub fn full_name(&self) -> String {
        full_name(&self.namespace, &self.name)
    }

    /// Its IPv4 address.
    #[must_use]
    pub fn ipv4(&self) -> Option<Ipv4Addr> {
        self.addresses.iter().find_map(|address| match address {
            IpAddr::V4(address) => Some(*address),
            IpAddr::V6(_) => None,
        })
    }

    /// Its IPv6 address.
    #[must_use]
    pub fn ipv6(&self) -> Option<Ipv6Addr> {
        self.addresses.iter().find_map(|address| match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(*address),
        })
    }
}

/// How a workload is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Through a tunnel, wire format `tacit/1`.
    Tacit,
    /// In clear: it is not enrolled.
    None,
}

/// All workloads and services known at one time. [`Default`] is the empty directory. A clone shares its content.
#[derive(Debug, Default, Clone)]
pub struct Directory {
    by_address: CowMap<IpAddr, Arc<Workload>>,
    by_name: CowMap<Arc<str>, Arc<Workload>>,
    by_node: CowMap<Arc<str>, Arc<Vec<Arc<Workload>>>>,
    services: CowMap<IpAddr, Arc<Service>>,
    services_by_name: CowMap<Arc<str>, Arc<Service>>,
    host_network: Arc<Vec<Arc<Workload>>>,
    departed: Arc<Vec<Arc<Workload>>>,
    ranges: Arc<Ranges>,
}

/// Of what traffic goes in clear because no range of the mesh covers it.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Uncovered {
    /// Enrolled workloads with an address in no range.
    pub workloads: usize,
    /// Services of enrolled workloads with a virtual address in no range.
    pub services: usize,
    /// One of them, with its address.
    pub example: Option<String>,
}

/// Who has an address that two workloads claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressConflict {
    /// The new one.
    Replace,
    /// The one that has it, if it is another workload: the new one is about to end, or news of an old one.
    Keep,
}

impl Directory {
    /// Parses `directory.yaml`; identities are made in `trust_domain`. `file` is named in the mistakes.
    ///
    /// # Errors
    /// All [`Mistakes`] of the text; two workloads or services that contradict each other are one.
    pub fn parse(text: &str, file: &Path, trust_domain: &TrustDomain) -> Result<Self, Mistakes> {
        let content = file::parse(text, file, trust_domain)?;
        let mut directory = Self::default();
        for workload in content.workloads {
            directory.insert(workload, AddressConflict::Replace);
        }
        for service in content.services {
            directory.insert_service(service);
        }
        Ok(directory)
    }

    /// The same directory, of a mesh with these ranges.
    #[must_use]
    pub fn within(self, ranges: Arc<Ranges>) -> Self {
        Self { ranges, ..self }
    }

    /// The ranges of the mesh, as far as the source knows them: those configured, and what it found.
    #[must_use]
    pub fn ranges(&self) -> &Arc<Ranges> {
        &self.ranges
    }

    /// The workload that has `address`; an IPv4-mapped IPv6 address counts as the IPv4 address.
    #[must_use]
    pub fn at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&address.to_canonical())
    }

    /// The service that has the virtual `address`.
    #[must_use]
    pub fn service_at(&self, address: IpAddr) -> Option<&Arc<Service>> {
        self.services.get(&address.to_canonical())
    }

    /// Whether anybody known has `address`, workload or service.
    #[must_use]
    pub fn knows(&self, address: IpAddr) -> bool {
        self.at(address).is_some() || self.service_at(address).is_some()
    }

    /// The workload of that name.
    #[must_use]
    pub fn named(&self, namespace: &str, name: &str) -> Option<&Arc<Workload>> {
        self.by_name.get(full_name(namespace, name).as_str())
    }

    /// The service of that name.
    #[must_use]
    pub fn service_named(&self, namespace: &str, name: &str) -> Option<&Arc<Service>> {
        self.services_by_name.get(full_name(namespace, name).as_str())
    }

    /// The workloads of `node`, in the order in which they were added.
    pub fn on_node<'a>(&'a self, node: &str) -> impl Iterator<Item = &'a Arc<Workload>> + use<'a> {
        self.by_node.get(node).into_iter().flat_map(|list| list.iter())
    }

    /// All workloads, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.by_name.values()
    }

    /// All services, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services_by_name.values()
    }

    /// Pods of the source's own node that have the node's addresses: they are left alone.
    pub fn host_network(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.host_network.iter()
    }

    /// Pods of the source's own node that the source no longer has, not because anybody wanted them out of the mesh:
    /// processes of theirs may live on. A bounded number of the latest.
    pub fn departed(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.departed.iter()
    }

    /// Who should be in `ranges` and is not. Looks at all: some milliseconds for 100,000.
    #[must_use]
    pub fn uncovered(&self, ranges: &Ranges) -> Uncovered {
        let outside =
            |addresses: &[IpAddr]| addresses.iter().copied().find(|address| !ranges.contains(*address));
        let mut found = Uncovered::default();
        for workload in self.iter().filter(|workload| workload.protocol == Protocol::Tacit) {
            if let Some(address) = outside(&workload.addresses) {
                found.workloads += 1;
                found.example.get_or_insert_with(|| format!("pod {} ({address})", workload.full_name()));
            }
        }
        for service in self.services() {
            if let Some(address) = outside(&service.addresses)
                && self.has_enrolled_endpoint(service)
            {
                found.services += 1;
                let name = full_name(&service.namespace, &service.name);
                found.example.get_or_insert_with(|| format!("service {name} ({address})"));
            }
        }
        found
    }

    /// Whether an enrolled workload has `address`.
    pub fn is_enrolled(&self, address: IpAddr) -> bool {
        self.at(address).is_some_and(|workload| workload.protocol == Protocol::Tacit)
    }

    /// Whether an endpoint of `service` is an enrolled workload's.
    pub fn has_enrolled_endpoint(&self, service: &Service) -> bool {
        let mut endpoints = service.ports.iter().flat_map(|port| port.ipv4.iter().chain(port.ipv6.iter()));
        endpoints.any(|endpoint| self.is_enrolled(endpoint.address.ip()))
    }

    /// Number of workloads.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether nobody is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Adds a workload, or replaces the one of its name.
    pub fn insert(&mut self, workload: Workload, conflict: AddressConflict) {
        self.remove(&workload.namespace, &workload.name);
        let workload = Arc::new(workload);
        for address in &workload.addresses {
            if conflict == AddressConflict::Replace || self.by_address.get(address).is_none() {
                self.by_address.insert(*address, Arc::clone(&workload));
            }
        }
        let mut on_node = self.by_node.get(&*workload.node).cloned().unwrap_or_default();
        // Removed from the map first, so that a list nobody else holds is changed in place.
        self.by_node.remove(&*workload.node);
        Arc::make_mut(&mut on_node).push(Arc::clone(&workload));
        self.by_node.insert(Arc::clone(&workload.node), on_node);
        self.by_name.insert(full_name(&workload.namespace, &workload.name).into(), workload);
    }

    /// Removes a workload. An address that another took over meanwhile stays the other's.
    pub fn remove(&mut self, namespace: &str, name: &str) -> Option<Arc<Workload>> {
        let workload = self.by_name.remove(full_name(namespace, name).as_str())?;
        for address in &workload.addresses {
            if self.by_address.get(address).is_some_and(|holder| Arc::ptr_eq(holder, &workload)) {
                self.by_address.remove(address);
            }
        }
        if let Some(mut on_node) = self.by_node.remove(&*workload.node) {
            Arc::make_mut(&mut on_node).retain(|other| !Arc::ptr_eq(other, &workload));
            if !on_node.is_empty() {
                self.by_node.insert(Arc::clone(&workload.node), on_node);
            }
        }
        Some(workload)
    }

    /// Adds or replaces a pod that has the node's addresses. Says whether that changed anything.
    pub fn set_host_network(&mut self, workload: Workload) -> bool {
        if self.host_network.iter().any(|known| **known == workload) {
            return false;
        }
        self.unset_host_network(&workload.namespace, &workload.name);
        Arc::make_mut(&mut self.host_network).push(Arc::new(workload));
        true
    }

    /// Removes such a pod. Says whether it was there.
    pub fn unset_host_network(&mut self, namespace: &str, name: &str) -> bool {
        let is_it = |known: &Arc<Workload>| *known.namespace == *namespace && *known.name == *name;
        let is_there = self.host_network.iter().any(is_it);
        if is_there {
            Arc::make_mut(&mut self.host_network).retain(|known| !is_it(known));
        }
        is_there
    }

    /// Replaces the ranges of the mesh.
    pub fn set_ranges(&mut self, ranges: Arc<Ranges>) {
        self.ranges = ranges;
    }

    /// Replaces the pods that [`Self::departed`] lists.
    pub fn set_departed(&mut self, departed: Vec<Arc<Workload>>) {
        self.departed = Arc::new(departed);
    }

    /// Adds a service, or replaces the one of its name.
    pub fn insert_service(&mut self, service: Service) {
        self.remove_service(&service.namespace, &service.name);
        let service = Arc::new(service);
        for address in &service.addresses {
            self.services.insert(*address, Arc::clone(&service));
        }
        self.services_by_name.insert(full_name(&service.namespace, &service.name).into(), service);
    }

    /// Removes a service. An address that another took over meanwhile stays the other's.
    pub fn remove_service(&mut self, namespace: &str, name: &str) {
        let Some(service) = self.services_by_name.remove(full_name(namespace, name).as_str()) else { return };
        for address in &service.addresses {
            if self.services.get(address).is_some_and(|holder| Arc::ptr_eq(holder, &service)) {
                self.services.remove(address);
            }
        }
    }
}

fn full_name(namespace: &str, name: &str) -> String {
    format!("{namespace}/{name}")
}

#[cfg(test)]
mod tests;

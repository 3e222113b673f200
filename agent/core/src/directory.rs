//! The workloads and services of the mesh with their addresses, as one immutable snapshot.
//!
//! Pure: no clock, no I/O, no logging. An address that is not in it belongs to nobody known; what that means is for the
//! caller to decide by mode. A source changes a copy of its own and publishes it: copies share all that did not change
//! (see `cow_map`), so a change costs some ten microseconds whatever the size of the mesh, and a copy a pointer for each map.
//!
//! Sources: `file` refuses contradictions; `kubernetes` has to live with those of a cluster, where the address of a pod
//! that ends may be another's already.

use std::{
    hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    cow_map::CowMap,
    spiffe::{SpiffeId, TrustDomain},
    yaml::Mistakes,
};

mod behind;
mod changes;
mod claims;
mod detour;
mod file;
mod labels;
mod node_services;
mod range;
mod ranges;
mod service;
mod service_addresses;

use claims::{AddressClaims, CgroupClaims, CgroupRefusal};
use service_addresses::ServiceAddresses;

pub use claims::Conflict;
pub use detour::{Detour, DetourOf};
pub use labels::Labels;
pub use node_services::{NodeService, NodeServices};
pub use range::{
    DISCOVERED_IPV4_BITS, DISCOVERED_IPV6_BITS, RangeError, discovered_range, mesh_range, special_address,
};
pub use ranges::{RangeAddition, Ranges};
pub use service::{
    Affinity, Endpoint, EndpointCondition, EndpointQuery, Endpoints, Hint, InternalTrafficPolicy,
    ListedEndpoint, NoEndpoint, Service, ServicePort, choose,
};

/// One pod of the mesh, or one known neighbour without a tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Name of the pod.
    pub name: Arc<str>,
    /// Its Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Its service account in the trust domain.
    pub identity: SpiffeId,
    /// Its addresses: one or two, at most one of each family, never IPv4-mapped.
    pub addresses: Vec<IpAddr>,
    /// Name of the node it runs on.
    pub node: Arc<str>,
    /// Its Kubernetes labels, which policies select by.
    pub labels: Labels,
    /// Its cgroup, relative to the directory that holds all pods of the node.
    pub cgroup: PathBuf,
    /// The protocol by which clients reach it.
    pub protocol: Protocol,
    /// Its plaintext into the mesh; `None` follows its mode.
    pub egress: Option<Egress>,
    /// Its plaintext UDP; `None` follows mode and egress.
    pub udp: Option<Udp>,
    /// When its `connect()` returns.
    pub connect: Connect,
}

/// The rule for plaintext of a workload into the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Egress {
    /// Plaintext passes, and is counted.
    Open,
    /// Nothing.
    Strict,
}

/// The rule for plaintext UDP of a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Udp {
    /// It passes, and is counted.
    Allow,
    /// It is dropped.
    Deny,
}

/// When `connect()` of a workload returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Connect {
    /// When the destination has accepted or refused, as without Tacit.
    #[default]
    Truthful,
    /// At once. A destination that refuses resets the connection later.
    Early,
}

impl Workload {
    /// Returns the UID of the Kubernetes pod; `None` for a workload whose cgroup is not named by the kubelet.
    #[must_use]
    pub fn pod_uid(&self) -> Option<String> {
        let cgroup = self.cgroup.file_name()?.to_str()?;
        let (_, uid) = cgroup.strip_suffix(".slice").unwrap_or(cgroup).rsplit_once("pod")?;
        // A slice has `_` in place of `-`.
        let uid = uid.replace('_', "-");
        let is_uid = !uid.is_empty() && uid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
        is_uid.then_some(uid)
    }

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

/// The protocol by which clients reach a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Through a tunnel, wire format `tacit/1`. The agent of its node enrols it.
    Tacit,
    /// Through a tunnel to the agent of another mesh, wire format HBONE. No agent of this mesh enrols it.
    Hbone,
    /// Plaintext: it is not enrolled.
    None,
}

impl Protocol {
    /// Returns true if clients reach the workload through a tunnel.
    #[must_use]
    pub fn is_tunnelled(self) -> bool {
        matches!(self, Self::Tacit | Self::Hbone)
    }
}

/// All workloads and services known at one time. [`Default`] is the empty directory. A clone shares its content.
#[derive(Debug, Default, Clone)]
pub struct Directory {
    addresses: AddressClaims,
    cgroups: CgroupClaims,
    by_name: CowMap<Arc<str>, Arc<Workload>>,
    /// Workloads whose claim to their addresses yields.
    yielding: CowMap<Arc<str>, ()>,
    /// Workloads that another one keeps from their cgroup, in the order in which they claimed it.
    refused: Arc<Vec<(Arc<str>, CgroupRefusal)>>,
    /// Number of changes of conflicts.
    conflict_changes: u64,
    /// Number of changes of the nodes' addresses, or their hash.
    node_changes: u64,
    by_node: CowMap<Arc<str>, Arc<NodeWorkloads>>,
    services: ServiceAddresses,
    host_network: CowMap<Arc<str>, Arc<Workload>>,
    departed: Arc<Vec<Arc<Workload>>>,
    ranges: Arc<Ranges>,
    /// Workloads and services that clients must not connect to directly.
    detours: CowMap<Arc<str>, Detour>,
    detour_ranges: Arc<detour::DetourRanges>,
}

/// The workloads of a node, by name. A node has some hundred at most, but 10,000 pod objects can name one node.
type NodeWorkloads = CowMap<Arc<str>, Arc<Workload>, 1>;

/// A workload that differs between two directories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadChange {
    /// The workload of the earlier directory. `None` if it is new.
    pub before: Option<Arc<Workload>>,
    /// The workload of the later directory. `None` if it is gone.
    pub now: Option<Arc<Workload>>,
}

/// Workloads and services whose traffic is plaintext because no range of the mesh covers it.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Uncovered {
    /// Enrolled workloads with an address in no range.
    pub workloads: usize,
    /// Services of enrolled workloads with a virtual address in no range.
    pub services: usize,
    /// One of them, with its address.
    pub example: Option<String>,
}

/// A protocol of services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IpProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// The claim of a workload to its addresses, where another workload claims one of them too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressConflict {
    /// A live claim. It wins over claims that yield. Two of these make an address unclear.
    Replace,
    /// A claim that yields to a live one: no container of the workload runs any more.
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
        for (node, addresses) in &content.nodes {
            directory.set_node_addresses(node, &[], addresses);
        }
        // Two versions of a file do not follow from each other.
        directory.node_changes = BuildHasherDefault::<DefaultHasher>::default().hash_one(&content.nodes);
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

    /// The workload that has `address`; an IPv4-mapped IPv6 address counts as the IPv4 address. `None` for an address that
    /// [`Self::is_unclear`].
    #[must_use]
    pub fn at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        let address = address.to_canonical();
        self.addresses.holder(address).filter(|_| !self.services.is_ingress(address))
    }

    /// Returns true if more than one workload, or a workload and a load balancer, claim `address`, so that nobody can be said to
    /// have it. Connections to it must be refused.
    #[must_use]
    pub fn is_unclear(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        if self.services.cluster(address).is_some() {
            return false;
        }
        self.addresses.is_unclear(address)
            || self.services.is_ingress(address) && self.addresses.holder(address).is_some()
    }

    /// Returns true if the address is unclear, or two services share it with this port.
    #[must_use]
    pub fn is_unclear_at(&self, at: SocketAddr) -> bool {
        let at = SocketAddr::new(at.ip().to_canonical(), at.port());
        let is_outer = self.outer_service(at.ip()).is_some() || self.is_shared_with_node(at.ip());
        self.is_unclear(at.ip()) || is_outer && self.services.is_contested(at)
    }

    /// Returns the workloads that contradict each other, in no order.
    pub fn conflicts(&self) -> impl Iterator<Item = Conflict> + use<'_> {
        let cgroups = self.refused.iter().filter_map(|(name, refusal)| {
            let workload = Arc::clone(self.by_name.get(name)?);
            Some(match refusal {
                CgroupRefusal::Held(holder) => Conflict::Cgroup { workload, holder: Arc::clone(holder) },
                CgroupRefusal::Path => Conflict::CgroupPath { workload },
            })
        });
        let unclear = self.addresses.unclear();
        let unclear = unclear.map(|(address, claimants)| Conflict::Address { address, claimants });
        let services = self.services.all_outer().filter_map(|(address, services)| {
            let services: Vec<_> = services.collect();
            let workload = self.addresses.holder(address).cloned();
            let shared = || {
                let ports = services.iter().flat_map(|service| &service.ports).map(|port| port.port);
                ports.into_iter().any(|port| self.services.is_contested(SocketAddr::new(address, port)))
            };
            let is_of_node = self.addresses.is_node(address);
            (workload.is_some() || is_of_node || shared()).then(|| Conflict::ServiceAddress {
                address,
                services: services.into_iter().cloned().collect(),
                workload,
            })
        });
        cgroups.chain(unclear).chain(services)
    }

    /// Number of changes after which [`Self::conflicts`] may differ.
    #[must_use]
    pub fn conflict_changes(&self) -> u64 {
        self.conflict_changes
    }

    /// Returns `namespace/name` of the workload that has a cgroup of a node.
    #[must_use]
    pub fn cgroup_holder(&self, node: &Arc<str>, cgroup: &Path) -> Option<&Arc<str>> {
        self.cgroups.holder(node, cgroup)
    }

    /// Returns true if the source lists `address` as one of its own node. No workload has it.
    #[must_use]
    pub fn is_own_node(&self, address: IpAddr) -> bool {
        self.addresses.is_own_node(address.to_canonical())
    }

    /// Returns the claim of a workload to its addresses.
    #[must_use]
    pub fn claim_of(&self, namespace: &str, name: &str) -> AddressConflict {
        match self.yielding.get(full_name(namespace, name).as_str()) {
            Some(()) => AddressConflict::Keep,
            None => AddressConflict::Replace,
        }
    }

    /// The service that has the virtual `address`, at whichever port.
    #[must_use]
    pub fn service_at(&self, address: IpAddr) -> Option<&Arc<Service>> {
        let address = address.to_canonical();
        self.services.cluster(address).or_else(|| self.outer_service(address))
    }

    /// The service that serves an address and port. `None` for an external or load balancer address without such a port, and for
    /// one that [`Self::is_unclear_at`].
    #[must_use]
    pub fn service_for(&self, at: SocketAddr) -> Option<&Arc<Service>> {
        let at = SocketAddr::new(at.ip().to_canonical(), at.port());
        let is_outer = || self.outer_service(at.ip()).is_some() || self.is_shared_with_node(at.ip());
        let outer = || self.services.outer_at(at).filter(|_| is_outer());
        let node_port = || self.services.node_port(at.port()).filter(|_| self.is_node_port(at));
        self.services.cluster(at.ip()).or_else(outer).or_else(node_port)
    }

    /// Returns true for an address of a load balancer that a node lists as its own. The ports of services are the services';
    /// all others are the node's. A node that lists an address which it does not have gains nothing.
    fn is_shared_with_node(&self, address: IpAddr) -> bool {
        self.services.is_ingress(address)
            && self.addresses.is_node(address)
            && self.addresses.holder(address).is_none()
            && !self.addresses.is_unclear(address)
    }

    /// The ports of load balancers at addresses that a node lists as its own, with the namespace of each.
    pub fn node_services(&self) -> impl Iterator<Item = NodeService<'_>> + use<'_> {
        let shared = self.services.all_outer().filter(|(address, _)| self.is_shared_with_node(*address));
        shared.flat_map(|(address, services)| {
            let services = services.filter(move |service| service.has_ingress(&address));
            services.flat_map(move |service| {
                let of =
                    move |port, protocol| (&*service.namespace, SocketAddr::new(address, port), protocol);
                let tcp = service.ports.iter().map(move |port| of(port.port, IpProtocol::Tcp));
                tcp.chain(service.udp_ports.iter().map(move |port| of(*port, IpProtocol::Udp)))
            })
        })
    }

    /// Returns true for an address of a node with a port that a service can have there.
    #[must_use]
    pub fn is_node_port(&self, at: SocketAddr) -> bool {
        tacit_abi::node_port::contains(at.port()) && self.is_node(at.ip())
    }

    /// The addresses that nodes list as their own.
    pub fn node_addresses(&self) -> impl Iterator<Item = IpAddr> + use<'_> {
        self.addresses.of_nodes()
    }

    /// A number that differs between two directories of a source whose [`Self::node_addresses`] differ.
    #[must_use]
    pub fn node_changes(&self) -> u64 {
        self.node_changes
    }

    /// The first service with an external or load balancer address that no pod and no node has.
    fn outer_service(&self, address: IpAddr) -> Option<&Arc<Service>> {
        // Most addresses of load balancers are those of nodes.
        let is_taken = self.addresses.is_node(address)
            || self.addresses.holder(address).is_some()
            || self.addresses.is_unclear(address);
        if is_taken { None } else { self.services.outer(address) }
    }

    /// Returns true if a node lists `address` as its own.
    #[must_use]
    pub fn is_node(&self, address: IpAddr) -> bool {
        self.addresses.is_node(address.to_canonical())
    }

    /// Returns true if a workload or a service has `address`.
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
        self.services.named(&full_name(namespace, name))
    }

    /// The workloads of `node` that have their cgroup to themselves, in no order.
    pub fn on_node<'a>(&'a self, node: &str) -> impl Iterator<Item = &'a Arc<Workload>> + use<'a> {
        self.by_node.get(node).into_iter().flat_map(|workloads| workloads.values())
    }

    /// The workload of that name on `node` that has its cgroup to itself, or that has the node's addresses.
    #[must_use]
    pub fn holder_named(&self, node: &str, namespace: &str, name: &str) -> Option<&Arc<Workload>> {
        let name = full_name(namespace, name);
        let own = self.by_node.get(node).and_then(|workloads| workloads.get(name.as_str()));
        own.or_else(|| self.host_network.get(name.as_str()))
    }

    /// Returns the workloads of `node` that differ from `before`. Of two versions of a source only the parts are read that
    /// changed.
    #[must_use]
    pub fn changes_on_node(&self, before: &Self, node: &str) -> Vec<WorkloadChange> {
        let none = NodeWorkloads::default();
        let of = |directory: &Self| directory.by_node.get(node).map(Arc::clone);
        match (of(self), of(before)) {
            (Some(now), Some(before)) if Arc::ptr_eq(&now, &before) => Vec::new(),
            (now, before) => changes(now.as_deref().unwrap_or(&none), before.as_deref().unwrap_or(&none)),
        }
    }

    /// Returns the pods with the node's addresses that differ from `before`.
    #[must_use]
    pub fn changes_of_host_network(&self, before: &Self) -> Vec<WorkloadChange> {
        changes(&self.host_network, &before.host_network)
    }

    /// Returns true if [`Self::departed`] lists the same pods as in `before`, an earlier version of the source.
    #[must_use]
    pub fn has_departed_of(&self, before: &Self) -> bool {
        Arc::ptr_eq(&self.departed, &before.departed)
    }

    /// The cgroups of `node` that [`Self::on_node`] and [`Self::host_network`] do not name: those that workloads claim and do
    /// not get, and those of departed pods. Relative to the cgroup of all pods.
    pub fn other_cgroups_on_node<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a Path> + use<'a> {
        let refused = self.refused.iter().filter_map(|(name, _)| self.by_name.get(name));
        let refused = refused.filter(move |workload| *workload.node == *node);
        refused.chain(self.departed.iter()).map(|workload| workload.cgroup.as_path())
    }

    /// All workloads, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.by_name.values()
    }

    /// All services, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.all()
    }

    /// Pods of the source's own node that have the node's addresses: they are left alone.
    pub fn host_network(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.host_network.values()
    }

    /// Pods of the source's own node that the source no longer has, not because anybody wanted them out of the mesh:
    /// processes of theirs may live on. A bounded number of the latest.
    pub fn departed(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.departed.iter()
    }

    /// Returns the workloads and services outside `ranges`. It reads all of them: some milliseconds for 100,000.
    #[must_use]
    pub fn uncovered(&self, ranges: &Ranges) -> Uncovered {
        let outside =
            |addresses: &[IpAddr]| addresses.iter().copied().find(|address| !ranges.contains(*address));
        let mut found = Uncovered::default();
        for workload in self.iter().filter(|workload| workload.protocol.is_tunnelled()) {
            if let Some(address) = outside(&workload.addresses) {
                found.workloads += 1;
                found.example.get_or_insert_with(|| format!("pod {} ({address})", workload.full_name()));
            }
        }
        for service in self.services() {
            let addresses: Vec<IpAddr> = service
                .all_addresses()
                .filter(|address| self.is_service_address(service, *address))
                .collect();
            if let Some(address) = outside(&addresses)
                && self.has_enrolled_endpoint(service)
            {
                found.services += 1;
                let name = full_name(&service.namespace, &service.name);
                found.example.get_or_insert_with(|| format!("service {name} ({address})"));
            }
        }
        found
    }

    /// Returns true if traffic to this address of a service is the service's.
    #[must_use]
    pub fn is_service_address(&self, service: &Service, address: IpAddr) -> bool {
        service.addresses.contains(&address) || self.outer_service(address).is_some()
    }

    /// Returns true if a workload of a mesh has `address`, this one or another.
    pub fn is_enrolled(&self, address: IpAddr) -> bool {
        self.at(address).is_some_and(|workload| workload.protocol.is_tunnelled())
    }

    /// Returns true if an endpoint of `service` is an enrolled workload.
    pub fn has_enrolled_endpoint(&self, service: &Service) -> bool {
        let mut endpoints = service.ports.iter().flat_map(|port| port.ipv4.iter().chain(port.ipv6.iter()));
        endpoints.any(|endpoint| self.is_enrolled(endpoint.address.ip()))
    }

    /// Number of workloads.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Returns true if there is no workload.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }
}

fn changes<const N: usize>(
    now: &CowMap<Arc<str>, Arc<Workload>, N>,
    before: &CowMap<Arc<str>, Arc<Workload>, N>,
) -> Vec<WorkloadChange> {
    let changes = now.changes(before).into_iter();
    changes.map(|(_, before, now)| WorkloadChange { before: before.cloned(), now: now.cloned() }).collect()
}

fn full_name(namespace: &str, name: &str) -> String {
    format!("{namespace}/{name}")
}

#[cfg(test)]
mod tests;

//! Services: a virtual address and port that stand for the endpoints behind it, and the choice among these.
//!
//! Pure. The choice is the less loaded of two at random, which keeps the longest queue short with no more knowledge than
//! this node's own flows (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001). What kube-proxy
//! promises is kept: endpoints that are not ready are never used, those that are ending only when no other is left (KEP
//! 1669), `internalTrafficPolicy: Local` never leaves the node, and the hints of endpoint slices are followed
//! (`trafficDistribution`, KEP 4444). Unlike with kube-proxy, endpoints farther away are tried if the near ones fail.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use crate::refusal::RefusalReason;

/// A service of Kubernetes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its virtual addresses, at most one of each family; none when it is headless.
    pub addresses: Vec<IpAddr>,
    /// Its `externalIPs`, which its creator writes: an address of a pod or a node is not used.
    pub external_ips: Vec<IpAddr>,
    /// Addresses of its load balancer, which a controller writes and which the node itself serves.
    /// In order, each once.
    pub ingress_ips: Vec<IpAddr>,
    /// Its TCP ports.
    pub ports: Vec<ServicePort>,
    /// Its UDP ports, which are not carried.
    pub udp_ports: Vec<u16>,
    /// The endpoints that a client may reach.
    pub traffic: InternalTrafficPolicy,
    /// The session affinity.
    pub affinity: Affinity,
}

impl Service {
    /// All its addresses.
    pub fn all_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().chain(self.outer_addresses()).copied()
    }

    /// Its addresses that other services may have too, at other ports.
    pub(super) fn outer_addresses(&self) -> impl Iterator<Item = &IpAddr> {
        self.external_ips.iter().chain(&self.ingress_ips)
    }

    /// Returns true for an address of its load balancer.
    pub(super) fn has_ingress(&self, address: &IpAddr) -> bool {
        self.ingress_ips.binary_search(address).is_ok()
    }

    /// Returns true for one of its addresses that other services may have too.
    pub(super) fn has_outer(&self, address: &IpAddr) -> bool {
        self.has_ingress(address) || self.external_ips.contains(address)
    }

    pub(super) fn has_port(&self, number: u16) -> bool {
        self.ports.iter().any(|port| port.port == number)
    }
}

/// A port of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// The port that clients ask for.
    pub port: u16,
    /// The port at the addresses of nodes.
    pub node_port: Option<u16>,
    /// Endpoints for clients of IPv4.
    pub ipv4: Endpoints,
    /// Endpoints for clients of IPv6.
    pub ipv6: Endpoints,
}

/// Endpoints that may be used; those that are not ready are left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Endpoints {
    /// The near ones first.
    ready: Box<[Endpoint]>,
    /// Number of ready endpoints that clients of this node use: all of them, unless hints name fewer.
    near: usize,
    terminating: Box<[Endpoint]>,
}

/// An endpoint as a slice of a service lists it.
#[derive(Debug, Clone)]
pub struct ListedEndpoint {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// Its condition.
    pub condition: EndpointCondition,
    /// The nodes whose clients are to use it.
    pub for_nodes: Hint,
    /// The zones whose clients are to use it.
    pub for_zones: Hint,
}

/// The clients that a hint of an endpoint names, as this node sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hint {
    /// There is none.
    Absent,
    /// Clients of this node are among them.
    Here,
    /// They are on other nodes alone.
    Elsewhere,
}

impl Endpoints {
    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Endpoint> {
        self.ready.iter().chain(&self.terminating)
    }
}

/// A place where a port of a service is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Address of the workload and port of its application.
    pub address: SocketAddr,
    /// Node it runs on; empty when it is not known.
    pub node: Arc<str>,
}

/// The condition of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndpointCondition {
    /// It can.
    Ready,
    /// It is ending but still serves.
    Terminating,
    /// It cannot.
    NotReady,
}

/// The endpoints that a client may reach (`internalTrafficPolicy`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InternalTrafficPolicy {
    /// All of them.
    Cluster,
    /// Those of its own node.
    Local,
}

/// The session affinity of a client (`sessionAffinity`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Affinity {
    /// It does not.
    None,
    /// A client of one address does, until it has not connected for this long.
    ClientIp(Duration),
}

/// The input of the choice besides the service.
#[derive(Debug, Clone, Copy)]
pub struct EndpointQuery<'a> {
    /// Node of the client.
    pub node: &'a str,
    /// The endpoint that the client has to stay with while that can be used.
    pub sticky: Option<SocketAddr>,
    /// Endpoints to which connecting has just failed.
    pub tried: &'a [SocketAddr],
    /// Random bits.
    pub random: u64,
}

/// A reason for which there is no endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoEndpoint {
    /// The service has no such port.
    #[error("the service has no TCP port {0}")]
    UnknownPort(u16),
    /// None is ready.
    #[error("no endpoint of the service is ready")]
    NoneReady,
    /// None is ready on the client's node, which it must not leave.
    #[error("no endpoint of the service is ready on this node, and its internalTrafficPolicy is Local")]
    NoneOnNode,
    /// Connecting to each of them has failed.
    #[error("no other endpoint is left")]
    AllTried,
}

impl NoEndpoint {
    /// Returns the reason for which the connection is refused.
    #[must_use]
    pub fn reason(self) -> RefusalReason {
        match self {
            Self::UnknownPort(_) => RefusalReason::ServicePortUnknown,
            Self::NoneReady | Self::NoneOnNode | Self::AllTried => RefusalReason::NoEndpoint,
        }
    }
}

impl Endpoints {
    /// Keeps those that can be used.
    pub fn new(all: impl IntoIterator<Item = (Endpoint, EndpointCondition)>) -> Self {
        let (mut ready, mut terminating) = (Vec::new(), Vec::new());
        for (endpoint, condition) in all {
            match condition {
                EndpointCondition::Ready => ready.push(endpoint),
                EndpointCondition::Terminating => terminating.push(endpoint),
                EndpointCondition::NotReady => {}
            }
        }
        Self { near: ready.len(), ready: ready.into(), terminating: terminating.into() }
    }

    /// As [`Endpoints::new`], with those first that hints name for this node. As in kube-proxy, hints for nodes count before those for
    /// zones, and either kind counts only if every ready endpoint has it and at least one is for this node.
    pub fn listed(all: impl IntoIterator<Item = ListedEndpoint>) -> Self {
        let mut all: Vec<ListedEndpoint> = all.into_iter().collect();
        let ready = || all.iter().filter(|listed| listed.condition == EndpointCondition::Ready);
        let counts = |hint: fn(&ListedEndpoint) -> Hint| {
            ready().all(|listed| hint(listed) != Hint::Absent)
                && ready().any(|listed| hint(listed) == Hint::Here)
        };
        let kinds: [fn(&ListedEndpoint) -> Hint; 2] = [|listed| listed.for_nodes, |listed| listed.for_zones];
        let hint = kinds.into_iter().find(|hint| counts(*hint));
        let near = hint.map(|hint| ready().filter(|listed| hint(listed) == Hint::Here).count());
        if let Some(hint) = hint {
            all.sort_by_key(|listed| hint(listed) != Hint::Here);
        }
        let endpoints = Self::new(all.into_iter().map(|listed| (listed.endpoint, listed.condition)));
        Self { near: near.unwrap_or(endpoints.near), ..endpoints }
    }

    /// Those that are used as things are, by clients of this node.
    #[must_use]
    pub fn usable(&self) -> &[Endpoint] {
        if self.ready.is_empty() { &self.terminating } else { &self.ready[..self.near] }
    }

    /// The ready ones that hints keep for other nodes.
    fn far(&self) -> &[Endpoint] {
        &self.ready[self.near..]
    }
}

/// Chooses the endpoint for a client that asked for `address`, a virtual address of `service` or a node port of it. `load` is the number of
/// flows that this node has to an endpoint.
///
/// # Errors
/// [`NoEndpoint`] when there is none to choose.
pub fn choose<'a>(
    service: &'a Service,
    address: SocketAddr,
    query: &EndpointQuery<'_>,
    load: impl Fn(SocketAddr) -> usize,
) -> Result<&'a Endpoint, NoEndpoint> {
    let is_own = service.all_addresses().any(|own| own == address.ip().to_canonical());
    let is_asked = |port: &&ServicePort| {
        if is_own { port.port == address.port() } else { port.node_port == Some(address.port()) }
    };
    let port = service.ports.iter().find(is_asked);
    let port = port.ok_or(NoEndpoint::UnknownPort(address.port()))?;
    let endpoints = if address.ip().to_canonical().is_ipv4() { &port.ipv4 } else { &port.ipv6 };
    // `internalTrafficPolicy` is about ClusterIPs. Clients in the cluster reach all endpoints by the other addresses.
    let is_cluster_ip = service.addresses.contains(&address.ip().to_canonical());
    let traffic = if is_cluster_ip { service.traffic } else { InternalTrafficPolicy::Cluster };
    match traffic {
        InternalTrafficPolicy::Cluster => {
            let (usable, far) = (endpoints.usable(), endpoints.far());
            let none = if usable.is_empty() { NoEndpoint::NoneReady } else { NoEndpoint::AllTried };
            let near = among(usable.len(), |index| &usable[index], query, &load);
            near.or_else(|| among(far.len(), |index| &far[index], query, &load)).ok_or(none)
        }
        InternalTrafficPolicy::Local => {
            let here = |list: &'a [Endpoint]| -> Vec<&'a Endpoint> {
                list.iter().filter(|endpoint| *endpoint.node == *query.node).collect()
            };
            let ready = here(&endpoints.ready);
            let usable = if ready.is_empty() { here(&endpoints.terminating) } else { ready };
            let none = if usable.is_empty() { NoEndpoint::NoneOnNode } else { NoEndpoint::AllTried };
            among(usable.len(), |index| usable[index], query, load).ok_or(none)
        }
    }
}

/// The client's own endpoint, else the better of two at random, among those of `count` that were not tried.
fn among<'a>(
    count: usize,
    at: impl Fn(usize) -> &'a Endpoint,
    query: &EndpointQuery<'_>,
    load: impl Fn(SocketAddr) -> usize,
) -> Option<&'a Endpoint> {
    let is_free = |endpoint: &Endpoint| !query.tried.contains(&endpoint.address);
    if let Some(sticky) = query.sticky
        && let Some(own) =
            (0..count).map(&at).find(|endpoint| endpoint.address == sticky && is_free(endpoint))
    {
        return Some(own);
    }
    // One that was tried gives way to the next that was not.
    let free_from = |start: usize| (start..count).chain(0..start).find(|index| is_free(at(*index)));
    let random = |bits: u64, below: usize| usize::try_from(bits % below.max(1) as u64).unwrap_or(0);
    let first = free_from(random(query.random & u64::from(u32::MAX), count))?;
    let other = (first + 1 + random(query.random >> 32, count - 1)) % count;
    let (first, second) = (at(first), at(free_from(other)?));
    // Of two with one load the one that is here is nearer; else the first.
    let rank = |endpoint: &Endpoint| (load(endpoint.address), *endpoint.node != *query.node);
    Some(if rank(second) < rank(first) { second } else { first })
}

#[cfg(test)]
mod tests;

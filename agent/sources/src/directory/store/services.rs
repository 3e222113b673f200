//! Services and their endpoint slices. A change of either rebuilds the service.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use tacit_core::directory::{
    self, Affinity, Endpoint, EndpointCondition, Endpoints, Hint, InternalTrafficPolicy, ListedEndpoint,
    ServicePort, special_address,
};

use super::{
    super::objects::{
        Conditions, HintName, Service, ServiceSpec, ServiceStatus, Slice, SliceEndpoint, SlicePort,
    },
    DirectoryStore, MeshSource, full_name,
};

/// Label of a slice with the name of its service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
const HEADLESS: &str = "None";
/// Value of `ipMode` of an address that the load balancer itself serves.
const PROXY: &str = "Proxy";
/// Maximum number of external addresses of one service. Its creator writes them.
const EXTERNAL_MAX: usize = 64;
/// Maximum number of load balancer addresses of one service. A controller writes them: those of all nodes, where the nodes serve load
/// balancers themselves, as many as the kernel has room for. The port at an address that is left out would be the node's own.
const INGRESS_MAX: usize = 16 * 1024;
/// Default of `sessionAffinityConfig.clientIP.timeoutSeconds` in Kubernetes.
const AFFINITY: Duration = Duration::from_secs(10_800);

#[derive(Debug)]
pub(super) struct ServiceRecord {
    spec: ServiceSpec,
    external_ips: Vec<IpAddr>,
    /// In order, each once. Kept as addresses: there can be thousands, and each change of an endpoint builds the service anew.
    ingress_ips: Vec<IpAddr>,
    namespace: Arc<str>,
    name: Arc<str>,
}

#[derive(Debug)]
pub(super) struct SliceRecord {
    /// `namespace/name` of its service.
    service: String,
    ports: Vec<SlicePort>,
    endpoints: Vec<EndpointRecord>,
}

#[derive(Debug)]
struct EndpointRecord {
    address: IpAddr,
    node: Arc<str>,
    condition: EndpointCondition,
    /// True for a hint that names this node. `None` without hints for nodes.
    for_node: Option<bool>,
    /// Zones that hints name; none without hints for zones.
    for_zones: Box<[Arc<str>]>,
}

/// The endpoints of a service of Kubernetes.
pub(super) enum Parts<'a> {
    /// Its endpoint slices, as a node of a zone sees them.
    Slices(Vec<&'a SliceRecord>, Option<&'a str>),
    /// The endpoints of each port in both families.
    Ports(HashMap<u16, [Endpoints; 2]>),
}

impl Parts<'_> {
    /// Returns the endpoints of both families at a port.
    fn at(&self, port: u16, name: &str) -> [Endpoints; 2] {
        match self {
            Self::Ports(ports) => ports.get(&port).cloned().unwrap_or_default(),
            Self::Slices(slices, zone) => {
                let all = slices.iter().flat_map(|slice| served(slice, name, *zone));
                let (ipv4, ipv6): (Vec<_>, Vec<_>) =
                    all.partition(|listed| listed.endpoint.address.is_ipv4());
                [Endpoints::listed(ipv4), Endpoints::listed(ipv6)]
            }
        }
    }
}

impl EndpointRecord {
    /// Returns the endpoint at `port`, as a node of `zone` sees it.
    fn listed(&self, port: u16, zone: Option<&str>) -> ListedEndpoint {
        let is_here = |is_here| if is_here { Hint::Here } else { Hint::Elsewhere };
        let is_zone = self.for_zones.iter().any(|named| Some(&**named) == zone);
        ListedEndpoint {
            endpoint: Endpoint { address: (self.address, port).into(), node: Arc::clone(&self.node) },
            condition: self.condition,
            for_nodes: self.for_node.map_or(Hint::Absent, is_here),
            for_zones: if self.for_zones.is_empty() { Hint::Absent } else { is_here(is_zone) },
        }
    }
}

impl DirectoryStore {
    pub(super) fn service(&mut self, service: Service) {
        let full = full_name(&service.metadata);
        let record = ServiceRecord {
            external_ips: parsed(service.spec.external_ips.iter().take(EXTERNAL_MAX)),
            ingress_ips: ingress(&service.status),
            spec: service.spec,
            namespace: self.interner.intern(&service.metadata.namespace),
            name: service.metadata.name.into(),
        };
        self.services.insert(full.clone(), record);
        self.rebuild(&full);
        self.service_outdated(&full);
    }

    pub(super) fn slice(&mut self, slice: Slice) {
        let name = full_name(&slice.metadata);
        let Some(service) = slice.metadata.labels.get(SERVICE_NAME) else {
            return self.remove_slice(&name);
        };
        let service = format!("{}/{service}", slice.metadata.namespace);
        if self.slices.get(&name).is_some_and(|known| known.service != service) {
            self.remove_slice(&name);
        }
        let record = self.record(slice, service.clone());
        self.slices.insert(name.clone(), record);
        self.slices_of.entry(service.clone()).or_default().insert(name);
        self.rebuild(&service);
    }

    pub(super) fn remove_slice(&mut self, name: &str) {
        let Some(record) = self.slices.remove(name) else { return };
        if let Some(names) = self.slices_of.get_mut(&record.service) {
            names.remove(name);
            if names.is_empty() {
                self.slices_of.remove(&record.service);
            }
        }
        self.rebuild(&record.service);
    }

    /// Converts a slice. Only the first address of an endpoint is used. Slices of names (`FQDN`) have no endpoints.
    fn record(&mut self, slice: Slice, service: String) -> SliceRecord {
        let is_ipv4 = slice.address_type == "IPv4";
        let endpoints = slice.endpoints.iter().filter_map(|endpoint| {
            let address: IpAddr = endpoint.addresses.first()?.parse().ok()?;
            (address.is_ipv4() == is_ipv4).then(|| self.endpoint(endpoint, address))
        });
        SliceRecord { service, endpoints: endpoints.collect(), ports: slice.ports }
    }

    fn endpoint(&mut self, endpoint: &SliceEndpoint, address: IpAddr) -> EndpointRecord {
        let topology = endpoint.topology.as_ref().and_then(|topology| topology.hostname.as_deref());
        let node = endpoint.node_name.as_deref().or(topology).unwrap_or_default();
        let (for_nodes, for_zones) = (&endpoint.hints.for_nodes, &endpoint.hints.for_zones);
        let named = |hints: &[HintName]| hints.iter().any(|hint| hint.name == *self.local_node.node);
        EndpointRecord {
            address,
            condition: condition(endpoint.conditions),
            for_node: (!for_nodes.is_empty()).then(|| named(for_nodes)),
            for_zones: for_zones.iter().map(|hint| self.interner.intern(&hint.name)).collect(),
            node: self.interner.intern(node),
        }
    }

    /// Takes in the zone of this node, which hints of slices are about.
    pub(super) fn set_zone(&mut self, zone: Option<&String>) {
        if self.zone.as_ref() == zone {
            return;
        }
        self.zone = zone.cloned();
        let hinted = |slice: &SliceRecord| slice.endpoints.iter().any(|one| !one.for_zones.is_empty());
        let services: BTreeSet<String> =
            self.slices.values().filter(|slice| hinted(slice)).map(|slice| slice.service.clone()).collect();
        services.iter().for_each(|service| self.rebuild(service));
    }

    /// Rebuilds the directory's entry of a service.
    pub(super) fn rebuild(&mut self, full: &str) {
        let Some(record) = self.services.get(full) else {
            self.range_discovery.remove_service(full);
            if let Some((namespace, name)) = full.split_once('/')
                && self.directory.service_named(namespace, name).is_some()
            {
                self.forget_service_addresses(full);
                self.directory.remove_service(namespace, name);
                self.changed = true;
            }
            return;
        };
        let slices = self.slices_of.get(full).into_iter().flatten();
        let parts = match self.source {
            MeshSource::Kubernetes => {
                let slices = slices.filter_map(|name| self.slices.get(name));
                Parts::Slices(slices.collect(), self.zone.as_deref())
            }
            MeshSource::Istiod => self.mesh_parts(full),
        };
        let service = build(record, &parts);
        self.put_service(full, service);
    }

    /// Adds or replaces a service of the directory.
    pub(super) fn put_service(&mut self, full: &str, service: directory::Service) {
        let known = self.directory.service_named(&service.namespace, &service.name);
        if known.is_none_or(|known| **known != service) {
            // A load balancer can have thousands of addresses, and most changes are of endpoints.
            if !known.is_some_and(|known| known.all_addresses().eq(service.all_addresses())) {
                self.range_discovery.used(&service.all_addresses().collect::<Vec<_>>());
                self.forget_service_addresses(full);
            }
            self.range_discovery.service(full, service.all_addresses(), self.directory.ranges());
            self.directory.insert_service(service);
            self.changed = true;
        }
    }
}

impl DirectoryStore {
    /// Records that the service of the directory no longer uses its addresses.
    pub(super) fn forget_service_addresses(&mut self, full: &str) {
        let Some((namespace, name)) = full.split_once('/') else { return };
        if let Some(service) = self.directory.service_named(namespace, name) {
            let addresses: Vec<IpAddr> = service.all_addresses().collect();
            self.range_discovery.unused(&addresses);
        }
    }
}

/// Returns the entry of a service for clients of this node.
fn build(record: &ServiceRecord, parts: &Parts<'_>) -> directory::Service {
    let spec = &record.spec;
    let listed = spec.cluster_ips.iter().chain(&spec.cluster_ip);
    let addresses = parsed(listed.filter(|text| *text != HEADLESS));
    // Clients of a headless service connect to endpoint addresses from DNS.
    let is_headless = addresses.is_empty();
    let tcp = spec.ports.iter().filter(|port| is_tcp(port.protocol.as_deref()));
    let ports = tcp.map(|port| {
        // 0 is written for services without node ports.
        let node_port = port.node_port.filter(|port| *port != 0);
        let [ipv4, ipv6] = if is_headless { Default::default() } else { parts.at(port.port, &port.name) };
        ServicePort { port: port.port, node_port, ipv4, ipv6 }
    });
    let udp = spec.ports.iter().filter(|port| port.protocol.as_deref() == Some("UDP"));
    let time = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let time = time.and_then(|client| client.timeout_seconds);
    let is_local = spec.internal_traffic_policy.as_deref() == Some("Local");
    let is_sticky = spec.session_affinity.as_deref() == Some("ClientIP");
    let time = time.map_or(AFFINITY, |seconds| Duration::from_secs(seconds.into()));
    directory::Service {
        name: Arc::clone(&record.name),
        namespace: Arc::clone(&record.namespace),
        ports: ports.collect(),
        udp_ports: udp.map(|port| port.port).collect(),
        addresses,
        external_ips: record.external_ips.clone(),
        ingress_ips: record.ingress_ips.clone(),
        traffic: if is_local { InternalTrafficPolicy::Local } else { InternalTrafficPolicy::Cluster },
        affinity: if is_sticky { Affinity::ClientIp(time) } else { Affinity::None },
    }
}

/// Returns the addresses of a load balancer that nodes serve, in order.
fn ingress(status: &ServiceStatus) -> Vec<IpAddr> {
    let all = status.load_balancer.ingress.iter().take(INGRESS_MAX);
    let served_by_nodes = all.filter(|ingress| ingress.ip_mode.as_deref() != Some(PROXY));
    let mut addresses = parsed(served_by_nodes.filter_map(|ingress| ingress.ip.as_ref()));
    addresses.sort_unstable();
    addresses
}

/// Returns the addresses in a list, each once, without those that no service has.
fn parsed<'a>(texts: impl Iterator<Item = &'a String>) -> Vec<IpAddr> {
    let mut seen = HashSet::new();
    let all = texts.filter_map(|text| text.parse::<IpAddr>().ok()).map(|address| address.to_canonical());
    all.filter(|address| special_address(*address).is_none() && seen.insert(*address)).collect()
}

/// Returns the endpoints of a slice at the named port. The port number is in the slice, because a named target port may have
/// different numbers in different pods.
fn served<'a>(
    slice: &'a SliceRecord,
    name: &'a str,
    zone: Option<&'a str>,
) -> impl Iterator<Item = ListedEndpoint> + 'a {
    let named = slice.ports.iter().filter(move |port| {
        port.name.as_deref().unwrap_or_default() == name && is_tcp(port.protocol.as_deref())
    });
    let numbers = named.filter_map(|port| port.port);
    numbers.flat_map(move |number| slice.endpoints.iter().map(move |one| one.listed(number, zone)))
}

fn is_tcp(protocol: Option<&str>) -> bool {
    protocol.is_none_or(|protocol| protocol == "TCP")
}

/// Applies the API's defaults: `ready` defaults to true, and `serving` to the value of `ready`.
fn condition(conditions: Conditions) -> EndpointCondition {
    let is_ready = conditions.ready.unwrap_or(true);
    let is_serving = conditions.serving.unwrap_or(is_ready);
    match (is_ready, is_serving && conditions.terminating == Some(true)) {
        (true, _) => EndpointCondition::Ready,
        (false, true) => EndpointCondition::Terminating,
        (false, false) => EndpointCondition::NotReady,
    }
}

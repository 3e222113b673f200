//! Workloads and services of istiod, beside what the Kubernetes API has of this node.
//!
//! | part of the directory | source |
//! |---|---|
//! | pods of this node: cgroup, label, identity, addresses | Kubernetes API |
//! | workloads elsewhere | istiod |
//! | services of Kubernetes: ClusterIP, node ports, load balancers, affinity | Kubernetes API |
//! | other services, the endpoints of all, waypoints | istiod |
//!
//! A service is built again when the batch of changes ends, and not for each of its workloads. A workload of istiod never replaces a pod
//! of this node: istiod sends no UID, so it cannot name a cgroup.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use tacit_core::{
    directory::{
        AddressConflict, Affinity, Connect, Detour, DetourOf, Endpoint, EndpointCondition, Endpoints, Hint,
        InternalTrafficPolicy, Labels, ListedEndpoint, Protocol, Service, ServicePort, Workload,
    },
    spiffe::{SpiffeId, TrustDomain, pod_service_account},
};

mod refused;

use refused::Refused;

use super::{DirectoryStore, services::Parts};
use crate::istiod::{
    address::{
        AddressContent, AddressObject, Balancing, Distribution, Locality, PortPair, ServiceRecord,
        WorkloadRecord,
    },
    messages::BalancingScope,
};

/// The labels of a node with its region, its zone and its subzone.
const LOCALITY: [&str; 3] =
    ["topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone"];

/// The agent's place in the mesh, as istiod names it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MeshPlace {
    /// Name of the cluster.
    pub cluster: String,
    /// Name of the network, empty for the default one.
    pub network: String,
}

/// Resources that istiod has sent.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    place: MeshPlace,
    locality: Locality,
    workloads: HashMap<Arc<str>, Arc<WorkloadRecord>>,
    services: HashMap<Arc<str>, Arc<ServiceRecord>>,
    /// The workloads of each service, by `<namespace>/<hostname>`.
    members: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// Resources of services of Kubernetes, by `<namespace>/<name>`.
    of_kubernetes: HashMap<String, Arc<str>>,
    /// Pods of this node that the Kubernetes API has.
    own_pods: HashSet<String>,
    /// Services that must be built again: resources of istiod.
    outdated: BTreeSet<Arc<str>>,
    refused: Refused,
}

impl Addresses {
    pub(super) fn new(place: MeshPlace) -> Self {
        Self { place, ..Self::default() }
    }

    pub(super) fn own_pods(&self) -> impl Iterator<Item = &String> {
        self.own_pods.iter()
    }

    fn is_pod_of_cluster(&self, record: &WorkloadRecord) -> bool {
        record.is_pod && record.cluster == self.place.cluster
    }

    /// Returns the name of a workload in the directory: that of the pod, or the whole uid of any other workload.
    fn directory_name(&self, uid: &str, record: &WorkloadRecord) -> String {
        if self.is_pod_of_cluster(record) { record.name.clone() } else { uid.to_owned() }
    }

    /// Returns the name of the resource of a pod of the cluster, `namespace/name`.
    fn uid(&self, full: &str) -> String {
        format!("{}//Pod/{full}", self.place.cluster)
    }

    fn node(&self, record: &WorkloadRecord) -> String {
        if record.node.is_empty() || record.cluster == self.place.cluster {
            return record.node.clone();
        }
        format!("{}/{}", record.cluster, record.node)
    }
}

impl DirectoryStore {
    /// Applies a resource of istiod.
    pub(super) fn address(&mut self, object: AddressObject) {
        let AddressObject { name, content } = object;
        let of = format!("istiod/{name}");
        match content {
            AddressContent::Unreadable(problem) => {
                // The version before stays in use.
                let problem = format!(
                    "resource {name} of istiod cannot be read, the version before stays in use: {problem}"
                );
                self.problems.set_resource(&of, vec![problem]);
            }
            AddressContent::Removed => {
                self.set_mesh_workload(&name, None);
                self.set_mesh_service(&name, None);
                self.problems.clear(&of);
            }
            AddressContent::Workload(record) => {
                self.set_mesh_service(&name, None);
                self.set_mesh_workload(&name, Some(Arc::clone(&record)));
                self.problems.set_resource(&of, self.workload_problems(&name, &record));
            }
            AddressContent::Service(record) => {
                self.set_mesh_workload(&name, None);
                self.problems.set_resource(&of, refused::service_problems(&name, &record));
                self.set_mesh_service(&name, Some(record));
            }
        }
    }

    fn set_mesh_workload(&mut self, uid: &Arc<str>, record: Option<Arc<WorkloadRecord>>) {
        let before = match &record {
            Some(record) => self.addresses.workloads.insert(Arc::clone(uid), Arc::clone(record)),
            None => self.addresses.workloads.remove(uid),
        };
        if before == record {
            return;
        }
        if let Some(before) = before {
            for membership in &before.services {
                let key: Arc<str> = membership.service.as_str().into();
                if let Some(members) = self.addresses.members.get_mut(&key) {
                    members.remove(uid);
                    if members.is_empty() {
                        self.addresses.members.remove(&key);
                    }
                }
                self.addresses.outdated.insert(key);
            }
            let is_renamed = record.as_ref().is_none_or(|record| {
                record.namespace != before.namespace
                    || self.addresses.directory_name(uid, record)
                        != self.addresses.directory_name(uid, &before)
            });
            if is_renamed {
                self.forget_mesh_workload(uid, &before);
            }
        }
        let Some(record) = record else { return };
        for membership in &record.services {
            let key = self.interner.intern(&membership.service);
            self.addresses.members.entry(Arc::clone(&key)).or_default().insert(Arc::clone(uid));
            self.addresses.outdated.insert(key);
        }
        self.put_mesh_workload(uid, &record);
    }

    fn forget_mesh_workload(&mut self, uid: &Arc<str>, record: &WorkloadRecord) {
        let name = self.addresses.directory_name(uid, record);
        let of = DetourOf::Workload(&record.namespace, &name);
        self.changed |= self.directory.set_detour(of, None);
        self.refuse_workload(uid, None);
        let full = format!("{}/{name}", record.namespace);
        if self.addresses.own_pods.contains(&full) {
            self.set_own_detour(&full);
        } else {
            self.end_pod(&full);
        }
    }

    /// Adds a workload to the directory, unless the Kubernetes API has it, or its address is no proof of who it is.
    fn put_mesh_workload(&mut self, uid: &Arc<str>, record: &WorkloadRecord) {
        let addresses = &self.addresses;
        let name = addresses.directory_name(uid, record);
        let full = format!("{}/{name}", record.namespace);
        let is_own = addresses.own_pods.contains(&full);
        let is_pod_here = self.is_pod_here(record);
        // A gateway has the addresses of another network, of which there may be others here.
        let is_elsewhere = record.network != addresses.place.network;
        if is_own {
            self.set_own_detour(&full);
        } else {
            let other = (is_elsewhere && !is_pod_here).then_some(Detour::Gateway);
            let detour = if record.has_waypoint { Some(Detour::Waypoint) } else { other };
            self.changed |= self.directory.set_detour(DetourOf::Workload(&record.namespace, &name), detour);
        }
        // The addresses of a node and of whatever a WorkloadEntry names are endpoints alone.
        let is_known =
            !is_own && !is_pod_here && !record.is_host_network && (record.is_pod || record.is_tunnelled);
        let identity = self.mesh_identity(record);
        self.refuse_workload(uid, Some(record).filter(|_| is_known && identity.is_none()));
        if is_own {
            return;
        }
        let Some(identity) = identity.filter(|_| is_known) else { return self.end_pod(&full) };
        let is_live = record.is_pod && !is_elsewhere;
        let claim = if is_live { AddressConflict::Replace } else { AddressConflict::Keep };
        let workload = Workload {
            node: self.interner.intern(&self.addresses.node(record)),
            namespace: self.interner.intern(&record.namespace),
            name: name.into(),
            identity,
            addresses: record.addresses.clone(),
            labels: Labels::default(),
            cgroup: std::path::PathBuf::default(),
            protocol: if record.is_tunnelled { Protocol::Tacit } else { Protocol::None },
            egress: None,
            udp: None,
            connect: Connect::default(),
        };
        self.put(&full, workload, claim, false);
    }

    fn is_pod_here(&self, record: &WorkloadRecord) -> bool {
        self.addresses.is_pod_of_cluster(record) && *record.node == *self.local_node.node
    }

    fn mesh_identity(&mut self, record: &WorkloadRecord) -> Option<SpiffeId> {
        let account = pod_service_account(&record.service_account);
        match &record.trust_domain {
            None => self.interner.identity(&self.local_node, &record.namespace, account),
            Some(domain) => SpiffeId::new(&TrustDomain::parse(domain).ok()?, &record.namespace, account).ok(),
        }
    }

    /// Records that the Kubernetes API has a pod of this node, which is no longer istiod's to describe.
    pub(super) fn own_pod(&mut self, full: &str) {
        self.addresses.own_pods.insert(full.to_owned());
    }

    /// Records that the Kubernetes API no longer has a pod of this node. One of the same name may run elsewhere by now.
    pub(super) fn own_pod_gone(&mut self, full: &str) {
        if !self.addresses.own_pods.remove(full) {
            return;
        }
        self.set_own_detour(full);
        let known = self.addresses.workloads.get_key_value(self.addresses.uid(full).as_str());
        if let Some((uid, record)) = known.map(|(uid, record)| (Arc::clone(uid), Arc::clone(record))) {
            self.put_mesh_workload(&uid, &record);
        }
    }

    fn set_mesh_service(&mut self, key: &Arc<str>, record: Option<Arc<ServiceRecord>>) {
        let before = match &record {
            Some(record) => self.addresses.services.insert(Arc::clone(key), Arc::clone(record)),
            None => self.addresses.services.remove(key),
        };
        if before == record {
            return;
        }
        let of_kubernetes = |record: &ServiceRecord| {
            kubernetes_name(record).map(|name| format!("{}/{name}", record.namespace))
        };
        if let Some(before) = before.as_deref()
            && let Some(full) = of_kubernetes(before)
        {
            self.addresses.of_kubernetes.remove(&full);
            self.rebuild(&full);
        }
        if let Some(full) = record.as_deref().and_then(of_kubernetes) {
            self.addresses.of_kubernetes.insert(full, Arc::clone(key));
        }
        if let Some(before) = before.filter(|_| record.is_none()) {
            let name = outer_name(&before);
            for name in [Some(&*name), kubernetes_name(&before)].into_iter().flatten() {
                self.changed |= self.directory.set_detour(DetourOf::Service(&before.namespace, name), None);
            }
            self.remove_directory_service(&format!("{}/{name}", before.namespace));
        }
        self.set_refused_ranges(key, record.as_deref());
        self.addresses.outdated.insert(Arc::clone(key));
    }

    /// Takes in the locality of this node.
    pub(super) fn set_locality(&mut self, labels: Option<&BTreeMap<String, String>>) {
        let [region, zone, subzone] =
            LOCALITY.map(|name| labels.and_then(|labels| labels.get(name)).cloned().unwrap_or_default());
        let locality = Locality { region, zone, subzone };
        if self.addresses.locality != locality {
            self.addresses.locality = locality;
            self.addresses.outdated.extend(self.addresses.services.keys().cloned());
        }
    }

    /// Builds the services again whose workloads or properties have changed.
    pub(super) fn update_mesh_services(&mut self) {
        self.update_refused();
        for key in std::mem::take(&mut self.addresses.outdated) {
            let Some(record) = self.addresses.services.get(&key).cloned() else { continue };
            let kubernetes = kubernetes_name(&record).map(|name| format!("{}/{name}", record.namespace));
            let of_api = kubernetes.as_ref().filter(|full| self.services.contains_key(*full));
            if let Some(full) = of_api {
                self.remove_directory_service(&format!("{}/{}", record.namespace, outer_name(&record)));
                self.rebuild(full);
            } else {
                let service = self.outer_service(&key, &record);
                let full = format!("{}/{}", service.namespace, service.name);
                self.put_service(&full, service);
            }
            let (ports, has_remote) = self.mesh_endpoints(&key, &record);
            let is_served = ports.values().any(|[v4, v6]| v4.iter().chain(v6.iter()).next().is_some());
            let detour = match (record.has_waypoint, has_remote && !is_served) {
                (true, _) => Some(Detour::Waypoint),
                (false, true) => Some(Detour::Gateway),
                (false, false) => None,
            };
            let outer = outer_name(&record);
            let name = kubernetes_name(&record).filter(|_| of_api.is_some()).unwrap_or(&outer);
            if self.directory.set_detour(DetourOf::Service(&record.namespace, name), detour) {
                self.changed = true;
                self.range_discovery.detour_changed(&format!("{}/{name}", record.namespace));
            }
        }
    }

    /// Marks the service of istiod that has the endpoints of a service of Kubernetes.
    pub(super) fn service_outdated(&mut self, full: &str) {
        if let Some(key) = self.addresses.of_kubernetes.get(full) {
            self.addresses.outdated.insert(Arc::clone(key));
        }
    }

    /// Returns the parts of a service of Kubernetes that istiod knows.
    pub(super) fn mesh_parts(&self, full: &str) -> Parts<'static> {
        let key = self.addresses.of_kubernetes.get(full);
        let known = key.and_then(|key| Some((key, self.addresses.services.get(key)?)));
        let Some((key, record)) = known else { return Parts::Ports(HashMap::new()) };
        Parts::Ports(self.mesh_endpoints(key, record).0)
    }

    /// Returns the entry of a service that the Kubernetes API does not have. Its creator writes its addresses, so they yield to those of
    /// pods, nodes and ClusterIPs.
    fn outer_service(&mut self, key: &Arc<str>, record: &ServiceRecord) -> Service {
        let (endpoints, _) = self.mesh_endpoints(key, record);
        let ports = record.ports.iter().map(|port| {
            let [ipv4, ipv6] = endpoints.get(&port.service).cloned().unwrap_or_default();
            ServicePort { port: port.service, node_port: None, ipv4, ipv6 }
        });
        Service {
            name: outer_name(record).into(),
            namespace: self.interner.intern(&record.namespace),
            addresses: Vec::new(),
            external_ips: refused::outer_addresses(record),
            ingress_ips: Vec::new(),
            ports: ports.collect(),
            udp_ports: Vec::new(),
            traffic: InternalTrafficPolicy::Cluster,
            affinity: Affinity::None,
        }
    }

    /// Returns the endpoints of each port in both families, and true if some are in another network.
    fn mesh_endpoints(&self, key: &Arc<str>, record: &ServiceRecord) -> (HashMap<u16, [Endpoints; 2]>, bool) {
        let addresses = &self.addresses;
        let members = addresses.members.get(key).into_iter().flatten();
        let members = members.filter_map(|uid| addresses.workloads.get(uid));
        let (here, elsewhere): (Vec<_>, Vec<_>) =
            members.partition(|workload| workload.network == addresses.place.network);
        let Balancing { preference, mode, uses_unhealthy } = &record.balancing;
        let rank = |workload: &WorkloadRecord| {
            preference.iter().take_while(|scope| self.shares(workload, **scope)).count()
        };
        let mut ranked: Vec<(usize, &WorkloadRecord)> = here.iter().map(|one| (rank(one), &***one)).collect();
        if *mode == Distribution::Strict {
            ranked.retain(|(rank, _)| *rank == preference.len());
        }
        let is_ready = |workload: &WorkloadRecord| workload.is_healthy || *uses_unhealthy;
        let ready = ranked.iter().filter(|(_, workload)| is_ready(workload));
        let best = ready.map(|(rank, _)| *rank).max().filter(|_| *mode == Distribution::Failover);
        let mut listed: HashMap<u16, [Vec<ListedEndpoint>; 2]> = HashMap::new();
        for (rank, workload) in ranked {
            let condition =
                if is_ready(workload) { EndpointCondition::Ready } else { EndpointCondition::NotReady };
            let for_nodes = match best {
                None => Hint::Absent,
                Some(best) if best == rank => Hint::Here,
                Some(_) => Hint::Elsewhere,
            };
            let node: Arc<str> = addresses.node(workload).into();
            let memberships = workload.services.iter().filter(|membership| membership.service == **key);
            for PortPair { service, target } in memberships.flat_map(|membership| &membership.ports) {
                let of_service = record.ports.iter().find(|port| port.service == *service);
                let default = of_service.map_or(0, |port| port.target);
                let target = if *target == 0 { default } else { *target };
                if target == 0 {
                    continue;
                }
                for address in &workload.addresses {
                    let endpoint = Endpoint { address: (*address, target).into(), node: Arc::clone(&node) };
                    let one = ListedEndpoint { endpoint, condition, for_nodes, for_zones: Hint::Absent };
                    listed.entry(*service).or_default()[usize::from(address.is_ipv6())].push(one);
                }
            }
        }
        let endpoints = listed.into_iter().map(|(port, lists)| (port, lists.map(Endpoints::listed)));
        (endpoints.collect(), !elsewhere.is_empty())
    }

    /// Returns true if a workload is in the same place as clients of this node.
    fn shares(&self, workload: &WorkloadRecord, scope: BalancingScope) -> bool {
        let (own, other) = (&self.addresses.locality, &workload.locality);
        match scope {
            BalancingScope::Unspecified => true,
            BalancingScope::Region => own.region == other.region,
            BalancingScope::Zone => own.zone == other.zone,
            BalancingScope::Subzone => own.subzone == other.subzone,
            BalancingScope::Node => *workload.node == *self.local_node.node,
            BalancingScope::Cluster => workload.cluster == self.addresses.place.cluster,
            BalancingScope::Network => workload.network == self.addresses.place.network,
        }
    }

    fn remove_directory_service(&mut self, full: &str) {
        let Some((namespace, name)) = full.split_once('/') else { return };
        if self.directory.service_named(namespace, name).is_none() {
            return;
        }
        self.range_discovery.remove_service(full);
        self.forget_service_addresses(full);
        self.directory.remove_service(namespace, name);
        self.changed = true;
    }
}

/// Returns the name of a service whose hostname is that of a service of Kubernetes.
fn kubernetes_name(record: &ServiceRecord) -> Option<&str> {
    let prefix = format!("{}.{}.svc.", record.name, record.namespace);
    record.hostname.starts_with(&prefix).then_some(&*record.name)
}

/// Returns the name in the directory of a service that the Kubernetes API does not have. It has a dot, so no service of Kubernetes has it.
fn outer_name(record: &ServiceRecord) -> String {
    if record.hostname.contains('.') { record.hostname.clone() } else { format!("{}.", record.hostname) }
}

#[cfg(test)]
mod tests;

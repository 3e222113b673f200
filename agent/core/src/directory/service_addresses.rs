//! Services by name and by address. Pure.
//!
//! A ClusterIP is allocated by the API server and belongs to one service. External and load balancer addresses may be shared by
//! services with different ports. Two services with the same address and port contradict each other, and neither has it.
//!
//! A load balancer can have thousands of addresses. Addresses name their services, so a service whose endpoints have changed
//! changes no entry of its addresses, and one that has gained an address changes that entry alone.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{Service, full_name};
use crate::cow_map::CowMap;

type ByName = CowMap<Arc<str>, Arc<Service>>;

/// All services, and those of all addresses.
#[derive(Debug, Default, Clone)]
pub(super) struct ServiceAddresses {
    by_name: ByName,
    cluster: CowMap<IpAddr, Arc<Service>>,
    outer: CowMap<IpAddr, Arc<OuterAddress>>,
    /// The API server gives a node port to one service.
    node_ports: CowMap<u16, Arc<Service>>,
}

/// The services with one external or load balancer address, by `namespace/name`. Every namespace can add services, so no lookup
/// goes through them all.
#[derive(Debug, Default, Clone)]
struct OuterAddress {
    services: Vec<Arc<str>>,
    /// The service of each port, or `None` if several services have the port. Empty for an address of one service, whose own
    /// ports count.
    ports: HashMap<u16, Option<Arc<str>>>,
    /// Number of services whose load balancer has the address.
    ingress_count: usize,
}

impl OuterAddress {
    fn insert(&mut self, address: IpAddr, name: &Arc<str>, service: &Service, by_name: &ByName) {
        if self.services.contains(name) {
            return;
        }
        if let [only] = &self.services[..] {
            let only = Arc::clone(only);
            if let Some(first) = by_name.get(&only) {
                self.insert_ports(&only, first);
            }
        }
        self.services.push(Arc::clone(name));
        self.ingress_count += usize::from(service.has_ingress(&address));
        if self.services.len() > 1 {
            self.insert_ports(name, service);
        }
    }

    fn insert_ports(&mut self, name: &Arc<str>, service: &Service) {
        for port in &service.ports {
            let holder = self.ports.entry(port.port).or_insert_with(|| Some(Arc::clone(name)));
            if holder.as_ref().is_some_and(|known| known != name) {
                *holder = None;
            }
        }
    }

    fn remove(&mut self, address: IpAddr, name: &Arc<str>, service: &Service, by_name: &ByName) {
        let before = self.services.len();
        self.services.retain(|known| known != name);
        if self.services.len() == before {
            return;
        }
        self.ingress_count -= usize::from(service.has_ingress(&address));
        if self.services.len() < 2 {
            self.ports = HashMap::new();
        } else {
            service.ports.iter().for_each(|port| self.release(port.port, name, by_name));
        }
    }

    /// Finds the service of a port that `removed` had. Only a port of several services needs a search.
    fn release(&mut self, port: u16, removed: &Arc<str>, by_name: &ByName) {
        if let Some(Some(holder)) = self.ports.get(&port) {
            if holder == removed {
                self.ports.remove(&port);
            }
            return;
        }
        self.ports.remove(&port);
        let has_port = |name: &&Arc<str>| by_name.get(*name).is_some_and(|service| service.has_port(port));
        let mut others = self.services.iter().filter(has_port);
        match (others.next(), others.next()) {
            (None, _) => {}
            (Some(only), None) => drop(self.ports.insert(port, Some(Arc::clone(only)))),
            (Some(_), Some(_)) => drop(self.ports.insert(port, None)),
        }
    }
}

impl ServiceAddresses {
    /// Adds a service, or replaces the one of its name. Returns true if the services or ports of an external or load balancer
    /// address have changed.
    pub(super) fn insert(&mut self, service: Service) -> bool {
        let name: Arc<str> = full_name(&service.namespace, &service.name).into();
        let service = Arc::new(service);
        let before = self.by_name.get(&name).cloned();
        if let Some(before) = &before {
            self.remove_inner(before);
        }
        for address in &service.addresses {
            self.cluster.insert(*address, Arc::clone(&service));
        }
        for port in service.ports.iter().filter_map(|port| port.node_port) {
            self.node_ports.insert(port, Arc::clone(&service));
        }
        let is_changed = self.replace_outer(&name, before.as_deref(), Some(&service));
        self.by_name.insert(name, service);
        is_changed
    }

    /// Removes a service. A ClusterIP that another service took over stays with that service. Returns true if the service had
    /// an external or load balancer address.
    pub(super) fn remove(&mut self, namespace: &str, name: &str) -> bool {
        let name: Arc<str> = full_name(namespace, name).into();
        let Some(service) = self.by_name.get(&name).cloned() else { return false };
        self.remove_inner(&service);
        let is_changed = self.replace_outer(&name, Some(&service), None);
        self.by_name.remove(&name);
        is_changed
    }

    /// Removes the ClusterIPs and node ports of a service, unless another service took them over.
    fn remove_inner(&mut self, service: &Arc<Service>) {
        for address in &service.addresses {
            if self.cluster.get(address).is_some_and(|holder| Arc::ptr_eq(holder, service)) {
                self.cluster.remove(address);
            }
        }
        for port in service.ports.iter().filter_map(|port| port.node_port) {
            if self.node_ports.get(&port).is_some_and(|holder| Arc::ptr_eq(holder, service)) {
                self.node_ports.remove(&port);
            }
        }
    }

    /// Changes the entries of the external and load balancer addresses that have other services or ports now. Returns true if
    /// there are any.
    fn replace_outer(&mut self, name: &Arc<str>, before: Option<&Service>, now: Option<&Service>) -> bool {
        let ports = |service: &Service| service.ports.iter().map(|port| port.port).collect::<Vec<_>>();
        let has_same_ports = before.map(ports) == now.map(ports);
        if let (Some(before), Some(now)) = (before, now)
            && has_same_ports
            && (&before.external_ips, &before.ingress_ips) == (&now.external_ips, &now.ingress_ips)
        {
            return before.udp_ports != now.udp_ports && before.outer_addresses().next().is_some();
        }
        let Self { by_name, outer, .. } = self;
        let mut touched = differing(before, now);
        if !has_same_ports {
            let is_shared =
                |address: &&IpAddr| outer.get(*address).is_some_and(|outer| outer.services.len() > 1);
            touched.extend(before.into_iter().flat_map(Service::outer_addresses).filter(is_shared));
        }
        // Once each: an address can be in both lists, and its port shared.
        touched.sort_unstable();
        touched.dedup();
        for address in touched {
            let mut entry = outer.remove(&address).unwrap_or_default();
            let services = Arc::make_mut(&mut entry);
            if let Some(before) = before {
                services.remove(address, name, before, by_name);
            }
            if let Some(now) = now.filter(|now| now.has_outer(&address)) {
                services.insert(address, name, now, by_name);
            }
            if !services.services.is_empty() {
                outer.insert(address, entry);
            }
        }
        [before, now].into_iter().flatten().any(|service| service.outer_addresses().next().is_some())
    }

    /// All services, in no order.
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.by_name.values()
    }

    /// The service with this `namespace/name`.
    pub(super) fn named(&self, full_name: &str) -> Option<&Arc<Service>> {
        self.by_name.get(full_name)
    }

    /// The service with a ClusterIP.
    pub(super) fn cluster(&self, address: IpAddr) -> Option<&Arc<Service>> {
        self.cluster.get(&address)
    }

    /// The service with a node port.
    pub(super) fn node_port(&self, port: u16) -> Option<&Arc<Service>> {
        self.node_ports.get(&port)
    }

    /// The first service with an external or load balancer address.
    pub(super) fn outer(&self, address: IpAddr) -> Option<&Arc<Service>> {
        self.by_name.get(self.outer.get(&address)?.services.first()?)
    }

    /// The only service with an external or load balancer address that has the port.
    pub(super) fn outer_at(&self, at: SocketAddr) -> Option<&Arc<Service>> {
        let outer = self.outer.get(&at.ip())?;
        match &outer.services[..] {
            [only] => self.by_name.get(only).filter(|service| service.has_port(at.port())),
            _ => self.by_name.get(outer.ports.get(&at.port())?.as_ref()?),
        }
    }

    /// Returns true if more than one service has the port of an external or load balancer address.
    pub(super) fn is_contested(&self, at: SocketAddr) -> bool {
        self.outer.get(&at.ip()).is_some_and(|outer| outer.ports.get(&at.port()) == Some(&None))
    }

    /// Returns true if a load balancer of a service has the address.
    pub(super) fn is_ingress(&self, address: IpAddr) -> bool {
        self.outer.get(&address).is_some_and(|outer| outer.ingress_count > 0)
    }

    /// All external and load balancer addresses, with their services.
    pub(super) fn all_outer(&self) -> impl Iterator<Item = (IpAddr, impl Iterator<Item = &Arc<Service>>)> {
        self.outer.iter().map(|(address, outer)| {
            (*address, outer.services.iter().filter_map(|name| self.by_name.get(name)))
        })
    }
}

/// Returns the external and load balancer addresses that only one of two states of a service has, or has of another kind.
fn differing(before: Option<&Service>, now: Option<&Service>) -> Vec<IpAddr> {
    fn ingress(service: Option<&Service>) -> &[IpAddr] {
        service.map_or(&[], |service| &service.ingress_ips)
    }
    fn external(service: Option<&Service>) -> &[IpAddr] {
        service.map_or(&[], |service| &service.external_ips)
    }
    let mut differing = Vec::new();
    // Both are in order, and each can have thousands.
    let (mut old, mut new) = (ingress(before), ingress(now));
    while let (Some((first, others)), Some((next, rest))) = (old.split_first(), new.split_first()) {
        if first != next {
            differing.push(*first.min(next));
        }
        (old, new) = (if first <= next { others } else { old }, if next <= first { rest } else { new });
    }
    differing.extend_from_slice(old);
    differing.extend_from_slice(new);
    let (old, new) = (external(before), external(now));
    differing.extend(old.iter().filter(|address| !new.contains(address)));
    differing.extend(new.iter().filter(|address| !old.contains(address)));
    differing
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::{
        Affinity, Endpoint, EndpointCondition, Endpoints, Hint, InternalTrafficPolicy, ListedEndpoint,
        ServicePort,
    };

    const ADDRESS: [u8; 4] = [192, 0, 2, 1];

    fn service(name: &str, ports: &[u16]) -> Service {
        let port = |port: &u16| ServicePort {
            port: *port,
            node_port: None,
            ipv4: Endpoints::default(),
            ipv6: Endpoints::default(),
        };
        Service {
            name: name.into(),
            namespace: "shop".into(),
            addresses: Vec::new(),
            external_ips: vec![ADDRESS.into()],
            ingress_ips: Vec::new(),
            ports: ports.iter().map(port).collect(),
            udp_ports: Vec::new(),
            traffic: InternalTrafficPolicy::Cluster,
            affinity: Affinity::None,
        }
    }

    #[test]
    fn a_port_has_the_one_service_that_is_left_in_every_order() {
        let all = [service("a", &[80, 443]), service("b", &[443, 443, 8443]), service("c", &[443])];
        // Every order of six changes, each of which adds or removes one of the three.
        for history in 0..3_u32.pow(6) {
            let (mut addresses, mut present) = (ServiceAddresses::default(), Vec::new());
            for step in 0..6 {
                let one = &all[(history / 3_u32.pow(step) % 3) as usize];
                if let Some(place) = present.iter().position(|known| *known == one) {
                    assert!(addresses.remove(&one.namespace, &one.name));
                    present.remove(place);
                } else {
                    assert!(addresses.insert(one.clone()));
                    present.push(one);
                }
                for port in [80, 443, 8443, 1] {
                    let at = SocketAddr::from((ADDRESS, port));
                    let with: Vec<_> = present.iter().filter(|service| service.has_port(port)).collect();
                    let only = if let [only] = with[..] { Some(&only.name) } else { None };
                    assert_eq!(addresses.outer_at(at).map(|found| &found.name), only, "{history} {step}");
                    assert_eq!(addresses.is_contested(at), with.len() > 1, "{history} {step}");
                }
            }
        }
    }

    /// A load balancer with `count` addresses and an endpoint with this last octet.
    fn balancer(count: u32, ports: &[u16], endpoint: u8) -> Service {
        let mut balancer = Service { external_ips: Vec::new(), ..service("lb", ports) };
        balancer.ingress_ips = (0..count).map(|i| std::net::Ipv4Addr::from(0x0a00_0000 + i).into()).collect();
        let address = SocketAddr::from(([10, 77, 0, endpoint], 80));
        let endpoint = Endpoint { address, node: "a".into() };
        let listed = ListedEndpoint {
            endpoint,
            condition: EndpointCondition::Ready,
            for_nodes: Hint::Absent,
            for_zones: Hint::Absent,
        };
        for port in &mut balancer.ports {
            port.ipv4 = Endpoints::listed(vec![listed.clone()]);
        }
        balancer
    }

    /// Returns the number of entries of addresses that differ in two copies, whatever they hold.
    fn changed_entries(now: &ServiceAddresses, before: &ServiceAddresses) -> usize {
        let is_other = |(address, entry): (&IpAddr, &Arc<OuterAddress>)| {
            before.outer.get(address).is_none_or(|old| !Arc::ptr_eq(old, entry))
        };
        let gone = before.outer.iter().filter(|(address, _)| now.outer.get(*address).is_none()).count();
        now.outer.iter().filter(|entry| is_other(*entry)).count() + gone
    }

    #[test]
    fn a_change_of_a_load_balancer_changes_the_entries_of_the_addresses_that_differ() {
        let mut addresses = ServiceAddresses::default();
        addresses.insert(balancer(5_000, &[80], 1));
        let other = Service { external_ips: vec![[10, 0, 0, 7].into()], ..service("b", &[80]) };
        addresses.insert(other);
        let found = |addresses: &ServiceAddresses, at: ([u8; 4], u16)| {
            addresses.outer_at(SocketAddr::from(at)).map(|service| service.ports[0].ipv4.iter().count())
        };
        // Address 7 is shared by two services.
        for (next, is_changed, entries) in [
            (balancer(5_000, &[80], 2), false, 0),
            (balancer(5_000, &[443], 2), true, 1),
            (balancer(5_001, &[443], 2), true, 1),
            (balancer(5_000, &[443], 3), true, 1),
            (balancer(5_000, &[80, 443], 3), true, 1),
        ] {
            let before = addresses.clone();
            assert_eq!(addresses.insert(next.clone()), is_changed);
            assert_eq!(changed_entries(&addresses, &before), entries);
            for port in [80, 443] {
                let expected = next.has_port(port).then_some(1);
                assert_eq!(found(&addresses, ([10, 0, 0, 9], port)), expected, "{port}");
            }
            let is_contested = next.has_port(80);
            assert_eq!(addresses.is_contested(SocketAddr::from(([10, 0, 0, 7], 80))), is_contested);
        }
    }

    #[test]
    fn the_kind_and_the_udp_ports_of_an_address_count_as_changes() {
        let mut addresses = ServiceAddresses::default();
        let outer = Service { external_ips: Vec::new(), ..service("a", &[80]) };
        assert!(!addresses.insert(outer.clone()), "it has no such address");
        let external = Service { external_ips: vec![ADDRESS.into()], ..outer.clone() };
        assert!(addresses.insert(external.clone()) && !addresses.is_ingress(ADDRESS.into()));
        let udp = Service { udp_ports: vec![53], ..external.clone() };
        assert!(addresses.insert(udp.clone()) && !addresses.insert(udp));
        let ingress = Service { ingress_ips: vec![ADDRESS.into()], ..outer.clone() };
        assert!(addresses.insert(ingress.clone()) && addresses.is_ingress(ADDRESS.into()));
        assert!(addresses.insert(external) && !addresses.is_ingress(ADDRESS.into()));
        assert!(addresses.insert(ingress.clone()) && addresses.is_ingress(ADDRESS.into()));
        let both = Service { external_ips: vec![ADDRESS.into()], ..ingress };
        assert!(addresses.insert(both) && addresses.is_ingress(ADDRESS.into()));
        assert!(addresses.insert(outer) && !addresses.is_ingress(ADDRESS.into()));
        assert!(addresses.outer(ADDRESS.into()).is_none());
    }
}

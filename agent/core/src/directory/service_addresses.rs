//! Services by address. Pure.
//!
//! A ClusterIP is allocated by the API server and belongs to one service. External and load balancer addresses may be shared by
//! services with different ports. Two services with the same address and port contradict each other, and neither has it.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::Service;
use crate::cow_map::CowMap;

/// The services of all addresses.
#[derive(Debug, Default, Clone)]
pub(super) struct ServiceAddresses {
    cluster: CowMap<IpAddr, Arc<Service>>,
    outer: CowMap<IpAddr, Arc<OuterAddress>>,
    /// The API server gives a node port to one service.
    node_ports: CowMap<u16, Arc<Service>>,
}

/// The services with one external or load balancer address. Every namespace can add services, so lookups are not scans.
#[derive(Debug, Default, Clone)]
struct OuterAddress {
    services: Vec<Arc<Service>>,
    /// The service of each port, or `None` if several services have the port.
    ports: HashMap<u16, Option<Arc<Service>>>,
    /// Number of services whose load balancer has the address.
    ingress_count: usize,
}

impl OuterAddress {
    fn insert(&mut self, address: IpAddr, service: &Arc<Service>) {
        if self.services.iter().any(|known| Arc::ptr_eq(known, service)) {
            return;
        }
        self.services.push(Arc::clone(service));
        self.ingress_count += usize::from(service.has_ingress(&address));
        for port in &service.ports {
            let holder = self.ports.entry(port.port).or_insert_with(|| Some(Arc::clone(service)));
            if holder.as_ref().is_some_and(|known| !Arc::ptr_eq(known, service)) {
                *holder = None;
            }
        }
    }

    fn remove(&mut self, address: IpAddr, service: &Arc<Service>) {
        let before = self.services.len();
        self.services.retain(|known| !Arc::ptr_eq(known, service));
        if self.services.len() < before {
            self.ingress_count -= usize::from(service.has_ingress(&address));
            service.ports.iter().for_each(|port| self.release(port.port, service));
        }
    }

    /// Finds the service of a port that `removed` had. Only a port of several services needs a search.
    fn release(&mut self, port: u16, removed: &Arc<Service>) {
        if let Some(Some(holder)) = self.ports.get(&port) {
            if Arc::ptr_eq(holder, removed) {
                self.ports.remove(&port);
            }
            return;
        }
        self.ports.remove(&port);
        let mut others = self.services.iter().filter(|service| service.has_port(port));
        match (others.next(), others.next()) {
            (None, _) => {}
            (Some(only), None) => drop(self.ports.insert(port, Some(Arc::clone(only)))),
            (Some(_), Some(_)) => drop(self.ports.insert(port, None)),
        }
    }
}

impl ServiceAddresses {
    pub(super) fn insert(&mut self, service: &Arc<Service>) {
        for address in &service.addresses {
            self.cluster.insert(*address, Arc::clone(service));
        }
        for port in service.ports.iter().filter_map(|port| port.node_port) {
            self.node_ports.insert(port, Arc::clone(service));
        }
        for address in service.outer_addresses() {
            let mut outer = self.outer.remove(address).unwrap_or_default();
            Arc::make_mut(&mut outer).insert(*address, service);
            self.outer.insert(*address, outer);
        }
    }

    /// Removes a service. A ClusterIP that another service took over stays with that service.
    pub(super) fn remove(&mut self, service: &Arc<Service>) {
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
        for address in service.outer_addresses() {
            let Some(mut outer) = self.outer.remove(address) else { continue };
            Arc::make_mut(&mut outer).remove(*address, service);
            if !outer.services.is_empty() {
                self.outer.insert(*address, outer);
            }
        }
    }

    /// The service with a ClusterIP.
    pub(super) fn cluster(&self, address: IpAddr) -> Option<&Arc<Service>> {
        self.cluster.get(&address)
    }

    /// The service with a node port.
    pub(super) fn node_port(&self, port: u16) -> Option<&Arc<Service>> {
        self.node_ports.get(&port)
    }

    /// The services with an external or load balancer address.
    pub(super) fn outer(&self, address: IpAddr) -> &[Arc<Service>] {
        self.outer.get(&address).map_or(&[], |outer| outer.services.as_slice())
    }

    /// The only service with an external or load balancer address that has the port.
    pub(super) fn outer_at(&self, at: SocketAddr) -> Option<&Arc<Service>> {
        self.outer.get(&at.ip())?.ports.get(&at.port())?.as_ref()
    }

    /// Returns true if more than one service has the port of an external or load balancer address.
    pub(super) fn is_contested(&self, at: SocketAddr) -> bool {
        self.outer.get(&at.ip()).is_some_and(|outer| outer.ports.get(&at.port()) == Some(&None))
    }

    /// Returns true if a load balancer of a service has the address.
    pub(super) fn is_ingress(&self, address: IpAddr) -> bool {
        self.outer.get(&address).is_some_and(|outer| outer.ingress_count > 0)
    }

    /// All external and load balancer addresses.
    pub(super) fn all_outer(&self) -> impl Iterator<Item = (IpAddr, &[Arc<Service>])> {
        self.outer.iter().map(|(address, outer)| (*address, outer.services.as_slice()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::{Affinity, Endpoints, InternalTrafficPolicy, ServicePort};

    const ADDRESS: [u8; 4] = [192, 0, 2, 1];

    fn service(name: &str, ports: &[u16]) -> Arc<Service> {
        let port = |port: &u16| ServicePort {
            port: *port,
            node_port: None,
            ipv4: Endpoints::default(),
            ipv6: Endpoints::default(),
        };
        Arc::new(Service {
            name: name.into(),
            namespace: "shop".into(),
            addresses: Vec::new(),
            external_ips: vec![ADDRESS.into()],
            ingress_ips: Vec::new(),
            ports: ports.iter().map(port).collect(),
            udp_ports: Vec::new(),
            traffic: InternalTrafficPolicy::Cluster,
            affinity: Affinity::None,
        })
    }

    #[test]
    fn a_port_has_the_one_service_that_is_left_in_every_order() {
        let all = [service("a", &[80, 443]), service("b", &[443, 443, 8443]), service("c", &[443])];
        // Every order of six changes, each of which adds or removes one of the three.
        for history in 0..3_u32.pow(6) {
            let (mut addresses, mut present) = (ServiceAddresses::default(), Vec::new());
            for step in 0..6 {
                let one = &all[(history / 3_u32.pow(step) % 3) as usize];
                if let Some(place) = present.iter().position(|known| Arc::ptr_eq(known, one)) {
                    addresses.remove(one);
                    present.remove(place);
                } else {
                    addresses.insert(one);
                    present.push(Arc::clone(one));
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
}

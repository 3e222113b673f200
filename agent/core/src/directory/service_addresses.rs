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
            service.ports.iter().for_each(|port| self.release(port.port));
        }
    }

    /// Finds the service of a port that a removed service had. Only a port of several services needs a search.
    fn release(&mut self, port: u16) {
        if let Some(Some(_)) = self.ports.remove(&port) {
            return;
        }
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

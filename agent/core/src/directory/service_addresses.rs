//! Services by address. Pure.
//!
//! A ClusterIP is allocated by the API server and belongs to one service. External and load balancer addresses may be shared by
//! services with different ports. Two services with the same address and port contradict each other, and neither has it.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{Service, cow_map::CowMap};

/// The services of all addresses.
#[derive(Debug, Default, Clone)]
pub(super) struct ServiceAddresses {
    cluster: CowMap<IpAddr, Arc<Service>>,
    outer: CowMap<IpAddr, Arc<Vec<Arc<Service>>>>,
}

impl ServiceAddresses {
    pub(super) fn insert(&mut self, service: &Arc<Service>) {
        for address in &service.addresses {
            self.cluster.insert(*address, Arc::clone(service));
        }
        for address in service.outer_addresses() {
            let mut all = self.outer.remove(address).unwrap_or_default();
            if !all.iter().any(|known| Arc::ptr_eq(known, service)) {
                Arc::make_mut(&mut all).push(Arc::clone(service));
            }
            self.outer.insert(*address, all);
        }
    }

    /// Removes a service. A ClusterIP that another service took over stays with that service.
    pub(super) fn remove(&mut self, service: &Arc<Service>) {
        for address in &service.addresses {
            if self.cluster.get(address).is_some_and(|holder| Arc::ptr_eq(holder, service)) {
                self.cluster.remove(address);
            }
        }
        for address in service.outer_addresses() {
            let Some(mut all) = self.outer.remove(address) else { continue };
            Arc::make_mut(&mut all).retain(|known| !Arc::ptr_eq(known, service));
            if !all.is_empty() {
                self.outer.insert(*address, all);
            }
        }
    }

    /// The service with a ClusterIP.
    pub(super) fn cluster(&self, address: IpAddr) -> Option<&Arc<Service>> {
        self.cluster.get(&address)
    }

    /// The services with an external or load balancer address.
    pub(super) fn outer(&self, address: IpAddr) -> &[Arc<Service>] {
        self.outer.get(&address).map_or(&[], |all| all.as_slice())
    }

    /// The only service with an external or load balancer address that has the port.
    pub(super) fn outer_at(&self, at: SocketAddr) -> Option<&Arc<Service>> {
        let mut all = self.outer(at.ip()).iter().filter(|service| service.has_port(at.port()));
        all.next().filter(|_| all.next().is_none())
    }

    /// Returns true if more than one service has the port of an external or load balancer address.
    pub(super) fn is_contested(&self, at: SocketAddr) -> bool {
        self.outer(at.ip()).iter().filter(|service| service.has_port(at.port())).nth(1).is_some()
    }

    /// Returns true if a load balancer of a service has the address.
    pub(super) fn is_ingress(&self, address: IpAddr) -> bool {
        self.outer(address).iter().any(|service| service.ingress_ips.contains(&address))
    }

    /// All external and load balancer addresses.
    pub(super) fn all_outer(&self) -> impl Iterator<Item = (IpAddr, &[Arc<Service>])> {
        self.outer.iter().map(|(address, all)| (*address, all.as_slice()))
    }
}

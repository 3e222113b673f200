//! The tables of services at nodes: addresses of the cluster's nodes, and ports of load balancers that have such addresses.
//!
//! While a table was never written in full, or is known to lack an entry, the kernel takes every address, or every port of a node,
//! for one of a service. So a STRICT pod sends nothing there as plaintext. The flag that says so comes before the table changes, and
//! goes after it has (`plan`). The flags have a map of their own: no heartbeat writes them, neither this agent's nor that of one
//! which ends.

use std::{
    collections::{BTreeSet, HashSet},
    hash::Hash,
    net::{IpAddr, SocketAddr},
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData},
};
use tacit_abi::{
    Address, ClearKey, limits,
    node_port::{PORT_WORDS, flag, port_bit},
};

use super::{
    super::KernelError, Maps, PRESENT, PlaintextDestination, address, failed, guard::clear_key, lock, map_of,
};

mod plan;

use plan::{Services, Write};

const FLAGS: &str = "NODE_TABLES";
const NODES: &str = "CLUSTER_NODES";
const SERVICES: &str = "NODE_SERVICES";
const PORTS: &str = "NODE_SERVICE_PORTS";

/// The ports of load balancers at addresses of nodes.
#[derive(Debug, Clone, Default)]
pub struct NodeServicePorts {
    /// Ports at one address each.
    pub exact: Vec<PlaintextDestination>,
    /// Ports, with the number of the IP protocol, that count at each of `addresses`.
    pub anywhere: Vec<(u16, u8)>,
    /// The addresses of nodes that load balancers have.
    pub addresses: BTreeSet<IpAddr>,
}

/// Typed handles of the tables.
pub(super) struct NodeTables {
    flags: Array<MapData, u32>,
    nodes: HashMap<MapData, Address, u32>,
    services: HashMap<MapData, ClearKey, u32>,
    ports: Array<MapData, u64>,
}

impl NodeTables {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, KernelError> {
        Ok(Self {
            flags: map_of(ebpf, FLAGS)?,
            nodes: map_of(ebpf, NODES)?,
            services: map_of(ebpf, SERVICES)?,
            ports: map_of(ebpf, PORTS)?,
        })
    }

    fn flags(&self) -> Result<u32, KernelError> {
        self.flags.get(&0, 0).map_err(failed(FLAGS))
    }

    /// Makes the writes up to the first that fails.
    fn make(&mut self, writes: &[Write]) -> Result<(), KernelError> {
        writes.iter().try_for_each(|write| match write {
            Write::Flags(flags) => self.flags.set(0, flags, 0).map_err(failed(FLAGS)),
            Write::AddNode(address) => self.nodes.insert(address, PRESENT, 0).map_err(failed(NODES)),
            Write::AddService(key) => self.services.insert(key, PRESENT, 0).map_err(failed(SERVICES)),
            Write::Ports(word, bits) => self.ports.set(*word, bits, 0).map_err(failed(PORTS)),
            // One that stays is one of a node, or of a service, for longer.
            Write::RemoveNode(address) => {
                let _ = self.nodes.remove(address);
                Ok(())
            }
            Write::RemoveService(key) => {
                let _ = self.services.remove(key);
                Ok(())
            }
        })
    }

    fn set_nodes(&mut self, wanted: &HashSet<Address>, has_room: bool) -> Result<(), KernelError> {
        let (flags, present) = (self.flags()?, self.nodes.keys().filter_map(Result::ok).collect());
        let written = self.make(&plan::nodes(flags, &present, wanted, has_room));
        if written.is_err() {
            let flags = self.flags()? & !flag::NODES_KNOWN;
            self.make(&[Write::Flags(flags)])?;
        }
        written
    }

    fn set_services(&mut self, wanted: &Services, has_room: bool) -> Result<(), KernelError> {
        let ports: Result<_, _> = (0..PORT_WORDS).map(|word| self.ports.get(&word, 0)).collect();
        let entries = self.services.keys().filter_map(Result::ok).collect();
        let present = Services { entries, ports: ports.map_err(failed(PORTS))? };
        let written = self.make(&plan::services(self.flags()?, &present, wanted, has_room));
        if written.is_err() {
            let flags = self.flags()? | flag::PORTS_UNKNOWN;
            self.make(&[Write::Flags(flags)])?;
        }
        written
    }
}

impl Maps {
    /// Makes the addresses of the cluster's nodes exactly `addresses`.
    ///
    /// # Errors
    /// [`KernelError::Full`] for more than the map holds; those that fit are written. [`KernelError::Map`]. Every address counts
    /// as one of a node after an error. After the first success every port of a node counts as one of a service, until
    /// [`Self::set_node_services`] has written the ports.
    pub fn set_cluster_nodes(&self, addresses: impl Iterator<Item = IpAddr>) -> Result<(), KernelError> {
        let (wanted, room) = fitting(addresses.map(address), limits::CLUSTER_NODES as usize, NODES);
        lock(&self.node_tables).set_nodes(&wanted, room.is_ok()).and(room)
    }

    /// Makes the ports of load balancers that have addresses of nodes exactly `ports`.
    ///
    /// # Errors
    /// [`KernelError::Full`] for more than the map holds; those that fit are written. [`KernelError::Map`]. Every port of a node
    /// counts as one of a service after an error.
    pub fn set_node_services(&self, ports: &NodeServicePorts) -> Result<(), KernelError> {
        let (wanted, room) = Services::of(ports);
        lock(&self.node_tables).set_services(&wanted, room.is_ok()).and(room)
    }
}

impl Services {
    /// Returns the entries for `ports` that fit into the table, and an error if there are more.
    fn of(ports: &NodeServicePorts) -> (Self, Result<(), KernelError>) {
        let balanced = ports
            .addresses
            .iter()
            .map(|ip| PlaintextDestination { address: SocketAddr::new(*ip, 0), protocol: 0 });
        let (addresses, room) =
            fitting(balanced.map(|at| clear_key(&at)), limits::CLUSTER_NODES as usize, SERVICES);
        let (mut entries, exact_room) =
            fitting(ports.exact.iter().map(clear_key), limits::NODE_SERVICES as usize, SERVICES);
        entries.extend(addresses);
        let mut bits = vec![0_u64; PORT_WORDS as usize];
        for (word, bit) in ports.anywhere.iter().map(|(port, protocol)| port_bit(*port, (*protocol).into())) {
            bits[word as usize] |= bit;
        }
        (Self { entries, ports: bits }, room.and(exact_room))
    }
}

/// Returns the first entries that fit into a map, and an error if there are more.
fn fitting<K: Eq + Hash>(
    all: impl Iterator<Item = K>,
    bound: usize,
    map: &'static str,
) -> (HashSet<K>, Result<(), KernelError>) {
    let mut kept = HashSet::new();
    let mut left_out = 0;
    for key in all {
        if kept.len() < bound {
            kept.insert(key);
        } else if !kept.contains(&key) {
            left_out += 1;
        }
    }
    let room = if left_out == 0 { Ok(()) } else { Err(KernelError::Full { map, bound, left_out }) };
    (kept, room)
}

#[cfg(test)]
mod tests;

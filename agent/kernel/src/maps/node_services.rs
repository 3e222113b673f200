//! The tables of services at nodes: addresses of the cluster's nodes, and ports of load balancers that have such addresses.
//!
//! While a table was never written in full, or is known to lack an entry, the kernel takes every address, or every port of a node,
//! for one of a service. So a STRICT pod sends nothing there as plaintext. The flag that says so comes before the table changes, and
//! goes after it has. The flags have a map of their own: no heartbeat writes them, neither this agent's nor that of one which ends.

use std::{
    collections::{BTreeSet, HashSet},
    hash::Hash,
    net::{IpAddr, SocketAddr},
};

use aya::maps::{Array, HashMap, MapData};
use tacit_abi::{
    Address, ClearKey, limits,
    node_port::{PORT_WORDS, flag, port_bit},
};

use super::{
    super::{KernelError, programs::Programs},
    Maps, PRESENT, PlaintextDestination, address, failed,
    guard::clear_key,
    lock, replace_all, unlocked,
};

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
    pub(super) fn take(programs: &mut Programs) -> Result<Self, KernelError> {
        Ok(Self {
            flags: unlocked(programs, "NODE_TABLES")?,
            nodes: unlocked(programs, "CLUSTER_NODES")?,
            services: unlocked(programs, "NODE_SERVICES")?,
            ports: unlocked(programs, "NODE_SERVICE_PORTS")?,
        })
    }

    /// Sets or clears bits of [`flag`].
    fn mark(&mut self, flag: u32, is_set: bool) -> Result<(), KernelError> {
        const MAP: &str = "NODE_TABLES";
        let others = self.flags.get(&0, 0).map_err(failed(MAP))? & !flag;
        self.flags.set(0, if is_set { others | flag } else { others }, 0).map_err(failed(MAP))
    }

    fn has(&self, flag: u32) -> Result<bool, KernelError> {
        self.flags.get(&0, 0).map(|flags| flags & flag != 0).map_err(failed("NODE_TABLES"))
    }

    /// Makes the words of the bitmap those that `word` returns.
    fn set_ports(&mut self, word: impl Fn(u64, u64) -> u64, wanted: &[u64]) -> Result<(), KernelError> {
        const MAP: &str = "NODE_SERVICE_PORTS";
        for (index, wanted) in (0..PORT_WORDS).zip(wanted) {
            let present = self.ports.get(&index, 0).map_err(failed(MAP))?;
            let new = word(present, *wanted);
            if new != present {
                self.ports.set(index, new, 0).map_err(failed(MAP))?;
            }
        }
        Ok(())
    }

    /// Makes the entries those of `wanted`. What is new comes before what is gone goes.
    fn set_services(&mut self, wanted: &HashSet<ClearKey>, ports: &[u64]) -> Result<(), KernelError> {
        const MAP: &str = "NODE_SERVICES";
        self.set_ports(|present, wanted| present | wanted, ports)?;
        let present: HashSet<ClearKey> = self.services.keys().filter_map(Result::ok).collect();
        for new in wanted.difference(&present) {
            self.services.insert(new, PRESENT, 0).map_err(failed(MAP))?;
        }
        for gone in present.difference(wanted) {
            // One that stays makes a port one of a service for longer.
            let _ = self.services.remove(gone);
        }
        self.set_ports(|_, wanted| wanted, ports)
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
        const MAP: &str = "CLUSTER_NODES";
        let (wanted, room) = fitting(addresses.map(address), limits::CLUSTER_NODES as usize, MAP);
        let mut tables = lock(&self.node_tables);
        if room.is_err() {
            tables.mark(flag::NODES_KNOWN, false)?;
        }
        let written = replace_all(&mut tables.nodes, &wanted).map_err(failed(MAP)).and(room);
        if written.is_ok() && !tables.has(flag::NODES_KNOWN)? {
            // In one write: without the nodes, unknown ports would be those of every address.
            tables.mark(flag::NODES_KNOWN | flag::PORTS_UNKNOWN, true)?;
        }
        tables.mark(flag::NODES_KNOWN, written.is_ok())?;
        written
    }

    /// Makes the ports of load balancers that have addresses of nodes exactly `ports`.
    ///
    /// # Errors
    /// [`KernelError::Full`] for more than the map holds; those that fit are written. [`KernelError::Map`]. Every port of a node
    /// counts as one of a service after an error.
    pub fn set_node_services(&self, ports: &NodeServicePorts) -> Result<(), KernelError> {
        const MAP: &str = "NODE_SERVICES";
        let balanced = ports
            .addresses
            .iter()
            .map(|ip| PlaintextDestination { address: SocketAddr::new(*ip, 0), protocol: 0 });
        let (addresses, room) =
            fitting(balanced.map(|at| clear_key(&at)), limits::CLUSTER_NODES as usize, MAP);
        let (mut wanted, exact_room) =
            fitting(ports.exact.iter().map(clear_key), limits::NODE_SERVICES as usize, MAP);
        wanted.extend(addresses);
        let room = room.and(exact_room);
        let mut bits = vec![0_u64; PORT_WORDS as usize];
        for (word, bit) in ports.anywhere.iter().map(|(port, protocol)| port_bit(*port, (*protocol).into())) {
            bits[word as usize] |= bit;
        }
        let is_empty = wanted.is_empty() && ports.anywhere.is_empty();
        let mut tables = lock(&self.node_tables);
        if room.is_err() {
            tables.mark(flag::PORTS_UNKNOWN, true)?;
        }
        if !is_empty {
            tables.mark(flag::LISTED, true)?;
        }
        let written = tables.set_services(&wanted, &bits).and(room);
        tables.mark(flag::PORTS_UNKNOWN, written.is_err())?;
        tables.mark(flag::LISTED, !is_empty)?;
        written
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
mod tests {
    use super::*;

    #[test]
    fn entries_that_do_not_fit_are_an_error_and_repeated_ones_are_not() {
        let fit = |keys: &[u8]| fitting(keys.iter().copied(), 2, "TEST");
        for keys in [&[][..], &[1], &[1, 2], &[1, 2, 1, 2]] {
            let (kept, room) = fit(keys);
            assert!(room.is_ok() && keys.iter().all(|key| kept.contains(key)), "{keys:?}");
        }
        let (kept, room) = fit(&[1, 1, 2, 3, 2, 4]);
        assert_eq!(kept, HashSet::from([1, 2]));
        assert!(matches!(room, Err(KernelError::Full { bound: 2, left_out: 2, .. })));
    }
}

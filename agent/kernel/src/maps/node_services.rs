//! The tables of services at nodes: addresses of the cluster's nodes, and ports of load balancers that have such addresses.
//!
//! While a table lacks an entry, the kernel takes every address, or every port of a node, for one of a service. So a STRICT
//! pod sends nothing there as plaintext.

use std::{collections::HashSet, hash::Hash, net::IpAddr};

use tacit_abi::{limits, node_port::flag};

use super::{
    super::KernelError, Maps, PlaintextDestination, address, failed, guard::clear_key, lock, replace_all,
};

impl Maps {
    /// Makes the addresses of the cluster's nodes exactly `addresses`.
    ///
    /// # Errors
    /// [`KernelError::Full`] for more than the map holds; those that fit are written. [`KernelError::Map`]. Every address counts
    /// as one of a node after an error.
    pub fn set_cluster_nodes(&self, addresses: impl Iterator<Item = IpAddr>) -> Result<(), KernelError> {
        const MAP: &str = "CLUSTER_NODES";
        let (wanted, room) = fitting(addresses.map(address), limits::CLUSTER_NODES as usize, MAP);
        let written = replace_all(&mut lock(&self.cluster_nodes), &wanted).map_err(failed(MAP)).and(room);
        self.mark_node_services(flag::NODES_UNKNOWN, written.is_err())?;
        written
    }

    /// Makes the ports of load balancers that have addresses of nodes exactly `ports`.
    ///
    /// # Errors
    /// [`KernelError::Full`] for more than the map holds; those that fit are written. [`KernelError::Map`]. Every port of a node
    /// counts as one of a service after an error.
    pub fn set_node_services(
        &self,
        ports: impl Iterator<Item = PlaintextDestination>,
    ) -> Result<(), KernelError> {
        const MAP: &str = "NODE_SERVICES";
        let keys = ports.map(|port| clear_key(&port));
        let (wanted, room) = fitting(keys, limits::NODE_SERVICES as usize, MAP);
        let written =
            replace_all(&mut lock(&self.guard.node_services), &wanted).map_err(failed(MAP)).and(room);
        self.mark_node_services(flag::PORTS_UNKNOWN, written.is_err())?;
        self.mark_node_services(flag::LISTED, !wanted.is_empty())?;
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

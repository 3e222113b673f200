//! Ports of services at addresses of nodes: node ports, and ports of load balancers that have such addresses.

use crate::Address;

/// The first node port, by the default of kube-apiserver's `--service-node-port-range`.
pub const FIRST: u16 = 30_000;
/// The last node port.
pub const LAST: u16 = 32_767;

/// Returns true for ports that a service can have at the addresses of nodes.
#[inline(always)]
#[must_use]
pub const fn contains(port: u16) -> bool {
    port >= FIRST && port <= LAST
}

/// Flags of [`crate::State::node_services`].
pub mod flag {
    flags! {
        /// Load balancers have addresses of nodes, so the table of their ports has entries.
        LISTED = 1;
        /// The table of load balancers' ports lacks some: every port of a node counts as one of a service.
        PORTS_UNKNOWN = 2;
        /// The table of nodes' addresses lacks some: every address but a loopback one counts as one of a node.
        NODES_UNKNOWN = 4;
    }
}

/// Returns true if a service may have this port at `address`. `flags` are those of [`flag`]. `is_node` and `is_listed` look
/// the address up among those of nodes, and the port among those of load balancers.
#[inline(always)]
pub fn is_service(
    flags: u32,
    address: &Address,
    port: u16,
    is_node: impl FnOnce() -> bool,
    is_listed: impl FnOnce() -> bool,
) -> bool {
    // Most ports are no node ports, and most clusters have no such load balancers: no hash is looked up.
    if contains(port) || flags & flag::PORTS_UNKNOWN != 0 {
        let is_any =
            flags & flag::NODES_UNKNOWN != 0 && !address.is_loopback() && !address.is_none_of_family();
        if is_any || is_node() {
            return true;
        }
    }
    flags & flag::LISTED != 0 && is_listed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_range_is_that_of_kubernetes() {
        assert!([30_000, 31_999, 32_767].into_iter().all(contains));
        assert!(![0, 443, 10_250, 29_999, 32_768, u16::MAX].into_iter().any(contains));
    }

    #[test]
    fn a_table_that_lacks_entries_makes_every_port_or_address_one_of_a_service() {
        use flag::{LISTED, NODES_UNKNOWN, PORTS_UNKNOWN};
        let other = Address::from_v4_be(u32::from_ne_bytes([192, 0, 2, 1]));
        let loopback = Address::from_v4_be(u32::from_ne_bytes([127, 0, 0, 1]));
        let is =
            |flags, address: &Address, port, is_node| is_service(flags, address, port, || is_node, || false);
        let table = [
            // Flags, and the verdicts on a node port and another port, of a node and elsewhere.
            (0, [true, false, false, false]),
            (LISTED, [true, false, false, false]),
            (PORTS_UNKNOWN, [true, true, false, false]),
            (NODES_UNKNOWN, [true, false, true, false]),
            (PORTS_UNKNOWN | NODES_UNKNOWN, [true; 4]),
        ];
        for (flags, expected) in table {
            let found = [(FIRST, true), (443, true), (FIRST, false), (443, false)]
                .map(|(port, is_node)| is(flags, &other, port, is_node));
            assert_eq!(found, expected, "{flags}");
            for address in [loopback, Address::LOOPBACK_V6, Address::NONE, Address::from_v4_be(0)] {
                assert!(!is(flags, &address, FIRST, false), "{flags}");
            }
            assert_eq!(
                is_service(flags, &other, 443, || false, || true),
                flags != 0 && flags != NODES_UNKNOWN && flags != PORTS_UNKNOWN
            );
        }
    }
}

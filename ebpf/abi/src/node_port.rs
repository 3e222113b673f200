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

/// Flags of the tables of nodes. The agent that serves is the only one that writes them. Zero is what no agent has written.
pub mod flag {
    flags! {
        /// The table of nodes' addresses has all. Without this flag every address but a loopback one counts as one of a node.
        NODES_KNOWN = 1;
        /// The table of load balancers' ports lacks some: every port of a node counts as one of a service.
        PORTS_UNKNOWN = 2;
        /// Load balancers have addresses of nodes, so the tables of their ports have entries.
        LISTED = 4;
    }
}

/// Number of words of the bitmap of ports that count at each address of a load balancer: a bit for each port of TCP and UDP.
pub const PORT_WORDS: u32 = 2 * (1 << 16) / u64::BITS;

/// Returns the word of the bitmap that has the bit of a port of TCP or UDP, and the bit in it.
#[inline(always)]
#[must_use]
pub const fn port_bit(port: u16, protocol: u32) -> (u32, u64) {
    let of_protocol = if protocol == crate::protocol::UDP as u32 { PORT_WORDS / 2 } else { 0 };
    (of_protocol + port as u32 / u64::BITS, 1 << (port as u32 % u64::BITS))
}

/// Facts about an address and a port that may be a service's at a node.
pub trait NodePortFacts {
    /// Returns true if the address is in the table of nodes' addresses.
    fn is_node(&self) -> bool;
    /// Returns true if the address and the port are in the table of load balancers' ports.
    fn is_listed(&self) -> bool;
    /// Returns true if the port counts at each address of a load balancer.
    fn is_anywhere(&self) -> bool;
    /// Returns true if the address is listed as one that load balancers have.
    fn is_balanced(&self) -> bool;
}

/// Returns true if a service may have this port at `address`. `flags` are those of [`flag`].
#[inline(always)]
pub fn is_service(flags: u32, address: &Address, port: u16, facts: &impl NodePortFacts) -> bool {
    // Most ports are no node ports, and most clusters have no such load balancers: no hash is looked up.
    if contains(port) || flags & flag::PORTS_UNKNOWN != 0 {
        let is_any = flags & flag::NODES_KNOWN == 0 && !address.is_loopback() && !address.is_none_of_family();
        if is_any || facts.is_node() {
            return true;
        }
    }
    flags & flag::LISTED != 0 && (facts.is_listed() || facts.is_anywhere() && facts.is_balanced())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// The answers of [`NodePortFacts`], in its order.
    #[derive(Clone, Copy, Debug)]
    struct Facts([bool; 4]);

    impl NodePortFacts for Facts {
        fn is_node(&self) -> bool {
            self.0[0]
        }
        fn is_listed(&self) -> bool {
            self.0[1]
        }
        fn is_anywhere(&self) -> bool {
            self.0[2]
        }
        fn is_balanced(&self) -> bool {
            self.0[3]
        }
    }

    #[test]
    fn the_default_range_is_that_of_kubernetes() {
        assert!([30_000, 31_999, 32_767].into_iter().all(contains));
        assert!(![0, 443, 10_250, 29_999, 32_768, u16::MAX].into_iter().any(contains));
    }

    #[test]
    fn every_port_of_either_protocol_has_its_own_bit() {
        let protocols = [crate::protocol::TCP, crate::protocol::UDP].map(u32::from);
        let bits: HashSet<_> = protocols
            .iter()
            .flat_map(|protocol| (0..=u16::MAX).map(|port| port_bit(port, *protocol)))
            .collect();
        assert_eq!(bits.len(), 2 << 16);
        assert!(bits.iter().all(|(word, bit)| *word < PORT_WORDS && bit.is_power_of_two()));
    }

    #[test]
    fn a_table_that_lacks_entries_makes_every_port_or_address_one_of_a_service() {
        use flag::{LISTED, NODES_KNOWN, PORTS_UNKNOWN};
        let other = Address::from_v4_be(u32::from_ne_bytes([192, 0, 2, 1]));
        let loopback = Address::from_v4_be(u32::from_ne_bytes([127, 0, 0, 1]));
        let is = |flags, address: &Address, port, facts| is_service(flags, address, port, &Facts(facts));
        let of = |is_node| [is_node, false, false, false];
        let table = [
            // Flags, and the verdicts on a node port and another port, of a node and elsewhere. Nothing was written yet in the first.
            (0, [true, false, true, false]),
            (PORTS_UNKNOWN, [true; 4]),
            (LISTED, [true, false, true, false]),
            (NODES_KNOWN, [true, false, false, false]),
            (NODES_KNOWN | LISTED, [true, false, false, false]),
            (NODES_KNOWN | PORTS_UNKNOWN, [true, true, false, false]),
        ];
        for (flags, expected) in table {
            let found = [(FIRST, true), (443, true), (FIRST, false), (443, false)]
                .map(|(port, is_node)| is(flags, &other, port, of(is_node)));
            assert_eq!(found, expected, "{flags}");
            for address in [loopback, Address::LOOPBACK_V6, Address::NONE, Address::from_v4_be(0)] {
                assert!(!is(flags, &address, FIRST, of(false)), "{flags}");
            }
        }
    }

    #[test]
    fn a_port_of_load_balancers_is_a_services_where_it_is_listed() {
        let other = Address::from_v4_be(u32::from_ne_bytes([192, 0, 2, 1]));
        for (facts, expected) in [
            ([true, false, false, false], false),
            ([true, true, false, false], true),
            ([true, false, true, false], false),
            ([true, false, false, true], false),
            ([true, false, true, true], true),
        ] {
            let is = |flags| is_service(flags, &other, 443, &Facts(facts));
            assert_eq!(is(flag::NODES_KNOWN | flag::LISTED), expected, "{facts:?}");
            assert!(!is(flag::NODES_KNOWN), "{facts:?}: no table has an entry");
        }
    }
}

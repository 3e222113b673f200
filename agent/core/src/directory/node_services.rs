//! Ports of load balancers at addresses of nodes, as the kernel has them: each namespace has a share of the table of addresses and
//! ports. Pure.
//!
//! ```text
//! within its share   address and port        exact: other ports of the address, and the port at other addresses, are the nodes'
//! beyond it          port at every address   a service's at each address of a node that any load balancer has
//! ```
//! Ports are bits of a bitmap with room for all, so no number of services makes it full. A namespace beyond its share costs others
//! the exactness of its own port numbers, and nothing else.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::{IpAddr, SocketAddr},
};

use super::IpProtocol;
use crate::shares::{Bounds, Capacity, NODE_SERVICES, ShareUse};

/// One port of a load balancer at an address of a node, with the namespace of its service.
pub type NodeService<'a> = (&'a str, SocketAddr, IpProtocol);

/// The ports of load balancers at addresses of nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeServices {
    /// Those of namespaces within their share.
    pub exact: HashSet<(SocketAddr, IpProtocol)>,
    /// Ports of namespaces beyond their share. They count at each of [`Self::addresses`].
    pub ports: BTreeSet<(u16, IpProtocol)>,
    /// The addresses of nodes that load balancers have. Empty while no namespace is beyond its share.
    pub addresses: BTreeSet<IpAddr>,
    /// Use of the share. A refused use is a namespace beyond it.
    pub usage: ShareUse<String>,
}

/// The ports of one namespace.
#[derive(Default)]
struct OfNamespace {
    /// At most one more than the share.
    exact: HashSet<(SocketAddr, IpProtocol)>,
    ports: BTreeSet<(u16, IpProtocol)>,
    units: u64,
}

impl NodeServices {
    /// Divides the table between the namespaces of `all`.
    pub fn divide<'a>(all: impl Iterator<Item = NodeService<'a>>) -> Self {
        // The bounds are the same on every node.
        Self::divide_by(NODE_SERVICES.bounds(Capacity { descriptors: 0 }), all)
    }

    fn divide_by<'a>(bounds: Bounds, all: impl Iterator<Item = NodeService<'a>>) -> Self {
        let mut namespaces = BTreeMap::<&str, OfNamespace>::new();
        let mut addresses = BTreeSet::new();
        for (namespace, at, protocol) in all {
            let of = namespaces.entry(namespace).or_default();
            addresses.insert(at.ip());
            of.ports.insert((at.port(), protocol));
            // What is beyond the share is not kept: a namespace can have any number.
            let is_beyond = of.exact.len() as u64 > bounds.each;
            of.units += u64::from(is_beyond || of.exact.insert((at, protocol)));
        }
        let fullest = namespaces.iter().max_by_key(|(_, of)| of.units);
        let fullest = fullest.map(|(name, of)| ((*name).to_owned(), of.units));
        let usage = ShareUse { resource: NODE_SERVICES.resource, bounds, used: 0, fullest, refused: 0 };
        let mut divided = Self { exact: HashSet::new(), ports: BTreeSet::new(), addresses, usage };
        // The smallest first: many large namespaces lose what a small one needs, never the other way round.
        let mut by_size: Vec<OfNamespace> = namespaces.into_values().collect();
        by_size.sort_by_key(|of| of.units);
        for of in by_size {
            if of.units <= bounds.each && divided.usage.used + of.units <= bounds.total {
                divided.usage.used += of.units;
                divided.exact.extend(of.exact);
            } else {
                divided.usage.refused += 1;
                divided.ports.extend(of.ports);
            }
        }
        if divided.ports.is_empty() {
            divided.addresses.clear();
        }
        divided
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { total: 10, each: 4 };

    fn at(node: u8, port: u16) -> (SocketAddr, IpProtocol) {
        (SocketAddr::from(([192, 0, 2, node], port)), IpProtocol::Tcp)
    }

    /// Divides ports of namespaces, each with its nodes and ports.
    fn divide(all: &[(&str, &[u8], std::ops::Range<u16>)]) -> NodeServices {
        let each = all.iter().flat_map(|(namespace, nodes, ports)| {
            nodes.iter().flat_map(move |node| {
                ports.clone().map(move |port| (*namespace, at(*node, port).0, IpProtocol::Tcp))
            })
        });
        NodeServices::divide_by(BOUNDS, each)
    }

    fn ports(all: &NodeServices) -> Vec<u16> {
        all.ports.iter().map(|(port, _)| *port).collect()
    }

    #[test]
    fn within_their_shares_all_are_exact() {
        let divided = divide(&[("shop", &[1, 2], 80..82), ("bank", &[3], 443..446)]);
        assert_eq!((divided.exact.len(), ports(&divided)), (7, vec![]));
        assert!(divided.exact.contains(&at(2, 81)) && !divided.exact.contains(&at(3, 81)));
        assert!(divided.addresses.is_empty());
        assert_eq!((divided.usage.used, divided.usage.refused), (7, 0));
        assert_eq!(divided.usage.fullest, Some(("shop".to_owned(), 4)));
    }

    #[test]
    fn a_namespace_beyond_its_share_loses_its_own_exactness_alone() {
        let divided = divide(&[("mallory", &[1, 2], 6000..6010), ("bank", &[3], 443..446)]);
        assert_eq!(divided.exact, (443..446).map(|port| at(3, port)).collect());
        assert_eq!(ports(&divided), (6000..6010).collect::<Vec<_>>());
        let addresses: BTreeSet<_> = [1, 2, 3].map(|node| at(node, 0).0.ip()).into();
        assert_eq!(divided.addresses, addresses, "any load balancer's");
        assert_eq!((divided.usage.used, divided.usage.refused), (3, 1));
        assert_eq!(divided.usage.fullest, Some(("mallory".to_owned(), 20)));
        assert!(divided.usage.is_full());
    }

    #[test]
    fn a_small_namespace_stays_exact_however_many_are_large() {
        let large = ["a", "b", "c", "d"].map(|namespace| (namespace, &[1][..], 80..84));
        let divided = divide(&[&large[..], &[("small", &[2], 443..445)]].concat());
        assert!(divided.exact.contains(&at(2, 443)) && divided.exact.contains(&at(2, 444)));
        assert!(divided.exact.len() <= 10 && divided.usage.used == 10, "{divided:?}");
        assert_eq!((ports(&divided), divided.usage.refused), ((80..84).collect(), 2));
    }

    #[test]
    fn repeated_ports_count_once() {
        let divided = divide(&[("shop", &[1], 80..84), ("shop", &[1], 80..84)]);
        assert_eq!((divided.usage.used, divided.usage.refused), (4, 0));
    }
}

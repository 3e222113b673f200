//! Who is who: the workloads of the mesh and the addresses they have, as one immutable snapshot.
//!
//! Pure: no clock, no I/O, no logging. A snapshot is complete and free of contradictions, since whoever
//! builds it refuses two workloads with one address, name or cgroup. An address that is not in it belongs to
//! nobody known; what that means is for the caller to decide by mode. The source that reads a file is in
//! `file`.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    identity::{SpiffeId, TrustDomain},
    yaml::Mistakes,
};

mod file;

/// One pod of the mesh, or one known neighbour without a tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Name of the pod.
    pub name: Arc<str>,
    /// Its Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Who it is: its service account in the trust domain.
    pub identity: SpiffeId,
    /// Its addresses: one or two, at most one of each family, never IPv4-mapped.
    pub addresses: Vec<IpAddr>,
    /// Name of the node it runs on.
    pub node: Arc<str>,
    /// Its Kubernetes labels, which policies select by.
    pub labels: BTreeMap<String, String>,
    /// Its cgroup, relative to the directory that holds all pods of the node.
    pub cgroup: PathBuf,
    /// How it is reached.
    pub protocol: Protocol,
    /// What it may send in clear into the mesh; `None` follows its mode.
    pub egress: Option<Egress>,
    /// Whether its UDP may pass in clear; `None` follows mode and egress.
    pub udp: Option<Udp>,
}

/// What a workload may send in clear into the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Egress {
    /// What is not tunnelled passes, and is counted.
    Open,
    /// Nothing.
    Strict,
}

/// Whether a workload's UDP may pass in clear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Udp {
    /// It passes, and is counted.
    Allow,
    /// It is dropped.
    Deny,
}

impl Workload {
    /// Its IPv4 address.
    #[must_use]
    pub fn ipv4(&self) -> Option<Ipv4Addr> {
        self.addresses.iter().find_map(|address| match address {
            IpAddr::V4(address) => Some(*address),
            IpAddr::V6(_) => None,
        })
    }

    /// Its IPv6 address.
    #[must_use]
    pub fn ipv6(&self) -> Option<Ipv6Addr> {
        self.addresses.iter().find_map(|address| match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(*address),
        })
    }
}

/// How a workload is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Through a tunnel, wire format `tacit/1`.
    Tacit,
    /// In clear: it is not enrolled.
    None,
}

/// All workloads known at one time. [`Default`] is the empty directory.
#[derive(Debug, Default)]
pub struct Directory {
    workloads: Vec<Arc<Workload>>,
    by_address: HashMap<IpAddr, Arc<Workload>>,
    by_node: HashMap<Arc<str>, Vec<Arc<Workload>>>,
}

impl Directory {
    /// Parses `directory.yaml`; identities are made in `trust_domain`. `file` is named in the mistakes.
    ///
    /// # Errors
    /// All [`Mistakes`] of the text; two workloads that contradict each other are one.
    pub fn parse(text: &str, file: &Path, trust_domain: &TrustDomain) -> Result<Self, Mistakes> {
        file::parse(text, file, trust_domain).map(Self::index)
    }

    /// The workload that has `address`; an IPv4-mapped IPv6 address counts as the IPv4 address. One hash
    /// lookup.
    #[must_use]
    pub fn at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&address.to_canonical())
    }

    /// The workloads of `node`, in the order of the source.
    pub fn on_node<'a>(&'a self, node: &str) -> impl Iterator<Item = &'a Arc<Workload>> + use<'a> {
        self.by_node.get(node).into_iter().flatten()
    }

    /// All workloads, in the order of the source.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.iter()
    }

    /// Number of workloads.
    #[must_use]
    pub fn len(&self) -> usize {
        self.workloads.len()
    }

    /// Whether nobody is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.workloads.is_empty()
    }

    /// Indexes workloads whose addresses are unique.
    fn index(workloads: Vec<Workload>) -> Self {
        let mut directory = Self::default();
        for workload in workloads.into_iter().map(Arc::new) {
            for address in &workload.addresses {
                directory.by_address.insert(*address, Arc::clone(&workload));
            }
            directory.by_node.entry(Arc::clone(&workload.node)).or_default().push(Arc::clone(&workload));
            directory.workloads.push(workload);
        }
        directory
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
workloads:
- {name: web, namespace: shop, serviceAccount: web, addresses: [10.77.1.2, 'fd77:1::2'], node: a, labels: {app: web}}
- {name: db, namespace: shop, addresses: ['fd77:2::3'], node: b, cgroup: shop/db, tunnel: none}
- {name: cart, namespace: shop, addresses: [10.77.1.4], node: a}
";

    fn sample() -> Directory {
        let trust_domain = TrustDomain::parse("cluster.local").expect("valid");
        Directory::parse(TEXT, Path::new("directory.yaml"), &trust_domain).expect("valid")
    }

    #[test]
    fn a_workload_is_found_by_each_of_its_addresses() {
        let directory = sample();
        for (address, name) in [
            ("10.77.1.2", Some("web")),
            ("fd77:1::2", Some("web")),
            ("::ffff:10.77.1.2", Some("web")),
            ("fd77:2::3", Some("db")),
            ("10.77.1.4", Some("cart")),
            ("10.77.1.3", None),
            ("fd77:1::3", None),
        ] {
            let found = directory.at(address.parse().expect("an address")).map(|workload| &*workload.name);
            assert_eq!(found, name, "{address}");
        }
    }

    #[test]
    fn a_workload_has_what_the_file_says_and_the_defaults() {
        let directory = sample();
        let all: Vec<_> = directory.iter().collect();
        let (web, db) = (all[0], all[1]);
        assert_eq!(web.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/web");
        assert_eq!(web.cgroup, Path::new("shop_web"));
        assert_eq!(web.protocol, Protocol::Tacit);
        assert_eq!(web.labels, BTreeMap::from([("app".to_owned(), "web".to_owned())]));
        assert_eq!(web.ipv4(), Some(Ipv4Addr::new(10, 77, 1, 2)));
        assert_eq!(web.ipv6(), Some("fd77:1::2".parse().expect("an address")));
        assert_eq!(db.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/default");
        assert_eq!(db.cgroup, Path::new("shop/db"));
        assert_eq!(db.protocol, Protocol::None);
        assert_eq!((db.ipv4(), db.labels.len()), (None, 0));
    }

    #[test]
    fn a_node_has_its_workloads_in_order() {
        let directory = sample();
        let names = |node| directory.on_node(node).map(|workload| &*workload.name).collect::<Vec<_>>();
        assert_eq!(names("a"), ["web", "cart"]);
        assert_eq!(names("b"), ["db"]);
        assert!(names("c").is_empty());
        assert_eq!((directory.len(), directory.is_empty()), (3, false));
        assert!(Directory::default().is_empty());
    }
}

//! Proxies that clients must go through to reach a workload or a service. Pure.
//!
//! The agent speaks to none of them. It refuses connections to such destinations, because a connection past a waypoint would avoid
//! the policies that the waypoint enforces. A detour belongs to a workload or a service and not to an address: who has an address is
//! decided by the claims to it. A range of addresses has a detour only where no workload, service or node has the address.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;

use super::{Directory, Service, Workload};
use crate::refusal::RefusalReason;

/// A proxy between clients and a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Detour {
    /// A waypoint of Istio.
    Waypoint,
    /// A gateway of another network.
    Gateway,
    /// Not known, since the source has not named the pod yet. It may have a waypoint.
    Unnamed,
    /// Not known, since the source's names of the workload form no identity.
    Unidentified,
}

/// Ranges by their detour. Those of one detour are in order, and no two overlap.
pub(super) type DetourRanges = BTreeMap<Detour, Vec<IpNet>>;

/// A workload or a service, by namespace and name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DetourOf<'a> {
    /// A workload, for clients that connect to its own address.
    Workload(&'a str, &'a str),
    /// A service.
    Service(&'a str, &'a str),
}

impl DetourOf<'_> {
    fn key(self) -> String {
        match self {
            Self::Workload(namespace, name) => format!("workload/{namespace}/{name}"),
            Self::Service(namespace, name) => format!("service/{namespace}/{name}"),
        }
    }
}

impl Detour {
    /// Returns the reason for which a connection to the destination is refused.
    #[must_use]
    pub fn reason(self) -> RefusalReason {
        match self {
            Self::Waypoint | Self::Unnamed => RefusalReason::ThroughWaypoint,
            Self::Gateway => RefusalReason::OtherNetwork,
            Self::Unidentified => RefusalReason::DestinationUnclear,
        }
    }
}

impl fmt::Display for Detour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Waypoint => {
                "clients reach the destination through a waypoint, which this agent does not speak to"
            }
            Self::Gateway => {
                "the destination is in another network, whose gateway this agent does not speak to"
            }
            Self::Unnamed => "istiod has not named the pod yet, so that it may have a waypoint",
            Self::Unidentified => {
                "the names that the directory's source has of the destination form no identity"
            }
        })
    }
}

impl Directory {
    /// Returns the proxy that clients must go through to reach `at`. `None` if they connect directly. A client that asks for a service
    /// has the detour of the service, whatever the endpoint.
    #[must_use]
    pub fn detour(&self, at: SocketAddr) -> Option<Detour> {
        if self.detours.is_empty() && self.detour_ranges.is_empty() {
            return None;
        }
        let service = |service: &Arc<Service>| DetourOf::Service(&service.namespace, &service.name).key();
        let workload =
            |workload: &Arc<Workload>| DetourOf::Workload(&workload.namespace, &workload.name).key();
        match self.service_for(at).map(service).or_else(|| self.at(at.ip()).map(workload)) {
            Some(key) => self.detours.get(key.as_str()).copied(),
            None => self.range_detour(at.ip()),
        }
    }

    /// Returns the detour of the range that contains an address which no workload, service or node has.
    fn range_detour(&self, address: IpAddr) -> Option<Detour> {
        if self.detour_ranges.is_empty() || self.is_node(address) {
            return None;
        }
        let single = IpNet::from(address.to_canonical());
        let contains = |ranges: &Vec<IpNet>| {
            let after = ranges.partition_point(|range| *range <= single);
            ranges[..after].last().is_some_and(|range| range.contains(&single))
        };
        self.detour_ranges.iter().find(|(_, ranges)| contains(ranges)).map(|(detour, _)| *detour)
    }

    /// Replaces the ranges with a detour.
    pub fn set_detour_ranges(&mut self, detour: Detour, ranges: &[IpNet]) {
        let mut joined = IpNet::aggregate(&ranges.to_vec());
        joined.sort_unstable();
        let all = Arc::make_mut(&mut self.detour_ranges);
        if joined.is_empty() {
            all.remove(&detour);
        } else {
            all.insert(detour, joined);
        }
    }

    /// Returns the proxy that clients of a service must go through.
    #[must_use]
    pub fn detour_of(&self, service: &Service) -> Option<Detour> {
        if self.detours.is_empty() {
            return None;
        }
        self.detours.get(DetourOf::Service(&service.namespace, &service.name).key().as_str()).copied()
    }

    /// Sets or removes a detour. Returns true if it has changed.
    pub fn set_detour(&mut self, of: DetourOf<'_>, detour: Option<Detour>) -> bool {
        let key = of.key();
        if self.detours.get(key.as_str()).copied() == detour {
            return false;
        }
        match detour {
            Some(detour) => self.detours.insert(key.into(), detour),
            None => _ = self.detours.remove(key.as_str()),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::spiffe::TrustDomain;

    const TEXT: &str = "\
workloads:
- {name: web, namespace: shop, node: a, addresses: [10.77.1.2]}
services:
- name: web
  namespace: shop
  addresses: [10.96.0.1]
  ports: [{port: 80}]
  endpoints: [{addresses: [10.77.1.2], ready: true}]
";

    #[test]
    fn a_client_has_the_detour_of_what_it_asks_for() {
        let domain = TrustDomain::parse("cluster.local").expect("valid");
        let mut directory = Directory::parse(TEXT, Path::new("directory.yaml"), &domain).expect("valid");
        let (service, pod) = (DetourOf::Service("shop", "web"), DetourOf::Workload("shop", "web"));
        let at = |directory: &Directory| {
            [[10, 96, 0, 1], [10, 77, 1, 2], [10, 77, 1, 3]].map(|ip| directory.detour((ip, 80).into()))
        };
        assert_eq!(at(&directory), [None, None, None]);
        assert!(directory.set_detour(service, Some(Detour::Waypoint)));
        assert!(!directory.set_detour(service, Some(Detour::Waypoint)));
        let before = directory.clone();
        assert!(directory.set_detour(pod, Some(Detour::Gateway)) && directory.set_detour(service, None));
        assert_eq!(at(&before), [Some(Detour::Waypoint), None, None]);
        assert_eq!(at(&directory), [None, Some(Detour::Gateway), None]);
        assert!(directory.set_detour(pod, None) && !directory.set_detour(pod, None));
    }

    #[test]
    fn a_range_has_its_detour_where_nobody_has_the_address() {
        let domain = TrustDomain::parse("cluster.local").expect("valid");
        let mut directory = Directory::parse(TEXT, Path::new("directory.yaml"), &domain).expect("valid");
        directory.set_node_addresses(&"b".into(), &[], &[[10, 77, 0, 9].into()]);
        let ranges = ["10.77.0.0/16", "10.96.0.0/24", "10.77.3.0/24", "fd77::/64"];
        directory.set_detour_ranges(Detour::Waypoint, &ranges.map(|range| range.parse().expect("a range")));
        for (ip, expected) in [
            ("10.77.3.3", Some(Detour::Waypoint)),
            ("::ffff:10.77.9.9", Some(Detour::Waypoint)),
            ("fd77::1", Some(Detour::Waypoint)),
            ("10.96.0.2", Some(Detour::Waypoint)),
            ("10.78.0.1", None),
            ("fd77:0:0:1::1", None),
            ("10.77.1.2", None),
            ("10.96.0.1", None),
            ("10.77.0.9", None),
        ] {
            assert_eq!(directory.detour((ip.parse::<IpAddr>().expect("valid"), 80).into()), expected, "{ip}");
        }
        directory.set_detour_ranges(Detour::Waypoint, &[]);
        assert_eq!(directory.detour(([10, 77, 3, 3], 80).into()), None);
    }
}

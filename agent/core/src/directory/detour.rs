//! Proxies that clients must go through to reach a workload or a service. Pure.
//!
//! The agent speaks to none of them. It refuses connections to such destinations, because a connection past a waypoint would avoid
//! the policies that the waypoint enforces. A detour belongs to a workload or a service and not to an address: who has an address is
//! decided by the claims to it.

use std::{fmt, net::SocketAddr, sync::Arc};

use super::{Directory, Service, Workload};
use crate::refusal::RefusalReason;

/// A proxy between clients and a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Detour {
    /// A waypoint of Istio.
    Waypoint,
    /// A gateway of another network.
    Gateway,
}

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
            Self::Waypoint => RefusalReason::ThroughWaypoint,
            Self::Gateway => RefusalReason::OtherNetwork,
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
        })
    }
}

impl Directory {
    /// Returns the proxy that clients must go through to reach `at`. `None` if they connect directly. A client that asks for a service
    /// has the detour of the service, whatever the endpoint.
    #[must_use]
    pub fn detour(&self, at: SocketAddr) -> Option<Detour> {
        if self.detours.is_empty() {
            return None;
        }
        let service = |service: &Arc<Service>| DetourOf::Service(&service.namespace, &service.name).key();
        let workload =
            |workload: &Arc<Workload>| DetourOf::Workload(&workload.namespace, &workload.name).key();
        let key = self.service_for(at).map(service).or_else(|| self.at(at.ip()).map(workload))?;
        self.detours.get(key.as_str()).copied()
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
}

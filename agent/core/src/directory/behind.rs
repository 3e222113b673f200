//! Services that another program may translate before or after Tacit's connect hook, such as the socket load balancer of a network
//! plugin. If it runs first, the hook sees the endpoint. If it runs later, the hook sees the service, and must know it.

use std::net::{IpAddr, SocketAddr};

use super::{Directory, Ranges};

impl Directory {
    /// Returns `configured` and, one by one, the cluster addresses outside of services with an enrolled endpoint. Connections to them
    /// are captured, whoever would translate them afterwards.
    #[must_use]
    pub fn covering_services(&self, configured: &Ranges) -> Ranges {
        let mut ranges = configured.clone();
        let outside = |address: &&IpAddr| !configured.contains(**address);
        for service in self.services() {
            if service.addresses.iter().any(|address| outside(&address))
                && self.has_enrolled_endpoint(service)
            {
                for address in service.addresses.iter().filter(outside) {
                    // What does not fit stays uncovered, which the status shows.
                    let _ = ranges.add((*address).into());
                }
            }
        }
        ranges
    }

    /// Returns the endpoints that traffic to a service's cluster address and port may have after a translation.
    /// Whoever may write the slices of a service can list any address. So only those count that the directory gives to pods of the
    /// service's namespace, and to nobody else. Endpoints are known of TCP ports alone. A UDP port has those of the TCP port with the
    /// same number, as that of cluster DNS does.
    #[must_use]
    pub fn endpoints_behind(&self, at: SocketAddr) -> Vec<SocketAddr> {
        let Some(service) = self.service_at(at.ip()).filter(|service| service.addresses.contains(&at.ip()))
        else {
            return Vec::new();
        };
        let ports = service.ports.iter().filter(|port| port.port == at.port());
        let endpoints = ports.flat_map(|port| if at.is_ipv4() { port.ipv4.iter() } else { port.ipv6.iter() });
        let is_own = |address: &SocketAddr| {
            let holder = self.at(address.ip()).filter(|_| !self.is_unclear(address.ip()));
            holder.is_some_and(|holder| holder.namespace == service.namespace)
        };
        endpoints.map(|endpoint| endpoint.address).filter(is_own).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::spiffe::TrustDomain;

    const TEXT: &str = "\
workloads:
- {name: dns, namespace: kube-system, node: a, addresses: [10.77.1.2]}
- {name: other, namespace: shop, node: a, addresses: [10.77.1.3], tunnel: none}
services:
- name: dns
  namespace: kube-system
  addresses: [172.20.0.10]
  ports: [{port: 53, targetPort: 5353}]
  endpoints: [{addresses: [10.77.1.2], ready: true}]
- name: other
  namespace: shop
  addresses: [172.20.0.11]
  ports: [{port: 80}]
  endpoints: [{addresses: [10.77.1.3], ready: true}]
";

    fn directory() -> Directory {
        let domain = TrustDomain::parse("cluster.local").expect("valid");
        Directory::parse(TEXT, Path::new("directory.yaml"), &domain).expect("valid")
    }

    #[test]
    fn services_with_enrolled_endpoints_are_covered_wherever_they_are() {
        let configured = Ranges::configured(&["10.77.0.0/16".parse().expect("a range")]);
        let covering = directory().covering_services(&configured);
        assert!(covering.contains([172, 20, 0, 10].into()) && !covering.contains([172, 20, 0, 11].into()));
        assert_eq!((covering.count_configured(), covering.count_detected()), (1, 1));
        let all =
            Ranges::configured(&["10.77.0.0/16", "172.20.0.0/16"].map(|text| text.parse().expect("a range")));
        assert_eq!(directory().covering_services(&all), all);
    }

    #[test]
    fn endpoints_that_are_not_pods_of_the_services_namespace_do_not_count() {
        for stolen in ["10.77.1.3", "10.77.1.9"] {
            let text =
                TEXT.replace("{addresses: [10.77.1.2], ready", &format!("{{addresses: [{stolen}], ready"));
            let domain = TrustDomain::parse("cluster.local").expect("valid");
            let directory = Directory::parse(&text, Path::new("directory.yaml"), &domain).expect("valid");
            assert_eq!(directory.endpoints_behind(([172, 20, 0, 10], 53).into()), [], "{stolen}");
        }
    }

    #[test]
    fn traffic_to_a_service_may_arrive_at_its_endpoints() {
        let behind = |port| directory().endpoints_behind(([172, 20, 0, 10], port).into());
        let endpoint = SocketAddr::from(([10, 77, 1, 2], 5353));
        assert_eq!(behind(53), [endpoint]);
        assert_eq!(behind(80), []);
        assert_eq!(directory().endpoints_behind(endpoint), []);
    }
}

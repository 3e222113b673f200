//! The node's own addresses.

use std::net::IpAddr;

use tacit_core::directory::Directory;
use tacit_kernel::host;

/// Returns the addresses that probes can come from: those of the node's interfaces, without those that belong to a service or a pod.
/// With IPVS, kube-proxy adds the addresses of all services to an interface of the node.
pub(super) fn node_addresses(listed: Vec<IpAddr>, directory: &Directory) -> Vec<IpAddr> {
    let is_own = |address: &IpAddr| {
        host::is_probe_source(address) && !directory.knows(*address) && !directory.is_unclear(*address)
    };
    listed.into_iter().filter(is_own).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tacit_core::spiffe::TrustDomain;

    use super::*;

    #[test]
    fn addresses_of_services_and_pods_are_not_the_nodes() {
        let text = "\
workloads: [{name: web, namespace: shop, addresses: [10.77.1.2], node: a}]
services: [{name: web, namespace: shop, addresses: [10.96.0.1], ports: [{port: 80}], endpoints: []}]
";
        let domain = TrustDomain::parse("cluster.local").expect("valid");
        let directory = Directory::parse(text, Path::new("directory.yaml"), &domain).expect("valid");
        let parse = |texts: &[&str]| -> Vec<IpAddr> {
            texts.iter().map(|text| text.parse().expect("an address")).collect()
        };
        let listed = parse(&["127.0.0.1", "10.96.0.1", "10.77.1.2", "192.0.2.1", "fe80::1", "fd00::1"]);
        assert_eq!(node_addresses(listed, &directory), parse(&["192.0.2.1", "fd00::1"]));
    }
}

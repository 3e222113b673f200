//! `istio.workload.Address` as the directory and the policies need it. Pure.
//!
//! Values that cannot be understood make the whole resource unreadable. The version before it stays in use.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use prost::Message as _;
use tacit_core::directory::special_address;

use super::{
    authorization::address,
    messages::{
        Address, AddressKind, BalancingMode, BalancingScope, HealthPolicy, LoadBalancing, NetworkAddress,
        NetworkMode, Port, Service, TunnelProtocol, Visibility, Workload, WorkloadStatus,
    },
};

/// A resource of the type `Address`.
#[derive(Debug, Clone)]
pub(crate) struct AddressObject {
    /// Name of the resource: a workload's uid, or a service's `<namespace>/<hostname>`.
    pub(crate) name: Arc<str>,
    pub(crate) content: AddressContent,
}

#[derive(Debug, Clone)]
pub(crate) enum AddressContent {
    Workload(Arc<WorkloadRecord>),
    Service(Arc<ServiceRecord>),
    /// Its defect.
    Unreadable(String),
    /// Only its name is known.
    Removed,
}

/// A workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WorkloadRecord {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) cluster: String,
    pub(crate) network: String,
    pub(crate) node: String,
    /// At most one of each family, without those that no workload has.
    pub(crate) addresses: Vec<IpAddr>,
    /// True for a pod of Kubernetes.
    pub(crate) is_pod: bool,
    /// True if clients reach it through a tunnel.
    pub(crate) is_tunnelled: bool,
    /// `None` for the trust domain of the mesh.
    pub(crate) trust_domain: Option<String>,
    pub(crate) service_account: String,
    pub(crate) has_waypoint: bool,
    pub(crate) is_host_network: bool,
    pub(crate) is_healthy: bool,
    pub(crate) locality: Locality,
    pub(crate) services: Vec<Membership>,
    /// Names of the policies that select it.
    pub(crate) policies: Vec<String>,
}

/// Region, zone and subzone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Locality {
    pub(crate) region: String,
    pub(crate) zone: String,
    pub(crate) subzone: String,
}

/// The ports by which a workload serves a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Membership {
    /// `<namespace>/<hostname>`.
    pub(crate) service: String,
    pub(crate) ports: Vec<PortPair>,
}

/// A port of a service, and the port of the application. 0 if that is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PortPair {
    pub(crate) service: u16,
    pub(crate) target: u16,
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServiceRecord {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) hostname: String,
    /// In the agent's network, without ranges.
    pub(crate) addresses: Vec<IpAddr>,
    /// Ranges of addresses in the agent's network. They are not load-balanced.
    pub(crate) ranges: Vec<IpNet>,
    pub(crate) ports: Vec<PortPair>,
    pub(crate) has_waypoint: bool,
    /// True if clients of all namespaces see it.
    pub(crate) is_public: bool,
    pub(crate) balancing: Balancing,
}

/// The order in which endpoints are used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Balancing {
    /// Properties that an endpoint shares with the client, the most important first.
    pub(crate) preference: Vec<BalancingScope>,
    pub(crate) mode: Distribution,
    /// True if endpoints are used that are not healthy.
    pub(crate) uses_unhealthy: bool,
}

/// The meaning of [`Balancing::preference`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Distribution {
    /// All endpoints are alike.
    #[default]
    Even,
    /// Others are used if no endpoint has all of them.
    Failover,
    /// Only endpoints that have all of them are used.
    Strict,
    /// Clients connect to the address itself.
    Passthrough,
}

/// Reads the message of the resource `name` for an agent in `network`.
///
/// # Errors
/// The field, its value and the expected one.
pub(super) fn read(name: &str, bytes: &[u8], network: &str) -> Result<AddressContent, String> {
    let message = Address::decode(bytes).map_err(|error| format!("no istio.workload.Address: {error}"))?;
    match message.kind {
        Some(AddressKind::Workload(workload)) => {
            Ok(AddressContent::Workload(Arc::new(self::workload(name, *workload)?)))
        }
        Some(AddressKind::Service(service)) => {
            Ok(AddressContent::Service(Arc::new(self::service(name, *service, network)?)))
        }
        None => Err("neither a workload nor a service".to_owned()),
    }
}

fn workload(name: &str, message: Workload) -> Result<WorkloadRecord, String> {
    if message.uid != name {
        return Err(format!("uid is {:?}: expected {name:?}", message.uid));
    }
    let is_tunnelled = match TunnelProtocol::try_from(message.tunnel_protocol) {
        Ok(TunnelProtocol::None | TunnelProtocol::LegacyIstioMtls) => false,
        // A tunnel of a later version is no reason for plaintext.
        Ok(TunnelProtocol::Hbone) | Err(_) => true,
    };
    // The addresses of a node are not those of a workload. Any other mode leaves the workload its addresses.
    let is_host_network = message.network_mode == NetworkMode::HostNetwork as i32;
    let mut addresses: Vec<IpAddr> = Vec::new();
    for (i, bytes) in message.addresses.iter().enumerate() {
        let address = address(bytes).map_err(|problem| format!("addresses[{i}]: {problem}"))?.to_canonical();
        let is_first = addresses.iter().all(|other| other.is_ipv4() != address.is_ipv4());
        if is_first && special_address(address).is_none() {
            addresses.push(address);
        }
    }
    let mut services = Vec::with_capacity(message.services.len());
    for (service, list) in message.services {
        let ports = ports(&list.ports).map_err(|problem| format!("services[{service:?}].{problem}"))?;
        services.push(Membership { service, ports });
    }
    let pod_uid = format!("{}//Pod/{}/{}", message.cluster_id, message.namespace, message.name);
    let locality = message.locality.unwrap_or_default();
    Ok(WorkloadRecord {
        is_pod: message.uid == pod_uid,
        name: message.name,
        namespace: message.namespace,
        cluster: message.cluster_id,
        network: message.network,
        node: message.node,
        addresses,
        is_tunnelled,
        trust_domain: (!message.trust_domain.is_empty()).then_some(message.trust_domain),
        service_account: message.service_account,
        has_waypoint: message.waypoint.is_some(),
        is_host_network,
        // A status of a later version is no reason to send traffic there.
        is_healthy: message.status == WorkloadStatus::Healthy as i32,
        locality: Locality { region: locality.region, zone: locality.zone, subzone: locality.subzone },
        services,
        policies: message.authorization_policies,
    })
}

fn service(name: &str, message: Service, network: &str) -> Result<ServiceRecord, String> {
    let own_name = format!("{}/{}", message.namespace, message.hostname);
    if own_name != name {
        return Err(format!("namespace and hostname are {own_name:?}: expected {name:?}"));
    }
    let (mut addresses, mut ranges) = (Vec::new(), Vec::new());
    for (i, listed) in message.addresses.iter().enumerate() {
        let NetworkAddress { network: of, address: bytes, length } = listed;
        let address = address(bytes).map_err(|problem| format!("addresses[{i}]: {problem}"))?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        match length {
            Some(length) if *length > bits => {
                return Err(format!("addresses[{i}]: {length} bits of {address}: expected at most {bits}"));
            }
            Some(length) if *length < bits => {
                if let Some(range) = range(address, *length).filter(|_| of == network) {
                    ranges.push(range);
                }
            }
            _ => {
                let address = address.to_canonical();
                let is_used = of == network && special_address(address).is_none();
                if is_used && !addresses.contains(&address) {
                    addresses.push(address);
                }
            }
        }
    }
    let balancing = message.load_balancing.map_or_else(|| Ok(Balancing::default()), balancing)?;
    Ok(ServiceRecord {
        ports: ports(&message.ports)?,
        name: message.name,
        namespace: message.namespace,
        hostname: message.hostname,
        addresses,
        ranges,
        has_waypoint: message.waypoint.is_some() || !message.weighted_waypoints.is_empty(),
        is_public: message.visibility == Visibility::Public as i32,
        balancing,
    })
}

/// Returns a range in the form that lookups use: a range of IPv4-mapped addresses is one of IPv4.
fn range(address: IpAddr, length: u32) -> Option<IpNet> {
    let canonical = address.to_canonical();
    let mapped = if canonical.is_ipv4() == address.is_ipv4() { 0 } else { 96 };
    let (address, length) = if length < mapped { (address, length) } else { (canonical, length - mapped) };
    Some(IpNet::new(address, u8::try_from(length).ok()?).ok()?.trunc())
}

fn balancing(message: LoadBalancing) -> Result<Balancing, String> {
    let mode = match BalancingMode::try_from(message.mode) {
        Ok(BalancingMode::Unspecified) => Distribution::Even,
        Ok(BalancingMode::Strict) => Distribution::Strict,
        Ok(BalancingMode::Failover) => Distribution::Failover,
        Ok(BalancingMode::Passthrough) => Distribution::Passthrough,
        Err(_) => return Err(format!("loadBalancing.mode is {}: expected 0 to 3", message.mode)),
    };
    let preference = message.routing_preference.into_iter().map(|scope| {
        BalancingScope::try_from(scope)
            .map_err(|_| format!("loadBalancing.routingPreference has {scope}: expected 0 to 6"))
    });
    let uses_unhealthy = message.health_policy == HealthPolicy::AllowAll as i32;
    Ok(Balancing { preference: preference.collect::<Result<_, _>>()?, mode, uses_unhealthy })
}

fn ports(ports: &[Port]) -> Result<Vec<PortPair>, String> {
    let number = |i: usize, field: &str, value: u32| {
        u16::try_from(value).map_err(|_| format!("ports[{i}].{field} is {value}: expected 0 to 65535"))
    };
    let pairs = ports.iter().enumerate().map(|(i, port)| {
        let service = number(i, "servicePort", port.service_port)?;
        Ok(PortPair { service, target: number(i, "targetPort", port.target_port)? })
    });
    pairs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::istiod::messages::{self, GatewayAddress, PortList, WeightedWaypoint};

    fn message(kind: AddressKind) -> Vec<u8> {
        Address { kind: Some(kind) }.encode_to_vec()
    }

    fn pod() -> Workload {
        let list = PortList { ports: vec![Port { service_port: 80, target_port: 8080, app_protocol: 0 }] };
        Workload {
            uid: "c//Pod/shop/web-1".to_owned(),
            name: "web-1".to_owned(),
            namespace: "shop".to_owned(),
            cluster_id: "c".to_owned(),
            node: "a".to_owned(),
            addresses: vec![vec![10, 77, 1, 2], vec![10, 77, 1, 3], vec![127, 0, 0, 1]],
            tunnel_protocol: 1,
            services: [("shop/web.shop.svc.cluster.local".to_owned(), list)].into(),
            ..Workload::default()
        }
    }

    fn web() -> Service {
        let at = |network: &str, address: &[u8], length| NetworkAddress {
            network: network.to_owned(),
            address: address.to_vec(),
            length,
        };
        Service {
            name: "web".to_owned(),
            namespace: "shop".to_owned(),
            hostname: "web.shop.svc.cluster.local".to_owned(),
            addresses: vec![
                at("", &[10, 96, 0, 1], None),
                at("", &[10, 96, 0, 2], Some(32)),
                at("other", &[10, 96, 0, 3], None),
                at("", &[10, 97, 0, 0], Some(16)),
            ],
            ports: vec![Port { service_port: 80, target_port: 0, app_protocol: 0 }],
            ..Service::default()
        }
    }

    fn read_workload(message_of: Workload) -> Result<Arc<WorkloadRecord>, String> {
        let AddressContent::Workload(record) =
            read("c//Pod/shop/web-1", &message(AddressKind::Workload(Box::new(message_of))), "")?
        else {
            panic!("no workload")
        };
        Ok(record)
    }

    fn read_service(message_of: Service) -> Result<Arc<ServiceRecord>, String> {
        let bytes = message(AddressKind::Service(Box::new(message_of)));
        let AddressContent::Service(record) = read("shop/web.shop.svc.cluster.local", &bytes, "")? else {
            panic!("no service")
        };
        Ok(record)
    }

    #[test]
    fn a_pod_is_read() {
        let read = read_workload(pod()).expect("valid");
        assert!(read.is_pod && read.is_tunnelled && read.is_healthy && !read.is_host_network);
        assert_eq!(read.addresses, [IpAddr::from([10, 77, 1, 2])], "one of each family, and no loopback");
        assert_eq!(read.services[0].ports, [PortPair { service: 80, target: 8080 }]);
        assert_eq!(read.trust_domain, None);
        let vm = Workload { cluster_id: "other".to_owned(), ..pod() };
        assert!(!read_workload(vm).expect("valid").is_pod, "not the uid of a pod of its cluster");
        let sick = Workload { status: 7, waypoint: Some(GatewayAddress::default()), ..pod() };
        let sick = read_workload(sick).expect("valid");
        assert!(!sick.is_healthy && sick.has_waypoint);
        let later = Workload { tunnel_protocol: 3, network_mode: 2, ..pod() };
        let later = read_workload(later).expect("valid");
        assert!(later.is_tunnelled && !later.is_host_network, "of a later version, and not plaintext");
    }

    #[test]
    fn a_service_has_the_addresses_of_the_own_network() {
        let read = read_service(web()).expect("valid");
        assert_eq!(read.addresses, [IpAddr::from([10, 96, 0, 1]), IpAddr::from([10, 96, 0, 2])]);
        assert_eq!(
            (read.ranges.as_slice(), read.has_waypoint),
            (&["10.97.0.0/16".parse().expect("a range")][..], false)
        );
        assert_eq!(read.balancing, Balancing::default());
        let weighted = Service { weighted_waypoints: vec![WeightedWaypoint::default()], ..web() };
        assert!(read_service(weighted).expect("valid").has_waypoint);
        for (visibility, is_public) in [(0, true), (1, false), (2, false)] {
            assert_eq!(read_service(Service { visibility, ..web() }).expect("valid").is_public, is_public);
        }
    }

    #[test]
    fn a_resource_that_is_not_understood_is_refused_with_the_field() {
        for (changed, problem) in [
            (
                Workload { uid: "other".to_owned(), ..pod() },
                "uid is \"other\": expected \"c//Pod/shop/web-1\"",
            ),
            (
                Workload { addresses: vec![vec![10, 77]], ..pod() },
                "addresses[0]: 2 bytes are no address: expected 4 or 16",
            ),
        ] {
            assert_eq!(read_workload(changed).expect_err("refused"), problem);
        }
        let port = Port { service_port: 70_000, target_port: 0, app_protocol: 0 };
        for (changed, problem) in [
            (
                Service { hostname: "x".to_owned(), ..web() },
                "namespace and hostname are \"shop/x\": expected \"shop/web.shop.svc.cluster.local\"",
            ),
            (Service { ports: vec![port], ..web() }, "ports[0].servicePort is 70000: expected 0 to 65535"),
            (
                Service {
                    load_balancing: Some(LoadBalancing { mode: 9, ..LoadBalancing::default() }),
                    ..web()
                },
                "loadBalancing.mode is 9: expected 0 to 3",
            ),
        ] {
            assert_eq!(read_service(changed).expect_err("refused"), problem);
        }
        assert_eq!(read("x", &[], "").expect_err("refused"), "neither a workload nor a service");
        assert!(read("x", &[0xff], "").expect_err("refused").starts_with("no istio.workload.Address"));
    }

    #[test]
    fn ranges_of_mapped_addresses_are_ranges_of_ipv4() {
        let text = |address: &str, length| {
            range(address.parse().expect("an address"), length).map(|range| range.to_string())
        };
        assert_eq!(text("::ffff:10.97.3.0", 112).as_deref(), Some("10.97.0.0/16"));
        assert_eq!(text("::ffff:10.97.3.0", 64).as_deref(), Some("::/64"));
        assert_eq!(text("fd77::1", 64).as_deref(), Some("fd77::/64"));
    }

    #[test]
    fn preferences_of_a_service_are_read() {
        let load_balancing = messages::LoadBalancing {
            routing_preference: vec![6, 1, 2],
            mode: BalancingMode::Failover as i32,
            health_policy: HealthPolicy::AllowAll as i32,
        };
        let read = read_service(Service { load_balancing: Some(load_balancing), ..web() }).expect("valid");
        let preference = vec![BalancingScope::Network, BalancingScope::Region, BalancingScope::Zone];
        assert_eq!(
            read.balancing,
            Balancing { preference, mode: Distribution::Failover, uses_unhealthy: true }
        );
    }
}

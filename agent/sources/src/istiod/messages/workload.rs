//! Messages of `istio.workload`.

use std::collections::BTreeMap;

use prost::{Enumeration, Message, Oneof};

use super::Any;

/// A workload or a service.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Address {
    #[prost(oneof = "AddressKind", tags = "1, 2")]
    pub(crate) kind: Option<AddressKind>,
}

#[derive(Clone, PartialEq, Oneof)]
pub(crate) enum AddressKind {
    #[prost(message, tag = "1")]
    Workload(Box<Workload>),
    #[prost(message, tag = "2")]
    Service(Box<Service>),
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Workload {
    /// `<cluster>//Pod/<namespace>/<name>` for a pod.
    #[prost(string, tag = "20")]
    pub(crate) uid: String,
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(string, tag = "2")]
    pub(crate) namespace: String,
    /// 4 or 16 bytes each.
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub(crate) addresses: Vec<Vec<u8>>,
    /// For workloads that are reached by name alone.
    #[prost(string, tag = "21")]
    pub(crate) hostname: String,
    #[prost(string, tag = "4")]
    pub(crate) network: String,
    #[prost(enumeration = "TunnelProtocol", tag = "5")]
    pub(crate) tunnel_protocol: i32,
    /// Absent for the trust domain of the mesh.
    #[prost(string, tag = "6")]
    pub(crate) trust_domain: String,
    /// Absent for `default`.
    #[prost(string, tag = "7")]
    pub(crate) service_account: String,
    #[prost(message, optional, tag = "8")]
    pub(crate) waypoint: Option<GatewayAddress>,
    #[prost(message, optional, tag = "19")]
    pub(crate) network_gateway: Option<GatewayAddress>,
    #[prost(string, tag = "9")]
    pub(crate) node: String,
    #[prost(string, tag = "10")]
    pub(crate) canonical_name: String,
    #[prost(string, tag = "11")]
    pub(crate) canonical_revision: String,
    #[prost(enumeration = "WorkloadType", tag = "12")]
    pub(crate) workload_type: i32,
    #[prost(string, tag = "13")]
    pub(crate) workload_name: String,
    #[prost(bool, tag = "14")]
    pub(crate) native_tunnel: bool,
    #[prost(message, optional, tag = "23")]
    pub(crate) application_tunnel: Option<ApplicationTunnel>,
    /// The ports by which it serves each service, by `<namespace>/<hostname>`.
    #[prost(btree_map = "string, message", tag = "22")]
    pub(crate) services: BTreeMap<String, PortList>,
    /// Names of the policies that select it by labels.
    #[prost(string, repeated, tag = "16")]
    pub(crate) authorization_policies: Vec<String>,
    #[prost(enumeration = "WorkloadStatus", tag = "17")]
    pub(crate) status: i32,
    #[prost(string, tag = "18")]
    pub(crate) cluster_id: String,
    #[prost(message, optional, tag = "24")]
    pub(crate) locality: Option<Locality>,
    #[prost(enumeration = "NetworkMode", tag = "25")]
    pub(crate) network_mode: i32,
    #[prost(message, repeated, tag = "26")]
    pub(crate) extensions: Vec<Extension>,
    /// `google.protobuf.UInt32Value`.
    #[prost(message, optional, tag = "27")]
    pub(crate) capacity: Option<u32>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Service {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(string, tag = "2")]
    pub(crate) namespace: String,
    /// `<name>.<namespace>.svc.<domain>` for a service of Kubernetes.
    #[prost(string, tag = "3")]
    pub(crate) hostname: String,
    #[prost(message, repeated, tag = "4")]
    pub(crate) addresses: Vec<NetworkAddress>,
    #[prost(message, repeated, tag = "5")]
    pub(crate) ports: Vec<Port>,
    #[prost(string, repeated, tag = "6")]
    pub(crate) subject_alt_names: Vec<String>,
    #[prost(message, optional, tag = "7")]
    pub(crate) waypoint: Option<GatewayAddress>,
    #[prost(message, optional, tag = "8")]
    pub(crate) load_balancing: Option<LoadBalancing>,
    #[prost(enumeration = "IpFamilies", tag = "9")]
    pub(crate) ip_families: i32,
    #[prost(message, repeated, tag = "10")]
    pub(crate) extensions: Vec<Extension>,
    #[prost(bool, tag = "11")]
    pub(crate) canonical: bool,
    #[prost(bool, tag = "12")]
    pub(crate) ingress_use_waypoint: bool,
    #[prost(message, repeated, tag = "13")]
    pub(crate) weighted_waypoints: Vec<WeightedWaypoint>,
    #[prost(enumeration = "Visibility", tag = "14")]
    pub(crate) visibility: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub(crate) enum Visibility {
    Public = 0,
    Namespace = 1,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub(crate) enum IpFamilies {
    Automatic = 0,
    Ipv4Only = 1,
    Ipv6Only = 2,
    Dual = 3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub(crate) enum NetworkMode {
    Standard = 0,
    HostNetwork = 1,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct LoadBalancing {
    #[prost(enumeration = "BalancingScope", repeated, tag = "1")]
    pub(crate) routing_preference: Vec<i32>,
    #[prost(enumeration = "BalancingMode", tag = "2")]
    pub(crate) mode: i32,
    #[prost(enumeration = "HealthPolicy", tag = "3")]
    pub(crate) health_policy: i32,
}

/// `LoadBalancing.Scope`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub(crate) enum BalancingScope {
    Unspecified = 0,
    Region = 1,
    Zone = 2,
    Subzone = 3,
    Node = 4,
    Cluster = 5,
    Network = 6,
}

/// `LoadBalancing.Mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub(crate) enum BalancingMode {
    Unspecified = 0,
    Strict = 1,
    Failover = 2,
    Passthrough = 3,
}

/// `LoadBalancing.HealthPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub(crate) enum HealthPolicy {
    OnlyHealthy = 0,
    AllowAll = 1,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct Locality {
    #[prost(string, tag = "1")]
    pub(crate) region: String,
    #[prost(string, tag = "2")]
    pub(crate) zone: String,
    #[prost(string, tag = "3")]
    pub(crate) subzone: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub(crate) enum WorkloadStatus {
    Healthy = 0,
    Unhealthy = 1,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub(crate) enum WorkloadType {
    Deployment = 0,
    Cronjob = 1,
    Pod = 2,
    Job = 3,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct PortList {
    #[prost(message, repeated, tag = "1")]
    pub(crate) ports: Vec<Port>,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Port {
    #[prost(uint32, tag = "1")]
    pub(crate) service_port: u32,
    /// 0 if each workload has a number of its own.
    #[prost(uint32, tag = "2")]
    pub(crate) target_port: u32,
    #[prost(enumeration = "AppProtocol", tag = "3")]
    pub(crate) app_protocol: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub(crate) enum AppProtocol {
    Unknown = 0,
    Http11 = 1,
    Http2 = 2,
    Grpc = 3,
    Tcp = 4,
    Tls = 5,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub(crate) enum TunnelProtocol {
    None = 0,
    Hbone = 1,
    LegacyIstioMtls = 2,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct ApplicationTunnel {
    #[prost(enumeration = "ApplicationProtocol", tag = "1")]
    pub(crate) protocol: i32,
    #[prost(uint32, tag = "2")]
    pub(crate) port: u32,
}

/// `ApplicationTunnel.Protocol`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub(crate) enum ApplicationProtocol {
    None = 0,
    Proxy = 1,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct GatewayAddress {
    #[prost(oneof = "GatewayDestination", tags = "1, 2")]
    pub(crate) destination: Option<GatewayDestination>,
    #[prost(uint32, tag = "3")]
    pub(crate) hbone_mtls_port: u32,
}

#[derive(Clone, PartialEq, Oneof)]
pub(crate) enum GatewayDestination {
    #[prost(message, tag = "1")]
    Hostname(NamespacedHostname),
    #[prost(message, tag = "2")]
    Address(NetworkAddress),
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct WeightedWaypoint {
    #[prost(message, optional, tag = "1")]
    pub(crate) destination: Option<GatewayAddress>,
    #[prost(uint32, tag = "2")]
    pub(crate) weight: u32,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct NetworkAddress {
    #[prost(string, tag = "1")]
    pub(crate) network: String,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) address: Vec<u8>,
    /// Bits of a range; absent for one address.
    #[prost(uint32, optional, tag = "3")]
    pub(crate) length: Option<u32>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct NamespacedHostname {
    #[prost(string, tag = "1")]
    pub(crate) namespace: String,
    #[prost(string, tag = "2")]
    pub(crate) hostname: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct Extension {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(message, optional, tag = "2")]
    pub(crate) config: Option<Any>,
}

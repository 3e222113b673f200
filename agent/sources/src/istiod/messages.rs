//! Messages of istiod's delta xDS for ambient, as far as the agent reads them. Unknown fields are skipped.
//!
//! | message | defined in |
//! |---|---|
//! | [`Address`] and all that it holds | istio/ztunnel, `proto/workload.proto`, package `istio.workload` |
//! | [`Authorization`] and all that it holds | istio/ztunnel, `proto/authorization.proto`, package `istio.security` |
//! | [`DeltaDiscoveryRequest`], [`DeltaDiscoveryResponse`], [`Resource`], [`Node`] | envoyproxy/data-plane-api, `envoy/service/discovery/v3/discovery.proto`, `envoy/config/core/v3/base.proto` |
//! | [`Any`], [`Struct`], [`Status`] | protobuf's `any.proto` and `struct.proto`, googleapis' `rpc/status.proto` |
//!
//! They are written by hand, so that no protoc is needed.

use std::collections::BTreeMap;

use prost::{Enumeration, Message, Oneof};

/// Type of [`Address`].
pub(crate) const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// Type of [`Authorization`].
pub(crate) const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";

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

/// A policy.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Authorization {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(string, tag = "2")]
    pub(crate) namespace: String,
    #[prost(enumeration = "Scope", tag = "3")]
    pub(crate) scope: i32,
    #[prost(enumeration = "Action", tag = "4")]
    pub(crate) action: i32,
    /// `groups` in earlier versions.
    #[prost(message, repeated, tag = "5")]
    pub(crate) rules: Vec<Rule>,
    #[prost(bool, tag = "6")]
    pub(crate) dry_run: bool,
    #[prost(message, repeated, tag = "7")]
    pub(crate) extensions: Vec<Extension>,
}

/// `Group` in earlier versions.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Rule {
    #[prost(message, repeated, tag = "1")]
    pub(crate) clauses: Vec<Clause>,
}

/// `Rules` in earlier versions.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Clause {
    #[prost(message, repeated, tag = "2")]
    pub(crate) matches: Vec<Match>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Match {
    #[prost(message, repeated, tag = "1")]
    pub(crate) namespaces: Vec<StringMatch>,
    #[prost(message, repeated, tag = "2")]
    pub(crate) not_namespaces: Vec<StringMatch>,
    #[prost(message, repeated, tag = "11")]
    pub(crate) service_accounts: Vec<ServiceAccountMatch>,
    #[prost(message, repeated, tag = "12")]
    pub(crate) not_service_accounts: Vec<ServiceAccountMatch>,
    #[prost(message, repeated, tag = "3")]
    pub(crate) principals: Vec<StringMatch>,
    #[prost(message, repeated, tag = "4")]
    pub(crate) not_principals: Vec<StringMatch>,
    #[prost(message, repeated, tag = "5")]
    pub(crate) source_ips: Vec<Block>,
    #[prost(message, repeated, tag = "6")]
    pub(crate) not_source_ips: Vec<Block>,
    #[prost(message, repeated, tag = "7")]
    pub(crate) destination_ips: Vec<Block>,
    #[prost(message, repeated, tag = "8")]
    pub(crate) not_destination_ips: Vec<Block>,
    #[prost(uint32, repeated, tag = "9")]
    pub(crate) destination_ports: Vec<u32>,
    #[prost(uint32, repeated, tag = "10")]
    pub(crate) not_destination_ports: Vec<u32>,
    #[prost(message, repeated, tag = "13")]
    pub(crate) extensions: Vec<Extension>,
}

/// `istio.security.Address`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct Block {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) address: Vec<u8>,
    #[prost(uint32, tag = "2")]
    pub(crate) length: u32,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct ServiceAccountMatch {
    #[prost(string, tag = "1")]
    pub(crate) namespace: String,
    #[prost(string, tag = "2")]
    pub(crate) service_account: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct StringMatch {
    #[prost(oneof = "MatchType", tags = "1, 2, 3, 4")]
    pub(crate) match_type: Option<MatchType>,
}

#[derive(Clone, PartialEq, Eq, Oneof)]
pub(crate) enum MatchType {
    #[prost(string, tag = "1")]
    Exact(String),
    #[prost(string, tag = "2")]
    Prefix(String),
    #[prost(string, tag = "3")]
    Suffix(String),
    #[prost(message, tag = "4")]
    Presence(()),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub(crate) enum Scope {
    Global = 0,
    Namespace = 1,
    WorkloadSelector = 2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub(crate) enum Action {
    Allow = 0,
    Deny = 1,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct Any {
    #[prost(string, tag = "1")]
    pub(crate) type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) value: Vec<u8>,
}

/// `google.rpc.Status`, without details.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct Status {
    #[prost(int32, tag = "1")]
    pub(crate) code: i32,
    #[prost(string, tag = "2")]
    pub(crate) message: String,
}

/// `google.protobuf.Struct`, of texts alone.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Struct {
    #[prost(btree_map = "string, message", tag = "1")]
    pub(crate) fields: BTreeMap<String, Value>,
}

/// `google.protobuf.Value`.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct Value {
    #[prost(string, optional, tag = "3")]
    pub(crate) string_value: Option<String>,
}

/// `envoy.config.core.v3.Node`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Node {
    #[prost(string, tag = "1")]
    pub(crate) id: String,
    #[prost(string, tag = "2")]
    pub(crate) cluster: String,
    #[prost(message, optional, tag = "3")]
    pub(crate) metadata: Option<Struct>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct DeltaDiscoveryRequest {
    #[prost(message, optional, tag = "1")]
    pub(crate) node: Option<Node>,
    #[prost(string, tag = "2")]
    pub(crate) type_url: String,
    #[prost(string, repeated, tag = "3")]
    pub(crate) resource_names_subscribe: Vec<String>,
    #[prost(string, repeated, tag = "4")]
    pub(crate) resource_names_unsubscribe: Vec<String>,
    /// Versions of the resources that the client has, in the first request of a type on a stream.
    #[prost(btree_map = "string, string", tag = "5")]
    pub(crate) initial_resource_versions: BTreeMap<String, String>,
    #[prost(string, tag = "6")]
    pub(crate) response_nonce: String,
    /// Set in a rejection.
    #[prost(message, optional, tag = "7")]
    pub(crate) error_detail: Option<Status>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct DeltaDiscoveryResponse {
    #[prost(string, tag = "1")]
    pub(crate) system_version_info: String,
    #[prost(message, repeated, tag = "2")]
    pub(crate) resources: Vec<Resource>,
    #[prost(string, tag = "4")]
    pub(crate) type_url: String,
    #[prost(string, repeated, tag = "6")]
    pub(crate) removed_resources: Vec<String>,
    #[prost(string, tag = "5")]
    pub(crate) nonce: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct Resource {
    #[prost(string, tag = "3")]
    pub(crate) name: String,
    #[prost(string, repeated, tag = "4")]
    pub(crate) aliases: Vec<String>,
    #[prost(string, tag = "1")]
    pub(crate) version: String,
    #[prost(message, optional, tag = "2")]
    pub(crate) resource: Option<Any>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Encodes one field of the wire format with the wire type 2 (length-delimited) or 0 (varint).
    fn field(number: u32, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        prost::encoding::encode_varint(u64::from(number << 3 | 2), &mut out);
        prost::encoding::encode_varint(bytes.len() as u64, &mut out);
        out.extend_from_slice(bytes);
        out
    }

    fn number(number: u32, value: u64) -> Vec<u8> {
        let mut out = Vec::new();
        prost::encoding::encode_varint(u64::from(number << 3), &mut out);
        prost::encoding::encode_varint(value, &mut out);
        out
    }

    #[test]
    fn an_address_has_the_field_numbers_of_its_definition() {
        let port = [number(1, 80), number(2, 8080)].concat();
        let services = [field(1, b"shop/web.shop.svc.cluster.local"), field(2, &field(1, &port))].concat();
        let waypoint = [field(2, &field(2, &[10, 96, 0, 9])), number(3, 15008)].concat();
        let bytes = [
            field(20, b"c//Pod/shop/web-1"),
            field(1, b"web-1"),
            field(2, b"shop"),
            field(3, &[10, 77, 1, 2]),
            number(5, 1),
            field(7, b"web"),
            field(8, &waypoint),
            field(9, b"a"),
            field(16, b"shop/p"),
            number(17, 1),
            field(18, b"c"),
            field(22, &services),
            field(24, &[field(1, b"r"), field(2, b"z")].concat()),
            number(25, 1),
            field(27, &number(1, 3)),
            // A field of a later version.
            field(99, b"later"),
        ]
        .concat();
        let decoded = Address::decode(&field(1, &bytes)[..]).expect("an address");
        let Some(AddressKind::Workload(workload)) = decoded.kind else { panic!("a workload") };
        assert_eq!((&*workload.uid, &*workload.name, &*workload.node), ("c//Pod/shop/web-1", "web-1", "a"));
        assert_eq!(workload.addresses, [vec![10, 77, 1, 2]]);
        assert_eq!(workload.tunnel_protocol(), TunnelProtocol::Hbone);
        assert_eq!(
            (workload.status(), workload.network_mode()),
            (WorkloadStatus::Unhealthy, NetworkMode::HostNetwork)
        );
        assert_eq!(workload.authorization_policies, ["shop/p"]);
        assert_eq!(workload.services.values().next().expect("one").ports[0].target_port, 8080);
        assert_eq!(workload.locality.expect("given").zone, "z");
        assert_eq!(workload.capacity, Some(3));
        let Some(GatewayDestination::Address(at)) = workload.waypoint.expect("given").destination else {
            panic!("an address")
        };
        assert_eq!(at.address, [10, 96, 0, 9]);
    }

    #[test]
    fn a_policy_has_the_field_numbers_of_its_definition() {
        let presence = field(4, &field(4, b""));
        let one = [presence, number(9, 80)].concat();
        let bytes = [
            field(1, b"p"),
            field(2, b"shop"),
            number(3, 2),
            number(4, 1),
            field(5, &field(1, &field(2, &one))),
            number(6, 1),
        ]
        .concat();
        let policy = Authorization::decode(&bytes[..]).expect("a policy");
        assert_eq!(
            (policy.scope(), policy.action(), policy.dry_run),
            (Scope::WorkloadSelector, Action::Deny, true)
        );
        let one = &policy.rules[0].clauses[0].matches[0];
        assert_eq!(one.not_principals[0].match_type, Some(MatchType::Presence(())));
        assert_eq!(one.destination_ports, [80], "also unpacked");
    }
}

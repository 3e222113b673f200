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

mod authorization;
mod discovery;
mod workload;

#[cfg(test)]
pub(crate) use authorization::Clause;
pub(crate) use authorization::{
    Action, Authorization, Block, Match, MatchType, Rule, Scope, ServiceAccountMatch, StringMatch,
};
pub(crate) use discovery::{
    Any, DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status, Struct, Value,
};
pub(crate) use workload::{
    Address, AddressKind, BalancingMode, BalancingScope, Extension, HealthPolicy, LoadBalancing,
    NetworkAddress, NetworkMode, Port, Service, TunnelProtocol, Visibility, Workload, WorkloadStatus,
};
#[cfg(test)]
pub(crate) use workload::{GatewayAddress, GatewayDestination, PortList, WeightedWaypoint};

/// Type of [`Address`].
pub(crate) const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// Type of [`Authorization`].
pub(crate) const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";

#[cfg(test)]
mod tests {
    use prost::Message as _;

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

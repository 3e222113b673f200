//! Tests of the guard's decisions: tables of facts.

use super::*;
use crate::{Arrival, ArrivalFacts, Claim, Link, decide_arrival, may_claim, may_send_from};
use Exception::{
    AllowClear, Answer, DisabledPort, Discovery, InboundIcmp, NodeAddress, NodeFlow, Outside, OwnAddress,
    OwnNode, PlaintextPort, TunnelCookie, UdpAllowed, WithoutData,
};
use Reason::{
    GuardClear, GuardEncapsulated, GuardIcmp, GuardInboundOther, GuardInboundTcp, GuardInboundUdp,
    GuardOther, GuardSpoofed, GuardTcp, GuardUdp,
};
use Verdict::{Ask, Except};

mod counts;

const fn v4(last: u8) -> Address {
    Address::from_v4_be(u32::from_ne_bytes([10, 77, 1, last]))
}

fn strict() -> Pod {
    Pod { v4: v4(2), slot: 3, mode: Mode::Strict as u32, flags: pod_flag::EGRESS_STRICT, ..Pod::default() }
}

fn open() -> Pod {
    Pod { mode: Mode::Permissive as u32, flags: pod_flag::UDP_ALLOWED, ..strict() }
}

fn packet(protocol: u8) -> Packet {
    Packet {
        local: v4(2),
        remote: v4(9),
        protocol,
        local_port: 4000,
        remote_port: 80,
        segment: Segment::Data,
        is_discovery: false,
    }
}

fn tcp(segment: Segment) -> Packet {
    Packet { segment, ..packet(protocol::TCP) }
}

#[derive(Clone, Copy, Debug)]
struct Facts {
    agent: bool,
    marked: Option<Marked>,
    mesh: bool,
    node: bool,
    service: bool,
    node_flow: bool,
    accepted: Option<Accepted>,
    port_mode: Option<Mode>,
    allowed: bool,
    node_socket: bool,
    tcp_socket: bool,
    to_neighbour: bool,
    answer: bool,
    cookie: bool,
}

impl GuardFacts for Facts {
    fn is_agent(&self) -> bool {
        self.agent
    }
    fn marked(&self) -> Option<Marked> {
        self.marked
    }
    fn in_mesh(&self, _: &Address) -> bool {
        self.mesh
    }
    fn is_node(&self, _: &Address) -> bool {
        self.node
    }
    fn is_node_service(&self, _: &Packet) -> bool {
        self.service
    }
    fn is_node_flow(&self, _: &Packet) -> bool {
        self.node_flow
    }
    fn accepted(&self) -> Option<Accepted> {
        self.accepted
    }
    fn port_mode(&self, slot: u32, _: u16) -> Option<u32> {
        assert!(slot == 3 || slot == u32::MAX);
        self.port_mode.map(|mode| mode as u32)
    }
    fn is_allowed_clear(&self, _: &Address, _: u16, _: u8) -> bool {
        self.allowed
    }
    fn is_node_socket(&self) -> bool {
        self.node_socket
    }
    fn is_tcp_socket(&self) -> bool {
        self.tcp_socket
    }
    fn may_send_from(&self, pod: &Pod, address: &Address) -> bool {
        may_send_from(pod, &Link::default(), address)
    }
    fn is_to_neighbour(&self) -> bool {
        self.to_neighbour
    }
    fn is_answer(&self, _: &Packet) -> bool {
        self.answer
    }
    fn is_tunnel_cookie(&self, _: &Pod, _: &Packet) -> bool {
        self.cookie
    }
}

impl ArrivalFacts for Facts {
    fn is_node(&self, _: &Address) -> bool {
        self.node
    }
    fn is_node_socket(&self) -> bool {
        self.node_socket
    }
    fn is_node_flow(&self, _: &Packet) -> bool {
        self.node_flow
    }
}

/// The other end is in the mesh; nothing else is known.
const MESH: Facts = Facts {
    agent: false,
    marked: None,
    mesh: true,
    node: false,
    service: false,
    node_flow: false,
    accepted: None,
    port_mode: None,
    allowed: false,
    node_socket: false,
    tcp_socket: false,
    to_neighbour: false,
    answer: false,
    cookie: false,
};
const OUTSIDE: Facts = Facts { mesh: false, ..MESH };
const SCTP: u8 = 132;
const HOOKS: [Hook; 2] = [Hook::Socket, Hook::Link];

#[test]
fn a_strict_pods_sockets_send_no_plaintext() {
    let table = [
        (protocol::TCP, GuardTcp),
        (protocol::UDP, GuardUdp),
        (protocol::ICMP, GuardIcmp),
        (protocol::ICMP_V6, GuardIcmp),
        (SCTP, GuardOther),
        (protocol::UNKNOWN, GuardOther),
    ];
    for (number, reason) in table {
        for hook in HOOKS {
            let egress = |facts, pod| decide_egress(&facts, &pod, hook, &packet(number));
            assert_eq!(egress(MESH, strict()), Verdict::Drop(reason));
            assert_eq!(egress(MESH, open()), Verdict::Clear(GuardClear));
            assert_eq!(egress(MESH, Pod { flags: pod_flag::EXEMPT, ..strict() }), Verdict::Pass);
            let allowed = egress(Facts { allowed: true, ..MESH }, strict());
            assert!(matches!(allowed, Except(AllowClear) | Ask(AllowClear)), "{allowed:?}");
        }
    }
}

#[test]
fn a_strict_pod_reaches_what_is_outside_the_mesh_and_no_neighbour() {
    let link_local = Address([0xfe80_0000_u32.to_be(), 0, 0, 9_u32.to_be()]);
    let multicast = Address([0xff02_0000_u32.to_be(), 0, 0, 251_u32.to_be()]);
    for number in [protocol::TCP, protocol::UDP, SCTP] {
        let to = |remote, facts, hook| {
            decide_egress(&facts, &strict(), hook, &Packet { remote, ..packet(number) })
        };
        for hook in HOOKS {
            assert!(matches!(to(v4(9), OUTSIDE, hook), Except(Outside) | Ask(Outside)));
            assert!(matches!(to(link_local, OUTSIDE, hook), Verdict::Drop(_)));
            assert!(matches!(to(multicast, OUTSIDE, hook), Verdict::Drop(_)));
        }
        let neighbour = Facts { to_neighbour: true, node: true, ..OUTSIDE };
        assert!(matches!(to(v4(9), neighbour, Hook::Link), Verdict::Drop(_)));
    }
}

#[test]
fn a_strict_pod_sends_nothing_to_services_of_nodes() {
    let service = Facts { service: true, node: true, ..OUTSIDE };
    for (number, reason) in [(protocol::TCP, GuardTcp), (protocol::UDP, GuardUdp)] {
        for hook in HOOKS {
            let to = |facts, pod| decide_egress(&facts, &pod, hook, &packet(number));
            assert_eq!(to(service, strict()), Verdict::Drop(reason));
            assert!(!matches!(to(service, open()), Verdict::Drop(_)));
            assert!(!matches!(to(Facts { service: false, ..service }, strict()), Verdict::Drop(_)));
            assert!(!matches!(to(Facts { allowed: true, ..service }, strict()), Verdict::Drop(_)));
        }
    }
}

#[test]
fn a_strict_pod_answers_datagrams_that_the_node_sent_from_a_port_of_services() {
    let service = Facts { service: true, node: true, ..MESH };
    let answered = Facts { node_flow: true, ..service };
    for hook in HOOKS {
        let to = |facts, number| decide_egress(&facts, &strict(), hook, &packet(number));
        assert_eq!(to(answered, protocol::UDP), Ask(NodeFlow));
        assert_eq!(to(service, protocol::UDP), Verdict::Drop(GuardUdp));
        assert_eq!(to(Facts { node: false, ..answered }, protocol::UDP), Verdict::Drop(GuardUdp));
        assert_eq!(to(answered, protocol::TCP), Verdict::Drop(GuardTcp), "TCP is accepted as the node's");
    }
}

#[test]
fn of_the_agents_packets_only_tunnels_pass_a_link() {
    let agent = Facts { agent: true, tcp_socket: true, ..MESH };
    let egress = |facts, hook| decide_egress(&facts, &strict(), hook, &packet(protocol::TCP));
    assert_eq!(egress(agent, Hook::Socket), Verdict::Pass);
    assert_eq!(egress(agent, Hook::Link), Verdict::Drop(GuardTcp));
    assert_eq!(egress(Facts { marked: Some(Marked::Tunnel), ..agent }, Hook::Link), Verdict::Pass);
    let disabled = Facts { marked: Some(Marked::Disabled), ..agent };
    assert_eq!(egress(disabled, Hook::Link), Except(DisabledPort), "plaintext, as the peer's mode wants it");
    assert_eq!(decide_egress(&disabled, &open(), Hook::Link, &packet(protocol::TCP)), Verdict::Pass);
    // The pod can rewrite ports.
    let rewritten =
        Packet { local_port: tcp_port::TUNNEL, remote_port: tcp_port::TUNNEL, ..packet(protocol::TCP) };
    assert_eq!(decide_egress(&agent, &strict(), Hook::Link, &rewritten), Verdict::Drop(GuardTcp));
    assert_eq!(
        decide_egress(&agent, &open(), Hook::Link, &packet(protocol::TCP)),
        Verdict::Clear(GuardClear)
    );
}

#[test]
fn a_pod_without_an_entry_is_treated_as_strict() {
    for number in [protocol::TCP, protocol::UDP, SCTP] {
        for verdict in [
            decide_egress(&MESH, &Pod::unknown(), Hook::Socket, &packet(number)),
            decide_ingress(&MESH, &Pod::unknown(), &Packet { segment: Segment::Syn, ..packet(number) }),
        ] {
            assert!(matches!(verdict, Verdict::Drop(_)), "{verdict:?}");
        }
    }
}

#[test]
fn a_pod_that_no_source_has_named_serves_the_nodes_addresses_only() {
    let node = Facts { node: true, ..MESH };
    let opening = Packet { segment: Segment::Syn, ..packet(protocol::TCP) };
    let arrives = |facts, pod| decide_ingress(&facts, &pod, &opening);
    assert_eq!(arrives(node, Pod::unknown()), Except(NodeAddress));
    assert!(matches!(arrives(MESH, Pod::unknown()), Verdict::Drop(_)));
    assert!(matches!(arrives(node, strict()), Verdict::Drop(_)), "a named pod does not have these addresses");
    let of_socket = Facts { tcp_socket: true, ..node };
    let sent = |facts, pod, hook, protocol| decide_egress(&facts, &pod, hook, &packet(protocol));
    let passes = Except(NodeAddress);
    assert_eq!(sent(of_socket, Pod::unknown(), Hook::Socket, protocol::TCP), passes);
    for (facts, pod, hook, protocol) in [
        (of_socket, strict(), Hook::Socket, protocol::TCP),
        (of_socket, Pod::unknown(), Hook::Link, protocol::TCP),
        (node, Pod::unknown(), Hook::Socket, protocol::TCP),
        (Facts { tcp_socket: true, ..MESH }, Pod::unknown(), Hook::Socket, protocol::TCP),
    ] {
        assert_eq!(sent(facts, pod, hook, protocol), Verdict::Drop(GuardTcp), "{facts:?} {hook:?}");
    }
    let is_service = Facts { service: true, ..of_socket };
    let datagram = sent(is_service, Pod::unknown(), Hook::Socket, protocol::UDP);
    assert_eq!(datagram, Verdict::Drop(GuardUdp), "a source address proves nothing");
}

#[test]
fn tcp_segments_without_data_pass() {
    for segment in [Segment::Bare, Segment::SynAck] {
        let egress = |facts, hook| decide_egress(&facts, &strict(), hook, &tcp(segment));
        assert_eq!(egress(Facts { tcp_socket: true, ..MESH }, Hook::Socket), Except(WithoutData));
        assert_eq!(egress(Facts { tcp_socket: true, ..MESH }, Hook::Link), Except(WithoutData));
        // A raw socket can write data into header fields.
        assert_eq!(egress(MESH, Hook::Socket), Verdict::Drop(GuardTcp));
        assert_eq!(egress(MESH, Hook::Link), Verdict::Drop(GuardTcp));
        assert_eq!(egress(Facts { node_socket: true, ..MESH }, Hook::Link), Except(WithoutData));
        assert_eq!(decide_ingress(&MESH, &strict(), &tcp(segment)), Except(WithoutData));
        assert_eq!(decide_ingress(&MESH, &open(), &tcp(segment)), Verdict::Pass);
    }
}

#[test]
fn a_cookie_of_the_tunnel_listener_passes_the_link_without_a_socket() {
    let answer = Packet { local_port: tcp_port::TUNNEL, ..tcp(Segment::SynAck) };
    let cookie = Facts { cookie: true, ..MESH };
    let egress = |facts, hook, packet| decide_egress(&facts, &strict(), hook, &packet);
    assert_eq!(egress(cookie, Hook::Link, answer), Except(TunnelCookie));
    assert_eq!(egress(MESH, Hook::Link, answer), Verdict::Drop(GuardTcp));
    assert_eq!(egress(cookie, Hook::Socket, answer), Verdict::Drop(GuardTcp));
    assert_eq!(egress(cookie, Hook::Link, Packet { local_port: 80, ..answer }), Verdict::Drop(GuardTcp));
    assert_eq!(
        egress(cookie, Hook::Link, Packet { segment: Segment::Data, ..answer }),
        Verdict::Drop(GuardTcp)
    );
}

#[test]
fn replies_pass_as_long_as_their_port_takes_plaintext() {
    let accepted = Facts { accepted: Some(Accepted::Other), ..MESH };
    let egress = |facts: Facts| decide_egress(&facts, &strict(), Hook::Socket, &packet(protocol::TCP));
    assert_eq!(egress(accepted), Verdict::Drop(GuardTcp));
    let permissive = Facts { port_mode: Some(Mode::Permissive), ..accepted };
    assert_eq!(egress(permissive), Except(PlaintextPort));
    assert_eq!(egress(Facts { accepted: None, ..permissive }), Verdict::Drop(GuardTcp));
    // The address of the node alone is no proof.
    assert_eq!(egress(Facts { node: true, ..accepted }), Verdict::Drop(GuardTcp));
    assert_eq!(egress(Facts { accepted: Some(Accepted::Node), ..MESH }), Except(NodeFlow));
}

#[test]
fn encapsulated_packets_of_a_strict_pod_go_nowhere() {
    let to = |protocol, remote_port| Packet { remote_port, ..packet(protocol) };
    for hook in HOOKS {
        for facts in [MESH, OUTSIDE, Facts { node: true, ..OUTSIDE }, Facts { allowed: true, ..OUTSIDE }] {
            for packet in [to(4, 0), to(41, 0), to(47, 0), to(17, 4789), to(17, 8472), to(17, 6081)] {
                let verdict = decide_egress(&facts, &strict(), hook, &packet);
                assert_eq!(verdict, Verdict::Drop(GuardEncapsulated), "{packet:?}");
            }
        }
        assert_eq!(decide_egress(&OUTSIDE, &open(), hook, &to(47, 0)), Verdict::Pass);
        assert_eq!(decide_egress(&OUTSIDE, &strict(), hook, &to(17, 53)), Ask(Outside));
    }
}

#[test]
fn udp_has_its_own_setting() {
    let pod = Pod { flags: pod_flag::EGRESS_STRICT | pod_flag::UDP_ALLOWED, ..strict() };
    let udp = packet(protocol::UDP);
    assert_eq!(decide_egress(&MESH, &pod, Hook::Link, &udp), Except(UdpAllowed));
    assert_eq!(decide_ingress(&MESH, &pod, &udp), Except(UdpAllowed));
    let tcp = packet(protocol::TCP);
    assert_eq!(decide_egress(&MESH, &pod, Hook::Link, &tcp), Verdict::Drop(GuardTcp));
}

#[test]
fn an_open_pod_may_be_denied_udp() {
    let pod = Pod { flags: 0, ..open() };
    let udp = packet(protocol::UDP);
    assert_eq!(decide_egress(&MESH, &pod, Hook::Socket, &udp), Verdict::Drop(GuardUdp));
    assert_eq!(decide_ingress(&MESH, &pod, &udp), Verdict::Drop(GuardInboundUdp));
    assert_eq!(decide_egress(&Facts { node: true, ..MESH }, &pod, Hook::Socket, &udp), Ask(OwnNode));
    assert_eq!(decide_ingress(&OUTSIDE, &pod, &udp), Except(Outside));
    let own = Packet { remote: v4(2), ..udp };
    assert_eq!(decide_egress(&MESH, &pod, Hook::Socket, &own), Except(OwnAddress));
    assert_eq!(decide_ingress(&MESH, &pod, &own), Except(OwnAddress));
    assert_eq!(decide_ingress(&MESH, &pod, &tcp(Segment::Bare)), Verdict::Pass, "TCP is not held");
}

#[test]
fn a_link_carries_the_pods_own_addresses_only_in_every_mode() {
    let spoofed = Packet { local: v4(7), ..packet(protocol::UDP) };
    for pod in [strict(), open(), Pod { flags: pod_flag::EXEMPT, ..open() }] {
        for facts in [MESH, OUTSIDE, Facts { allowed: true, ..MESH }, Facts { agent: true, ..MESH }] {
            let verdict = decide_egress(&facts, &pod, Hook::Link, &spoofed);
            assert_eq!(verdict, Verdict::Drop(GuardSpoofed));
        }
    }
    let tunnel = Facts { agent: true, marked: Some(Marked::Tunnel), ..MESH };
    assert_eq!(decide_egress(&tunnel, &strict(), Hook::Link, &spoofed), Verdict::Pass);
    let covered = Pod { v4: Address::NONE, ..open() };
    assert_eq!(decide_egress(&OUTSIDE, &covered, Hook::Link, &spoofed), Verdict::Pass);
}

#[test]
fn a_pod_claims_its_own_addresses_only() {
    let own = Address([0xfe80_0000_u32.to_be(), 0, 0, 2_u32.to_be()]);
    let other = Address([0xfe80_0000_u32.to_be(), 0, 0, 9_u32.to_be()]);
    let link = Link { hardware: 0x0200_0000_0002, has_neighbours: 1, link_local: own, ..Link::default() };
    let arp = |hardware, address| Claim::Arp { hardware, address };
    let table = [
        (arp(link.hardware, v4(2)), true),
        (arp(link.hardware, Address::from_v4_be(0)), true),
        (arp(link.hardware, v4(1)), false),
        (arp(0x0200_0000_0009, v4(2)), false),
        (Claim::Advertisement(own), true),
        (Claim::Advertisement(other), false),
        (Claim::Advertisement(v4(2)), true),
        (Claim::Advertisement(v4(9)), false),
        (Claim::Routing, false),
    ];
    for (claim, expected) in table {
        assert_eq!(may_claim(&strict(), &link, &claim), expected, "{claim:?}");
    }
    assert!(may_send_from(&strict(), &link, &own) && !may_send_from(&strict(), &link, &other));
    assert!(may_send_from(&strict(), &Link::default(), &other), "nobody else is on the link");
    let unknown = Link { link_local: Address::NONE, ..link };
    assert!(
        !may_send_from(&strict(), &unknown, &own)
            && !may_claim(&strict(), &unknown, &Claim::Advertisement(own))
    );
}

#[test]
fn of_icmp_only_discovery_by_the_kernel_passes_the_link() {
    let icmp = packet(protocol::ICMP_V6);
    let kernels = Facts { node_socket: true, ..MESH };
    assert_eq!(decide_egress(&kernels, &strict(), Hook::Link, &icmp), Verdict::Drop(GuardIcmp));
    let discovery = Packet { is_discovery: true, ..icmp };
    assert_eq!(decide_egress(&kernels, &strict(), Hook::Link, &discovery), Except(Discovery));
    assert_eq!(decide_egress(&MESH, &strict(), Hook::Link, &discovery), Verdict::Drop(GuardIcmp));
    assert_eq!(decide_egress(&kernels, &strict(), Hook::Socket, &discovery), Verdict::Drop(GuardIcmp));
    let to_node = Facts { node: true, ..MESH };
    assert_eq!(decide_egress(&to_node, &strict(), Hook::Socket, &icmp), Except(OwnNode));
}

#[test]
fn plaintext_to_a_strict_port_is_dropped_wherever_it_comes_from() {
    for facts in [MESH, OUTSIDE] {
        let ingress = |facts, packet| decide_ingress(&facts, &strict(), &packet);
        assert_eq!(ingress(facts, tcp(Segment::Syn)), Verdict::Drop(GuardInboundTcp));
        assert_eq!(ingress(facts, packet(protocol::UDP)), Verdict::Drop(GuardInboundUdp));
        assert_eq!(ingress(facts, packet(SCTP)), Verdict::Drop(GuardInboundOther));
        assert_eq!(ingress(facts, packet(protocol::ICMP)), Except(InboundIcmp));
        assert_eq!(ingress(Facts { agent: true, ..facts }, tcp(Segment::Syn)), Verdict::Pass);
        let claims_node = Facts { node: true, ..facts };
        assert_eq!(ingress(claims_node, tcp(Segment::Syn)), Verdict::Drop(GuardInboundTcp));
        assert_eq!(ingress(Facts { node_flow: true, ..claims_node }, tcp(Segment::Syn)), Except(NodeFlow));
        let former_address = Facts { node_flow: true, ..facts };
        assert_eq!(ingress(former_address, tcp(Segment::Syn)), Verdict::Drop(GuardInboundTcp));
        let accepted = Facts { accepted: Some(Accepted::Other), ..facts };
        assert_eq!(ingress(accepted, tcp(Segment::Data)), Verdict::Drop(GuardInboundTcp));
        let permissive = Facts { port_mode: Some(Mode::Permissive), ..facts };
        assert_eq!(ingress(permissive, tcp(Segment::Syn)), Except(PlaintextPort));
    }
    assert_eq!(decide_ingress(&MESH, &strict(), &tcp(Segment::Data)), Verdict::Drop(GuardInboundTcp));
    assert_eq!(decide_ingress(&OUTSIDE, &strict(), &tcp(Segment::Data)), Except(Outside));
}

#[test]
fn only_answers_of_datagrams_that_the_pod_sent_arrive() {
    let table = [
        (OUTSIDE, Verdict::Drop(GuardInboundUdp)),
        (Facts { answer: true, ..OUTSIDE }, Except(Answer)),
        (Facts { allowed: true, ..OUTSIDE }, Verdict::Drop(GuardInboundUdp)),
        (Facts { allowed: true, ..MESH }, Verdict::Drop(GuardInboundUdp)),
        (Facts { allowed: true, answer: true, ..MESH }, Except(AllowClear)),
    ];
    for (facts, expected) in table {
        assert_eq!(decide_ingress(&facts, &strict(), &packet(protocol::UDP)), expected, "{facts:?}");
    }
}

#[test]
fn a_pod_that_policies_select_gets_no_connection_past_the_agent() {
    let judged = Pod { flags: pod_flag::UDP_ALLOWED | pod_flag::JUDGED, ..open() };
    let ingress = |facts, segment| decide_ingress(&facts, &judged, &tcp(segment));
    assert_eq!(ingress(OUTSIDE, Segment::Syn), Verdict::Drop(GuardInboundTcp));
    assert_eq!(ingress(Facts { agent: true, ..OUTSIDE }, Segment::Syn), Verdict::Pass);
    assert_eq!(ingress(Facts { node: true, node_flow: true, ..OUTSIDE }, Segment::Syn), Verdict::Pass);
    assert_eq!(ingress(OUTSIDE, Segment::Data), Verdict::Pass);
}

#[test]
fn data_to_a_connection_of_the_node_is_proven_each_time() {
    let accepted = Facts { accepted: Some(Accepted::Node), ..MESH };
    let ingress = |facts| decide_ingress(&facts, &strict(), &tcp(Segment::Data));
    assert_eq!(ingress(accepted), Verdict::Drop(GuardInboundTcp));
    assert_eq!(ingress(Facts { node: true, node_flow: true, ..accepted }), Except(NodeFlow));
}

#[test]
fn only_a_socket_of_the_node_proves_that_a_packet_is_the_nodes() {
    let node = Facts { node: true, ..MESH };
    let arrives = |facts, packet| decide_arrival(&facts, &strict(), &packet);
    let sent = Facts { node_socket: true, ..node };
    assert_eq!(arrives(sent, tcp(Segment::Syn)), Arrival::OfNode);
    assert_eq!(arrives(sent, tcp(Segment::Bare)), Arrival::Pass);
    assert_eq!(arrives(Facts { node_flow: true, ..sent }, tcp(Segment::Bare)), Arrival::OfNode);
    assert_eq!(arrives(node, tcp(Segment::Syn)), Arrival::Pass);
    assert_eq!(arrives(Facts { node: false, ..sent }, tcp(Segment::Syn)), Arrival::Pass);
    let other = Packet { local: v4(7), ..tcp(Segment::Syn) };
    assert_eq!(arrives(sent, other), Arrival::Pass);
    let taken_over = Facts { node_flow: true, ..node };
    assert_eq!(arrives(taken_over, tcp(Segment::Data)), Arrival::Drop(GuardSpoofed));
    assert_eq!(arrives(taken_over, tcp(Segment::Bare)), Arrival::Pass);
    // Errors about a connection of the node come from anywhere.
    for error in [protocol::ICMP, protocol::ICMP_V6] {
        assert_eq!(arrives(taken_over, packet(error)), Arrival::Pass);
    }
    let own = Packet { remote: v4(2), ..packet(protocol::UDP) };
    assert_eq!(arrives(sent, own), Arrival::Drop(GuardSpoofed));
}

#[test]
fn a_packet_to_the_pods_own_address_passes_its_sockets_and_not_its_link() {
    let own = Packet { remote: v4(2), ..packet(protocol::UDP) };
    assert_eq!(decide_egress(&MESH, &strict(), Hook::Socket, &own), Except(OwnAddress));
    assert_eq!(decide_egress(&MESH, &strict(), Hook::Link, &own), Verdict::Drop(GuardUdp));
}

//! Properties of addresses and of the kernel side's decisions, for random facts.
//!
//! The lists of exceptions below follow the security model and not the code. A failure prints the smallest input that was
//! found. Add this input as a test beside the code.

use std::net::{IpAddr, Ipv6Addr};

use proptest::{
    prelude::*,
    sample::{select, subsequence},
    test_runner::Config,
};
use tacit_abi::{
    Accepted, Address, Connect, ConnectFacts, GuardFacts, Hook, Inbound, InboundFacts, Link, Listener,
    Marked, Mode, Packet, Pod, PodCells, Reason, Segment, Steer, Steered, Tuple, Verdict, decide_connect,
    decide_egress, decide_inbound, decide_ingress, may_send_from, pod_flag, protocol, steer_flag, tcp_port,
};

fn config() -> Config {
    // Cases are cheap, and defects show in combinations of facts.
    Config { failure_persistence: None, cases: 4096, ..Config::default() }
}

/// Facts of all decisions. A decision looks up each fact for one subject, so one value is enough.
#[derive(Debug, Clone, Copy)]
struct Facts {
    agent: bool,
    tunnel: bool,
    node: bool,
    node_flow: bool,
    accepted: Option<Accepted>,
    to_neighbour: bool,
    answer: bool,
    cookie: bool,
    port_mode: Option<u32>,
    allowed_clear: bool,
    node_socket: bool,
    tcp_socket: bool,
    pod: Option<Pod>,
    tcp: bool,
    mesh: bool,
    netns: u64,
    node_netns: bool,
    default_is_strict: bool,
    stale: bool,
    steered: Option<Steered>,
    captured: bool,
    handshake: bool,
    bound_to_link: bool,
    share_used_up: bool,
}

impl GuardFacts for Facts {
    fn is_agent(&self) -> bool {
        self.agent
    }
    fn marked(&self) -> Option<Marked> {
        self.tunnel.then_some(Marked::Tunnel)
    }
    fn in_mesh(&self, _: &Address) -> bool {
        self.mesh
    }
    fn is_node(&self, _: &Address) -> bool {
        self.node
    }
    fn is_node_service(&self, packet: &Packet) -> bool {
        self.node && packet.remote_port >= 30_000
    }
    fn is_node_flow(&self, _: &Packet) -> bool {
        self.node_flow
    }
    fn accepted(&self) -> Option<Accepted> {
        self.accepted
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
    fn port_mode(&self, _: u32, _: u16) -> Option<u32> {
        self.port_mode
    }
    fn is_allowed_clear(&self, _: &Address, _: u16, _: u8) -> bool {
        self.allowed_clear
    }
    fn is_node_socket(&self) -> bool {
        self.node_socket
    }
    fn is_tcp_socket(&self) -> bool {
        self.tcp_socket
    }
}

impl ConnectFacts for Facts {
    fn pod(&self) -> Option<Pod> {
        self.pod
    }
    fn is_tcp(&self) -> bool {
        self.tcp
    }
    fn in_mesh(&self, _: &Address) -> bool {
        self.mesh
    }
    fn netns_cookie(&self) -> u64 {
        self.netns
    }
    fn is_in_node_netns(&self) -> bool {
        self.node_netns
    }
    fn is_agent(&self) -> bool {
        self.agent
    }
    fn default_is_strict(&self) -> bool {
        self.default_is_strict
    }
    fn is_allowed_clear(&self, _: &Address) -> bool {
        self.allowed_clear
    }
    fn is_stale(&self) -> bool {
        self.stale
    }
    fn is_bound_to_link(&self) -> bool {
        self.bound_to_link
    }
    fn is_share_used_up(&self, _: u32) -> bool {
        self.share_used_up
    }
}

impl InboundFacts for Facts {
    fn steered(&self, _: &Address) -> Option<Steered> {
        self.steered
    }
    fn is_captured(&self, _: &Tuple) -> bool {
        self.captured
    }
    fn port_mode(&self, _: u32, _: u16) -> Option<u32> {
        self.port_mode
    }
    fn is_node_flow(&self, _: PodCells, _: &Inbound) -> bool {
        self.node_flow
    }
    fn in_mesh(&self, _: &Address) -> bool {
        self.mesh
    }
    fn is_stale(&self) -> bool {
        self.stale
    }
    fn is_in_handshake(&self, _: &Inbound) -> bool {
        self.handshake
    }
}

fn raw_mode() -> impl Strategy<Value = u32> {
    prop_oneof![1..4_u32, any::<u32>()]
}

fn pod() -> impl Strategy<Value = Pod> {
    let own =
        (prop_oneof![Just(Address::NONE), Just(POD_V4)], prop_oneof![Just(Address::NONE), Just(POD_V6)]);
    let of_entries = pod_flag::ALL.into_iter().filter(|flag| *flag != pod_flag::UNKNOWN).collect::<Vec<_>>();
    let flags = subsequence(of_entries, 0..pod_flag::ALL.len()).prop_map(|flags| flags.iter().sum::<u32>());
    let known = (own, raw_mode(), flags, 7..9_u64).prop_map(|((v4, v6), mode, flags, netns_cookie)| Pod {
        netns_cookie,
        v4,
        v6,
        slot: 3,
        mode,
        flags,
        capture_port: 0,
    });
    prop_oneof![4 => known, 1 => Just(Pod::unknown())]
}

fn facts() -> impl Strategy<Value = Facts> {
    let steered = (raw_mode(), 0..2_u32).prop_map(|(mode, flags)| Steered { slot: 3, mode, flags, mark: 0 });
    let accepted = select(vec![None, Some(Accepted::Node), Some(Accepted::Other)]);
    let options = (
        proptest::option::of(raw_mode()),
        proptest::option::of(pod()),
        proptest::option::of(steered),
        accepted,
    );
    (any::<[bool; 19]>(), 7..9_u64, options).prop_map(|(is, netns, (port_mode, pod, steered, accepted))| {
        let [
            agent,
            tunnel,
            node,
            node_flow,
            to_neighbour,
            answer,
            cookie,
            allowed_clear,
            node_socket,
            tcp_socket,
            tcp,
            mesh,
            strict,
            stale,
            captured,
            handshake,
            bound_to_link,
            share_used_up,
            node_netns,
        ] = is;
        Facts {
            agent,
            tunnel,
            node,
            node_flow,
            accepted,
            to_neighbour,
            answer,
            cookie,
            port_mode,
            allowed_clear,
            node_socket,
            tcp_socket,
            pod,
            tcp,
            mesh,
            netns,
            node_netns,
            default_is_strict: strict,
            stale,
            steered,
            captured,
            handshake,
            bound_to_link,
            share_used_up,
        }
    })
}

const fn v4(last: u8) -> Address {
    Address::from_octets([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 77, 1, last])
}

const POD_V4: Address = v4(2);
const POD_V6: Address = Address::from_octets([0xfd, 0x77, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
const LINK_LOCAL: Address = Address::from_octets([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);

fn address() -> impl Strategy<Value = Address> {
    let any_v6 = any::<[u8; 16]>().prop_map(Address::from_octets);
    let any_v4 = any::<[u8; 4]>().prop_map(|ip| Address::from_v4_be(u32::from_ne_bytes(ip)));
    let known = [POD_V4, POD_V6, v4(9), LINK_LOCAL, Address::NONE, Address::LOOPBACK_V6, loopback_v4()];
    prop_oneof![4 => select(known.to_vec()), 1 => any_v6, 1 => any_v4]
}

fn loopback_v4() -> Address {
    Address::from_v4_be(u32::from_ne_bytes([127, 0, 0, 1]))
}

fn packet() -> impl Strategy<Value = Packet> {
    let known = [
        protocol::TCP,
        protocol::UDP,
        protocol::ICMP,
        protocol::ICMP_V6,
        protocol::UNKNOWN,
        protocol::GRE,
        132,
    ];
    let number = prop_oneof![6 => select(known.to_vec()), 1 => any::<u8>()];
    let port = prop_oneof![2 => any::<u16>(), 1 => select(vec![tcp_port::TUNNEL, 53, 4789, 8472])];
    let segment = select(vec![Segment::Syn, Segment::SynAck, Segment::Data, Segment::Bare]);
    (address(), address(), number, (port.clone(), port), segment, any::<bool>()).prop_map(
        |(local, remote, protocol, (local_port, remote_port), segment, is_discovery)| Packet {
            local,
            remote,
            protocol,
            local_port,
            remote_port,
            segment: if protocol == tacit_abi::protocol::TCP { segment } else { Segment::Data },
            is_discovery,
        },
    )
}

fn hook() -> impl Strategy<Value = Hook> {
    prop_oneof![Just(Hook::Socket), Just(Hook::Link)]
}

fn accepts_plaintext(facts: &Facts, mode: u32) -> bool {
    let mode = facts.port_mode.unwrap_or(mode);
    mode == Mode::Disable as u32 || mode == Mode::Permissive as u32
}

fn passes(verdict: Verdict) -> bool {
    !matches!(verdict, Verdict::Drop(_))
}

/// Returns true for an address that the pod has. The unspecified one stands for none.
fn is_own(pod: &Pod, address: &Address) -> bool {
    *address != Address::NONE && [pod.v4, pod.v6].contains(address)
}

fn std_address(address: &Address) -> IpAddr {
    Ipv6Addr::from(address.octets()).to_canonical()
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn addresses_are_of_the_classes_that_the_standard_library_names(address in address(), other in address()) {
        let expected = std_address(&address);
        prop_assert_eq!(Address::from_octets(address.octets()), address);
        prop_assert_eq!(address.is_v4(), expected.is_ipv4());
        prop_assert_eq!(address.is_loopback(), expected.is_loopback());
        prop_assert_eq!(address.is_link_local(), matches!(expected, IpAddr::V6(v6) if v6.is_unicast_link_local()));
        prop_assert_eq!(address.is_none(), address.octets() == [0; 16]);
        prop_assert_eq!(address.same(&other), address == other);
        if let IpAddr::V4(v4) = expected {
            prop_assert_eq!(address.v4_be().to_ne_bytes(), v4.octets());
        }
    }

    #[test]
    fn capture_targets_are_loopback_and_apart_from_dial_sources(address in address(), port: u16, hash: u32) {
        let target = address.capture_target(port, hash);
        let source = Address::dial_source(address.is_v4(), hash);
        prop_assert!(target.is_loopback() && source.is_loopback());
        if address.is_v4() {
            prop_assert_eq!(target.octets()[13] & 0xf0, 96, "127.96.0.0/12");
            prop_assert_eq!(source.octets()[13] & 0xf0, 64, "127.64.0.0/12");
        }
        let spread = tcp_port::CAPTURE_V6_FIRST..tcp_port::CAPTURE_V6_FIRST + tcp_port::CAPTURE_V6_COUNT;
        prop_assert!(spread.contains(&address.capture_port_v6(port)));
        prop_assert!(spread.clone().all(|port| !tcp_port::is_reserved(port)));
        prop_assert!(!source.may_be_reported_to(&POD_V4) && source.may_be_reported_to(&Address::LOOPBACK_V6));
    }

    #[test]
    fn a_strict_or_unknown_pod_sends_only_listed_plaintext(
        facts in facts(), pod in pod(), hook in hook(), packet in packet(),
    ) {
        let pod = Pod { flags: pod.flags & pod_flag::SPREAD | pod_flag::EGRESS_STRICT, ..pod };
        let verdict = decide_egress(&facts, &pod, hook, &packet);
        let on_link = hook == Hook::Link;
        let of = |numbers: &[u8]| numbers.contains(&packet.protocol);
        let own = [&packet.local, &packet.remote].map(|end| is_own(&pod, end));
        let is_own_source = own[0] || !pod.has_addresses() || packet.local.is_none_of_family() || packet.local.is_link_local();
        let is_neighbour = packet.remote.is_link_local() || packet.remote.is_multicast() || on_link && facts.to_neighbour;
        let is_bare = matches!(packet.segment, Segment::Bare | Segment::SynAck);
        let is_service = facts.node && packet.remote_port >= 30_000;
        let is_outside = !facts.mesh && !is_neighbour && !is_service;
        let takes_plaintext = accepts_plaintext(&facts, pod.mode);
        let listed = [
            is_outside,
            of(&[protocol::TCP]) && is_bare && (facts.tcp_socket || on_link && facts.node_socket),
            of(&[protocol::TCP]) && on_link && facts.cookie && packet.local_port == tcp_port::TUNNEL && packet.segment == Segment::SynAck,
            of(&[protocol::TCP]) && facts.accepted.is_some_and(|by| by == Accepted::Node || takes_plaintext),
            of(&[protocol::UDP, protocol::ICMP, protocol::ICMP_V6]) && facts.node && !is_neighbour && !(is_service && of(&[protocol::UDP]) && !facts.node_flow),
            of(&[protocol::ICMP_V6]) && packet.is_discovery && on_link && facts.node_socket,
            facts.allowed_clear,
        ];
        let is_unpacked = of(&[4, 41, 47, 97, 115, 137, 143])
            || of(&[protocol::UDP]) && [1701, 3544, 4789, 4790, 5555, 6080, 6081, 6635, 8472].contains(&packet.remote_port);
        let expected = if on_link { facts.tunnel } else { facts.agent }
            || !on_link && own[1]
            || (!on_link || is_own_source) && !is_unpacked && listed.contains(&true);
        prop_assert_eq!(passes(verdict), expected, "{:?}", verdict);
    }

    #[test]
    fn a_pods_link_carries_no_other_source_in_any_mode(
        facts in facts(), pod in pod(), packet in packet(),
    ) {
        let verdict = decide_egress(&facts, &pod, Hook::Link, &packet);
        let is_own = pod.owns(&packet.local) || packet.local.is_none_of_family() || packet.local.is_link_local();
        if pod.has_addresses() && !facts.tunnel && !is_own {
            prop_assert_eq!(verdict, Verdict::Drop(Reason::GuardSpoofed));
        }
    }

    #[test]
    fn strict_passes_no_packet_that_open_drops(
        facts in facts(), pod in pod(), hook in hook(), packet in packet(),
    ) {
        let strict = Pod { flags: pod.flags | pod_flag::EGRESS_STRICT, mode: Mode::Strict as u32, ..pod };
        let open = Pod { flags: pod.flags & !pod_flag::EGRESS_STRICT, mode: Mode::Permissive as u32, ..pod };
        if passes(decide_egress(&facts, &strict, hook, &packet)) {
            prop_assert!(passes(decide_egress(&facts, &open, hook, &packet)));
        }
        if passes(decide_ingress(&facts, &strict, &packet)) {
            prop_assert!(passes(decide_ingress(&facts, &open, &packet)));
        }
    }

    #[test]
    fn a_strict_pod_receives_only_listed_plaintext(facts in facts(), pod in pod(), packet in packet()) {
        let mode = Mode::Strict as u32;
        let pod = Pod { mode, flags: pod.flags & pod_flag::SPREAD | pod_flag::EGRESS_STRICT, ..pod };
        let verdict = decide_ingress(&facts, &pod, &packet);
        let is_tcp = packet.protocol == protocol::TCP;
        let is_icmp = packet.protocol == protocol::ICMP || packet.protocol == protocol::ICMP_V6;
        let is_opening = packet.segment == Segment::Syn;
        let is_outside = !facts.mesh && !packet.remote.is_link_local() && !packet.remote.is_multicast();
        let takes_plaintext = accepts_plaintext(&facts, mode);
        let is_own_connection = facts.accepted.is_none() && (is_outside || facts.allowed_clear);
        let expected = facts.agent
            || facts.node && facts.node_flow
            || pod.owns(&packet.remote)
            || is_icmp
            || is_tcp && matches!(packet.segment, Segment::Bare | Segment::SynAck)
            || is_tcp && takes_plaintext
            || is_tcp && !is_opening && is_own_connection
            || !is_tcp && facts.answer;
        prop_assert_eq!(passes(verdict), expected, "{:?}", verdict);
    }

    #[test]
    fn an_unknown_pod_is_a_strict_one_but_for_what_comes_to_the_node_and_its_tcp(facts in facts(), packet in packet()) {
        let unknown = Pod::unknown();
        let strict = Pod { flags: unknown.flags & !pod_flag::UNKNOWN, ..unknown };
        let expected = passes(decide_ingress(&facts, &strict, &packet)) || facts.node;
        prop_assert_eq!(passes(decide_ingress(&facts, &unknown, &packet)), expected);
        for hook in [Hook::Socket, Hook::Link] {
            let egress = |pod| decide_egress(&facts, pod, hook, &packet);
            let is_tcp_socket = packet.protocol == protocol::TCP && facts.tcp_socket;
            if hook == Hook::Socket && is_tcp_socket && facts.node {
                prop_assert!(passes(egress(&unknown)));
            } else {
                prop_assert_eq!(egress(&unknown), egress(&strict));
            }
        }
    }

    #[test]
    fn a_pod_that_policies_select_gets_connections_from_the_agent_or_the_node_only(
        facts in facts(), pod in pod(), packet in packet(),
    ) {
        let flags = pod.flags & !(pod_flag::EXEMPT | pod_flag::UNKNOWN) | pod_flag::JUDGED;
        let pod = Pod { flags, ..pod };
        let packet = Packet { protocol: protocol::TCP, segment: Segment::Syn, ..packet };
        let is_proven = facts.agent || facts.node && facts.node_flow || pod.owns(&packet.remote);
        prop_assert_eq!(passes(decide_ingress(&facts, &pod, &packet)), is_proven);
    }

    #[test]
    fn an_unknown_mode_is_read_as_strict(facts in facts(), pod in pod(), packet in packet(), raw: u32) {
        prop_assume!(raw != Mode::Disable as u32 && raw != Mode::Permissive as u32);
        let strict = Pod { mode: Mode::Strict as u32, ..pod };
        let other = Pod { mode: raw, ..pod };
        prop_assert_eq!(decide_ingress(&facts, &other, &packet), decide_ingress(&facts, &strict, &packet));
        for hook in [Hook::Socket, Hook::Link] {
            let egress = |pod| decide_egress(&facts, pod, hook, &packet);
            prop_assert_eq!(egress(&other), egress(&strict));
        }
    }

    #[test]
    fn a_connection_into_the_mesh_is_left_alone_only_for_a_listed_reason(facts in facts(), destination in address()) {
        let verdict = decide_connect(&facts, &destination);
        let is_left = matches!(verdict, Connect::Leave(_) | Connect::Inside(_));
        let is_outside = !facts.tcp || !facts.mesh || facts.allowed_clear;
        let expected = match facts.pod {
            None => is_outside || !facts.default_is_strict || facts.agent || facts.node_netns,
            Some(pod) => {
                let is_own = is_own(&pod, &destination);
                let is_open = !pod.has(pod_flag::EGRESS_STRICT) && pod.netns_cookie != 0;
                let is_nested = facts.netns != pod.netns_cookie;
                let is_unreachable = is_open && (is_nested || facts.stale || facts.bound_to_link);
                pod.has(pod_flag::EXEMPT) || is_outside || is_own || is_unreachable
            }
        };
        prop_assert_eq!(is_left, expected, "{:?}", verdict);
        if let Connect::Capture(pod) = verdict {
            prop_assert!(Some(pod) == facts.pod && !facts.stale && facts.netns == pod.netns_cookie);
            prop_assert!(!facts.bound_to_link && !facts.share_used_up);
        }
    }

    #[test]
    fn a_connection_to_a_pod_passes_only_for_a_listed_reason(
        facts in facts(), local in address(), remote in address(), remote_port: u16,
        port in prop_oneof![14_990..15_070_u16, any::<u16>()],
    ) {
        let flow = Inbound { local, remote, port, remote_port };
        let verdict = decide_inbound(&facts, &flow);
        let is_spread = local == Address::LOOPBACK_V6
            && (tcp_port::CAPTURE_V6_FIRST..tcp_port::CAPTURE_V6_FIRST + tcp_port::CAPTURE_V6_COUNT).contains(&port)
            && !remote.is_loopback();
        let is_local = local.is_loopback() || remote.is_loopback() || local == remote;
        let is_agents = port == tcp_port::TUNNEL || tcp_port::is_reserved(port);
        let is_missed = facts.handshake && local.is_v4() && local.is_loopback() && tcp_port::is_capture(port);
        let expected = !is_spread
            && !is_missed
            && (is_local
                || match facts.steered {
                    None => true,
                    Some(steered) => {
                        let has_policy = steered.flags & steer_flag::JUDGED != 0;
                        !is_agents && (facts.node_flow || accepts_plaintext(&facts, steered.mode) && !has_policy)
                    }
                });
        prop_assert_eq!(matches!(verdict, Steer::Pass(_)), expected, "{:?}", verdict);
        let is_given = matches!(verdict, Steer::Agent(..) | Steer::Capture(..));
        prop_assert!(!is_given || facts.steered.is_some() && !facts.stale, "{:?}", verdict);
        let is_tunnel = matches!(verdict, Steer::Agent(_, Listener::Tunnel, _));
        prop_assert!(!is_tunnel || port == tcp_port::TUNNEL);
    }
}

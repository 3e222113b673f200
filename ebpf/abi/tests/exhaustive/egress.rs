//! Packets that leave a pod.

use tacit_abi::{
    Accepted, Address, Exception, ExceptionHook, GuardFacts, Hook, Marked, Packet, Pod, Reason, Verdict,
    decide_egress, may_send_from, pod_flag, tcp_port,
};

use crate::{
    Excepted, Row, assert_no_dead_line,
    facts::{Every as _, RawMode, facts},
    first,
    packets::{self, LinkKind, Subject, is_unspecified},
};

facts! {
    /// Facts of a packet at the guard.
    Facts of Subject {
        agent: bool,
        marked: Option<Marked>,
        in_mesh: bool,
        of_node: bool,
        own_end_of_node: bool,
        node_service: bool,
        node_flow: bool,
        accepted: Option<Accepted>,
        port_mode: Option<RawMode>,
        allowed_clear: bool,
        node_socket: bool,
        tcp_socket: bool,
        link: LinkKind,
        to_neighbour: bool,
        answer: bool,
        tunnel_cookie: bool,
    }
}

impl GuardFacts for Facts {
    fn is_agent(&self) -> bool {
        self.agent()
    }
    fn marked(&self) -> Option<Marked> {
        self.marked()
    }
    fn in_mesh(&self, address: &Address) -> bool {
        assert_eq!(*address, self.subject.packet.remote);
        self.in_mesh()
    }
    fn is_node(&self, address: &Address) -> bool {
        if *address == self.subject.packet.local {
            return self.is_at_nodes_address();
        }
        assert_eq!(*address, self.subject.packet.remote);
        self.of_node()
    }
    fn is_node_service(&self, packet: &Packet) -> bool {
        assert_eq!(*packet, self.subject.packet);
        self.node_service()
    }
    fn is_node_flow(&self, packet: &Packet) -> bool {
        assert_eq!(*packet, self.subject.packet);
        self.node_flow()
    }
    fn accepted(&self) -> Option<Accepted> {
        self.accepted()
    }
    fn port_mode(&self, slot: u32, port: u16) -> Option<u32> {
        assert_eq!((slot, port), (self.subject.pod.slot, self.subject.packet.local_port));
        self.port_mode().map(|mode| mode.0)
    }
    fn is_allowed_clear(&self, remote: &Address, port: u16, protocol: u8) -> bool {
        let packet = &self.subject.packet;
        assert_eq!((*remote, port, protocol), (packet.remote, packet.remote_port, packet.protocol));
        self.allowed_clear()
    }
    fn is_node_socket(&self) -> bool {
        self.node_socket()
    }
    fn is_tcp_socket(&self) -> bool {
        self.tcp_socket()
    }
    fn may_send_from(&self, pod: &Pod, address: &Address) -> bool {
        may_send_from(pod, &self.link().link(), address)
    }
    fn is_to_neighbour(&self) -> bool {
        self.to_neighbour()
    }
    fn is_answer(&self, packet: &Packet) -> bool {
        assert_eq!(*packet, self.subject.packet);
        self.answer()
    }
    fn is_tunnel_cookie(&self, _: &Pod, packet: &Packet) -> bool {
        assert_eq!(*packet, self.subject.packet);
        self.tunnel_cookie()
    }
}

impl Facts {
    fn on_link(&self) -> bool {
        self.subject.hook == Hook::Link
    }

    fn is_neighbour(&self) -> bool {
        self.subject.is_to_everyone_or_link_local() || self.on_link() && self.to_neighbour()
    }

    /// Returns true if the pod's mode, or its port's, takes plaintext.
    pub(crate) fn takes_plaintext(&self) -> bool {
        !self.subject.is_strict(self.port_mode())
    }

    /// Returns true for an address that is outside the mesh and no neighbour's. A service there may lead back into it.
    fn is_outside_and_no_service(&self) -> bool {
        !self.node_service() && self.is_outside()
    }

    pub(crate) fn is_outside(&self) -> bool {
        !self.is_neighbour() && !self.in_mesh()
    }

    /// Returns true if the pod's end of the packet has an address of the node.
    pub(crate) fn is_at_nodes_address(&self) -> bool {
        let packet = &self.subject.packet;
        if packet.local == packet.remote { self.of_node() } else { self.own_end_of_node() }
    }

    pub(crate) fn is_of_agent(&self) -> bool {
        self.agent()
    }

    /// Returns true if the other end has an address of the node.
    pub(crate) fn is_of_nodes_address(&self) -> bool {
        self.of_node()
    }

    pub(crate) fn is_of_node_flow(&self) -> bool {
        self.node_flow()
    }

    pub(crate) fn how_accepted(&self) -> Option<Accepted> {
        self.accepted()
    }

    pub(crate) fn is_answer_of_pod(&self) -> bool {
        self.answer()
    }

    pub(crate) fn is_to_allowed_clear(&self) -> bool {
        self.allowed_clear()
    }

    fn is_own_source(&self) -> bool {
        let source = &self.subject.packet.local;
        !self.subject.pod.has_addresses()
            || self.subject.is_own(source)
            || is_unspecified(source)
            || self.link().gives(source)
    }

    /// Returns `Ask` for a datagram, whose answer is to be let in.
    fn ask(&self, exception: Exception) -> Verdict {
        if self.subject.is_datagram() { Verdict::Ask(exception) } else { Verdict::Except(exception) }
    }

    /// Returns true if all that is not listed is refused to what the pod sends.
    fn is_held(&self) -> bool {
        let is_denied_udp = self.subject.is_udp() && !self.subject.has_udp_allowed();
        self.subject.sends_no_plaintext() || is_denied_udp
    }
}

type Line = Row<Facts, Verdict>;

/// Packets that pass whatever the pod's mode is.
static ALWAYS: [Line; 6] = [
    Line::new("of an agent's socket", |f| !f.on_link() && f.agent(), |_| Verdict::Pass),
    Line::new(
        "of an agent's tunnel, on the link",
        |f| f.on_link() && f.marked() == Some(Marked::Tunnel),
        |_| Verdict::Pass,
    ),
    Line::new(
        "of an agent to a port in DISABLE, on the link of a STRICT pod",
        |f| {
            let is_strict = f.subject.sends_no_plaintext() && !f.subject.is_exempt();
            f.on_link() && f.marked() == Some(Marked::Disabled) && is_strict
        },
        |_| Verdict::Except(Exception::DisabledPort),
    ),
    Line::new(
        "of an agent to a port in DISABLE, on another link",
        |f| f.on_link() && f.marked() == Some(Marked::Disabled),
        |_| Verdict::Pass,
    ),
    Line::new(
        "of a pod that is not enrolled, from its own address",
        |f| f.subject.is_exempt() && (!f.on_link() || f.is_own_source()),
        |_| Verdict::Pass,
    ),
    Line::new(
        "of a pod to itself, inside its namespace",
        |f| !f.on_link() && f.subject.is_own(&f.subject.packet.remote),
        |f| if f.is_held() { Verdict::Except(Exception::OwnAddress) } else { Verdict::Pass },
    ),
];

/// A held pod sends nothing in clear but this, from its own address, and not encapsulated.
static STRICT: [Line; 12] = [
    Line::new(
        "to an address outside the mesh that is no neighbour and no service of a node",
        Facts::is_outside_and_no_service,
        |f| f.ask(Exception::Outside),
    ),
    Line::new(
        "TCP without data, made by the kernel",
        |f| {
            let is_kernels = f.tcp_socket() || f.on_link() && f.node_socket();
            f.subject.is_tcp() && !f.subject.has_data() && is_kernels
        },
        |_| Verdict::Except(Exception::WithoutData),
    ),
    Line::new(
        "the kernel's cookie of the tunnel's listener, on the link",
        |f| {
            let is_synack = f.subject.is_tcp() && f.subject.packet.segment == tacit_abi::Segment::SynAck;
            let from_tunnel = f.subject.packet.local_port == tcp_port::TUNNEL;
            f.on_link() && is_synack && from_tunnel && f.tunnel_cookie()
        },
        |_| Verdict::Except(Exception::TunnelCookie),
    ),
    Line::new(
        "TCP of a connection of the node, proven on the link",
        |f| f.subject.is_tcp() && f.accepted() == Some(Accepted::Node),
        |_| Verdict::Except(Exception::NodeFlow),
    ),
    Line::new(
        "TCP of a connection that was accepted as plaintext, while its port takes plaintext",
        |f| f.subject.is_tcp() && f.accepted() == Some(Accepted::Other) && f.takes_plaintext(),
        |_| Verdict::Except(Exception::PlaintextPort),
    ),
    Line::new(
        "TCP from an address of the node, at the socket of a pod that no source has named",
        |f| {
            let is_sockets = !f.on_link() && f.tcp_socket();
            f.subject.is_tcp() && f.subject.is_unnamed() && is_sockets && f.is_at_nodes_address()
        },
        |_| Verdict::Except(Exception::NodeAddress),
    ),
    Line::new(
        "UDP of a workload with `udp: allow`",
        |f| f.subject.is_udp() && f.subject.has_udp_allowed(),
        |_| Verdict::Except(Exception::UdpAllowed),
    ),
    Line::new(
        "UDP to this node, which is no neighbour, and to no service there",
        |f| f.subject.is_udp() && f.of_node() && !f.is_neighbour() && !f.node_service(),
        |_| Verdict::Ask(Exception::OwnNode),
    ),
    Line::new(
        "UDP to this node, which is no neighbour, in a flow that the node began",
        |f| f.subject.is_udp() && f.of_node() && !f.is_neighbour() && f.node_flow(),
        |_| Verdict::Ask(Exception::NodeFlow),
    ),
    Line::new(
        "ICMP to this node, which is no neighbour",
        |f| f.subject.is_icmp() && f.of_node() && !f.is_neighbour(),
        |_| Verdict::Except(Exception::OwnNode),
    ),
    Line::new(
        "neighbour discovery that the kernel made, on the link",
        |f| {
            let is_discovery = f.subject.of(&[58]) && f.subject.packet.is_discovery;
            is_discovery && f.on_link() && f.node_socket()
        },
        |_| Verdict::Except(Exception::Discovery),
    ),
    Line::new("to a destination of `allowClear`", Facts::allowed_clear, |f| f.ask(Exception::AllowClear)),
];

fn specified(facts: &Facts) -> Verdict {
    let subject = &facts.subject;
    if let Some(verdict) = first(&ALWAYS, facts) {
        return verdict;
    }
    if facts.on_link() && !facts.is_own_source() {
        return Verdict::Drop(Reason::GuardSpoofed);
    }
    if !facts.is_held() {
        let is_counted = (subject.has_data() || !subject.is_tcp()) && facts.in_mesh();
        return if is_counted { Verdict::Clear(Reason::GuardClear) } else { Verdict::Pass };
    }
    if subject.sends_no_plaintext() && is_encapsulated(subject) {
        return Verdict::Drop(Reason::GuardEncapsulated);
    }
    first(&STRICT, facts).unwrap_or(Verdict::Drop(match subject.packet.protocol {
        6 => Reason::GuardTcp,
        17 => Reason::GuardUdp,
        1 | 58 => Reason::GuardIcmp,
        _ => Reason::GuardOther,
    }))
}

fn is_encapsulated(subject: &Subject) -> bool {
    subject.of(&packets::ENCAPSULATION_PROTOCOLS)
        || subject.is_udp() && packets::ENCAPSULATION_PORTS.contains(&subject.packet.remote_port)
}

static EXCEPTED: Excepted = Excepted::new();

fn check(pod: Pod, packet: Packet) -> u64 {
    let at = |hook| {
        Facts::each(Subject { pod, hook, packet }, |facts| {
            let verdict = decide_egress(facts, &pod, hook, &packet);
            let expected = specified(facts);
            assert_eq!(verdict, expected, "{facts:?}");
            EXCEPTED.note(verdict, hook.counted());
        })
    };
    Hook::all().map(at).sum()
}

#[test]
fn a_strict_or_unknown_pod_sends_nothing_in_clear_but_what_is_listed() {
    let combinations = packets::each(check);
    assert_no_dead_line(&ALWAYS);
    assert_no_dead_line(&STRICT);
    EXCEPTED.assert_all_at(&[ExceptionHook::Egress, ExceptionHook::Link]);
    assert!(combinations > 0, "nothing was checked");
    println!("{combinations} combinations");
}

#[test]
fn no_protocol_number_and_no_udp_port_is_special_but_those_that_are_listed() {
    let is_wide = |pod: &Pod| pod.flags & !(pod_flag::EGRESS_STRICT | pod_flag::UDP_ALLOWED) == 0;
    let pods: Vec<Pod> = packets::pods().into_iter().filter(|pod| pod.mode == 3 && is_wide(pod)).collect();
    let mut combinations = 0;
    for pod in &pods {
        combinations += packets::protocols().map(|packet| check(*pod, packet)).sum::<u64>();
    }
    combinations += packets::udp_ports().map(|packet| check(Pod::unknown(), packet)).sum::<u64>();
    assert!(combinations > 0, "nothing was checked");
    println!("{combinations} combinations");
}

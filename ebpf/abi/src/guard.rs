//! Decisions of the guard on packets. The guard sees every packet of a pod, including those of raw and packet sockets,
//! which the connect hooks do not see.
//!
//! ```text
//! egress   cgroup_skb at the pods' cgroup     every socket of a pod's process, in any network namespace
//! ingress  cgroup_skb at the pods' cgroup     every packet that reaches a socket of a pod
//! link     tcx or clsact, host end of a link  every frame that leaves the pod: packet sockets, nested namespaces,
//!                                             processes that left the pod's cgroup
//! arrival  tcx or clsact, host end of a link  every frame towards the pod
//! ```
//! STRICT is a property of the pod. To and from a STRICT pod, or one that has no entry in a STRICT mesh, everything is
//! refused that is not in the lists below, whatever the other address. Traffic inside a namespace does not get here.
//! The guard identifies the agent's sockets by cgroup, which pods cannot join, and the node's by cgroup on the host end of
//! a link. Source addresses and ports prove nothing, except where this file has checked them.

use crate::{Address, Link, Mode, NodeFlow, Pod, Reason, pod_flag, tcp_port};

/// IP protocol numbers.
pub mod protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// IPv4 in IP.
    pub const IP_IN_IP: u8 = 4;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6 in IP.
    pub const IPV6_IN_IP: u8 = 41;
    /// GRE.
    pub const GRE: u8 = 47;
    /// ICMP for IPv6.
    pub const ICMP_V6: u8 = 58;
    /// Ethernet in IP.
    pub const ETHERIP: u8 = 97;
    /// Layer 2 tunnelling, version 3.
    pub const L2TP: u8 = 115;
    /// MPLS in IP.
    pub const MPLS_IN_IP: u8 = 137;
    /// Ethernet in IPv6 segment routing.
    pub const ETHERNET: u8 = 143;
    /// Not known: the chain of extension headers is too long.
    pub const UNKNOWN: u8 = 255;
}

/// UDP ports on which nodes decapsulate: GUE and FOU as commonly set up, L2TP, VXLAN (standard, Linux' default, flannel's
/// UDP backend), VXLAN-GPE, Geneve, MPLS and Teredo.
const ENCAPSULATION_PORTS: [u16; 9] = [1701, 3544, 4789, 4790, 5555, 6080, 6081, 6635, 8472];

/// A packet between a pod and another address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Address of the pod.
    pub local: Address,
    /// Address of the other end.
    pub remote: Address,
    /// IP protocol number, such as those in [`protocol`].
    pub protocol: u8,
    /// Port of the pod; 0 if the protocol has no ports.
    pub local_port: u16,
    /// Port of the other end; 0 if the protocol has no ports.
    pub remote_port: u16,
    /// Kind of a TCP segment; [`Segment::Data`] for other protocols.
    pub segment: Segment,
    /// True for the messages of IPv6 neighbour discovery and multicast listener reports.
    pub is_discovery: bool,
}

impl Packet {
    /// Returns the key of the packet's flow, if its other end is the node itself.
    #[inline(always)]
    #[must_use]
    pub const fn node_flow(&self) -> NodeFlow {
        NodeFlow {
            node: self.remote,
            pod: self.local,
            node_port: self.remote_port as u32,
            pod_port: self.local_port as u32,
            protocol: self.protocol as u32,
            pad: 0,
        }
    }
}

/// Kind of a TCP segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    /// Opens a connection. It may carry data.
    Syn,
    /// Answers a SYN and carries no data.
    SynAck,
    /// Carries data.
    Data,
    /// Neither opens a connection nor carries data. The kernel's TCP writes no application bytes into such a segment, and
    /// connections need it to end in order.
    Bare,
}

impl Segment {
    /// Returns true for segments into which the kernel's TCP writes no application bytes.
    #[inline(always)]
    #[must_use]
    pub const fn is_bare(self) -> bool {
        matches!(self, Self::Bare | Self::SynAck)
    }
}

/// Hook at which the guard sees a packet that leaves a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// cgroup_skb, at the packet's socket.
    Socket,
    /// tcx or clsact, on the host end of the pod's link.
    Link,
}

/// Plaintext connection that an application accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// From the node itself, proven on the host end of the pod's link.
    Node,
    /// From anyone else.
    Other,
}

/// Facts that the guard can look up.
pub trait GuardFacts {
    /// Returns true if an agent owns the packet's socket.
    fn is_agent(&self) -> bool;
    /// Returns true if the agent marked the packet's socket as a tunnel before it connected.
    fn is_tunnel(&self) -> bool;
    /// Returns true for addresses in the mesh's ranges.
    fn in_mesh(&self, address: &Address) -> bool;
    /// Returns true for the node's own addresses. Proves nothing about a packet's source.
    fn is_node(&self, address: &Address) -> bool;
    /// Returns true if the node itself sent a packet of this flow to the pod, as seen on the host end of its link.
    fn is_node_flow(&self, packet: &Packet) -> bool;
    /// Returns how an application accepted the packet's connection as plaintext; `None` for all other connections.
    fn accepted(&self) -> Option<Accepted>;
    /// Returns the mode of a port that has its own.
    fn port_mode(&self, slot: u32, port: u16) -> Option<u32>;
    /// Returns true for destinations of `allowClear`.
    fn is_allowed_clear(&self, remote: &Address, port: u16, protocol: u8) -> bool;
    /// Returns true if the packet's socket belongs to the kernel or the node, and not to a pod. Used on links only.
    fn is_node_socket(&self) -> bool;
    /// Returns true for a TCP socket, whose headers the kernel wrote. The owner of a raw or packet socket writes its own.
    fn is_tcp_socket(&self) -> bool;
    /// Returns true for addresses that the pod may send from, see [`may_send_from`]. Used on links only.
    fn may_send_from(&self, pod: &Pod, address: &Address) -> bool;
    /// Returns true if the frame is addressed to a neighbour on the pod's link and not to the node. Used on links only.
    fn is_to_neighbour(&self) -> bool;
    /// Returns true if the pod sent a datagram to the packet's other end from the packet's port a short time ago.
    fn is_answer(&self, pod: &Pod, packet: &Packet) -> bool;
    /// Returns true if the segment is a SYN cookie of the agent's tunnel listener in the pod. Used on links only.
    fn is_tunnel_cookie(&self, pod: &Pod, packet: &Packet) -> bool;
}

/// Verdict on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Passes without a count.
    Pass,
    /// Passes without a count. The other end may answer, so the kernel side remembers the datagram.
    Ask,
    /// Passes as plaintext and is counted.
    Clear(Reason),
    /// As [`Verdict::Ask`], and is counted.
    AskClear(Reason),
    /// Dropped and counted.
    Drop(Reason),
}

/// Decides on a packet from `pod`.
#[inline(always)]
pub fn decide_egress(facts: &impl GuardFacts, pod: &Pod, hook: Hook, packet: &Packet) -> Verdict {
    let on_link = matches!(hook, Hook::Link);
    // A pod can rewrite the destination of what the agent sends in its namespace. The link sees the rewritten packet: it
    // lets the agent's tunnels pass, and treats the agent's other packets like the pod's.
    let is_tunnel = !on_link || packet.local_port == tcp_port::TUNNEL || facts.is_tunnel();
    if is_tunnel && facts.is_agent() {
        return Verdict::Pass;
    }
    if on_link && !facts.may_send_from(pod, &packet.local) {
        return Verdict::Drop(Reason::GuardSpoofed);
    }
    if pod.has(pod_flag::EXEMPT) || (!on_link && pod.owns(&packet.remote)) {
        return Verdict::Pass;
    }
    let is_strict = pod.has(pod_flag::EGRESS_STRICT);
    let is_denied_udp = packet.protocol == protocol::UDP && !pod.has(pod_flag::UDP_ALLOWED);
    if !is_strict && !is_denied_udp {
        let is_counted = !packet.segment.is_bare() && facts.in_mesh(&packet.remote);
        return if is_counted { Verdict::Clear(Reason::GuardClear) } else { Verdict::Pass };
    }
    if is_strict && is_encapsulation(packet) {
        return Verdict::Drop(Reason::GuardEncapsulated);
    }
    let is_neighbour = is_neighbour(&packet.remote) || (on_link && facts.is_to_neighbour());
    if !is_neighbour && !facts.in_mesh(&packet.remote) {
        return if has_no_connections(packet) { Verdict::Ask } else { Verdict::Pass };
    }
    match packet.protocol {
        // Resets that the kernel sends on its own belong to a socket of the node. Only the link hook sees them.
        protocol::TCP
            if packet.segment.is_bare() && (facts.is_tcp_socket() || (on_link && facts.is_node_socket())) =>
        {
            Verdict::Pass
        }
        // Under a SYN flood the kernel answers without a socket.
        protocol::TCP
            if on_link
                && matches!(packet.segment, Segment::SynAck)
                && packet.local_port == tcp_port::TUNNEL
                && facts.is_tunnel_cookie(pod, packet) =>
        {
            Verdict::Pass
        }
        protocol::TCP if is_reply(facts, pod, packet) => Verdict::Clear(Reason::GuardReply),
        protocol::UDP if pod.has(pod_flag::UDP_ALLOWED) => Verdict::Clear(Reason::GuardUdpClear),
        // Answers to the node's probes stay on this node.
        protocol::UDP | protocol::ICMP | protocol::ICMP_V6
            if !is_neighbour && facts.is_node(&packet.remote) =>
        {
            Verdict::Ask
        }
        // ICMP errors and echo replies repeat the packet they answer. A pod can spoof one to itself, and so send data in
        // another address' name. Of the kernel's own ICMP only discovery passes.
        protocol::ICMP_V6 if packet.is_discovery && on_link && facts.is_node_socket() => Verdict::Pass,
        _ if facts.is_allowed_clear(&packet.remote, packet.remote_port, packet.protocol) => {
            if has_no_connections(packet) {
                Verdict::AskClear(Reason::GuardAllowed)
            } else {
                Verdict::Clear(Reason::GuardAllowed)
            }
        }
        protocol::TCP => Verdict::Drop(Reason::GuardTcp),
        protocol::UDP => Verdict::Drop(Reason::GuardUdp),
        protocol::ICMP | protocol::ICMP_V6 => Verdict::Drop(Reason::GuardIcmp),
        _ => Verdict::Drop(Reason::GuardOther),
    }
}

/// Returns true for addresses that a neighbour on the pod's link can have whatever the mesh's ranges are.
#[inline(always)]
fn is_neighbour(address: &Address) -> bool {
    address.is_link_local() || address.is_multicast()
}

/// Returns true for packets that a node unpacks and sends on under the addresses inside.
#[inline(always)]
fn is_encapsulation(packet: &Packet) -> bool {
    match packet.protocol {
        protocol::IP_IN_IP
        | protocol::IPV6_IN_IP
        | protocol::GRE
        | protocol::ETHERIP
        | protocol::L2TP
        | protocol::MPLS_IN_IP
        | protocol::ETHERNET => true,
        protocol::UDP => {
            let mut found = false;
            for port in ENCAPSULATION_PORTS {
                found |= packet.remote_port == port;
            }
            found
        }
        _ => false,
    }
}

/// Returns true for protocols whose answers only a record of what was sent can tell from unsolicited packets.
#[inline(always)]
fn has_no_connections(packet: &Packet) -> bool {
    !matches!(packet.protocol, protocol::TCP | protocol::ICMP | protocol::ICMP_V6)
}

/// Returns true for a packet of a connection that was accepted as plaintext and that the mode still allows.
#[inline(always)]
fn is_reply(facts: &impl GuardFacts, pod: &Pod, packet: &Packet) -> bool {
    match facts.accepted() {
        Some(Accepted::Node) => true,
        Some(Accepted::Other) => accepts_plaintext(facts, pod, packet.local_port),
        None => false,
    }
}

#[inline(always)]
fn accepts_plaintext(facts: &impl GuardFacts, pod: &Pod, port: u16) -> bool {
    let mode = facts.port_mode(pod.slot, port).unwrap_or(pod.mode);
    !matches!(Mode::from_raw(mode), Mode::Strict)
}

/// Decides on a packet to a socket of `pod`.
#[inline(always)]
pub fn decide_ingress(facts: &impl GuardFacts, pod: &Pod, packet: &Packet) -> Verdict {
    // The pod's own addresses are a nested namespace's way out. Frames from elsewhere that claim them do not arrive.
    if pod.has(pod_flag::EXEMPT) || facts.is_agent() || pod.owns(&packet.remote) || facts.is_node_flow(packet)
    {
        return Verdict::Pass;
    }
    match packet.protocol {
        // Inbound ICMP carries no data of the pod, and applications need the errors.
        protocol::ICMP | protocol::ICMP_V6 => Verdict::Pass,
        protocol::TCP => decide_ingress_tcp(facts, pod, packet),
        protocol::UDP => decide_ingress_udp(facts, pod, packet),
        _ if !is_strict(pod) => Verdict::Pass,
        _ => answer(facts, pod, packet).unwrap_or(Verdict::Drop(Reason::GuardInboundOther)),
    }
}

/// Connections reach an application's socket past the steering program where the pod has an address that the program does
/// not know, and where the program is not attached yet. So every SYN is judged here too.
#[inline(always)]
fn decide_ingress_tcp(facts: &impl GuardFacts, pod: &Pod, packet: &Packet) -> Verdict {
    if packet.segment.is_bare() {
        return Verdict::Pass;
    }
    let is_opening = matches!(packet.segment, Segment::Syn);
    if accepts_plaintext(facts, pod, packet.local_port) {
        // The agent decides on connections to a pod that authorization policies select, and ends those that were open.
        let is_undecided = is_opening && pod.has(pod_flag::JUDGED);
        return if is_undecided { Verdict::Drop(Reason::GuardInboundTcp) } else { Verdict::Pass };
    }
    if is_opening {
        return Verdict::Drop(Reason::GuardInboundTcp);
    }
    match facts.accepted() {
        // Packets of the node are proven on the link, each of them.
        Some(_) => Verdict::Drop(Reason::GuardInboundTcp),
        // The pod opened this connection.
        None if !facts.in_mesh(&packet.remote) && !is_neighbour(&packet.remote) => Verdict::Pass,
        None if facts.is_allowed_clear(&packet.remote, packet.remote_port, packet.protocol) => {
            Verdict::Clear(Reason::GuardAllowed)
        }
        None if !pod.has(pod_flag::EGRESS_STRICT) => Verdict::Clear(Reason::GuardClear),
        None => Verdict::Drop(Reason::GuardInboundTcp),
    }
}

#[inline(always)]
fn decide_ingress_udp(facts: &impl GuardFacts, pod: &Pod, packet: &Packet) -> Verdict {
    match (pod.has(pod_flag::UDP_ALLOWED), is_strict(pod)) {
        (true, true) => return Verdict::Clear(Reason::GuardUdpClear),
        (true, false) => return Verdict::Pass,
        // `udp: deny` of an open pod concerns the mesh only.
        (false, false) if !facts.in_mesh(&packet.remote) && !is_neighbour(&packet.remote) => {
            return Verdict::Pass;
        }
        (false, _) => {}
    }
    answer(facts, pod, packet).unwrap_or(Verdict::Drop(Reason::GuardInboundUdp))
}

/// Returns the verdict on an answer to what the pod sent; `None` for everything else.
#[inline(always)]
fn answer(facts: &impl GuardFacts, pod: &Pod, packet: &Packet) -> Option<Verdict> {
    if !facts.is_answer(pod, packet) {
        return None;
    }
    let is_allowed = facts.is_allowed_clear(&packet.remote, packet.remote_port, packet.protocol);
    Some(if is_allowed { Verdict::Clear(Reason::GuardAllowed) } else { Verdict::Pass })
}

#[inline(always)]
fn is_strict(pod: &Pod) -> bool {
    matches!(Mode::from_raw(pod.mode), Mode::Strict)
}

/// What a frame says about who has an address: an ARP packet, or a message of neighbour discovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// ARP: the sender has these addresses.
    Arp {
        /// Hardware address.
        hardware: u64,
        /// IPv4 address; unspecified in a probe.
        address: Address,
    },
    /// A neighbour advertisement: the target is here.
    Advertisement(Address),
    /// A router advertisement or a redirect: other addresses are reached through somebody.
    Routing,
}

/// Returns true if a pod may say this on its link. What else it says would lead its neighbours' traffic to it.
#[inline(always)]
#[must_use]
pub fn may_claim(pod: &Pod, link: &Link, claim: &Claim) -> bool {
    match claim {
        Claim::Arp { hardware, address } => {
            (link.hardware == 0 || *hardware == link.hardware)
                && (pod.owns(address) || address.is_none_of_family() || !pod.has_addresses())
        }
        Claim::Advertisement(target) => {
            pod.owns(target) || is_own_link_local(link, target) || !pod.has_addresses()
        }
        Claim::Routing => false,
    }
}

/// Returns true if `address` may be the source of a frame on the pod's link.
#[inline(always)]
#[must_use]
pub fn may_send_from(pod: &Pod, link: &Link, address: &Address) -> bool {
    pod.owns(address)
        || address.is_none_of_family()
        || is_own_link_local(link, address)
        || !pod.has_addresses()
}

/// The pod's link-local address is not known while it has none; any is taken for it then.
#[inline(always)]
fn is_own_link_local(link: &Link, address: &Address) -> bool {
    address.is_link_local() && (link.link_local.is_none() || address.same(&link.link_local))
}

/// Facts about a frame towards a pod, on the host end of its link.
pub trait ArrivalFacts {
    /// Returns true for the node's own addresses.
    fn is_node(&self, address: &Address) -> bool;
    /// Returns true if the packet's socket belongs to the kernel or the node, and not to a pod.
    fn is_node_socket(&self) -> bool;
    /// Returns true if the node itself sent a packet of this flow, see [`is_recent`].
    fn is_node_flow(&self, packet: &Packet) -> bool;
}

/// Seconds after the node's last packet in which a flow counts as the node's own. Linux keeps the port of a closed
/// connection for as long (`TCP_TIMEWAIT_LEN`). Later, others on the node may use the port.
const NODE_FLOW_SECONDS: u32 = 60;

/// Returns the time in seconds, which wraps around after 136 years.
#[inline(always)]
#[must_use]
pub const fn seconds(now_ns: u64) -> u32 {
    (now_ns / 1_000_000_000) as u32
}

/// Returns true if a flow still counts as the node's own, whose last packet it sent at `sent_seconds`.
#[inline(always)]
#[must_use]
pub const fn is_recent(sent_seconds: u32, now_ns: u64) -> bool {
    seconds(now_ns).wrapping_sub(sent_seconds) <= NODE_FLOW_SECONDS
}

/// Verdict on a frame towards a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Passes; nothing is proven.
    Pass,
    /// Passes, and its flow is the node's own.
    OfNode,
    /// Dropped and counted.
    Drop(Reason),
}

/// Decides on a packet towards `pod`, on the host end of its link. This is the only place that can tell the node's own
/// packets, such as probes of the kubelet, from forwarded, masqueraded and forged ones: they have a socket of the node.
#[inline(always)]
pub fn decide_arrival(facts: &impl ArrivalFacts, pod: &Pod, packet: &Packet) -> Arrival {
    // A pod's packets to itself do not leave its namespace. Such a source would pass for the pod inside.
    if pod.owns(&packet.remote) {
        return Arrival::Drop(Reason::GuardSpoofed);
    }
    if !pod.owns(&packet.local) || !facts.is_node(&packet.remote) {
        return Arrival::Pass;
    }
    if facts.is_node_socket() {
        // Anyone can make the node's kernel send a reset to the pod. It begins no flow of the node.
        let is_answer = matches!(packet.segment, Segment::Bare) && !facts.is_node_flow(packet);
        return if is_answer { Arrival::Pass } else { Arrival::OfNode };
    }
    // Somebody else takes part in a connection of the node. Masquerading never chooses a port that is in use.
    if !packet.segment.is_bare() && !is_icmp(packet.protocol) && facts.is_node_flow(packet) {
        return Arrival::Drop(Reason::GuardSpoofed);
    }
    Arrival::Pass
}

#[inline(always)]
fn is_icmp(number: u8) -> bool {
    matches!(number, protocol::ICMP | protocol::ICMP_V6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Reason::{
        GuardAllowed, GuardClear, GuardEncapsulated, GuardIcmp, GuardInboundOther, GuardInboundTcp,
        GuardInboundUdp, GuardOther, GuardReply, GuardSpoofed, GuardTcp, GuardUdp, GuardUdpClear,
    };

    const fn v4(last: u8) -> Address {
        Address::from_v4_be(u32::from_ne_bytes([10, 77, 1, last]))
    }

    fn strict() -> Pod {
        Pod {
            v4: v4(2),
            slot: 3,
            mode: Mode::Strict as u32,
            flags: pod_flag::EGRESS_STRICT,
            ..Pod::default()
        }
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
        tunnel: bool,
        mesh: bool,
        node: bool,
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
        fn is_tunnel(&self) -> bool {
            self.tunnel
        }
        fn in_mesh(&self, _: &Address) -> bool {
            self.mesh
        }
        fn is_node(&self, _: &Address) -> bool {
            self.node
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
        fn is_answer(&self, _: &Pod, _: &Packet) -> bool {
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
        tunnel: false,
        mesh: true,
        node: false,
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
                let is_allowed =
                    matches!(allowed, Verdict::Clear(GuardAllowed) | Verdict::AskClear(GuardAllowed));
                assert!(is_allowed, "{allowed:?}");
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
                assert!(matches!(to(v4(9), OUTSIDE, hook), Verdict::Pass | Verdict::Ask));
                assert!(matches!(to(link_local, OUTSIDE, hook), Verdict::Drop(_)));
                assert!(matches!(to(multicast, OUTSIDE, hook), Verdict::Drop(_)));
            }
            let neighbour = Facts { to_neighbour: true, node: true, ..OUTSIDE };
            assert!(matches!(to(v4(9), neighbour, Hook::Link), Verdict::Drop(_)));
        }
    }

    #[test]
    fn of_the_agents_packets_only_tunnels_pass_a_link() {
        let agent = Facts { agent: true, tcp_socket: true, ..MESH };
        let egress = |facts, hook| decide_egress(&facts, &strict(), hook, &packet(protocol::TCP));
        assert_eq!(egress(agent, Hook::Socket), Verdict::Pass);
        assert_eq!(egress(agent, Hook::Link), Verdict::Drop(GuardTcp));
        assert_eq!(egress(Facts { tunnel: true, ..agent }, Hook::Link), Verdict::Pass);
        assert_eq!(egress(Facts { tunnel: true, ..MESH }, Hook::Link), Verdict::Drop(GuardTcp));
        let served = Packet { local_port: tcp_port::TUNNEL, ..packet(protocol::TCP) };
        assert_eq!(decide_egress(&agent, &strict(), Hook::Link, &served), Verdict::Pass);
        assert_eq!(decide_egress(&MESH, &strict(), Hook::Link, &served), Verdict::Drop(GuardTcp));
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
    fn tcp_segments_without_data_pass() {
        for segment in [Segment::Bare, Segment::SynAck] {
            let egress = |facts, hook| decide_egress(&facts, &strict(), hook, &tcp(segment));
            assert_eq!(egress(Facts { tcp_socket: true, ..MESH }, Hook::Socket), Verdict::Pass);
            assert_eq!(egress(Facts { tcp_socket: true, ..MESH }, Hook::Link), Verdict::Pass);
            // A raw socket can write data into header fields.
            assert_eq!(egress(MESH, Hook::Socket), Verdict::Drop(GuardTcp));
            assert_eq!(egress(MESH, Hook::Link), Verdict::Drop(GuardTcp));
            assert_eq!(egress(Facts { node_socket: true, ..MESH }, Hook::Link), Verdict::Pass);
            assert_eq!(decide_ingress(&MESH, &strict(), &tcp(segment)), Verdict::Pass);
        }
    }

    #[test]
    fn a_cookie_of_the_tunnel_listener_passes_the_link_without_a_socket() {
        let answer = Packet { local_port: tcp_port::TUNNEL, ..tcp(Segment::SynAck) };
        let cookie = Facts { cookie: true, ..MESH };
        let egress = |facts, hook, packet| decide_egress(&facts, &strict(), hook, &packet);
        assert_eq!(egress(cookie, Hook::Link, answer), Verdict::Pass);
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
        assert_eq!(egress(permissive), Verdict::Clear(GuardReply));
        assert_eq!(egress(Facts { accepted: None, ..permissive }), Verdict::Drop(GuardTcp));
        // The address of the node alone is no proof.
        assert_eq!(egress(Facts { node: true, ..accepted }), Verdict::Drop(GuardTcp));
        assert_eq!(egress(Facts { accepted: Some(Accepted::Node), ..MESH }), Verdict::Clear(GuardReply));
    }

    #[test]
    fn encapsulated_packets_of_a_strict_pod_go_nowhere() {
        let to = |protocol, remote_port| Packet { remote_port, ..packet(protocol) };
        for hook in HOOKS {
            for facts in [MESH, OUTSIDE, Facts { node: true, ..OUTSIDE }, Facts { allowed: true, ..OUTSIDE }]
            {
                for packet in [to(4, 0), to(41, 0), to(47, 0), to(17, 4789), to(17, 8472), to(17, 6081)] {
                    let verdict = decide_egress(&facts, &strict(), hook, &packet);
                    assert_eq!(verdict, Verdict::Drop(GuardEncapsulated), "{packet:?}");
                }
            }
            assert_eq!(decide_egress(&OUTSIDE, &open(), hook, &to(47, 0)), Verdict::Pass);
            assert_eq!(decide_egress(&OUTSIDE, &strict(), hook, &to(17, 53)), Verdict::Ask);
        }
    }

    #[test]
    fn udp_has_its_own_setting() {
        let pod = Pod { flags: pod_flag::EGRESS_STRICT | pod_flag::UDP_ALLOWED, ..strict() };
        let udp = packet(protocol::UDP);
        assert_eq!(decide_egress(&MESH, &pod, Hook::Link, &udp), Verdict::Clear(GuardUdpClear));
        assert_eq!(decide_ingress(&MESH, &pod, &udp), Verdict::Clear(GuardUdpClear));
        let tcp = packet(protocol::TCP);
        assert_eq!(decide_egress(&MESH, &pod, Hook::Link, &tcp), Verdict::Drop(GuardTcp));
    }

    #[test]
    fn an_open_pod_may_be_denied_udp() {
        let pod = Pod { flags: 0, ..open() };
        let udp = packet(protocol::UDP);
        assert_eq!(decide_egress(&MESH, &pod, Hook::Socket, &udp), Verdict::Drop(GuardUdp));
        assert_eq!(decide_ingress(&MESH, &pod, &udp), Verdict::Drop(GuardInboundUdp));
        assert_eq!(decide_egress(&Facts { node: true, ..MESH }, &pod, Hook::Socket, &udp), Verdict::Ask);
        assert_eq!(decide_ingress(&OUTSIDE, &pod, &udp), Verdict::Pass);
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
        let tunnel = Facts { agent: true, tunnel: true, ..MESH };
        assert_eq!(decide_egress(&tunnel, &strict(), Hook::Link, &spoofed), Verdict::Pass);
        let covered = Pod { v4: Address::NONE, ..open() };
        assert_eq!(decide_egress(&OUTSIDE, &covered, Hook::Link, &spoofed), Verdict::Pass);
    }

    #[test]
    fn a_pod_claims_its_own_addresses_only() {
        let own = Address([0xfe80_0000_u32.to_be(), 0, 0, 2_u32.to_be()]);
        let other = Address([0xfe80_0000_u32.to_be(), 0, 0, 9_u32.to_be()]);
        let link = Link { hardware: 0x0200_0000_0002, link_local: own, ..Link::default() };
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
        assert!(may_send_from(&strict(), &Link::default(), &other));
    }

    #[test]
    fn of_icmp_only_discovery_by_the_kernel_passes_the_link() {
        let icmp = packet(protocol::ICMP_V6);
        let kernels = Facts { node_socket: true, ..MESH };
        assert_eq!(decide_egress(&kernels, &strict(), Hook::Link, &icmp), Verdict::Drop(GuardIcmp));
        let discovery = Packet { is_discovery: true, ..icmp };
        assert_eq!(decide_egress(&kernels, &strict(), Hook::Link, &discovery), Verdict::Pass);
        assert_eq!(decide_egress(&MESH, &strict(), Hook::Link, &discovery), Verdict::Drop(GuardIcmp));
        assert_eq!(decide_egress(&kernels, &strict(), Hook::Socket, &discovery), Verdict::Drop(GuardIcmp));
        let to_node = Facts { node: true, ..MESH };
        assert_eq!(decide_egress(&to_node, &strict(), Hook::Socket, &icmp), Verdict::Ask);
    }

    #[test]
    fn plaintext_to_a_strict_port_is_dropped_wherever_it_comes_from() {
        for facts in [MESH, OUTSIDE] {
            let ingress = |facts, packet| decide_ingress(&facts, &strict(), &packet);
            assert_eq!(ingress(facts, tcp(Segment::Syn)), Verdict::Drop(GuardInboundTcp));
            assert_eq!(ingress(facts, packet(protocol::UDP)), Verdict::Drop(GuardInboundUdp));
            assert_eq!(ingress(facts, packet(SCTP)), Verdict::Drop(GuardInboundOther));
            assert_eq!(ingress(facts, packet(protocol::ICMP)), Verdict::Pass);
            assert_eq!(ingress(Facts { agent: true, ..facts }, tcp(Segment::Syn)), Verdict::Pass);
            assert_eq!(ingress(Facts { node_flow: true, ..facts }, tcp(Segment::Syn)), Verdict::Pass);
            let claims_node = Facts { node: true, ..facts };
            assert_eq!(ingress(claims_node, tcp(Segment::Syn)), Verdict::Drop(GuardInboundTcp));
            let accepted = Facts { accepted: Some(Accepted::Other), ..facts };
            assert_eq!(ingress(accepted, tcp(Segment::Data)), Verdict::Drop(GuardInboundTcp));
            let permissive = Facts { port_mode: Some(Mode::Permissive), ..facts };
            assert_eq!(ingress(permissive, tcp(Segment::Syn)), Verdict::Pass);
        }
        assert_eq!(decide_ingress(&MESH, &strict(), &tcp(Segment::Data)), Verdict::Drop(GuardInboundTcp));
        assert_eq!(decide_ingress(&OUTSIDE, &strict(), &tcp(Segment::Data)), Verdict::Pass);
    }

    #[test]
    fn only_answers_of_datagrams_that_the_pod_sent_arrive() {
        let table = [
            (OUTSIDE, Verdict::Drop(GuardInboundUdp)),
            (Facts { answer: true, ..OUTSIDE }, Verdict::Pass),
            (Facts { allowed: true, ..OUTSIDE }, Verdict::Drop(GuardInboundUdp)),
            (Facts { allowed: true, ..MESH }, Verdict::Drop(GuardInboundUdp)),
            (Facts { allowed: true, answer: true, ..MESH }, Verdict::Clear(GuardAllowed)),
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
        assert_eq!(ingress(Facts { node_flow: true, ..OUTSIDE }, Segment::Syn), Verdict::Pass);
        assert_eq!(ingress(OUTSIDE, Segment::Data), Verdict::Pass);
    }

    #[test]
    fn a_flow_is_the_nodes_for_a_minute() {
        let now = 5_000_000_000;
        for (sent, expected) in [(5, true), (6, false), (4, true), (0, true)] {
            assert_eq!(is_recent(sent, now), expected, "{sent}");
        }
        assert!(is_recent(5, now + 60_000_000_000) && !is_recent(5, now + 61_000_000_000));
    }

    #[test]
    fn data_to_a_connection_of_the_node_is_proven_each_time() {
        let accepted = Facts { accepted: Some(Accepted::Node), ..MESH };
        let ingress = |facts| decide_ingress(&facts, &strict(), &tcp(Segment::Data));
        assert_eq!(ingress(accepted), Verdict::Drop(GuardInboundTcp));
        assert_eq!(ingress(Facts { node_flow: true, ..accepted }), Verdict::Pass);
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
        let own = Packet { remote: v4(2), ..packet(protocol::UDP) };
        assert_eq!(arrives(sent, own), Arrival::Drop(GuardSpoofed));
    }
}

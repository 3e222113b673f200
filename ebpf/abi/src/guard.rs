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

use crate::{Address, Exception, ExceptionHook, Mode, NodeFlow, Pod, Reason, pod_flag, tcp_port};

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
        let (node, pod) = ((self.remote, self.remote_port as u32), (self.local, self.local_port as u32));
        NodeFlow::new(node, pod, self.protocol)
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

impl Hook {
    /// Returns the hook whose counters an exception counts in.
    #[inline(always)]
    #[must_use]
    pub const fn counted(self) -> ExceptionHook {
        match self {
            Self::Socket => ExceptionHook::Egress,
            Self::Link => ExceptionHook::Link,
        }
    }
}

/// Connection that the agent has marked. The pod can rewrite the agent's packets, but not its marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marked {
    /// A tunnel.
    Tunnel,
    /// Plaintext to a port whose mode is DISABLE.
    Disabled,
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
    /// Returns the mark of the packet's socket if an agent owns it, and the packet is to the end that the mark names.
    fn marked(&self) -> Option<Marked>;
    /// Returns true for addresses in the mesh's ranges.
    fn in_mesh(&self, address: &Address) -> bool;
    /// Returns true for the node's own addresses. Proves nothing about a packet's source.
    fn is_node(&self, address: &Address) -> bool;
    /// Returns true if the packet's other end is a service at an address of a node, which sends the packet on to a pod: a node
    /// port, or a port of a load balancer that the nodes serve themselves.
    fn is_node_service(&self, packet: &Packet) -> bool;
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
    /// Returns true for addresses that the pod may send from, see [`crate::may_send_from`]. Used on links only.
    fn may_send_from(&self, pod: &Pod, address: &Address) -> bool;
    /// Returns true if the frame is addressed to a neighbour on the pod's link and not to the node. Used on links only.
    fn is_to_neighbour(&self) -> bool;
    /// Returns true if the pod sent a datagram to the packet's other end from the packet's port a short time ago.
    fn is_answer(&self, packet: &Packet) -> bool;
    /// Returns true if the segment is a SYN cookie of the agent's tunnel listener in the pod, without a socket, and with the
    /// options only that the kernel writes. Used on links only.
    fn is_tunnel_cookie(&self, pod: &Pod, packet: &Packet) -> bool;
}

/// Verdict on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Passes without a count: it is the agent's, or of a pod that is not held.
    Pass,
    /// Passes as plaintext of a pod that may send it, and is counted.
    Clear(Reason),
    /// Passes by an exception, which is counted.
    Except(Exception),
    /// As [`Verdict::Except`]. The other end may answer, so the kernel side remembers the datagram.
    Ask(Exception),
    /// Dropped and counted.
    Drop(Reason),
}

/// Decides on a packet from `pod`.
#[inline(always)]
pub fn decide_egress(facts: &impl GuardFacts, pod: &Pod, hook: Hook, packet: &Packet) -> Verdict {
    let on_link = matches!(hook, Hook::Link);
    let is_strict = pod.has(pod_flag::EGRESS_STRICT);
    // A pod can rewrite the destination of what the agent sends in its namespace. The link sees the rewritten packet: it
    // lets the agent's marked connections pass to their own end, and treats the agent's other packets like the pod's.
    match (on_link, if on_link { facts.marked() } else { None }) {
        (true, Some(Marked::Disabled)) if is_strict && !pod.has(pod_flag::EXEMPT) => {
            return Verdict::Except(Exception::DisabledPort);
        }
        (true, Some(_)) => return Verdict::Pass,
        (false, _) if facts.is_agent() => return Verdict::Pass,
        _ => {}
    }
    if on_link && !facts.may_send_from(pod, &packet.local) {
        return Verdict::Drop(Reason::GuardSpoofed);
    }
    if pod.has(pod_flag::EXEMPT) {
        return Verdict::Pass;
    }
    let is_held = is_strict || is_denied_udp(pod, packet);
    if !on_link && pod.owns(&packet.remote) {
        return if is_held { Verdict::Except(Exception::OwnAddress) } else { Verdict::Pass };
    }
    if !is_held {
        let is_counted = !packet.segment.is_bare() && facts.in_mesh(&packet.remote);
        return if is_counted { Verdict::Clear(Reason::GuardClear) } else { Verdict::Pass };
    }
    if is_strict && is_encapsulation(packet) {
        return Verdict::Drop(Reason::GuardEncapsulated);
    }
    let is_neighbour = is_neighbour(&packet.remote) || (on_link && facts.is_to_neighbour());
    let is_service = facts.is_node_service(packet);
    if !is_neighbour && !is_service && !facts.in_mesh(&packet.remote) {
        return sent(packet, Exception::Outside);
    }
    match packet.protocol {
        // Resets that the kernel sends on its own belong to a socket of the node. Only the link hook sees them.
        protocol::TCP
            if packet.segment.is_bare() && (facts.is_tcp_socket() || (on_link && facts.is_node_socket())) =>
        {
            Verdict::Except(Exception::WithoutData)
        }
        // Under a SYN flood the kernel answers without a socket.
        protocol::TCP
            if on_link
                && matches!(packet.segment, Segment::SynAck)
                && packet.local_port == tcp_port::TUNNEL
                && facts.is_tunnel_cookie(pod, packet) =>
        {
            Verdict::Except(Exception::TunnelCookie)
        }
        protocol::TCP => decide_plaintext_tcp(facts, pod, hook, packet),
        protocol::UDP if pod.has(pod_flag::UDP_ALLOWED) => Verdict::Except(Exception::UdpAllowed),
        // Answers to the node's probes stay on this node. What goes to a service may be sent on to another node. A process of
        // the node may have a port of that range: answers go to the process, whose datagram the link has seen.
        protocol::UDP
            if !is_neighbour
                && facts.is_node(&packet.remote)
                && (!is_service || facts.is_node_flow(packet)) =>
        {
            Verdict::Ask(if is_service { Exception::NodeFlow } else { Exception::OwnNode })
        }
        protocol::ICMP | protocol::ICMP_V6 if !is_neighbour && facts.is_node(&packet.remote) => {
            Verdict::Except(Exception::OwnNode)
        }
        // ICMP errors and echo replies repeat the packet they answer. A pod can spoof one to itself, and so send data in
        // another address' name. Of the kernel's own ICMP only discovery passes.
        protocol::ICMP_V6 if packet.is_discovery && on_link && facts.is_node_socket() => {
            Verdict::Except(Exception::Discovery)
        }
        protocol::UDP => allowed_or(facts, packet, Reason::GuardUdp),
        protocol::ICMP | protocol::ICMP_V6 => allowed_or(facts, packet, Reason::GuardIcmp),
        _ => allowed_or(facts, packet, Reason::GuardOther),
    }
}

/// Decides on TCP of a held pod that may carry data into the mesh.
#[inline(always)]
fn decide_plaintext_tcp(facts: &impl GuardFacts, pod: &Pod, hook: Hook, packet: &Packet) -> Verdict {
    match facts.accepted() {
        Some(Accepted::Node) => return Verdict::Except(Exception::NodeFlow),
        // The mode may have changed since the connection was accepted.
        Some(Accepted::Other) if accepts_plaintext(facts, pod, packet.local_port) => {
            return Verdict::Except(Exception::PlaintextPort);
        }
        _ => {}
    }
    if matches!(hook, Hook::Socket) && is_of_nodes_address(facts, pod, packet) {
        return Verdict::Except(Exception::NodeAddress);
    }
    allowed_or(facts, packet, Reason::GuardTcp)
}

/// Returns the verdict on what only `allowClear` lets pass.
#[inline(always)]
fn allowed_or(facts: &impl GuardFacts, packet: &Packet, refused: Reason) -> Verdict {
    if facts.is_allowed_clear(&packet.remote, packet.remote_port, packet.protocol) {
        sent(packet, Exception::AllowClear)
    } else {
        Verdict::Drop(refused)
    }
}

/// Returns the verdict on a packet that passes by `exception` and may be answered.
#[inline(always)]
fn sent(packet: &Packet, exception: Exception) -> Verdict {
    if has_no_connections(packet) { Verdict::Ask(exception) } else { Verdict::Except(exception) }
}

/// Returns true for UDP of a pod with `udp: deny`.
#[inline(always)]
fn is_denied_udp(pod: &Pod, packet: &Packet) -> bool {
    packet.protocol == protocol::UDP && !pod.has(pod_flag::UDP_ALLOWED)
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

/// Returns true for TCP of a pod with the node's network that no source has named yet. The connect hook refuses such connections
/// from any other namespace. A pod that translates addresses in its own namespace can send segments in the node's name after that
/// hook, as it can by packet sockets (L14), but only the node receives the answers. Datagrams are not included: over IPv6 a process
/// may send them from any address.
#[inline(always)]
fn is_of_nodes_address(facts: &impl GuardFacts, pod: &Pod, packet: &Packet) -> bool {
    pod.has(pod_flag::UNKNOWN) && facts.is_tcp_socket() && facts.is_node(&packet.local)
}

#[inline(always)]
fn accepts_plaintext(facts: &impl GuardFacts, pod: &Pod, port: u16) -> bool {
    let mode = facts.port_mode(pod.slot, port).unwrap_or(pod.mode);
    !matches!(Mode::from_raw(mode), Mode::Strict)
}

/// Decides on a packet to a socket of `pod`.
#[inline(always)]
pub fn decide_ingress(facts: &impl GuardFacts, pod: &Pod, packet: &Packet) -> Verdict {
    if pod.has(pod_flag::EXEMPT) || facts.is_agent() {
        return Verdict::Pass;
    }
    let is_held = is_strict(pod) || is_denied_udp(pod, packet);
    // The pod's own addresses are a nested namespace's way out. Frames from elsewhere that claim them do not arrive.
    if pod.owns(&packet.remote) {
        return held(is_held, Exception::OwnAddress);
    }
    // Most packets come from other addresses, for which no flow is hashed. An address that is no longer the node's proves
    // nothing.
    if facts.is_node(&packet.remote) && facts.is_node_flow(packet) {
        return held(is_held, Exception::NodeFlow);
    }
    // A pod with the node's network, such as a control plane, may serve the source that is to name it. Other pods are not
    // reached at these addresses.
    if pod.has(pod_flag::UNKNOWN) && facts.is_node(&packet.local) {
        return Verdict::Except(Exception::NodeAddress);
    }
    match packet.protocol {
        // Inbound ICMP carries no data of the pod, and applications need the errors.
        protocol::ICMP | protocol::ICMP_V6 => held(is_held, Exception::InboundIcmp),
        protocol::TCP => decide_ingress_tcp(facts, pod, packet),
        protocol::UDP => decide_ingress_udp(facts, pod, packet),
        _ if !is_held => Verdict::Pass,
        _ => answer_or(facts, packet, Reason::GuardInboundOther),
    }
}

/// Connections reach an application's socket past the steering program where the pod has an address that the program does
/// not know, and where the program is not attached yet. So every SYN is judged here too.
#[inline(always)]
fn decide_ingress_tcp(facts: &impl GuardFacts, pod: &Pod, packet: &Packet) -> Verdict {
    if packet.segment.is_bare() {
        return held(is_strict(pod), Exception::WithoutData);
    }
    let is_opening = matches!(packet.segment, Segment::Syn);
    if accepts_plaintext(facts, pod, packet.local_port) {
        // The agent decides on connections to a pod that authorization policies select, and ends those that were open.
        let is_undecided = is_opening && pod.has(pod_flag::JUDGED);
        return if is_undecided {
            Verdict::Drop(Reason::GuardInboundTcp)
        } else {
            held(is_strict(pod), Exception::PlaintextPort)
        };
    }
    if is_opening {
        return Verdict::Drop(Reason::GuardInboundTcp);
    }
    match facts.accepted() {
        // Packets of the node are proven on the link, each of them.
        Some(_) => Verdict::Drop(Reason::GuardInboundTcp),
        // The pod opened this connection.
        None if !facts.in_mesh(&packet.remote) && !is_neighbour(&packet.remote) => {
            Verdict::Except(Exception::Outside)
        }
        None if facts.is_allowed_clear(&packet.remote, packet.remote_port, packet.protocol) => {
            Verdict::Except(Exception::AllowClear)
        }
        None if !pod.has(pod_flag::EGRESS_STRICT) => Verdict::Except(Exception::OpenSender),
        None => Verdict::Drop(Reason::GuardInboundTcp),
    }
}

#[inline(always)]
fn decide_ingress_udp(facts: &impl GuardFacts, pod: &Pod, packet: &Packet) -> Verdict {
    if pod.has(pod_flag::UDP_ALLOWED) {
        return held(is_strict(pod), Exception::UdpAllowed);
    }
    // `udp: deny` of an open pod concerns the mesh only.
    if !is_strict(pod) && !facts.in_mesh(&packet.remote) && !is_neighbour(&packet.remote) {
        return Verdict::Except(Exception::Outside);
    }
    answer_or(facts, packet, Reason::GuardInboundUdp)
}

/// Returns the verdict on what only arrives as an answer to what the pod sent.
#[inline(always)]
fn answer_or(facts: &impl GuardFacts, packet: &Packet, refused: Reason) -> Verdict {
    if !facts.is_answer(packet) {
        return Verdict::Drop(refused);
    }
    let is_allowed = facts.is_allowed_clear(&packet.remote, packet.remote_port, packet.protocol);
    Verdict::Except(if is_allowed { Exception::AllowClear } else { Exception::Answer })
}

/// Returns the verdict on a packet that passes, by `exception` if its pod is held.
#[inline(always)]
fn held(is_held: bool, exception: Exception) -> Verdict {
    if is_held { Verdict::Except(exception) } else { Verdict::Pass }
}

#[inline(always)]
fn is_strict(pod: &Pod) -> bool {
    matches!(Mode::from_raw(pod.mode), Mode::Strict)
}

#[cfg(test)]
mod tests;

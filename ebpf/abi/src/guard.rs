//! Decisions of the guard on packets. The guard sees every packet of a pod, including those of raw and packet sockets,
//! which the connect hooks do not see.
//!
//! ```text
//! egress   cgroup_skb at the pods' cgroup     every socket of a pod's process, in any network namespace
//! link     tcx or clsact, host end of a link  every frame that leaves the pod: packet sockets, nested namespaces,
//!                                             processes that left the pod's cgroup
//! ingress  cgroup_skb at the pods' cgroup     every packet that reaches a socket of a pod
//! ```
//! These functions decide only on packets between a pod and a mesh address. Loopback traffic does not get here.
//! The guard identifies the agent's sockets by cgroup, which pods cannot join, and not by port, mark or address.

use crate::{Address, Mode, Pod, Reason, pod_flag};

/// IP protocol numbers.
pub mod protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMP_V6: u8 = 58;
    /// Not known: the chain of extension headers is too long.
    pub const UNKNOWN: u8 = 255;
}

/// A packet between a pod and a mesh address.
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
    /// False only for a TCP segment that neither opens a connection (SYN without ACK) nor carries data.
    /// The kernel's TCP writes no application bytes into such a segment, and connections need them to end in order.
    pub is_syn_or_data: bool,
    /// True for IPv6 neighbour and router discovery.
    pub is_discovery: bool,
}

/// Hook at which the guard sees a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// cgroup_skb, at the packet's socket.
    Socket,
    /// tcx or clsact, on the host end of the pod's link.
    Link,
}

/// Facts that the guard can look up.
pub trait GuardFacts {
    /// Returns true if an agent owns the packet's socket.
    fn is_agent(&self) -> bool;
    /// Returns true for the node's own addresses.
    fn is_node(&self, remote: &Address) -> bool;
    /// Returns true if an application accepted the packet's connection as plaintext, as its port's mode allowed.
    fn is_accepted_clear(&self) -> bool;
    /// Returns the mode of a port that has its own.
    fn port_mode(&self, slot: u32, port: u16) -> Option<u32>;
    /// Returns true for destinations of `allowClear`.
    fn is_allowed_clear(&self, remote: &Address, port: u16, protocol: u8) -> bool;
    /// Returns true if the packet's socket belongs to the kernel or the node, and not to a pod. Used on links only.
    fn is_node_socket(&self) -> bool;
    /// Returns true for a TCP socket, whose headers the kernel wrote. The owner of a raw or packet socket writes its own.
    fn is_tcp_socket(&self) -> bool;
}

/// Verdict on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Passes without a count.
    Pass,
    /// Passes as plaintext and is counted.
    Clear(Reason),
    /// Dropped and counted.
    Drop(Reason),
}

/// Decides on a packet from `pod` to a mesh address.
#[inline(always)]
pub fn decide_egress(facts: &impl GuardFacts, pod: &Pod, hook: Hook, packet: &Packet) -> Verdict {
    if pod.has(pod_flag::EXEMPT) || facts.is_agent() || pod.owns(&packet.remote) {
        return Verdict::Pass;
    }
    let is_denied_udp = packet.protocol == protocol::UDP && !pod.has(pod_flag::UDP_ALLOWED);
    if !pod.has(pod_flag::EGRESS_STRICT) && !is_denied_udp {
        return if packet.is_syn_or_data { Verdict::Clear(Reason::GuardClear) } else { Verdict::Pass };
    }
    if matches!(hook, Hook::Link) && !is_source(pod, &packet.local) {
        return Verdict::Drop(Reason::GuardSpoofed);
    }
    match packet.protocol {
        // Resets that the kernel sends on its own belong to a socket of the node. Only the link hook sees them.
        protocol::TCP
            if !packet.is_syn_or_data
                && (facts.is_tcp_socket() || (matches!(hook, Hook::Link) && facts.is_node_socket())) =>
        {
            Verdict::Pass
        }
        protocol::TCP if is_reply(facts, pod, packet) => Verdict::Clear(Reason::GuardReply),
        protocol::UDP if pod.has(pod_flag::UDP_ALLOWED) => Verdict::Clear(Reason::GuardUdpClear),
        // Answers to the node's probes stay on this node.
        protocol::UDP if facts.is_node(&packet.remote) => Verdict::Pass,
        protocol::ICMP | protocol::ICMP_V6 if facts.is_node(&packet.remote) => Verdict::Pass,
        // ICMP errors and echo replies repeat the packet they answer. A pod can spoof one to itself, and so send data in
        // another address' name. Of the kernel's own ICMP only discovery passes.
        protocol::ICMP_V6 if packet.is_discovery && matches!(hook, Hook::Link) && facts.is_node_socket() => {
            Verdict::Pass
        }
        _ if facts.is_allowed_clear(&packet.remote, packet.remote_port, packet.protocol) => {
            Verdict::Clear(Reason::GuardAllowed)
        }
        protocol::TCP => Verdict::Drop(Reason::GuardTcp),
        protocol::UDP => Verdict::Drop(Reason::GuardUdp),
        protocol::ICMP | protocol::ICMP_V6 => Verdict::Drop(Reason::GuardIcmp),
        _ => Verdict::Drop(Reason::GuardOther),
    }
}

/// Returns true for the pod's addresses, and for link-local and unspecified ones, which neighbour discovery uses.
#[inline(always)]
fn is_source(pod: &Pod, local: &Address) -> bool {
    pod.owns(local) || local.is_none() || local.is_link_local()
}

/// Returns true for a packet of a connection that was accepted as plaintext and that the mode still allows.
#[inline(always)]
fn is_reply(facts: &impl GuardFacts, pod: &Pod, packet: &Packet) -> bool {
    facts.is_accepted_clear()
        && (accepts_plaintext(facts, pod, packet.local_port) || facts.is_node(&packet.remote))
}

#[inline(always)]
fn accepts_plaintext(facts: &impl GuardFacts, pod: &Pod, port: u16) -> bool {
    let mode = facts.port_mode(pod.slot, port).unwrap_or(pod.mode);
    !matches!(Mode::from_raw(mode), Mode::Strict)
}

/// Decides on a packet from a mesh address to a socket of `pod`.
#[inline(always)]
pub fn decide_ingress(facts: &impl GuardFacts, pod: &Pod, packet: &Packet) -> Verdict {
    if pod.has(pod_flag::EXEMPT)
        || facts.is_agent()
        || pod.owns(&packet.remote)
        || facts.is_node(&packet.remote)
        || (packet.protocol != protocol::UDP && accepts_plaintext(facts, pod, packet.local_port))
    {
        return Verdict::Pass;
    }
    match packet.protocol {
        protocol::TCP if !packet.is_syn_or_data => Verdict::Pass,
        protocol::UDP if pod.has(pod_flag::UDP_ALLOWED) => match Mode::from_raw(pod.mode) {
            Mode::Strict => Verdict::Clear(Reason::GuardUdpClear),
            Mode::Permissive | Mode::Disable => Verdict::Pass,
        },
        // Inbound ICMP carries no data of the pod, and applications need the errors.
        protocol::ICMP | protocol::ICMP_V6 => Verdict::Pass,
        _ if facts.is_allowed_clear(&packet.remote, packet.remote_port, packet.protocol) => {
            Verdict::Clear(Reason::GuardAllowed)
        }
        // The pod may send plaintext, so the packet can belong to a connection that the pod opened.
        protocol::TCP if !pod.has(pod_flag::EGRESS_STRICT) && !facts.is_accepted_clear() => {
            Verdict::Clear(Reason::GuardClear)
        }
        protocol::TCP => Verdict::Drop(Reason::GuardInboundTcp),
        protocol::UDP => Verdict::Drop(Reason::GuardInboundUdp),
        _ => Verdict::Drop(Reason::GuardInboundOther),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Reason::{
        GuardAllowed, GuardClear, GuardIcmp, GuardInboundOther, GuardInboundTcp, GuardInboundUdp, GuardOther,
        GuardReply, GuardSpoofed, GuardTcp, GuardUdp, GuardUdpClear,
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
            is_syn_or_data: true,
            is_discovery: false,
        }
    }

    #[derive(Clone, Copy, Default)]
    struct Facts {
        agent: bool,
        node: bool,
        accepted: bool,
        port_mode: Option<Mode>,
        clear: bool,
        node_socket: bool,
        tcp_socket: bool,
    }

    impl GuardFacts for Facts {
        fn is_agent(&self) -> bool {
            self.agent
        }
        fn is_node(&self, _: &Address) -> bool {
            self.node
        }
        fn is_accepted_clear(&self) -> bool {
            self.accepted
        }
        fn port_mode(&self, slot: u32, _: u16) -> Option<u32> {
            assert_eq!(slot, 3);
            self.port_mode.map(|mode| mode as u32)
        }
        fn is_allowed_clear(&self, _: &Address, _: u16, _: u8) -> bool {
            self.clear
        }
        fn is_node_socket(&self) -> bool {
            self.node_socket
        }
        fn is_tcp_socket(&self) -> bool {
            self.tcp_socket
        }
    }

    const NONE: Facts = Facts {
        agent: false,
        node: false,
        accepted: false,
        port_mode: None,
        clear: false,
        node_socket: false,
        tcp_socket: false,
    };
    const SCTP: u8 = 132;

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
            for hook in [Hook::Socket, Hook::Link] {
                let egress = |facts, pod| decide_egress(&facts, &pod, hook, &packet(number));
                assert_eq!(egress(NONE, strict()), Verdict::Drop(reason));
                assert_eq!(egress(Facts { clear: true, ..NONE }, strict()), Verdict::Clear(GuardAllowed));
                assert_eq!(egress(Facts { agent: true, ..NONE }, strict()), Verdict::Pass);
                assert_eq!(egress(NONE, open()), Verdict::Clear(GuardClear));
                assert_eq!(egress(NONE, Pod { flags: pod_flag::EXEMPT, ..strict() }), Verdict::Pass);
            }
        }
    }

    #[test]
    fn a_pod_without_an_entry_is_treated_as_strict() {
        for number in [protocol::TCP, protocol::UDP, SCTP] {
            let verdict = decide_egress(&NONE, &Pod::unknown(), Hook::Socket, &packet(number));
            assert!(matches!(verdict, Verdict::Drop(_)), "{verdict:?}");
        }
    }

    #[test]
    fn tcp_segments_without_data_pass() {
        let empty = Packet { is_syn_or_data: false, ..packet(protocol::TCP) };
        let egress = |facts, hook| decide_egress(&facts, &strict(), hook, &empty);
        assert_eq!(egress(Facts { tcp_socket: true, ..NONE }, Hook::Socket), Verdict::Pass);
        assert_eq!(egress(Facts { tcp_socket: true, ..NONE }, Hook::Link), Verdict::Pass);
        // A raw socket can write data into header fields.
        assert_eq!(egress(NONE, Hook::Socket), Verdict::Drop(GuardTcp));
        assert_eq!(egress(NONE, Hook::Link), Verdict::Drop(GuardTcp));
        assert_eq!(egress(Facts { node_socket: true, ..NONE }, Hook::Link), Verdict::Pass);
        assert_eq!(decide_ingress(&NONE, &strict(), &empty), Verdict::Pass);
    }

    #[test]
    fn replies_pass_as_long_as_their_port_takes_plaintext() {
        let accepted = Facts { accepted: true, ..NONE };
        let egress = |facts: Facts| decide_egress(&facts, &strict(), Hook::Socket, &packet(protocol::TCP));
        assert_eq!(egress(accepted), Verdict::Drop(GuardTcp));
        let permissive = Facts { port_mode: Some(Mode::Permissive), ..accepted };
        assert_eq!(egress(permissive), Verdict::Clear(GuardReply));
        assert_eq!(egress(Facts { accepted: false, ..permissive }), Verdict::Drop(GuardTcp));
        assert_eq!(egress(Facts { node: true, ..accepted }), Verdict::Clear(GuardReply));
        assert_eq!(egress(Facts { node: true, ..NONE }), Verdict::Drop(GuardTcp));
    }

    #[test]
    fn udp_has_its_own_setting() {
        let pod = Pod { flags: pod_flag::EGRESS_STRICT | pod_flag::UDP_ALLOWED, ..strict() };
        let udp = packet(protocol::UDP);
        assert_eq!(decide_egress(&NONE, &pod, Hook::Link, &udp), Verdict::Clear(GuardUdpClear));
        assert_eq!(decide_ingress(&NONE, &pod, &udp), Verdict::Clear(GuardUdpClear));
        let tcp = packet(protocol::TCP);
        assert_eq!(decide_egress(&NONE, &pod, Hook::Link, &tcp), Verdict::Drop(GuardTcp));
    }

    #[test]
    fn an_open_pod_may_be_denied_udp() {
        let pod = Pod { flags: 0, ..open() };
        let udp = packet(protocol::UDP);
        assert_eq!(decide_egress(&NONE, &pod, Hook::Socket, &udp), Verdict::Drop(GuardUdp));
        assert_eq!(decide_ingress(&NONE, &pod, &udp), Verdict::Drop(GuardInboundUdp));
        assert_eq!(decide_egress(&Facts { node: true, ..NONE }, &pod, Hook::Socket, &udp), Verdict::Pass);
    }

    #[test]
    fn a_link_carries_the_pods_own_addresses_only() {
        let spoofed = Packet { local: v4(7), ..packet(protocol::UDP) };
        let egress = |facts: Facts, hook| decide_egress(&facts, &strict(), hook, &spoofed);
        assert_eq!(egress(NONE, Hook::Link), Verdict::Drop(GuardSpoofed));
        assert_eq!(egress(Facts { clear: true, ..NONE }, Hook::Link), Verdict::Drop(GuardSpoofed));
        assert_eq!(egress(Facts { agent: true, ..NONE }, Hook::Link), Verdict::Pass);
    }

    #[test]
    fn of_icmp_only_discovery_by_the_kernel_passes_the_link() {
        let icmp = packet(protocol::ICMP_V6);
        let kernels = Facts { node_socket: true, ..NONE };
        assert_eq!(decide_egress(&kernels, &strict(), Hook::Link, &icmp), Verdict::Drop(GuardIcmp));
        let discovery = Packet { is_discovery: true, ..icmp };
        assert_eq!(decide_egress(&kernels, &strict(), Hook::Link, &discovery), Verdict::Pass);
        assert_eq!(decide_egress(&NONE, &strict(), Hook::Link, &discovery), Verdict::Drop(GuardIcmp));
        assert_eq!(decide_egress(&kernels, &strict(), Hook::Socket, &discovery), Verdict::Drop(GuardIcmp));
        let node = Facts { node: true, ..NONE };
        assert_eq!(decide_egress(&node, &strict(), Hook::Socket, &icmp), Verdict::Pass);
        let udp = packet(protocol::UDP);
        assert_eq!(decide_egress(&kernels, &strict(), Hook::Link, &udp), Verdict::Drop(GuardUdp));
    }

    #[test]
    fn a_strict_pod_receives_no_plaintext() {
        let table = [
            (protocol::TCP, Verdict::Drop(GuardInboundTcp)),
            (protocol::UDP, Verdict::Drop(GuardInboundUdp)),
            (SCTP, Verdict::Drop(GuardInboundOther)),
            (protocol::ICMP, Verdict::Pass),
        ];
        for (number, expected) in table {
            assert_eq!(decide_ingress(&NONE, &strict(), &packet(number)), expected);
            assert_eq!(
                decide_ingress(&Facts { node: true, ..NONE }, &strict(), &packet(number)),
                Verdict::Pass
            );
            assert_eq!(decide_ingress(&NONE, &open(), &packet(number)), Verdict::Pass);
        }
    }

    #[test]
    fn an_unknown_mode_is_read_as_strict() {
        let pod = Pod { mode: 99, ..strict() };
        let verdict = decide_ingress(&NONE, &pod, &packet(protocol::TCP));
        assert_eq!(verdict, Verdict::Drop(GuardInboundTcp));
    }
}

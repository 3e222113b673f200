//! What the guard decides on a packet. It sees every packet of a pod, whatever made it; the connect hooks see only what
//! asks to connect.
//!
//! ```text
//! egress   cgroup_skb at the pods' cgroup     every socket of a pod's process, in whatever network namespace
//! link     tcx or clsact, host end of a link  every frame that leaves the pod: packet sockets, nested namespaces,
//!                                             processes that left the pod's cgroup
//! ingress  cgroup_skb at the pods' cgroup     what reaches a socket of a pod
//! ```
//! Only packets to and from mesh addresses come here; loopback and the pod's own addresses do not. The agent's sockets
//! are told by their cgroup, which no pod can enter: not by port, mark or address, which every pod can forge.

use crate::{Address, Mode, Pod, Reason, pod_flag};

/// Numbers of IP protocols.
pub mod protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMP_V6: u8 = 58;
    /// None: a part of a packet without the head, or a chain of headers that is too long.
    pub const UNKNOWN: u8 = 255;
}

/// A packet between a pod and a mesh address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The pod's end.
    pub local: Address,
    /// The other end.
    pub remote: Address,
    /// One of [`protocol`], or any other number.
    pub protocol: u8,
    /// The pod's port; 0 where there is none.
    pub local_port: u16,
    /// The other port; 0 where there is none.
    pub remote_port: u16,
    /// TCP only: it opens a connection (SYN without ACK) or carries data. The rest (ACK, FIN, RST) carries nothing
    /// that an application wrote when the kernel's TCP made it, and ends connections in good order.
    pub matters: bool,
    /// Neighbour or router discovery of IPv6.
    pub is_discovery: bool,
}

/// Where a packet of a pod is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// At its socket.
    Socket,
    /// On the pod's link.
    Link,
}

/// What the guard can look up.
pub trait GuardFacts {
    /// Does the agent own the packet's socket?
    fn is_agent(&self) -> bool;
    /// Is it one of the node's own addresses?
    fn is_node(&self, remote: &Address) -> bool;
    /// Did an application accept the packet's connection in clear, with its mode's consent?
    fn is_accepted_clear(&self) -> bool;
    /// The mode of one port, when it has its own.
    fn port_mode(&self, slot: u32, port: u16) -> Option<u32>;
    /// May this end be reached in clear, as the operator said?
    fn is_allowed_clear(&self, remote: &Address, port: u16, protocol: u8) -> bool;
    /// Is the packet's socket one of the kernel itself or of the node, not of any pod? Asked on links only.
    fn is_of_node(&self) -> bool;
    /// Is the packet's socket one of TCP, so that the kernel made its headers? A raw or packet socket's owner did.
    fn is_of_tcp(&self) -> bool;
}

/// Verdict on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Passes; nothing to count.
    Pass,
    /// Passes in clear, and is counted.
    Clear(Reason),
    /// Dropped and counted.
    Drop(Reason),
}

/// Decides on a packet from `pod` to a mesh address.
#[inline(always)]
pub fn decide_egress(facts: &impl GuardFacts, pod: &Pod, seen: Seen, packet: &Packet) -> Verdict {
    if pod.has(pod_flag::EXEMPT) || facts.is_agent() || pod.owns(&packet.remote) {
        return Verdict::Pass;
    }
    let is_denied_udp = packet.protocol == protocol::UDP && !pod.has(pod_flag::UDP_ALLOWED);
    if !pod.has(pod_flag::EGRESS_STRICT) && !is_denied_udp {
        return if packet.matters { Verdict::Clear(Reason::GuardClear) } else { Verdict::Pass };
    }
    if matches!(seen, Seen::Link) && !is_source(pod, &packet.local) {
        return Verdict::Drop(Reason::GuardSpoofed);
    }
    match packet.protocol {
        // The kernel's own resets have a socket of the node's, and are seen on links only.
        protocol::TCP
            if !packet.matters
                && (facts.is_of_tcp() || (matches!(seen, Seen::Link) && facts.is_of_node())) =>
        {
            Verdict::Pass
        }
        protocol::TCP if is_reply(facts, pod, packet) => Verdict::Clear(Reason::GuardReply),
        protocol::UDP if pod.has(pod_flag::UDP_ALLOWED) => Verdict::Clear(Reason::GuardUdpClear),
        // A probe's answer: it goes no further than this node.
        protocol::UDP if facts.is_node(&packet.remote) => Verdict::Pass,
        protocol::ICMP | protocol::ICMP_V6 if facts.is_node(&packet.remote) => Verdict::Pass,
        // Of what the kernel says by itself, only this: in errors and echo replies it repeats what it was sent, and a
        // pod can send itself a request in another's name.
        protocol::ICMP_V6 if packet.is_discovery && matches!(seen, Seen::Link) && facts.is_of_node() => {
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

/// Does the pod send from this address? Link-local and unspecified ones are those of neighbour discovery.
#[inline(always)]
fn is_source(pod: &Pod, local: &Address) -> bool {
    pod.owns(local) || local.is_none() || local.is_link_local()
}

/// A packet of a connection that came in clear, and may still.
#[inline(always)]
fn is_reply(facts: &impl GuardFacts, pod: &Pod, packet: &Packet) -> bool {
    facts.is_accepted_clear() && (takes_clear(facts, pod, packet.local_port) || facts.is_node(&packet.remote))
}

#[inline(always)]
fn takes_clear(facts: &impl GuardFacts, pod: &Pod, port: u16) -> bool {
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
        || (packet.protocol != protocol::UDP && takes_clear(facts, pod, packet.local_port))
    {
        return Verdict::Pass;
    }
    match packet.protocol {
        protocol::TCP if !packet.matters => Verdict::Pass,
        protocol::UDP if pod.has(pod_flag::UDP_ALLOWED) => match Mode::from_raw(pod.mode) {
            Mode::Strict => Verdict::Clear(Reason::GuardUdpClear),
            Mode::Permissive | Mode::Disable => Verdict::Pass,
        },
        // Nothing of the pod's is in it, and errors are needed.
        protocol::ICMP | protocol::ICMP_V6 => Verdict::Pass,
        _ if facts.is_allowed_clear(&packet.remote, packet.remote_port, packet.protocol) => {
            Verdict::Clear(Reason::GuardAllowed)
        }
        // The pod asked this end in clear while that was allowed; what it may not say any more, it may still hear.
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
            matters: true,
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
        of_node: bool,
        of_tcp: bool,
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
        fn is_of_node(&self) -> bool {
            self.of_node
        }
        fn is_of_tcp(&self) -> bool {
            self.of_tcp
        }
    }

    const NONE: Facts = Facts {
        agent: false,
        node: false,
        accepted: false,
        port_mode: None,
        clear: false,
        of_node: false,
        of_tcp: false,
    };
    const SCTP: u8 = 132;

    #[test]
    fn a_strict_pods_sockets_send_nothing_in_clear() {
        let table = [
            (protocol::TCP, GuardTcp),
            (protocol::UDP, GuardUdp),
            (protocol::ICMP, GuardIcmp),
            (protocol::ICMP_V6, GuardIcmp),
            (SCTP, GuardOther),
            (protocol::UNKNOWN, GuardOther),
        ];
        for (number, reason) in table {
            for seen in [Seen::Socket, Seen::Link] {
                let egress = |facts, pod| decide_egress(&facts, &pod, seen, &packet(number));
                assert_eq!(egress(NONE, strict()), Verdict::Drop(reason));
                assert_eq!(egress(Facts { clear: true, ..NONE }, strict()), Verdict::Clear(GuardAllowed));
                assert_eq!(egress(Facts { agent: true, ..NONE }, strict()), Verdict::Pass);
                assert_eq!(egress(NONE, open()), Verdict::Clear(GuardClear));
                assert_eq!(egress(NONE, Pod { flags: pod_flag::EXEMPT, ..strict() }), Verdict::Pass);
            }
        }
    }

    #[test]
    fn a_pod_that_nobody_told_of_is_strict_in_all() {
        for number in [protocol::TCP, protocol::UDP, SCTP] {
            let verdict = decide_egress(&NONE, &Pod::unknown(), Seen::Socket, &packet(number));
            assert!(matches!(verdict, Verdict::Drop(_)), "{verdict:?}");
        }
    }

    #[test]
    fn only_what_an_application_wrote_matters_in_tcp() {
        let empty = Packet { matters: false, ..packet(protocol::TCP) };
        let egress = |facts, seen| decide_egress(&facts, &strict(), seen, &empty);
        assert_eq!(egress(Facts { of_tcp: true, ..NONE }, Seen::Socket), Verdict::Pass);
        assert_eq!(egress(Facts { of_tcp: true, ..NONE }, Seen::Link), Verdict::Pass);
        // Headers have room for a text too.
        assert_eq!(egress(NONE, Seen::Socket), Verdict::Drop(GuardTcp));
        assert_eq!(egress(NONE, Seen::Link), Verdict::Drop(GuardTcp));
        assert_eq!(egress(Facts { of_node: true, ..NONE }, Seen::Link), Verdict::Pass);
        assert_eq!(decide_ingress(&NONE, &strict(), &empty), Verdict::Pass);
    }

    #[test]
    fn replies_pass_as_long_as_their_port_takes_plaintext() {
        let accepted = Facts { accepted: true, ..NONE };
        let egress = |facts: Facts| decide_egress(&facts, &strict(), Seen::Socket, &packet(protocol::TCP));
        assert_eq!(egress(accepted), Verdict::Drop(GuardTcp));
        let permissive = Facts { port_mode: Some(Mode::Permissive), ..accepted };
        assert_eq!(egress(permissive), Verdict::Clear(GuardReply));
        assert_eq!(egress(Facts { accepted: false, ..permissive }), Verdict::Drop(GuardTcp));
        assert_eq!(egress(Facts { node: true, ..accepted }), Verdict::Clear(GuardReply));
        assert_eq!(egress(Facts { node: true, ..NONE }), Verdict::Drop(GuardTcp));
    }

    #[test]
    fn udp_is_a_choice_of_its_own() {
        let pod = Pod { flags: pod_flag::EGRESS_STRICT | pod_flag::UDP_ALLOWED, ..strict() };
        let udp = packet(protocol::UDP);
        assert_eq!(decide_egress(&NONE, &pod, Seen::Link, &udp), Verdict::Clear(GuardUdpClear));
        assert_eq!(decide_ingress(&NONE, &pod, &udp), Verdict::Clear(GuardUdpClear));
        let tcp = packet(protocol::TCP);
        assert_eq!(decide_egress(&NONE, &pod, Seen::Link, &tcp), Verdict::Drop(GuardTcp));
    }

    #[test]
    fn an_open_pod_may_be_denied_udp() {
        let pod = Pod { flags: 0, ..open() };
        let udp = packet(protocol::UDP);
        assert_eq!(decide_egress(&NONE, &pod, Seen::Socket, &udp), Verdict::Drop(GuardUdp));
        assert_eq!(decide_ingress(&NONE, &pod, &udp), Verdict::Drop(GuardInboundUdp));
        assert_eq!(decide_egress(&Facts { node: true, ..NONE }, &pod, Seen::Socket, &udp), Verdict::Pass);
    }

    #[test]
    fn a_link_carries_the_pods_own_addresses_only() {
        let spoofed = Packet { local: v4(7), ..packet(protocol::UDP) };
        let egress = |facts: Facts, seen| decide_egress(&facts, &strict(), seen, &spoofed);
        assert_eq!(egress(NONE, Seen::Link), Verdict::Drop(GuardSpoofed));
        assert_eq!(egress(Facts { clear: true, ..NONE }, Seen::Link), Verdict::Drop(GuardSpoofed));
        assert_eq!(egress(Facts { agent: true, ..NONE }, Seen::Link), Verdict::Pass);
    }

    #[test]
    fn of_icmp_only_discovery_by_the_kernel_passes_the_link() {
        let icmp = packet(protocol::ICMP_V6);
        let kernels = Facts { of_node: true, ..NONE };
        assert_eq!(decide_egress(&kernels, &strict(), Seen::Link, &icmp), Verdict::Drop(GuardIcmp));
        let discovery = Packet { is_discovery: true, ..icmp };
        assert_eq!(decide_egress(&kernels, &strict(), Seen::Link, &discovery), Verdict::Pass);
        assert_eq!(decide_egress(&NONE, &strict(), Seen::Link, &discovery), Verdict::Drop(GuardIcmp));
        assert_eq!(decide_egress(&kernels, &strict(), Seen::Socket, &discovery), Verdict::Drop(GuardIcmp));
        let node = Facts { node: true, ..NONE };
        assert_eq!(decide_egress(&node, &strict(), Seen::Socket, &icmp), Verdict::Pass);
        let udp = packet(protocol::UDP);
        assert_eq!(decide_egress(&kernels, &strict(), Seen::Link, &udp), Verdict::Drop(GuardUdp));
    }

    #[test]
    fn a_strict_pod_hears_nothing_in_clear() {
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

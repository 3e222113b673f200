//! The guard: drops plaintext between pods and the mesh where it is not allowed. The rules are in `tacit_abi`'s `guard`.
//!
//! Verdicts without facts: a pod without an entry is `Pod::unknown` in a STRICT mesh and passes otherwise. Packets of
//! STRICT pods that cannot be parsed are dropped. A full table of drops loses a count, never a verdict.

use aya_ebpf::programs::SkBuffContext;
use tacit_abi::{
    Accepted, Address, Arrival, ArrivalFacts, Exception, ExceptionHook, GuardFacts, Hook, LOST_CLIENT_MARK,
    Link, Listener, Marked, Packet, Pod, PodCells, Reason, Segment, Verdict, decide_arrival, decide_egress,
    decide_ingress, listener_index, may_claim, may_send_from, names_kind, pod_flag, protocol,
};

use crate::{
    answers,
    context::{self, LOOPBACK_INDEX, Skb},
    count::{count, count_exception},
    drops::{Dropped, drop, report},
    lookup,
    maps::{LINKS, PODS, SETTINGS, pod_of},
    node_flows,
    packet::{self, Direction, ETH_P_ARP, ETH_P_IP, ETH_P_IPV6, IpHeader},
};

/// Length of the Ethernet header; guarded links of pods are Ethernet links.
const ETHERNET_HEADER: u32 = 14;
/// Length of the smallest Ethernet frame: an ARP packet (42 bytes) with padding. A longer frame carries other data.
const ARP_MAX: u32 = 60;

/// Facts of a packet at a hook. `link` and `is_to_neighbour` are those of a frame, where the hook is on a link.
struct Facts<'a> {
    skb: &'a Skb<'a>,
    link: &'a Link,
    /// Offset of the first byte after the IP headers, from the network header.
    payload: u32,
    is_to_neighbour: bool,
    cells: PodCells,
}

impl GuardFacts for Facts<'_> {
    #[inline(always)]
    fn is_agent(&self) -> bool {
        lookup::is_agent_cgroup(self.skb.cgroup())
    }

    #[inline(always)]
    fn marked(&self) -> Option<Marked> {
        // Where it counts, marked connections have passed before.
        None
    }

    #[inline(always)]
    fn in_mesh(&self, address: &Address) -> bool {
        lookup::in_mesh(address)
    }

    #[inline(always)]
    fn is_node(&self, address: &Address) -> bool {
        lookup::is_node(address)
    }

    #[inline(always)]
    fn is_node_service(&self, packet: &Packet) -> bool {
        let protocol = packet.protocol;
        matches!(protocol, protocol::TCP | protocol::UDP)
            && lookup::is_node_service(&packet.remote, packet.remote_port, u32::from(protocol))
    }

    #[inline(always)]
    fn is_node_flow(&self, packet: &Packet) -> bool {
        node_flows::is_node_flow(self.cells, &packet.node_flow())
    }

    #[inline(always)]
    fn accepted(&self) -> Option<Accepted> {
        match self.skb.names()?.kind {
            names_kind::NODE => Some(Accepted::Node),
            names_kind::CLEAR => Some(Accepted::Other),
            _ => None,
        }
    }

    #[inline(always)]
    fn port_mode(&self, slot: u32, port: u16) -> Option<u32> {
        lookup::port_mode(slot, port)
    }

    #[inline(always)]
    fn is_allowed_clear(&self, remote: &Address, port: u16, protocol: u8) -> bool {
        lookup::is_allowed_clear(remote, port, u32::from(protocol))
    }

    #[inline(always)]
    fn is_node_socket(&self) -> bool {
        is_node_socket(self.skb)
    }

    #[inline(always)]
    fn is_tcp_socket(&self) -> bool {
        self.skb.is_tcp_socket()
    }

    #[inline(always)]
    fn may_send_from(&self, pod: &Pod, address: &Address) -> bool {
        may_send_from(pod, self.link, address)
    }

    #[inline(always)]
    fn is_to_neighbour(&self) -> bool {
        self.is_to_neighbour
    }

    #[inline(always)]
    fn is_answer(&self, packet: &Packet) -> bool {
        answers::is_answer(self.cells, packet)
    }

    #[inline(always)]
    fn is_tunnel_cookie(&self, pod: &Pod, packet: &Packet) -> bool {
        is_tunnel_cookie(self.skb, pod.slot, packet, self.payload)
    }
}

/// Returns true for a socket of the kernel or of a process outside the pods' cgroup.
#[inline(always)]
fn is_node_socket(skb: &Skb<'_>) -> bool {
    let settings = SETTINGS.load();
    skb.cgroup() != 0 && skb.ancestor_cgroup(settings.pods_level) != settings.pods_cgroup
}

/// Returns true if a SYN-ACK carries a SYN cookie of the agent's tunnel listener: the kernel accepts the client's answer.
/// Without the kernel's secret nobody can make one.
#[inline(never)]
fn is_tunnel_cookie(skb: &Skb<'_>, slot: u32, packet: &Packet, payload: u32) -> bool {
    // Of a socket, the pod's say, the kernel sends no cookie. Without one, a pod that forwards packets can send a cookie
    // again, with few bytes of its own: see `tacit_abi::has_options_of_kernel`.
    if skb.cgroup() != 0 || !packet::has_options_of_kernel(skb, payload) {
        return false;
    }
    let Some(mut tcp) = packet::acknowledgement(skb, payload) else { return false };
    let listener = listener_index(slot, Listener::Tunnel);
    let (client, server) = (&packet.remote, &packet.local);
    if server.is_v4() {
        let version = u32::from_ne_bytes([0x45, 0, 0, 0]);
        let mut ip = [version, 0, 0, client.v4_be(), server.v4_be()];
        return context::is_syn_cookie(listener, &mut ip, &mut tcp);
    }
    let version = u32::from_ne_bytes([0x60, 0, 0, 0]);
    let (c, s) = (client.0, server.0);
    let mut ip = [version, 0, c[0], c[1], c[2], c[3], s[0], s[1], s[2], s[3]];
    context::is_syn_cookie(listener, &mut ip, &mut tcp)
}

/// Decides on packets from and to sockets of pods; true if the packet passes.
#[inline(always)]
pub fn socket(ctx: &SkBuffContext, direction: Direction) -> bool {
    let mut dropped = Dropped::NONE;
    match direction {
        Direction::Egress => passes_egress(ctx, &mut dropped) || report(ctx, &dropped),
        Direction::Ingress => passes_ingress(ctx, &mut dropped) || report(ctx, &dropped),
    }
}

/// Decides on frames that leave a pod, on the host end of its link; true if the frame passes.
#[inline(always)]
pub fn link(ctx: &SkBuffContext) -> bool {
    let mut dropped = Dropped::NONE;
    passes_link(ctx, &mut dropped) || report(ctx, &dropped)
}

/// Decides on frames towards a pod, on the host end of its link; true if the frame passes.
#[inline(always)]
pub fn arrival(ctx: &SkBuffContext) -> bool {
    let mut dropped = Dropped::NONE;
    passes_arrival(ctx, &mut dropped) || report(ctx, &dropped)
}

// Decisions and the report of a drop are functions of their own: a program has 512 bytes of stack, and each needs much of
// it, one after the other.

#[inline(never)]
fn passes_egress(ctx: &SkBuffContext, dropped: &mut Dropped) -> bool {
    passes_socket(ctx, Direction::Egress, dropped)
}

#[inline(never)]
fn passes_ingress(ctx: &SkBuffContext, dropped: &mut Dropped) -> bool {
    passes_socket(ctx, Direction::Ingress, dropped)
}

#[inline(always)]
fn passes_socket(ctx: &SkBuffContext, direction: Direction, dropped: &mut Dropped) -> bool {
    let skb = Skb(ctx);
    // This check is first because all traffic to the agent is loopback. `established` counts what it marks.
    if skb.interface() == LOOPBACK_INDEX {
        return skb.mark() != LOST_CLIENT_MARK;
    }
    let ethertype = skb.ethertype();
    // Sockets of other families never reach these hooks.
    if ethertype != ETH_P_IP && ethertype != ETH_P_IPV6 {
        return true;
    }
    let Some((cgroup, pod)) = of_socket(&skb) else { return true };
    if pod.has(pod_flag::EXEMPT) {
        return true;
    }
    let Some(header) = packet::ip_header(&skb, ethertype) else {
        return drop_if_strict(dropped, cgroup, &pod, Reason::GuardUnreadable);
    };
    let Some(packet) = packet::parse(&skb, &header, direction, 0) else {
        return drop_if_strict(dropped, cgroup, &pod, Reason::GuardUnreadable);
    };
    let facts = Facts {
        skb: &skb,
        link: &NO_LINK,
        payload: header.payload(),
        is_to_neighbour: false,
        cells: PodCells::new(pod.slot, cgroup),
    };
    let (verdict, hook) = match direction {
        Direction::Egress => (decide_egress(&facts, &pod, Hook::Socket, &packet), ExceptionHook::Egress),
        Direction::Ingress => (decide_ingress(&facts, &pod, &packet), ExceptionHook::Ingress),
    };
    apply(dropped, cgroup, &pod, &packet, (verdict, hook))
}

/// VLAN id of a tag that has a priority only.
const PRIORITY_TAG: u16 = 0;

/// Returns true if the pod sends no plaintext into the mesh.
#[inline(always)]
fn is_strict(pod: &Pod) -> bool {
    !pod.has(pod_flag::EXEMPT) && pod.has(pod_flag::EGRESS_STRICT)
}

const NO_LINK: Link = Link { cgroup: 0, hardware: 0, has_neighbours: 0, link_local: Address::NONE };

/// Returns the pod of a packet's socket and its cgroup's id; `None` if nothing is enforced for the socket.
#[inline(always)]
fn of_socket(skb: &Skb<'_>) -> Option<(u64, Pod)> {
    if let Some(found) = pod_of(|level| skb.ancestor_cgroup(level)) {
        return Some(found);
    }
    if lookup::default_is_strict() { Some((skb.cgroup(), Pod::unknown())) } else { None }
}

/// Returns the pod behind a link; `None` if nothing is enforced for it.
#[inline(always)]
fn of_link<'a>(skb: &Skb<'_>) -> Option<(&'a Link, Pod)> {
    // SAFETY: the entry of an interface is replaced only by one of the same pod, or after the interface is gone.
    let link = unsafe { LINKS.get(&skb.interface()) }?;
    // SAFETY: the entry is copied at once; the agent replaces entries, it never changes one in place.
    match unsafe { PODS.get(&link.cgroup) } {
        Some(pod) => Some((link, *pod)),
        None if lookup::default_is_strict() => Some((link, Pod::unknown())),
        None => None,
    }
}

/// Returns the agent's mark of the packet's socket, if the packet is to the end that the mark names.
#[inline(never)]
fn marked_end(skb: &Skb<'_>) -> u32 {
    let Some(names) = skb.names() else { return 0 };
    if names.kind != names_kind::TUNNEL && names.kind != names_kind::DISABLED {
        return 0;
    }
    let is_to_end = packet::tcp_destination(skb)
        .is_some_and(|(address, port)| u32::from(port) == names.peer_port && address.same(&names.peer));
    if is_to_end { names.kind } else { 0 }
}

/// Counts a packet of the agent to a port in DISABLE, if its pod is STRICT.
#[inline(never)]
fn count_disabled(skb: &Skb<'_>) {
    if of_link(skb).is_some_and(|(_, pod)| is_strict(&pod)) {
        count_exception(Exception::DisabledPort, ExceptionHook::Link);
    }
}

#[inline(never)]
fn passes_link(ctx: &SkBuffContext, dropped: &mut Dropped) -> bool {
    let skb = Skb(ctx);
    // This check is first because tunnels of the agent are the hot path.
    if lookup::is_agent_cgroup(skb.cgroup()) {
        match marked_end(&skb) {
            names_kind::TUNNEL => return true,
            names_kind::DISABLED => {
                count_disabled(&skb);
                return true;
            }
            _ => {}
        }
    }
    let Some((link, pod)) = of_link(&skb) else { return true };
    let Some((to, from)) = skb.hardware() else {
        return drop_if_strict(dropped, link.cgroup, &pod, Reason::GuardUnreadable);
    };
    if link.hardware != 0 && from != link.hardware {
        return drop(dropped, link.cgroup, &Address::NONE, 0, 0, Reason::GuardSpoofed);
    }
    let is_to_neighbour = link.has_neighbours != 0 && !lookup::is_node_hardware(to);
    match skb.vlan() {
        None => {}
        // Receivers take a frame of VLAN 0 for one without a tag.
        Some(PRIORITY_TAG) if !is_strict(&pod) => {}
        Some(_) => return drop_if_strict(dropped, link.cgroup, &pod, Reason::GuardNotIp),
    }
    let ethertype = skb.ethertype();
    if ethertype != ETH_P_IP && ethertype != ETH_P_IPV6 {
        return not_ip(dropped, &skb, link, &pod, ethertype);
    }
    let Some(header) = packet::ip_header(&skb, ethertype) else {
        return drop_if_strict(dropped, link.cgroup, &pod, Reason::GuardUnreadable);
    };
    if !is_own_discovery(&skb, &pod, link, &header) {
        return drop(dropped, link.cgroup, &header.source, 0, 0, Reason::GuardSpoofed);
    }
    let Some(packet) = packet::parse(&skb, &header, Direction::Egress, ETHERNET_HEADER) else {
        return drop_if_strict(dropped, link.cgroup, &pod, Reason::GuardUnreadable);
    };
    let cells = PodCells::new(pod.slot, link.cgroup);
    let facts = Facts { skb: &skb, link, payload: header.payload(), is_to_neighbour, cells };
    let verdict = decide_egress(&facts, &pod, Hook::Link, &packet);
    apply(dropped, link.cgroup, &pod, &packet, (verdict, ExceptionHook::Link))
}

/// Returns true unless the packet is of neighbour discovery and says what the pod may not say.
#[inline(never)]
fn is_own_discovery(skb: &Skb<'_>, pod: &Pod, link: &Link, header: &IpHeader) -> bool {
    packet::discovery_claim(skb, header).is_none_or(|claim| may_claim(pod, link, &claim))
}

/// Returns true if the pod may say what the ARP packet says.
#[inline(never)]
fn is_own_arp(skb: &Skb<'_>, pod: &Pod, link: &Link) -> bool {
    packet::arp_claim(skb).is_some_and(|claim| may_claim(pod, link, &claim))
}

/// Decides on frames other than IP.
#[inline(always)]
fn not_ip(dropped: &mut Dropped, skb: &Skb<'_>, link: &Link, pod: &Pod, ethertype: u16) -> bool {
    if packet::is_tag(ethertype) {
        // Tags inside a tag of VLAN 0: receivers take them off, and what is inside cannot be seen here.
        return drop(dropped, link.cgroup, &Address::NONE, 0, 0, Reason::GuardNotIp);
    }
    if ethertype != ETH_P_ARP {
        return drop_if_strict(dropped, link.cgroup, pod, Reason::GuardNotIp);
    }
    if !is_own_arp(skb, pod, link) {
        return drop(dropped, link.cgroup, &Address::NONE, 0, 0, Reason::GuardSpoofed);
    }
    if skb.len() > ARP_MAX {
        return drop_if_strict(dropped, link.cgroup, pod, Reason::GuardNotIp);
    }
    if is_strict(pod) {
        count_exception(Exception::Discovery, ExceptionHook::Link);
    }
    true
}

#[inline(never)]
fn passes_arrival(ctx: &SkBuffContext, dropped: &mut Dropped) -> bool {
    let skb = Skb(ctx);
    let Some((link, pod)) = of_link(&skb) else { return true };
    if pod.has(pod_flag::EXEMPT) || skb.vlan().is_some_and(|id| id != PRIORITY_TAG) {
        return true;
    }
    let ethertype = skb.ethertype();
    if packet::is_tag(ethertype) {
        // What is inside the tags may claim the node's address, or the pod's own.
        return drop(dropped, link.cgroup, &Address::NONE, 0, 0, Reason::GuardNotIp);
    }
    if ethertype != ETH_P_IP && ethertype != ETH_P_IPV6 {
        return true;
    }
    let Some(header) = packet::ip_header(&skb, ethertype) else { return true };
    // Most frames are of tunnels, which come from other addresses.
    if !pod.owns(&header.source) && !lookup::is_node(&header.source) {
        return true;
    }
    // The node's packets are not that short. The pod may reassemble the packet, and then read its ports.
    let (mut port, mut number) = (0, 0);
    let mut arrival = Arrival::Drop(Reason::GuardUnreadable);
    if let Some(mut packet) = packet::parse(&skb, &header, Direction::Ingress, ETHERNET_HEADER) {
        if packet.segment.is_bare() && packet::may_continue(&skb, &header) {
            packet.segment = Segment::Data;
        }
        (port, number) = (packet.remote_port, packet.protocol);
        let cells = PodCells::new(pod.slot, link.cgroup);
        arrival = decide_arrival(&Arriving(&skb, cells), &pod, &packet);
        if arrival == Arrival::OfNode {
            node_flows::prove(cells, &packet.node_flow());
        }
    }
    match arrival {
        Arrival::Pass | Arrival::OfNode => true,
        Arrival::Drop(reason) => drop(dropped, link.cgroup, &header.source, port, number, reason),
    }
}

/// A frame towards the pod with these cells.
struct Arriving<'a>(&'a Skb<'a>, PodCells);

impl ArrivalFacts for Arriving<'_> {
    #[inline(always)]
    fn is_node(&self, address: &Address) -> bool {
        lookup::is_node(address)
    }

    #[inline(always)]
    fn is_node_socket(&self) -> bool {
        is_node_socket(self.0)
    }

    #[inline(always)]
    fn is_node_flow(&self, packet: &Packet) -> bool {
        node_flows::is_node_flow(self.1, &packet.node_flow())
    }
}

/// Drops a packet that cannot be classified if its pod is STRICT; true if the packet passes.
#[inline(always)]
fn drop_if_strict(dropped: &mut Dropped, cgroup: u64, pod: &Pod, reason: Reason) -> bool {
    if !is_strict(pod) {
        return true;
    }
    drop(dropped, cgroup, &Address::NONE, 0, 0, reason)
}

#[inline(always)]
fn apply(
    dropped: &mut Dropped,
    cgroup: u64,
    pod: &Pod,
    packet: &Packet,
    (verdict, hook): (Verdict, ExceptionHook),
) -> bool {
    match verdict {
        Verdict::Pass => {}
        Verdict::Clear(reason) => count(reason),
        Verdict::Except(exception) => count_exception(exception, hook),
        Verdict::Ask(exception) => {
            count_exception(exception, hook);
            answers::expect_answer(PodCells::new(pod.slot, cgroup), packet);
        }
        Verdict::Drop(reason) => {
            let reason = if pod.has(pod_flag::UNKNOWN) { Reason::GuardHeld } else { reason };
            return drop(dropped, cgroup, &packet.remote, packet.remote_port, packet.protocol, reason);
        }
    }
    true
}

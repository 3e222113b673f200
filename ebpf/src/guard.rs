//! The guard: drops plaintext between pods and the mesh where it is not allowed. The rules are in `tacit_abi`'s `guard`.
//!
//! Verdicts without facts: a pod without an entry is `Pod::unknown` in a STRICT mesh and passes otherwise. Packets of
//! STRICT pods that cannot be parsed are dropped. A full table of drops loses a count, never a verdict.

use aya_ebpf::{bindings::BPF_NOEXIST, programs::SkBuffContext};
use aya_log_ebpf::warn;
use tacit_abi::{
    Address, DropKey, GuardFacts, Hook, Packet, Pod, Reason, Verdict, decide_egress, decide_ingress,
    names_kind, pod_flag,
};

use crate::{
    context::{self, Skb},
    count::count,
    log_budget,
    maps::{DROPS, LINKS, PODS, SETTINGS, pod_of},
    packet::{self, Direction, ETH_P_ARP, ETH_P_IP, ETH_P_IPV6},
};

/// Length of the Ethernet header; guarded links of pods are Ethernet links.
const ETHERNET_HEADER: u32 = 14;
/// Length of the smallest Ethernet frame: an ARP packet (42 bytes) with padding. A longer frame carries other data.
const ARP_MAX: u32 = 60;

struct Facts<'a>(&'a Skb<'a>);

impl GuardFacts for Facts<'_> {
    #[inline(always)]
    fn is_agent(&self) -> bool {
        context::is_agent_cgroup(self.0.cgroup())
    }

    #[inline(always)]
    fn is_node(&self, remote: &Address) -> bool {
        context::is_node(remote)
    }

    #[inline(always)]
    fn is_accepted_clear(&self) -> bool {
        self.0.names().is_some_and(|names| names.kind == names_kind::CLEAR)
    }

    #[inline(always)]
    fn port_mode(&self, slot: u32, port: u16) -> Option<u32> {
        context::port_mode(slot, port)
    }

    #[inline(always)]
    fn is_allowed_clear(&self, remote: &Address, port: u16, protocol: u8) -> bool {
        context::is_allowed_clear(remote, port, u32::from(protocol))
    }

    #[inline(always)]
    fn is_node_socket(&self) -> bool {
        let settings = SETTINGS.load();
        self.0.cgroup() != 0 && self.0.ancestor_cgroup(settings.pods_level) != settings.pods_cgroup
    }

    #[inline(always)]
    fn is_tcp_socket(&self) -> bool {
        self.0.is_tcp_socket()
    }
}

/// Decides on packets from and to sockets of pods; true if the packet passes.
#[inline(always)]
pub fn socket(ctx: &SkBuffContext, direction: Direction) -> bool {
    let skb = Skb(ctx);
    let ethertype = skb.ethertype();
    // Sockets of other families never reach these hooks.
    if ethertype != ETH_P_IP && ethertype != ETH_P_IPV6 {
        return true;
    }
    let Some(header) = packet::ip_header(&skb, ethertype) else {
        return unreadable(ctx, &skb);
    };
    let remote = match direction {
        Direction::Egress => &header.destination,
        Direction::Ingress => &header.source,
    };
    // This check is first because all traffic to the agent is loopback.
    if remote.is_loopback() || !context::in_mesh(remote) {
        return true;
    }
    let Some((cgroup, pod)) = of_socket(&skb) else { return true };
    let Some(packet) = packet::parse(&skb, &header, direction, 0) else {
        return unreadable(ctx, &skb);
    };
    let facts = Facts(&skb);
    let verdict = match direction {
        Direction::Egress => decide_egress(&facts, &pod, Hook::Socket, &packet),
        Direction::Ingress => decide_ingress(&facts, &pod, &packet),
    };
    apply(ctx, cgroup, &packet, verdict)
}

/// Returns the pod of a packet's socket and its cgroup's id; `None` if nothing is enforced for the socket.
#[inline(always)]
fn of_socket(skb: &Skb<'_>) -> Option<(u64, Pod)> {
    if let Some(found) = pod_of(|level| skb.ancestor_cgroup(level)) {
        return Some(found);
    }
    if context::default_is_strict() { Some((skb.cgroup(), Pod::unknown())) } else { None }
}

/// Decides on a packet that is too short for its own headers.
#[inline(always)]
fn unreadable(ctx: &SkBuffContext, skb: &Skb<'_>) -> bool {
    let Some((cgroup, pod)) = of_socket(skb) else { return true };
    drop_if_strict(ctx, cgroup, &pod, Reason::GuardUnreadable)
}

/// Decides on frames that leave a pod, on the host end of its link; true if the frame passes.
#[inline(always)]
pub fn link(ctx: &SkBuffContext) -> bool {
    let skb = Skb(ctx);
    // This check is first because tunnels of the agent are the hot path.
    if context::is_agent_cgroup(skb.cgroup()) {
        return true;
    }
    // SAFETY: copied at once.
    let Some(cgroup) = unsafe { LINKS.get(&skb.interface()) }.copied() else { return true };
    // SAFETY: the entry is copied at once; the agent replaces entries, it never changes one in place.
    let pod = match unsafe { PODS.get(&cgroup) } {
        Some(pod) => *pod,
        None if context::default_is_strict() => Pod::unknown(),
        None => return true,
    };
    let ethertype = skb.ethertype();
    let is_ip = ethertype == ETH_P_IP || ethertype == ETH_P_IPV6;
    if !is_ip || skb.has_vlan() {
        let is_arp = ethertype == ETH_P_ARP && !skb.has_vlan() && skb.len() <= ARP_MAX;
        return is_arp || drop_if_strict(ctx, cgroup, &pod, Reason::GuardNotIp);
    }
    let Some(header) = packet::ip_header(&skb, ethertype) else {
        return drop_if_strict(ctx, cgroup, &pod, Reason::GuardUnreadable);
    };
    if !context::in_mesh(&header.destination) {
        return true;
    }
    let Some(packet) = packet::parse(&skb, &header, Direction::Egress, ETHERNET_HEADER) else {
        return drop_if_strict(ctx, cgroup, &pod, Reason::GuardUnreadable);
    };
    let verdict = decide_egress(&Facts(&skb), &pod, Hook::Link, &packet);
    apply(ctx, cgroup, &packet, verdict)
}

/// Drops a packet that cannot be classified if its pod is STRICT; true if the packet passes.
#[inline(always)]
fn drop_if_strict(ctx: &SkBuffContext, cgroup: u64, pod: &Pod, reason: Reason) -> bool {
    if pod.has(pod_flag::EXEMPT) || !pod.has(pod_flag::EGRESS_STRICT) {
        return true;
    }
    drop(ctx, cgroup, &Address::NONE, 0, 0, reason)
}

#[inline(always)]
fn apply(ctx: &SkBuffContext, cgroup: u64, packet: &Packet, verdict: Verdict) -> bool {
    match verdict {
        Verdict::Pass => true,
        Verdict::Clear(reason) => {
            count(reason);
            true
        }
        Verdict::Drop(reason) => {
            drop(ctx, cgroup, &packet.remote, packet.remote_port, packet.protocol, reason)
        }
    }
}

/// Counts and logs a drop; always false.
#[inline(always)]
fn drop(ctx: &SkBuffContext, cgroup: u64, remote: &Address, port: u16, protocol: u8, reason: Reason) -> bool {
    count(reason);
    let key = DropKey { cgroup, remote: *remote, reason: reason as u32, protocol: u32::from(protocol) };
    match DROPS.get_ptr_mut(&key) {
        // SAFETY: a live value of the map; two CPUs may lose a count to each other, COUNTERS do not.
        Some(packets) => unsafe { *packets += 1 },
        None => {
            let _ = DROPS.insert(&key, &1, BPF_NOEXIST.into());
        }
    }
    if log_budget::take_line() {
        warn!(
            ctx,
            "packet of cgroup {}, other end [{:i}]:{}, protocol {}: dropped, reason {}",
            cgroup,
            remote.octets(),
            port,
            protocol,
            reason as u32
        );
    }
    false
}

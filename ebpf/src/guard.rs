//! The guard: what must not be in clear does not pass, whatever made it. See `tacit_abi`'s `guard` for the rules.
//!
//! Verdicts without a fact: no entry of the pod is `Pod::unknown` when the mesh is STRICT, else it passes; a packet
//! that cannot be read is dropped for strict pods; a table of drops that is full loses a line, never a verdict.

use aya_ebpf::{bindings::BPF_NOEXIST, programs::SkBuffContext};
use aya_log_ebpf::warn;
use tacit_abi::{
    Address, DropKey, GuardFacts, Packet, Pod, Reason, Seen, Verdict, decide_egress, decide_ingress,
    names_kind, pod_flag,
};

use crate::{
    context::{self, Skb},
    count::count,
    event,
    maps::{DROPS, LINKS, PODS, SETTINGS, pod_of},
    packet::{self, ETH_P_ARP, ETH_P_IP, ETH_P_IPV6, Way},
};

/// Links of pods that are guarded are Ethernet's.
const ETHERNET_HEADER: u32 = 14;
/// The smallest frame of Ethernet: an ARP packet (42 bytes) padded. Longer ones carry something else.
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
    fn is_of_node(&self) -> bool {
        let settings = SETTINGS.load();
        self.0.cgroup() != 0 && self.0.ancestor_cgroup(settings.pods_level) != settings.pods_cgroup
    }

    #[inline(always)]
    fn is_of_tcp(&self) -> bool {
        self.0.is_of_tcp()
    }
}

/// Packets from and to sockets of pods. Returns whether the packet passes.
#[inline(always)]
pub fn socket(ctx: &SkBuffContext, way: Way) -> bool {
    let skb = Skb(ctx);
    let ethertype = skb.ethertype();
    // Sockets of other families have nothing that these hooks see.
    if ethertype != ETH_P_IP && ethertype != ETH_P_IPV6 {
        return true;
    }
    let Some(head) = packet::head(&skb, ethertype) else {
        return unreadable(ctx, &skb);
    };
    let remote = match way {
        Way::Out => &head.destination,
        Way::In => &head.source,
    };
    // First of all: what goes to the agent goes by loopback.
    if remote.is_loopback() || !context::in_mesh(remote) {
        return true;
    }
    let Some((cgroup, pod)) = of_socket(&skb) else { return true };
    let Some(packet) = packet::packet(&skb, &head, way, 0) else {
        return unreadable(ctx, &skb);
    };
    let facts = Facts(&skb);
    let verdict = match way {
        Way::Out => decide_egress(&facts, &pod, Seen::Socket, &packet),
        Way::In => decide_ingress(&facts, &pod, &packet),
    };
    apply(ctx, cgroup, &packet, verdict)
}

/// The pod that a packet's socket belongs to; `None` is nobody who is held to anything.
#[inline(always)]
fn of_socket(skb: &Skb<'_>) -> Option<(u64, Pod)> {
    if let Some(found) = pod_of(|level| skb.ancestor_cgroup(level)) {
        return Some(found);
    }
    if context::default_is_strict() { Some((skb.cgroup(), Pod::unknown())) } else { None }
}

/// A packet too short for its own headers: nobody's answer depends on it.
#[inline(always)]
fn unreadable(ctx: &SkBuffContext, skb: &Skb<'_>) -> bool {
    let Some((cgroup, pod)) = of_socket(skb) else { return true };
    refuse_strict(ctx, cgroup, &pod, Reason::GuardUnreadable)
}

/// Frames that leave a pod, on the host end of its link. Returns whether the frame passes.
#[inline(always)]
pub fn link(ctx: &SkBuffContext) -> bool {
    let skb = Skb(ctx);
    // The hot path: the agent's own tunnels.
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
        return is_arp || refuse_strict(ctx, cgroup, &pod, Reason::GuardNotIp);
    }
    let Some(head) = packet::head(&skb, ethertype) else {
        return refuse_strict(ctx, cgroup, &pod, Reason::GuardUnreadable);
    };
    if !context::in_mesh(&head.destination) {
        return true;
    }
    let Some(packet) = packet::packet(&skb, &head, Way::Out, ETHERNET_HEADER) else {
        return refuse_strict(ctx, cgroup, &pod, Reason::GuardUnreadable);
    };
    let verdict = decide_egress(&Facts(&skb), &pod, Seen::Link, &packet);
    apply(ctx, cgroup, &packet, verdict)
}

/// Drops for strict pods what cannot be told apart further.
#[inline(always)]
fn refuse_strict(ctx: &SkBuffContext, cgroup: u64, pod: &Pod, reason: Reason) -> bool {
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

/// Counts and tells a drop; always false.
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
    if event::admit() {
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

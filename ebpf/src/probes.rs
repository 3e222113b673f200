//! Holds the probes of applications' connections, see `tacit_abi`'s `probes`.

use aya_ebpf::programs::SkBuffContext;
use tacit_abi::{Destination, HELD_PACKET_MAX, Pod, Reason, held_kind, names_kind, pod_flag};

use crate::{
    context::{self, LOOPBACK_INDEX, RingPosition, Skb},
    count::count,
    held, lookup,
    maps::{PROBE_SHARES, pod_of},
};

/// Returns false for a probe that is held.
#[inline(always)]
pub fn passes(ctx: &SkBuffContext) -> bool {
    let skb = Skb(ctx);
    // Probes have no data. Of other packets only short ones are looked at.
    if skb.interface() != LOOPBACK_INDEX || skb.len() > HELD_PACKET_MAX as u32 {
        return true;
    }
    let Some(next) = skb.next_of_idle() else { return true };
    let is_probe = skb.segment_head().is_some_and(|head| head.is_probe(next));
    !is_probe || decide(ctx)
}

/// A function of its own, because a program has 512 bytes of stack and the guard needs much of it.
#[inline(never)]
fn decide(ctx: &SkBuffContext) -> bool {
    let skb = Skb(ctx);
    let Some(pod) = agents_end(&skb) else { return true };
    let is_held = hold(&skb, &pod);
    count(if is_held { Reason::ProbeHeld } else { Reason::ProbePassed });
    !is_held
}

/// Returns the pod of a connection whose other end is the agent's.
#[inline(always)]
fn agents_end(skb: &Skb<'_>) -> Option<Pod> {
    let names = skb.names()?;
    if names.kind != names_kind::CAPTURED && names.kind != names_kind::ACCEPTED {
        return None;
    }
    let (_, pod) = pod_of(|level| skb.ancestor_cgroup(level))?;
    if pod.has(pod_flag::EXEMPT) { None } else { Some(pod) }
}

/// Hands the probe to the agent; false if the agent cannot answer it soon.
#[inline(always)]
fn hold(skb: &Skb<'_>, pod: &Pod) -> bool {
    let Some(share) = PROBE_SHARES.get_ptr_mut(pod.slot) else { return false };
    let ring = held::ring_of(pod.slot);
    let (consumed, now) = (context::ring_position(ring, RingPosition::Consumed), context::now());
    // SAFETY: a live value of the map. Two CPUs may lose a note to each other.
    let is_attended = unsafe { (*share).is_attended(pod.netns_cookie, consumed, now) };
    if !is_attended || lookup::is_stale() {
        return false;
    }
    let none = Destination::default();
    if !held::hand_over(skb, pod, none, held_kind::PROBE) {
        return false;
    }
    let produced = context::ring_position(ring, RingPosition::Produced);
    // SAFETY: as above.
    unsafe { (*share).add(consumed, produced, now) };
    true
}

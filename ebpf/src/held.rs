//! Holds the SYN of captured connections, see `tacit_abi`'s `held`. A drop at this hook leaves the application's `connect()`
//! pending: the kernel reports no error and sends the SYN again later.

use aya_ebpf::programs::SkBuffContext;
use tacit_abi::{
    Destination, HELD_PACKET_MIN, HeldEnd, HeldSyn, Hold, HoldFacts, Pod, Reason, Tuple, decide_hold,
    held_kind, held_ring, names_kind,
};

use crate::{
    context::{self, RingPosition, Skb},
    count::count,
    lookup,
    maps::{HELD_0, HELD_1, HELD_2, HELD_3, HELD_SHARES, HeldRing, pod_of},
};

/// Index of the loopback interface, which the kernel gives to no other interface of a namespace.
const LOOPBACK: u32 = 1;

struct Facts<'a>(&'a Skb<'a>);

impl HoldFacts for Facts<'_> {
    #[inline(always)]
    fn destination(&self) -> Option<Destination> {
        let names = self.0.names().filter(|names| names.kind == names_kind::CAPTURED)?;
        Some(Destination { address: names.peer, port: names.peer_port, slot: names.slot })
    }

    #[inline(always)]
    fn pod(&self) -> Option<Pod> {
        pod_of(|level| self.0.ancestor_cgroup(level)).map(|(_, pod)| pod)
    }

    #[inline(always)]
    fn is_stale(&self) -> bool {
        lookup::is_stale()
    }

    #[inline(always)]
    fn has_listener(&self, slot: u32) -> bool {
        context::has_capture_listener(slot)
    }
}

/// Returns false for a SYN that is held.
#[inline(always)]
pub fn passes(ctx: &SkBuffContext) -> bool {
    let skb = Skb(ctx);
    // Nearly all packets end here: neither reads the packet.
    if skb.interface() != LOOPBACK || !skb.is_connecting() {
        return true;
    }
    decide(ctx)
}

/// A function of its own, because a program has 512 bytes of stack and the guard needs much of it.
#[inline(never)]
fn decide(ctx: &SkBuffContext) -> bool {
    let skb = Skb(ctx);
    match decide_hold(&Facts(&skb)) {
        Hold::Pass => true,
        Hold::PassUnanswered(reason) => {
            count(reason);
            true
        }
        Hold::Hold(pod, destination) => {
            count(if hand_over(&skb, &pod, destination, held_kind::SYN) {
                Reason::ConnectHeld
            } else {
                Reason::ConnectHeldFull
            });
            false
        }
    }
}

#[inline(always)]
pub fn ring_of(slot: u32) -> &'static HeldRing {
    match held_ring(slot) {
        0 => &HELD_0,
        1 => &HELD_1,
        2 => &HELD_2,
        _ => &HELD_3,
    }
}

/// Takes room for one record of the slot's pod; false if the pod has used its share of the ring. Two CPUs may lose a count to
/// each other.
#[inline(always)]
fn takes_share(ring: &'static HeldRing, slot: u32) -> bool {
    let Some(share) = HELD_SHARES.get_ptr_mut(slot) else { return false };
    let consumed = context::ring_position(ring, RingPosition::Consumed);
    // SAFETY: a live value of the map.
    unsafe { (*share).take(consumed, || context::ring_position(ring, RingPosition::Produced)) }
}

/// Hands the packet to the agent; false if the ring is full, or the pod's share of it is used.
#[inline(always)]
pub fn hand_over(skb: &Skb<'_>, pod: &Pod, destination: Destination, kind: u32) -> bool {
    if skb.len() < HELD_PACKET_MIN as u32 {
        return false;
    }
    let ring = ring_of(pod.slot);
    if !takes_share(ring, pod.slot) {
        return false;
    }
    let Some(mut record) = ring.reserve(0) else { return false };
    let at: *mut HeldSyn = record.as_mut_ptr();
    // SAFETY: the record is reserved for this program, of this type and aligned.
    let length = unsafe {
        (&raw mut (*at).kind).write(kind);
        (&raw mut (*at).slot).write(pod.slot);
        (&raw mut (*at).netns_cookie).write(pod.netns_cookie);
        (&raw mut (*at).destination).write(destination);
        (&raw mut (*at).repeated).write(u32::from(skb.is_repeated()));
        skb.copy_packet(&raw mut (*at).packet)
    };
    // SAFETY: as above.
    unsafe { (&raw mut (*at).length).write(length) };
    record.submit(0);
    true
}

/// Reports to the agent that the application of the slot's pod has closed a captured connection whose handshake with the agent's
/// listener had not ended. A record that is lost costs the agent an opening that it gives up later.
#[inline(always)]
pub fn ended(tuple: &Tuple, slot: u32) {
    let ring = ring_of(slot);
    if !takes_share(ring, slot) {
        return;
    }
    let Some(mut record) = ring.reserve_untyped::<HeldEnd>(0) else { return };
    let at: *mut HeldEnd = record.as_mut_ptr();
    // SAFETY: the record is reserved for this program, of this type and aligned.
    unsafe {
        (&raw mut (*at).kind).write(held_kind::END);
        (&raw mut (*at).slot).write(slot);
        (&raw mut (*at).tuple).write(*tuple);
    }
    record.submit(0);
}

//! Held connections: decision on the SYN of a captured connection, and the records that the agent gets.
//!
//! The application's `connect()` must end as the destination's answer says. The guard drops the SYN of a captured connection,
//! which leaves `connect()` pending without an error, and hands it to the agent. The agent connects to the destination and then
//! puts the same SYN on the pod's loopback, or answers it with a reset or an ICMP error. The kernel keeps no state of a held
//! connection: every retransmission of the SYN is handed over again, and the agent recognises it.

use crate::{Destination, Pod, Reason, Tuple, pod_flag};

/// Bytes of a held packet that are handed over: an IPv4 header (60) and a TCP header (60) of the largest size fit, and so do
/// those of IPv6 (40 and 60). Data of a SYN is left out, the application's kernel sends it again.
pub const HELD_PACKET_MAX: usize = 120;
/// The shortest SYN: two headers without options.
pub const HELD_PACKET_MIN: usize = 40;
/// Rings that pods share by slot, so that each has its own consumer. A power of two.
pub const HELD_RINGS: u32 = 4;
/// Bytes of each ring: room for some 6,000 records. A power of two, and of pages.
pub const HELD_RING_BYTES: u32 = 1024 * 1024;
/// Records that a pod may add to its ring until the agent has read those before. At most twice as many are in the ring, a
/// third of it, so that one pod cannot fill it. A pod with more loses SYNs, which its kernel sends again.
pub const HELD_SHARE: u64 = 1024;

/// Returns the index of the ring for pods with this slot.
#[inline(always)]
#[must_use]
pub const fn held_ring(slot: u32) -> u32 {
    slot % HELD_RINGS
}

/// Kinds of records, the first word of each.
pub mod held_kind {
    /// A [`super::HeldSyn`].
    pub const SYN: u32 = 1;
    /// A [`super::HeldEnd`].
    pub const END: u32 = 2;
    /// A [`super::HeldSyn`] with a probe instead of a SYN, and without a destination.
    pub const PROBE: u32 = 3;
}

/// A SYN that was held.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldSyn {
    /// [`held_kind::SYN`] or [`held_kind::PROBE`].
    pub kind: u32,
    /// The pod's slot.
    pub slot: u32,
    /// Cookie of the pod's network namespace.
    pub netns_cookie: u64,
    /// The destination that the application asked for.
    pub destination: Destination,
    /// Number of bytes in `packet`.
    pub length: u32,
    /// 1 if the SYN was sent before, else 0.
    pub repeated: u32,
    /// The packet as the application's kernel sent it, from its IP header. Its checksum may be partial.
    pub packet: [u8; HELD_PACKET_MAX],
}

/// The end of a captured connection whose handshake with the agent's listener had not ended: its application closed it, or
/// gave up.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldEnd {
    /// [`held_kind::END`].
    pub kind: u32,
    /// The pod's slot.
    pub slot: u32,
    /// The connection, as its connecting side sees it.
    pub tuple: Tuple,
}

const _: () = {
    assert!(size_of::<HeldSyn>() == 168);
    assert!(size_of::<HeldEnd>() == 56);
    assert!(HELD_RINGS.is_power_of_two() && HELD_RING_BYTES.is_power_of_two());
};

#[cfg(feature = "user")]
// SAFETY: repr(C), no padding (asserted above by size), every bit pattern is valid.
unsafe impl aya::Pod for HeldSyn {}
#[cfg(feature = "user")]
// SAFETY: as above.
unsafe impl aya::Pod for HeldEnd {}

/// A pod's share of its ring. The map's key is the pod's slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldShare {
    /// Position in the ring up to which the agent has to read before the pod's count starts anew.
    pub mark: u64,
    /// Records of the pod since then.
    pub count: u64,
}

impl HeldShare {
    /// Takes room for one record; false if the pod has used its share. `consumed` is the position up to which the agent has
    /// read, and `produced` returns the position up to which records were added.
    #[inline(always)]
    pub fn take(&mut self, consumed: u64, produced: impl FnOnce() -> u64) -> bool {
        if consumed >= self.mark {
            *self = Self { mark: produced(), count: 0 };
        }
        if self.count >= HELD_SHARE {
            return false;
        }
        self.count += 1;
        true
    }
}

/// Facts that the program can look up about a packet of a socket that is connecting.
pub trait HoldFacts {
    /// Returns the destination that is stored in a captured socket.
    fn destination(&self) -> Option<Destination>;
    /// Returns the enrolled pod of the socket.
    fn pod(&self) -> Option<Pod>;
    /// Returns true if the agent's heartbeat is stale.
    fn is_stale(&self) -> bool;
    /// Returns true if an agent listens for captured connections of the slot.
    fn has_listener(&self, slot: u32) -> bool;
}

/// Verdict on a SYN on the pod's loopback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Is delivered: it is not captured, or its pod wants no truthful connect().
    Pass,
    /// Is delivered without the destination's answer, because no agent could give it. Without a listener the kernel refuses the
    /// connection.
    PassUnanswered(Reason),
    /// Is held: dropped here, and handed to the agent of the pod.
    Hold(Pod, Destination),
}

/// Decides on a SYN that a socket sends on its loopback.
#[inline(always)]
pub fn decide_hold(facts: &impl HoldFacts) -> Hold {
    let Some(destination) = facts.destination() else { return Hold::Pass };
    let Some(pod) = facts.pod() else { return Hold::Pass };
    if pod.has(pod_flag::EXEMPT) || pod.has(pod_flag::CONNECT_EARLY) {
        return Hold::Pass;
    }
    if facts.is_stale() || !facts.has_listener(pod.slot) {
        return Hold::PassUnanswered(Reason::ConnectUnanswered);
    }
    Hold::Hold(pod, destination)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Address;

    #[derive(Clone, Copy)]
    struct Syn {
        destination: Option<Destination>,
        pod: Option<Pod>,
        stale: bool,
        listener: bool,
    }

    impl HoldFacts for Syn {
        fn destination(&self) -> Option<Destination> {
            self.destination
        }
        fn pod(&self) -> Option<Pod> {
            self.pod
        }
        fn is_stale(&self) -> bool {
            self.stale
        }
        fn has_listener(&self, slot: u32) -> bool {
            assert_eq!(slot, 3);
            self.listener
        }
    }

    #[test]
    fn only_a_captured_connection_of_a_pod_that_an_agent_serves_is_held() {
        let pod = Pod { slot: 3, ..Pod::default() };
        let destination = Destination {
            address: Address::from_v4_be(u32::from_ne_bytes([10, 77, 2, 3])),
            port: 80,
            slot: 3,
        };
        let held = Syn { destination: Some(destination), pod: Some(pod), stale: false, listener: true };
        let flagged = |flags| Some(Pod { flags, ..pod });
        let unanswered = Hold::PassUnanswered(Reason::ConnectUnanswered);
        let table = [
            (held, Hold::Hold(pod, destination)),
            (Syn { destination: None, ..held }, Hold::Pass),
            (Syn { pod: None, ..held }, Hold::Pass),
            (Syn { pod: flagged(pod_flag::CONNECT_EARLY), ..held }, Hold::Pass),
            (Syn { pod: flagged(pod_flag::EXEMPT), ..held }, Hold::Pass),
            (Syn { stale: true, ..held }, unanswered),
            (Syn { listener: false, ..held }, unanswered),
            (Syn { stale: true, pod: flagged(pod_flag::CONNECT_EARLY), ..held }, Hold::Pass),
        ];
        for (facts, expected) in table {
            assert_eq!(decide_hold(&facts), expected);
        }
        let strict = Pod { flags: pod_flag::EGRESS_STRICT, ..pod };
        assert_eq!(decide_hold(&Syn { pod: Some(strict), ..held }), Hold::Hold(strict, destination));
    }

    #[test]
    fn slots_are_spread_over_all_rings() {
        for slot in 0..8 {
            assert_eq!(held_ring(slot), held_ring(slot + HELD_RINGS));
        }
        assert!((1..HELD_RINGS).all(|slot| held_ring(slot) != held_ring(0)));
    }

    #[test]
    fn a_pod_has_at_most_two_shares_in_the_ring_and_always_gets_one_when_it_is_read() {
        let (mut share, mut produced, mut consumed) = (HeldShare::default(), 0_u64, 0_u64);
        let mut state = 7_u64;
        for _ in 0..200_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // The pod adds more often than the agent reads.
            if state >> 61 != 0 {
                produced += u64::from(share.take(consumed, || produced));
            } else {
                consumed += (produced - consumed).min(state >> 40 & 7);
            }
            assert!(produced - consumed <= 2 * HELD_SHARE, "{} in the ring", produced - consumed);
        }
        // The agent reads everything, and then nothing: the first record does not count, because the mark is before it.
        consumed = produced;
        let mut added = 0;
        for _ in 0..2 * HELD_SHARE {
            let has_room = share.take(consumed, || produced);
            produced += u64::from(has_room);
            added += u64::from(has_room);
        }
        assert_eq!(added, HELD_SHARE + 1);
    }
}

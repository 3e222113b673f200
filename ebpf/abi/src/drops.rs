//! Counters of dropped packets by other end, reason and protocol, for `tacit status`. No verdict depends on them.
//!
//! Each pod has [`limits::DROPS_PER_POD`] counters of its own, so a pod that sends to many addresses cannot hide what was
//! dropped of others. A kind of packet may be in [`DROP_WAYS`] counters, chosen by a hash.

use crate::{Address, cells::mix, limits};

/// Neighbouring counters in which a kind of packet may be.
pub const DROP_WAYS: u32 = 4;

/// A kind of dropped packet and its number. All zero if the counter is free.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DropCounter {
    /// Id of the pod's cgroup.
    pub cgroup: u64,
    /// Address of the other end.
    pub remote: Address,
    /// The `Reason`.
    pub reason: u32,
    /// IP protocol number.
    pub protocol: u32,
    /// Packets, since the counter was taken for this kind.
    pub packets: u64,
    /// Time of the last packet in nanoseconds of `CLOCK_MONOTONIC`.
    pub seen: u64,
}

/// The counters of one pod.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PodDrops(pub [DropCounter; limits::DROPS_PER_POD as usize]);

const _: () = assert!(size_of::<DropCounter>() == 48);

#[cfg(feature = "user")]
// SAFETY: repr(C), no padding (asserted above by size), every bit pattern is valid.
unsafe impl aya::Pod for PodDrops {}

impl DropCounter {
    /// Returns true if this counter counts packets of the same kind as `other`.
    #[inline(always)]
    #[must_use]
    pub const fn is_of(&self, other: &Self) -> bool {
        self.cgroup == other.cgroup
            && self.reason == other.reason
            && self.protocol == other.protocol
            && self.remote.same(&other.remote)
            && self.packets != 0
    }

    /// Returns the first of the counters in which this kind may be.
    #[inline(always)]
    #[must_use]
    pub const fn first(&self) -> u32 {
        let remote = &self.remote.0;
        let mixed = mix((remote[0] as u64) << 32 | remote[1] as u64);
        let mixed = mix(mixed ^ ((remote[2] as u64) << 32 | remote[3] as u64));
        let mixed = mix(mixed ^ ((self.reason as u64) << 32 | self.protocol as u64));
        mixed as u32 & (limits::DROPS_PER_POD - DROP_WAYS)
    }
}

/// Returns the index of a pod's counters in their map.
#[inline(always)]
#[must_use]
pub const fn drops_index(slot: u32, cgroup: u64) -> u32 {
    if slot < limits::SLOTS {
        slot
    } else {
        limits::SLOTS + (mix(cgroup) as u32 & (limits::DROPS_WITHOUT_SLOT - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn kinds_of_a_pod_are_spread_over_all_its_counters() {
        let first = |host: u32| {
            DropCounter { remote: Address::from_v4_be(host.to_be()), reason: 25, ..Default::default() }
                .first()
        };
        let sets: HashSet<u32> = (0..1000).map(first).collect();
        assert!(sets.iter().all(|first| first + DROP_WAYS <= limits::DROPS_PER_POD));
        assert_eq!(sets.len() as u32, limits::DROPS_PER_POD / DROP_WAYS);
    }

    #[test]
    fn a_pod_with_a_slot_has_its_own_counters() {
        assert_eq!(drops_index(3, 77), 3);
        for cgroup in 0..1000 {
            let index = drops_index(u32::MAX, cgroup);
            assert!((limits::SLOTS..limits::SLOTS + limits::DROPS_WITHOUT_SLOT).contains(&index));
        }
    }

    #[test]
    fn a_free_counter_is_of_no_kind() {
        assert!(!DropCounter::default().is_of(&DropCounter::default()));
    }
}

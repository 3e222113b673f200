//! Hashed cells: the hash of all tables that programs index themselves, and cells that hold a tag and a time.

/// Bits of a cell that hold the time. They wrap around after half a year of seconds, or four hours of milliseconds.
const TIME_BITS: u32 = 24;
const TIME_MASK: u64 = (1 << TIME_BITS) - 1;

/// One pod's cells in a table that has cells for each slot. The mark is part of each flow's hash, so a pod's cells match nothing
/// for the next pod in its slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodCells {
    /// The pod's slot.
    pub slot: u32,
    /// Lower half of the id of the pod's cgroup. The kernel gives each of its values once before it begins again, which takes 2^31
    /// cgroups. No cell counts for that long.
    pub mark: u32,
}

impl PodCells {
    /// Returns the cells of the pod with this slot and cgroup.
    #[inline(always)]
    #[must_use]
    pub const fn new(slot: u32, cgroup: u64) -> Self {
        Self { slot, mark: cgroup as u32 }
    }
}

/// A bijection of 64 bits in which each bit of the input changes half of the output (murmur3's finalizer).
#[inline(always)]
pub(crate) const fn mix(mut value: u64) -> u64 {
    value ^= value >> 33;
    value = value.wrapping_mul(0xff51_afd7_ed55_8ccd);
    value ^= value >> 33;
    value = value.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    value ^ value >> 33
}

/// Returns a number that depends on the pod with this slot, and that no pod can foresee.
#[inline(always)]
#[must_use]
pub const fn pod_secret(seed: u64, slot: u32) -> u32 {
    mix(seed ^ slot as u64) as u32
}

/// Returns the tag of what has this `hash`, from the bits that choose no cell. An empty cell is 0, which no tag is.
#[inline(always)]
pub(crate) const fn tag(hash: u64) -> u64 {
    (hash >> TIME_BITS | 1) << TIME_BITS
}

/// Returns what the cell of `tag` holds from `time` on, in any unit.
#[inline(always)]
pub(crate) const fn noted(tag: u64, time: u64) -> u64 {
    tag | time & TIME_MASK
}

/// Returns true if `cell` was noted for `tag` at most `most` units before `time`.
#[inline(always)]
pub(crate) const fn is_noted_within(cell: u64, tag: u64, time: u64, most: u64) -> bool {
    cell & !TIME_MASK == tag && time.wrapping_sub(cell) & TIME_MASK <= most
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits;

    #[test]
    fn each_pod_and_seed_has_a_secret_of_its_own() {
        let of_seed = |seed: u64| (0..limits::SLOTS).map(move |slot| pod_secret(seed << 32, slot));
        let secrets: std::collections::HashSet<_> = (0..4).flat_map(of_seed).collect();
        assert_eq!(secrets.len(), 4 * limits::SLOTS as usize);
    }

    #[test]
    fn the_hash_is_murmur3s_finalizer() {
        let known = [
            (0, 0),
            (1, 0xb456_bcfc_34c2_cb2c),
            (2, 0x3abf_2a20_6506_83e7),
            (u64::MAX, 0x64b5_720b_4b82_5f21),
        ];
        assert_eq!(known.map(|(value, _)| mix(value)), known.map(|(_, mixed)| mixed));
    }

    #[test]
    fn a_tag_leaves_room_for_the_time_and_is_no_empty_cell() {
        for hash in [0, 1, 1 << TIME_BITS, u64::MAX, mix(7)] {
            let tag = tag(hash);
            assert!(tag & TIME_MASK == 0 && tag >> TIME_BITS & 1 == 1, "{hash:x}");
            // The time wraps around.
            let at = 3 * (TIME_MASK + 1) - 2;
            let cell = noted(tag, at);
            assert!(is_noted_within(cell, tag, at, 0) && is_noted_within(cell, tag, at + 5, 5));
            assert!(!is_noted_within(cell, tag, at + 6, 5) && !is_noted_within(cell, tag, at - 1, 5));
            assert!(!is_noted_within(0, tag, 0, 5) && !is_noted_within(cell, !tag & !TIME_MASK, at, 5));
        }
    }
}

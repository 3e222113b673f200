//! Each pod's share of the maps of pending connections.
//!
//! The kernel side counts the entries of each slot. It adds one before it makes an entry, and takes one off after it removed the
//! entry. Of several removers one succeeds. So the count is never below the number of entries, and no slot has more entries than
//! its share. The shares of all slots fit into the maps. Entries of a pod that left count for the slot until their sockets close.

/// Numbers of a pod's entries in the maps of pending connections. The map's index is the pod's slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// Captured connections that the agent's listener has not taken yet.
    pub captured: i64,
    /// Connections of the agent that the pod's applications have not taken yet.
    pub dialled: i64,
    /// Captured connections that were refused because the share was used up, of all pods that had the slot since the map was
    /// made. Only the sum over all slots is shown.
    pub captured_refused: i64,
    /// Connections of the agent that were refused because the share was used up, counted as above.
    pub dialled_refused: i64,
}

impl Pending {
    /// Returns true if no connection is pending.
    #[must_use]
    pub const fn is_clear(&self) -> bool {
        self.captured <= 0 && self.dialled <= 0
    }
}

const _: () = assert!(size_of::<Pending>() == 32);

#[cfg(feature = "user")]
// SAFETY: repr(C), no padding (asserted above by size), every bit pattern is valid.
unsafe impl aya::Pod for Pending {}

/// Returns true if a pod with `entries` can have no further one in a map with this `share`. The number is signed: should the counters ever be lost
/// while entries remain, it falls below zero and admits as many too much, and no pod is locked out.
#[inline(always)]
#[must_use]
pub const fn is_share_used_up(entries: i64, share: u32) -> bool {
    entries >= share as i64
}

/// Returns true if the count after an entry was added to it is inside the `share`.
#[inline(always)]
#[must_use]
pub const fn is_in_share(entries_with_new: i64, share: u32) -> bool {
    entries_with_new <= share as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits;

    #[test]
    fn a_share_ends_at_its_bound_and_lost_counters_lock_nobody_out() {
        let share = limits::DIALLED_PER_POD;
        let bound = i64::from(share);
        for (entries, used_up) in
            [(i64::MIN, false), (-1, false), (0, false), (bound - 1, false), (bound, true), (i64::MAX, true)]
        {
            assert_eq!(is_share_used_up(entries, share), used_up, "{entries}");
            if let Some(with_new) = entries.checked_add(1) {
                assert_eq!(is_in_share(with_new, share), !used_up, "{entries}");
            }
        }
    }
}

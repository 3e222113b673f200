//! The maps of pending connections, with a share for each pod, see `tacit_abi::Pending`.
//!
//! An entry is removed when the other side's handshake ends, else at CLOSE of the socket that made the entry. The removal takes
//! it off the count of the pod that the entry names.

use aya_ebpf::bindings::BPF_NOEXIST;
use tacit_abi::{Destination, Pending, Tuple, is_in_share, is_share_used_up, limits};

use crate::{
    atomic::Counter,
    maps::{CAPTURED, DIALLED, PENDING},
};

/// One of the two maps.
#[derive(Clone, Copy)]
pub enum Table {
    Captured,
    Dialled,
}

impl Table {
    /// Returns the share of one pod, in entries.
    #[inline(always)]
    const fn share(self) -> u32 {
        match self {
            Self::Captured => limits::CAPTURED_PER_POD,
            Self::Dialled => limits::DIALLED_PER_POD,
        }
    }

    #[inline(always)]
    fn insert(self, key: &Tuple, entry: &Destination) -> bool {
        match self {
            Self::Captured => CAPTURED.insert(key, entry, BPF_NOEXIST.into()),
            Self::Dialled => DIALLED.insert(key, entry, BPF_NOEXIST.into()),
        }
        .is_ok()
    }

    #[inline(always)]
    fn get(self, key: &Tuple) -> Option<Destination> {
        // SAFETY: the entry is copied at once; entries are never changed in place.
        match self {
            Self::Captured => unsafe { CAPTURED.get(key) },
            Self::Dialled => unsafe { DIALLED.get(key) },
        }
        .copied()
    }

    #[inline(always)]
    fn remove(self, key: &Tuple) -> bool {
        match self {
            Self::Captured => CAPTURED.remove(key),
            Self::Dialled => DIALLED.remove(key),
        }
        .is_ok()
    }

    /// Returns the pod's counter of entries.
    #[inline(always)]
    fn entries(self, pending: *mut Pending) -> Counter {
        // SAFETY: a live value of the map, whose fields are aligned words and are changed here only.
        unsafe {
            Counter::at(match self {
                Self::Captured => &raw mut (*pending).captured,
                Self::Dialled => &raw mut (*pending).dialled,
            })
        }
    }

    /// Returns the pod's counter of refused entries.
    #[inline(always)]
    fn refused(self, pending: *mut Pending) -> Counter {
        // SAFETY: as above.
        unsafe {
            Counter::at(match self {
                Self::Captured => &raw mut (*pending).captured_refused,
                Self::Dialled => &raw mut (*pending).dialled_refused,
            })
        }
    }
}

/// Returns true if the pod can have no further captured connection; also for a pod without a slot.
#[inline(always)]
pub fn is_captured_share_used_up(slot: u32) -> bool {
    let Some(pending) = PENDING.get_ptr_mut(slot) else { return true };
    let used_up = is_share_used_up(Table::Captured.entries(pending).get(), Table::Captured.share());
    if used_up {
        Table::Captured.refused(pending).add(1);
    }
    used_up
}

/// Makes an entry; false if the pod's share is used up or there is no memory.
#[inline(always)]
pub fn publish(table: Table, key: &Tuple, entry: &Destination) -> bool {
    if try_publish(table, key, entry) {
        return true;
    }
    // For sockets of an agent whose cgroup is below the pods' cgroup the program runs twice, and the second run finds the first
    // one's entry. A connection that ended without CLOSE leaves one too. Both are replaced.
    take(table, key).is_some() && try_publish(table, key, entry)
}

/// Adds one to the count, then reads it. Of two CPUs at the bound both may be refused, but never are too many admitted. The
/// addition returns nothing: programs on arm64 have an atomic that does only from Linux 5.18 on.
#[inline(always)]
fn try_publish(table: Table, key: &Tuple, entry: &Destination) -> bool {
    let Some(pending) = PENDING.get_ptr_mut(entry.slot) else { return false };
    let entries = table.entries(pending);
    entries.add(1);
    let is_in_share = is_in_share(entries.get(), table.share());
    if is_in_share && table.insert(key, entry) {
        return true;
    }
    entries.add(-1);
    if !is_in_share {
        table.refused(pending).add(1);
    }
    false
}

/// Takes an entry out. Of several that try at once one gets it.
#[inline(always)]
pub fn take(table: Table, key: &Tuple) -> Option<Destination> {
    let entry = table.get(key)?;
    if !table.remove(key) {
        return None;
    }
    if let Some(pending) = PENDING.get_ptr_mut(entry.slot) {
        table.entries(pending).add(-1);
    }
    Some(entry)
}

//! Captured connections whose handshake has a socket since a moment ago, see `tacit_abi::recent_cell`.

use tacit_abi::{Inbound, is_recent, noted_at, recent_cell};

use crate::{context::now, lookup, maps::RECENT};

/// Notes a connection.
#[inline(always)]
pub fn note(flow: &Inbound) {
    let (cell, tag) = recent_cell(lookup::seed(), flow);
    let Some(cell) = RECENT.get_ptr_mut(cell) else { return };
    // SAFETY: a live value of the map, an aligned word.
    unsafe { cell.write_volatile(noted_at(tag, now())) };
}

/// Forgets a connection: another one begins from the same ends.
#[inline(always)]
pub fn forget(flow: &Inbound) {
    let (cell, tag) = recent_cell(lookup::seed(), flow);
    let Some(cell) = RECENT.get_ptr_mut(cell) else { return };
    // SAFETY: as above.
    unsafe {
        if is_recent(cell.read_volatile(), tag, now()) {
            cell.write_volatile(0);
        }
    }
}

/// Returns true if the connection was noted a moment ago.
#[inline(always)]
pub fn has(flow: &Inbound) -> bool {
    let (cell, tag) = recent_cell(lookup::seed(), flow);
    let Some(cell) = RECENT.get_ptr(cell) else { return false };
    // SAFETY: as above.
    is_recent(unsafe { cell.read_volatile() }, tag, now())
}

//! Counting: every verdict and every error goes through here once.

use tacit_abi::Reason;

use crate::maps::COUNTERS;

/// Adds one to the counter of `reason` on this CPU.
#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: the pointer is this CPU's slot of a per-CPU array; programs are not preempted by themselves.
        unsafe { *counter += 1 }
    }
}

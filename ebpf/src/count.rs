//! Counters: every verdict and every error is counted here once.

use tacit_abi::Reason;

use crate::maps::COUNTERS;

/// Adds one to the counter of `reason` on this CPU.
#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: the pointer is this CPU's slot of a per-CPU array; a program does not preempt itself.
        unsafe { *counter += 1 }
    }
}

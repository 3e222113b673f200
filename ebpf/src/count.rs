//! Counters: every verdict and every error is counted here once. A packet that passes by an exception is counted by the exception.

use aya_ebpf::btf_maps::PerCpuArray;
use tacit_abi::{Exception, ExceptionHook, Reason};

use crate::maps::{COUNTERS, EXCEPTIONS};

/// Adds one to the counter of `reason` on this CPU.
#[inline(always)]
pub fn count(reason: Reason) {
    add_one(&COUNTERS, reason as u32);
}

/// Adds one to the counter of `exception` at `hook` on this CPU.
#[inline(always)]
pub fn count_exception(exception: Exception, hook: ExceptionHook) {
    add_one(&EXCEPTIONS, exception.counter(hook));
}

#[inline(always)]
fn add_one<const LENGTH: usize>(counters: &PerCpuArray<u64, LENGTH>, index: u32) {
    if let Some(counter) = counters.get_ptr_mut(index) {
        // SAFETY: the pointer is this CPU's slot of a per-CPU array; a program does not preempt itself.
        unsafe { *counter += 1 }
    }
}

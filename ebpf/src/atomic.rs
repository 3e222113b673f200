//! A number in a map that several CPUs change at once.
//!
//! The target has no compare-and-swap, so the standard library offers no read-modify-write on its atomics. The kernel has
//! had the instruction for it since the first version of BPF.

use core::arch::asm;

/// A number in a value of a map.
#[derive(Clone, Copy)]
pub struct Counter(*mut i64);

impl Counter {
    /// # Safety
    /// `at` is an aligned field of a live value of a map, and all programs change it through a [`Counter`].
    #[inline(always)]
    pub unsafe fn at(at: *mut i64) -> Self {
        Self(at)
    }

    /// Adds `amount`, which may be negative.
    #[inline(always)]
    pub fn add(self, amount: i64) {
        // SAFETY: `Counter::at` requires a live, aligned word.
        unsafe { asm!("lock *(u64 *)({at} + 0) += {amount}", at = in(reg) self.0, amount = in(reg) amount) }
    }

    /// Returns the number.
    #[inline(always)]
    pub fn get(self) -> i64 {
        // SAFETY: as above.
        unsafe { self.0.read_volatile() }
    }
}

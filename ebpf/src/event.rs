//! Lines for the agent's log about what was denied or lost, at a bounded rate. Counters tell all of it, lines tell who.

use aya_ebpf::helpers::bpf_ktime_get_ns;

use crate::maps::LOG_BUDGET;

/// Lines each CPU may write in one second: enough to see what happens, too few to fill the agent's log by connecting.
const LINES_PER_SECOND: u64 = 10;
const SECOND_NS: u64 = 1_000_000_000;

/// What is left of this CPU's second.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Budget {
    second: u64,
    lines: u64,
}

/// May this program write one line now?
#[inline(always)]
pub fn admit() -> bool {
    let Some(slot) = LOG_BUDGET.get_ptr_mut(0) else { return false };
    // SAFETY: takes no pointer.
    let second = unsafe { bpf_ktime_get_ns() } / SECOND_NS;
    // SAFETY: this CPU's slot of a per-CPU array; a lost update under preemption only shifts the bound.
    let budget = unsafe { &mut *slot };
    if budget.second != second {
        *budget = Budget { second, lines: 0 };
    }
    budget.lines += 1;
    budget.lines <= LINES_PER_SECOND
}

//! Rate limit for lines in the agent's log about denied or lost connections. Counters are complete; lines name the ends.

use aya_ebpf::{btf_maps::PerCpuArray, helpers::bpf_ktime_get_ns, macros::btf_map};

/// Lines that each CPU may write in one second. A pod must not be able to fill the agent's log by connecting.
const LINES_PER_SECOND: u64 = 10;
const SECOND_NS: u64 = 1_000_000_000;

/// Lines that a CPU wrote in its current second.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Budget {
    second: u64,
    lines: u64,
}

/// Numbers of log lines that each CPU wrote in its current second. Not pinned, because a successor does not need them.
#[btf_map]
static LOG_BUDGET: PerCpuArray<Budget, 1> = PerCpuArray::new();

/// Takes one line from this CPU's budget; false if the budget is used up.
#[inline(always)]
pub fn take_line() -> bool {
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

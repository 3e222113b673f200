//! Rate limit for lines in the agent's log about denied connections and dropped packets. Counters are complete; lines name the
//! ends.
//!
//! Each pod has a share of the lines, so one pod that connects in a loop does not hide the lines of others. Four such pods on one
//! CPU do.

use aya_ebpf::{btf_maps::PerCpuArray, helpers::bpf_ktime_get_ns, macros::btf_map};
use tacit_abi::limits;

/// Lines that each CPU may write in one second. Pods must not be able to fill the agent's log by connecting.
const LINES_PER_SECOND: u64 = 10;
/// Of these, lines of one pod. All pods without a slot together have one share.
const LINES_PER_POD: u64 = 3;
const SECOND_NS: u64 = 1_000_000_000;
/// Index of the budget of all pods without a slot, behind the slots.
const WITHOUT_SLOT: u32 = limits::SLOTS;
/// Index of the budget of all pods together.
const ALL: u32 = limits::SLOTS + 1;

/// Lines that were asked for on a CPU in its current second, written or not.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Budget {
    second: u64,
    lines: u64,
}

/// Budgets of each CPU, by slot. Not pinned, because a successor does not need them.
#[btf_map]
static LOG_BUDGET: PerCpuArray<Budget, { limits::SLOTS as usize + 2 }> = PerCpuArray::new();

/// Takes one line about the pod with this slot from this CPU's budgets; false if that of the pod or that of all pods is used
/// up. A line that only the second one refuses still counts in the first.
#[inline(always)]
pub fn take_line(slot: u32) -> bool {
    // SAFETY: takes no pointer.
    let second = unsafe { bpf_ktime_get_ns() } / SECOND_NS;
    let of_pod = if slot < limits::SLOTS { slot } else { WITHOUT_SLOT };
    take(of_pod, second, LINES_PER_POD) && take(ALL, second, LINES_PER_SECOND)
}

#[inline(always)]
fn take(index: u32, second: u64, bound: u64) -> bool {
    let Some(slot) = LOG_BUDGET.get_ptr_mut(index) else { return false };
    // SAFETY: this CPU's slot of a per-CPU array; a lost update under preemption only shifts the bound.
    let budget = unsafe { &mut *slot };
    if budget.second != second {
        *budget = Budget { second, lines: 0 };
    }
    budget.lines += 1;
    budget.lines <= bound
}

//! Rate limit for lines in the agent's log about denied or lost connections. Counters are complete; lines name the ends.
//!
//! Each pod has a share of the lines. One that connects in a loop must not hide the lines of others.

use aya_ebpf::{btf_maps::PerCpuArray, helpers::bpf_ktime_get_ns, macros::btf_map};
use tacit_abi::limits;

/// Lines that each CPU may write in one second. Pods must not be able to fill the agent's log by connecting.
const LINES_PER_SECOND: u64 = 10;
/// Of these, lines of one pod. All pods without a slot together have one share.
const LINES_PER_POD: u64 = 3;
const SECOND_NS: u64 = 1_000_000_000;
/// Index of the lines of all pods in their map, behind the slots, and of the pods without a slot.
const ALL: u32 = limits::SLOTS + 1;
const WITHOUT_SLOT: u32 = limits::SLOTS;

/// Lines that a CPU wrote in its current second.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Budget {
    second: u64,
    lines: u64,
}

/// Numbers of log lines that each CPU wrote in its current second, by slot. Not pinned, because a successor does not need
/// them.
#[btf_map]
static LOG_BUDGET: PerCpuArray<Budget, { limits::SLOTS as usize + 2 }> = PerCpuArray::new();

/// Takes one line about the pod with this slot from this CPU's budget; false if the pod's or all of it is used up.
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

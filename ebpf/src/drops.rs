//! Dropped packets: counted by reason and by pod, and logged within a budget.

use aya_ebpf::programs::SkBuffContext;
use aya_log_ebpf::warn;
use tacit_abi::{Address, DROP_WAYS, DropCounter, Reason, drops_index, limits};

use crate::{
    context::now,
    count::count,
    log_budget,
    maps::{DROPS, PODS},
};

/// The facts of a dropped packet that are counted and logged.
pub struct Dropped {
    cgroup: u64,
    remote: Address,
    port: u16,
    protocol: u8,
    reason: Reason,
}

impl Dropped {
    pub const NONE: Self =
        Self { cgroup: 0, remote: Address::NONE, port: 0, protocol: 0, reason: Reason::GuardUnreadable };
}

/// Says what is dropped; always false.
#[inline(always)]
pub fn drop(
    dropped: &mut Dropped,
    cgroup: u64,
    remote: &Address,
    port: u16,
    protocol: u8,
    reason: Reason,
) -> bool {
    *dropped = Dropped { cgroup, remote: *remote, port, protocol, reason };
    false
}

/// Counts and logs a drop; always false.
#[inline(never)]
pub fn report(ctx: &SkBuffContext, dropped: &Dropped) -> bool {
    let Dropped { cgroup, remote, port, protocol, reason } = *dropped;
    count(reason);
    // SAFETY: the slot is copied at once; the agent replaces entries, it never changes one in place.
    let slot = unsafe { PODS.get(&cgroup) }.map_or(u32::MAX, |pod| pod.slot);
    let kind = DropCounter {
        cgroup,
        remote,
        reason: reason as u32,
        protocol: u32::from(protocol),
        packets: 1,
        seen: now(),
    };
    count_kind(slot, &kind);
    if log_budget::take_line(slot) {
        warn!(
            ctx,
            "packet of cgroup {}, other end [{:i}]:{}, protocol {}: dropped, reason {}",
            cgroup,
            remote.octets(),
            port,
            protocol,
            reason as u32
        );
    }
    false
}

/// Counts one packet of a kind: in its own counter, else in a free or the least recently seen one of the pod. Two CPUs may
/// lose a count to each other, `COUNTERS` do not.
#[inline(never)]
fn count_kind(slot: u32, kind: &DropCounter) {
    let Some(drops) = DROPS.get_ptr_mut(drops_index(slot, kind.cgroup)) else { return };
    // SAFETY: a live value of the map.
    let counters = unsafe { &mut (*drops).0 };
    let first = kind.first();
    let mut oldest = (first, u64::MAX);
    for way in first..first + DROP_WAYS {
        let counter = &mut counters[(way & (limits::DROPS_PER_POD - 1)) as usize];
        if counter.is_of(kind) {
            counter.packets += 1;
            counter.seen = kind.seen;
            return;
        }
        if counter.seen < oldest.1 {
            oldest = (way, counter.seen);
        }
    }
    counters[(oldest.0 & (limits::DROPS_PER_POD - 1)) as usize] = *kind;
}

//! Dropped packets: counted by reason and by pod, and logged within a budget.

use aya_ebpf::{bindings::BPF_NOEXIST, programs::SkBuffContext};
use aya_log_ebpf::warn;
use tacit_abi::{Address, DropKey, Reason};

use crate::{count::count, log_budget, maps::DROPS};

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
    let key = DropKey { cgroup, remote, reason: reason as u32, protocol: u32::from(protocol) };
    match DROPS.get_ptr_mut(&key) {
        // SAFETY: a live value of the map; two CPUs may lose a count to each other, COUNTERS do not.
        Some(packets) => unsafe { *packets += 1 },
        None => {
            let _ = DROPS.insert(&key, &1, BPF_NOEXIST.into());
        }
    }
    if log_budget::take_line() {
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

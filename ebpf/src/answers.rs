//! The table of datagrams whose answers are expected, see `tacit_abi::answer_cells`. Both functions are compiled apart from
//! their callers, whose stack is short.

use tacit_abi::{ANSWER_WAYS, Packet, PodCells, answer_cells, is_expected, remember};

use crate::{context, lookup, maps::ANSWERS};

/// Returns true if the pod sent a datagram of the packet's flow a short time ago.
#[inline(never)]
pub fn is_answer(pod: PodCells, packet: &Packet) -> bool {
    let Some((first, tag)) = answer_cells(lookup::seed(), pod, packet) else { return false };
    let now = context::now();
    for way in 0..ANSWER_WAYS {
        if ANSWERS.get(first + way).is_some_and(|cell| is_expected(*cell, tag, now)) {
            return true;
        }
    }
    false
}

/// Remembers that the pod sent a datagram. The flow's own cell is used, else a free or the oldest one.
#[inline(never)]
pub fn expect_answer(pod: PodCells, packet: &Packet) {
    let Some((first, tag)) = answer_cells(lookup::seed(), pod, packet) else { return };
    let fresh = remember(tag, context::now());
    let mut oldest = (first, u64::MAX);
    for way in 0..ANSWER_WAYS {
        let Some(cell) = ANSWERS.get(first + way) else { return };
        if *cell == fresh {
            return;
        }
        // The time is in the lower bits. Of an own cell it counts as the oldest.
        let age = if *cell ^ tag < 1 << 24 { 0 } else { *cell & 0xff_ffff };
        if age < oldest.1 {
            oldest = (first + way, age);
        }
    }
    if let Some(cell) = ANSWERS.get_ptr_mut(oldest.0) {
        // SAFETY: a live value of the map, written as one word.
        unsafe { *cell = fresh };
    }
}

//! The table of flows that the node itself has with pods, see `tacit_abi::NodeFlow`. Both functions are compiled apart from
//! their callers, whose stack is short.

use tacit_abi::{NODE_FLOW_WAYS, NodeFlow, PodCells};

use crate::{context::now, lookup, maps::NODE_FLOWS};

/// Returns true if the node itself sent a packet of this flow to the pod a short time ago.
#[inline(never)]
pub fn is_node_flow(pod: PodCells, flow: &NodeFlow) -> bool {
    let Some(key) = flow.key(lookup::seed(), pod) else { return false };
    let now = now();
    for way in 0..NODE_FLOW_WAYS {
        if NODE_FLOWS.get(key.index + way).is_some_and(|cell| key.is_proven(cell, now)) {
            return true;
        }
    }
    false
}

/// Remembers that the node itself sent a packet of this flow to the pod. The flow's own cell is used, else a free or the
/// oldest one of the pod.
#[inline(never)]
pub fn prove(pod: PodCells, flow: &NodeFlow) {
    let Some(key) = flow.key(lookup::seed(), pod) else { return };
    let now = now();
    let proven = key.proven(now);
    let mut oldest = (key.index, 0);
    for way in 0..NODE_FLOW_WAYS {
        let Some(cell) = NODE_FLOWS.get(key.index + way) else { return };
        if *cell == proven {
            return;
        }
        let age = if key.is_of(cell) { u64::MAX } else { cell.age(now) };
        if age >= oldest.1 {
            oldest = (key.index + way, age);
        }
        if key.is_of(cell) {
            break;
        }
    }
    if let Some(cell) = NODE_FLOWS.get_ptr_mut(oldest.0) {
        // SAFETY: a live value of the map. Each word is written at once, and a cell between both writes matches no flow.
        unsafe {
            (&raw mut (*cell).first).write_volatile(proven.first);
            (&raw mut (*cell).second).write_volatile(proven.second);
        }
    }
}

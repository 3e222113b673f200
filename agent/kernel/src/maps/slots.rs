//! The cells of a slot: the flows that the kernel side remembers of the pod that has it, see `tacit_abi`'s `answers` and `node_flows`.

use aya::maps::{Array, MapData};
use tacit_abi::{NodeFlowCell, limits};

use super::{KernelError, Maps, Programs, failed, lock, unlocked};

/// Both maps with cells.
pub(super) struct Cells {
    answers: Array<MapData, u64>,
    node_flows: Array<MapData, NodeFlowCell>,
}

impl Cells {
    pub(super) fn take(programs: &mut Programs) -> Result<Self, KernelError> {
        Ok(Self { answers: unlocked(programs, "ANSWERS")?, node_flows: unlocked(programs, "NODE_FLOWS")? })
    }
}

impl Maps {
    /// Forgets the flows of the pod that had this slot before: an answer to that pod is none to the next one. To be called
    /// before the next pod gets its entry.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn clear_cells(&self, slot: u32) -> Result<(), KernelError> {
        if slot >= limits::SLOTS {
            return Ok(());
        }
        let mut cells = lock(&self.cells);
        let of = |each: u32| slot * each..(slot + 1) * each;
        for cell in of(limits::ANSWERS_PER_POD) {
            cells.answers.set(cell, 0, 0).map_err(failed("ANSWERS"))?;
        }
        for cell in of(limits::NODE_FLOWS_PER_POD) {
            cells.node_flows.set(cell, NodeFlowCell::default(), 0).map_err(failed("NODE_FLOWS"))?;
        }
        Ok(())
    }
}

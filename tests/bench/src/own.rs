//! Measurements that need a topology of their own.

mod idle;
mod kernel;
mod pods;
mod workers;

use anyhow::Result;

use super::{cases::Own, ground::Programs, measure::Plan, result::Measured};

/// Runs one of them.
pub(super) fn run(own: Own, programs: &Programs, plan: Plan) -> Result<Vec<Measured>> {
    match own {
        Own::Idle => idle::run(programs),
        Own::Workers => workers::run(programs, plan),
        Own::Pods => pods::run(programs),
        Own::Kernel => kernel::run(programs, plan),
    }
}

//! Measurements that need a topology of their own.

mod idle;
mod kernel;
mod pods;
mod workers;

use anyhow::Result;

use super::{cases::Special, figures::Figure, programs::Programs, rounds::Plan};

/// Runs one of them.
pub(super) fn run(own: Special, programs: &Programs, plan: Plan) -> Result<Vec<Figure>> {
    match own {
        Special::Idle => idle::run(programs),
        Special::Workers => workers::run(programs, plan),
        Special::Pods => pods::run(programs),
        Special::Kernel => kernel::run(programs, plan),
    }
}

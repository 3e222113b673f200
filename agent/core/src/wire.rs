//! The wire format `tacit/1` between two agents.

pub mod flow_state;
pub mod frame;
pub mod open;

pub use flow_state::Role;
pub use open::{DenyReason, Open, OptimisticMode, TraceId};

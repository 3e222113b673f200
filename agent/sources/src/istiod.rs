//! istiod.
pub(crate) mod address;
mod authorization;
pub(crate) mod messages;
mod policies;

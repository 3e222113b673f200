//! Peers that must be rejected, on both sides of the tunnel. The reason is logged and counted, and no byte from or to an
//! application passes.
//!
//! The fakes hold the mesh's root key, so each is valid in every property but one. Fakes that are valid in every property
//! are accepted, which shows that the others are rejected for this property.

mod certificates;
mod clients;
mod fake;
mod federation;
mod pressure;
mod servers;

//! Peers that must be refused, on both sides of the tunnel: with the reason logged and counted, and without a byte
//! for or from an application.
//!
//! The fakes of this test hold the mesh's root key, so each can be right in everything but one thing. That they are
//! refused for that thing, and not because they are fakes, is shown by the ones that are right in everything.

mod clients;
mod fake;
mod forge;
mod pressure;
mod servers;

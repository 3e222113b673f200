//! The tunnel between two agents: mutually authenticated TLS that carries one flow at a time in frames (`tacit/1`), and
//! the relay of a flow.
//!
//! ```text
//!  client: Session::connect --> open --> relay --> pool     server: Session::accept --> next --> accept_flow --> relay --> next
//!               |                                                        |
//!              tls (configs, verifiers, records)                        tls
//! ```
//!
//! | module | content |
//! |---|---|
//! | `tls` | the TLS configuration, the verifiers, the record layer |
//! | `session` | one session on one connection |
//! | `relay` | moves the bytes of a flow until it ends |
//! | `batch` | DATA frames built in place, pure |
//! | `receive_buffer` | received bytes to frames, in place, no I/O |
//! | `app_read` | reads of an application's socket |
//! | `socket`, `buffers` | polled vectored socket I/O; buffers that idle flows do not hold |
//!
//! The frames are in `tacit_core::wire`. A byte is sent to a peer only after the peer's certificate was verified.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod app_read;
mod batch;
pub mod buffers;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod receive_buffer;
pub mod relay;
pub mod session;
pub mod socket;
#[cfg(test)]
mod testing;
pub mod tls;

use tacit_core::wire::TraceId;

pub use session::{OpenError, OptimisticData, Session};
pub use tls::{Refusal, TlsInfo, TunnelError};

/// A new trace id.
#[must_use]
pub fn random_trace_id() -> TraceId {
    TraceId(tls::random())
}

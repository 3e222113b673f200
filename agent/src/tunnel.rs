//! The tunnel between two agents: mutually authenticated TLS that carries one flow at a time in frames (`tacit/1`).
//!
//! ```text
//!  outbound --> Session::connect --> open --> relay --> Pool     Session::accept --> next --> accept_flow --> relay --> next
//!                     |                                                |
//!                    tls (configs, verifiers, records)                tls
//! ```
//!
//! | file | what it is |
//! |---|---|
//! | `frame`, `open` | the wire format: encoding and decoding, pure |
//! | `batch` | DATA frames built in place, pure |
//! | `phase` | which frame may come next, pure |
//! | `inbox` | received bytes to frames, in place, no I/O |
//! | `pool` | idle sessions of a pair, pure |
//! | `tls` | what TLS must be, whom to trust, the record stream |
//! | `session` | one session: all of the above on one connection |
//! | `socket`, `buffers` | polled vectored socket I/O; buffers that idle flows do not hold |
//!
//! Only `tls` knows rustls. A byte is sent to a peer only after its certificate was verified.

pub(crate) mod batch;
pub(crate) mod buffers;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub(crate) mod inbox;
pub(crate) mod said;
pub mod session;
pub(crate) mod socket;
#[cfg(test)]
pub(crate) mod testing;
pub mod tls;

use tacit_core::wire::TraceId;

pub(crate) use session::Early;
pub use session::{OpenError, Session};
pub use tls::{Refusal, TlsInfo, TunnelError};

/// A new trace id.
#[must_use]
pub fn random_trace_id() -> TraceId {
    TraceId(tls::random())
}

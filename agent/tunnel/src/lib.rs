//! The tunnel between two agents. A tunnel is a mutually authenticated TLS session that carries one flow at a time in frames
//! (`tacit/1`). The crate also contains the relay of a flow.
//!
//! ```text
//!  client: Outgoing::connect --> open --> relay --> pool     server: Incoming::accept --> next --> accept_flow --> relay --> next
//!               |                                                         |
//!            stream --> tls (configs, verifiers), record               stream
//! ```
//!
//! | module | content |
//! |---|---|
//! | `record` | the record layer: records after the handshake, sealed and opened in place; no I/O |
//! | `tls` | TLS configuration, verifiers and handshake |
//! | `stream` | one TLS connection on its socket |
//! | `session` | one session on one connection |
//! | `hbone` | the other wire format: HTTP/2 CONNECT over the same TLS, many flows a connection |
//! | `incoming`, `outgoing` | accepts a client, connects to a server, of either wire format |
//! | `relay` | forwards the bytes of a flow until the flow ends |
//! | `batch` | builds DATA frames in place; pure |
//! | `receive_buffer` | parses received bytes into frames, in place; no I/O |
//! | `app_read` | reads an application's socket |
//! | `socket`, `buffers` | polled vectored socket I/O; buffers that idle flows do not hold |
//!
//! The frames are defined in `tacit_core::wire`. No byte of a flow is sent before the peer's certificate is verified.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod app_read;
mod batch;
pub mod buffers;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod hbone;
mod incoming;
mod outgoing;
mod receive_buffer;
mod record;
pub mod relay;
pub mod session;
pub mod socket;
mod stream;
#[cfg(test)]
mod testing;
pub mod tls;

use tacit_core::wire::TraceId;

pub use incoming::Incoming;
pub use outgoing::Outgoing;
pub use record::RecordError;
pub use session::{OpenError, OptimisticData, Session};
pub use tls::{PeerCertificateError, TlsInfo, TunnelError};

/// Returns a new trace id.
#[must_use]
pub fn random_trace_id() -> TraceId {
    TraceId(tls::random())
}

//! gRPC over HTTP/2 on any byte stream: TCP, TLS or a Unix socket (gRPC's PROTOCOL-HTTP2.md).
//!
//! The messages are `prost` messages that the user of this crate defines. A channel is one connection. Addresses, TLS, deadlines
//! and reconnects are the caller's. Every message has a bound that the caller sets. Compressed messages are rejected, because no
//! compression is offered.
//!
//! The crate uses `h2` and not hyper: a call must see if the server reset it, closed the connection, or stopped answering
//! HTTP/2 PINGs. hyper reports all three as the end of a body.
//!
//! | module | content |
//! |---|---|
//! | `client` | a channel, its calls, keep-alive |
//! | `server` | calls of a connection, for simulated servers |
//! | `call` | one direction of a call: the sender and the receiver of messages |
//! | `frame` | frames of messages |
//! | `status` | status codes and texts |
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod call;
pub mod client;
pub mod frame;
pub mod server;
pub mod status;

pub use call::{CallError, Receiver, Sender};
pub use client::{Channel, KeepAlive, Settings};
pub use frame::MessageError;
pub use status::{Code, Status};

/// Media type of requests and answers.
pub const CONTENT_TYPE: &str = "application/grpc";

#[cfg(test)]
mod tests;

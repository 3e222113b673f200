//! HBONE, the wire format of Istio ambient: HTTP/2 over the same TLS, each flow a CONNECT stream. Peers that are no Tacit agents
//! choose it by ALPN `h2`.
//!
//! ```text
//! client: CONNECT 10.77.2.3:80 ──> request ── the agent checks and dials ──> 200, no END_STREAM ──> relay: DATA both ways
//!                                                                       └──> 400, 401 or 503 with END_STREAM
//! ```
//!
//! The agent is either side. As a client it opens a flow on a connection that it has to the destination, or on a new one.
//!
//! | module | content |
//! |---|---|
//! | `tls_io` | the bytes of the TLS connection, for HTTP/2 |
//! | `server` | one connection of a client, and its requests |
//! | `client` | one connection to a server, and the flows that open on it |
//! | `request` | what a request claims; pure |
//! | `window` | the window of each stream; pure |
//! | `stream` | the stream of a flow, and what it has received |
//! | `relay` | forwards the bytes of a flow |
//! | `unsent` | what of a stream waits for the connection's socket |
//! | `keep_alive` | PING |
//!
//! # Bounds
//!
//! A stream holds at most its window, which the agent sets by the connections that the pod has. The window of the connection is the
//! sum over its streams, so that an application that does not read holds up its own flow alone. Frames are at most 16 KiB. What has
//! come is taken out of the queue of HTTP/2 at once, so that small frames cost no more than their bytes.
//!
//! # Ends
//!
//! | event | other side |
//! |---|---|
//! | END_STREAM | the agent ends its direction to the application |
//! | RST_STREAM of any code, connection broken or closed inside the stream | application reset |
//! | application ends its direction | empty DATA with END_STREAM |
//! | application resets, also after its end or while the stream has no room | RST_STREAM (CONNECT_ERROR, RFC 9113 section 8.5) |

use std::time::Duration;

mod client;
mod keep_alive;
mod relay;
mod request;
mod server;
mod stream;
#[cfg(test)]
mod tests;
mod tls_io;
mod unsent;
mod window;

pub use client::{Asked, Client, Connected, Connection, OpenError, Place};
pub use relay::relay;
pub use request::{BadRequest, Connect};
pub use server::{Accepted, FlowRequest, Refused, Server};
pub use stream::{FlowStream, Peer};

/// Most streams of a connection that are open at a time. That of ztunnel's server; its client uses 100.
pub const STREAMS_MAX: u32 = 200;
/// Most streams that the agent opens on a connection, as ztunnel does. A server may allow fewer.
pub const CLIENT_STREAMS_MAX: usize = 100;
/// Streams that the agent has reset and still knows for 30 s. What the peer has sent on others by then counts as an error, and h2 ends a
/// connection after 1,024 of these.
const RESETS_KEPT: usize = 1024;
/// Most bytes of the fields of a request. Beyond it the answer is 431.
const FIELDS_MAX_BYTES: u32 = 64 << 10;
/// Largest frame that a peer may send: the smallest value of the protocol. A larger one would be buffered whole.
const FRAME_MAX_BYTES: u32 = 16 << 10;
/// Time for which [`RESETS_KEPT`] streams are known.
const RESETS_KEPT_FOR: Duration = Duration::from_secs(30);
/// Most bytes of a stream that wait for the connection's socket. With many connections of the pod it is the window of a stream.
const UNSENT_MAX_BYTES: u32 = 128 << 10;
/// Most pieces of these bytes: one for each read of the application's socket, which HTTP/2 never joins.
const UNSENT_PIECES_MAX: usize = 64;
/// Memory of the frames of a connection beside their content: twice that of the frames of one byte that come at a time. The streams take
/// them then.
const FRAMES_BUDGET_BYTES: usize = 8 << 20;

//! Forwards the bytes of one flow until it ends, and reports how it ended.
//!
//! [`tunnelled`] connects an application's socket and a tunnel session, [`plain`] two sockets. Each moves both directions in
//! one task, and a blocked direction never blocks the other. A half-close is forwarded as a half-close, and a reset as a
//! reset. A broken tunnel is forwarded as a reset, never as a clean end.
//!
//! A reset is delivered after the data sent before it, so an application that does not read sees it late.

use std::sync::atomic::AtomicU64;

mod bulk;
pub mod busy_poll;
mod delayed_accept;
mod plain;
#[cfg(test)]
pub(crate) mod testing;
pub mod threads;
mod tunnelled;
#[cfg(test)]
mod urgent;
mod watch;

pub use bulk::{BulkShare, PodBulk};
pub use busy_poll::{connection_proceeds, connection_started};
pub use plain::{Remote, plain};
pub use tunnelled::tunnelled;
pub(crate) use watch::PeerWatch;
pub use watch::{Answer, News, Tell, Watch, Watching};

use crate::TunnelError;

/// Payload bytes of one flow. Relaxed ordering is enough for statistics.
#[derive(Debug, Default)]
pub struct FlowCounters {
    /// Bytes from source to destination.
    pub sent: AtomicU64,
    /// Bytes from destination to source.
    pub received: AtomicU64,
}

/// One of the two applications of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum App {
    /// The client.
    Source,
    /// The server.
    Destination,
}

/// The way a flow ended.
#[derive(Debug)]
pub enum FlowEnd {
    /// Both directions ended, and all bytes were forwarded.
    Clean,
    /// The connection of this application was reset, or its agent gave up on it. The other connection was reset too.
    Reset(App),
    /// The tunnel failed. The local application was reset.
    TunnelLost(TunnelError),
    /// The kernel of the peer was silent for the limit, although it was asked.
    PeerSilent,
}

/// The way the relay of a flow over a tunnel stopped, before both ends are told.
pub(crate) enum Ending {
    /// Both directions ended.
    Finished,
    /// The local application's connection was reset.
    ResetByApp,
    /// The peer has reset the flow.
    ResetByPeer,
    /// The tunnel failed.
    Lost(TunnelError),
    /// The kernel of the peer was silent for the limit.
    Silent,
}

impl FlowEnd {
    /// Returns the label for logs and metrics, one of a fixed set.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Reset(App::Source) => "reset_by_source",
            Self::Reset(App::Destination) => "reset_by_destination",
            Self::TunnelLost(_) => "tunnel_lost",
            Self::PeerSilent => "peer_silent",
        }
    }

    /// Returns true if the peer's node does not answer any more.
    #[must_use]
    pub fn is_silence(&self) -> bool {
        match self {
            Self::PeerSilent => true,
            Self::TunnelLost(TunnelError::Io(error)) => error.kind() == std::io::ErrorKind::TimedOut,
            _ => false,
        }
    }
}

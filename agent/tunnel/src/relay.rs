//! Moves the bytes of one flow until it ends, and tells how it ended.
//!
//! [`tunnelled`] joins an application's socket and a tunnel session, [`plain`] two sockets. Both move both directions in one
//! task, each at its own pace: a direction that is blocked never holds up the other. The ends of a connection keep their
//! meaning: the end of one direction is passed on as such while the other goes on, a reset arrives as a reset, and a tunnel
//! that breaks is a reset and never looks like an end.
//!
//! A reset keeps its place behind the data that was sent before it: an application that does not read sees it late.

use std::sync::atomic::AtomicU64;

pub mod busy_poll;
mod delayed_accept;
mod plain;
#[cfg(test)]
pub(crate) mod testing;
mod tunnelled;

pub use busy_poll::begins;
pub use plain::plain;
pub use tunnelled::tunnelled;

use crate::TunnelError;

/// Payload bytes of one flow, counted by the relay as they pass. Relaxed ordering is enough: they are
/// statistics.
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
    /// The one that connected.
    Source,
    /// The one it connected to.
    Destination,
}

/// How a flow ended.
#[derive(Debug)]
pub enum FlowEnd {
    /// Both directions ended, every byte was passed on.
    Clean,
    /// This application's connection was reset (or its agent gave up on it); the other one was reset too.
    Reset(App),
    /// The tunnel broke; the application on our side was reset.
    TunnelLost(TunnelError),
}

impl FlowEnd {
    /// For logs and metric labels; one of a fixed set.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Reset(App::Source) => "reset_by_source",
            Self::Reset(App::Destination) => "reset_by_destination",
            Self::TunnelLost(_) => "tunnel_lost",
        }
    }
}

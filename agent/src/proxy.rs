//! The proxy of a node: it carries the flows of the node's pods.
//!
//! | module | content |
//! |---|---|
//! | `accept` | accepts the connections of a pod and gives each to a worker |
//! | `outbound` | captured connections |
//! | `inbound` | tunnel sessions, and plaintext that needs a verdict |
//! | `authorize` | asks policy about a flow, when it opens and when policy changes |
//! | `snapshots` | the control state that flows read |
//! | `dialer` | connections made from inside a pod's network namespace |
//! | `sessions` | tunnel sessions: handshake permits, idle sessions of each worker |
//! | `workers` | the threads that carry flows |
//! | `drain` | ends flows and listeners in order |
//!
//! This file has the parts that `outbound` and `inbound` share. Nothing here waits for a control task.

pub mod accept;
pub mod authorize;
pub mod dialer;
pub mod drain;
pub mod inbound;
pub mod outbound;
pub mod sessions;
pub mod snapshots;
pub mod workers;

use std::{io, net::SocketAddr, sync::Arc};

use arc_swap::ArcSwap;
use tacit_core::{balance::Balancer, spiffe::SpiffeId, wire::open::DenyReason};
use tacit_tunnel::{TlsInfo, socket::reset};
use tokio::net::TcpStream;

use crate::{
    enrol::Pods,
    proxy::{dialer::Dialer, drain::Drain, sessions::Sessions, snapshots::Snapshots, workers::Workers},
    telemetry::{Party, Refusal, Reporter, Security, Telemetry},
};

/// Everything a connection needs.
pub struct Proxy {
    /// The control state.
    pub snapshots: Snapshots,
    /// Pods of this node.
    pub pods: Arc<ArcSwap<Pods>>,
    /// Tunnel sessions.
    pub sessions: Sessions,
    /// Counters and logs.
    pub telemetry: Telemetry,
    /// Ends listeners and flows.
    pub drain: Drain,
    dialer: Dialer,
    balancer: Balancer,
    workers: Workers,
}

impl Proxy {
    /// A proxy without pods: [`Proxy::pods`] is filled by enrolment.
    #[must_use]
    pub fn new(snapshots: Snapshots, dialer: Dialer, workers: Workers, telemetry: Telemetry) -> Self {
        Self {
            snapshots,
            pods: Arc::default(),
            sessions: Sessions::new(workers.count()),
            telemetry,
            drain: Drain::default(),
            dialer,
            balancer: Balancer::default(),
            workers,
        }
    }

    /// One end of a flow, with what the directory knows of it.
    #[must_use]
    pub fn party(&self, address: SocketAddr, identity: Option<SpiffeId>) -> Party {
        self.snapshots.party(address, identity)
    }

    /// Resets a connection and says why.
    pub fn refuse(&self, connection: TcpStream, refused: Refused) {
        self.report(refused);
        reset(connection);
    }

    /// Counts and logs a refusal.
    pub fn report(&self, refused: Refused) {
        let Refused { reporter, source, destination, identity, reason, detail } = refused;
        self.telemetry.refused(&Refusal {
            reporter,
            source: self.party(source, identity),
            destination: self.party(destination, None),
            reason,
            detail,
        });
    }
}

/// A connection that is not to be, and why.
#[derive(Debug)]
pub struct Refused {
    /// Which side of the flow this agent is.
    pub reporter: Reporter,
    /// Who asked.
    pub source: SocketAddr,
    /// For what.
    pub destination: SocketAddr,
    /// Who the source proved to be.
    pub identity: Option<SpiffeId>,
    /// Stable label.
    pub reason: &'static str,
    /// For people.
    pub detail: String,
}

/// How a flow over a session is protected.
#[must_use]
pub fn security(tls: &TlsInfo) -> Security {
    Security::MutualTls { version: tls.version, cipher: tls.cipher, key_exchange: tls.key_exchange }
}

/// What a failed connect to an application is called, to the peer and in metrics.
#[must_use]
pub fn deny_reason(error: &io::Error) -> DenyReason {
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => DenyReason::ConnectionRefused,
        io::ErrorKind::TimedOut => DenyReason::TimedOut,
        _ => DenyReason::Unreachable,
    }
}

/// An address as the application meant it: v4-mapped is IPv4.
#[must_use]
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

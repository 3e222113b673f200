//! The proxy of a node: it carries the flows of the node's pods.
//!
//! | module | content |
//! |---|---|
//! | `accept` | accepts the connections of a pod and gives each to a worker |
//! | `outbound` | captured connections |
//! | `inbound` | tunnel sessions, and plaintext that needs a verdict |
//! | `authorize` | asks policy about a flow, when it opens and when policy changes |
//! | `sessions` | tunnel sessions: handshake permits, idle sessions of each worker |
//! | `workers` | the threads that carry flows |
//! | `drain` | ends flows and listeners in order |
//!
//! This file has the parts that `outbound` and `inbound` share: snapshots of control, the kernel's handles, the pool, and
//! connections to an application in its pod. Nothing here waits for a control task.

pub mod accept;
pub mod authorize;
pub mod drain;
pub mod inbound;
pub mod outbound;
pub mod sessions;
pub mod workers;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use tacit_core::{
    balance::Balancer,
    directory::{Directory, Workload},
    policy::Policies,
    spiffe::{SpiffeId, TrustDomain},
    wire::open::DenyReason,
};
use tacit_identity::manager::Identities;
use tacit_kernel::{Kernel, netns::HostNetns, socket};
use tacit_sources::reload::Watched;
use tacit_tunnel::{
    TlsInfo,
    socket::{reset, reset_if_dropped},
};
use tokio::net::TcpStream;

use crate::{
    enrol::{Pod, Pods},
    mesh::Mesh,
    proxy::{drain::Drain, sessions::Sessions, workers::Workers},
    telemetry::{Party, Refusal, Reporter, Security, Telemetry},
};

/// How long an application may take to accept. It is on this node: more means its backlog is full.
const APPLICATION_CONNECT: Duration = Duration::from_secs(5);
/// Everything a connection needs.
pub struct Proxy {
    /// Identities outside it do not exist.
    pub trust_domain: TrustDomain,
    /// The kernel side.
    pub kernel: Arc<Kernel>,
    /// The node's own namespace.
    pub host: Arc<HostNetns>,
    /// Who is where.
    pub directory: Arc<Watched<Directory>>,
    /// Modes.
    pub policies: Arc<Watched<Policies>>,
    /// Certificates.
    pub identities: Arc<Identities>,
    /// Pods of this node.
    pub table: Arc<ArcSwap<Pods>>,
    /// Counters and logs.
    pub telemetry: Telemetry,
    /// How the agent ends.
    pub drain: Drain,
    /// Addresses of the mesh, those of services included.
    pub mesh: Arc<Mesh>,
    /// Chooses endpoints of services.
    pub balancer: Balancer,
    /// Tunnel sessions.
    pub sessions: Sessions,
    /// Who carries flows.
    pub workers: Workers,
}

/// Parts of a [`Proxy`] that others made.
pub struct Parts {
    /// See [`Proxy::trust_domain`].
    pub trust_domain: TrustDomain,
    /// See [`Proxy::kernel`].
    pub kernel: Arc<Kernel>,
    /// See [`Proxy::host`].
    pub host: Arc<HostNetns>,
    /// See [`Proxy::directory`].
    pub directory: Arc<Watched<Directory>>,
    /// See [`Proxy::policies`].
    pub policies: Arc<Watched<Policies>>,
    /// See [`Proxy::identities`].
    pub identities: Arc<Identities>,
    /// See [`Proxy::table`].
    pub table: Arc<ArcSwap<Pods>>,
    /// See [`Proxy::telemetry`].
    pub telemetry: Telemetry,
    /// See [`Proxy::drain`].
    pub drain: Drain,
    /// See [`Proxy::workers`].
    pub workers: Workers,
    /// See [`Proxy::mesh`].
    pub mesh: Arc<Mesh>,
}

impl Proxy {
    /// Puts the parts together.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        let Parts {
            trust_domain,
            kernel,
            host,
            directory,
            policies,
            identities,
            table,
            telemetry,
            drain,
            workers,
            mesh,
        } = parts;
        Self {
            trust_domain,
            kernel,
            host,
            directory,
            policies,
            identities,
            table,
            telemetry,
            drain,
            mesh,
            balancer: Balancer::default(),
            sessions: Sessions::new(workers.count()),
            workers,
        }
    }

    /// Whether the mesh's promises hold for `address`.
    #[must_use]
    pub fn is_mesh(&self, address: IpAddr) -> bool {
        self.mesh.contains(address)
    }

    /// Connects to an application of `pod` as `client`: the application sees the client's address.
    ///
    /// # Errors
    /// The kernel's, or a time-out.
    pub async fn to_application(
        &self,
        pod: &Pod,
        application: SocketAddr,
        client: SocketAddr,
    ) -> io::Result<TcpStream> {
        let socket = socket::dialer(&pod.netns, &self.host, application, client)?;
        // An application decides by who it is told its client is: without the name there is no connection.
        self.kernel.maps.set_peer_name(&socket, client).map_err(io::Error::other)?;
        let connected = socket::connected(socket, application, APPLICATION_CONNECT).await?;
        reset_if_dropped(&connected);
        Ok(connected)
    }

    /// One end of a flow, with what the directory knows of it.
    #[must_use]
    pub fn party(&self, address: SocketAddr, identity: Option<SpiffeId>) -> Party {
        Party { address, workload: self.workload(address.ip()), identity }
    }

    fn workload(&self, address: IpAddr) -> Option<Arc<Workload>> {
        self.directory.current().at(address).cloned()
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

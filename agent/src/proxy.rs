//! The proxy of a node: it carries the flows of the node's pods.
//!
//! | module | content |
//! |---|---|
//! | `outbound` | captured connections |
//! | `inbound` | tunnel sessions, and plaintext that needs a verdict |
//! | `authorize` | asks policy about a flow, when it opens and when policy changes |
//! | `workers` | the threads that carry flows |
//! | `drain` | ends flows and listeners in order |
//!
//! This file has the parts that `outbound` and `inbound` share: snapshots of control, the kernel's handles, the pool, and
//! connections to an application in its pod. Nothing here waits for a control task.

pub mod authorize;
pub mod drain;
pub mod inbound;
pub mod outbound;
pub mod workers;

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use tacit_core::{
    balance::Balancer,
    directory::{Directory, Workload},
    policy::Policies,
    pool::Pool,
    refusal::{Refusal, RefusalReason},
    spiffe::{SpiffeId, TrustDomain},
};
use tacit_identity::manager::Identities;
use tacit_kernel::{
    Kernel,
    netns::HostNetns,
    socket::{self, Acceptor},
};
use tacit_sources::reload::Watched;
use tacit_tunnel::{
    Session, TlsInfo,
    socket::{reset, reset_if_dropped},
};
use tokio::{net::TcpStream, sync::Semaphore};

use crate::{
    enrol::{Pod, Pods},
    mesh::Mesh,
    proxy::{drain::Drain, workers::Workers},
    telemetry::{Ends, Party, Reporter, Security, Telemetry},
};

/// How long an application may take to accept. It is on this node: more means its backlog is full.
const APPLICATION_CONNECT: Duration = Duration::from_secs(5);
/// Handshakes at the same time, over all pods; beyond it peers wait for their turn. One costs about a millisecond of a
/// core and some 30 kB while it lasts.
pub const HANDSHAKES_MAX: usize = 1024;
/// How long a peer waits for its turn: as long as a handshake may take at most, by then every other has ended.
pub const HANDSHAKE_WAIT: Duration = Duration::from_secs(10);
/// Pause when descriptors are used up: accepting again at once would only spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(20);

/// Sessions are interchangeable for flows of the same pod to the same server under the same identities.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// The thread that polls the session.
    pub worker: usize,
    /// Cgroup id of the source pod: a session belongs to its network namespace.
    pub pod: u64,
    /// Address of the destination pod.
    pub server: IpAddr,
    /// Identity the server proved.
    pub identity: SpiffeId,
    /// Serial number of the certificate the client showed.
    pub serial: Arc<str>,
}

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
    /// Bounds handshakes.
    pub handshakes: Semaphore,
    /// Who carries flows.
    pub workers: Workers,
    pool: Mutex<Pool<PoolKey, Box<Session>>>,
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
            handshakes: Semaphore::new(HANDSHAKES_MAX),
            workers,
            pool: Mutex::new(Pool::default()),
        }
    }

    /// Whether the mesh's promises hold for `address`.
    #[must_use]
    pub fn is_mesh(&self, address: IpAddr) -> bool {
        self.mesh.contains(address)
    }

    /// The idle sessions.
    pub fn pool(&self) -> MutexGuard<'_, Pool<PoolKey, Box<Session>>> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Returns both ends of a flow that this agent reports as the agent of the end `by`, with the directory's workloads and
    /// the identities that were proven.
    #[must_use]
    pub fn ends(
        &self,
        by: Reporter,
        addresses: Addresses,
        source: Option<SpiffeId>,
        destination: Option<SpiffeId>,
    ) -> Ends {
        let party = |address: SocketAddr, identity| Party {
            address,
            workload: self.workload(address.ip()),
            identity,
        };
        Ends {
            reporter: by,
            source: party(addresses.source, source),
            destination: party(addresses.destination, destination),
        }
    }

    fn workload(&self, address: IpAddr) -> Option<Arc<Workload>> {
        self.directory.current().at(address).cloned()
    }

    /// Counts and logs a refusal, and resets the connection.
    pub fn refuse(&self, connection: TcpStream, by: Reporter, addresses: Addresses, refusal: Refusal) {
        self.report(by, addresses, refusal);
        reset(connection);
    }

    /// Counts and logs a refusal by this agent, as the agent of the end `by`.
    pub fn report(&self, by: Reporter, addresses: Addresses, mut refusal: Refusal) {
        let ends = self.ends(by, addresses, refusal.source.take(), None);
        self.telemetry.refused(&ends, &refusal);
    }
}

/// The addresses of a flow, as both applications see them.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    /// The client's.
    pub source: SocketAddr,
    /// The server's.
    pub destination: SocketAddr,
}

/// How a flow over a session is protected.
#[must_use]
pub fn security(tls: &TlsInfo) -> Security {
    Security::MutualTls { version: tls.version, cipher: tls.cipher, key_exchange: tls.key_exchange }
}

/// Returns the refusal of a flow whose application or plaintext destination cannot be connected to.
#[must_use]
pub fn not_connected(error: &io::Error) -> Refusal {
    let reason = match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => RefusalReason::ConnectionRefused,
        io::ErrorKind::TimedOut => RefusalReason::TimedOut,
        _ => RefusalReason::Unreachable,
    };
    Refusal::new(reason, error)
}

/// Accepts on `listener` until the pod or the agent ends; each connection gets a task of its own.
pub fn accept_loop<F>(
    path: &Arc<Proxy>,
    pod: &Arc<Pod>,
    listener: TcpListener,
    handle: fn(Arc<Proxy>, Arc<Pod>, TcpStream, SocketAddr) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let (path, pod) = (path.clone(), pod.clone());
    let home = pod.home(path.workers.count());
    let thread = path.workers.handle(home).clone();
    thread.spawn(async move {
        match Acceptor::new(listener) {
            Ok(listener) => accept_on(path, pod, home, listener, handle).await,
            Err(error) => tracing::error!(%error, pod = %pod.workload.name, "a listener cannot be polled"),
        }
    });
}

async fn accept_on<F>(
    path: Arc<Proxy>,
    pod: Arc<Pod>,
    home: usize,
    listener: Acceptor,
    handle: fn(Arc<Proxy>, Arc<Pod>, TcpStream, SocketAddr) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    loop {
        let accepted = tokio::select! {
            () = path.drain.stop.cancelled() => return,
            () = pod.closed.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((connection, peer)) => {
                let (worker, load) = path.workers.place(home);
                let (on, who) = (path.clone(), pod.clone());
                let flow = async move {
                    match TcpStream::from_std(connection) {
                        Ok(connection) => handle(on, who, connection, canonical(peer)).await,
                        Err(error) => {
                            tracing::error!(%error, "a connection cannot be polled, and is dropped")
                        }
                    }
                    drop(load);
                };
                if worker == home {
                    path.drain.tasks.spawn(flow);
                } else {
                    path.drain.tasks.spawn_on(flow, path.workers.handle(worker));
                }
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::error!(%error, "cannot accept; raise the limit of open files if this persists");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// An address as the application meant it: v4-mapped is IPv4.
#[must_use]
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

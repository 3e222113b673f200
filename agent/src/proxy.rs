//! The proxy of a node: it carries the flows of the node's pods.
//!
//! | module | content |
//! |---|---|
//! | `accept` | accepts the connections of a pod and gives each to a worker |
//! | `outbound` | captured connections |
//! | `openings` | captured connections that the kernel holds meanwhile |
//! | `inbound` | tunnel sessions, and plaintext that needs a verdict |
//! | `authorize` | asks policy about a flow, when it opens and when policy changes |
//! | `dialer` | connections made from inside a pod's network namespace |
//! | `sessions` | tunnel sessions: idle sessions of each worker |
//! | `hbone` | connections to servers that speak HBONE |
//! | `watches` | asks the peers of flows whether they are alive |
//! | `shares` | permits of connections and handshakes, by pod and source address |
//! | `workers` | the threads that carry flows |
//! | `drain` | ends flows and listeners in order |
//!
//! This file has the parts that `outbound` and `inbound` share. Nothing here waits for a control task.

pub mod accept;
pub mod authorize;
pub mod dialer;
pub mod drain;
pub mod hbone;
pub mod inbound;
pub mod openings;
pub mod outbound;
pub mod sessions;
pub mod shares;
pub mod watches;
pub mod workers;

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use tacit_core::{
    balance::Balancer,
    refusal::{Refusal, RefusalReason},
    shares::{self as bounds, Capacity},
    spiffe::SpiffeId,
};
use tacit_kernel::{
    held::HeldEnds,
    socket::{AppStream, ClientNotStored, peer::limit_silence},
};
use tacit_tunnel::{
    TlsInfo,
    relay::threads::{ThreadKind, until_move},
    socket::reset,
};
use tokio::{runtime::Handle, sync::Notify};
use tokio_util::sync::CancellationToken;

use crate::{
    control_state::Snapshots,
    enrol::{Pod, Pods},
    proxy::{
        dialer::Dialer,
        drain::Drain,
        hbone::HboneConnections,
        openings::Openings,
        sessions::Sessions,
        shares::Shares,
        watches::{Watched, Watches},
        workers::{Load, Workers},
    },
    recheck::Rechecks,
    telemetry::{Ends, Reporter, Security, Telemetry},
};

/// Receive buffers on loopback as a multiple of those outside it: the agent then reads half as often.
const LOOPBACK_UNREAD: u32 = 2;

/// A flow that can go on at another thread.
type MovableFlow = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Everything a connection needs.
pub struct Proxy {
    /// The control state.
    pub snapshots: Snapshots,
    /// Pods of this node.
    pub pods: Arc<ArcSwap<Pods>>,
    /// Notified after each change of `pods`, for one waiter.
    pub pods_published: Arc<Notify>,
    /// Connections that the kernel holds.
    pub openings: Arc<Openings>,
    /// Tunnel sessions.
    pub sessions: Sessions,
    /// Connections that speak HBONE.
    pub hbone: HboneConnections,
    /// Use of the agent by each pod and each source address.
    pub shares: Shares,
    /// Counters and logs.
    pub telemetry: Telemetry,
    /// Decides again on live flows.
    pub rechecks: Arc<Rechecks>,
    /// Watches of the peers of live flows.
    pub watches: Arc<Watches>,
    /// Silence of a peer after which its flows end.
    tunnel_timeout: Duration,
    /// Ends listeners and flows.
    pub drain: Drain,
    dialer: Dialer,
    balancer: Balancer,
    workers: Workers,
    /// Destinations whose agents said that they take plaintext alone. Data must not leave with OPEN to them, because it would be
    /// lost.
    untunnelled: Mutex<HashSet<IpAddr>>,
}

/// Most destinations that are remembered as untunnelled. Beyond it all are forgotten, which costs each a connection of `connect: early`.
const UNTUNNELLED_MAX: usize = 1024;

impl Proxy {
    /// A proxy without pods: [`Proxy::pods`] is filled by enrolment.
    #[must_use]
    pub fn new(
        snapshots: Snapshots,
        dialer: Dialer,
        workers: Workers,
        telemetry: Telemetry,
        capacity: Capacity,
        tunnel_timeout: Duration,
    ) -> Self {
        Self {
            snapshots,
            pods: Arc::default(),
            pods_published: Arc::default(),
            openings: Arc::default(),
            sessions: Sessions::new(workers.count(), bounds::IDLE_SESSIONS.bounds(capacity)),
            hbone: HboneConnections::new(workers.count(), bounds::HBONE_CONNECTIONS.bounds(capacity)),
            shares: Shares::new(capacity),
            telemetry,
            rechecks: Arc::default(),
            watches: Arc::default(),
            tunnel_timeout,
            drain: Drain::default(),
            dialer,
            balancer: Balancer::default(),
            workers,
            untunnelled: Mutex::default(),
        }
    }

    /// Returns true if the last answer of the destination's agent was that the destination takes plaintext alone.
    fn is_untunnelled(&self, destination: IpAddr) -> bool {
        self.untunnelled.lock().unwrap_or_else(PoisonError::into_inner).contains(&destination)
    }

    /// Remembers the answer of a destination's agent.
    fn note_tunnelled(&self, destination: IpAddr, is_tunnelled: bool) {
        let mut known = self.untunnelled.lock().unwrap_or_else(PoisonError::into_inner);
        if is_tunnelled {
            known.remove(&destination);
            return;
        }
        if known.len() >= UNTUNNELLED_MAX {
            known.clear();
        }
        known.insert(destination);
    }

    /// Starts the task of a flow on the worker that new connections of listeners with this home go to. The flow counts as the
    /// load of the thread that it is on.
    pub fn spawn_flow(self: &Arc<Self>, home: usize, flow: impl Future<Output = ()> + Send + 'static) {
        let (worker, load) = self.workers.place(home);
        let handle = self.workers.handle(worker);
        self.run_flow((ThreadKind::Quick, worker), handle, load, Box::pin(flow));
    }

    /// Starts the task of a flow on a thread of kind `on`, and again on another one if it moves. It comes back to its `first` worker,
    /// whose pool the pod's next flows look into.
    fn run_flow(
        self: &Arc<Self>,
        (on, first): (ThreadKind, usize),
        handle: &Handle,
        load: Load,
        mut flow: MovableFlow,
    ) {
        let proxy = self.clone();
        let run = async move {
            if let Some(kind) = until_move(on, &mut flow).await {
                drop(load);
                let (handle, load) = proxy.workers.place_moved(kind, first);
                proxy.run_flow((kind, first), handle, load, flow);
            }
        };
        self.drain.tasks.spawn_on(run, handle);
    }

    /// Cancelled when a thread that carries flows, or a listener on it, has failed.
    #[must_use]
    pub fn workers_failed(&self) -> &CancellationToken {
        self.workers.failed()
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
        Ends {
            reporter: by,
            source: self.snapshots.party(addresses.source, source),
            destination: self.snapshots.party(addresses.destination, destination),
        }
    }

    /// Returns a watch of the peer of a flow, whose application's connection in `pod` has these ends.
    fn watch(&self, pod: &Pod, ends: Option<HeldEnds>) -> Watched {
        let (openings, slot, netns_cookie) = (self.openings.clone(), pod.slot(), pod.netns.cookie());
        self.watches.add(netns_cookie, ends, self.tunnel_timeout, move |ends, app, news| {
            if let Some(openings) = openings.get(slot, netns_cookie) {
                openings.tell(&ends, app, news);
            }
        })
    }

    /// Ends the connection to another node when its peer is silent for the configured time. Connections that a listener accepts inherit
    /// this.
    fn limit_silence(&self, socket: &impl AsFd) {
        if let Err(error) = limit_silence(socket, self.tunnel_timeout) {
            tracing::debug!(%error, "a connection has no keep-alive");
        }
    }

    /// Connects to an application of `pod` as `client`.
    async fn dial_application(
        &self,
        pod: &Pod,
        application: SocketAddr,
        client: SocketAddr,
    ) -> io::Result<AppStream> {
        let unread_bytes = self.shares.unread_bytes(pod.cgroup).map(|bytes| LOOPBACK_UNREAD * bytes);
        self.dialer.to_application(pod, application, client, unread_bytes).await
    }

    /// Counts and logs a refusal, and resets the connection.
    pub fn refuse(&self, connection: impl AsFd, by: Reporter, addresses: Addresses, refusal: Refusal) {
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

/// Returns the security of a flow over a session.
#[must_use]
pub fn security(tls: &TlsInfo) -> Security {
    let TlsInfo { version, cipher, key_exchange, alpn, .. } = *tls;
    Security::MutualTls { version, cipher, key_exchange, alpn }
}

/// Returns the refusal of a flow whose application or plaintext destination cannot be connected to.
#[must_use]
pub fn not_connected(error: &io::Error) -> Refusal {
    // As a full backlog, which it stands for: `connect()` goes on.
    if error.get_ref().is_some_and(|error| error.is::<ClientNotStored>()) {
        return Refusal::new(RefusalReason::PendingDials, error);
    }
    let reason = match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => RefusalReason::ConnectionRefused,
        io::ErrorKind::TimedOut => RefusalReason::TimedOut,
        _ => RefusalReason::Unreachable,
    };
    Refusal::new(reason, error).because_of(error)
}

/// Returns the ends of an application's connection, of which the agent's is read from the kernel. Returns `None` for a connection that
/// has ended.
#[must_use]
pub fn ends_in_pod(client: SocketAddr, app: &AppStream) -> Option<HeldEnds> {
    Some(HeldEnds { client, target: canonical(app.local_addr().ok()?) })
}

/// An address as the application meant it: v4-mapped is IPv4.
#[must_use]
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

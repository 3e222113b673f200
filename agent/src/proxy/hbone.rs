//! Connections to servers that speak HBONE. Each carries the flows of one pod to one server.
//!
//! Each worker has connections of its own, behind a lock of its own: a flow and the task of its connection are on one thread. A flow takes a
//! place on a connection of its worker. If none has room, it makes one, and the other flows of the worker to that server wait for it.
//! If it cannot be made, each of them tries by itself.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use tacit_core::directory::Workload;
use tacit_tunnel::hbone::{Client, Connection, Place};
use tokio::sync::watch;

use crate::proxy::{Proxy, sessions::PoolKey, shares::ConnectionPermit, workers::Workers};

/// A connection without flows is kept this long, as an idle session of `tacit/1`.
const IDLE: Duration = tacit_core::pool::IDLE;

/// The connections of every worker.
pub struct HboneConnections {
    /// One for each worker, by its index.
    workers: Vec<Mutex<Servers>>,
    /// Servers of all workers. A node without such peers takes no lock.
    known: AtomicUsize,
}

type Servers = HashMap<PoolKey, Server>;

/// A server that speaks HBONE.
struct Server {
    connections: Vec<Client>,
    /// Last use by a flow.
    used: Instant,
    /// Becomes true if the connection that is being made can be used.
    connecting: Option<watch::Receiver<bool>>,
}

/// Result of a search for a place.
pub enum Found {
    /// A place on a connection.
    Place(Place),
    /// All connections are full: the caller makes one.
    Connect(Connecting),
    /// Another flow makes one. The value becomes true if it can be used.
    Wait(watch::Receiver<bool>),
    /// The server is not known to speak HBONE.
    Unknown,
}

/// A connection that is being made. Dropped before [`Connecting::made`], those who wait try by themselves.
pub struct Connecting {
    proxy: Arc<Proxy>,
    worker: usize,
    key: PoolKey,
    tell: watch::Sender<bool>,
}

impl Connecting {
    /// Tells those who wait that the connection can be used.
    fn made(self) {
        self.tell.send_replace(true);
    }
}

impl Drop for Connecting {
    fn drop(&mut self) {
        if let Some(server) = self.proxy.hbone.servers(self.worker).get_mut(&self.key) {
            server.connecting = None;
        }
    }
}

impl HboneConnections {
    /// No connections of `workers` threads.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        Self { workers: (0..workers.max(1)).map(|_| Mutex::default()).collect(), known: AtomicUsize::new(0) }
    }

    /// Searches for a place on a connection of the calling worker, whose stream shall have a window of `window_bytes`. `is_hbone` if the
    /// directory says that the server speaks HBONE.
    #[must_use]
    pub fn find(proxy: &Arc<Proxy>, key: &PoolKey, window_bytes: u32, is_hbone: bool) -> Found {
        let all = &proxy.hbone;
        if !is_hbone && all.known.load(Relaxed) == 0 {
            return Found::Unknown;
        }
        let worker = all.own();
        if !is_hbone && !all.is_known(worker, key) {
            return Found::Unknown;
        }
        let mut servers = all.servers(worker);
        let server = servers.entry(key.clone()).or_insert_with(|| {
            all.known.fetch_add(1, Relaxed);
            Server { connections: Vec::new(), used: Instant::now(), connecting: None }
        });
        server.used = Instant::now();
        // The fullest comes first, so that connections that are left over become idle.
        if let Some(place) = server.connections.iter().find_map(|client| client.place(window_bytes)) {
            return Found::Place(place);
        }
        if let Some(connecting) = &server.connecting {
            return Found::Wait(connecting.clone());
        }
        let (tell, told) = watch::channel(false);
        server.connecting = Some(told);
        Found::Connect(Connecting { proxy: proxy.clone(), worker, key: key.clone(), tell })
    }

    /// Returns true if a worker knows the server, the calling one first.
    fn is_known(&self, worker: usize, key: &PoolKey) -> bool {
        let others = (0..self.workers.len()).filter(|other| *other != worker);
        std::iter::once(worker).chain(others).any(|worker| self.servers(worker).contains_key(key))
    }

    fn add(&self, worker: usize, key: &PoolKey, client: Client) {
        let mut servers = self.servers(worker);
        let server = servers.entry(key.clone()).or_insert_with(|| {
            self.known.fetch_add(1, Relaxed);
            Server { connections: Vec::new(), used: Instant::now(), connecting: None }
        });
        server.connections.retain(Client::is_open);
        server.connections.push(client);
    }

    /// Forgets a server that does not speak HBONE any more.
    pub fn forget(&self, key: &PoolKey) {
        self.close_where(|known, _| known == key);
    }

    /// Has the flows to a server that does not answer open on new connections.
    pub fn close_to(&self, key: &PoolKey) {
        self.for_each(|known, server| {
            if known == key {
                close(server.connections.drain(..));
            }
            true
        });
    }

    /// Closes connections that were idle too long, and connections of network namespaces for which `is_enrolled(cgroup, cookie)` is false.
    /// Flows that are open go on.
    pub fn close_unused(&self, is_enrolled: impl Fn(u64, u64) -> bool) {
        let now = Instant::now();
        self.close_where(|key, server| {
            if server.connections.iter().any(Client::is_used) || server.connecting.is_some() {
                server.used = now;
            }
            now.duration_since(server.used) >= IDLE || !is_enrolled(key.pod, key.netns)
        });
    }

    /// Has no more flows open on connections whose peers are not trusted any more: by revocation lists, or by the roots of a federated
    /// domain.
    pub fn close_untrusted(&self) {
        let now = SystemTime::now();
        self.for_each(|_, server| {
            close(server.connections.extract_if(.., |client| client.peer().chain().check(now).is_err()));
            true
        });
    }

    /// Has no more flows open on any connection.
    pub fn close_all(&self) {
        self.close_where(|_, _| true);
    }

    /// Returns the number of open connections of the node.
    #[must_use]
    pub fn count(&self) -> usize {
        (0..self.workers.len())
            .map(|worker| self.servers(worker).values().map(|server| server.connections.len()).sum::<usize>())
            .sum()
    }

    fn close_where(&self, is_over: impl Fn(&PoolKey, &mut Server) -> bool) {
        self.for_each(|key, server| {
            let is_over = is_over(key, server);
            if is_over {
                close(server.connections.drain(..));
            }
            !is_over
        });
    }

    /// Keeps the servers for which `keep` is true.
    fn for_each(&self, keep: impl Fn(&PoolKey, &mut Server) -> bool) {
        for worker in 0..self.workers.len() {
            let mut servers = self.servers(worker);
            let before = servers.len();
            servers.retain(|key, server| keep(key, server));
            self.known.fetch_sub(before - servers.len(), Relaxed);
        }
    }

    /// The index of the calling worker.
    fn own(&self) -> usize {
        Workers::current() % self.workers.len()
    }

    fn servers(&self, worker: usize) -> MutexGuard<'_, Servers> {
        self.workers[worker].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection ends after its last flow. Its task makes the system calls, so a lock may be held.
fn close(clients: impl Iterator<Item = Client>) {
    clients.for_each(|client| client.close());
}

/// Starts the task of a connection on this thread. The flows of this worker may use it when the server has sent its SETTINGS.
/// `permit` counts the connection.
pub fn start(
    proxy: &Arc<Proxy>,
    key: &PoolKey,
    (client, connection): (Client, Connection),
    permit: ConnectionPermit,
    connecting: Option<Connecting>,
) {
    let (run, key) = (proxy.clone(), key.clone());
    let worker = proxy.hbone.own();
    proxy.drain.tasks.spawn(async move {
        let cut = run.drain.cut.clone();
        tokio::select! {
            () = keep(run, worker, key, client, connection, connecting) => {}
            () = cut.cancelled() => {}
        }
        drop(permit);
    });
}

async fn keep(
    proxy: Arc<Proxy>,
    worker: usize,
    key: PoolKey,
    client: Client,
    mut connection: Connection,
    connecting: Option<Connecting>,
) {
    let peer = client.peer().clone();
    if let Err(error) = connection.settled().await {
        return tracing::debug!(peer = %peer.identity(), %error, "connection ended");
    }
    if !proxy.drain.stop.is_cancelled() {
        proxy.hbone.add(worker, &key, client);
        if let Some(connecting) = connecting {
            connecting.made();
        }
    }
    let mut is_stopped = false;
    let ended = loop {
        tokio::select! {
            ended = connection.run() => break ended,
            () = proxy.drain.stop.cancelled(), if !is_stopped => {
                is_stopped = true;
                proxy.hbone.close_to(&key);
            }
        }
    };
    proxy.hbone.for_each(|known, server| {
        if *known == key {
            server.connections.retain(Client::is_open);
        }
        true
    });
    if let Err(error) = ended {
        tracing::debug!(peer = %peer.identity(), %error, "connection ended");
    }
}

/// Describes a workload for the metrics of the peer, in the format of W3C Baggage.
#[must_use]
pub fn baggage(workload: &Workload) -> String {
    let label = |names: &[&str]| names.iter().find_map(|name| workload.labels.get(name));
    let service = label(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]);
    let version = label(&["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"]);
    let members = [
        ("k8s.namespace.name", Some(&*workload.namespace)),
        ("k8s.pod.name", Some(&*workload.name)),
        ("service.name", Some(service.unwrap_or(&workload.name))),
        ("service.version", version),
    ];
    let present = members.iter().filter_map(|(name, value)| Some(format!("{name}={}", (*value)?)));
    present.collect::<Vec<_>>().join(",")
}

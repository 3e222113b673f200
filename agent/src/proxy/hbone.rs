//! Connections to servers that speak HBONE. Each carries the flows of one pod to one server.
//!
//! Each worker has connections of its own, behind a lock of its own: a flow and the task of its connection are on one thread. A flow takes a
//! place on a connection of its worker. If none has room, it makes one, and the other flows of the worker to that server wait for it.
//! If it cannot be made, another of them tries.
//!
//! A flow over HBONE has one socket, and is counted as if it had two. So connections with flows are paid for by these. Those without are
//! bounded by [`HBONE_CONNECTIONS`].

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use tacit_core::{
    directory::Workload,
    shares::{Bounds, HBONE_CONNECTIONS, ShareUse, connections::PodId},
};
use tacit_tunnel::hbone::{Client, Connection, Place};
use tokio::{sync::watch, time::timeout};

use crate::proxy::{Proxy, sessions::PoolKey, workers::Workers};

/// A connection without flows is kept this long, as an idle session of `tacit/1`.
const IDLE: Duration = tacit_core::pool::IDLE;
/// Limit for the first SETTINGS of a server, which sends them with the end of its handshake.
const SETTINGS_MAX: Duration = Duration::from_secs(10);

/// The connections of every worker.
pub struct HboneConnections {
    /// Of connections without flows.
    bounds: Bounds,
    /// One for each worker, by its index.
    workers: Vec<Mutex<Servers>>,
    /// Servers of all workers. A node without such peers takes no lock.
    known: AtomicUsize,
    /// Connections that were closed for others.
    displaced: AtomicU64,
}

type Servers = HashMap<PoolKey, Server>;

/// A server that speaks HBONE.
struct Server {
    connections: Vec<Kept>,
    /// Last search of a flow.
    searched: Instant,
    /// Becomes true if the connection that is being made can be used.
    connecting: Option<watch::Receiver<bool>>,
}

/// A connection that flows may use.
struct Kept {
    client: Client,
    /// Last time at which a flow took a place, or was seen to have one.
    used: Instant,
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

/// A connection that is being made. Dropped before [`Connecting::made`], those who wait search again.
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
            // The server may have been forgotten meanwhile, and another connection be on its way.
            let own = self.tell.subscribe();
            server.connecting.take_if(|connecting| connecting.same_channel(&own));
        }
    }
}

impl HboneConnections {
    /// No connections of `workers` threads.
    #[must_use]
    pub fn new(workers: usize, bounds: Bounds) -> Self {
        Self {
            bounds,
            workers: (0..workers.max(1)).map(|_| Mutex::default()).collect(),
            known: AtomicUsize::new(0),
            displaced: AtomicU64::new(0),
        }
    }

    /// Returns true if no server is known to speak HBONE. Takes no lock.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.known.load(Relaxed) == 0
    }

    /// Searches for a place on a connection of the calling worker, whose stream shall have a window of `window_bytes`. `is_hbone` if the
    /// directory says that the server speaks HBONE.
    #[must_use]
    pub fn find(proxy: &Arc<Proxy>, key: &PoolKey, window_bytes: u32, is_hbone: bool) -> Found {
        let all = &proxy.hbone;
        let worker = all.own();
        let mut servers = all.servers(worker);
        if !servers.contains_key(key) && !is_hbone {
            return Found::Unknown;
        }
        let server = all.server(&mut servers, key);
        let now = Instant::now();
        server.searched = now;
        // The first one that has room, so that others become idle.
        let place = server.connections.iter_mut().find_map(|kept| {
            let place = kept.client.place(window_bytes)?;
            kept.used = now;
            Some(place)
        });
        if let Some(place) = place {
            return Found::Place(place);
        }
        if let Some(connecting) = &server.connecting {
            return Found::Wait(connecting.clone());
        }
        let (tell, told) = watch::channel(false);
        server.connecting = Some(told);
        Found::Connect(Connecting { proxy: proxy.clone(), worker, key: key.clone(), tell })
    }

    /// Returns the entry of a server, which is made if there is none.
    fn server<'a>(&self, servers: &'a mut Servers, key: &PoolKey) -> &'a mut Server {
        servers.entry(key.clone()).or_insert_with(|| {
            self.known.fetch_add(1, Relaxed);
            Server { connections: Vec::new(), searched: Instant::now(), connecting: None }
        })
    }

    fn add(&self, worker: usize, key: &PoolKey, client: Client) {
        self.close_beyond(Some(key.pod));
        let mut servers = self.servers(worker);
        let server = self.server(&mut servers, key);
        server.connections.retain(|kept| kept.client.is_open());
        server.connections.push(Kept { client, used: Instant::now() });
    }

    /// Closes connections without flows beyond the bounds, those that are idle for the longest time first. Leaves room for one of `joining`.
    fn close_beyond(&self, joining: Option<PodId>) {
        let Bounds { total, each } = self.bounds;
        let mut idle = self.idle();
        let mut of_pod: HashMap<PodId, u64> = HashMap::new();
        idle.iter().for_each(|(pod, ..)| *of_pod.entry(*pod).or_default() += 1);
        idle.sort_by_key(|(.., used)| *used);
        let (mut all, mut is_any_closed) = (idle.len() as u64 + u64::from(joining.is_some()), false);
        if let Some(pod) = joining {
            *of_pod.entry(pod).or_default() += 1;
        }
        for (pod, client, _) in idle {
            let own = of_pod.entry(pod).or_default();
            if *own > each || all > total {
                client.close();
                self.displaced.fetch_add(1, Relaxed);
                *own -= 1;
                all -= 1;
                is_any_closed = true;
            }
        }
        if is_any_closed {
            // What the table holds of a connection keeps it open.
            self.retain(|_, server| {
                server.connections.retain(|kept| kept.client.is_open());
                true
            });
        }
    }

    /// Returns the connections without flows, with their pods and last uses.
    fn idle(&self) -> Vec<(PodId, Client, Instant)> {
        let mut idle = Vec::new();
        for worker in 0..self.workers.len() {
            for (key, server) in self.servers(worker).iter() {
                let unused =
                    server.connections.iter().filter(|kept| !kept.client.is_used() && kept.client.is_open());
                idle.extend(unused.map(|kept| (key.pod, kept.client.clone(), kept.used)));
            }
        }
        idle
    }

    /// Forgets a server that does not speak HBONE any more.
    pub fn forget(&self, key: &PoolKey) {
        for worker in 0..self.workers.len() {
            if let Some(server) = self.servers(worker).remove(key) {
                self.known.fetch_sub(1, Relaxed);
                close(server);
            }
        }
    }

    /// Has the flows to a server that does not answer open on new connections.
    pub fn close_to(&self, key: &PoolKey) {
        for worker in 0..self.workers.len() {
            if let Some(server) = self.servers(worker).get_mut(key) {
                server.connections.drain(..).for_each(|kept| kept.client.close());
            }
        }
    }

    /// Closes connections that were idle too long, and connections of network namespaces for which `is_enrolled(cgroup, cookie)` is false.
    /// Flows that are open go on.
    pub fn close_unused(&self, is_enrolled: impl Fn(u64, u64) -> bool) {
        let (now, today) = (Instant::now(), SystemTime::now());
        self.retain(|key, server| {
            let is_enrolled = is_enrolled(key.pod, key.netns);
            server.connections.retain_mut(|kept| {
                if kept.client.is_used() {
                    kept.used = now;
                }
                let is_current =
                    now.duration_since(kept.used) < IDLE && kept.client.peer().not_after() > today;
                if !is_enrolled || !is_current {
                    kept.client.close();
                }
                kept.client.is_open()
            });
            let is_wanted = now.duration_since(server.searched) < IDLE || server.connecting.is_some();
            is_enrolled && (is_wanted || !server.connections.is_empty())
        });
        self.close_beyond(None);
    }

    /// Has no more flows open on connections whose peers are not trusted any more: by revocation lists, or by the roots of a federated
    /// domain.
    pub fn close_untrusted(&self) {
        let now = SystemTime::now();
        self.retain(|_, server| {
            server.connections.retain(|kept| {
                let is_trusted = kept.client.peer().chain().check(now).is_ok();
                if !is_trusted {
                    kept.client.close();
                }
                is_trusted
            });
            true
        });
    }

    /// Returns the use by pod of connections without flows.
    #[must_use]
    pub fn usage(&self) -> ShareUse<PodId> {
        let mut held: HashMap<PodId, u64> = HashMap::new();
        self.idle().iter().for_each(|(pod, ..)| *held.entry(*pod).or_default() += 1);
        ShareUse {
            resource: HBONE_CONNECTIONS.resource,
            bounds: self.bounds,
            used: held.values().sum(),
            fullest: held.into_iter().max_by_key(|(_, units)| *units),
            refused: self.displaced.load(Relaxed),
        }
    }

    /// Keeps the servers for which `keep` is true, and closes the connections of the others.
    fn retain(&self, keep: impl Fn(&PoolKey, &mut Server) -> bool) {
        for worker in 0..self.workers.len() {
            let removed: Vec<_> = self.servers(worker).extract_if(|key, server| !keep(key, server)).collect();
            self.known.fetch_sub(removed.len(), Relaxed);
            removed.into_iter().for_each(|(_, server)| close(server));
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

/// Has the connections of a server end after their last flows.
fn close(server: Server) {
    server.connections.into_iter().for_each(|kept| kept.client.close());
}

/// Starts the task of a connection on this thread. The flows of this worker may use it when the server has sent its SETTINGS.
pub fn start(
    proxy: &Arc<Proxy>,
    key: &PoolKey,
    (client, connection): (Client, Connection),
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
    let log = |error: &dyn std::fmt::Display| {
        tracing::debug!(peer = %peer.identity(), %error, "connection ended");
    };
    match timeout(SETTINGS_MAX, connection.settled()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return log(&error),
        Err(_) => return log(&"no SETTINGS of the server"),
    }
    // What is left of it here would keep the connection.
    if proxy.drain.stop.is_cancelled() || client.streams_max() == 0 {
        client.close();
        drop((client, connecting));
    } else {
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
    if let Some(server) = proxy.hbone.servers(worker).get_mut(&key) {
        server.connections.retain(|kept| kept.client.is_open());
    }
    if let Err(error) = ended {
        log(&error);
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

//! Accepts the connections of a pod's listeners and gives each to a worker.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use socket2::SockRef;
use tacit_core::{refusal::Refusal, shares::connections::Connection};
use tacit_kernel::{
    held::{HeldEnds, HeldRing},
    socket::{Acceptor, Listeners, Polled},
};

use crate::{
    enrol::Pod,
    proxy::{
        Addresses, LOOPBACK_UNREAD, Proxy, canonical,
        dialer::Serving,
        inbound,
        openings::PodOpenings,
        outbound::{self, opening},
        shares::ConnectionPermit,
        workers::vital,
    },
    telemetry::Reporter,
};

/// Pause when descriptors are used up, which the shares of connections prevent unless the limit was lowered since the start:
/// accepting again at once would only spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(20);

/// The origin of a listener's connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// The pod itself.
    OwnPod,
    /// Other pods, or anything else outside.
    Elsewhere,
}

/// Serves one connection to its end.
type Handler<S, F> = fn(Arc<Proxy>, Arc<Pod>, S, SocketAddr) -> F;

/// Serves the listeners of `pod` until the pod or the agent ends.
pub fn serve_pod(proxy: &Arc<Proxy>, pod: &Arc<Pod>, listeners: Listeners) {
    let Listeners { capture, plaintext, tunnel, injector } = listeners;
    let home = pod.home(proxy.workers.count());
    let entrance = |origin| Entrance { proxy: proxy.clone(), pod: pod.clone(), home, origin };
    let capture = Arc::new(capture);
    let openings = Arc::new(PodOpenings::new(pod.clone(), injector, &capture));
    proxy.limit_silence(&tunnel);
    proxy.limit_silence(&plaintext);
    entrance(Origin::OwnPod).serve_captured(capture, openings.clone());
    entrance(Origin::Elsewhere).serve(tunnel.into(), inbound::tunnel);
    entrance(Origin::Elsewhere).serve(plaintext.into(), inbound::plaintext);
    for held in proxy.openings.add(&openings) {
        opening::start(proxy, &openings, held);
    }
    proxy.dialer.set_probes_served(pod, Serving::Yes);
}

/// Has flows look at their peers, until the agent ends.
pub fn serve_watches(proxy: &Arc<Proxy>) {
    let on = proxy.clone();
    let failed = proxy.workers.failed().clone();
    proxy.workers.handle(0).spawn(vital(failed, async move {
        tokio::select! {
            () = on.drain.cut.cancelled() => {}
            () = on.watches.look() => {}
        }
    }));
}

/// Accepts what a delivered SYN has brought, without the turns of the thread that waking the listener's task takes.
pub(super) fn accept_delivered(proxy: &Arc<Proxy>, openings: &PodOpenings) {
    if let Some((connection, peer)) = openings.accept_now() {
        let (pod, home) = (openings.pod.clone(), openings.pod.home(proxy.workers.count()));
        let entrance = Entrance { proxy: proxy.clone(), pod, home, origin: Origin::OwnPod };
        entrance.admit_captured(openings, connection, canonical(peer));
    }
}

/// Answers the peers of a pod that is left alone until the pod or the agent ends.
pub fn answer_peers(proxy: &Arc<Proxy>, pod: &Arc<Pod>, listener: TcpListener) {
    let home = pod.home(proxy.workers.count());
    let entrance = Entrance { proxy: proxy.clone(), pod: pod.clone(), home, origin: Origin::Elsewhere };
    proxy.limit_silence(&listener);
    entrance.serve(listener.into(), inbound::tunnel);
}

/// Hands what the kernel side holds to the openings of its pod, until the agent ends. Each ring has a thread of its own, the
/// home of its pods where there are no more threads than rings.
pub fn serve_held(proxy: &Arc<Proxy>, rings: Vec<HeldRing>) {
    for (index, ring) in rings.into_iter().enumerate() {
        let on = proxy.clone();
        let failed = proxy.workers.failed().clone();
        proxy.workers.handle(index).spawn(vital(failed, async move {
            tokio::select! {
                () = on.drain.cut.cancelled() => {}
                () = ring.forward(|held| opening::handle_record(&on, held)) => {}
            }
        }));
    }
}

/// A listener's surroundings.
struct Entrance {
    proxy: Arc<Proxy>,
    pod: Arc<Pod>,
    /// The worker that accepts.
    home: usize,
    origin: Origin,
}

impl Entrance {
    /// Accepts on `listener` until the pod or the agent ends; each connection gets a task of its own.
    fn serve<S, F>(self, listener: Arc<TcpListener>, handle: Handler<S, F>)
    where
        S: Polled + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn(move |entrance| async move {
            let ended = async {
                tokio::select! {
                    () = entrance.proxy.drain.stop.cancelled() => {}
                    () = entrance.pod.closed.cancelled() => {}
                }
            };
            let admit = |connection, peer| entrance.admit(connection, peer, handle);
            entrance.accept_on(listener, ended, admit).await;
        });
    }

    /// Accepts captured connections until the pod or the agent ends. Those that are being opened may come until then.
    fn serve_captured(self, listener: Arc<TcpListener>, openings: Arc<PodOpenings>) {
        self.spawn(move |entrance| async move {
            let admit = |connection, peer| entrance.admit_captured(&openings, connection, peer);
            entrance.accept_on(listener, entrance.until_opened(&openings), admit).await;
            if entrance.proxy.openings.remove(&openings) {
                entrance.proxy.dialer.set_probes_served(&entrance.pod, Serving::No);
            }
        });
    }

    /// Runs `accepting` on the worker that accepts.
    fn spawn<F>(self, accepting: impl FnOnce(Self) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let thread = self.proxy.workers.handle(self.home).clone();
        let failed = self.proxy.workers.failed().clone();
        thread.spawn(vital(failed, accepting(self)));
    }

    /// Waits until the pod ends, or the agent ends and nothing is being opened.
    async fn until_opened(&self, openings: &PodOpenings) {
        let Self { proxy, pod, .. } = self;
        tokio::select! {
            () = pod.closed.cancelled() => return,
            () = proxy.drain.stop.cancelled() => {}
        }
        if !proxy.drain.alone.is_cancelled() {
            openings.cancel_spread();
        }
        tokio::select! {
            () = pod.closed.cancelled() => {}
            () = proxy.drain.cut.cancelled() => {}
            () = openings.until_empty() => {}
        }
    }

    /// Gives what comes to `listener` to `admit`, until `ended`.
    async fn accept_on(
        &self,
        listener: Arc<TcpListener>,
        ended: impl Future<Output = ()>,
        admit: impl Fn(std::net::TcpStream, SocketAddr),
    ) {
        let listener = match Acceptor::new(listener) {
            Ok(listener) => listener,
            Err(error) => {
                return tracing::error!(%error, pod = %self.pod.workload.name, "a listener cannot be polled");
            }
        };
        tokio::pin!(ended);
        loop {
            let accepted = tokio::select! {
                () = &mut ended => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((connection, peer)) => admit(connection, canonical(peer)),
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot accept; raise the limit of open files if this persists");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }

    /// Gives a captured connection to the opening that waits for it, or starts a task for one that has none.
    fn admit_captured(&self, openings: &PodOpenings, connection: std::net::TcpStream, client: SocketAddr) {
        if let Some(connection) = join(openings, connection, client) {
            self.admit(connection, client, outbound::handle);
        }
    }

    /// Starts a task for the flow, or resets a connection of a pod or source that has its share.
    fn admit<S, F>(&self, connection: std::net::TcpStream, peer: SocketAddr, handle: Handler<S, F>)
    where
        S: Polled + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let source = (self.origin == Origin::Elsewhere).then_some(peer.ip());
        match self.proxy.shares.connection(Connection { pod: self.pod.cgroup, source }) {
            Ok(permit) => {
                bound_unread(&connection, permit.unread_bytes());
                self.spawn_flow(connection, peer, permit, handle);
            }
            Err(refusal) => self.refuse(&connection, peer, refusal),
        }
    }

    /// Starts a task for the flow on the worker that the connection goes to.
    fn spawn_flow<S, F>(
        &self,
        connection: std::net::TcpStream,
        peer: SocketAddr,
        permit: ConnectionPermit,
        handle: Handler<S, F>,
    ) where
        S: Polled + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let (on, who) = (self.proxy.clone(), self.pod.clone());
        self.proxy.spawn_flow(self.home, async move {
            match S::of(connection.into()) {
                Ok(connection) => handle(on, who, connection, peer).await,
                Err(error) => tracing::error!(%error, "a connection cannot be polled, and is dropped"),
            }
            drop(permit);
        });
    }

    fn refuse(&self, connection: &std::net::TcpStream, peer: SocketAddr, refusal: Refusal) {
        let at = connection.local_addr().map_or(peer, canonical);
        let (by, destination) = match self.origin {
            Origin::OwnPod => (Reporter::Source, self.proxy.dialer.destination(connection).unwrap_or(at)),
            Origin::Elsewhere => (Reporter::Destination, at),
        };
        self.proxy.report(by, Addresses { source: peer, destination }, refusal);
        // Fails only if the connection is already closed.
        let _ = SockRef::from(connection).set_linger(Some(Duration::ZERO));
    }
}

/// Bounds the bytes of an application that `connection` keeps for the agent to what its pod's share leaves.
pub(super) fn bound_unread(connection: &std::net::TcpStream, unread_bytes: Option<u32>) {
    if let Some(unread_bytes) = unread_bytes {
        let bytes = (LOOPBACK_UNREAD * unread_bytes) as usize;
        // An error leaves the bound that the listener has set.
        let _ = SockRef::from(connection).set_recv_buffer_size(bytes);
    }
}

/// Gives a connection to the opening that waits for it. Returns it if there is none. An opening has its destination and its
/// permit already.
fn join(
    openings: &PodOpenings,
    connection: std::net::TcpStream,
    client: SocketAddr,
) -> Option<std::net::TcpStream> {
    if openings.count() == 0 {
        return Some(connection);
    }
    let ends = HeldEnds { client, target: canonical(connection.local_addr().ok()?) };
    if !openings.has(&ends) {
        return Some(connection);
    }
    // If the opening has ended meanwhile, the connection is reset.
    drop(openings.join(&ends, connection));
    None
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

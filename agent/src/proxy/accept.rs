//! Accepts the connections of a pod's listeners and gives each to a worker.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use socket2::SockRef;
use tacit_core::{refusal::Refusal, shares::connections::Connection};
use tacit_kernel::socket::{Acceptor, Listeners};
use tokio::net::TcpStream;

use crate::{
    enrol::Pod,
    proxy::{
        Addresses, LOOPBACK_UNREAD, Proxy, canonical, inbound, outbound, shares::ConnectionPermit,
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
type Handler<F> = fn(Arc<Proxy>, Arc<Pod>, TcpStream, SocketAddr) -> F;

/// Serves the listeners of `pod` until the pod or the agent ends.
pub fn serve_pod(proxy: &Arc<Proxy>, pod: &Arc<Pod>, listeners: Listeners) {
    let Listeners { capture, plaintext, tunnel } = listeners;
    let home = pod.home(proxy.workers.count());
    let entrance = |origin| Entrance { proxy: proxy.clone(), pod: pod.clone(), home, origin };
    entrance(Origin::OwnPod).serve(capture, outbound::handle);
    entrance(Origin::Elsewhere).serve(tunnel, inbound::tunnel);
    entrance(Origin::Elsewhere).serve(plaintext, inbound::plaintext);
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
    fn serve<F>(self, listener: TcpListener, handle: Handler<F>)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let thread = self.proxy.workers.handle(self.home).clone();
        let failed = self.proxy.workers.failed().clone();
        thread.spawn(vital(failed, async move {
            match Acceptor::new(listener) {
                Ok(listener) => self.accept_on(listener, handle).await,
                Err(error) => {
                    tracing::error!(%error, pod = %self.pod.workload.name, "a listener cannot be polled");
                }
            }
        }));
    }

    async fn accept_on<F>(self, listener: Acceptor, handle: Handler<F>)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        loop {
            let accepted = tokio::select! {
                () = self.proxy.drain.stop.cancelled() => return,
                () = self.pod.closed.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((connection, peer)) => self.admit(connection, canonical(peer), handle),
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot accept; raise the limit of open files if this persists");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }

    /// Starts a task for the flow, or resets a connection of a pod or source that has its share.
    fn admit<F>(&self, connection: std::net::TcpStream, peer: SocketAddr, handle: Handler<F>)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let source = (self.origin == Origin::Elsewhere).then_some(peer.ip());
        match self.proxy.shares.connection(Connection { pod: self.pod.cgroup, source }) {
            Ok(permit) => {
                if let Some(unread_bytes) = permit.unread_bytes() {
                    // An error leaves the bound that the listener has set.
                    let bytes = (LOOPBACK_UNREAD * unread_bytes) as usize;
                    let _ = SockRef::from(&connection).set_recv_buffer_size(bytes);
                }
                self.spawn_flow(connection, peer, permit, handle);
            }
            Err(refusal) => self.refuse(&connection, peer, refusal),
        }
    }

    /// Starts a task for the flow on the worker that the connection goes to.
    fn spawn_flow<F>(
        &self,
        connection: std::net::TcpStream,
        peer: SocketAddr,
        permit: ConnectionPermit,
        handle: Handler<F>,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let Self { proxy, pod, home, .. } = self;
        let (worker, load) = proxy.workers.place(*home);
        let (on, who) = (proxy.clone(), pod.clone());
        let flow = async move {
            match TcpStream::from_std(connection) {
                Ok(connection) => handle(on, who, connection, peer).await,
                Err(error) => tracing::error!(%error, "a connection cannot be polled, and is dropped"),
            }
            drop((load, permit));
        };
        if worker == *home {
            proxy.drain.tasks.spawn(flow);
        } else {
            proxy.drain.tasks.spawn_on(flow, proxy.workers.handle(worker));
        }
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

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

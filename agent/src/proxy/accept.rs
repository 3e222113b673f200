//! Accepts the connections of a pod's listeners and gives each to a worker.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use tacit_kernel::{
    held::{HeldEnds, HeldRing},
    socket::{Acceptor, Listeners},
};
use tokio::net::TcpStream;

use crate::{
    enrol::Pod,
    proxy::{
        Proxy, canonical, inbound,
        openings::PodOpenings,
        outbound::{self, opening},
    },
};

/// Pause when descriptors are used up: accepting again at once would only spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(20);

/// Serves one connection to its end.
type Handler<F> = fn(Arc<Proxy>, Arc<Pod>, TcpStream, SocketAddr) -> F;

/// Serves the listeners of `pod` until the pod or the agent ends.
pub fn serve_pod(proxy: &Arc<Proxy>, pod: &Arc<Pod>, listeners: Listeners) {
    let Listeners { capture, plaintext, tunnel, injector } = listeners;
    let openings = Arc::new(PodOpenings::new(pod.clone(), injector));
    serve_captured(proxy, &openings, capture);
    serve(proxy, pod, tunnel, inbound::tunnel);
    serve(proxy, pod, plaintext, inbound::plaintext);
    for held in proxy.openings.add(&openings) {
        opening::start(proxy, &openings, held);
    }
}

/// Hands what the kernel side holds to the openings of its pod, until the agent ends. Each ring has a thread of its own, the
/// home of its pods where there are no more threads than rings.
pub fn serve_held(proxy: &Arc<Proxy>, rings: Vec<HeldRing>) {
    for (index, ring) in rings.into_iter().enumerate() {
        let on = proxy.clone();
        proxy.workers.handle(index).spawn(async move {
            tokio::select! {
                // The application's kernel sends again what is not read: to the next agent, or to nobody.
                () = on.drain.stop.cancelled() => {}
                () = ring.forward(|held| opening::handle_record(&on, held)) => {}
            }
        });
    }
}

/// Accepts captured connections until the pod or the agent ends. Those that are being opened may come until then.
fn serve_captured(proxy: &Arc<Proxy>, openings: &Arc<PodOpenings>, listener: TcpListener) {
    let (proxy, openings) = (proxy.clone(), openings.clone());
    let home = openings.pod.home(proxy.workers.count());
    let thread = proxy.workers.handle(home).clone();
    thread.spawn(async move {
        match Acceptor::new(listener) {
            Ok(listener) => accept_captured(&proxy, &openings, home, listener).await,
            Err(error) => {
                tracing::error!(%error, pod = %openings.pod.workload.name, "a listener cannot be polled")
            }
        }
        proxy.openings.remove(&openings);
    });
}

async fn accept_captured(proxy: &Arc<Proxy>, openings: &PodOpenings, home: usize, listener: Acceptor) {
    let ended = async {
        tokio::select! {
            () = openings.pod.closed.cancelled() => return,
            () = proxy.drain.stop.cancelled() => {}
        }
        tokio::select! {
            () = openings.pod.closed.cancelled() => {}
            () = proxy.drain.cut.cancelled() => {}
            () = openings.until_empty() => {}
        }
    };
    tokio::pin!(ended);
    loop {
        let accepted = tokio::select! {
            () = &mut ended => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((connection, peer)) => {
                let client = canonical(peer);
                if let Some(connection) = join(proxy, openings, connection, client) {
                    spawn_flow(proxy, &openings.pod, home, connection, client, outbound::handle);
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

/// Gives a connection to the opening that waits for it. Returns it if there is none.
fn join(
    proxy: &Proxy,
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
    // The kernel has handed over the destination before. It is taken out first: a repetition of the SYN that is read later
    // finds neither an opening nor a destination.
    let _ = proxy.dialer.take_destination(&openings.pod, client, ends.target);
    // If the opening has ended meanwhile, the connection is reset.
    drop(openings.join(&ends, connection));
    None
}

/// Accepts on `listener` until the pod or the agent ends; each connection gets a task of its own.
fn serve<F>(proxy: &Arc<Proxy>, pod: &Arc<Pod>, listener: TcpListener, handle: Handler<F>)
where
    F: Future<Output = ()> + Send + 'static,
{
    let (proxy, pod) = (proxy.clone(), pod.clone());
    let home = pod.home(proxy.workers.count());
    let thread = proxy.workers.handle(home).clone();
    thread.spawn(async move {
        match Acceptor::new(listener) {
            Ok(listener) => accept_on(proxy, pod, home, listener, handle).await,
            Err(error) => tracing::error!(%error, pod = %pod.workload.name, "a listener cannot be polled"),
        }
    });
}

async fn accept_on<F>(proxy: Arc<Proxy>, pod: Arc<Pod>, home: usize, listener: Acceptor, handle: Handler<F>)
where
    F: Future<Output = ()> + Send + 'static,
{
    loop {
        let accepted = tokio::select! {
            () = proxy.drain.stop.cancelled() => return,
            () = pod.closed.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((connection, peer)) => spawn_flow(&proxy, &pod, home, connection, canonical(peer), handle),
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::error!(%error, "cannot accept; raise the limit of open files if this persists");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// Starts a task for the flow on the worker that the connection goes to.
fn spawn_flow<F>(
    proxy: &Arc<Proxy>,
    pod: &Arc<Pod>,
    home: usize,
    connection: std::net::TcpStream,
    peer: SocketAddr,
    handle: Handler<F>,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let (on, who) = (proxy.clone(), pod.clone());
    proxy.spawn_flow(home, |load| async move {
        match TcpStream::from_std(connection) {
            Ok(connection) => handle(on, who, connection, peer).await,
            Err(error) => tracing::error!(%error, "a connection cannot be polled, and is dropped"),
        }
        drop(load);
    });
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

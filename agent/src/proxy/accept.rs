//! Accepts the connections of a pod's listeners and gives each to a worker.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use tacit_kernel::socket::{Acceptor, Listeners};
use tokio::net::TcpStream;

use crate::{
    enrol::Pod,
    proxy::{Proxy, canonical, inbound, outbound},
};

/// Pause when descriptors are used up: accepting again at once would only spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(20);

/// Serves one connection to its end.
type Handler<F> = fn(Arc<Proxy>, Arc<Pod>, TcpStream, SocketAddr) -> F;

/// Serves the listeners of `pod` until the pod or the agent ends.
pub fn serve_pod(proxy: &Arc<Proxy>, pod: &Arc<Pod>, listeners: Listeners) {
    let Listeners { capture, plaintext, tunnel } = listeners;
    serve(proxy, pod, capture, outbound::handle);
    serve(proxy, pod, tunnel, inbound::tunnel);
    serve(proxy, pod, plaintext, inbound::plaintext);
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
    let (worker, load) = proxy.workers.place(home);
    let (on, who) = (proxy.clone(), pod.clone());
    let flow = async move {
        match TcpStream::from_std(connection) {
            Ok(connection) => handle(on, who, connection, peer).await,
            Err(error) => tracing::error!(%error, "a connection cannot be polled, and is dropped"),
        }
        drop(load);
    };
    if worker == home {
        proxy.drain.tasks.spawn(flow);
    } else {
        proxy.drain.tasks.spawn_on(flow, proxy.workers.handle(worker));
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

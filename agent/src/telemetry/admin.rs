//! The admin servers: the metrics port (plain HTTP on the node's loopback), the health port (the same, never anywhere else), the
//! operator's socket (HTTP on a Unix socket that only root can open), and the socket of the CNI plugin (the same). The authority has
//! the metrics port alone.
//!
//! | server | request | answer |
//! |---|---|---|
//! | metrics port | `GET /metrics` | all metrics, `OpenMetrics` text |
//! | metrics port | `GET /healthz/live` | 200 for as long as requests are answered at all |
//! | metrics port | `GET /healthz/ready` | 200, or 503 with the reasons, one a line |
//! | health port | `GET /healthz/ready` | 200 or 503, without a reason: every process of the node's network can ask |
//! | socket | `GET /healthz/live`, `/healthz/ready` | as on the metrics port: two agents of a node have sockets of their own |
//! | socket | `GET /status` | the status as JSON |
//! | sandboxes | `GET /sandbox?namespace=..&name=..&uid=..` | 200 if the agent covers this pod, or 503 with the reason |
//! | socket | `GET /policy/explain?from=..&to=..&port=..` | an `Explanation` as JSON, or 400 with what is wrong |
//!
//! Nothing here changes the agent. A connection carries one request and has a deadline; of too many the silent ones give way
//! (`connections`). On shutdown answers under way are cut off: they are only observations.

pub(super) mod connections;
mod explain;
mod socket;

use std::{
    convert::Infallible,
    future::Future,
    io,
    net::IpAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode, Uri,
    body::Incoming,
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    task::JoinSet,
    time,
};

use connections::{Connections, Place};
pub use explain::{ExplainSource, fetch_explanation};
pub use socket::{BindError, FetchError, Health, bind_operator, bind_replacing, fetch_health, fetch_status};

use super::{Telemetry, metrics, status::Status};

/// From connecting to the end of the request's headers.
const HEADERS_MAX: Duration = Duration::from_secs(5);
/// From connecting to the end of the answer; the usual scrape timeout is 10 s.
const CONNECTION_MAX: Duration = Duration::from_secs(15);
/// Pause after accept() failed, as it does without free descriptors: there is nothing to wait for.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Makes the status as of now. Called for every request; must not block.
pub type StatusSource = Arc<dyn Fn() -> Status + Send + Sync>;

/// Returns true while the agent is ready. Called for every request; must not block.
pub type ReadySource = Arc<dyn Fn() -> bool + Send + Sync>;

/// Serves metrics and readiness until `shutdown` completes.
pub async fn serve_metrics(
    listener: TcpListener,
    source: StatusSource,
    telemetry: Telemetry,
    shutdown: impl Future<Output = ()> + Send,
) {
    let connections = telemetry.admin.clone();
    let routes = move |uri: &Uri| match uri.path() {
        "/metrics" => Some(metrics_answer(&telemetry, source())),
        path => health_answer(path, &*source),
    };
    serve(listener, Arc::new(routes), connections, shutdown).await;
}

/// Serves readiness to the kubelet until `shutdown` completes. Clients at other than loopback addresses get no answer.
pub async fn serve_health(
    listener: TcpListener,
    is_ready: ReadySource,
    shutdown: impl Future<Output = ()> + Send,
) {
    let routes = move |uri: &Uri| match uri.path() {
        "/healthz/ready" if is_ready() => Some(plain(StatusCode::OK, "ready\n")),
        "/healthz/ready" => Some(plain(StatusCode::SERVICE_UNAVAILABLE, "not ready\n")),
        _ => None,
    };
    serve(OwnNode(listener), Arc::new(routes), Arc::default(), shutdown).await;
}

/// Serves metrics and readiness of the authority until `shutdown` completes.
pub async fn serve_authority(
    listener: TcpListener,
    source: tacit_authority::StatusSource,
    shutdown: impl Future<Output = ()> + Send,
) {
    let routes = move |uri: &Uri| match uri.path() {
        "/metrics" => Some(match metrics::authority::text(source()) {
            Ok(text) => answer(StatusCode::OK, metrics::CONTENT_TYPE, text),
            Err(fmt_error) => failure(&fmt_error),
        }),
        "/healthz/ready" => Some(match source().unready() {
            None => plain(StatusCode::OK, "ready\n"),
            Some(reason) => plain(StatusCode::SERVICE_UNAVAILABLE, reason + "\n"),
        }),
        _ => None,
    };
    serve(listener, Arc::new(routes), Arc::default(), shutdown).await;
}

/// Serves the operator's commands until `shutdown` completes. The listener comes from [`bind_operator`].
pub async fn serve_operator(
    listener: UnixListener,
    source: StatusSource,
    explain: ExplainSource,
    shutdown: impl Future<Output = ()> + Send,
) {
    let routes = move |uri: &Uri| match uri.path() {
        "/status" => Some(status_answer(&source())),
        explain::PATH => Some(explain::answer(uri.query().unwrap_or_default(), &*explain)),
        path => health_answer(path, &*source),
    };
    serve(listener, Arc::new(routes), Arc::default(), shutdown).await;
}

/// Decides whether the sandbox of a pod may be made: `Err` with the reason if not yet.
pub type SandboxSource = Arc<dyn Fn(&SandboxQuery<'_>) -> Result<(), String> + Send + Sync>;

/// A pod whose sandbox is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SandboxQuery<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Its UID, if the container runtime tells.
    pub uid: Option<&'a str>,
}

/// Serves the questions of the CNI plugin until it is dropped.
pub async fn serve_sandboxes(listener: UnixListener, source: SandboxSource) {
    let routes = move |uri: &Uri| (uri.path() == "/sandbox").then(|| sandbox_answer(uri.query(), &*source));
    serve(listener, Arc::new(routes), Arc::default(), std::future::pending()).await;
}

fn sandbox_answer(query: Option<&str>, source: &dyn Fn(&SandboxQuery<'_>) -> Result<(), String>) -> Answer {
    let pairs: Vec<_> =
        query.unwrap_or_default().split('&').filter_map(|pair| pair.split_once('=')).collect();
    let value = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| *value);
    let (Some(namespace), Some(name)) = (value("namespace"), value("name")) else {
        return plain(StatusCode::BAD_REQUEST, "expected namespace and name\n");
    };
    match source(&SandboxQuery { namespace, name, uid: value("uid") }) {
        Ok(()) => plain(StatusCode::OK, "covered\n"),
        Err(reason) => plain(StatusCode::SERVICE_UNAVAILABLE, reason + "\n"),
    }
}

fn metrics_answer(telemetry: &Telemetry, status: Status) -> Answer {
    match telemetry.metrics_text(status) {
        Ok(text) => answer(StatusCode::OK, metrics::CONTENT_TYPE, text),
        Err(fmt_error) => failure(&fmt_error),
    }
}

fn health_answer(path: &str, source: &dyn Fn() -> Status) -> Option<Answer> {
    match path {
        "/healthz/live" => Some(plain(StatusCode::OK, "alive\n")),
        "/healthz/ready" => Some(ready_answer(&source())),
        _ => None,
    }
}

fn ready_answer(status: &Status) -> Answer {
    let reasons = status.unready();
    if reasons.is_empty() {
        plain(StatusCode::OK, "ready\n")
    } else {
        plain(StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n")
    }
}

fn status_answer(status: &Status) -> Answer {
    match serde_json::to_string(status) {
        Ok(json) => answer(StatusCode::OK, "application/json", json),
        Err(json_error) => failure(&json_error),
    }
}

type Answer = Response<Full<Bytes>>;

/// The answer to a request for this; `None` when there is none.
type Routes = dyn Fn(&Uri) -> Option<Answer> + Send + Sync;

fn answer(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

fn plain(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    answer(status, "text/plain; charset=utf-8", body)
}

/// Returns the answer for an internal error: the answer could not be written.
fn failure(error: &dyn std::error::Error) -> Answer {
    tracing::error!(%error, "cannot write an answer for the operator; this is a bug");
    plain(StatusCode::INTERNAL_SERVER_ERROR, "the answer could not be written; see the agent's log\n")
}

fn route(request: &Request<Incoming>, routes: &Routes) -> Answer {
    if request.method() != Method::GET {
        let mut refused = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET is served here\n");
        refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
        return refused;
    }
    routes(request.uri()).unwrap_or_else(|| plain(StatusCode::NOT_FOUND, "no such path\n"))
}

/// A source of connections: one of the two kinds of listener.
trait Listener: Send + Sync {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next connection, with the address of its client if it has one.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, Option<IpAddr>)>> + Send;
}

impl Listener for TcpListener {
    type Stream = tokio::net::TcpStream;

    async fn accept(&self) -> io::Result<(Self::Stream, Option<IpAddr>)> {
        Self::accept(self).await.map(|(stream, client)| (stream, Some(client.ip().to_canonical())))
    }
}

/// A listener on the loopback that accepts connections of its own node alone. With `route_localnet`, which kube-proxy sets, the
/// kernel also delivers packets of others to 127.0.0.1.
struct OwnNode(TcpListener);

impl Listener for OwnNode {
    type Stream = tokio::net::TcpStream;

    async fn accept(&self) -> io::Result<(Self::Stream, Option<IpAddr>)> {
        loop {
            let (stream, client) = self.0.accept().await?;
            if client.ip().is_loopback() {
                return Ok((stream, Some(client.ip())));
            }
            tracing::debug!(%client, "a connection to the health port that is not from this node was closed");
        }
    }
}

impl Listener for UnixListener {
    type Stream = tokio::net::UnixStream;

    async fn accept(&self) -> io::Result<(Self::Stream, Option<IpAddr>)> {
        Self::accept(self).await.map(|(stream, _)| (stream, None))
    }
}

async fn serve<L: Listener>(
    listener: L,
    routes: Arc<Routes>,
    connections: Arc<Connections>,
    shutdown: impl Future<Output = ()> + Send,
) {
    let mut tasks = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => return,
            Some(_) = tasks.join_next(), if !tasks.is_empty() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, source)) => {
                    let place = connections.open(source);
                    let id = place.id();
                    let task = tasks.spawn(serve_connection(stream, Arc::clone(&routes), place));
                    connections.started(id, task);
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an operator's connection; trying again");
                    time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    routes: Arc<Routes>,
    place: Place,
) {
    let has_asked = place.has_asked();
    let service = service_fn(|request| {
        has_asked.store(true, Ordering::Relaxed);
        let answer = route(&request, &*routes);
        async move { Ok::<_, Infallible>(answer) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match time::timeout(CONNECTION_MAX, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "an operator's connection ended early"),
        Err(_) => {
            tracing::debug!("an operator's connection took longer than {CONNECTION_MAX:?} and was cut off")
        }
    }
}

#[cfg(test)]
mod tests;

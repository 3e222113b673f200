//! Server of the CA API: TCP, TLS 1.3 with a certificate of the intermediate, HTTP/2, gRPC.
//!
//! All resources of a caller are bounded: connections, handshakes, streams, header and message sizes, request time, connection
//! age. Connections beyond the total limit wait in the kernel's queue. Connections beyond the limit of an address are closed, so
//! that one pod cannot block all agents.

use std::{convert::Infallible, fmt, net::IpAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Method, Request, Response,
    body::{Body, Incoming},
    header::{CONTENT_TYPE, HeaderValue},
    server::conn::http2,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
    version::TLS13,
};
use tacit_grpc::{Code, Status, frame::frame};
use tacit_identity::istio::api::{self, CertificateResponse};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::service::Service;
use crate::{connection_limit::ConnectionLimit, reconciler::Live};

/// Maximum open connections. An agent of Tacit connects for some milliseconds, a ztunnel for the whole day.
const CONNECTIONS_MAX: usize = 8192;
/// Maximum connections of one address. Several agents share an address if the path to the authority is masqueraded.
pub(super) const CONNECTIONS_OF_ONE_ADDRESS_MAX: usize = 256;
/// Timeout of TCP accept and TLS handshake.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// Maximum concurrent requests of a connection.
const STREAMS_MAX: u32 = 32;
/// Maximum size of a request's headers, mostly its token.
const HEADERS_MAX_BYTES: u32 = 32 * 1024;
/// Maximum size of a request. A request has some 700 bytes, or a few thousand with an RSA key. Buffered bytes are not yet
/// authenticated, so the windows are small.
const REQUEST_MAX_BYTES: u32 = 16 * 1024;
/// The window of a connection, the minimum of HTTP/2.
const CONNECTION_WINDOW_BYTES: u32 = 65_535;
/// Maximum age of a connection. Callers then reconnect to any replica and get its current certificate.
const CONNECTION_MAX: Duration = Duration::from_secs(3600);
/// Time for current requests when a connection is closed.
const END_MAX: Duration = Duration::from_secs(5);
/// Interval of pings to a silent peer, and the timeout of their answer.
const PING: Duration = Duration::from_secs(30);
/// Pause after a failed accept(), for example without free descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Serves until `stop`, then finishes the current requests.
pub(super) async fn serve(
    listener: TcpListener,
    live: Arc<ArcSwapOption<Live>>,
    service: Arc<Service>,
    stop: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(Arc::new(tls(live)));
    let limit = Arc::new(ConnectionLimit::new(CONNECTIONS_OF_ONE_ADDRESS_MAX));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((tcp, peer)) => {
                    let peer = peer.ip().to_canonical();
                    let Some(permit) = limit.take(peer) else {
                        service.count_rejected_connection(peer);
                        continue;
                    };
                    let served = connection(acceptor.clone(), service.clone(), tcp, peer, stop.clone());
                    connections.spawn(async move {
                        let _permit = permit;
                        served.await;
                    });
                }
                Err(error) => {
                    warn!(%error, "cannot accept a connection; retrying");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    // Each connection ends within END_MAX.
    while connections.join_next().await.is_some() {}
}

fn tls(live: Arc<ArcSwapOption<Live>>) -> ServerConfig {
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites of TLS 1.3")
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Current(live)));
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.send_tls13_tickets = 0;
    config
}

/// Resolves to the certificate of the current intermediate. Without one, the handshake fails.
struct Current(Arc<ArcSwapOption<Live>>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load().as_ref().map(|live| live.signer.server.clone())
    }
}

impl fmt::Debug for Current {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Current")
    }
}

async fn connection(
    acceptor: TlsAcceptor,
    service: Arc<Service>,
    tcp: TcpStream,
    peer: IpAddr,
    stop: CancellationToken,
) {
    let tls = match timeout(HANDSHAKE_MAX, acceptor.accept(tcp)).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => return debug!(%peer, %error, "the TLS handshake failed"),
        Err(_) => return debug!(%peer, "no TLS handshake within {HANDSHAKE_MAX:?}"),
    };
    let handler = service_fn(move |request| {
        let service = service.clone();
        async move { Ok::<_, Infallible>(handle(&service, peer, request).await) }
    });
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEADERS_MAX_BYTES)
        .initial_stream_window_size(REQUEST_MAX_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING);
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(tls), handler));
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = async { tokio::select! { () = stop.cancelled() => {}, () = sleep(CONNECTION_MAX) => {} } } => {
            connection.as_mut().graceful_shutdown();
            timeout(END_MAX, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        debug!(%peer, %error, "a connection ended early");
    }
}

/// Answers one request, always with HTTP 200. The gRPC status is in the trailers.
async fn handle(
    service: &Service,
    peer: IpAddr,
    request: Request<Incoming>,
) -> Response<impl Body<Data = Bytes, Error = Infallible> + use<>> {
    if request.method() != Method::POST || request.uri().path() != api::PATH {
        return response(Err(Status::new(Code::Unimplemented, format!("only {} is served here", api::PATH))));
    }
    let (head, body) = request.into_parts();
    let answer = service.answer(peer, &head.headers, Limited::new(body, REQUEST_MAX_BYTES as usize)).await;
    response(answer.map_err(|refusal| Status::new(refusal.code(), refusal.to_string())))
}

fn response(
    outcome: Result<CertificateResponse, Status>,
) -> Response<impl Body<Data = Bytes, Error = Infallible> + use<>> {
    let (body, status) = match outcome {
        Ok(message) => (frame(&message), Status::OK),
        Err(status) => (Bytes::new(), status),
    };
    let trailers = std::future::ready(Some(Ok(status.trailers())));
    let mut response = Response::new(Full::new(body).with_trailers(trailers));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(tacit_grpc::CONTENT_TYPE));
    response
}

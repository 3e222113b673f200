//! A server of HBONE in a pod that no agent covers, as a ztunnel would serve the pod.

use crate::{
    PEER,
    certificates::{Credentials, sign},
};
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use h2::{
    Reason, RecvStream, SendStream,
    server::{Builder, Connection, SendResponse},
};
use http::{HeaderMap, Response, request::Parts};
use rustls::{ServerConfig, crypto::aws_lc_rs, server::WebPkiClientVerifier, version::TLS13};
use std::{
    net::{Ipv6Addr, SocketAddr, TcpListener},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, channel},
    },
    thread,
};
use tacit_tests::Mesh;
use tacit_topology::{HANG, TUNNEL_PORT};
use tokio::{
    net::TcpStream,
    runtime::{self, Runtime},
    sync::watch,
    task::AbortHandle,
};
use tokio_rustls::TlsAcceptor;

/// The behaviour of a server.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Serve {
    /// Most streams of a connection.
    pub(crate) streams_max: u32,
    /// URI names of its certificate.
    pub(crate) names: &'static [&'static str],
    pub(crate) alpn: &'static [&'static [u8]],
    /// Does this with each request.
    pub(crate) answer: Reply,
}

/// Treatment of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Reply {
    /// 200; what comes is sent back, and so is the end.
    Echo,
    /// Another status, with END_STREAM.
    Status(u16),
    /// RST_STREAM before an answer.
    Reset(Reason),
    /// 200, then a line, then RST_STREAM.
    LineAndReset(Reason),
    /// 200, and an end before what comes is read to its end.
    EndFirst,
}

impl Default for Serve {
    fn default() -> Self {
        Self { streams_max: 200, names: &[PEER], alpn: &[b"h2"], answer: Reply::Echo }
    }
}

/// A request that the server has seen.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) authority: String,
    pub(crate) fields: HeaderMap,
    /// The address of the connection's client.
    pub(crate) client: SocketAddr,
    /// The number of the connection, from 0.
    pub(crate) connection: usize,
}

/// The end of a stream that the server has received.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// END_STREAM after these bytes.
    Clean(Vec<u8>),
    Reset(Option<Reason>),
    Lost,
}

/// The server. Its connections end when it is dropped.
pub(crate) struct HboneServer {
    requests: Receiver<Seen>,
    ends: Receiver<End>,
    state: Arc<State>,
    drain: watch::Sender<bool>,
    listening: AbortHandle,
    _runtime: Runtime,
}

#[derive(Default)]
struct State {
    /// Handshakes that have succeeded.
    connections: Mutex<usize>,
    /// Handshakes that have failed, with the reasons.
    failures: Mutex<Vec<String>>,
}

impl HboneServer {
    /// Listens at the tunnel port of `peer`, for both families.
    pub(crate) fn start(mesh: &Mesh, serve: Serve) -> Result<Self> {
        let Credentials { chain, key, roots } = sign(mesh.agent("a")?.files().issuer(), serve.names)?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build()?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, key)?;
        config.alpn_protocols = serve.alpn.iter().map(|name| name.to_vec()).collect();
        let at = SocketAddr::from((Ipv6Addr::UNSPECIFIED, TUNNEL_PORT));
        let listener = mesh.pod("peer")?.netns().enter(|| TcpListener::bind(at))??;
        listener.set_nonblocking(true)?;
        let runtime = runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let _in = runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let state = Arc::new(State::default());
        let (drain, draining) = watch::channel(false);
        let (seen, requests) = channel();
        let (ended, ends) = channel();
        let (counted, acceptor) = (state.clone(), TlsAcceptor::from(Arc::new(config)));
        let listening = runtime.spawn(async move {
            while let Ok((tcp, client)) = listener.accept().await {
                let (acceptor, counted) = (acceptor.clone(), counted.clone());
                let (seen, ended, draining) = (seen.clone(), ended.clone(), draining.clone());
                tokio::spawn(async move {
                    let _ = tcp.set_nodelay(true);
                    let tls = match acceptor.accept(tcp).await {
                        Ok(tls) => tls,
                        Err(error) => return lock(&counted.failures).push(error.to_string()),
                    };
                    let connection = {
                        let mut connections = lock(&counted.connections);
                        *connections += 1;
                        *connections - 1
                    };
                    let mut settings = Builder::new();
                    settings
                        .initial_window_size(4 << 20)
                        .initial_connection_window_size(16 << 20)
                        .max_frame_size(1 << 20)
                        .max_concurrent_streams(serve.streams_max);
                    if let Ok(http) = settings.handshake(tls).await {
                        let client = SocketAddr::new(client.ip().to_canonical(), client.port());
                        run(http, draining, |request, respond| {
                            let (parts, body) = request.into_parts();
                            // Nobody may want to know.
                            let _ = seen.send(describe(&parts, client, connection));
                            let ended = ended.clone();
                            tokio::spawn(async move {
                                let _ = ended.send(reply(serve.answer, body, respond).await);
                            });
                        })
                        .await;
                    }
                });
            }
        });
        let listening = listening.abort_handle();
        Ok(Self { requests, ends, state, drain, listening, _runtime: runtime })
    }

    /// Waits for the next request.
    pub(crate) fn request(&self) -> Result<Seen> {
        self.requests.recv_timeout(HANG).context("no request")
    }

    /// Waits for the end of the next stream to end.
    pub(crate) fn end(&self) -> Result<End> {
        self.ends.recv_timeout(HANG).context("no end of a stream")
    }

    /// Returns the number of connections so far.
    pub(crate) fn connections(&self) -> usize {
        *lock(&self.state.connections)
    }

    /// Waits for a handshake that fails.
    pub(crate) fn failure(&self) -> Result<String> {
        let deadline = std::time::Instant::now() + HANG;
        loop {
            if let Some(failure) = lock(&self.state.failures).pop() {
                return Ok(failure);
            }
            if std::time::Instant::now() > deadline {
                bail!("no handshake has failed");
            }
            thread::yield_now();
        }
    }

    /// Sends GOAWAY on all connections, and on those that come.
    pub(crate) fn drain(&self) -> Result<()> {
        Ok(self.drain.send(true)?)
    }

    /// Has later connections refused.
    pub(crate) fn stop_listening(&self) {
        self.listening.abort();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn run(
    mut http: Connection<tokio_rustls::server::TlsStream<TcpStream>, Bytes>,
    mut draining: watch::Receiver<bool>,
    serve: impl Fn(http::Request<RecvStream>, SendResponse<Bytes>),
) {
    let mut is_draining = false;
    loop {
        tokio::select! {
            next = http.accept() => match next {
                Some(Ok((request, respond))) => serve(request, respond),
                _ => return,
            },
            drain = draining.wait_for(|drain| *drain), if !is_draining => {
                is_draining = true;
                if drain.is_ok() {
                    http.graceful_shutdown();
                }
            }
        }
    }
}

fn describe(parts: &Parts, client: SocketAddr, connection: usize) -> Seen {
    let authority = parts.uri.authority().map(ToString::to_string).unwrap_or_default();
    Seen { method: parts.method.to_string(), authority, fields: parts.headers.clone(), client, connection }
}

async fn reply(reply: Reply, mut body: RecvStream, mut respond: SendResponse<Bytes>) -> End {
    let accept = |respond: &mut SendResponse<Bytes>| respond.send_response(Response::new(()), false);
    let answer = match reply {
        Reply::Status(status) => {
            let response = Response::builder().status(status).body(()).expect("a status");
            let _ = respond.send_response(response, true);
            return rest(&mut body).await;
        }
        Reply::Reset(reason) => {
            respond.send_reset(reason);
            return End::Reset(None);
        }
        _ => accept(&mut respond),
    };
    let Ok(mut send) = answer else { return End::Lost };
    match reply {
        Reply::LineAndReset(reason) => {
            let _ = send.send_data(Bytes::from_static(b"line\n"), false);
            let _ = body.data().await;
            send.send_reset(reason);
            End::Reset(None)
        }
        Reply::EndFirst => {
            let _ = send.send_data(Bytes::from_static(b"first\n"), true);
            rest(&mut body).await
        }
        _ => echo(&mut body, &mut send).await,
    }
}

async fn echo(body: &mut RecvStream, send: &mut SendStream<Bytes>) -> End {
    while let Some(bytes) = body.data().await {
        let Ok(mut bytes) = bytes else { return failed(bytes.err()) };
        let received_bytes = bytes.len();
        while !bytes.is_empty() {
            send.reserve_capacity(bytes.len());
            match std::future::poll_fn(|cx| send.poll_capacity(cx)).await {
                Some(Ok(room)) => {
                    let here = bytes.split_to(room.min(bytes.len()));
                    if send.send_data(here, false).is_err() {
                        return End::Lost;
                    }
                }
                _ => return End::Lost,
            }
        }
        if body.flow_control().release_capacity(received_bytes).is_err() {
            return End::Lost;
        }
    }
    let _ = send.send_data(Bytes::new(), true);
    End::Clean(Vec::new())
}

async fn rest(body: &mut RecvStream) -> End {
    let mut all = Vec::new();
    while let Some(bytes) = body.data().await {
        match bytes {
            Ok(bytes) => all.extend_from_slice(&bytes),
            Err(error) => return failed(Some(error)),
        }
    }
    End::Clean(all)
}

fn failed(error: Option<h2::Error>) -> End {
    match error {
        Some(error) if error.is_reset() => End::Reset(error.reason()),
        _ => End::Lost,
    }
}

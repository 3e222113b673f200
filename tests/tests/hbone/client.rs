//! A client of HBONE in a pod that no agent covers.

use crate::{
    PEER,
    certificates::{Credentials, sign},
};
use anyhow::{Context, Result, anyhow, ensure};
use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, client::SendRequest};
use http::{HeaderMap, Method, Request, StatusCode};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, UnixTime},
    version::TLS13,
};
use std::{
    future::Future,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tacit_tests::Mesh;
use tacit_topology::{HANG, Pod, TUNNEL_PORT};
use tokio::{net::TcpStream, runtime::Builder, task::JoinHandle, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// Limit of a test, and of a wait in it: longer than a loaded machine needs.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Runs `work`, for a bounded time. Connections have threads of their own, so that `work` may wait for events meanwhile.
pub(crate) fn run<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async { timeout(2 * LIMIT, work).await.context("the test hangs")? })
}

/// One connection, and its driver.
pub(crate) struct Connection {
    pub(crate) requests: SendRequest<Bytes>,
    pub(crate) driver: JoinHandle<Result<(), h2::Error>>,
    pub(crate) local: SocketAddr,
}

/// The answer to a CONNECT.
pub(crate) enum Answer {
    Flow(Flow),
    /// A status other than 200, and true if the stream ended with it.
    Status(u16, bool),
    Reset(Option<Reason>),
}

/// An open flow.
pub(crate) struct Flow {
    pub(crate) send: SendStream<Bytes>,
    pub(crate) receive: RecvStream,
    pub(crate) fields: HeaderMap,
}

/// Connects to the tunnel port of `server` with TLS and these protocols.
pub(crate) async fn tls(mesh: &Mesh, server: IpAddr, alpn: &[&[u8]]) -> Result<TlsStream<TcpStream>> {
    tls_as(mesh, server, alpn, &[PEER]).await
}

/// As [`tls`], with a certificate that has these URI names.
pub(crate) async fn tls_as(
    mesh: &Mesh,
    server: IpAddr,
    alpn: &[&[u8]],
    uris: &[&str],
) -> Result<TlsStream<TcpStream>> {
    tls_with(mesh, server, alpn, sign(mesh.agent("b")?.files().issuer(), uris)?).await
}

/// As [`tls`], with this certificate.
pub(crate) async fn tls_with(
    mesh: &Mesh,
    server: IpAddr,
    alpn: &[&[u8]],
    credentials: Credentials,
) -> Result<TlsStream<TcpStream>> {
    let Credentials { chain, key, roots } = credentials;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let chains = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build()?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Signatures(chains)))
        .with_client_auth_cert(chain, key)?;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.enable_sni = false;
    let tcp = tcp(mesh.pod("peer")?, SocketAddr::new(server, TUNNEL_PORT))?;
    Ok(TlsConnector::from(Arc::new(config)).connect(ServerName::from(server), tcp).await?)
}

fn tcp(from: &Pod, to: SocketAddr) -> Result<TcpStream> {
    let tcp = from.netns().enter(|| std::net::TcpStream::connect_timeout(&to, HANG))??;
    tcp.set_nonblocking(true)?;
    tcp.set_nodelay(true)?;
    Ok(TcpStream::from_std(tcp)?)
}

/// Checks what the agent proves about its key. The identity of a pod is what the tests of the agent's client are about.
#[derive(Debug)]
struct Signatures(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for Signatures {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

impl Connection {
    /// Connects to the tunnel port of `server` with ztunnel's settings.
    pub(crate) async fn open(mesh: &Mesh, server: IpAddr) -> Result<Self> {
        Self::over(tls(mesh, server, &[b"h2"]).await?).await
    }

    /// Begins HTTP/2 with ztunnel's settings.
    pub(crate) async fn over(tls: TlsStream<TcpStream>) -> Result<Self> {
        let local = tls.get_ref().0.local_addr()?;
        let mut settings = h2::client::Builder::new();
        settings
            .enable_push(false)
            .initial_window_size(4 << 20)
            .initial_connection_window_size(16 << 20)
            .max_frame_size(1 << 20)
            .max_header_list_size(16 << 10);
        let (requests, driver) = settings.handshake(tls).await?;
        Ok(Self { requests, driver: tokio::spawn(driver), local })
    }

    /// Sends a CONNECT to `to` and waits for the answer.
    pub(crate) async fn connect(&mut self, to: SocketAddr) -> Result<Answer> {
        self.ask(connect(&to.to_string())).await
    }

    /// Opens a flow to `to`.
    pub(crate) async fn flow(&mut self, to: SocketAddr) -> Result<Flow> {
        self.ask(connect(&to.to_string())).await?.flow()
    }

    /// Sends a request and waits for the answer.
    pub(crate) async fn ask(&mut self, request: http::request::Builder) -> Result<Answer> {
        let mut requests = self.requests.clone().ready().await?;
        let (response, send) = requests.send_request(request.body(())?, false)?;
        let response = match timeout(LIMIT, response).await.context("no answer")? {
            Ok(response) => response,
            Err(error) if error.is_reset() => return Ok(Answer::Reset(error.reason())),
            Err(error) => return Err(error.into()),
        };
        let (head, receive) = response.into_parts();
        if head.status == StatusCode::OK {
            return Ok(Answer::Flow(Flow { send, receive, fields: head.headers }));
        }
        Ok(Answer::Status(head.status.as_u16(), receive.is_end_stream()))
    }
}

/// A CONNECT to `authority`.
pub(crate) fn connect(authority: &str) -> http::request::Builder {
    Request::builder().method(Method::CONNECT).uri(authority)
}

impl Answer {
    pub(crate) fn flow(self) -> Result<Flow> {
        match self {
            Self::Flow(flow) => Ok(flow),
            other => Err(anyhow!("expected 200, got {other:?}")),
        }
    }
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Flow(_) => f.write_str("200"),
            Self::Status(status, ended) => write!(f, "{status}, ended: {ended}"),
            Self::Reset(reason) => write!(f, "RST_STREAM {reason:?}"),
        }
    }
}

impl Flow {
    /// Sends all of `bytes`, as the windows permit.
    pub(crate) async fn send(&mut self, mut bytes: Bytes) -> Result<()> {
        while !bytes.is_empty() {
            self.send.reserve_capacity(bytes.len());
            let room = std::future::poll_fn(|cx| self.send.poll_capacity(cx)).await.context("closed")??;
            self.send.send_data(bytes.split_to(room.min(bytes.len())), false)?;
        }
        Ok(())
    }

    /// Ends this direction.
    pub(crate) fn end(&mut self) -> Result<()> {
        Ok(self.send.send_data(Bytes::new(), true)?)
    }

    /// Receives until END_STREAM.
    pub(crate) async fn rest(&mut self) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(bytes) = timeout(LIMIT, self.receive.data()).await.context("no more bytes")? {
            let bytes = bytes?;
            self.receive.flow_control().release_capacity(bytes.len())?;
            all.extend_from_slice(&bytes);
        }
        Ok(all)
    }

    /// Sends `text` and checks that it comes back, and the end too.
    pub(crate) async fn echo(mut self, text: &str) -> Result<()> {
        self.send(Bytes::copy_from_slice(text.as_bytes())).await?;
        self.end()?;
        let got = self.rest().await?;
        ensure!(got == text.as_bytes(), "{:?} came back", String::from_utf8_lossy(&got));
        Ok(())
    }

    /// Waits until the flow is cut, by RST_STREAM or with its connection.
    pub(crate) async fn cut(&mut self) -> Result<()> {
        let reset = std::future::poll_fn(|cx| self.send.poll_reset(cx));
        timeout(LIMIT, reset).await.context("the flow goes on").map(drop)
    }

    /// Waits for RST_STREAM.
    pub(crate) async fn reset(&mut self) -> Result<Reason> {
        let reset = std::future::poll_fn(|cx| self.send.poll_reset(cx));
        Ok(timeout(LIMIT, reset).await.context("no RST_STREAM")??)
    }
}

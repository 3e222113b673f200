//! Tests of the server: its requests, and the limits of connections and requests per address.

use std::{
    io,
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Request,
    client::conn::http2::{SendRequest, handshake},
    header::AUTHORIZATION,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
    version::TLS13,
};
use tacit_grpc::Code;
use tacit_identity::istio::api;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::sleep,
};
use tokio_rustls::TlsConnector;

use super::{
    api::Api,
    bench::{NAME, Running, cluster, config, published, ready, started},
};
use crate::{
    config::{Config, Rate},
    server::CONNECTIONS_OF_ONE_ADDRESS_MAX,
    service::NODES_AT_ONE_ADDRESS,
};

const HOUR: Duration = Duration::from_secs(3600);
const ONE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 1);
const OTHER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

#[tokio::test]
async fn nothing_is_served_without_tls() {
    let (_api, running, _agent) = started(HOUR).await;
    let mut tcp = connect(&running, ONE).await.expect("connects");
    tcp.write_all(b"GET / HTTP/1.1\r\n\r\n").await.expect("sent");
    let mut answer = Vec::new();
    let _reset_or_end = tcp.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"));
}

#[tokio::test]
async fn other_methods_are_unimplemented() {
    let (api, running, _agent) = started(HOUR).await;
    let mut client = open(&api, &running, ONE).await.expect("opens");
    let other = "/istio.v1.auth.IstioCertificateService/Other";
    assert_eq!(
        asked(&mut client, Request::post(url(other)).body(Full::default())).await,
        Code::Unimplemented
    );
    assert_eq!(
        asked(&mut client, Request::get(url(api::PATH)).body(Full::default())).await,
        Code::Unimplemented
    );
    assert_eq!(with_token(&mut client, "unknown").await, Code::Unauthenticated, "the one method is served");
}

#[tokio::test]
async fn an_address_beyond_its_rate_is_refused_and_another_is_served() {
    let api = cluster().await;
    let slow = Config { rate: Rate { per_second: 1, burst: 3 }, ..config(HOUR) };
    let running = Running::start(slow, Some(&api)).await;
    ready(&api, &running).await;
    let mut client = open(&api, &running, ONE).await.expect("opens");
    for _ in 0..NODES_AT_ONE_ADDRESS * 3 {
        assert_eq!(with_token(&mut client, "unknown").await, Code::Unauthenticated, "within the burst");
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while with_token(&mut client, "unknown").await != Code::ResourceExhausted {
        assert!(Instant::now() < deadline, "never too often");
    }
    let mut other = open(&api, &running, OTHER).await.expect("opens");
    assert_eq!(with_token(&mut other, "unknown").await, Code::Unauthenticated, "its own rate");
}

#[tokio::test]
async fn an_address_beyond_its_connections_is_not_served_while_another_is() {
    let (api, running, _agent) = started(HOUR).await;
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS_OF_ONE_ADDRESS_MAX {
        held.push(connect(&running, ONE).await.expect("connects"));
    }
    open(&api, &running, ONE).await.expect_err("one too many");
    open(&api, &running, OTHER).await.expect("another address is served");
    assert_eq!(running.refused("connections"), 1);
    drop(held);
    let deadline = Instant::now() + Duration::from_secs(30);
    while let Err(error) = open(&api, &running, ONE).await {
        assert!(Instant::now() < deadline, "not served again: {error}");
        sleep(Duration::from_millis(10)).await;
    }
}

async fn connect(running: &Running, from: Ipv4Addr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((from, 0).into())?;
    socket.connect(running.address).await
}

/// Opens an HTTP/2 connection to the authority.
async fn open(api: &Api, running: &Running, from: Ipv4Addr) -> io::Result<SendRequest<Full<Bytes>>> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(published(api).as_bytes()) {
        roots.add(root.expect("PEM")).expect("a root");
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites of TLS 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let name = ServerName::try_from(NAME).expect("a name");
    let tls = TlsConnector::from(Arc::new(config)).connect(name, connect(running, from).await?).await?;
    let (sender, connection) =
        handshake(TokioExecutor::new(), TokioIo::new(tls)).await.map_err(io::Error::other)?;
    tokio::spawn(connection);
    Ok(sender)
}

fn url(path: &str) -> String {
    format!("https://{NAME}{path}")
}

async fn with_token(client: &mut SendRequest<Full<Bytes>>, token: &str) -> Code {
    let request = Request::post(url(api::PATH)).header(AUTHORIZATION, format!("Bearer {token}"));
    asked(client, request.body(Full::default())).await
}

/// Returns the gRPC status of a request.
async fn asked(
    client: &mut SendRequest<Full<Bytes>>,
    request: hyper::http::Result<Request<Full<Bytes>>>,
) -> Code {
    let response = client.send_request(request.expect("a request")).await.expect("an answer");
    let body = response.into_body().collect().await.expect("whole");
    let status = body.trailers().and_then(|trailers| trailers.get("grpc-status")).expect("a status");
    Code::parse(status.as_bytes()).expect("a number")
}

//! Tests of the TLS requirements and the reason of each rejection.

mod revocation;
mod trust_domains;

use std::time::SystemTime;

use rustls::{SignatureScheme, client::ResolvesClientCert, sign::CertifiedKey};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::{
    stream::{self, Established},
    testing::{ISSUER, TestIssuer, connection, credentials, identity},
};

const HOUR: Duration = Duration::from_secs(3600);

/// Returns the outcome on both sides. A client reads on after success, because TLS 1.3 reports a rejection late.
async fn handshake(client: &Credentials, expected: &SpiffeId, server: &Credentials) -> (String, String) {
    let (near, far) = connection().await;
    let connect = async { outcome(stream::connect(near, client, expected).await).await };
    let accept = async {
        match stream::accept(far, server).await {
            Ok(_) => "ok".to_owned(),
            Err(error) => error.reason().label().to_owned(),
        }
    };
    tokio::join!(connect, accept)
}

async fn outcome(established: Result<Established, TunnelError>) -> String {
    let read = match established {
        Ok(Established { mut stream, mut receive_buffer, .. }) => {
            std::future::poll_fn(move |cx| {
                while receive_buffer.next(|record| stream.open(record))?.is_none() {
                    std::task::ready!(stream.poll_fill(cx, &mut receive_buffer))?;
                }
                std::task::Poll::Ready(Ok(()))
            })
            .await
        }
        Err(error) => Err(error),
    };
    read.map_or_else(|error| error.reason().label().to_owned(), |()| "ok".to_owned())
}

fn of(id: &str, made: SystemTime, lifetime: Duration) -> Credentials {
    ISSUER.any(&SpiffeId::parse(id).expect("valid"), made, lifetime)
}

#[tokio::test]
async fn each_wrong_certificate_is_refused_with_its_reason() {
    let now = SystemTime::now();
    let (web, db, db_id) = (credentials("web"), credentials("db"), identity("db"));
    let stranger = |account| TestIssuer::new().any(&identity(account), now, HOUR);
    let other = "spiffe://other.local/ns/shop/sa/db";
    let expired = |id| of(id, now - 2 * HOUR, HOUR);
    let future = |id| of(id, now + 2 * HOUR, HOUR);
    let (web_text, db_text) =
        ("spiffe://cluster.local/ns/shop/sa/web", "spiffe://cluster.local/ns/shop/sa/db");

    // The client rejects the server.
    for (server, reason) in [
        (of("spiffe://cluster.local/ns/shop/sa/mail", now, HOUR), "identity_mismatch"),
        (of("spiffe://cluster.local/ns/bank/sa/db", now, HOUR), "identity_mismatch"),
        (of(other, now, HOUR), "other_trust_domain"),
        (expired(db_text), "expired"),
        (future(db_text), "not_yet_valid"),
        (stranger("db"), "unknown_issuer"),
    ] {
        let (client, server) = handshake(&web, &db_id, &server).await;
        assert_eq!((client.as_str(), server.as_str()), (reason, "refused_by_peer"));
    }
    // The server rejects the client.
    for (mut client, reason) in [
        (of("spiffe://other.local/ns/shop/sa/web", now, HOUR), "other_trust_domain"),
        (expired(web_text), "expired"),
        (future(web_text), "not_yet_valid"),
    ] {
        // Give the client our trust domain, so that it does not reject the server first.
        client.identity = identity("web");
        let (client, server) = handshake(&client, &db_id, &db).await;
        assert_eq!((client.as_str(), server.as_str()), ("refused_by_peer", reason));
    }
    assert_eq!(handshake(&web, &db_id, &db).await.1, "ok");
}

#[tokio::test]
async fn a_certificate_must_name_exactly_one_identity() {
    let (web, db) = (credentials("web"), credentials("db"));
    let (first, second) = (identity("db").to_string(), identity("web").to_string());
    for (uris, reason) in [
        (vec![], "uri_names"),
        (vec![first.clone(), second], "uri_names"),
        (vec![first.clone(), first.clone()], "uri_names"),
        (vec!["https://db.shop".to_owned()], "not_an_identity"),
        (vec![format!("{first}/x")], "not_an_identity"),
        (vec![first], "ok"),
    ] {
        let invalid = Arc::new(SingleCertAndKey::from(ISSUER.invalid(&uris)));
        let mut server = ServerConfig::clone(&server_config(&db));
        server.cert_resolver = invalid.clone();
        let (near, far) = connection().await;
        let expected = identity("db");
        let (client, _) = tokio::join!(
            stream::connect(near, &web, &expected),
            TlsAcceptor::from(Arc::new(server)).accept(far)
        );
        assert_eq!(client.map_or_else(|e| e.reason().label(), |_| "ok"), reason, "server with {uris:?}");

        let mut client = ClientConfig::clone(&client_config(&web, &expected));
        client.client_auth_cert_resolver = invalid;
        assert_eq!(accept_from(client, &db).await, reason, "client with {uris:?}");
    }
}

/// Returns the outcome of our server for a client with `config`.
async fn accept_from(config: ClientConfig, own: &Credentials) -> &'static str {
    let (near, far) = connection().await;
    let name = rustls::pki_types::ServerName::from(far.local_addr().expect("open").ip());
    let connector = TlsConnector::from(Arc::new(config));
    let (_, server) = tokio::join!(connector.connect(name, near), stream::accept(far, own));
    server.map_or_else(|e| e.reason().label(), |_| "ok")
}

#[derive(Debug)]
struct NoCertificate;

impl ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let mut client = ClientConfig::clone(&client_config(&credentials("web"), &identity("db")));
    client.client_auth_cert_resolver = Arc::new(NoCertificate);
    assert_eq!(accept_from(client, &credentials("db")).await, "no_client_certificate");
}

#[tokio::test]
async fn both_sides_insist_on_the_alpn() {
    let (web, db, expected) = (credentials("web"), credentials("db"), identity("db"));
    for (alpn, outcome) in [
        (vec![], "alpn"),
        (vec![b"h2".to_vec()], "ok"),
        (vec![b"tacit/2".to_vec(), b"http/1.1".to_vec()], "alpn"),
    ] {
        let mut client = ClientConfig::clone(&client_config(&web, &expected));
        client.alpn_protocols.clone_from(&alpn);
        assert_eq!(accept_from(client, &db).await, outcome);

        let mut server = ServerConfig::clone(&server_config(&db));
        server.alpn_protocols = alpn;
        let (near, far) = connection().await;
        let (client, _) = tokio::join!(
            stream::connect(near, &web, &expected),
            TlsAcceptor::from(Arc::new(server)).accept(far)
        );
        assert_eq!(client.map_or_else(|e| e.reason().label(), |_| "ok"), outcome);
    }
}

#[tokio::test]
async fn a_peer_of_an_earlier_version_gets_no_urgent_frames() {
    let (web, db, expected) = (credentials("web"), credentials("db"), identity("db"));
    let connect = async |near, far| {
        let (client, server) = tokio::join!(stream::connect(near, &web, &expected), stream::accept(far, &db));
        [client, server].map(|side| side.map_or_else(|e| panic!("{e}"), |side| side.tls.has_urgent))
    };
    let (near, far) = connection().await;
    assert_eq!(connect(near, far).await, [true, true]);

    let mut client = ClientConfig::clone(&client_config(&web, &expected));
    client.alpn_protocols = vec![ALPN.to_vec()];
    let (near, far) = connection().await;
    let earlier = tokio_rustls::TlsConnector::from(Arc::new(client));
    let name = rustls::pki_types::ServerName::try_from("x").expect("a name");
    let (_client, server) = tokio::join!(earlier.connect(name, near), stream::accept(far, &db));
    assert!(!server.map_or_else(|e| panic!("{e}"), |server| server.tls.has_urgent));

    let mut server = ServerConfig::clone(&server_config(&db));
    server.alpn_protocols = vec![ALPN.to_vec()];
    let (near, far) = connection().await;
    let (client, _server) =
        tokio::join!(stream::connect(near, &web, &expected), TlsAcceptor::from(Arc::new(server)).accept(far));
    assert!(!client.map_or_else(|e| panic!("{e}"), |client| client.tls.has_urgent));
}

/// A ClientHello that offers TLS 1.2 and nothing newer.
const CLIENT_HELLO_1_2: &[u8] = &[
    22, 3, 1, 0, 63, 1, 0, 0, 59, 3, 3, // record, handshake, version
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28,
    29, 30, 31, 32, 0, // random, no session id
    0, 2, 0xc0, 0x2b, 1, 0, // ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, no compression
    0, 16, 0, 10, 0, 4, 0, 2, 0, 29, // extensions; groups: X25519
    0, 13, 0, 4, 0, 2, 4, 3, // signatures: ecdsa_secp256r1_sha256
];

/// A ServerHello that chooses TLS 1.2.
const SERVER_HELLO_1_2: &[u8] = &[
    22, 3, 3, 0, 42, 2, 0, 0, 38, 3, 3, //
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28,
    29, 30, 31, 32, 0, // random, no session id
    0xc0, 0x2b, 0, // ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, no compression
];

async fn send(mut tcp: TcpStream, bytes: &[u8]) {
    tcp.write_all(bytes).await.expect("open");
    let mut rest = Vec::new();
    let _ = tcp.read_to_end(&mut rest).await;
}

#[tokio::test]
async fn a_peer_without_tls_1_3_is_refused() {
    let (web, db, expected) = (credentials("web"), credentials("db"), identity("db"));
    for (bytes, reason) in [(CLIENT_HELLO_1_2, "tls_mismatch"), (b"GET / HTTP/1.1\r\n\r\n", "tls")] {
        let (near, far) = connection().await;
        let accept = async { stream::accept(far, &db).await.map_or_else(|e| e.reason().label(), |_| "ok") };
        let (server, ()) = tokio::join!(accept, send(near, bytes));
        assert_eq!(server, reason);
    }
    for (bytes, reason) in [(SERVER_HELLO_1_2, "tls_mismatch"), (b"SSH-2.0-OpenSSH_10.0\r\n", "tls")] {
        let (near, far) = connection().await;
        let connect = async {
            stream::connect(near, &web, &expected).await.map_or_else(|e| e.reason().label(), |_| "ok")
        };
        let (client, ()) = tokio::join!(connect, send(far, bytes));
        assert_eq!(client, reason);
    }
}

#[test]
fn configurations_are_made_once_for_all_connections() {
    let own = credentials("web");
    assert!(Arc::ptr_eq(&server_config(&own), &server_config(&own)));
    let suites: Vec<_> = PROVIDER.cipher_suites.iter().map(|suite| suite.suite().as_str()).collect();
    assert_eq!(
        suites,
        [
            Some("TLS13_AES_256_GCM_SHA384"),
            Some("TLS13_AES_128_GCM_SHA256"),
            Some("TLS13_CHACHA20_POLY1305_SHA256")
        ]
    );
}

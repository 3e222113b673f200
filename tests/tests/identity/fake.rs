//! Fake peers that implement the tunnel's wire format, as agents of another implementation could.
//!
//! They accept every certificate, because the tests check the agent's verification and not theirs.

use crate::certificates::Credentials;
use anyhow::{Context, Result, bail};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible,
    ServerConfig, ServerConnection, SignatureScheme, Stream,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
    version::TLS13,
};
use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};
use tacit_topology::{HANG, Netns, TUNNEL_PORT};

/// OPEN with its header, in bytes.
const OPEN_BYTES: usize = 58;
const ACCEPT: [u8; 4] = [2, 0, 0, 0];
const DENY: u8 = 3;
const FIN: [u8; 4] = [5, 0, 0, 0];

/// TLS settings of a fake peer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TlsOptions {
    pub(crate) alpn: &'static [u8],
}

/// The settings of an agent.
pub(crate) const VALID_OPTIONS: TlsOptions = TlsOptions { alpn: b"tacit/1" };

/// A ClientHello that offers TLS 1.2 and nothing newer (RFC 5246, 7.4.1.2).
pub(crate) const CLIENT_HELLO_1_2: &[u8] = &[
    22, 3, 1, 0, 63, 1, 0, 0, 59, 3, 3, // record, handshake, version
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28,
    29, 30, 31, 32, 0, // random, no session id
    0, 2, 0xc0, 0x2b, 1, 0, // ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, no compression
    0, 16, 0, 10, 0, 4, 0, 2, 0, 29, // extensions; groups: X25519
    0, 13, 0, 4, 0, 2, 4, 3, // signatures: ecdsa_secp256r1_sha256
];

/// A ServerHello that chooses TLS 1.2.
pub(crate) const SERVER_HELLO_1_2: &[u8] = &[
    22, 3, 3, 0, 42, 2, 0, 0, 38, 3, 3, //
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28,
    29, 30, 31, 32, 0, // random, no session id
    0xc0, 0x2b, 0, // ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, no compression
];

/// Response to a fake client's flow.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Response {
    Accepted,
    /// DENY, with the code of its reason.
    Denied(u8),
    /// No response, because the session was closed before.
    Ended(String),
}

/// Flow that a fake client requests.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FlowRequest {
    pub(crate) destination: SocketAddr,
    pub(crate) client: SocketAddr,
}

/// Connects from `netns` to an agent at `server` and requests a flow. Returns also the client's address.
pub(crate) fn request_flow(
    netns: &Netns,
    server: SocketAddr,
    credentials: Option<Credentials>,
    options: TlsOptions,
    request: FlowRequest,
) -> Result<(SocketAddr, Response)> {
    let mut tls = client(server.ip(), credentials, options)?;
    let mut tcp = netns.enter(|| TcpStream::connect_timeout(&server, HANG))??;
    tcp.set_read_timeout(Some(HANG))?;
    let from = tcp.local_addr()?;
    let mut stream = Stream::new(&mut tls, &mut tcp);
    let mut header = [0; 4];
    let received = stream.write_all(&open(request)).and_then(|()| stream.read_exact(&mut header));
    let response = match (received, header) {
        (Err(error), _) => Response::Ended(error.to_string()),
        (Ok(()), ACCEPT) => Response::Accepted,
        (Ok(()), [DENY, 0, 0, 1]) => {
            let mut reason = [0];
            stream.read_exact(&mut reason)?;
            Response::Denied(reason[0])
        }
        (Ok(()), other) => bail!("invalid response {other:?}: expected ACCEPT or DENY"),
    };
    Ok((from, response))
}

/// Connects to the tunnel port like [`request_flow`] and sends up to `max` key updates. Returns the number that could be sent.
pub(crate) fn flood_with_key_updates(
    netns: &Netns,
    server: IpAddr,
    credentials: Credentials,
    request: FlowRequest,
    max: usize,
) -> Result<usize> {
    let mut tls = client(server, Some(credentials), VALID_OPTIONS)?;
    let mut tcp =
        netns.enter(|| TcpStream::connect_timeout(&SocketAddr::new(server, TUNNEL_PORT), HANG))??;
    tcp.set_read_timeout(Some(HANG))?;
    let mut header = [0; 4];
    let mut stream = Stream::new(&mut tls, &mut tcp);
    stream.write_all(&open(request))?;
    stream.read_exact(&mut header)?;
    if header != ACCEPT {
        bail!("not accepted: {header:?}");
    }
    for sent in 0..max {
        tls.refresh_traffic_keys()?;
        while tls.wants_write() {
            if tls.write_tls(&mut tcp).is_err() {
                return Ok(sent);
            }
        }
    }
    Ok(max)
}

fn client(server: IpAddr, credentials: Option<Credentials>, options: TlsOptions) -> Result<ClientConnection> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(NoVerification));
    let mut config = match credentials {
        Some(Credentials { chain, key }) => config.with_client_auth_cert(chain, key)?,
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![options.alpn.to_vec()];
    config.enable_sni = false;
    Ok(ClientConnection::new(Arc::new(config), ServerName::from(server))?)
}

/// A server on the tunnel port of a pod. It accepts every flow, sends `hello` and FIN.
#[derive(Debug)]
pub(crate) struct Server {
    requested_flows: Arc<AtomicUsize>,
}

/// Script of a fake server.
#[derive(Debug)]
pub(crate) enum Script {
    Tls(Credentials, TlsOptions),
    /// These bytes only.
    Bytes(&'static [u8]),
}

impl Server {
    /// Serves in `netns` until the test process ends.
    pub(crate) fn start(netns: &Netns, script: Script) -> Result<Self> {
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, TUNNEL_PORT));
        let listener =
            netns.enter(|| TcpListener::bind(any))?.context("bind the tunnel port of a fake server")?;
        let requested_flows = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&requested_flows);
        let serve: Box<dyn Fn(TcpStream) -> Result<()> + Send> = match script {
            Script::Bytes(bytes) => Box::new(move |mut tcp| Ok(tcp.write_all(bytes)?)),
            Script::Tls(credentials, options) => {
                let config = Arc::new(server_config(credentials, options)?);
                Box::new(move |tcp| serve(tcp, &config, &count))
            }
        };
        thread::spawn(move || {
            for tcp in listener.incoming().map_while(std::io::Result::ok) {
                // The error is ignored, because most tests expect the client to reject the server.
                let _ = serve(tcp);
            }
        });
        Ok(Self { requested_flows })
    }

    /// Returns the number of requested flows. A client requests one only if it trusts the server.
    pub(crate) fn requested_flows(&self) -> usize {
        self.requested_flows.load(Ordering::Relaxed)
    }
}

fn server_config(credentials: Credentials, options: TlsOptions) -> Result<ServerConfig> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(NoVerification))
        .with_single_cert(credentials.chain, credentials.key)?;
    config.alpn_protocols = vec![options.alpn.to_vec()];
    Ok(config)
}

fn serve(mut tcp: TcpStream, config: &Arc<ServerConfig>, requested_flows: &AtomicUsize) -> Result<()> {
    tcp.set_read_timeout(Some(HANG))?;
    let mut tls = ServerConnection::new(Arc::clone(config))?;
    let mut stream = Stream::new(&mut tls, &mut tcp);
    stream.read_exact(&mut [0; OPEN_BYTES])?;
    requested_flows.fetch_add(1, Ordering::Relaxed);
    stream.write_all(&ACCEPT)?;
    stream.write_all(b"\x04\0\0\x06hello\n")?;
    stream.write_all(&FIN)?;
    stream.read_to_end(&mut Vec::new())?;
    Ok(())
}

fn open(request: FlowRequest) -> Vec<u8> {
    let mut frame = vec![1, 0, 0, 54, 1];
    for address in [request.destination, request.client] {
        let ip = match address.ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        frame.extend(ip.octets());
        frame.extend(address.port().to_be_bytes());
    }
    frame.extend([0x5a; 16]);
    // No data before the response.
    frame.push(0);
    frame
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// Accepts every certificate, but checks that the peer holds its key.
#[derive(Debug)]
struct NoVerification;

impl ServerCertVerifier for NoVerification {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for NoVerification {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ServerCertVerifier::verify_tls12_signature(self, message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ServerCertVerifier::verify_tls13_signature(self, message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ServerCertVerifier::supported_verify_schemes(self)
    }
}

//! Peers of our own making that speak the tunnel's wire format, as agents of another implementation could.
//!
//! They trust everybody: what is under test is whether they are trusted.

use crate::forge::Shown;
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

/// How a fake speaks TLS.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Speech {
    pub(crate) alpn: &'static [u8],
}

/// As an agent does.
pub(crate) const RIGHT: Speech = Speech { alpn: b"tacit/1" };

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

/// What came back on a flow that a fake client asked for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Accepted,
    /// With the code of the reason.
    Denied(u8),
    /// No answer: the session was ended before.
    Ended(String),
}

/// The flow a fake client asks for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    pub(crate) destination: SocketAddr,
    pub(crate) client: SocketAddr,
}

/// Connects from `netns` to the tunnel port of `server` and asks for a flow. Also tells the address it connected from.
pub(crate) fn ask(
    netns: &Netns,
    server: IpAddr,
    shown: Option<Shown>,
    speech: Speech,
    asked: Asked,
) -> Result<(SocketAddr, Answer)> {
    let mut tls = client(server, shown, speech)?;
    let mut tcp =
        netns.enter(|| TcpStream::connect_timeout(&SocketAddr::new(server, TUNNEL_PORT), HANG))??;
    tcp.set_read_timeout(Some(HANG))?;
    let from = tcp.local_addr()?;
    let mut stream = Stream::new(&mut tls, &mut tcp);
    let mut header = [0; 4];
    let answered = stream.write_all(&open(asked)).and_then(|()| stream.read_exact(&mut header));
    let answer = match (answered, header) {
        (Err(error), _) => Answer::Ended(error.to_string()),
        (Ok(()), ACCEPT) => Answer::Accepted,
        (Ok(()), [DENY, 0, 0, 1]) => {
            let mut reason = [0];
            stream.read_exact(&mut reason)?;
            Answer::Denied(reason[0])
        }
        (Ok(()), other) => bail!("a frame that is no answer: {other:?}"),
    };
    Ok((from, answer))
}

/// Connects as [`ask`] does, and asks for new keys again and again, `most` times at most. Returns how often it could.
pub(crate) fn flood_with_key_updates(
    netns: &Netns,
    server: IpAddr,
    shown: Shown,
    asked: Asked,
    most: usize,
) -> Result<usize> {
    let mut tls = client(server, Some(shown), RIGHT)?;
    let mut tcp =
        netns.enter(|| TcpStream::connect_timeout(&SocketAddr::new(server, TUNNEL_PORT), HANG))??;
    tcp.set_read_timeout(Some(HANG))?;
    let mut header = [0; 4];
    let mut stream = Stream::new(&mut tls, &mut tcp);
    stream.write_all(&open(asked))?;
    stream.read_exact(&mut header)?;
    if header != ACCEPT {
        bail!("not accepted: {header:?}");
    }
    for done in 0..most {
        tls.refresh_traffic_keys()?;
        while tls.wants_write() {
            if tls.write_tls(&mut tcp).is_err() {
                return Ok(done);
            }
        }
    }
    Ok(most)
}

fn client(server: IpAddr, shown: Option<Shown>, speech: Speech) -> Result<ClientConnection> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody));
    let mut config = match shown {
        Some(Shown { chain, key }) => config.with_client_auth_cert(chain, key)?,
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![speech.alpn.to_vec()];
    config.enable_sni = false;
    Ok(ClientConnection::new(Arc::new(config), ServerName::from(server))?)
}

/// A server on the tunnel port of a pod, which answers every flow with `hello` and its end.
#[derive(Debug)]
pub(crate) struct Server {
    opened: Arc<AtomicUsize>,
}

/// What a fake server says.
#[derive(Debug)]
pub(crate) enum Says {
    Tls(Shown, Speech),
    /// These bytes and nothing else.
    Bytes(&'static [u8]),
}

impl Server {
    /// Serves in `netns` until the test process ends.
    pub(crate) fn start(netns: &Netns, says: Says) -> Result<Self> {
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, TUNNEL_PORT));
        let listener = netns.enter(|| TcpListener::bind(any))?.context("tunnel port of a fake")?;
        let opened = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&opened);
        let serve: Box<dyn Fn(TcpStream) -> Result<()> + Send> = match says {
            Says::Bytes(bytes) => Box::new(move |mut tcp| Ok(tcp.write_all(bytes)?)),
            Says::Tls(shown, speech) => {
                let config = Arc::new(server_config(shown, speech)?);
                Box::new(move |tcp| serve(tcp, &config, &count))
            }
        };
        thread::spawn(move || {
            for tcp in listener.incoming().map_while(std::io::Result::ok) {
                // A client that refuses us is what most tests want.
                let _ = serve(tcp);
            }
        });
        Ok(Self { opened })
    }

    /// Flows that clients asked it for: each one trusted it.
    pub(crate) fn opened(&self) -> usize {
        self.opened.load(Ordering::Relaxed)
    }
}

fn server_config(shown: Shown, speech: Speech) -> Result<ServerConfig> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(Anybody))
        .with_single_cert(shown.chain, shown.key)?;
    config.alpn_protocols = vec![speech.alpn.to_vec()];
    Ok(config)
}

fn serve(mut tcp: TcpStream, config: &Arc<ServerConfig>, opened: &AtomicUsize) -> Result<()> {
    tcp.set_read_timeout(Some(HANG))?;
    let mut tls = ServerConnection::new(Arc::clone(config))?;
    let mut stream = Stream::new(&mut tls, &mut tcp);
    stream.read_exact(&mut [0; OPEN_BYTES])?;
    opened.fetch_add(1, Ordering::Relaxed);
    stream.write_all(&ACCEPT)?;
    stream.write_all(b"\x04\0\0\x06hello\n")?;
    stream.write_all(&FIN)?;
    stream.read_to_end(&mut Vec::new())?;
    Ok(())
}

fn open(asked: Asked) -> Vec<u8> {
    let mut frame = vec![1, 0, 0, 54, 1];
    for address in [asked.destination, asked.client] {
        let ip = match address.ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        frame.extend(ip.octets());
        frame.extend(address.port().to_be_bytes());
    }
    frame.extend([0x5a; 16]);
    // No data ahead of the answer.
    frame.push(0);
    frame
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// Takes every certificate; still checks that the peer holds its key.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
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

impl ClientCertVerifier for Anybody {
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

//! The certificate authority of the ztunnel: Istio's CA API with the root of the mesh. It signs for `peer` alone, whatever is asked, as
//! a CA that takes the identity from the caller's token.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result};
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, ExtendedKeyUsagePurpose, Issuer,
    KeyPair, SanType,
};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tacit_grpc::{Status, server::Connection};
use tacit_identity::istio::api::{CertificateRequest, CertificateResponse};
use tacit_topology::Netns;
use time::{Duration, OffsetDateTime};
use tokio::{net::TcpListener, runtime::Builder, sync::oneshot};
use tokio_rustls::TlsAcceptor;

/// Longest message.
const MESSAGE_MAX_BYTES: usize = 64 << 10;

/// A running authority.
pub(crate) struct Authority {
    signed: Arc<AtomicUsize>,
    /// Ends it when dropped.
    _stop: oneshot::Sender<()>,
    _thread: JoinHandle<()>,
}

/// The root, and the lifetime of what is signed.
struct Signer {
    root: String,
    key: String,
    identity: String,
    lifetime: Duration,
}

impl Authority {
    /// Listens at `at` in `netns` as `name`, with the root in `folder`.
    pub(crate) fn start(
        netns: &Netns,
        at: SocketAddr,
        name: &str,
        folder: &Path,
        identity: &str,
        lifetime_seconds: i64,
    ) -> Result<Self> {
        let read = |file: &str| fs::read_to_string(folder.join(file)).with_context(|| format!("read {file}"));
        let signer = Arc::new(Signer {
            root: read("root-cert.pem")?,
            key: read("root-key.pem")?,
            identity: identity.to_owned(),
            lifetime: Duration::seconds(lifetime_seconds),
        });
        let (chain, key) = signer.own(name)?;
        let mut config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = netns.enter(|| std::net::TcpListener::bind(at))??;
        listener.set_nonblocking(true)?;
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let signed = Arc::new(AtomicUsize::new(0));
        let counted = signed.clone();
        let serve = async move {
            let Ok(listener) = TcpListener::from_std(listener) else { return };
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, signer, counted) = (acceptor.clone(), signer.clone(), counted.clone());
                tokio::spawn(async move {
                    let Ok(tls) = acceptor.accept(tcp).await else { return };
                    let Ok(mut connection) = Connection::open(tls, MESSAGE_MAX_BYTES).await else { return };
                    while let Some(call) = connection.next().await {
                        let (mut requests, mut replies) =
                            call.start::<CertificateRequest, CertificateResponse>();
                        let (signer, counted) = (signer.clone(), counted.clone());
                        tokio::spawn(async move {
                            if let Ok(Some(request)) = requests.message().await
                                && let Ok(response) = signer.sign(&request.csr)
                            {
                                counted.fetch_add(1, Relaxed);
                                let _ = replies.send(&response).await;
                                let _ = replies.finish(&Status::OK).await;
                            }
                        });
                    }
                });
            }
        };
        let thread = thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = serve => {}
                    // Nothing is ever sent.
                    _ = stopped => {}
                }
            });
        });
        Ok(Self { signed, _stop: stop, _thread: thread })
    }

    /// Returns the number of certificates that were signed.
    pub(crate) fn signed(&self) -> usize {
        self.signed.load(Relaxed)
    }
}

impl Signer {
    fn issuer(&self) -> Result<Issuer<'static, KeyPair>> {
        Ok(Issuer::from_ca_cert_pem(&self.root, KeyPair::from_pem(&self.key)?)?)
    }

    /// A certificate of this server.
    fn own(&self, name: &str) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let key = KeyPair::generate()?;
        let params = self.valid(CertificateParams::new([name.to_owned()])?);
        let chain = vec![params.signed_by(&key, &self.issuer()?)?.der().clone()];
        Ok((chain, PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()))))
    }

    fn sign(&self, request: &str) -> Result<CertificateResponse> {
        let mut asked = CertificateSigningRequestParams::from_pem(request)?;
        let mut params = self.valid(CertificateParams::default());
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(self.identity.as_str().try_into()?)];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        asked.params = params;
        let leaf = asked.signed_by(&self.issuer()?)?.pem();
        Ok(CertificateResponse { cert_chain: vec![leaf, self.root.clone()] })
    }

    fn valid(&self, mut params: CertificateParams) -> CertificateParams {
        let now = OffsetDateTime::now_utc();
        (params.not_before, params.not_after) = (now - Duration::seconds(1), now + self.lifetime);
        params
    }
}

//! An issuer that speaks Istio's CA API: Tacit's own authority, istiod or istio-csr.
//!
//! The key is made here and never leaves this process; the authority gets a request signed with it. The roots to trust
//! are the last element of the answer, which may hold several while a root is replaced. Token and root file are read
//! again for each call: Kubernetes replaces both under a running agent. What comes back is believed only when it is for
//! the identity asked for and leads to the roots that came with it.

pub mod api;
mod connection;
mod skew;

use std::{
    future::Future,
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use http::{HeaderMap, header::HeaderValue};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tacit_core::spiffe::SpiffeId;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Semaphore,
    task::spawn_blocking,
};

pub use connection::CallError;
pub use skew::Skew;

use super::{
    certificate::{self, Validity},
    credentials::{Credentials, CredentialsError},
};
use crate::atomic_file;
use api::{CertificateRequest, CertificateResponse};
use connection::{CallResponse, CallTarget};

/// Calls under way at once. A starting agent wants all its identities; an authority serves many agents.
const CALLS_MAX: usize = 8;
/// Longest token or root file, in bytes; tokens are some 1,200 and root files some 1,000 for each root.
const FILE_MAX_BYTES: u64 = 256 * 1024;
/// A clock this far off is reported: certificates are backdated by 60 s, so there is time left to act.
const SKEW_REPORTED: Duration = Duration::from_secs(5);

/// Reads the PEM text of the authority's roots from where they are published; `None` while they are not.
pub type PublishedRoots =
    Box<dyn Fn() -> Pin<Box<dyn Future<Output = Result<Option<String>, String>> + Send>> + Send + Sync>;

/// The authority's address, and the credentials for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IstioConfig {
    /// Host and port.
    pub address: String,
    /// Name that its certificate must have.
    pub server_name: String,
    /// PEM file of the roots that its certificate must lead to.
    pub root_file: PathBuf,
    /// File of the token that is sent.
    pub token_file: PathBuf,
    /// Sent as `clusterid`, for istiod.
    pub cluster_id: Option<HeaderValue>,
    /// Lifetime asked for.
    pub lifetime: Duration,
}

/// Why the authority gave no certificate.
#[derive(Debug, thiserror::Error)]
pub enum IstioError {
    /// Token or root file cannot be read.
    #[error("cannot read {what} {}: {source}", path.display())]
    File {
        /// `tokenFile` or `rootFile`.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no root file, and the published roots cannot be read.
    #[error("no rootFile {}, and rootConfigMap: {problem}", path.display())]
    Published {
        /// The path of the root file.
        path: PathBuf,
        /// The problem.
        problem: String,
    },
    /// Token or root file holds something else.
    #[error("{what} {}: {problem}", path.display())]
    Content {
        /// `tokenFile` or `rootFile`.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The problem.
        problem: String,
    },
    /// No key or request.
    #[error("no certificate request could be made: {0}")]
    Request(#[from] rcgen::Error),
    /// No answer.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The answer is no certificate with its roots.
    #[error("the authority's answer is refused: {0}")]
    Answer(String),
    /// The certificate cannot be used.
    #[error("the authority's certificate is refused: {0}")]
    Credentials(#[from] CredentialsError),
    /// It is for somebody else.
    #[error("the authority's certificate is for {presented}, not for {asked}")]
    Identity {
        /// The requested identity.
        asked: SpiffeId,
        /// The identity in the certificate.
        presented: SpiffeId,
    },
    /// It was no longer valid as it came.
    #[error(
        "the authority's certificate had expired as it came; is this node's clock right, and the authority's?"
    )]
    Expired,
}

/// The latest contact with the authority.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Contact {
    /// The latest answer, a refusal too; `None` before the first.
    pub answered: Option<SystemTime>,
    /// This node's clock skew at that moment; `None` if it was never measured.
    pub skew: Option<Skew>,
}

/// One answer of the authority.
pub struct Exchange {
    /// The certificate and its roots.
    pub answer: CertificateResponse,
    sent: SystemTime,
    received: SystemTime,
    /// The skew that the answer's date shows; `None` without a date.
    skew: Option<Skew>,
}

/// Asks an authority over the network.
pub struct IstioIssuer {
    config: IstioConfig,
    /// Used while there is no root file.
    published_roots: Option<PublishedRoots>,
    calls: Semaphore,
    contact: Mutex<Contact>,
}

impl IstioIssuer {
    /// Nothing is read or dialled yet: an agent starts while its authority is down.
    #[must_use]
    pub fn new(config: IstioConfig) -> Self {
        let calls = Semaphore::new(CALLS_MAX);
        Self { config, published_roots: None, calls, contact: Mutex::default() }
    }

    /// Reads the roots by `published` while there is no root file: the kubelet brings a mounted ConfigMap that was made after the pod up
    /// to a minute late.
    #[must_use]
    pub fn with_published_roots(self, published: PublishedRoots) -> Self {
        Self { published_roots: Some(published), ..self }
    }

    /// The configured address.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.config.address
    }

    /// Returns the latest contact with the authority.
    #[must_use]
    pub fn contact(&self) -> Contact {
        *self.contact.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new key, and a certificate of the authority for `identity`. The caller sets the deadline.
    ///
    /// # Errors
    /// [`IstioError`].
    pub async fn issue(&self, identity: &SpiffeId) -> Result<Credentials, IstioError> {
        let _turn = self.calls.acquire().await.expect("never closed");
        let key = KeyPair::generate()?;
        let csr = request(identity, &key)?;
        let seconds = i64::try_from(self.config.lifetime.as_secs()).unwrap_or(i64::MAX);
        let message = CertificateRequest::for_identity(&identity.to_string(), csr, seconds);
        let exchange = self.ask(&message).await?;
        let credentials = credentials(&exchange.answer, &key, identity)?;
        if exchange.skew.is_none() {
            let Credentials { not_before, not_after, .. } = credentials;
            let validity = Validity { not_before, not_after };
            let skew = skew::by_certificate(exchange.sent, exchange.received, validity);
            self.answered(exchange.received, Some(skew));
        }
        still_valid(credentials, exchange.received)
    }

    /// Sends one message with token and roots as they are now.
    ///
    /// # Errors
    /// [`IstioError`].
    pub async fn ask(&self, message: &CertificateRequest) -> Result<Exchange, IstioError> {
        let target = self.target().await?;
        let sent = SystemTime::now();
        let CallResponse { outcome, date } = connection::call(target, message).await?;
        let received = SystemTime::now();
        let skew = date.map(|date| skew::by_date(sent, received, date));
        self.answered(received, skew);
        Ok(Exchange { answer: outcome?, sent, received, skew })
    }

    /// Connects to another service at the authority's address, with token and roots as they are now. Returns the connection after TLS,
    /// with HTTP/2 as its protocol, and the metadata of calls. The caller sets the deadline.
    ///
    /// # Errors
    /// [`IstioError`].
    pub async fn dial(
        &self,
    ) -> Result<(impl AsyncRead + AsyncWrite + Unpin + Send + use<>, HeaderMap), IstioError> {
        Ok(connection::dial(self.target().await?).await?)
    }

    async fn target(&self) -> Result<CallTarget<'_>, IstioError> {
        let (roots, token) = (self.roots().await?, self.token().await?);
        Ok(CallTarget {
            address: &self.config.address,
            server_name: &self.config.server_name,
            roots,
            token,
            cluster: self.config.cluster_id.clone(),
        })
    }

    fn answered(&self, at: SystemTime, measured: Option<Skew>) {
        let mut contact = self.contact.lock().unwrap_or_else(PoisonError::into_inner);
        contact.answered = Some(at);
        let Some(skew) = measured else { return };
        let far = |skew: Skew| skew.distance() >= SKEW_REPORTED;
        // Once for each time that it goes wrong, not for each certificate.
        if far(skew) && !contact.skew.is_some_and(far) {
            tracing::warn!(clock = %skew, "this node's clock is wrong, or the authority's; beyond 60 s peers refuse certificates");
        }
        contact.skew = Some(skew);
    }

    async fn roots(&self) -> Result<RootCertStore, IstioError> {
        let (what, path) = ("rootFile", &self.config.root_file);
        let bytes = match (read(what, path).await, &self.published_roots) {
            (Err(IstioError::File { source, .. }), Some(published))
                if source.kind() == io::ErrorKind::NotFound =>
            {
                let failed = |problem| IstioError::Published { path: path.clone(), problem };
                let text = published().await.map_err(failed)?;
                text.ok_or_else(|| failed("it does not exist yet, or has no such key".to_owned()))?
                    .into_bytes()
            }
            (read, _) => read?,
        };
        let refuse = |problem| IstioError::Content { what, path: path.clone(), problem };
        let roots = certificate::list(&bytes).map_err(|e| refuse(e.to_string()))?;
        store(roots).map_err(refuse)
    }

    async fn token(&self) -> Result<HeaderValue, IstioError> {
        let (what, path) = ("tokenFile", &self.config.token_file);
        let bytes = read(what, path).await?;
        let refuse =
            |problem: &str| IstioError::Content { what, path: path.clone(), problem: problem.into() };
        let text = std::str::from_utf8(&bytes).map_err(|_| refuse("it is no text"))?.trim();
        if text.is_empty() {
            return Err(refuse("it is empty"));
        }
        let value = HeaderValue::try_from(format!("Bearer {text}"));
        let mut value = value.map_err(|_| refuse("it holds characters that no token has"))?;
        value.set_sensitive(true);
        Ok(value)
    }
}

/// A request for `identity` alone, signed with `key`.
fn request(identity: &SpiffeId, key: &KeyPair) -> Result<String, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    params.serialize_request(key)?.pem()
}

async fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, IstioError> {
    let owned = path.to_owned();
    let blocking = spawn_blocking(move || atomic_file::at_most(std::fs::File::open(owned)?, FILE_MAX_BYTES));
    let read = blocking.await.unwrap_or_else(|panic| Err(io::Error::other(panic)));
    read.map_err(|source| IstioError::File { what, path: path.to_owned(), source })
}

pub(crate) fn store(certificates: Vec<CertificateDer<'static>>) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate).map_err(|e| format!("a certificate in it is no root: {e}"))?;
    }
    Ok(roots)
}

/// The credentials that an answer and `key` make: leaf first, roots last, between them what leads from one to the other.
fn credentials(
    answer: &CertificateResponse,
    key: &KeyPair,
    asked: &SpiffeId,
) -> Result<Credentials, IstioError> {
    let [leaf, between @ .., roots] = answer.cert_chain.as_slice() else {
        let count = answer.cert_chain.len();
        return Err(IstioError::Answer(format!(
            "{count} elements, where a certificate and its roots belong"
        )));
    };
    let read =
        |pem: &String| certificate::list(pem.as_bytes()).map_err(|e| IstioError::Answer(e.to_string()));
    let roots = store(read(roots)?).map_err(IstioError::Answer)?;
    let mut chain = read(leaf)?;
    // istiod sends an empty text when nothing is between.
    for pem in between.iter().filter(|pem| !pem.trim().is_empty()) {
        chain.extend(read(pem)?);
    }
    let validity = certificate::validity(&chain[0]).map_err(CredentialsError::from)?;
    certificate::leads_to(&roots, &chain, validity).map_err(|e| {
        IstioError::Answer(format!("the certificate does not lead to the roots that came with it: {e}"))
    })?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let credentials = Credentials::new(chain, &key, Arc::new(roots))?;
    if &credentials.identity != asked {
        let presented = credentials.identity;
        return Err(IstioError::Identity { asked: asked.clone(), presented });
    }
    Ok(credentials)
}

/// Credentials that nobody could use would be renewed at once, and again.
fn still_valid(credentials: Credentials, received: SystemTime) -> Result<Credentials, IstioError> {
    if credentials.not_after <= received { Err(IstioError::Expired) } else { Ok(credentials) }
}

#[cfg(test)]
mod tests;

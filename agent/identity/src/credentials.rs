//! The key and certificate with which the agent speaks for one service account: an immutable snapshot.
//!
//! Identity, validity and serial number are read from the certificate itself, so they cannot contradict it. The private
//! key stays in memory, inside the signer, and is never printed. TLS configurations made from a snapshot are kept with
//! it, because making one costs far more than a connection should.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::SystemTime,
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::aws_lc_rs::sign::any_supported_type,
    pki_types::{CertificateDer, PrivateKeyDer},
    sign::CertifiedKey,
};
use tacit_core::spiffe::SpiffeId;

use super::{
    certificate::{self, CertificateError},
    peer_trust::{OwnRoots, PeerTrust},
};

/// Servers whose configurations are kept; some 500 bytes each. They are all made again when there are more.
const SERVERS_MAX: usize = 1024;

/// Why a key and a chain are no credentials.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The chain has no certificate.
    #[error("the certificate chain is empty")]
    Empty,
    /// There is no root, so no peer could ever be verified.
    #[error("there is no root certificate to verify peers with")]
    NoRoots,
    /// The first certificate cannot be read, or names no single identity.
    #[error("the certificate is refused: {0}")]
    Certificate(#[from] CertificateError),
    /// The private key is of no supported kind, or not the certificate's.
    #[error("the private key does not fit the certificate: {0}")]
    Key(#[source] rustls::Error),
}

/// Key, certificate and roots of one service account.
pub struct Credentials {
    /// The identity that the certificate proves.
    pub identity: SpiffeId,
    /// Roots to which a peer's chain must lead; never empty.
    pub roots: Arc<RootCertStore>,
    /// Conditions of trust in peers, beside these roots.
    pub trust: Arc<PeerTrust>,
    /// The roots as they are now. [`Credentials::roots`] stays as it was.
    pub own_roots: OwnRoots,
    /// First moment of validity; backdated, see `issuer`.
    pub not_before: SystemTime,
    /// Last moment of validity.
    pub not_after: SystemTime,
    /// Serial number in hexadecimal.
    pub serial: Arc<str>,
    certified: Arc<CertifiedKey>,
    client: OnceLock<Arc<ClientConfig>>,
    clients: Mutex<HashMap<SpiffeId, Arc<ClientConfig>>>,
    server: OnceLock<Arc<ServerConfig>>,
}

impl Credentials {
    /// Credentials of the identity that the first certificate of `chain` names.
    ///
    /// # Errors
    /// [`CredentialsError`] when that certificate names no single identity, `key` is not its key, or there is no root.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: &PrivateKeyDer<'static>,
        roots: Arc<RootCertStore>,
    ) -> Result<Self, CredentialsError> {
        let leaf = chain.first().ok_or(CredentialsError::Empty)?;
        if roots.is_empty() {
            return Err(CredentialsError::NoRoots);
        }
        let identity = certificate::spiffe_id(leaf)?;
        let validity = certificate::validity(leaf)?;
        let serial = certificate::serial(leaf)?;
        let certified = CertifiedKey::new(chain, any_supported_type(key).map_err(CredentialsError::Key)?);
        certified.keys_match().map_err(CredentialsError::Key)?;
        Ok(Self {
            identity,
            roots,
            trust: Arc::default(),
            own_roots: OwnRoots::Fixed,
            not_before: validity.not_before,
            not_after: validity.not_after,
            serial: serial.into(),
            certified: Arc::new(certified),
            client: OnceLock::new(),
            clients: Mutex::default(),
            server: OnceLock::new(),
        })
    }

    /// Returns the same credentials, with which peers are held to `trust`. Before any configuration is made of them.
    #[must_use]
    pub fn with_trust(self, trust: Arc<PeerTrust>) -> Self {
        Self { trust, ..self }
    }

    /// Returns the same credentials, whose peers are trusted no longer than their root is among `own_roots`. Before any configuration
    /// is made of them.
    #[must_use]
    pub fn with_own_roots(self, own_roots: OwnRoots) -> Self {
        Self { own_roots, ..self }
    }

    /// Returns credentials with the same key and certificate, and with other roots, at least one.
    #[must_use]
    pub(crate) fn with_roots(&self, roots: Arc<RootCertStore>) -> Self {
        Self {
            identity: self.identity.clone(),
            roots,
            trust: self.trust.clone(),
            own_roots: self.own_roots.clone(),
            not_before: self.not_before,
            not_after: self.not_after,
            serial: self.serial.clone(),
            certified: self.certified.clone(),
            client: OnceLock::new(),
            clients: Mutex::default(),
            server: OnceLock::new(),
        }
    }

    /// The certificate chain, own certificate first.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// True after the last moment of validity.
    #[must_use]
    pub fn expired(&self, now: SystemTime) -> bool {
        now > self.not_after
    }

    /// Chain and signer, as rustls wants them.
    pub fn certified(&self) -> &Arc<CertifiedKey> {
        &self.certified
    }

    /// The client configuration, made by `make` the first time.
    pub fn client_config(&self, make: impl FnOnce() -> ClientConfig) -> &Arc<ClientConfig> {
        self.client.get_or_init(|| Arc::new(make()))
    }

    /// The client configuration for servers that must be `expected`, made by `make` the first time. All sessions with them
    /// share it.
    pub fn client_config_for(
        &self,
        expected: &SpiffeId,
        make: impl FnOnce() -> ClientConfig,
    ) -> Arc<ClientConfig> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = clients.get(expected) {
            return config.clone();
        }
        if clients.len() == SERVERS_MAX {
            clients.clear();
        }
        clients.entry(expected.clone()).insert_entry(Arc::new(make())).get().clone()
    }

    /// The server configuration, made by `make` the first time.
    pub fn server_config(&self, make: impl FnOnce() -> ServerConfig) -> &Arc<ServerConfig> {
        self.server.get_or_init(|| Arc::new(make()))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("identity", &self.identity.to_string())
            .field("serial", &self.serial)
            .field("not_before", &self.not_before)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

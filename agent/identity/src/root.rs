//! The root of the embedded issuer, kept in a directory: `root-key.pem` (mode 0600) and `root-cert.pem`.
//!
//! The first agent to start makes it. A lock file, temporary files and renames make sure that agents starting at the same
//! moment, or one that dies half-way, leave one root: the key is in place before the certificate, and a key that is
//! found alone gets its certificate made. The root carries `spiffe://<trust domain>` as its only name, so that it cannot
//! be used for another trust domain by mistake. It is valid for ten years; to replace it, replace the directory.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose,
    PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tacit_core::spiffe::TrustDomain;

use super::{
    certificate::{self, CertificateError},
    template::{BACKDATED, random_serial},
};
use crate::atomic_file::{self, FileError};

const KEY_FILE: &str = "root-key.pem";
const CERTIFICATE_FILE: &str = "root-cert.pem";
const LOCK_FILE: &str = ".lock";
/// Another agent holds the lock for milliseconds; longer means that it hangs.
const LOCK_WAIT: Duration = Duration::from_secs(10);
const LOCK_RETRY: Duration = Duration::from_millis(20);
/// Limit for a PEM file, in bytes. A key or certificate takes a few hundred.
const FILE_MAX_BYTES: u64 = 64 * 1024;
const LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Why the root cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedRootError {
    /// A file or the directory cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another process holds the directory's lock.
    #[error("{} is locked by another process for more than {LOCK_WAIT:?}; see which one holds it", .0.display())]
    Locked(PathBuf),
    /// Others than the owner may read the key.
    #[error(
        "{} has mode {mode:03o} and would be readable by others; make sure nobody has read it, then run chmod 600",
        path.display()
    )]
    KeyExposed {
        /// The key.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The certificate is there and the key is not.
    #[error("{} is missing though the certificate is there; restore it, or remove both for a new root", .0.display())]
    KeyMissing(PathBuf),
    /// Not a P-256 key in PKCS #8 PEM.
    #[error("{} holds no ECDSA P-256 key in PKCS #8 PEM: {reason}", path.display())]
    KeyUnreadable {
        /// The key.
        path: PathBuf,
        /// The problem.
        reason: String,
    },
    /// Not a certificate in PEM.
    #[error("{} holds no readable certificate: {reason}", path.display())]
    CertificateUnreadable {
        /// The certificate.
        path: PathBuf,
        /// The problem.
        reason: String,
    },
    /// The certificate is of another key.
    #[error("{} is not the certificate of the key beside it; restore the pair that belongs together", .0.display())]
    Mismatch(PathBuf),
    /// The root belongs to another trust domain, or was not made by Tacit.
    #[error(
        "{} is the root of {found:?}, not of spiffe://{ours}; correct trustDomain or use another directory",
        path.display()
    )]
    TrustDomain {
        /// The certificate.
        path: PathBuf,
        /// Its URI names.
        found: Vec<String>,
        /// The configured trust domain.
        ours: TrustDomain,
    },
    /// The root's own validity does not cover now.
    #[error("{} is not valid now; check the clock, or remove both files for a new root", .0.display())]
    NotValidNow(PathBuf),
    /// Key or certificate could not be made.
    #[error("cannot make the root: {0}")]
    Make(#[from] rcgen::Error),
}

/// The root of the embedded issuer.
pub struct EmbeddedRoot {
    /// Signs the certificates of workloads.
    pub(super) issuer: rcgen::Issuer<'static, KeyPair>,
    /// The certificate that peers trust.
    pub(super) certificate: CertificateDer<'static>,
}

impl EmbeddedRoot {
    /// Reads the root of `trust_domain` in `directory`, or makes it. Blocks, at most for `LOCK_WAIT` and the disk.
    ///
    /// # Errors
    /// [`EmbeddedRootError`]; nothing that is found is ever replaced.
    pub fn open(
        directory: &Path,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Self, EmbeddedRootError> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700).create(directory).map_err(FileError::of("create", directory))?;
        let _lock = lock(&directory.join(LOCK_FILE))?;
        let (key_path, certificate_path) = (directory.join(KEY_FILE), directory.join(CERTIFICATE_FILE));
        let key_pem = read_key(&key_path)?;
        let certificate_pem = read(&certificate_path)?;
        if key_pem.is_none() && certificate_pem.is_some() {
            return Err(EmbeddedRootError::KeyMissing(key_path));
        }
        let key = match key_pem {
            Some(pem) => parse_key(&key_path, &pem)?,
            None => {
                let key = KeyPair::generate()?;
                atomic_file::replace(&key_path, 0o600, key.serialize_pem().as_bytes())?;
                key
            }
        };
        let params = params(trust_domain, now)?;
        if certificate_pem.is_none() {
            atomic_file::replace(&certificate_path, 0o644, params.self_signed(&key)?.pem().as_bytes())?;
        }
        let certificate =
            match certificate_pem.map_or_else(|| read(&certificate_path), |pem| Ok(Some(pem)))? {
                Some(pem) => parse_certificate(&certificate_path, pem.as_bytes())?,
                None => return Err(EmbeddedRootError::Mismatch(certificate_path)),
            };
        check(&certificate_path, &certificate, &params, &key, trust_domain, now)?;
        Ok(Self { issuer: rcgen::Issuer::new(params, key), certificate })
    }
}

/// Name, serial number and use of the root of `trust_domain`. The subject depends on the trust domain alone, so the
/// issuer name that leaves carry is known without parsing the certificate.
fn params(trust_domain: &TrustDomain, now: SystemTime) -> Result<CertificateParams, EmbeddedRootError> {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "Tacit");
    // RFC 5280 appendix A bounds a common name to 64 characters; the URI name carries the whole.
    name.push(DnType::CommonName, trust_domain.as_str().chars().take(64).collect::<String>());
    let mut params = CertificateParams::default();
    params.distinguished_name = name;
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{trust_domain}").try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (now - BACKDATED).into();
    params.not_after = (now + LIFETIME).into();
    params.serial_number = Some(SerialNumber::from_slice(&random_serial()?));
    Ok(params)
}

fn check(
    path: &Path,
    certificate: &CertificateDer<'_>,
    params: &CertificateParams,
    key: &KeyPair,
    trust_domain: &TrustDomain,
    now: SystemTime,
) -> Result<(), EmbeddedRootError> {
    let unreadable = |e: CertificateError| EmbeddedRootError::CertificateUnreadable {
        path: path.into(),
        reason: e.to_string(),
    };
    let found = certificate::uri_names(certificate).map_err(unreadable)?;
    let (subject, public_key) = certificate::subject_and_key(certificate).map_err(unreadable)?;
    let expected = params.self_signed(key)?;
    let (our_subject, our_key) = certificate::subject_and_key(expected.der()).map_err(unreadable)?;
    if found != [format!("spiffe://{trust_domain}")] || subject != our_subject {
        return Err(EmbeddedRootError::TrustDomain { path: path.into(), found, ours: trust_domain.clone() });
    }
    if public_key != our_key || our_key != key.subject_public_key_info() {
        return Err(EmbeddedRootError::Mismatch(path.into()));
    }
    let validity = certificate::validity(certificate).map_err(unreadable)?;
    if now < validity.not_before || now > validity.not_after {
        return Err(EmbeddedRootError::NotValidNow(path.into()));
    }
    Ok(())
}

fn lock(path: &Path) -> Result<File, EmbeddedRootError> {
    let mut options = OpenOptions::new();
    let file = options.create(true).truncate(false).write(true).mode(0o600).open(path);
    let file = file.map_err(FileError::of("open", path))?;
    let deadline = Instant::now() + LOCK_WAIT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(source)) => return Err(FileError::of("lock", path)(source).into()),
            Err(TryLockError::WouldBlock) if Instant::now() > deadline => {
                return Err(EmbeddedRootError::Locked(path.into()));
            }
            Err(TryLockError::WouldBlock) => thread::sleep(LOCK_RETRY),
        }
    }
}

/// The text of `path`; `None` when there is no such file.
fn read(path: &Path) -> Result<Option<String>, EmbeddedRootError> {
    let Some(file) = atomic_file::open(path)? else { return Ok(None) };
    Ok(Some(atomic_file::text(&file, path, FILE_MAX_BYTES)?))
}

/// As [`read`], for a file that only its owner may touch.
fn read_key(path: &Path) -> Result<Option<String>, EmbeddedRootError> {
    let Some(file) = atomic_file::open(path)? else { return Ok(None) };
    let mode = file.metadata().map_err(FileError::of("stat", path))?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(EmbeddedRootError::KeyExposed { path: path.into(), mode });
    }
    Ok(Some(atomic_file::text(&file, path, FILE_MAX_BYTES)?))
}

fn parse_key(path: &Path, pem: &str) -> Result<KeyPair, EmbeddedRootError> {
    KeyPair::from_pkcs8_pem_and_sign_algo(pem, &rcgen::PKCS_ECDSA_P256_SHA256)
        .map_err(|e| EmbeddedRootError::KeyUnreadable { path: path.into(), reason: e.to_string() })
}

fn parse_certificate(path: &Path, pem: &[u8]) -> Result<CertificateDer<'static>, EmbeddedRootError> {
    CertificateDer::from_pem_slice(pem)
        .map_err(|e| EmbeddedRootError::CertificateUnreadable { path: path.into(), reason: e.to_string() })
}

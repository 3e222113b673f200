//! Revocation of peers' certificates by lists (CRLs, RFC 5280 section 5).
//!
//! ```text
//! file ── RevocationLists::parse ── watch ──> RevocationCheck ── handshake: chain_of(path) ──> CertificateChain::check
//!                                                             └─ live session: its CertificateChain, again with every new file
//! ```
//!
//! A list counts for a certificate if the issuer's key has signed it. webpki looks a list up by the issuer's name alone, and fails
//! where a root was replaced by one of the same name. So the lists are asked here, after webpki has verified the chain:
//!
//! | lists of the issuer | status |
//! |---|---|
//! | one of them has the serial number, expired or not | revoked |
//! | none, or only lists that another key has signed | unknown |
//! | for a part of its certificates (with an issuing distribution point) | unknown |
//! | for all of its certificates, expired | unknown |
//! | for all of its certificates, current | good |
//!
//! A list for a part says nothing about the other certificates, and the parts that are missing in the file cannot be counted.
//!
//! A peer of unknown status gets no new session or flow, unless [`UnknownStatus::Allow`] is configured. Its live flows go on, because
//! nothing has been revoked. The root itself has no status: it is taken out of the roots.

mod list;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use rustls::pki_types::{CertificateRevocationListDer, pem::PemObject as _};
use tokio::sync::watch;
use webpki::{Cert, VerifiedPath};

use crate::certificate::{SEQUENCE, element};
pub use list::ListState;
use list::{List, name_text};

/// Lists of one file, a number: each certificate authority of a mesh has one or a few.
const LISTS_MAX: usize = 256;
/// Issuers that are remembered by name and key, a number. Only certificates of verified chains get here.
const ISSUERS_MAX: usize = 1024;

/// The reason for which a file holds no usable revocation lists.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ListError {
    /// There is none in it. That is no way to revoke nothing: a file may be empty by accident.
    #[error("it holds no revocation list, neither in PEM nor in DER")]
    Empty,
    /// More than are ever needed.
    #[error("it holds more than {LISTS_MAX} revocation lists; leave out those that are not needed")]
    Long,
    /// Not PEM.
    #[error("its PEM cannot be read: {0}")]
    Pem(String),
    /// Not a list of RFC 5280, or a kind that is not supported, such as a delta list.
    #[error("revocation list {number} cannot be used: {reason}")]
    List {
        /// Number of the list in the file, counted from 1.
        number: usize,
        /// Its defect.
        reason: String,
    },
}

/// The revocation lists of one file.
#[derive(Debug)]
pub struct RevocationLists {
    lists: Vec<List>,
    /// The indices of an issuer's lists, by its name.
    by_issuer: HashMap<Box<[u8]>, Vec<usize>>,
}

impl RevocationLists {
    /// Parses PEM text, or lists in DER one behind the other. Signatures are verified once the issuers are known.
    ///
    /// # Errors
    /// [`ListError`]: a file with one bad list is not used at all.
    pub fn parse(content: &[u8]) -> Result<Self, ListError> {
        let ders = if content.windows(BEGIN.len()).any(|window| window == BEGIN) {
            CertificateRevocationListDer::pem_slice_iter(content)
                .take(LISTS_MAX + 1)
                .map(|list| list.map(|list| list.as_ref().to_vec()))
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| ListError::Pem(error.to_string()))?
        } else {
            split(content)?
        };
        if ders.is_empty() {
            return Err(ListError::Empty);
        }
        if ders.len() > LISTS_MAX {
            return Err(ListError::Long);
        }
        let mut lists = Vec::with_capacity(ders.len());
        let mut by_issuer: HashMap<Box<[u8]>, Vec<usize>> = HashMap::new();
        for (index, der) in ders.iter().enumerate() {
            let list = List::parse(der).map_err(|reason| ListError::List { number: index + 1, reason })?;
            by_issuer.entry(list.issuer().into()).or_default().push(index);
            lists.push(list);
        }
        Ok(Self { lists, by_issuer })
    }

    /// Returns the lists as an operator sees them, in the order of the file.
    #[must_use]
    pub fn states(&self) -> Vec<ListState> {
        self.lists.iter().map(List::state).collect()
    }

    fn status(&self, link: &Link, now: SystemTime) -> CertificateStatus {
        let named = self.by_issuer.get(&link.issuer.name).map_or(&[][..], Vec::as_slice);
        let named = named.iter().map(|index| &self.lists[*index]);
        let (mut signed, mut is_first) = (Vec::new(), false);
        for list in named {
            let (is_signed, is_new) = list.is_signed_by(&link.issuer);
            is_first |= is_new;
            if is_signed {
                signed.push(list);
            }
        }
        if signed.iter().any(|list| list.names(&link.serial)) {
            return CertificateStatus::Revoked;
        }
        if signed.is_empty() {
            let has_namesake = self.by_issuer.contains_key(&link.issuer.name);
            if is_first && has_namesake {
                let issuer = name_text(&link.issuer.name);
                tracing::warn!(%issuer, "the revocation lists of this issuer are not signed by its key, and are not used for its certificates");
            }
            return CertificateStatus::Unknown(if has_namesake {
                UnknownCause::NotSigned
            } else {
                UnknownCause::NoList
            });
        }
        // The newest list counts.
        let complete = signed.iter().filter(|list| list.is_complete());
        match complete.map(|list| list.next_update).max() {
            None => CertificateStatus::Unknown(UnknownCause::Partitioned),
            Some(until) if until <= now => CertificateStatus::Unknown(UnknownCause::Expired),
            Some(_) => CertificateStatus::Good,
        }
    }
}

/// The head of every PEM block.
const BEGIN: &[u8] = b"-----BEGIN ";

/// Lists in DER one behind the other.
fn split(mut content: &[u8]) -> Result<Vec<Vec<u8>>, ListError> {
    let mut ders = Vec::new();
    while !content.is_empty() && ders.len() <= LISTS_MAX {
        let Some((_, rest)) = element(content, SEQUENCE) else {
            let reason = "it is neither PEM nor DER".to_owned();
            return Err(ListError::List { number: ders.len() + 1, reason });
        };
        ders.push(content[..content.len() - rest.len()].to_vec());
        content = rest;
    }
    Ok(ders)
}

/// Status of one certificate by the lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CertificateStatus {
    Good,
    Revoked,
    Unknown(UnknownCause),
}

/// The reason for which the lists say nothing about a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownCause {
    /// No list has the issuer's name.
    NoList,
    /// The lists with the issuer's name are of another key.
    NotSigned,
    /// The lists are for a part of the issuer's certificates.
    Partitioned,
    /// The list has expired.
    Expired,
}

impl fmt::Display for UnknownCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoList => "the file has no revocation list of this issuer",
            Self::NotSigned => "the revocation lists with this issuer's name are not signed by its key",
            Self::Partitioned => {
                "the revocation lists of this issuer have an issuing distribution point; add a list of all its certificates"
            }
            Self::Expired => "the revocation list of this issuer has expired",
        })
    }
}

/// A certificate of a chain that is not accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unaccepted {
    /// `None` if it is revoked, otherwise why that is not known.
    pub unknown: Option<UnknownCause>,
    /// Serial number in hexadecimal.
    pub serial: String,
    /// Name of the certificate's issuer.
    pub issuer: String,
    /// True for the peer's own certificate, false for an intermediate.
    pub is_leaf: bool,
}

impl fmt::Display for Unaccepted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { unknown, serial, issuer, is_leaf } = self;
        let which = if *is_leaf { "the certificate" } else { "the intermediate certificate" };
        match unknown {
            None => write!(f, "{which} with serial number {serial} is revoked by its issuer, {issuer}"),
            Some(cause) => {
                write!(f, "{which} with serial number {serial} of {issuer} may be revoked: {cause}")
            }
        }
    }
}

/// The answer for certificates of unknown status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UnknownStatus {
    /// They are refused.
    #[default]
    Deny,
    /// They are accepted.
    Allow,
}

/// The check of certificates against revocation lists.
#[derive(Debug, Clone, Default)]
pub enum RevocationCheck {
    /// No lists are configured.
    #[default]
    Off,
    /// Lists are.
    Lists(Arc<Revocation>),
}

/// Revocation lists that are replaced whenever their file changes.
#[derive(Debug)]
pub struct Revocation {
    lists: watch::Receiver<Arc<RevocationLists>>,
    unknown: UnknownStatus,
    /// Issuers of the sessions' certificates, each once.
    issuers: Mutex<HashSet<Arc<IssuerKey>>>,
}

impl Revocation {
    /// Checks against the latest of `lists`.
    #[must_use]
    pub fn new(lists: watch::Receiver<Arc<RevocationLists>>, unknown: UnknownStatus) -> Self {
        Self { lists, unknown, issuers: Mutex::default() }
    }

    /// Returns a receiver of the lists.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<RevocationLists>> {
        self.lists.clone()
    }

    /// Returns the one handle of an issuer, so that thousands of sessions share its name and key.
    fn issuer(&self, name: &[u8], key: &[u8]) -> Arc<IssuerKey> {
        let issuer = IssuerKey { name: name.into(), key: key.into() };
        let mut known = lock(&self.issuers);
        if let Some(known) = known.get(&issuer) {
            return known.clone();
        }
        if known.len() >= ISSUERS_MAX {
            known.retain(|issuer| Arc::strong_count(issuer) > 1);
        }
        let issuer = Arc::new(issuer);
        if known.len() < ISSUERS_MAX {
            known.insert(issuer.clone());
        }
        issuer
    }
}

/// Name and public key of an issuer, as DER without the outer tags.
#[derive(Debug, PartialEq, Eq, Hash)]
struct IssuerKey {
    name: Box<[u8]>,
    /// Content of the SubjectPublicKeyInfo.
    key: Box<[u8]>,
}

impl RevocationCheck {
    /// Returns the certificates of a chain that webpki has verified.
    #[must_use]
    pub fn chain_of(&self, path: &VerifiedPath<'_>) -> CertificateChain {
        let Self::Lists(revocation) = self else { return CertificateChain::default() };
        let issuers = path.intermediate_certificates();
        let chain: Vec<&Cert<'_>> = std::iter::once(&**path.end_entity()).chain(issuers).collect();
        let mut links = Vec::with_capacity(chain.len());
        for (at, certificate) in chain.iter().enumerate() {
            let issuer = match chain.get(at + 1) {
                Some(issuer) => {
                    let info = issuer.subject_public_key_info();
                    let key = element(info.as_ref(), SEQUENCE).map_or(&[][..], |(key, _)| key);
                    revocation.issuer(issuer.subject(), key)
                }
                None => {
                    let root = path.anchor();
                    revocation.issuer(&root.subject, &root.subject_public_key_info)
                }
            };
            links.push(Link { issuer, serial: certificate.serial().into() });
        }
        CertificateChain(Some(Arc::new(Chain { revocation: revocation.clone(), links: links.into() })))
    }
}

/// The certificates of a verified peer, as revocation lists name them. Empty if no lists are configured. A clone shares it.
#[derive(Debug, Clone, Default)]
pub struct CertificateChain(Option<Arc<Chain>>);

#[derive(Debug)]
struct Chain {
    revocation: Arc<Revocation>,
    /// The peer's certificate first, the one that a root has issued last.
    links: Box<[Link]>,
}

/// One certificate.
#[derive(Debug)]
struct Link {
    issuer: Arc<IssuerKey>,
    /// As in the certificate, with a leading zero if there is one.
    serial: Box<[u8]>,
}

impl CertificateChain {
    /// Returns true if there is nothing to check, now and later.
    #[must_use]
    pub fn is_unchecked(&self) -> bool {
        self.0.is_none()
    }

    /// Checks each certificate against the latest lists, for a new session or flow.
    ///
    /// # Errors
    /// [`Unaccepted`] with the first certificate that is revoked, or else the first of unknown status if those are denied.
    pub fn check(&self, now: SystemTime) -> Result<(), Unaccepted> {
        let Some(chain) = &self.0 else { return Ok(()) };
        let lists = chain.revocation.lists.borrow().clone();
        let mut first_unknown = None;
        for (at, link) in chain.links.iter().enumerate() {
            let unaccepted = |unknown| Unaccepted {
                unknown,
                serial: link.serial_text(),
                issuer: name_text(&link.issuer.name),
                is_leaf: at == 0,
            };
            match lists.status(link, now) {
                CertificateStatus::Good => {}
                CertificateStatus::Revoked => return Err(unaccepted(None)),
                CertificateStatus::Unknown(cause) => {
                    first_unknown.get_or_insert_with(|| unaccepted(Some(cause)));
                }
            }
        }
        match first_unknown {
            Some(unknown) if chain.revocation.unknown == UnknownStatus::Deny => Err(unknown),
            _ => Ok(()),
        }
    }
}

impl Link {
    fn serial_text(&self) -> String {
        let digits = self.serial.iter().skip_while(|byte| **byte == 0);
        digits.map(|byte| format!("{byte:02x}")).collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

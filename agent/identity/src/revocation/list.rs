//! One revocation list. webpki parses it, and rejects delta lists, indirect lists and critical extensions that it does not know.
//! The signature is verified here, because webpki does so for one issuer of a name only.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::SystemTime,
};

use webpki::{CertRevocationList, OwnedCertRevocationList};
use x509_parser::{prelude::FromDer as _, x509::X509Name};

use super::{ISSUERS_MAX, IssuerKey, lock};
use crate::certificate::{INTEGER, SEQUENCE, element, time};

const BIT_STRING: u8 = 0x03;

/// A revocation list as an operator sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListState {
    /// Name of the issuer.
    pub issuer: String,
    /// Number of revoked certificates.
    pub revoked: u64,
    /// When it was made.
    pub this_update: SystemTime,
    /// When it expires.
    pub next_update: SystemTime,
    /// True if the key of an issuer has signed it, false if only other keys have come up that have the issuer's name. `None` before the
    /// first certificate of that name.
    pub is_signed: Option<bool>,
}

/// A list, and the keys that were asked for its signature.
#[derive(Debug)]
pub(super) struct List {
    /// The serial numbers.
    entries: CertRevocationList<'static>,
    revoked: u64,
    this_update: SystemTime,
    pub(super) next_update: SystemTime,
    /// The signed part, with its tag.
    to_be_signed: Box<[u8]>,
    /// Content of the AlgorithmIdentifier.
    algorithm: Box<[u8]>,
    signature: Box<[u8]>,
    /// Results of checks that the key of an issuer has signed the list. A check takes some 100 µs, and more for a long list.
    signers: Mutex<HashMap<Arc<IssuerKey>, bool>>,
}

impl List {
    pub(super) fn parse(der: &[u8]) -> Result<Self, String> {
        let entries = OwnedCertRevocationList::from_der(der).map_err(|error| error.to_string())?;
        let fields = Fields::read(der).ok_or("its fields cannot be read")?;
        Ok(Self {
            entries: entries.into(),
            revoked: fields.revoked,
            this_update: fields.this_update,
            next_update: fields.next_update,
            to_be_signed: fields.to_be_signed.into(),
            algorithm: fields.algorithm.into(),
            signature: fields.signature.into(),
            signers: Mutex::default(),
        })
    }

    /// Returns the name of the issuer, as DER without the outer tag.
    pub(super) fn issuer(&self) -> &[u8] {
        self.entries.issuer()
    }

    /// Returns true if the list is for all certificates of the issuer: it has no issuing distribution point.
    pub(super) fn is_complete(&self) -> bool {
        self.entries.issuing_distribution_point().is_none()
    }

    /// Returns true if the list has the serial number. A list in which it cannot be looked up has it.
    pub(super) fn names(&self, serial: &[u8]) -> bool {
        !matches!(self.entries.find_serial(serial), Ok(None))
    }

    /// Returns whether the issuer's key has signed the list, and whether the issuer is asked for the first time.
    pub(super) fn is_signed_by(&self, issuer: &Arc<IssuerKey>) -> (bool, bool) {
        let mut signers = lock(&self.signers);
        if let Some(is_signed) = signers.get(issuer) {
            return (*is_signed, false);
        }
        let is_signed = self.has_signature_of(&issuer.key).is_some();
        if signers.len() >= ISSUERS_MAX {
            signers.clear();
        }
        signers.insert(issuer.clone(), is_signed);
        (is_signed, true)
    }

    fn has_signature_of(&self, key: &[u8]) -> Option<()> {
        let (key_algorithm, rest) = element(key, SEQUENCE)?;
        let (key, _) = bits(rest)?;
        let fits = webpki::ALL_VERIFICATION_ALGS.iter().filter(|algorithm| {
            algorithm.signature_alg_id().as_ref() == &*self.algorithm
                && algorithm.public_key_alg_id().as_ref() == key_algorithm
        });
        let mut verified = fits
            .filter(|algorithm| algorithm.verify_signature(key, &self.to_be_signed, &self.signature).is_ok());
        verified.next().map(|_| ())
    }

    pub(super) fn state(&self) -> ListState {
        let signers = lock(&self.signers);
        ListState {
            issuer: name_text(self.issuer()),
            revoked: self.revoked,
            this_update: self.this_update,
            next_update: self.next_update,
            is_signed: (!signers.is_empty()).then(|| signers.values().any(|is_signed| *is_signed)),
        }
    }
}

/// The fields of a CertificateList (RFC 5280 section 5.1) that webpki keeps to itself.
struct Fields<'a> {
    to_be_signed: &'a [u8],
    algorithm: &'a [u8],
    signature: &'a [u8],
    this_update: SystemTime,
    next_update: SystemTime,
    revoked: u64,
}

impl<'a> Fields<'a> {
    fn read(der: &'a [u8]) -> Option<Self> {
        let (list, _) = element(der, SEQUENCE)?;
        let (content, rest) = element(list, SEQUENCE)?;
        let to_be_signed = &list[..list.len() - rest.len()];
        let (algorithm, rest) = element(rest, SEQUENCE)?;
        let (signature, _) = bits(rest)?;
        let (_version, rest) = element(content, INTEGER)?;
        let (_algorithm, rest) = element(rest, SEQUENCE)?;
        let (_issuer, rest) = element(rest, SEQUENCE)?;
        let (this_update, rest) = time(rest)?;
        let (next_update, rest) = time(rest)?;
        let mut entries = element(rest, SEQUENCE).map_or(&[][..], |(entries, _)| entries);
        let mut revoked = 0;
        while !entries.is_empty() {
            (_, entries) = element(entries, SEQUENCE)?;
            revoked += 1;
        }
        Some(Self { to_be_signed, algorithm, signature, this_update, next_update, revoked })
    }
}

/// The content of a BIT STRING of whole bytes, and what follows it.
fn bits(input: &[u8]) -> Option<(&[u8], &[u8])> {
    let (content, rest) = element(input, BIT_STRING)?;
    Some((content.strip_prefix(&[0])?, rest))
}

/// Returns a name for operators. `content` is DER without the outer tag.
pub(super) fn name_text(content: &[u8]) -> String {
    let mut der = vec![SEQUENCE];
    match content.len() {
        length @ 0..=0x7f => der.extend(u8::try_from(length)),
        length @ 0x80..=0xff => der.extend([0x81].into_iter().chain(u8::try_from(length))),
        length => {
            der.push(0x82);
            der.extend(u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes());
        }
    }
    der.extend(content);
    match X509Name::from_der(&der) {
        Ok((_, name)) => name.to_string(),
        Err(_) => "a name that cannot be read".to_owned(),
    }
}

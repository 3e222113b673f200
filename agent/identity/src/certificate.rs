//! Reader of X.509 certificates: the one SPIFFE id, the validity, the serial number.
//!
//! Names are parsed by webpki, the parser that also verifies the chain, so both can never disagree about an identity.
//! webpki keeps the validity to itself; it is read here by walking the first fields of the certificate (RFC 5280
//! section 4.1), which webpki has accepted by then. Peers are verified by `tunnel::tls`; `leads_to` only finds out early that no
//! peer could verify a chain.

use std::{
    ops::RangeInclusive,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, UnixTime, pem::PemObject as _},
};
use tacit_core::spiffe::{IdentityError, SpiffeId};
use webpki::{EndEntityCert, KeyUsage};

pub(crate) const INTEGER: u8 = 0x02;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
pub(crate) const SEQUENCE: u8 = 0x30;
/// `[0] EXPLICIT` around the version.
const VERSION: u8 = 0xa0;

/// Most certificates of one text, a number: the roots of a whole system are some 150.
const LIST_MAX: usize = 256;

/// Why a text is no list of certificates.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateListError {
    /// There is none in it.
    #[error("it holds no certificate")]
    Empty,
    /// More than are ever needed.
    #[error("it holds more than {LIST_MAX} certificates: leave out those that are not needed")]
    Long,
    /// Not certificates in DER, one after the other.
    #[error("it holds bytes that are not certificates in DER")]
    Der,
    /// Not PEM.
    #[error("it holds a certificate that cannot be read: {0}")]
    Pem(String),
}

/// Why a certificate cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// Not an X.509 version 3 certificate.
    #[error("it is no readable X.509 certificate ({0})")]
    Unreadable(String),
    /// SPIFFE asks for exactly one URI name (X.509-SVID section 2).
    #[error("it has {0} URI names, exactly one is required")]
    UriNames(usize),
    /// The one URI is no SPIFFE id.
    #[error("its URI name is no identity: {0}")]
    Identity(#[from] IdentityError),
    /// The validity is missing or no time of RFC 5280.
    #[error("its validity cannot be read")]
    Validity,
}

/// The time a certificate is valid for, both ends included, in whole seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// First moment.
    pub not_before: SystemTime,
    /// Last moment.
    pub not_after: SystemTime,
}

/// The certificates of a PEM text, at least one.
///
/// # Errors
/// [`CertificateListError`]; a list that is too long is not cut.
pub fn list(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, CertificateListError> {
    let list: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).take(LIST_MAX + 1).collect();
    match list {
        Ok(list) if list.is_empty() => Err(CertificateListError::Empty),
        Ok(list) if list.len() > LIST_MAX => Err(CertificateListError::Long),
        Ok(list) => Ok(list),
        Err(e) => Err(CertificateListError::Pem(e.to_string())),
    }
}

/// The certificates of a text in DER, one after the other, at least one.
///
/// # Errors
/// [`CertificateListError`]; a list that is too long is not cut.
pub fn list_der(mut der: &[u8]) -> Result<Vec<CertificateDer<'static>>, CertificateListError> {
    let mut list = Vec::new();
    while !der.is_empty() {
        let (_, rest) = element(der, SEQUENCE).ok_or(CertificateListError::Der)?;
        let (certificate, _) = der.split_at(der.len() - rest.len());
        if list.len() == LIST_MAX {
            return Err(CertificateListError::Long);
        }
        list.push(CertificateDer::from(certificate.to_vec()));
        der = rest;
    }
    if list.is_empty() { Err(CertificateListError::Empty) } else { Ok(list) }
}

/// Checks that peers can verify the chain, as client and as server. The check uses the middle of the leaf's life as time,
/// because a wrong clock is reported on its own.
///
/// # Errors
/// The reason why peers would reject the chain.
pub fn leads_to(
    roots: &RootCertStore,
    chain: &[CertificateDer<'_>],
    validity: Validity,
) -> Result<(), webpki::Error> {
    let (leaf, between) = chain.split_first().ok_or(webpki::Error::UnknownIssuer)?;
    let life = validity.not_after.duration_since(validity.not_before).unwrap_or_default();
    let middle = validity.not_before + life / 2;
    let time = UnixTime::since_unix_epoch(middle.duration_since(UNIX_EPOCH).unwrap_or_default());
    let leaf = EndEntityCert::try_from(leaf)?;
    for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
        let algorithms = webpki::ALL_VERIFICATION_ALGS;
        leaf.verify_for_usage(algorithms, &roots.roots, between, time, usage, None, None)?;
    }
    Ok(())
}

/// The URI names of `certificate`, in its order. Other kinds of names never count as an identity and are left out.
///
/// # Errors
/// [`CertificateError::Unreadable`].
pub fn uri_names(certificate: &CertificateDer<'_>) -> Result<Vec<String>, CertificateError> {
    let parsed = parse(certificate)?;
    Ok(parsed.valid_uri_names().map(str::to_owned).collect())
}

/// The identity `certificate` names.
///
/// # Errors
/// [`CertificateError`] when it does not name exactly one.
pub fn spiffe_id(certificate: &CertificateDer<'_>) -> Result<SpiffeId, CertificateError> {
    match uri_names(certificate)?.as_slice() {
        [one] => Ok(SpiffeId::parse(one)?),
        names => Err(CertificateError::UriNames(names.len())),
    }
}

/// The serial number in hexadecimal, without leading zero bytes.
///
/// # Errors
/// [`CertificateError::Unreadable`].
pub fn serial(certificate: &CertificateDer<'_>) -> Result<String, CertificateError> {
    let parsed = parse(certificate)?;
    let digits = parsed.serial().iter().skip_while(|byte| **byte == 0);
    Ok(digits.map(|byte| format!("{byte:02x}")).collect())
}

/// The raw subject and the public key (SubjectPublicKeyInfo) of `certificate`, both DER.
///
/// # Errors
/// [`CertificateError::Unreadable`].
pub fn subject_and_key(certificate: &CertificateDer<'_>) -> Result<(Vec<u8>, Vec<u8>), CertificateError> {
    let parsed = parse(certificate)?;
    Ok((parsed.subject().to_vec(), parsed.subject_public_key_info().as_ref().to_vec()))
}

/// When `certificate` is valid.
///
/// # Errors
/// [`CertificateError::Validity`].
pub fn validity(certificate: &CertificateDer<'_>) -> Result<Validity, CertificateError> {
    read_validity(certificate.as_ref()).ok_or(CertificateError::Validity)
}

fn parse<'a>(certificate: &'a CertificateDer<'a>) -> Result<EndEntityCert<'a>, CertificateError> {
    EndEntityCert::try_from(certificate).map_err(|e| CertificateError::Unreadable(e.to_string()))
}

fn read_validity(der: &[u8]) -> Option<Validity> {
    let (certificate, _) = element(der, SEQUENCE)?;
    let (to_be_signed, _) = element(certificate, SEQUENCE)?;
    let (_version, rest) = element(to_be_signed, VERSION)?;
    let (_serial, rest) = element(rest, INTEGER)?;
    let (_algorithm, rest) = element(rest, SEQUENCE)?;
    let (_issuer, rest) = element(rest, SEQUENCE)?;
    let (validity, _) = element(rest, SEQUENCE)?;
    let (not_before, rest) = time(validity)?;
    let (not_after, rest) = time(rest)?;
    rest.is_empty().then_some(Validity { not_before, not_after })
}

/// The content of the DER element at the head of `input`, which must have `tag`, and what follows it.
pub(crate) fn element(input: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&[found, first], rest) = input.split_first_chunk::<2>()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81 => {
            let (&[length], rest) = rest.split_first_chunk::<1>()?;
            (usize::from(length), rest)
        }
        0x82 => {
            let (length, rest) = rest.split_first_chunk::<2>()?;
            (usize::from(u16::from_be_bytes(*length)), rest)
        }
        0x83 => {
            let (&[high, middle, low], rest) = rest.split_first_chunk::<3>()?;
            (usize::try_from(u32::from_be_bytes([0, high, middle, low])).ok()?, rest)
        }
        // webpki reads certificates up to 64 KiB, and files of revocation lists are smaller than 16 MiB.
        _ => return None,
    };
    if found == tag { rest.split_at_checked(length) } else { None }
}

/// A time of RFC 5280 section 4.1.2.5: always UTC, always with seconds.
pub(crate) fn time(input: &[u8]) -> Option<(SystemTime, &[u8])> {
    if let Some((text, rest)) = element(input, UTC_TIME) {
        let year = number(text, 0..=1)?;
        let year = if year < 50 { 2000 + year } else { 1900 + year };
        return Some((moment(year, text.get(2..)?)?, rest));
    }
    let (text, rest) = element(input, GENERALIZED_TIME)?;
    Some((moment(number(text, 0..=3)?, text.get(4..)?)?, rest))
}

/// `MMDDHHMMSSZ` of `year`.
fn moment(year: u32, text: &[u8]) -> Option<SystemTime> {
    if text.len() != 11 || text.last() != Some(&b'Z') {
        return None;
    }
    let part = |at: usize| number(text, at..=at + 1).and_then(|n| u8::try_from(n).ok());
    let month = time::Month::try_from(part(0)?).ok()?;
    let date = time::Date::from_calendar_date(i32::try_from(year).ok()?, month, part(2)?).ok()?;
    let clock = date.with_hms(part(4)?, part(6)?, part(8)?).ok()?;
    let seconds = clock.assume_utc().unix_timestamp();
    let distance = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(distance)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(distance)
    }
}

fn number(text: &[u8], at: RangeInclusive<usize>) -> Option<u32> {
    let digits = std::str::from_utf8(text.get(at)?).ok()?;
    if digits.bytes().all(|b| b.is_ascii_digit()) { digits.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn times_are_read_as_rfc_5280_writes_them() {
        let utc =
            |text: &str| [&[UTC_TIME, u8::try_from(text.len()).expect("short")], text.as_bytes()].concat();
        let general = |text: &str| {
            [&[GENERALIZED_TIME, u8::try_from(text.len()).expect("short")], text.as_bytes()].concat()
        };
        for (der, expected) in [
            (utc("700101000000Z"), Some(at(0))),
            (utc("261123233806Z"), Some(at(1_795_477_086))),
            (general("20500101000000Z"), Some(at(2_524_608_000))),
            (utc("261323233806Z"), None),
            (utc("261123233806"), None),
            (utc("2611232338Z"), None),
            (utc("26+123233806Z"), None),
            (utc("261123233806+0100"), None),
            (utc("261123233860Z"), None),
        ] {
            assert_eq!(time(&der).map(|(moment, _)| moment), expected, "{der:02x?}");
        }
    }

    #[test]
    fn a_certificate_tells_its_validity_names_and_serial() {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::default();
        params.not_before = at(1_700_000_000).into();
        params.not_after = at(2_600_000_000).into();
        params.serial_number = Some(rcgen::SerialNumber::from_slice(&[0xf0, 1, 2]));
        params.subject_alt_names = vec![
            rcgen::SanType::DnsName("web.shop".try_into().expect("ascii")),
            rcgen::SanType::URI("spiffe://cluster.local/ns/shop/sa/web".try_into().expect("ascii")),
        ];
        let certificate = params.self_signed(&key).expect("signed").der().clone();
        assert_eq!(
            validity(&certificate),
            Ok(Validity { not_before: at(1_700_000_000), not_after: at(2_600_000_000) })
        );
        assert_eq!(
            spiffe_id(&certificate).expect("one").to_string(),
            "spiffe://cluster.local/ns/shop/sa/web"
        );
        assert_eq!(serial(&certificate).as_deref(), Ok("f00102"));
    }

    #[test]
    fn a_list_has_one_certificate_at_least_and_is_never_cut() {
        let key = rcgen::KeyPair::generate().expect("a key");
        let one = rcgen::CertificateParams::default().self_signed(&key).expect("signed").pem();
        let broken = one.replace("MII", "M!I");
        for (text, expected) in [
            (one.clone(), Ok(1)),
            (one.repeat(LIST_MAX), Ok(LIST_MAX)),
            (one.repeat(LIST_MAX + 1), Err("more than 256")),
            (String::new(), Err("no certificate")),
            (format!("{one}{broken}"), Err("cannot be read")),
        ] {
            let read = list(text.as_bytes()).map(|list| list.len()).map_err(|e| e.to_string());
            match (read, expected) {
                (Ok(count), Ok(expected)) => assert_eq!(count, expected),
                (Err(problem), Err(expected)) => assert!(problem.contains(expected), "{problem}"),
                (read, expected) => panic!("{read:?}, not {expected:?}"),
            }
        }
    }

    #[test]
    fn a_list_in_der_is_split_and_never_cut() {
        let key = rcgen::KeyPair::generate().expect("a key");
        let one = rcgen::CertificateParams::default().self_signed(&key).expect("signed").der().clone();
        let two = [one.as_ref(), one.as_ref()].concat();
        assert_eq!(list_der(&two), Ok(vec![one.clone(), one.clone()]));
        assert_eq!(list_der(&[]), Err(CertificateListError::Empty));
        assert_eq!(list_der(&one.repeat(LIST_MAX)).map(|list| list.len()), Ok(LIST_MAX));
        assert_eq!(list_der(&one.repeat(LIST_MAX + 1)), Err(CertificateListError::Long));
        for length in (1..two.len()).filter(|length| *length != one.len()) {
            assert_eq!(list_der(&two[..length]), Err(CertificateListError::Der), "cut at {length}");
        }
    }

    #[test]
    fn a_cut_certificate_has_no_validity_and_never_panics() {
        let key = rcgen::KeyPair::generate().expect("a key");
        let certificate = rcgen::CertificateParams::default().self_signed(&key).expect("signed");
        for length in 0..certificate.der().len() {
            let cut = CertificateDer::from(&certificate.der()[..length]);
            assert_eq!(validity(&cut), Err(CertificateError::Validity), "cut at {length}");
        }
    }
}

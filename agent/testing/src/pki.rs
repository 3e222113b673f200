//! Certificate authorities of tests, and their revocation lists.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CrlIssuingDistributionPoint,
    DnType, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
};

/// Returns the parameters and a new key of an authority for certificates and revocation lists.
///
/// # Panics
/// If no key can be made.
#[must_use]
pub fn authority(name: &str, serial: u8) -> (CertificateParams, KeyPair) {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(SerialNumber::from_slice(&[serial]));
    (params, KeyPair::generate().expect("a key"))
}

/// Returns a revocation list of `issuer` in PEM, made a day before now or before `next_update`. `part` makes it one of a part of the
/// certificates.
///
/// # Panics
/// If it cannot be signed.
#[must_use]
pub fn revocation_list<S: AsRef<[u8]>>(
    issuer: &Issuer<'_, KeyPair>,
    serials: &[S],
    next_update: SystemTime,
    part: Option<CrlIssuingDistributionPoint>,
) -> String {
    let this_update = next_update.min(SystemTime::now()) - Duration::from_secs(24 * 3600);
    let entry = |serial: &S| RevokedCertParams {
        serial_number: SerialNumber::from_slice(serial.as_ref()),
        revocation_time: this_update.into(),
        reason_code: None,
        invalidity_date: None,
    };
    let params = CertificateRevocationListParams {
        this_update: this_update.into(),
        next_update: next_update.into(),
        crl_number: SerialNumber::from_slice(&[1]),
        issuing_distribution_point: part,
        revoked_certs: serials.iter().map(entry).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params.signed_by(issuer).expect("signed").pem().expect("printable")
}

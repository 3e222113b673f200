//! Contents of certificates: the template of a leaf, serial numbers, and the start of the validity.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType,
    SerialNumber,
};
use rustls::crypto::aws_lc_rs;

/// Certificates are valid from this long before they are made: the clocks of two nodes differ, and a peer whose clock is
/// behind would refuse a fresh certificate as not yet valid.
pub const BACKDATED: Duration = Duration::from_secs(60);

/// The parameters of a leaf certificate for exactly these URI names, valid for `lifetime` from `now`.
///
/// # Errors
/// [`rcgen::Error`] when a name is not ASCII, or there is no randomness for the serial number.
pub fn leaf_params(
    uris: &[String],
    now: SystemTime,
    lifetime: Duration,
) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    // No subject: the URI name is the identity, and RFC 5280 then marks it critical.
    params.distinguished_name = DistinguishedName::new();
    for uri in uris {
        params.subject_alt_names.push(SanType::URI(uri.as_str().try_into()?));
    }
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(SerialNumber::from_slice(&random_serial()?));
    let now = whole_seconds(now);
    params.not_before = (now - BACKDATED).into();
    params.not_after = (now + lifetime).into();
    Ok(params)
}

/// Returns `time` without fractions of a second, which certificates do not have.
#[must_use]
pub fn whole_seconds(time: SystemTime) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())
}

/// A random serial number of 128 bits.
pub fn random_serial() -> Result<[u8; 16], rcgen::Error> {
    let mut serial = [0; 16];
    aws_lc_rs::default_provider()
        .secure_random
        .fill(&mut serial)
        .map_err(|_| rcgen::Error::RingUnspecified)?;
    Ok(serial)
}

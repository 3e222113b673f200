//! Connections with fixed keys and without a handshake, for tests and fuzzing of the record layer.

use aws_lc_rs::aead::NONCE_LEN;
use rustls::{
    ConnectionTrafficSecrets, ExtractedSecrets,
    crypto::cipher::{AeadKey, Iv},
};

use super::{RecordError, Records, Schedule};

/// Returns the secret of both directions and both ends.
pub(super) fn secret() -> ConnectionTrafficSecrets {
    ConnectionTrafficSecrets::Aes256Gcm { key: AeadKey::from([7; 32]), iv: Iv::from([9; NONCE_LEN]) }
}

/// Returns both ends of a connection.
pub(crate) fn pair() -> Result<(Records, Records), RecordError> {
    let end = || {
        let secrets = ExtractedSecrets { tx: (0, secret()), rx: (0, secret()) };
        Records::new(secrets, Schedule::Fixed)
    };
    Ok((end()?, end()?))
}

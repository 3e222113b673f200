//! `crl`: revocation lists that peers' certificates are checked against.

use std::path::{Path, PathBuf};

use tacit_core::yaml::Value;
use tacit_identity::revocation::UnknownStatus;

pub(super) const FIELDS: [&str; 2] = ["file", "unknownStatus"];
/// Values of `unknownStatus`. The first one is the default.
const UNKNOWN: [(&str, UnknownStatus); 2] = [("DENY", UnknownStatus::Deny), ("ALLOW", UnknownStatus::Allow)];

/// The configured revocation lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrlConfig {
    /// File of the lists, in PEM or DER.
    pub file: PathBuf,
    /// The answer for certificates whose issuer has no current list.
    pub unknown: UnknownStatus,
}

pub(super) fn decode(value: &Value<'_>, folder: &Path) -> Option<CrlConfig> {
    let mut fields = value.fields(&FIELDS)?;
    let file = fields.required("file", "the file of the revocation lists, such as crl.pem");
    let file = file.and_then(|value| value.text());
    let unknown = fields.or("unknownStatus", UNKNOWN[0].1, |value| value.choice(&UNKNOWN));
    Some(CrlConfig { file: folder.join(file?), unknown: unknown? })
}

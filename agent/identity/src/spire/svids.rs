//! SVIDs as SPIRE sends them, and the choice of one. Pure.

use std::{fmt, sync::Arc, time::SystemTime};

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tacit_core::spiffe::SpiffeId;

use super::{
    SpireError,
    api::{SvidsResponse, WorkloadResponse},
};
use crate::{
    certificate::{self, CertificateListError},
    credentials::{Credentials, CredentialsError},
};

/// Identities that an error names.
const NAMED_MAX: usize = 3;

/// A certificate chain with its key. The key is never printed.
pub(super) struct Svid {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    /// URI names of the certificate; `None` if it cannot be read.
    names: Option<Vec<String>>,
}

impl Svid {
    fn new(chain: Vec<CertificateDer<'static>>, key: Vec<u8>) -> Self {
        let names = chain.first().and_then(|leaf| certificate::uri_names(leaf).ok());
        Self { chain, key: PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key)), names }
    }

    fn is_for(&self, identity: &str) -> bool {
        self.names.as_deref().is_some_and(|names| names.iter().any(|name| name == identity))
    }

    fn not_after(&self) -> Option<SystemTime> {
        Some(certificate::validity(self.chain.first()?).ok()?.not_after)
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid").field("names", &self.names).finish_non_exhaustive()
    }
}

/// Returns the SVIDs of an answer of the Delegated Identity API.
pub(super) fn delegated(answer: SvidsResponse) -> Vec<Svid> {
    let with_key = answer.svids.into_iter();
    with_key
        .map(|svid| {
            let chain = svid.svid.unwrap_or_default().chain;
            Svid::new(chain.into_iter().map(CertificateDer::from).collect(), svid.key)
        })
        .collect()
}

/// Returns the SVIDs of an answer of the Workload API.
///
/// # Errors
/// A chain is not DER.
pub(super) fn own(answer: WorkloadResponse) -> Result<Vec<Svid>, CertificateListError> {
    let svids = answer.svids.into_iter();
    svids.map(|svid| Ok(Svid::new(certificate::list_der(&svid.chain)?, svid.key))).collect()
}

/// Returns the credentials of `identity`: its SVID that expires last. `asked` describes the request in errors.
pub(super) fn choose(
    svids: &[Svid],
    roots: &Arc<RootCertStore>,
    identity: &SpiffeId,
    asked: &str,
    now: SystemTime,
) -> Result<Credentials, SpireError> {
    let text = identity.to_string();
    let fitting = svids.iter().filter(|svid| svid.is_for(&text)).max_by_key(|svid| svid.not_after());
    let svid = fitting.ok_or_else(|| SpireError::Identity {
        expected: identity.clone(),
        presented: presented(svids),
        asked: asked.to_owned(),
    })?;
    let credentials = Credentials::new(svid.chain.clone(), &svid.key, roots.clone())?;
    // With a second URI name, the certificate has no identity, which `Credentials` refuses.
    let validity = certificate::validity(&svid.chain[0]).map_err(CredentialsError::from)?;
    if credentials.expired(now) {
        return Err(SpireError::Expired { identity: identity.clone(), at: validity.not_after });
    }
    certificate::leads_to(roots, &svid.chain, validity).map_err(SpireError::Chain)?;
    Ok(credentials)
}

fn presented(svids: &[Svid]) -> String {
    let all = svids.iter().flat_map(|svid| svid.names.iter().flatten().map(String::as_str));
    let mut names: Vec<_> = all.clone().take(NAMED_MAX).collect();
    match (names.is_empty(), all.count().saturating_sub(NAMED_MAX)) {
        (true, _) => names.push("no readable identity"),
        (false, 0) => {}
        (false, _) => names.push("others"),
    }
    names.join(", ")
}

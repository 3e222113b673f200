//! `trustDomainAliases` and `federation`: trust domains beside the own one.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use tacit_core::{spiffe::TrustDomain, yaml::Value};

pub(super) const FEDERATION_FIELDS: [&str; 2] = ["trustDomain", "rootFile"];
/// Most domains of a list. A mesh has a handful.
const DOMAINS_MAX: usize = 64;
/// In policies this stands for the own trust domain, whatever that is called.
const STANDS_FOR_OWN: &str = "cluster.local";

/// A federated trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FederationConfig {
    /// Its name.
    pub trust_domain: TrustDomain,
    /// PEM file of its roots.
    pub root_file: PathBuf,
}

/// Decodes the aliases of `own`.
pub(super) fn aliases(value: &Value<'_>, own: Option<&TrustDomain>) -> Option<Vec<TrustDomain>> {
    let items = value.items()?;
    if items.len() > DOMAINS_MAX {
        value.refuse(format_args!("{} trust domains: write at most {DOMAINS_MAX}", items.len()));
    }
    let mut seen = HashSet::new();
    let domains: Vec<_> = items.iter().map(|item| domain(item, own, &mut seen)).collect();
    domains.into_iter().collect()
}

/// Decodes the federated domains. None of them may be `own` or an alias.
pub(super) fn federation(
    value: &Value<'_>,
    (own, aliases): (Option<&TrustDomain>, &[TrustDomain]),
    folder: &Path,
) -> Option<Vec<FederationConfig>> {
    let items = value.items()?;
    if items.len() > DOMAINS_MAX {
        value.refuse(format_args!("{} trust domains: write at most {DOMAINS_MAX}", items.len()));
    }
    let mut seen: HashSet<TrustDomain> = aliases.iter().cloned().collect();
    let domains: Vec<_> = items.iter().map(|item| federated(item, own, &mut seen, folder)).collect();
    domains.into_iter().collect()
}

fn federated(
    value: &Value<'_>,
    own: Option<&TrustDomain>,
    seen: &mut HashSet<TrustDomain>,
    folder: &Path,
) -> Option<FederationConfig> {
    let mut fields = value.fields(&FEDERATION_FIELDS)?;
    let name = fields.required("trustDomain", "the federated trust domain, such as partner.example");
    let trust_domain = name.and_then(|name| {
        let parsed = domain(&name, own, seen)?;
        if parsed.as_str() == STANDS_FOR_OWN {
            name.refuse(format_args!(
                "{STANDS_FOR_OWN} stands for the own trust domain in policies, so it cannot be federated: give the other mesh another name"
            ));
            return None;
        }
        Some(parsed)
    });
    let root_file = fields.required("rootFile", "the PEM file of its roots, such as partner.pem");
    let root_file = root_file.and_then(|value| value.text());
    Some(FederationConfig { trust_domain: trust_domain?, root_file: folder.join(root_file?) })
}

/// Parses a trust domain that is neither the own one nor one that was named before.
fn domain(
    value: &Value<'_>,
    own: Option<&TrustDomain>,
    seen: &mut HashSet<TrustDomain>,
) -> Option<TrustDomain> {
    let parsed = value.parse(TrustDomain::parse)?;
    if own == Some(&parsed) {
        value.refuse(format_args!("{parsed} is trustDomain: write another one"));
        return None;
    }
    if !seen.insert(parsed.clone()) {
        value.refuse(format_args!(
            "{parsed} is named twice as an alias or a federated trust domain: remove one"
        ));
        return None;
    }
    Some(parsed)
}

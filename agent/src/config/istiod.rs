//! `{istiod: {..}}` of `directory` and `policy`: the connection to the control plane, and the agent's place in the mesh.

use std::path::{Path, PathBuf};

use hyper::header::HeaderValue;
use tacit_core::yaml::{Fields, Value};
use tacit_identity::{issuer::LEAF_LIFETIME, istio::IstioConfig};
use tacit_sources::{
    directory::{MeshPlace, Options as DirectoryOptions},
    roots::ConfigMapKey,
};

use super::{issuer, kubernetes};

pub(super) const DIRECTORY_FIELDS: [&str; 11] = [
    "announce",
    "address",
    "serverName",
    "rootFile",
    "rootConfigMap",
    "tokenFile",
    "plaintext",
    "clusterId",
    "network",
    "enrolLabel",
    "kubeconfig",
];
const SWITCH: [(&str, bool); 2] = [("true", true), ("false", false)];
/// Name of the first cluster of a mesh in Istio.
const CLUSTER: &str = "Kubernetes";
/// The fields that only a connection with TLS has.
const TLS_FIELDS: [&str; 4] = ["serverName", "rootFile", "rootConfigMap", "tokenFile"];

/// istiod, and the agent's place in its mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IstiodConfig {
    /// The connection.
    pub access: IstiodAccess,
    /// Cluster and network of the agent.
    pub place: MeshPlace,
    /// The label that enrols pods of this node, and access to the API for them.
    pub local: DirectoryOptions,
}

/// The connection to istiod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IstiodAccess {
    /// TLS with a token, and where istiod's roots are published.
    Tls(IstioConfig, Option<ConfigMapKey>),
    /// Plaintext without a token: anybody on the way can change directory and policies.
    Plaintext {
        /// Host and port.
        address: String,
    },
}

impl IstiodAccess {
    /// Host and port.
    #[must_use]
    pub fn address(&self) -> &str {
        match self {
            Self::Tls(config, _) => &config.address,
            Self::Plaintext { address } => address,
        }
    }
}

pub(super) fn directory(value: &Value<'_>, folder: &Path) -> Option<IstiodConfig> {
    let mut fields = value.fields(&DIRECTORY_FIELDS)?;
    let address = fields.required("address", "host and port, such as istiod.istio-system.svc:15012");
    let address = address.and_then(|value| value.parse(issuer::address_parts));
    let cluster = fields.or("clusterId", CLUSTER.to_owned(), |value| value.text().map(str::to_owned));
    let network = fields.or("network", String::new(), |value| value.text().map(str::to_owned));
    let local = kubernetes::local(&mut fields, folder);
    let is_plaintext = fields.or("plaintext", false, |value| value.choice(&SWITCH));
    let (address, host) = address?;
    let (cluster, is_plaintext) = (cluster?, is_plaintext?);
    let Ok(cluster_id) = HeaderValue::try_from(cluster.as_str()) else {
        value.refuse(format_args!("clusterId: {cluster:?} is no cluster id: write ASCII"));
        return None;
    };
    let access = if is_plaintext {
        let superfluous: Vec<&str> =
            TLS_FIELDS.into_iter().filter(|field| value.peek(field).is_some()).collect();
        if !superfluous.is_empty() {
            value.refuse(format_args!("plaintext uses no {}: remove them", superfluous.join(", ")));
        }
        IstiodAccess::Plaintext { address }
    } else {
        tls(&mut fields, folder, (address, host), cluster_id)?
    };
    Some(IstiodConfig { access, place: MeshPlace { cluster, network: network? }, local: local? })
}

fn tls(
    fields: &mut Fields<'_>,
    folder: &Path,
    (address, host): (String, String),
    cluster_id: HeaderValue,
) -> Option<IstiodAccess> {
    let server_name = fields.or("serverName", host, |value| value.text().map(str::to_owned));
    let root_file =
        path(fields, folder, "rootFile", "the PEM file of istiod's roots, or set `plaintext: true`");
    let what = "the file of a projected ServiceAccount token with the audience istio-ca";
    let token_file = path(fields, folder, "tokenFile", what);
    let root_config_map = fields.or("rootConfigMap", None, |value| issuer::config_map(value).map(Some));
    let config = IstioConfig {
        address,
        server_name: server_name?,
        root_file: root_file?,
        token_file: token_file?,
        cluster_id: Some(cluster_id),
        lifetime: LEAF_LIFETIME,
    };
    Some(IstiodAccess::Tls(config, root_config_map?))
}

fn path(fields: &mut Fields<'_>, folder: &Path, field: &'static str, what: &str) -> Option<PathBuf> {
    let value = fields.required(field, what)?;
    value.text().map(|text| folder.join(text))
}

/// Decodes `{istiod: {}}` of `policy`, which has no fields.
pub(super) fn policy(value: &Value<'_>, _folder: &Path) -> Option<()> {
    if value.is_null() {
        return Some(());
    }
    value.fields(&[]).map(drop)
}

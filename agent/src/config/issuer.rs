//! `issuer`: who signs certificates.

use std::path::Path;

use hyper::header::HeaderValue;
use tacit_core::yaml::{Fields, Value};
use tacit_identity::{
    issuer::{LEAF_LIFETIME, LEAF_LIFETIME_RANGE},
    istio::IstioConfig,
    spire::{SpireApi, SpireConfig},
};
use tacit_sources::roots::ConfigMapKey;

use super::IssuerConfig;

pub(super) const FIELDS: [&str; 3] = ["embedded", "istio", "spire"];
pub(super) const EMBEDDED_FIELDS: [&str; 2] = ["directory", "leafLifetime"];
pub(super) const ISTIO_FIELDS: [&str; 7] =
    ["address", "serverName", "rootFile", "rootConfigMap", "tokenFile", "clusterId", "leafLifetime"];
pub(super) const SPIRE_FIELDS: [&str; 2] = ["socket", "api"];
pub(super) const CONFIG_MAP_FIELDS: [&str; 3] = ["namespace", "name", "key"];

/// Longest path of a Unix socket, in bytes (`sun_path` of unix(7), without its end).
const SOCKET_MAX_BYTES: usize = 107;

pub(super) fn decode(value: &Value<'_>, folder: &Path) -> Option<IssuerConfig> {
    let mut fields = value.fields(&FIELDS)?;
    match (fields.optional("embedded"), fields.optional("istio"), fields.optional("spire")) {
        (Some(value), None, None) => embedded(&mut value.fields(&EMBEDDED_FIELDS)?, folder),
        (None, Some(value), None) => istio(&mut value.fields(&ISTIO_FIELDS)?, folder),
        (None, None, Some(value)) => spire(&mut value.fields(&SPIRE_FIELDS)?, folder),
        _ => {
            value.refuse(
                "not exactly one issuer is written: write {embedded: ..}, {istio: ..} or {spire: ..}",
            );
            None
        }
    }
}

fn embedded(fields: &mut Fields<'_>, folder: &Path) -> Option<IssuerConfig> {
    let directory = fields.required("directory", "the folder of the root key").and_then(|value| value.text());
    let leaf_lifetime = fields.or("leafLifetime", LEAF_LIFETIME, |v| v.duration(LEAF_LIFETIME_RANGE));
    Some(IssuerConfig::Embedded { directory: folder.join(directory?), leaf_lifetime: leaf_lifetime? })
}

fn istio(fields: &mut Fields<'_>, folder: &Path) -> Option<IssuerConfig> {
    let address = fields.required("address", "host and port, such as tacit-authority.tacit-system.svc:15012");
    let address = address.and_then(|value| value.parse(address_parts));
    let server_name = fields.optional("serverName").map(|value| value.text().map(str::to_owned));
    let root_file = fields.required("rootFile", "the PEM file of the authority's roots");
    let root_file = root_file.and_then(|value| value.text());
    let root_config_map = fields.or("rootConfigMap", None, |value| config_map(value).map(Some));
    let token_file = fields.required("tokenFile", "the file of the projected ServiceAccount token");
    let token_file = token_file.and_then(|value| value.text());
    let cluster_id = fields.or("clusterId", None, |value| {
        value.parse(|text| HeaderValue::try_from(text).map_err(|_| "no cluster id: write ASCII")).map(Some)
    });
    let lifetime = fields.or("leafLifetime", LEAF_LIFETIME, |v| v.duration(LEAF_LIFETIME_RANGE));
    let (address, host) = address?;
    let config = IstioConfig {
        address,
        server_name: server_name.unwrap_or(Some(host))?,
        root_file: folder.join(root_file?),
        token_file: folder.join(token_file?),
        cluster_id: cluster_id?,
        lifetime: lifetime?,
    };
    Some(IssuerConfig::Istio(config, root_config_map?))
}

fn spire(fields: &mut Fields<'_>, folder: &Path) -> Option<IssuerConfig> {
    let socket = fields.required("socket", "the admin socket of the SPIRE agent");
    let socket = socket.and_then(|value| {
        value.parse(|text| {
            let path = folder.join(text);
            let fits = !text.is_empty() && path.as_os_str().len() <= SOCKET_MAX_BYTES;
            if fits { Ok(path) } else { Err("empty or longer than 107 bytes: write a shorter path") }
        })
    });
    let api = fields.or("api", SpireApi::Delegated, |value| {
        value.parse(|text| match text {
            "delegated" => Ok(SpireApi::Delegated),
            "workload" => Ok(SpireApi::Workload),
            _ => Err("no API of SPIRE: write delegated or workload"),
        })
    });
    Some(IssuerConfig::Spire(SpireConfig { socket: socket?, api: api? }))
}

pub(super) fn config_map(value: &Value<'_>) -> Option<ConfigMapKey> {
    let mut fields = value.fields(&CONFIG_MAP_FIELDS)?;
    let mut name = |field: &str, example| {
        fields.required(field, example).and_then(|value| value.name().map(str::to_owned))
    };
    let (namespace, name) = (name("namespace", "tacit-system"), name("name", "tacit-root"));
    let key = fields.required("key", "root-cert.pem").and_then(|value| value.text().map(str::to_owned));
    Some(ConfigMapKey { namespace: namespace?, name: name?, key: key? })
}

/// An address and the host in it.
pub(super) fn address_parts(text: &str) -> Result<(String, String), &'static str> {
    const RULE: &str = "no host with a port: write it as istiod.istio-system.svc:15012";
    let (host, port) = text.rsplit_once(':').ok_or(RULE)?;
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let port_fits = port.parse::<u16>().is_ok_and(|port| port != 0);
    let name = bare.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-'));
    let fits =
        if bare == host { name && !bare.is_empty() } else { bare.parse::<std::net::Ipv6Addr>().is_ok() };
    if port_fits && fits { Ok((text.to_owned(), bare.to_owned())) } else { Err(RULE) }
}

#[cfg(test)]
mod tests {
    use super::address_parts;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for (text, host) in [
            ("tacit-authority.tacit-system.svc:15012", Some("tacit-authority.tacit-system.svc")),
            ("127.0.0.1:1", Some("127.0.0.1")),
            ("[::1]:15012", Some("::1")),
            ("::1:15012", None),
            ("[host]:15012", None),
            ("host", None),
            ("host:0", None),
            ("host:65536", None),
            (":15012", None),
            ("https://host:15012", None),
            ("a b:15012", None),
        ] {
            let parsed = address_parts(text).ok();
            assert_eq!(parsed.map(|(_, host)| host).as_deref(), host, "{text}");
        }
    }
}

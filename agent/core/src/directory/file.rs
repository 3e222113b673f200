//! `directory.yaml`: the directory of a standalone mesh, written by hand or by a tool.
//!
//! Two workloads with one address or one name, or with one cgroup on a node, are mistakes: whose identity
//! counts would depend on their order in the file. So are two services with one name or address. The fields are
//! described in `deploy/directory.schema.json`.

use std::{
    collections::HashMap,
    net::IpAddr,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use super::{Connect, Egress, Labels, Protocol, Service, Udp, Workload, special_address};
use crate::{
    spiffe::{SpiffeId, TrustDomain},
    yaml::{self, Mistakes, Value},
};

mod services;

const FIELDS: [&str; 11] = [
    "name",
    "namespace",
    "serviceAccount",
    "addresses",
    "node",
    "labels",
    "cgroup",
    "tunnel",
    "egress",
    "udp",
    "connect",
];
const NODE_FIELDS: [&str; 2] = ["name", "addresses"];
const SERVICE_ACCOUNT: &str = "default";
const PROTOCOLS: [(&str, Protocol); 3] =
    [("tacit", Protocol::Tacit), ("hbone", Protocol::Hbone), ("none", Protocol::None)];
const EGRESS: [(&str, Option<Egress>); 2] = [("open", Some(Egress::Open)), ("strict", Some(Egress::Strict))];
const CONNECT: [(&str, Connect); 2] = [("truthful", Connect::Truthful), ("early", Connect::Early)];
const UDP: [(&str, Option<Udp>); 2] = [("allow", Some(Udp::Allow)), ("deny", Some(Udp::Deny))];

/// The mistake of a text that is no address of a pod.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum AddressError {
    #[error("no IP address: write an IPv4 or IPv6 address without prefix length or port")]
    Form,
    #[error("an IPv4-mapped IPv6 address: write {0}")]
    Mapped(IpAddr),
    #[error("a {0} address, which no pod has: write the pod's own address")]
    Special(&'static str),
}

/// The content of the file.
pub(super) struct ParsedFile {
    pub(super) workloads: Vec<Workload>,
    pub(super) services: Vec<Service>,
    /// Nodes with their addresses.
    pub(super) nodes: Vec<(Arc<str>, Vec<IpAddr>)>,
}

pub(super) fn parse(text: &str, file: &Path, trust_domain: &TrustDomain) -> Result<ParsedFile, Mistakes> {
    yaml::decode(text, file, |root| {
        let mut fields = root.fields(&["workloads", "services", "nodes"])?;
        let services = fields.optional("services");
        let nodes = fields.optional("nodes");
        let list = fields.required("workloads", "a list of workloads, or [] for none");
        let mut uniqueness = Uniqueness::default();
        // Not collected to an `Option`: that would stop at the first mistake.
        let workloads: Vec<_> =
            list?.items()?.iter().map(|item| workload(item, trust_domain, &mut uniqueness)).collect();
        uniqueness.refuse_nested_cgroups();
        let services = match services {
            Some(list) => services::services(&list, &workloads, &mut uniqueness),
            None => Some(Vec::new()),
        };
        let nodes = nodes.map_or(Some(Vec::new()), |list| self::nodes(&list, &mut uniqueness));
        Some(ParsedFile {
            workloads: workloads.into_iter().collect::<Option<_>>()?,
            services: services?,
            nodes: nodes?,
        })
    })
}

fn nodes(list: &Value<'_>, uniqueness: &mut Uniqueness<'_>) -> Option<Vec<(Arc<str>, Vec<IpAddr>)>> {
    let node = |item: &Value<'_>| {
        let mut fields = item.fields(&NODE_FIELDS)?;
        let name = fields.required("name", "the node's name").and_then(|value| value.name());
        let list = fields.required("addresses", "the node's addresses, such as [192.0.2.1]");
        let owner = format!("node {}", name.unwrap_or("?"));
        let addresses = list.and_then(|value| addresses(&value, &owner, uniqueness));
        Some((Arc::from(name?), addresses?))
    };
    // Not collected to an `Option`: that would stop at the first mistake.
    let nodes: Vec<_> = list.items()?.iter().map(node).collect();
    nodes.into_iter().collect()
}

/// Decodes all fields before the first `?`, so that the mistakes of each one are recorded.
fn workload<'a>(
    item: &Value<'a>,
    trust_domain: &TrustDomain,
    uniqueness: &mut Uniqueness<'a>,
) -> Option<Workload> {
    let mut fields = item.fields(&FIELDS)?;
    let name = fields.required("name", "the pod's name").and_then(|value| value.name());
    let namespace = fields.required("namespace", "the pod's namespace").and_then(|value| value.name());
    let account = fields.optional("serviceAccount").map_or(Some(SERVICE_ACCOUNT), |value| value.name());
    let node = fields.required("node", "the name of the node it runs on").and_then(|value| value.name());
    let owner = format!("{}/{}", namespace.unwrap_or("?"), name.unwrap_or("?"));
    let list = fields.required("addresses", "the pod's addresses, such as [10.77.1.2]");
    let addresses = list.and_then(|value| addresses(&value, &owner, uniqueness));
    let labels = fields.optional("labels").map_or(Some(Labels::default()), |value| labels(&value));
    let protocol = fields.optional("tunnel").map_or(Some(Protocol::Tacit), |value| value.choice(&PROTOCOLS));
    let egress = fields.optional("egress").map_or(Some(None), |value| value.choice(&EGRESS));
    let udp = fields.optional("udp").map_or(Some(None), |value| value.choice(&UDP));
    let connect = fields.optional("connect").map_or(Some(Connect::default()), |value| value.choice(&CONNECT));
    let cgroup = fields.optional("cgroup");
    let path = match &cgroup {
        Some(value) => cgroup_path(value),
        None => Some(PathBuf::from(format!("{}_{}", namespace?, name?))),
    };
    let (name, namespace, node, path) = (name?, namespace?, node?, path?);
    uniqueness.name(item, &owner);
    uniqueness.cgroup(cgroup.unwrap_or_else(|| item.clone()), node, &path, &owner);
    Some(Workload {
        name: name.into(),
        namespace: namespace.into(),
        identity: SpiffeId::new(trust_domain, namespace, account?)
            .map_err(|error| item.refuse(error))
            .ok()?,
        addresses: addresses?,
        node: node.into(),
        labels: labels?,
        cgroup: path,
        protocol: protocol?,
        egress: egress?,
        udp: udp?,
        connect: connect?,
    })
}

fn addresses(list: &Value<'_>, owner: &str, uniqueness: &mut Uniqueness<'_>) -> Option<Vec<IpAddr>> {
    let items = list.items()?;
    if items.is_empty() {
        list.refuse("the list is empty: write at least one address");
    }
    let mut addresses: Vec<IpAddr> = Vec::with_capacity(items.len());
    for item in &items {
        let Some(address) = item.parse(pod_address) else {
            continue;
        };
        if let Some(other) = addresses.iter().find(|other| other.is_ipv4() == address.is_ipv4()) {
            item.refuse(format_args!("{address}: {other} is of the same family: write at most one of each"));
        }
        uniqueness.address(item, address, owner);
        addresses.push(address);
    }
    Some(addresses)
}

fn pod_address(text: &str) -> Result<IpAddr, AddressError> {
    let address: IpAddr = text.parse().map_err(|_| AddressError::Form)?;
    if address.to_canonical() != address {
        return Err(AddressError::Mapped(address.to_canonical()));
    }
    special_address(address).map_or(Ok(address), |what| Err(AddressError::Special(what)))
}

fn labels<'a>(value: &Value<'a>) -> Option<Labels> {
    let label = |entry: yaml::Entry<'a>| Some((entry.name, entry.value.text_or_empty()?));
    let labels: Vec<_> = value.entries()?.into_iter().map(label).collect();
    labels.into_iter().collect()
}

/// A path below the pods' cgroup: relative, without `.` or `..`, so that it cannot name a cgroup elsewhere.
fn cgroup_path(value: &Value<'_>) -> Option<PathBuf> {
    let text = value.text()?;
    let path = Path::new(text);
    if !path.components().all(|component| matches!(component, Component::Normal(_))) {
        value.refuse(format_args!("{text:?}: write a path relative to podsCgroup, without `.` and `..`"));
        return None;
    }
    Some(path.components().collect())
}

/// Names, addresses and cgroups of the workloads read so far, with their owner and line. Each of them is unique.
#[derive(Default)]
struct Uniqueness<'a> {
    names: HashMap<String, usize>,
    addresses: HashMap<IpAddr, (String, usize)>,
    cgroups: HashMap<(Arc<str>, PathBuf), (String, Value<'a>)>,
    node_ports: HashMap<u16, (String, usize)>,
}

impl<'a> Uniqueness<'a> {
    fn name(&mut self, item: &Value<'_>, owner: &str) {
        if let Some(line) = self.names.insert(owner.to_owned(), item.line()) {
            item.refuse(format_args!("workload {owner} is already in line {line}: remove one or rename it"));
        }
    }

    fn address(&mut self, item: &Value<'_>, address: IpAddr, owner: &str) {
        if let Some((other, line)) = self.addresses.insert(address, (owner.to_owned(), item.line())) {
            item.refuse(format_args!(
                "{address} is already the address of {other} (line {line}): correct one"
            ));
        }
    }

    fn node_port(&mut self, item: &Value<'_>, port: u16, owner: &str) {
        if let Some((other, line)) = self.node_ports.insert(port, (owner.to_owned(), item.line())) {
            item.refuse(format_args!(
                "{port} is already a node port of service {other} (line {line}): correct one"
            ));
        }
    }

    fn cgroup(&mut self, value: Value<'a>, node: &str, path: &Path, owner: &str) {
        let key = (Arc::from(node), path.to_owned());
        if let Some((other, first)) = self.cgroups.get(&key) {
            // Two workloads of one name have one default cgroup: that is said once, about the name.
            if other != owner {
                value.refuse(format_args!(
                    "cgroup {path:?} on node {node} is already that of {other} (line {}): correct one",
                    first.line()
                ));
            }
            return;
        }
        self.cgroups.insert(key, (owner.to_owned(), value));
    }

    /// A pod's processes are found by the pod's cgroup, so no pod's cgroup may hold another pod's.
    fn refuse_nested_cgroups(&self) {
        for ((node, path), (_, value)) in &self.cgroups {
            for outer in path.ancestors().skip(1).filter(|outer| !outer.as_os_str().is_empty()) {
                if let Some((other, first)) = self.cgroups.get(&(Arc::clone(node), outer.to_owned())) {
                    value.refuse(format_args!(
                        "cgroup {path:?} on node {node} is inside that of {other} (line {}): correct one",
                        first.line()
                    ));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;

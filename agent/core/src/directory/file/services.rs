//! The services of `directory.yaml`.
//!
//! A named target port is a number that each endpoint says for itself, as pods do. An endpoint need not be a workload of
//! the file; it is reached as any other address is.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use super::{Uniqueness, Value, Workload, addresses, pod_address};
use crate::directory::{
    Affinity, Endpoint, EndpointCondition, Endpoints, InternalTrafficPolicy, Service, ServicePort,
};

pub(super) const FIELDS: [&str; 8] = [
    "name",
    "namespace",
    "addresses",
    "ports",
    "endpoints",
    "internalTrafficPolicy",
    "sessionAffinity",
    "sessionAffinitySeconds",
];
pub(super) const PORT_FIELDS: [&str; 3] = ["port", "targetPort", "nodePort"];
pub(super) const ENDPOINT_FIELDS: [&str; 4] = ["addresses", "ready", "node", "ports"];
const TRAFFIC: [(&str, InternalTrafficPolicy); 2] =
    [("Cluster", InternalTrafficPolicy::Cluster), ("Local", InternalTrafficPolicy::Local)];
/// Values of `sessionAffinity`, and true for affinity by the client's address.
const AFFINITY: [(&str, bool); 2] = [("None", false), ("ClientIP", true)];
const READY: [(&str, EndpointCondition); 2] =
    [("true", EndpointCondition::Ready), ("false", EndpointCondition::NotReady)];
/// Kubernetes' own default and limits of `sessionAffinityConfig.clientIP.timeoutSeconds`.
pub(super) const AFFINITY_SECONDS: u32 = 10_800;
const AFFINITY_SECONDS_MAX: u32 = 86_400;

/// A port of a service before its endpoints are known.
struct ParsedPort<'a> {
    port: u16,
    node_port: Option<u16>,
    target: TargetPort<'a>,
}

/// The port of an endpoint, by number or by name.
enum TargetPort<'a> {
    Number(u16),
    Name(&'a str),
}

/// An endpoint before its ports are known.
struct ParsedEndpoint<'a> {
    value: Value<'a>,
    addresses: Vec<std::net::IpAddr>,
    node: Arc<str>,
    condition: EndpointCondition,
    ports: HashMap<&'a str, u16>,
}

pub(super) fn services<'a>(
    list: &Value<'a>,
    workloads: &[Option<Workload>],
    uniqueness: &mut Uniqueness<'a>,
) -> Option<Vec<Service>> {
    let nodes =
        workloads.iter().flatten().flat_map(|w| w.addresses.iter().map(|a| (*a, Arc::clone(&w.node))));
    let nodes: HashMap<_, _> = nodes.collect();
    let mut names = HashMap::new();
    // Not collected to an `Option`: that would stop at the first mistake.
    let services: Vec<_> =
        list.items()?.iter().map(|item| service(item, &nodes, &mut names, uniqueness)).collect();
    services.into_iter().collect()
}

/// Decodes all fields before the first `?`, so that the mistakes of each one are recorded.
fn service<'a>(
    item: &Value<'a>,
    nodes: &HashMap<std::net::IpAddr, Arc<str>>,
    names: &mut HashMap<String, usize>,
    uniqueness: &mut Uniqueness<'a>,
) -> Option<Service> {
    let mut fields = item.fields(&FIELDS)?;
    let name = fields.required("name", "the service's name").and_then(|value| value.name());
    let namespace = fields.required("namespace", "the service's namespace").and_then(|value| value.name());
    let owner = format!("{}/{}", namespace.unwrap_or("?"), name.unwrap_or("?"));
    let addresses = match fields.optional("addresses") {
        Some(list) => addresses(&list, &format!("service {owner}"), uniqueness),
        None => Some(Vec::new()),
    };
    let ports = fields.required("ports", "the service's ports, such as [{port: 80, targetPort: 8080}]");
    let ports = ports.and_then(|list| ports_of(&list, &owner, uniqueness));
    let endpoints = match fields.optional("endpoints") {
        Some(list) => endpoints(&list, nodes),
        None => Some(Vec::new()),
    };
    let traffic = fields.optional("internalTrafficPolicy");
    let traffic = traffic.map_or(Some(InternalTrafficPolicy::Cluster), |value| value.choice(&TRAFFIC));
    let by_client = fields.optional("sessionAffinity").map_or(Some(false), |value| value.choice(&AFFINITY));
    let seconds = fields.optional("sessionAffinitySeconds");
    let seconds = seconds.map_or(Some(AFFINITY_SECONDS), |value| value.parse(affinity_seconds));
    let (name, namespace) = (name?, namespace?);
    if let Some(line) = names.insert(owner.clone(), item.line()) {
        item.refuse(format_args!("service {owner} is already in line {line}: remove one or rename it"));
    }
    let endpoints = endpoints?;
    let ports: Vec<_> = ports?.iter().map(|port| served(port, &endpoints)).collect();
    let after = Duration::from_secs(seconds?.into());
    Some(Service {
        name: name.into(),
        namespace: namespace.into(),
        addresses: addresses?,
        external_ips: Vec::new(),
        ingress_ips: Vec::new(),
        ports: ports.into_iter().collect::<Option<_>>()?,
        udp_ports: Vec::new(),
        traffic: traffic?,
        affinity: if by_client? { Affinity::ClientIp(after) } else { Affinity::None },
    })
}

fn ports_of<'a>(
    list: &Value<'a>,
    owner: &str,
    uniqueness: &mut Uniqueness<'a>,
) -> Option<Vec<ParsedPort<'a>>> {
    let mut seen = HashMap::new();
    let mut port = |item: &Value<'a>| {
        let mut fields = item.fields(&PORT_FIELDS)?;
        let number =
            fields.required("port", "the port that clients ask for").and_then(|v| v.parse(port_number));
        let target = fields.optional("targetPort").map(|value| target(&value));
        let node_port = fields.optional("nodePort").map(|value| {
            let port = value.parse(node_port)?;
            uniqueness.node_port(&value, port, owner);
            Some(port)
        });
        let (number, node_port) = (number?, node_port.map_or(Some(None), |port| port.map(Some)));
        if let Some(line) = seen.insert(number, item.line()) {
            item.refuse(format_args!("port {number} is already in line {line}: remove one"));
        }
        let target = target.unwrap_or(Some(TargetPort::Number(number)));
        Some(ParsedPort { port: number, node_port: node_port?, target: target? })
    };
    let ports: Vec<_> = list.items()?.iter().map(&mut port).collect();
    ports.into_iter().collect()
}

fn target<'a>(value: &Value<'a>) -> Option<TargetPort<'a>> {
    let text = value.scalar()?;
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        return value.parse(port_number).map(TargetPort::Number);
    }
    value.text().map(TargetPort::Name)
}

fn endpoints<'a>(
    list: &Value<'a>,
    nodes: &HashMap<std::net::IpAddr, Arc<str>>,
) -> Option<Vec<ParsedEndpoint<'a>>> {
    let endpoint = |item: &Value<'a>| {
        let mut fields = item.fields(&ENDPOINT_FIELDS)?;
        let list = fields.required("addresses", "the endpoint's addresses, such as [10.77.1.2]");
        let addresses = list.and_then(|list| {
            let all: Vec<_> = list.items()?.iter().map(|item| item.parse(pod_address)).collect();
            all.into_iter().collect::<Option<Vec<_>>>()
        });
        let condition =
            fields.optional("ready").map_or(Some(EndpointCondition::Ready), |value| value.choice(&READY));
        let node = fields.optional("node").map(|value| value.name().map(Arc::from));
        let ports = match fields.optional("ports") {
            Some(value) => named_ports(&value),
            None => Some(HashMap::new()),
        };
        let addresses = addresses?;
        let of_workload = || addresses.iter().find_map(|address| nodes.get(address).cloned());
        let node = node.unwrap_or_else(|| Some(of_workload().unwrap_or_default()))?;
        Some(ParsedEndpoint { value: item.clone(), node, condition: condition?, ports: ports?, addresses })
    };
    let endpoints: Vec<_> = list.items()?.iter().map(endpoint).collect();
    endpoints.into_iter().collect()
}

fn named_ports<'a>(value: &Value<'a>) -> Option<HashMap<&'a str, u16>> {
    let ports: Vec<_> =
        value.entries()?.iter().map(|entry| Some((entry.name, entry.value.parse(port_number)?))).collect();
    ports.into_iter().collect()
}

/// The endpoints of one port. An endpoint without the named port is a mistake of the file, whatever Kubernetes makes of
/// it: nobody would learn why it gets no traffic.
fn served(asked: &ParsedPort<'_>, endpoints: &[ParsedEndpoint<'_>]) -> Option<ServicePort> {
    let ParsedPort { port, node_port, target } = asked;
    let mut all = Vec::new();
    let mut complete = true;
    for endpoint in endpoints {
        let number = match target {
            TargetPort::Number(number) => Some(number),
            TargetPort::Name(name) => endpoint.ports.get(name),
        };
        let Some(number) = number else {
            let TargetPort::Name(name) = target else { continue };
            endpoint.value.refuse(format_args!(
                "no port {name:?}, the targetPort of {port}: write ports: {{{name}: 8080}}"
            ));
            complete = false;
            continue;
        };
        let at_port = |address| Endpoint {
            address: SocketAddr::new(address, *number),
            node: Arc::clone(&endpoint.node),
        };
        all.extend(endpoint.addresses.iter().map(|address| (at_port(*address), endpoint.condition)));
    }
    let (ipv4, ipv6): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|(endpoint, _)| endpoint.address.is_ipv4());
    let (ipv4, ipv6) = (Endpoints::new(ipv4), Endpoints::new(ipv6));
    complete.then_some(ServicePort { port: *port, node_port: *node_port, ipv4, ipv6 })
}

fn port_number(text: &str) -> Result<u16, &'static str> {
    text.parse().ok().filter(|port| *port != 0).ok_or("no port: write 1 to 65535")
}

fn node_port(text: &str) -> Result<u16, String> {
    let port = text.parse().ok().filter(|port| tacit_abi::node_port::contains(*port));
    let (first, last) = (tacit_abi::node_port::FIRST, tacit_abi::node_port::LAST);
    port.ok_or_else(|| format!("no node port: write {first} to {last}"))
}

fn affinity_seconds(text: &str) -> Result<u32, String> {
    let seconds = text.parse().ok().filter(|seconds| (1..=AFFINITY_SECONDS_MAX).contains(seconds));
    seconds.ok_or_else(|| format!("no number of seconds: write 1 to {AFFINITY_SECONDS_MAX}"))
}

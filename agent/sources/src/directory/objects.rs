//! What is read of Kubernetes' objects, and nothing else: the rest is skipped while decoding.
//!
//! Every list takes null for none: see `or_default`.

use std::{collections::BTreeMap, net::IpAddr};

use serde::Deserialize;

use crate::kubernetes::{Followed, Label, or_default};

mod network;

pub(super) use network::{Node, ServiceCidr};

/// What is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Kind {
    Namespaces,
    Pods,
    Services,
    EndpointSlices,
    Nodes,
    ServiceCidrs,
}

impl Kind {
    pub(super) const ALL: [Self; 6] =
        [Self::Namespaces, Self::Pods, Self::Services, Self::EndpointSlices, Self::Nodes, Self::ServiceCidrs];
}

impl Label for Kind {
    fn label(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::Pods => "pods",
            Self::Services => "services",
            Self::EndpointSlices => "endpointslices",
            Self::Nodes => "nodes",
            Self::ServiceCidrs => "servicecidrs",
        }
    }
}

/// One object of any kind.
#[derive(Debug, Clone)]
pub(super) enum Object {
    Namespace(Namespace),
    Pod(Box<Pod>),
    Service(Box<Service>),
    Slice(Box<Slice>),
    Node(Box<Node>),
    ServiceCidr(Box<ServiceCidr>),
}

impl Object {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Namespace(_) => Kind::Namespaces,
            Self::Pod(_) => Kind::Pods,
            Self::Service(_) => Kind::Services,
            Self::Slice(_) => Kind::EndpointSlices,
            Self::Node(_) => Kind::Nodes,
            Self::ServiceCidr(_) => Kind::ServiceCidrs,
        }
    }

    pub(super) fn meta(&self) -> &Meta {
        match self {
            Self::Namespace(object) => &object.metadata,
            Self::Pod(object) => &object.metadata,
            Self::Service(object) => &object.metadata,
            Self::Slice(object) => &object.metadata,
            Self::Node(object) => &object.metadata,
            Self::ServiceCidr(object) => &object.metadata,
        }
    }
}

/// `metadata` of an object.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Meta {
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) namespace: String,
    #[serde(default)]
    pub(super) uid: String,
    #[serde(default)]
    pub(super) resource_version: String,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) labels: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) annotations: Annotations,
    pub(super) deletion_timestamp: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct Annotations {
    /// On the API's image of a static pod: the UID by which the kubelet knows it.
    #[serde(rename = "kubernetes.io/config.mirror")]
    pub(super) mirror: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Namespace {
    pub(super) metadata: Meta,
}

impl Followed for Namespace {
    type Kind = Kind;
    type Object = Object;

    const KIND: Kind = Kind::Namespaces;
    const PATHS: &'static [&'static str] = &["/api/v1/namespaces"];

    fn version(&self) -> &str {
        &self.metadata.resource_version
    }

    fn into_object(self) -> Object {
        Object::Namespace(self)
    }
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Pod {
    pub(super) metadata: Meta,
    #[serde(default)]
    pub(super) spec: PodSpec,
    #[serde(default)]
    pub(super) status: PodStatus,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodSpec {
    #[serde(default)]
    pub(super) node_name: String,
    #[serde(default)]
    pub(super) service_account_name: String,
    #[serde(default)]
    pub(super) host_network: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodStatus {
    #[serde(default)]
    pub(super) phase: String,
    #[serde(default)]
    pub(super) qos_class: QosClass,
    #[serde(rename = "podIP")]
    pub(super) pod_ip: Option<String>,
    #[serde(rename = "podIPs", default, deserialize_with = "or_default")]
    pub(super) pod_ips: Vec<PodIp>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct PodIp {
    #[serde(default)]
    pub(super) ip: String,
}

/// Which of the node's cgroups a pod stands in. The API server sets it when a pod is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub(super) enum QosClass {
    Guaranteed,
    Burstable,
    #[default]
    BestEffort,
}

impl Followed for Pod {
    type Kind = Kind;
    type Object = Object;

    const KIND: Kind = Kind::Pods;
    const PATHS: &'static [&'static str] = &["/api/v1/pods"];

    fn version(&self) -> &str {
        &self.metadata.resource_version
    }

    fn into_object(self) -> Object {
        Object::Pod(Box::new(self))
    }
}

impl Pod {
    /// Its processes have ended for good.
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.status.phase.as_str(), "Succeeded" | "Failed")
    }

    /// Its addresses, at most one of each family.
    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        let listed = self.status.pod_ips.iter().map(|ip| ip.ip.as_str()).chain(self.status.pod_ip.as_deref());
        let mut addresses: Vec<IpAddr> = Vec::with_capacity(2);
        for address in listed.filter_map(|text| text.parse::<IpAddr>().ok()).map(|ip| ip.to_canonical()) {
            if !addresses.iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
                addresses.push(address);
            }
        }
        addresses
    }
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Service {
    pub(super) metadata: Meta,
    #[serde(default)]
    pub(super) spec: ServiceSpec,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServiceSpec {
    #[serde(rename = "clusterIP")]
    pub(super) cluster_ip: Option<String>,
    /// Since 1.20; before that there is `clusterIP` alone.
    #[serde(rename = "clusterIPs", default, deserialize_with = "or_default")]
    pub(super) cluster_ips: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) ports: Vec<ServicePort>,
    pub(super) internal_traffic_policy: Option<String>,
    pub(super) session_affinity: Option<String>,
    pub(super) session_affinity_config: Option<SessionAffinity>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct ServicePort {
    #[serde(default)]
    pub(super) name: String,
    pub(super) port: u16,
    pub(super) protocol: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct SessionAffinity {
    #[serde(rename = "clientIP")]
    pub(super) client_ip: Option<ClientIp>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ClientIp {
    pub(super) timeout_seconds: Option<u32>,
}

impl Followed for Service {
    type Kind = Kind;
    type Object = Object;

    const KIND: Kind = Kind::Services;
    const PATHS: &'static [&'static str] = &["/api/v1/services"];

    fn version(&self) -> &str {
        &self.metadata.resource_version
    }

    fn into_object(self) -> Object {
        Object::Service(Box::new(self))
    }
}

/// Part of the endpoints of a service. `discovery.k8s.io/v1beta1` differs in where the node's name may stand.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Slice {
    pub(super) metadata: Meta,
    #[serde(default)]
    pub(super) address_type: String,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) endpoints: Vec<SliceEndpoint>,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) ports: Vec<SlicePort>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SliceEndpoint {
    #[serde(default, deserialize_with = "or_default")]
    pub(super) addresses: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) conditions: Conditions,
    pub(super) node_name: Option<String>,
    /// v1beta1 alone.
    pub(super) topology: Option<Topology>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub(super) struct Conditions {
    pub(super) ready: Option<bool>,
    pub(super) serving: Option<bool>,
    pub(super) terminating: Option<bool>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Topology {
    #[serde(rename = "kubernetes.io/hostname")]
    pub(super) hostname: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct SlicePort {
    pub(super) name: Option<String>,
    pub(super) port: Option<u16>,
    pub(super) protocol: Option<String>,
}

impl Followed for Slice {
    type Kind = Kind;
    type Object = Object;

    const KIND: Kind = Kind::EndpointSlices;
    const PATHS: &'static [&'static str] =
        &["/apis/discovery.k8s.io/v1/endpointslices", "/apis/discovery.k8s.io/v1beta1/endpointslices"];

    fn version(&self) -> &str {
        &self.metadata.resource_version
    }

    fn into_object(self) -> Object {
        Object::Slice(Box::new(self))
    }
}

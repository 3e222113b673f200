//! The fields of Kubernetes objects that the agent reads. All other fields are skipped while decoding.
//!
//! Every list accepts `null`; see `or_default`.

use std::{collections::BTreeMap, net::IpAddr};

use serde::{Deserialize, de::IgnoredAny};

use tacit_core::directory::special_address;

use super::announce;
use crate::{
    istiod::address::AddressObject,
    kubernetes::{KindName, Resource, or_default},
};

mod network;

pub(super) use network::{Node, ServiceCidr};

/// The watched resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum ResourceKind {
    Namespaces,
    Pods,
    Services,
    EndpointSlices,
    Nodes,
    ServiceCidrs,
    /// Workloads and services of istiod.
    Addresses,
}

impl ResourceKind {
    /// The resources of a directory from the Kubernetes API.
    pub(super) const KUBERNETES: [Self; 6] =
        [Self::Namespaces, Self::Pods, Self::Services, Self::EndpointSlices, Self::Nodes, Self::ServiceCidrs];
    /// The resources of a directory from istiod. Pods are those of the own node.
    pub(super) const ISTIOD: [Self; 6] =
        [Self::Namespaces, Self::Pods, Self::Services, Self::Nodes, Self::ServiceCidrs, Self::Addresses];
}

impl KindName for ResourceKind {
    fn label(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::Pods => "pods",
            Self::Services => "services",
            Self::EndpointSlices => "endpointslices",
            Self::Nodes => "nodes",
            Self::ServiceCidrs => "servicecidrs",
            Self::Addresses => "addresses",
        }
    }
}

/// An object of any watched resource.
#[derive(Debug, Clone)]
pub(crate) enum Object {
    Namespace(Box<Namespace>),
    Pod(Box<Pod>),
    Service(Box<Service>),
    Slice(Box<Slice>),
    Node(Box<Node>),
    ServiceCidr(Box<ServiceCidr>),
    Address(Box<AddressObject>),
}

impl Object {
    pub(super) fn kind(&self) -> ResourceKind {
        match self {
            Self::Namespace(_) => ResourceKind::Namespaces,
            Self::Pod(_) => ResourceKind::Pods,
            Self::Service(_) => ResourceKind::Services,
            Self::Slice(_) => ResourceKind::EndpointSlices,
            Self::Node(_) => ResourceKind::Nodes,
            Self::ServiceCidr(_) => ResourceKind::ServiceCidrs,
            Self::Address(_) => ResourceKind::Addresses,
        }
    }

    /// Returns `namespace/name`, the name of an object without a namespace, or the name of a resource of istiod.
    pub(super) fn full_name(&self) -> String {
        super::store::full_name(match self {
            Self::Namespace(object) => &object.metadata,
            Self::Pod(object) => &object.metadata,
            Self::Service(object) => &object.metadata,
            Self::Slice(object) => &object.metadata,
            Self::Node(object) => &object.metadata,
            Self::ServiceCidr(object) => &object.metadata,
            Self::Address(object) => return object.name.to_string(),
        })
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
    /// Set by the API server, in UTC (RFC 3339).
    pub(super) creation_timestamp: Option<String>,
    pub(super) deletion_timestamp: Option<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) owner_references: Vec<OwnerReference>,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct OwnerReference {
    #[serde(default)]
    pub(super) kind: String,
    #[serde(default)]
    pub(super) name: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct Annotations {
    /// Set on the mirror pod of a static pod: the UID that the kubelet uses for its cgroup. Everybody who may create pods can
    /// write it.
    #[serde(rename = "kubernetes.io/config.mirror")]
    pub(super) mirror: Option<String>,
    /// `enabled`: a ztunnel serves the pod, and istio-cni wrote it. With `announced` an agent did, for a pod that it serves.
    #[serde(rename = "ambient.istio.io/redirection")]
    pub(super) redirection: Option<String>,
    /// Present: an agent wrote `redirection`.
    #[serde(rename = "tacit.io/announced")]
    pub(super) announced: Option<IgnoredAny>,
    /// `early` or `truthful`: when `connect()` of the pod returns.
    #[serde(rename = "tacit.io/connect")]
    pub(super) connect: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Namespace {
    pub(super) metadata: Meta,
}

impl Resource for Namespace {
    type Kind = ResourceKind;
    type Object = Object;

    const KIND: ResourceKind = ResourceKind::Namespaces;
    const PATHS: &'static [&'static str] = &["/api/v1/namespaces"];

    fn version(&self) -> &str {
        &self.metadata.resource_version
    }

    fn into_object(self) -> Object {
        Object::Namespace(Box::new(self))
    }
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Pod {
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
    /// Written by the pod's kubelet. The API server drops a status that the creator of a pod wrote.
    pub(super) start_time: Option<String>,
    #[serde(default)]
    pub(super) qos_class: QosClass,
    #[serde(rename = "podIP")]
    pub(super) pod_ip: Option<String>,
    #[serde(rename = "podIPs", default, deserialize_with = "or_default")]
    pub(super) pod_ips: Vec<PodIp>,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) init_container_statuses: Vec<ContainerStatus>,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) container_statuses: Vec<ContainerStatus>,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) ephemeral_container_statuses: Vec<ContainerStatus>,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct ContainerStatus {
    #[serde(default, deserialize_with = "or_default")]
    pub(super) state: ContainerState,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct ContainerState {
    pub(super) running: Option<IgnoredAny>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct PodIp {
    #[serde(default)]
    pub(super) ip: String,
}

/// The QoS class, which selects the parent of the pod's cgroup. The API server sets it when it creates the pod.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub(super) enum QosClass {
    Guaranteed,
    Burstable,
    #[default]
    BestEffort,
}

impl Resource for Pod {
    type Kind = ResourceKind;
    type Object = Object;

    const KIND: ResourceKind = ResourceKind::Pods;
    const PATHS: &'static [&'static str] = &["/api/v1/pods"];
    /// A pod without a node has no processes yet, and one that has ended has none left. A pod of this node is needed before it has an
    /// address, so addresses are no reason to leave a pod out. `spec.hostNetwork` can be selected since 1.28 only.
    const FIELDS: Option<&'static str> = Some("spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed");

    fn version(&self) -> &str {
        &self.metadata.resource_version
    }

    fn into_object(self) -> Object {
        Object::Pod(Box::new(self))
    }
}

impl Pod {
    /// Returns true if the annotation says that the pod takes HBONE, whoever wrote it.
    pub(super) fn is_redirected(&self) -> bool {
        self.metadata.annotations.redirection.as_deref() == Some(announce::ENABLED)
    }

    /// Returns true if an agent of this mesh wrote that annotation.
    pub(super) fn is_marked(&self) -> bool {
        self.metadata.annotations.announced.is_some()
    }

    /// Returns true if all containers have ended and will not restart.
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.status.phase.as_str(), "Succeeded" | "Failed")
    }

    /// Returns true if the pod is deleted and no container of it runs any more, so that its addresses may be another pod's.
    pub(super) fn is_vacated(&self) -> bool {
        let status = &self.status;
        let mut containers = status
            .container_statuses
            .iter()
            .chain(&status.init_container_statuses)
            .chain(&status.ephemeral_container_statuses);
        self.metadata.deletion_timestamp.is_some() && containers.all(|one| one.state.running.is_none())
    }

    /// Returns true if the pod's owner is its node, as that of a mirror pod is.
    pub(super) fn is_owned_by_its_node(&self) -> bool {
        let node = &self.spec.node_name;
        self.metadata.owner_references.iter().any(|owner| owner.kind == "Node" && owner.name == *node)
    }

    /// Returns the pod's addresses, at most one of each family. An address that no pod has is left out, with a message in
    /// `invalid`.
    pub(super) fn addresses(&self, invalid: &mut Vec<String>) -> Vec<IpAddr> {
        let listed = self.status.pod_ips.iter().map(|ip| ip.ip.as_str()).chain(self.status.pod_ip.as_deref());
        let mut addresses: Vec<IpAddr> = Vec::with_capacity(2);
        for address in listed.filter_map(|text| text.parse::<IpAddr>().ok()).map(|ip| ip.to_canonical()) {
            if let Some(what) = special_address(address) {
                let problem = format!("address {address} is not used: it is a {what} address");
                if !invalid.contains(&problem) {
                    invalid.push(problem);
                }
            } else if !addresses.iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
                addresses.push(address);
            }
        }
        addresses
    }
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Service {
    pub(super) metadata: Meta,
    #[serde(default)]
    pub(super) spec: ServiceSpec,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) status: ServiceStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServiceStatus {
    #[serde(default, deserialize_with = "or_default")]
    pub(super) load_balancer: LoadBalancer,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub(super) struct LoadBalancer {
    #[serde(default, deserialize_with = "or_default")]
    pub(super) ingress: Vec<Ingress>,
}

/// An address of a load balancer. With the mode `Proxy` the load balancer itself serves it, and nodes do not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Ingress {
    pub(super) ip: Option<String>,
    pub(super) ip_mode: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServiceSpec {
    #[serde(rename = "clusterIP")]
    pub(super) cluster_ip: Option<String>,
    /// Since 1.20. Older servers have only `clusterIP`.
    #[serde(rename = "clusterIPs", default, deserialize_with = "or_default")]
    pub(super) cluster_ips: Vec<String>,
    #[serde(rename = "externalIPs", default, deserialize_with = "or_default")]
    pub(super) external_ips: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) ports: Vec<ServicePort>,
    pub(super) internal_traffic_policy: Option<String>,
    pub(super) session_affinity: Option<String>,
    pub(super) session_affinity_config: Option<SessionAffinity>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServicePort {
    #[serde(default)]
    pub(super) name: String,
    pub(super) port: u16,
    pub(super) node_port: Option<u16>,
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

impl Resource for Service {
    type Kind = ResourceKind;
    type Object = Object;

    const KIND: ResourceKind = ResourceKind::Services;
    const PATHS: &'static [&'static str] = &["/api/v1/services"];

    fn version(&self) -> &str {
        &self.metadata.resource_version
    }

    fn into_object(self) -> Object {
        Object::Service(Box::new(self))
    }
}

/// Part of the endpoints of a service. In `discovery.k8s.io/v1beta1` the node's name may be in `topology`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Slice {
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
    /// Since 1.21.
    #[serde(default, deserialize_with = "or_default")]
    pub(super) hints: Hints,
    /// Only in v1beta1.
    pub(super) topology: Option<Topology>,
}

/// The clients that an endpoint is meant for, as the controller of the slices derives them from `trafficDistribution`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Hints {
    #[serde(default, deserialize_with = "or_default")]
    pub(super) for_zones: Vec<HintName>,
    /// Since 1.33.
    #[serde(default, deserialize_with = "or_default")]
    pub(super) for_nodes: Vec<HintName>,
}

/// The name of a node or a zone.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct HintName {
    #[serde(default)]
    pub(super) name: String,
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

impl Resource for Slice {
    type Kind = ResourceKind;
    type Object = Object;

    const KIND: ResourceKind = ResourceKind::EndpointSlices;
    const PATHS: &'static [&'static str] =
        &["/apis/discovery.k8s.io/v1/endpointslices", "/apis/discovery.k8s.io/v1beta1/endpointslices"];

    fn version(&self) -> &str {
        &self.metadata.resource_version
    }

    fn into_object(self) -> Object {
        Object::Slice(Box::new(self))
    }
}

//! Objects that define address ranges: nodes and ServiceCIDRs.

use serde::Deserialize;

use super::{Meta, Object, ResourceKind};
use crate::kubernetes::{Definition, Resource, or_default};

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Node {
    pub(in super::super) metadata: Meta,
    #[serde(default)]
    pub(in super::super) spec: NodeSpec,
    #[serde(default)]
    pub(in super::super) status: NodeStatus,
}

/// The ranges of the node's pods, if the cluster assigns a range to each node. Network plugins may use other addresses.
#[derive(Debug, Clone, Default, Deserialize)]
pub(in super::super) struct NodeSpec {
    #[serde(rename = "podCIDR")]
    pub(in super::super) pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs", default, deserialize_with = "or_default")]
    pub(in super::super) pod_cidrs: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub(in super::super) struct NodeStatus {
    #[serde(default, deserialize_with = "or_default")]
    pub(in super::super) addresses: Vec<NodeAddress>,
}

/// An IP address or a host name.
#[derive(Debug, Clone, Deserialize)]
pub(in super::super) struct NodeAddress {
    #[serde(default)]
    pub(in super::super) address: String,
}

impl Resource for Node {
    type Kind = ResourceKind;
    type Object = Object;

    const KIND: ResourceKind = ResourceKind::Nodes;
    const PATHS: &'static [&'static str] = &["/api/v1/nodes"];

    fn version(&self) -> &str {
        &self.metadata.resource_version
    }

    fn into_object(self) -> Object {
        Object::Node(Box::new(self))
    }
}

/// A range of ClusterIPs.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct ServiceCidr {
    pub(in super::super) metadata: Meta,
    #[serde(default)]
    pub(in super::super) spec: ServiceCidrSpec,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub(in super::super) struct ServiceCidrSpec {
    #[serde(default, deserialize_with = "or_default")]
    pub(in super::super) cidrs: Vec<String>,
}

impl Resource for ServiceCidr {
    type Kind = ResourceKind;
    type Object = Object;

    const KIND: ResourceKind = ResourceKind::ServiceCidrs;
    const PATHS: &'static [&'static str] =
        &["/apis/networking.k8s.io/v1/servicecidrs", "/apis/networking.k8s.io/v1beta1/servicecidrs"];
    /// Served since 1.33, and by older servers with the feature enabled.
    const DEFINITION: Definition = Definition::Newer;

    fn version(&self) -> &str {
        &self.metadata.resource_version
    }

    fn into_object(self) -> Object {
        Object::ServiceCidr(Box::new(self))
    }
}

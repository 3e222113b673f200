//! What tells of address ranges: nodes and ServiceCIDRs.

use serde::Deserialize;

use super::{Kind, Meta, Object};
use crate::kubernetes::{Definition, Followed, or_default};

#[derive(Debug, Clone, Deserialize)]
pub(in super::super) struct Node {
    pub(in super::super) metadata: Meta,
    #[serde(default)]
    pub(in super::super) spec: NodeSpec,
    #[serde(default)]
    pub(in super::super) status: NodeStatus,
}

/// Where the node's pods have their addresses from, if the cluster gives each node a part; network plugins need not keep
/// to it.
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

/// An address, or a name.
#[derive(Debug, Clone, Deserialize)]
pub(in super::super) struct NodeAddress {
    #[serde(default)]
    pub(in super::super) address: String,
}

impl Followed for Node {
    type Kind = Kind;
    type Object = Object;

    const KIND: Kind = Kind::Nodes;
    const PATHS: &'static [&'static str] = &["/api/v1/nodes"];

    fn version(&self) -> &str {
        &self.metadata.resource_version
    }

    fn into_object(self) -> Object {
        Object::Node(Box::new(self))
    }
}

/// Where ClusterIPs are taken from.
#[derive(Debug, Clone, Deserialize)]
pub(in super::super) struct ServiceCidr {
    pub(in super::super) metadata: Meta,
    #[serde(default)]
    pub(in super::super) spec: ServiceCidrSpec,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub(in super::super) struct ServiceCidrSpec {
    #[serde(default, deserialize_with = "or_default")]
    pub(in super::super) cidrs: Vec<String>,
}

impl Followed for ServiceCidr {
    type Kind = Kind;
    type Object = Object;

    const KIND: Kind = Kind::ServiceCidrs;
    const PATHS: &'static [&'static str] =
        &["/apis/networking.k8s.io/v1/servicecidrs", "/apis/networking.k8s.io/v1beta1/servicecidrs"];
    /// Served from 1.33 on; before, if somebody switched it on.
    const DEFINITION: Definition = Definition::Newer;

    fn version(&self) -> &str {
        &self.metadata.resource_version
    }

    fn into_object(self) -> Object {
        Object::ServiceCidr(Box::new(self))
    }
}

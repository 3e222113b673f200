//! A policy as the API stores it.
//!
//! Fields that users can nest without limit are not parsed here, because one object could otherwise make a whole list invalid.
//! `spec` stays raw JSON, and `status` and `managedFields` are skipped.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use tacit_core::policy::PolicyKind;

use crate::kubernetes::{Definition, KindName, Resource, or_default};

/// Policies per page. A policy has up to 1.5 MiB.
const PAGE: u32 = 25;

impl KindName for PolicyKind {
    fn label(self) -> &'static str {
        match self {
            Self::PeerAuthentication => "peerauthentications",
            Self::AuthorizationPolicy => "authorizationpolicies",
        }
    }
}

/// One policy.
#[derive(Debug, Clone)]
pub(super) struct Document {
    pub(super) kind: PolicyKind,
    pub(super) metadata: Metadata,
    /// The fields that are read, as JSON.
    pub(super) text: String,
}

#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Metadata {
    #[serde(deserialize_with = "or_default")]
    pub(super) name: String,
    #[serde(deserialize_with = "or_default")]
    pub(super) namespace: String,
    #[serde(deserialize_with = "or_default")]
    pub(super) uid: String,
    #[serde(deserialize_with = "or_default")]
    pub(super) resource_version: String,
    /// RFC 3339 in UTC, so that texts sort by time.
    #[serde(deserialize_with = "or_default")]
    pub(super) creation_timestamp: String,
    #[serde(deserialize_with = "or_default")]
    annotations: Annotations,
}

/// Annotations that affect a policy.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
struct Annotations {
    #[serde(rename = "istio.io/dry-run", default, skip_serializing_if = "Option::is_none")]
    dry_run: Option<String>,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct RawPolicy {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    api_version: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kind: Option<String>,
    #[serde(default)]
    metadata: Metadata,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    spec: Option<Box<RawValue>>,
}

impl Document {
    fn decode<'de, D: Deserializer<'de>>(kind: PolicyKind, decoder: D) -> Result<Self, D::Error> {
        let written = RawPolicy::deserialize(decoder)?;
        let text = serde_json::to_string(&written).map_err(serde::de::Error::custom)?;
        Ok(Self { kind, metadata: written.metadata, text })
    }
}

/// A PeerAuthentication.
#[derive(Debug, Clone)]
pub(super) struct PeerAuthentications(Document);

impl<'de> Deserialize<'de> for PeerAuthentications {
    fn deserialize<D: Deserializer<'de>>(decoder: D) -> Result<Self, D::Error> {
        Document::decode(PolicyKind::PeerAuthentication, decoder).map(Self)
    }
}

impl Resource for PeerAuthentications {
    type Kind = PolicyKind;
    type Object = Document;

    const PAGE: u32 = PAGE;
    const KIND: PolicyKind = PolicyKind::PeerAuthentication;
    const PATHS: &'static [&'static str] = &[
        "/apis/security.istio.io/v1/peerauthentications",
        "/apis/security.istio.io/v1beta1/peerauthentications",
    ];
    const DEFINITION: Definition = Definition::Custom("peerauthentications.security.istio.io");

    fn version(&self) -> &str {
        &self.0.metadata.resource_version
    }

    fn into_object(self) -> Document {
        self.0
    }
}

/// An AuthorizationPolicy.
#[derive(Debug, Clone)]
pub(super) struct AuthorizationPolicies(Document);

impl<'de> Deserialize<'de> for AuthorizationPolicies {
    fn deserialize<D: Deserializer<'de>>(decoder: D) -> Result<Self, D::Error> {
        Document::decode(PolicyKind::AuthorizationPolicy, decoder).map(Self)
    }
}

impl Resource for AuthorizationPolicies {
    type Kind = PolicyKind;
    type Object = Document;

    const PAGE: u32 = PAGE;
    const KIND: PolicyKind = PolicyKind::AuthorizationPolicy;
    const PATHS: &'static [&'static str] = &[
        "/apis/security.istio.io/v1/authorizationpolicies",
        "/apis/security.istio.io/v1beta1/authorizationpolicies",
    ];
    const DEFINITION: Definition = Definition::Custom("authorizationpolicies.security.istio.io");

    fn version(&self) -> &str {
        &self.0.metadata.resource_version
    }

    fn into_object(self) -> Document {
        self.0
    }
}

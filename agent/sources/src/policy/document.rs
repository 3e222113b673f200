//! A policy as the API has it: who it is, and the text that is read.
//!
//! What a user may nest without end is not taken apart here, or one object could make a whole list unreadable: `spec` stays
//! as it was written, and `status` and `managedFields` are skipped.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use tacit_core::policy::PolicyKind;

use crate::kubernetes::{Definition, Followed, Label, or_default};

impl Label for PolicyKind {
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
    /// What is read of it, as JSON.
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
    /// RFC 3339 in UTC, so that texts compare as times do.
    #[serde(deserialize_with = "or_default")]
    pub(super) creation_timestamp: String,
    #[serde(deserialize_with = "or_default")]
    annotations: Annotations,
}

/// Those that say something about a policy.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
struct Annotations {
    #[serde(rename = "istio.io/dry-run", default, skip_serializing_if = "Option::is_none")]
    dry_run: Option<String>,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Written {
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
        let written = Written::deserialize(decoder)?;
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

impl Followed for PeerAuthentications {
    type Kind = PolicyKind;
    type Object = Document;

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

impl Followed for AuthorizationPolicies {
    type Kind = PolicyKind;
    type Object = Document;

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

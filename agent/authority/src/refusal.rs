//! Refusals of certificate requests.

use std::time::Duration;

use tacit_core::spiffe::{IdentityError, SpiffeId, TrustDomain};
use tacit_grpc::Code;

/// The reason why a request was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum RequestRefusal {
    #[error("the request has no bearer token in its authorization header")]
    NoToken,
    #[error("the token is refused: {0}")]
    Token(String),
    #[error("the token is not for audience {0:?}; project it for that audience")]
    Audience(String),
    #[error("{0} is not one of the agents' service accounts")]
    NotAnAgent(String),
    #[error("the node of the token's bearer is unknown: {0}")]
    NoNode(String),
    #[error("invalid request: {0}")]
    Message(String),
    #[error("the certificate request is refused: {0}")]
    Csr(String),
    #[error("the certificate request has {0} names, expected exactly one URI")]
    Names(usize),
    #[error("invalid identity in the certificate request: {0}")]
    Identity(#[from] IdentityError),
    #[error("{identity} is not of trust domain {ours}")]
    TrustDomain { identity: SpiffeId, ours: TrustDomain },
    #[error("the certificate request is for {csr}, but the message requests {asked}")]
    Mismatch { csr: SpiffeId, asked: String },
    #[error("invalid lifetime of {0} s: expected 0 or more")]
    Lifetime(i64),
    #[error("no pod of {identity} is on node {node}")]
    NotOnNode { identity: SpiffeId, node: String },
    #[error(
        "only static pods of {identity} are on node {node}, and namespace {} is not in staticPods.namespaces of the authority; add it there if every node may have this identity, because a node can create static pods in any namespace",
        identity.namespace()
    )]
    StaticPod { identity: SpiffeId, node: String },
    #[error("node {node} exceeds its request rate; retry in {again:?}")]
    Rate { node: String, again: Duration },
    #[error("the caller cannot be checked now: {0}")]
    Api(String),
    #[error("the authority cannot sign now: {0}")]
    NotReady(String),
    #[error("cannot create the certificate: {0}")]
    Sign(String),
}

impl RequestRefusal {
    /// Returns the label for logs and metrics, one of a fixed set.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::NoToken => "no_token",
            Self::Token(_) => "token",
            Self::Audience(_) => "audience",
            Self::NotAnAgent(_) => "not_an_agent",
            Self::NoNode(_) => "no_node",
            Self::Message(_) => "message",
            Self::Csr(_) => "csr",
            Self::Names(_) => "names",
            Self::Identity(_) => "identity",
            Self::TrustDomain { .. } => "trust_domain",
            Self::Mismatch { .. } => "mismatch",
            Self::Lifetime(_) => "lifetime",
            Self::NotOnNode { .. } => "not_on_node",
            Self::StaticPod { .. } => "static_pod",
            Self::Rate { .. } => "rate",
            Self::Api(_) => "api",
            Self::NotReady(_) => "not_ready",
            Self::Sign(_) => "sign",
        }
    }

    /// Returns the gRPC status code.
    pub(super) fn code(&self) -> Code {
        match self {
            Self::NoToken | Self::Token(_) | Self::Audience(_) => Code::Unauthenticated,
            Self::NotAnAgent(_)
            | Self::NoNode(_)
            | Self::TrustDomain { .. }
            | Self::Mismatch { .. }
            | Self::NotOnNode { .. }
            | Self::StaticPod { .. } => Code::PermissionDenied,
            Self::Message(_) | Self::Csr(_) | Self::Names(_) | Self::Identity(_) | Self::Lifetime(_) => {
                Code::InvalidArgument
            }
            Self::Rate { .. } => Code::ResourceExhausted,
            Self::Api(_) | Self::NotReady(_) => Code::Unavailable,
            Self::Sign(_) => Code::Internal,
        }
    }
}

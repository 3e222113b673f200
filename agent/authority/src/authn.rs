//! Who asks, and what may be had: an agent gets certificates for service accounts that have a pod on its own node.
//!
//! In Kubernetes the API server reviews the agent's token and names its pod, and pods are read from it. Standalone, a file
//! names the token of each node, and the directory file says which workloads are where. What neither says, and what the
//! API server does not answer, is a refusal. Of a file that cannot be read any more the last good version counts, and
//! that is trouble which operators are shown.

mod kubernetes;
mod tokens;

use std::path::PathBuf;

use tacit_core::{
    directory::Directory,
    spiffe::{SpiffeId, TrustDomain},
};
use tacit_sources::{file::LoadError, reload::Watched};

use super::refusal::Refusal;

pub(super) use kubernetes::Kubernetes;
use tokens::Tokens;

/// An agent that has proven who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Caller {
    /// The node it runs on.
    pub(super) node: String,
    /// Its own identity, when it is a workload.
    pub(super) identity: Option<SpiffeId>,
}

/// Where agents and workloads are known from.
pub(super) enum Authenticator {
    Kubernetes(Kubernetes),
    Standalone { tokens: Watched<Tokens>, directory: Watched<Directory> },
}

impl Authenticator {
    /// Reads both files, and watches them. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`LoadError`] of the first version.
    pub(super) fn standalone(
        tokens: PathBuf,
        directory: PathBuf,
        trust_domain: &TrustDomain,
    ) -> Result<Self, LoadError> {
        let (file, domain) = (directory.clone(), trust_domain.clone());
        let directory = Watched::open(directory, move |text| Directory::parse(text, &file, &domain))?;
        let file = tokens.clone();
        let tokens = Watched::open(tokens, move |text| Tokens::parse(text, &file))?;
        Ok(Self::Standalone { tokens, directory })
    }

    /// Why a file as it is now is not in use; `None` when all are.
    pub(super) fn trouble(&self) -> Option<String> {
        match self {
            Self::Kubernetes(_) => None,
            Self::Standalone { tokens, directory } => {
                tokens.state().last_error.or_else(|| directory.state().last_error)
            }
        }
    }

    /// Who sent `token`.
    pub(super) async fn authenticate(&self, token: &str) -> Result<Caller, Refusal> {
        match self {
            Self::Kubernetes(kubernetes) => kubernetes.authenticate(token).await,
            Self::Standalone { tokens, .. } => {
                let node = tokens.current().node(token).map(str::to_owned);
                let node = node.ok_or_else(|| Refusal::Token("it is not in the tokens file".to_owned()))?;
                Ok(Caller { node, identity: None })
            }
        }
    }

    /// Whether a pod of `identity` is on the node of `caller`.
    pub(super) async fn allow(&self, caller: &Caller, identity: &SpiffeId) -> Result<(), Refusal> {
        let found = match self {
            Self::Kubernetes(kubernetes) => kubernetes.has_pod(&caller.node, identity).await?,
            Self::Standalone { directory, .. } => {
                directory.current().on_node(&caller.node).any(|workload| &workload.identity == identity)
            }
        };
        let refusal = || Refusal::NotOnNode { identity: identity.clone(), node: caller.node.clone() };
        found.then_some(()).ok_or_else(refusal)
    }
}

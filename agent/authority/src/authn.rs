//! Authentication of callers and authorization of requests. An agent may request certificates of service accounts that have a
//! pod on its own node.
//!
//! In Kubernetes the API server reviews the agent's token and returns the agent's pod. Pods are read from the API. Standalone, a
//! file holds the token of each node, and the directory file lists the workloads. Requests are refused if neither source has
//! an entry or the API does not answer. If a file becomes invalid, its last valid version stays in use and the status reports
//! the error.

mod kubernetes;
mod tokens;

use std::path::PathBuf;

use tacit_core::{
    directory::Directory,
    spiffe::{SpiffeId, TrustDomain},
};
use tacit_sources::{file::LoadError, reload::Watched};

use super::refusal::RequestRefusal;

pub(super) use kubernetes::Kubernetes;
use kubernetes::Pods;
use tokens::Tokens;

/// An authenticated agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Caller {
    /// The node of the agent.
    pub(super) node: String,
    /// The agent's own identity, if it is a workload.
    pub(super) identity: Option<SpiffeId>,
}

/// The source of agents and workloads.
pub(super) enum Authenticator {
    Kubernetes(Kubernetes),
    Standalone { tokens: Watched<Tokens>, directory: Watched<Directory> },
}

impl Authenticator {
    /// Loads both files and watches them. Requires a tokio runtime.
    ///
    /// # Errors
    /// [`LoadError`] if a first version is invalid.
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

    /// Returns the error of an invalid file, or `None` if both are in use.
    pub(super) fn file_error(&self) -> Option<String> {
        match self {
            Self::Kubernetes(_) => None,
            Self::Standalone { tokens, directory } => {
                tokens.state().last_error.or_else(|| directory.state().last_error)
            }
        }
    }

    /// Authenticates the sender of `token`.
    pub(super) async fn authenticate(&self, token: &str) -> Result<Caller, RequestRefusal> {
        match self {
            Self::Kubernetes(kubernetes) => kubernetes.authenticate(token).await,
            Self::Standalone { tokens, .. } => {
                let node = tokens.current().node(token).map(str::to_owned);
                let node =
                    node.ok_or_else(|| RequestRefusal::Token("it is not in the tokens file".to_owned()))?;
                Ok(Caller { node, identity: None })
            }
        }
    }

    /// Checks that a pod of `identity` runs on the node of `caller`.
    pub(super) async fn allow(&self, caller: &Caller, identity: &SpiffeId) -> Result<(), RequestRefusal> {
        let (owned, node) = (identity.clone(), caller.node.clone());
        let pods = match self {
            Self::Kubernetes(kubernetes) => kubernetes.pods(&caller.node, identity).await?,
            Self::Standalone { directory, .. } => {
                let directory = directory.current();
                let found = directory.on_node(&node).any(|workload| &workload.identity == identity);
                if found { Pods::Found } else { Pods::None }
            }
        };
        match pods {
            Pods::Found => Ok(()),
            Pods::StaticAlone => Err(RequestRefusal::StaticPod { identity: owned, node }),
            Pods::None => Err(RequestRefusal::NotOnNode { identity: owned, node }),
        }
    }
}

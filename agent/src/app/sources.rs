//! The sources of directory and policies, as the configuration names them: files or the Kubernetes API.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use tacit_core::{
    directory::{Directory, Ranges},
    policy::Policies,
};
use tacit_sources::{
    directory::{Announcer, CgroupLayout, LocalNode},
    kubernetes::KubernetesError,
    reload::{Opening, ReloadState, Watched},
};
use tokio::sync::watch;

use crate::{
    app::AppError,
    config::{Config, Source},
    telemetry::status::SourceKind,
};

/// Both sources, opened but perhaps not complete.
pub(super) struct Sources {
    directory: Opening<Directory>,
    policies: Opening<Policies>,
    announcer: Option<Announcer>,
}

impl Sources {
    pub(super) async fn open(config: &Config, pods_cgroup: &Path) -> Result<Self, AppError> {
        let (directory, announcer) = open_directory(config, pods_cgroup).await?;
        Ok(Self { directory, policies: open_policies(config).await?, announcer })
    }

    /// Takes the announcer, which is not there twice. `None` if nothing is to be announced.
    pub(super) fn take_announcer(&mut self) -> Option<Announcer> {
        self.announcer.take()
    }

    /// Returns the state of each source, for the operator.
    pub(super) fn states(&self) -> Vec<(SourceKind, watch::Receiver<ReloadState>)> {
        vec![(SourceKind::Directory, self.directory.states()), (SourceKind::Policy, self.policies.states())]
    }

    /// Waits until both sources are complete, without a limit.
    pub(super) async fn complete(
        self,
    ) -> Result<(Arc<Watched<Directory>>, Arc<Watched<Policies>>), AppError> {
        let (directory, policies) = tokio::join!(self.directory.complete(), self.policies.complete());
        let ended = |field| move || AppError::Kubernetes { field, source: KubernetesError::Ended };
        let directory = directory.ok_or_else(ended("directory"))?;
        Ok((Arc::new(directory), Arc::new(policies.ok_or_else(ended("policy"))?)))
    }
}

/// The directory. It is used once it is complete: what an earlier agent left for pods that are not in it would be removed.
async fn open_directory(
    config: &Config,
    pods_cgroup: &Path,
) -> Result<(Opening<Directory>, Option<Announcer>), AppError> {
    let domain = config.trust_domain.clone();
    let ranges = Arc::new(Ranges::configured(&config.captured_ranges()));
    match &config.directory {
        Source::File(file) => {
            let named = file.clone();
            let last = Mutex::new(Arc::clone(&ranges));
            let parse = move |text: &str| {
                let known = Directory::parse(text, &named, &domain)?;
                let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(next) = known.covering_services(&ranges).succeeding(&last) {
                    *last = Arc::new(next);
                }
                Ok(known.within(Arc::clone(&last)))
            };
            Ok((Watched::open(file, parse)?.into(), None))
        }
        Source::Kubernetes(options) => {
            let local_node = LocalNode {
                node: config.node.clone(),
                trust_domain: domain,
                cgroups: CgroupLayout::of(pods_cgroup),
                ranges,
            };
            let opened = tacit_sources::directory::open(options, local_node).await;
            opened.map_err(|source| AppError::Kubernetes { field: "directory", source })
        }
    }
}

/// The policies. They are used once all are known: one that is missing would let through what it denies.
async fn open_policies(config: &Config) -> Result<Opening<Policies>, AppError> {
    let root = config.root_namespace.clone();
    let minimum = config.minimum_mode;
    match &config.policy {
        Source::File(file) => {
            let named = file.clone();
            Ok(Watched::open(file, move |text| {
                let policies = Policies::parse(text, &named, &root)?.with_minimum(minimum);
                for note in policies.notes() {
                    tracing::warn!(file = %named.display(), "{note}");
                }
                for (namespace, why) in policies.not_applied() {
                    tracing::warn!(file = %named.display(), namespace, why, "policies are not applied, and all connections to pods of the namespace are denied");
                }
                Ok(policies)
            })?
            .into())
        }
        Source::Kubernetes(options) => {
            let opened = tacit_sources::policy::open(options, root, minimum).await;
            opened.map_err(|source| AppError::Kubernetes { field: "policy", source })
        }
    }
}

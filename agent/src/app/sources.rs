//! The sources of directory and policies, as the configuration names them: files, the Kubernetes API or istiod.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use tacit_core::{
    directory::{Directory, Ranges},
    policy::Policies,
};
use tacit_sources::{
    directory::{CgroupLayout, LocalNode},
    kubernetes::KubernetesError,
    reload::{Opening, ReloadState, Watched},
};
use tokio::sync::watch;

mod istiod;

use crate::{
    app::AppError,
    config::{Config, Source},
    telemetry::status::SourceKind,
};

/// Both sources, opened but perhaps not complete.
pub(super) struct Sources {
    directory: Opening<Directory>,
    policies: Opening<Policies>,
}

impl Sources {
    pub(super) async fn open(config: &Config, pods_cgroup: &Path) -> Result<Self, AppError> {
        let (directory, policies) = open_directory(config, pods_cgroup).await?;
        let policies = match policies {
            Some(policies) => policies,
            None => open_policies(config).await?,
        };
        Ok(Self { directory, policies })
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

/// The directory, with the policies if both have one connection. It is used once it is complete: what an earlier agent left for pods
/// that are not in it would be removed.
async fn open_directory(
    config: &Config,
    pods_cgroup: &Path,
) -> Result<(Opening<Directory>, Option<Opening<Policies>>), AppError> {
    let domain = config.trust_domain.clone();
    let ranges = Arc::new(Ranges::configured(&config.captured_ranges()));
    let local_node = LocalNode {
        node: config.node.clone(),
        trust_domain: domain.clone(),
        cgroups: CgroupLayout::of(pods_cgroup),
        ranges: Arc::clone(&ranges),
    };
    let failed = |source| AppError::Kubernetes { field: "directory", source };
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
            let opened = tacit_sources::directory::open(options, local_node).await;
            Ok((opened.map_err(failed)?, None))
        }
        Source::Istiod(istiod) => {
            let options = istiod::options(istiod, config).await?;
            let scope = istiod::PolicyScope {
                root_namespace: config.root_namespace.clone(),
                minimum: config.minimum_mode,
            };
            let scope = matches!(config.policy, Source::Istiod(())).then_some(scope);
            let opened = tacit_sources::istiod::open(&options, local_node, scope).await.map_err(failed)?;
            Ok((opened.directory, opened.policies))
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
        // The configuration refuses policies from istiod without a directory from there.
        Source::Istiod(()) => Err(AppError::TaskFailed),
        Source::Kubernetes(options) => {
            let opened = tacit_sources::policy::open(options, root, minimum).await;
            opened.map_err(|source| AppError::Kubernetes { field: "policy", source })
        }
    }
}

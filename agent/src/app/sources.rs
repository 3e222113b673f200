//! The sources of directory and policies, as the configuration names them: files, the Kubernetes API or istiod. The file of revocation
//! lists is watched like them.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use tacit_core::{
    directory::{Directory, Ranges},
    policy::Policies,
};
use tacit_identity::{peer_trust, revocation::RevocationLists};
use tacit_sources::{
    directory::{Announcer, CgroupLayout, LocalNode},
    kubernetes::KubernetesError,
    policy::MeshSettings,
    reload::{Opening, ReloadState, Watched},
};
use tokio::sync::watch;

mod istiod;

use crate::{
    app::AppError,
    config::{Config, FederationConfig, Source},
    control_state::FederatedRoots,
    telemetry::status::SourceKind,
};

/// All sources, opened but perhaps not complete.
pub(super) struct Sources {
    directory: Opening<Directory>,
    policies: Opening<Policies>,
    revocation: Option<Watched<RevocationLists>>,
    federation: Vec<FederatedRoots>,
    announcer: Option<Announcer>,
}

/// The complete sources.
pub(super) struct Complete {
    pub(super) directory: Arc<Watched<Directory>>,
    pub(super) policies: Arc<Watched<Policies>>,
    pub(super) revocation: Option<Arc<Watched<RevocationLists>>>,
    pub(super) federation: Arc<[FederatedRoots]>,
}

impl Sources {
    pub(super) async fn open(config: &Config, pods_cgroup: &Path) -> Result<Self, AppError> {
        let (revocation, federation) = (open_revocation(config)?, open_federation(config)?);
        let OpenedDirectory { directory, policies, announcer } = open_directory(config, pods_cgroup).await?;
        let policies = match policies {
            Some(policies) => policies,
            None => open_policies(config).await?,
        };
        Ok(Self { directory, policies, revocation, federation, announcer })
    }

    /// Takes the announcer, which is not there twice. `None` if nothing is to be announced.
    pub(super) fn take_announcer(&mut self) -> Option<Announcer> {
        self.announcer.take()
    }

    /// Returns the state of each source, for the operator.
    pub(super) fn states(&self) -> Vec<(SourceKind, watch::Receiver<ReloadState>)> {
        let revocation = self.revocation.iter().map(|lists| (SourceKind::Crl, lists.states()));
        let sources =
            [(SourceKind::Directory, self.directory.states()), (SourceKind::Policy, self.policies.states())];
        let federation = self.federation.iter().map(|domain| (SourceKind::Federation, domain.roots.states()));
        sources.into_iter().chain(revocation).chain(federation).collect()
    }

    /// Waits until all sources are complete, without a limit.
    pub(super) async fn complete(self) -> Result<Complete, AppError> {
        let (directory, policies) = tokio::join!(self.directory.complete(), self.policies.complete());
        let ended = |field| move || AppError::Kubernetes { field, source: KubernetesError::Ended };
        let directory = directory.ok_or_else(ended("directory"))?;
        let policies = policies.ok_or_else(ended("policy"))?;
        Ok(Complete {
            directory: Arc::new(directory),
            policies: Arc::new(policies),
            revocation: self.revocation.map(Arc::new),
            federation: self.federation.into(),
        })
    }
}

/// The revocation lists. Without the first version the agent does not start: it would take revoked certificates.
fn open_revocation(config: &Config) -> Result<Option<Watched<RevocationLists>>, AppError> {
    let Some(crl) = &config.crl else { return Ok(None) };
    let parse = |content: &[u8]| RevocationLists::parse(content).map_err(|error| error.to_string());
    Watched::open_content(&crl.file, parse).map(Some).map_err(AppError::RevocationLists)
}

/// The roots of federated trust domains. All have to be there at the start.
fn open_federation(config: &Config) -> Result<Vec<FederatedRoots>, AppError> {
    let open = |domain: &FederationConfig| {
        let roots = Watched::open_content(&domain.root_file, peer_trust::roots);
        let roots = roots.map_err(|source| AppError::FederatedRoots {
            trust_domain: domain.trust_domain.clone(),
            source,
        })?;
        Ok(FederatedRoots { trust_domain: domain.trust_domain.clone(), roots })
    };
    config.federation.iter().map(open).collect()
}

/// A directory, and what comes with it.
struct OpenedDirectory {
    directory: Opening<Directory>,
    /// The policies, if both have one connection.
    policies: Option<Opening<Policies>>,
    announcer: Option<Announcer>,
}

/// The directory, with the policies if both have one connection. It is used once it is complete: what an earlier agent left for pods
/// that are not in it would be removed.
async fn open_directory(config: &Config, pods_cgroup: &Path) -> Result<OpenedDirectory, AppError> {
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
            let directory = Watched::open(file, parse)?.into();
            Ok(OpenedDirectory { directory, policies: None, announcer: None })
        }
        Source::Kubernetes(options) => {
            let opened = tacit_sources::directory::open(options, local_node).await;
            let (directory, announcer) = opened.map_err(failed)?;
            Ok(OpenedDirectory { directory, policies: None, announcer })
        }
        Source::Istiod(istiod) => {
            let options = istiod::options(istiod, config).await?;
            let settings = matches!(config.policy, Source::Istiod(())).then(|| mesh_settings(config));
            let opened = tacit_sources::istiod::open(&options, local_node, settings).await.map_err(failed)?;
            let tacit_sources::istiod::Sources { directory, policies, announcer } = opened;
            Ok(OpenedDirectory { directory, policies, announcer })
        }
    }
}

fn mesh_settings(config: &Config) -> MeshSettings {
    MeshSettings {
        root_namespace: config.root_namespace.clone(),
        minimum: config.minimum_mode,
        aliases: config.trust_domain_aliases.clone().into(),
    }
}

/// The policies. They are used once all are known: one that is missing would let through what it denies.
async fn open_policies(config: &Config) -> Result<Opening<Policies>, AppError> {
    let settings = mesh_settings(config);
    match &config.policy {
        Source::File(file) => {
            let named = file.clone();
            Ok(Watched::open(file, move |text| {
                let policies =
                    settings.applied(Policies::parse(text, &named, &settings.root_namespace)?);
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
            let opened = tacit_sources::policy::open(options, settings).await;
            opened.map_err(|source| AppError::Kubernetes { field: "policy", source })
        }
    }
}

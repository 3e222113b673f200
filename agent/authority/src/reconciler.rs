//! Keeps root, intermediate and bundle current. The reconciler reads the store every few seconds, writes the step that
//! `rotation` decides, and passes the result to the service as a snapshot.
//!
//! Replicas work independently. A step is written only if the store has not changed since the decision. If a reconciliation
//! fails, the last snapshot stays in use while the waits of a rotation allow it (`Live::stale`). After that the replica refuses
//! to sign, because its knowledge of the trusted roots may be outdated.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwapOption;
use tacit_core::{error_chain::format_chain, spiffe::TrustDomain};
use tokio::time::{sleep, timeout};
use tracing::{error, info, warn};

use super::{
    bundle::{Bundle, BundleError},
    config::Lifetimes,
    root::{self, Root, RootError, seconds},
    rotation::{Observed, Rotation, Step, Waits, decide},
    signer::{Signer, time_of},
    store::{Fields, Store, StoreContent, StoreError, Written},
};

/// Field of the store with the rotation.
const ROTATION: &str = "tacit.json";
/// Maximum consecutive conflicts with other writers. The next reconciliation then retries.
const CONFLICTS_MAX: usize = 8;
/// Maximum interval between two reconciliations.
const INTERVAL: Duration = Duration::from_secs(10);
/// Timeout of a reconciliation. A working API answers sooner, and a hanging API must be reported.
pub(super) const RECONCILE_MAX: Duration = Duration::from_secs(30);
/// Reconciliations within the slack of a rotation, so that a few may fail.
const RECONCILIATIONS_WITHIN_SLACK: u32 = 8;

/// The reason why a reconciliation failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReconcileError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the root is refused: {0}")]
    Root(#[from] RootError),
    #[error(
        "invalid {ROTATION} in the store: {0}; correct it, or remove it to start again with the existing root"
    )]
    Rotation(#[from] serde_json::Error),
    #[error(
        "no answer from the store or the bundle within {0:?}; check whether the Kubernetes API or the disk is overloaded"
    )]
    Timeout(Duration),
    #[error("another writer changed the store first, {CONFLICTS_MAX} times in a row")]
    Conflicts,
    #[error("the roots are not published: {0}")]
    Bundle(#[from] BundleError),
}

/// A snapshot of the signer and the trusted roots.
pub(super) struct Live {
    pub(super) signer: Arc<Signer>,
    /// All trusted roots, in PEM.
    pub(super) bundle: String,
    /// Number of trusted roots.
    pub(super) roots: usize,
    /// Expiry of the root.
    pub(super) root_not_after: SystemTime,
    /// Time at which the store was read.
    read_at: Instant,
    valid_for: Duration,
}

impl Live {
    /// Returns true if the snapshot may be outdated.
    pub(super) fn stale(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.read_at) > self.valid_for
    }
}

/// Keeps root, intermediate and bundle current.
pub(super) struct Reconciler {
    pub(super) store: Store,
    pub(super) bundle: Bundle,
    pub(super) trust_domain: TrustDomain,
    pub(super) names: Vec<String>,
    pub(super) lifetimes: Lifetimes,
    /// Timeout of a reconciliation.
    pub(super) reconcile_max: Duration,
    pub(super) live: Arc<ArcSwapOption<Live>>,
    /// Error of the latest reconciliation.
    pub(super) last_error: Arc<ArcSwapOption<String>>,
    /// The last rotation read or written. It survives the removal of the store's content.
    pub(super) known: Option<Rotation>,
    /// The published bundle.
    pub(super) published: Option<String>,
}

impl Reconciler {
    /// Reconciles until the future is dropped. Errors are logged once for each change.
    pub(super) async fn run(mut self) {
        loop {
            let result = self.reconcile(SystemTime::now()).await;
            let problem = result.err().map(|error| format_chain(&error));
            match (&problem, self.last_error.load().as_deref()) {
                (Some(problem), before) if before != Some(problem) => {
                    error!(%problem, "cannot update root, intermediate or bundle; retrying");
                }
                (None, Some(_)) => info!("root, intermediate and bundle are up to date again"),
                _ => {}
            }
            self.last_error.store(problem.map(Arc::new));
            sleep(self.pause()).await;
        }
    }

    fn waits(&self) -> Waits {
        Waits::new(self.lifetimes.leaf)
    }

    fn pause(&self) -> Duration {
        (Duration::from_secs(self.waits().slack) / RECONCILIATIONS_WITHIN_SLACK).min(INTERVAL)
    }

    /// Reconciles once. Updates the store, then the snapshot and the bundle. Cancellation is safe, because each write is atomic
    /// and the next reconciliation reads it.
    pub(super) async fn reconcile(&mut self, now: SystemTime) -> Result<(), ReconcileError> {
        let reconcile_max = self.reconcile_max;
        timeout(reconcile_max, self.try_reconcile(now))
            .await
            .unwrap_or(Err(ReconcileError::Timeout(reconcile_max)))
    }

    async fn try_reconcile(&mut self, now: SystemTime) -> Result<(), ReconcileError> {
        for _ in 0..CONFLICTS_MAX {
            let read_at = Instant::now();
            let Some(stored) = self.store.load().await? else {
                let fields = self.first(now)?;
                info!("the store has no root; creating one");
                let _conflict_or_not_it_is_read_again = self.store.create(fields).await?;
                continue;
            };
            let root = Root::read(&stored.fields)?;
            let rotation: Option<Rotation> =
                stored.fields.get(ROTATION).map(|text| serde_json::from_str(text)).transpose()?;
            let step = self.step(&root, rotation.as_ref(), &stored, now);
            let Some(rotation) = rotation.filter(|_| step == Step::Keep) else {
                if self.write(step, &root, stored, now).await? == Written::Done {
                    info!(root = root.fingerprint, ?step, "root rotation");
                }
                continue;
            };
            self.update_live(&root, &rotation, read_at, now)?;
            self.known = Some(rotation);
            if self.publish().await? == Written::Done {
                return stored.request.map(drop).map_err(ReconcileError::from);
            }
        }
        Err(ReconcileError::Conflicts)
    }

    fn step(&self, root: &Root, rotation: Option<&Rotation>, stored: &StoreContent, now: SystemTime) -> Step {
        let observed = Observed {
            fingerprint: &root.fingerprint,
            not_before: seconds(root.validity.not_before),
            not_after: seconds(root.validity.not_after),
            rotation,
            request: stored.rotation_request(),
        };
        let published = rotation.is_some_and(|rotation| self.published.as_ref() == Some(&rotation.bundle()));
        decide(&observed, self.waits(), seconds(now), published)
    }

    /// Returns the content of a new store. Roots known from before the store was emptied stay trusted for their time.
    fn first(&self, now: SystemTime) -> Result<Fields, ReconcileError> {
        let (certificate, key) = root::make(&self.trust_domain, self.lifetimes.root, now)?;
        let mut fields = with_root(certificate, key);
        let root = Root::read(&fields)?;
        let (known, waits) = (self.known.as_ref(), self.waits());
        let (fingerprint, anchors) = (root.fingerprint.clone(), root.anchors_pem());
        let rotation = Rotation::adopt(true, fingerprint, anchors, known, waits, seconds(now));
        fields.insert(ROTATION.to_owned(), serde_json::to_string_pretty(&rotation)?);
        Ok(fields)
    }

    async fn write(
        &self,
        step: Step,
        root: &Root,
        stored: StoreContent,
        now: SystemTime,
    ) -> Result<Written, ReconcileError> {
        let waits = self.waits();
        let before: Option<Rotation> =
            stored.fields.get(ROTATION).map(|text| serde_json::from_str(text)).transpose()?;
        let known = before.as_ref().or(self.known.as_ref());
        let mut fields = Fields::new();
        let after = match (step, known) {
            (Step::Begin, Some(known)) => {
                let (certificate, key) = root::make(&self.trust_domain, self.lifetimes.root, now)?;
                known.begin(certificate, key, stored.rotation_request(), seconds(now))
            }
            (Step::Promote, Some(known @ Rotation { next: Some(next), .. })) => {
                fields = with_root(next.certificate.clone(), next.key.clone());
                known.promote(Root::read(&fields)?.fingerprint, waits, seconds(now))
            }
            (Step::Forget, Some(known)) => known.forget(seconds(now)),
            // The field was removed from the store.
            (_, Some(known)) if known.fingerprint == root.fingerprint => known.clone(),
            (_, known) => {
                // Adopt only a root that can sign. Otherwise the last valid root stays in use.
                self.signer(root, now)?;
                let (fingerprint, anchors) = (root.fingerprint.clone(), root.anchors_pem());
                Rotation::adopt(false, fingerprint, anchors, known, waits, seconds(now))
            }
        };
        fields.insert(ROTATION.to_owned(), serde_json::to_string_pretty(&after)?);
        Ok(self.store.replace(stored, fields).await?)
    }

    fn signer(&self, root: &Root, now: SystemTime) -> Result<Signer, RootError> {
        Signer::make(root, &self.trust_domain, &self.names, self.lifetimes, now)
    }

    /// Updates the snapshot from the store's content.
    fn update_live(
        &self,
        root: &Root,
        rotation: &Rotation,
        read_at: Instant,
        now: SystemTime,
    ) -> Result<(), ReconcileError> {
        let current = self.live.load_full().map(|live| live.signer.clone());
        let waits = now < time_of(rotation.signs_from);
        let signer = match current {
            Some(current) if current.root == root.fingerprint && !current.due(now) => current,
            Some(current)
                if current.root != root.fingerprint && waits && current.covers(self.lifetimes.leaf, now) =>
            {
                current
            }
            _ => {
                let made = Arc::new(self.signer(root, now)?);
                if waits {
                    warn!(
                        "the root was replaced, and no intermediate of the previous root is left; some peers may not trust the new root yet"
                    );
                }
                info!(serial = made.serial, root = made.root, "intermediate made");
                made
            }
        };
        let bundle = rotation.bundle();
        self.live.store(Some(Arc::new(Live {
            signer,
            roots: bundle.matches("-----BEGIN CERTIFICATE-----").count(),
            bundle,
            root_not_after: root.validity.not_after,
            read_at,
            valid_for: Duration::from_secs(self.waits().slack) / 2,
        })));
        Ok(())
    }

    async fn publish(&mut self) -> Result<Written, ReconcileError> {
        let Some(live) = self.live.load_full() else { return Ok(Written::Done) };
        // Read each time, because the target may have been changed or removed.
        self.published = None;
        let written = self.bundle.publish(&live.bundle).await?;
        self.published = (written == Written::Done).then(|| live.bundle.clone());
        Ok(written)
    }
}

fn with_root(certificate: String, key: String) -> Fields {
    [(root::ROOTS, certificate.clone()), (root::CERTIFICATE, certificate), (root::KEY, key)]
        .into_iter()
        .map(|(field, text)| (field.to_owned(), text))
        .collect()
}

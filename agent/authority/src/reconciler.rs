//! Keeps root, intermediate and bundle current: looks at the store every few seconds, writes the step that `rotation`
//! decides, and hands the result to the service as a snapshot.
//!
//! Several replicas do this without knowing of each other: a step is written only over what it was decided on. A look
//! that fails leaves the last good snapshot in use, for as long as the waits of a rotation allow (`Live::stale`); after
//! that this replica refuses to sign, as it may not know which roots others trust.

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
    rotation::{Held, Rotation, Step, Waits, decide},
    signer::{Signer, moment},
    store::{Fields, Store, StoreError, Stored, Written},
};

/// Field of the store with the rotation.
const ROTATION: &str = "tacit.json";
/// Looks at the store in a row when others were faster; after that the next turn comes.
const CONFLICTS_MAX: usize = 8;
/// Longest time between two looks at the store.
const LOOK: Duration = Duration::from_secs(10);
/// Longest look: an API that answers at all does so in less, and one that does not must show as trouble.
pub(super) const LOOK_MAX: Duration = Duration::from_secs(30);
/// Looks at the store within the slack of a rotation: a few may fail.
const LOOKS_WITHIN_SLACK: u32 = 8;

/// Why the authority cannot sign, or not for long.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReconcileError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the root is refused: {0}")]
    Root(#[from] RootError),
    #[error(
        "{ROTATION} in the store cannot be read: {0}; correct it, or remove it to begin anew with the root that is there"
    )]
    Rotation(#[from] serde_json::Error),
    #[error(
        "the store or the place of the bundle has not answered within {0:?}: is the Kubernetes API, or the disk, overloaded?"
    )]
    Late(Duration),
    #[error("{CONFLICTS_MAX} times somebody else changed the store first")]
    Conflicts,
    #[error("the roots are not published: {0}")]
    Bundle(#[from] BundleError),
}

/// What the service signs with; a snapshot.
pub(super) struct Live {
    pub(super) signer: Arc<Signer>,
    /// All roots to trust, in PEM.
    pub(super) bundle: String,
    /// How many roots those are.
    pub(super) roots: usize,
    /// Last moment of the root.
    pub(super) root_not_after: SystemTime,
    /// When the store was read last.
    read_at: Instant,
    valid_for: Duration,
}

impl Live {
    /// What it says may no longer be so.
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
    /// Longest look.
    pub(super) look_max: Duration,
    pub(super) live: Arc<ArcSwapOption<Live>>,
    /// What the latest look failed with.
    pub(super) trouble: Arc<ArcSwapOption<String>>,
    /// What was last read or written; survives the removal of the store's content.
    pub(super) known: Option<Rotation>,
    /// The bundle that is where agents read it.
    pub(super) published: Option<String>,
}

impl Reconciler {
    /// Looks, writes and publishes until it is dropped. What goes wrong is logged here, once for each change.
    pub(super) async fn run(mut self) {
        loop {
            let looked = self.look(SystemTime::now()).await;
            let problem = looked.err().map(|error| format_chain(&error));
            match (&problem, self.trouble.load().as_deref()) {
                (Some(problem), before) if before != Some(problem) => {
                    error!(%problem, "root, intermediate or bundle cannot be brought up to date; trying again");
                }
                (None, Some(_)) => info!("root, intermediate and bundle are up to date again"),
                _ => {}
            }
            self.trouble.store(problem.map(Arc::new));
            sleep(self.pause()).await;
        }
    }

    fn waits(&self) -> Waits {
        Waits::new(self.lifetimes.leaf)
    }

    fn pause(&self) -> Duration {
        (Duration::from_secs(self.waits().slack) / LOOKS_WITHIN_SLACK).min(LOOK)
    }

    /// One look: the store is brought to where it should be, and the snapshot and the bundle to what it says. One that is
    /// given up half-way does no harm: what it wrote is whole, and the next one reads it.
    pub(super) async fn look(&mut self, now: SystemTime) -> Result<(), ReconcileError> {
        let look_max = self.look_max;
        timeout(look_max, self.bring_up_to_date(now)).await.unwrap_or(Err(ReconcileError::Late(look_max)))
    }

    async fn bring_up_to_date(&mut self, now: SystemTime) -> Result<(), ReconcileError> {
        for _ in 0..CONFLICTS_MAX {
            let read_at = Instant::now();
            let Some(stored) = self.store.load().await? else {
                let fields = self.first(now)?;
                info!("there is no root yet: making one");
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
            self.take(&root, &rotation, read_at, now)?;
            self.known = Some(rotation);
            if self.publish().await? == Written::Done {
                return stored.request.map(drop).map_err(ReconcileError::from);
            }
        }
        Err(ReconcileError::Conflicts)
    }

    fn step(&self, root: &Root, rotation: Option<&Rotation>, stored: &Stored, now: SystemTime) -> Step {
        let held = Held {
            fingerprint: &root.fingerprint,
            not_before: seconds(root.validity.not_before),
            not_after: seconds(root.validity.not_after),
            rotation,
            request: stored.asked(),
        };
        let published = rotation.is_some_and(|rotation| self.published.as_ref() == Some(&rotation.bundle()));
        decide(&held, self.waits(), seconds(now), published)
    }

    /// The content of a store that holds none. Roots known from before it was emptied stay trusted for their time.
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
        stored: Stored,
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
                known.begin(certificate, key, stored.asked(), seconds(now))
            }
            (Step::Promote, Some(known @ Rotation { next: Some(next), .. })) => {
                fields = with_root(next.certificate.clone(), next.key.clone());
                known.promote(Root::read(&fields)?.fingerprint, waits, seconds(now))
            }
            (Step::Forget, Some(known)) => known.forget(seconds(now)),
            // Somebody wrote the store anew without it.
            (_, Some(known)) if known.fingerprint == root.fingerprint => known.clone(),
            (_, known) => {
                // Only what can sign is taken over; else the last good root stays in use.
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

    /// Makes the snapshot of what the store says.
    fn take(
        &self,
        root: &Root,
        rotation: &Rotation,
        read_at: Instant,
        now: SystemTime,
    ) -> Result<(), ReconcileError> {
        let held = self.live.load_full().map(|live| live.signer.clone());
        let waits = now < moment(rotation.signs_from);
        let signer = match held {
            Some(held) if held.root == root.fingerprint && !held.due(now) => held,
            Some(held) if held.root != root.fingerprint && waits && held.covers(self.lifetimes.leaf, now) => {
                held
            }
            _ => {
                let made = Arc::new(self.signer(root, now)?);
                if waits {
                    warn!(
                        "the root was replaced and nothing is left that its predecessor signed: some peers may not trust it yet"
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
        // Looked at each time: somebody may have removed or changed it.
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

//! Keeps the credentials of every workload of the node current.
//!
//! One task an identity asks the issuer when `renewal` says so, or follows what SPIRE sends. Readers take the latest snapshot without waiting; what has
//! expired is never handed out, even when the task is late.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use rustls::{RootCertStore, crypto::aws_lc_rs};
use tacit_core::{
    renewal::{Renewal, RenewalSchedule},
    spiffe::SpiffeId,
};
use tokio::{
    sync::watch,
    task::AbortHandle,
    time::{sleep, timeout},
};
use tracing::{error, info, warn};

use super::{
    credentials::Credentials,
    issuer::{IssueError, Issuer},
    peer_trust::{OwnRoots, PeerTrust},
    spire::SpireIssuer,
};

/// One attempt to get a certificate takes this long at most.
const ISSUE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest sleep before the clock is read again, because it may be set meanwhile.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// Refusals after which an identity counts as refused. An authority can be some seconds behind a pod that has just been made.
const REFUSALS: u32 = 3;

/// The credentials of the node's identities. Cheap to clone; the tasks end with the last clone.
#[derive(Clone)]
pub struct Identities {
    issuer: Arc<Issuer>,
    /// Conditions of trust in all their peers.
    trust: Arc<PeerTrust>,
    slots: Arc<Slots>,
    /// Told after each attempt, and after a change of roots.
    changes: watch::Sender<()>,
    /// Told after a root was removed.
    removals: watch::Sender<()>,
}

/// One certificate as an operator sees it.
#[derive(Debug, Clone)]
pub struct CertificateState {
    /// The identity that the certificate proves.
    pub identity: SpiffeId,
    /// Serial number in hexadecimal; empty when none was issued yet.
    pub serial: String,
    /// First moment of validity; `None` when none was issued yet.
    pub not_before: Option<SystemTime>,
    /// Last moment of validity; `None` when none was issued yet.
    pub not_after: Option<SystemTime>,
    /// When it was issued.
    pub last_renewal: Option<SystemTime>,
    /// Failed attempts since then.
    pub renewal_failures: u32,
    /// The error of the latest attempt.
    pub last_error: Option<String>,
}

impl Identities {
    /// Starts with no identity; they come by [`Identities::ready`]. Peers are held to the roots alone.
    #[must_use]
    pub fn start(issuer: Issuer) -> Self {
        Self::trusting(issuer, Arc::default())
    }

    /// As [`Identities::start`], with what peers are held to beside the roots.
    #[must_use]
    pub fn trusting(issuer: Issuer, trust: Arc<PeerTrust>) -> Self {
        let (changes, removals) = (watch::Sender::new(()), watch::Sender::new(()));
        Self { issuer: Arc::new(issuer), trust, slots: Arc::default(), changes, removals }
    }

    /// Returns what peers are held to beside the roots.
    #[must_use]
    pub fn trust(&self) -> &Arc<PeerTrust> {
        &self.trust
    }

    /// Returns the issuer.
    #[must_use]
    pub fn issuer(&self) -> &Issuer {
        &self.issuer
    }

    /// Has the credentials of `identity` asked for, when that is not done yet. Needs a tokio runtime; never waits.
    pub fn prepare(&self, identity: &SpiffeId) {
        self.slot(identity);
    }

    /// Returns `Ok` if `identity` has credentials. Otherwise requests them. They are renewed until
    /// [`Identities::forget`].
    ///
    /// Needs a tokio runtime. Never waits: [`Identities::changes`] tells when there may be another answer.
    ///
    /// # Errors
    /// [`IssueError`] of the latest attempt, [`IssueError::Awaited`] before the first has ended. Attempts go on in the
    /// background.
    pub fn ready(&self, identity: &SpiffeId) -> Result<(), IssueError> {
        let slot = self.slot(identity);
        if slot.shared.usable(SystemTime::now()).is_some() {
            return Ok(());
        }
        let failure = slot.shared.progress().last_error.clone();
        Err(failure.unwrap_or(IssueError::Awaited))
    }

    /// Returns true if the issuer has refused `identity` several times since it last issued a certificate for it. Attempts go on.
    #[must_use]
    pub fn is_refused(&self, identity: &SpiffeId) -> bool {
        let map = self.slots.map.load();
        map.get(identity).is_some_and(|slot| slot.shared.progress().refusals >= REFUSALS)
    }

    /// Returns true if any identity has credentials: the issuer answers this agent.
    #[must_use]
    pub fn has_any(&self) -> bool {
        let now = SystemTime::now();
        self.slots.map.load().values().any(|slot| slot.shared.usable(now).is_some())
    }

    /// Notice of every attempt that ended, of any identity.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Notice of every root that is no longer one of an identity. Peers that it vouched for are not trusted any more.
    #[must_use]
    pub fn root_removals(&self) -> watch::Receiver<()> {
        self.removals.subscribe()
    }

    /// Waits for [`Identities::ready`], for no longer than one attempt at the issuer.
    #[cfg(test)]
    pub(crate) async fn require(&self, identity: &SpiffeId) -> Result<(), IssueError> {
        let mut changes = self.changes();
        loop {
            match self.ready(identity) {
                Err(IssueError::Awaited) => {
                    changes.changed().await.expect("the sender lives as long as this")
                }
                told => return told,
            }
        }
    }

    /// The credentials of `identity`; `None` when there are none or they have expired. Never waits.
    #[must_use]
    pub fn current(&self, identity: &SpiffeId) -> Option<Arc<Credentials>> {
        self.slots.map.load().get(identity)?.shared.usable(SystemTime::now())
    }

    /// Drops the credentials of `identity` and stops renewing them.
    pub fn forget(&self, identity: &SpiffeId) {
        let _writer = self.slots.writer();
        let mut map = HashMap::clone(&self.slots.map.load());
        map.remove(identity);
        self.slots.map.store(Arc::new(map));
    }

    /// All certificates, by identity.
    #[must_use]
    pub fn certificates(&self) -> Vec<CertificateState> {
        let map = self.slots.map.load();
        let mut list: Vec<_> = map.iter().map(|(identity, slot)| slot.shared.state(identity)).collect();
        list.sort_by(|a, b| a.identity.cmp(&b.identity));
        list
    }

    fn slot(&self, identity: &SpiffeId) -> Arc<Slot> {
        if let Some(slot) = self.slots.map.load().get(identity) {
            return slot.clone();
        }
        let _writer = self.slots.writer();
        let mut map = HashMap::clone(&self.slots.map.load());
        let start = || {
            let by = (self.issuer.clone(), self.trust.clone());
            let shared = Shared::new(self.removals.clone());
            Arc::new(Slot::start(identity.clone(), by, shared, self.changes.clone()))
        };
        let slot = map.entry(identity.clone()).or_insert_with(start).clone();
        self.slots.map.store(Arc::new(map));
        slot
    }
}

/// The slots by identity: a snapshot for readers, a lock for writers.
#[derive(Default)]
struct Slots {
    map: ArcSwap<HashMap<SpiffeId, Arc<Slot>>>,
    writing: Mutex<()>,
}

impl Slots {
    fn writer(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One identity with the task that renews it.
struct Slot {
    shared: Arc<Shared>,
    task: AbortHandle,
}

impl Slot {
    fn start(
        identity: SpiffeId,
        by: (Arc<Issuer>, Arc<PeerTrust>),
        shared: Shared,
        changes: watch::Sender<()>,
    ) -> Self {
        let shared = Arc::new(shared);
        let task = tokio::spawn(keep_current(identity, by, shared.clone(), changes)).abort_handle();
        Self { shared, task }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// State shared by the task and the readers.
struct Shared {
    credentials: ArcSwapOption<Credentials>,
    /// The roots of the latest credentials, for the sessions of earlier ones too. Empty before the first.
    roots: watch::Sender<Arc<RootCertStore>>,
    /// Of all identities.
    removals: watch::Sender<()>,
    progress: Mutex<Progress>,
}

#[derive(Default, Clone)]
struct Progress {
    obtained: Option<SystemTime>,
    failures: u32,
    /// Those of them that were refusals.
    refusals: u32,
    failed_at: Option<SystemTime>,
    /// The latest attempt's failure; `None` before the first attempt and after a success.
    last_error: Option<IssueError>,
}

impl Shared {
    fn new(removals: watch::Sender<()>) -> Self {
        let roots = watch::Sender::new(Arc::new(RootCertStore::empty()));
        Self { credentials: ArcSwapOption::empty(), roots, removals, progress: Mutex::default() }
    }

    fn usable(&self, now: SystemTime) -> Option<Arc<Credentials>> {
        self.credentials.load_full().filter(|credentials| !credentials.expired(now))
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn schedule(&self) -> RenewalSchedule {
        let progress = self.progress().clone();
        let held = self.credentials.load();
        let obtained = progress.obtained.unwrap_or(SystemTime::UNIX_EPOCH);
        RenewalSchedule {
            obtained,
            not_after: held.as_ref().map_or(obtained, |credentials| credentials.not_after),
            failures: progress.failures,
            failed_at: progress.failed_at.unwrap_or(SystemTime::UNIX_EPOCH),
            jitter: jitter(),
        }
    }

    fn succeeded(&self, credentials: Credentials) {
        self.hold(credentials);
        *self.progress() = Progress { obtained: Some(SystemTime::now()), ..Progress::default() };
    }

    /// Hands out these credentials from now on. Peers of earlier ones are held to their roots too.
    fn hold(&self, credentials: Credentials) {
        let roots = credentials.roots.clone();
        let credentials = credentials.with_own_roots(OwnRoots::Watched(self.roots.subscribe()));
        // The roots first: a handshake with a peer of a new root is checked against them.
        let old = self.roots.send_replace(roots.clone());
        self.credentials.store(Some(Arc::new(credentials)));
        if old.roots.iter().any(|root| !roots.roots.contains(root)) {
            self.removals.send_replace(());
        }
    }

    /// Holds peers to these roots, at least one, whatever becomes of the next certificate. Returns true if they are others.
    fn hold_roots(&self, roots: Arc<RootCertStore>) -> bool {
        let held = self.credentials.load_full().filter(|held| held.roots.roots != roots.roots);
        held.map(|held| self.hold(held.with_roots(roots))).is_some()
    }

    fn failed(&self, error: IssueError) {
        let mut progress = self.progress();
        progress.failures = progress.failures.saturating_add(1);
        progress.refusals = progress.refusals.saturating_add(u32::from(error.is_refusal()));
        progress.failed_at = Some(SystemTime::now());
        progress.last_error = Some(error);
    }

    fn state(&self, identity: &SpiffeId) -> CertificateState {
        let progress = self.progress().clone();
        let held = self.credentials.load_full();
        CertificateState {
            identity: identity.clone(),
            serial: held.as_ref().map(|c| c.serial.to_string()).unwrap_or_default(),
            not_before: held.as_ref().map(|c| c.not_before),
            not_after: held.as_ref().map(|c| c.not_after),
            last_renewal: progress.obtained,
            renewal_failures: progress.failures,
            last_error: progress.last_error.map(|error| error.to_string()),
        }
    }
}

async fn keep_current(
    identity: SpiffeId,
    (issuer, trust): (Arc<Issuer>, Arc<PeerTrust>),
    shared: Arc<Shared>,
    changes: watch::Sender<()>,
) {
    if let Issuer::Spire(spire) = &*issuer {
        return follow(identity, spire, &trust, &shared, &changes).await;
    }
    loop {
        // Drawn once a pause: a new draw at every look would move the moment waited for.
        let schedule = shared.schedule();
        let holds_another = loop {
            let now = SystemTime::now();
            match schedule.next(now) {
                Renewal::Wait(until) => {
                    sleep(until.duration_since(now).unwrap_or_default().min(LONGEST_SLEEP)).await;
                }
                Renewal::Renew => break true,
                Renewal::Expired => break false,
            }
        };
        let attempt = timeout(ISSUE_TIMEOUT, issuer.issue(&identity)).await;
        let outcome = attempt.unwrap_or(Err(IssueError::Timeout(ISSUE_TIMEOUT)));
        note((&identity, &trust), outcome, holds_another, &shared);
        changes.send_replace(());
    }
}

/// Keeps the latest credentials that SPIRE has sent for `identity`.
async fn follow(
    identity: SpiffeId,
    spire: &SpireIssuer,
    trust: &Arc<PeerTrust>,
    shared: &Shared,
    changes: &watch::Sender<()>,
) {
    let mut subscription = match spire.subscribe(&identity) {
        Ok(subscription) => subscription,
        Err(failure) => {
            note((&identity, trust), Err(failure), false, shared);
            changes.send_replace(());
            return;
        }
    };
    let mut expires = None;
    let mut roots = subscription.roots();
    loop {
        let outcome = tokio::select! {
            latest = roots.next() => {
                if shared.hold_roots(latest) {
                    changes.send_replace(());
                }
                continue;
            }
            outcome = subscription.next() => outcome,
            () = sleep_until(expires) => Err(IssueError::NotRenewed),
        };
        match &outcome {
            Ok(credentials) => expires = Some(credentials.not_after),
            Err(IssueError::NotRenewed) => expires = None,
            Err(_) => {}
        }
        note((&identity, trust), outcome, shared.usable(SystemTime::now()).is_some(), shared);
        changes.send_replace(());
    }
}

/// Waits until a moment has passed by the wall clock, which may be set meanwhile. Without a moment it never ends.
async fn sleep_until(moment: Option<SystemTime>) {
    let Some(moment) = moment else { return std::future::pending().await };
    while let Ok(left) = moment.duration_since(SystemTime::now()) {
        // Above zero, and past the moment.
        sleep(left.min(LONGEST_SLEEP) + Duration::from_millis(1)).await;
    }
}

fn note(
    (identity, trust): (&SpiffeId, &Arc<PeerTrust>),
    outcome: Result<Credentials, IssueError>,
    holds_another: bool,
    shared: &Shared,
) {
    match outcome {
        Ok(credentials) => {
            info!(%identity, serial = &*credentials.serial, "certificate issued");
            shared.succeeded(credentials.with_trust(trust.clone()));
        }
        Err(failure) => {
            if holds_another {
                warn!(%identity, %failure, "certificate not renewed, the old one stays in use");
            } else {
                error!(%identity, %failure, "no certificate: traffic of this identity is refused");
            }
            shared.failed(failure);
        }
    }
}

/// Random; without randomness the middle, as retries then only lose their spread.
pub(crate) fn jitter() -> u8 {
    let mut byte = [128];
    match aws_lc_rs::default_provider().secure_random.fill(&mut byte) {
        Ok(()) => byte[0],
        Err(_) => 128,
    }
}

#[cfg(test)]
mod tests;

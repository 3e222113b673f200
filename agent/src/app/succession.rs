//! Handover of a node from one agent to the next, without a lost connection.
//!
//! ```text
//! last   serves ────────────────── SIGTERM ── releases PinLock ── serves on ───── gets SuccessorLock: no new flows ── drains
//! next   starts ── SuccessorLock ── waits for PinLock ─────────── takes over ── all pods reconciled: releases it ── serves
//! ```
//! `PinLock` locks the pin directory, and `SuccessorLock` the successor's place. The kernel releases both when their holder
//! exits, even after a crash. Steering and capture change from one agent's listeners to the other's in one map update each,
//! so one of the two accepts at every moment. Without a successor the last agent serves on for `successorTimeout`, as it may
//! have been deleted and not replaced yet. After that it keeps `PinLock` until it exits: it drains and ends.

use std::{
    collections::HashMap,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tacit_core::directory::{Directory, Protocol, Workload, WorkloadChange};
use tacit_identity::manager::Identities;
use tacit_kernel::{Kernel, KernelError, PinLock, PreparedPrograms, SuccessorLock};
use tacit_sources::reload::Watched;
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};

use crate::config::Config;

/// Limit for the next agent to take over, while the last one serves on. Measured: 25 ms; on an emulated machine under load
/// 1.2 s, and 9.5 s if the pinned maps have changed and the programs are loaded again. The termination grace period of the pod
/// must exceed `successorTimeout`, `drainTimeout` and 15 s: this limit, [`LATE_HANDSHAKES`], and 3.5 s for the end of
/// enrolment's pass and the reset of what is left.
const TAKE_OVER_MAX: Duration = Duration::from_secs(10);
/// Pause between two looks for a successor. The kernel tells nobody that a lock is taken.
const SUCCESSOR_POLL: Duration = Duration::from_millis(50);
/// Time during which the last agent's listeners accept connections whose handshake began before the switch to the next
/// agent's listeners: the answer to a SYN-ACK, sent again once.
const LATE_HANDSHAKES: Duration = Duration::from_millis(1500);
/// Time during which peers may begin flows on their sessions with the last agent. A busy session ends with its next flow.
/// A session that is idle for longer is unlikely to be used at the moment of its end.
pub(super) const LINGER: Duration = Duration::from_secs(3);

/// The lock on the pins. A successor also has its lock, which the last agent waits for, and its prepared programs.
pub(super) type Succession = (PinLock, Option<(SuccessorLock, PreparedPrograms)>);

/// Locks the pins of an agent that follows no other one. Returns an error while another agent has them.
pub(super) fn first(pin_path: &Path) -> Result<Succession, KernelError> {
    PinLock::try_acquire(pin_path).map(|pin_lock| (pin_lock, None))
}

/// Prepares to take over, with verified programs and certificates for this node's pods. Then waits until the agent that has
/// the pins releases them or exits. Calls `stands_by` once only that wait is left.
pub(super) async fn stand_by(
    config: &Config,
    pods_cgroup: &Path,
    (directory, identities): (&Watched<Directory>, &Identities),
    prepare: impl FnOnce() -> Result<PreparedPrograms, KernelError>,
    stands_by: impl FnOnce(),
) -> Result<Succession, KernelError> {
    match first(&config.pin_path) {
        Err(KernelError::Locked { .. }) => {}
        free => return free,
    }
    let prepared = prepare()?;
    let has_cgroup = |cgroup: &Path| pods_cgroup.join(cgroup).exists();
    certified(directory, identities, &config.node, has_cgroup).await;
    let path = config.pin_path.clone();
    let successor_lock = on_a_thread(move || SuccessorLock::acquire(&path)).await?;
    tracing::info!("another agent serves this node; standing by to take over from it");
    stands_by();
    let path = config.pin_path.clone();
    let pin_lock = on_a_thread(move || PinLock::acquire(&path)).await?;
    tracing::info!("taking over");
    Ok((pin_lock, Some((successor_lock, prepared))))
}

/// Waits until all pods of `node` that have a cgroup have certificates. A pod that is deleted meanwhile needs none. Pods that
/// never run are not waited for: anybody who may create pods can make thousands of them. Nor are pods whose identities the
/// issuer refuses while it issues others: no image would change that. Only changed pods are looked at.
async fn certified(
    directory: &Watched<Directory>,
    identities: &Identities,
    node: &str,
    has_cgroup: impl Fn(&Path) -> bool,
) {
    let (mut attempts, mut changes) = (identities.changes(), directory.subscribe());
    let runs =
        |workload: &Arc<Workload>| workload.protocol == Protocol::Tacit && has_cgroup(&workload.cgroup);
    let (mut seen, mut missing) = (Arc::new(Directory::default()), HashMap::new());
    loop {
        let known = directory.current();
        for WorkloadChange { before, now } in known.changes_on_node(&seen, node) {
            before.iter().for_each(|before| drop(missing.remove(&before.full_name())));
            missing.extend(now.filter(runs).map(|now| (now.full_name(), now)));
        }
        seen = known;
        // Requests all certificates. The identity manager logs failures and retries.
        missing.retain(|_, workload| identities.ready(&workload.identity).is_err());
        let is_refused = |workload: &Arc<Workload>| identities.is_refused(&workload.identity);
        if missing.is_empty() {
            return;
        }
        if identities.has_any() && missing.values().all(is_refused) {
            let pod = missing.keys().next().map_or("", String::as_str);
            tracing::warn!(
                pods = missing.len(),
                pod,
                "the issuer refuses the identities of pods; not waiting for their certificates"
            );
            return;
        }
        // Both senders outlive this wait, so neither channel closes.
        tokio::select! {
            _ = attempts.changed() => {}
            _ = changes.changed() => {}
        }
    }
}

/// The end of an agent.
pub(super) enum Ending {
    /// No agent takes over. The held lock keeps a successor from starting to.
    Alone(#[expect(dead_code, reason = "held, not used")] Option<SuccessorLock>),
    /// Another agent serves the pods and owns the kernel side.
    TakenOver(#[expect(dead_code, reason = "held, not used")] Option<SuccessorLock>),
}

/// Waits until an agent stands by, or for `limit` without one.
pub(super) async fn await_successor(pin_path: &Path, limit: Duration) -> Result<(), KernelError> {
    let begun = Instant::now();
    while SuccessorLock::try_acquire(pin_path)?.is_some() {
        if begun.elapsed() >= limit {
            return Ok(());
        }
        sleep(SUCCESSOR_POLL.min(limit)).await;
    }
    Ok(())
}

/// Hands over to the agent that stands by, if there is one. Calls `settle` first: after it this agent must not change the
/// kernel side.
pub(super) async fn hand_over(
    kernel: &Kernel,
    pin_path: &Path,
    settle: impl AsyncFnOnce(),
) -> Result<Ending, KernelError> {
    if let Some(lock) = SuccessorLock::try_acquire(pin_path)? {
        return Ok(Ending::Alone(Some(lock)));
    }
    tracing::info!("handing over to the agent that stands by");
    let begun = Instant::now();
    settle().await;
    kernel.programs().release();
    let path = pin_path.to_owned();
    let lock = timeout(TAKE_OVER_MAX, on_a_thread(move || SuccessorLock::acquire(&path))).await;
    // The successor exited before it took over, or has not begun to.
    if kernel.programs().reacquire() {
        tracing::warn!("no agent took over");
        return Ok(Ending::Alone(lock.ok().transpose()?));
    }
    let Ok(lock) = lock else {
        tracing::warn!(limit = ?TAKE_OVER_MAX, "the successor has not finished taking over within the limit; not waiting for it");
        return Ok(Ending::TakenOver(None));
    };
    tracing::info!(took = ?begun.elapsed(), "handed over");
    sleep(LATE_HANDSHAKES).await;
    lock.map(|lock| Ending::TakenOver(Some(lock)))
}

/// Runs a blocking call on a thread of its own. The process can exit while the thread still waits.
async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, KernelError> + Send + 'static,
) -> Result<T, KernelError> {
    let (sender, receiver) = oneshot::channel();
    thread::Builder::new()
        .name("tacit-succession".to_owned())
        // The receiver is gone when the process exits.
        .spawn(move || drop(sender.send(work())))
        .map_err(|source| KernelError::Thread { source })?;
    receiver.await.unwrap_or(Err(KernelError::Thread { source: std::io::ErrorKind::BrokenPipe.into() }))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tacit_core::{
        directory::AddressConflict,
        spiffe::{SpiffeId, TrustDomain},
    };
    use tacit_identity::{
        issuer::{EmbeddedIssuer, Issuer, LEAF_LIFETIME},
        istio::{IstioConfig, IstioIssuer},
    };
    use tacit_testing::Scratch;

    use super::*;

    #[tokio::test]
    async fn pods_that_never_run_and_a_pod_that_goes_are_not_waited_for() {
        let folder = Scratch::new();
        let domain = TrustDomain::parse("cluster.local").expect("valid");
        // The issuer's files are absent, so every attempt fails.
        let issuer = IstioIssuer::new(IstioConfig {
            address: "127.0.0.1:1".to_owned(),
            server_name: "127.0.0.1".to_owned(),
            root_file: folder.path().join("root.pem"),
            token_file: folder.path().join("token"),
            cluster_id: None,
            lifetime: Duration::from_secs(3600),
        });
        let identities = Identities::start(Issuer::Istio(issuer));
        let file = folder.path().join("directory.yaml");
        let pods = "workloads:\n\
                    - {name: web, namespace: shop, addresses: [10.77.1.2], node: a}\n\
                    - {name: dead, namespace: shop, addresses: [10.77.1.3], node: a}\n";
        fs::write(&file, pods).expect("written");
        let named = file.clone();
        let parse = move |text: &str| Directory::parse(text, &named, &domain);
        let directory = Watched::open(&file, parse).expect("read");
        let soon = Duration::from_secs(10);
        certified(&directory, &identities, "b", |_| true).await;
        certified(&directory, &identities, "a", |_| false).await;
        assert!(identities.certificates().is_empty(), "none is requested for pods that never run");
        let web = directory.current().named("shop", "web").expect("it is listed").cgroup.clone();
        let mut waiting = std::pin::pin!(certified(&directory, &identities, "a", |cgroup| *cgroup == *web));
        let refused = async {
            let mut attempts = identities.changes();
            attempts.changed().await
        };
        tokio::select! {
            () = &mut waiting => panic!("nobody has a certificate"),
            _ = refused => {}
        }
        let fresh = folder.path().join("fresh");
        fs::write(&fresh, "workloads: []\n").expect("written");
        fs::rename(&fresh, &file).expect("replaced");
        timeout(soon, waiting).await.expect("the pod is gone");
    }

    /// A static pod in a namespace without identities for such pods, for example, used to hold up every update of its node.
    #[tokio::test]
    async fn a_pod_whose_identity_is_refused_holds_up_no_successor_while_others_get_theirs() {
        let folder = Scratch::new();
        let [ours, other] =
            ["cluster.local", "other.local"].map(|name| TrustDomain::parse(name).expect("valid"));
        let issuer = EmbeddedIssuer::open(folder.path(), &ours, LEAF_LIFETIME).expect("a root");
        let identities = Identities::start(Issuer::Embedded(issuer));
        let file = folder.path().join("directory.yaml");
        let workload = |name: &str, last: u8| {
            format!("- {{name: {name}, namespace: shop, addresses: [10.77.1.{last}], node: a}}\n")
        };
        let named = file.clone();
        let parse = move |text: &str| {
            let mut directory = Directory::parse(text, &named, &ours)?;
            // The issuer has nothing for another trust domain.
            let refused = directory.named("shop", "static").cloned().expect("it is listed");
            let identity = SpiffeId::new(&other, "shop", "static").expect("valid");
            directory.insert(Workload { identity, ..(*refused).clone() }, AddressConflict::Replace);
            Ok(directory)
        };
        fs::write(&file, format!("workloads:\n{}", workload("static", 3))).expect("written");
        let directory = Watched::open(&file, parse).expect("read");
        let refused = directory.current().named("shop", "static").expect("it is listed").identity.clone();
        let mut waiting = std::pin::pin!(certified(&directory, &identities, "a", |_| true));
        let mut attempts = identities.changes();
        // An issuer that refuses all may be the wrong one, or this agent's token may be.
        while !identities.is_refused(&refused) {
            tokio::select! {
                () = &mut waiting => panic!("the agent has no certificate at all"),
                attempt = attempts.changed() => attempt.expect("attempts go on"),
            }
        }
        let fresh = folder.path().join("fresh");
        let both = format!("workloads:\n{}{}", workload("static", 3), workload("web", 2));
        fs::write(&fresh, both).expect("written");
        fs::rename(&fresh, &file).expect("replaced");
        timeout(Duration::from_secs(60), waiting).await.expect("the other pod has a certificate");
        assert!(identities.has_any() && identities.is_refused(&refused));
    }
}

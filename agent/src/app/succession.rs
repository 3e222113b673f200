//! One agent follows another on a node, and no connection notices.
//!
//! ```text
//! last   serves ───────────── SIGTERM ── gives up its claim ── serves on ──────── has the turn: no new flows ── drains
//! next   starts ── turn ── waits for the claim ─────────────── takes over ── all pods looked at: frees the turn ── serves
//! ```
//! The claim is the lock on the pins, the turn another one beside it: what an agent waits for ends with the process that it
//! waits for, however that ends. Steering and capture change from one agent's listeners to the other's in one map update
//! each, so at every moment there is one that accepts. Without a next agent there is no claim to give up early: the last
//! one drains and ends as if nobody ever followed.

use std::{
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tacit_core::directory::{Directory, Protocol, Workload};
use tacit_identity::manager::Identities;
use tacit_kernel::{Kernel, KernelError, PinLock, PreparedPrograms, SuccessorLock};
use tacit_sources::reload::Watched;
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};

use crate::config::Config;

/// How long the last agent serves on while the next one takes over: 25 ms, or 1.2 s on an emulated machine under load; there
/// 9.5 s when it finds the pinned maps changed and has to load the programs again. With `drainTimeout` it has to fit into the
/// time that a node gives an agent to end.
const TAKE_OVER_MAX: Duration = Duration::from_secs(10);
/// How long connections may come to the last agent's listeners that were on their way before they were told of the next
/// one's: the answer to a SYN-ACK, sent again once.
const ON_THEIR_WAY: Duration = Duration::from_millis(1500);
/// How long peers may begin flows on sessions that they have with the last agent. One that is busy ends with its next flow,
/// and one that was not used for so long will hardly be used in the very moment of its end.
pub(super) const LINGER: Duration = Duration::from_secs(3);

/// The right to the pins, and what an agent has that follows another one, which serves on until the turn is free.
pub(super) type Succession = (PinLock, Option<(SuccessorLock, PreparedPrograms)>);

/// The pins of no other agent; an error while one has them.
pub(super) fn first(pin_path: &Path) -> Result<Succession, KernelError> {
    PinLock::try_acquire(pin_path).map(|claim| (claim, None))
}

/// Has all that taking over needs, programs that this kernel has verified and certificates for this node's pods, and then waits
/// until the agent that has the pins gives them up or ends. `stands_by` is told when there is nothing else to wait for.
pub(super) async fn stand_by(
    config: &Config,
    directory: &Watched<Directory>,
    identities: &Identities,
    prepare: impl FnOnce() -> Result<PreparedPrograms, KernelError>,
    stands_by: impl FnOnce(),
) -> Result<Succession, KernelError> {
    match first(&config.pin_path) {
        Err(KernelError::Locked { .. }) => {}
        free => return free,
    }
    let prepared = prepare()?;
    certified(directory, identities, &config.node).await;
    let path = config.pin_path.clone();
    let turn = on_a_thread(move || SuccessorLock::acquire(&path)).await?;
    tracing::info!("another agent serves this node; standing by to take over from it");
    stands_by();
    let path = config.pin_path.clone();
    let claim = on_a_thread(move || PinLock::acquire(&path)).await?;
    tracing::info!("taking over");
    Ok((claim, Some((turn, prepared))))
}

/// Waits until all pods that `node` has have certificates. A pod may go meanwhile, and then nobody gets its certificate.
async fn certified(directory: &Watched<Directory>, identities: &Identities, node: &str) {
    let (mut attempts, mut changes) = (identities.changes(), directory.subscribe());
    loop {
        let known = directory.current();
        // All are asked for; failed attempts are logged and go on by themselves.
        let missing = |workload: &&Arc<Workload>| identities.ready(&workload.identity).is_err();
        let wanted = known.on_node(node).filter(|workload| workload.protocol == Protocol::Tacit);
        if wanted.filter(missing).count() == 0 {
            return;
        }
        // The senders are parts of what was given.
        tokio::select! {
            _ = attempts.changed() => {}
            _ = changes.changed() => {}
        }
    }
}

/// How an agent ends.
pub(super) enum Ending {
    /// Nobody takes over. The turn is held so that it stays so.
    Alone(#[expect(dead_code, reason = "held, not used")] Option<SuccessorLock>),
    /// Another agent serves the pods; nothing of the kernel side is this one's any more.
    TakenOver(#[expect(dead_code, reason = "held, not used")] Option<SuccessorLock>),
}

/// Lets the agent that stands by take over, if one does. `settle` is called before: from then on this agent must change
/// nothing on the kernel side.
pub(super) async fn hand_over(
    kernel: &Kernel,
    pin_path: &Path,
    settle: impl AsyncFnOnce(),
) -> Result<Ending, KernelError> {
    if let Some(turn) = SuccessorLock::try_acquire(pin_path)? {
        return Ok(Ending::Alone(Some(turn)));
    }
    tracing::info!("handing over to the agent that stands by");
    let begun = Instant::now();
    settle().await;
    kernel.programs().release();
    let path = pin_path.to_owned();
    let turn = timeout(TAKE_OVER_MAX, on_a_thread(move || SuccessorLock::acquire(&path))).await;
    // It gave up before it had taken over, or has not begun to.
    if kernel.programs().reacquire() {
        tracing::warn!("nobody took over");
        return Ok(Ending::Alone(turn.ok().transpose()?));
    }
    let Ok(turn) = turn else {
        tracing::warn!(limit = ?TAKE_OVER_MAX, "taking over takes long; not waiting for its end");
        return Ok(Ending::TakenOver(None));
    };
    tracing::info!(took = ?begun.elapsed(), "handed over");
    sleep(ON_THEIR_WAY).await;
    turn.map(|turn| Ending::TakenOver(Some(turn)))
}

/// Runs what blocks on a thread that nobody has to wait for when the process ends.
async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, KernelError> + Send + 'static,
) -> Result<T, KernelError> {
    let (tell, told) = oneshot::channel();
    thread::Builder::new()
        .name("tacit-succession".to_owned())
        // Nobody listens any more when the process ends.
        .spawn(move || drop(tell.send(work())))
        .map_err(|source| KernelError::Thread { source })?;
    told.await.unwrap_or(Err(KernelError::Thread { source: std::io::ErrorKind::BrokenPipe.into() }))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tacit_core::spiffe::TrustDomain;
    use tacit_identity::{
        issuer::Issuer,
        istio::{IstioConfig, IstioIssuer},
    };
    use tacit_testing::Scratch;

    use super::*;

    #[tokio::test]
    async fn a_pod_that_goes_meanwhile_is_not_waited_for() {
        let folder = Scratch::new();
        let domain = TrustDomain::parse("cluster.local").expect("valid");
        // Its files are absent, so that every attempt fails.
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
        let pod = "workloads: [{name: web, namespace: shop, addresses: [10.77.1.2], node: a}]\n";
        fs::write(&file, pod).expect("written");
        let named = file.clone();
        let parse = move |text: &str| Directory::parse(text, &named, &domain);
        let directory = Watched::open(&file, parse).expect("read");
        let soon = Duration::from_secs(10);
        certified(&directory, &identities, "b").await;
        let mut waiting = std::pin::pin!(certified(&directory, &identities, "a"));
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
}

//! The control tasks of an agent that serves: enrolment, upkeep, the heartbeat, the log of the kernel side.

use std::{collections::HashSet, io, sync::Arc, time::Duration};

use tacit_core::directory::Directory;
use tacit_kernel::{Kernel, KernelError, events, host};
use tokio::{
    sync::watch,
    task::{JoinSet, spawn_blocking},
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use super::node_addresses::node_addresses;
use crate::{
    app::report::Report,
    enrol::Enroller,
    mesh::Mesh,
    proxy::{Proxy, workers::vital},
    recheck::Rechecks,
    telemetry::status::UncoveredStatus,
};

/// Interval of reading the node's own addresses and of closing expired idle sessions.
const HOUSEKEEPING: Duration = Duration::from_secs(5);

/// Connections that come or go before memory that is left over is given back: that of their handshakes, some 30 KiB each, or all
/// that they had.
const MANY: usize = 1000;

/// Heartbeats within the time after which the kernel takes the agent for dead: a few may be late or lost.
const BEATS_WITHIN_TIMEOUT: u32 = 6;

/// The running tasks. Each method can be called more than once.
pub(super) struct Tasks {
    enrolment: JoinSet<io::Result<()>>,
    /// Ends enrolment after its current pass. A drain cancels it too.
    settle: CancellationToken,
    /// Housekeeping, the ranges of the mesh, and the kept state.
    upkeep: JoinSet<()>,
    heart: JoinSet<()>,
    kernel_log: JoinSet<()>,
    /// Decides again on live flows for as long as there are any.
    rechecks: JoinSet<()>,
    live: Arc<Rechecks>,
    mesh: Arc<Mesh>,
}

impl Tasks {
    pub(super) fn spawn(
        kernel: &Arc<Kernel>,
        proxy: &Arc<Proxy>,
        report: &Arc<Report>,
        (enroller, keeper): (Enroller, impl Future<Output = ()> + Send + 'static),
        heartbeat_timeout: Duration,
    ) -> Self {
        let settle = proxy.drain.stop.child_token();
        let snapshots = proxy.snapshots.clone();
        // Worker threads and their listeners count too.
        let failed = proxy.workers_failed().clone();
        let mut enrolment = JoinSet::new();
        let (enrols, enrolment_failed) = (enroller.run(settle.clone()), failed.clone());
        enrolment.spawn(async move { enrols.await.inspect_err(|_| enrolment_failed.cancel()) });
        let mut upkeep = JoinSet::new();
        upkeep.spawn(vital(failed.clone(), housekeeping(kernel.clone(), proxy.clone(), report.clone())));
        let mesh = snapshots.mesh.clone();
        upkeep.spawn(vital(failed.clone(), snapshots.mesh.keep(snapshots.directory)));
        upkeep.spawn(vital(failed.clone(), keeper));
        let mut heart = JoinSet::new();
        let mut kernel_log = JoinSet::new();
        let logged = kernel.clone();
        kernel_log.spawn(async move { events::forward(&logged).await });
        let mut rechecks = JoinSet::new();
        let follow = proxy
            .rechecks
            .clone()
            .follow(proxy.snapshots.directory.clone(), proxy.snapshots.policies.clone());
        rechecks.spawn(vital(failed.clone(), follow));
        if let Some(lists) = &proxy.snapshots.revocation {
            rechecks.spawn(vital(failed.clone(), follow_trust(proxy.clone(), lists.subscribe())));
        }
        for domain in &*proxy.snapshots.federation {
            rechecks.spawn(vital(failed.clone(), follow_trust(proxy.clone(), domain.roots.subscribe())));
        }
        let removals = proxy.snapshots.identities.root_removals();
        rechecks.spawn(vital(failed.clone(), follow_trust(proxy.clone(), removals)));
        rechecks.spawn(run_rechecks(proxy.rechecks.clone(), failed.clone()));
        heart.spawn(heartbeat(kernel.clone(), heartbeat_timeout, failed));
        Self { enrolment, settle, upkeep, heart, kernel_log, rechecks, live: proxy.rechecks.clone(), mesh }
    }

    /// Ends enrolment and upkeep. After that this agent changes only its heartbeat on the kernel side.
    pub(super) async fn settle(&mut self) {
        self.settle.cancel();
        self.upkeep.abort_all();
        let mesh = self.mesh.clone();
        if let Err(error) = spawn_blocking(move || mesh.end()).await {
            tracing::error!(%error, "the maps of the whole node may change once more while another agent takes over");
        }
        self.enrolment_ended().await;
    }

    /// Waits until enrolment has ended, which a drain or [`Tasks::settle`] has asked for.
    pub(super) async fn enrolment_ended(&mut self) {
        // An error of it was logged, and the agent ends anyway.
        while self.enrolment.join_next().await.is_some() {}
    }

    /// Stops the heartbeat. Waits for its end, so that no beat follows the removal of this agent's entry or the beats of
    /// the next agent.
    pub(super) async fn stop_heart(&mut self) {
        self.heart.shutdown().await;
    }

    /// Stops upkeep, the log of the kernel side and the heartbeat.
    pub(super) async fn stop(&mut self) {
        self.upkeep.abort_all();
        self.kernel_log.abort_all();
        self.live.close();
        self.rechecks.abort_all();
        self.stop_heart().await;
    }
}

/// Runs the thread that decides again on live flows. Cancels `failed` if there is no such thread any more.
async fn run_rechecks(rechecks: Arc<Rechecks>, failed: CancellationToken) {
    if let Err(error) = rechecks.run().await {
        tracing::error!(%error, "live flows are not decided on again when policy changes; restart the agent");
        failed.cancel();
    }
}

/// Ends flows and idle sessions whose peers are not trusted any more, for as long as revocation lists, the own roots, or those of a
/// federated domain, change.
async fn follow_trust<T>(proxy: Arc<Proxy>, mut input: watch::Receiver<T>) {
    loop {
        proxy.rechecks.trust_changed();
        proxy.sessions.close_untrusted();
        proxy.hbone.close_untrusted();
        if input.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Writes the heartbeat while the agent's tasks run and none of them has failed. An agent whose control tasks have failed
/// applies nothing any more, so the kernel treats it as dead. Deleted pins are made again, because otherwise the programs would
/// end with the agent.
async fn heartbeat(kernel: Arc<Kernel>, timeout: Duration, failed: CancellationToken) {
    let mut tick = interval(timeout / BEATS_WITHIN_TIMEOUT);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = failed.cancelled() => {
                tracing::error!("a task has failed: no more heartbeats, the kernel decides by mode; this agent ends, to be started again");
                return;
            }
        }
        if let Err(error) = kernel.maps.beat(timeout) {
            tracing::error!(%error, "no heartbeat: the kernel decides by mode alone");
        }
        let restored = kernel.programs().restore_pins();
        match restored {
            Ok(0) => {}
            Ok(pins) => tracing::warn!(pins, "pins were deleted under this agent, and are made again"),
            Err(error) => {
                tracing::error!(%error, "deleted pins cannot be made again: this agent's end would leave its pods uncovered")
            }
        }
    }
}

/// Keeps the node's addresses true, and sessions from staying beyond their time.
async fn housekeeping(kernel: Arc<Kernel>, proxy: Arc<Proxy>, report: Arc<Report>) {
    let mut tick = interval(HOUSEKEEPING);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut trimmed_at = 0;
    let mut told = UncoveredStatus::default();
    loop {
        tick.tick().await;
        let uncovered = report.uncovered();
        if uncovered != told && uncovered.example.is_some() {
            tracing::warn!("{uncovered}");
        }
        told = uncovered;
        let connections = proxy.drain.tasks.len();
        if connections.abs_diff(trimmed_at) > MANY {
            trimmed_at = connections;
            host::release_memory();
        }
        if let Err(error) = refresh_node(&kernel, &proxy.snapshots.directory.current()) {
            tracing::error!(%error, "the node's own addresses may be outdated: probes from new ones are refused under STRICT");
        }
        let enrolled: HashSet<(u64, u64)> =
            proxy.pods.load().pods.iter().map(|pod| (pod.cgroup, pod.netns.cookie())).collect();
        proxy.sessions.close_unused(|cgroup, netns| enrolled.contains(&(cgroup, netns)));
        proxy.hbone.close_unused(|cgroup, netns| enrolled.contains(&(cgroup, netns)));
    }
}

pub(super) fn refresh_node(kernel: &Kernel, directory: &Directory) -> Result<(), KernelError> {
    let listed = host::addresses().map_err(|e| KernelError::Map { map: "NODE", problem: e.to_string() })?;
    let sources = node_addresses(listed, directory);
    kernel.refresh_node_hardware()?;
    kernel.maps.set_node(&sources)
}

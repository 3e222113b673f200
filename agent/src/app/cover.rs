//! Covers the pods of the node before any source is asked: loads and pins the programs, with what is known without a source.
//!
//! | the pinned maps | what applies until the sources answer |
//! |---|---|
//! | of an earlier agent | what they hold, and the configuration |
//! | new, as after a reboot | the kept state and the configuration, see `node_state` |
//!
//! There is no heartbeat yet, so the kernel decides by mode alone.

use std::{net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use tacit_core::directory::Ranges;
use tacit_kernel::{Kernel, KernelError, PinLock, VerifierLog, cgroup::Cgroup, host};
use tokio::time::{MissedTickBehavior, interval};

use crate::{
    app::node_state::{Kept, NodeState, folder},
    config::Config,
    telemetry::status::NodeStateStatus,
};

/// Interval at which the node's addresses are read while the sources do not answer.
const NODE_ADDRESSES: Duration = Duration::from_secs(5);

/// The kernel side, and the ranges that apply without a source.
pub(super) struct Cover {
    pub(super) kernel: Arc<Kernel>,
    /// The ranges of new maps; `None` if an earlier agent filled them.
    new: Option<Ranges>,
}

impl Cover {
    /// Loads and attaches the programs, and fills their maps as far as no source is needed. Changes `status` accordingly.
    ///
    /// # Errors
    /// [`KernelError`].
    pub(super) fn open(
        config: &Config,
        pods_cgroup: &Cgroup,
        verifier_log: &VerifierLog,
        lock: PinLock,
        (kept, status): (&Kept, &mut NodeStateStatus),
    ) -> Result<Self, KernelError> {
        let kernel = Arc::new(Kernel::open(lock, pods_cgroup, verifier_log, None)?);
        let configured = config.captured_ranges();
        let new = match kernel.maps.default_mode()? {
            Some(mode) => {
                kernel.maps.extend_mesh(&configured, &[])?;
                kernel.maps.set_default_mode(mode.max(config.minimum_mode))?;
                "the pinned maps of an earlier agent".clone_into(&mut status.origin);
                None
            }
            None => {
                let initial = kept.initial(&configured, config.minimum_mode);
                kernel.maps.set_mesh(&initial.ranges)?;
                // The mode comes last: it puts the ranges in force.
                kernel.maps.set_default_mode(initial.mode)?;
                origin(kept).clone_into(&mut status.origin);
                let ranges = initial.ranges.iter().map(IpNet::to_string).collect::<Vec<_>>().join(" ");
                tracing::info!(mode = ?initial.mode, ranges, origin = status.origin, "in force until the sources answer");
                Some(Ranges::configured(&initial.ranges))
            }
        };
        kernel.maps.set_plaintext_destinations(&config.allow_clear)?;
        Ok(Self { kernel, new })
    }

    /// Keeps the node's addresses up to date while `work` waits for the sources.
    pub(super) async fn while_waiting<T>(&self, work: impl Future<Output = T>) -> T {
        let Some(ranges) = &self.new else { return work.await };
        let mut work = std::pin::pin!(work);
        let mut tick = interval(NODE_ADDRESSES);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                done = &mut work => return done,
                _ = tick.tick() => {}
            }
            if let Err(error) = set_node(&self.kernel, ranges) {
                tracing::error!(%error, "addresses of the node unknown: pods with the node's network are held");
            }
        }
    }
}

/// Tells the programs the node's addresses. Inside the mesh they may be a service's, which only a source knows.
fn set_node(kernel: &Kernel, ranges: &Ranges) -> Result<(), KernelError> {
    let listed = host::addresses().map_err(|e| KernelError::Map { map: "NODE", problem: e.to_string() })?;
    let is_own = |address: &IpAddr| host::is_probe_source(address) && !ranges.contains(*address);
    let own: Vec<IpAddr> = listed.into_iter().filter(is_own).collect();
    kernel.maps.set_node(&own)
}

/// Reads the kept state, and begins its status.
pub(super) fn kept_state(config: &Config) -> (Kept, NodeStateStatus) {
    let folder = folder(&config.state_path);
    let kept = NodeState::read(&folder);
    if let Kept::Unusable(problem) = &kept {
        tracing::error!(problem, "the state that was kept for a start after a reboot cannot be used");
    }
    let read_error = match &kept {
        Kept::Unusable(problem) => Some(problem.clone()),
        Kept::State(_) | Kept::Nothing => None,
    };
    let folder = folder.display().to_string();
    let origin = "another agent serves the node".to_owned();
    (kept, NodeStateStatus { folder, origin, read_error, write_error: None })
}

fn origin(kept: &Kept) -> &'static str {
    match kept {
        Kept::State(_) => "the kept state",
        Kept::Nothing => "the configuration, because no state was kept",
        Kept::Unusable(_) => "STRICT, because the kept state cannot be used",
    }
}

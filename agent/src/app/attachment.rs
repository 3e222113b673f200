//! Notices that the pods' cgroup is gone or another one, as after a change of the kubelet's cgroup driver or a new start of a node that
//! is a container. The programs stay attached to the old cgroup, and nothing of a pod below the new one is captured.
//!
//! The programs know the cgroup by its id, and are loaded anew for another one. So the process starts again. A cgroup only goes when it
//! has no processes, so no flow of a pod is lost then. If somebody detaches a program, all flows of the node are.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use tacit_kernel::{Kernel, cgroup};
use tokio::time::{MissedTickBehavior, interval};

use crate::{
    app::state::{Event, State},
    config::Config,
};

/// Interval of the looks. Each takes some 20 system calls.
const LOOK: Duration = Duration::from_millis(200);
/// Looks between two searches for another cgroup.
const SEARCH: u32 = 25;

/// The pods' cgroup that the agent has found at its start.
pub(super) struct Attachment {
    path: PathBuf,
    is_configured: bool,
}

impl Attachment {
    pub(super) fn new(config: &Config, pods_cgroup: &Path) -> Self {
        Self { path: pods_cgroup.to_owned(), is_configured: config.pods_cgroup.is_some() }
    }

    /// Waits until the programs are not attached to the pods' cgroup any more, and another one is there. `state` shows it meanwhile.
    pub(super) async fn lost(&self, kernel: &Kernel, state: &State) {
        let mut tick = interval(LOOK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looks = 0_u32;
        let mut was_lost = false;
        loop {
            tick.tick().await;
            let searches = looks.is_multiple_of(SEARCH);
            looks = looks.wrapping_add(1);
            let attached = kernel.programs().are_attached_to(&self.path);
            match attached {
                Ok(true) if !(was_lost || searches && self.has_moved()) => continue,
                Ok(_) => {}
                Err(error) => {
                    // Pins that were deleted are made again.
                    tracing::debug!(%error, "attachments are not known");
                    continue;
                }
            }
            if !was_lost {
                tracing::error!(
                    path = %self.path.display(),
                    "the pods' cgroup is gone or another one: nothing of any pod is captured until the programs are attached again"
                );
                state.apply(Event::Detached);
                was_lost = true;
            }
            if self.is_there() {
                return;
            }
        }
    }

    /// Returns true if the agent would find another cgroup now.
    pub(super) fn has_moved(&self) -> bool {
        !self.is_configured && cgroup::pods().is_ok_and(|found| found.path() != self.path)
    }

    /// Returns true if there is a cgroup to attach the programs to.
    fn is_there(&self) -> bool {
        if self.is_configured { self.path.exists() } else { cgroup::pods().is_ok() }
    }
}

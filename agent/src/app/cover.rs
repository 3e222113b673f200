//! Covers the pods of the node before any source is asked: loads and pins the programs, with what is known without a source.
//!
//! | the pinned maps | what applies until the sources answer |
//! |---|---|
//! | of an earlier agent | what they hold, and the configuration |
//! | new, as after a reboot | the kept state and the configuration, see `node_state` |
//!
//! There is no heartbeat yet, so the kernel decides by mode alone. The mode is the last thing that is written: before it the
//! kernel has the ranges and the node's own addresses. An address of the node can lie in the ranges of the mesh:
//!
//! | the pinned maps | an address of the node, inside the ranges, is the node's own |
//! |---|---|
//! | of an earlier agent | if that agent found so, which knew the services |
//! | new | unless a dummy interface has it: kube-proxy and node-local DNS put addresses of services there |

use std::{net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use tacit_core::policy::Mode;
use tacit_kernel::{
    Kernel, KernelError, PinLock, VerifierLog,
    cgroup::Cgroup,
    host::{self, InterfaceAddress},
};
use tokio::time::{MissedTickBehavior, interval};

use crate::{
    app::node_state::{Kept, NodeState, folder, ranges_under},
    config::Config,
    telemetry::status::NodeStateStatus,
};

/// Interval at which the node's addresses are read while the sources do not answer.
const NODE_ADDRESSES: Duration = Duration::from_secs(5);

/// The kernel side before a source has answered.
pub(super) struct Cover {
    pub(super) kernel: Arc<Kernel>,
    maps: Maps,
}

/// The origin of the pinned maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Maps {
    New,
    OfEarlierAgent,
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
        let maps = match kernel.maps.default_mode()? {
            Some(mode) => {
                let mode = mode.max(config.minimum_mode);
                let ranges =
                    if kernel.maps.count_mesh() == 0 { ranges_under(mode, configured) } else { configured };
                kernel.maps.extend_mesh(&ranges, &[])?;
                put_in_force(&kernel, Maps::OfEarlierAgent, mode)?;
                "the pinned maps of an earlier agent".clone_into(&mut status.origin);
                Maps::OfEarlierAgent
            }
            None => {
                let initial = kept.initial(&configured, config.minimum_mode);
                kernel.maps.set_mesh(&initial.ranges)?;
                put_in_force(&kernel, Maps::New, initial.mode)?;
                origin(kept).clone_into(&mut status.origin);
                let ranges = initial.ranges.iter().map(IpNet::to_string).collect::<Vec<_>>().join(" ");
                tracing::info!(mode = ?initial.mode, ranges, origin = status.origin, "in force until the sources answer");
                Maps::New
            }
        };
        kernel.maps.set_plaintext_destinations(&config.allow_clear)?;
        Ok(Self { kernel, maps })
    }

    /// Keeps the node's addresses up to date while `work` waits for the sources.
    pub(super) async fn while_waiting<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        let mut tick = interval(NODE_ADDRESSES);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                done = &mut work => return done,
                _ = tick.tick() => {}
            }
            set_node(&self.kernel, self.maps);
        }
    }
}

/// Puts the ranges that the kernel has in force, with `mode`. The node's addresses come first, or its own pods would be held.
fn put_in_force(kernel: &Kernel, maps: Maps, mode: Mode) -> Result<(), KernelError> {
    set_node(kernel, maps);
    kernel.maps.set_default_mode(mode)
}

/// Writes the node's addresses to the kernel. Without them the pods with the node's network are held.
fn set_node(kernel: &Kernel, maps: Maps) {
    let in_kernel = &kernel.maps;
    let is_own = |found: &InterfaceAddress| {
        is_own(found, maps, in_kernel.is_in_mesh(found.address), in_kernel.is_node(found.address))
    };
    let written = host::interface_addresses().map_err(|e| e.to_string()).and_then(|listed| {
        let own: Vec<IpAddr> =
            listed.iter().filter(|found| is_own(found)).map(|found| found.address).collect();
        in_kernel.set_node(&own).map_err(|e| e.to_string())
    });
    if let Err(error) = written {
        tracing::error!(error, "addresses of the node unknown: pods with the node's network are held");
    }
}

/// Returns true for an address that is the node's own, as far as that is known without a source.
fn is_own(found: &InterfaceAddress, maps: Maps, is_in_mesh: bool, was_own: bool) -> bool {
    let is_own_in_mesh = match maps {
        Maps::OfEarlierAgent => was_own,
        Maps::New => !found.is_of_dummy,
    };
    host::is_probe_source(&found.address) && (!is_in_mesh || is_own_in_mesh)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_the_node_inside_the_ranges_stays_the_nodes_own_unless_it_may_be_a_services() {
        let found = |text: &str, is_of_dummy| InterfaceAddress {
            address: text.parse().expect("an address"),
            is_of_dummy,
        };
        let (bridge, dummy) = (found("10.244.0.1", false), found("10.96.0.1", true));
        let (new, earlier) = (Maps::New, Maps::OfEarlierAgent);
        for (found, maps, is_in_mesh, was_own, expected) in [
            (&bridge, new, true, false, true),
            (&dummy, new, true, false, false),
            (&dummy, new, false, false, true),
            (&bridge, earlier, true, true, true),
            (&bridge, earlier, true, false, false),
            (&dummy, earlier, true, true, true),
            (&bridge, earlier, false, false, true),
        ] {
            assert_eq!(is_own(found, maps, is_in_mesh, was_own), expected, "{found:?} {maps:?} {is_in_mesh}");
        }
        assert!(
            !is_own(&found("127.0.0.1", false), new, false, true),
            "every namespace has loopback addresses"
        );
    }
}

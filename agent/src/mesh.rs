//! The ranges of the mesh as the kernel has them: what the directory knows of them, put into the kernel's map before
//! anybody here goes by it.
//!
//! New ranges are added to the map before others are removed, so no address of both is ever outside.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwap;
use ipnet::IpNet;
use tacit_core::{
    directory::{Directory, IpProtocol, NodeServices, Ranges},
    shares::ShareUse,
};
use tacit_kernel::{Kernel, KernelError, NodeServicePorts, PlaintextDestination};
use tacit_sources::reload::Watched;
use tokio::task::spawn_blocking;

/// The ranges in force.
pub struct Mesh {
    kernel: Arc<Kernel>,
    ranges: ArcSwap<Ranges>,
    /// The nodes and their services that the kernel has.
    nodes: Mutex<Nodes>,
    /// Destinations that take plaintext of STRICT pods.
    clear: Clear,
    tenure: Tenure,
}

/// The time in which the kernel's maps are this agent's to change: one change at a time, and none after its end.
#[derive(Debug, Default)]
struct Tenure(Mutex<Following>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Following {
    #[default]
    Directory,
    /// Another agent may take over.
    Nothing,
}

impl Tenure {
    /// Makes a change, unless the tenure has ended. A change that panics leaves the maps to the next one.
    fn change(&self, make: impl FnOnce()) {
        let following = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if *following == Following::Directory {
            make();
        }
    }

    /// Ends the tenure after the change that is under way.
    fn end(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Following::Nothing;
    }
}

/// Destinations that take plaintext of STRICT pods: those of `allowClear`, and the endpoints of those that are services. Another
/// program at the hooks may have translated a service before the guard sees the packet.
struct Clear {
    configured: Vec<PlaintextDestination>,
    written: Mutex<Vec<PlaintextDestination>>,
}

/// Most destinations that the kernel's table has room for.
const CLEAR_MAX: usize = tacit_abi::limits::CLEAR as usize;

impl Clear {
    fn wanted(&self, directory: &Directory) -> Vec<PlaintextDestination> {
        let mut all = self.configured.clone();
        // Each entry has its share, so that no service pushes out the endpoints of another.
        let share = CLEAR_MAX.saturating_sub(all.len()) / all.len().max(1);
        for PlaintextDestination { address, protocol } in &self.configured {
            let endpoints = directory.endpoints_behind(*address);
            if endpoints.len() > share {
                tracing::warn!(
                    service = %address,
                    endpoints = endpoints.len(),
                    share,
                    "a service of allowClear has more endpoints than its share: some are not reached as plaintext after a translation"
                );
            }
            let endpoints = endpoints.into_iter().take(share);
            all.extend(endpoints.map(|address| PlaintextDestination { address, protocol: *protocol }));
        }
        all
    }

    /// Writes the destinations if they have changed. What the kernel rejects is tried again with the next directory.
    fn follow(&self, kernel: &Kernel, directory: &Directory) -> Result<(), KernelError> {
        let wanted = self.wanted(directory);
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if *written != wanted {
            kernel.maps.set_plaintext_destinations(&wanted)?;
            *written = wanted;
        }
        Ok(())
    }
}

/// The nodes and their services that the kernel has.
#[derive(Default)]
struct Nodes {
    /// Their [`Directory::node_changes`] and [`Directory::conflict_changes`].
    written: Option<(u64, u64)>,
    not_applied: NodesNotApplied,
    /// Use of the share of load balancers' ports at nodes.
    usage: Option<ShareUse<String>>,
}

/// Why the kernel lacks nodes or services at nodes. Until it has them, what may be a service there is not sent as plaintext.
#[derive(Debug, Clone, Default)]
pub struct NodesNotApplied {
    /// Why it lacks addresses of nodes; `None` if it has all.
    pub addresses: Option<String>,
    /// Why it lacks ports of load balancers at nodes; `None` if it has all.
    pub ports: Option<String>,
}

impl Mesh {
    /// Puts the directory's ranges in force; others, of an agent before, go.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn start(
        kernel: Arc<Kernel>,
        directory: &Directory,
        allow_clear: &[PlaintextDestination],
    ) -> Result<Self, KernelError> {
        let ranges = Arc::clone(directory.ranges());
        let list: Vec<IpNet> = ranges.iter().copied().collect();
        kernel.maps.set_mesh(&list)?;
        let shown: Vec<String> = list.iter().map(ToString::to_string).collect();
        let (configured, detected) = (ranges.count_configured(), ranges.count_detected());
        tracing::info!(configured, detected, ranges = shown.join(" "), "ranges of the mesh");
        let nodes = Mutex::default();
        let clear = Clear { configured: allow_clear.to_vec(), written: Mutex::default() };
        let mesh = Self { kernel, ranges: ArcSwap::new(ranges), nodes, clear, tenure: Tenure::default() };
        mesh.clear.follow(&mesh.kernel, directory)?;
        mesh.follow_nodes(directory);
        Ok(mesh)
    }

    /// Writes the addresses of all nodes, at which services have node ports, and the ports of load balancers there. What does
    /// not fit fails closed; what the kernel rejects is tried again with the next directory.
    fn follow_nodes(&self, directory: &Directory) {
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let current = (directory.node_changes(), directory.conflict_changes());
        if nodes.written == Some(current) {
            return;
        }
        let maps = &self.kernel.maps;
        let mut is_rejected = false;
        let mut not_applied = |written: Result<(), KernelError>| {
            let error = written.err()?;
            tracing::error!(%error, "services at nodes are not all known: what may be one is not sent as plaintext by STRICT pods");
            is_rejected |= !matches!(error, KernelError::Full { .. });
            Some(error.to_string())
        };
        if nodes.written.is_none_or(|written| written.0 != current.0) {
            nodes.not_applied.addresses = not_applied(maps.set_cluster_nodes(directory.node_addresses()));
        }
        let services = NodeServices::divide(directory.node_services());
        nodes.not_applied.ports = not_applied(maps.set_node_services(&ports_of(&services)));
        nodes.usage = Some(services.usage);
        nodes.written = (!is_rejected).then_some(current);
    }

    /// Returns why the kernel lacks nodes or services at nodes.
    #[must_use]
    pub fn nodes_not_applied(&self) -> NodesNotApplied {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner).not_applied.clone()
    }

    /// Returns the use of the share of load balancers' ports at nodes.
    #[must_use]
    pub fn node_services_use(&self) -> Option<ShareUse<String>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner).usage.clone()
    }

    /// The ranges that the kernel has.
    #[must_use]
    pub fn ranges(&self) -> Arc<Ranges> {
        self.ranges.load_full()
    }

    /// Returns true if `address` is in a range of the mesh.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.ranges.load().contains(address)
    }

    /// Puts what the directory has found since in force. When the kernel refuses, all stays as it is, and is tried again
    /// when this is called again.
    pub fn follow(&self, directory: &Directory) {
        self.tenure.change(|| self.change(directory));
    }

    fn change(&self, directory: &Directory) {
        self.follow_nodes(directory);
        if let Err(error) = self.clear.follow(&self.kernel, directory) {
            tracing::error!(%error, "endpoints of allowClear are not all in force");
        }
        let (before, after) = (self.ranges.load_full(), directory.ranges());
        // A caller may come with a directory that is no longer the latest.
        if Arc::ptr_eq(&before, after) || after.generation() <= before.generation() {
            return;
        }
        let (new, gone) = (missing(&before, after), missing(after, &before));
        if let Err(error) = self.kernel.maps.extend_mesh(&new, &gone) {
            tracing::error!(%error, "detected ranges are not in force: traffic of this node's pods to them is plaintext");
            return;
        }
        let shown = |ranges: &[IpNet]| ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        tracing::info!(
            added = shown(&new),
            removed = shown(&gone),
            total = after.iter().count(),
            "the ranges of the mesh have changed"
        );
        self.ranges.store(Arc::clone(after));
    }

    /// Waits for a change that is under way, and makes no further one: the maps are the next agent's. A change runs on a thread that
    /// does not end with its task.
    pub fn end(&self) {
        self.tenure.end();
    }

    /// Follows the directory for as long as that changes. The kernel's map is written on a thread for blocking work.
    pub async fn keep(self: Arc<Self>, directory: Arc<Watched<Directory>>) {
        let mut changes = directory.subscribe();
        while changes.changed().await.is_ok() {
            let latest = Arc::clone(&changes.borrow_and_update());
            let mesh = Arc::clone(&self);
            if let Err(error) = spawn_blocking(move || mesh.follow(&latest)).await {
                tracing::error!(%error, "detected ranges are not in force: traffic of this node's pods to them is plaintext");
            }
        }
    }
}

/// Returns the ports as the kernel's tables have them.
fn ports_of(services: &NodeServices) -> NodeServicePorts {
    let number = |protocol: &IpProtocol| match protocol {
        IpProtocol::Tcp => tacit_abi::protocol::TCP,
        IpProtocol::Udp => tacit_abi::protocol::UDP,
    };
    let exact = services.exact.iter();
    let exact = exact.map(|(at, protocol)| PlaintextDestination { address: *at, protocol: number(protocol) });
    NodeServicePorts {
        exact: exact.collect(),
        anywhere: services.ports.iter().map(|(port, protocol)| (*port, number(protocol))).collect(),
        addresses: services.addresses.clone(),
    }
}

/// Ranges of `wanted` that `there` does not have as they are.
fn missing(there: &Ranges, wanted: &Ranges) -> Vec<IpNet> {
    let there: std::collections::HashSet<&IpNet> = there.iter().collect();
    wanted.iter().filter(|range| !there.contains(range)).copied().collect()
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, sync::mpsc, thread};

    use super::*;

    /// An agent that hands over used to be able to write maps that were the next agent's by then.
    #[test]
    fn a_change_under_way_ends_before_the_tenure_and_none_begins_after_it() {
        let tenure = Tenure::default();
        let count = Cell::new(0);
        tenure.change(|| {
            count.set(count.get() + 1);
            assert!(tenure.0.try_lock().is_err(), "the end has to wait for this change");
        });
        tenure.end();
        tenure.change(|| count.set(count.get() + 1));
        assert_eq!(count.get(), 1);
    }

    #[test]
    fn an_end_waits_for_the_change_of_another_thread() {
        let tenure = Tenure::default();
        let (begun, begins) = mpsc::channel();
        let (finish, finished) = mpsc::channel::<()>();
        let written = Mutex::new(0);
        thread::scope(|scope| {
            let tenure = &tenure;
            let written = &written;
            scope.spawn(move || {
                tenure.change(|| {
                    begun.send(()).expect("the test waits");
                    finished.recv().expect("the test goes on");
                    *written.lock().expect("nobody panics") = 1;
                });
            });
            begins.recv().expect("a change begins");
            let ending = scope.spawn(move || {
                tenure.end();
                *written.lock().expect("nobody panics")
            });
            finish.send(()).expect("the change waits");
            assert_eq!(ending.join().expect("it ends"), 1, "the change was complete at the end");
        });
    }

    #[test]
    fn a_change_that_panics_leaves_the_next_one_and_the_end_possible() {
        let tenure = Tenure::default();
        let panicked = thread::scope(|scope| scope.spawn(|| tenure.change(|| panic!("on purpose"))).join());
        assert!(panicked.is_err());
        let mut is_made = false;
        tenure.change(|| is_made = true);
        tenure.end();
        assert!(is_made);
    }
}

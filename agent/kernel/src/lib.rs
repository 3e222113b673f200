//! The kernel side as the agent sees it: load, attach and pin the programs, typed maps, sockets inside pods.
//!
//! The only crate of the agent that uses aya, libc and `unsafe`. Nothing here decides: callers say what holds, this crate
//! makes the kernel hold it. Every method is synchronous and short; none blocks on the network.
//!
//! | file | what |
//! |---|---|
//! | `cgroup` | where cgroup v2 is mounted, the pods' cgroup, a cgroup's id, level and processes |
//! | `netlink` | interfaces and connections of a namespace |
//! | `netns` | open, enter and name network namespaces |
//! | `clsact` | the guard's filter on kernels without tcx |
//! | `link` | the bpf(2) link commands that aya keeps private |
//! | `probe` | what the running kernel can do, by trying |
//! | `programs` | load, attach, pin, re-adopt |
//! | `pins` | the folder that keeps programs and maps alive |
//! | `verifier` | the verifier's verdict, and its log |
//! | `maps` | what each map is for, behind typed methods |
//! | `events` | the programs' log lines |
//! | `held` | the programs' records of held connections |
//! | `inject` | packets on a pod's loopback that answer a held connection |
//! | `socket` | listeners and outgoing sockets in a pod's namespace |
//! | `reset_sockets` | resets connections of a pod that no agent carries |
//! | `host` | the node's own addresses, its kernel's name, limits of this process |
#![deny(missing_docs)]

pub mod cgroup;
mod clsact;
pub mod events;
pub mod held;
mod hooks;
pub mod host;
pub mod inject;
mod link;
mod maps;
mod netlink;
pub mod netns;
#[cfg(test)]
mod object;
mod pins;
pub mod probe;
mod programs;
pub mod reset_sockets;
pub mod socket;
mod translation;
mod verifier;

use std::{
    io,
    net::TcpListener,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

pub use hooks::{HookProgram, connect_programs};
pub use maps::{
    ConnectReturn, DropCount, ExceptionCounter, KernelCounter, Maps, NodeServicePorts, PlaintextDestination,
    PlaintextEgress, PlaintextHandling, PodEntry,
};
pub use pins::{PinLock, SuccessorLock, uninstall};
pub use programs::{GuardedLink, HostEnd, PreparedPrograms, ProgramState, Programs, has_host_end};
pub use translation::rewrites_arrivals;
pub use verifier::VerifierLog;

/// Something the kernel would not do.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The kernel lacks what the agent cannot do without.
    #[error(transparent)]
    Unsupported(#[from] probe::Unsupported),
    /// The binary was built without its eBPF object.
    #[error("this binary holds no eBPF object: run `cargo xtask build-ebpf` and build it again")]
    NoObject,
    /// The pin path is not on a BPF file system.
    #[error("pinPath {path}: not on a BPF file system; mount one: mount -t bpf bpf /sys/fs/bpf")]
    NotBpffs {
        /// The configured path.
        path: PathBuf,
    },
    /// Another agent holds the pin path.
    #[error("pinPath {path}: another agent uses it; stop that agent or configure another path")]
    Locked {
        /// The configured path.
        path: PathBuf,
    },
    /// Pins of another, incompatible version.
    #[error(
        "pinPath {path}: holds state of another version ({found}); run `tacit uninstall` of that version first"
    )]
    OtherVersion {
        /// The configured path.
        path: PathBuf,
        /// Name of the folder found.
        found: String,
    },
    /// The pods' cgroup is not usable.
    #[error("podsCgroup {path}: {problem}")]
    Cgroup {
        /// The path asked for.
        path: PathBuf,
        /// The problem, with the remedy.
        problem: String,
    },
    /// The verifier or the loader refused the object or a program.
    #[error("kernel {release} refused program {program}: {problem}\n{log}")]
    Refused {
        /// Program name, or `object` when loading failed before.
        program: String,
        /// Running kernel's release.
        release: String,
        /// The error.
        problem: String,
        /// Last lines of the verifier's log, and where all of it is.
        log: String,
    },
    /// A program could not be attached.
    #[error("attach {program} to {target}: {problem}")]
    Attach {
        /// Program name.
        program: &'static str,
        /// The cgroup, network namespace or interface.
        target: String,
        /// The error.
        problem: String,
    },
    /// The pod's end of a link has an address that is another's.
    #[error(
        "interface {interface}: the pod's end has a hardware or link-local address of another pod or of the node; delete the pod"
    )]
    LinkAddress {
        /// Name of the host end.
        interface: String,
    },
    /// A map operation failed.
    #[error("map {map}: {problem}")]
    Map {
        /// Map name.
        map: &'static str,
        /// The error.
        problem: String,
    },
    /// A map has no room for all entries.
    #[error("map {map}: it holds {bound} entries, and {left_out} more are wanted")]
    Full {
        /// Map name.
        map: &'static str,
        /// Entries that the map holds.
        bound: usize,
        /// Entries that are left out.
        left_out: usize,
    },
    /// A pod needs more entries of a map than its share.
    #[error("map {map}: the pod needs {have} entries, its share has {bound}")]
    Share {
        /// Map name.
        map: &'static str,
        /// Entries that the pod needs.
        have: usize,
        /// Entries that a pod can have.
        bound: usize,
    },
    /// The listener whose packets are dropped could not be opened.
    #[error(
        "open the listener that discards, in a network namespace of its own: {0}; the agent needs CAP_SYS_ADMIN"
    )]
    Discarding(#[source] io::Error),
    /// No thread to wait on.
    #[error("a thread to wait for another agent: {source}")]
    Thread {
        /// The error.
        #[source]
        source: io::Error,
    },
    /// A file system operation failed.
    #[error("{what} {path}: {source}")]
    File {
        /// The operation.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
}

impl KernelError {
    /// Returns the exit code of the process for this error: 78 (`EX_CONFIG`) if no restart can help, else 1.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Unsupported(unsupported) => unsupported.exit_code(),
            _ => 1,
        }
    }

    fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File { what, path: path.to_owned(), source }
    }
}

/// The loaded kernel side. One for each agent; it holds the lock on the pin path.
pub struct Kernel {
    programs: Mutex<Programs>,
    /// Typed maps.
    pub maps: Maps,
    /// Id of the cgroup that this agent's sockets belong to.
    pub cgroup: u64,
    /// Held, not used.
    _discarding: TcpListener,
}

impl Kernel {
    /// Loads the programs, re-adopting pinned maps and links of an earlier run, and attaches them.
    ///
    /// With programs `prepared` while another agent had the pins, that one may still be there; else the sockets of earlier
    /// agents are no longer an agent's.
    ///
    /// # Errors
    /// [`KernelError`]; nothing new stays attached or pinned then, what was there before stays.
    pub fn open(
        pin_lock: PinLock,
        pods_cgroup: &cgroup::Cgroup,
        log: &VerifierLog,
        prepared: Option<PreparedPrograms>,
    ) -> Result<Self, KernelError> {
        let still_there = prepared.is_some();
        let mut programs = Programs::load(pin_lock, pods_cgroup, log, prepared)?;
        let maps = Maps::take(&mut programs)?;
        let cgroup = cgroup::Cgroup::of_self()?.id();
        maps.set_agent(cgroup, still_there)?;
        let discarding = socket::discarding().map_err(KernelError::Discarding)?;
        maps.set_discarding(&discarding)?;
        Ok(Self { programs: Mutex::new(programs), maps, cgroup, _discarding: discarding })
    }

    /// Loads the programs while another agent has the pins, for [`Kernel::open`] to attach. Changes nothing.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn prepare(
        pin_path: &Path,
        pods_cgroup: &cgroup::Cgroup,
        log: &VerifierLog,
    ) -> Result<PreparedPrograms, KernelError> {
        PreparedPrograms::load(pin_path, pods_cgroup, log)
    }

    /// Writes the hardware addresses of the node's interfaces to the programs' map.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn refresh_node_hardware(&self) -> Result<(), KernelError> {
        let problem = |e: io::Error| KernelError::Map { map: "NODE_HARDWARE", problem: e.to_string() };
        self.maps.set_node_hardware(&programs::node_hardware().map_err(problem)?)
    }

    /// Programs and their links. Held for a few system calls, never across an await.
    pub fn programs(&self) -> MutexGuard<'_, Programs> {
        // A panic meanwhile leaves descriptors and paths as they were.
        self.programs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

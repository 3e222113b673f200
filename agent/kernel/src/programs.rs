//! Load, attach and pin the programs; adopt those of an earlier agent without a gap.
//!
//! ```text
//! <pinPath>/maps-v8/<MAP>            every map, by name; v8 is the ABI's version
//! <pinPath>/links/<program>          the programs at the pods' cgroup
//! <pinPath>/links/steer-<cgroup id>  the steering program in one pod's network namespace
//! <pinPath>/links/guard-<cgroup id>-<interface>  the guard on the host end of one pod's link, for frames from the pod
//! <pinPath>/links/arrival-<cgroup id>-<interface>  the same, for frames towards the pod
//! <pinPath>/next                     empty; locked by who takes over next
//! ```
//! All programs are verified before the first is attached. A pinned link that still has the right target is kept and its
//! program swapped atomically; any other is replaced. The link at the agent's own cgroup is not pinned: it only
//! serves connections that the agent makes.

use std::{
    fs::File,
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::MapInfo,
    programs::{
        CgroupAttachMode, Program, ProgramError, SockOps,
        links::{FdLink, LinkError},
    },
};
use aya_log::EbpfLogger;
use tacit_abi::{ABI_VERSION, Settings};
use tacit_core::error_chain::format_chain;

use super::{
    KernelError, VerifierLog,
    cgroup::Cgroup,
    link,
    netns::{self, Netns},
    pins::{self, PinLock, Pins},
    probe,
    verifier::{refused, verify},
};

pub(super) static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tacit-ebpf.o"));

const STEER: &str = "steer";
const ESTABLISHED: &str = "established";

/// Maps that outlive the agent.
pub(super) const MAPS: [&str; 28] = [
    "STATE",
    "AGENTS",
    "CLEAR",
    "LINKS",
    "NODE_HARDWARE",
    "NODE_FLOWS",
    "ANSWERS",
    "DROPS",
    "PODS",
    "STEERED",
    "PORT_MODES",
    "MESH",
    "NODE",
    "CLUSTER_NODES",
    "NODE_SERVICES",
    "NODE_SERVICE_PORTS",
    "NODE_TABLES",
    "LISTENERS",
    "CAPTURERS",
    "DISCARD",
    "RECENT",
    "NAMES",
    "SILENCES",
    "CAPTURED",
    "DIALLED",
    "PENDING",
    "COUNTERS",
    "EXCEPTIONS",
];

mod in_force;
mod link_guard;

use in_force::CGROUP_PROGRAMS;
pub(super) use link_guard::node_hardware;
use link_guard::{GUARD_ARRIVAL, GUARD_LINK};
pub use link_guard::{GuardedLink, HostEnd, has_host_end};

/// One attached program, for the operator.
#[derive(Debug, Clone)]
pub struct ProgramState {
    /// Program name.
    pub name: String,
    /// Cgroup path or network namespace.
    pub attached_to: String,
    /// The kernel's program id.
    pub id: u32,
    /// The path of its pinned link.
    pub pinned: Option<PathBuf>,
}

/// The loaded programs and the folder that pins them.
pub struct Programs {
    ebpf: Ebpf,
    pins: Pins,
    attached: Vec<ProgramState>,
    /// Id of the pods' cgroup that the programs know.
    pods_cgroup: u64,
    /// All programs at the pods' cgroup were attached before this agent.
    were_attached: bool,
}

/// Programs that this kernel has verified while another agent has the pins. Nothing is attached.
pub struct PreparedPrograms {
    ebpf: Ebpf,
    /// Of the pinned maps that they use; `None` when they have maps of their own.
    map_ids: Option<Vec<u32>>,
    /// Id of the pods' cgroup that they know.
    pods_cgroup: u64,
}

impl PreparedPrograms {
    pub(super) fn load(pin_path: &Path, pods: &Cgroup, log: &VerifierLog) -> Result<Self, KernelError> {
        pins::check_version(pin_path)?;
        let before = pinned_map_ids(pin_path);
        // Without all maps there, loading would pin new ones, which is for the agent that has the pins.
        let ebpf = load_verified(before.is_some().then_some(pin_path), pods, log)?;
        let map_ids = before.filter(|before| is_pinned(pin_path, before));
        Ok(Self { ebpf, map_ids, pods_cgroup: pods.id() })
    }

    /// The programs, if they use the maps that are pinned now, and know the cgroup `pods`.
    fn still_fit(self, pin_path: &Path, pods: &Cgroup) -> Option<Ebpf> {
        let fits = self.map_ids.is_some_and(|ids| is_pinned(pin_path, &ids)) && self.pods_cgroup == pods.id();
        if !fits {
            tracing::info!(
                "the pinned maps or the pods' cgroup have changed since the programs were loaded; loading them again"
            );
        }
        fits.then_some(self.ebpf)
    }
}

/// The kernel's ids of all [`MAPS`], which it gives once; `None` unless all are pinned.
fn pinned_map_ids(pin_path: &Path) -> Option<Vec<u32>> {
    let folder = pins::maps_folder(pin_path);
    MAPS.iter().map(|name| MapInfo::from_pin(folder.join(name)).ok().map(|info| info.id())).collect()
}

fn is_pinned(pin_path: &Path, map_ids: &[u32]) -> bool {
    pinned_map_ids(pin_path).is_some_and(|now| now == map_ids)
}

impl Programs {
    pub(super) fn load(
        pin_lock: PinLock,
        pods: &Cgroup,
        log: &VerifierLog,
        prepared: Option<PreparedPrograms>,
    ) -> Result<Self, KernelError> {
        let pins = Pins::open(pin_lock)?;
        // It may have been made anew while another agent had the pins.
        let pods = &Cgroup::open(pods.path())?;
        let (maps, links) = (pins.maps()?, pins.links()?);
        let prepared = prepared.and_then(|prepared| prepared.still_fit(pins.root(), pods));
        let ebpf = match prepared.map_or_else(|| load_verified(Some(pins.root()), pods, log), Ok) {
            Ok(ebpf) => ebpf,
            Err(error) => {
                pins.remove_maps_but(&maps);
                return Err(error);
            }
        };
        let mut programs =
            Self { ebpf, pins, attached: Vec::new(), pods_cgroup: pods.id(), were_attached: true };
        if let Err(error) = programs.attach_all(pods) {
            for (name, _) in programs.pins.links()?.iter().filter(|l| !links.contains(l)) {
                programs.pins.remove_link(name);
            }
            programs.pins.remove_maps_but(&maps);
            return Err(error);
        }
        for (_, path) in programs.pins.maps()? {
            programs.pins.hold(&path).map_err(KernelError::file("open", &path))?;
        }
        Ok(programs)
    }

    /// The programs' own log lines. `None` when the log cannot be read: it is not worth the agent's life.
    pub(super) fn take_log(&mut self) -> Option<EbpfLogger<&'static dyn log::Log>> {
        EbpfLogger::init(&mut self.ebpf)
            .inspect_err(
                |error| tracing::warn!(%error, "no log lines from the kernel side; its counters still tell"),
            )
            .ok()
    }

    pub(super) fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    fn attach_all(&mut self, pods: &Cgroup) -> Result<(), KernelError> {
        let target = File::open(pods.path()).map_err(KernelError::file("open", pods.path()))?;
        for (name, _) in CGROUP_PROGRAMS {
            let shown = pods.path().display().to_string();
            let id = match self.adopt(name, name, pods.id())? {
                Some(id) => id,
                None => {
                    self.were_attached = false;
                    self.attach(name, name, &shown, &target)?
                }
            };
            let pinned = Some(self.pins.link(name));
            self.attached.push(ProgramState { name: name.to_owned(), attached_to: shown, id, pinned });
        }
        self.attach_to_self(pods)
    }

    /// The agent's own dials must be named too, see `established`; in Kubernetes the agent is below the pods' cgroup
    /// itself.
    fn attach_to_self(&mut self, pods: &Cgroup) -> Result<(), KernelError> {
        let own = Cgroup::of_self()?;
        if own.is_within(pods) {
            return Ok(());
        }
        let target = File::open(own.path()).map_err(KernelError::file("open", own.path()))?;
        let shown = own.path().display().to_string();
        let failed =
            |e: String| KernelError::Attach { program: ESTABLISHED, target: shown.clone(), problem: e };
        let program = self.sock_ops(ESTABLISHED).map_err(|e| failed(e.to_string()))?;
        program.attach(&target, CgroupAttachMode::Single).map_err(|e| failed(format_chain(&e)))?;
        let id = program.info().map_err(|e| failed(e.to_string()))?.id();
        self.attached.push(ProgramState {
            name: ESTABLISHED.to_owned(),
            attached_to: shown,
            id,
            pinned: None,
        });
        Ok(())
    }

    /// Steers inbound connections in a pod's namespace; idempotent, and atomic when it was steered before.
    ///
    /// # Errors
    /// [`KernelError::Attach`].
    pub fn steer(&mut self, pod: u64, netns: &Netns) -> Result<(), KernelError> {
        let pin = steer_pin(pod);
        if self.adopt(STEER, &pin, netns.inode() & u64::from(u32::MAX))?.is_none() {
            self.attach(STEER, &pin, &format!("netns {}", netns.inode()), netns.file())?;
        }
        Ok(())
    }

    /// Makes pins again that were deleted; returns how many.
    ///
    /// # Errors
    /// [`KernelError::File`]; what could be restored is.
    pub fn restore_pins(&mut self) -> Result<usize, KernelError> {
        self.pins.restore()
    }

    /// Lets another agent have the programs, the pins and all that follows from them.
    pub fn release(&mut self) {
        self.pins.release();
    }

    /// Takes back what was given up; false when another agent has it.
    pub fn reacquire(&mut self) -> bool {
        self.pins.reacquire()
    }

    /// Ends the steering in a pod's namespace.
    pub fn unsteer(&mut self, pod: u64) {
        self.pins.remove_link(&steer_pin(pod));
    }

    /// Pods whose namespaces are steered, by cgroup id; after a restart also those that are gone.
    ///
    /// # Errors
    /// Fails if the pins cannot be read.
    pub fn steered(&self) -> Result<Vec<u64>, KernelError> {
        let links = self.pins.links()?;
        Ok(links.iter().filter_map(|(name, _)| name.strip_prefix("steer-")?.parse().ok()).collect())
    }

    /// All attached programs.
    #[must_use]
    pub fn states(&self) -> Vec<ProgramState> {
        let mut states = self.attached.clone();
        for (name, path) in self.pins.links().unwrap_or_default() {
            let (name, place) = match name.split_once('-') {
                Some(("steer", _)) => (STEER, "netns"),
                Some(("guard", _)) => (GUARD_LINK, "interface"),
                Some(("arrival", _)) => (GUARD_ARRIVAL, "interface"),
                _ => continue,
            };
            let Ok(info) = link::open_pin(&path).and_then(|fd| link::info(fd.as_fd())) else { continue };
            states.push(ProgramState {
                name: name.to_owned(),
                attached_to: format!("{place} {}", info.target()),
                id: info.program_id,
                pinned: Some(path),
            });
        }
        states
    }

    /// Swaps the program of a pinned link that is attached to `target`; `None` when there is no such link.
    fn adopt(&mut self, program: &'static str, pin: &str, target: u64) -> Result<Option<u32>, KernelError> {
        let path = self.pins.link(pin);
        if !path.exists() {
            return Ok(None);
        }
        let failed = |e: io::Error| KernelError::Attach {
            program,
            target: format!("the pinned link {}", path.display()),
            problem: format!("{e}; if this persists, run `tacit uninstall` and start again"),
        };
        let link = link::open_pin(&path).map_err(failed)?;
        self.pins.hold(&path).map_err(failed)?;
        if link::info(link.as_fd()).map_err(failed)?.target() != target {
            self.pins.remove_link(pin);
            return Ok(None);
        }
        let new = self.ebpf.program(program).map(Program::fd);
        let Some(Ok(new)) = new else {
            return Err(failed(io::Error::other("program is not loaded")));
        };
        link::update(link.as_fd(), new.as_fd()).map_err(failed)?;
        Ok(Some(link::info(link.as_fd()).map_err(failed)?.program_id))
    }

    /// Attaches and pins; returns the program's id.
    fn attach(
        &mut self,
        program: &'static str,
        pin: &str,
        shown: &str,
        target: &File,
    ) -> Result<u32, KernelError> {
        let failed = |problem: String| KernelError::Attach { program, target: shown.to_owned(), problem };
        let path = self.pins.link(pin);
        let link = self.link_to(program, target).map_err(|e| failed(format_chain(&e)))?;
        link.pin(&path).map_err(|e| failed(format!("pin {}: {e}", path.display())))?;
        self.pins.hold(&path).map_err(|e| failed(e.to_string()))?;
        let link = link::open_pin(&path).map_err(|e| failed(e.to_string()))?;
        Ok(link::info(link.as_fd()).map_err(|e| failed(e.to_string()))?.program_id)
    }

    fn link_to(&mut self, name: &str, target: &File) -> Result<FdLink, ProgramError> {
        let wrong = |_: LinkError| ProgramError::UnexpectedProgramType;
        match self.ebpf.program_mut(name) {
            Some(Program::CgroupSockAddr(p)) => {
                let id = p.attach(target, CgroupAttachMode::Single)?;
                p.take_link(id)?.try_into().map_err(wrong)
            }
            Some(Program::SockOps(p)) => {
                let id = p.attach(target, CgroupAttachMode::Single)?;
                p.take_link(id)?.try_into().map_err(wrong)
            }
            Some(Program::CgroupSkb(p)) => {
                let way = p.expected_attach_type().ok_or(ProgramError::UnexpectedProgramType)?;
                let id = p.attach(target, way, CgroupAttachMode::Single)?;
                p.take_link(id)?.try_into().map_err(wrong)
            }
            Some(Program::SkLookup(p)) => {
                let id = p.attach(target)?;
                Ok(p.take_link(id)?.into())
            }
            _ => Err(ProgramError::UnexpectedProgramType),
        }
    }

    fn sock_ops(&mut self, name: &str) -> Result<&mut SockOps, ProgramError> {
        self.ebpf.program_mut(name).ok_or(ProgramError::UnexpectedProgramType)?.try_into()
    }
}

fn steer_pin(pod: u64) -> String {
    format!("steer-{pod}")
}

/// With maps of its own unless there is a `pin_path`.
fn load_verified(pin_path: Option<&Path>, pods: &Cgroup, log: &VerifierLog) -> Result<Ebpf, KernelError> {
    if OBJECT.is_empty() {
        return Err(KernelError::NoObject);
    }
    let mut ebpf = load_object(pin_path, pods)?;
    for name in CGROUP_PROGRAMS.into_iter().map(|(name, _)| name).chain([STEER, GUARD_LINK, GUARD_ARRIVAL]) {
        verify(&mut ebpf, name, log)?;
    }
    Ok(ebpf)
}

fn load_object(pin_path: Option<&Path>, pods: &Cgroup) -> Result<Ebpf, KernelError> {
    // The agent has the node's network.
    let node_netns_cookie = netns::netns_cookie().map_err(|e| KernelError::Map {
        map: "SETTINGS",
        problem: format!("cookie of the namespace: {e}"),
    })?;
    let settings = Settings {
        pods_level: pods.level()?,
        abi_version: ABI_VERSION,
        pods_cgroup: pods.id(),
        has_set_retval: u32::from(probe::has_set_retval()),
        has_tcp6_sock: u32::from(probe::has_tcp6_sock()),
        node_netns_cookie,
    };
    let mut loader = EbpfLoader::new();
    loader.override_global("SETTINGS", &settings, true);
    if let Some(folder) = pin_path.map(pins::maps_folder) {
        for name in MAPS {
            loader.map_pin_path(name, folder.join(name));
        }
    }
    loader.load(OBJECT).map_err(|error| refused("object", &error, String::new()))
}

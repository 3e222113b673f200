//! Load, attach and pin the programs; adopt those of an earlier agent without a gap.
//!
//! ```text
//! <pinPath>/maps-v1/<MAP>            every map, by name; v1 is the ABI's version
//! <pinPath>/links/<program>          the programs at the pods' cgroup
//! <pinPath>/links/steer-<cgroup id>  the steering program in one pod's network namespace
//! ```
//! All programs are verified before the first is attached. A pinned link whose target is still ours is kept and its
//! program swapped atomically; any other is replaced. The link at the agent's own cgroup is not pinned: it only
//! serves connections that the agent makes.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    programs::{
        CgroupAttachMode, CgroupSockAddr, Program, ProgramError, SkLookup, SockOps,
        links::{FdLink, LinkError, PinnedLink},
    },
};
use aya_log::EbpfLogger;
use nix::{
    fcntl::{Flock, FlockArg},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use tacit_abi::{ABI_VERSION, Settings};

use super::{KernelError, cgroup::Cgroup, link, netns::Netns, node};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tacit-ebpf.o"));

/// Programs at the pods' cgroup, in the order they are attached: whoever is told names must be able to find them.
const CGROUP_PROGRAMS: [&str; 7] =
    ["getpeername4", "getpeername6", "getsockname4", "getsockname6", "established", "connect4", "connect6"];
const STEER: &str = "steer";
const ESTABLISHED: &str = "established";

/// Maps that outlive the agent.
pub(super) const MAPS: [&str; 10] = [
    "PODS",
    "STEERED",
    "PORT_MODES",
    "MESH",
    "NODE",
    "LISTENERS",
    "NAMES",
    "CAPTURED",
    "DIALLED",
    "COUNTERS",
];

/// Lines of a verifier log that an error shows; the cause stands at its end.
const LOG_TAIL_LINES: usize = 12;

/// One attached program, for the operator.
#[derive(Debug, Clone)]
pub struct ProgramState {
    /// Program name.
    pub name: String,
    /// Cgroup path or network namespace.
    pub attached_to: String,
    /// The kernel's program id.
    pub id: u32,
    /// Where its link is pinned.
    pub pinned: Option<PathBuf>,
}

/// The loaded programs and the folder that pins them.
pub struct Programs {
    ebpf: Ebpf,
    pins: Pins,
    attached: Vec<ProgramState>,
}

impl Programs {
    pub(super) fn load(pin_path: &Path, pods: &Cgroup) -> Result<Self, KernelError> {
        if OBJECT.is_empty() {
            return Err(KernelError::NoObject);
        }
        let pins = Pins::open(pin_path)?;
        let mut ebpf = load_object(&pins, pods)?;
        for name in CGROUP_PROGRAMS.into_iter().chain([STEER]) {
            verify(&mut ebpf, name)?;
        }
        let mut programs = Self { ebpf, pins, attached: Vec::new() };
        let before = programs.pins.links()?;
        if let Err(error) = programs.attach_all(pods) {
            for (name, _) in programs.pins.links()?.iter().filter(|l| !before.contains(l)) {
                programs.pins.remove_link(name);
            }
            return Err(error);
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
        for name in CGROUP_PROGRAMS {
            let shown = pods.path().display().to_string();
            let id = match self.adopt(name, name, pods.id())? {
                Some(id) => id,
                None => self.attach(name, name, &shown, &target)?,
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
        program.attach(&target, CgroupAttachMode::Single).map_err(|e| failed(describe(&e)))?;
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

    /// Ends the steering in a pod's namespace.
    pub fn unsteer(&mut self, pod: u64) {
        self.pins.remove_link(&steer_pin(pod));
    }

    /// Pods whose namespaces are steered, by cgroup id; after a restart also those that are gone.
    ///
    /// # Errors
    /// When the pins cannot be read.
    pub fn steered(&self) -> Result<Vec<u64>, KernelError> {
        let links = self.pins.links()?;
        Ok(links.iter().filter_map(|(name, _)| name.strip_prefix("steer-")?.parse().ok()).collect())
    }

    /// All attached programs.
    #[must_use]
    pub fn states(&self) -> Vec<ProgramState> {
        let mut states = self.attached.clone();
        for (name, path) in self.pins.links().unwrap_or_default() {
            if !name.starts_with("steer-") {
                continue;
            }
            let Ok(info) = link::open_pin(&path).and_then(|fd| link::info(fd.as_fd())) else { continue };
            states.push(ProgramState {
                name: STEER.to_owned(),
                attached_to: format!("netns {}", info.target()),
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
        let link = self.link_to(program, target).map_err(|e| failed(describe(&e)))?;
        link.pin(&path).map_err(|e| failed(format!("pin {}: {e}", path.display())))?;
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

fn load_object(pins: &Pins, pods: &Cgroup) -> Result<Ebpf, KernelError> {
    let settings = Settings { pods_level: pods.level(), abi_version: ABI_VERSION };
    let paths: Vec<(&str, PathBuf)> = MAPS.iter().map(|name| (*name, pins.map(name))).collect();
    let mut loader = EbpfLoader::new();
    loader.override_global("SETTINGS", &settings, true);
    for (name, path) in &paths {
        loader.map_pin_path(name, path.as_path());
    }
    loader.load(OBJECT).map_err(|error| refused("object", &error, String::new()))
}

/// Has the verifier check one program.
fn verify(ebpf: &mut Ebpf, name: &'static str) -> Result<(), KernelError> {
    let result = match ebpf.program_mut(name) {
        Some(Program::CgroupSockAddr(p)) => CgroupSockAddr::load(p),
        Some(Program::SockOps(p)) => SockOps::load(p),
        Some(Program::SkLookup(p)) => SkLookup::load(p),
        _ => Err(ProgramError::UnexpectedProgramType),
    };
    result.map_err(|error| match &error {
        ProgramError::LoadError { io_error, verifier_log } => {
            refused(name, io_error, tail(&verifier_log.to_string()))
        }
        other => refused(name, other, String::new()),
    })
}

fn refused(program: &str, problem: &dyn std::error::Error, log: String) -> KernelError {
    KernelError::Refused {
        program: program.to_owned(),
        release: node::kernel_release(),
        problem: describe(problem),
        log,
    }
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().filter(|l| !l.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
}

/// An error with its causes: aya's outermost texts name the call only.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// The folder of pins, locked for one agent.
struct Pins {
    root: PathBuf,
    _lock: Flock<File>,
}

impl Pins {
    fn open(root: &Path) -> Result<Self, KernelError> {
        let parent = root.ancestors().find(|p| p.exists()).unwrap_or(root);
        let on_bpffs = statfs(parent).is_ok_and(|s| s.filesystem_type() == BPF_FS_MAGIC);
        if !on_bpffs {
            return Err(KernelError::NotBpffs { path: root.to_owned() });
        }
        fs::create_dir_all(root).map_err(KernelError::file("create", root))?;
        let folder = File::open(root).map_err(KernelError::file("open", root))?;
        let lock = Flock::lock(folder, FlockArg::LockExclusiveNonblock)
            .map_err(|_| KernelError::Locked { path: root.to_owned() })?;
        let pins = Self { root: root.to_owned(), _lock: lock };
        pins.check_version()?;
        for folder in [pins.maps_folder(), pins.links_folder()] {
            fs::create_dir_all(&folder).map_err(KernelError::file("create", &folder))?;
        }
        Ok(pins)
    }

    fn check_version(&self) -> Result<(), KernelError> {
        let ours = maps_folder_name();
        for entry in
            fs::read_dir(&self.root).map_err(KernelError::file("read", &self.root))?.filter_map(Result::ok)
        {
            let found = entry.file_name().to_string_lossy().into_owned();
            if found.starts_with("maps-") && found != ours {
                return Err(KernelError::OtherVersion { path: self.root.clone(), found });
            }
        }
        Ok(())
    }

    fn maps_folder(&self) -> PathBuf {
        self.root.join(maps_folder_name())
    }

    fn links_folder(&self) -> PathBuf {
        self.root.join("links")
    }

    fn map(&self, name: &str) -> PathBuf {
        self.maps_folder().join(name)
    }

    fn link(&self, name: &str) -> PathBuf {
        self.links_folder().join(name)
    }

    fn links(&self) -> Result<Vec<(String, PathBuf)>, KernelError> {
        let folder = self.links_folder();
        let entries = fs::read_dir(&folder).map_err(KernelError::file("read", &folder))?;
        Ok(entries
            .filter_map(Result::ok)
            .map(|e| (e.file_name().to_string_lossy().into_owned(), e.path()))
            .collect())
    }

    /// Detaches a pinned link: the kernel ends it with its last reference, which the pin is.
    fn remove_link(&self, name: &str) {
        let path = self.link(name);
        if !path.exists() {
            return;
        }
        let removed = PinnedLink::from_pin(&path)
            .map_err(|e| e.to_string())
            .and_then(|link| link.unpin().map(drop).map_err(|e| e.to_string()));
        if let Err(error) = removed {
            tracing::warn!(path = %path.display(), error, "a pinned link stays behind; remove the file by hand");
        }
    }
}

fn maps_folder_name() -> String {
    format!("maps-v{ABI_VERSION}")
}

/// Detaches everything pinned under `pin_path` and removes it. Refused while an agent runs.
///
/// # Errors
/// [`KernelError`]; what was removed until then stays removed.
pub fn uninstall(pin_path: &Path) -> Result<usize, KernelError> {
    if !pin_path.exists() {
        return Ok(0);
    }
    let folder = File::open(pin_path).map_err(KernelError::file("open", pin_path))?;
    let _lock = Flock::lock(folder, FlockArg::LockExclusiveNonblock)
        .map_err(|_| KernelError::Locked { path: pin_path.to_owned() })?;
    let mut removed = 0;
    // Links first: a program must not run on while its maps are being unpinned.
    let mut folders: Vec<PathBuf> = vec![pin_path.join("links")];
    let entries = fs::read_dir(pin_path).map_err(KernelError::file("read", pin_path))?;
    folders.extend(entries.filter_map(Result::ok).map(|e| e.path()).filter(|p| !p.ends_with("links")));
    for folder in folders.iter().filter(|f| f.is_dir()) {
        for entry in fs::read_dir(folder).map_err(KernelError::file("read", folder))?.filter_map(Result::ok) {
            fs::remove_file(entry.path()).map_err(KernelError::file("remove", &entry.path()))?;
            removed += 1;
        }
        fs::remove_dir(folder).map_err(KernelError::file("remove", folder))?;
    }
    fs::remove_dir(pin_path).map_err(KernelError::file("remove", pin_path))?;
    Ok(removed)
}

//! The folder of pins, which keeps programs and maps alive without an agent. `programs` describes its layout.
//!
//! [`PinLock`] limits the folder to one agent. The next agent holds [`SuccessorLock`]. An agent that ends while there is a
//! successor releases `PinLock` first, and serves on until the successor releases `SuccessorLock`.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use aya::programs::links::PinnedLink;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use tacit_abi::ABI_VERSION;

use super::{KernelError, clsact, link};

/// The lock on the folder of pins, held until it is dropped.
pub struct PinLock {
    root: PathBuf,
    lock: Flock<File>,
}

impl PinLock {
    /// Locks the folder of pins. Creates the folder if it is missing.
    ///
    /// # Errors
    /// [`KernelError::Locked`] while another agent has it.
    pub fn try_acquire(root: &Path) -> Result<Self, KernelError> {
        make_root(root)?;
        Ok(Self { root: root.to_owned(), lock: lock(root)? })
    }

    /// Waits until the agent that has the lock releases it or exits, and takes it. Blocks the thread.
    ///
    /// # Errors
    /// Fails if the folder cannot be locked at all.
    pub fn acquire(root: &Path) -> Result<Self, KernelError> {
        make_root(root)?;
        Ok(Self { root: root.to_owned(), lock: wait_lock(root)? })
    }
}

/// The lock on the successor's place, held until it is dropped.
pub struct SuccessorLock(#[expect(dead_code, reason = "held, not used")] Flock<File>);

impl SuccessorLock {
    /// Locks the successor's place. Returns `None` while another agent has it.
    ///
    /// # Errors
    /// Fails if there is no folder of pins.
    pub fn try_acquire(root: &Path) -> Result<Option<Self>, KernelError> {
        match lock(&successor_folder(root)?) {
            Ok(lock) => Ok(Some(Self(lock))),
            Err(KernelError::Locked { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits until the successor's place is free, and locks it. Blocks the thread.
    ///
    /// # Errors
    /// As [`SuccessorLock::try_acquire`].
    pub fn acquire(root: &Path) -> Result<Self, KernelError> {
        wait_lock(&successor_folder(root)?).map(Self)
    }
}

/// Returns the folder that [`SuccessorLock`] locks.
fn successor_folder(root: &Path) -> Result<PathBuf, KernelError> {
    let folder = root.join("next");
    fs::create_dir_all(&folder).map_err(KernelError::file("create", &folder))?;
    Ok(folder)
}

/// The folder of pins, locked for one agent.
///
/// The agent holds the pinned objects open, so a pin that is deleted under a running agent detaches nothing.
/// [`Pins::restore`] makes the pin again, so that the object also outlives the agent.
pub(super) struct Pins {
    root: PathBuf,
    /// `None` once another agent may have it.
    lock: Option<Flock<File>>,
    held: BTreeMap<PathBuf, OwnedFd>,
}

impl Pins {
    pub(super) fn open(PinLock { root, lock }: PinLock) -> Result<Self, KernelError> {
        check_version(&root)?;
        let pins = Self { root, lock: Some(lock), held: BTreeMap::new() };
        pins.make_folders()?;
        Ok(pins)
    }

    fn make_folders(&self) -> Result<(), KernelError> {
        for folder in [self.maps_folder(), self.links_folder()] {
            fs::create_dir_all(&folder).map_err(KernelError::file("create", &folder))?;
        }
        Ok(())
    }

    /// Keeps the object pinned at `path` alive for as long as this agent lives.
    pub(super) fn hold(&mut self, path: &Path) -> io::Result<()> {
        self.held.insert(path.to_owned(), link::open_pin(path)?);
        Ok(())
    }

    /// Another agent may have the folder from now on. What it removes is not kept alive here.
    pub(super) fn release(&mut self) {
        self.held.clear();
        self.lock = None;
    }

    /// Takes the folder back that was given up; false when another agent has it.
    pub(super) fn reacquire(&mut self) -> bool {
        self.lock = self.lock.take().or_else(|| lock(&self.root).ok());
        self.lock.is_some()
    }

    /// Makes the pins again that were deleted; returns how many.
    ///
    /// # Errors
    /// [`KernelError::File`]; what could be restored is.
    pub(super) fn restore(&mut self) -> Result<usize, KernelError> {
        if self.lock.is_none() {
            return Ok(0);
        }
        let missing: Vec<&PathBuf> = self.held.keys().filter(|path| !path.exists()).collect();
        if missing.is_empty() {
            return Ok(0);
        }
        if !self.root.exists() {
            fs::create_dir_all(&self.root).map_err(KernelError::file("create", &self.root))?;
            self.lock = Some(lock(&self.root)?);
        }
        self.make_folders()?;
        let restored = missing.len();
        for (path, object) in self.held.iter().filter(|(path, _)| !path.exists()) {
            link::pin(object.as_fd(), path).map_err(KernelError::file("pin again", path))?;
        }
        Ok(restored)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    fn maps_folder(&self) -> PathBuf {
        maps_folder(&self.root)
    }

    fn links_folder(&self) -> PathBuf {
        self.root.join("links")
    }

    pub(super) fn link(&self, name: &str) -> PathBuf {
        self.links_folder().join(name)
    }

    pub(super) fn links(&self) -> Result<Vec<(String, PathBuf)>, KernelError> {
        entries(&self.links_folder())
    }

    pub(super) fn maps(&self) -> Result<Vec<(String, PathBuf)>, KernelError> {
        entries(&self.maps_folder())
    }

    /// Unpins what a start that failed has pinned; `before` is what was there before it.
    pub(super) fn remove_maps_but(&self, before: &[(String, PathBuf)]) {
        for (_, path) in self.maps().unwrap_or_default().iter().filter(|map| !before.contains(map)) {
            if let Err(error) = fs::remove_file(path) {
                tracing::warn!(path = %path.display(), %error, "a pinned map stays behind; remove the file by hand");
            }
        }
    }

    /// Detaches a pinned link: the kernel ends it with its last reference, which the pin is.
    pub(super) fn remove_link(&mut self, name: &str) {
        let path = self.link(name);
        self.held.remove(&path);
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

fn make_root(root: &Path) -> Result<(), KernelError> {
    let parent = root.ancestors().find(|p| p.exists()).unwrap_or(root);
    let on_bpffs = statfs(parent).is_ok_and(|s| s.filesystem_type() == BPF_FS_MAGIC);
    if !on_bpffs {
        return Err(KernelError::NotBpffs { path: root.to_owned() });
    }
    fs::create_dir_all(root).map_err(KernelError::file("create", root))
}

fn lock(folder: &Path) -> Result<Flock<File>, KernelError> {
    let file = File::open(folder).map_err(KernelError::file("open", folder))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| KernelError::Locked { path: folder.to_owned() })
}

fn wait_lock(folder: &Path) -> Result<Flock<File>, KernelError> {
    let mut file = File::open(folder).map_err(KernelError::file("open", folder))?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusive) {
            Ok(lock) => return Ok(lock),
            Err((again, Errno::EINTR)) => file = again,
            Err((_, error)) => return Err(KernelError::file("lock", folder)(error.into())),
        }
    }
}

fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>, KernelError> {
    let entries = fs::read_dir(folder).map_err(KernelError::file("read", folder))?;
    Ok(entries
        .filter_map(Result::ok)
        .map(|e| (e.file_name().to_string_lossy().into_owned(), e.path()))
        .collect())
}

/// An error when pins of another version are below `root`.
pub(super) fn check_version(root: &Path) -> Result<(), KernelError> {
    let ours = maps_folder_name();
    for entry in fs::read_dir(root).map_err(KernelError::file("read", root))?.filter_map(Result::ok) {
        let found = entry.file_name().to_string_lossy().into_owned();
        if found.starts_with("maps-") && found != ours {
            return Err(KernelError::OtherVersion { path: root.to_owned(), found });
        }
    }
    Ok(())
}

/// Returns the folder of pinned maps below `root`.
pub(super) fn maps_folder(root: &Path) -> PathBuf {
    root.join(maps_folder_name())
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
    let _lock = lock(pin_path)?;
    clsact::detach_all(&maps_folder(pin_path).join("LINKS"));
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

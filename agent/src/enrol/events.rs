//! Tells when something happened to the pods' cgroups: one made or removed, its first process in, its last out.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd, RawFd},
    path::Path,
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

/// Watches cgroups with inotify. Adding a watch twice is harmless: the kernel keeps one for each inode.
pub(super) struct CgroupEvents(AsyncFd<Watcher>);

struct Watcher(Inotify);

impl AsRawFd for Watcher {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl CgroupEvents {
    pub(super) fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe; Watcher owns its descriptor for as long as it lives"
        )]
        let watcher = AsyncFd::new(Watcher(inotify))?;
        Ok(Self(watcher))
    }

    /// Watches for cgroups made or removed directly below `path`.
    pub(super) fn watch(&self, path: &Path) {
        self.add(path, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE);
    }

    /// Watches a pod's cgroup for its first and last process, and its parent for the cgroup itself.
    pub(super) fn watch_pod(&self, path: &Path) {
        if let Some(parent) = path.parent() {
            self.watch(parent);
        }
        self.add(&path.join("cgroup.events"), AddWatchFlags::IN_MODIFY);
    }

    fn add(&self, path: &Path, what: AddWatchFlags) {
        // A missing cgroup is the ordinary case; it is watched once its parent reports it.
        let _ = self.0.get_ref().0.add_watch(path, what);
    }

    /// Returns when something happened since the last call.
    pub(super) async fn changed(&mut self) {
        let Ok(mut ready) = self.0.readable().await else { return };
        // The events themselves do not matter, because the caller reconciles all pods. Drains them, then waits again.
        while ready.get_inner().0.read_events().is_ok() {}
        ready.clear_ready();
    }
}

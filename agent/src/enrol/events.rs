//! Reports what happened to the pods' cgroups: one made or removed, its first process in, its last out.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd as _, AsRawFd, RawFd},
    path::{Path, PathBuf},
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::unix::AsyncFd;

/// Watches cgroups with inotify. Adding a watch twice is harmless: the kernel keeps one for each inode.
pub(super) struct CgroupEvents {
    inotify: AsyncFd<Watcher>,
    /// The watched cgroups whose children are watched for.
    parents: HashMap<WatchDescriptor, PathBuf>,
}

/// The changes since the last call.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct CgroupChanges {
    /// Cgroups that were created.
    pub created: Vec<PathBuf>,
    /// True if the kernel dropped events.
    pub is_incomplete: bool,
}

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
        let inotify = AsyncFd::new(Watcher(inotify))?;
        Ok(Self { inotify, parents: HashMap::new() })
    }

    /// Watches for cgroups made or removed directly below `path`. Returns false if there is no such cgroup.
    pub(super) fn watch(&mut self, path: &Path) -> bool {
        let Some(watch) = self.add(path, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE) else {
            return false;
        };
        self.parents.insert(watch, path.to_owned());
        true
    }

    /// Watches a pod's cgroup for its first and last process, and its parent for the cgroup itself.
    pub(super) fn watch_pod(&mut self, path: &Path) {
        if let Some(parent) = path.parent() {
            self.watch(parent);
        }
        self.add(&path.join("cgroup.events"), AddWatchFlags::IN_MODIFY);
    }

    /// Watches for the cgroup at `path`, which is below `root`, or for the cgroup above it that is missing too.
    pub(super) fn watch_for(&mut self, path: &Path, root: &Path) {
        let above = path.ancestors().skip(1).take_while(|above| above.starts_with(root));
        for above in above {
            if self.watch(above) {
                return;
            }
        }
    }

    fn add(&self, path: &Path, what: AddWatchFlags) -> Option<WatchDescriptor> {
        // A missing cgroup is the ordinary case; it is watched once its parent reports it.
        self.inotify.get_ref().0.add_watch(path, what).ok()
    }

    /// Waits until something happens, and returns all that happened.
    pub(super) async fn changed(&mut self) -> CgroupChanges {
        let mut changes = CgroupChanges::default();
        let Ok(mut ready) = self.inotify.readable().await else { return changes };
        // Read until empty, then wait again.
        while let Ok(events) = ready.get_inner().0.read_events() {
            events.into_iter().for_each(|event| note(&mut self.parents, &mut changes, event));
        }
        ready.clear_ready();
        changes
    }
}

fn note(parents: &mut HashMap<WatchDescriptor, PathBuf>, changes: &mut CgroupChanges, event: InotifyEvent) {
    if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
        changes.is_incomplete = true;
    }
    if event.mask.contains(AddWatchFlags::IN_IGNORED) {
        parents.remove(&event.wd);
    }
    if event.mask.contains(AddWatchFlags::IN_CREATE)
        && let (Some(parent), Some(name)) = (parents.get(&event.wd), event.name)
    {
        changes.created.push(parent.join(name));
    }
}

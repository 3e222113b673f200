//! Notice of changes in the folder of a file, by inotify.

use std::{
    future, io,
    os::fd::{AsFd, AsRawFd, RawFd},
    path::{Path, PathBuf},
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

/// A folder in which changes are noticed, if inotify can be had.
pub(super) struct Folder {
    path: PathBuf,
    events: Option<AsyncFd<Events>>,
}

struct Events(Inotify);

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Folder {
    /// The folder that holds `file`. Without inotify, which is logged, changes are never noticed here.
    pub(super) fn of(file: &Path) -> Self {
        let path = match file.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
            _ => PathBuf::from("."),
        };
        let events = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
            .map_err(io::Error::from)
            .and_then(|inotify| register(Events(inotify)));
        let events = events
            .map_err(|error| {
                tracing::warn!(folder = %path.display(), %error, "no inotify: changes of files are noticed late");
            })
            .ok();
        let folder = Self { path, events };
        folder.watch_again();
        folder
    }

    /// Watches the folder that has the path now. The kernel keeps one watch a folder, so asking again costs
    /// nothing; a folder that was replaced needs it.
    pub(super) fn watch_again(&self) {
        let Some(events) = &self.events else { return };
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_ONLYDIR;
        if let Err(error) = events.get_ref().0.add_watch(&self.path, flags) {
            tracing::debug!(folder = %self.path.display(), %error, "folder is not watched");
        }
    }

    /// Ends when something in the folder changed. Cancel safe: an event that was not waited for is there the
    /// next time.
    pub(super) async fn changed(&mut self) {
        let Some(events) = &self.events else {
            return future::pending().await;
        };
        loop {
            let result = match events.readable().await {
                Ok(mut guard) => match guard.try_io(|events| Ok(events.get_ref().0.read_events()?)) {
                    Ok(result) => result,
                    // Readiness was stale.
                    Err(_) => continue,
                },
                Err(error) => Err(error),
            };
            match result {
                Ok(_) => return,
                Err(error) => {
                    tracing::warn!(folder = %self.path.display(), %error, "inotify failed: changes are noticed late");
                    break;
                }
            }
        }
        self.events = None;
        future::pending().await
    }
}

#[expect(
    deprecated,
    reason = "the replacement is unsafe since a type could change its descriptor; Events has one for its whole life"
)]
fn register(events: Events) -> io::Result<AsyncFd<Events>> {
    AsyncFd::new(events)
}

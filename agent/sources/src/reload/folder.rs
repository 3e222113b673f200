//! Watches the folder of a file with inotify.

use std::{
    future, io,
    os::fd::{AsFd, AsRawFd, RawFd},
    path::{Path, PathBuf},
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

/// A watched folder. Without inotify no changes are reported.
pub struct Folder {
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
    /// Watches the folder that contains `file`. If inotify is unavailable, logs a warning and never reports a change.
    #[must_use]
    pub fn of(file: &Path) -> Self {
        Self::at(match file.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
            _ => PathBuf::from("."),
        })
    }

    /// Watches the folder `path`, which may not exist yet, as above.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        let events = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
            .map_err(io::Error::from)
            .and_then(|inotify| register(Events(inotify)));
        let events = events
            .map_err(|error| {
                tracing::warn!(folder = %path.display(), %error, "inotify is unavailable; file changes are detected with a delay");
            })
            .ok();
        let folder = Self { path, events };
        folder.watch_again();
        folder
    }

    /// Watches the folder that now has this path. Repeated calls are free, because the kernel keeps one watch per folder. A
    /// replaced folder requires a new watch.
    pub fn watch_again(&self) {
        let Some(events) = &self.events else { return };
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_ONLYDIR;
        if let Err(error) = events.get_ref().0.add_watch(&self.path, flags) {
            tracing::debug!(folder = %self.path.display(), %error, "cannot watch the folder");
        }
    }

    /// Waits until something in the folder changes. Cancel-safe, because pending events stay queued.
    pub async fn changed(&mut self) {
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
                    tracing::warn!(folder = %self.path.display(), %error, "inotify failed; file changes are detected with a delay");
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

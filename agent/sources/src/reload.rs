//! Watched files: the last good version, always.
//!
//! A new version is taken when it parses; a bad one is logged once with all its mistakes and counted, and the
//! last good one stays. A file that was deleted or cannot be read is a bad version too.
//!
//! ```text
//! inotify on the folder --+
//!                         +--> read until two reads agree --> as before: nothing | parses: publish | else: report
//! every 5 s --------------+
//! ```
//!
//! The folder is watched, not the file: editors rename a new file over the old one, and Kubernetes swaps the
//! `..data` symlink beside it. Where inotify sees nothing (symlink into another folder, network file system,
//! no instances left) the slow re-read does. A half-written file can be valid YAML with less in it, and an
//! empty policy file means PERMISSIVE: hence a changed content counts only when it is read twice with a pause
//! between. Renaming a finished file into place is still the safe way.

use std::{
    hash::{BuildHasher, RandomState},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use tacit_core::yaml::Mistakes;
use tokio::{
    sync::watch,
    task::{self, AbortHandle},
    time::{MissedTickBehavior, interval, sleep},
};

use crate::file::{self, LoadError};

mod folder;

use folder::Folder;

/// Pause between two reads that must agree, and between an event and its read: a busy folder costs 20 reads a
/// second at most.
const SETTLE: Duration = Duration::from_millis(50);
/// Reads to wait for a content to settle (2 s); a writer that is slower is met again by the re-read.
const SETTLE_READS: usize = 40;
/// Time between re-reads that need no event.
const REREAD: Duration = Duration::from_secs(5);

type Parse<T> = dyn Fn(&str) -> Result<T, Mistakes> + Send + Sync;

/// What the operator should know about a watched file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReloadState {
    /// The file.
    pub file: PathBuf,
    /// When the version in use was loaded.
    pub loaded_at: SystemTime,
    /// Versions loaded, with the initial one.
    pub loads: u64,
    /// Bad versions seen; one content seen many times in a row counts once.
    pub refusals: u64,
    /// Why the file as it is now is not in use; `None` when it is.
    pub last_error: Option<String>,
    /// Since when what is in use may be outdated; `None` when it is not.
    pub stale_since: Option<SystemTime>,
    /// What of the version in use could not be read, a line each: such policies deny what they select, such ranges
    /// are not used.
    pub unreadable: Vec<String>,
}

/// The last good version of a file that is watched until this value is dropped.
#[derive(Debug)]
pub struct Watched<T> {
    values: watch::Receiver<Arc<T>>,
    state: watch::Receiver<ReloadState>,
    task: AbortHandle,
}

impl<T: Send + Sync + 'static> Watched<T> {
    /// Loads `path` and watches it. Needs a tokio runtime with time and I/O; `parse` runs on a blocking
    /// thread from then on.
    ///
    /// # Errors
    /// [`LoadError`] when the first version cannot be read or parsed: there is no last good one yet.
    pub fn open(
        path: impl Into<PathBuf>,
        parse: impl Fn(&str) -> Result<T, Mistakes> + Send + Sync + 'static,
    ) -> Result<Self, LoadError> {
        let path = path.into();
        let text = file::read(&path)?;
        let initial = parse(&text)?;
        let hasher = RandomState::new();
        let loaded = digest(&hasher, &Ok(text));
        Ok(Self::run(path, initial, Arc::new(parse), (hasher, loaded), REREAD))
    }

    fn run(
        file: PathBuf,
        initial: T,
        parse: Arc<Parse<T>>,
        (hasher, loaded): (RandomState, u64),
        reread: Duration,
    ) -> Self {
        // Watched before the first read of the task, so that no change falls between.
        let folder = Folder::of(&file);
        let loaded_at = SystemTime::now();
        let state = ReloadState {
            file: file.clone(),
            loaded_at,
            loads: 1,
            refusals: 0,
            last_error: None,
            stale_since: None,
            unreadable: Vec::new(),
        };
        let (values_sender, values) = watch::channel(Arc::new(initial));
        let (state_sender, state) = watch::channel(state);
        let reader = Reader {
            file,
            parse,
            hasher,
            loaded,
            judged: loaded,
            values: values_sender,
            state: state_sender,
        };
        let task = tokio::spawn(reader.run(folder, reread)).abort_handle();
        Self { values, state, task }
    }
}

impl<T> Watched<T> {
    /// The version in use.
    #[must_use]
    pub fn current(&self) -> Arc<T> {
        Arc::clone(&self.values.borrow())
    }

    /// The version in use, and notice of each new one.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<T>> {
        self.values.clone()
    }

    /// What the operator should know.
    #[must_use]
    pub fn state(&self) -> ReloadState {
        self.state.borrow().clone()
    }

    /// What the operator should know, now and later.
    #[cfg(test)]
    pub(crate) fn states(&self) -> watch::Receiver<ReloadState> {
        self.state.clone()
    }
}

impl<T> Drop for Watched<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A value that is on its way: nobody sees it before it is complete.
#[derive(Debug)]
pub struct Opening<T>(Watched<T>);

impl<T> Opening<T> {
    /// Values that `task` gives, complete from the first load on.
    pub(crate) fn fed(
        values: watch::Receiver<Arc<T>>,
        state: watch::Receiver<ReloadState>,
        task: AbortHandle,
    ) -> Self {
        Self(Watched { values, state, task })
    }

    /// What the operator should know, now and later.
    #[must_use]
    pub fn states(&self) -> watch::Receiver<ReloadState> {
        self.0.state.clone()
    }

    /// The value once it is complete, however long that takes; `None` when its task ended.
    pub async fn complete(self) -> Option<Watched<T>> {
        let mut state = self.states();
        state.wait_for(|state| state.loads > 0).await.ok()?;
        Some(self.0)
    }
}

impl<T> From<Watched<T>> for Opening<T> {
    fn from(complete: Watched<T>) -> Self {
        Self(complete)
    }
}

/// The text of the file, or why there is none.
type Content = Result<String, String>;

fn digest(hasher: &RandomState, content: &Content) -> u64 {
    hasher.hash_one(content)
}

/// What one more read says.
#[derive(Debug, PartialEq, Eq)]
enum Settle {
    /// The content is the one judged before.
    AsBefore,
    /// A new content, read twice in a row.
    Settled,
    /// A new content, which may be half written.
    ReadAgain,
}

/// Compares the digest of a read with that judged before and that of the read before.
fn settle(judged: u64, last: Option<u64>, digest: u64) -> Settle {
    if digest == judged {
        Settle::AsBefore
    } else if Some(digest) == last {
        Settle::Settled
    } else {
        Settle::ReadAgain
    }
}

/// The task that reads.
struct Reader<T> {
    file: PathBuf,
    parse: Arc<Parse<T>>,
    hasher: RandomState,
    /// Digest of the content in use.
    loaded: u64,
    /// Digest of the content judged last, good or bad.
    judged: u64,
    values: watch::Sender<Arc<T>>,
    state: watch::Sender<ReloadState>,
}

impl<T: Send + Sync + 'static> Reader<T> {
    async fn run(mut self, mut folder: Folder, reread: Duration) {
        let mut ticks = interval(reread);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = folder.changed() => sleep(SETTLE).await,
                _ = ticks.tick() => folder.watch_again(),
            }
            if let Some((content, digest)) = self.settled().await {
                self.judge(content, digest).await;
            }
        }
    }

    /// A content other than the one judged last, once two reads agree on it.
    async fn settled(&self) -> Option<(Content, u64)> {
        let mut last = None;
        for _ in 0..SETTLE_READS {
            let content = read(&self.file).await;
            let digest = digest(&self.hasher, &content);
            match settle(self.judged, last, digest) {
                Settle::AsBefore => return None,
                Settle::Settled => return Some((content, digest)),
                Settle::ReadAgain => last = Some(digest),
            }
            sleep(SETTLE).await;
        }
        None
    }

    async fn judge(&mut self, content: Content, digest: u64) {
        self.judged = digest;
        let text = match content {
            Err(problem) => return self.refuse(problem),
            Ok(_) if self.loaded == digest => return self.accept(None),
            Ok(text) => text,
        };
        let parse = Arc::clone(&self.parse);
        match task::spawn_blocking(move || parse(&text)).await {
            Ok(Ok(value)) => {
                self.loaded = digest;
                self.accept(Some(value));
            }
            Ok(Err(mistakes)) => self.refuse(mistakes.to_string()),
            Err(panic) => {
                self.refuse(format!("the parser failed, a bug of Tacit, please report it: {panic}"))
            }
        }
    }

    /// Publishes a new version; `None` when the file is back to the one in use.
    fn accept(&self, new: Option<T>) {
        let loads = u64::from(new.is_some());
        if let Some(value) = new {
            self.values.send_replace(Arc::new(value));
        }
        self.state.send_modify(|state| {
            state.last_error = None;
            state.stale_since = None;
            if loads > 0 {
                state.loads += loads;
                state.loaded_at = SystemTime::now();
            }
        });
        tracing::info!(file = %self.file.display(), new = loads > 0, "good version in use");
    }

    fn refuse(&self, problem: String) {
        tracing::error!(file = %self.file.display(), "new version refused, the last good one stays:\n{problem}");
        self.state.send_modify(|state| {
            state.refusals += 1;
            state.last_error = Some(problem);
            state.stale_since.get_or_insert_with(SystemTime::now);
        });
    }
}

async fn read(file: &Path) -> Content {
    let file = file.to_owned();
    match task::spawn_blocking(move || file::read(&file)).await {
        Ok(text) => text.map_err(|error| error.to_string()),
        Err(panic) => Err(format!("reading failed, a bug of Tacit, please report it: {panic}")),
    }
}

#[cfg(test)]
mod tests;

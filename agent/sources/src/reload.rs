//! Watches files and keeps the last valid version.
//!
//! A new version is used if it parses. An invalid version is counted and logged once with all its mistakes, and the last valid
//! version stays in use. A deleted or unreadable file counts as an invalid version.
//!
//! ```text
//! inotify on the folder --+
//!                         +--> read until two reads agree --> unchanged: nothing | parses: publish | else: report
//! every 5 s --------------+
//! ```
//!
//! The folder is watched and not the file, because editors rename a new file over the old one, and Kubernetes swaps the
//! `..data` symlink. Some changes cause no inotify event, for example behind symlinks or on network file systems. The periodic
//! re-read finds those. A partly written file can be valid YAML, and an empty policy file means PERMISSIVE. New content is
//! therefore used only after two equal reads with a pause between. Renaming a finished file into place is the safest way.

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

use crate::{
    file::{self, LoadError},
    istiod::ConnectionState,
};

pub mod folder;

use folder::Folder;

/// Pause between two reads that must agree, and between an event and its read. It limits a busy folder to 20 reads a second.
const SETTLE: Duration = Duration::from_millis(50);
/// Maximum reads until content settles (2 s). A slower writer is handled by the next re-read.
const SETTLE_READS: usize = 40;
/// Interval of re-reads without an event.
const REREAD: Duration = Duration::from_secs(5);

type Parse<T> = dyn Fn(Vec<u8>) -> Result<T, LoadError> + Send + Sync;

/// The state of a watched source, for the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReloadState {
    /// The file.
    pub file: PathBuf,
    /// Time at which the current version was loaded.
    pub loaded_at: SystemTime,
    /// Number of loaded versions, including the first.
    pub loads: u64,
    /// Number of invalid versions. Repeated reads of the same content count once.
    pub refusals: u64,
    /// The error of the latest version, or `None` if it is in use.
    pub last_error: Option<String>,
    /// Time since which the current version may be outdated, or `None` if it is up to date.
    pub stale_since: Option<SystemTime>,
    /// Invalid parts of the current version, one per line. Invalid policies deny what they select, and invalid ranges are
    /// ignored.
    pub unreadable: Vec<String>,
}

/// The last valid version of a source. Dropping this value stops the watch.
#[derive(Debug)]
pub struct Watched<T> {
    values: watch::Receiver<Arc<T>>,
    state: watch::Receiver<ReloadState>,
    /// Of a source that keeps one.
    connection: Option<watch::Receiver<ConnectionState>>,
    task: AbortHandle,
}

impl<T: Send + Sync + 'static> Watched<T> {
    /// Loads `path` and watches it. Requires a tokio runtime with time and I/O. Later versions are parsed on a blocking thread.
    ///
    /// # Errors
    /// [`LoadError`] if the first version cannot be read or parsed.
    pub fn open(
        path: impl Into<PathBuf>,
        parse: impl Fn(&str) -> Result<T, Mistakes> + Send + Sync + 'static,
    ) -> Result<Self, LoadError> {
        let path = path.into();
        let named = path.clone();
        Self::open_with(path, move |content| Ok(parse(&file::text(&named, content)?)?))
    }

    /// As [`Watched::open`], of a file that need not be text. `parse` returns what is wrong with the content.
    ///
    /// # Errors
    /// [`LoadError`] if the first version cannot be read or parsed.
    pub fn open_content(
        path: impl Into<PathBuf>,
        parse: impl Fn(&[u8]) -> Result<T, String> + Send + Sync + 'static,
    ) -> Result<Self, LoadError> {
        let path = path.into();
        let named = path.clone();
        Self::open_with(path, move |content| {
            parse(&content).map_err(|problem| LoadError::Content { path: named.clone(), problem })
        })
    }

    fn open_with(
        path: PathBuf,
        parse: impl Fn(Vec<u8>) -> Result<T, LoadError> + Send + Sync + 'static,
    ) -> Result<Self, LoadError> {
        let content = file::read_bytes(&path)?;
        let hasher = RandomState::new();
        let loaded = digest(&hasher, &Ok(content.clone()));
        let initial = parse(content)?;
        Ok(Self::run(path, initial, Arc::new(parse), (hasher, loaded), REREAD))
    }

    fn run(
        file: PathBuf,
        initial: T,
        parse: Arc<Parse<T>>,
        (hasher, loaded): (RandomState, u64),
        reread: Duration,
    ) -> Self {
        // Watch before the first read of the task, so that no change is missed.
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
            checked: loaded,
            values: values_sender,
            state: state_sender,
        };
        let task = tokio::spawn(reader.run(folder, reread)).abort_handle();
        Self { values, state, connection: None, task }
    }
}

impl<T> Watched<T> {
    /// Returns the version in use.
    #[must_use]
    pub fn current(&self) -> Arc<T> {
        Arc::clone(&self.values.borrow())
    }

    /// Returns a receiver of the current and all later versions.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<T>> {
        self.values.clone()
    }

    /// Returns the current state.
    #[must_use]
    pub fn state(&self) -> ReloadState {
        self.state.borrow().clone()
    }

    /// Returns the state of the connection to istiod, if the source has one.
    #[must_use]
    pub fn connection(&self) -> Option<ConnectionState> {
        self.connection.as_ref().map(|state| state.borrow().clone())
    }

    /// Returns a receiver of the state.
    #[must_use]
    pub fn states(&self) -> watch::Receiver<ReloadState> {
        self.state.clone()
    }
}

impl<T> Drop for Watched<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A source whose first value is not complete yet.
#[derive(Debug)]
pub struct Opening<T>(Watched<T>);

impl<T> Opening<T> {
    /// Wraps the values of `task`. The first load completes the value.
    pub(crate) fn new(
        values: watch::Receiver<Arc<T>>,
        state: watch::Receiver<ReloadState>,
        task: AbortHandle,
    ) -> Self {
        Self(Watched { values, state, connection: None, task })
    }

    /// Returns a receiver of the state.
    #[must_use]
    pub fn states(&self) -> watch::Receiver<ReloadState> {
        self.0.state.clone()
    }

    /// Adds the state of the connection of the source.
    pub(crate) fn with_connection(mut self, state: watch::Receiver<ConnectionState>) -> Self {
        self.0.connection = Some(state);
        self
    }

    /// Waits for the first complete value, without a limit. Returns `None` if the task exited.
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

/// The content of the file, or the error.
type Content = Result<Vec<u8>, String>;

fn digest(hasher: &RandomState, content: &Content) -> u64 {
    hasher.hash_one(content)
}

/// The conclusion from one more read.
#[derive(Debug, PartialEq, Eq)]
enum Settle {
    /// The content was checked before.
    Unchanged,
    /// New content, read twice in a row.
    Settled,
    /// New content that may be partly written.
    ReadAgain,
}

/// Compares the digest of a read with the last checked digest and with the previous read.
fn settle(checked: u64, last: Option<u64>, digest: u64) -> Settle {
    if digest == checked {
        Settle::Unchanged
    } else if Some(digest) == last {
        Settle::Settled
    } else {
        Settle::ReadAgain
    }
}

/// The task that reads the file.
struct Reader<T> {
    file: PathBuf,
    parse: Arc<Parse<T>>,
    hasher: RandomState,
    /// Digest of the content in use.
    loaded: u64,
    /// Digest of the content checked last, valid or not.
    checked: u64,
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
                self.check(content, digest).await;
            }
        }
    }

    /// Returns new content after two equal reads.
    async fn settled(&self) -> Option<(Content, u64)> {
        let mut last = None;
        for _ in 0..SETTLE_READS {
            let content = read(&self.file).await;
            let digest = digest(&self.hasher, &content);
            match settle(self.checked, last, digest) {
                Settle::Unchanged => return None,
                Settle::Settled => return Some((content, digest)),
                Settle::ReadAgain => last = Some(digest),
            }
            sleep(SETTLE).await;
        }
        None
    }

    async fn check(&mut self, content: Content, digest: u64) {
        self.checked = digest;
        let content = match content {
            Err(problem) => return self.reject(problem),
            Ok(_) if self.loaded == digest => return self.accept(None),
            Ok(content) => content,
        };
        let parse = Arc::clone(&self.parse);
        match task::spawn_blocking(move || parse(content)).await {
            Ok(Ok(value)) => {
                self.loaded = digest;
                self.accept(Some(value));
            }
            Ok(Err(error)) => self.reject(error.to_string()),
            Err(panic) => {
                self.reject(format!("the parser panicked; this is a bug of Tacit, please report it: {panic}"))
            }
        }
    }

    /// Publishes a new version, or `None` if the file is back to the version in use.
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
        tracing::info!(file = %self.file.display(), new = loads > 0, "valid version in use");
    }

    fn reject(&self, problem: String) {
        tracing::error!(file = %self.file.display(), "invalid version, the last valid version stays in use:\n{problem}");
        self.state.send_modify(|state| {
            state.refusals += 1;
            state.last_error = Some(problem);
            state.stale_since.get_or_insert_with(SystemTime::now);
        });
    }
}

async fn read(file: &Path) -> Content {
    let file = file.to_owned();
    match task::spawn_blocking(move || file::read_bytes(&file)).await {
        Ok(content) => content.map_err(|error| error.to_string()),
        Err(panic) => Err(format!("reading panicked; this is a bug of Tacit, please report it: {panic}")),
    }
}

#[cfg(test)]
mod tests;

//! Lists one resource and then watches it, until the receiver is dropped.
//!
//! ```text
//! list, page by page ──> watch ──closed by the server──> watch again
//!   ▲                      │ ├── failed ── pause ──> watch again
//!   │                      │ └── 410 Gone (version expired), 404 (path not served) ──> list
//!   └─ failed ── pause     ▼
//!                        changes, in order, into a bounded channel
//! ```
//! Pauses double from half a second to half a minute. Jitter shortens each by up to a half, so that the agents of a large
//! cluster do not reconnect at the same time. A silent connection is dropped after the watch's own timeout.
//!
//! A resource that only newer servers have counts as empty on older servers. The watcher checks again periodically.
//!
//! Deleting the definition of a custom resource deletes all its objects. While a definition is being deleted, or is absent, the
//! known objects are kept: see `definition`.

use std::{
    fmt::Debug,
    hash::{BuildHasher as _, RandomState},
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use kube::{
    Client, Error,
    core::{
        Request, WatchEvent,
        params::{ListParams, WatchParams},
    },
};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::{
    sync::{Notify, mpsc},
    time::{sleep, timeout},
};

use super::or_default;

mod definition;

use definition::{DefinitionChecks, check_definition};

/// Objects per page, the usual value of clients. A page of pods has some MB.
pub(crate) const PAGE: u32 = 500;
/// Time between the request of a new list and the list, at most. Whoever can have lists requested costs the API server one
/// list of each agent in this time, and not all of them at once.
const RELIST_PAUSE: Duration = Duration::from_secs(30);
/// Timeout of a page.
const PAGE_TIMEOUT: Duration = Duration::from_secs(60);
/// Seconds after which the server ends a watch, about the usual value of clients.
const WATCH_SECONDS: u32 = 290;
/// A watch that is silent for this long has failed, because the server would have ended it.
const WATCH_SILENCE: Duration = Duration::from_secs(300);
/// Timeout of the response to a watch request.
const WATCH_OPEN: Duration = Duration::from_secs(30);
/// A watch that ends sooner counts as failed, even if it was closed normally.
const WATCH_SHORT: Duration = Duration::from_secs(1);
/// Interval between checks for a resource that the server does not have, as long as a watch.
const ABSENT_PAUSE: Duration = Duration::from_secs(290);
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);

const GONE: u16 = 410;
const NOT_FOUND: u16 = 404;

/// Names of the resources of a store.
pub(crate) trait KindName: Copy + Ord + Debug + Send + 'static {
    /// The name in logs.
    fn label(self) -> &'static str;
}

/// A watched object.
pub(crate) trait Resource: DeserializeOwned + Clone + Send + 'static {
    /// The resources of its store.
    type Kind: KindName;
    /// The object type of its store.
    type Object: Send + 'static;

    const KIND: Self::Kind;
    /// API paths, the newest version first.
    const PATHS: &'static [&'static str];
    const DEFINITION: Definition = Definition::BuiltIn;
    /// Objects per page.
    const PAGE: u32 = PAGE;
    /// Field selector; `None` for all objects. The server sends the deletion of an object that no longer matches.
    const FIELDS: Option<&'static str> = None;

    /// Returns the resource version.
    fn version(&self) -> &str;

    fn into_object(self) -> Self::Object;
}

/// The definition of a resource.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Definition {
    /// Built into the API server.
    BuiltIn,
    /// Built into newer API servers. On other servers the resource has no objects.
    Newer,
    /// Defined by the CustomResourceDefinition of this name.
    Custom(&'static str),
}

/// A change in the cluster.
#[derive(Debug)]
pub(crate) enum Change<K, O> {
    /// A list starts.
    Listing(K),
    /// The object was created or updated.
    Applied(O),
    /// The object was deleted.
    Deleted(O),
    /// The list is complete.
    Listed(K),
}

/// A message of a watcher.
#[derive(Debug)]
pub(crate) enum Update<K, O> {
    Change(Change<K, O>),
    /// The state of this resource is up to date.
    Fresh(K),
    Failed(K, String),
}

type Sender<K> = mpsc::Sender<Update<<K as Resource>::Kind, <K as Resource>::Object>>;

/// The way a watch ended.
enum WatchEnd {
    /// Closed by the server, as every watch is.
    Closed,
    /// The version has expired. A list is required.
    Gone,
    /// The path is no longer served. A list may find another.
    NotServed(String),
    /// The receiver was dropped.
    Unwanted,
    Failed(String),
}

/// The reason why a list failed.
enum ListError {
    /// The server does not serve the path.
    NotServed,
    Other(String),
}

impl From<Error> for ListError {
    fn from(error: Error) -> Self {
        if code(&error) == Some(NOT_FOUND) { Self::NotServed } else { Self::Other(error.to_string()) }
    }
}

/// Lists and watches `K` until the receiver is dropped.
pub(crate) async fn list_and_watch<K: Resource>(client: Client, updates: Sender<K>) {
    list_and_watch_again::<K>(client, updates, &Notify::new()).await;
}

/// Lists and watches `K` until the receiver is dropped. Lists again after each request of `relist`, within [`RELIST_PAUSE`].
pub(crate) async fn list_and_watch_again<K: Resource>(client: Client, updates: Sender<K>, relist: &Notify) {
    let mut pause = Pause::default();
    while !updates.is_closed() {
        match list_served::<K>(&client, &updates).await {
            Ok(None) => {
                pause = Pause::default();
                sleep(ABSENT_PAUSE).await;
            }
            Ok(Some((path, version))) => {
                pause = Pause::default();
                let again = async {
                    relist.notified().await;
                    sleep(shortened(RELIST_PAUSE, random())).await;
                };
                tokio::select! {
                    end = watch_on::<K>(&client, path, version, &updates, &mut pause) => {
                        if end.is_none() {
                            return;
                        }
                    }
                    () = again => {}
                }
            }
            Err(problem) => {
                if report_failure::<K>(&updates, problem).await.is_none() {
                    return;
                }
                sleep(pause.next(random())).await;
            }
        }
    }
}

/// Lists all objects from the newest path that is served. Returns the path and the version for the watch, or `None` if the
/// server is too old for the resource.
async fn list_served<K: Resource>(
    client: &Client,
    updates: &Sender<K>,
) -> Result<Option<(&'static str, String)>, String> {
    for path in K::PATHS {
        match list::<K>(client, path, updates).await {
            Ok(version) => return Ok(Some((path, version))),
            Err(ListError::NotServed) => {}
            Err(ListError::Other(problem)) => return Err(format!("{path}: {problem}")),
        }
    }
    let help = match K::DEFINITION {
        Definition::BuiltIn => String::new(),
        Definition::Newer => {
            for update in [Change::Listing(K::KIND), Change::Listed(K::KIND)].map(Update::Change) {
                // The caller detects a dropped receiver.
                let _ = updates.send(update).await;
            }
            let _ = updates.send(Update::Fresh(K::KIND)).await;
            return Ok(None);
        }
        Definition::Custom(name) => {
            format!("; apply deploy/crds, or Istio's definition {name}")
        }
    };
    Err(format!("{}: this API server does not serve the resource{help}", K::PATHS.join(", ")))
}

async fn list<K: Resource>(client: &Client, path: &str, updates: &Sender<K>) -> Result<String, ListError> {
    let mut next: Option<String> = None;
    let mut first = true;
    loop {
        let field_selector = K::FIELDS.map(str::to_owned);
        let params = ListParams {
            limit: Some(K::PAGE),
            continue_token: next,
            field_selector,
            ..ListParams::default()
        };
        let request = Request::new(path).list(&params).map_err(Error::BuildRequest)?;
        let page = timeout(PAGE_TIMEOUT, client.request::<Page<K>>(request)).await;
        let page = page.map_err(|_| Error::ReadEvents(std::io::ErrorKind::TimedOut.into()))??;
        // A failed list starts again, and sends Listing again.
        let begin = std::mem::take(&mut first).then_some(Change::Listing(K::KIND));
        let changes =
            begin.into_iter().chain(page.items.into_iter().map(|item| Change::Applied(item.into_object())));
        for change in changes {
            // The caller detects a dropped receiver.
            let _ = updates.send(Update::Change(change)).await;
        }
        next = page.metadata.next.filter(|token| !token.is_empty());
        if next.is_none() {
            // From here on, objects that were not in the list count as deleted.
            check_definition::<K>(client).await.map_err(ListError::Other)?;
            let _ = updates.send(Update::Change(Change::Listed(K::KIND))).await;
            let _ = updates.send(Update::Fresh(K::KIND)).await;
            return Ok(page.metadata.resource_version);
        }
    }
}

/// Watches until a list is needed. Returns `None` if the receiver was dropped.
async fn watch_on<K: Resource>(
    client: &Client,
    path: &str,
    mut version: String,
    updates: &Sender<K>,
    pause: &mut Pause,
) -> Option<()> {
    loop {
        let begin = Instant::now();
        // After a failure, check the definition first. Otherwise the watch would count as working until it fails again.
        let is_defined = if pause.tries > 0 { check_definition::<K>(client).await } else { Ok(()) };
        let end = match is_defined {
            Ok(()) => watch::<K>(client, path, &mut version, updates).await,
            Err(problem) => WatchEnd::Failed(problem),
        };
        let (problem, list_again) = match end {
            WatchEnd::Unwanted => return None,
            WatchEnd::Gone => return Some(()),
            WatchEnd::Closed if begin.elapsed() >= WATCH_SHORT => {
                *pause = Pause::default();
                continue;
            }
            WatchEnd::Closed => ("the watch ended at once".to_owned(), false),
            WatchEnd::Failed(problem) => (problem, false),
            WatchEnd::NotServed(problem) => (problem, true),
        };
        report_failure::<K>(updates, format!("{path}: {problem}")).await?;
        if begin.elapsed() >= PAUSE_MAX {
            *pause = Pause::default();
        }
        sleep(pause.next(random())).await;
        if list_again {
            return Some(());
        }
    }
}

/// Runs one watch from `version`, which is updated.
async fn watch<K: Resource>(
    client: &Client,
    path: &str,
    version: &mut String,
    updates: &Sender<K>,
) -> WatchEnd {
    let (timeout_seconds, field_selector) = (Some(WATCH_SECONDS), K::FIELDS.map(str::to_owned));
    let params =
        WatchParams { timeout: timeout_seconds, bookmarks: true, field_selector, ..WatchParams::default() };
    let request = match Request::new(path).watch(&params, version) {
        Ok(request) => request,
        Err(error) => return WatchEnd::Failed(error.to_string()),
    };
    let events = match timeout(WATCH_OPEN, client.request_events::<K>(request)).await {
        Ok(Ok(events)) => events,
        Ok(Err(error)) => return ended(&error),
        Err(_) => return WatchEnd::Failed(format!("no answer within {WATCH_OPEN:?}")),
    };
    let mut events = std::pin::pin!(events.map(decode_event::<K>));
    if updates.send(Update::Fresh(K::KIND)).await.is_err() {
        return WatchEnd::Unwanted;
    }
    let mut checks = DefinitionChecks::new();
    loop {
        let first = match timeout(WATCH_SILENCE, events.next()).await {
            Ok(Some(Ok(first))) => first,
            Ok(Some(Err(end))) => return end,
            Ok(None) => return WatchEnd::Closed,
            Err(_) => return WatchEnd::Failed(format!("silent for {WATCH_SILENCE:?}")),
        };
        let is_gone = matches!(first.1, Update::Change(Change::Deleted(_)));
        let mut batch = vec![first];
        let end = match K::DEFINITION {
            Definition::Custom(_) if is_gone => checks.check::<K>(client, &mut batch, events.as_mut()).await,
            _ => Ok(None),
        };
        let end = match end {
            Ok(end) => end,
            Err(problem) => return WatchEnd::Failed(problem),
        };
        for (next, update) in batch {
            *version = next;
            if updates.send(update).await.is_err() {
                return WatchEnd::Unwanted;
            }
        }
        if let Some(end) = end {
            return end;
        }
    }
}

/// A watch event: the new version, and the update for the reflector.
type WatchUpdate<K> = (String, Update<<K as Resource>::Kind, <K as Resource>::Object>);

fn decode_event<K: Resource>(event: Result<WatchEvent<K>, Error>) -> Result<WatchUpdate<K>, WatchEnd> {
    match event {
        Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
            Ok((object.version().to_owned(), Update::Change(Change::Applied(object.into_object()))))
        }
        Ok(WatchEvent::Deleted(object)) => {
            Ok((object.version().to_owned(), Update::Change(Change::Deleted(object.into_object()))))
        }
        Ok(WatchEvent::Bookmark(bookmark)) => {
            Ok((bookmark.metadata.resource_version, Update::Fresh(K::KIND)))
        }
        Ok(WatchEvent::Error(status)) => Err(ended(&Error::Api(status))),
        Err(error) => Err(ended(&error)),
    }
}

fn ended(error: &Error) -> WatchEnd {
    match code(error) {
        Some(GONE) => WatchEnd::Gone,
        Some(NOT_FOUND) => WatchEnd::NotServed(error.to_string()),
        _ => WatchEnd::Failed(error.to_string()),
    }
}

fn code(error: &Error) -> Option<u16> {
    match error {
        Error::Api(status) => Some(status.code),
        _ => None,
    }
}

async fn report_failure<K: Resource>(updates: &Sender<K>, problem: String) -> Option<()> {
    updates.send(Update::Failed(K::KIND, problem)).await.ok()
}

/// A page of a list.
#[derive(Debug, Clone, Deserialize)]
struct Page<T> {
    metadata: PageMeta,
    #[serde(
        default = "Vec::new",
        deserialize_with = "or_default",
        bound(deserialize = "T: Deserialize<'de>")
    )]
    items: Vec<T>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PageMeta {
    resource_version: String,
    #[serde(rename = "continue")]
    next: Option<String>,
}

/// Exponential backoff.
#[derive(Debug, Default)]
pub(crate) struct Pause {
    tries: u32,
}

impl Pause {
    /// Returns the next pause. Doubles each time; `random` subtracts up to a half.
    pub(crate) fn next(&mut self, random: u64) -> Duration {
        let full = PAUSE_FIRST.saturating_mul(1 << self.tries.min(16)).min(PAUSE_MAX);
        self.tries = self.tries.saturating_add(1);
        shortened(full, random)
    }
}

/// Subtracts up to a half.
fn shortened(pause: Duration, random: u64) -> Duration {
    pause - pause / 2 * u32::try_from(random % 1000).unwrap_or(0) / 1000
}

/// Returns random bits. Not for secrets: `RandomState` has new keys for each value.
pub(crate) fn random() -> u64 {
    RandomState::new().hash_one(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_to_a_bound_and_are_spread() {
        let mut pause = Pause::default();
        let longest: Vec<u128> = (0..9).map(|_| pause.next(0).as_millis()).collect();
        assert_eq!(longest, [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]);
        let mut pause = Pause { tries: u32::MAX };
        assert!(pause.next(999) >= PAUSE_MAX / 2 && pause.next(999) < PAUSE_MAX * 51 / 100);
        let mut pauses: Vec<Duration> = (0..20).map(|_| Pause { tries: 6 }.next(random())).collect();
        pauses.dedup();
        assert!(pauses.len() > 1, "all alike: {pauses:?}");
    }
}

//! One kind of object, listed and then watched for as long as somebody wants to know.
//!
//! ```text
//! list, page by page ──> watch ──closed by the server──> watch on
//!   ▲                      │ ├── failed ── pause ──> watch on
//!   │                      │ └── 410 Gone (the version is too old), 404 (the path is gone) ──> list
//!   └─ failed ── pause     ▼
//!                        changes, in order, into a channel of fixed size
//! ```
//! Pauses double from half a second to half a minute, each by chance up to half shorter, so that the agents of a large
//! cluster do not return at one moment. A connection that went silent is given up when the watch's own time is over.
//!
//! A kind that only newer servers have is one without objects where it is not served; it is asked for again now and then.
//!
//! A custom kind can go as a whole, and all its objects with it. While its definition is being deleted, or is gone, what is
//! known stays: see `definition`.

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
    sync::mpsc,
    time::{sleep, timeout},
};

use super::or_default;

mod definition;

use definition::{Looks, defined};

/// Objects of one answer, as other clients ask for: some MB of pods.
const PAGE: u32 = 500;
/// How long a page may take.
const PAGE_TIMEOUT: Duration = Duration::from_secs(60);
/// After this time the server ends a watch, in seconds; other clients choose about the same.
const WATCH_SECONDS: u32 = 290;
/// Silence from which on a watch is dead: the server would have ended it.
const WATCH_SILENCE: Duration = Duration::from_secs(300);
/// How long the answer to the request for a watch may take.
const WATCH_OPEN: Duration = Duration::from_secs(30);
/// A watch that ends sooner did not work, whatever its end says.
const WATCH_SHORT: Duration = Duration::from_secs(1);
/// Between looks for a kind that the server does not have: as long as a watch lasts.
const ABSENT_PAUSE: Duration = Duration::from_secs(290);
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);

const GONE: u16 = 410;
const NOT_FOUND: u16 = 404;

/// Kinds of objects that one store takes.
pub(crate) trait Label: Copy + Ord + Debug + Send + 'static {
    /// Its name in logs.
    fn label(self) -> &'static str;
}

/// An object that is followed.
pub(crate) trait Followed: DeserializeOwned + Clone + Send + 'static {
    /// The kinds of its store.
    type Kind: Label;
    /// What its store takes.
    type Object: Send + 'static;

    const KIND: Self::Kind;
    /// Where the API has it, the newest version first.
    const PATHS: &'static [&'static str];
    const DEFINITION: Definition = Definition::BuiltIn;

    /// Its resource version.
    fn version(&self) -> &str;

    fn into_object(self) -> Self::Object;
}

/// Who defines a kind.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Definition {
    /// The API server itself.
    BuiltIn,
    /// The API server itself, if it is new enough: where it does not serve the kind, there are no objects.
    Newer,
    /// The CustomResourceDefinition of this name.
    Custom(&'static str),
}

/// What happened in the cluster.
#[derive(Debug)]
pub(crate) enum Change<K, O> {
    /// A list of this kind begins.
    Listing(K),
    /// The object is there, or has changed.
    Applied(O),
    /// The object is gone.
    Deleted(O),
    /// The list is complete.
    Listed(K),
}

/// What followers tell.
#[derive(Debug)]
pub(crate) enum News<K, O> {
    Change(Change<K, O>),
    /// What is known of this kind is up to date.
    Fresh(K),
    Failed(K, String),
}

type Sender<K> = mpsc::Sender<News<<K as Followed>::Kind, <K as Followed>::Object>>;

/// How a watch ended.
enum End {
    /// As the server ends every watch.
    Closed,
    /// What was watched from is no longer known: only a list helps.
    Gone,
    /// The path is no longer served: a list may find another.
    NotServed(String),
    /// Nobody wants to know any more.
    Unwanted,
    Failed(String),
}

/// Why there is no list.
enum Failure {
    /// The server has no such path.
    NotServed,
    Other(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        if code(&error) == Some(NOT_FOUND) { Self::NotServed } else { Self::Other(error.to_string()) }
    }
}

/// Follows `K` until nobody listens.
pub(crate) async fn follow<K: Followed>(client: Client, news: Sender<K>) {
    let mut pause = Pause::default();
    while !news.is_closed() {
        match list_served::<K>(&client, &news).await {
            Ok(None) => {
                pause = Pause::default();
                sleep(ABSENT_PAUSE).await;
            }
            Ok(Some((path, version))) => {
                pause = Pause::default();
                if watch_on::<K>(&client, path, version, &news, &mut pause).await.is_none() {
                    return;
                }
            }
            Err(problem) => {
                if tell_failed::<K>(&news, problem).await.is_none() {
                    return;
                }
                sleep(pause.next(random())).await;
            }
        }
    }
}

/// Lists all objects from the newest path that is served; answers it, and the version from which to watch. `None` when the
/// server is too old for the kind.
async fn list_served<K: Followed>(
    client: &Client,
    news: &Sender<K>,
) -> Result<Option<(&'static str, String)>, String> {
    for path in K::PATHS {
        match list::<K>(client, path, news).await {
            Ok(version) => return Ok(Some((path, version))),
            Err(Failure::NotServed) => {}
            Err(Failure::Other(problem)) => return Err(format!("{path}: {problem}")),
        }
    }
    let help = match K::DEFINITION {
        Definition::BuiltIn => String::new(),
        Definition::Newer => {
            for told in [Change::Listing(K::KIND), Change::Listed(K::KIND)].map(News::Change) {
                // Closed is seen by the caller.
                let _ = news.send(told).await;
            }
            let _ = news.send(News::Fresh(K::KIND)).await;
            return Ok(None);
        }
        Definition::Custom(name) => {
            format!(": apply deploy/crds, or Istio's own definition {name}")
        }
    };
    Err(format!("{}: not served by this API server{help}", K::PATHS.join(", ")))
}

async fn list<K: Followed>(client: &Client, path: &str, news: &Sender<K>) -> Result<String, Failure> {
    let mut next: Option<String> = None;
    let mut first = true;
    loop {
        let params = ListParams { limit: Some(PAGE), continue_token: next, ..ListParams::default() };
        let request = Request::new(path).list(&params).map_err(Error::BuildRequest)?;
        let page = timeout(PAGE_TIMEOUT, client.request::<Page<K>>(request)).await;
        let page = page.map_err(|_| Error::ReadEvents(std::io::ErrorKind::TimedOut.into()))??;
        // A list that failed half way starts again, and this with it.
        let begin = std::mem::take(&mut first).then_some(Change::Listing(K::KIND));
        let changes =
            begin.into_iter().chain(page.items.into_iter().map(|item| Change::Applied(item.into_object())));
        for change in changes {
            // Closed is seen by the caller.
            let _ = news.send(News::Change(change)).await;
        }
        next = page.metadata.next.filter(|token| !token.is_empty());
        if next.is_none() {
            // What the list did not hold counts as gone from here on.
            defined::<K>(client).await.map_err(Failure::Other)?;
            let _ = news.send(News::Change(Change::Listed(K::KIND))).await;
            let _ = news.send(News::Fresh(K::KIND)).await;
            return Ok(page.metadata.resource_version);
        }
    }
}

/// Watches until a list is needed; `None` when nobody listens any more.
async fn watch_on<K: Followed>(
    client: &Client,
    path: &str,
    mut version: String,
    news: &Sender<K>,
    pause: &mut Pause,
) -> Option<()> {
    loop {
        let begin = Instant::now();
        // A watch that failed for its definition would fail for it again, and be taken for a working one until then.
        let is_defined = if pause.tries > 0 { defined::<K>(client).await } else { Ok(()) };
        let end = match is_defined {
            Ok(()) => watch::<K>(client, path, &mut version, news).await,
            Err(problem) => End::Failed(problem),
        };
        let (problem, list_again) = match end {
            End::Unwanted => return None,
            End::Gone => return Some(()),
            End::Closed if begin.elapsed() >= WATCH_SHORT => {
                *pause = Pause::default();
                continue;
            }
            End::Closed => ("the watch ended at once".to_owned(), false),
            End::Failed(problem) => (problem, false),
            End::NotServed(problem) => (problem, true),
        };
        tell_failed::<K>(news, format!("{path}: {problem}")).await?;
        if begin.elapsed() >= PAUSE_MAX {
            *pause = Pause::default();
        }
        sleep(pause.next(random())).await;
        if list_again {
            return Some(());
        }
    }
}

/// One watch, from `version` on, which is kept up to date.
async fn watch<K: Followed>(client: &Client, path: &str, version: &mut String, news: &Sender<K>) -> End {
    let params = WatchParams { timeout: Some(WATCH_SECONDS), bookmarks: true, ..WatchParams::default() };
    let request = match Request::new(path).watch(&params, version) {
        Ok(request) => request,
        Err(error) => return End::Failed(error.to_string()),
    };
    let events = match timeout(WATCH_OPEN, client.request_events::<K>(request)).await {
        Ok(Ok(events)) => events,
        Ok(Err(error)) => return ended(&error),
        Err(_) => return End::Failed(format!("no answer within {WATCH_OPEN:?}")),
    };
    let mut events = std::pin::pin!(events.map(told::<K>));
    if news.send(News::Fresh(K::KIND)).await.is_err() {
        return End::Unwanted;
    }
    let mut looks = Looks::new();
    loop {
        let first = match timeout(WATCH_SILENCE, events.next()).await {
            Ok(Some(Ok(first))) => first,
            Ok(Some(Err(end))) => return end,
            Ok(None) => return End::Closed,
            Err(_) => return End::Failed(format!("silent for {WATCH_SILENCE:?}")),
        };
        let is_gone = matches!(first.1, News::Change(Change::Deleted(_)));
        let mut together = vec![first];
        let end = match K::DEFINITION {
            Definition::Custom(_) if is_gone => looks.look::<K>(client, &mut together, events.as_mut()).await,
            _ => Ok(None),
        };
        let end = match end {
            Ok(end) => end,
            Err(problem) => return End::Failed(problem),
        };
        for (next, told) in together {
            *version = next;
            if news.send(told).await.is_err() {
                return End::Unwanted;
            }
        }
        if let Some(end) = end {
            return end;
        }
    }
}

/// What an event of a watch says: the version it leads to, and what is told of it.
type Told<K> = (String, News<<K as Followed>::Kind, <K as Followed>::Object>);

fn told<K: Followed>(event: Result<WatchEvent<K>, Error>) -> Result<Told<K>, End> {
    match event {
        Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
            Ok((object.version().to_owned(), News::Change(Change::Applied(object.into_object()))))
        }
        Ok(WatchEvent::Deleted(object)) => {
            Ok((object.version().to_owned(), News::Change(Change::Deleted(object.into_object()))))
        }
        Ok(WatchEvent::Bookmark(bookmark)) => Ok((bookmark.metadata.resource_version, News::Fresh(K::KIND))),
        Ok(WatchEvent::Error(status)) => Err(ended(&Error::Api(status))),
        Err(error) => Err(ended(&error)),
    }
}

fn ended(error: &Error) -> End {
    match code(error) {
        Some(GONE) => End::Gone,
        Some(NOT_FOUND) => End::NotServed(error.to_string()),
        _ => End::Failed(error.to_string()),
    }
}

fn code(error: &Error) -> Option<u16> {
    match error {
        Error::Api(status) => Some(status.code),
        _ => None,
    }
}

async fn tell_failed<K: Followed>(news: &Sender<K>, problem: String) -> Option<()> {
    news.send(News::Failed(K::KIND, problem)).await.ok()
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

/// The pause before the next try.
#[derive(Debug, Default)]
struct Pause {
    tries: u32,
}

impl Pause {
    /// Doubles; `random` takes up to half of it away.
    fn next(&mut self, random: u64) -> Duration {
        let full = PAUSE_FIRST.saturating_mul(1 << self.tries.min(16)).min(PAUSE_MAX);
        self.tries = self.tries.saturating_add(1);
        let less = full / 2 * u32::try_from(random % 1000).unwrap_or(0) / 1000;
        full - less
    }
}

/// Bits nobody has to be unable to guess; `RandomState` has other keys each time.
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

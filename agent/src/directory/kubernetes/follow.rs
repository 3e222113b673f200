//! One kind of object, listed and then watched for as long as somebody wants to know.
//!
//! ```text
//! list, page by page ──> watch ──closed by the server──> watch on
//!   ▲                      │ ├── failed ── pause ──> watch on
//!   │                      │ └── 410 Gone (the version is too old) ──> list
//!   └─ failed ── pause     ▼
//!                        changes, in order, into a channel of fixed size
//! ```
//! Pauses double from half a second to half a minute, each by chance up to half shorter, so that the agents of a large
//! cluster do not return at one moment. A connection that went silent is given up when the watch's own time is over.

use std::{
    hash::{BuildHasher as _, RandomState},
    time::{Duration, Instant},
};

use futures_util::TryStreamExt as _;
use kube::{
    Client, Error,
    core::{
        Request, WatchEvent,
        params::{ListParams, WatchParams},
    },
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use super::{
    News,
    objects::{Page, Watched},
    store::Change,
};

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
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);

const GONE: u16 = 410;
const NOT_FOUND: u16 = 404;

/// How a watch ended.
enum End {
    /// As the server ends every watch.
    Closed,
    /// What was watched from is no longer known: only a list helps.
    Gone,
    /// Nobody wants to know any more.
    Unwanted,
    Failed(String),
}

/// Follows `K` until nobody listens.
pub(super) async fn follow<K: Watched>(client: Client, news: mpsc::Sender<News>) {
    let mut pause = Pause::default();
    let mut paths = K::PATHS.iter().copied().cycle();
    let mut path = paths.next().unwrap_or_default();
    loop {
        match list::<K>(&client, path, &news).await {
            Ok(version) => {
                pause = Pause::default();
                if watch_on::<K>(&client, path, version, &news, &mut pause).await.is_none() {
                    return;
                }
            }
            Err(error) => {
                if code(&error) == Some(NOT_FOUND) {
                    path = paths.next().unwrap_or_default();
                }
                if tell_failed::<K>(&news, path, &error.to_string()).await.is_none() {
                    return;
                }
                sleep(pause.next(random())).await;
            }
        }
        if news.is_closed() {
            return;
        }
    }
}

/// Lists all objects; answers the version from which to watch.
async fn list<K: Watched>(client: &Client, path: &str, news: &mpsc::Sender<News>) -> Result<String, Error> {
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
            let _ = news.send(News::Change(Change::Listed(K::KIND))).await;
            let _ = news.send(News::Fresh(K::KIND)).await;
            return Ok(page.metadata.resource_version);
        }
    }
}

/// Watches until a list is needed; `None` when nobody listens any more.
async fn watch_on<K: Watched>(
    client: &Client,
    path: &str,
    mut version: String,
    news: &mpsc::Sender<News>,
    pause: &mut Pause,
) -> Option<()> {
    loop {
        let begin = Instant::now();
        let end = watch::<K>(client, path, &mut version, news).await;
        let problem = match end {
            End::Unwanted => return None,
            End::Gone => return Some(()),
            End::Closed if begin.elapsed() >= WATCH_SHORT => {
                *pause = Pause::default();
                continue;
            }
            End::Closed => "the watch ended at once".to_owned(),
            End::Failed(problem) => problem,
        };
        tell_failed::<K>(news, path, &problem).await?;
        if begin.elapsed() >= PAUSE_MAX {
            *pause = Pause::default();
        }
        sleep(pause.next(random())).await;
    }
}

/// One watch, from `version` on, which is kept up to date.
async fn watch<K: Watched>(
    client: &Client,
    path: &str,
    version: &mut String,
    news: &mpsc::Sender<News>,
) -> End {
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
    let mut events = std::pin::pin!(events);
    if news.send(News::Fresh(K::KIND)).await.is_err() {
        return End::Unwanted;
    }
    loop {
        let event = match timeout(WATCH_SILENCE, events.try_next()).await {
            Ok(Ok(Some(event))) => event,
            Ok(Ok(None)) => return End::Closed,
            Ok(Err(error)) => return ended(&error),
            Err(_) => return End::Failed(format!("silent for {WATCH_SILENCE:?}")),
        };
        let change = match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => Change::Applied(object.into_object()),
            WatchEvent::Deleted(object) => Change::Deleted(object.into_object()),
            WatchEvent::Bookmark(bookmark) => {
                *version = bookmark.metadata.resource_version;
                if news.send(News::Fresh(K::KIND)).await.is_err() {
                    return End::Unwanted;
                }
                continue;
            }
            WatchEvent::Error(status) => return ended(&Error::Api(status)),
        };
        if let Change::Applied(object) | Change::Deleted(object) = &change {
            object.meta().resource_version.clone_into(version);
        }
        if news.send(News::Change(change)).await.is_err() {
            return End::Unwanted;
        }
    }
}

fn ended(error: &Error) -> End {
    if code(error) == Some(GONE) { End::Gone } else { End::Failed(error.to_string()) }
}

fn code(error: &Error) -> Option<u16> {
    match error {
        Error::Api(status) => Some(status.code),
        _ => None,
    }
}

async fn tell_failed<K: Watched>(news: &mpsc::Sender<News>, path: &str, problem: &str) -> Option<()> {
    news.send(News::Failed(K::KIND, format!("{path}: {problem}"))).await.ok()
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
fn random() -> u64 {
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

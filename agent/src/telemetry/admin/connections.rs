//! The connections of an admin server. A newcomer is always served: when its source address has its share, or all places are
//! taken, another connection gives way.
//!
//! The source with the most connections loses one: its oldest that has not asked anything yet, or else its oldest. So silent
//! connections keep no scrape out, of their own address neither, and slow readers of one address keep no other address out.

use std::{
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use tacit_core::shares::{ADMIN_CONNECTIONS, Bounds, Capacity, Ledger, ShareUse};
use tokio::task::AbortHandle;

/// The open connections, oldest first.
#[derive(Debug)]
pub(in crate::telemetry) struct Connections(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    open: Vec<Open>,
    sources: Ledger<Source>,
    next_id: u64,
}

/// Address of a client; `None` on the operator's socket.
type Source = Option<IpAddr>;

#[derive(Debug)]
struct Open {
    id: u64,
    source: Source,
    has_asked: Arc<AtomicBool>,
    /// `None` until its task runs.
    task: Option<AbortHandle>,
}

impl Default for Connections {
    fn default() -> Self {
        // No bound here depends on the node.
        Self::new(ADMIN_CONNECTIONS.bounds(Capacity { descriptors: 0 }))
    }
}

impl Connections {
    fn new(bounds: Bounds) -> Self {
        Self(Mutex::new(Inner { open: Vec::new(), sources: Ledger::new(bounds), next_id: 0 }))
    }

    /// Counts a connection until its place is dropped; another one may have to end for it.
    pub(super) fn open(self: &Arc<Self>, source: Source) -> Place {
        let mut inner = self.lock();
        while inner.sources.check(&source).is_err() {
            // Counts the refusal: here it is another's loss.
            inner.sources.refuse();
            if !inner.end_one(source) {
                break;
            }
        }
        // Succeeds: the loop has made room.
        let _ = inner.sources.take(source);
        let (id, has_asked) = (inner.next_id, Arc::<AtomicBool>::default());
        inner.next_id += 1;
        inner.open.push(Open { id, source, has_asked: has_asked.clone(), task: None });
        Place { connections: self.clone(), id, has_asked }
    }

    /// Returns the use by source.
    pub(in crate::telemetry) fn usage(&self) -> ShareUse<String> {
        let name = |source: Source| source.map_or_else(|| "operator".to_owned(), |source| source.to_string());
        self.lock().sources.usage(ADMIN_CONNECTIONS.resource).named(name)
    }

    /// A panic under the lock leaves at most one place counted, so a poisoned lock is still good.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Ends a connection, so that one of `newcomer` has room. Returns false if there is none.
    fn end_one(&mut self, newcomer: Source) -> bool {
        let Bounds { each, .. } = self.sources.bounds();
        let own_is_full = self.sources.held(&newcomer) >= each;
        let loser =
            if own_is_full { Some(newcomer) } else { self.sources.fullest().map(|(source, _)| source) };
        let Some(loser) = loser else { return false };
        let of_loser = || self.open.iter().enumerate().filter(|(_, open)| open.source == loser);
        let silent = of_loser().find(|(_, open)| !open.has_asked.load(Relaxed));
        let Some((at, _)) = silent.or_else(|| of_loser().next()) else { return false };
        let ended = self.open.remove(at);
        self.sources.release(&ended.source);
        if let Some(task) = ended.task {
            task.abort();
        }
        true
    }
}

/// The place of one connection.
pub(super) struct Place {
    connections: Arc<Connections>,
    id: u64,
    has_asked: Arc<AtomicBool>,
}

impl Place {
    /// Records that a whole request has arrived.
    pub(super) fn has_asked(&self) -> Arc<AtomicBool> {
        self.has_asked.clone()
    }

    /// Returns what ends the task of this place.
    pub(super) fn id(&self) -> u64 {
        self.id
    }
}

impl Connections {
    /// Lets the place `id` end its task. A place that gave way before ends it at once.
    pub(super) fn started(&self, id: u64, task: AbortHandle) {
        match self.lock().open.iter_mut().find(|open| open.id == id) {
            Some(open) => open.task = Some(task),
            None => task.abort(),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inner = self.connections.lock();
        if let Some(at) = inner.open.iter().position(|open| open.id == self.id) {
            let source = inner.open.remove(at).source;
            inner.sources.release(&source);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { total: 6, each: 4 };

    fn from(last: u8) -> Source {
        Some([10, 0, 0, last].into())
    }

    fn open_ids(all: &Arc<Connections>) -> Vec<u64> {
        all.lock().open.iter().map(|open| open.id).collect()
    }

    #[test]
    fn the_oldest_silent_connection_of_the_same_source_gives_way() {
        let all = Arc::new(Connections::new(BOUNDS));
        let places: Vec<_> = (0..4).map(|_| all.open(from(1))).collect();
        places[0].has_asked().store(true, Relaxed);
        let newest = all.open(from(1));
        assert_eq!(open_ids(&all), [0, 2, 3, newest.id()]);
        for place in &places {
            place.has_asked().store(true, Relaxed);
        }
        newest.has_asked().store(true, Relaxed);
        let _last = all.open(from(1));
        assert_eq!(open_ids(&all), [2, 3, 4, 5], "none is silent: the oldest");
        assert_eq!(all.usage().refused, 2);
    }

    #[test]
    fn a_source_with_few_connections_loses_none_to_one_with_many() {
        let all = Arc::new(Connections::new(BOUNDS));
        let scraper = all.open(from(2));
        let mut attacker: Vec<_> = (0..1000).map(|_| all.open(from(1))).collect();
        assert!(open_ids(&all).contains(&scraper.id()));
        let second = all.open(from(3));
        assert!(open_ids(&all).contains(&second.id()) && all.usage().used <= BOUNDS.total);
        attacker.clear();
        drop((scraper, second));
        assert_eq!(
            (all.usage().used, open_ids(&all).len()),
            (0, 0),
            "a place that gave way is released once"
        );
    }
}

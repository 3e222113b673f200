//! Idle sessions kept for the next flow of the same pair. Pure: time comes in as an argument, sessions are any type.
//!
//! The most recently used session is taken first, so that sessions left over from a burst expire. The server waits longer
//! before it closes an idle session (`session::SERVER_IDLE`), so a session is not closed at the moment it is taken.
//!
//! The pool drops no session. Every method returns the sessions that it removes, so that a caller that locks the pool can
//! close their sockets after it has released the lock.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

use crate::shares::{Bounds, Ledger};

/// An idle session is kept this long: above the usual gap between two calls of one pod.
pub const IDLE: Duration = Duration::from_secs(90);
/// Idle sessions of one pair in one pool; above the concurrency of an ordinary client of one destination.
pub const PER_KEY_MAX: usize = 64;
/// Idle sessions `S` by pair `K`. Each owner `O` of pairs has a share of the pool.
#[derive(Debug)]
pub struct Pool<K, O, S> {
    /// Of each pair the sessions with the time they came, the latest last. No list is empty.
    idle: HashMap<K, Vec<(Instant, S)>>,
    owner: fn(&K) -> O,
    owners: Ledger<O>,
}

impl<K: Eq + Hash + Clone, O: Eq + Hash + Clone, S> Pool<K, O, S> {
    /// An empty pool with these bounds. `owner` returns the owner of a pair.
    #[must_use]
    pub fn new(bounds: Bounds, owner: fn(&K) -> O) -> Self {
        Self { idle: HashMap::new(), owner, owners: Ledger::new(bounds) }
    }

    /// Takes out the most recently used session of `key` that is not too old. Older ones stay until [`Pool::expire`].
    pub fn take(&mut self, key: &K, now: Instant) -> Option<S> {
        let list = self.idle.get_mut(key)?;
        let (_, session) = list.pop_if(|(since, _)| now.duration_since(*since) < IDLE)?;
        self.owners.release(&(self.owner)(key));
        if list.is_empty() {
            self.idle.remove(key);
        }
        Some(session)
    }

    /// Keeps `session` for `key`. Returns the session that has no room, if any: the pair's oldest at the bound of the pair,
    /// at the share of the owner the pair's oldest, or `session` itself if the pair has no other.
    #[must_use = "close the session that did not fit"]
    pub fn put(&mut self, key: K, session: S, now: Instant) -> Option<S> {
        let list = self.idle.get_mut(&key);
        let is_pair_full = list.as_ref().is_some_and(|list| list.len() >= PER_KEY_MAX);
        if !is_pair_full && self.owners.take((self.owner)(&key)).is_ok() {
            self.idle.entry(key).or_default().push((now, session));
            return None;
        }
        match list {
            Some(list) => {
                list.push((now, session));
                Some(list.remove(0).1)
            }
            None => Some(session),
        }
    }

    /// Takes out all sessions that are too old.
    #[must_use = "close them"]
    pub fn expire(&mut self, now: Instant) -> Vec<S> {
        self.remove(|_, since, _| now.duration_since(since) >= IDLE)
    }

    /// Takes out all sessions for which `unwanted` is true, for example of an identity that was renewed or removed.
    #[must_use = "close them"]
    pub fn clear_where(&mut self, unwanted: impl Fn(&K, &S) -> bool) -> Vec<S> {
        self.remove(|key, _, session| unwanted(key, session))
    }

    /// Takes out all sessions of `key`.
    #[must_use = "close them"]
    pub fn clear(&mut self, key: &K) -> Vec<S> {
        let removed = self.idle.remove(key).unwrap_or_default();
        removed.iter().for_each(|_| self.owners.release(&(self.owner)(key)));
        removed.into_iter().map(|(_, session)| session).collect()
    }

    /// Returns the number of idle sessions.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::try_from(self.owners.used()).unwrap_or(usize::MAX)
    }

    /// Returns the bounds.
    #[must_use]
    pub fn bounds(&self) -> Bounds {
        self.owners.bounds()
    }

    /// Returns the number of sessions that found their owner's share full.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.owners.refused()
    }

    /// Returns every owner that has sessions, with their number.
    pub fn owners(&self) -> impl Iterator<Item = (O, u64)> + '_ {
        self.owners.holders()
    }

    /// True when none is idle.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.owners.used() == 0
    }

    fn remove(&mut self, unwanted: impl Fn(&K, Instant, &S) -> bool) -> Vec<S> {
        let mut removed = Vec::new();
        let (owner, owners) = (self.owner, &mut self.owners);
        self.idle.retain(|key, list| {
            let before = removed.len();
            removed.extend(list.extract_if(.., |(since, session)| unwanted(key, *since, session)));
            removed[before..].iter().for_each(|_| owners.release(&owner(key)));
            !list.is_empty()
        });
        removed.into_iter().map(|(_, session)| session).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: usize = 1000;
    const BOUNDS: Bounds = Bounds { total: 100_000, each: 1000 };

    fn pool<K: Eq + Hash + Clone>() -> Pool<K, (), i32> {
        Pool::new(BOUNDS, |_| ())
    }

    #[test]
    fn the_latest_session_of_the_pair_is_taken_first() {
        let now = Instant::now();
        let mut pool = pool();
        assert_eq!(pool.put("a", 1, now), None);
        assert_eq!(pool.put("a", 2, now), None);
        assert_eq!(pool.put("b", 3, now), None);
        assert_eq!(pool.take(&"a", now), Some(2));
        assert_eq!(pool.take(&"a", now), Some(1));
        assert_eq!(pool.take(&"a", now), None);
        assert_eq!(pool.len(), 1);
    }

    #[test]
    fn old_sessions_are_not_taken_and_stay_until_they_expire() {
        let now = Instant::now();
        let mut pool = pool();
        assert_eq!(pool.put("a", 1, now), None);
        assert_eq!(pool.put("a", 2, now), None);
        assert_eq!(pool.take(&"a", now + IDLE), None);
        assert_eq!(pool.len(), 2);
        assert_eq!(pool.expire(now + IDLE), [1, 2]);
        assert!(pool.is_empty());
    }

    #[test]
    fn sessions_expire_and_are_handed_out_for_closing() {
        let now = Instant::now();
        let mut pool = pool();
        assert_eq!(pool.put("a", 1, now), None);
        assert_eq!(pool.put("a", 2, now + IDLE / 2), None);
        assert!(pool.expire(now + IDLE - Duration::from_millis(1)).is_empty());
        assert_eq!(pool.expire(now + IDLE), [1]);
        assert_eq!(pool.take(&"a", now + IDLE), Some(2));
    }

    #[test]
    fn sessions_of_an_identity_can_be_cleared() {
        let now = Instant::now();
        let mut pool = pool();
        for (key, session) in [("a", 1), ("b", 2), ("a", 3)] {
            assert_eq!(pool.put(key, session, now), None);
        }
        assert_eq!(pool.clear_where(|key, _| *key == "a"), [1, 3]);
        assert_eq!((pool.len(), pool.take(&"b", now)), (1, Some(2)));
    }

    #[test]
    fn sessions_of_a_pair_can_be_cleared() {
        let now = Instant::now();
        let mut pool = pool();
        for (key, session) in [("a", 1), ("b", 2), ("a", 3)] {
            assert_eq!(pool.put(key, session, now), None);
        }
        assert_eq!(pool.clear(&"a"), [1, 3]);
        assert!(pool.clear(&"a").is_empty());
        assert_eq!((pool.len(), pool.take(&"b", now)), (1, Some(2)));
        assert!(pool.is_empty());
    }

    #[test]
    fn a_pair_and_its_owner_have_bounds() {
        let now = Instant::now();
        let mut pool = Pool::new(BOUNDS, |(owner, _): &(char, usize)| *owner);
        for session in 0..PER_KEY_MAX {
            assert_eq!(pool.put(('a', 0), session, now), None);
        }
        assert_eq!(pool.put(('a', 0), 999, now), Some(0), "the pair's oldest makes room");
        for pair in 1..=ROOM - PER_KEY_MAX {
            assert_eq!(pool.put(('a', pair), pair, now), None);
        }
        assert_eq!(pool.len(), ROOM);
        assert_eq!(pool.put(('a', 1_000_000), 7, now), Some(7), "the owner has its share");
        assert_eq!(pool.put(('a', 1), 8, now), Some(1), "a pair replaces its own at the owner's share");
        assert_eq!((pool.len(), pool.refused()), (ROOM, 2));
        assert_eq!(pool.put(('b', 0), 9, now), None, "another owner has room");
        assert_eq!(pool.owners().find(|(owner, _)| *owner == 'b'), Some(('b', 1)));
    }
}

//! Idle sessions kept for the next flow of the same pair. Pure: time comes in as an argument, sessions are any type.
//!
//! The session used last is taken first, so that those a burst has left over grow old and go. The server waits longer
//! before it closes an idle session (`session::SERVER_IDLE`), so a session is not closed at the moment it is taken.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

/// An idle session is kept this long: above the usual gap between two calls of one pod.
pub const IDLE: Duration = Duration::from_secs(90);
/// Idle sessions of one pair; above the concurrency of an ordinary client of one destination.
pub const PER_KEY_MAX: usize = 64;
/// Idle sessions of the node; each costs a socket and a few KiB here and at its peer.
pub const TOTAL_MAX: usize = 8192;

/// Idle sessions `S` by pair `K`.
#[derive(Debug)]
pub struct Pool<K, S> {
    /// Of each pair the sessions with the time they came, the latest last. No list is empty.
    idle: HashMap<K, Vec<(Instant, S)>>,
    total: usize,
}

impl<K, S> Default for Pool<K, S> {
    fn default() -> Self {
        Self { idle: HashMap::new(), total: 0 }
    }
}

impl<K: Eq + Hash + Clone, S> Pool<K, S> {
    /// The session of `key` that was used last, is not too old and is `alive`. Those found dead are dropped.
    pub fn take(&mut self, key: &K, now: Instant, alive: impl Fn(&S) -> bool) -> Option<S> {
        let list = self.idle.get_mut(key)?;
        let mut found = None;
        while let Some((since, session)) = list.pop() {
            self.total -= 1;
            if now.duration_since(since) < IDLE && alive(&session) {
                found = Some(session);
                break;
            }
        }
        if list.is_empty() {
            self.idle.remove(key);
        }
        found
    }

    /// Keeps `session` for `key`. Returns the session that had to make room, if any: the pair's oldest at the pair's bound,
    /// `session` itself at the node's.
    #[must_use = "close the session that did not fit"]
    pub fn put(&mut self, key: K, session: S, now: Instant) -> Option<S> {
        let full = self.total >= TOTAL_MAX;
        let list = self.idle.get_mut(&key);
        match list {
            Some(list) if list.len() >= PER_KEY_MAX || full => {
                list.push((now, session));
                Some(list.remove(0).1)
            }
            _ if full => Some(session),
            _ => {
                self.idle.entry(key).or_default().push((now, session));
                self.total += 1;
                None
            }
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

    /// How many sessions are idle.
    #[must_use]
    pub fn len(&self) -> usize {
        self.total
    }

    /// True when none is idle.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    fn remove(&mut self, unwanted: impl Fn(&K, Instant, &S) -> bool) -> Vec<S> {
        let mut removed = Vec::new();
        self.idle.retain(|key, list| {
            removed.extend(list.extract_if(.., |(since, session)| unwanted(key, *since, session)));
            !list.is_empty()
        });
        self.total -= removed.len();
        removed.into_iter().map(|(_, session)| session).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alive(_: &u32) -> bool {
        true
    }

    #[test]
    fn the_latest_session_of_the_pair_is_taken_first() {
        let now = Instant::now();
        let mut pool = Pool::default();
        assert_eq!(pool.put("a", 1, now), None);
        assert_eq!(pool.put("a", 2, now), None);
        assert_eq!(pool.put("b", 3, now), None);
        assert_eq!(pool.take(&"a", now, alive), Some(2));
        assert_eq!(pool.take(&"a", now, alive), Some(1));
        assert_eq!(pool.take(&"a", now, alive), None);
        assert_eq!(pool.len(), 1);
    }

    #[test]
    fn dead_and_old_sessions_are_not_taken() {
        let now = Instant::now();
        let mut pool = Pool::default();
        for session in 1..=3 {
            assert_eq!(pool.put("a", session, now), None);
        }
        assert_eq!(pool.take(&"a", now, |session| *session < 3), Some(2));
        assert_eq!(pool.take(&"a", now + IDLE, alive), None);
        assert!(pool.is_empty());
    }

    #[test]
    fn sessions_expire_and_are_handed_out_for_closing() {
        let now = Instant::now();
        let mut pool = Pool::default();
        assert_eq!(pool.put("a", 1, now), None);
        assert_eq!(pool.put("a", 2, now + IDLE / 2), None);
        assert!(pool.expire(now + IDLE - Duration::from_millis(1)).is_empty());
        assert_eq!(pool.expire(now + IDLE), [1]);
        assert_eq!(pool.take(&"a", now + IDLE, alive), Some(2));
    }

    #[test]
    fn sessions_of_an_identity_can_be_cleared() {
        let now = Instant::now();
        let mut pool = Pool::default();
        for (key, session) in [("a", 1), ("b", 2), ("a", 3)] {
            assert_eq!(pool.put(key, session, now), None);
        }
        assert_eq!(pool.clear_where(|key, _| *key == "a"), [1, 3]);
        assert_eq!((pool.len(), pool.take(&"b", now, alive)), (1, Some(2)));
    }

    #[test]
    fn a_pair_and_the_node_have_bounds() {
        let now = Instant::now();
        let mut pool = Pool::default();
        for session in 0..PER_KEY_MAX {
            assert_eq!(pool.put(0, session, now), None);
        }
        assert_eq!(pool.put(0, 999, now), Some(0), "the pair's oldest makes room");
        for key in 1..=TOTAL_MAX - PER_KEY_MAX {
            assert_eq!(pool.put(key, key, now), None);
        }
        assert_eq!(pool.len(), TOTAL_MAX);
        assert_eq!(pool.put(1_000_000, 7, now), Some(7), "no room on the node");
        assert_eq!(pool.put(1, 8, now), Some(1), "a pair replaces its own at the node's bound");
        assert_eq!(pool.len(), TOTAL_MAX);
    }
}

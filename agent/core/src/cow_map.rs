//! A hash map whose copies share what did not change: the entries stand in [`SHARDS`] maps of their own, and a change
//! copies the one map it falls into, unless nobody else holds it.
//!
//! With 100,000 entries a change copies some 400 of them and 256 pointers. A lookup is two hashes.

use std::{
    borrow::Borrow,
    collections::HashMap,
    hash::{BuildHasher as _, Hash, RandomState},
    sync::Arc,
};

/// About the square root of the largest number of entries meant, where copying shards and copying pointers cost the same.
const SHARDS: usize = 256;

/// `N` is the number of shards.
#[derive(Debug)]
pub(crate) struct CowMap<K, V, const N: usize = SHARDS> {
    shards: Vec<Arc<HashMap<K, V>>>,
    hasher: RandomState,
    len: usize,
}

impl<K, V, const N: usize> Clone for CowMap<K, V, N> {
    fn clone(&self) -> Self {
        Self { shards: self.shards.clone(), hasher: self.hasher.clone(), len: self.len }
    }
}

impl<K, V, const N: usize> Default for CowMap<K, V, N> {
    fn default() -> Self {
        let empty = Arc::new(HashMap::new());
        Self { shards: vec![empty; N], hasher: RandomState::new(), len: 0 }
    }
}

impl<K: Eq + Hash, V: PartialEq, const N: usize> PartialEq for CowMap<K, V, N> {
    fn eq(&self, other: &Self) -> bool {
        let mut entries = self.shards.iter().flat_map(|shard| shard.iter());
        self.len == other.len && entries.all(|(key, value)| other.shard_of(key).get(key) == Some(value))
    }
}

impl<K: Eq + Hash, V: Eq, const N: usize> Eq for CowMap<K, V, N> {}

impl<K, V, const N: usize> CowMap<K, V, N> {
    fn shard_of<Q: Hash + ?Sized>(&self, key: &Q) -> &HashMap<K, V> {
        &self.shards[self.shard(key)]
    }

    fn shard<Q: Hash + ?Sized>(&self, key: &Q) -> usize {
        // The remainder is below N, so it is an index on every platform.
        usize::try_from(self.hasher.hash_one(key) % N as u64).unwrap_or(0)
    }
}

impl<K: Eq + Hash + Clone, V: Clone, const N: usize> CowMap<K, V, N> {
    pub(crate) fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.shard_of(key).get(key)
    }

    pub(crate) fn insert(&mut self, key: K, value: V) {
        let shard = self.shard(&key);
        if Arc::make_mut(&mut self.shards[shard]).insert(key, value).is_none() {
            self.len += 1;
        }
    }

    pub(crate) fn remove<Q: Eq + Hash + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let shard = self.shard(key);
        // Nothing is copied for a key that is not there.
        self.shards[shard].get(key)?;
        let removed = Arc::make_mut(&mut self.shards[shard]).remove(key);
        self.len -= usize::from(removed.is_some());
        removed
    }

    /// Returns the entries that differ from `before`: the key, the value before and the value now. Of two copies of one map
    /// only the shards are read that changed.
    pub(crate) fn changes<'a>(&'a self, before: &'a Self) -> Vec<(&'a K, Option<&'a V>, Option<&'a V>)>
    where
        V: PartialEq,
    {
        let are_copies = self.hasher.hash_one(0) == before.hasher.hash_one(0);
        let pairs = self.shards.iter().zip(&before.shards);
        let changed = pairs.filter(|(now, before)| !are_copies || !Arc::ptr_eq(now, before));
        let mut changes = Vec::new();
        for (now, old) in changed {
            let gone = old.iter().filter(|(key, _)| self.get(key).is_none());
            changes.extend(gone.map(|(key, value)| (key, Some(value), None)));
            let other = now.iter().map(|(key, value)| (key, before.get(key), Some(value)));
            changes.extend(other.filter(|(_, before, now)| before != now));
        }
        changes
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &V> {
        self.shards.iter().flat_map(|shard| shard.values())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards.iter().flat_map(|shard| shard.iter())
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_keeps_what_it_was() {
        let mut map = <CowMap<_, _>>::default();
        (0..10_000_u32).for_each(|key| map.insert(key, key));
        let copy = map.clone();
        map.insert(7, 70);
        map.insert(10_000, 1);
        assert_eq!(map.remove(&8), Some(8));
        assert_eq!(map.remove(&8), None);
        assert_eq!((map.get(&7), map.get(&8), map.len()), (Some(&70), None, 10_000));
        assert_eq!((copy.get(&7), copy.get(&8), copy.len()), (Some(&7), Some(&8), 10_000));
        assert_eq!(copy.values().count(), 10_000);
        assert!(!copy.is_empty() && <CowMap<u32, u32>>::default().is_empty());
    }

    #[test]
    fn a_change_copies_one_shard() {
        let mut map = <CowMap<_, _>>::default();
        (0..10_000_u32).for_each(|key| map.insert(key, key));
        let copy = map.clone();
        map.insert(7, 70);
        map.remove(&20_000);
        let copied = map.shards.iter().zip(&copy.shards).filter(|(a, b)| !Arc::ptr_eq(a, b));
        assert_eq!(copied.count(), 1);
    }

    #[test]
    fn the_changes_of_a_copy_are_found_in_the_shards_that_changed() {
        let mut map = <CowMap<_, _>>::default();
        (0..10_000_u32).for_each(|key| map.insert(key, key));
        let before = map.clone();
        assert!(map.changes(&before).is_empty());
        map.insert(7, 70);
        map.insert(8, 8);
        map.insert(10_000, 1);
        map.remove(&9);
        let mut changes = map.changes(&before);
        changes.sort();
        assert_eq!(changes, [(&7, Some(&7), Some(&70)), (&9, Some(&9), None), (&10_000, None, Some(&1))]);
        let mut other = <CowMap<_, _>>::default();
        before.iter().for_each(|(key, value)| other.insert(*key, *value));
        let mut changes = map.changes(&other);
        changes.sort();
        assert_eq!(changes.len(), 3, "of a map with other shards too");
    }
}

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

#[derive(Debug)]
pub(super) struct CowMap<K, V> {
    shards: Vec<Arc<HashMap<K, V>>>,
    hasher: RandomState,
    len: usize,
}

impl<K, V> Clone for CowMap<K, V> {
    fn clone(&self) -> Self {
        Self { shards: self.shards.clone(), hasher: self.hasher.clone(), len: self.len }
    }
}

impl<K, V> Default for CowMap<K, V> {
    fn default() -> Self {
        let empty = Arc::new(HashMap::new());
        Self { shards: vec![empty; SHARDS], hasher: RandomState::new(), len: 0 }
    }
}

impl<K: Eq + Hash + Clone, V: Clone> CowMap<K, V> {
    pub(super) fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.shards[self.shard(key)].get(key)
    }

    pub(super) fn insert(&mut self, key: K, value: V) {
        let shard = self.shard(&key);
        if Arc::make_mut(&mut self.shards[shard]).insert(key, value).is_none() {
            self.len += 1;
        }
    }

    pub(super) fn remove<Q: Eq + Hash + ?Sized>(&mut self, key: &Q) -> Option<V>
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

    pub(super) fn values(&self) -> impl Iterator<Item = &V> {
        self.shards.iter().flat_map(|shard| shard.values())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards.iter().flat_map(|shard| shard.iter())
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn shard<Q: Hash + ?Sized>(&self, key: &Q) -> usize {
        // The remainder is below SHARDS, so it is an index on every platform.
        usize::try_from(self.hasher.hash_one(key) % SHARDS as u64).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_keeps_what_it_was() {
        let mut map = CowMap::default();
        (0..10_000_u32).for_each(|key| map.insert(key, key));
        let copy = map.clone();
        map.insert(7, 70);
        map.insert(10_000, 1);
        assert_eq!(map.remove(&8), Some(8));
        assert_eq!(map.remove(&8), None);
        assert_eq!((map.get(&7), map.get(&8), map.len()), (Some(&70), None, 10_000));
        assert_eq!((copy.get(&7), copy.get(&8), copy.len()), (Some(&7), Some(&8), 10_000));
        assert_eq!(copy.values().count(), 10_000);
        assert!(!copy.is_empty() && CowMap::<u32, u32>::default().is_empty());
    }

    #[test]
    fn a_change_copies_one_shard() {
        let mut map = CowMap::default();
        (0..10_000_u32).for_each(|key| map.insert(key, key));
        let copy = map.clone();
        map.insert(7, 70);
        map.remove(&20_000);
        let copied = map.shards.iter().zip(&copy.shards).filter(|(a, b)| !Arc::ptr_eq(a, b));
        assert_eq!(copied.count(), 1);
    }
}

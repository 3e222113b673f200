//! A hash map whose copies share what did not change. A copy costs one pointer, whatever the size of the map.
//!
//! ```text
//! root ──> N branches ──> 32 leaves each, hash maps of their own
//! ```
//! A change copies the root, one branch and one leaf, unless nobody else holds them. Beside 20,000 entries that is 64 pointers and
//! some 20 entries, beside 100,000 some 100. A lookup is two hashes.

use std::{
    borrow::Borrow,
    collections::HashMap,
    hash::{BuildHasher as _, Hash, RandomState},
    sync::Arc,
};

/// Branches of a map of all pods or services. With [`LEAVES`] it makes 1,024 leaves, so that copying a leaf costs as much as
/// copying the pointers to it at some 60,000 entries.
const BRANCHES: usize = 32;
/// Leaves of a branch.
const LEAVES: usize = 32;

type Leaf<K, V> = Arc<HashMap<K, V>>;
type Branch<K, V> = Arc<[Leaf<K, V>]>;

/// `N` is the number of branches.
#[derive(Debug)]
pub(crate) struct CowMap<K, V, const N: usize = BRANCHES> {
    root: Arc<[Branch<K, V>]>,
    hasher: RandomState,
    len: usize,
}

impl<K, V, const N: usize> Clone for CowMap<K, V, N> {
    fn clone(&self) -> Self {
        Self { root: Arc::clone(&self.root), hasher: self.hasher.clone(), len: self.len }
    }
}

impl<K, V, const N: usize> Default for CowMap<K, V, N> {
    fn default() -> Self {
        let leaf: Leaf<K, V> = Arc::default();
        let branch: Branch<K, V> = vec![leaf; LEAVES].into();
        Self { root: vec![branch; N].into(), hasher: RandomState::new(), len: 0 }
    }
}

impl<K: Eq + Hash, V: PartialEq, const N: usize> PartialEq for CowMap<K, V, N> {
    fn eq(&self, other: &Self) -> bool {
        let mut entries = self.leaves().flat_map(|leaf| leaf.iter());
        self.len == other.len && entries.all(|(key, value)| other.leaf_of(key).get(key) == Some(value))
    }
}

impl<K: Eq + Hash, V: Eq, const N: usize> Eq for CowMap<K, V, N> {}

impl<K, V, const N: usize> CowMap<K, V, N> {
    fn leaf_of<Q: Hash + ?Sized>(&self, key: &Q) -> &Leaf<K, V> {
        let (branch, leaf) = self.place(key);
        &self.root[branch][leaf]
    }

    /// Returns the index of the branch and of the leaf in it.
    fn place<Q: Hash + ?Sized>(&self, key: &Q) -> (usize, usize) {
        // The remainder is below the number of leaves, so it is an index on every platform.
        let place = usize::try_from(self.hasher.hash_one(key) % (N * LEAVES) as u64).unwrap_or(0);
        (place / LEAVES, place % LEAVES)
    }

    fn leaves(&self) -> impl Iterator<Item = &Leaf<K, V>> {
        self.root.iter().flat_map(|branch| branch.iter())
    }
}

impl<K: Eq + Hash + Clone, V: Clone, const N: usize> CowMap<K, V, N> {
    pub(crate) fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.leaf_of(key).get(key)
    }

    pub(crate) fn insert(&mut self, key: K, value: V) {
        let place = self.place(&key);
        if self.leaf_mut(place).insert(key, value).is_none() {
            self.len += 1;
        }
    }

    pub(crate) fn remove<Q: Eq + Hash + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let (branch, leaf) = self.place(key);
        // Nothing is copied for a key that is not there.
        self.root[branch][leaf].get(key)?;
        let removed = self.leaf_mut((branch, leaf)).remove(key);
        self.len -= usize::from(removed.is_some());
        removed
    }

    fn leaf_mut(&mut self, (branch, leaf): (usize, usize)) -> &mut HashMap<K, V> {
        let branch = &mut Arc::make_mut(&mut self.root)[branch];
        Arc::make_mut(&mut Arc::make_mut(branch)[leaf])
    }

    /// Returns the entries that differ from `before`: the key, the value before and the value now. Of two copies of one map
    /// only the leaves are read that changed.
    pub(crate) fn changes<'a>(&'a self, before: &'a Self) -> Vec<(&'a K, Option<&'a V>, Option<&'a V>)>
    where
        V: PartialEq,
    {
        let are_copies = self.hasher.hash_one(0) == before.hasher.hash_one(0);
        let mut changes = Vec::new();
        if are_copies && Arc::ptr_eq(&self.root, &before.root) {
            return changes;
        }
        let branches = self.root.iter().zip(before.root.iter());
        let branches = branches.filter(|(now, before)| !are_copies || !Arc::ptr_eq(now, before));
        let leaves = branches.flat_map(|(now, before)| now.iter().zip(before.iter()));
        for (now, old) in leaves.filter(|(now, before)| !are_copies || !Arc::ptr_eq(now, before)) {
            let gone = old.iter().filter(|(key, _)| self.get(key).is_none());
            changes.extend(gone.map(|(key, value)| (key, Some(value), None)));
            let other = now.iter().map(|(key, value)| (key, before.get(key), Some(value)));
            changes.extend(other.filter(|(_, before, now)| before != now));
        }
        changes
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &V> {
        self.leaves().flat_map(|leaf| leaf.values())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.leaves().flat_map(|leaf| leaf.iter())
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
    fn a_copy_costs_a_pointer_and_a_change_copies_one_leaf() {
        let mut map = <CowMap<_, _>>::default();
        (0..10_000_u32).for_each(|key| map.insert(key, key));
        let copy = map.clone();
        assert!(Arc::ptr_eq(&map.root, &copy.root));
        map.remove(&20_000);
        assert!(Arc::ptr_eq(&map.root, &copy.root), "nothing was removed");
        map.insert(7, 70);
        let branches = map.root.iter().zip(copy.root.iter());
        assert_eq!(branches.filter(|(a, b)| !Arc::ptr_eq(a, b)).count(), 1);
        let leaves = map.leaves().zip(copy.leaves());
        assert_eq!(leaves.filter(|(a, b)| !Arc::ptr_eq(a, b)).count(), 1);
    }

    #[test]
    fn the_changes_of_a_copy_are_found_in_the_leaves_that_changed() {
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
        assert_eq!(changes.len(), 3, "of a map with other leaves too");
    }
}

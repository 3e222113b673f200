//! Interns names, labels and identities, so that workloads share equal values.
//!
//! Unused entries are removed after each relist, and whenever the table has doubled since the last sweep. The sweeps are needed
//! because short-lived pods have unique labels, for example their template hash.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{BuildHasher as _, RandomState},
    sync::Arc,
};

use tacit_core::{directory::Labels, spiffe::SpiffeId};

use super::super::LocalNode;

/// Below this size a sweep is not worthwhile.
const SWEEP_MIN: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Interner {
    strings: HashSet<Arc<str>>,
    /// Keyed by hash. If two sets collide, only the later is kept.
    labels: HashMap<u64, Labels>,
    hasher: RandomState,
    identities: HashMap<(Arc<str>, Arc<str>), SpiffeId>,
    /// Number of entries after the last sweep.
    last_len: usize,
}

impl Interner {
    pub(super) fn intern(&mut self, text: &str) -> Arc<str> {
        if let Some(string) = self.strings.get(text) {
            return Arc::clone(string);
        }
        let string: Arc<str> = text.into();
        self.strings.insert(Arc::clone(&string));
        string
    }

    pub(super) fn labels(&mut self, labels: &BTreeMap<String, String>) -> Labels {
        let hash = self.hasher.hash_one(labels);
        let same = |known: &&Labels| {
            known.iter().eq(labels.iter().map(|(name, value)| (name.as_str(), value.as_str())))
        };
        if let Some(known) = self.labels.get(&hash).filter(same) {
            return known.clone();
        }
        let made: Labels =
            labels.iter().map(|(name, value)| (self.intern(name), self.intern(value))).collect();
        self.labels.insert(hash, made.clone());
        made
    }

    pub(super) fn identity(
        &mut self,
        local_node: &LocalNode,
        namespace: &str,
        account: &str,
    ) -> Option<SpiffeId> {
        let key = (self.intern(namespace), self.intern(account));
        if let Some(identity) = self.identities.get(&key) {
            return Some(identity.clone());
        }
        let identity = SpiffeId::new(&local_node.trust_domain, namespace, account).ok()?;
        self.identities.insert(key, identity.clone());
        Some(identity)
    }

    /// Sweeps if the table has doubled since the last sweep.
    pub(super) fn sweep_if_grown(&mut self) {
        if self.len() > 2 * self.last_len.max(SWEEP_MIN) {
            self.sweep();
        }
    }

    /// Removes the entries that no object uses.
    pub(super) fn sweep(&mut self) {
        self.identities.clear();
        self.labels.retain(|_, labels| labels.is_shared());
        self.strings.retain(|string| Arc::strong_count(string) > 1);
        self.last_len = self.len();
    }

    fn len(&self) -> usize {
        self.strings.len() + self.labels.len() + self.identities.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_shared_and_unused_values_removed() {
        let mut interner = Interner::default();
        let take = |interner: &mut Interner, text: &str| {
            let labels =
                [("app", "web"), ("hash", text)].map(|(name, value)| (name.to_owned(), value.to_owned()));
            interner.labels(&labels.into())
        };
        let kept = take(&mut interner, "kept");
        assert!(std::ptr::eq(
            kept.get("app").expect("there"),
            take(&mut interner, "kept").get("app").expect("there")
        ));
        for pod in 0..10_000 {
            take(&mut interner, &pod.to_string());
            interner.sweep_if_grown();
            assert!(interner.len() <= 2 * SWEEP_MIN + 2, "{} strings of deleted pods", interner.len());
        }
        interner.sweep();
        // "app", "web", "hash", "kept" and the labels.
        assert_eq!(interner.len(), 5);
        assert!(std::ptr::eq(
            kept.get("hash").expect("there"),
            take(&mut interner, "kept").get("hash").expect("there")
        ));
    }
}

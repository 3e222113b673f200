//! Names, labels and identities that many workloads have, kept once.
//!
//! What no object has any more is forgotten after a list, and in between once there is twice as much as was left then: pods
//! that come and go bring words of their own, such as the hash of their template.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{BuildHasher as _, RandomState},
    sync::Arc,
};

use tacit_core::{directory::Labels, spiffe::SpiffeId};

use super::super::Place;

/// So many are not worth a look at all.
const FEW: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Interner {
    words: HashSet<Arc<str>>,
    /// By the hash of what they say. Of two with one hash the later is kept.
    labels: HashMap<u64, Labels>,
    hasher: RandomState,
    identities: HashMap<(Arc<str>, Arc<str>), SpiffeId>,
    /// How many were in use when that was last looked at.
    used: usize,
}

impl Interner {
    pub(super) fn word(&mut self, text: &str) -> Arc<str> {
        if let Some(word) = self.words.get(text) {
            return Arc::clone(word);
        }
        let word: Arc<str> = text.into();
        self.words.insert(Arc::clone(&word));
        word
    }

    pub(super) fn labels(&mut self, labels: &BTreeMap<String, String>) -> Labels {
        let hash = self.hasher.hash_one(labels);
        let same = |known: &&Labels| {
            known.iter().eq(labels.iter().map(|(name, value)| (name.as_str(), value.as_str())))
        };
        if let Some(known) = self.labels.get(&hash).filter(same) {
            return known.clone();
        }
        let made: Labels = labels.iter().map(|(name, value)| (self.word(name), self.word(value))).collect();
        self.labels.insert(hash, made.clone());
        made
    }

    pub(super) fn identity(&mut self, place: &Place, namespace: &str, account: &str) -> Option<SpiffeId> {
        let key = (self.word(namespace), self.word(account));
        if let Some(identity) = self.identities.get(&key) {
            return Some(identity.clone());
        }
        let identity = SpiffeId::new(&place.trust_domain, namespace, account).ok()?;
        self.identities.insert(key, identity.clone());
        Some(identity)
    }

    /// Forgets what no object has any more when there has come much.
    pub(super) fn forget_when_many(&mut self) {
        if self.len() > 2 * self.used.max(FEW) {
            self.forget_unused();
        }
    }

    /// Forgets what no object has any more.
    pub(super) fn forget_unused(&mut self) {
        self.identities.clear();
        self.labels.retain(|_, labels| labels.is_shared());
        self.words.retain(|word| Arc::strong_count(word) > 1);
        self.used = self.len();
    }

    fn len(&self) -> usize {
        self.words.len() + self.labels.len() + self.identities.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_equal_is_kept_once_and_what_is_unused_is_forgotten() {
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
            interner.forget_when_many();
            assert!(interner.len() <= 2 * FEW + 2, "{} words of pods that are gone", interner.len());
        }
        interner.forget_unused();
        // "app", "web", "hash", "kept" and the labels.
        assert_eq!(interner.len(), 5);
        assert!(std::ptr::eq(
            kept.get("hash").expect("there"),
            take(&mut interner, "kept").get("hash").expect("there")
        ));
    }
}

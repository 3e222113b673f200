//! Builds policies from the resources of istiod, one change at a time. It logs policies that cannot be read, and has no other effects.
//!
//! Workloads name the policies that select them, and the policies come in messages of their own. One may be there before the other.
//! For a moment, until [`PolicyDocument::Settle`], a workload keeps the list that it had before, and a removed policy is kept
//! while a workload lists it. After that a listed policy without a message denies everything.
//!
//! | policy cannot be read | denied |
//! |---|---|
//! | in a namespace | all connections to the pods of the namespace, since its scope is not known |
//! | in the root namespace | all connections |

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use tacit_core::policy::{
    Policies, PolicyUsage, ReducedListing, ReducedNamespace, ReducedPolicy, ReducedScope, ReducedStrictness,
};

use crate::{
    kubernetes::{Change, InvalidObjects, KindName, ObjectStore, Problem, reported},
    policy::{MeshSettings, NotApplied},
};

/// The types of resources that policies are built from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum PolicyResource {
    Addresses,
    Authorizations,
}

impl KindName for PolicyResource {
    fn label(self) -> &'static str {
        match self {
            Self::Addresses => "addresses",
            Self::Authorizations => "authorizations",
        }
    }
}

/// A resource, as far as policies are concerned.
#[derive(Debug, Clone)]
pub(super) enum PolicyDocument {
    /// The policies that a workload lists.
    Listing { uid: Arc<str>, listing: Listing },
    /// A workload without its list, for its removal.
    Unlisted { uid: Arc<str> },
    /// A policy, or why it cannot be read.
    Authorization { name: Arc<str>, policy: Result<ReducedPolicy, String> },
    /// The connection was quiet for long enough to deliver what belongs together.
    Settle,
}

/// A workload and the policies that it lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listing {
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
    pub(super) addresses: Vec<IpAddr>,
    /// True for a pod of the agent's own node.
    pub(super) is_here: bool,
    /// Names of policies, `<namespace>/<name>`.
    pub(super) policies: Vec<Arc<str>>,
}

/// All policies of the mesh, and the lists of its workloads.
pub(super) struct ReducedStore {
    root_namespace: Arc<str>,
    settings: MeshSettings,
    policies: Policies,
    by_name: BTreeMap<Arc<str>, Result<ReducedPolicy, String>>,
    listings: HashMap<Arc<str>, Listing>,
    /// Lists with a policy whose message is not there yet.
    waiting: HashMap<Arc<str>, Listing>,
    /// Policies that were removed and are still listed.
    removed: HashSet<Arc<str>>,
    /// Number of workloads that list each policy.
    references: HashMap<Arc<str>, usize>,
    /// Pods of the own node, by namespace.
    here: BTreeMap<Arc<str>, BTreeMap<Arc<str>, Arc<str>>>,
    listed: BTreeSet<PolicyResource>,
    /// Namespaces whose pods may have other policies than at the last publication.
    changed: BTreeSet<Arc<str>>,
    is_global_changed: bool,
    /// True if lists or policies have changed, so that the strictness of the mesh may differ.
    may_differ: bool,
    strictness: ReducedStrictness,
    is_published: bool,
    unreadable: u64,
    logged: NotApplied,
}

impl ReducedStore {
    pub(super) fn new(settings: MeshSettings, node: Arc<str>) -> Self {
        let root_namespace = Arc::clone(&settings.root_namespace);
        Self {
            policies: Policies::reduced(&root_namespace, node),
            root_namespace,
            settings,
            by_name: BTreeMap::new(),
            listings: HashMap::new(),
            waiting: HashMap::new(),
            removed: HashSet::new(),
            references: HashMap::new(),
            here: BTreeMap::new(),
            listed: BTreeSet::new(),
            changed: BTreeSet::new(),
            is_global_changed: true,
            may_differ: true,
            strictness: ReducedStrictness::default(),
            is_published: false,
            unreadable: 0,
            logged: NotApplied::default(),
        }
    }

    fn list(&mut self, uid: Arc<str>, listing: Listing) {
        let is_known = |name: &Arc<str>| self.by_name.contains_key(name);
        if self.listed.contains(&PolicyResource::Authorizations) && !listing.policies.iter().all(is_known) {
            self.waiting.insert(uid, listing);
            return;
        }
        self.waiting.remove(&uid);
        self.put(uid, Some(listing));
    }

    /// Replaces the list of a workload.
    fn put(&mut self, uid: Arc<str>, listing: Option<Listing>) {
        if self.listings.get(&uid) == listing.as_ref() {
            return;
        }
        if let Some(before) = self.listings.remove(&uid) {
            for name in &before.policies {
                let Some(count) = self.references.get_mut(name) else { continue };
                *count -= 1;
                if *count == 0 {
                    self.references.remove(name);
                    if self.removed.remove(name) {
                        self.forget(name);
                    }
                }
            }
            if before.is_here {
                self.changed.insert(Arc::clone(&before.namespace));
                if let Some(pods) = self.here.get_mut(&before.namespace) {
                    pods.remove(&before.name);
                    if pods.is_empty() {
                        self.here.remove(&before.namespace);
                    }
                }
            }
        }
        self.may_differ = true;
        let Some(listing) = listing else { return };
        for name in &listing.policies {
            *self.references.entry(Arc::clone(name)).or_default() += 1;
        }
        if listing.is_here {
            self.changed.insert(Arc::clone(&listing.namespace));
            let pods = self.here.entry(Arc::clone(&listing.namespace)).or_default();
            pods.insert(Arc::clone(&listing.name), Arc::clone(&uid));
        }
        self.listings.insert(uid, listing);
    }

    fn authorize(&mut self, name: Arc<str>, policy: Result<ReducedPolicy, String>) {
        self.removed.remove(&name);
        if self.by_name.get(&name) == Some(&policy) {
            return;
        }
        if let Err(problem) = &policy {
            self.unreadable += 1;
            tracing::error!(
                policy = &*name,
                problem,
                "istiod's policy cannot be read; {}",
                effect(&self.root_namespace, &name)
            );
        }
        self.touch(&name);
        self.is_global_changed |= is_global(&policy);
        self.by_name.insert(Arc::clone(&name), policy);
        if self.waiting.is_empty() {
            return;
        }
        let (known, by_name) = (&self.waiting, &self.by_name);
        let complete = |listing: &Listing| listing.policies.iter().all(|name| by_name.contains_key(name));
        let ready: Vec<Arc<str>> =
            known.iter().filter(|(_, listing)| complete(listing)).map(|(uid, _)| Arc::clone(uid)).collect();
        for uid in ready {
            let listing = self.waiting.remove(&uid);
            self.put(uid, listing);
        }
    }

    /// Marks the namespaces whose pods a policy concerns.
    fn touch(&mut self, name: &Arc<str>) {
        self.may_differ = true;
        self.is_global_changed |= self.by_name.get(name).is_some_and(is_global);
        self.changed.insert(namespace_of(name).into());
        let lists = |pods: &BTreeMap<Arc<str>, Arc<str>>| {
            let mut listings = pods.values().filter_map(|uid| self.listings.get(uid));
            listings.any(|listing| listing.policies.contains(name))
        };
        let listing = self.here.iter().filter(|(_, pods)| lists(pods));
        let listing: Vec<Arc<str>> = listing.map(|(namespace, _)| Arc::clone(namespace)).collect();
        self.changed.extend(listing);
    }

    fn remove_policy(&mut self, name: &Arc<str>) {
        if self.references.contains_key(name) {
            self.removed.insert(Arc::clone(name));
        } else {
            self.forget(name);
        }
    }

    fn forget(&mut self, name: &Arc<str>) {
        self.touch(name);
        self.by_name.remove(name);
    }

    fn settle(&mut self) {
        for name in std::mem::take(&mut self.removed) {
            self.forget(&name);
        }
        for (uid, listing) in std::mem::take(&mut self.waiting) {
            self.put(uid, Some(listing));
        }
    }

    fn build(&mut self, namespace: &Arc<str>) {
        let prefix = format!("{namespace}/");
        let own = self
            .by_name
            .range::<str, _>((std::ops::Bound::Included(prefix.as_str()), std::ops::Bound::Unbounded));
        let own = own.take_while(|(name, _)| name.starts_with(&prefix));
        let (mut scoped, mut usage) = (Vec::new(), PolicyUsage::default());
        for (name, policy) in own {
            match policy {
                Ok(policy) => {
                    let used = policy.usage();
                    usage += PolicyUsage { lookups: 0, ..used };
                    if policy.scope == ReducedScope::Namespace {
                        usage.lookups = usage.lookups.saturating_add(used.lookups);
                        scoped.push(policy.clone());
                    }
                }
                Err(problem) => scoped.push(ReducedPolicy::unreadable(
                    name.to_string(),
                    ReducedScope::Namespace,
                    problem.clone(),
                )),
            }
        }
        let pods = self.here.get(namespace).into_iter().flatten();
        let listed: HashMap<Arc<str>, ReducedListing> = pods
            .filter_map(|(name, uid)| {
                let listing = self.listings.get(uid)?;
                let policies = listing.policies.iter().map(|policy| self.listed_policy(policy));
                let addresses = listing.addresses.clone();
                Some((Arc::clone(name), ReducedListing { addresses, policies: policies.collect() }))
            })
            .collect();
        let lookups = |listing: &ReducedListing| -> u64 {
            let of_namespace = listing.policies.iter().map(|policy| policy.usage().lookups);
            of_namespace.fold(0, u64::saturating_add)
        };
        usage.lookups = usage.lookups.saturating_add(listed.values().map(lookups).max().unwrap_or(0));
        let namespace = Arc::clone(namespace);
        self.policies.set_reduced_namespace(namespace, ReducedNamespace { scoped, listed, usage });
    }

    /// The policy that a workload lists, or one that denies everything in its place.
    fn listed_policy(&self, name: &Arc<str>) -> ReducedPolicy {
        let problem = match self.by_name.get(name) {
            Some(Ok(policy)) => return policy.clone(),
            Some(Err(problem)) => problem.clone(),
            None => "istiod lists it and has not sent it".to_owned(),
        };
        ReducedPolicy::unreadable(name.to_string(), ReducedScope::Listed, problem)
    }

    fn build_global(&mut self) {
        let in_root = |name: &str| *namespace_of(name) == *self.root_namespace;
        let global = self.by_name.iter().filter_map(|(name, policy)| match policy {
            Ok(policy) => (policy.scope == ReducedScope::Global).then(|| policy.clone()),
            Err(problem) => in_root(name)
                .then(|| ReducedPolicy::unreadable(name.to_string(), ReducedScope::Global, problem.clone())),
        });
        let global = global.collect();
        self.policies.set_reduced_global(global);
    }

    fn strictness(&self) -> ReducedStrictness {
        let mut strictness = ReducedStrictness::default();
        for (name, policy) in &self.by_name {
            let Ok(policy) = policy else {
                strictness.anywhere = true;
                continue;
            };
            let holds = policy.scope != ReducedScope::Listed || self.references.contains_key(name);
            strictness.mesh |= holds && policy.is_strict();
            strictness.anywhere |= holds && policy.is_strict_somewhere();
        }
        strictness
    }
}

impl ObjectStore for ReducedStore {
    type Kind = PolicyResource;
    type Object = PolicyDocument;
    type Value = Policies;

    fn apply_change(&mut self, change: Change<PolicyResource, PolicyDocument>) {
        match change {
            Change::Applied(PolicyDocument::Listing { uid, listing }) => self.list(uid, listing),
            Change::Applied(PolicyDocument::Authorization { name, policy }) => self.authorize(name, policy),
            Change::Applied(PolicyDocument::Settle) => self.settle(),
            Change::Deleted(PolicyDocument::Listing { uid, .. } | PolicyDocument::Unlisted { uid }) => {
                self.waiting.remove(&uid);
                self.put(uid, None);
            }
            Change::Deleted(PolicyDocument::Authorization { name, .. }) => self.remove_policy(&name),
            Change::Listed(kind) => _ = self.listed.insert(kind),
            Change::Listing(_)
            | Change::Applied(PolicyDocument::Unlisted { .. })
            | Change::Deleted(PolicyDocument::Settle) => {}
        }
    }

    fn take_changed(&mut self) -> Option<Policies> {
        if self.listed.len() < 2 {
            return None;
        }
        let changed = std::mem::take(&mut self.changed);
        let mut is_changed = !changed.is_empty() || !self.is_published;
        for namespace in &changed {
            self.build(namespace);
        }
        // After the root namespace: all is denied if its policies exceed their share.
        if std::mem::take(&mut self.is_global_changed) || changed.contains(&self.root_namespace) {
            self.build_global();
            is_changed = true;
        }
        if std::mem::take(&mut self.may_differ) {
            let strictness = self.strictness();
            is_changed |= strictness != self.strictness;
            self.strictness = strictness;
            self.policies.set_reduced_strictness(strictness);
        }
        self.is_published = true;
        is_changed.then(|| self.settings.applied(self.policies.clone()))
    }

    fn warnings(&mut self) -> Vec<String> {
        self.logged.warnings(&self.policies)
    }

    fn invalid_objects(&self) -> InvalidObjects {
        let unreadable =
            self.by_name.iter().filter_map(|(name, policy)| Some((name, policy.as_ref().err()?)));
        let problems = unreadable.map(|(name, problem)| Problem {
            owner: namespace_of(name).to_owned(),
            line: format!("policy {name}: {problem}; {}", effect(&self.root_namespace, name)),
        });
        let (mut list, more) = reported(&problems.collect::<Vec<_>>());
        if more > 0 {
            list.push(format!("and {more} more policies that cannot be read"));
        }
        InvalidObjects { list, total: self.unreadable }
    }
}

/// Returns true if the policy may hold for all workloads.
fn is_global(policy: &Result<ReducedPolicy, String>) -> bool {
    policy.as_ref().map_or(true, |policy| policy.scope == ReducedScope::Global)
}

fn namespace_of(name: &str) -> &str {
    name.split_once('/').map_or(name, |(namespace, _)| namespace)
}

fn effect(root_namespace: &str, name: &str) -> String {
    match namespace_of(name) {
        namespace if namespace == root_namespace => {
            "all connections to pods of the mesh are denied".to_owned()
        }
        namespace => format!("all connections to pods of namespace {namespace} are denied"),
    }
}

#[cfg(test)]
mod tests;

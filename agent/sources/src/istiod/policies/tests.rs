//! The store of policies, change by change.

use tacit_core::{
    directory::Workload,
    policy::{
        Flow, FlowSource, Listed, Mode, PolicyVerdict, ReducedAction, ReducedMatch, ReducedRules, TextMatch,
        decide,
    },
};

use super::*;
use crate::istiod::testing::{mesh_settings, own_pod};

const STRICT: &str = "istio-system/istio_converted_static_strict";

fn unproven() -> ReducedRules {
    let principals = Listed { any: Vec::new(), none: vec![TextMatch::Presence] };
    vec![vec![vec![ReducedMatch { principals, ..ReducedMatch::default() }]]]
}

/// A policy that denies every source without an identity.
fn strict(name: &str, scope: ReducedScope) -> PolicyDocument {
    let policy = ReducedPolicy::new(name.to_owned(), (scope, ReducedAction::Deny), false, unproven(), 100);
    PolicyDocument::Authorization { name: name.into(), policy: Ok(policy) }
}

/// A policy that denies everything.
fn closed(name: &str, scope: ReducedScope) -> PolicyDocument {
    let policy = ReducedPolicy::new(name.to_owned(), (scope, ReducedAction::Deny), false, vec![vec![]], 100);
    PolicyDocument::Authorization { name: name.into(), policy: Ok(policy) }
}

fn listing(number: u16, is_here: bool, policies: &[&str]) -> PolicyDocument {
    let listing = Listing {
        namespace: "shop".into(),
        name: format!("web-{number}").into(),
        addresses: own_pod(number).addresses,
        is_here,
        policies: policies.iter().map(|name| (*name).into()).collect(),
    };
    PolicyDocument::Listing { uid: format!("uid-{number}").into(), listing }
}

struct Fixture {
    store: ReducedStore,
    policies: Policies,
}

impl Fixture {
    /// A store that is complete, with the pods 1 and 2 of this node.
    fn new() -> Self {
        let store = ReducedStore::new(mesh_settings(), "a".into());
        let mut fixture = Self { store, policies: Policies::default() };
        fixture.store.apply_change(Change::Applied(listing(1, true, &[])));
        fixture.store.apply_change(Change::Applied(listing(2, true, &[])));
        assert!(fixture.store.take_changed().is_none(), "not complete");
        fixture.store.apply_change(Change::Listed(PolicyResource::Addresses));
        assert!(fixture.store.take_changed().is_none(), "a missing policy would allow what it denies");
        fixture.store.apply_change(Change::Listed(PolicyResource::Authorizations));
        assert!(fixture.take(), "complete");
        fixture
    }

    fn take(&mut self) -> bool {
        let changed = self.store.take_changed();
        let is_changed = changed.is_some();
        self.policies = changed.unwrap_or_else(|| self.policies.clone());
        is_changed
    }

    fn apply(&mut self, document: PolicyDocument) -> bool {
        self.store.apply_change(Change::Applied(document));
        self.take()
    }

    fn delete(&mut self, document: PolicyDocument) -> bool {
        self.store.apply_change(Change::Deleted(document));
        self.take()
    }

    fn is_strict(&self, number: u16) -> bool {
        self.policies.modes(&own_pod(number)).default == Mode::Strict
    }

    fn allows(&self, pod: &Workload) -> bool {
        let source = FlowSource::Tunnel(pod.identity.clone());
        let flow = Flow { source, client: [10, 77, 2, 2].into(), destination: ([10, 77, 0, 1], 80).into() };
        let (modes, authorization) = (self.policies.modes(pod), self.policies.authorization(pod));
        decide(&modes, &authorization, &flow) == PolicyVerdict::Allow
    }
}

#[test]
fn a_listed_policy_holds_for_the_workloads_that_list_it() {
    let mut fixture = Fixture::new();
    fixture.apply(strict(STRICT, ReducedScope::Listed));
    assert!(!fixture.is_strict(1) && fixture.policies.mesh_default() == Mode::Permissive, "nobody lists it");
    assert!(fixture.apply(listing(1, true, &[STRICT])));
    assert!(fixture.is_strict(1) && !fixture.is_strict(2));
    assert_eq!(fixture.policies.mesh_default(), Mode::Strict);
    assert!(!fixture.apply(listing(1, true, &[STRICT])), "nothing new");
    assert!(fixture.apply(listing(1, true, &[])));
    assert!(!fixture.is_strict(1) && !fixture.policies.may_be_strict());
    // A workload elsewhere makes the mesh STRICT, and nothing else.
    assert!(fixture.apply(listing(7, false, &[STRICT])));
    assert!(!fixture.is_strict(1) && fixture.policies.mesh_default() == Mode::Strict);
    assert!(!fixture.apply(listing(8, false, &[STRICT])), "a further one changes nothing here");
    fixture.delete(PolicyDocument::Unlisted { uid: "uid-7".into() });
    assert!(fixture.delete(PolicyDocument::Unlisted { uid: "uid-8".into() }));
    assert_eq!(fixture.policies.mesh_default(), Mode::Permissive);
}

#[test]
fn namespace_and_mesh_policies_hold_by_their_scope() {
    let other = Workload { namespace: "jobs".into(), node: "b".into(), ..own_pod(1) };
    let mut fixture = Fixture::new();
    fixture.apply(closed("shop/all", ReducedScope::Namespace));
    assert!(!fixture.allows(&own_pod(1)) && fixture.allows(&other));
    fixture.delete(closed("shop/all", ReducedScope::Namespace));
    assert!(fixture.allows(&own_pod(1)));
    fixture.apply(closed("istio-system/all", ReducedScope::Global));
    assert!(!fixture.allows(&own_pod(1)) && !fixture.allows(&other));
    // A policy can change its scope.
    fixture.apply(closed("istio-system/all", ReducedScope::Namespace));
    assert!(fixture.allows(&own_pod(1)) && fixture.allows(&other));
    fixture.apply(closed("istio-system/all", ReducedScope::Global));
    fixture.delete(closed("istio-system/all", ReducedScope::Global));
    assert!(fixture.allows(&own_pod(1)) && fixture.allows(&other));
}

#[test]
fn a_list_waits_for_its_policies_and_a_removed_policy_for_the_lists() {
    let mut fixture = Fixture::new();
    fixture.apply(listing(1, true, &[STRICT]));
    assert!(!fixture.is_strict(1) && fixture.allows(&own_pod(1)), "the list before");
    fixture.apply(strict(STRICT, ReducedScope::Listed));
    assert!(fixture.is_strict(1) && fixture.allows(&own_pod(1)));
    // The policy goes first, and its workload a moment later.
    fixture.delete(strict(STRICT, ReducedScope::Listed));
    assert!(fixture.is_strict(1) && fixture.allows(&own_pod(1)), "kept");
    fixture.apply(listing(1, true, &[]));
    fixture.apply(PolicyDocument::Settle);
    assert!(!fixture.is_strict(1) && fixture.allows(&own_pod(1)));
    assert_eq!(fixture.policies.mesh_default(), Mode::Permissive);
    // What never comes is closed.
    fixture.apply(listing(1, true, &["shop/never"]));
    assert!(fixture.apply(PolicyDocument::Settle));
    assert!(fixture.is_strict(1) && !fixture.allows(&own_pod(1)) && fixture.allows(&own_pod(2)));
    assert!(!fixture.apply(PolicyDocument::Settle), "settled before");
    fixture.apply(listing(1, true, &[STRICT]));
    fixture.delete(PolicyDocument::Unlisted { uid: "uid-1".into() });
    assert!(!fixture.allows(&own_pod(1)), "not named");
    let later = Workload { addresses: vec![[10, 77, 9, 9].into()], ..own_pod(2) };
    assert!(fixture.allows(&own_pod(2)) && !fixture.allows(&later), "the list of an earlier pod of its name");
}

#[test]
fn a_policy_that_cannot_be_read_denies_by_its_name() {
    let unreadable = |name: &str| {
        let policy = Err("scope is 7: expected 0, 1 or 2".to_owned());
        PolicyDocument::Authorization { name: name.into(), policy }
    };
    let mut fixture = Fixture::new();
    for name in ["shop/p", "istio-system/p"] {
        fixture.apply(unreadable(name));
        assert!(fixture.is_strict(1) && !fixture.allows(&own_pod(1)), "{name}");
        let shown = fixture.store.invalid_objects();
        assert!(shown.list.len() == 1 && shown.list[0].contains(name), "{:?}", shown.list);
        fixture.delete(unreadable(name));
        assert!(!fixture.is_strict(1) && fixture.allows(&own_pod(1)), "{name}");
    }
    fixture.apply(unreadable("jobs/p"));
    assert!(fixture.allows(&own_pod(1)), "another namespace");
    // One that was good before is not good any more.
    fixture.apply(strict("shop/p", ReducedScope::Listed));
    assert!(fixture.allows(&own_pod(1)));
    fixture.apply(unreadable("shop/p"));
    assert!(!fixture.allows(&own_pod(1)));
}

#[test]
fn a_namespace_beyond_its_share_is_closed_and_shown() {
    let mut fixture = Fixture::new();
    for i in 0..=2048 {
        fixture.store.apply_change(Change::Applied(strict(&format!("shop/p{i}"), ReducedScope::Listed)));
    }
    assert!(fixture.take());
    assert!(!fixture.allows(&own_pod(1)) && fixture.is_strict(1));
    let warnings = fixture.store.warnings();
    assert!(warnings.len() == 1 && warnings[0].contains("namespace shop"), "{warnings:?}");
    fixture.delete(strict("shop/p0", ReducedScope::Listed));
    assert!(fixture.allows(&own_pod(1)) && fixture.policies.not_applied().next().is_none());
}

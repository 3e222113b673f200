//! The reduced policies of a mesh, as far as they concern the workloads of one node. Pure.
//!
//! Workloads list the policies whose selector selects them. A workload of the node that the source has not named yet is STRICT, and
//! every connection to it is denied: the policies that it would list are not known. The same holds if the source names the workload with
//! other addresses: it means an earlier pod of the same name.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use super::{Authorization, AuthorizationPolicy, Mode, Modes, PolicyUsage, ReducedPolicy, ReducedScope};
use crate::{cow_map::CowMap, directory::Workload, spiffe::TrustDomain};

/// The reason why a pod that the source has not named is denied everything.
const NOT_NAMED: &str = "istiod has not named the pod yet, so that its policies are not known";

/// All reduced policies that concern a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ReducedPolicies {
    node: Arc<str>,
    global: Arc<Vec<ReducedPolicy>>,
    pub(super) namespaces: CowMap<Arc<str>, Arc<ReducedNamespace>>,
    strictness: ReducedStrictness,
    not_named: ReducedPolicy,
}

/// The reduced policies of one namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReducedNamespace {
    /// Those that hold for all of its workloads.
    pub scoped: Vec<ReducedPolicy>,
    /// Those that each of its workloads of this node lists, by the workload's name.
    pub listed: HashMap<Arc<str>, ReducedListing>,
    /// The used part of the namespace's share.
    pub usage: PolicyUsage,
}

/// The policies that a workload lists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReducedListing {
    /// The addresses of the workload. They tell a workload from an earlier one of the same name.
    pub addresses: Vec<IpAddr>,
    /// In the order of the list.
    pub policies: Vec<ReducedPolicy>,
}

impl ReducedListing {
    fn is_of(&self, workload: &Workload) -> bool {
        self.addresses.iter().any(|address| workload.addresses.contains(address))
    }
}

/// STRICT modes of a mesh, as far as its policies show them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReducedStrictness {
    /// True if a workload is STRICT at ports that no policy names. A pod that no source names is held to STRICT then.
    pub mesh: bool,
    /// True if a workload is STRICT at some port.
    pub anywhere: bool,
}

impl ReducedPolicies {
    pub(super) fn new(node: Arc<str>) -> Self {
        let not_named = ReducedPolicy::not_applied("not named", ReducedScope::Listed, NOT_NAMED);
        Self {
            node,
            global: Arc::default(),
            namespaces: CowMap::default(),
            strictness: ReducedStrictness::default(),
            not_named,
        }
    }

    pub(super) fn set_global(&mut self, policies: Vec<ReducedPolicy>) {
        self.global = Arc::new(policies);
    }

    pub(super) fn set_namespace(&mut self, namespace: Arc<str>, policies: ReducedNamespace) {
        if policies == ReducedNamespace::default() {
            self.namespaces.remove(&*namespace);
        } else {
            self.namespaces.insert(namespace, Arc::new(policies));
        }
    }

    pub(super) fn set_strictness(&mut self, strictness: ReducedStrictness) {
        self.strictness = strictness;
    }

    pub(super) fn strictness(&self) -> ReducedStrictness {
        self.strictness
    }

    /// Returns true if the same policies hold for the workloads of a namespace as in `other`, of which this is a changed copy.
    pub(super) fn is_same_for(&self, namespace: &str, other: &Self) -> bool {
        let is_same = match (self.namespaces.get(namespace), other.namespaces.get(namespace)) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (None, None) => true,
            _ => false,
        };
        is_same && Arc::ptr_eq(&self.global, &other.global)
    }

    /// The policies that hold for a workload, mesh-wide ones first. Policies that workloads of other nodes list are not kept.
    fn holding<'a>(&'a self, workload: &Workload) -> impl Iterator<Item = &'a ReducedPolicy> + use<'a> {
        let own = self.namespaces.get(&*workload.namespace);
        let scoped = own.into_iter().flat_map(|own| &own.scoped);
        let listed = own.and_then(|own| own.listed.get(&*workload.name));
        let listed = listed.filter(|listed| listed.is_of(workload)).map(|listed| &listed.policies);
        let is_unnamed = listed.is_none() && *workload.node == *self.node;
        let unnamed = is_unnamed.then_some(&self.not_named);
        self.global.iter().chain(scoped).chain(listed.into_iter().flatten()).chain(unnamed)
    }

    pub(super) fn authorization(&self, workload: &Workload, aliases: Arc<[TrustDomain]>) -> Authorization {
        let policies = self.holding(workload).map(|policy| Arc::clone(policy.policy()));
        Authorization::new(policies.collect::<Vec<Arc<AuthorizationPolicy>>>(), aliases)
    }

    /// The modes of a workload: STRICT at each port at which a policy denies every source without an identity.
    pub(super) fn modes(&self, workload: &Workload) -> Modes {
        let denials: Vec<_> = self.holding(workload).map(ReducedPolicy::unproven).collect();
        let mode = |is_strict| if is_strict { Mode::Strict } else { Mode::Permissive };
        let default = mode(denials.iter().any(|denial| denial.elsewhere));
        let named = denials.iter().flat_map(|denial| denial.ports.keys());
        let at = |port: u16| mode(denials.iter().any(|denial| denial.at(port)));
        let ports: BTreeMap<u16, Mode> = named.map(|port| (*port, at(*port))).collect();
        Modes { default, ports: ports.into_iter().filter(|(_, mode)| *mode != default).collect() }
    }
}

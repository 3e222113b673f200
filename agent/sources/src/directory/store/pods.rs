//! Pods: from an API object to a workload.
//!
//! Values that a pod's creator or a node's kubelet writes are checked here, or kept as claims in the directory. A pod of this node
//! whose UID cannot be part of a path is left out.

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use tacit_core::{
    directory::{AddressConflict, Connect, Protocol, Workload},
    spiffe::pod_service_account,
};

use super::{
    super::{cgroup::PodUid, objects::Pod},
    DEPARTED_MAX, DirectoryStore, full_name,
};

/// Maximum length of a value in a message, in characters.
const SHOWN_MAX: usize = 64;

/// A pod with the cgroup that its annotation names.
#[derive(Debug)]
pub(super) struct Mirror {
    /// The cgroup of its own UID.
    own_cgroup: PathBuf,
    created: Option<String>,
}

impl Mirror {
    /// Returns true if this pod was created before the other one. A pod without a time is younger than all others.
    fn is_older_than(&self, other: &Self) -> bool {
        match (&self.created, &other.created) {
            (Some(own), Some(other)) => own < other,
            (own, other) => own.is_some() && other.is_none(),
        }
    }
}

impl DirectoryStore {
    pub(super) fn pod(&mut self, pod: Pod) {
        let name = full_name(&pod.metadata);
        if pod.has_ended() || pod.spec.node_name.is_empty() {
            return self.end_pod(&name);
        }
        let claim = if pod.is_vacated() { AddressConflict::Keep } else { AddressConflict::Replace };
        let host_network = pod.spec.host_network;
        let mut problems = Vec::new();
        let workload = self.workload(pod, &name, &mut problems);
        match workload {
            Some(workload) => self.known_pod(&name, workload, claim, host_network),
            None => self.end_pod(&name),
        }
        self.problems.set(&name, problems);
    }

    fn known_pod(&mut self, name: &str, workload: Workload, claim: AddressConflict, host_network: bool) {
        if workload.node == self.local_node.node {
            let known = self.directory.named(&workload.namespace, &workload.name);
            if known.is_some_and(|known| known.cgroup != workload.cgroup) {
                self.refuse_heirs(name);
            }
            return self.ahead_of_mirror(name, workload, claim, host_network);
        }
        self.put(name, workload, claim, host_network);
    }

    /// The cgroup of a pod's own UID is its own, whatever an annotation of another pod says and whichever came first. Of two
    /// mirror pods the older one has the cgroup, whichever a list has first.
    fn ahead_of_mirror(
        &mut self,
        name: &str,
        workload: Workload,
        claim: AddressConflict,
        host_network: bool,
    ) {
        let is_ahead = |holder: &Mirror| self.mirrors.get(name).is_none_or(|own| own.is_older_than(holder));
        let holder = self.directory.cgroup_holder(&workload.node, &workload.cgroup);
        let holder = holder.filter(|holder| ***holder != *name);
        let mirror = holder.filter(|holder| self.mirrors.get(&***holder).is_some_and(is_ahead)).cloned();
        let Some((namespace, mirror)) = mirror.as_deref().and_then(|mirror| mirror.split_once('/')) else {
            return self.put(name, workload, claim, host_network);
        };
        let claim_of_mirror = self.directory.claim_of(namespace, mirror);
        let removed = self.directory.remove(namespace, mirror);
        self.put(name, workload, claim, host_network);
        if let Some(removed) = removed {
            self.directory.insert((*removed).clone(), claim_of_mirror);
        }
    }

    /// Gives the mirror pods that wait for the cgroup of a pod that ends the cgroups of their own UIDs. Processes of the pod that
    /// ends may live on.
    fn refuse_heirs(&mut self, name: &str) {
        if self.mirrors.is_empty() {
            return;
        }
        let Some((namespace, pod)) = name.split_once('/') else { return };
        let Some(ending) = self.directory.holder_named(&self.local_node.node, namespace, pod).cloned() else {
            return;
        };
        let heirs = self.mirrors.iter().filter(|(mirror, _)| **mirror != *name);
        let heirs: Vec<(String, Workload)> = heirs
            .filter_map(|(name, mirror)| {
                let (namespace, pod) = name.split_once('/')?;
                let workload = self.directory.named(namespace, pod)?;
                let cgroup = mirror.own_cgroup.clone();
                let is_heir = workload.cgroup == ending.cgroup;
                is_heir.then(|| (name.clone(), Workload { cgroup, ..(**workload).clone() }))
            })
            .collect();
        for (heir, workload) in heirs {
            self.mirrors.remove(&heir);
            let claim = self.directory.claim_of(&workload.namespace, &workload.name);
            self.directory.insert(workload, claim);
        }
    }

    pub(super) fn put(&mut self, name: &str, workload: Workload, claim: AddressConflict, host_network: bool) {
        let is_here = workload.node == self.local_node.node;
        if host_network {
            self.forget(&workload.namespace, &workload.name);
            if is_here && self.directory.set_host_network(workload) {
                self.changed = true;
            }
            return;
        }
        // A pod of another node is unreachable until it has an address. A pod of this node must be covered before.
        if workload.addresses.is_empty() && !is_here {
            return self.end_pod(name);
        }
        let known = self.directory.named(&workload.namespace, &workload.name);
        let claimed = self.directory.claim_of(&workload.namespace, &workload.name);
        if known.is_some_and(|known| **known == workload) && claimed == claim {
            return;
        }
        self.insert(workload, claim);
    }

    pub(super) fn insert(&mut self, workload: Workload, claim: AddressConflict) {
        if workload.protocol.is_tunnelled() {
            self.range_discovery.enrolled(&workload.addresses, self.directory.ranges());
        }
        if let Some(before) = self.directory.named(&workload.namespace, &workload.name)
            && before.protocol.is_tunnelled()
        {
            self.range_discovery.unused(&before.addresses);
        }
        self.directory.insert(workload, claim);
        self.changed = true;
    }

    /// Returns `None` if the pod's names cannot form an identity, or its UID no path. Such a pod is unknown to the mesh.
    fn workload(&mut self, pod: Pod, name: &str, problems: &mut Vec<String>) -> Option<Workload> {
        let enrols = self.label(&pod.metadata);
        let enrols = enrols.unwrap_or_else(|| self.namespaces.get(&pod.metadata.namespace) == Some(&true));
        // Only the agent of its node uses the cgroup.
        let is_here = *pod.spec.node_name == *self.local_node.node;
        self.mirrors.remove(name);
        // An agent's own annotation does not outlive the enrolment, so a pod that was released is not reached by HBONE until it is removed.
        match pod.is_redirected() && !pod.is_marked() {
            true => self.redirected.insert(name.to_owned()),
            false => self.redirected.remove(name),
        };
        if is_here && let Some(own_pods) = &mut self.own_pods {
            own_pods.set(name, &pod);
        }
        let cgroup = if is_here { self.cgroup(&pod, name, problems)? } else { PathBuf::default() };
        let account = pod_service_account(&pod.spec.service_account_name);
        let identity = self.interner.identity(&self.local_node, &pod.metadata.namespace, account)?;
        let connect = connect(&pod, problems);
        Some(Workload {
            namespace: self.interner.intern(&pod.metadata.namespace),
            node: self.interner.intern(&pod.spec.node_name),
            addresses: pod.addresses(problems),
            name: pod.metadata.name.into(),
            labels: self.interner.labels(&pod.metadata.labels),
            identity,
            cgroup,
            protocol: self.protocol(name, enrols),
            egress: None,
            udp: None,
            connect,
        })
    }

    /// Returns the cgroup of a pod of this node.
    fn cgroup(&mut self, pod: &Pod, name: &str, problems: &mut Vec<String>) -> Option<PathBuf> {
        let meta = &pod.metadata;
        let Some(own) = PodUid::parse(&meta.uid) else {
            let uid = shown(&meta.uid);
            problems.push(format!("not enrolled: its UID {uid} has other characters than 0-9, a-f and `-`"));
            return None;
        };
        let path = |uid| self.local_node.cgroups.pod(uid, pod.status.qos_class);
        // Only its kubelet writes the status of a pod, and none of a mirror pod without a static pod. A false mirror pod of a
        // static pod that has just started would be the first to claim its cgroup.
        let is_reported = pod.status.start_time.is_some();
        if let Some(text) = meta.annotations.mirror.as_ref().filter(|_| is_reported) {
            match self.static_pod_uid(pod, text, name) {
                Ok(uid) => {
                    let cgroup = path(uid);
                    let mirror = Mirror { own_cgroup: path(own), created: meta.creation_timestamp.clone() };
                    self.mirrors.insert(name.to_owned(), mirror);
                    return Some(cgroup);
                }
                Err(why) => {
                    let value = shown(text);
                    problems
                        .push(format!("annotation kubernetes.io/config.mirror {value} is not used: {why}"));
                }
            }
        }
        Some(path(own))
    }

    /// Returns the UID that a mirror pod names. Everybody who may create pods can write the annotation and the owner, so the
    /// directory decides if the cgroup is still free.
    fn static_pod_uid<'a>(&self, pod: &Pod, text: &'a str, name: &str) -> Result<PodUid<'a>, &'static str> {
        if !pod.is_owned_by_its_node() {
            return Err("the pod's owner is not its node, so it is no mirror pod");
        }
        let uid =
            PodUid::of_static_pod(text).ok_or("it is neither a hash of 32 hexadecimal digits nor a UUID")?;
        let cgroup = self.local_node.cgroups.pod(uid, pod.status.qos_class);
        let of_other = |departed: &Arc<Workload>| departed.cgroup == cgroup && departed.full_name() != *name;
        if self.departed.iter().any(of_other) {
            return Err("it is the UID of another pod, which may still have processes");
        }
        Ok(uid)
    }

    pub(super) fn end_pod(&mut self, full: &str) {
        self.problems.clear(full);
        self.mirrors.remove(full);
        self.redirected.remove(full);
        if let Some(own_pods) = &mut self.own_pods {
            own_pods.remove(full);
        }
        self.refuse_heirs(full);
        let Some((namespace, name)) = full.split_once('/') else { return };
        if self.directory.unset_host_network(namespace, name) {
            self.changed = true;
        }
        // One that another kept from its cgroup never had processes there.
        let has_cgroup = self.directory.named(namespace, name).is_some_and(|workload| {
            let holder = self.directory.cgroup_holder(&workload.node, &workload.cgroup);
            holder.is_some_and(|holder| **holder == *full)
        });
        let Some(workload) = self.forget(namespace, name) else { return };
        self.changed = true;
        if has_cgroup && workload.node == self.local_node.node {
            self.departed.push_back(workload);
            if self.departed.len() > DEPARTED_MAX {
                self.forget_departed();
            }
            let enrolled = self.departed.iter().filter(|pod| pod.protocol == Protocol::Tacit);
            self.directory.set_departed(enrolled.cloned().collect());
        }
    }

    /// Removes the oldest departed pod of the namespace that has most, so that a namespace with many short pods forgets its own.
    fn forget_departed(&mut self) {
        let mut counts: HashMap<&str, usize> = HashMap::new();
        self.departed.iter().for_each(|pod| *counts.entry(&pod.namespace).or_default() += 1);
        let most = counts.values().copied().max();
        let oldest = self.departed.iter().position(|pod| counts.get(&*pod.namespace).copied() == most);
        if let Some(oldest) = oldest {
            self.departed.remove(oldest);
        }
    }

    /// Removes a workload from the directory.
    fn forget(&mut self, namespace: &str, name: &str) -> Option<Arc<Workload>> {
        let workload = self.directory.remove(namespace, name)?;
        if workload.protocol.is_tunnelled() {
            self.range_discovery.unused(&workload.addresses);
        }
        Some(workload)
    }
}

/// Returns a value from the API for a message.
fn shown(text: &str) -> String {
    let start: String = text.chars().take(SHOWN_MAX).collect();
    let rest = if start.len() < text.len() { "..." } else { "" };
    format!("{start:?}{rest}")
}

/// Returns what the pod's annotation says about `connect()`; a value that is not understood is reported and not used.
fn connect(pod: &Pod, problems: &mut Vec<String>) -> Connect {
    match pod.metadata.annotations.connect.as_deref() {
        None | Some("truthful") => Connect::Truthful,
        Some("early") => Connect::Early,
        Some(other) => {
            let value = shown(other);
            problems
                .push(format!("annotation tacit.io/connect {value} is not used: expected early or truthful"));
            Connect::Truthful
        }
    }
}

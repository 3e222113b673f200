//! Changes of the directory, made by a source in its own copy.

use std::{net::IpAddr, sync::Arc};

use super::{
    AddressConflict, Directory, NodeWorkloads, Ranges, Service, Workload, claims::CgroupRefusal, full_name,
};

impl Directory {
    /// Adds a workload, or replaces the one of its name. A workload whose cgroup another one has is not of its node.
    pub fn insert(&mut self, workload: Workload, claim: AddressConflict) {
        let name: Arc<str> = full_name(&workload.namespace, &workload.name).into();
        let workload = Arc::new(workload);
        let before = self.by_name.get(&name).cloned();
        if let Some(before) = &before {
            self.leave_node(before, &name);
            // Kept in between, or a later claimant would get it.
            if (&before.node, &before.cgroup) != (&workload.node, &workload.cgroup) {
                self.release_cgroup(before, &name);
            }
        }
        self.note_conflicts(before.as_ref());
        self.addresses.replace(before.as_ref(), &workload, claim);
        match claim {
            AddressConflict::Replace => drop(self.yielding.remove(&name)),
            AddressConflict::Keep => self.yielding.insert(Arc::clone(&name), ()),
        }
        self.note_conflicts(Some(&workload));
        self.by_name.insert(Arc::clone(&name), Arc::clone(&workload));
        self.claim_cgroup(workload, name);
    }

    /// Removes a workload. Others that claim its addresses or cgroup may have them then.
    pub fn remove(&mut self, namespace: &str, name: &str) -> Option<Arc<Workload>> {
        let name = full_name(namespace, name);
        let workload = self.by_name.remove(name.as_str())?;
        self.yielding.remove(name.as_str());
        self.note_conflicts(Some(&workload));
        self.addresses.remove(&workload);
        self.leave_node(&workload, &name);
        self.release_cgroup(&workload, &name);
        Some(workload)
    }

    /// Counts a change of the conflicts in which `workload` takes part.
    fn note_conflicts(&mut self, workload: Option<&Arc<Workload>>) {
        let mut addresses = workload.into_iter().flat_map(|workload| &workload.addresses);
        let is_contested =
            |address: &IpAddr| self.addresses.is_unclear(*address) || self.services.outer(*address).is_some();
        self.conflict_changes += u64::from(addresses.any(is_contested));
    }

    fn claim_cgroup(&mut self, workload: Arc<Workload>, name: Arc<str>) {
        let refusal = self.cgroups.claim(&workload, &name).err();
        let known = self.refused.iter().position(|(refused, _)| *refused == name);
        if refusal.is_some() || known.is_some() {
            self.conflict_changes += 1;
            let refused = Arc::make_mut(&mut self.refused);
            match (known, &refusal) {
                // Keeps its place.
                (Some(at), Some(refusal)) => refused[at].1 = refusal.clone(),
                (Some(at), None) => drop(refused.remove(at)),
                (None, Some(refusal)) => refused.push((Arc::clone(&name), refusal.clone())),
                (None, None) => {}
            }
        }
        if refusal.is_none() {
            // Removed from the map first, so that workloads nobody else holds are changed in place.
            let mut on_node = self.by_node.remove(&*workload.node).unwrap_or_default();
            Arc::make_mut(&mut on_node).insert(name, Arc::clone(&workload));
            self.by_node.insert(Arc::clone(&workload.node), on_node);
        }
    }

    fn leave_node(&mut self, workload: &Arc<Workload>, name: &str) {
        let is_there =
            |on_node: &Arc<NodeWorkloads>| on_node.get(name).is_some_and(|own| Arc::ptr_eq(own, workload));
        if !self.by_node.get(&*workload.node).is_some_and(is_there) {
            return;
        }
        let Some(mut on_node) = self.by_node.remove(&*workload.node) else { return };
        Arc::make_mut(&mut on_node).remove(name);
        if !on_node.is_empty() {
            self.by_node.insert(Arc::clone(&workload.node), on_node);
        }
    }

    /// Releases the cgroup of a workload. The workloads that waited for it claim it again.
    fn release_cgroup(&mut self, workload: &Workload, name: &str) {
        self.cgroups.release(workload, name);
        if self.refused.is_empty() {
            return;
        }
        let before = self.refused.len();
        Arc::make_mut(&mut self.refused).retain(|(refused, _)| **refused != *name);
        self.conflict_changes += u64::from(before != self.refused.len());
        let held = |refusal: &CgroupRefusal| matches!(refusal, CgroupRefusal::Held(by) if **by == *name);
        let waiting = self.refused.iter().filter(|(_, refusal)| held(refusal));
        let waiting: Vec<Arc<str>> = waiting.map(|(name, _)| Arc::clone(name)).collect();
        for name in waiting {
            if let Some(workload) = self.by_name.get(&name).cloned() {
                self.claim_cgroup(workload, name);
            }
        }
    }

    /// Adds or replaces a pod that has the node's addresses. Returns true if the directory has changed.
    pub fn set_host_network(&mut self, workload: Workload) -> bool {
        let name: Arc<str> = full_name(&workload.namespace, &workload.name).into();
        if self.host_network.get(&*name).is_some_and(|known| **known == workload) {
            return false;
        }
        self.unset_host_network(&workload.namespace, &workload.name);
        // Its cgroup is no other pod's. One that it cannot have makes no difference: the pod is left alone.
        let _ = self.cgroups.claim(&workload, &name);
        self.host_network.insert(name, Arc::new(workload));
        true
    }

    /// Removes a pod that has the node's addresses. Returns true if the directory had it.
    pub fn unset_host_network(&mut self, namespace: &str, name: &str) -> bool {
        let name = full_name(namespace, name);
        let known = self.host_network.remove(name.as_str());
        if let Some(known) = &known {
            self.release_cgroup(known, &name);
        }
        known.is_some()
    }

    /// Sets the node of the source. No workload has an address that this node lists.
    pub fn set_own_node(&mut self, node: Arc<str>) {
        self.addresses.set_own_node(node);
    }

    /// Replaces the addresses that a node lists as its own. Its workloads do not have them.
    pub fn set_node_addresses(&mut self, node: &Arc<str>, before: &[IpAddr], addresses: &[IpAddr]) {
        self.addresses.set_node(node, before, addresses);
        self.conflict_changes += 1;
        self.node_changes += 1;
    }

    /// Replaces the ranges of the mesh.
    pub fn set_ranges(&mut self, ranges: Arc<Ranges>) {
        self.ranges = ranges;
    }

    /// Replaces the pods that [`Self::departed`] lists.
    pub fn set_departed(&mut self, departed: Vec<Arc<Workload>>) {
        self.departed = Arc::new(departed);
    }

    /// Adds a service, or replaces the one of its name.
    pub fn insert_service(&mut self, service: Service) {
        self.conflict_changes += u64::from(self.services.insert(service));
    }

    /// Removes a service. A ClusterIP that another took over meanwhile stays the other's.
    pub fn remove_service(&mut self, namespace: &str, name: &str) {
        self.conflict_changes += u64::from(self.services.remove(namespace, name));
    }
}

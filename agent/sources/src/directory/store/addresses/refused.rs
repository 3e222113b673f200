//! Addresses of istiod that no client may connect to directly.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use tacit_core::directory::{Detour, DetourOf, Protocol};

use super::super::DirectoryStore;
use crate::istiod::address::{Distribution, ServiceRecord, WorkloadRecord};

/// Maximum number of addresses of one service that is not of Kubernetes. Its creator writes them. A service with a waypoint has all of its
/// addresses, since a connection to one that is left out would avoid the waypoint. The API server's limit for an object bounds them.
const OUTER_MAX: usize = 64;

/// Ranges with a detour, by their resource.
#[derive(Debug, Default)]
pub(super) struct Refused {
    ranges: BTreeMap<Arc<str>, (Detour, Vec<IpNet>)>,
    /// Detours whose ranges differ from those of the directory.
    outdated: BTreeSet<Detour>,
}

impl DirectoryStore {
    /// Sets the detour of a pod that the Kubernetes API has. An enrolled pod that istiod has not named with one of its addresses may have a
    /// waypoint.
    /// A record with other addresses is that of an earlier pod.
    pub(in super::super) fn set_own_detour(&mut self, full: &str) {
        let Some((namespace, name)) = full.split_once('/') else { return };
        let record = self.addresses.workloads.get(self.addresses.uid(full).as_str());
        let detour = self.directory.named(namespace, name).and_then(|workload| {
            let is_named = |record: &&Arc<WorkloadRecord>| {
                record.addresses.iter().any(|address| workload.addresses.contains(address))
            };
            match record.filter(is_named) {
                Some(record) => record.has_waypoint.then_some(Detour::Waypoint),
                // istiod does not name the pods of namespaces that it does not watch. Those outside the mesh go on as they are.
                None => (workload.protocol == Protocol::Tacit).then_some(Detour::Unnamed),
            }
        });
        self.changed |= self.directory.set_detour(DetourOf::Workload(namespace, name), detour);
    }

    /// Replaces the ranges of a service with a waypoint.
    pub(super) fn set_refused_ranges(&mut self, key: &Arc<str>, record: Option<&ServiceRecord>) {
        let ranges = record.filter(|record| record.has_waypoint).map(|record| record.ranges.clone());
        let new = ranges.filter(|ranges| !ranges.is_empty()).map(|ranges| (Detour::Waypoint, ranges));
        self.set_refused(key, new);
    }

    /// Refuses connections to the addresses of a workload whose names form no identity. Without a record it ends that.
    pub(super) fn refuse_workload(&mut self, uid: &Arc<str>, record: Option<&WorkloadRecord>) {
        let known = self.addresses.refused.ranges.get(uid);
        let before = known.map(|(_, ranges)| ranges.iter().map(IpNet::addr).collect::<Vec<_>>());
        let now = record.map(|record| &record.addresses);
        if before.as_ref() == now {
            return;
        }
        if let Some(addresses) = now {
            self.range_discovery.enrolled(addresses, self.directory.ranges());
        }
        self.range_discovery.unused(&before.unwrap_or_default());
        let new = now.map(|now| now.iter().copied().map(IpNet::from).collect());
        self.set_refused(uid, new.map(|ranges| (Detour::Unidentified, ranges)));
    }

    fn set_refused(&mut self, key: &Arc<str>, new: Option<(Detour, Vec<IpNet>)>) {
        let Refused { ranges, outdated } = &mut self.addresses.refused;
        if ranges.get(key) == new.as_ref() {
            return;
        }
        outdated.extend(new.as_ref().map(|(detour, _)| *detour));
        let before = match new {
            Some(new) => ranges.insert(Arc::clone(key), new),
            None => ranges.remove(key),
        };
        outdated.extend(before.map(|(detour, _)| detour));
    }

    /// Takes the ranges into the directory, once for a batch of changes.
    pub(super) fn update_refused(&mut self) {
        let Refused { ranges, outdated } = &mut self.addresses.refused;
        for detour in std::mem::take(outdated) {
            let of_detour = ranges.values().filter(|(of, _)| *of == detour);
            let ranges: Vec<IpNet> = of_detour.flat_map(|(_, ranges)| ranges.iter().copied()).collect();
            self.directory.set_detour_ranges(detour, &ranges);
            self.changed = true;
        }
    }

    /// Returns the problems of a workload that is in the store.
    pub(super) fn workload_problems(&self, uid: &str, record: &WorkloadRecord) -> Vec<String> {
        let WorkloadRecord { namespace, service_account, network, .. } = record;
        let own = &self.addresses.place.network;
        let unidentified = self.addresses.refused.ranges.contains_key(uid).then(|| {
            let domain = record.trust_domain.as_deref().unwrap_or_default();
            format!(
                "workload {uid} of istiod: trust domain {domain:?}, namespace {namespace:?} and service account {service_account:?} form no identity: connections to its addresses are refused"
            )
        });
        let misplaced = (self.is_pod_here(record) && network != own).then(|| {
            format!(
                "workload {uid} of istiod is a pod of this node in network {network:?}: expected {own:?}, the configured network"
            )
        });
        unidentified.into_iter().chain(misplaced).collect()
    }
}

/// Returns the addresses of a service that the Kubernetes API does not have, as far as the directory has them.
pub(super) fn outer_addresses(record: &ServiceRecord) -> Vec<IpAddr> {
    if record.has_waypoint {
        return record.addresses.clone();
    }
    // Clients of other namespaces reach the address itself, and the directory is one for all of them.
    let is_balanced = record.balancing.mode != Distribution::Passthrough && record.is_public;
    record.addresses.iter().copied().take(OUTER_MAX).filter(|_| is_balanced).collect()
}

/// Returns the problems of a service.
pub(super) fn service_problems(name: &str, record: &ServiceRecord) -> Vec<String> {
    if record.has_waypoint {
        return Vec::new();
    }
    let ranges = record.ranges.iter().map(|range| {
        format!(
            "service {name} of istiod: range {range} is not used: connections into it are not load-balanced"
        )
    });
    let is_outer = super::kubernetes_name(record).is_none();
    let hidden = (is_outer && !record.is_public && !record.addresses.is_empty()).then(|| {
        format!(
            "service {name} of istiod is not visible in all namespaces: connections to its addresses are not load-balanced"
        )
    });
    let is_cut = is_outer && record.is_public && record.addresses.len() > OUTER_MAX;
    let cut = is_cut.then(|| {
        format!(
            "service {name} of istiod has {} addresses: connections to all but the first {OUTER_MAX} are not load-balanced",
            record.addresses.len()
        )
    });
    ranges.chain(hidden).chain(cut).collect()
}

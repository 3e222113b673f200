//! Addresses of istiod that no client may connect to directly.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use tacit_core::directory::Detour;

use super::super::DirectoryStore;
use crate::istiod::address::{Distribution, ServiceRecord};

/// Maximum number of addresses of one service that is not of Kubernetes. Its creator writes them. A service with a waypoint has all of its
/// addresses, since a connection to one that is left out would avoid the waypoint. The API server's limit for an object bounds them.
const OUTER_MAX: usize = 64;

/// Ranges with a detour, by their resource.
#[derive(Debug, Default)]
pub(super) struct Refused {
    ranges: BTreeMap<Arc<str>, (Detour, Vec<IpNet>)>,
}

impl DirectoryStore {
    /// Replaces the ranges of a service with a waypoint.
    pub(super) fn set_refused_ranges(&mut self, key: &Arc<str>, record: Option<&ServiceRecord>) {
        let ranges = record.filter(|record| record.has_waypoint).map(|record| record.ranges.clone());
        let new = ranges.filter(|ranges| !ranges.is_empty()).map(|ranges| (Detour::Waypoint, ranges));
        self.set_refused(key, new);
    }

    fn set_refused(&mut self, key: &Arc<str>, new: Option<(Detour, Vec<IpNet>)>) {
        let known = &mut self.addresses.refused.ranges;
        if known.get(key) == new.as_ref() {
            return;
        }
        let detour = new.as_ref().map(|(detour, _)| *detour);
        let before = match new {
            Some(new) => known.insert(Arc::clone(key), new),
            None => known.remove(key),
        };
        for detour in [before.map(|(detour, _)| detour), detour].into_iter().flatten() {
            let of_detour = known.values().filter(|(of, _)| *of == detour);
            let ranges: Vec<IpNet> = of_detour.flat_map(|(_, ranges)| ranges.iter().copied()).collect();
            self.directory.set_detour_ranges(detour, &ranges);
        }
        self.changed = true;
    }
}

/// Returns the addresses of a service that the Kubernetes API does not have, as far as the directory has them.
pub(super) fn outer_addresses(record: &ServiceRecord) -> Vec<IpAddr> {
    if record.has_waypoint {
        return record.addresses.clone();
    }
    let is_balanced = record.balancing.mode != Distribution::Passthrough;
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
    let is_cut = super::kubernetes_name(record).is_none() && record.addresses.len() > OUTER_MAX;
    let cut = is_cut.then(|| {
        format!(
            "service {name} of istiod has {} addresses: connections to all but the first {OUTER_MAX} are not load-balanced",
            record.addresses.len()
        )
    });
    ranges.chain(cut).collect()
}

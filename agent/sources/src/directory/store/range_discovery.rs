//! Discovery of mesh ranges, in addition to the configured ranges. Pure.
//!
//! | source | range |
//! |---|---|
//! | a node: `spec.podCIDRs` | the CIDR |
//! | a ServiceCIDR: `spec.cidrs` | the CIDR |
//! | an enrolled pod, a service with an enrolled endpoint | each of its addresses outside all other ranges |
//!
//! A range is kept until the agent exits, even if its source is deleted. An unnecessary range costs a plaintext connection
//! through the agent, but a missing range leaves traffic unprotected. Ranges that contain a node's address are refused, because
//! only pods and services belong to the mesh. Refused ranges and ranges beyond the limit are reported, and the pods in them are
//! covered by their addresses.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    mem,
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use tacit_core::directory::{Directory, RangeAddition, Ranges, discovered_range};

use super::super::objects::{Node, ResourceKind, ServiceCidr};
use crate::kubernetes::InvalidObjects;

/// Maximum number of ranges of one object. Clusters that have outgrown a range add more.
const PER_OBJECT_MAX: usize = 16;
/// Maximum number of refused ranges in a report. The rest is counted.
const REPORTED_MAX: usize = 20;

/// The sources of ranges, and the changes since the last update.
#[derive(Debug, Default)]
pub(super) struct RangeDiscovery {
    sources: BTreeMap<(ResourceKind, String), RangeSource>,
    sources_changed: bool,
    /// Addresses of all nodes.
    node_addresses: BTreeSet<IpAddr>,
    /// New addresses of enrolled pods outside all ranges.
    new_addresses: Vec<IpAddr>,
    /// True if pods were enrolled, so that services may have enrolled endpoints.
    enrolled: bool,
    /// Services with an address outside all ranges, and the changed ones among them.
    uncovered_services: BTreeSet<String>,
    changed_services: BTreeSet<String>,
    /// Refused ranges with the reason, one per line.
    refused: Vec<String>,
    unlogged: Vec<String>,
    refusals: u64,
}

/// The ranges and addresses of a node or a ServiceCIDR.
#[derive(Debug, Default, PartialEq, Eq)]
struct RangeSource {
    /// Each range with its object, field and value, for error messages.
    ranges: Vec<(IpNet, String)>,
    addresses: Vec<IpAddr>,
    refused: Vec<String>,
}

impl RangeSource {
    fn read<'a>(&mut self, object: &str, listed: impl Iterator<Item = (String, &'a str)>) {
        for (index, (field, text)) in listed.enumerate() {
            let name = format!("{object}: {field}: {text:?}");
            if index == PER_OBJECT_MAX {
                return self.refused.push(format!(
                    "{name}: more than {PER_OBJECT_MAX} ranges; this one and the following are not used"
                ));
            }
            match discovered_range(text) {
                Ok(range) => self.ranges.push((range, name)),
                Err(problem) => self.refused.push(format!("{name}: {problem}")),
            }
        }
    }
}

impl RangeDiscovery {
    pub(super) fn node(&mut self, node: Node) {
        let mut source = RangeSource::default();
        let listed = node.spec.pod_cidrs.iter().enumerate();
        let listed = listed.map(|(index, text)| (format!("spec.podCIDRs[{index}]"), text.as_str()));
        // The first entry of podCIDRs, or the only range on old servers.
        let single = node.spec.pod_cidr.iter().filter(|text| !text.is_empty());
        let single = single.filter(|text| !node.spec.pod_cidrs.contains(text));
        let single = single.map(|text| ("spec.podCIDR".to_owned(), text.as_str()));
        source.read(&format!("Node {}", node.metadata.name), listed.chain(single));
        // Host names fail to parse and are skipped.
        let addresses = node.status.addresses.iter().filter_map(|listed| listed.address.parse().ok());
        source.addresses.extend(addresses.map(|address: IpAddr| address.to_canonical()));
        self.set((ResourceKind::Nodes, node.metadata.name), source);
    }

    pub(super) fn service_cidr(&mut self, object: ServiceCidr) {
        let mut source = RangeSource::default();
        let listed = object.spec.cidrs.iter().enumerate();
        let listed = listed.map(|(index, text)| (format!("spec.cidrs[{index}]"), text.as_str()));
        source.read(&format!("ServiceCIDR {}", object.metadata.name), listed);
        self.set((ResourceKind::ServiceCidrs, object.metadata.name), source);
    }

    fn set(&mut self, key: (ResourceKind, String), source: RangeSource) {
        if self.sources.get(&key) != Some(&source) {
            self.sources.insert(key, source);
            self.sources_changed = true;
        }
    }

    pub(super) fn remove(&mut self, kind: ResourceKind, name: &str) {
        self.sources_changed |= self.sources.remove(&(kind, name.to_owned())).is_some();
    }

    pub(super) fn names(&self, kind: ResourceKind) -> Vec<String> {
        self.sources.keys().filter(|(of, _)| *of == kind).map(|(_, name)| name.clone()).collect()
    }

    /// Records an enrolled pod's addresses.
    pub(super) fn enrolled(&mut self, addresses: &[IpAddr], ranges: &Ranges) {
        self.enrolled = true;
        self.new_addresses.extend(addresses.iter().filter(|address| !ranges.contains(**address)));
    }

    /// Records a new or changed service.
    pub(super) fn service(&mut self, name: &str, addresses: &[IpAddr], ranges: &Ranges) {
        if addresses.iter().all(|address| ranges.contains(*address)) {
            return self.remove_service(name);
        }
        self.uncovered_services.insert(name.to_owned());
        self.changed_services.insert(name.to_owned());
    }

    pub(super) fn remove_service(&mut self, name: &str) {
        self.uncovered_services.remove(name);
        self.changed_services.remove(name);
    }

    /// Adds the pending ranges to the directory. Returns true if the status must be published.
    pub(super) fn add_pending(&mut self, directory: &mut Directory) -> bool {
        let mut ranges = Arc::clone(directory.ranges());
        let is_changed = mem::take(&mut self.sources_changed) && self.add_source_ranges(&mut ranges);
        for address in mem::take(&mut self.new_addresses) {
            if directory.is_enrolled(address) {
                self.add_address(&mut ranges, address);
            }
        }
        self.add_service_addresses(directory, &mut ranges);
        let has_grown = ranges != *directory.ranges();
        if has_grown {
            directory.set_ranges(ranges);
        }
        has_grown || is_changed
    }

    /// Recomputes the ranges of nodes and ServiceCIDRs. Returns true if the refused ranges have changed.
    fn add_source_ranges(&mut self, ranges: &mut Arc<Ranges>) -> bool {
        self.node_addresses = self.sources.values().flat_map(|source| &source.addresses).copied().collect();
        let mut refused = Vec::new();
        for source in self.sources.values() {
            refused.extend(source.refused.iter().cloned());
            for (range, name) in &source.ranges {
                if ranges.covers(range) {
                    continue;
                }
                let mut nodes = self.node_addresses.range(range.network()..=range.broadcast());
                if let Some(address) = nodes.next() {
                    refused.push(format!("{name}: contains the address {address} of a node"));
                } else if Arc::make_mut(ranges).add(*range) == RangeAddition::Full {
                    refused.push(format!("{name}: too many ranges; write a larger range that contains this one in meshRanges or serviceRanges"));
                }
            }
        }
        let before: HashSet<String> = mem::replace(&mut self.refused, refused).into_iter().collect();
        let new: Vec<String> = self.refused.iter().filter(|line| !before.contains(*line)).cloned().collect();
        self.refusals += new.len() as u64;
        let is_changed = !new.is_empty() || before.len() != self.refused.len();
        self.unlogged.extend(new);
        is_changed
    }

    fn add_service_addresses(&mut self, directory: &Directory, ranges: &mut Arc<Ranges>) {
        let changed_services = mem::take(&mut self.changed_services);
        let names =
            if mem::take(&mut self.enrolled) { self.uncovered_services.clone() } else { changed_services };
        for full in names {
            let named =
                full.split_once('/').and_then(|(namespace, name)| directory.service_named(namespace, name));
            let Some(service) = named else { continue };
            if directory.has_enrolled_endpoint(service) {
                service.addresses.iter().for_each(|address| self.add_address(ranges, *address));
            }
            if service.addresses.iter().all(|address| ranges.contains(*address)) {
                self.uncovered_services.remove(&full);
            }
        }
    }

    /// Adds an address. An address that cannot be added is reported as uncovered.
    fn add_address(&self, ranges: &mut Arc<Ranges>, address: IpAddr) {
        let is_of_node = self.node_addresses.contains(&address);
        if !is_of_node
            && !ranges.contains(address)
            && let Ok(range) = discovered_range(&IpNet::from(address).to_string())
        {
            Arc::make_mut(ranges).add(range);
        }
    }

    /// Returns the ranges refused since the last call.
    pub(super) fn warnings(&mut self) -> Vec<String> {
        let mut lines = truncated(&self.unlogged);
        self.unlogged.clear();
        lines.iter_mut().for_each(|line| line.insert_str(0, "mesh range not used: "));
        lines
    }

    /// Returns the ranges that are refused now.
    pub(super) fn invalid_objects(&self) -> InvalidObjects {
        InvalidObjects { list: truncated(&self.refused), total: self.refusals }
    }
}

/// Truncates a list to [`REPORTED_MAX`] lines.
fn truncated(lines: &[String]) -> Vec<String> {
    let more = lines.len().saturating_sub(REPORTED_MAX);
    let rest = (more > 0).then(|| format!("and {more} more"));
    lines.iter().take(REPORTED_MAX).cloned().chain(rest).collect()
}

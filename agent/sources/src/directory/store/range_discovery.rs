//! Discovery of mesh ranges, in addition to the configured ranges. Pure.
//!
//! | source | range |
//! |---|---|
//! | a node: `spec.podCIDRs` | the CIDR |
//! | a ServiceCIDR: `spec.cidrs` | the CIDR |
//! | an enrolled pod, a service with an enrolled endpoint | each of its addresses outside all other ranges |
//! | a service behind a waypoint | each of its ClusterIPs outside all other ranges |
//!
//! Configured ranges always stay. A range whose source is gone stays until the last address is gone for which it is needed: one of
//! an enrolled pod or of a service, in no other range. An address goes with its pod or service.
//!
//! A node can report any address as its own. Such an address is cut out of the range that contains it, unless a pod or a service
//! has it, and no range is refused for it. Refused ranges and ranges beyond the limit are reported, and the pods in them are
//! covered by their addresses.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    mem,
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use tacit_core::directory::{Directory, RangeAddition, Ranges, discovered_range};

use super::{
    super::objects::{Node, ResourceKind, ServiceCidr},
    problems::listed,
};
use crate::kubernetes::{InvalidObjects, Problem};

/// Maximum number of ranges of one object. Clusters that have outgrown a range add more.
const PER_OBJECT_MAX: usize = 16;
/// Maximum number of addresses of one node that are read. Nodes have some for each network.
const NODE_ADDRESSES_MAX: usize = 64;
/// Maximum number of addresses of one node that are cut out of ranges. Few nodes have one in a range of pods.
const CUT_PER_NODE_MAX: usize = 4;
/// Maximum number of addresses that are cut out of ranges. Each splits a range into up to 24 (IPv4) or 96 (IPv6) parts.
const CUT_MAX: usize = 256;
/// Maximum number of external and load balancer addresses of a namespace's services that are ranges of their own. Everybody who
/// may create services can write external addresses, and all namespaces share the kernel's ranges.
pub(super) const OUTER_PER_NAMESPACE_MAX: usize = 1024;
/// Maximum number of ranges that are kept for their addresses after their source is gone. Then the addresses are covered one
/// by one.
const RETIRED_MAX: usize = 4096;

/// The sources of ranges, and the changes since the last update.
#[derive(Debug, Default)]
pub(super) struct RangeDiscovery {
    sources: BTreeMap<(ResourceKind, String), RangeSource>,
    sources_changed: bool,
    configured: Arc<Ranges>,
    /// Ranges without a source.
    retired: Vec<IpNet>,
    /// Number of enrolled pods and services with each address.
    in_use: BTreeMap<IpAddr, u32>,
    /// Addresses that are ranges of their own, with the namespace if it is for an external address of a service.
    single: BTreeMap<IpAddr, Option<Arc<str>>>,
    /// True if a retired range may no longer be needed.
    may_shrink: bool,
    /// True if retired ranges were forgotten.
    is_overflowing: bool,
    /// Single addresses that were out of use since the last update.
    gone: Vec<IpAddr>,
    /// Addresses in use that may be outside all ranges.
    new_addresses: Vec<IpAddr>,
    /// True if pods were enrolled, so that services may have enrolled endpoints.
    enrolled: bool,
    /// Services with an address outside all ranges, and the changed ones among them.
    uncovered_services: BTreeSet<String>,
    changed_services: BTreeSet<String>,
    /// Refused ranges with the reason, by object.
    refused: Vec<Problem>,
    unlogged: Vec<Problem>,
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
    pub(super) fn new(configured: Arc<Ranges>) -> Self {
        Self { configured, ..Self::default() }
    }

    /// Records a node. Returns its addresses before and now.
    pub(super) fn node(&mut self, node: Node) -> (Vec<IpAddr>, Vec<IpAddr>) {
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
        let addresses = addresses.map(|address: IpAddr| address.to_canonical());
        source.addresses.extend(addresses.take(NODE_ADDRESSES_MAX));
        let now = source.addresses.clone();
        (self.set((ResourceKind::Nodes, node.metadata.name), source), now)
    }

    pub(super) fn service_cidr(&mut self, object: ServiceCidr) {
        let mut source = RangeSource::default();
        let listed = object.spec.cidrs.iter().enumerate();
        let listed = listed.map(|(index, text)| (format!("spec.cidrs[{index}]"), text.as_str()));
        source.read(&format!("ServiceCIDR {}", object.metadata.name), listed);
        self.set((ResourceKind::ServiceCidrs, object.metadata.name), source);
    }

    /// Replaces a source. Returns the addresses that it had.
    fn set(&mut self, key: (ResourceKind, String), source: RangeSource) -> Vec<IpAddr> {
        match self.sources.get(&key) {
            Some(known) if *known == source => source.addresses,
            _ => {
                self.sources_changed = true;
                let ranges: BTreeSet<IpNet> = source.ranges.iter().map(|(range, _)| *range).collect();
                let before = self.sources.insert(key, source);
                self.retire(before.as_ref(), &ranges);
                before.map(|before| before.addresses).unwrap_or_default()
            }
        }
    }

    /// Removes a source. Returns the addresses that it had.
    pub(super) fn remove(&mut self, kind: ResourceKind, name: &str) -> Vec<IpAddr> {
        let before = self.sources.remove(&(kind, name.to_owned()));
        self.sources_changed |= before.is_some();
        self.retire(before.as_ref(), &BTreeSet::new());
        before.map(|before| before.addresses).unwrap_or_default()
    }

    fn retire(&mut self, before: Option<&RangeSource>, now: &BTreeSet<IpNet>) {
        let ranges = before.into_iter().flat_map(|source| &source.ranges).map(|(range, _)| *range);
        for range in ranges.filter(|range| !now.contains(range)) {
            self.may_shrink = true;
            if self.retired.len() == RETIRED_MAX {
                // Their addresses are covered one by one.
                self.retired.clear();
                self.is_overflowing = true;
            }
            if !self.retired.contains(&range) {
                self.retired.push(range);
            }
        }
    }

    pub(super) fn names(&self, kind: ResourceKind) -> Vec<String> {
        self.sources.keys().filter(|(of, _)| *of == kind).map(|(_, name)| name.clone()).collect()
    }

    /// Records an enrolled pod's addresses.
    pub(super) fn enrolled(&mut self, addresses: &[IpAddr], ranges: &Ranges) {
        self.enrolled = true;
        self.used(addresses);
        self.new_addresses.extend(addresses.iter().filter(|address| !ranges.contains(**address)));
    }

    /// Records that addresses of a pod or a service are in use.
    pub(super) fn used(&mut self, addresses: &[IpAddr]) {
        for address in addresses {
            *self.in_use.entry(*address).or_default() += 1;
        }
    }

    /// Records that a pod or a service no longer uses addresses.
    pub(super) fn unused(&mut self, addresses: &[IpAddr]) {
        for address in addresses {
            let Some(count) = self.in_use.get_mut(address) else { continue };
            *count -= 1;
            if *count == 0 {
                self.in_use.remove(address);
                let is_in = |range: &IpNet| range.contains(address);
                self.may_shrink |= self.retired.iter().any(is_in);
                if self.single.contains_key(address) {
                    self.gone.push(*address);
                }
            }
        }
    }

    /// Records that other nodes' addresses are known: pods may have addresses that they did not have before.
    pub(super) fn node_addresses_changed(&mut self, ranges: &Ranges) {
        let outside = self.in_use.keys().filter(|address| !ranges.contains(**address));
        self.new_addresses = outside.copied().collect();
        self.sources_changed = true;
        // An external address of a service may have been a node's.
        self.enrolled = true;
    }

    /// Records a new or changed service.
    pub(super) fn service(
        &mut self,
        name: &str,
        mut addresses: impl Iterator<Item = IpAddr>,
        ranges: &Ranges,
    ) {
        if addresses.all(|address| ranges.contains(address)) {
            return self.remove_service(name);
        }
        self.uncovered_services.insert(name.to_owned());
        self.changed_services.insert(name.to_owned());
    }

    /// Records that clients of a service have another detour.
    pub(super) fn detour_changed(&mut self, name: &str) {
        if self.uncovered_services.contains(name) {
            self.changed_services.insert(name.to_owned());
        }
    }

    pub(super) fn remove_service(&mut self, name: &str) {
        self.uncovered_services.remove(name);
        self.changed_services.remove(name);
    }

    /// Brings the directory's ranges up to date. Returns true if the status must be published.
    pub(super) fn update(&mut self, directory: &mut Directory) -> bool {
        let mut ranges = Arc::clone(directory.ranges());
        let mut is_changed = false;
        let sources_changed = mem::take(&mut self.sources_changed);
        let mut gone = mem::take(&mut self.gone);
        gone.retain(|address| !self.in_use.contains_key(address) && self.single.remove(address).is_some());
        if mem::take(&mut self.may_shrink) || sources_changed {
            let (rebuilt, refusals_changed) = self.rebuild(directory);
            is_changed = refusals_changed;
            if let Some(rebuilt) = rebuilt.succeeding(&ranges) {
                ranges = Arc::new(rebuilt);
            }
        } else {
            for address in gone {
                Arc::make_mut(&mut ranges).remove_address(address);
            }
        }
        for address in mem::take(&mut self.new_addresses) {
            // Of an unclear address one claimant is right: it is one of the mesh.
            if directory.is_enrolled(address) || directory.is_unclear(address) {
                self.add_address(&mut ranges, address, None);
            }
        }
        self.add_service_addresses(directory, &mut ranges);
        let has_changed = ranges != *directory.ranges();
        if has_changed {
            directory.set_ranges(ranges);
        }
        has_changed || is_changed
    }

    /// Builds the ranges anew. Returns them, and true if the refused ranges have changed.
    fn rebuild(&mut self, directory: &Directory) -> (Ranges, bool) {
        let cut = self.cut(directory);
        let mut ranges = (*self.configured).clone();
        let mut refused = Vec::new();
        for ((_, object), source) in &self.sources {
            let problem = |line: String| Problem { owner: object.clone(), line };
            refused.extend(source.refused.iter().cloned().map(problem));
            for (range, name) in &source.ranges {
                if add_without(&mut ranges, *range, &cut) == RangeAddition::Full {
                    refused.push(problem(format!("{name}: too many ranges; write a larger range that contains this one in meshRanges or serviceRanges")));
                }
            }
        }
        // Measured by the ranges that have a source.
        let kept = ranges.clone();
        let in_use = &self.in_use;
        self.retired.retain(|range| {
            let mut inside = in_use.range(range.network()..=range.broadcast());
            inside.any(|(address, _)| !kept.contains(*address))
        });
        for range in &self.retired {
            add_without(&mut ranges, *range, &cut);
        }
        let is_needed = |address: IpAddr| directory.knows(address) || directory.is_unclear(address);
        self.single.retain(|address, _| !ranges.contains(*address) && is_needed(*address));
        for address in self.single.keys() {
            ranges.add(IpNet::from(*address));
        }
        if mem::take(&mut self.is_overflowing) {
            let outside = self.in_use.keys().filter(|address| !ranges.contains(**address));
            self.new_addresses.extend(outside);
            self.enrolled = true;
        }
        let before = mem::replace(&mut self.refused, refused);
        let before: HashSet<String> = before.into_iter().map(|problem| problem.line).collect();
        let new: Vec<Problem> =
            self.refused.iter().filter(|problem| !before.contains(&problem.line)).cloned().collect();
        self.refusals += new.len() as u64;
        let is_changed = !new.is_empty() || before.len() != self.refused.len();
        self.unlogged.extend(new);
        (ranges, is_changed)
    }

    /// Returns the addresses of nodes that are cut out of ranges: those that no pod and no service has.
    fn cut(&self, directory: &Directory) -> BTreeSet<IpAddr> {
        let is_free = |address: &&IpAddr| !directory.knows(**address) && !directory.is_unclear(**address);
        let of_nodes = self
            .sources
            .values()
            .flat_map(|source| source.addresses.iter().filter(is_free).take(CUT_PER_NODE_MAX));
        of_nodes.take(CUT_MAX).copied().collect()
    }

    fn add_service_addresses(&mut self, directory: &Directory, ranges: &mut Arc<Ranges>) {
        let changed_services = mem::take(&mut self.changed_services);
        let names =
            if mem::take(&mut self.enrolled) { self.uncovered_services.clone() } else { changed_services };
        if names.is_empty() {
            return;
        }
        let mut outer_counts: HashMap<Arc<str>, usize> = HashMap::new();
        for namespace in self.single.values().flatten() {
            *outer_counts.entry(Arc::clone(namespace)).or_default() += 1;
        }
        for full in names {
            let named =
                full.split_once('/').and_then(|(namespace, name)| directory.service_named(namespace, name));
            let Some(service) = named else { continue };
            if directory.has_enrolled_endpoint(service) {
                let addresses = service.all_addresses();
                let addresses = addresses.filter(|address| directory.is_service_address(service, *address));
                let outer_count = outer_counts.entry(Arc::clone(&service.namespace)).or_default();
                for address in addresses {
                    if service.addresses.contains(&address) {
                        self.add_address(ranges, address, None);
                    } else if *outer_count < OUTER_PER_NAMESPACE_MAX {
                        let namespace = Some(Arc::clone(&service.namespace));
                        *outer_count += usize::from(self.add_address(ranges, address, namespace));
                    }
                }
            }
            // A connection to a service behind a waypoint must meet the refusal. Only the API server allocates ClusterIPs.
            if directory.detour_of(service).is_some() {
                for address in &service.addresses {
                    self.add_address(ranges, *address, None);
                }
            }
            if service.all_addresses().all(|address| ranges.contains(address)) {
                self.uncovered_services.remove(&full);
            }
        }
    }

    /// Adds an address, and returns true if it is new. An address that cannot be added is reported as uncovered.
    fn add_address(&mut self, ranges: &mut Arc<Ranges>, address: IpAddr, outer_of: Option<Arc<str>>) -> bool {
        let is_new = !ranges.contains(address)
            && discovered_range(&IpNet::from(address).to_string())
                .is_ok_and(|range| Arc::make_mut(ranges).add(range) == RangeAddition::New);
        if is_new {
            self.single.insert(address, outer_of);
        }
        is_new
    }

    /// Returns the ranges refused since the last call.
    pub(super) fn warnings(&mut self) -> Vec<String> {
        let mut lines = listed(&mem::take(&mut self.unlogged));
        lines.iter_mut().for_each(|line| line.insert_str(0, "mesh range not used: "));
        lines
    }

    /// Returns the ranges that are refused now.
    pub(super) fn invalid_objects(&self) -> InvalidObjects {
        InvalidObjects { list: listed(&self.refused), total: self.refusals }
    }
}

/// Adds a range without some addresses.
fn add_without(ranges: &mut Ranges, range: IpNet, cut: &BTreeSet<IpAddr>) -> RangeAddition {
    if ranges.covers(&range) {
        return RangeAddition::Known;
    }
    if cut.range(range.network()..=range.broadcast()).next().is_none() {
        return ranges.add(range);
    }
    let halves = range.subnets(range.prefix_len() + 1).into_iter().flatten();
    let added = halves.map(|half| add_without(ranges, half, cut));
    // An address of its own has no halves and is left out.
    added.fold(RangeAddition::Known, |all, one| if all == RangeAddition::Full { all } else { one })
}

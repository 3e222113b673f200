//! Which ranges the mesh has, beside those that are configured. Pure.
//!
//! | told by | range |
//! |---|---|
//! | a node: `spec.podCIDRs` | as it is |
//! | a ServiceCIDR: `spec.cidrs` | as it is |
//! | an enrolled pod, a service with an enrolled endpoint | each address of it that is in no other range |
//!
//! A range stays for as long as the agent runs, whoever told of it: what is captured once too often is reached in clear by
//! the agent, what is captured too seldom is not protected. A node's own address is in no range, since nothing but pods and
//! services is behind the mesh. What is refused, or does not fit, is told; pods in it are found by their addresses.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    mem,
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use tacit_core::directory::{Directory, RangeAddition, Ranges, discovered_range};

use super::super::objects::{Kind, Node, ServiceCidr};
use crate::kubernetes::Complaints;

/// Ranges that one object may have: there are two families, and a cluster that has outgrown its ranges adds some.
const OF_ONE_MAX: usize = 16;
/// Refused ranges that are told at a time; more are counted.
const TOLD_MAX: usize = 20;

/// What tells of ranges, and what has to be looked at again.
#[derive(Debug, Default)]
pub(super) struct RangeDiscovery {
    sources: BTreeMap<(Kind, String), Source>,
    sources_changed: bool,
    /// Of all nodes.
    node_addresses: BTreeSet<IpAddr>,
    /// Addresses of enrolled pods that were in no range when they came.
    fresh: Vec<IpAddr>,
    /// Whether pods were enrolled, which services may lead to.
    enrolled: bool,
    /// Services with an address in no range, and those of them that have changed.
    outside: BTreeSet<String>,
    touched: BTreeSet<String>,
    /// Why ranges are not used, a line each.
    refused: Vec<String>,
    unlogged: Vec<String>,
    refusals: u64,
}

/// What a node or a ServiceCIDR tells.
#[derive(Debug, Default, PartialEq, Eq)]
struct Source {
    /// Each with its object, field and value, as it is called in a refusal.
    ranges: Vec<(IpNet, String)>,
    addresses: Vec<IpAddr>,
    refused: Vec<String>,
}

impl Source {
    fn read<'a>(&mut self, object: &str, told: impl Iterator<Item = (String, &'a str)>) {
        for (index, (field, text)) in told.enumerate() {
            let name = format!("{object}: {field}: {text:?}");
            if index == OF_ONE_MAX {
                return self
                    .refused
                    .push(format!("{name}: more than {OF_ONE_MAX} ranges, which are not used"));
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
        let mut source = Source::default();
        let listed = node.spec.pod_cidrs.iter().enumerate();
        let listed = listed.map(|(index, text)| (format!("spec.podCIDRs[{index}]"), text.as_str()));
        // The first of the list again, or all that there is.
        let single = node.spec.pod_cidr.iter().filter(|text| !text.is_empty());
        let single = single.filter(|text| !node.spec.pod_cidrs.contains(text));
        let single = single.map(|text| ("spec.podCIDR".to_owned(), text.as_str()));
        source.read(&format!("Node {}", node.metadata.name), listed.chain(single));
        // Names among them are none.
        let addresses = node.status.addresses.iter().filter_map(|listed| listed.address.parse().ok());
        source.addresses.extend(addresses.map(|address: IpAddr| address.to_canonical()));
        self.set((Kind::Nodes, node.metadata.name), source);
    }

    pub(super) fn service_cidr(&mut self, object: ServiceCidr) {
        let mut source = Source::default();
        let listed = object.spec.cidrs.iter().enumerate();
        let listed = listed.map(|(index, text)| (format!("spec.cidrs[{index}]"), text.as_str()));
        source.read(&format!("ServiceCIDR {}", object.metadata.name), listed);
        self.set((Kind::ServiceCidrs, object.metadata.name), source);
    }

    fn set(&mut self, key: (Kind, String), source: Source) {
        if self.sources.get(&key) != Some(&source) {
            self.sources.insert(key, source);
            self.sources_changed = true;
        }
    }

    pub(super) fn forget(&mut self, kind: Kind, name: &str) {
        self.sources_changed |= self.sources.remove(&(kind, name.to_owned())).is_some();
    }

    pub(super) fn names(&self, kind: Kind) -> Vec<String> {
        self.sources.keys().filter(|(of, _)| *of == kind).map(|(_, name)| name.clone()).collect()
    }

    /// An enrolled pod came, or came to these addresses.
    pub(super) fn enrolled(&mut self, addresses: &[IpAddr], ranges: &Ranges) {
        self.enrolled = true;
        self.fresh.extend(addresses.iter().filter(|address| !ranges.contains(**address)));
    }

    /// A service came or has changed.
    pub(super) fn service(&mut self, name: &str, addresses: &[IpAddr], ranges: &Ranges) {
        if addresses.iter().all(|address| ranges.contains(*address)) {
            return self.forget_service(name);
        }
        self.outside.insert(name.to_owned());
        self.touched.insert(name.to_owned());
    }

    pub(super) fn forget_service(&mut self, name: &str) {
        self.outside.remove(name);
        self.touched.remove(name);
    }

    /// Adds to the directory's ranges what is to be added now. Says whether there is something to tell.
    pub(super) fn grow(&mut self, directory: &mut Directory) -> bool {
        let mut ranges = Arc::clone(directory.ranges());
        let is_told = mem::take(&mut self.sources_changed) && self.by_sources(&mut ranges);
        for address in mem::take(&mut self.fresh) {
            if directory.is_enrolled(address) {
                self.add_address(&mut ranges, address);
            }
        }
        self.by_services(directory, &mut ranges);
        let has_grown = ranges != *directory.ranges();
        if has_grown {
            directory.set_ranges(ranges);
        }
        has_grown || is_told
    }

    /// Looks at what all nodes and ServiceCIDRs tell. Says whether something else is refused than before.
    fn by_sources(&mut self, ranges: &mut Arc<Ranges>) -> bool {
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
                    refused.push(format!("{name}: a node has the address {address} in it"));
                } else if Arc::make_mut(ranges).add(*range) == RangeAddition::Full {
                    refused.push(format!("{name}: no room for more ranges; write one in meshRanges or serviceRanges that holds many"));
                }
            }
        }
        let before: HashSet<String> = mem::replace(&mut self.refused, refused).into_iter().collect();
        let new: Vec<String> = self.refused.iter().filter(|line| !before.contains(*line)).cloned().collect();
        self.refusals += new.len() as u64;
        let is_told = !new.is_empty() || before.len() != self.refused.len();
        self.unlogged.extend(new);
        is_told
    }

    fn by_services(&mut self, directory: &Directory, ranges: &mut Arc<Ranges>) {
        let touched = mem::take(&mut self.touched);
        let names = if mem::take(&mut self.enrolled) { self.outside.clone() } else { touched };
        for full in names {
            let named =
                full.split_once('/').and_then(|(namespace, name)| directory.service_named(namespace, name));
            let Some(service) = named else { continue };
            if directory.has_enrolled_endpoint(service) {
                service.addresses.iter().for_each(|address| self.add_address(ranges, *address));
            }
            if service.addresses.iter().all(|address| ranges.contains(*address)) {
                self.outside.remove(&full);
            }
        }
    }

    /// An address that cannot be added is seen where the agent shows who is in no range.
    fn add_address(&self, ranges: &mut Arc<Ranges>, address: IpAddr) {
        let is_of_node = self.node_addresses.contains(&address);
        if !is_of_node
            && !ranges.contains(address)
            && let Ok(range) = discovered_range(&IpNet::from(address).to_string())
        {
            Arc::make_mut(ranges).add(range);
        }
    }

    /// What was refused since this was last asked.
    pub(super) fn warnings(&mut self) -> Vec<String> {
        let mut told = some(&self.unlogged);
        self.unlogged.clear();
        told.iter_mut().for_each(|line| line.insert_str(0, "no range of the mesh: "));
        told
    }

    /// What is refused now.
    pub(super) fn complaints(&self) -> Complaints {
        Complaints { list: some(&self.refused), total: self.refusals }
    }
}

/// The first of many.
fn some(lines: &[String]) -> Vec<String> {
    let more = lines.len().saturating_sub(TOLD_MAX);
    let rest = (more > 0).then(|| format!("and {more} more"));
    lines.iter().take(TOLD_MAX).cloned().chain(rest).collect()
}

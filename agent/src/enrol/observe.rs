//! Looks at cgroups, processes and network namespaces, for `plan` and for a pod that is to be enrolled.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use tacit_core::directory::{Directory, Ranges, Workload};
use tacit_kernel::{
    cgroup::{self, Cgroup},
    has_host_end,
    netns::Netns,
};

use crate::enrol::{
    Enroller, State,
    plan::{Level, NotYet, Observed, ObservedCgroup, Served, Wanted},
};

/// Levels below the pods' cgroup at which the connect hooks look for a pod.
const POD_LEVELS: std::ops::RangeInclusive<u32> = 1..=2;

impl Enroller {
    pub(super) fn observe(&self, state: &State, wanted: &Wanted) -> Observed {
        let served = |(path, pod): (&PathBuf, &Arc<super::Pod>)| {
            (path.clone(), Served { cgroup: pod.cgroup, workload: pod.workload.clone() })
        };
        let departed = wanted.departed.iter().filter_map(|w| Some((&w.cgroup, self.departed(&w.cgroup)?)));
        let pods = wanted
            .bystanders
            .iter()
            .chain(&wanted.pods)
            .filter_map(|w| Some((&w.cgroup, self.cgroup(state, &w.cgroup)?)));
        // Those of served pods too: their identities may have changed.
        let uncertified = wanted
            .pods
            .iter()
            .filter_map(|w| Some((w.identity.clone(), self.snapshots.identities.ready(&w.identity).err()?)));
        Observed {
            pods_cgroup: self.pods_cgroup.path().to_owned(),
            // Of a pod that is wanted again, the second.
            cgroups: departed.chain(pods).map(|(path, cgroup)| (path.clone(), cgroup)).collect(),
            served: state.current.iter().map(served).collect(),
            covered: state.known.keys().copied().collect(),
            exempt: state.exempt.iter().map(|(id, addresses)| (*id, addresses.clone())).collect(),
            unnamed: state.unnamed.passed(),
            is_partial: !state.has_seen_all,
            guarded: state.guarded.iter().copied().collect(),
            attached: state.attached.iter().copied().collect(),
            uncertified: uncertified.collect(),
            taken_ports: state.taken_ports.reasons(),
            ranges: self.snapshots.mesh.ranges(),
        }
    }

    /// Looks at the cgroup of a wanted pod.
    fn cgroup(&self, state: &State, path: &Path) -> Option<ObservedCgroup> {
        if let Some(pod) = state.current.get(path)
            && let Some(served) = self.departed(path).filter(|cgroup| cgroup.id == pod.cgroup)
        {
            return Some(served);
        }
        let path = self.pods_cgroup.path().join(path);
        let cgroup = Cgroup::open(&path).ok()?;
        let level = cgroup.levels_below(&self.pods_cgroup)?;
        Some(ObservedCgroup {
            id: cgroup.id(),
            level: if POD_LEVELS.contains(&level) { Level::Hooked } else { Level::Other(level) },
            populated: cgroup::processes(&path).is_ok_and(|processes| !processes.is_empty()),
        })
    }

    /// Looks at a cgroup at a level that is known to be right.
    fn departed(&self, path: &Path) -> Option<ObservedCgroup> {
        let path = self.pods_cgroup.path().join(path);
        let id = cgroup::id_at(&path)?;
        Some(ObservedCgroup { id, level: Level::Hooked, populated: cgroup::is_populated(&path) })
    }

    /// The pod's namespace, that of the first process with all the pod's addresses. Of several the one with a link of the node.
    /// Addresses that the directory does not have yet are those of the one namespace in which all the pod's processes are.
    pub(super) fn find_netns(
        &self,
        processes: Vec<u32>,
        workload: &Arc<Workload>,
    ) -> Result<(Netns, Arc<Workload>), NotYet> {
        let away = processes.into_iter().filter(|pid| !self.host.is_home_of(*pid).unwrap_or(true));
        let mut found: Vec<Netns> = Vec::new();
        for netns in away.filter_map(|pid| Netns::of_process(pid, &self.host).ok()) {
            if found.iter().all(|known| known.inode() != netns.inode()) {
                found.push(netns);
            }
        }
        let listed = |netns: &Netns| netns.addresses(&self.host).unwrap_or_default();
        if workload.addresses.is_empty() {
            let only = found.pop().filter(|_| found.is_empty()).ok_or(NotYet::AddressUnknown)?;
            let addresses = mesh_addresses(&listed(&only), &self.snapshots.mesh.ranges());
            if addresses.is_empty() {
                return Err(NotYet::AddressUnknown);
            }
            // The pod may have written them itself.
            let directory = self.snapshots.directory.current();
            let taken = addresses.iter().find(|address| is_given_away(&directory, **address, workload));
            if let Some(taken) = taken {
                return Err(NotYet::AddressTaken(*taken));
            }
            return Ok((only, Arc::new(Workload { addresses, ..(**workload).clone() })));
        }
        let has_all = |netns: &Netns| {
            let listed = listed(netns);
            workload.addresses.iter().all(|address| listed.contains(address))
        };
        let mut fitting: Vec<Netns> = found.into_iter().filter(has_all).collect();
        // A process of the pod can make a namespace with the pod's addresses, but none with a link of the node.
        if fitting.len() > 1 && fitting.iter().any(|netns| has_host_end(netns, &self.host)) {
            fitting.retain(|netns| has_host_end(netns, &self.host));
        }
        match fitting.into_iter().next() {
            Some(netns) => Ok((netns, Arc::clone(workload))),
            None => {
                let addresses: Vec<String> = workload.addresses.iter().map(ToString::to_string).collect();
                Err(NotYet::NoAddress(addresses.join(" and ")))
            }
        }
    }
}

/// Returns true if the directory gives `address` to somebody else than `workload`, or to nobody because it is unclear.
pub(super) fn is_given_away(directory: &Directory, address: IpAddr, workload: &Workload) -> bool {
    let is_others = directory.at(address).is_some_and(|known| known.full_name() != workload.full_name());
    is_others
        || directory.is_unclear(address)
        || directory.service_at(address).is_some()
        || directory.is_node(address)
}

/// The first address of each family that lies in the mesh.
fn mesh_addresses(listed: &[IpAddr], ranges: &Ranges) -> Vec<IpAddr> {
    let of_mesh = |address: &&IpAddr| ranges.contains(**address);
    let first = |is_ipv4| listed.iter().filter(of_mesh).find(|address| address.is_ipv4() == is_ipv4);
    [first(true), first(false)].into_iter().flatten().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    use tacit_core::spiffe::TrustDomain;

    use crate::enrol::testing::workload;

    #[test]
    fn an_address_that_is_somebody_elses_is_never_adopted() {
        let text = "\
workloads: [{name: other, namespace: shop, addresses: [10.77.1.2], node: b}]
services: [{name: web, namespace: shop, addresses: [10.96.0.1], ports: [{port: 80}], endpoints: []}]
";
        let domain = TrustDomain::parse("cluster.local").expect("valid");
        let mut directory = Directory::parse(text, Path::new("directory.yaml"), &domain).expect("valid");
        let address = |text: &str| text.parse::<IpAddr>().expect("an address");
        for node in ["b", "c"] {
            let claim = Workload { name: node.into(), node: node.into(), ..workload("web", &["10.77.1.5"]) };
            directory.insert(claim, tacit_core::directory::AddressConflict::Replace);
        }
        directory.set_node_addresses(&"b".into(), &[], &[address("192.0.2.2")]);
        directory.insert(workload("web", &["10.77.1.4"]), tacit_core::directory::AddressConflict::Replace);
        let adopts = workload("web", &[]);
        for (text, expected) in [
            ("10.77.1.2", true),
            ("10.77.1.5", true),
            ("10.96.0.1", true),
            ("192.0.2.2", true),
            ("10.77.1.3", false),
            ("10.77.1.4", false),
        ] {
            assert_eq!(is_given_away(&directory, address(text), &adopts), expected, "{text}");
        }
    }

    #[test]
    fn of_a_pods_interfaces_the_mesh_addresses_count() {
        let parse = |text: &&str| text.parse::<IpAddr>().expect("an address");
        let ranges = ["10.77.0.0/16", "fd77::/16"].map(|text| text.parse().expect("a range"));
        let ranges = Ranges::configured(&ranges);
        for (listed, found) in [
            (&["127.0.0.1", "::1", "fe80::1", "10.77.1.2", "fd77::2"][..], &["10.77.1.2", "fd77::2"][..]),
            (&["fd77::2", "10.77.1.2", "10.77.1.3"], &["10.77.1.2", "fd77::2"]),
            (&["10.78.1.2", "fd77::2"], &["fd77::2"]),
            (&["127.0.0.1", "fe80::1"], &[]),
        ] {
            let listed: Vec<IpAddr> = listed.iter().map(parse).collect();
            assert_eq!(
                mesh_addresses(&listed, &ranges),
                found.iter().map(parse).collect::<Vec<_>>(),
                "{listed:?}"
            );
        }
    }
}

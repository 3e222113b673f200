//! The node itself: its own addresses and its kernel's name.

use std::{
    collections::{BTreeMap, HashSet},
    io,
    net::{IpAddr, Ipv6Addr},
    os::fd::BorrowedFd,
};

use ipnet::IpNet;
use nix::{
    ifaddrs::{InterfaceAddress as Listed, getifaddrs},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        socket::SockaddrStorage,
    },
};

use super::netlink;

/// Addresses of all interfaces in the calling thread's network namespace.
///
/// # Errors
/// Fails if the interfaces cannot be listed.
pub fn addresses() -> io::Result<Vec<IpAddr>> {
    let mut found: Vec<IpAddr> = listed()?.into_iter().map(|(_, address)| address).collect();
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// The address.
    pub address: IpAddr,
    /// True if the only interfaces that have the address are dummy interfaces, which no packet leaves by.
    pub is_of_dummy: bool,
}

/// Returns the addresses of all interfaces in the calling thread's network namespace, with the kind of interface.
///
/// # Errors
/// Fails if the interfaces cannot be listed.
pub fn interface_addresses() -> io::Result<Vec<InterfaceAddress>> {
    let interfaces = netlink::interfaces()?;
    let is_dummy = |name: &str| interfaces.iter().any(|found| found.name == name && found.kind == "dummy");
    let mut found: BTreeMap<IpAddr, bool> = BTreeMap::new();
    for (name, address) in listed()? {
        let is_of_dummy = is_dummy(&name);
        found.entry(address).and_modify(|before| *before &= is_of_dummy).or_insert(is_of_dummy);
    }
    let of = |(address, is_of_dummy)| InterfaceAddress { address, is_of_dummy };
    Ok(found.into_iter().map(of).collect())
}

/// Most ranges inside a pod. What a pod has beyond is not inside, and goes the way of any other destination.
const INNER_RANGES_MAX: usize = 64;

/// Returns the ranges of the links in the calling thread's network namespace that do not leave it, where the namespace is a pod's:
/// bridges to containers or virtual machines, and pairs whose other end is in a namespace of the pod. `host` is the node's namespace.
/// An interface with an address of `own`, a range with one, and link-local ranges are left out.
pub(super) fn inner_ranges(host: BorrowedFd<'_>, own: &[IpAddr]) -> io::Result<Vec<IpNet>> {
    let inner = inner_links(host)?;
    if inner.is_empty() {
        return Ok(Vec::new());
    }
    let all: Vec<_> = getifaddrs()?.collect();
    let ip = |storage: Option<&SockaddrStorage>| -> Option<IpAddr> {
        let storage = storage?;
        let v4 = storage.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| storage.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    };
    let has_own = |found: &Listed| ip(found.address.as_ref()).is_some_and(|ip| own.contains(&ip));
    let outer: HashSet<&str> =
        all.iter().filter(|found| has_own(found)).map(|found| found.interface_name.as_str()).collect();
    let is_inner = |name: &str| inner.contains(name) && !outer.contains(name);
    let mut ranges: Vec<IpNet> = all
        .iter()
        .filter(|found| is_inner(&found.interface_name))
        .filter_map(|found| {
            IpNet::with_netmask(ip(found.address.as_ref())?, ip(found.netmask.as_ref())?).ok()
        })
        .filter(|range| is_probe_source(&range.addr()) && !own.iter().any(|address| range.contains(address)))
        .map(|range| range.trunc())
        .collect();
    ranges.sort_unstable();
    ranges.dedup();
    ranges.truncate(INNER_RANGES_MAX);
    Ok(ranges)
}

/// Names of the links that do not leave the calling thread's namespace, if that is a pod's. A link of the plugin that makes a second
/// network has its other end on the node, or none.
fn inner_links(host: BorrowedFd<'_>) -> io::Result<HashSet<String>> {
    let links = netlink::interfaces()?;
    let host = netlink::netns_id(host)?;
    let is_inner = |link: &netlink::Interface| match link.kind.as_str() {
        "bridge" => true,
        "veth" => link.linked_netns.is_some() && link.linked_netns != host,
        _ => false,
    };
    Ok(links.into_iter().filter(is_inner).map(|link| link.name).collect())
}

/// Returns the addresses of all interfaces, each with its interface's name.
fn listed() -> io::Result<Vec<(String, IpAddr)>> {
    let mut found = Vec::new();
    for interface in getifaddrs()? {
        let Some(address) = interface.address else { continue };
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        let ip = v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())));
        found.extend(ip.map(|ip| (interface.interface_name, ip)));
    }
    Ok(found)
}

/// Returns true for an address that probes can come from: not loopback, and not link-local, which is the same on every link.
#[must_use]
pub fn is_probe_source(address: &IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => is_unicast_link_local(v6),
    };
    !address.is_loopback() && !link_local
}

fn is_unicast_link_local(address: &Ipv6Addr) -> bool {
    address.segments()[0] & 0xffc0 == 0xfe80
}

/// Raises this process' limit of open files to the most it may have: a flow takes two descriptors, and the usual soft
/// limit of 1,024 would end at some 500 flows. Returns the limit in force.
///
/// # Errors
/// Fails if the limit cannot be read or raised.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// Returns true if there is a process `id`. The first one of a system is no agent's.
pub(super) fn is_process(id: u32) -> bool {
    id > 1 && std::path::Path::new(&format!("/proc/{id}")).exists()
}

/// The running kernel's release, such as `6.18.0-1-amd64`.
#[must_use]
pub fn kernel_release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "?".to_owned(), |s| s.trim().to_owned())
}

/// Gives memory that the allocator holds and nobody uses back to the system. It holds each of the allocator's locks for the
/// time it takes, some milliseconds after thousands of flows.
pub fn release_memory() {
    // SAFETY: takes no pointer, and may be called by any thread at any time.
    unsafe { libc::malloc_trim(0) };
}

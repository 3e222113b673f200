//! The node itself: its own addresses and its kernel's name.

use std::{
    io,
    net::{IpAddr, Ipv6Addr},
};

use nix::{
    ifaddrs::getifaddrs,
    sys::resource::{Resource, getrlimit, setrlimit},
};

/// Addresses of all interfaces in the calling thread's network namespace.
///
/// # Errors
/// When the interfaces cannot be listed.
pub fn addresses() -> io::Result<Vec<IpAddr>> {
    let mut found = Vec::new();
    for interface in getifaddrs()? {
        let Some(address) = interface.address else { continue };
        if let Some(v4) = address.as_sockaddr_in() {
            found.push(IpAddr::V4(v4.ip()));
        } else if let Some(v6) = address.as_sockaddr_in6() {
            found.push(IpAddr::V6(v6.ip()));
        }
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// Is it an address that probes can come from (not loopback; link-local is the same on every link)?
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
/// When the limit cannot be read or raised.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// Is there a process `id`? The first one of a system is no agent's.
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

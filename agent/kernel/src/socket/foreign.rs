//! Listeners of a pod's own programs, found by the cgroup of their sockets.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use super::{HostNetns, Netns};
use crate::netlink::{self, Netlink};

/// Returns the first of `ports` of `netns` at which a socket listens that is not an agent's, on one of `addresses`, a loopback
/// address or all. `is_agent` returns true for cgroups of agents. A kernel that does not show the cgroups of sockets (before Linux
/// 5.9, or without `inet_diag`) finds none.
///
/// # Errors
/// When the namespace cannot be entered, or the kernel does not answer.
pub fn foreign_listener(
    netns: &Netns,
    host: &HostNetns,
    (addresses, ports): (&[IpAddr], &[u16]),
    is_agent: impl Fn(u64) -> bool,
) -> io::Result<Option<u16>> {
    let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    host.run_in(netns.file(), || {
        let netlink = Netlink::sock_diag()?;
        for port in ports {
            for ip in addresses.iter().chain(&loopback) {
                let found = netlink::listener_at(&netlink, SocketAddr::new(*ip, *port))?;
                if found.is_some_and(|found| found.cgroup.is_some_and(|cgroup| !is_agent(cgroup))) {
                    return Ok(Some(*port));
                }
            }
        }
        Ok(None)
    })?
}

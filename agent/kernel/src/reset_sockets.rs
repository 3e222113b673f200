//! Resets of a pod's plaintext TCP connections without an agent between: those from before its enrolment, which passed no
//! connect hook, and those that its applications accepted while its mode and policies allowed them.

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, SocketAddr},
};

use super::{
    netlink::{self, Connection},
    netns::{HostNetns, Netns},
};

/// Resets the connections of `netns` with mesh addresses that are not the agent's own, and returns how many there were.
/// `is_mesh` tells mesh addresses, the pod's own and the node's not among them; `agent` is the id of the agent's cgroup.
///
/// # Errors
/// The kernel's; `EOPNOTSUPP` without CONFIG_INET_DIAG_DESTROY. The guard drops the packets of what is left.
pub fn reset_plaintext(
    netns: &Netns,
    host: &HostNetns,
    agent: u64,
    is_mesh: impl Fn(IpAddr) -> bool,
) -> io::Result<usize> {
    let is_clear = |c: &Connection| c.cgroup != Some(agent) && is_mesh(c.remote.ip());
    host.run_in(netns.file(), || {
        let mut ended = 0;
        for connection in netlink::connections()?.iter().filter(|c| is_clear(c)) {
            netlink::destroy(connection)?;
            tracing::info!(local = %connection.local, remote = %connection.remote, "reset: plaintext from before enrolment");
            ended += 1;
        }
        Ok(ended)
    })?
}

/// Resets connections of `netns` that were accepted by others than the agent, for which `denial` has a reason by their
/// local and remote address, and tells `ended` of each that was. Accepted are those to a port on which somebody listens.
///
/// # Errors
/// The kernel's; `EOPNOTSUPP` without CONFIG_INET_DIAG_DESTROY.
pub fn reset_accepted<T>(
    netns: &Netns,
    host: &HostNetns,
    agent: u64,
    denial: impl Fn(SocketAddr, SocketAddr) -> Option<T>,
    ended: impl Fn(&T),
) -> io::Result<()> {
    host.run_in(netns.file(), || {
        let ports: HashSet<u16> = netlink::listeners()?.iter().map(|c| c.local.port()).collect();
        for connection in netlink::connections()? {
            let is_accepted = connection.cgroup != Some(agent) && ports.contains(&connection.local.port());
            if is_accepted && let Some(denial) = denial(connection.local, connection.remote) {
                netlink::destroy(&connection)?;
                ended(&denial);
            }
        }
        Ok(())
    })?
}

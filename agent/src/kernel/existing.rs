//! TCP connections that a pod has from before it was enrolled: they passed no connect hook, so they are in clear.

use std::{io, net::IpAddr};

use super::{
    netlink::{self, Connection},
    netns::{HostNetns, Netns},
};

/// Resets the connections of `netns` with mesh addresses that are not the agent's own, and returns how many there were.
/// `is_mesh` tells mesh addresses, the pod's own and the node's not among them; `agent` is the id of the agent's cgroup.
///
/// # Errors
/// The kernel's; `EOPNOTSUPP` without CONFIG_INET_DIAG_DESTROY. The guard drops the packets of what is left.
pub fn reset_clear(
    netns: &Netns,
    host: &HostNetns,
    agent: u64,
    is_mesh: impl Fn(IpAddr) -> bool,
) -> io::Result<usize> {
    let is_clear = |c: &Connection| c.cgroup != Some(agent) && is_mesh(c.remote.ip());
    host.within(netns.file(), || {
        let mut ended = 0;
        for connection in netlink::connections()?.iter().filter(|c| is_clear(c)) {
            netlink::destroy(connection)?;
            tracing::info!(local = %connection.local, remote = %connection.remote, "reset: in clear from before enrolment");
            ended += 1;
        }
        Ok(ended)
    })?
}

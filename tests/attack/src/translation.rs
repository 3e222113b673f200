//! Attacks by address translation: of a pod in its own namespace, and of a node that forwards.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use anyhow::Result;
use tacit_topology::{Pod, nf_tables::Hook};

use crate::{
    Family,
    catalogue::{Dial, Layout},
    judge::Outcome,
    nat::Nat,
    neighbours::{host_end, victim, wire_address},
    step_process::simple,
    wire::Sighting,
    world::{DISABLED_PORT, PORT, World, address},
};

/// A service in the mesh's ranges, whose one endpoint is outside: the agent dials it as plaintext.
pub(crate) const SERVICE: &str = "services:\n- name: outside\n  namespace: attack\n  \
                                  addresses: [10.77.200.10, 'fd77:c8::10']\n  ports: [{port: 9100}]\n  \
                                  endpoints: [{addresses: [198.51.100.7, '2001:db8::7'], ready: true}]\n";

/// Addresses of the service and of its endpoint.
fn service(family: Family) -> Result<[IpAddr; 2]> {
    Ok(match family {
        Family::V4 | Family::Mapped => ["10.77.200.10".parse()?, "198.51.100.7".parse()?],
        Family::V6 => ["fd77:c8::10".parse()?, "2001:db8::7".parse()?],
    })
}

/// The attacker connects to what the agent dials as plaintext. Rules of its own lead what is sent there, by itself or by the
/// agent, to a pod that takes plaintext.
pub(crate) fn of_agents_dial(world: &World, dial: Dial, family: Family, marker: &str) -> Result<Outcome> {
    let (attacker, stranger) = (&world.attacker, address(&world.stranger, family, PORT));
    let (target, dialled) = match dial {
        Dial::Outside => {
            let [service, endpoint] = service(family)?;
            (SocketAddr::new(service, PORT), endpoint)
        }
        Dial::Disabled => {
            let victim = address(&world.victim, family, DISABLED_PORT);
            (victim, victim.ip())
        }
    };
    let mut rules = vec![(target.ip(), stranger), (dialled, stranger)];
    rules.dedup();
    let nat = Nat::redirect(attacker.netns(), Hook::Output, &rules, false)?;
    let mut outcome = with(nat, || simple(world, attacker, "tcp", target, marker, &[]))?;
    // Without the rules, the same bytes may go where they are allowed: the agent still tries to connect.
    outcome.only = Some(Sighting::ToPod(host_end(&world.stranger)));
    Ok(outcome)
}

/// A pod of another node connects to an address of the victim's node. The node forwards that to the victim, under its own
/// address, as for a NodePort.
pub(crate) fn masqueraded(
    world: &World,
    step: &str,
    layout: Layout,
    family: Family,
    marker: &str,
) -> Result<Outcome> {
    let node = world.far_node()?;
    let (of_node, of_victim) = (wire_address(node, family), address(victim(world, layout), family, PORT));
    let nat = Nat::redirect(node.netns(), Hook::Prerouting, &[(of_node, of_victim)], true)?;
    let outsider: &Pod = &world.outsider;
    with(nat, || simple(world, outsider, step, SocketAddr::new(of_node, PORT), marker, &[]))
}

/// Runs an attack while the rules stand.
fn with(nat: io::Result<Nat>, attack: impl FnOnce() -> Result<Outcome>) -> Result<Outcome> {
    match nat {
        Ok(_rules) => attack(),
        Err(error) if is_absent(&error) => {
            Ok(Outcome { absent: Some(format!("nf_tables: {error}")), ..Outcome::default() })
        }
        Err(error) => Err(error.into()),
    }
}

/// Returns true for the errors of a kernel without nf_tables, or without its parts for address translation.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPROTONOSUPPORT | libc::EOPNOTSUPP | libc::ENOENT))
}

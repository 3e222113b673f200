//! Attacks under a flood of SYNs to the port of the tunnels. The kernel then answers with SYN cookies, which no socket sends.

use std::fs;

use anyhow::{Context as _, Result};
use tacit_topology::{Pod, scale, until};

use crate::{
    Family,
    judge::Outcome,
    step_process::{Step, command, simple},
    world::{PORT, World, address, ip},
};

const TUNNEL: u16 = 15008;
/// Connections that are opened at once. Sessions of earlier attacks may serve a few of them.
const CONNECTIONS: u64 = 60;
/// Cookies that the kernel must have accepted before the attack ends.
const ACCEPTED: u64 = 40;
/// Cookies that the kernel must have sent before the attack begins: its queue of half-open connections is full.
const SENT: u64 = 1000;
/// Sources of the flood: addresses of the mesh that nobody has. The route to them leads over the wire, and ends there.
const SOURCES: [&str; 2] = ["10.77.192.0/18", "fd77:f100::/32"];

/// Connections are opened during the flood, again and again until enough of them were opened by cookies: on a slow machine the
/// flood does not fill the kernel's queue all the time.
pub(crate) fn connections(world: &World, family: Family, marker: &str) -> Result<Outcome> {
    under_flood(world, family, || {
        let before = cookies(&world.victim)?;
        let target = address(&world.victim, family, PORT);
        // On an emulated machine the agents' own time limits reset some.
        let required = if scale()? == 1 { CONNECTIONS } else { CONNECTIONS / 2 };
        let counts = [CONNECTIONS, required].map(|count| count.to_string());
        let counts = counts.each_ref().map(String::as_str);
        until("connections opened by cookies", || {
            let outcome = simple(world, &world.attacker, "at-once", target, marker, &counts)?;
            let accepted = cookies(&world.victim)?.accepted - before.accepted;
            Ok((outcome.told != "sent" || accepted >= ACCEPTED).then_some(outcome))
        })
    })
}

/// The flooded pod repeats the kernel's cookies, with text of its own in their TCP options.
pub(crate) fn replayed_cookies(world: &World, family: Family, marker: &str) -> Result<Outcome> {
    let target = address(&world.victim, family, flooded_port(world));
    under_flood(world, family, || simple(world, &world.victim, "replayed-cookies", target, marker, &[]))
}

/// Connections to the victim's application come to the port of the tunnels, where there are tunnels.
fn flooded_port(world: &World) -> u16 {
    if world.has_tacit() { TUNNEL } else { PORT }
}

fn under_flood(world: &World, family: Family, attack: impl FnOnce() -> Result<Outcome>) -> Result<Outcome> {
    routes(world, "add")?;
    let outcome = flooded(world, family, attack);
    routes(world, "del")?;
    outcome
}

fn flooded(world: &World, family: Family, attack: impl FnOnce() -> Result<Outcome>) -> Result<Outcome> {
    let before = cookies(&world.victim)?;
    let target = address(&world.victim, family, flooded_port(world));
    let mut flood = Step::start(command(world, &world.stranger, "flood", target, "-", &[]))?;
    flood.wait_ready()?;
    until("SYN cookies of the victim", || {
        Ok((cookies(&world.victim)?.sent >= before.sent + SENT).then_some(()))
    })?;
    let outcome = attack()?;
    flood.go();
    flood.end()?;
    Ok(outcome)
}

fn routes(world: &World, what: &str) -> Result<()> {
    let (near, far) = (world.near_node()?, world.far_node()?);
    let gateways = [near.wire_ipv4().to_string(), near.wire_ipv6().to_string()];
    for (sources, gateway) in SOURCES.iter().zip(gateways) {
        ip(far.netns(), &format!("route {what} {sources} via {gateway}"))?;
        ip(near.netns(), &format!("route {what} blackhole {sources}"))?;
    }
    Ok(())
}

/// Counts of SYN cookies in a pod's namespace.
struct Cookies {
    sent: u64,
    accepted: u64,
}

fn cookies(pod: &Pod) -> Result<Cookies> {
    let text = pod.netns().enter(|| fs::read_to_string("/proc/thread-self/net/netstat"))??;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt: "));
    let (names, values) = (lines.next().context("names")?, lines.next().context("values")?);
    let count = |wanted: &str| -> Result<u64> {
        let mut pairs = names.split(' ').zip(values.split(' '));
        let (_, value) = pairs.find(|(name, _)| *name == wanted).with_context(|| format!("no {wanted}"))?;
        Ok(value.parse()?)
    };
    Ok(Cookies { sent: count("SyncookiesSent")?, accepted: count("SyncookiesRecv")? })
}

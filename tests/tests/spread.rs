//! Captured IPv6 connections are spread over ports of `::1` by destination, like IPv4 connections over addresses. So the
//! source ports of one target do not limit all of them. Other connections are not affected.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    sync::OnceLock,
};
use tacit_abi::{Address, tcp_port};
use tacit_tests::{Client, Mesh, Plan, Server, fresh_port, with_and_without_tacit};
use tacit_topology::{Agent, Pod};

/// Source ports of a client's namespace, few enough for a test to use them up.
const SOURCE_PORTS: RangeInclusive<u16> = 40_000..=40_039;
const FAR: [&str; 3] = ["far-1", "far-2", "far-3"];

with_and_without_tacit!(plan:
    flows_to_several_destinations_may_be_more_than_there_are_source_ports,
    flows_to_one_destination_may_not,
);

fn plan() -> Plan {
    let plan = Plan::new("spread").pod("a", "shop", "client").pod("a", "shop", "single");
    FAR.into_iter().fold(plan.pod("b", "shop", "alone"), |plan, name| plan.pod("b", "shop", name))
}

fn flows_to_several_destinations_may_be_more_than_there_are_source_ports(mesh: &Mesh) -> Result<()> {
    let servers = servers_of_different_targets(mesh)?;
    let wanted = servers.len() * (SOURCE_PORTS.len() - 10);
    ensure!(wanted > 2 * SOURCE_PORTS.len());
    let outcome = flows(mesh.pod("client")?, wanted, &servers)?;
    ensure!(outcome["echoed"] == wanted, "{outcome}");
    Ok(())
}

fn flows_to_one_destination_may_not(mesh: &Mesh) -> Result<()> {
    // Pods that no other test uses, because tunnels take source ports too.
    let servers = [serve(mesh.pod("alone")?, fresh_port())?];
    let outcome = flows(mesh.pod("single")?, SOURCE_PORTS.len() + 10, &servers)?;
    let echoed = outcome["echoed"].as_u64().context("a number")?;
    ensure!(echoed > 0 && echoed <= SOURCE_PORTS.len() as u64, "{outcome}");
    ensure!(outcome["failures"]["AddrNotAvailable"].as_u64().is_some_and(|failed| failed >= 10), "{outcome}");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn the_target_is_a_function_of_the_destination() -> Result<()> {
    let mesh = mesh()?;
    let client = mesh.pod("client")?;
    let servers = servers_of_different_targets(mesh)?;
    let steps = ["send:open", "line", "pause"];
    let open = |server: &Server| Client::start(client, server.address(), &steps);
    let mut clients = servers.iter().chain(&servers).map(open).collect::<Result<Vec<_>>>()?;
    for client in &clients {
        ensure!(client.events().first("line")?["text"] == "open");
    }
    let used = loopback_targets(client)?;
    for server in &servers {
        let target = target(server.address());
        ensure!(used.contains(&target), "{} is not at {target}: {used:?}", server.address());
    }
    clients.iter_mut().try_for_each(Client::proceed)
}

#[test]
#[ignore = "needs root"]
fn a_client_that_chose_its_own_end_is_carried_too() -> Result<()> {
    let mesh = mesh()?;
    let client = mesh.pod("client")?;
    let server = serve(mesh.pod(FAR[0])?, fresh_port())?;
    let to = server.address().to_string();
    for from in [IpAddr::V6(client.ipv6()), IpAddr::V6(Ipv6Addr::UNSPECIFIED)] {
        let steps = ["connect", &to, "--from", &from.to_string(), "send:bound", "shut", "read-end"];
        let events = Client::with_args(client, &steps)?.finish()?;
        ensure!(find(&events, "end").is_some_and(|end| end["text"] == "bound\n"), "from {from}: {events:?}");
        let names = find(&events, "connected").context("connected")?;
        ensure!(names["peer"] == to, "{names}");
        let own: SocketAddr = names["local"].as_str().unwrap_or_default().parse()?;
        ensure!(own.ip() == client.ipv6(), "{names}");
    }
    Ok(())
}

/// Applications keep the ports, because only captured connections are redirected.
#[test]
#[ignore = "needs root"]
fn applications_may_serve_the_ports() -> Result<()> {
    let mesh = mesh()?;
    let (client, far) = (mesh.pod("client")?, mesh.pod(FAR[1])?);
    for port in [tcp_port::CAPTURE_V6_FIRST, tcp_port::CAPTURE_V6_FIRST + tcp_port::CAPTURE_V6_COUNT - 1] {
        let own = Server::start(client, SocketAddr::from((Ipv6Addr::LOCALHOST, port)), &["echo"])?;
        Client::echo(client, own.address(), "to myself")?;
        let any = Server::start(far, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), &["echo"])?;
        for address in [IpAddr::V6(far.ipv6()), IpAddr::V4(far.ipv4())] {
            Client::echo(client, SocketAddr::new(address, port), "to another pod")?;
        }
        Client::echo(far, SocketAddr::new(far.ipv6().into(), port), "to my own address")?;
        Client::echo(far, SocketAddr::from((Ipv6Addr::LOCALHOST, port)), "to my loopback")?;
        ensure!(own.accepted()? == 1, "expected one connection");
        drop(any);
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_dial_that_was_not_captured_gets_nowhere() -> Result<()> {
    let mesh = mesh()?;
    let client = mesh.pod("client")?;
    let port = tcp_port::CAPTURE_V6_FIRST + 5;
    let to = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    let events = Client::run(client, to, &["read-end"])?;
    ensure!(find(&events, "failed").is_some_and(|f| f["error"] == "ConnectionRefused"), "{events:?}");
    // With the source address of captured connections, a listener of the pod makes no difference.
    let own = Server::start(client, to, &["echo"])?;
    let (to, from) = (to.to_string(), client.ipv6().to_string());
    let events = Client::with_args(client, &["connect", &to, "--from", &from, "read-end"])?.finish()?;
    ensure!(find(&events, "failed").is_some_and(|f| f["error"] == "ConnectionRefused"), "{events:?}");
    ensure!(own.accepted()? == 0);
    Ok(())
}

/// A pod can add another pod's address to its loopback. Connections from this address never reach an agent.
#[test]
#[ignore = "needs root"]
fn a_foreign_source_address_leads_to_no_agent() -> Result<()> {
    let mesh = mesh()?;
    let neighbour = mesh.pod(FAR[2])?.ipv6().to_string();
    let pod = mesh.pod(FAR[0])?;
    let ip = |act: &str| -> Result<()> {
        let args = ["-6", "address", act, &format!("{neighbour}/128"), "dev", "lo", "nodad"];
        let done = pod.command("ip").args(args).status()?;
        ensure!(done.success(), "ip {act}: {done}");
        Ok(())
    };
    ip("add")?;
    let to = SocketAddr::from((Ipv6Addr::LOCALHOST, tcp_port::CAPTURE_V6_FIRST)).to_string();
    let events = Client::with_args(pod, &["connect", &to, "--from", &neighbour, "read-end"])?.finish();
    ip("del")?;
    let events = events?;
    ensure!(find(&events, "failed").is_some_and(|f| f["error"] == "ConnectionRefused"), "{events:?}");
    Ok(())
}

/// A process of the pod must not get captured connections by listening on their ports after the agent has exited.
#[test]
#[ignore = "needs root"]
fn without_an_agent_nothing_captured_comes_to_a_listener_of_the_pod() -> Result<()> {
    let mut mesh = Plan::new("spreadx").pod("a", "shop", "client").pod("b", "shop", "far").with_agents()?;
    let server = serve(mesh.pod("far")?, fresh_port())?;
    Client::echo(mesh.pod("client")?, server.address(), "with an agent")?;
    let ports = tcp_port::CAPTURE_V6_FIRST..tcp_port::CAPTURE_V6_FIRST + tcp_port::CAPTURE_V6_COUNT;
    let listen =
        |port| Server::start(mesh.pod("client")?, SocketAddr::from((Ipv6Addr::LOCALHOST, port)), &["echo"]);
    let own = ports.map(listen).collect::<Result<Vec<_>>>()?;
    mesh.agent_mut("a").map(Agent::kill)??;
    let events = Client::run(mesh.pod("client")?, server.address(), &["read-end"])?;
    ensure!(find(&events, "failed").is_some_and(|f| f["error"] == "ConnectionRefused"), "{events:?}");
    for server in own {
        ensure!(server.accepted()? == 0, "captured connections reached {}", server.address());
    }
    Ok(())
}

fn mesh() -> Result<&'static Mesh> {
    static MESH: OnceLock<Result<Mesh, String>> = OnceLock::new();
    Mesh::shared(&MESH, || plan().with_agents())
}

fn serve(pod: &Pod, port: u16) -> Result<Server> {
    Server::start(pod, SocketAddr::new(pod.ipv6().into(), port), &["echo"])
}

/// Starts a server in each far pod, on ports whose targets differ.
fn servers_of_different_targets(mesh: &Mesh) -> Result<Vec<Server>> {
    let mut targets = BTreeSet::new();
    let mut servers = Vec::new();
    for name in FAR {
        let pod = mesh.pod(name)?;
        let is_new = |port: &u16| targets.insert(target(SocketAddr::new(pod.ipv6().into(), *port)));
        let port = std::iter::repeat_with(fresh_port).take(1000).find(is_new).context("another target")?;
        servers.push(serve(pod, port)?);
    }
    Ok(servers)
}

fn target(destination: SocketAddr) -> u16 {
    let IpAddr::V6(address) = destination.ip() else { return tcp_port::CAPTURE };
    Address::from_octets(address.octets()).capture_port_v6(destination.port())
}

/// Returns the ports of `::1` that connections of the pod are redirected to.
fn loopback_targets(pod: &Pod) -> Result<BTreeSet<u16>> {
    let table = pod.netns().enter(|| fs::read_to_string("/proc/thread-self/net/tcp6"))??;
    let remote = |line: &str| -> Option<u16> {
        let port = line.split_whitespace().nth(2)?.strip_prefix("00000000000000000000000001000000:")?;
        u16::from_str_radix(port, 16).ok()
    };
    Ok(table.lines().filter_map(remote).collect())
}

/// Opens `count` concurrent flows, distributed over the servers, from a client with few source ports.
fn flows(client: &Pod, count: usize, servers: &[Server]) -> Result<Value> {
    let range = format!("{} {}", SOURCE_PORTS.start(), SOURCE_PORTS.end());
    client.netns().enter(|| fs::write("/proc/sys/net/ipv4/ip_local_port_range", range))??;
    let addresses: Vec<String> = servers.iter().map(|server| server.address().to_string()).collect();
    let count = count.to_string();
    let args: Vec<&str> = ["flows", &count].into_iter().chain(addresses.iter().map(String::as_str)).collect();
    let events = Client::with_args(client, &args)?.finish()?;
    find(&events, "flows").cloned().with_context(|| format!("{events:?}"))
}

fn find<'a>(events: &'a [Value], event: &str) -> Option<&'a Value> {
    events.iter().find(|found| found["event"] == event)
}

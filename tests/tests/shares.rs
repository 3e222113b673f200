//! Shares: what one pod or one address uses up is its own loss.
//!
//! Every test fills the share of an attacker, proves by the agent's figures that the share is full, and requires that all
//! connections of the others succeed meanwhile. The attack that only succeeds without the share is the one that the figures
//! count as refused.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    io::Write,
    net::{SocketAddr, TcpStream},
    sync::OnceLock,
};
use tacit_tests::{Client, Mesh, Plan, Server, fresh_port, observe, scaled};
use tacit_topology::{Agent, HANG, MeshFiles, Netns, Pod, TUNNEL_PORT, WorkloadEntry, http_get, until};

/// Limit of open files of the agents.
const DESCRIPTORS: u64 = 2048;
/// Connections that the attacker tries to hold; more than the share of one pod on either node.
const HELD: u64 = 1000;
/// Connections of each victim during an attack.
const VICTIM: u64 = 20;
/// First bytes of a handshake record whose announced length is never sent.
const HELLO: [u8; 5] = [0x16, 3, 1, 2, 0];
/// Bytes that a flow that nobody reads may hold, as a multiple of those without Tacit.
const UNREAD_FACTOR: u64 = 2;
/// Flows of which one holds no more. The kernel grows receive buffers on the wire until the first stall, by more if the machine is
/// busy: one flow of some 30 on a busy machine held 2.1 times as much.
const UNREAD_TRIES: usize = 3;

fn mesh() -> Result<&'static Mesh> {
    static MESH: OnceLock<Result<Mesh, String>> = OnceLock::new();
    let plan = Plan::new("shares")
        .descriptors(DESCRIPTORS)
        .pod("a", "shop", "attacker")
        .pod("a", "shop", "client")
        .pod("a", "shop", "near")
        .pod("b", "shop", "web")
        .pod("b", "shop", "db")
        .pod("b", "shop", "far-client")
        .outside("a", "shop", "stranger")
        .outside("b", "shop", "open");
    // A refusal of the other node's agent passes with time, so a connect() that waits for the answer would go on.
    let early = |entry: WorkloadEntry| match &*entry.name {
        "attacker" => WorkloadEntry { connect: Some("early"), ..entry },
        _ => entry,
    };
    Mesh::shared(&MESH, || {
        plan.with_directories(|_, mesh| Ok(mesh.directory().into_iter().map(early).collect()))
    })
}

/// C4. One pod holds what it can get of the descriptors of both nodes' agents.
#[test]
#[ignore = "needs root"]
fn a_pod_that_holds_a_thousand_connections_takes_none_from_others() -> Result<()> {
    let mesh = mesh()?;
    let servers = [serve(mesh, "web", "echo")?, serve(mesh, "db", "echo")?, serve(mesh, "near", "echo")?];
    let victims = || -> Result<u64> {
        let mut echoed = 0;
        for (client, server) in [("client", 0), ("client", 1), ("client", 2), ("far-client", 2), ("near", 0)]
        {
            echoed += flows(mesh.pod(client)?, servers[server].address(), VICTIM)?;
        }
        Ok(echoed)
    };
    ensure!(victims()? == 5 * VICTIM, "victims fail without any attack");

    // To the other node: the attacker's address has its share there. To its own node too: the pod has its share here.
    let (a, b) = (mesh.agent("a")?, mesh.agent("b")?);
    let before = [observe::refused(b, "source_connections")?, observe::refused(a, "pod_connections")?];
    let mut one = hold(mesh, &servers[..1])?;
    let echoed_by_one = one.events().first("held")?["echoed"].as_u64().context("a number")?;
    ensure!(echoed_by_one < HELD, "nothing bounds the connections of one address: {echoed_by_one}");
    let at_web = share(b, "source_connections_at_pod")?;
    ensure!(is_full(&at_web) && holder(&at_web).contains("shop/web"), "{at_web}");
    ensure!(observe::refused(b, "source_connections")? > before[0], "not counted: {at_web}");
    ensure!(victims()? == 5 * VICTIM, "a full share of one address is the loss of others: {at_web}");

    let mut two = hold(mesh, &servers[2..])?;
    two.events().first("held")?;
    let of_attacker = share(a, "connections")?;
    ensure!(is_full(&of_attacker) && holder(&of_attacker) == "shop/attacker", "{of_attacker}");
    ensure!(observe::refused(a, "pod_connections")? > before[1], "not counted: {of_attacker}");
    ensure!(victims()? == 5 * VICTIM, "a full share of one pod is the loss of others: {of_attacker}");
    ensure!(flows(mesh.pod("attacker")?, servers[2].address(), 1)? == 0, "the attacker's share is not full");

    for client in [&mut one, &mut two] {
        client.proceed()?;
    }
    one.finish()?;
    two.finish()?;
    until("the attacker's connections have ended", || {
        Ok((flows(mesh.pod("attacker")?, servers[2].address(), VICTIM)? == VICTIM).then_some(()))
    })
}

/// C2. One address begins handshakes and never goes on.
#[test]
#[ignore = "needs root"]
fn an_address_that_holds_handshakes_open_keeps_no_other_out() -> Result<()> {
    let mesh = mesh()?;
    let (server, other) = (serve(mesh, "web", "echo")?, serve(mesh, "db", "echo")?);
    let agent = mesh.agent("b")?;
    let refused = observe::refused(agent, "handshake_limit")?;
    let web = SocketAddr::new(mesh.pod("web")?.ipv4().into(), TUNNEL_PORT);
    let attack = || -> Result<Vec<TcpStream>> {
        // Fewer than the share of connections, which would end the attack before.
        (0..300).map(|_| begin(mesh.pod("stranger")?.netns(), web)).collect()
    };
    let held = attack()?;
    let at_once = until("the share of handshakes is full", || {
        let handshakes = share(agent, "handshakes")?;
        Ok(is_full(&handshakes).then_some(handshakes))
    })?;
    ensure!(holder(&at_once) == mesh.pod("stranger")?.ipv4().to_string(), "{at_once}");
    // At most 64 idle sessions are kept and reused: so many at once need new ones.
    for address in [server.address(), other.address()] {
        let echoed = flows(mesh.pod("client")?, address, scaled(100)?)?;
        ensure!(echoed == scaled(100)?, "{echoed} of 100 flows beside the attack: {at_once}");
    }
    ensure!(is_full(&share(agent, "handshakes")?), "the attack was over before");
    until("the newest handshakes of the address are refused", || {
        Ok((observe::refused(agent, "handshake_limit")? > refused).then_some(()))
    })?;
    drop(held);
    Ok(())
}

/// C8. Silent connections to the metrics port, of the scraper's own address, before and during scrapes.
#[test]
#[ignore = "needs root"]
fn silent_connections_to_the_metrics_keep_no_scrape_waiting() -> Result<()> {
    let mesh = mesh()?;
    let agent = mesh.agent("a")?;
    let netns = mesh.topology().node("a")?.netns();
    let metrics: SocketAddr = MeshFiles::METRICS.parse()?;
    let connect = |_| netns.enter(|| TcpStream::connect_timeout(&metrics, HANG))?.context("connect");
    let mut silent = (0..200).map(connect).collect::<Result<Vec<_>>>()?;
    for _ in 0..20 {
        silent.extend((0..10).map(connect).collect::<Result<Vec<_>>>()?);
        let (status, _) = http_get(netns, MeshFiles::METRICS, "/metrics")?;
        ensure!(status == 200, "{status}");
    }
    let connections = share(agent, "admin_connections")?;
    let (used, refused) = (number(&connections, "used"), number(&connections, "refused"));
    ensure!(used <= number(&connections, "limit"), "{connections}");
    ensure!(refused as usize > silent.len() / 2, "the silent ones did not fill the share: {connections}");
    Ok(())
}

/// C5. Nobody reads at the far end: the bytes that send() accepts, with Tacit and without, in one run.
#[test]
#[ignore = "needs root"]
fn a_flow_that_nobody_reads_holds_at_most_twice_what_it_holds_without_tacit() -> Result<()> {
    let mesh = mesh()?;
    let direct = [
        unread(mesh, "stranger", "open", Sender::Client)?,
        unread(mesh, "stranger", "open", Sender::Server)?,
    ];
    for (client, server) in [("client", "web"), ("client", "near"), ("web", "near")] {
        for (sender, direct) in [Sender::Client, Sender::Server].into_iter().zip(direct) {
            let mut bytes = u64::MAX;
            for _ in 0..UNREAD_TRIES {
                if bytes > direct * UNREAD_FACTOR {
                    bytes = bytes.min(unread(mesh, client, server, sender)?);
                }
            }
            let what = format!("{client} to {server}, {sender:?} sends: {} KiB", bytes >> 10);
            eprintln!("{what}, without Tacit {} KiB", direct >> 10);
            ensure!(bytes <= direct * UNREAD_FACTOR, "{what}, without Tacit {} KiB", direct >> 10);
        }
    }
    Ok(())
}

/// The side that sends; the other does not read.
#[derive(Debug, Clone, Copy)]
enum Sender {
    Client,
    Server,
}

/// The bytes that send() accepts when nobody reads at the other end.
fn unread(mesh: &Mesh, client: &str, server: &str, sender: Sender) -> Result<u64> {
    let (of_client, of_server) = match sender {
        Sender::Client => ("fill", "pause"),
        Sender::Server => ("pause", "fill"),
    };
    let server = serve(mesh, server, of_server)?;
    let client = Client::start(mesh.pod(client)?, server.address(), &[of_client])?;
    let events = match sender {
        Sender::Client => client.events(),
        Sender::Server => server.events(),
    };
    events.first("filled")?["bytes"].as_u64().context("a number")
}

fn serve(mesh: &Mesh, pod: &str, step: &str) -> Result<Server> {
    let pod = mesh.pod(pod)?;
    Server::start(pod, SocketAddr::new(pod.ipv4().into(), fresh_port()), &[step])
}

/// Opens `count` connections at the same time and returns how many are echoed.
fn flows(pod: &Pod, to: SocketAddr, count: u64) -> Result<u64> {
    let events = Client::with_args(pod, &["flows", &count.to_string(), &to.to_string()])?.finish()?;
    let flows = events.iter().find(|event| event["event"] == "flows").context("no flows")?;
    flows["echoed"].as_u64().context("a number")
}

/// The attacker opens connections to these servers and keeps them.
fn hold(mesh: &Mesh, servers: &[Server]) -> Result<Client> {
    let count = HELD.to_string();
    let addresses: Vec<String> = servers.iter().map(|server| server.address().to_string()).collect();
    let mut args = vec!["hold", count.as_str()];
    args.extend(addresses.iter().map(String::as_str));
    Client::with_args(mesh.pod("attacker")?, &args)
}

/// Opens a connection to a tunnel port and starts a handshake.
fn begin(from: &Netns, to: SocketAddr) -> Result<TcpStream> {
    let mut tcp = from.enter(|| TcpStream::connect_timeout(&to, HANG))??;
    tcp.write_all(&HELLO)?;
    Ok(tcp)
}

/// The row of `tacit status` for one shared resource.
fn share(agent: &Agent, resource: &str) -> Result<Value> {
    let status = observe::status(agent)?;
    let shares = status["shares"].as_array().context("shares in the status")?;
    let found = shares.iter().find(|share| share["resource"] == resource);
    found.cloned().with_context(|| format!("no share {resource}"))
}

fn is_full(share: &Value) -> bool {
    share["full"] == true
}

fn holder(share: &Value) -> &str {
    share["fullest"].as_str().unwrap_or_default()
}

fn number(share: &Value, field: &str) -> u64 {
    share[field].as_u64().unwrap_or_default()
}

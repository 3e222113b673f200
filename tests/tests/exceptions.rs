//! Exceptions: each plaintext packet of and to a STRICT pod that passes is counted by the exception that lets it pass, and a tunnel
//! counts in none.

use anyhow::{Context, Result, ensure};
use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};
use tacit_tests::{Client, Mesh, Plan, STRICT_MESH, Server, agent_program, fresh_port, observe};
use tacit_topology::run;

/// Port of `far` to which plaintext is allowed.
const ALLOWED: u16 = 53;
/// Time for the other end to answer a step.
const PATIENCE: Duration = Duration::from_millis(200);

/// Counters by exception and hook.
type Counters = BTreeMap<(String, String), u64>;

fn counters(mesh: &Mesh) -> Result<Counters> {
    let status = observe::status(mesh.agent("a")?)?;
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned).context("a text");
    let all = status["exceptions"].as_array().context("exceptions")?;
    all.iter()
        .map(|one| {
            Ok(((text(&one["name"])?, text(&one["hook"])?), one["value"].as_u64().context("a count")?))
        })
        .collect()
}

/// Returns what `step` added to each counter. Neighbour discovery happens at any time.
fn added(mesh: &Mesh, step: impl FnOnce() -> Result<()>) -> Result<Vec<(String, u64)>> {
    let before = counters(mesh)?;
    step()?;
    let after = counters(mesh)?.into_iter().filter(|((name, _), _)| name != "neighbour_discovery");
    let difference = |((name, hook), value): ((String, String), u64)| {
        let from = before.get(&(name.clone(), hook.clone())).copied().unwrap_or(0);
        (format!("{name} {hook}"), value - from)
    };
    Ok(after.map(difference).filter(|(_, added)| *added > 0).collect())
}

/// Sends a datagram from the client's namespace and cgroup.
fn send(mesh: &Mesh, to: SocketAddr) -> Result<()> {
    let mut step = mesh.pod("client")?.command(agent_program()?.with_file_name("tacit-attack"));
    step.args(["step", "udp", &to.to_string(), "hello"]);
    run(step.env("TACIT_ATTACK_PATIENCE_MS", PATIENCE.as_millis().to_string()))?;
    Ok(())
}

fn once(names: &[&str]) -> Vec<(String, u64)> {
    names.iter().map(|name| ((*name).to_owned(), 1)).collect()
}

#[test]
#[ignore = "needs root"]
fn each_exception_counts_what_passes_by_it_and_a_tunnel_counts_in_none() -> Result<()> {
    let mesh = Plan::new("except")
        .pod("a", "shop", "client")
        .pod("b", "shop", "far")
        .policy(STRICT_MESH)
        .config(&format!("allowClear: [\"10.77.2.2:{ALLOWED}/udp\"]\n"))
        .with_agents()?;
    let (client, far) = (mesh.pod("client")?, mesh.pod("far")?);
    ensure!(far.ipv4() == Ipv4Addr::new(10, 77, 2, 2), "the address of allowClear: {}", far.ipv4());
    let server = Server::start(far, SocketAddr::new(far.ipv4().into(), fresh_port()), &["echo"])?;
    Client::echo(client, server.address(), "first")?;

    let tunnel = added(&mesh, || (0..20).try_for_each(|_| Client::echo(client, server.address(), "hello")))?;
    ensure!(tunnel.is_empty(), "a tunnel: {tunnel:?}");
    let refused = added(&mesh, || send(&mesh, SocketAddr::new(far.ipv4().into(), ALLOWED + 1)))?;
    ensure!(refused.is_empty(), "a datagram that is dropped: {refused:?}");
    let outside = SocketAddr::new(mesh.topology().node("b")?.wire_ipv4().into(), 29_999);
    let outside = added(&mesh, || send(&mesh, outside))?;
    ensure!(outside == once(&["outside egress", "outside link"]), "{outside:?}");
    let allowed = added(&mesh, || send(&mesh, SocketAddr::new(far.ipv4().into(), ALLOWED)))?;
    ensure!(allowed == once(&["allow_clear egress", "allow_clear link"]), "{allowed:?}");
    let local = Server::start(client, SocketAddr::from(([127, 0, 0, 1], fresh_port())), &["echo"])?;
    let inside = added(&mesh, || Client::echo(client, local.address(), "hello"))?;
    ensure!(inside == once(&["loopback connect"]), "{inside:?}");

    let probed = Server::start(client, SocketAddr::new(client.ipv4().into(), fresh_port()), &["echo"])?;
    let probe = added(&mesh, || probe(&mesh, probed.address()))?;
    let kinds: Vec<&str> = probe.iter().map(|(name, _)| name.as_str()).collect();
    let flow = ["node_flow egress", "node_flow ingress", "node_flow link"];
    ensure!(flow.iter().all(|kind| kinds.contains(kind)), "{probe:?}");
    ensure!(
        kinds.iter().all(|kind| flow.contains(kind) || kind.starts_with("tcp_without_data")),
        "{probe:?}"
    );

    let shown = mesh.agent("a")?.status_table()?;
    ensure!(shown.lines().any(|line| line.contains("loopback") && line.contains("connect")), "{shown}");
    let labels = [("exception", "outside"), ("hook", "egress")];
    ensure!(observe::metric(mesh.agent("a")?, "tacit_kernel_exceptions_total", &labels)? >= 1);
    Ok(())
}

/// Asks the pod's server from its own node, as a kubelet does, and waits for the end of the connection.
fn probe(mesh: &Mesh, at: SocketAddr) -> Result<()> {
    mesh.topology().node("a")?.netns().enter(|| -> Result<()> {
        let mut stream = TcpStream::connect(at)?;
        stream.write_all(b"hello\n")?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer == "hello\n", "{answer}");
        Ok(())
    })?
}

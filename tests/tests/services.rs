//! Services: a pod connects to a virtual address and gets an endpoint that answers.
//!
//! The topology has no kube-proxy. Without Tacit the virtual address is unreachable, which is the control.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fmt::Write as _,
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    sync::OnceLock,
    time::Duration,
};
use tacit_abi::limits::CLUSTER_NODES;
use tacit_tests::{Client, Mesh, Plan, STRICT_MESH, Server, agent_program, observe};
use tacit_topology::{Pod, run, until};

const VIP4: &str = "10.96.0.10";
const VIP6: &str = "fd96::10";
/// Number of connections. All miss one of two endpoints with a probability of one in a million.
const MANY: usize = 20;

/// A service in `directory.yaml`: port 80, and its endpoints with their pod and readiness.
struct Service<'a> {
    port: u16,
    endpoints: &'a [(&'a str, bool)],
    more: &'a str,
}

/// Builds a mesh. Tests do not share one, because each writes its own services.
fn mesh(tag: &str, policy: &str, service: &Service<'_>) -> Result<Mesh> {
    let mesh = plan(tag).policy(policy).with_agents()?;
    update_directory(&mesh, service)?;
    Ok(mesh)
}

fn plan(tag: &str) -> Plan {
    Plan::new(tag)
        .pod("a", "shop", "client")
        .pod("a", "shop", "near")
        .pod("b", "shop", "far")
        .pod("b", "shop", "far2")
        .config("serviceRanges: [10.96.0.0/16, \"fd96::/64\"]\n")
}

/// Writes the directory with the service for both agents and waits until they have loaded it.
fn update_directory(mesh: &Mesh, service: &Service<'_>) -> Result<()> {
    load_directory(mesh, &directory(mesh, service)?)
}

fn load_directory(mesh: &Mesh, text: &str) -> Result<()> {
    for node in ["a", "b"] {
        let agent = mesh.agent(node)?;
        let loads = |status: &Value| {
            status["sources"].as_array()?.iter().find(|s| s["kind"] == "directory")?["loads"].as_u64()
        };
        let before = loads(&observe::status(agent)?).context("loads")?;
        agent.files().set_directory_text(text)?;
        observe::wait_status(agent, "the services are loaded", |status| {
            (loads(status)? > before).then_some(())
        })?;
    }
    Ok(())
}

fn directory(mesh: &Mesh, service: &Service<'_>) -> Result<String> {
    let mut text = String::from("workloads:\n");
    for pod in ["client", "near", "far", "far2"] {
        let pod = mesh.pod(pod)?;
        writeln!(
            text,
            "- {{name: {0}, namespace: shop, serviceAccount: {0}, addresses: [{1}, '{2}'], node: {3}}}",
            pod.name(),
            pod.ipv4(),
            pod.ipv6(),
            pod.node(),
        )?;
    }
    let Service { port, endpoints, more } = service;
    writeln!(
        text,
        "services:\n- name: web\n  namespace: shop\n  addresses: [{VIP4}, '{VIP6}']\n  ports: [{{port: 80, targetPort: {port}}}]"
    )?;
    writeln!(text, "{more}  endpoints:")?;
    for (pod, ready) in *endpoints {
        let pod = mesh.pod(pod)?;
        writeln!(text, "  - {{addresses: [{}, '{}'], ready: {ready}}}", pod.ipv4(), pod.ipv6())?;
    }
    Ok(text)
}

fn vip(text: &str) -> Result<SocketAddr> {
    Ok(SocketAddr::new(text.parse::<IpAddr>()?, 80))
}

/// Starts an echo server on both addresses of a pod.
fn serve(pod: &Pod, port: u16) -> Result<[Server; 2]> {
    let start = |ip: IpAddr| Server::start(pod, SocketAddr::new(ip, port), &["echo"]);
    Ok([start(pod.ipv4().into())?, start(pod.ipv6().into())?])
}

/// Connects to `address` and returns the peer that the client saw. Fails without an echo.
fn connect(pod: &Pod, address: SocketAddr) -> Result<String> {
    let events = Client::run(pod, address, &["send:hello", "shut", "read-end"])?;
    let connected = events.iter().find(|event| event["event"] == "connected");
    let end = events.iter().find(|event| event["event"] == "end");
    if !end.is_some_and(|end| end["text"] == "hello\n" && end["end"] == "eof") {
        bail!("no echo from {address}: {events:?}");
    }
    let peer = connected.and_then(|connected| connected["peer"].as_str()).context("no peer")?;
    Ok(peer.to_owned())
}

/// Connects to the virtual address from the client pod. An error has the log lines of rejected connections.
fn connect_to_vip(mesh: &Mesh) -> Result<String> {
    connect(mesh.pod("client")?, vip(VIP4)?).with_context(|| {
        let log = mesh.agent("a").and_then(|agent| agent.log()).unwrap_or_default();
        log.lines().filter(|line| line.contains("refused")).collect::<Vec<_>>().join("\n")
    })
}

/// Returns the number of accepted connections of `servers`, both families together.
fn accepted(servers: &[Server]) -> Result<usize> {
    servers.iter().map(Server::accepted).sum()
}

#[test]
#[ignore = "needs root"]
fn a_virtual_address_leads_nowhere_without_tacit() -> Result<()> {
    let mesh = plan("svcnone").without_agents()?;
    let _far = serve(mesh.pod("far")?, 8080)?;
    ensure!(connect(mesh.pod("client")?, vip(VIP4)?).is_err(), "another server answers on {VIP4}");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn endpoints_of_both_nodes_are_reached_and_the_client_sees_what_it_asked_for() -> Result<()> {
    static MESH: OnceLock<Result<Mesh, String>> = OnceLock::new();
    let service =
        Service { port: 8080, endpoints: &[("near", true), ("far", true), ("far2", false)], more: "" };
    let mesh = Mesh::shared(&MESH, || mesh("svc", STRICT_MESH, &service))?;
    let (near, far, idle) =
        (serve(mesh.pod("near")?, 8080)?, serve(mesh.pod("far")?, 8080)?, serve(mesh.pod("far2")?, 8080)?);
    for text in [VIP4, VIP6] {
        let address = vip(text)?;
        // The connections stay open, so that the load of the near endpoint makes the far one the better choice.
        let mut open = Vec::new();
        for _ in 0..MANY / 2 {
            let client =
                Client::start(mesh.pod("client")?, address, &["send:hello", "pause", "shut", "read-end"])?;
            client.events().first("connected")?;
            open.push(client);
        }
        for mut client in open {
            client.proceed()?;
            let events = client.finish()?;
            let connected = events.iter().find(|event| event["event"] == "connected").context("connected")?;
            ensure!(connected["peer"] == address.to_string(), "getpeername: {connected}");
            ensure!(
                events.iter().any(|event| event["event"] == "end" && event["end"] == "eof"),
                "{events:?}"
            );
        }
    }
    let counts = [accepted(&near)?, accepted(&far)?, accepted(&idle)?];
    ensure!(counts[0] > 0 && counts[1] > 0, "near, far, not ready: {counts:?}");
    ensure!(counts[0] + counts[1] == MANY && counts[2] == 0, "near, far, not ready: {counts:?}");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn an_endpoint_that_does_not_answer_is_replaced_unnoticed() -> Result<()> {
    let service =
        Service { port: 8080, endpoints: &[("near", true), ("far", true), ("far2", true)], more: "" };
    let mesh = mesh("svcdead", STRICT_MESH, &service)?;
    // Pods near and far have no listener.
    let alive = serve(mesh.pod("far2")?, 8080)?;
    for _ in 0..MANY {
        connect_to_vip(&mesh)?;
    }
    ensure!(accepted(&alive)? == MANY, "expected each connection once at the live endpoint");
    // Control: without an endpoint that answers, the client is reset.
    drop(alive);
    ensure!(connect(mesh.pod("client")?, vip(VIP4)?).is_err(), "an echo without a server");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_client_stays_with_its_endpoint_when_the_service_says_so() -> Result<()> {
    let endpoints: &[(&str, bool)] = &[("far", true), ("far2", true)];
    let sticky = Service { port: 8080, endpoints, more: "  sessionAffinity: ClientIP\n" };
    let mesh = mesh("svcstay", STRICT_MESH, &sticky)?;
    let servers = [serve(mesh.pod("far")?, 8080)?, serve(mesh.pod("far2")?, 8080)?];
    let counts = || -> Result<BTreeSet<usize>> { servers.iter().map(|server| accepted(server)).collect() };
    for _ in 0..MANY {
        connect_to_vip(&mesh)?;
    }
    ensure!(counts()? == BTreeSet::from([0, MANY]), "one endpoint has all: {:?}", counts()?);
    // Control: without affinity both endpoints get connections.
    update_directory(&mesh, &Service { more: "", ..sticky })?;
    for _ in 0..MANY {
        connect_to_vip(&mesh)?;
    }
    ensure!(!counts()?.contains(&0), "both have some: {:?}", counts()?);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn what_no_endpoint_can_serve_is_refused_with_its_reason() -> Result<()> {
    let local = "  internalTrafficPolicy: Local\n";
    let service = Service { port: 8080, endpoints: &[("far", true)], more: local };
    let mesh = mesh("svcno", "", &service)?;
    let _far = serve(mesh.pod("far")?, 8080)?;
    let agent = mesh.agent("a")?;
    for (port, reason) in [(80, "no_endpoint"), (81, "service_port_unknown")] {
        let before = observe::refused(agent, reason)?;
        let address = SocketAddr::new(VIP4.parse()?, port);
        let events = Client::run(mesh.pod("client")?, address, &["read-end"])?;
        let refused = |event: &Value| event["step"] == "connect" && event["error"] == "ConnectionRefused";
        ensure!(events.iter().any(refused), "{address}, as kube-proxy would: {events:?}");
        observe::wait_refused(agent, reason, before, VIP4)?;
    }
    update_directory(&mesh, &Service { more: "", ..service })?;
    until("the far endpoint used with policy Cluster", || Ok(connect(mesh.pod("client")?, vip(VIP4)?).ok()))?;
    Ok(())
}

/// Time in which a packet arrives if nothing drops it.
const PATIENCE: Duration = Duration::from_millis(700);

/// Runs an attack step in the client's cgroup and namespace; true if the system took the marker.
fn step(mesh: &Mesh, protocol: &str, to: SocketAddr) -> Result<bool> {
    let mut step = mesh.pod("client")?.command(agent_program()?.with_file_name("tacit-attack"));
    step.args(["step", protocol, &to.to_string(), "hello"]);
    let told = run(step.env("TACIT_ATTACK_PATIENCE_MS", PATIENCE.as_millis().to_string()))?;
    Ok(told.trim() == "sent")
}

/// Returns true if a datagram of the client arrives at a socket of node `b`, which stands in for kube-proxy.
fn is_received(mesh: &Mesh, at: SocketAddr) -> Result<bool> {
    let socket = mesh.topology().node("b")?.netns().enter(|| UdpSocket::bind(at))??;
    socket.set_read_timeout(Some(PATIENCE))?;
    step(mesh, "udp", at)?;
    match socket.recv(&mut [0; 16]) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The mesh's nodes, and further ones with `more` addresses.
fn nodes(mesh: &Mesh, more: u32) -> Result<String> {
    let mut text = String::from("nodes:\n");
    for name in ["a", "b"] {
        let node = mesh.topology().node(name)?;
        writeln!(text, "- {{name: {name}, addresses: [{}, '{}']}}", node.wire_ipv4(), node.wire_ipv6())?;
    }
    Ok(text + &more_nodes(more))
}

/// Nodes that do not exist, for the list of nodes.
fn more_nodes(count: u32) -> String {
    let node =
        |number| format!("- {{name: n{number}, addresses: [{}]}}\n", Ipv4Addr::from(0xc612_0000 | number));
    (0..count).map(node).collect()
}

/// Returns true if a connection of the client opens at node `b`.
fn is_accepted(mesh: &Mesh, at: SocketAddr) -> Result<bool> {
    let listener = mesh.topology().node("b")?.netns().enter(|| TcpListener::bind(at))??;
    listener.set_nonblocking(true)?;
    step(mesh, "tcp", at)?;
    Ok(listener.accept().is_ok())
}

#[test]
#[ignore = "needs root"]
fn a_node_port_leads_to_the_service_and_nothing_leaves_in_clear() -> Result<()> {
    let service = Service { port: 8080, endpoints: &[("far", true)], more: "" };
    let mesh = mesh("svcnode", STRICT_MESH, &service)?;
    let (a, b) = (mesh.topology().node("a")?, mesh.topology().node("b")?);
    let addresses = |node: &tacit_topology::Node| [IpAddr::from(node.wire_ipv4()), node.wire_ipv6().into()];
    for address in addresses(b) {
        let at = |port| SocketAddr::new(address, port);
        ensure!(is_received(&mesh, at(30_081))?, "control: nobody knows that {address} is a node's");
        ensure!(is_accepted(&mesh, at(30_081))?, "control: nobody knows that {address} is a node's");
    }
    let text = directory(&mesh, &service)?
        .replace("{port: 80, targetPort: 8080}", "{port: 80, targetPort: 8080, nodePort: 30080}");
    load_directory(&mesh, &format!("{text}{}", nodes(&mesh, 0)?))?;
    let [first, second] = addresses(b);
    until("the node's addresses in the kernel", || {
        Ok((!is_received(&mesh, SocketAddr::new(first, 30_081))?).then_some(()))
    })?;
    for address in [first, second] {
        let at = |port| SocketAddr::new(address, port);
        ensure!(!is_received(&mesh, at(30_081))? && !is_received(&mesh, at(32_767))?);
        ensure!(!is_accepted(&mesh, at(30_081))?, "no service has the port");
        ensure!(is_received(&mesh, at(29_999))? && is_accepted(&mesh, at(29_999))?, "the node's own ports");
    }
    let far = serve(mesh.pod("far")?, 8080)?;
    for address in addresses(a).into_iter().chain(addresses(b)) {
        let asked = SocketAddr::new(address, 30_080);
        ensure!(connect(mesh.pod("client")?, asked)? == asked.to_string(), "the peer is what was asked for");
    }
    ensure!(accepted(&far)? == 4);
    let drops = observe::metric(mesh.agent("a")?, "tacit_kernel_verdicts_total", &[("reason", "guard_udp")])?;
    ensure!(drops > 0);
    Ok(())
}

/// A node that did not fit into the kernel's table used to have no protected node ports.
#[test]
#[ignore = "needs root"]
fn with_more_nodes_than_the_kernel_holds_no_address_has_a_node_port_in_clear() -> Result<()> {
    let service = Service { port: 8080, endpoints: &[("far", true)], more: "" };
    let mesh = mesh("svcmany", STRICT_MESH, &service)?;
    let (agent, text) = (mesh.agent("a")?, directory(&mesh, &service)?);
    // The directory never names node `b`: the kernel has no entry of its addresses, as if it did not fit.
    let b = mesh.topology().node("b")?;
    let unlisted =
        format!("{text}nodes:\n- {{name: a, addresses: [{}]}}\n", mesh.topology().node("a")?.wire_ipv4());
    let at = |port| SocketAddr::new(b.wire_ipv4().into(), port);
    let not_applied = || observe::metric(agent, "tacit_nodes_not_applied", &[("kind", "addresses")]);
    load_directory(&mesh, &unlisted)?;
    ensure!(is_received(&mesh, at(30_081))? && not_applied()? == 0, "control: no table is full");

    load_directory(&mesh, &(unlisted.clone() + &more_nodes(CLUSTER_NODES)))?;
    let error = observe::wait_status(agent, "nodes that are not applied", |status| {
        status["nodes"]["addresses_not_applied"].as_str().map(str::to_owned)
    })?;
    ensure!(error.contains("1 more are wanted") && not_applied()? == 1, "{error}");
    ensure!(agent.status_table()?.contains("addresses of nodes not applied"));
    ensure!(!is_received(&mesh, at(30_081))? && !is_accepted(&mesh, at(30_081))?, "a port of a service");
    ensure!(is_received(&mesh, at(29_999))? && is_accepted(&mesh, at(29_999))?, "no port of a service");
    let loopback = SocketAddr::from(([127, 0, 0, 1], 30_082));
    let _own = Server::start(mesh.pod("client")?, loopback, &["echo"])?;
    ensure!(connect(mesh.pod("client")?, loopback)? == loopback.to_string(), "the pod's own loopback");

    load_directory(&mesh, &unlisted)?;
    observe::wait_status(agent, "all nodes are applied", |status| {
        status["nodes"]["addresses_not_applied"].is_null().then_some(())
    })?;
    ensure!(is_received(&mesh, at(30_081))? && not_applied()? == 0);
    Ok(())
}

//! Content of the wire between the nodes, and reports of agents about the flows that crossed it.
//!
//! Every check that a marker is absent has a control: the same exchange without Tacit, in which the marker is present.

use anyhow::Result;
use serde_json::Value;
use std::net::{IpAddr, SocketAddr};
use tacit_tests::{Client, Mesh, Plan, Server, fresh_port, observe, with_and_without_tacit};
use tacit_topology::{Pod, until};

with_and_without_tacit!(plan:
    ipv4_bytes_cannot_be_read,
    ipv6_bytes_cannot_be_read,
    bytes_to_a_mapped_address_cannot_be_read,
    bytes_to_a_server_that_speaks_first_cannot_be_read,
    bytes_of_a_pod_that_begins_at_once_cannot_be_read,
    bytes_of_a_container_inside_the_pod_cannot_be_read,
    bytes_of_a_multipath_socket_cannot_be_read,
    bytes_to_a_pod_of_the_same_node_never_reach_the_wire,
    bytes_to_a_pod_outside_the_mesh_stay_as_they_are,
);

fn plan() -> Plan {
    Plan::new("wire")
        .pod("a", "shop", "client")
        .pod("a", "shop", "near")
        .pod("b", "shop", "far")
        .outside("b", "shop", "legacy")
        .policy(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: far, namespace: shop}\n\
             spec:\n  selector: {matchLabels: {app: far}}\n  mtls: {mode: STRICT}\n",
        )
}

fn ipv4_bytes_cannot_be_read(mesh: &Mesh) -> Result<()> {
    let far = mesh.pod("far")?;
    crosses_encrypted(mesh, SocketAddr::new(far.ipv4().into(), fresh_port()), |address| address)
}

fn ipv6_bytes_cannot_be_read(mesh: &Mesh) -> Result<()> {
    let far = mesh.pod("far")?;
    crosses_encrypted(mesh, SocketAddr::new(far.ipv6().into(), fresh_port()), |address| address)
}

fn bytes_to_a_mapped_address_cannot_be_read(mesh: &Mesh) -> Result<()> {
    let far = mesh.pod("far")?;
    crosses_encrypted(mesh, SocketAddr::new(far.ipv4().into(), fresh_port()), |address| match address.ip() {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    })
}

fn bytes_to_a_server_that_speaks_first_cannot_be_read(mesh: &Mesh) -> Result<()> {
    let far = mesh.pod("far")?;
    let marker = marker();
    let capture = mesh.topology().capture()?;
    let address = SocketAddr::new(far.ipv4().into(), fresh_port());
    let _server = Server::start(far, address, &[&format!("send:{marker}"), "read-end"])?;
    let events = Client::run(mesh.pod("client")?, address, &["line", &format!("send:{marker}")])?;
    assert!(events.iter().any(|event| event["text"] == marker.as_str()), "{events:?}");
    let readable = capture.finish()?.occurrences(marker.as_bytes());
    assert_eq!(readable, if mesh.has_tacit() { 0 } else { 2 });
    Ok(())
}

/// A program that connects right after its start. It is in its pod's cgroup before it starts, so the connection is captured.
fn bytes_of_a_pod_that_begins_at_once_cannot_be_read(mesh: &Mesh) -> Result<()> {
    let far = mesh.pod("far")?;
    let (marker, address) = (marker(), SocketAddr::new(far.ipv4().into(), fresh_port()));
    let _server = Server::start(far, address, &["echo"])?;
    let capture = mesh.topology().capture()?;
    let clients: Vec<_> = (0..20)
        .map(|_| {
            Client::start(mesh.pod("client")?, address, &[&format!("send:{marker}"), "shut", "read-end"])
        })
        .collect::<Result<_>>()?;
    for client in clients {
        client.finish()?;
    }
    let readable = capture.finish()?.occurrences(marker.as_bytes());
    assert_eq!(readable, if mesh.has_tacit() { 0 } else { 40 });
    Ok(())
}

/// Kubernetes puts each container of a pod in a cgroup below the pod's.
fn bytes_of_a_container_inside_the_pod_cannot_be_read(mesh: &Mesh) -> Result<()> {
    let (container, far) = (mesh.pod("client")?.container("main")?, mesh.pod("far")?);
    let (marker, address) = (marker(), SocketAddr::new(far.ipv4().into(), fresh_port()));
    let _server = Server::start(far, address, &["echo"])?;
    let capture = mesh.topology().capture()?;
    Client::echo(&container, address, &marker)?;
    let readable = capture.finish()?.occurrences(marker.as_bytes());
    assert_eq!(readable, if mesh.has_tacit() { 0 } else { 2 });
    Ok(())
}

/// The connection may succeed or fail, but must not bypass the agent.
fn bytes_of_a_multipath_socket_cannot_be_read(mesh: &Mesh) -> Result<()> {
    let far = mesh.pod("far")?;
    let (marker, address) = (marker(), SocketAddr::new(far.ipv4().into(), fresh_port()));
    let _server = Server::start(far, address, &["echo"])?;
    let capture = mesh.topology().capture()?;
    let (to, text) = (address.to_string(), format!("send:{marker}"));
    let events =
        Client::with_args(mesh.pod("client")?, &["connect", &to, "--mptcp", &text, "shut", "read-end"])?
            .finish()?;
    let readable = capture.finish()?.occurrences(marker.as_bytes());
    let unsupported =
        events.iter().any(|event| event["step"] == "connect" && event["error"] == "Uncategorized");
    assert_eq!(readable, if mesh.has_tacit() || unsupported { 0 } else { 2 }, "{events:?}");
    Ok(())
}

fn bytes_to_a_pod_of_the_same_node_never_reach_the_wire(mesh: &Mesh) -> Result<()> {
    let near = mesh.pod("near")?;
    let marker = marker();
    let capture = mesh.topology().capture()?;
    for address in [IpAddr::V4(near.ipv4()), IpAddr::V6(near.ipv6())] {
        exchange(mesh, near, SocketAddr::new(address, fresh_port()), &marker)?;
    }
    assert_eq!(capture.finish()?.occurrences(marker.as_bytes()), 0);
    Ok(())
}

fn bytes_to_a_pod_outside_the_mesh_stay_as_they_are(mesh: &Mesh) -> Result<()> {
    let legacy = mesh.pod("legacy")?;
    let marker = marker();
    let capture = mesh.topology().capture()?;
    exchange(mesh, legacy, SocketAddr::new(legacy.ipv4().into(), fresh_port()), &marker)?;
    assert_eq!(capture.finish()?.occurrences(marker.as_bytes()), 2);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_live_flow_is_shown_with_both_identities_by_both_agents() -> Result<()> {
    let mesh = plan().with_agents()?;
    let far = mesh.pod("far")?;
    let address = SocketAddr::new(far.ipv4().into(), fresh_port());
    let _server = Server::start(far, address, &["echo"])?;
    let mut client =
        Client::start(mesh.pod("client")?, address, &["send:live", "line", "pause", "shut", "read-end"])?;
    client.events().first("line")?;
    for (node, reporter) in [("a", "source"), ("b", "destination")] {
        let flow =
            observe::wait_status(mesh.agent(node)?, "the live flow", |status| flow_to(status, address))?;
        assert_eq!(flow["reporter"], reporter);
        assert_eq!(flow["security"], "mutual_tls");
        assert_eq!(flow["key_exchange"], "X25519MLKEM768");
        assert_eq!(flow["source"]["identity"], "spiffe://cluster.local/ns/shop/sa/client");
        assert_eq!(flow["destination"]["identity"], "spiffe://cluster.local/ns/shop/sa/far");
        assert_eq!(flow["source"]["workload"], "shop/client");
        assert_eq!(flow["destination"]["workload"], "shop/far");
        let table = mesh.agent(node)?.status_table()?;
        assert!(table.contains(far.name()) || table.contains("client"), "{table}");
    }
    client.proceed()?;
    client.finish()?;
    for (node, reporter, direction) in [("a", "source", "outbound"), ("b", "destination", "inbound")] {
        let agent = mesh.agent(node)?;
        let labels = [
            ("reporter", reporter),
            ("connection_security_policy", "mutual_tls"),
            ("source_principal", "spiffe://cluster.local/ns/shop/sa/client"),
            ("destination_principal", "spiffe://cluster.local/ns/shop/sa/far"),
        ];
        until("the flow counted as closed", || {
            let closed = observe::metric(agent, "istio_tcp_connections_closed_total", &labels)?;
            Ok((closed == 1).then_some(()))
        })?;
        assert_eq!(observe::metric(agent, "istio_tcp_connections_opened_total", &labels)?, 1);
        // `live` and its line feed, each way.
        assert_eq!(observe::metric(agent, "istio_tcp_received_bytes_total", &labels)?, 5);
        assert_eq!(observe::metric(agent, "istio_tcp_sent_bytes_total", &labels)?, 5);
        let line = until("the line of the access log", || {
            let log = agent.log()?;
            let of_flow = |line: &&str| line.contains("connection complete") && line.contains(direction);
            Ok(log.lines().find(of_flow).map(str::to_owned))
        })?;
        for part in
            ["sa/client", "sa/far", "TLSv1.3", "X25519MLKEM768", "bytes_sent=5", "bytes_recv=5", "clean"]
        {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_flow_on_the_same_node_has_identities_but_no_tunnel() -> Result<()> {
    let mesh = plan().with_agents()?;
    let near = mesh.pod("near")?;
    let address = SocketAddr::new(near.ipv4().into(), fresh_port());
    let _server = Server::start(near, address, &["echo"])?;
    let mut client =
        Client::start(mesh.pod("client")?, address, &["send:live", "line", "pause", "shut", "read-end"])?;
    client.events().first("line")?;
    let flow = observe::wait_status(mesh.agent("a")?, "the live flow", |status| flow_to(status, address))?;
    assert_eq!(flow["security"], "same_node");
    assert_eq!(flow["source"]["identity"], "spiffe://cluster.local/ns/shop/sa/client");
    assert_eq!(flow["destination"]["identity"], "spiffe://cluster.local/ns/shop/sa/near");
    client.proceed()?;
    client.finish()?;
    Ok(())
}

fn crosses_encrypted(mesh: &Mesh, address: SocketAddr, reach: fn(SocketAddr) -> SocketAddr) -> Result<()> {
    let far = mesh.pod("far")?;
    let marker = marker();
    let _server = Server::start(far, address, &["echo"])?;
    let capture = mesh.topology().capture()?;
    Client::echo(mesh.pod("client")?, reach(address), &marker)?;
    let traffic = capture.finish()?;
    if mesh.has_tacit() {
        assert_eq!(traffic.occurrences(marker.as_bytes()), 0, "readable in {:?}", traffic.clear_streams());
        assert!(traffic.tunnel_bytes > 2 * marker.len() as u64, "{traffic:?}");
        assert!(traffic.tunnel_is_tls());
        let clear: Vec<_> = traffic
            .clear_streams()
            .into_iter()
            .filter(|pair| pair.0 == address || pair.1 == address)
            .collect();
        assert_eq!(clear, Vec::new());
    } else {
        // One occurrence in each direction.
        assert_eq!(traffic.occurrences(marker.as_bytes()), 2);
        assert_eq!(traffic.tunnel_bytes, 0);
    }
    Ok(())
}

fn exchange(mesh: &Mesh, server: &Pod, address: SocketAddr, marker: &str) -> Result<()> {
    let _server = Server::start(server, address, &["echo"])?;
    Client::echo(mesh.pod("client")?, address, marker)
}

/// Returns a text that occurs nowhere else.
fn marker() -> String {
    format!("marker-of-{}-{}", std::process::id(), fresh_port())
}

fn flow_to(status: &Value, address: SocketAddr) -> Option<Value> {
    let flows = status["flows"]["list"].as_array()?;
    flows.iter().find(|flow| flow["destination"]["address"] == address.to_string()).cloned()
}

//! Behaviour of connections as applications see it: with Tacit the same as without.

use anyhow::{Result, ensure};
use serde_json::Value;
use std::net::{IpAddr, SocketAddr};
use tacit_tests::{Client, Mesh, Plan, Server, fresh_port, observe, scaled, with_and_without_tacit};
use tacit_topology::Pod;

with_and_without_tacit!(plan:
    ipv4_reaches_the_other_node,
    ipv6_reaches_the_other_node,
    an_ipv6_socket_reaches_a_mapped_ipv4_address,
    a_mapped_client_reaches_an_ipv6_listener,
    a_pod_of_the_same_node_is_reached,
    a_pod_reaches_itself,
    a_server_may_speak_first,
    the_client_may_end_its_direction_first,
    the_server_may_end_its_direction_first,
    a_hundred_mebibytes_each_way_arrive_intact,
    two_thousand_flows_are_open_at_once,
    a_closed_port_is_refused,
    a_reset_of_the_server_reaches_the_client,
    a_reset_of_the_client_reaches_the_server,
    a_client_may_bind_its_address_first,
    many_flows_one_after_the_other,
);

fn plan() -> Plan {
    Plan::new("flows").pod("a", "shop", "client").pod("a", "shop", "near").pod("b", "shop", "far")
}

fn ipv4_reaches_the_other_node(mesh: &Mesh) -> Result<()> {
    let far = mesh.pod("far")?;
    echo(mesh, far, far.ipv4().into(), |address| address)
}

fn ipv6_reaches_the_other_node(mesh: &Mesh) -> Result<()> {
    let far = mesh.pod("far")?;
    echo(mesh, far, far.ipv6().into(), |address| address)
}

fn an_ipv6_socket_reaches_a_mapped_ipv4_address(mesh: &Mesh) -> Result<()> {
    let far = mesh.pod("far")?;
    echo(mesh, far, far.ipv4().into(), mapped)
}

fn a_mapped_client_reaches_an_ipv6_listener(mesh: &Mesh) -> Result<()> {
    let far = mesh.pod("far")?;
    let any = SocketAddr::new(IpAddr::from([0_u16; 8]), fresh_port());
    let _server = Server::start(far, any, &["echo"])?;
    for address in [IpAddr::V4(far.ipv4()), IpAddr::V6(far.ipv6())] {
        Client::echo(mesh.pod("client")?, SocketAddr::new(address, any.port()), "to any address")?;
    }
    Client::echo(
        mesh.pod("client")?,
        mapped(SocketAddr::new(far.ipv4().into(), any.port())),
        "mapped on both sides",
    )
}

fn a_pod_of_the_same_node_is_reached(mesh: &Mesh) -> Result<()> {
    let near = mesh.pod("near")?;
    echo(mesh, near, near.ipv4().into(), |address| address)?;
    echo(mesh, near, near.ipv6().into(), |address| address)?;
    echo(mesh, near, near.ipv4().into(), mapped)
}

fn a_pod_reaches_itself(mesh: &Mesh) -> Result<()> {
    let client = mesh.pod("client")?;
    for address in [client.ipv4().into(), client.ipv6().into(), IpAddr::from([127, 0, 0, 1])] {
        echo(mesh, client, address, |address| address)?;
    }
    Ok(())
}

fn a_server_may_speak_first(mesh: &Mesh) -> Result<()> {
    let server = serve(mesh, &["send:220 ready", "line", "send:bye"])?;
    let events = Client::run(mesh.pod("client")?, server.address(), &["line", "send:hello", "read-end"])?;
    assert_eq!(event(&events, "line")?["text"], "220 ready");
    assert_eq!(event(&events, "end")?["text"], "bye\n");
    assert_eq!(server.events().first("line")?["text"], "hello");
    Ok(())
}

fn the_client_may_end_its_direction_first(mesh: &Mesh) -> Result<()> {
    let server = serve(mesh, &["read-end", "send:after the other end"])?;
    let events = Client::run(mesh.pod("client")?, server.address(), &["send:all data", "shut", "read-end"])?;
    let end = server.events().first("end")?;
    assert_eq!((&end["text"], &end["end"]), (&Value::from("all data\n"), &Value::from("eof")));
    let end = event(&events, "end")?;
    assert_eq!((&end["text"], &end["end"]), (&Value::from("after the other end\n"), &Value::from("eof")));
    Ok(())
}

fn the_server_may_end_its_direction_first(mesh: &Mesh) -> Result<()> {
    let server = serve(mesh, &["send:all data", "shut", "read-end"])?;
    let events =
        Client::run(mesh.pod("client")?, server.address(), &["read-end", "send:after the other end"])?;
    let end = event(&events, "end")?;
    assert_eq!((&end["text"], &end["end"]), (&Value::from("all data\n"), &Value::from("eof")));
    let end = server.events().first("end")?;
    assert_eq!((&end["text"], &end["end"]), (&Value::from("after the other end\n"), &Value::from("eof")));
    Ok(())
}

fn a_hundred_mebibytes_each_way_arrive_intact(mesh: &Mesh) -> Result<()> {
    let bytes = scaled(100 << 20)?;
    let server = serve(mesh, &[&format!("bulk:{bytes}:1:2")])?;
    let events = Client::run(mesh.pod("client")?, server.address(), &[&format!("bulk:{bytes}:2:1")])?;
    for side in [server.events().first("bulk")?, event(&events, "bulk")?.clone()] {
        assert_eq!(side["received"], bytes);
        assert_eq!(side["intact"], true);
    }
    Ok(())
}

fn two_thousand_flows_are_open_at_once(mesh: &Mesh) -> Result<()> {
    let flows_wanted = scaled(2000)?;
    let server = serve(mesh, &["echo"])?;
    let address = server.address().to_string();
    let count = flows_wanted.to_string();
    let events = Client::with_args(mesh.pod("client")?, &["flows", &count, &address])?.finish()?;
    let refused = |node| mesh.agent(node).and_then(observe::refusals).unwrap_or_default();
    let flows = event(&events, "flows")?;
    let seen = (flows["echoed"].as_u64(), server.accepted()? as u64);
    assert_eq!(
        seen,
        (Some(flows_wanted), flows_wanted),
        "{flows}, rejected by a: {:#?}, by b: {:#?}",
        refused("a"),
        refused("b")
    );
    Ok(())
}

fn a_closed_port_is_refused(mesh: &Mesh) -> Result<()> {
    let far = mesh.pod("far")?;
    for address in [IpAddr::V4(far.ipv4()), IpAddr::V6(far.ipv6()), mesh.pod("near")?.ipv4().into()] {
        let events = Client::run(mesh.pod("client")?, SocketAddr::new(address, fresh_port()), &["read-end"])?;
        let refused = |event: &Value| event["step"] == "connect" && event["error"] == "ConnectionRefused";
        ensure!(events.iter().any(refused), "port of {address}: {events:?}");
    }
    Ok(())
}

fn a_reset_of_the_server_reaches_the_client(mesh: &Mesh) -> Result<()> {
    let server = serve(mesh, &["send:before", "line", "reset"])?;
    let events = Client::run(mesh.pod("client")?, server.address(), &["line", "send:now", "read-end"])?;
    assert_eq!(event(&events, "line")?["text"], "before");
    assert_eq!(event(&events, "end")?["end"], "ConnectionReset");
    Ok(())
}

fn a_reset_of_the_client_reaches_the_server(mesh: &Mesh) -> Result<()> {
    let server = serve(mesh, &["line", "send:go", "read-end"])?;
    Client::run(mesh.pod("client")?, server.address(), &["send:before", "line", "reset"])?;
    assert_eq!(server.events().first("line")?["text"], "before");
    assert_eq!(server.events().first("end")?["end"], "ConnectionReset");
    Ok(())
}

fn a_client_may_bind_its_address_first(mesh: &Mesh) -> Result<()> {
    let server = serve(mesh, &["echo"])?;
    let client = mesh.pod("client")?;
    let (to, from) = (server.address().to_string(), client.ipv4().to_string());
    let steps = ["connect", &to, "--from", &from, "send:bound", "shut", "read-end"];
    let events = Client::with_args(client, &steps)?.finish()?;
    assert_eq!(event(&events, "end")?["text"], "bound\n");
    let seen: SocketAddr =
        server.events().first("accepted")?["accept"].as_str().unwrap_or_default().parse()?;
    assert_eq!(seen.ip(), client.ipv4());
    Ok(())
}

/// Tunnel sessions are reused after a clean end, which no application may notice.
fn many_flows_one_after_the_other(mesh: &Mesh) -> Result<()> {
    let server = serve(mesh, &["echo"])?;
    for number in 0..50 {
        Client::echo(mesh.pod("client")?, server.address(), &format!("flow {number}"))?;
    }
    assert_eq!(server.accepted()?, 50);
    Ok(())
}

fn echo(mesh: &Mesh, pod: &Pod, address: IpAddr, reach: fn(SocketAddr) -> SocketAddr) -> Result<()> {
    let server = Server::start(pod, SocketAddr::new(address, fresh_port()), &["echo"])?;
    Client::echo(mesh.pod("client")?, reach(server.address()), "echo")?;
    assert_eq!(server.accepted()?, 1);
    Ok(())
}

fn serve(mesh: &Mesh, steps: &[&str]) -> Result<Server> {
    let far = mesh.pod("far")?;
    Server::start(far, SocketAddr::new(far.ipv4().into(), fresh_port()), steps)
}

fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

fn event<'a>(events: &'a [Value], name: &str) -> Result<&'a Value> {
    let found = events.iter().find(|event| event["event"] == name);
    found.ok_or_else(|| anyhow::anyhow!("no {name:?} among {events:?}"))
}

//! Flows that a pod of the mesh opens to a pod that speaks HBONE.

use crate::server::{End, HboneServer, Reply, Serve};
use anyhow::{Context, Result, ensure};
use h2::Reason;
use serde_json::Value;
use std::{collections::HashSet, net::SocketAddr};
use tacit_tests::{Client, Mesh, Plan, fresh_port, observe};
use tacit_topology::{Tunnel, WorkloadEntry};

/// A client's pod on node b, and the peer's on node a, which no agent covers.
fn plan(tag: &str) -> Plan {
    Plan::new(tag).pod("b", "shop", "web").outside("a", "shop", "peer")
}

/// A mesh in whose directory at the client's node the peer has this `tunnel`. Its own agent knows that it does not enrol the peer.
fn mesh(plan: Plan, at_client: Tunnel) -> Result<Mesh> {
    plan.with_directories(|node, mesh| {
        let tunnel = if node == "b" { at_client } else { Tunnel::Hbone };
        let peer = WorkloadEntry { tunnel, ..WorkloadEntry::of(mesh.pod("peer")?) };
        Ok([mesh.directory(), vec![peer]].concat())
    })
}

/// Addresses of the peer with a port that nobody listens at: the server of HBONE is the application.
fn addresses(mesh: &Mesh) -> Result<[SocketAddr; 2]> {
    let (peer, port) = (mesh.pod("peer")?, fresh_port());
    Ok([SocketAddr::new(peer.ipv4().into(), port), SocketAddr::new(peer.ipv6().into(), port)])
}

fn end_of(events: &[Value]) -> Result<&Value> {
    events.iter().find(|event| event["event"] == "end").with_context(|| format!("{events:?}"))
}

#[test]
#[ignore = "needs root"]
fn a_pod_reaches_an_ambient_pod_as_itself_under_strict() -> Result<()> {
    // The directory may not know the wire format: the handshake tells.
    for (tag, tunnel) in [("houta", Tunnel::Hbone), ("houtb", Tunnel::Tacit)] {
        let mesh = mesh(plan(tag).policy(tacit_tests::STRICT_MESH), tunnel)?;
        let server = HboneServer::start(&mesh, Serve::default())?;
        let web = mesh.pod("web")?;
        for (to, own) in addresses(&mesh)?.into_iter().zip([web.ipv4().to_string(), web.ipv6().to_string()]) {
            let client = Client::start(web, to, &["send:over h2", "line", "pause", "shut", "read-end"])?;
            client.events().first("line")?;
            let seen = server.request()?;
            ensure!((&*seen.method, &seen.authority) == ("CONNECT", &to.to_string()), "{seen:?}");
            ensure!(seen.client.ip().to_string() == own, "{seen:?}");
            let forwarded = seen.fields["forwarded"].to_str()?;
            let connected = client.events().first("connected")?;
            ensure!(
                forwarded == format!("for=\"{}\"", connected["local"].as_str().context("local")?),
                "{seen:?}"
            );
            let baggage = "k8s.namespace.name=shop,k8s.pod.name=web,service.name=web";
            ensure!(seen.fields["baggage"] == baggage, "{seen:?}");
            observe::wait_status(mesh.agent("b")?, "the flow", |status| {
                let flows = status["flows"]["list"].as_array()?;
                let flow = flows.iter().find(|flow| flow["destination"]["address"] == to.to_string())?;
                let trace = flow["trace"].as_str()?;
                let is_traced = seen.fields["traceparent"].to_str().ok()?.contains(trace);
                (flow["wire"] == "h2" && flow["destination"]["identity"] == crate::PEER && is_traced)
                    .then_some(())
            })?;
            let mut client = client;
            client.proceed()?;
            let events = client.finish()?;
            ensure!(end_of(&events)?["end"] == "eof", "{events:?}");
            ensure!(server.end()? == End::Clean(Vec::new()));
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn many_flows_share_connections_within_the_limit_of_each() -> Result<()> {
    let mesh = mesh(plan("houtm"), Tunnel::Hbone)?;
    for (streams_max, each) in [(200, 100), (30, 30)] {
        let server = HboneServer::start(&mesh, Serve { streams_max, ..Serve::default() })?;
        let [v4, v6] = addresses(&mesh)?.map(|address| address.to_string());
        let count = 600;
        let events =
            Client::with_args(mesh.pod("web")?, &["flows", &count.to_string(), &v4, &v6])?.finish()?;
        let done =
            events.iter().find(|event| event["event"] == "flows").with_context(|| format!("{events:?}"))?;
        ensure!(done["echoed"] == count, "{done}");
        let requests: Vec<_> = (0..count).map(|_| server.request()).collect::<Result<_>>()?;
        let used: HashSet<_> = requests.iter().map(|seen| seen.connection).collect();
        for connection in &used {
            let here = requests.iter().filter(|seen| seen.connection == *connection).count();
            ensure!(here <= each, "{here} streams at once on a connection");
        }
        // Each worker has connections of its own, of which the last need not be full, to each address.
        let workers = std::thread::available_parallelism()?.get();
        let most = count / each + 2 * workers + 2;
        ensure!(server.connections() <= most, "{} connections, at most {most}", server.connections());
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_refusal_of_the_peer_is_one_for_the_application() -> Result<()> {
    let mesh = mesh(plan("houtr"), Tunnel::Hbone)?;
    for (answer, reason) in [
        (Reply::Status(503), "connection_refused"),
        (Reply::Status(401), "policy"),
        (Reply::Status(400), "unknown_destination"),
        (Reply::Status(500), "other"),
        (Reply::Reset(Reason::INTERNAL_ERROR), "internal"),
    ] {
        let server = HboneServer::start(&mesh, Serve { answer, ..Serve::default() })?;
        for to in addresses(&mesh)? {
            let before = observe::refused(mesh.agent("b")?, reason)?;
            let events = Client::run(mesh.pod("web")?, to, &["send:lost", "read-end"])?;
            let failed = events.iter().find(|event| event["event"] == "failed");
            ensure!(
                failed.is_some_and(|failed| failed["error"] == "ConnectionRefused"),
                "{answer:?}: {events:?}"
            );
            observe::wait_refused(mesh.agent("b")?, reason, before, crate::PEER)?;
            server.request()?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn another_identity_at_the_address_gets_no_flow_and_nothing_goes_in_clear() -> Result<()> {
    let mesh = mesh(plan("houti"), Tunnel::Hbone)?;
    let other = "spiffe://cluster.local/ns/shop/sa/other";
    let two: &[&str] = &[crate::PEER, "spiffe://cluster.local/ns/shop/sa/other"];
    for (names, reason) in
        [(&[other] as &[&str], "identity_mismatch"), (two, "uri_names"), (&[], "uri_names")]
    {
        let names: &'static [&'static str] =
            Vec::leak(names.iter().map(|name| &*String::leak((*name).to_owned())).collect());
        let server = HboneServer::start(&mesh, Serve { names, ..Serve::default() })?;
        for to in addresses(&mesh)? {
            let before = observe::refused(mesh.agent("b")?, reason)?;
            let events = Client::run(mesh.pod("web")?, to, &["send:secret", "read-end"])?;
            ensure!(events.iter().any(|event| event["event"] == "failed"), "{events:?}");
            observe::wait_refused(mesh.agent("b")?, reason, before, "")?;
            server.failure()?;
        }
        ensure!(server.connections() == 0, "a handshake succeeded");
    }
    // Nobody is there: the flow is refused, not sent as plaintext to the application that listens.
    let [to, _] = addresses(&mesh)?;
    let plain = tacit_tests::Server::start(mesh.pod("peer")?, to, &["read-end"])?;
    let events = Client::run(mesh.pod("web")?, to, &["send:secret", "read-end"])?;
    ensure!(events.iter().any(|event| event["event"] == "failed"), "{events:?}");
    ensure!(plain.accepted()? == 0);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn each_direction_ends_alone_and_resets_stay_resets() -> Result<()> {
    let mesh = mesh(plan("houte"), Tunnel::Hbone)?;
    let web = mesh.pod("web")?;
    for to in addresses(&mesh)? {
        let server = HboneServer::start(&mesh, Serve { answer: Reply::EndFirst, ..Serve::default() })?;
        let events = Client::run(web, to, &["read-end", "send:late", "shut"])?;
        ensure!(end_of(&events)?["text"] == "first\n", "{events:?}");
        ensure!(server.end()? == End::Clean(b"late\n".to_vec()));
        drop(server);

        let server = HboneServer::start(&mesh, Serve::default())?;
        let events = Client::run(web, to, &["send:question", "shut", "read-end"])?;
        ensure!(end_of(&events)?["text"] == "question\n", "{events:?}");
        ensure!(server.end()? == End::Clean(Vec::new()));
        Client::run(web, to, &["send:question", "line", "reset"])?;
        ensure!(server.end()? == End::Reset(Some(Reason::CANCEL)));
        drop(server);

        for reason in [Reason::CANCEL, Reason::NO_ERROR, Reason::CONNECT_ERROR] {
            let answer = Reply::LineAndReset(reason);
            let _server = HboneServer::start(&mesh, Serve { answer, ..Serve::default() })?;
            let events = Client::run(web, to, &["line", "send:go", "read-end"])?;
            ensure!(end_of(&events)?["end"] == "ConnectionReset", "{reason}: {events:?}");
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_peer_that_drains_keeps_its_flows_and_gets_no_others() -> Result<()> {
    let mesh = mesh(plan("houtg"), Tunnel::Hbone)?;
    let (web, [to, _]) = (mesh.pod("web")?, addresses(&mesh)?);
    let server = HboneServer::start(&mesh, Serve::default())?;
    let mut held =
        Client::start(web, to, &["send:held", "line", "pause", "send:on", "line", "shut", "read-end"])?;
    held.events().first("line")?;
    let first = server.request()?.connection;
    server.drain()?;
    // As a ztunnel that is replaced: the old one listens no more, the new one takes over the port.
    server.stop_listening();
    let next =
        tacit_topology::until("the port is free", || Ok(HboneServer::start(&mesh, Serve::default()).ok()))?;
    for _ in 0..20 {
        Client::echo(web, to, "another")?;
    }
    ensure!(next.connections() >= 1 && server.connections() == first + 1);
    held.proceed()?;
    let events = held.finish()?;
    ensure!(end_of(&events)?["end"] == "eof", "{events:?}");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn an_agent_that_ends_lets_its_flows_finish() -> Result<()> {
    let mut mesh = mesh(plan("houtd").config("drainTimeout: 60s\n"), Tunnel::Hbone)?;
    let [to, _] = addresses(&mesh)?;
    let server = HboneServer::start(&mesh, Serve::default())?;
    let mut held = Client::start(
        mesh.pod("web")?,
        to,
        &["send:held", "line", "pause", "send:on", "line", "shut", "read-end"],
    )?;
    held.events().first("line")?;
    mesh.agent("b")?.send_sigterm()?;
    observe::wait_log(mesh.agent("b")?, &["draining"])?;
    held.proceed()?;
    let events = held.finish()?;
    ensure!(end_of(&events)?["end"] == "eof", "{events:?}");
    ensure!(server.end()? == End::Clean(Vec::new()));
    let status = mesh.agent_mut("b")?.wait_end()?;
    ensure!(status.success(), "{status}");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_connection_to_a_node_that_died_ends_as_to_one_that_is_gone() -> Result<()> {
    let mesh = mesh(plan("houts"), Tunnel::Hbone)?;
    let (web, [to, _]) = (mesh.pod("web")?, addresses(&mesh)?);
    let server = HboneServer::start(&mesh, Serve::default())?;
    Client::echo(web, to, "first")?;
    routes(&mesh, "add")?;
    // The pod's connection is open, and its peer silent: `connect()` neither succeeds nor waits for it.
    let events = Client::with_args(web, &["probe", &to.to_string(), "send-timeout:3000"])?.finish()?;
    let seen = events.iter().find(|event| event["event"] == "probe").context("probe")?;
    ensure!(seen["connect"] == "EINPROGRESS", "{seen}");
    routes(&mesh, "del")?;
    Client::echo(web, to, "last")?;
    ensure!(server.connections() >= 2, "the silent connection got another flow");
    Ok(())
}

/// Makes or ends an outage between both pods, in which nothing is answered.
fn routes(mesh: &Mesh, action: &str) -> Result<()> {
    for (node, pod) in [("b", "peer"), ("a", "web")] {
        let to = mesh.pod(pod)?.ipv4().to_string();
        let status =
            mesh.topology().node(node)?.command("ip")?.args(["route", action, "blackhole", &to]).status()?;
        ensure!(status.success(), "route {action} blackhole {to}: {status}");
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn connections_that_carry_no_flow_any_more_have_a_bound() -> Result<()> {
    let mesh = mesh(plan("houtx").descriptors(2048), Tunnel::Hbone)?;
    // A connection for each flow.
    let server = HboneServer::start(&mesh, Serve { streams_max: 1, ..Serve::default() })?;
    let [to, _] = addresses(&mesh)?;
    let events = Client::with_args(mesh.pod("web")?, &["flows", "80", &to.to_string()])?.finish()?;
    let done =
        events.iter().find(|event| event["event"] == "flows").with_context(|| format!("{events:?}"))?;
    ensure!(done["echoed"] == 80, "{done}");
    ensure!(server.connections() >= 80, "{} connections", server.connections());
    observe::wait_status(mesh.agent("b")?, "connections within their share", |status| {
        let shares = status["shares"].as_array()?;
        let share = shares.iter().find(|share| share["resource"] == "hbone_connections")?;
        let (used, each) = (share["used"].as_u64()?, share["holder_limit"].as_u64()?);
        (used > 0 && used <= each && each < 80).then_some(())
    })?;
    // Those that are left carry the next flow.
    Client::echo(mesh.pod("web")?, to, "again")
}

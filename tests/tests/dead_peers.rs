//! Nodes that die: a connection ends in the time that its application asked for, with the error that it has without Tacit, and not
//! otherwise.
//!
//! A node dies by routes that lead nowhere, in both directions. Each case runs in a mesh without agents and in one with agents.

use std::{
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tacit_abi::tcp_port;
use tacit_tests::{Client, Mesh, Plan, Server, fresh_port, observe};
use tacit_topology::{Agent, Pod, until};

/// Time by which a flow may end later than without Tacit.
const LATE_MS: u64 = 2000;
/// Time by which a flow may end earlier: timers of the kernel have coarse ticks.
const EARLY_MS: u64 = 500;
/// An outage that every connection survives which asked for nothing.
const OUTAGE: Duration = Duration::from_secs(4);
/// Time for which a connection with the shortest keep-alive has to live.
const LIVES: Duration = Duration::from_secs(8);
/// The shortest keep-alive: one probe without an answer ends the connection after two seconds.
const SHORTEST: &str = "set:keep-alive:1:1:1";
/// Exchanges two lines.
const GREET: [&str; 2] = ["send:hello", "line"];

/// An application that loses its peer.
#[derive(Debug, Clone, Copy)]
struct Case {
    name: &'static str,
    server_pod: &'static str,
    is_v6: bool,
    /// Time that the application asks for: since the last answer for a connection that is idle, else since the first byte.
    limit_ms: u64,
    /// Option before connect().
    before: Option<&'static str>,
    /// Steps of the client after both have greeted, before the peer dies.
    first: &'static [&'static str],
    /// Steps of the client after the peer has died.
    then: &'static [&'static str],
    /// Steps of the server after both have greeted. It waits for the end, too, if the case is about the server.
    server: &'static [&'static str],
    is_of_server: bool,
}

const CLIENT: Case = Case {
    name: "",
    server_pod: "far",
    is_v6: false,
    limit_ms: 4000,
    before: None,
    first: &[],
    then: &["wait-end"],
    server: &["read-end"],
    is_of_server: false,
};
const KEEP_ALIVE: &str = "keep-alive:3:1:3";
const USER_TIMEOUT: &str = "user-timeout:4000";

const CASES: [Case; 13] = [
    Case { limit_ms: 6000, name: "keep-alive before connect()", before: Some(KEEP_ALIVE), ..CLIENT },
    Case { limit_ms: 6000, name: "keep-alive after connect()", first: &["set:keep-alive:3:1:3"], ..CLIENT },
    Case {
        limit_ms: 6000,
        name: "keep-alive of the server",
        server: &["set:keep-alive:3:1:3", "wait-end"],
        is_of_server: true,
        ..CLIENT
    },
    Case {
        name: "keep-alive and a user timeout",
        before: Some(USER_TIMEOUT),
        first: &["set:keep-alive:2:1:9"],
        ..CLIENT
    },
    Case {
        name: "user timeout before connect(), upload",
        before: Some(USER_TIMEOUT),
        then: &["upload"],
        ..CLIENT
    },
    Case { name: "user timeout, upload", first: &["set:user-timeout:4000"], then: &["upload"], ..CLIENT },
    Case {
        name: "user timeout, a request",
        first: &["set:user-timeout:4000"],
        then: &["send:x", "wait-end"],
        ..CLIENT
    },
    Case {
        name: "user timeout of the server, an answer",
        server: &["set:user-timeout:4000", "send:x", "wait-end"],
        is_of_server: true,
        ..CLIENT
    },
    Case {
        limit_ms: 6000,
        name: "keep-alive, IPv6",
        is_v6: true,
        first: &["set:keep-alive:3:1:3"],
        ..CLIENT
    },
    Case {
        name: "user timeout of the server, an answer, IPv6",
        is_v6: true,
        server: &["set:user-timeout:4000", "send:x", "wait-end"],
        is_of_server: true,
        ..CLIENT
    },
    Case {
        name: "user timeout, a request, IPv6",
        is_v6: true,
        before: Some(USER_TIMEOUT),
        then: &["send:x", "wait-end"],
        ..CLIENT
    },
    Case {
        limit_ms: 6000,
        name: "keep-alive, plaintext",
        server_pod: "plain",
        before: Some(KEEP_ALIVE),
        ..CLIENT
    },
    Case {
        name: "user timeout, a request, plaintext",
        server_pod: "plain",
        before: Some(USER_TIMEOUT),
        then: &["send:x", "wait-end"],
        ..CLIENT
    },
];

#[test]
#[ignore = "needs root"]
fn a_connection_ends_in_the_time_that_its_application_asked_for() -> Result<()> {
    let (without, _) = lose_peers(&plan("lost").without_agents()?)?;
    let (with, waited_ms) = lose_peers(&plan("lostt").with_agents()?)?;
    let mut differences = Vec::new();
    for ((case, without), with) in CASES.iter().zip(&without).zip(&with) {
        let text = format!("{}: {without} without, {with} with", case.name);
        println!("{text}");
        let [without_ms, with_ms] = [without, with].map(|ended| ended["ms"].as_u64().unwrap_or(u64::MAX));
        let is_same = without["error"] == "TimedOut"
            && with["error"] == without["error"]
            && with_ms <= without_ms.max(case.limit_ms) + LATE_MS
            && with_ms + waited_ms + EARLY_MS >= case.limit_ms;
        if !is_same {
            differences.push(text);
        }
    }
    ensure!(differences.is_empty(), "{differences:#?}");
    Ok(())
}

/// Runs all cases at once. Returns how each connection ended, and the most milliseconds for which one was idle before.
fn lose_peers(mesh: &Mesh) -> Result<(Vec<Value>, u64)> {
    let begun = Instant::now();
    let mut connections = Vec::new();
    for case in CASES {
        let pod = mesh.pod(case.server_pod)?;
        let at =
            SocketAddr::new(if case.is_v6 { pod.ipv6().into() } else { pod.ipv4().into() }, fresh_port());
        let server_steps = [&["line", "send:hello", "line", "pause"], case.server].concat();
        let server = Client::with_args(pod, &[&["serve", &at.to_string()], &server_steps[..]].concat())?;
        server.events().first("listening")?;
        let option = case.before.map_or(Vec::new(), |option| vec!["--set", option]);
        let steps = [&GREET[..], case.first, &["send:ready", "pause"], case.then].concat();
        let client = Client::with_args(
            mesh.pod("client")?,
            &[&["connect", &at.to_string()], &option[..], &steps[..]].concat(),
        )?;
        client.events().first("line")?;
        server.events().nth("line", 1)?;
        connections.push((case, server, client));
    }
    for pod in ["client", "far", "plain"] {
        until("everything is acknowledged", || Ok(is_acknowledged(mesh.pod(pod)?)?.then_some(())))?;
    }
    cut(mesh)?;
    let waited_ms = u64::try_from(begun.elapsed().as_millis())?;
    for (_, server, client) in &mut connections {
        server.proceed()?;
        client.proceed()?;
    }
    let end = |(case, server, client): &(Case, Client, Client)| {
        let of = if case.is_of_server { server } else { client };
        of.events().first("ended").with_context(|| case.name)
    };
    Ok((connections.iter().map(end).collect::<Result<_>>()?, waited_ms))
}

#[test]
#[ignore = "needs root"]
fn an_outage_that_is_shorter_than_the_limit_ends_nothing() -> Result<()> {
    for mesh in [plan("short").without_agents()?, plan("shortt").config("tunnelTimeout: 8s\n").with_agents()?]
    {
        let far = mesh.pod("far")?;
        let server = Server::start(far, SocketAddr::new(far.ipv4().into(), fresh_port()), &["echo"])?;
        let start = |steps: &[&str]| {
            let client = Client::start(mesh.pod("client")?, server.address(), &[&GREET[..], steps].concat())?;
            client.events().first("line")?;
            anyhow::Ok(client)
        };
        let mut idle = start(&["pause", "send:again", "shut", "read-end"])?;
        let mut busy = start(&["pause", "send:lost", "line", "shut", "read-end"])?;
        // It asks for more than the outage, and keeps its options.
        let asks = ["limits", "pause", "send:lost", "line", "limits", "shut", "read-end"];
        let mut asks = start(&[&["set:keep-alive:9:8:7", "set:user-timeout:60000"], &asks[..]].concat())?;
        asks.events().first("limits")?;
        // It sets one option during the outage, and keeps the others.
        let sets = ["limits", "pause", "send:lost", "pause", "limits", "set:user-timeout:50000", "limits"];
        let mut sets = start(&[&sets[..], &["line", "limits", "shut", "read-end"]].concat())?;
        sets.events().first("limits")?;
        cut(&mesh)?;
        busy.proceed()?;
        asks.proceed()?;
        sets.proceed()?;
        // An outage lasts for a time, whatever happens in it.
        let begun = Instant::now();
        until("the outage lasts", || Ok((begun.elapsed() >= OUTAGE).then_some(())))?;
        sets.proceed()?;
        let during = sets.events().nth("limits", 1)?;
        ensure!(during["keep_alive"] == mesh.has_tacit(), "Tacit {}: {during}", mesh.has_tacit());
        sets.events().nth("limits", 2)?;
        heal(&mesh)?;
        idle.proceed()?;
        let (mut before, after) = (sets.events().nth("limits", 0)?, sets.events().nth("limits", 3)?);
        before["user_timeout_ms"] = 50_000.into();
        ensure!(before == after, "Tacit {}: {before} before, {after} after", mesh.has_tacit());
        let (before, after) = (asks.events().nth("limits", 0)?, asks.events().nth("limits", 1)?);
        ensure!(before == after, "Tacit {}: {before} before, {after} after", mesh.has_tacit());
        for client in [idle, busy, asks, sets] {
            let events = client.finish()?;
            ensure!(
                events.iter().any(|event| event["end"] == "eof"),
                "Tacit {}: {events:?}",
                mesh.has_tacit()
            );
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_black_hole_under_load_ends_by_the_limit() -> Result<()> {
    let limit_ms = 5000;
    let mesh = plan("hole").config("tunnelTimeout: 5s\n").with_agents()?;
    let far = mesh.pod("far")?;
    let server = Server::start(
        far,
        SocketAddr::new(far.ipv4().into(), fresh_port()),
        &["line", "send:hello", "read-end"],
    )?;
    let mut clients = Vec::new();
    for then in [&["upload"][..], &["send:x", "wait-end"]] {
        let steps = [&GREET[..], &["pause"], then].concat();
        let client = Client::start(mesh.pod("client")?, server.address(), &steps)?;
        client.events().first("line")?;
        clients.push(client);
    }
    cut(&mesh)?;
    for mut client in clients {
        client.proceed()?;
        let ended = client.events().first("ended")?;
        let ms = ended["ms"].as_u64().context("ms")?;
        ensure!(ended["error"] == "TimedOut" && ms + EARLY_MS >= limit_ms, "{ended}");
    }
    Ok(())
}

/// The kernel's side of the application keeps the time, so a new connection ends as without Tacit, and the sessions of the pool are
/// not used again.
#[test]
#[ignore = "needs root"]
fn a_new_connection_to_a_dead_node_does_not_wait_for_a_session_of_the_pool() -> Result<()> {
    let mesh = plan("pooled").with_agents()?;
    let far = mesh.pod("far")?;
    let server = Server::start(far, SocketAddr::new(far.ipv4().into(), fresh_port()), &["echo"])?;
    let idle = || observe::metric(mesh.agent("a")?, "tacit_pool_idle_sessions", &[]);
    Client::echo(mesh.pod("client")?, server.address(), "first")?;
    until("a session is idle", || Ok((idle()? > 0).then_some(())))?;
    cut(&mesh)?;
    let address = server.address().to_string();
    let events =
        Client::with_args(mesh.pod("client")?, &["probe", &address, "send-timeout:3000"])?.finish()?;
    let seen = events.iter().find(|event| event["event"] == "probe").context("probe")?;
    ensure!(seen["connect"] == "EINPROGRESS", "{seen}");
    ensure!(idle()? == 0, "a session to a dead node is kept");
    heal(&mesh)?;
    Client::echo(mesh.pod("client")?, server.address(), "last")
}

/// A session of the pool is silent for longer than its peer is waited for, and the peer lives. Whichever session opens the
/// connection in the end, the application at the far end accepts one.
#[test]
#[ignore = "needs root"]
fn a_connection_that_begins_in_an_outage_is_accepted_once() -> Result<()> {
    let mesh = plan("once").with_agents()?;
    let (client, far) = (mesh.pod("client")?, mesh.pod("far")?);
    let server = Server::start(far, SocketAddr::new(far.ipv4().into(), fresh_port()), &["echo"])?;
    let idle = || observe::metric(mesh.agent("a")?, "tacit_pool_idle_sessions", &[]);
    for outage in 1..=3 {
        Client::echo(client, server.address(), "before")?;
        until("a session is idle", || Ok((idle()? > 0).then_some(())))?;
        cut(&mesh)?;
        let begun = Client::start(client, server.address(), &["send:hello", "line"])?;
        until("another session is tried", || Ok(is_another_session_tried(client)?.then_some(())))?;
        heal(&mesh)?;
        let events = begun.finish()?;
        ensure!(events.iter().any(|event| event["text"] == "hello"), "{events:?}");
        // A connection by what was sent before the outage would be there by the end of this one.
        Client::echo(client, server.address(), "after")?;
        until("nothing waits to be sent", || Ok(is_acknowledged(client)?.then_some(())))?;
        assert_eq!(server.accepted()?, 3 * outage, "outage {outage}");
    }
    Ok(())
}

/// Returns true if a SYN is on its way to the tunnel port of another pod.
fn is_another_session_tried(pod: &Pod) -> Result<bool> {
    const SYN_SENT: &str = "02";
    let port = format!(":{:04X}", tcp_port::TUNNEL);
    let table = pod.netns().enter(|| fs::read_to_string("/proc/thread-self/net/tcp"))??;
    Ok(table.lines().skip(1).any(|line| {
        let columns: Vec<_> = line.split_whitespace().collect();
        columns.get(2).is_some_and(|remote| remote.ends_with(&port)) && columns.get(3) == Some(&SYN_SENT)
    }))
}

#[test]
#[ignore = "needs root"]
fn a_connection_with_the_shortest_keep_alive_lives_on() -> Result<()> {
    let mut mesh = plan("lives").config("drainTimeout: 10m\n").with_agents()?;
    let (far, near) = (mesh.pod("far")?, mesh.pod("near")?);
    let mut clients = Vec::new();
    for pod in [far, near] {
        for address in [pod.ipv4().into(), pod.ipv6().into()] {
            let at = SocketAddr::new(address, fresh_port());
            let server = Client::with_args(
                pod,
                &["serve", &at.to_string(), SHORTEST, "line", "send:hello", "line", "send:bye", "read-end"],
            )?;
            server.events().first("listening")?;
            let steps =
                [&[SHORTEST], &GREET[..], &["pause", "send:again", "line", "shut", "read-end"]].concat();
            let client = Client::start(mesh.pod("client")?, at, &steps)?;
            client.events().first("line")?;
            clients.push((server, client));
        }
    }
    let held =
        |agent: &Agent| observe::metric(agent, "tacit_kernel_verdicts_total", &[("reason", "probe_held")]);
    let begun = Instant::now();
    until("probes are held", || Ok((held(mesh.agent("a")?)? > 8).then_some(())))?;
    let mut next = mesh.agent("a")?.start_standby(mesh.topology().node("a")?, "next")?;
    until("the next agent stands by", || {
        Ok(observe::status(&next).is_ok_and(|status| status["state"] == "standing_by").then_some(()))
    })?;
    mesh.agent("a")?.send_sigterm()?;
    observe::wait_enrolled(&next)?;
    next.wait_ready()?;
    let before = held(&next)?;
    until("probes are held for the next agent", || {
        Ok((begun.elapsed() > LIVES && held(&next)? > before + 8).then_some(()))
    })?;
    for (_server, mut client) in clients {
        client.proceed()?;
        let events = client.finish()?;
        ensure!(events.iter().any(|event| event["text"] == "bye"), "{events:?}");
    }
    ensure!(mesh.agent_mut("a")?.wait_end()?.success(), "{}", mesh.agent("a")?.log()?);
    Ok(())
}

/// The end of a connection that has ended its direction waits for a slow answer. Neither end's kernel sends a probe that is asked for
/// then.
#[test]
#[ignore = "needs root"]
fn a_half_closed_connection_with_the_shortest_keep_alive_lives_on() -> Result<()> {
    // A policy of the server has its agent carry plaintext to it.
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: all, namespace: shop}\n\
                  spec: {selector: {matchLabels: {app: far}}, rules: [{}]}\n";
    for mesh in [plan("half").without_agents()?, plan("halft").policy(policy).with_agents()?] {
        let mut connections = Vec::new();
        for (from, to) in [("client", "plain"), ("plain", "far"), ("client", "far"), ("client", "near")] {
            let pod = mesh.pod(to)?;
            let at = SocketAddr::new(pod.ipv4().into(), fresh_port());
            let server = Client::with_args(
                pod,
                &["serve", &at.to_string(), SHORTEST, "line", "send:hello", "read-end", "pause", "send:bye"],
            )?;
            server.events().first("listening")?;
            let steps = [&[SHORTEST], &GREET[..], &["shut", "read-end"]].concat();
            let client = Client::start(mesh.pod(from)?, at, &steps)?;
            server.events().first("end")?;
            connections.push((from, to, server, client));
        }
        let begun = Instant::now();
        until("the answers are slow", || Ok((begun.elapsed() > LIVES).then_some(())))?;
        for (from, to, mut server, client) in connections {
            server.proceed()?;
            let events = client.finish()?;
            let is_answered = events.iter().any(|event| event["text"] == "bye\n" && event["end"] == "eof");
            ensure!(is_answered, "Tacit {}, {from} to {to}: {events:?}", mesh.has_tacit());
        }
    }
    Ok(())
}

/// Returns true if no connection of the pod has bytes in flight. An acknowledgement can be delayed, and then be lost with the node.
fn is_acknowledged(pod: &Pod) -> Result<bool> {
    let tables = pod.netns().enter(|| {
        ["tcp", "tcp6"]
            .map(|name| fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default())
    })?;
    // The fifth column has the bytes of both queues, of listeners the numbers of connections.
    let queued = |line: &str| line.split_whitespace().nth(4).map(|queues| !queues.starts_with("00000000:"));
    Ok(!tables.iter().flat_map(|table| table.lines().skip(1)).any(|line| queued(line) == Some(true)))
}

/// Drops everything between pod client and the pods of node b.
fn cut(mesh: &Mesh) -> Result<()> {
    routes(mesh, "add")
}

/// Ends what [`cut`] has begun.
fn heal(mesh: &Mesh) -> Result<()> {
    routes(mesh, "del")
}

fn routes(mesh: &Mesh, action: &str) -> Result<()> {
    for (node, pod) in [("a", "far"), ("a", "plain"), ("b", "client")] {
        let pod = mesh.pod(pod)?;
        for to in [pod.ipv4().to_string(), pod.ipv6().to_string()] {
            let mut ip = mesh.topology().node(node)?.command("ip")?;
            let status = ip.args(["route", action, "blackhole", &to]).status()?;
            ensure!(status.success(), "route {action} blackhole {to}: {status}");
        }
    }
    Ok(())
}

fn plan(tag: &str) -> Plan {
    let plan = Plan::new(tag).pod("a", "shop", "client").pod("a", "shop", "near");
    plan.pod("b", "shop", "far").outside("b", "shop", "plain")
}

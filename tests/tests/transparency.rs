//! System calls as applications see them: with Tacit they return the same as without.
//!
//! Each row is one connection, described by what its program calls (see `tacit-peer`'s `probe`) and by what it meets. All rows
//! run in a mesh without agents and in one with agents, and what every call returned is compared. A difference that is
//! meant stands in the table with its reason.

#[path = "transparency/source_ports.rs"]
mod source_ports;
#[path = "transparency/urgent_data.rs"]
mod urgent_data;

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4},
    sync::OnceLock,
    thread::{self, ScopedJoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tacit_abi::{limits::CAPTURED_PER_POD, tcp_port};
use tacit_tests::{Client, Mesh, Plan, Server, fresh_port, observe, raw::Segments};
use tacit_topology::{Pod, WorkloadEntry, until};

/// Repetitions of a SYN in the client's pod: `connect()` gives up after some three seconds instead of two minutes.
const SYN_RETRIES: &str = "1";
/// Addresses of pods of node b that its routes lead nowhere. The directory knows the first of each kind.
const REJECTED: [&str; 4] = ["10.77.2.201", "fd77:2::201", "10.77.2.211", "fd77:2::211"];
const SWALLOWED: [&str; 4] = ["10.77.2.202", "fd77:2::202", "10.77.2.212", "fd77:2::212"];
/// Connections of a flood: more than a pod may open at a time, and fewer than there are ports.
const FLOOD: u64 = 6000;
/// Connections that end before their ports are looked at.
const SHORT: usize = 50;
/// Ports that the kernel chooses from by default.
const EPHEMERAL: std::ops::RangeInclusive<u16> = 32_768..=60_999;
/// A port that policies deny.
const DENIED: u16 = 81;
/// A difference of times that says nothing on a loaded machine.
const NOISE_MS: u64 = 1500;

/// Destination of a connection.
#[derive(Debug, Clone, Copy)]
enum To {
    /// An address of the pod, with a server that runs these steps.
    Server(&'static str, Family, &'static [&'static str]),
    /// An address of the pod, at a port on which nobody listens.
    Closed(&'static str, Family),
    /// Such an address, with a full backlog.
    Deaf(&'static str),
    /// An address that no server has.
    Nobody(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
    Mapped,
}
use Family::{Mapped, V4, V6};

const ALL: [Family; 3] = [V4, V6, Mapped];

/// Speaks first, and then reads what comes.
const SPEAKS: &[&str] = &["send:220 ready", "read-end"];
/// Answers a line.
const ANSWERS: &[&str] = &["line", "send:hi", "read-end"];

#[test]
#[ignore = "needs root"]
fn connections_to_open_ports() -> Result<()> {
    for pod in ["far", "near"] {
        for family in ALL {
            for way in ["blocking", "epoll", "listen", "send-timeout:5000", "user-timeout:5000"] {
                same(way, To::Server(pod, family, SPEAKS))?;
            }
            for way in ["speak", "fast-open"] {
                same(way, To::Server(pod, family, ANSWERS))?;
            }
            same("twice", To::Server(pod, family, &["read-end"]))?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn connections_to_closed_ports_are_refused() -> Result<()> {
    for pod in ["far", "near", "client"] {
        for family in ALL {
            for way in ["blocking", "epoll", "twice", "fast-open", "send-timeout:5000", "user-timeout:5000"] {
                let seen = same(way, To::Closed(pod, family))?;
                let call = if way == "fast-open" { "sendto" } else { "connect" };
                let refused = [&seen[call], &seen["error"]].iter().any(|error| **error == "ECONNREFUSED");
                ensure!(refused, "{way} {pod} {family:?}: {seen}");
            }
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn connections_to_hosts_that_a_router_rejects_are_unreachable() -> Result<()> {
    for address in REJECTED {
        // The router of this test answers while connect() still runs. The kernel then fails only a later SYN, and a waiting
        // connect() alone shows how it ends.
        let seen = same("blocking", To::Nobody(address))?;
        let expected = if address.contains(':') { "ENETUNREACH" } else { "EHOSTUNREACH" };
        ensure!(seen["connect"] == expected, "{address}: {seen}");
        let seen = run_probe(with_tacit()?, SocketAddr::new(address.parse()?, 80), "epoll")?;
        ensure!(seen["error"] == expected && seen["peer"] == "ENOTCONN", "{address}: {seen}");
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn connections_to_hosts_that_do_not_answer_time_out() -> Result<()> {
    at_once(SWALLOWED, |address| {
        for way in ["blocking", "epoll"] {
            let seen = same(way, To::Nobody(address))?;
            let expected = [&seen["connect"], &seen["error"]].iter().any(|error| **error == "ETIMEDOUT");
            ensure!(expected, "{way} {address}: {seen}");
        }
        same("send-timeout:700", To::Nobody(address))?;
        same("user-timeout:700", To::Nobody(address))?;
        same("early-shutdown", To::Nobody(address))?;
        let seen = same("pending", To::Nobody(address))?;
        ensure!(seen["pending"] == true, "{seen}");
        Ok(())
    })
}

#[test]
#[ignore = "needs root"]
fn connections_to_a_full_backlog_time_out() -> Result<()> {
    at_once(["far", "near"], |pod| {
        let seen = same("blocking", To::Deaf(pod))?;
        ensure!(seen["connect"] == "ETIMEDOUT", "{pod}: {seen}");
        same("send-timeout:700", To::Deaf(pod)).map(drop)
    })
}

/// Compares connections to several destinations at the same time, since all they do is wait.
fn at_once<const N: usize>(
    destinations: [&'static str; N],
    compare: impl Fn(&'static str) -> Result<()> + Sync,
) -> Result<()> {
    thread::scope(|scope| {
        let compare = &compare;
        let running = destinations.map(|destination| scope.spawn(move || compare(destination)));
        running.map(joined).into_iter().collect()
    })
}

fn joined<T>(thread: ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|_| bail!("a comparison has panicked"))
}

/// Without Tacit there is no policy, so the same connection succeeds there.
#[test]
#[ignore = "needs root"]
fn connections_that_policy_denies_are_refused() -> Result<()> {
    for (pod, family) in [("far", V4), ("far", V6), ("near", V4), ("near", Mapped)] {
        for way in ["blocking", "epoll"] {
            let to = To::Server(pod, family, SPEAKS);
            let control = probe(without_tacit()?, way, to, DENIED)?;
            ensure!(control["peer"] != "ENOTCONN", "{control}");
            let seen = probe(with_tacit()?, way, to, DENIED)?;
            let errors = [&seen["connect"], &seen["error"]];
            ensure!(errors.iter().any(|error| **error == "ECONNREFUSED"), "{way} {pod} {family:?}: {seen}");
        }
    }
    Ok(())
}

/// The agent keeps nothing of a connection that was closed before it was connected.
#[test]
#[ignore = "needs root"]
fn connections_that_are_closed_early_leave_nothing() -> Result<()> {
    let mesh = with_tacit()?;
    let held = || {
        let held = [("reason", "connect_held")];
        observe::metric(mesh.agent("a")?, "tacit_kernel_verdicts_total", &held)
    };
    for way in ["cancel", "linger-close", "early-shutdown", "send-timeout:200"] {
        let before = held()?;
        let seen = run_probe(mesh, SocketAddr::new(SWALLOWED[0].parse()?, 80), way)?;
        until(&format!("{way}: nothing is being opened, after {seen}"), || {
            Ok((observe::metric(mesh.agent("a")?, "tacit_flows_opening", &[])? == 0).then_some(()))
        })?;
        ensure!(held()? > before, "{way}: it was not held: {seen}");
    }
    Ok(())
}

/// Connections beyond the share of a pod are its own loss.
#[test]
#[ignore = "needs root"]
fn a_pod_that_floods_does_not_hold_up_others() -> Result<()> {
    let mesh = with_tacit()?;
    let agent = mesh.agent("a")?;
    let opening = || observe::metric(agent, "tacit_flows_opening", &[]);
    let to = SocketAddr::new(SWALLOWED[0].parse()?, 80).to_string();
    let mut flood = Client::with_args(mesh.pod("client")?, &["pending", &FLOOD.to_string(), &to])?;
    let share = u64::from(CAPTURED_PER_POD);
    let pending = flood.events().first("pending")?;
    // ENOBUFS.
    ensure!(pending["opened"] == share && pending["failures"]["105"] == FLOOD - share, "{pending}");
    until("many connections are being opened", || Ok((opening()? > share / 2).then_some(())))?;
    let far = mesh.pod("far")?;
    let server = Server::start(far, SocketAddr::new(far.ipv4().into(), fresh_port()), SPEAKS)?;
    let at = server.address().to_string();
    let events = Client::with_args(mesh.pod("near")?, &["probe", &at, "blocking"])?.finish()?;
    let seen = events.iter().find(|event| event["event"] == "probe").context("probe")?;
    ensure!(seen["connect"] == "ok", "{seen}");
    ensure!(seen["ms"].as_u64().context("ms")? < NOISE_MS, "{seen}");
    let at_most = opening()?;
    // That of pod near may still be counted.
    ensure!(at_most <= share + 1, "{at_most} connections of one pod");
    flood.proceed()?;
    flood.finish()?;
    until("nothing is being opened", || Ok((opening()? == 0).then_some(())))
}

/// The agent's connections to applications use ports of the pod, and keep them for a minute after their end.
#[test]
#[ignore = "needs root"]
fn ports_of_connections_that_have_ended_are_free_for_servers() -> Result<()> {
    for mesh in [without_tacit()?, with_tacit()?] {
        let far = mesh.pod("far")?;
        let server = Server::start(far, SocketAddr::new(far.ipv4().into(), fresh_port()), &["read-end"])?;
        for _ in 0..SHORT {
            Client::run(mesh.pod("client")?, server.address(), &["send:text", "shut", "read-end"])?;
        }
        server.events().nth("closed", SHORT - 1)?;
        let taken = far.netns().enter(|| EPHEMERAL.filter(|port| !may_listen(*port)).count())?;
        ensure!(taken == 0, "{taken} ports of pod far are taken, Tacit {}", mesh.has_tacit());
    }
    Ok(())
}

/// Listens as servers do, which set SO_REUSEADDR.
fn may_listen(port: u16) -> bool {
    let listen = || -> std::io::Result<()> {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from(([0, 0, 0, 0], port)).into())?;
        socket.listen(1)
    };
    listen().is_ok()
}

#[test]
#[ignore = "needs root"]
fn a_pod_that_asks_for_it_is_connected_early() -> Result<()> {
    let entries = |_: &str, mesh: &Mesh| {
        let mut entries = mesh.directory();
        entries.iter_mut().for_each(|entry| entry.connect = Some("early"));
        Ok(entries)
    };
    let mesh =
        Plan::new("early").pod("a", "shop", "client").pod("b", "shop", "far").with_directories(entries)?;
    let (far, port) = (mesh.pod("far")?, fresh_port());
    let seen = run_probe(&mesh, SocketAddr::new(far.ipv4().into(), port), "listen")?;
    ensure!(seen["connect"] == "ok" && seen["recv"] == "ECONNRESET", "{seen}");
    let _server = Server::start(far, SocketAddr::new(far.ipv4().into(), port), ANSWERS)?;
    let seen = run_probe(&mesh, SocketAddr::new(far.ipv4().into(), port), "speak")?;
    ensure!(seen["recv"] == 3, "{seen}");
    Ok(())
}

/// A connection that waits for its destination is refused when its agent is gone, as connections are without an agent.
#[test]
#[ignore = "needs root"]
fn a_connection_that_waits_ends_with_its_agent() -> Result<()> {
    let (mut mesh, _server, client) = waiting("killed")?;
    mesh.agent_mut("a")?.kill()?;
    let events = client.finish()?;
    ensure!(events.iter().any(|event| event["connect"] == "ECONNREFUSED"), "{events:?}");
    Ok(())
}

/// An agent that hands over ends what it has begun.
#[test]
#[ignore = "needs root"]
fn a_connection_that_waits_survives_a_handover() -> Result<()> {
    let (mut mesh, mut server, client) = waiting("nextone")?;
    let mut next = mesh.agent("a")?.start_standby(mesh.topology().node("a")?, "next")?;
    until("the next agent stands by", || {
        // The socket does not exist at first.
        Ok(observe::status(&next).is_ok_and(|status| status["state"] == "standing_by").then_some(()))
    })?;
    mesh.agent("a")?.send_sigterm()?;
    next.wait_ready()?;
    server.listener.proceed()?;
    let events = client.finish()?;
    ensure!(events.iter().any(|event| event["recv"] == 3), "{events:?}");
    ensure!(mesh.agent_mut("a")?.wait_end()?.success(), "{}", mesh.agent("a")?.log()?);
    Ok(())
}

/// A mesh in which a connection of pod client to pod far is being opened: the server's backlog is full.
fn waiting(tag: &str) -> Result<(Mesh, Full, Client)> {
    let mesh = Plan::new(tag).pod("a", "shop", "client").pod("b", "shop", "far").with_agents()?;
    let to = SocketAddr::new(mesh.pod("far")?.ipv4().into(), fresh_port());
    let full = fill(mesh.pod("far")?, to)?;
    let client = Client::with_args(mesh.pod("client")?, &["probe", &to.to_string(), "speak"])?;
    until("a connection is being opened", || {
        Ok((observe::metric(mesh.agent("a")?, "tacit_flows_opening", &[])? == 1).then_some(()))
    })?;
    Ok((mesh, full, client))
}

/// Returns what every call returned, which is the same without Tacit and with it.
fn same(way: &str, to: To) -> Result<Value> {
    let port = fresh_port();
    let (without, with) = (without_tacit()?, with_tacit()?);
    // At the same time, since most of a run is waiting.
    let run = |mesh| move || probe(mesh, way, to, port);
    let (without, with) = thread::scope(|scope| {
        let (without, with) = (scope.spawn(run(without)), scope.spawn(run(with)));
        (joined(without), joined(with))
    });
    let mut without = without.with_context(|| format!("{way} {to:?} without Tacit"))?;
    let mut with = with.with_context(|| format!("{way} {to:?} with Tacit"))?;
    let times = [&mut without, &mut with].map(|seen| seen["ms"].take().as_u64().unwrap_or_default());
    // The connect hook binds an IPv6 socket to the pod's address, which the kernel would choose too. It stays bound after a
    // connection that fails.
    if without["own"] == "::" && with["own"] == with_tacit()?.pod("client")?.ipv6().to_string() {
        with["own"] = without["own"].clone();
    }
    ensure!(with == without, "{way} {to:?}\nwithout Tacit: {without}\n   with Tacit: {with}");
    let [without_ms, with_ms] = times;
    ensure!(with_ms + NOISE_MS >= without_ms, "{way} {to:?}: {with_ms} ms instead of {without_ms}");
    // The agent waits up to a second for the directory to learn an unknown address, and a SYN is repeated meanwhile.
    let is_unknown = matches!(to, To::Nobody(address) if [REJECTED, SWALLOWED].iter().any(|all| all[2..].contains(&address)));
    ensure!(
        is_unknown || with_ms <= without_ms + NOISE_MS,
        "{way} {to:?}: {with_ms} ms instead of {without_ms}"
    );
    Ok(with)
}

/// Makes one connection and returns what its calls returned. The port of its own end is left out.
fn probe(mesh: &Mesh, way: &str, to: To, port: u16) -> Result<Value> {
    let at = |pod, family| anyhow::Ok(SocketAddr::new(address(mesh.pod(pod)?, family), port));
    let mut servers = Vec::new();
    let mut listeners = Vec::new();
    let to = match to {
        To::Server(pod, family, steps) => {
            let to = at(pod, family)?;
            servers.push(Server::start(
                mesh.pod(pod)?,
                SocketAddr::new(to.ip().to_canonical(), port),
                steps,
            )?);
            to
        }
        To::Closed(pod, family) => at(pod, family)?,
        To::Deaf(pod) => {
            let to = at(pod, V4)?;
            listeners.push(fill(mesh.pod(pod)?, to)?);
            to
        }
        To::Nobody(address) => SocketAddr::new(address.parse()?, port),
    };
    run_probe(mesh, to, way)
}

fn run_probe(mesh: &Mesh, to: SocketAddr, way: &str) -> Result<Value> {
    let events = Client::with_args(mesh.pod("client")?, &["probe", &to.to_string(), way])?.finish()?;
    let probe = events.iter().find(|event| event["event"] == "probe");
    probe.cloned().with_context(|| format!("no probe: {events:?}"))
}

/// A listener whose backlog is full, and the connections in it.
struct Full {
    listener: Client,
    _queued: Vec<std::net::TcpStream>,
}

/// Fills the backlog of a listener with connections from inside its pod, until one more is not answered.
fn fill(pod: &Pod, at: SocketAddr) -> Result<Full> {
    let listener = Client::with_args(pod, &[&["deaf", &at.to_string()], ANSWERS].concat())?;
    listener.events().first("listening")?;
    let queued = pod.netns().enter(|| {
        let connect = || std::net::TcpStream::connect_timeout(&at, Duration::from_millis(300)).ok();
        std::iter::from_fn(connect).take(16).collect::<Vec<_>>()
    })?;
    ensure!(queued.len() < 16, "the backlog is never full");
    Ok(Full { listener, _queued: queued })
}

fn address(pod: &Pod, family: Family) -> IpAddr {
    match family {
        V4 => pod.ipv4().into(),
        V6 => pod.ipv6().into(),
        Mapped => pod.ipv4().to_ipv6_mapped().into(),
    }
}

fn without_tacit() -> Result<&'static Mesh> {
    static MESH: OnceLock<Result<Mesh, String>> = OnceLock::new();
    Mesh::shared(&MESH, || prepared(plan().without_agents()?))
}

fn with_tacit() -> Result<&'static Mesh> {
    static MESH: OnceLock<Result<Mesh, String>> = OnceLock::new();
    Mesh::shared(&MESH, || prepared(plan().with_directories(|_, mesh| Ok(directory(mesh)))?))
}

/// Before Linux 6.19 the kernel can miss a connection's socket while it replaces that of the handshake, and then asks the steering
/// program as for a SYN. A segment that comes right after the end of a handshake looks the same to it.
#[test]
#[ignore = "needs root"]
fn a_segment_that_misses_the_socket_of_its_handshake_is_not_answered() -> Result<()> {
    let mesh = plan().with_agents()?;
    let agent = mesh.agent("a")?;
    let raced = || observe::metric(agent, "tacit_kernel_verdicts_total", &[("reason", "inbound_raced")]);
    let segments = mesh.pod("client")?.netns().enter(|| Segments::open(Ipv4Addr::LOCALHOST))??;
    let target = SocketAddrV4::new(Ipv4Addr::new(127, 1, 2, 3), tcp_port::CAPTURE);
    let mut ports = *EPHEMERAL.start()..;
    let mut next = || ports.next().context("a port");
    until("a segment that is not answered", || {
        let (without, with, last, before) = (next()?, next()?, next()?, raced()?);
        segments.send_ack(without, target)?;
        segments.send_syn(with, target)?;
        segments.send_ack(with, target)?;
        segments.send_ack(last, target)?;
        let resets = segments.resets_until(tcp_port::CAPTURE, last)?;
        ensure!(resets.contains(&without), "a segment without a handshake is answered: {resets:?}");
        // A machine that halts in between answers that with a handshake, too.
        Ok((!resets.contains(&with) && raced()? == before + 1).then_some(()))
    })
}

/// With SYN cookies the segment that ends the handshake has no socket. Kubernetes lets every pod set this sysctl.
#[test]
#[ignore = "needs root"]
fn a_pod_whose_kernel_sends_a_cookie_with_every_answer_is_connected() -> Result<()> {
    let mesh = Plan::new("cookies").pod("a", "shop", "client").pod("b", "shop", "far").with_agents()?;
    mesh.pod("client")?.netns().enter(|| fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2"))??;
    let far = mesh.pod("far")?;
    for (way, steps) in [("speak", ANSWERS), ("listen", SPEAKS)] {
        for family in ALL {
            let to = SocketAddr::new(address(far, family), fresh_port());
            let _server = Server::start(far, SocketAddr::new(to.ip().to_canonical(), to.port()), steps)?;
            let seen = run_probe(&mesh, to, way)?;
            ensure!(seen["connect"] == "ok" && seen["recv"].as_u64() > Some(0), "{way} {family:?}: {seen}");
        }
    }
    Ok(())
}

fn plan() -> Plan {
    let policy = ["far", "near"].map(|pod| {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: no-{pod}, namespace: shop}}\n\
             spec: {{action: DENY, selector: {{matchLabels: {{app: {pod}}}}}, rules: [{{to: [{{operation: {{ports: ['{DENIED}']}}}}]}}]}}\n"
        )
    });
    let plan = Plan::new("transp").policy(&policy.concat());
    plan.pod("a", "shop", "client").pod("a", "shop", "near").pod("b", "shop", "far")
}

/// The pods, and pods that have been there before.
fn directory(mesh: &Mesh) -> Vec<WorkloadEntry> {
    let mut entries = mesh.directory();
    let Some(far) = entries.iter().find(|entry| entry.name == "far").cloned() else { return entries };
    for (name, [v4, v6, ..]) in [("rejected", REJECTED), ("swallowed", SWALLOWED)] {
        let addresses = [v4, v6].iter().filter_map(|text| text.parse().ok()).collect();
        // No agent waits for pods of a third node.
        entries.push(WorkloadEntry { name: name.to_owned(), addresses, node: "c".to_owned(), ..far.clone() });
    }
    entries
}

/// Has connections of the client fail early, and the routes of node b lead nowhere for some addresses.
fn prepared(mesh: Mesh) -> Result<Mesh> {
    mesh.pod("client")?.netns().enter(|| fs::write("/proc/sys/net/ipv4/tcp_syn_retries", SYN_RETRIES))??;
    let node = mesh.topology().node("b")?;
    for (kind, addresses) in [("unreachable", REJECTED), ("blackhole", SWALLOWED)] {
        for address in addresses {
            let status = node.command("ip")?.args(["route", "add", kind, address]).status()?;
            ensure!(status.success(), "route {kind} {address}: {status}");
        }
    }
    Ok(mesh)
}

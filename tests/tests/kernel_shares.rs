//! Each pod's share of the kernel's tables: a pod that uses up its own share fails alone.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs, io,
    net::{IpAddr, SocketAddr},
    process::Command,
};
use tacit_abi::{
    LOOPBACK_UNSENT_BYTES,
    limits::{CAPTURED_PER_POD, DIALLED_PER_POD, PORT_MODES_PER_POD},
};
use tacit_tests::{Client, Mesh, Plan, Server, agent_program, fresh_port, observe, scaled};
use tacit_topology::{Agent, Pod, WorkloadEntry, until};

/// Accept queue of the greedy pod's listeners, in connections. With a short one few connections fill it.
const ACCEPT_QUEUE: u64 = 128;
/// Connections that the greedy pod opens at once: more than its share and the accept queue.
const GREEDY: u64 = CAPTURED_PER_POD as u64 + ACCEPT_QUEUE + 64;
/// Connections of a client at once to an application of the greedy pod: more than the share and the accept queue.
const DIALS: u64 = DIALLED_PER_POD as u64 + ACCEPT_QUEUE + 64;
/// Connections of the victim meanwhile.
const VICTIM: u64 = 100;
const ENETUNREACH: &str = "101";
const ENOBUFS: &str = "105";

fn plan(tag: &str) -> Plan {
    // The agent is paused for a while, and the kernel must not notice.
    Plan::new(tag)
        .pod("a", "mallory", "greedy")
        .pod("a", "bank", "victim")
        .pod("b", "bank", "server")
        .config("heartbeatTimeout: 60s\n")
}

/// Before the agent opens its listeners there, since `listen` reads the bound.
fn shorten_accept_queue(mesh: &Mesh) -> Result<()> {
    let queue = ACCEPT_QUEUE.to_string();
    Ok(mesh.pod("greedy")?.netns().enter(|| fs::write("/proc/sys/net/core/somaxconn", queue))??)
}

#[test]
#[ignore = "needs root"]
fn pending_connections_of_one_pod_stop_at_its_share() -> Result<()> {
    let mesh = plan("kshare").with_directories(|_, mesh| {
        shorten_accept_queue(mesh)?;
        Ok(mesh.directory())
    })?;
    let (agent, greedy, victim) = (mesh.agent("a")?, mesh.pod("greedy")?, mesh.pod("victim")?);
    for is_v4 in [true, false] {
        let server = serve(&mesh, is_v4)?;
        let to = server.address();
        // Each is a handshake of both agents, which have 10 s for all of them.
        let flows_count = scaled(VICTIM)?;
        // A place that is not given back would be missed after one share.
        let many = scaled(if is_v4 { 10_000 } else { 2_000 })?;
        let events =
            Client::with_args(greedy, &["sequence", &many.to_string(), &to.to_string()])?.finish()?;
        let sequence = event(&events, "sequence")?;
        ensure!(sequence["echoed"] == many, "{sequence}");
        wait_unused(agent)?;
        pause(agent)?;
        let checked = (|| {
            // A connection that waits gives its place back when its socket closes, in whatever way.
            let first = flood(greedy, to, true)?;
            let beside = pending(victim, to, VICTIM)?;
            ensure!(beside.opened == VICTIM, "the victim: {:?}", beside.failures);
            close(first)?;
            drop(flood(greedy, to, false)?);
            let last = flood(greedy, to, false)?;
            // Blocking connects, whose echoes come when the agent goes on.
            let flows = Client::with_args(victim, &["flows", &flows_count.to_string(), &to.to_string()])?;
            Ok((last, beside.client, flows))
        })();
        agent.resume()?;
        let (last, beside, flows) = checked?;
        let echoed = event(&flows.finish()?, "flows")?;
        ensure!(echoed["echoed"] == flows_count, "the victim's flows: {echoed}");
        // Some are open at the client alone, since the kernel answered with SYN cookies. Their end is accepted late.
        [last, beside].into_iter().try_for_each(close)?;
        wait_unused(agent)?;
        let denied = observe::metric(agent, "tacit_kernel_verdicts_total", &[("reason", "connect_share")])?;
        let refused =
            share(&observe::status(agent)?, "pending_connections").and_then(|s| s["refused"].as_u64());
        ensure!(denied > 0 && refused.is_some_and(|refused| refused >= denied), "{refused:?} of {denied}");
    }
    Ok(())
}

/// Opens more connections than the share, and checks which fail. `with_queue` if the accept queue is empty before.
fn flood(pod: &Pod, to: SocketAddr, with_queue: bool) -> Result<Client> {
    let Opened { client, opened, failures } = pending(pod, to, GREEDY)?;
    let failed = failures.get(ENOBUFS).copied().unwrap_or(0);
    ensure!(failures.len() == 1 && opened + failed == GREEDY, "{opened} opened, {failures:?}");
    // The kernel takes one connection more than the queue has places.
    let share = u64::from(CAPTURED_PER_POD);
    let expected = if with_queue { share..=share + ACCEPT_QUEUE + 1 } else { share..=share };
    ensure!(expected.contains(&opened), "{opened} opened, expected {expected:?}");
    Ok(client)
}

/// Stops the agent, and waits until no thread of it accepts any more.
fn pause(agent: &Agent) -> Result<()> {
    agent.pause()?;
    let threads = format!("/proc/{}/task", agent.id().context("no process")?);
    until("all threads of the agent stopped", || {
        let is_stopped = |thread: io::Result<fs::DirEntry>| -> Result<bool> {
            Ok(fs::read_to_string(thread?.path().join("status"))?.contains("State:\tT"))
        };
        let all: Vec<bool> = fs::read_dir(&threads)?.map(is_stopped).collect::<Result<_>>()?;
        Ok(all.iter().all(|stopped| *stopped).then_some(()))
    })
}

/// Connections that an application has not accepted fill the share of its pod. The next ones used to reach it as connections of
/// its own pod.
#[test]
#[ignore = "needs root"]
fn connections_beyond_the_share_of_dials_are_refused_and_no_client_is_false() -> Result<()> {
    let plan = Plan::new("kdials").pod("a", "mallory", "greedy").pod("a", "bank", "victim");
    let mesh = plan.with_directories(|_, mesh| {
        shorten_accept_queue(mesh)?;
        // Connections that wait for the application would use up the client's own share before that of dials.
        let early = |entry: WorkloadEntry| match &*entry.name {
            "victim" => WorkloadEntry { connect: Some("early"), ..entry },
            _ => entry,
        };
        Ok(mesh.directory().into_iter().map(early).collect())
    })?;
    let (agent, greedy, victim) = (mesh.agent("a")?, mesh.pod("greedy")?, mesh.pod("victim")?);
    let dials = |field: &str| -> Result<u64> {
        let status = observe::status(agent)?;
        share(&status, "pending_dials").and_then(|share| share[field].as_u64()).context("pending_dials")
    };
    for is_v4 in [true, false] {
        let (own, client): (IpAddr, IpAddr) = if is_v4 {
            (greedy.ipv4().into(), victim.ipv4().into())
        } else {
            (greedy.ipv6().into(), victim.ipv6().into())
        };
        let to = SocketAddr::new(own, fresh_port());
        let mut server = Client::with_args(greedy, &["serve", "--after-line", &to.to_string(), "echo"])?;
        server.events().first("listening")?;
        // Another application of the pod, which accepts at once.
        let beside = Server::start(greedy, SocketAddr::new(own, fresh_port()), &["echo"])?;
        Client::echo(victim, beside.address(), "control")?;
        let before = dials("refused")?;
        let flows = Client::with_args(victim, &["flows", &DIALS.to_string(), &to.to_string()])?;
        until("connections beyond the share", || Ok((dials("refused")? > before).then_some(())))?;
        ensure!(
            Client::echo(victim, beside.address(), "beyond").is_err(),
            "the share is the pod's, not a port's"
        );
        ensure!(beside.accepted()? == 1, "only the control reached the application");
        // SYNs that the full accept queue lost are sent again.
        server.proceed()?;
        let echoed = event(&flows.finish()?, "flows")?["echoed"].as_u64().context("echoed")?;
        ensure!(ACCEPT_QUEUE < echoed && echoed < DIALS, "{echoed} echoed");
        wait_unused(agent)?;
        let last = Client::start(victim, to, &["send:last", "shut", "read-end"])?;
        let local = last.events().first("connected")?["local"].as_str().context("local")?.to_owned();
        until("the last connection", || {
            Ok(server.events().so_far().iter().any(|event| event["peer"] == local).then_some(()))
        })?;
        let accepted = server.events().so_far();
        let accepted: Vec<_> = accepted.iter().filter(|event| event["event"] == "accepted").collect();
        ensure!(accepted.len() as u64 > echoed, "{} accepted, {echoed} echoed", accepted.len());
        for event in accepted {
            let peer: SocketAddr = event["peer"].as_str().context("peer")?.parse()?;
            ensure!(peer.ip() == client, "a false client: {event}");
        }
    }
    let refused = dials("refused")?;
    ensure!(observe::refused(agent, "pending_dials")? == refused, "{refused} by the kernel");

    let others: Vec<_> = mesh.directory().into_iter().filter(|entry| entry.name != "greedy").collect();
    agent.files().set_directory(&others)?;
    observe::wait_status(agent, "the pod has left", |status| pod(status, "greedy").is_none().then_some(()))?;
    ensure!(dials("refused")? == refused, "a count that only grows");
    Ok(())
}

/// The bound of unsent bytes that an application chose used to be replaced.
#[test]
#[ignore = "needs root"]
fn an_application_keeps_its_own_bound_of_unsent_bytes() -> Result<()> {
    let mesh = plan("kunsent").with_agents()?;
    for is_v4 in [true, false] {
        let server = serve(&mesh, is_v4)?;
        let to = server.address().to_string();
        let unsent = |options: &[&str]| -> Result<Option<u64>> {
            let arguments = [&["connect", &to], options, &["send:hello", "shut", "read-end"]].concat();
            let events = Client::with_args(mesh.pod("victim")?, &arguments)?.finish()?;
            Ok(event(&events, "connected")?["unsent_bytes"].as_u64())
        };
        ensure!(unsent(&["--unsent", "4096"])? == Some(4096));
        ensure!(unsent(&[])? == Some(LOOPBACK_UNSENT_BYTES.into()), "control: Tacit sets a bound");
    }
    Ok(())
}

fn wait_unused(agent: &Agent) -> Result<()> {
    observe::wait_status(agent, "no pending connection", |status| {
        (share(status, "pending_connections")?["used"] == 0 && share(status, "pending_dials")?["used"] == 0)
            .then_some(())
    })
}

fn share<'s>(status: &'s Value, resource: &str) -> Option<&'s Value> {
    status["shares"].as_array()?.iter().find(|share| share["resource"] == resource)
}

fn event(events: &[Value], name: &str) -> Result<Value> {
    events
        .iter()
        .find(|event| event["event"] == name)
        .cloned()
        .with_context(|| format!("no {name}: {events:?}"))
}

#[test]
#[ignore = "needs root"]
fn control_without_tacit_no_connection_fails_at_connect() -> Result<()> {
    let mesh = plan("ksharec").without_agents()?;
    shorten_accept_queue(&mesh)?;
    for is_v4 in [true, false] {
        let server = serve(&mesh, is_v4)?;
        for (name, count) in [("greedy", GREEDY), ("victim", VICTIM)] {
            let all = pending(mesh.pod(name)?, server.address(), count)?;
            ensure!(all.opened == count, "{name}: {:?}", all.failures);
            close(all.client)?;
        }
    }
    Ok(())
}

/// A socket that is bound to the pod's link cannot reach the agent on the loopback.
#[test]
#[ignore = "needs root"]
fn a_socket_that_is_bound_to_a_device_connects_or_fails_at_once() -> Result<()> {
    let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict, namespace: mallory}\n\
                  spec: {mtls: {mode: STRICT}}\n";
    for has_tacit in [true, false] {
        let plan = plan(if has_tacit { "kdev" } else { "kdevc" }).policy(strict);
        let mesh = if has_tacit { plan.with_agents()? } else { plan.without_agents()? };
        for is_v4 in [true, false] {
            let server = serve(&mesh, is_v4)?;
            for (name, device, is_strict) in [("greedy", "eth0", true), ("victim", "eth0", false)] {
                let arguments = ["sequence", "3", &server.address().to_string(), "--device", device];
                let events = Client::with_args(mesh.pod(name)?, &arguments)?.finish()?;
                let sequence =
                    events.iter().find(|event| event["event"] == "sequence").context("sequence")?;
                let fails = has_tacit && is_strict;
                let expected = if fails { (0, 3) } else { (3, 0) };
                let failures = sequence["failures"][ENETUNREACH].as_u64().unwrap_or(0);
                ensure!(
                    (sequence["echoed"].as_u64(), failures) == (Some(expected.0), expected.1),
                    "{name}, Tacit: {has_tacit}: {sequence}"
                );
            }
        }
        if has_tacit {
            let agent = mesh.agent("a")?;
            for reason in ["connect_device", "connect_device_clear"] {
                let counted = observe::metric(agent, "tacit_kernel_verdicts_total", &[("reason", reason)])?;
                ensure!(counted == 6, "{reason}: {counted}");
            }
        }
    }
    Ok(())
}

/// 16,384 ports used to fill the table of all pods, and another namespace's new policy was not applied.
#[test]
#[ignore = "needs root"]
fn port_modes_of_one_policy_do_not_keep_another_policy_from_the_kernel() -> Result<()> {
    let plan = Plan::new("kports")
        .pod("b", "mallory", "greedy")
        .pod("b", "bank", "victim")
        .pod("a", "bank", "client")
        .outside("a", "bank", "stranger");
    let mesh = plan.with_agents()?;
    let agent = mesh.agent("b")?;
    let stranger = mesh.pod("stranger")?;
    let open = |name: &str| -> Result<Server> {
        let pod = mesh.pod(name)?;
        Server::start(pod, SocketAddr::from((pod.ipv4(), fresh_port())), &["echo"])
    };
    let (greedy, victim) = (open("greedy")?, open("victim")?);
    for server in [&greedy, &victim] {
        Client::echo(stranger, server.address(), "before")?;
    }
    let ports = many_ports(16_384);
    agent.files().set_policy(&ports)?;
    let not_applied = observe::wait_status(agent, "the policy with many ports is not applied", |status| {
        pod(status, "greedy")?["policy_not_applied"].as_str().map(str::to_owned)
    })?;
    ensure!(not_applied.contains(&PORT_MODES_PER_POD.to_string()), "{not_applied}");
    let table = agent.status_table()?;
    ensure!(table.contains("policy not applied, STRICT until it is"), "{table}");
    ensure!(
        Client::echo(stranger, greedy.address(), "not applied").is_err(),
        "what is not applied must fail closed"
    );

    let rules = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict, namespace: bank}\n\
                 spec: {mtls: {mode: STRICT}}\n---\n\
                 apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: nobody, namespace: bank}\nspec: {}\n";
    agent.files().set_policy(&format!("{ports}---\n{rules}"))?;
    observe::wait_status(agent, "the victim's policy is in force", |status| {
        let victim = pod(status, "victim")?;
        (victim["mode"] == "STRICT"
            && victim["policies"][0] == "bank/nobody"
            && victim["policy_not_applied"].is_null())
        .then_some(())
    })?;
    ensure!(Client::echo(stranger, victim.address(), "strict").is_err());
    ensure!(Client::echo(mesh.pod("client")?, victim.address(), "denied").is_err());
    for (name, part) in [
        ("bank/victim", "STRICT takes no plaintext"),
        ("mallory/greedy", "The configured policy is not applied"),
    ] {
        let text = explain(agent, &stranger.ipv4().to_string(), name)?;
        ensure!(text.starts_with("DENY") && text.contains(part), "{name}: {text}");
    }

    agent.files().set_policy(&many_ports(PORT_MODES_PER_POD))?;
    observe::wait_status(agent, "a policy inside the share is applied", |status| {
        let greedy = pod(status, "greedy")?;
        let ports = greedy["port_modes"].as_object()?.len();
        (greedy["policy_not_applied"].is_null() && ports == PORT_MODES_PER_POD as usize).then_some(())
    })?;
    Client::echo(stranger, greedy.address(), "applied")
}

fn many_ports(count: u32) -> String {
    let mut text = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: ports, namespace: mallory}\n\
                    spec:\n  selector: {matchLabels: {app: greedy}}\n  portLevelMtls:\n"
        .to_owned();
    for port in 1..=count {
        let _ = writeln!(text, "    {port}: {{mode: DISABLE}}");
    }
    text
}

fn pod<'s>(status: &'s Value, name: &str) -> Option<&'s Value> {
    status["pods"].as_array()?.iter().find(|pod| pod["name"] == name)
}

fn explain(agent: &Agent, from: &str, to: &str) -> Result<String> {
    let mut command = Command::new(agent_program()?);
    command.args(["policy", "explain", from, to, "80", "--socket"]).arg(agent.files().socket());
    let output = command.output().context("start tacit policy explain")?;
    Ok(String::from_utf8([output.stdout, output.stderr].concat())?)
}

fn serve(mesh: &Mesh, is_v4: bool) -> Result<Server> {
    let pod = mesh.pod("server")?;
    let address = if is_v4 { pod.ipv4().into() } else { pod.ipv6().into() };
    Server::start(pod, SocketAddr::new(address, fresh_port()), &["echo"])
}

/// Connections that a client opened and keeps.
struct Opened {
    client: Client,
    opened: u64,
    /// Those that failed, by the number of their error.
    failures: BTreeMap<String, u64>,
}

/// Opens connections without waiting for any.
fn pending(pod: &Pod, to: SocketAddr, count: u64) -> Result<Opened> {
    let client = Client::with_args(pod, &["pending", &count.to_string(), &to.to_string()])?;
    let event = client.events().first("pending")?;
    let failures = event["failures"].as_object().context("failures")?;
    let failures =
        failures.iter().filter_map(|(error, count)| Some((error.clone(), count.as_u64()?))).collect();
    Ok(Opened { client, opened: event["opened"].as_u64().context("opened")?, failures })
}

fn close(mut client: Client) -> Result<()> {
    client.proceed()?;
    client.events().first("closed").map(drop)
}

//! Pods with a proxy of their own, such as the sidecar of another mesh: a program listens at a port that proxies use. A PERMISSIVE
//! pod of this kind is left alone, as without Tacit. A STRICT one is refused at once. The control run has no agents.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::net::{Ipv6Addr, SocketAddr};
use tacit_abi::tcp_port::{OF_PROXIES, TUNNEL};
use tacit_tests::{Client, Mesh, Plan, STRICT_MESH, Server, fresh_port, observe};
use tacit_topology::Pod;

/// A pod with a proxy: its name, the proxy's port, and what the proxy does on a connection.
type Proxied = (&'static str, u16, &'static [&'static str]);
/// One proxy at each port, and one that answers at once in a protocol of its own.
const PROXIED: [Proxied; 4] = [
    ("outbound", OF_PROXIES[0], &["echo"]),
    ("inbound", OF_PROXIES[1], &["echo"]),
    ("hbone", TUNNEL, &["read-end"]),
    ("talkative", TUNNEL, &["send:HTTP/1.1 400 Bad Request", "read-end"]),
];

fn plan(tag: &str) -> Plan {
    let plan = Plan::new(tag).pod("a", "shop", "client").pod("b", "shop", "near").pod("b", "shop", "server");
    PROXIED.iter().fold(plan, |plan, (name, ..)| plan.pod("b", "shop", name))
}

/// The program in each pod of [`PROXIED`].
fn start_proxies(mesh: &Mesh) -> Result<Vec<Server>> {
    let started = PROXIED.iter().map(|(name, port, steps)| {
        Server::start(mesh.pod(name)?, SocketAddr::from((Ipv6Addr::UNSPECIFIED, *port)), steps)
    });
    started.collect()
}

fn server(pod: &Pod, is_ipv4: bool) -> Result<Server> {
    let ip = if is_ipv4 { pod.ipv4().into() } else { pod.ipv6().into() };
    Server::start(pod, SocketAddr::new(ip, fresh_port()), &["echo"])
}

/// Returns true if all connections with the pods of [`PROXIED`] work, from and to the same node and another one.
fn all_work(mesh: &Mesh, text: &str) -> Result<()> {
    for is_ipv4 in [true, false] {
        let far = server(mesh.pod("client")?, is_ipv4)?;
        let near = server(mesh.pod("server")?, is_ipv4)?;
        for (name, ..) in PROXIED {
            let proxied = mesh.pod(name)?;
            let own = server(proxied, is_ipv4)?;
            for client in ["client", "near"] {
                let reached = Client::echo(mesh.pod(client)?, own.address(), text);
                reached.with_context(|| format!("{client} to {name}, IPv4 {is_ipv4}"))?;
            }
            for to in [&far, &near] {
                let reached = Client::echo(proxied, to.address(), text);
                reached.with_context(|| format!("{name} to {}", to.address()))?;
            }
        }
    }
    Ok(())
}

/// Returns the states of the pods of [`PROXIED`].
fn states(status: &Value) -> Vec<Value> {
    let pods = status["pods"].as_array().map(Vec::as_slice).unwrap_or_default();
    let state = |name: &str| pods.iter().find(|pod| pod["name"] == name).map(|pod| pod["state"].clone());
    PROXIED.iter().filter_map(|(name, ..)| state(name)).collect()
}

fn wait_states(mesh: &Mesh, what: &str, is: impl Fn(&Value) -> bool) -> Result<()> {
    observe::wait_status(mesh.agent("b")?, what, |status| {
        let states = states(status);
        (states.len() == PROXIED.len() && states.iter().all(&is)).then_some(())
    })
}

fn names_its_port(state: &Value) -> bool {
    state.as_str().is_some_and(|reason| OF_PROXIES.iter().any(|port| reason.contains(&port.to_string())))
}

#[test]
#[ignore = "needs root"]
fn a_permissive_pod_with_a_proxy_is_left_alone_until_its_ports_are_free() -> Result<()> {
    let mut mesh = plan("prox").with_agents()?;
    // A proxy of a pod starts after the pod was enrolled.
    let proxies = start_proxies(&mesh)?;
    wait_states(&mesh, "left alone", |state| names_its_port(&state["left_alone"]))?;
    ensure!(observe::metric(mesh.agent("b")?, "tacit_pods_left_alone", &[])? == PROXIED.len() as u64);
    let capture = mesh.topology().capture()?;
    all_work(&mesh, "text of the proxied")?;
    ensure!(capture.finish()?.occurrences(b"text of the proxied") > 0, "plaintext, as without Tacit");
    // Their proxies are reached too.
    for (proxy, (name, ..)) in proxies.iter().zip(PROXIED) {
        for client in ["client", "near"] {
            let to = SocketAddr::new(mesh.pod(name)?.ipv4().into(), proxy.address().port());
            let events = Client::run(mesh.pod(client)?, to, &["send:hello", "shut", "read-end"])?;
            ensure!(events.iter().any(|event| event["end"] == "eof"), "{client} to {to}: {events:?}");
        }
    }

    // So does the next agent.
    ensure!(mesh.agent_mut("b")?.terminate()?.success());
    mesh.agent_mut("b")?.restart()?;
    mesh.agent_mut("b")?.wait_ready()?;
    wait_states(&mesh, "left alone again", |state| names_its_port(&state["left_alone"]))?;
    all_work(&mesh, "after a restart")?;

    // A mode counts at once, for open connections too.
    let open = Open::start(&mesh)?;
    for node in ["a", "b"] {
        mesh.agent(node)?.files().set_policy(STRICT_MESH)?;
    }
    wait_states(&mesh, "held", |state| names_its_port(&state["waiting"]))?;
    open.check_ended(&mesh)?;
    refused(&mesh)?;
    for node in ["a", "b"] {
        mesh.agent(node)?.files().set_policy("")?;
    }
    wait_states(&mesh, "left alone by the mode", |state| names_its_port(&state["left_alone"]))?;

    drop(proxies);
    observe::wait_enrolled(mesh.agent("b")?)?;
    wait_states(&mesh, "enrolled", |state| state == "enrolled")?;
    let capture = mesh.topology().capture()?;
    all_work(&mesh, "text of the enrolled")?;
    ensure!(capture.finish()?.occurrences(b"text of the enrolled") == 0, "plaintext of an enrolled pod");
    Ok(())
}

/// Text that no connection of a STRICT pod carries in clear.
const LATE: &str = "text of a connection from before";

/// Open connections with the pods of [`PROXIED`].
struct Open {
    arrived: Vec<Client>,
    opened: Vec<Client>,
    _servers: Vec<Server>,
}

impl Open {
    /// Opens connections to each pod from both nodes, and from each pod to the other node, and waits for the first answers.
    fn start(mesh: &Mesh) -> Result<Self> {
        let far = server(mesh.pod("client")?, true)?;
        let mut open = Self { arrived: Vec::new(), opened: Vec::new(), _servers: Vec::new() };
        for (name, ..) in PROXIED {
            let own = server(mesh.pod(name)?, true)?;
            for client in ["client", "near"] {
                let steps = ["send:one", "line", "read-end"];
                open.arrived.push(Client::start(mesh.pod(client)?, own.address(), &steps)?);
            }
            let late = format!("send:{LATE}");
            let steps = ["send:one", "line", "pause", &late];
            open.opened.push(Client::start(mesh.pod(name)?, far.address(), &steps)?);
            open._servers.push(own);
        }
        open._servers.push(far);
        for client in open.arrived.iter().chain(&open.opened) {
            client.events().first("line")?;
        }
        Ok(open)
    }

    /// Waits until those that arrived are reset, and checks that the others carry nothing more in clear.
    fn check_ended(self, mesh: &Mesh) -> Result<()> {
        for client in self.arrived {
            let events = client.finish()?;
            ensure!(events.iter().any(|event| event["end"] == "ConnectionReset"), "{events:?}");
        }
        let capture = mesh.topology().capture()?;
        for client in self.opened {
            let mut client = client;
            client.proceed()?;
            client.finish()?;
        }
        ensure!(capture.finish()?.occurrences(LATE.as_bytes()) == 0, "a STRICT pod sends plaintext");
        Ok(())
    }
}

/// Checks that connections with the pods of [`PROXIED`] fail at once, and that it is counted.
fn refused(mesh: &Mesh) -> Result<()> {
    let at_once = |from: &Pod, to: SocketAddr| -> Result<()> {
        let events = Client::run(from, to, &[])?;
        ensure!(events.iter().any(|event| event["error"] == "ConnectionRefused"), "{to}: {events:?}");
        Ok(())
    };
    let server = server(mesh.pod("server")?, true)?;
    for (name, ..) in PROXIED {
        let own = self::server(mesh.pod(name)?, true)?;
        at_once(mesh.pod("client")?, own.address())?;
        at_once(mesh.pod("near")?, own.address())?;
        at_once(mesh.pod(name)?, server.address())?;
    }
    let verdicts = "tacit_kernel_verdicts_total";
    let agent = mesh.agent("b")?;
    ensure!(
        observe::metric(agent, verdicts, &[("reason", "connect_not_served")])? > 0,
        "{}",
        agent.metrics()?
    );
    ensure!(observe::metric(agent, verdicts, &[("reason", "inbound_no_agent")])? > 0, "{}", agent.metrics()?);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn control_pods_with_a_proxy_work_without_tacit() -> Result<()> {
    let mesh = plan("proxc").without_agents()?;
    let _proxies = start_proxies(&mesh)?;
    all_work(&mesh, "text")
}

//! Pods with a proxy of their own, such as the sidecar of another mesh: a program listens at a port that proxies use. A PERMISSIVE
//! pod of this kind is left alone, as without Tacit. A STRICT one is refused at once. The control run has no agents.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::net::{Ipv6Addr, SocketAddr};
use tacit_abi::tcp_port::{OF_PROXIES, TUNNEL};
use tacit_tests::{Client, Mesh, Plan, Server, fresh_port, observe};
use tacit_topology::Pod;

const STRICT: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                      metadata: {name: default, namespace: istio-system}\nspec: {mtls: {mode: STRICT}}\n";
/// The pods with a proxy, in the order of [`OF_PROXIES`].
const PROXIED: [&str; 3] = ["outbound", "inbound", "hbone"];

fn plan(tag: &str) -> Plan {
    let plan = Plan::new(tag).pod("a", "shop", "client").pod("b", "shop", "near").pod("b", "shop", "server");
    PROXIED.iter().fold(plan, |plan, name| plan.pod("b", "shop", name))
}

/// The program in each pod of [`PROXIED`]. One does not answer, as a proxy that expects something else.
fn start_proxies(mesh: &Mesh) -> Result<Vec<Server>> {
    let started = PROXIED.iter().zip(OF_PROXIES).map(|(name, port)| {
        let steps = if port == TUNNEL { ["read-end"] } else { ["echo"] };
        Server::start(mesh.pod(name)?, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), &steps)
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
        for name in PROXIED {
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
    PROXIED.iter().filter_map(|name| state(name)).collect()
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
    ensure!(observe::metric(mesh.agent("b")?, "tacit_pods_left_alone", &[])? == 3);
    let capture = mesh.topology().capture()?;
    all_work(&mesh, "text of the proxied")?;
    ensure!(capture.finish()?.occurrences(b"text of the proxied") > 0, "plaintext, as without Tacit");
    // Their proxies are reached too.
    for (proxy, name) in proxies.iter().zip(PROXIED) {
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

    // A mode counts at once.
    for node in ["a", "b"] {
        mesh.agent(node)?.files().set_policy(STRICT)?;
    }
    wait_states(&mesh, "held", |state| names_its_port(&state["waiting"]))?;
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

/// Checks that connections with the pods of [`PROXIED`] fail at once, and that it is counted.
fn refused(mesh: &Mesh) -> Result<()> {
    let at_once = |from: &Pod, to: SocketAddr| -> Result<()> {
        let events = Client::run(from, to, &[])?;
        ensure!(events.iter().any(|event| event["error"] == "ConnectionRefused"), "{to}: {events:?}");
        Ok(())
    };
    let server = server(mesh.pod("server")?, true)?;
    for name in PROXIED {
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

//! Pods whose own rules rewrite what arrives, such as `REDIRECT` of port 80 to 8080 by an init container. The agent delivers inside the
//! pod, where these rules do not run. Peers reach such a pod as plaintext while it is PERMISSIVE, and are refused at once while it
//! is STRICT. The control run has no agents.

use anyhow::{Context, Result, ensure};
use std::net::{IpAddr, SocketAddr};
use tacit_tests::{Client, Mesh, Plan, STRICT_MESH, Server, fresh_port, observe, redirect};
use tacit_topology::Pod;

/// The port that clients connect to.
const SERVICE: u16 = 80;
const CLIENTS: [&str; 2] = ["client", "near"];

fn plan(tag: &str) -> Plan {
    Plan::new(tag).pod("a", "shop", "client").pod("b", "shop", "near").pod("b", "shop", "server")
}

fn both(pod: &Pod) -> [IpAddr; 2] {
    [pod.ipv4().into(), pod.ipv6().into()]
}

/// Servers of the pod at a port that only its rules lead to.
fn start(mesh: &Mesh) -> Result<(u16, [Server; 2])> {
    let (pod, port) = (mesh.pod("server")?, fresh_port());
    let [v4, v6] = both(pod).map(|ip| Server::start(pod, SocketAddr::new(ip, port), &["echo"]));
    redirect::add(pod, SERVICE, port)?;
    Ok((port, [v4?, v6?]))
}

/// Checks that all clients reach the service, in both families.
fn all_reach(mesh: &Mesh, text: &str) -> Result<()> {
    for client in CLIENTS {
        for ip in both(mesh.pod("server")?) {
            let reached = Client::echo(mesh.pod(client)?, SocketAddr::new(ip, SERVICE), text);
            reached.with_context(|| format!("{client} to {ip}"))?;
        }
    }
    Ok(())
}

fn wait_shown(mesh: &Mesh, is_rewriting: bool) -> Result<()> {
    observe::wait_status(mesh.agent("b")?, "rules of the pod", |status| {
        let pods = status["pods"].as_array()?;
        let server = pods.iter().find(|pod| pod["name"] == "server")?;
        (server["rewrites_arrivals"] == is_rewriting && server["state"] == "enrolled").then_some(())
    })
}

/// Waits until all pods of both nodes have this mode.
fn wait_modes(mesh: &Mesh, mode: &str) -> Result<()> {
    ["a", "b"].into_iter().try_for_each(|node| observe::wait_modes(mesh.agent(node)?, mode))
}

#[test]
#[ignore = "needs root"]
fn a_pod_with_rules_of_its_own_is_reached_through_them() -> Result<()> {
    let mesh = plan("rules").with_agents()?;
    // An init container runs after the pod was enrolled.
    let (port, _servers) = start(&mesh)?;
    wait_shown(&mesh, true)?;
    ensure!(observe::metric(mesh.agent("b")?, "tacit_pods_rewriting", &[])? == 1);
    let capture = mesh.topology().capture()?;
    all_reach(&mesh, "text through rules")?;
    ensure!(capture.finish()?.occurrences(b"text through rules") > 0, "plaintext, as without Tacit");
    // Its own connections go through the tunnel all the same.
    let client = mesh.pod("client")?;
    let other = Server::start(client, SocketAddr::new(client.ipv4().into(), fresh_port()), &["echo"])?;
    let capture = mesh.topology().capture()?;
    Client::echo(mesh.pod("server")?, other.address(), "text of its own")?;
    ensure!(capture.finish()?.occurrences(b"text of its own") == 0, "plaintext of an enrolled pod");

    let open = CLIENTS.map(|client| -> Result<Client> {
        let to = SocketAddr::new(mesh.pod("server")?.ipv4().into(), SERVICE);
        let client = Client::start(mesh.pod(client)?, to, &["send:one", "line", "read-end"])?;
        client.events().first("line")?;
        Ok(client)
    });
    let open: Vec<Client> = open.into_iter().collect::<Result<_>>()?;
    for node in ["a", "b"] {
        mesh.agent(node)?.files().set_policy(STRICT_MESH)?;
    }
    wait_modes(&mesh, "STRICT")?;
    for client in open {
        let events = client.finish()?;
        ensure!(events.iter().any(|event| event["end"] == "ConnectionReset"), "{events:?}");
    }
    for client in CLIENTS {
        for ip in both(mesh.pod("server")?) {
            let events = Client::run(mesh.pod(client)?, SocketAddr::new(ip, SERVICE), &[])?;
            let is_refused = events.iter().any(|event| event["error"] == "ConnectionRefused");
            ensure!(is_refused, "{client} to {ip}: {events:?}");
            Client::echo(mesh.pod(client)?, SocketAddr::new(ip, port), "what listens in the pod itself")?;
        }
    }
    ensure!(
        observe::refused(mesh.agent("b")?, "own_rules")? > 0,
        "{:?}",
        observe::refusals(mesh.agent("b")?)?
    );

    for node in ["a", "b"] {
        mesh.agent(node)?.files().set_policy("")?;
    }
    wait_modes(&mesh, "PERMISSIVE")?;
    redirect::remove(mesh.pod("server")?)?;
    wait_shown(&mesh, false)?;
    let capture = mesh.topology().capture()?;
    for client in CLIENTS {
        let to = SocketAddr::new(mesh.pod("server")?.ipv4().into(), port);
        Client::echo(mesh.pod(client)?, to, "text without rules")?;
    }
    ensure!(capture.finish()?.occurrences(b"text without rules") == 0, "plaintext without rules");
    Ok(())
}

/// An agent reads a bounded number of rules, and takes those beyond it for ones that rewrite.
#[test]
#[ignore = "needs root"]
fn a_pod_with_very_many_rules_counts_as_one_that_rewrites() -> Result<()> {
    let mesh = plan("rulem").with_agents()?;
    redirect::add_without_effect(mesh.pod("server")?, 4000)?;
    // Rules without an effect are no reason by themselves.
    let other = mesh.pod("near")?;
    redirect::add(other, SERVICE, fresh_port())?;
    observe::wait_status(mesh.agent("b")?, "the rules of the other pod", |status| {
        let is = |name: &str, rewrites: bool| {
            let found = status["pods"].as_array()?.iter().find(|pod| pod["name"] == name)?;
            (found["rewrites_arrivals"] == rewrites).then_some(())
        };
        is("near", true).and(is("server", false))
    })?;
    redirect::add_without_effect(mesh.pod("server")?, 1000)?;
    wait_shown(&mesh, true)?;
    redirect::remove(mesh.pod("server")?)?;
    wait_shown(&mesh, false)
}

#[test]
#[ignore = "needs root"]
fn control_rules_of_a_pod_apply_without_tacit() -> Result<()> {
    let mesh = plan("rulec").without_agents()?;
    let _servers = start(&mesh)?;
    all_reach(&mesh, "text")
}

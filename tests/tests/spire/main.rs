//! Agents that get keys, certificates and roots from a simulated SPIRE agent on each node.
//!
//! The nodes have one CA. No agent is restarted while SVIDs are renewed and roots are replaced.

mod fake;

use std::{fs, net::SocketAddr, path::PathBuf};

use anyhow::{Context, Result, ensure};
use fake::{SERIAL_START, Spire};
use serde_json::Value;
use tacit_tests::{Client, Mesh, Plan, STRICT_MESH, Server, fresh_port, observe};
use tacit_topology::{Agent, MeshFiles, Node, WorkloadEntry, until};

const NODES: [&str; 2] = ["a", "b"];
/// Name of a SPIRE agent's socket.
const SOCKET: &str = "spire.sock";
/// Pods by node.
const PODS: [(&str, &str); 2] = [("a", "client"), ("b", "far")];

#[test]
#[ignore = "needs root"]
fn pods_reach_each_other_with_identities_of_spire_through_renewal_and_rotation() -> Result<()> {
    let (mesh, spire) = mesh("spf")?;
    let far = mesh.pod("far")?;
    let address = SocketAddr::new(far.ipv4().into(), fresh_port());
    let _server = Server::start(far, address, &["echo"])?;
    let echo = |what: &str| Client::echo(mesh.pod("client")?, address, what).with_context(|| what.to_owned());
    echo("with SVIDs of SPIRE")?;
    let principal = format!("spiffe://{}/ns/shop/sa/far", MeshFiles::TRUST_DOMAIN);
    let opened = observe::metric(
        mesh.agent("a")?,
        "istio_tcp_connections_opened_total",
        &[("destination_principal", &principal)],
    )?;
    ensure!(opened > 0, "no connection to {principal}");

    let mut taken_up = taken_up(&mesh)?;
    let new = spire.publish_new_root()?;
    await_update(&mesh, &mut taken_up)?;
    echo("with both roots")?;
    let before = serials(&mesh)?;
    spire.issue_by(new);
    await_update(&mesh, &mut taken_up)?;
    for ((node, account), old) in PODS.into_iter().zip(&before) {
        observe::wait_status(mesh.agent(node)?, "an SVID of the new root", |status| {
            (certificate(status, account)?["serial"] != *old).then_some(())
        })?;
    }
    echo("with SVIDs of the new root")?;
    spire.remove_old_roots();
    await_update(&mesh, &mut taken_up)?;
    echo("with the new root alone")?;
    for node in NODES {
        let starts = mesh.agent(node)?.log()?.matches("certificate not renewed").count();
        ensure!(starts == 0, "node {node} refused an SVID in between:\n{}", mesh.agent(node)?.log()?);
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn the_last_svid_stays_while_spire_is_away() -> Result<()> {
    let (mesh, mut spire) = mesh("spa")?;
    let b = mesh.topology().node("b")?;
    spire.stop(&socket(b)?)?;
    let agent = mesh.agent("b")?;
    observe::wait_status(agent, "the lost stream", |status| {
        certificate(status, "far")?["last_error"]
            .as_str()
            .filter(|error| error.contains("issuer.spire.socket"))
            .map(drop)
    })?;
    let far = mesh.pod("far")?;
    let address = SocketAddr::new(far.ipv4().into(), fresh_port());
    let _server = Server::start(far, address, &["echo"])?;
    Client::echo(mesh.pod("client")?, address, "without SPIRE")?;
    let before = serials(&mesh)?;
    spire.listen(&socket(b)?)?;
    observe::wait_status(agent, "another SVID", |status| {
        let certificate = certificate(status, "far")?;
        (certificate["last_error"].is_null() && Some(&certificate["serial"]) != before.last()).then_some(())
    })?;
    Client::echo(mesh.pod("client")?, address, "with SPIRE again")
}

#[test]
#[ignore = "needs root"]
fn a_pod_for_which_spire_has_another_identity_waits_and_names_both() -> Result<()> {
    let (mesh, spire) = mesh("spw")?;
    spire.confuse("late", "far");
    let late = mesh.topology().node("b")?.pod("shop", "late")?;
    let _running = late.keep_alive()?;
    let mut directory = mesh.directory();
    directory.push(WorkloadEntry::of(&late));
    let agent = mesh.agent("b")?;
    agent.files().set_directory(&directory)?;
    let (given, expected) = ["far", "late"]
        .map(|account| format!("spiffe://{}/ns/shop/sa/{account}", MeshFiles::TRUST_DOMAIN))
        .into();
    observe::wait_status(agent, "a pod that waits", |status| {
        let pods = status["pods"].as_array()?;
        let state = pods.iter().find(|pod| pod["name"] == "late")?["state"].to_string();
        (state.contains(&format!("SPIRE gives {given}")) && state.contains(&format!("expected {expected}")))
            .then_some(())
    })
}

/// Both SPIREs claim the trust domain, and the identities are right. Only the roots differ.
#[test]
#[ignore = "needs root"]
fn an_identity_of_another_spire_is_refused() -> Result<()> {
    let (mut mesh, _spire) = mesh("spo")?;
    let far = SocketAddr::new(mesh.pod("far")?.ipv4().into(), fresh_port());
    let server = Server::start(mesh.pod("far")?, far, &["echo"])?;
    Client::echo(mesh.pod("client")?, far, "with the same SPIRE")?;
    let mut other = Spire::start()?;
    replace_issuer(&mut mesh, &mut other, "b", "other.sock")?;
    let accepted = server.accepted()?;
    let agent = mesh.agent("a")?;
    let before = observe::refused(agent, "unknown_issuer")?;
    let reached = Client::echo(mesh.pod("client")?, far, "with another SPIRE");
    ensure!(reached.is_err(), "the echo arrived");
    observe::wait_refused(agent, "unknown_issuer", before, &far.to_string())?;
    ensure!(server.accepted()? == accepted, "a connection reached the server");
    Ok(())
}

/// Starts two nodes whose agents have SPIRE as issuer. All pods are enrolled, with SVIDs, when this returns.
fn mesh(tag: &str) -> Result<(Mesh, Spire)> {
    let plan = Plan::new(tag).pod("a", "shop", "client").pod("b", "shop", "far").policy(STRICT_MESH);
    let mut mesh = plan.with_agents()?;
    let mut spire = Spire::start()?;
    for name in NODES {
        replace_issuer(&mut mesh, &mut spire, name, SOCKET)?;
    }
    Ok((mesh, spire))
}

/// Restarts the agent of a node with `spire` as issuer, at a socket of this name. All pods of the node are enrolled, with SVIDs, when
/// this returns.
fn replace_issuer(mesh: &mut Mesh, spire: &mut Spire, name: &str, socket: &str) -> Result<()> {
    let socket = mesh.topology().node(name)?.files()?.join(socket);
    spire.listen(&socket)?;
    let agent = mesh.agent_mut(name)?;
    agent.terminate()?;
    let path = agent.files().config();
    let text = fs::read_to_string(&path)?;
    let old = text.lines().find(|line| line.starts_with("issuer: ")).context("no issuer")?;
    fs::write(&path, text.replace(old, &format!("issuer: {{spire: {{socket: {}}}}}", socket.display())))?;
    agent.restart()?;
    agent.wait_ready()?;
    observe::wait_enrolled(agent)?;
    let status = observe::status(agent)?;
    let issuer = status["issuer"]["address"].as_str().context("no issuer")?;
    ensure!(issuer == format!("spire:{}", socket.display()), "the issuer is {issuer}");
    for certificate in status["certificates"].as_array().context("no certificates")? {
        let serial = certificate["serial"].as_str().context("no serial")?;
        ensure!(serial.starts_with(SERIAL_START), "serial {serial} is not one of SPIRE");
    }
    Ok(())
}

fn socket(node: &Node) -> Result<PathBuf> {
    Ok(node.files()?.join(SOCKET))
}

/// Returns the serial numbers of the pods' certificates, of node a and of node b.
fn serials(mesh: &Mesh) -> Result<Vec<Value>> {
    let of = |(node, account)| -> Result<Value> {
        let status = observe::status(mesh.agent(node)?)?;
        Ok(certificate(&status, account).context("no certificate")?["serial"].clone())
    };
    PODS.into_iter().map(of).collect()
}

/// Returns the number of times that the pods' SVIDs or roots were taken up, of node a and of node b.
fn taken_up(mesh: &Mesh) -> Result<Vec<usize>> {
    PODS.into_iter().map(|(node, account)| count_taken_up(mesh.agent(node)?, account)).collect()
}

/// Status has times in seconds, and two changes of a test can be in one.
fn count_taken_up(agent: &Agent, account: &str) -> Result<usize> {
    let account = format!("/sa/{account}");
    let is_of = |line: &&str| line.contains("certificate issued") && line.contains(&account);
    Ok(agent.log()?.lines().filter(is_of).count())
}

/// Waits until both agents have taken up another SVID or other roots.
fn await_update(mesh: &Mesh, before: &mut Vec<usize>) -> Result<()> {
    for ((node, account), old) in PODS.into_iter().zip(&*before) {
        let agent = mesh.agent(node)?;
        until("another SVID or root", || Ok((count_taken_up(agent, account)? > *old).then_some(())))?;
    }
    *before = taken_up(mesh)?;
    Ok(())
}

fn certificate(status: &Value, account: &str) -> Option<Value> {
    let is_of =
        |it: &&Value| it["identity"].as_str().is_some_and(|id| id.ends_with(&format!("/sa/{account}")));
    status["certificates"].as_array()?.iter().find(is_of).cloned()
}

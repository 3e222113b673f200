//! Certificates of a node's identities: an identity is removed with its last pod, and an authority that hangs does not
//! delay pods that have a certificate.
//!
//! Each test changes its mesh, so each has its own.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{
    fs::{self, File},
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};
use tacit_tests::{Mesh, Plan, STRICT_MESH, agent_program, observe};
use tacit_topology::{Agent, Process, WorkloadEntry};

/// Timeout of an agent's request to the authority.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
const ATTEMPTS: usize = 5;
const TOKEN: &str = "token of node b";
const TOKEN_SHA256: &str = "1e09d162a15ad69e20a6d9425e69582da5c01d515b46f8b9acdc2f74da691c34";

#[test]
#[ignore = "needs root"]
fn an_identity_is_forgotten_with_its_last_pod() -> Result<()> {
    let mesh = plan("cf").with_directories(|_, mesh| Ok(of_one_account(mesh)))?;
    let b = mesh.agent("b")?;
    let update_directory = |without: &[&str]| {
        let mut directory = of_one_account(&mesh);
        directory.retain(|workload| !without.contains(&workload.name.as_str()));
        b.files().set_directory(&directory)
    };
    ensure!(certificate(&observe::status(b)?, "shop").is_some(), "no certificate of the account");
    update_directory(&["web"])?;
    observe::wait_status(b, "one pod gone", |status| pod(status, "web").is_none().then_some(()))?;
    ensure!(certificate(&observe::status(b)?, "shop").is_some(), "removed while a pod needs it");
    update_directory(&["web", "db"])?;
    observe::wait_status(b, "the identity removed", |status| {
        certificate(status, "shop").is_none().then_some(())
    })?;
    ensure!(certificate(&observe::status(b)?, "other").is_some(), "another identity is removed too");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn an_authority_that_hangs_delays_nobody_who_has_a_certificate() -> Result<()> {
    let mut mesh = plan("ch").with_agents()?;
    let authority = with_authority(&mut mesh)?;
    authority.signal(Signal::SIGSTOP)?;
    // An agent that waits for the request always exceeds the timeout. A slow machine may need more than one attempt.
    let mut attempts = (0..ATTEMPTS).map(|number| changes_during_a_request(&mesh, &format!("late{number}")));
    let _late = loop {
        let (took, late) = attempts.next().context("policies and un-enrolment waited for the request")??;
        if took < REQUEST_TIMEOUT {
            break late;
        }
    };
    authority.signal(Signal::SIGCONT)?;
    observe::wait_enrolled(mesh.agent("b")?)
}

/// Adds pod `late`, which waits for a certificate, changes a policy and removes a pod from the directory. Returns the
/// duration and the process that keeps the pod alive.
fn changes_during_a_request(mesh: &Mesh, late: &str) -> Result<(Duration, Process)> {
    let b = mesh.agent("b")?;
    b.files().set_policy("")?;
    b.files().set_directory(&mesh.directory())?;
    observe::wait_status(b, "the initial state", |status| {
        has_mode(status, "db", "PERMISSIVE").then_some(())
    })?;
    let pod_late = mesh.topology().node("b")?.pod("shop", late)?;
    let running = pod_late.keep_alive()?;
    let begin = Instant::now();
    let mut directory = mesh.directory();
    directory.push(WorkloadEntry::of(&pod_late));
    b.files().set_directory(&directory)?;
    observe::wait_status(b, "a pod that waits for its certificate", |status| {
        pod(status, late).filter(|pod| pod["state"].to_string().contains("has not answered yet")).map(drop)
    })?;
    b.files().set_policy(STRICT_MESH)?;
    observe::wait_status(b, "the policy", |status| {
        ["web", "db"].iter().all(|name| has_mode(status, name, "STRICT")).then_some(())
    })?;
    directory.retain(|workload| workload.name != "db");
    b.files().set_directory(&directory)?;
    observe::wait_status(b, "a pod gone", |status| pod(status, "db").is_none().then_some(()))?;
    let took = begin.elapsed();
    let waits = pod(&observe::status(b)?, late).is_some_and(|pod| pod["state"] != "enrolled");
    ensure!(waits, "pod {late} is enrolled although the authority hangs");
    Ok((took, running))
}

fn has_mode(status: &Value, name: &str, mode: &str) -> bool {
    pod(status, name).is_some_and(|pod| pod["mode"] == mode)
}

/// Returns the plan. Node a has no pods; a topology has two nodes.
fn plan(tag: &str) -> Plan {
    Plan::new(tag).pod("b", "shop", "web").pod("b", "shop", "db").pod("b", "shop", "other")
}

/// Returns a directory in which pods web and db have service account `shop`.
fn of_one_account(mesh: &Mesh) -> Vec<WorkloadEntry> {
    let mut directory = mesh.directory();
    for workload in directory.iter_mut().filter(|workload| workload.name != "other") {
        "shop".clone_into(&mut workload.service_account);
    }
    directory
}

fn pod(status: &Value, name: &str) -> Option<Value> {
    status["pods"].as_array()?.iter().find(|pod| pod["name"] == name).cloned()
}

fn certificate(status: &Value, account: &str) -> Option<Value> {
    let is_of =
        |it: &&Value| it["identity"].as_str().is_some_and(|id| id.ends_with(&format!("/sa/{account}")));
    status["certificates"].as_array()?.iter().find(is_of).cloned()
}

/// Starts an authority on node b and restarts the agent with it as its issuer. All pods are enrolled when this returns.
fn with_authority(mesh: &mut Mesh) -> Result<Process> {
    let node = mesh.topology().node("b")?;
    let folder = node.files()?;
    fs::write(folder.join("token"), TOKEN)?;
    fs::write(folder.join("agents.yaml"), format!("agents: [{{node: b, tokenSha256: {TOKEN_SHA256}}}]\n"))?;
    let config = folder.join("authority.yaml");
    fs::write(
        &config,
        "trustDomain: cluster.local\nlisten: 127.0.0.1:15012\nmetrics: 127.0.0.1:15021\nroot: {directory: authority}\n\
         bundle: {file: roots.pem}\nagents: {tokens: agents.yaml, directory: directory.yaml}\n",
    )?;
    let mut command = node.command(agent_program()?)?;
    command.arg("authority").arg("--config").arg(&config).stdin(Stdio::null()).stdout(Stdio::null());
    let authority = Process::spawn(command.stderr(File::create(folder.join("authority.log"))?))?;
    let agent = mesh.agent_mut("b")?;
    agent.terminate()?;
    set_issuer(agent, &folder)?;
    agent.restart()?;
    agent.wait_ready()?;
    observe::wait_enrolled(agent)?;
    Ok(authority)
}

fn set_issuer(agent: &Agent, folder: &Path) -> Result<()> {
    let path = agent.files().config();
    let text = fs::read_to_string(&path)?;
    let old =
        text.lines().find(|line| line.starts_with("issuer: ")).context("no issuer in the configuration")?;
    let new = format!(
        "issuer: {{istio: {{address: \"127.0.0.1:15012\", serverName: tacit-authority.tacit-system.svc, \
         rootFile: {folder}/roots.pem, tokenFile: {folder}/token}}}}",
        folder = folder.display()
    );
    fs::write(path, text.replace(old, &new))?;
    Ok(())
}

//! Certificates of a node's identities: they are forgotten with the last pod that needs them, and an authority that hangs
//! delays nobody who has one already.
//!
//! Each test changes its mesh, so each has one of its own.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{
    fs::{self, File},
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};
use tacit_tests::{Mesh, Plan, agent_program, observe};
use tacit_topology::{Agent, Process, WorkloadEntry};

/// The agent gives up an attempt at the authority after this time.
const ATTEMPT: Duration = Duration::from_secs(10);
const TRIES: usize = 5;
const TOKEN: &str = "token of node b";
const TOKEN_SHA256: &str = "1e09d162a15ad69e20a6d9425e69582da5c01d515b46f8b9acdc2f74da691c34";
const STRICT: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                      metadata: {name: default, namespace: istio-system}\nspec: {mtls: {mode: STRICT}}\n";

#[test]
#[ignore = "needs root"]
fn an_identity_is_forgotten_with_its_last_pod() -> Result<()> {
    let mesh = plan("cf").with_agents_told(|_, mesh| Ok(of_one_account(mesh)))?;
    let b = mesh.agent("b")?;
    let told = |without: &[&str]| {
        let mut directory = of_one_account(&mesh);
        directory.retain(|workload| !without.contains(&workload.name.as_str()));
        b.files().set_directory(&directory)
    };
    ensure!(certificate(&observe::status(b)?, "shop").is_some(), "no certificate of the account");
    told(&["web"])?;
    observe::wait_status(b, "one pod gone", |status| pod(status, "web").is_none().then_some(()))?;
    ensure!(certificate(&observe::status(b)?, "shop").is_some(), "forgotten while a pod needs it");
    told(&["web", "db"])?;
    observe::wait_status(b, "the identity forgotten", |status| {
        certificate(status, "shop").is_none().then_some(())
    })?;
    ensure!(certificate(&observe::status(b)?, "other").is_some(), "another identity forgotten too");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn an_authority_that_hangs_delays_nobody_who_has_a_certificate() -> Result<()> {
    let mut mesh = plan("ch").with_agents()?;
    let authority = with_authority(&mut mesh)?;
    authority.signal(Signal::SIGSTOP)?;
    // An agent that waits for the attempt never stays below it; a slow machine may need more than one try.
    let mut tries = (0..TRIES).map(|number| changes_beside_an_attempt(&mesh, &format!("late{number}")));
    let _late = loop {
        let (took, late) = tries.next().context("policies and un-enrolment waited for the attempt")??;
        if took < ATTEMPT {
            break late;
        }
    };
    authority.signal(Signal::SIGCONT)?;
    observe::wait_enrolled(mesh.agent("b")?)
}

/// Makes pod `late` wait for a certificate, changes a policy and takes a pod out of the directory. Returns how long that took,
/// and what keeps the pod.
fn changes_beside_an_attempt(mesh: &Mesh, late: &str) -> Result<(Duration, Process)> {
    let b = mesh.agent("b")?;
    b.files().set_policy("")?;
    b.files().set_directory(&mesh.directory())?;
    observe::wait_status(b, "as it was", |status| has_mode(status, "db", "PERMISSIVE").then_some(()))?;
    let pod_late = mesh.topology().node("b")?.pod("shop", late)?;
    let running = pod_late.hold()?;
    let begin = Instant::now();
    let mut directory = mesh.directory();
    directory.push(WorkloadEntry::of(&pod_late));
    b.files().set_directory(&directory)?;
    observe::wait_status(b, "a pod that waits for its certificate", |status| {
        pod(status, late).filter(|pod| pod["state"].to_string().contains("has not answered yet")).map(drop)
    })?;
    b.files().set_policy(STRICT)?;
    observe::wait_status(b, "the policy", |status| {
        ["web", "db"].iter().all(|name| has_mode(status, name, "STRICT")).then_some(())
    })?;
    directory.retain(|workload| workload.name != "db");
    b.files().set_directory(&directory)?;
    observe::wait_status(b, "a pod gone", |status| pod(status, "db").is_none().then_some(()))?;
    let took = begin.elapsed();
    let waits = pod(&observe::status(b)?, late).is_some_and(|pod| pod["state"] != "enrolled");
    ensure!(waits, "the authority hung for nobody");
    Ok((took, running))
}

fn has_mode(status: &Value, name: &str, mode: &str) -> bool {
    pod(status, name).is_some_and(|pod| pod["mode"] == mode)
}

/// Node a is only there because a topology has two.
fn plan(tag: &str) -> Plan {
    Plan::new(tag).pod("b", "shop", "web").pod("b", "shop", "db").pod("b", "shop", "other")
}

/// Pods web and db are of service account `shop`.
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

/// An authority on node b, which its agent is made to ask from now on. All pods are enrolled when this returns.
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
    ask_authority(agent, &folder)?;
    agent.restart()?;
    agent.wait_ready()?;
    observe::wait_enrolled(agent)?;
    Ok(authority)
}

fn ask_authority(agent: &Agent, folder: &Path) -> Result<()> {
    let path = agent.files().config();
    let text = fs::read_to_string(&path)?;
    let own = text.lines().find(|line| line.starts_with("issuer: ")).context("no issuer is configured")?;
    let asked = format!(
        "issuer: {{istio: {{address: \"127.0.0.1:15012\", serverName: tacit-authority.tacit-system.svc, \
         rootFile: {folder}/roots.pem, tokenFile: {folder}/token}}}}",
        folder = folder.display()
    );
    fs::write(path, text.replace(own, &asked))?;
    Ok(())
}

//! Attacks on a pod that came while its node had no agent, or an agent without certificates. In the control the pod simply
//! comes.

use std::{
    fs,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result};
use tacit_topology::{Agent, WorkloadEntry, directory_text, until};

use crate::{
    Family,
    catalogue::Start,
    judge::Outcome,
    step_process::simple,
    translation::SERVICE,
    world::{PORT, World, address, wait_enrolled},
};

/// The agent of the victim's node is killed, a pod comes, and a pod outside the mesh connects to it.
pub(crate) fn drive(world: &mut World, start: Start, family: Family, marker: &str) -> Result<Outcome> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    if let Some(agent) = world.agents.last_mut() {
        agent.kill()?;
    }
    let name = format!("newborn{}", NUMBER.fetch_add(1, Ordering::Relaxed));
    let pod = world.far_node()?.pod("attack", &name)?;
    let _process = pod.keep_alive()?;
    world.serve(&pod, &PORT.to_string())?;
    let mut workloads = world.directory();
    workloads.push(WorkloadEntry::of(&pod));
    let configuration = match (start, world.agents.last_mut()) {
        (Start::WithoutCertificates, Some(agent)) => {
            agent.files().set_directory_text(&(directory_text(&workloads) + SERVICE))?;
            Some(start_without_certificates(agent, &name)?)
        }
        _ => None,
    };
    let outcome = simple(world, &world.stranger, "tcp", address(&pod, family, PORT), marker, &[]);
    restore(world, configuration)?;
    outcome
}

/// Starts an agent that gets no certificate, and waits until it has asked for the pod's. Returns its former configuration.
fn start_without_certificates(agent: &mut Agent, pod: &str) -> Result<String> {
    let file = agent.files().config();
    let folder = file.parent().context("a folder")?;
    let before = fs::read_to_string(&file)?;
    let issuer = before.lines().find(|line| line.starts_with("issuer: ")).context("an issuer")?;
    let token = folder.join("token");
    fs::write(&token, "token")?;
    // Nobody listens there: requests are refused at once.
    let nobody = format!(
        "issuer: {{istio: {{address: \"127.0.0.1:9\", serverName: authority.local, rootFile: {}, tokenFile: {}}}}}",
        agent.files().issuer().join("root-cert.pem").display(),
        token.display()
    );
    fs::write(&file, before.replace(issuer, &nobody))?;
    agent.restart()?;
    until("the pod waiting for its certificate", || {
        let Ok(status) = agent.status() else { return Ok(None) };
        let status: serde_json::Value = serde_json::from_str(&status)?;
        let pods = status["pods"].as_array().cloned().unwrap_or_default();
        let waits = |entry: &serde_json::Value| {
            let text = entry.to_string();
            text.contains(pod) && text.contains("no certificate")
        };
        Ok(pods.iter().any(waits).then_some(()))
    })?;
    Ok(before)
}

fn restore(world: &mut World, configuration: Option<String>) -> Result<()> {
    let directory = world.directory_text();
    let Some(agent) = world.agents.last_mut() else { return Ok(()) };
    if let Some(text) = configuration {
        agent.kill()?;
        fs::write(agent.files().config(), text)?;
        agent.files().set_directory_text(&directory)?;
    }
    agent.restart()?;
    agent.wait_ready()?;
    wait_enrolled(agent)
}

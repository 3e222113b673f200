//! The CNI plugin: a pod's sandbox is made only when the agent of the node covers the pod.

use std::{fs, time::Duration};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tacit_tests::{
    Mesh, Plan,
    cni::{CniEnd, CniFolders},
    observe,
};
use tacit_topology::{Agent, until, within};

/// Time for which a call is seen to wait.
const WAITS: Duration = Duration::from_millis(500);

/// A mesh whose node `a` has the CNI folders, with `more` in the section of the configuration.
fn node(tag: &str, more: &str) -> Result<(Mesh, CniFolders)> {
    let folders = CniFolders::new(tag)?;
    let mut mesh = Plan::new(tag).pod("a", "shop", "web").with_agents()?;
    configure(&mut mesh, &folders, more)?;
    Ok((mesh, folders))
}

/// Starts the agent of node `a` again with this section.
fn configure(mesh: &mut Mesh, folders: &CniFolders, more: &str) -> Result<()> {
    let file = mesh.agent("a")?.files().config();
    let text = fs::read_to_string(&file)?;
    let others = text
        .lines()
        .filter(|line| !line.starts_with("cni:"))
        .fold(String::new(), |text, line| text + line + "\n");
    fs::write(&file, others + &folders.section(more))?;
    let agent = mesh.agent_mut("a")?;
    agent.terminate()?;
    agent.restart()?;
    agent.wait_ready()
}

fn reason(end: &CniEnd) -> &str {
    end.printed["msg"].as_str().unwrap_or_default()
}

fn shown(agent: &Agent) -> Result<Value> {
    Ok(observe::status(agent)?["cni"].clone())
}

#[test]
#[ignore = "needs root"]
fn a_pod_starts_when_the_agent_covers_it() -> Result<()> {
    let (mut mesh, folders) = node("cni", "")?;
    folders.wait_chained()?;
    let passed = folders.call("ADD", "web", None)?.finish()?;
    ensure!(passed.is_passed && passed.printed["ips"][0]["address"] == "10.77.0.9/24", "{passed:?}");

    let unknown = folders.call("ADD", "new", Some(1))?.finish()?;
    ensure!(!unknown.is_passed && unknown.printed["code"] == 11, "{unknown:?}");
    ensure!(reason(&unknown).contains("has no pod shop/new on this node yet"), "{unknown:?}");
    let mut waits = folders.call("ADD", "new", Some(20))?;
    ensure!(within(WAITS, || Ok(waits.has_ended()?.then_some(())))?.is_none(), "an unknown pod has passed");
    let mut directory = mesh.directory();
    let mut new = directory[0].clone();
    new.name = "new".to_owned();
    new.addresses = vec!["10.77.1.200".parse()?];
    directory.push(new);
    mesh.agent("a")?.files().set_directory(&directory)?;
    let known = folders.call("ADD", "new", Some(1))?.finish()?;
    ensure!(!known.is_passed && reason(&known).contains("has no cgroup"), "{known:?}");
    let cgroup = mesh.pod("web")?.cgroup().with_file_name("shop_new");
    fs::create_dir(&cgroup)?;
    let covered = folders.call("ADD", "new", None)?.finish()?;
    fs::remove_dir(&cgroup)?;
    ensure!(covered.is_passed, "{covered:?}");
    drop(waits);

    mesh.agent_mut("a")?.kill()?;
    let dead = folders.call("ADD", "web", Some(1))?.finish()?;
    ensure!(!dead.is_passed && reason(&dead).contains("no agent answers at"), "{dead:?}");
    ensure!(folders.call("DEL", "web", None)?.finish()?.is_passed, "a pod can be removed");
    let mut waits = folders.call("ADD", "web", Some(20))?;
    ensure!(
        within(WAITS, || Ok(waits.has_ended()?.then_some(())))?.is_none(),
        "a pod has passed without an agent"
    );
    mesh.agent_mut("a")?.restart()?;
    ensure!(waits.finish()?.is_passed);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_pod_can_start_through_a_handover() -> Result<()> {
    let (mut mesh, folders) = node("cnihand", "")?;
    folders.wait_chained()?;
    let next = mesh.agent("a")?.start_standby(mesh.topology().node("a")?, "next")?;
    until("the next agent stands by", || {
        Ok(observe::status(&next).is_ok_and(|status| status["state"] == "standing_by").then_some(()))
    })?;
    ensure!(folders.call("ADD", "web", None)?.finish()?.is_passed, "the first agent answers");
    mesh.agent("a")?.send_sigterm()?;
    ensure!(folders.call("ADD", "web", None)?.finish()?.is_passed, "one of them answers");
    ensure!(mesh.agent_mut("a")?.wait_end()?.success());
    ensure!(folders.call("ADD", "web", None)?.finish()?.is_passed, "the next agent answers");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn the_plugin_stays_in_the_configuration_until_it_is_not_wanted() -> Result<()> {
    let (mut mesh, folders) = node("cnikeep", ", exemptNamespaces: [kube-system, ops], timeout: 7s")?;
    let entry = folders.wait_chained()?;
    let socket = mesh.agent("a")?.files().state_path().join("state/sandboxes.sock");
    ensure!(entry["socket"] == json!(socket) && entry["timeoutSeconds"] == 7, "{entry}");
    ensure!(entry["exemptNamespaces"] == json!(["kube-system", "ops"]), "{entry}");
    let named = |name: &str| -> Result<()> {
        let path = folders.configurations().join(name);
        let agent = mesh.agent("a")?;
        until("the configuration in the status", || {
            Ok((shown(agent)?["configuration"] == json!(path)).then_some(()))
        })
    };
    named("10-pods.conflist")?;
    // Its owner writes it anew, and another network comes before it.
    folders.write("10-pods.conflist")?;
    folders.wait_chained()?;
    folders.write("05-other.conflist")?;
    folders.wait_chained()?;
    named("05-other.conflist")?;
    let agent = mesh.agent("a")?;
    ensure!(observe::metric(agent, "tacit_cni_plugin_installed", &[])? == 1);

    configure(&mut mesh, &folders, ", enabled: false")?;
    until("the plugin out of the configuration", || Ok(folders.entry()?.is_none().then_some(())))?;
    ensure!(folders.has_program(), "a runtime may call it for pods that it made before");
    ensure!(!mesh.agent("a")?.metrics()?.contains("tacit_cni_plugin_installed "));
    configure(&mut mesh, &folders, "")?;
    folders.wait_chained()?;
    mesh.agent_mut("a")?.terminate()?;
    ensure!(folders.entry()?.is_some() && folders.has_program(), "an agent that ends leaves it");
    let printed = mesh.agent("a")?.uninstall()?;
    ensure!(printed.contains("removed the CNI plugin from"), "{printed}");
    ensure!(folders.entry()?.is_none() && !folders.has_program());
    Ok(())
}

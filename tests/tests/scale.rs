//! Pod objects that never run: policies hold and pods are enrolled as without them.

use std::{
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tacit_tests::{Plan, observe};
use tacit_topology::{Tunnel, WorkloadEntry};

/// Pod objects of one namespace that name the node and have no cgroup there.
const DEAD: u16 = 10_000;
/// Pods of one namespace without a cgroup that the status lists.
const LISTED: usize = 128;
const CHANGES: usize = 5;

#[test]
#[ignore = "needs root"]
fn pod_objects_that_never_run_delay_no_policy_and_no_pod() -> Result<()> {
    let mesh = Plan::new("scale").pod("a", "shop", "web").with_agents()?;
    let (agent, node) = (mesh.agent("a")?, mesh.pod("web")?.node().to_owned());
    let without = change_policies(agent)?;
    let mut directory = mesh.directory();
    directory.extend((0..DEAD).map(|number| dead(&node, number)));
    agent.files().set_directory(&directory)?;
    let of_dead = |status: &Value| {
        let pods = status["pods"].as_array().into_iter().flatten();
        pods.filter(|pod| pod["namespace"] == "dead").count()
    };
    observe::wait_status(agent, "the dead pods listed", |status| (of_dead(status) == LISTED).then_some(()))?;
    let with = change_policies(agent)?;
    eprintln!("a policy is in force after {without:?}, and after {with:?} with {DEAD} pods that never run");
    let late = mesh.topology().node("a")?.pod("shop", "late")?;
    directory.push(WorkloadEntry::of(&late));
    agent.files().set_directory(&directory)?;
    let process = late.keep_alive()?;
    observe::wait_status(agent, "a new pod enrolled beside them", |status| {
        pod(status, "late").filter(|pod| pod["state"] == "enrolled").map(drop)
    })?;
    drop(process);
    Ok(())
}

/// Changes the mode of the mesh some times. Returns the median time until a pod has it.
fn change_policies(agent: &tacit_topology::Agent) -> Result<Duration> {
    let mut times = Vec::new();
    for mode in ["STRICT", "PERMISSIVE"].into_iter().cycle().take(2 * CHANGES) {
        let begin = Instant::now();
        agent.files().set_policy(&format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
             metadata: {{name: default, namespace: istio-system}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
        ))?;
        observe::wait_status(agent, "the mode", |status| {
            pod(status, "web").filter(|pod| pod["mode"] == mode).map(drop)
        })?;
        times.push(begin.elapsed());
    }
    times.sort();
    let median = times.get(CHANGES).copied().context("some changes")?;
    ensure!(!median.is_zero());
    Ok(median)
}

fn pod(status: &Value, name: &str) -> Option<Value> {
    status["pods"].as_array()?.iter().find(|pod| pod["name"] == name).cloned()
}

fn dead(node: &str, number: u16) -> WorkloadEntry {
    WorkloadEntry {
        name: format!("dead-{number}"),
        namespace: "dead".to_owned(),
        service_account: format!("dead-{number}"),
        addresses: vec![IpAddr::V6(Ipv6Addr::new(0xfd77, 0xdead, 0, 0, 0, 0, 0, number))],
        node: node.to_owned(),
        labels: Vec::new(),
        tunnel: Tunnel::Tacit,
        egress: None,
    }
}

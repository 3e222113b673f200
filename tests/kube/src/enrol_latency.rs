//! Latency of enrolment of a new pod.
//!
//! Two clocks: from the start of the first process that the sandbox keeps, as the kernel tells it in hundredths of a second,
//! to the agent's line in its log; and the agent's own, from the first look that found a process in the pod's cgroup. That is
//! the earlier one: the runtime's process is there before it enters the pod's network.

use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tacit_topology::run;
use xtask_support::workspace::Workspace;

use super::{
    checks::{self, is_enrolled, pod_in},
    cluster::Cluster,
    install::{agent_on, status},
    load,
    node::Node,
    pods::{self, SHOP},
};
use crate::deploy::NAMESPACE;

/// Of each batch on each node: one of an account that the node has, one of a new one.
const KINDS: [&str; 2] = ["known", "new"];
const BATCHES: usize = 6;
/// The median's target, from the sandbox's start.
const TARGET: Duration = Duration::from_millis(50);

/// The measurements of one pod.
struct Enrolment {
    by_agent: Duration,
    since_sandbox: Duration,
}

pub(super) fn enrolled(_: &Workspace, cluster: &Cluster) -> Result<String> {
    let mut all = Vec::new();
    for batch in 0..BATCHES {
        all.extend(start(cluster, batch)?);
    }
    ensure!(all.len() == BATCHES * KINDS.len() * cluster.nodes.len(), "{} pods were measured", all.len());
    let by_agent = Spread::of(all.iter().map(|pod| pod.by_agent));
    let since_sandbox = Spread::of(all.iter().map(|pod| pod.since_sandbox));
    let said = format!("{} pods: {since_sandbox}; by the agent's clock {by_agent}", all.len());
    ensure!(since_sandbox.median <= TARGET, "above {TARGET:?}: {said}");
    Ok(said)
}

fn start(cluster: &Cluster, batch: usize) -> Result<Vec<Enrolment>> {
    let (mut objects, mut names) = (Vec::new(), Vec::new());
    for node in &cluster.nodes {
        for kind in KINDS {
            let name = format!("{kind}-{batch}-{}", node.plan.name);
            match kind {
                "new" => objects.extend(pods::with_account(SHOP, &name, node.plan.name, "sleep infinity")),
                _ => objects.push(pods::pod(SHOP, &name, node.plan.name, "sleep infinity")),
            }
            names.push((node, name));
        }
    }
    cluster.apply(&objects)?;
    let mut found = Vec::new();
    for (node, name) in &names {
        checks::is(cluster, node.plan.name, name, "enrolled", is_enrolled)?;
        found.push(measure(cluster, node, name)?);
    }
    let names: Vec<&str> = names.iter().map(|(_, name)| name.as_str()).collect();
    pods::end(cluster, SHOP, &names)?;
    Ok(found)
}

fn measure(cluster: &Cluster, node: &Node, name: &str) -> Result<Enrolment> {
    let log =
        cluster.kubectl(&["-n", NAMESPACE, "logs", &agent_on(cluster, node.plan.name)?, "--tail=-1"])?;
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let is_it = |line: &Value| line["message"] == "enrolled" && line["pod"] == name;
    let line = lines.into_iter().find(is_it).context("the agent did not log the enrolment")?;
    let took = line["took_ms"].as_u64().context("an enrolment without its time")?;
    let logged = line["timestamp"].as_str().context("a line without its time")?;
    let begun = sandbox_start(cluster, node, name)?;
    let since_sandbox = since_boot(node, logged)?.saturating_sub(begun);
    Ok(Enrolment { by_agent: Duration::from_millis(took), since_sandbox })
}

/// Returns the start of the first of a pod's processes, since boot.
fn sandbox_start(cluster: &Cluster, node: &Node, name: &str) -> Result<Duration> {
    let pod = pod_in(&status(cluster, node.plan.name)?, name)?;
    let cgroup = pod["cgroup"].as_str().context("a pod without its cgroup")?;
    // The 22nd field, of which two are before the parenthesis.
    let script = format!(
        "for p in $(cat {cgroup}/*/cgroup.procs); do sed 's/.*) //' /proc/$p/stat | cut -d' ' -f20; done | sort -n | head -n1"
    );
    let ticks: u64 = run(node.command("sh").args(["-c", &script]))?.trim().parse().context("no process")?;
    Ok(Duration::from_millis(ticks * 10))
}

/// A time of the wall's clock, since boot.
fn since_boot(node: &Node, wall: &str) -> Result<Duration> {
    let seconds: f64 = run(node.command("date").args(["-d", wall, "+%s.%N"]))?.trim().parse()?;
    let boot = UNIX_EPOCH.elapsed()?.saturating_sub(load::now()?);
    Ok(Duration::from_secs_f64(seconds).saturating_sub(boot))
}

/// The middle and the longest of some times.
struct Spread {
    median: Duration,
    longest: Duration,
}

impl Spread {
    fn of(times: impl Iterator<Item = Duration>) -> Self {
        let mut times: Vec<Duration> = times.collect();
        times.sort();
        let at = |index: usize| times.get(index).copied().unwrap_or_default();
        Self { median: at(times.len() / 2), longest: at(times.len().saturating_sub(1)) }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "median {} ms, longest {} ms", self.median.as_millis(), self.longest.as_millis())
    }
}

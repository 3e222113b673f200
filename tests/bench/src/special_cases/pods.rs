//! A full node: how long the agent takes for each pod, how much memory, and what it uses while the pods do nothing.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tacit_topology::{Pod, WorkloadEntry};

use crate::{
    cases::Better,
    figures::Figure,
    programs::Programs,
    testbed::{Testbed, wait_enrolled},
    usage,
};

/// Pods added to the two that are there: a node of 250 pods, the most that large providers set as `maxPods`.
const PODS: u16 = 248;
/// Time for which the agent's processor time is measured while the pods do nothing. It contains some of its periodic scans.
const SILENCE: Duration = Duration::from_secs(30);

/// Runs it: the agent is started over with the few pods and with the many.
pub(super) fn run(programs: &Programs) -> Result<Vec<Figure>> {
    let mut testbed = Testbed::tacit("pods", programs, "")?;
    let few = testbed.restart("a")?;
    let rss_few = usage::rss(&testbed.proxies()?[0])?;
    let node = testbed.topology().node("a")?;
    let pods: Vec<Pod> =
        (0..PODS).map(|number| node.pod("many", &format!("pod{number}"))).collect::<Result<_>>()?;
    let holds = pods.iter().map(Pod::keep_alive).collect::<Result<Vec<_>>>()?;
    let all = [&testbed.client, &testbed.near, &testbed.far].into_iter().chain(&pods);
    let directory: Vec<WorkloadEntry> = all.map(WorkloadEntry::of).collect();
    let begin = Instant::now();
    testbed.agent("a")?.files().set_directory(&directory)?;
    wait_for(&testbed, usize::from(PODS) + 2)?;
    let live = begin.elapsed();
    let many = testbed.restart("a")?;
    wait_for(&testbed, usize::from(PODS) + 2)?;
    let agent = testbed.proxies()?[0].clone();
    let rss_many = usage::rss(&agent)?;
    let before = usage::cpu(&agent)?;
    sleep(SILENCE);
    let idle = (usage::cpu(&agent)? - before).total() * 1e3 / SILENCE.as_secs_f64();
    drop(holds);
    testbed.close()?;
    let each = |value: f64| value / f64::from(PODS);
    let row = |name: &str, what: &str, unit, value| {
        Figure::alone("pods", name, format!("{PODS} pods on one node: {what}"), (unit, Better::Lower), value)
    };
    let per_start = each((many.as_secs_f64() - few.as_secs_f64()) * 1e3);
    let mut start = row("start", "time of each at the agent's start", "ms/pod", per_start);
    start.extra = vec![
        ("start_seconds_few".to_owned(), json!(few.as_secs_f64())),
        ("start_seconds_many".to_owned(), json!(many.as_secs_f64())),
    ];
    let mut memory = row("rss", "memory of each", "KiB/pod", each((rss_many - rss_few) / 1024.0));
    memory.extra = vec![("rss_few".to_owned(), json!(rss_few)), ("rss_many".to_owned(), json!(rss_many))];
    let live = row(
        "live",
        "time of each, all added at once while the agent runs",
        "ms/pod",
        each(live.as_secs_f64() * 1e3),
    );
    let idle = row("idle", "CPU while they do nothing", "ms/s", idle);
    Ok(vec![start, live, memory, idle])
}

/// Waits until that many pods of node a are enrolled.
fn wait_for(testbed: &Testbed, count: usize) -> Result<()> {
    let agent = testbed.agent("a")?;
    tacit_topology::until(&format!("{count} pods enrolled"), || {
        let status: Value = serde_json::from_str(&agent.status()?)?;
        let enrolled = status["pods"]
            .as_array()
            .map_or(0, |pods| pods.iter().filter(|pod| pod["state"] == "enrolled").count());
        ensure!(enrolled <= count, "{enrolled} pods are enrolled, {count} are there");
        Ok((enrolled == count).then_some(()))
    })?;
    wait_enrolled(agent)
}

//! Open and silent flows: what each holds in memory, what all of them use of the CPU, and what is left when they have
//! gone.

use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tacit_topology::Process;

use crate::{cases::Better, figures::Figure, load, programs::Programs, servers, testbed::Testbed, usage};

/// Flows. Each takes two descriptors of an agent, some machines give a process no more than 20,000, and one client has 3,890 of the
/// 8,750 connections that these make.
const FLOWS: u32 = 3500;
/// Silence in which CPU time is taken; a tick of it is 1 ms a second.
const SILENCE: Duration = Duration::from_secs(10);
/// Time for memory to come back after the last flow has closed.
const AFTERWARDS: Duration = Duration::from_secs(15);

/// Runs it.
pub(super) fn run(programs: &Programs) -> Result<Vec<Figure>> {
    let testbed = Testbed::tacit("idle", programs, "")?;
    let proxies = testbed.proxies()?;
    let rss = || -> Result<[f64; 2]> { Ok([usage::rss(&proxies[0])?, usage::rss(&proxies[1])?]) };
    let to = servers::echo_of(&testbed.far, 2);
    // Some work first: an agent that never did any has not touched its own code yet.
    load::requests(&testbed.client, &programs.load, "echo", to, (8, 64, 1))?;
    let before = rss()?;
    let mut command = testbed.client.command(&programs.load);
    command.args(["idle", &to.to_string(), &FLOWS.to_string()]);
    let mut flows = Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
    let mut told = BufReader::new(flows.take_stdout().context("no pipe from tacit-load")?).lines();
    let mut next = |what: &str| -> Result<Value> {
        let line = told.next().with_context(|| format!("tacit-load ended before it told {what}"))??;
        let value: Value = serde_json::from_str(&line)?;
        ensure!(value[what] == FLOWS, "tacit-load told {line}, not {what}");
        Ok(value)
    };
    let opened = next("open")?;
    let cpu =
        || -> Result<[f64; 2]> { Ok([usage::cpu(&proxies[0])?.total(), usage::cpu(&proxies[1])?.total()]) };
    // Work left over from opening them does not count as idle.
    sleep(Duration::from_secs(1));
    let (open, cpu_before, begin) = (rss()?, cpu()?, Instant::now());
    sleep(SILENCE);
    let (cpu_after, silence) = (cpu()?, begin.elapsed());
    drop(flows.take_stdin());
    next("closed")?;
    let after = least(rss)?;
    drop(flows);
    testbed.close()?;
    let mut rows = Vec::new();
    for (at, node) in ["a", "b"].into_iter().enumerate() {
        let per_flow = (open[at] - before[at]) / 1024.0 / f64::from(FLOWS);
        let used = (cpu_after[at] - cpu_before[at]) * 1e3 / silence.as_secs_f64();
        let what = |what: &str| format!("{FLOWS} idle flows, agent {}: {what}", node.to_uppercase());
        let mut row = |name: &str, text: &str, unit, value| {
            let name = format!("{name}-{node}");
            rows.push(Figure::alone("idle-flows", &name, what(text), (unit, Better::Lower), value));
        };
        row("rss", "memory of each", "KiB/flow", per_flow);
        row("cpu", "CPU while silent", "ms/s", used);
        row(
            "rss-after",
            &format!("memory {} s after they closed", AFTERWARDS.as_secs()),
            "x before",
            after[at] / before[at],
        );
        for row in rows.iter_mut().rev().take(3) {
            row.extra = vec![
                ("rss_before".to_owned(), json!(before[at])),
                ("rss_open".to_owned(), json!(open[at])),
                ("rss_after".to_owned(), json!(after[at])),
                ("open_seconds".to_owned(), opened["seconds"].clone()),
            ];
        }
    }
    Ok(rows)
}

/// The least memory of each agent within the time it has to give it back.
fn least(rss: impl Fn() -> Result<[f64; 2]>) -> Result<[f64; 2]> {
    let begin = Instant::now();
    let mut least = [f64::INFINITY; 2];
    while begin.elapsed() < AFTERWARDS {
        sleep(Duration::from_millis(500));
        let now = rss()?;
        least = [least[0].min(now[0]), least[1].min(now[1])];
    }
    Ok(least)
}

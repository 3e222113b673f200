//! Cost of each BPF program: its runs and their time, as the kernel counts them while `kernel.bpf_stats_enabled` is
//! set. Counting adds some 20 ns to a run, which is part of the figures.

use std::{collections::BTreeMap, fs};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{
    cases::{self, Better},
    figures::Figure,
    load::Work,
    programs::Programs,
    rounds::Plan,
    testbed::Testbed,
};

const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";
/// Bulk for the programs that see packets, connections for those that see system calls.
const LOADS: [&str; 2] = ["throughput-x1", "connect-x1"];

/// Time and number of a program's runs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Runs {
    time_ns: f64,
    count: f64,
}

/// Runs it.
pub(super) fn run(programs: &Programs, plan: Plan) -> Result<Vec<Figure>> {
    let testbed = Testbed::tacit("kernel", programs, "")?;
    let counting = Counting::start()?;
    let mut totals = Vec::new();
    for name in LOADS {
        let case = cases::named(name).with_context(|| format!("no case {name}"))?;
        let before = of_both(&testbed)?;
        let done = case.run(&testbed, programs, plan.seconds)?;
        totals.push((before, of_both(&testbed)?, done.work));
    }
    drop(counting);
    let mut rows = Vec::new();
    for node in ["a", "b"] {
        rows.extend(of_node(&testbed, node, &totals)?);
    }
    testbed.close()?;
    Ok(rows)
}

type Snapshot = BTreeMap<u64, Runs>;

/// A line for each program that the agent of the node reports. The kernel counts by program, wherever it is attached.
fn of_node(testbed: &Testbed, node: &str, totals: &[(Snapshot, Snapshot, Work)]) -> Result<Vec<Figure>> {
    let status: Value = serde_json::from_str(&testbed.agent(node)?.status()?).context("status is no JSON")?;
    let programs = listed(&status)?;
    ensure!(!programs.is_empty(), "the agent of node {node} reports no program");
    programs.iter().map(|(id, program)| line(node, *id, program, totals)).collect()
}

/// A program and where it is attached.
#[derive(Debug, Default, PartialEq)]
struct Program {
    name: String,
    places: Vec<String>,
}

/// The programs in a status, by their ids.
fn listed(status: &Value) -> Result<BTreeMap<u64, Program>> {
    let mut programs = BTreeMap::<u64, Program>::new();
    for entry in status["programs"].as_array().context("status lists no programs")? {
        let id = entry["id"].as_u64().with_context(|| format!("a program without id: {entry}"))?;
        let text =
            |key: &str| entry[key].as_str().with_context(|| format!("a program without {key}: {entry}"));
        let program = programs.entry(id).or_default();
        text("name")?.clone_into(&mut program.name);
        program.places.push(text("attached_to")?.to_owned());
    }
    Ok(programs)
}

fn line(node: &str, id: u64, program: &Program, totals: &[(Snapshot, Snapshot, Work)]) -> Result<Figure> {
    let mut all = Runs::default();
    let mut per = Vec::new();
    for (before, after, work) in totals {
        let (Some(before), Some(after)) = (before.get(&id), after.get(&id)) else {
            bail!(
                "program {} (id {id}) of node {node}: the agent has no descriptor to read its runs",
                program.name
            );
        };
        let runs = Runs { time_ns: after.time_ns - before.time_ns, count: after.count - before.count };
        all = Runs { time_ns: all.time_ns + runs.time_ns, count: all.count + runs.count };
        per.push(match work {
            Work::Bytes(bytes) => ("runs_per_gib", runs.count * f64::from(1 << 30) / bytes),
            Work::Requests(requests) => ("runs_per_connection", runs.count / requests),
        });
    }
    let Program { name, places } = program;
    let what = format!("BPF {name}, node {node}: {:.0} runs a GiB, {:.1} a connection", per[0].1, per[1].1);
    // Without runs this is no number, and shown so.
    let each = all.time_ns / all.count;
    let mut row = Figure::alone("kernel", &format!("{node}-{name}"), what, ("ns/run", Better::Lower), each);
    row.extra = vec![
        ("program".to_owned(), json!(name)),
        ("attached_to".to_owned(), json!(places)),
        ("runs".to_owned(), json!(all.count)),
    ];
    row.extra.extend(per.into_iter().map(|(name, value)| (name.to_owned(), json!(value))));
    Ok(row)
}

/// Runs so far of all programs that an agent has a descriptor of, by the program's id.
fn of_both(testbed: &Testbed) -> Result<Snapshot> {
    let mut all = Snapshot::new();
    for id in testbed.proxies()?.into_iter().flatten() {
        let folder = format!("/proc/{id}/fdinfo");
        for entry in fs::read_dir(&folder).with_context(|| format!("list {folder}"))?.flatten() {
            // A descriptor may be closed meanwhile.
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            all.extend(parse(&text));
        }
    }
    Ok(all)
}

/// The text of a program's descriptor in fdinfo (kernel/bpf/syscall.c, `bpf_prog_show_fdinfo`); links have no runs.
fn parse(text: &str) -> Option<(u64, Runs)> {
    let field =
        |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
    let runs = Runs { time_ns: field("run_time_ns:")? as f64, count: field("run_cnt:")? as f64 };
    Some((field("prog_id:")?, runs))
}

/// The kernel counts while this lives; then the switch stands as before.
struct Counting {
    before: String,
}

impl Counting {
    fn start() -> Result<Self> {
        let before = fs::read_to_string(SWITCH).with_context(|| format!("read {SWITCH}"))?;
        fs::write(SWITCH, "1").with_context(|| format!("write {SWITCH}"))?;
        Ok(Self { before })
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        if let Err(error) = fs::write(SWITCH, &self.before) {
            eprintln!("{SWITCH} stays 1, it was {}: {error}", self.before.trim());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_attached_twice_is_one_program() {
        let status = json!({"programs": [
            {"name": "steer", "id": 7, "attached_to": "netns 1"},
            {"name": "steer", "id": 7, "attached_to": "netns 2"},
        ]});
        let places = vec!["netns 1".to_owned(), "netns 2".to_owned()];
        let expected = BTreeMap::from([(7, Program { name: "steer".to_owned(), places })]);
        assert_eq!(listed(&status).expect("readable"), expected);
        assert!(listed(&json!({"programs": [{"name": "steer"}]})).is_err());
    }

    #[test]
    fn only_a_program_has_runs() {
        let program =
            "pos:\t0\nprog_type:\t18\nprog_jited:\t1\nprog_id:\t42\nrun_time_ns:\t9000\nrun_cnt:\t30\n";
        assert_eq!(parse(program), Some((42, Runs { time_ns: 9000.0, count: 30.0 })));
        assert_eq!(parse("link_type:\tcgroup\nlink_id:\t5\nprog_id:\t42\n"), None);
    }
}

//! A namespace that is enrolled while its pods talk.
//!
//! ```text
//! node1                                  node2
//! yard/caller ── held, new ───────────── yard/host        in the mesh, both enrolled: reset, then tunnelled
//!       │└────── held ────────────────── outside/depot    in the mesh's ranges, in clear: reset
//!       └─────── held ────────────────── outside/ferry    on the node's network, no part of the mesh: goes on
//! outside/visitor ── held ────────────── outside/depot    of another namespace: goes on
//! ```

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use xtask_support::workspace::Workspace;

use super::{
    checks::{self, ENROLLED, encrypted, is_enrolled},
    cluster::Cluster,
    install::status,
    load::{self, ECHO, Ends, Held, Stream},
    pods::{self, MARKER, OUTSIDE},
    wire,
};

const YARD: &str = "yard";
const HELD: usize = 4;
const OTHERS: usize = 2;
/// New connections in a row that have to be answered before the label, and after it.
const STREAM: usize = 20;
/// The port on the node's network.
const FERRY: u16 = 9001;
/// For new connections to be answered again. Both agents read the label within a second, and the pods of the second may
/// be reached before it has; a connection that hangs counts for 3 s.
const OUTAGE: Duration = Duration::from_secs(5);

/// Each kind of connection: by whom it is held, its name, how many, and whether enrolment ends it.
const KINDS: [(&str, &str, &str, usize, bool); 4] = [
    (YARD, "caller", "mesh", HELD, true),
    (YARD, "caller", "clear", OTHERS, true),
    (YARD, "caller", "node", OTHERS, false),
    (OUTSIDE, "visitor", "other", OTHERS, false),
];

pub(super) fn enrolled(_: &Workspace, cluster: &Cluster) -> Result<String> {
    start(cluster)?;
    load::answered(cluster, YARD, "caller", STREAM)?;
    for (namespace, pod, name, number, _) in KINDS {
        cluster.eventually("connections are held", |cluster| {
            let found = load::ends(cluster, namespace, pod, name)?;
            ensure!(found == Ends { ended: 0, alive: number }, "{name}: {found:?}");
            Ok(())
        })?;
    }
    let clear = wire::during(cluster, || load::answered(cluster, YARD, "caller", STREAM))?;
    let in_clear = clear.occurrences(MARKER.as_bytes());
    ensure!(in_clear >= 2 * STREAM, "the marker was read {in_clear} times before: nothing would be seen");

    let (before, labelled) = (resets(cluster)?, load::now()?);
    cluster.kubectl(&["label", "namespace", YARD, ENROLLED])?;
    for (node, pod) in [("node1", "caller"), ("node2", "host")] {
        checks::is(cluster, node, pod, "enrolled", is_enrolled)?;
    }
    load::answered(cluster, YARD, "caller", STREAM)?;
    encrypted(&wire::during(cluster, || load::answered(cluster, YARD, "caller", STREAM))?)?;
    for (namespace, pod, name, number, is_reset) in KINDS {
        let found = load::ends(cluster, namespace, pod, name)?;
        let (ended, alive) = if is_reset { (number, 0) } else { (0, number) };
        ensure!(found == Ends { ended, alive }, "{name}: {found:?}, of {number}");
    }
    let reset = resets(cluster)? - before;
    ensure!(reset >= (HELD + OTHERS) as u64, "the agents count {reset} resets");
    let stream = Stream::of(cluster, YARD, "caller", labelled)?;
    let outage = stream.outage()?;
    ensure!(outage <= OUTAGE, "new connections failed for {outage:?}");
    cluster.kubectl(&["delete", "namespace", YARD, "--wait=false"])?;
    pods::end(cluster, OUTSIDE, &["depot", "ferry", "visitor"])?;
    Ok(format!(
        "reset: {HELD} held in the mesh, {OTHERS} held with a pod in clear (agents count {reset} ends); not reset: {OTHERS} \
         with a node, {OTHERS} of another namespace; {} of {} new failed, within {:.2} s",
        stream.failed(),
        stream.made(),
        outage.as_secs_f64()
    ))
}

fn start(cluster: &Cluster) -> Result<()> {
    let [near, far] = cluster.nodes.as_slice() else { bail!("there are two nodes") };
    let (near, far) = (near.plan, far.plan);
    cluster.apply(&[pods::namespace(YARD)])?;
    cluster.eventually("the service account", |cluster| {
        cluster.kubectl(&["-n", YARD, "get", "serviceaccount", "default"]).map(drop)
    })?;
    let mut ferry = pods::pod(OUTSIDE, "ferry", far.name, &load::echo(FERRY));
    ferry["spec"]["hostNetwork"] = json!(true);
    let depot = pods::pod(OUTSIDE, "depot", far.name, &load::echo(ECHO));
    let host = pods::pod(YARD, "host", far.name, &load::serve());
    let idle = |namespace, name| pods::pod(namespace, name, near.name, "sleep infinity");
    cluster.apply(&[host, idle(YARD, "caller"), depot, ferry, idle(OUTSIDE, "visitor")])?;
    pods::ready(cluster, YARD, &["pod/host", "pod/caller"])?;
    pods::ready(cluster, OUTSIDE, &["pod/depot", "pod/ferry", "pod/visitor"])?;
    let host = pods::address(cluster, YARD, "host")?;
    let depot = pods::address(cluster, OUTSIDE, "depot")?;
    let held = |name, to, port, line, number| Held { name, to, port, line, number };
    let held_by_caller = [
        held("mesh", host.as_str(), ECHO, MARKER, HELD),
        held("clear", depot.as_str(), ECHO, "tick", OTHERS),
        held("node", far.address, FERRY, "tick", OTHERS),
    ];
    let held_by_visitor = [held("other", depot.as_str(), ECHO, "tick", OTHERS)];
    load::begin(cluster, YARD, "caller", &held_by_caller, Some(&host))?;
    load::begin(cluster, OUTSIDE, "visitor", &held_by_visitor, None)
}

/// Ends of connections that both agents have reset at an enrolment.
fn resets(cluster: &Cluster) -> Result<u64> {
    let of = |node| {
        let status = status(cluster, node)?;
        status["guard"]["resets_at_enrolment"].as_u64().context("a status without resets")
    };
    Ok(of("node1")? + of("node2")?)
}

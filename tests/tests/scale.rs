//! Pod objects that never run, and policies beyond the share of their namespace: others are not affected.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tacit_tests::{Client, Plan, Server, fresh_port, observe};
use tacit_topology::{Agent, Tunnel, WorkloadEntry, until};

/// Pod objects of one namespace that name the node and have no cgroup there.
const DEAD: u16 = 10_000;
/// Pods of one namespace without a cgroup that the status lists.
const LISTED: usize = 128;
const CHANGES: usize = 5;
/// A policy is in force within this many times what it takes without dead pods.
const SLOWER: u32 = 3;

#[test]
#[ignore = "needs root"]
fn pod_objects_that_never_run_delay_no_policy_no_pod_and_no_handover() -> Result<()> {
    let mut mesh = Plan::new("scale").pod("a", "shop", "web").with_agents()?;
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
    eprintln!("a policy is in force after {without:?}, and with {DEAD} pods that never run after {with:?}");
    ensure!(
        with.after_write <= SLOWER * without.after_write,
        "{without:?} without dead pods, {with:?} with them"
    );
    let late = mesh.topology().node("a")?.pod("shop", "late")?;
    directory.push(WorkloadEntry::of(&late));
    agent.files().set_directory(&directory)?;
    let process = late.keep_alive()?;
    observe::wait_status(agent, "a new pod enrolled beside them", |status| {
        pod(status, "late").filter(|pod| pod["state"] == "enrolled").map(drop)
    })?;
    let next = agent.start_standby(mesh.topology().node("a")?, "next")?;
    // The socket does not exist at first.
    until("the next agent standing by", || {
        Ok(observe::status(&next).is_ok_and(|status| status["state"] == "standing_by").then_some(()))
    })?;
    let log = observe::wait_log(&next, &["standing by to take over"])?;
    let has_certificate =
        |account: &str| log.lines().any(|line| line.contains("certificate issued") && line.contains(account));
    ensure!(has_certificate("/ns/shop/sa/web"), "{log}");
    ensure!(!has_certificate("/ns/dead/"), "waited for pods that never run: {log}");
    agent.send_sigterm()?;
    observe::wait_status(&next, "the pods enrolled", |status| {
        let is_enrolled = |name| pod(status, name).is_some_and(|pod| pod["state"] == "enrolled");
        (is_enrolled("web") && is_enrolled("late")).then_some(())
    })?;
    ensure!(mesh.agent_mut("a")?.wait_end()?.success(), "{}", mesh.agent("a")?.log()?);
    drop(process);
    Ok(())
}

/// Lookups for one connection in a namespace's policies, as `tacit_core::shares` has them.
const LOOKUPS: usize = 8192;

/// The text of the policy allows everything. A policy that is not applied must not.
#[test]
#[ignore = "needs root"]
fn policies_beyond_the_share_of_a_namespace_deny_to_its_pods_alone() -> Result<()> {
    let plan = Plan::new("polshare").pod("a", "shop", "client").outside("a", "shop", "stranger");
    let mesh = plan.pod("b", "mallory", "greedy").pod("b", "bank", "victim").with_agents()?;
    let agent = mesh.agent("b")?;
    let serve = |name: &str| {
        let pod = mesh.pod(name)?;
        let start = |ip: IpAddr| Server::start(pod, SocketAddr::new(ip, fresh_port()), &["echo"]);
        anyhow::Ok([start(pod.ipv4().into())?, start(pod.ipv6().into())?])
    };
    let (greedy, victim) = (serve("greedy")?, serve("victim")?);
    let echoes = |servers: &[Server], is_echoed: bool| {
        for server in servers {
            for client in ["client", "stranger"] {
                let echoed = Client::echo(mesh.pod(client)?, server.address(), "text");
                ensure!(echoed.is_ok() == is_echoed, "{client} at {}: {echoed:?}", server.address());
            }
        }
        Ok(())
    };
    let policy = |rules: usize| {
        let rules = "{}, ".repeat(rules);
        agent.files().set_policy(&format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
             metadata: {{name: many, namespace: mallory}}\nspec: {{rules: [{rules}]}}\n"
        ))
    };
    let is_applied = |status: &Value| Some(pod(status, "greedy")?["policy_not_applied"].is_null());
    let source = |status: &Value| {
        let sources = status["sources"].as_array()?;
        Some(sources.iter().find(|source| source["kind"] == "policy")?["unreadable"].to_string())
    };
    let note = "policies of namespace mallory are not applied";
    for server in [&greedy, &victim] {
        echoes(server, true)?;
    }
    for _ in 0..2 {
        let before = observe::refused(agent, "denied_by_policy")?;
        policy(LOOKUPS)?;
        observe::wait_status(agent, "the policy not applied", |status| {
            (!is_applied(status)?
                && pod(status, "greedy")?["mode"] == "STRICT"
                && pod(status, "victim")?["mode"] == "PERMISSIVE"
                && source(status)?.contains(note))
            .then_some(())
        })?;
        echoes(&greedy, false)?;
        echoes(&victim, true)?;
        observe::wait_refused(agent, "denied_by_policy", before, "ns/shop/sa/client")?;
        // One lookup for the policy itself and one for each rule.
        policy(LOOKUPS - 1)?;
        observe::wait_status(agent, "the policy applied", |status| {
            (is_applied(status)? && !source(status)?.contains(note)).then_some(())
        })?;
        echoes(&greedy, true)?;
    }
    Ok(())
}

/// Times from a change of policy until the policy is in force for a pod, as the agent logs them.
#[derive(Debug, Clone, Copy)]
struct InForce {
    /// From the write of the file. The source waits 100 ms for a file that settles.
    after_write: Duration,
    /// From the new version of the source.
    #[expect(dead_code, reason = "shown")]
    after_source: Duration,
    /// The longest such time.
    #[expect(dead_code, reason = "shown")]
    at_most: Duration,
}

/// Changes the mode of the mesh some times. Returns the median times until a pod has it.
fn change_policies(agent: &Agent) -> Result<InForce> {
    let mut times = Vec::new();
    for mode in ["STRICT", "PERMISSIVE"].into_iter().cycle().take(2 * CHANGES) {
        // Starting `tacit status` takes longer than the change.
        let before = agent.log()?.lines().count();
        let begin = Instant::now();
        agent.files().set_policy(&format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
             metadata: {{name: default, namespace: istio-system}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
        ))?;
        let since = |log: &str, file: &str, text: &str| {
            let new = |line: &&str| line.contains(file) && line.contains(text);
            log.lines().skip(before).find(new).map(seconds_of_day)
        };
        let (read, changed) = until("the policy in force", || {
            let log = agent.log()?;
            let read = since(&log, "policy.yaml", "valid version in use");
            Ok(read.zip(since(&log, "web", "policy changed")))
        })?;
        // The source logs after it has published.
        let after_source = (changed? - read?).max(0.0);
        times.push((begin.elapsed(), Duration::try_from_secs_f64(after_source)?));
    }
    observe::wait_status(agent, "the last mode", |status| {
        pod(status, "web").filter(|pod| pod["mode"] == "PERMISSIVE").map(drop)
    })?;
    let median = |mut times: Vec<Duration>| {
        times.sort();
        times.get(CHANGES).copied().context("some changes")
    };
    let (after_write, after_source): (Vec<_>, Vec<_>) = times.into_iter().unzip();
    let at_most = after_source.iter().max().copied().context("some changes")?;
    Ok(InForce { at_most, after_write: median(after_write)?, after_source: median(after_source)? })
}

/// Parses the time at the start of a log line, such as `2026-11-29T17:15:01.123456Z`.
fn seconds_of_day(line: &str) -> Result<f64> {
    let time = line.split_once('T').and_then(|(_, rest)| rest.split_once('Z'));
    let (time, _) = time.with_context(|| format!("no time in {line:?}"))?;
    time.split(':').try_fold(0.0, |sum, part| Ok(sum * 60.0 + part.parse::<f64>()?))
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
        connect: None,
    }
}

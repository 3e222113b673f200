//! Watched files of directory and policy: a valid new version applies at once, an invalid one is rejected and the last
//! valid one stays.
//!
//! Each test changes its mesh, so each has its own.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{net::SocketAddr, os::unix::fs::MetadataExt as _};
use tacit_tests::{Client, Plan, Server, fresh_port, observe};
use tacit_topology::{Agent, Pod, WorkloadEntry, until};

#[test]
#[ignore = "needs root"]
fn modes_of_mesh_namespace_workload_and_port_hold_as_soon_as_they_are_written() -> Result<()> {
    let mesh = plan().with_agents()?;
    let web = mesh.pod("web")?;
    let one = Server::start(web, SocketAddr::new(web.ipv4().into(), fresh_port()), &["shut"])?;
    let two = Server::start(web, SocketAddr::new(web.ipv6().into(), fresh_port()), &["shut"])?;
    let mesh_wide = policy("default", "istio-system", "mtls: {mode: STRICT}");
    let namespace = policy("shop", "shop", "mtls: {mode: PERMISSIVE}");
    let workload = policy("web", "shop", "selector: {matchLabels: {app: web}}\n  mtls: {mode: STRICT}");
    let port = format!(
        "{}\n  portLevelMtls:\n    {}: {{mode: DISABLE}}\n",
        workload.trim_end(),
        two.address().port()
    );
    // Expected access of a stranger to both ports, while the policy grows and shrinks again.
    let steps = [
        (vec![], [true, true]),
        (vec![&mesh_wide], [false, false]),
        (vec![&mesh_wide, &namespace], [true, true]),
        (vec![&mesh_wide, &namespace, &workload], [false, false]),
        (vec![&mesh_wide, &namespace, &port], [false, true]),
        (vec![&mesh_wide], [false, false]),
        (vec![], [true, true]),
    ];
    for (policies, expected) in steps {
        let text: String = policies.into_iter().map(String::as_str).collect();
        mesh.agent("b")?.files().set_policy(&text)?;
        for (server, expected) in [&one, &two].into_iter().zip(expected) {
            reaches(mesh.pod("stranger")?, server, expected).with_context(|| format!("policy:\n{text}"))?;
            Client::run(mesh.pod("client")?, server.address(), &["read-end"])?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_bad_policy_is_refused_and_the_last_good_one_stays() -> Result<()> {
    let mesh = plan().policy(&policy("default", "istio-system", "mtls: {mode: STRICT}")).with_agents()?;
    let web = mesh.pod("web")?;
    let server = Server::start(web, SocketAddr::new(web.ipv4().into(), fresh_port()), &["shut"])?;
    let agent = mesh.agent("b")?;
    for (number, invalid) in [
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: x}\nspec: {mtls: {mode: STRICTT}}\n",
        "kind: [",
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: x, namespace: shop}\nspec: {mtls: 7}\n",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: x, namespace: shop}\nspec: {action: DENIED}\n",
    ]
    .into_iter()
    .enumerate()
    {
        agent.files().set_policy(invalid)?;
        let refusals = number as u64 + 1;
        let error = observe::wait_status(agent, "the rejected policy", |status| {
            let source = source(status, "policy")?;
            (source["refusals"] == refusals).then(|| source["last_error"].clone())
        })?;
        let error = error.as_str().context("no error shown")?;
        ensure!(error.contains("policy.yaml:"), "no file and line in {error:?}");
        reaches(mesh.pod("stranger")?, &server, false)?;
        Client::run(mesh.pod("client")?, server.address(), &["read-end"])?;
    }
    let refused = [("source", "policy"), ("result", "refused")];
    assert_eq!(observe::metric(agent, "tacit_config_reloads_total", &refused)?, 4);
    observe::wait_log(agent, &["STRICTT"])?;
    // A valid policy is accepted again, and the error is cleared.
    agent.files().set_policy("")?;
    reaches(mesh.pod("stranger")?, &server, true)?;
    let error = observe::wait_status(agent, "the policy accepted", |status| {
        source(status, "policy").map(|source| source["last_error"].clone())
    })?;
    assert_eq!(error, Value::Null);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_bad_directory_is_refused_and_the_last_good_one_stays() -> Result<()> {
    let mesh = plan().with_agents()?;
    let web = mesh.pod("web")?;
    let server = Server::start(web, SocketAddr::new(web.ipv4().into(), fresh_port()), &["echo"])?;
    for node in ["a", "b"] {
        let agent = mesh.agent(node)?;
        agent.files().set_directory_text(
            "workloads:\n  - name: web\n    namespace: shop\n    addresses: [10.77.2.999]\n",
        )?;
        let error = observe::wait_status(agent, "the rejected directory", |status| {
            let source = source(status, "directory")?;
            (source["refusals"] == 1).then(|| source["last_error"].clone())
        })?;
        let error = error.as_str().context("no error shown")?;
        ensure!(error.contains("directory.yaml:") && error.contains("10.77.2.999"), "{error:?}");
        ensure!(error.contains("node"), "not all mistakes are reported: {error:?}");
    }
    let marker = format!("marker-after-invalid-directory-{}", std::process::id());
    let capture = mesh.topology().capture()?;
    Client::echo(mesh.pod("client")?, server.address(), &marker)?;
    assert_eq!(capture.finish()?.occurrences(marker.as_bytes()), 0);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_pod_that_comes_later_is_enrolled_and_one_that_goes_is_released() -> Result<()> {
    let mut mesh = plan().with_agents()?;
    let (a, b) = (mesh.agent("a")?, mesh.agent("b")?);
    let late = mesh.topology().node("b")?.pod("shop", "late")?;
    let mut directory = mesh.directory();
    directory.push(WorkloadEntry::of(&late));
    for agent in [a, b] {
        agent.files().set_directory(&directory)?;
    }
    // The agent finds the namespace through a process of the pod.
    observe::wait_status(b, "the pod waiting", |status| {
        pod(status, "late").filter(|pod| pod["state"] != "enrolled")
    })?;
    let process = late.keep_alive()?;
    observe::wait_status(b, "the pod enrolled", |status| {
        pod(status, "late").filter(|pod| pod["state"] == "enrolled")
    })?;
    observe::wait_status(a, "the directory loaded", |status| {
        source(status, "directory").and_then(|source| (source["loads"].as_u64() > Some(1)).then_some(()))
    })?;
    let server = Server::start(&late, SocketAddr::new(late.ipv4().into(), fresh_port()), &["echo"])?;
    let marker = format!("marker-of-a-late-pod-{}", std::process::id());
    let capture = mesh.topology().capture()?;
    Client::echo(mesh.pod("client")?, server.address(), &marker)?;
    let traffic = capture.finish()?;
    assert_eq!((traffic.occurrences(marker.as_bytes()), traffic.tunnel_bytes > 0), (0, true));
    drop((server, process));
    observe::wait_status(b, "the pod no longer enrolled", |status| {
        pod(status, "late").filter(|pod| pod["state"] != "enrolled")
    })?;
    // A process can still join the pod's cgroup, so the pod's entries stay, also over a restart.
    let id = std::fs::metadata(late.cgroup())?.ino();
    ensure!(!pins_of(b, id)?.is_empty(), "no pins of the pod");
    mesh.agent_mut("b")?.kill()?;
    mesh.agent_mut("b")?.restart()?;
    mesh.agent_mut("b")?.wait_ready()?;
    let (a, b) = (mesh.agent("a")?, mesh.agent("b")?);
    observe::wait_status(b, "the pod waiting again", |status| {
        pod(status, "late").filter(|pod| pod["state"] != "enrolled")
    })?;
    ensure!(
        pins_of(b, id)?.iter().any(|pin| pin.starts_with("steer-")),
        "the steering program of its namespace is not pinned"
    );
    for agent in [a, b] {
        agent.files().set_directory(&mesh.directory())?;
    }
    observe::wait_status(b, "the pod gone", |status| pod(status, "late").is_none().then_some(()))?;
    until("no pins of the pod", || Ok(pins_of(b, id)?.is_empty().then_some(())))
}

/// Returns the names of the links that are pinned for the pod with this cgroup.
fn pins_of(agent: &Agent, cgroup: u64) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for folder in std::fs::read_dir(agent.files().pin_path())? {
        let Ok(pins) = std::fs::read_dir(folder?.path()) else { continue };
        for pin in pins {
            names.push(pin?.file_name().to_string_lossy().into_owned());
        }
    }
    let of_pod = |name: &String| {
        ["steer", "guard"].iter().any(|kind| {
            let pod = name.strip_prefix(&format!("{kind}-")).and_then(|rest| rest.split('-').next());
            pod == Some(&cgroup.to_string())
        })
    };
    Ok(names.into_iter().filter(of_pod).collect())
}

fn plan() -> Plan {
    Plan::new("reload").pod("a", "shop", "client").pod("b", "shop", "web").outside("a", "shop", "stranger")
}

fn policy(name: &str, namespace: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec:\n  {spec}\n"
    )
}

/// Waits until `pod` reaches the server, or until it no longer does.
fn reaches(pod: &Pod, server: &Server, expected: bool) -> Result<()> {
    let mut last = Vec::new();
    let reached = until(&format!("reached: {expected}"), || {
        last = Client::run(pod, server.address(), &["read-end"])?;
        let ended = last.iter().any(|event| event["end"] == "eof");
        let reset = last.iter().any(|event| event["end"] == "ConnectionReset" || event["step"] == "connect");
        Ok(if expected { ended } else { reset }.then_some(()))
    });
    reached.with_context(|| format!("{}: last events {last:?}", pod.name()))
}

fn source<'a>(status: &'a Value, kind: &str) -> Option<&'a Value> {
    status["sources"].as_array()?.iter().find(|source| source["kind"] == kind)
}

fn pod(status: &Value, name: &str) -> Option<Value> {
    status["pods"].as_array()?.iter().find(|pod| pod["name"] == name).cloned()
}

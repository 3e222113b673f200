//! The cgroup of all pods, as nodes have it.
//!
//! - The cgroup root of a node is not the root of the kernel's hierarchy, as of kind: the node is a container with a cgroup namespace of its
//!   own. These tests run themselves again in such a node. The kernel still counts the levels of cgroups from the root of the whole
//!   hierarchy.
//! - The cgroup goes and is made anew while the agent runs, as if the node's kubelet starts with another cgroup driver and goes back.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    env, fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::{Command, Stdio},
};
use tacit_tests::{Client, Mesh, Plan, STRICT_MESH, Server, agent_program, fresh_port, observe};
use tacit_topology::{cgroup_mount, until};

/// Set in the run inside the node.
const INSIDE: &str = "TACIT_TEST_INSIDE";
/// Starts the rest of the arguments in a cgroup and a cgroup namespace of its own, with cgroup v2 mounted at the second argument.
const ENTER: &str = r#"echo $$ >"$0/cgroup.procs" && exec unshare --cgroup --mount --propagation private -- \
                       sh -c 'umount -l "$0" && mount -t cgroup2 none "$0" && exec "$@"' "$@""#;

/// Two cgroups, one in the other, and a program that starts the agent. All go at the end.
struct NestedNode {
    cgroup: PathBuf,
    agent: PathBuf,
}

impl NestedNode {
    fn make(name: &str, agent: AgentNamespace) -> Result<Self> {
        let name = format!("tacit-kind-{name}-{}", std::process::id());
        let made = Self { cgroup: cgroup_mount()?.join(&name), agent: env::temp_dir().join(&name) };
        fs::create_dir_all(made.cgroup.join("node"))?;
        let enter = match agent {
            AgentNamespace::OfNode => "",
            AgentNamespace::Own => "unshare --cgroup -- ",
        };
        let text = format!("#!/bin/sh\nexec {enter}{} \"$@\"\n", agent_program()?.display());
        fs::write(&made.agent, text)?;
        fs::set_permissions(&made.agent, fs::Permissions::from_mode(0o755))?;
        Ok(made)
    }
}

impl Drop for NestedNode {
    fn drop(&mut self) {
        for cgroup in [self.cgroup.join("node"), self.cgroup.clone()] {
            if let Err(error) = fs::remove_dir(&cgroup) {
                eprintln!("{} stays: {error}", cgroup.display());
            }
        }
        let _ = fs::remove_file(&self.agent);
    }
}

/// The cgroup namespace of the agents.
#[derive(Clone, Copy)]
enum AgentNamespace {
    /// The node's.
    OfNode,
    /// One of its own, as container runtimes make.
    Own,
}

/// Runs `test` inside a node with a cgroup root of its own.
fn inside(name: &str, agent: AgentNamespace, test: impl FnOnce() -> Result<()>) -> Result<()> {
    if env::var_os(INSIDE).is_some() {
        return test();
    }
    let node = NestedNode::make(name, agent)?;
    let mut command = Command::new("sh");
    command.args(["-c", ENTER]).arg(node.cgroup.join("node")).arg(cgroup_mount()?).arg(env::current_exe()?);
    command.args(["--exact", name, "--include-ignored", "--nocapture"]);
    command.env(INSIDE, "1").env("TACIT_BIN", &node.agent);
    let status = command.stdin(Stdio::null()).status().context("start the node")?;
    ensure!(status.success(), "inside the node: {status}");
    Ok(())
}

fn plan(tag: &str) -> Plan {
    Plan::new(tag)
        .pod("a", "shop", "client")
        .pod("b", "shop", "server")
        .outside("a", "shop", "stranger")
        .config("unnamedPodTimeout: 10s\n")
}

/// Checks that pods of the mesh use the tunnel, and that plaintext from outside is taken or refused by mode.
fn is_true_to_modes(mesh: &Mesh) -> Result<()> {
    let server = mesh.pod("server")?;
    let server = Server::start(server, SocketAddr::new(server.ipv4().into(), fresh_port()), &["echo"])?;
    let capture = mesh.topology().capture()?;
    Client::echo(mesh.pod("client")?, server.address(), "text of a pod")?;
    Client::echo(mesh.pod("stranger")?, server.address(), "text from outside")?;
    let capture = capture.finish()?;
    ensure!(capture.occurrences(b"text from outside") > 0, "the capture sees plaintext");
    ensure!(capture.occurrences(b"text of a pod") == 0, "PERMISSIVE: plaintext between pods");
    for node in ["a", "b"] {
        mesh.agent(node)?.files().set_policy(STRICT_MESH)?;
        observe::wait_modes(mesh.agent(node)?, "STRICT")?;
    }
    Client::echo(mesh.pod("client")?, server.address(), "text under STRICT")?;
    ensure!(Client::echo(mesh.pod("stranger")?, server.address(), "no").is_err(), "STRICT takes plaintext");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn modes_hold_under_a_nested_root() -> Result<()> {
    let test = || is_true_to_modes(&plan("kind").with_agents()?);
    inside("modes_hold_under_a_nested_root", AgentNamespace::OfNode, test)
}

#[test]
#[ignore = "needs root"]
fn modes_hold_if_the_agent_has_a_namespace_of_its_own_too() -> Result<()> {
    let test = || is_true_to_modes(&plan("kindc").with_agents()?);
    inside("modes_hold_if_the_agent_has_a_namespace_of_its_own_too", AgentNamespace::Own, test)
}

#[test]
#[ignore = "needs root"]
fn pods_are_captured_again_after_their_cgroup_was_made_anew() -> Result<()> {
    let mesh = plan("anew").with_agents()?;
    let (agent, server) = (mesh.agent("b")?, mesh.pod("server")?);
    let pods = mesh.topology().node("b")?.pods_cgroup();
    fs::write(pods.join("cgroup.kill"), "1").context("end all pods of the node")?;
    until("the pods' cgroup is gone", || {
        let _ = fs::remove_dir(server.cgroup());
        Ok(fs::remove_dir(&pods).is_ok().then_some(()))
    })?;
    observe::wait_status(agent, "the loss", |status| (status["state"] == "detached").then_some(()))?;
    ensure!(observe::metric(agent, "tacit_detached", &[])? == 1, "{}", agent.metrics()?);
    let pid = agent.id();

    fs::create_dir_all(server.cgroup())?;
    let _alive = server.keep_alive()?;
    // It does not answer while it starts again.
    until("a new start", || {
        Ok(observe::status(agent).ok().filter(|status| status["state"] == "ready").map(drop))
    })?;
    observe::wait_enrolled(agent)?;
    ensure!(agent.id() == pid, "the same process");
    ensure!(observe::metric(agent, "tacit_detached", &[])? == 0, "{}", agent.metrics()?);
    is_true_to_modes(&mesh)
}

/// Opens a connection while the agent of the client does not run, and returns its events once the agent is back. Before the connection,
/// detaches a program.
fn opened_without_agent(tag: &str, detached: Option<&str>, steps: &[&str]) -> Result<Vec<Value>> {
    let mut mesh = plan(tag).with_agents()?;
    ensure!(mesh.agent_mut("a")?.terminate()?.success());
    if let Some(program) = detached {
        // Nobody else holds the link.
        fs::remove_file(mesh.agent("a")?.files().pin_path().join("links").join(program))?;
    }
    let server = mesh.pod("server")?;
    let server = Server::start(server, SocketAddr::new(server.ipv4().into(), fresh_port()), &["echo"])?;
    let mut client = Client::start(mesh.pod("client")?, server.address(), steps)?;
    client.events().first("line")?;
    mesh.agent_mut("a")?.restart()?;
    mesh.agent_mut("a")?.wait_ready()?;
    observe::wait_enrolled(mesh.agent("a")?)?;
    if detached.is_none() {
        client.proceed()?;
    }
    client.finish()
}

#[test]
#[ignore = "needs root"]
fn connections_are_reset_that_a_detached_program_may_have_missed() -> Result<()> {
    let events = opened_without_agent("gap", Some("connect4"), &["send:one", "line", "read-end"])?;
    // The kernel reports so a socket that was closed from outside.
    ensure!(events.iter().any(|event| event["end"] == "ConnectionAborted"), "{events:?}");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn control_connections_stay_if_all_programs_were_attached() -> Result<()> {
    let steps = ["send:one", "line", "pause", "send:two", "line", "shut", "read-end"];
    let events = opened_without_agent("nogap", None, &steps)?;
    let has = |key: &str, value: &str| events.iter().any(|event| event[key] == value);
    ensure!(has("text", "two") && has("end", "eof"), "{events:?}");
    Ok(())
}

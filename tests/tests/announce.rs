//! Announcements of pods that take HBONE: the annotation that istiod reads follows enrolment, and belongs to its writer.
//!
//! The API is a server of this test in the node's network. It serves lists, watches, and patches of the status of pods.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::{fs, net::Ipv6Addr, net::SocketAddr};
use tacit_abi::tcp_port::OF_PROXIES;
use tacit_tests::{
    Client, Mesh, Plan, STRICT_MESH, Server, agent_program,
    api::{Api, PODS, enrolled_pod},
    fresh_port, observe,
};
use tacit_topology::{Agent, KUBELET_NAMESPACE, MeshFiles, until};

const REDIRECTION: &str = "ambient.istio.io/redirection";
const MARK: &str = "tacit.io/announced";
/// UIDs and names of the pods.
const UID: &str = "a11ce1";
const OTHER: &str = "a11ce2";
const PROXIED: &str = "a11ce3";

/// An agent of node `a`, its API, and the pods that both have.
struct Node {
    // The agent ends before its node goes.
    agent: Agent,
    api: Api,
    mesh: Mesh,
}

impl Node {
    fn start(tag: &str, policy: &str, prepare: impl FnOnce(&Api, &Mesh) -> Result<()>) -> Result<Self> {
        let plan = [UID, OTHER, PROXIED]
            .iter()
            .fold(Plan::new(tag), |plan, uid| plan.pod("a", KUBELET_NAMESPACE, uid));
        let mesh = plan.without_agents()?;
        let node = mesh.topology().node("a")?;
        let api = Api::start(node.netns())?;
        for uid in [UID, OTHER, PROXIED] {
            api.set(PODS, enrolled_pod(mesh.pod(uid)?, uid, "a"));
        }
        prepare(&api, &mesh)?;
        let files = MeshFiles::write(mesh.topology(), node, &[], policy, "")?;
        api.configure(&files)?;
        let config = fs::read_to_string(files.config())?;
        let announcing = config.replace("kubeconfig.yaml}", "kubeconfig.yaml, announce: ambient}");
        ensure!(config != announcing, "no directory in {config}");
        fs::write(files.config(), announcing)?;
        let mut agent = Agent::start(node, &agent_program()?, &files)?;
        agent.wait_ready()?;
        Ok(Self { agent, api, mesh })
    }

    /// Returns the annotation and the mark of a pod.
    fn annotations(&self, uid: &str) -> Result<(Value, Value)> {
        let annotations = self.api.pod(&name(uid))?["metadata"]["annotations"].clone();
        Ok((annotations[REDIRECTION].clone(), annotations[MARK].clone()))
    }

    fn is_announced(&self, uid: &str) -> Result<bool> {
        Ok(self.annotations(uid)? == (json!("enabled"), json!("true")))
    }

    fn wait_announced(&self, uid: &str) -> Result<()> {
        let announced = || Ok(self.is_announced(uid)?.then_some(()));
        until(&format!("pod {uid} announced"), announced).with_context(|| self.told())
    }

    fn wait_withdrawn(&self, uid: &str) -> Result<()> {
        let none = || Ok((self.annotations(uid)? == (Value::Null, Value::Null)).then_some(()));
        until(&format!("pod {uid} no longer announced"), none).with_context(|| self.told())
    }

    fn wait_status(&self, what: &str, is: impl Fn(&Value) -> bool) -> Result<()> {
        observe::wait_status(&self.agent, what, |status| is(&status["announced"]).then_some(()))
    }

    fn release(&self, uid: &str) -> Result<()> {
        self.api.change_pod(&name(uid), |pod| pod["metadata"]["labels"] = json!({}))
    }

    fn told(&self) -> String {
        format!("patches {:?}\nlog {}", self.api.patches(), self.agent.log().unwrap_or_default())
    }

    fn state_of(&self, uid: &str) -> Result<Value> {
        let status = observe::status(&self.agent)?;
        let pods = status["pods"].as_array().context("no pods")?;
        Ok(pods.iter().find(|pod| pod["name"] == uid).map_or(Value::Null, |pod| pod["state"].clone()))
    }
}

fn name(uid: &str) -> String {
    format!("{KUBELET_NAMESPACE}/{uid}")
}

#[test]
#[ignore = "needs root"]
fn pods_are_announced_after_enrolment_and_not_when_released_or_left_alone() -> Result<()> {
    let mut proxy = None;
    let port = OF_PROXIES[0];
    let start_proxy = |mesh: &Mesh| {
        Server::start(mesh.pod(PROXIED)?, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), &["echo"])
    };
    let node = Node::start("announc", "", |api, mesh| {
        proxy = Some(start_proxy(mesh)?);
        // As istio-cni writes it for a pod that this mesh does not enrol.
        api.change_pod(&name(OTHER), |pod| {
            pod["metadata"]["labels"] = json!({});
            pod["metadata"]["annotations"] = json!({REDIRECTION: "enabled"});
        })
    })?;
    node.wait_announced(UID)?;
    ensure!(node.state_of(UID)? == json!("enrolled"), "announced before it was enrolled");
    let is_left_alone = |uid: &str| Ok(node.state_of(uid)?["left_alone"].is_string().then_some(()));
    until("the pod with a proxy left alone", || is_left_alone(PROXIED))?;
    node.wait_status("one pod announced", |told| told["pods"] == 1 && told["pending"] == 0)?;
    ensure!(node.annotations(PROXIED)? == (Value::Null, Value::Null), "{}", node.told());

    drop(proxy.take());
    node.wait_announced(PROXIED)?;
    ensure!(node.state_of(PROXIED)? == json!("enrolled"), "announced before it was enrolled");
    let proxy = start_proxy(&node.mesh)?;
    node.wait_withdrawn(PROXIED)?;
    ensure!(is_left_alone(PROXIED)?.is_some(), "withdrawn, and not left alone");
    drop(proxy);
    node.wait_announced(PROXIED)?;

    node.release(UID)?;
    node.wait_withdrawn(UID)?;
    // Enrolled and released: the annotation is the agent's from its enrolment on.
    let label = json!({"tacit.io/enrol": "true"});
    node.api.change_pod(&name(UID), |pod| pod["metadata"]["labels"] = label)?;
    node.wait_announced(UID)?;

    ensure!(node.annotations(OTHER)? == (json!("enabled"), Value::Null), "it belongs to others");
    let patched: Vec<_> =
        node.api.patches().into_iter().filter(|patched| patched.pod == name(OTHER)).collect();
    ensure!(patched.is_empty(), "{patched:?}");
    for patched in node.api.patches() {
        let metadata = patched.patch["metadata"].as_object().context("no metadata")?;
        let fields: Vec<&String> = metadata.keys().collect();
        ensure!(patched.patch.as_object().is_some_and(|patch| patch.len() == 1), "{patched:?}");
        ensure!(fields == ["annotations", "uid"], "{patched:?}");
        let annotations = metadata["annotations"].as_object().context("no annotations")?;
        ensure!(annotations.keys().all(|name| [REDIRECTION, MARK].contains(&name.as_str())), "{patched:?}");
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn announcements_stay_over_a_restart_and_the_next_agent_knows_them() -> Result<()> {
    let mut node = Node::start("annstay", STRICT_MESH, |_, _| Ok(()))?;
    for uid in [UID, OTHER, PROXIED] {
        node.wait_announced(uid)?;
    }
    let patches = node.api.patches().len();
    node.agent.kill()?;
    ensure!(node.is_announced(UID)?);
    node.agent.restart()?;
    node.agent.wait_ready()?;
    observe::wait_enrolled(&node.agent)?;
    node.wait_status("three pods announced", |told| told["pods"] == 3 && told["pending"] == 0)?;
    // In good order too. A pod that is released meanwhile is announced until the next agent looks.
    node.agent.terminate()?;
    node.release(OTHER)?;
    ensure!(node.is_announced(UID)? && node.is_announced(OTHER)?, "withdrawn by an agent that ended");
    ensure!(node.api.patches().len() == patches, "{}", node.told());
    node.agent.restart()?;
    node.agent.wait_ready()?;
    node.wait_withdrawn(OTHER)?;
    ensure!(node.is_announced(UID)? && node.is_announced(PROXIED)?, "{}", node.told());
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_refused_patch_is_shown_and_repeated_and_holds_up_nothing() -> Result<()> {
    let node = Node::start("annforb", STRICT_MESH, |api, _| {
        api.refuse_patches(true);
        Ok(())
    })?;
    node.wait_status("refusals shown", |told| {
        let shows = told["last_error"]
            .as_str()
            .is_some_and(|error| error.contains("forbidden") && error.contains("pods/status"));
        shows && told["pods"] == 0 && told["pending"] == 3 && told["failures"].as_u64() >= Some(2)
    })?;
    observe::wait_enrolled(&node.agent)?;
    let (client, server) = (node.mesh.pod(UID)?, node.mesh.pod(OTHER)?);
    let server = Server::start(server, SocketAddr::new(server.ipv4().into(), fresh_port()), &["echo"])?;
    Client::echo(client, server.address(), "hello")?;
    let log = observe::wait_log(&node.agent, &["cannot be written, so ztunnels send plaintext"])?;
    ensure!(log.matches("cannot be written").count() == 1, "one line a minute: {log}");
    node.api.refuse_patches(false);
    for uid in [UID, OTHER, PROXIED] {
        node.wait_announced(uid)?;
    }
    node.wait_status("nothing pending", |told| told["pending"] == 0 && told["last_error"].is_null())?;
    Ok(())
}

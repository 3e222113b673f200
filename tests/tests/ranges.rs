//! Detected ranges of the mesh: an agent reads them from the API, writes them to the kernel while pods are connected, and
//! has them again after a restart.
//!
//! The API is a server of this test in the node's network. It serves lists of its objects, and watches with new ones.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::net::SocketAddr;
use tacit_tests::{
    Client, Plan, STRICT_MESH, Server, agent_program,
    api::{Api, NODES, PODS, enrolled_pod},
    fresh_port, observe,
};
use tacit_topology::{Agent, KUBELET_NAMESPACE, MeshFiles, until};

/// UID and name of the pod, whose cgroup looks like the kubelet's: `pod` with the UID.
const UID: &str = "c11e27";
/// Range of the addresses of node b's pods.
const RANGE: &str = "10.77.2.0/24";
const MARKER: &str = "this-can-be-read";

#[test]
#[ignore = "needs root"]
fn a_range_holds_from_when_it_is_found_and_after_a_restart() -> Result<()> {
    let mesh = Plan::new("ranges")
        .pod("a", KUBELET_NAMESPACE, UID)
        .outside("b", "shop", "stranger")
        .without_agents()?;
    let (client, stranger) = (mesh.pod(UID)?, mesh.pod("stranger")?);
    let node = mesh.topology().node("a")?;
    let api = Api::start(node.netns())?;
    api.set(PODS, enrolled_pod(client, UID, "a"));
    let files = MeshFiles::write(mesh.topology(), node, &[], STRICT_MESH, "")?;
    api.configure(&files)?;
    let mut agent = Agent::start(node, &agent_program()?, &files)?;
    agent.wait_ready()?;
    observe::wait_enrolled(&agent)?;
    let own = [format!("{}/32", client.ipv4()), format!("{}/128", client.ipv6())];
    let found = observe::status(&agent)?["mesh"].clone();
    ensure!(found == json!({"configured": 0, "detected": 2, "ranges": own}), "{found}");

    // Control: the API does not have the stranger's range yet, so a STRICT pod sends it plaintext.
    let server = Server::start(stranger, SocketAddr::new(stranger.ipv4().into(), fresh_port()), &["echo"])?;
    let capture = mesh.topology().capture()?;
    Client::echo(client, server.address(), MARKER)?;
    ensure!(capture.finish()?.occurrences(MARKER.as_bytes()) == 2, "the control capture lacks the marker");
    let open_flow = Client::start(client, server.address(), &["send:open", "pause", "read-end"])?;
    open_flow.events().first("connected")?;

    api.add(NODES, json!({"metadata": {"name": "b"}, "spec": {"podCIDR": RANGE, "podCIDRs": [RANGE]}}))?;
    let has_range =
        |status: &Value| status["mesh"]["ranges"].as_array()?.contains(&json!(RANGE)).then_some(());
    observe::wait_status(&agent, "the range detected", has_range)?;
    observe::wait_status(&agent, "the open flow reset", |status| {
        (status["guard"]["resets_at_enrolment"].as_u64()? > 0).then_some(())
    })?;
    let capture = mesh.topology().capture()?;
    ensure!(
        Client::echo(client, server.address(), MARKER).is_err(),
        "plaintext although the range is detected"
    );

    agent.kill()?;
    let refused =
        || Client::echo(client, server.address(), MARKER).err().context("plaintext during a restart");
    refused()?;
    agent.restart()?;
    until("the range detected again", || {
        refused()?;
        Ok(observe::status(&agent).ok().as_ref().and_then(has_range))
    })?;
    agent.wait_ready()?;
    refused()?;
    ensure!(capture.finish()?.occurrences(MARKER.as_bytes()) == 0, "the capture contains the marker");
    Ok(())
}

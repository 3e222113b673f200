//! Agents whose directory and policies come from istiod. The Kubernetes API of each node has the node's own pod alone.

mod server;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use server::{Istiod, Mesh as World, Workload};
use std::{fs, net::SocketAddr};
use tacit_tests::{
    Client, Mesh, Plan, Server, agent_program,
    api::{Api, PODS, enrolled_pod},
    fresh_port, observe,
};
use tacit_topology::{Agent, KUBELET_NAMESPACE, MeshFiles, Pod};

/// UIDs and names of the pods: their cgroups look like the kubelet's.
const CLIENT: &str = "c11e28";
const WEB: &str = "5e4be4";
/// Text that is looked for on the wire.
const TEXT: &str = "text of a mesh of istiod";

/// A pod on each of two nodes, an API and an istiod for each node, and one state of both istiods.
struct Cluster {
    agents: Vec<Agent>,
    istiod: Istiod,
    apis: Vec<Api>,
    mesh: Mesh,
}

impl Cluster {
    fn new(tag: &str) -> Result<Self> {
        let mesh = Plan::new(tag)
            .pod("a", KUBELET_NAMESPACE, CLIENT)
            .pod("b", KUBELET_NAMESPACE, WEB)
            .outside("a", "shop", "stranger")
            .without_agents()?;
        let workload = |pod: &Pod, node: &str| Workload {
            name: pod.name().to_owned(),
            namespace: KUBELET_NAMESPACE.to_owned(),
            node: node.to_owned(),
            addresses: vec![pod.ipv4().octets().to_vec(), pod.ipv6().octets().to_vec()],
            policies: Vec::new(),
            has_waypoint: false,
        };
        let istiod = Istiod::new(World {
            workloads: vec![workload(mesh.pod(CLIENT)?, "a"), workload(mesh.pod(WEB)?, "b")],
            is_up: true,
        });
        let (mut agents, mut apis) = (Vec::new(), Vec::new());
        for (name, uid) in [("a", CLIENT), ("b", WEB)] {
            let node = mesh.topology().node(name)?;
            let api = Api::start(node.netns())?;
            api.set(PODS, enrolled_pod(mesh.pod(uid)?, uid, name));
            let files = MeshFiles::write(mesh.topology(), node, &[], "", "")?;
            api.configure(&files)?;
            let address = istiod.serve(node.netns())?;
            let config = fs::read_to_string(files.config())?;
            let lines =
                config.lines().filter(|line| !line.starts_with("directory:") && !line.starts_with("policy:"));
            let directory = format!(
                "directory: {{istiod: {{address: \"{address}\", plaintext: true, announce: ambient, kubeconfig: kubeconfig.yaml}}}}"
            );
            let lines = lines.chain([
                directory.as_str(),
                "policy: {istiod: {}}",
                "meshRanges: [10.77.0.0/16, \"fd77::/16\"]",
                "",
            ]);
            fs::write(files.config(), lines.collect::<Vec<_>>().join("\n"))?;
            let mut agent = Agent::start(node, &agent_program()?, &files)?;
            agent.wait_ready().with_context(|| agent.log().unwrap_or_default())?;
            observe::wait_enrolled(&agent)?;
            agents.push(agent);
            apis.push(api);
        }
        Ok(Self { agents, istiod, apis, mesh })
    }

    fn servers(&self) -> Result<Vec<Server>> {
        let pod = self.mesh.pod(WEB)?;
        let ips = [pod.ipv4().into(), pod.ipv6().into()];
        ips.into_iter().map(|ip| Server::start(pod, SocketAddr::new(ip, fresh_port()), &["echo"])).collect()
    }

    /// Connects both families. Returns the bytes of the text on the wire.
    fn echo(&self, servers: &[Server], client: &str) -> Result<usize> {
        let capture = self.mesh.topology().capture()?;
        for server in servers {
            Client::echo(self.mesh.pod(client)?, server.address(), TEXT)?;
        }
        Ok(capture.finish()?.occurrences(TEXT.as_bytes()))
    }

    /// Returns true if all connections of `client` fail.
    fn is_refused(&self, servers: &[Server], client: &str) -> Result<bool> {
        let pod = self.mesh.pod(client)?;
        let refused = servers.iter().map(|server| Ok(Client::echo(pod, server.address(), TEXT).is_err()));
        Ok(refused.collect::<Result<Vec<_>>>()?.into_iter().all(|is| is))
    }

    /// Waits until the agent of a node has the mode of its only pod.
    fn wait_mode(&self, agent: &Agent, mode: &str) -> Result<()> {
        observe::wait_status(agent, mode, |status| {
            let pods = status["pods"].as_array()?;
            pods.iter().any(|pod| pod["name"] == WEB && pod["mode"] == mode).then_some(())
        })
    }
}

/// Returns the connection to istiod in a status.
fn connection(status: &Value) -> Value {
    let sources = status["sources"].as_array().cloned().unwrap_or_default();
    let directory = sources.into_iter().find(|source| source["kind"] == "directory").unwrap_or_default();
    directory["connection"].clone()
}

#[test]
#[ignore = "needs root"]
fn istiods_workloads_policies_and_waypoints_hold_also_while_it_is_away() -> Result<()> {
    let cluster = Cluster::new("istiod")?;
    let [a, b] = &cluster.agents[..] else { anyhow::bail!("two agents") };
    let servers = cluster.servers()?;
    ensure!(cluster.echo(&servers, CLIENT)? == 0, "plaintext between enrolled pods");
    // Nothing is STRICT: a pod without an agent connects as plaintext.
    ensure!(cluster.echo(&servers, "stranger")? > 0, "the positive control has no plaintext");
    let status = observe::status(b)?;
    ensure!(connection(&status)["resources"][0]["count"] == 2, "{}", connection(&status));

    // A ztunnel would reach them by HBONE.
    for api in &cluster.apis {
        let announced = || {
            let mut patches = api.patches().into_iter();
            patches.any(|patched| {
                patched.patch["metadata"]["annotations"]["ambient.istio.io/redirection"] == "enabled"
            })
        };
        tacit_topology::until("the pod is announced", || Ok(announced().then_some(())))?;
    }

    // A converted PeerAuthentication makes the server STRICT.
    cluster.istiod.change(|world| world.workloads[1].policies = vec![server::STRICT.to_owned()]);
    cluster.wait_mode(b, "STRICT")?;
    ensure!(cluster.is_refused(&servers, "stranger")?, "plaintext to a STRICT pod");
    ensure!(cluster.echo(&servers, CLIENT)? == 0);

    // istiod is away: all of it stays in force.
    cluster.istiod.change(|world| world.is_up = false);
    for agent in [a, b] {
        observe::wait_status(agent, "istiod is away", |status| {
            connection(status)["connected_since"].is_null().then_some(())
        })?;
    }
    ensure!(cluster.is_refused(&servers, "stranger")?, "STRICT ends with istiod");
    ensure!(cluster.echo(&servers, CLIENT)? == 0);

    // It comes back with a waypoint for the server.
    cluster.istiod.change(|world| (world.is_up, world.workloads[1].has_waypoint) = (true, true));
    for agent in [a, b] {
        observe::wait_status(agent, "istiod is back", |status| {
            (connection(status)["connections"].as_u64()? > 1).then_some(())
        })?;
    }
    tacit_topology::until("connections around the waypoint are refused", || {
        Ok(cluster.is_refused(&servers, CLIENT)?.then_some(()))
    })?;
    ensure!(observe::refused(a, "through_waypoint")? > 0, "{:?}", observe::refusals(a)?);

    // The policies are gone, and the waypoint too.
    cluster.istiod.change(|world| {
        world.workloads[1].policies.clear();
        world.workloads[1].has_waypoint = false;
    });
    cluster.wait_mode(b, "PERMISSIVE")?;
    tacit_topology::until("the waypoint is gone", || {
        Ok((!cluster.is_refused(&servers, CLIENT)?).then_some(()))
    })?;
    ensure!(cluster.echo(&servers, CLIENT)? == 0);
    ensure!(cluster.echo(&servers, "stranger")? > 0, "PERMISSIVE again");
    Ok(())
}

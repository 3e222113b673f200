//! Ports of load balancers that the nodes serve themselves: each namespace has a share of the kernel's table, and a table that lacks
//! entries makes every port of a node one of a service, whatever happens to the agent.
//!
//! The nodes' ports have servers of the test, which stand in for the load balancer.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::{
    fs,
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    time::Duration,
};
use tacit_abi::limits::{CLUSTER_NODES, NODE_SERVICES, NODE_SERVICES_PER_NAMESPACE};
use tacit_tests::{
    Mesh, Plan, STRICT_MESH, agent_program,
    api::{Api, NODES, PODS, SERVICES, enrolled_pod},
    observe,
};
use tacit_topology::{Agent, KUBELET_NAMESPACE, MeshFiles, run, until};

/// UID and name of the pod, whose cgroup looks like the kubelet's: `pod` with the UID.
const UID: &str = "c11e28";
/// Time in which a packet arrives if nothing drops it.
const PATIENCE: Duration = Duration::from_millis(700);
/// A port of the namespace `bank` at node `b`, and the ports of `mallory` at a node that does not exist.
const BANK: u16 = 8443;
const MALLORY: u16 = 10_000;
/// A port that no service has.
const OTHER: u16 = 9999;

/// A node with a STRICT pod, and the API that its agent asks.
struct Cluster {
    mesh: Mesh,
    api: Api,
    agent: Agent,
}

impl Cluster {
    /// `more` are objects of the API that are there before the agent.
    fn new(tag: &str, more: &[(&str, Value)]) -> Result<Self> {
        let mesh = Plan::new(tag)
            .pod("a", KUBELET_NAMESPACE, UID)
            .outside("b", "shop", "stranger")
            .without_agents()?;
        let client = mesh.pod(UID)?;
        let node = mesh.topology().node("a")?;
        let api = Api::start(node.netns())?;
        api.set(PODS, enrolled_pod(client, UID, "a"));
        let b = mesh.topology().node("b")?;
        api.set(NODES, self::node("b", &[b.wire_ipv4().into(), b.wire_ipv6().into()]));
        more.iter().for_each(|(path, object)| api.set(path, object.clone()));
        let files = MeshFiles::write(mesh.topology(), node, &[], STRICT_MESH, "")?;
        api.configure(&files)?;
        let mut agent = Agent::start(node, &agent_program()?, &files)?;
        agent.wait_ready()?;
        observe::wait_enrolled(&agent)?;
        Ok(Self { mesh, api, agent })
    }

    /// Returns true if a datagram of the pod arrives at this address of node `b`.
    fn arrives(&self, address: IpAddr, port: u16) -> Result<bool> {
        let at = SocketAddr::new(address, port);
        let socket = self.mesh.topology().node("b")?.netns().enter(|| UdpSocket::bind(at))??;
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut step = self.mesh.pod(UID)?.command(agent_program()?.with_file_name("tacit-attack"));
        step.args(["step", "udp", &at.to_string(), "hello"]);
        run(step.env("TACIT_ATTACK_PATIENCE_MS", PATIENCE.as_millis().to_string()))?;
        match socket.recv(&mut [0; 16]) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn b(&self) -> Result<[IpAddr; 2]> {
        let b = self.mesh.topology().node("b")?;
        Ok([b.wire_ipv4().into(), b.wire_ipv6().into()])
    }
}

fn node(name: &str, addresses: &[IpAddr]) -> Value {
    let addresses: Vec<Value> =
        addresses.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
    json!({"metadata": {"name": name}, "status": {"addresses": addresses}})
}

fn load_balancer(namespace: &str, name: &str, addresses: &[IpAddr], ports: std::ops::Range<u16>) -> Value {
    let ports: Vec<Value> =
        ports.map(|port| json!({"name": format!("p{port}"), "port": port, "protocol": "UDP"})).collect();
    let ingress: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    json!({
        "metadata": {"name": name, "namespace": namespace, "uid": name},
        "spec": {"type": "LoadBalancer", "ports": ports},
        "status": {"loadBalancer": {"ingress": ingress}},
    })
}

fn share(agent: &Agent) -> Result<Value> {
    let status = observe::status(agent)?;
    let mut shares = status["shares"].as_array().into_iter().flatten();
    Ok(shares.find(|share| share["resource"] == "node_services").cloned().unwrap_or_default())
}

/// More ports than the table holds used to make every port of every node one of a service.
#[test]
#[ignore = "needs root"]
fn a_namespace_with_too_many_ports_of_load_balancers_costs_others_its_own_port_numbers() -> Result<()> {
    let far: IpAddr = Ipv4Addr::new(198, 18, 0, 1).into();
    let cluster = Cluster::new("lbshare", &[(NODES, node("far", &[far]))])?;
    let ([b, other], agent) = (cluster.b()?, &cluster.agent);
    ensure!(cluster.arrives(b, BANK)?, "control: no load balancer has a port of the node");
    cluster.api.add(SERVICES, load_balancer("bank", "gate", &[b], BANK..BANK + 1))?;
    until("the port is a service's", || Ok((!cluster.arrives(b, BANK)?).then_some(())))?;
    ensure!(cluster.arrives(b, BANK + 1)? && cluster.arrives(b, MALLORY)?, "the node's own ports");
    ensure!(cluster.arrives(other, BANK)?, "no load balancer has this address");
    ensure!(
        (&share(agent)?["used"], &share(agent)?["fullest"]) == (&json!(1), &json!("bank")),
        "{}",
        share(agent)?
    );

    const EACH: u16 = 1000;
    let count = u16::try_from(NODE_SERVICES)? / EACH + 1;
    for number in 0..count {
        let first = MALLORY + number * EACH;
        let name = format!("s{number}");
        cluster.api.add(SERVICES, load_balancer("mallory", &name, &[far], first..first + EACH))?;
    }
    let ports = u64::from(count) * u64::from(EACH);
    let full = observe::wait_status(agent, "the share is exceeded", |_| {
        share(agent).ok().filter(|share| share["fullest_used"] == ports)
    })?;
    ensure!(full["fullest"] == "mallory" && full["refused"] == 1 && full["used"] == 1, "{full}");
    ensure!(full["holder_limit"] == u64::from(NODE_SERVICES_PER_NAMESPACE), "{full}");
    let not_applied = |kind| observe::metric(agent, "tacit_nodes_not_applied", &[("kind", kind)]);
    ensure!(not_applied("ports")? == 0 && not_applied("addresses")? == 0, "the tables have all");

    for port in [MALLORY, MALLORY + count * EACH - 1] {
        ensure!(!cluster.arrives(b, port)?, "{port} may be a service's at each address of a load balancer");
    }
    ensure!(cluster.arrives(other, MALLORY)?, "no load balancer has this address");
    ensure!(!cluster.arrives(b, BANK)?, "the port of the other namespace is a service's");
    ensure!(cluster.arrives(b, OTHER)? && cluster.arrives(b, BANK + 1)?, "the node's own ports");
    Ok(())
}

/// Addresses of load balancers that the kernel has no room for. The nodes have them too.
#[test]
#[ignore = "needs root"]
fn while_a_table_lacks_ports_every_port_of_a_node_is_held_whatever_happens_to_the_agent() -> Result<()> {
    let many: Vec<IpAddr> =
        (0..=CLUSTER_NODES).map(|number| Ipv4Addr::from(0xc612_0000 | number).into()).collect();
    let nodes = many.chunks(64).enumerate().map(|(number, some)| (NODES, node(&format!("n{number}"), some)));
    let mut cluster = Cluster::new("lbmany", &nodes.collect::<Vec<_>>())?;
    let [b, _] = cluster.b()?;
    ensure!(cluster.arrives(b, OTHER)?, "control: the table of ports has all");
    for (number, some) in many.chunks(1000).enumerate() {
        let all = load_balancer("bank", &format!("gate{number}"), some, BANK..BANK + 1);
        cluster.api.add(SERVICES, all)?;
    }
    observe::wait_status(&cluster.agent, "the ports are not applied", |status| {
        status["nodes"]["ports_not_applied"].is_string().then_some(())
    })?;
    ensure!(!cluster.arrives(b, OTHER)?, "a port of a node");
    ensure!(cluster.agent.status_table()?.contains("ports of load balancers at nodes not applied"));

    cluster.agent.kill()?;
    ensure!(!cluster.arrives(b, OTHER)?, "without an agent");
    // The API is away: what listens at this address accepts connections and never answers.
    let node = cluster.mesh.topology().node("a")?;
    let silent = node.netns().enter(|| TcpListener::bind("127.0.0.1:0"))??;
    let kubeconfig = cluster.agent.files().config().with_file_name("kubeconfig.yaml");
    let text = fs::read_to_string(&kubeconfig)?;
    fs::write(
        &kubeconfig,
        text.replace(&cluster.api.address().to_string(), &silent.local_addr()?.to_string()),
    )?;
    cluster.agent.restart()?;
    let connection = silent.accept()?;
    observe::wait_status(&cluster.agent, "the agent waits for the API", |status| {
        (status["state"] == "starting").then_some(())
    })?;
    ensure!(!cluster.arrives(b, OTHER)?, "while the API is away");
    drop(connection);
    Ok(())
}

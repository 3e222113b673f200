//! Containers inside a pod, as Docker in a pod makes them, with addresses that are also in the mesh's ranges. What stays in a PERMISSIVE pod,
//! or leaves it with the pod's address, works as without Tacit. Under STRICT, connections into the mesh are refused at once.

use anyhow::{Context, Result, ensure};
use std::net::{Ipv4Addr, SocketAddr};
use tacit_tests::{Client, Mesh, Plan, STRICT_MESH, Server, fresh_port, observe, redirect};
use tacit_topology::Pod;

/// Addresses inside the pod, which are in the mesh's ranges. Pods of the topology have others.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 77, 99, 1);
const INNER: Ipv4Addr = Ipv4Addr::new(10, 77, 99, 2);

fn plan(tag: &str) -> Plan {
    Plan::new(tag).pod("a", "shop", "far").pod("b", "shop", "outer").pod("b", "shop", "near")
}

/// Makes the container, which leaves the pod with the pod's address.
fn container(mesh: &Mesh) -> Result<Pod> {
    let outer = mesh.pod("outer")?;
    let inner = outer.nested(INNER, GATEWAY)?;
    redirect::masquerade(outer, INNER)?;
    Ok(inner)
}

/// Servers that the container, or its pod, connects to.
struct Servers {
    inner: Server,
    gateway: Server,
    far: Server,
    near: Server,
}

impl Servers {
    fn start(mesh: &Mesh, inner: &Pod) -> Result<Self> {
        let at =
            |pod: &Pod, ip: Ipv4Addr| Server::start(pod, SocketAddr::new(ip.into(), fresh_port()), &["echo"]);
        let (outer, far, near) = (mesh.pod("outer")?, mesh.pod("far")?, mesh.pod("near")?);
        Ok(Self {
            inner: at(inner, INNER)?,
            gateway: at(outer, GATEWAY)?,
            far: at(far, far.ipv4())?,
            near: at(near, near.ipv4())?,
        })
    }
}

fn all_work(mesh: &Mesh, inner: &Pod, servers: &Servers) -> Result<()> {
    let outer = mesh.pod("outer")?;
    for (what, from, to) in [
        ("pod to container", outer, &servers.inner),
        ("container to pod", inner, &servers.gateway),
        ("container to another node", inner, &servers.far),
        ("container to its node", inner, &servers.near),
        ("pod to another node", outer, &servers.far),
    ] {
        Client::echo(from, to.address(), "hello").context(what)?;
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn containers_inside_a_permissive_pod_work_as_without_tacit() -> Result<()> {
    let mesh = plan("nested").with_agents()?;
    let inner = container(&mesh)?;
    let servers = Servers::start(&mesh, &inner)?;
    all_work(&mesh, &inner, &servers)?;
    let nested = [("reason", "connect_nested")];
    ensure!(observe::metric(mesh.agent("b")?, "tacit_kernel_verdicts_total", &nested)? > 0, "not counted");

    mesh.agent("b")?.files().set_policy(STRICT_MESH)?;
    observe::wait_modes(mesh.agent("b")?, "STRICT")?;
    for server in [&servers.far, &servers.near, &servers.gateway] {
        let events = Client::run(&inner, server.address(), &[])?;
        let is_refused = events.iter().any(|event| event["error"] == "ConnectionRefused");
        ensure!(is_refused, "{}: {events:?}", server.address());
    }
    Client::echo(mesh.pod("outer")?, servers.far.address(), "by the tunnel")
}

#[test]
#[ignore = "needs root"]
fn control_containers_inside_a_pod_work_without_tacit() -> Result<()> {
    let mesh = plan("nestc").without_agents()?;
    let inner = container(&mesh)?;
    all_work(&mesh, &inner, &Servers::start(&mesh, &inner)?)
}

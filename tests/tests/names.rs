//! Addresses that applications see: with Tacit the same as without.

use anyhow::{Context, Result};
use serde_json::Value;
use std::{
    net::{IpAddr, SocketAddr},
    sync::OnceLock,
};
use tacit_tests::{Client, Mesh, Plan, Server, fresh_port};
use tacit_topology::Pod;

/// Addresses of one connection as both applications see them. The client's port, which the kernel chooses, is replaced
/// by 0.
#[derive(Debug, PartialEq, Eq)]
struct Names {
    client_getpeername: SocketAddr,
    client_getsockname: SocketAddr,
    server_accept: SocketAddr,
    server_getpeername: SocketAddr,
    server_getsockname: SocketAddr,
}

/// A connection whose names are compared.
type Case = fn(&Mesh) -> Result<Names>;

#[test]
#[ignore = "needs root"]
fn an_ipv4_connection_to_the_other_node() -> Result<()> {
    same(|mesh| connect(mesh.pod("client")?, mesh.pod("far")?, |pod| pod.ipv4().into(), unchanged))
}

#[test]
#[ignore = "needs root"]
fn an_ipv6_connection_to_the_other_node() -> Result<()> {
    same(|mesh| connect(mesh.pod("client")?, mesh.pod("far")?, |pod| pod.ipv6().into(), unchanged))
}

#[test]
#[ignore = "needs root"]
fn a_mapped_connection_to_an_ipv4_listener() -> Result<()> {
    same(|mesh| connect(mesh.pod("client")?, mesh.pod("far")?, |pod| pod.ipv4().into(), mapped))
}

#[test]
#[ignore = "needs root"]
fn a_mapped_connection_to_an_ipv6_listener() -> Result<()> {
    same(|mesh| to_any(mesh, "client", mapped))
}

#[test]
#[ignore = "needs root"]
fn an_ipv4_connection_to_an_ipv6_listener() -> Result<()> {
    same(|mesh| to_any(mesh, "client", unchanged))
}

#[test]
#[ignore = "needs root"]
fn an_ipv4_connection_on_the_same_node() -> Result<()> {
    same(|mesh| connect(mesh.pod("client")?, mesh.pod("near")?, |pod| pod.ipv4().into(), unchanged))
}

#[test]
#[ignore = "needs root"]
fn an_ipv6_connection_on_the_same_node() -> Result<()> {
    same(|mesh| connect(mesh.pod("client")?, mesh.pod("near")?, |pod| pod.ipv6().into(), unchanged))
}

#[test]
#[ignore = "needs root"]
fn a_mapped_connection_on_the_same_node() -> Result<()> {
    same(|mesh| connect(mesh.pod("client")?, mesh.pod("near")?, |pod| pod.ipv4().into(), mapped))
}

#[test]
#[ignore = "needs root"]
fn a_connection_to_the_pods_own_address() -> Result<()> {
    same(|mesh| connect(mesh.pod("client")?, mesh.pod("client")?, |pod| pod.ipv4().into(), unchanged))
}

#[test]
#[ignore = "needs root"]
fn a_loopback_connection_inside_a_pod() -> Result<()> {
    same(|mesh| {
        connect(mesh.pod("client")?, mesh.pod("client")?, |_| IpAddr::from([127, 0, 0, 1]), unchanged)
    })
}

#[test]
#[ignore = "needs root"]
fn a_connection_from_outside_the_mesh() -> Result<()> {
    same(|mesh| connect(mesh.pod("stranger")?, mesh.pod("far")?, |pod| pod.ipv4().into(), unchanged))?;
    same(|mesh| connect(mesh.pod("stranger")?, mesh.pod("far")?, |pod| pod.ipv6().into(), unchanged))
}

#[test]
#[ignore = "needs root"]
fn a_connection_from_an_address_bound_before() -> Result<()> {
    same(|mesh| {
        let (client, far) = (mesh.pod("client")?, mesh.pod("far")?);
        let server =
            Server::start(far, SocketAddr::new(far.ipv4().into(), fresh_port()), &["shut", "read-end"])?;
        let (to, from) = (server.address().to_string(), client.ipv4().to_string());
        let events = Client::with_args(client, &["connect", &to, "--from", &from, "read-end"])?.finish()?;
        Names::of(&events, &server)
    })
}

/// The agent dials applications from loopback addresses, which they trust, and replaces the names that they see. In this
/// test no agent has stored names, as if they were lost: the application sees no address rather than a false one.
#[test]
#[ignore = "needs root"]
fn a_peer_at_an_address_the_agent_dials_from_never_looks_like_loopback() -> Result<()> {
    type Own = fn(&Pod) -> IpAddr;
    let (v4, v6): (Own, Own) = (|pod| pod.ipv4().into(), |pod| pod.ipv6().into());
    for (from, own) in [("127.64.3.4", v4), ("::1", v6)] {
        let accepted_address = |mesh: &Mesh| {
            let pod = mesh.pod("near")?;
            let server = Server::start(pod, SocketAddr::new(own(pod), fresh_port()), &["shut", "read-end"])?;
            let to = server.address().to_string();
            let events = Client::with_args(pod, &["connect", &to, "--from", from, "read-end"])?.finish()?;
            let names = Names::of(&events, &server)?;
            anyhow::ensure!(names.server_accept == names.server_getpeername);
            anyhow::Ok(names.server_accept.ip())
        };
        let control = accepted_address(&pods_without_traffic().without_agents()?)?;
        assert_eq!(control, from.parse::<IpAddr>()?, "without Tacit");
        let shown = accepted_address(&pods_without_traffic().with_agents()?)?;
        assert!(shown.is_unspecified() && shown.is_ipv4() == control.is_ipv4(), "with Tacit: {shown}");
    }
    Ok(())
}

fn pods_without_traffic() -> Plan {
    Plan::new("unnamed").pod("a", "shop", "near").pod("b", "shop", "far")
}

fn same(case: Case) -> Result<()> {
    static WITHOUT: OnceLock<Result<Mesh, String>> = OnceLock::new();
    static WITH: OnceLock<Result<Mesh, String>> = OnceLock::new();
    let mut without = case(Mesh::shared(&WITHOUT, || plan().without_agents())?).context("without Tacit")?;
    let mut with = case(Mesh::shared(&WITH, || plan().with_agents())?).context("with Tacit")?;
    // Each run takes a fresh port, so the server's port differs. All other names must be equal.
    for names in [&mut without, &mut with] {
        let server = names.server_getsockname.port();
        for name in names.all() {
            if name.port() == server {
                name.set_port(1);
            }
        }
    }
    assert_eq!(with, without);
    Ok(())
}

fn plan() -> Plan {
    Plan::new("names")
        .pod("a", "shop", "client")
        .pod("a", "shop", "near")
        .pod("b", "shop", "far")
        .outside("a", "shop", "stranger")
}

fn connect(
    from: &Pod,
    to: &Pod,
    address: fn(&Pod) -> IpAddr,
    reach: fn(SocketAddr) -> SocketAddr,
) -> Result<Names> {
    let server = Server::start(to, SocketAddr::new(address(to), fresh_port()), &["shut", "read-end"])?;
    Names::of(&Client::run(from, reach(server.address()), &["read-end"])?, &server)
}

/// Connects to the far pod's IPv4 address, where the server listens on `[::]`.
fn to_any(mesh: &Mesh, from: &str, reach: fn(SocketAddr) -> SocketAddr) -> Result<Names> {
    let far = mesh.pod("far")?;
    let any = SocketAddr::new(IpAddr::from([0_u16; 8]), fresh_port());
    let server = Server::start(far, any, &["shut", "read-end"])?;
    let to = reach(SocketAddr::new(far.ipv4().into(), any.port()));
    Names::of(&Client::run(mesh.pod(from)?, to, &["read-end"])?, &server)
}

fn unchanged(address: SocketAddr) -> SocketAddr {
    address
}

fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

impl Names {
    fn of(client: &[Value], server: &Server) -> Result<Self> {
        let connected = client.iter().find(|event| event["event"] == "connected");
        let connected = connected.with_context(|| format!("not connected: {client:?}"))?;
        let accepted = server.events().first("accepted")?;
        let mut names = Self {
            client_getpeername: address(&connected["peer"])?,
            client_getsockname: address(&connected["local"])?,
            server_accept: address(&accepted["accept"])?,
            server_getpeername: address(&accepted["peer"])?,
            server_getsockname: address(&accepted["local"])?,
        };
        let chosen = names.client_getsockname.port();
        for name in names.all() {
            if name.port() == chosen {
                name.set_port(0);
            }
        }
        Ok(names)
    }

    fn all(&mut self) -> [&mut SocketAddr; 5] {
        [
            &mut self.client_getpeername,
            &mut self.client_getsockname,
            &mut self.server_accept,
            &mut self.server_getpeername,
            &mut self.server_getsockname,
        ]
    }
}

fn address(value: &Value) -> Result<SocketAddr> {
    let text = value.as_str().with_context(|| format!("invalid address {value}: expected a string"))?;
    text.parse().with_context(|| format!("address {text}"))
}

//! Peers that speak HBONE, as pods of Istio ambient do, with pods of Tacit.
//!
//! The peer is written by hand, as client and as server: TLS of rustls and HTTP/2 of h2, with the settings of ztunnel, or raw bytes for
//! faults. It holds a certificate of the mesh's root.

mod certificates;
mod client;
mod draining;
mod faults;
mod federation;
mod flows;
mod limits;
mod outgoing;
mod policy;
mod revocation;
mod server;

use anyhow::Result;
use std::{net::SocketAddr, sync::OnceLock};
use tacit_tests::{Mesh, Plan, Server, fresh_port};
use tacit_topology::Pod;

/// Identity of the peer, in the mesh's trust domain.
const PEER: &str = "spiffe://cluster.local/ns/shop/sa/peer";

/// A server's pod on node b, and the peer's on node a, which no agent covers.
fn plan(tag: &str) -> Plan {
    Plan::new(tag).pod("b", "shop", "web").outside("a", "shop", "peer")
}

/// The mesh of tests that do not change it.
fn mesh() -> Result<&'static Mesh> {
    static MESH: OnceLock<Result<Mesh, String>> = OnceLock::new();
    Mesh::shared(&MESH, || plan("hbone").with_agents())
}

/// Starts a server in `pod` for each family.
fn servers(pod: &Pod, steps: &[&str]) -> Result<[Server; 2]> {
    let port = fresh_port();
    let start = |ip| Server::start(pod, SocketAddr::new(ip, port), steps);
    Ok([start(pod.ipv4().into())?, start(pod.ipv6().into())?])
}

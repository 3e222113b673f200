//! Peers that try to exhaust an agent. The resources of each are bounded, and other clients are served meanwhile.

use crate::{
    certificates::{Leaf, Roots},
    fake::{FlowRequest, flood_with_key_updates},
};
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};
use tacit_tests::{Client, Mesh, Plan, Server, fresh_port, scaled};
use tacit_topology::{HANG, TUNNEL_PORT};

const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
/// Bound of memory growth, more than the state of a thousand connections before their first TLS byte.
const MEMORY_MAX_KIB: u64 = 64 * 1024;
/// First bytes of a handshake record whose announced length is never sent.
const HELLO: [u8; 5] = [0x16, 3, 1, 2, 0];

#[test]
#[ignore = "needs root"]
fn a_thousand_handshakes_held_open_keep_nobody_out() -> Result<()> {
    let (mesh, server) = mesh("open")?;
    let before = memory(&mesh)?;
    let handshakes = (0..scaled(1000)?).map(|_| begin(&mesh)).collect::<Result<Vec<_>>>()?;
    Client::echo(mesh.pod("client")?, server.address(), "served meanwhile")?;
    let grown = memory(&mesh)?.saturating_sub(before);
    ensure!(grown < MEMORY_MAX_KIB, "{} open handshakes cost {grown} KiB", handshakes.len());
    for mut tcp in handshakes {
        tcp.set_read_timeout(Some(HANG))?;
        ensure!(is_ended(&mut tcp)?, "a handshake is still open after {HANG:?}");
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_byte_a_second_is_cut_off() -> Result<()> {
    let (mesh, server) = mesh("slow")?;
    let mut tcp = begin(&mesh)?;
    let begin = Instant::now();
    // One byte is sent after each timeout of a second, until the agent closes the connection.
    tcp.set_read_timeout(Some(Duration::from_secs(1)))?;
    while !is_ended(&mut tcp)? {
        ensure!(begin.elapsed() < HANG, "still open after {HANG:?}");
        if tcp.write_all(&[0]).is_err() {
            break;
        }
    }
    Client::echo(mesh.pod("client")?, server.address(), "served")
}

/// rustls closes a connection whose peer sends key updates repeatedly without data.
#[test]
#[ignore = "needs root"]
fn a_flood_of_key_updates_is_cut_off() -> Result<()> {
    const MAX: usize = 100_000;
    let (mesh, server) = mesh("keys")?;
    let roots = Roots::open(mesh.agent("b")?.files().issuer())?;
    let (web, attacker) = (mesh.pod("web")?, mesh.pod("attacker")?);
    let request =
        FlowRequest { destination: server.address(), client: SocketAddr::new(attacker.ipv4().into(), 4000) };
    let credentials = roots.sign(&Leaf::valid(CLIENT))?;
    let sent = flood_with_key_updates(attacker.netns(), IpAddr::V4(web.ipv4()), credentials, request, MAX)?;
    ensure!(sent < MAX, "the agent accepted {sent} key updates");
    Client::echo(mesh.pod("client")?, server.address(), "served")
}

/// Opens a connection to the tunnel port and starts a handshake.
fn begin(mesh: &Mesh) -> Result<TcpStream> {
    let address = SocketAddr::new(mesh.pod("web")?.ipv4().into(), TUNNEL_PORT);
    let connect = || TcpStream::connect_timeout(&address, HANG);
    let mut tcp = mesh.pod("attacker")?.netns().enter(connect)??;
    tcp.write_all(&HELLO)?;
    Ok(tcp)
}

/// Returns true if the other side closed the connection before the socket's read timeout.
fn is_ended(tcp: &mut TcpStream) -> Result<bool> {
    let mut bytes = [0; 64];
    loop {
        match tcp.read(&mut bytes) {
            Ok(0) => return Ok(true),
            // A TLS alert.
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(true),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Returns the resident memory of the server's agent, in KiB.
fn memory(mesh: &Mesh) -> Result<u64> {
    let id = mesh.agent("b")?.id().context("the agent runs")?;
    let status = fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

fn mesh(tag: &str) -> Result<(Mesh, Server)> {
    let plan =
        Plan::new(tag).pod("b", "shop", "web").pod("a", "shop", "client").outside("a", "shop", "attacker");
    let mesh = plan.with_agents()?;
    let web = mesh.pod("web")?;
    let server = Server::start(web, SocketAddr::new(web.ipv4().into(), fresh_port()), &["echo"])?;
    Ok((mesh, server))
}

//! Peers that want to use up the agent: what each may take is bounded, and others are served meanwhile.

use crate::{
    fake::{Asked, flood_with_key_updates},
    forge::{Forge, Leaf},
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
/// More than a thousand connections with what TLS needs before the first byte.
const MEMORY_MAX_KIB: u64 = 64 * 1024;
/// The first bytes of a handshake record, of a length that never comes.
const HELLO: [u8; 5] = [0x16, 3, 1, 2, 0];

#[test]
#[ignore = "needs root"]
fn a_thousand_handshakes_held_open_keep_nobody_out() -> Result<()> {
    let (mesh, server) = mesh("held")?;
    let before = memory(&mesh)?;
    let held = (0..scaled(1000)?).map(|_| begin(&mesh)).collect::<Result<Vec<_>>>()?;
    Client::echo(mesh.pod("client")?, server.address(), "served meanwhile")?;
    let grown = memory(&mesh)?.saturating_sub(before);
    ensure!(grown < MEMORY_MAX_KIB, "{} held handshakes cost {grown} KiB", held.len());
    for mut tcp in held {
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
    // What is waited for is the end, a second at a time.
    tcp.set_read_timeout(Some(Duration::from_secs(1)))?;
    while !is_ended(&mut tcp)? {
        ensure!(begin.elapsed() < HANG, "still open after {HANG:?}");
        if tcp.write_all(&[0]).is_err() {
            break;
        }
    }
    Client::echo(mesh.pod("client")?, server.address(), "served")
}

/// rustls ends a connection whose peer asks for new keys again and again without saying anything.
#[test]
#[ignore = "needs root"]
fn a_flood_of_key_updates_is_cut_off() -> Result<()> {
    const MOST: usize = 100_000;
    let (mesh, server) = mesh("keys")?;
    let forge = Forge::open(mesh.agent("b")?.files().issuer())?;
    let (web, forger) = (mesh.pod("web")?, mesh.pod("forger")?);
    let asked = Asked { destination: server.address(), client: SocketAddr::new(forger.ipv4().into(), 4000) };
    let shown = forge.sign(&Leaf::right(CLIENT))?;
    let done = flood_with_key_updates(forger.netns(), IpAddr::V4(web.ipv4()), shown, asked, MOST)?;
    ensure!(done < MOST, "{done} key updates were taken");
    Client::echo(mesh.pod("client")?, server.address(), "served")
}

/// A connection to the tunnel port that has begun a handshake.
fn begin(mesh: &Mesh) -> Result<TcpStream> {
    let address = SocketAddr::new(mesh.pod("web")?.ipv4().into(), TUNNEL_PORT);
    let connect = || TcpStream::connect_timeout(&address, HANG);
    let mut tcp = mesh.pod("forger")?.netns().enter(connect)??;
    tcp.write_all(&HELLO)?;
    Ok(tcp)
}

/// Has the other end ended it? Waits for the read time-out of the socket.
fn is_ended(tcp: &mut TcpStream) -> Result<bool> {
    let mut bytes = [0; 64];
    loop {
        match tcp.read(&mut bytes) {
            Ok(0) => return Ok(true),
            // An alert.
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(true),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Resident memory of the server's agent, in KiB.
fn memory(mesh: &Mesh) -> Result<u64> {
    let id = mesh.agent("b")?.id().context("the agent runs")?;
    let status = fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

fn mesh(tag: &str) -> Result<(Mesh, Server)> {
    let plan =
        Plan::new(tag).pod("b", "shop", "web").pod("a", "shop", "client").outside("a", "shop", "forger");
    let mesh = plan.with_agents()?;
    let web = mesh.pod("web")?;
    let server = Server::start(web, SocketAddr::new(web.ipv4().into(), fresh_port()), &["echo"])?;
    Ok((mesh, server))
}

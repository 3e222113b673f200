//! Fake clients at the tunnel port of a real pod.

use crate::{
    fake::{Answer, Asked, CLIENT_HELLO_1_2, RIGHT, Speech, ask},
    forge::{Forge, Leaf, Root, Valid},
};
use anyhow::{Result, ensure};
use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    sync::OnceLock,
};
use tacit_tests::{Mesh, Plan, Server, fresh_port, observe};
use tacit_topology::{HANG, TUNNEL_PORT};

const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";

#[test]
#[ignore = "needs root"]
fn a_client_that_is_right_in_everything_is_let_in() -> Result<()> {
    let answer = knock(Some(&Leaf::right(CLIENT)), RIGHT, |asked| asked)?;
    ensure!(answer.answer == Answer::Accepted && answer.reached == 1, "{answer:?}");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_client_without_a_certificate_is_refused() -> Result<()> {
    refused(None, RIGHT, "no_client_certificate")
}

#[test]
#[ignore = "needs root"]
fn an_expired_client_is_refused() -> Result<()> {
    refused(Some(Leaf { valid: Valid::Past, ..Leaf::right(CLIENT) }), RIGHT, "expired")
}

#[test]
#[ignore = "needs root"]
fn a_client_of_the_future_is_refused() -> Result<()> {
    refused(Some(Leaf { valid: Valid::Future, ..Leaf::right(CLIENT) }), RIGHT, "not_yet_valid")
}

/// There is no tolerance for clocks that disagree: it would be one for certificates that were to end.
#[test]
#[ignore = "needs root"]
fn half_a_minute_too_late_is_refused() -> Result<()> {
    refused(Some(Leaf { valid: Valid::JustPast, ..Leaf::right(CLIENT) }), RIGHT, "expired")
}

#[test]
#[ignore = "needs root"]
fn half_a_minute_too_early_is_refused() -> Result<()> {
    refused(Some(Leaf { valid: Valid::Soon, ..Leaf::right(CLIENT) }), RIGHT, "not_yet_valid")
}

#[test]
#[ignore = "needs root"]
fn a_client_of_another_trust_domain_is_refused() -> Result<()> {
    refused(Some(Leaf::right("spiffe://other.domain/ns/shop/sa/client")), RIGHT, "other_trust_domain")
}

#[test]
#[ignore = "needs root"]
fn a_client_of_a_foreign_root_is_refused() -> Result<()> {
    refused(Some(Leaf { root: Root::Foreign, ..Leaf::right(CLIENT) }), RIGHT, "unknown_issuer")
}

#[test]
#[ignore = "needs root"]
fn a_client_of_a_root_that_only_has_the_name_of_ours_is_refused() -> Result<()> {
    refused(Some(Leaf { root: Root::Namesake, ..Leaf::right(CLIENT) }), RIGHT, "unknown_issuer")
}

#[test]
#[ignore = "needs root"]
fn a_client_with_two_identities_is_refused() -> Result<()> {
    let both = vec![CLIENT.to_owned(), "spiffe://cluster.local/ns/shop/sa/web".to_owned()];
    refused(Some(Leaf { uris: both, ..Leaf::right(CLIENT) }), RIGHT, "uri_names")
}

#[test]
#[ignore = "needs root"]
fn a_client_without_an_identity_is_refused() -> Result<()> {
    refused(Some(Leaf { uris: Vec::new(), ..Leaf::right(CLIENT) }), RIGHT, "uri_names")
}

#[test]
#[ignore = "needs root"]
fn a_client_whose_name_is_no_spiffe_id_is_refused() -> Result<()> {
    refused(Some(Leaf::right("https://cluster.local/ns/shop/sa/client")), RIGHT, "not_an_identity")
}

#[test]
#[ignore = "needs root"]
fn a_client_that_speaks_tls_1_2_only_is_refused() -> Result<()> {
    refused_bytes(CLIENT_HELLO_1_2, "tls_mismatch")
}

#[test]
#[ignore = "needs root"]
fn a_client_of_another_wire_format_is_refused() -> Result<()> {
    refused(Some(Leaf::right(CLIENT)), Speech { alpn: b"tacit/0" }, "alpn")
}

#[test]
#[ignore = "needs root"]
fn a_client_that_speaks_no_tls_is_refused() -> Result<()> {
    refused_bytes(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n", "tls")
}

/// A client whose first bytes are these.
fn refused_bytes(first: &[u8], reason: &str) -> Result<()> {
    let mesh = mesh()?;
    let (web, forger, agent) = (mesh.pod("web")?, mesh.pod("forger")?, mesh.agent("b")?);
    let before = observe::refused(agent, reason)?;
    let address = SocketAddr::new(web.ipv4().into(), TUNNEL_PORT);
    let mut answer = Vec::new();
    let mut tcp = forger.netns().enter(|| TcpStream::connect_timeout(&address, HANG))??;
    tcp.set_read_timeout(Some(HANG))?;
    tcp.write_all(first)?;
    // An alert may come before the end; nothing of an application can.
    let _ = tcp.read_to_end(&mut answer);
    assert!(answer.len() <= 7, "{answer:?}");
    observe::wait_refused(agent, reason, before, &forger.ipv4().to_string())
}

#[test]
#[ignore = "needs root"]
fn a_flow_in_the_name_of_another_address_is_denied() -> Result<()> {
    denied(|asked| Asked { client: SocketAddr::from(([10, 77, 1, 200], 4000)), ..asked })
}

#[test]
#[ignore = "needs root"]
fn a_flow_to_another_pod_than_the_tunnels_is_denied() -> Result<()> {
    let other = mesh()?.pod("other")?.ipv4();
    let server =
        Server::start(mesh()?.pod("other")?, SocketAddr::new(other.into(), fresh_port()), &["echo"])?;
    let address = server.address();
    denied(move |asked| Asked { destination: address, ..asked })?;
    assert_eq!(server.accepted()?, 0);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_flow_to_a_loopback_address_is_denied() -> Result<()> {
    let web = mesh()?.pod("web")?;
    let server = Server::start(web, SocketAddr::from(([127, 0, 0, 1], fresh_port())), &["echo"])?;
    let address = server.address();
    denied(move |asked| Asked { destination: address, ..asked })?;
    assert_eq!(server.accepted()?, 0);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_flow_to_the_agents_own_ports_is_denied() -> Result<()> {
    for port in [15001, 15006, TUNNEL_PORT] {
        denied(move |asked| Asked { destination: SocketAddr::new(asked.destination.ip(), port), ..asked })?;
    }
    Ok(())
}

/// What became of one attempt.
#[derive(Debug)]
struct Attempt {
    from: SocketAddr,
    answer: Answer,
    /// Connections that reached the application.
    reached: usize,
}

fn refused(leaf: Option<Leaf>, speech: Speech, reason: &str) -> Result<()> {
    let mesh = mesh()?;
    let agent = mesh.agent("b")?;
    let before = observe::refused(agent, reason)?;
    let attempt = knock(leaf.as_ref(), speech, |asked| asked)?;
    ensure!(matches!(attempt.answer, Answer::Ended(_)) && attempt.reached == 0, "not refused: {attempt:?}");
    // By the port too: other tests are refused for the same reason at the same time.
    observe::wait_refused(agent, reason, before, &attempt.from.to_string())
}

/// The client is who it says; what it asks for is not its to ask.
fn denied(change: impl FnOnce(Asked) -> Asked) -> Result<()> {
    let attempt = knock(Some(&Leaf::right(CLIENT)), RIGHT, change)?;
    let refused = matches!(attempt.answer, Answer::Denied(_) | Answer::Ended(_));
    ensure!(refused && attempt.reached == 0, "not denied: {attempt:?}");
    Ok(())
}

fn knock(leaf: Option<&Leaf>, speech: Speech, change: impl FnOnce(Asked) -> Asked) -> Result<Attempt> {
    let mesh = mesh()?;
    let (web, forger) = (mesh.pod("web")?, mesh.pod("forger")?);
    let server = Server::start(web, SocketAddr::new(web.ipv4().into(), fresh_port()), &["echo"])?;
    let forge = Forge::open(mesh.agent("b")?.files().issuer())?;
    let shown = leaf.map(|leaf| forge.sign(leaf)).transpose()?;
    let asked = Asked { destination: server.address(), client: SocketAddr::new(forger.ipv4().into(), 4000) };
    let (from, answer) = ask(forger.netns(), IpAddr::V4(web.ipv4()), shown, speech, change(asked))?;
    if answer == Answer::Accepted {
        server.events().first("accepted")?;
    }
    Ok(Attempt { from, answer, reached: server.accepted()? })
}

fn mesh() -> Result<&'static Mesh> {
    static MESH: OnceLock<Result<Mesh, String>> = OnceLock::new();
    Mesh::shared(&MESH, || {
        let plan = Plan::new("clients").pod("b", "shop", "web").pod("b", "shop", "other");
        plan.pod("a", "shop", "client").outside("a", "shop", "forger").with_agents()
    })
}

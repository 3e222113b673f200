//! Fake clients at the tunnel port of a real pod.

use crate::{
    certificates::{Leaf, Roots, SigningRoot, Validity},
    fake::{CLIENT_HELLO_1_2, FlowRequest, Response, TlsOptions, VALID_OPTIONS, request_flow},
};
use anyhow::{Result, ensure};
use std::{
    io::{Read, Write},
    net::{Ipv6Addr, SocketAddr, TcpStream},
    sync::OnceLock,
};
use tacit_abi::tcp_port;
use tacit_tests::{Mesh, Plan, Server, fresh_port, observe};
use tacit_topology::{HANG, Pod, TUNNEL_PORT};

const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";

#[test]
#[ignore = "needs root"]
fn a_client_that_is_right_in_everything_is_let_in() -> Result<()> {
    let attempt = connect_as(Some(&Leaf::valid(CLIENT)), VALID_OPTIONS, |request| request)?;
    ensure!(attempt.response == Response::Accepted && attempt.reached == 1, "{attempt:?}");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_client_without_a_certificate_is_refused() -> Result<()> {
    refused(None, VALID_OPTIONS, "no_client_certificate")
}

#[test]
#[ignore = "needs root"]
fn an_expired_client_is_refused() -> Result<()> {
    refused(Some(Leaf { validity: Validity::Past, ..Leaf::valid(CLIENT) }), VALID_OPTIONS, "expired")
}

#[test]
#[ignore = "needs root"]
fn a_client_of_the_future_is_refused() -> Result<()> {
    refused(Some(Leaf { validity: Validity::Future, ..Leaf::valid(CLIENT) }), VALID_OPTIONS, "not_yet_valid")
}

/// There is no tolerance for clock skew, because it would extend the life of expired certificates.
#[test]
#[ignore = "needs root"]
fn half_a_minute_too_late_is_refused() -> Result<()> {
    refused(Some(Leaf { validity: Validity::JustPast, ..Leaf::valid(CLIENT) }), VALID_OPTIONS, "expired")
}

#[test]
#[ignore = "needs root"]
fn half_a_minute_too_early_is_refused() -> Result<()> {
    refused(Some(Leaf { validity: Validity::Soon, ..Leaf::valid(CLIENT) }), VALID_OPTIONS, "not_yet_valid")
}

#[test]
#[ignore = "needs root"]
fn a_client_of_another_trust_domain_is_refused() -> Result<()> {
    refused(Some(Leaf::valid("spiffe://other.domain/ns/shop/sa/client")), VALID_OPTIONS, "other_trust_domain")
}

#[test]
#[ignore = "needs root"]
fn a_client_of_a_foreign_root_is_refused() -> Result<()> {
    refused(Some(Leaf { root: SigningRoot::Foreign, ..Leaf::valid(CLIENT) }), VALID_OPTIONS, "unknown_issuer")
}

#[test]
#[ignore = "needs root"]
fn a_client_of_a_root_that_only_has_the_name_of_ours_is_refused() -> Result<()> {
    refused(
        Some(Leaf { root: SigningRoot::Namesake, ..Leaf::valid(CLIENT) }),
        VALID_OPTIONS,
        "unknown_issuer",
    )
}

#[test]
#[ignore = "needs root"]
fn a_client_with_two_identities_is_refused() -> Result<()> {
    let both = vec![CLIENT.to_owned(), "spiffe://cluster.local/ns/shop/sa/web".to_owned()];
    refused(Some(Leaf { uris: both, ..Leaf::valid(CLIENT) }), VALID_OPTIONS, "uri_names")
}

#[test]
#[ignore = "needs root"]
fn a_client_without_an_identity_is_refused() -> Result<()> {
    refused(Some(Leaf { uris: Vec::new(), ..Leaf::valid(CLIENT) }), VALID_OPTIONS, "uri_names")
}

#[test]
#[ignore = "needs root"]
fn a_client_whose_name_is_no_spiffe_id_is_refused() -> Result<()> {
    refused(Some(Leaf::valid("https://cluster.local/ns/shop/sa/client")), VALID_OPTIONS, "not_an_identity")
}

#[test]
#[ignore = "needs root"]
fn a_client_that_speaks_tls_1_2_only_is_refused() -> Result<()> {
    refused_bytes(CLIENT_HELLO_1_2, "tls_mismatch")
}

#[test]
#[ignore = "needs root"]
fn a_client_of_another_wire_format_is_refused() -> Result<()> {
    refused(Some(Leaf::valid(CLIENT)), TlsOptions { alpn: b"tacit/0" }, "alpn")
}

#[test]
#[ignore = "needs root"]
fn a_client_that_speaks_no_tls_is_refused() -> Result<()> {
    refused_bytes(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n", "tls")
}

/// Checks that the agent rejects a client that sends `first`.
fn refused_bytes(first: &[u8], reason: &str) -> Result<()> {
    let mesh = mesh()?;
    let (web, attacker, agent) = (mesh.pod("web")?, mesh.pod("attacker")?, mesh.agent("b")?);
    let before = observe::refused(agent, reason)?;
    let address = SocketAddr::new(web.ipv4().into(), TUNNEL_PORT);
    let mut response = Vec::new();
    let mut tcp = attacker.netns().enter(|| TcpStream::connect_timeout(&address, HANG))??;
    tcp.set_read_timeout(Some(HANG))?;
    tcp.write_all(first)?;
    // The agent may send a TLS alert before it closes, but no application bytes.
    let _ = tcp.read_to_end(&mut response);
    assert!(response.len() <= 7, "{response:?}");
    observe::wait_refused(agent, reason, before, &attacker.ipv4().to_string())
}

#[test]
#[ignore = "needs root"]
fn a_flow_in_the_name_of_another_address_is_denied() -> Result<()> {
    denied(|request| FlowRequest { client: SocketAddr::from(([10, 77, 1, 200], 4000)), ..request })
}

#[test]
#[ignore = "needs root"]
fn a_flow_to_another_pod_than_the_tunnels_is_denied() -> Result<()> {
    let other = mesh()?.pod("other")?.ipv4();
    let server =
        Server::start(mesh()?.pod("other")?, SocketAddr::new(other.into(), fresh_port()), &["echo"])?;
    let address = server.address();
    denied(move |request| FlowRequest { destination: address, ..request })?;
    assert_eq!(server.accepted()?, 0);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_flow_to_a_loopback_address_is_denied() -> Result<()> {
    let web = mesh()?.pod("web")?;
    let server = Server::start(web, SocketAddr::from(([127, 0, 0, 1], fresh_port())), &["echo"])?;
    let address = server.address();
    denied(move |request| FlowRequest { destination: address, ..request })?;
    assert_eq!(server.accepted()?, 0);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_flow_to_the_agents_own_ports_is_denied() -> Result<()> {
    for port in [tcp_port::CAPTURE, tcp_port::PLAINTEXT, TUNNEL_PORT] {
        denied(move |request| FlowRequest {
            destination: SocketAddr::new(request.destination.ip(), port),
            ..request
        })?;
    }
    Ok(())
}

/// A pod with a proxy of its own is reached as plaintext, and its agent says so. All pods of an account have one certificate, so the
/// answer of one must not count for another.
#[test]
#[ignore = "needs root"]
fn an_answer_that_leads_to_plaintext_is_only_given_for_the_pod_that_is_asked() -> Result<()> {
    const PLAINTEXT: u8 = 9;
    let plan = Plan::new("answers").pod("b", "shop", "web").pod("b", "shop", "other");
    let mesh = plan.pod("a", "shop", "client").outside("a", "shop", "attacker").with_agents()?;
    let (web, other, attacker) = (mesh.pod("web")?, mesh.pod("other")?, mesh.pod("attacker")?);
    let agent = mesh.agent("b")?;
    let proxy = SocketAddr::from((Ipv6Addr::UNSPECIFIED, tcp_port::OF_PROXIES[0]));
    let _proxy = Server::start(web, proxy, &["echo"])?;
    observe::wait_status(agent, "left alone", |status| {
        let found = status["pods"].as_array()?.iter().find(|pod| pod["name"] == "web")?;
        found["state"]["left_alone"].is_string().then_some(())
    })?;
    let roots = Roots::open(agent.files().issuer())?;
    let agent_at = SocketAddr::new(web.ipv4().into(), tcp_port::ANSWER);
    let client = SocketAddr::new(attacker.ipv4().into(), 4000);
    let ask = |destination: SocketAddr, client: SocketAddr| -> Result<Response> {
        let credentials = Some(roots.sign(&Leaf::valid(CLIENT))?);
        let request = FlowRequest { destination, client };
        Ok(request_flow(attacker.netns(), agent_at, credentials, VALID_OPTIONS, request)?.1)
    };
    let at = |pod: &Pod| SocketAddr::new(pod.ipv4().into(), fresh_port());
    let right = ask(at(web), client)?;
    ensure!(right == Response::Denied(PLAINTEXT), "{right:?}");
    let stranger = SocketAddr::from(([10, 77, 1, 200], 4000));
    for (destination, client) in [(at(other), client), (at(web), stranger)] {
        let wrong = ask(destination, client)?;
        ensure!(matches!(wrong, Response::Denied(code) if code != PLAINTEXT), "{destination}: {wrong:?}");
    }
    Ok(())
}

/// Result of one connection of a fake client.
#[derive(Debug)]
struct Attempt {
    from: SocketAddr,
    response: Response,
    /// Connections that reached the application.
    reached: usize,
}

fn refused(leaf: Option<Leaf>, options: TlsOptions, reason: &str) -> Result<()> {
    let mesh = mesh()?;
    let agent = mesh.agent("b")?;
    let before = observe::refused(agent, reason)?;
    let attempt = connect_as(leaf.as_ref(), options, |request| request)?;
    ensure!(
        matches!(attempt.response, Response::Ended(_)) && attempt.reached == 0,
        "not refused: {attempt:?}"
    );
    // The port identifies the connection, because other tests are rejected for the same reason at the same time.
    observe::wait_refused(agent, reason, before, &attempt.from.to_string())
}

/// Checks that the agent denies the flow of a client with a valid certificate.
fn denied(change: impl FnOnce(FlowRequest) -> FlowRequest) -> Result<()> {
    let attempt = connect_as(Some(&Leaf::valid(CLIENT)), VALID_OPTIONS, change)?;
    let refused = matches!(attempt.response, Response::Denied(_) | Response::Ended(_));
    ensure!(refused && attempt.reached == 0, "not denied: {attempt:?}");
    Ok(())
}

fn connect_as(
    leaf: Option<&Leaf>,
    options: TlsOptions,
    change: impl FnOnce(FlowRequest) -> FlowRequest,
) -> Result<Attempt> {
    let mesh = mesh()?;
    let (web, attacker) = (mesh.pod("web")?, mesh.pod("attacker")?);
    let server = Server::start(web, SocketAddr::new(web.ipv4().into(), fresh_port()), &["echo"])?;
    let roots = Roots::open(mesh.agent("b")?.files().issuer())?;
    let credentials = leaf.map(|leaf| roots.sign(leaf)).transpose()?;
    let request =
        FlowRequest { destination: server.address(), client: SocketAddr::new(attacker.ipv4().into(), 4000) };
    let at = SocketAddr::new(web.ipv4().into(), TUNNEL_PORT);
    let (from, response) = request_flow(attacker.netns(), at, credentials, options, change(request))?;
    if response == Response::Accepted {
        server.events().first("accepted")?;
    }
    Ok(Attempt { from, response, reached: server.accepted()? })
}

fn mesh() -> Result<&'static Mesh> {
    static MESH: OnceLock<Result<Mesh, String>> = OnceLock::new();
    Mesh::shared(&MESH, || {
        let plan = Plan::new("clients").pod("b", "shop", "web").pod("b", "shop", "other");
        plan.pod("a", "shop", "client").outside("a", "shop", "attacker").with_agents()
    })
}

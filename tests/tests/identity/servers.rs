//! Fake servers on the tunnel port of a pod that the client's directory lists as a pod of the mesh.

use crate::{
    certificates::{Leaf, Roots, SigningRoot, Validity},
    fake::{SERVER_HELLO_1_2, Script, Server, TlsOptions, VALID_OPTIONS},
};
use anyhow::{Context, Result, ensure};
use std::{net::SocketAddr, sync::OnceLock};
use tacit_tests::{Client, Mesh, Plan, Server as Application, fresh_port, observe};
use tacit_topology::WorkloadEntry;

/// Pods of the fake servers. Each has its own, because a pod has one tunnel port.
const FAKES: [&str; 12] = [
    "right", "someone", "expired", "future", "domain", "foreign", "namesake", "two", "none", "oldtls",
    "format", "text",
];

#[test]
#[ignore = "needs root"]
fn a_server_that_is_right_in_everything_is_trusted() -> Result<()> {
    let mesh = mesh()?;
    let fake = start(mesh, "right", |leaf| leaf, VALID_OPTIONS)?;
    let events = connect(mesh, "right")?;
    ensure!(
        events.iter().any(|event| event["text"] == "hello\n") && fake.requested_flows() == 1,
        "{events:?}"
    );
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_server_that_is_someone_else_is_refused() -> Result<()> {
    let other = |leaf| Leaf { uris: vec!["spiffe://cluster.local/ns/shop/sa/right".to_owned()], ..leaf };
    refused("someone", other, VALID_OPTIONS, "identity_mismatch")
}

#[test]
#[ignore = "needs root"]
fn an_expired_server_is_refused() -> Result<()> {
    refused("expired", |leaf| Leaf { validity: Validity::Past, ..leaf }, VALID_OPTIONS, "expired")
}

#[test]
#[ignore = "needs root"]
fn a_server_of_the_future_is_refused() -> Result<()> {
    refused("future", |leaf| Leaf { validity: Validity::Future, ..leaf }, VALID_OPTIONS, "not_yet_valid")
}

#[test]
#[ignore = "needs root"]
fn a_server_of_another_trust_domain_is_refused() -> Result<()> {
    let other = |leaf| Leaf { uris: vec!["spiffe://other.domain/ns/shop/sa/domain".to_owned()], ..leaf };
    refused("domain", other, VALID_OPTIONS, "other_trust_domain")
}

#[test]
#[ignore = "needs root"]
fn a_server_of_a_foreign_root_is_refused() -> Result<()> {
    refused("foreign", |leaf| Leaf { root: SigningRoot::Foreign, ..leaf }, VALID_OPTIONS, "unknown_issuer")
}

#[test]
#[ignore = "needs root"]
fn a_server_of_a_root_that_only_has_the_name_of_ours_is_refused() -> Result<()> {
    refused("namesake", |leaf| Leaf { root: SigningRoot::Namesake, ..leaf }, VALID_OPTIONS, "unknown_issuer")
}

#[test]
#[ignore = "needs root"]
fn a_server_with_two_identities_is_refused() -> Result<()> {
    let both = |mut leaf: Leaf| {
        leaf.uris.push("spiffe://cluster.local/ns/shop/sa/right".to_owned());
        leaf
    };
    refused("two", both, VALID_OPTIONS, "uri_names")
}

#[test]
#[ignore = "needs root"]
fn a_server_without_an_identity_is_refused() -> Result<()> {
    refused("none", |leaf| Leaf { uris: Vec::new(), ..leaf }, VALID_OPTIONS, "uri_names")
}

#[test]
#[ignore = "needs root"]
fn a_server_that_speaks_tls_1_2_only_is_refused() -> Result<()> {
    refused_bytes("oldtls", SERVER_HELLO_1_2, "tls_mismatch")
}

#[test]
#[ignore = "needs root"]
fn a_server_of_another_wire_format_is_refused() -> Result<()> {
    refused("format", |leaf| leaf, TlsOptions { alpn: b"tacit/0" }, "alpn")
}

#[test]
#[ignore = "needs root"]
fn a_server_that_speaks_no_tls_is_refused() -> Result<()> {
    refused_bytes("text", b"HTTP/1.1 200 OK\r\n\r\nhello\n", "tls")
}

/// Checks that the agent rejects a server that sends `first`.
fn refused_bytes(name: &str, first: &'static [u8], reason: &str) -> Result<()> {
    let mesh = mesh()?;
    let before = observe::refused(mesh.agent("a")?, reason)?;
    let _fake = Server::start(mesh.pod(name)?.netns(), Script::Bytes(first))?;
    reset_without_a_byte(mesh, name)?;
    observe::wait_refused(mesh.agent("a")?, reason, before, &mesh.pod(name)?.ipv4().to_string())
}

/// Both agents are real; the client's directory names another service account for the server's pod.
#[test]
#[ignore = "needs root"]
fn a_real_server_is_refused_when_the_directory_expects_another_identity() -> Result<()> {
    const REASON: &str = "identity_mismatch";
    let plan =
        Plan::new("servers").pod("a", "shop", "client").pod("b", "shop", "web").pod("b", "shop", "honest");
    let mesh = plan.with_directories(|node, mesh| {
        let mut directory = mesh.directory();
        for entry in directory.iter_mut().filter(|entry| node == "a" && entry.name == "web") {
            entry.service_account = "another".to_owned();
        }
        Ok(directory)
    })?;
    let (web, honest) = (mesh.pod("web")?, mesh.pod("honest")?);
    let before = observe::refused(mesh.agent("a")?, REASON)?;
    let server = Application::start(web, SocketAddr::new(web.ipv4().into(), fresh_port()), &["echo"])?;
    let events = Client::run(mesh.pod("client")?, server.address(), &["read-end"])?;
    ensure!(is_reset(&events) && server.accepted()? == 0, "{events:?}");
    observe::wait_refused(mesh.agent("a")?, REASON, before, &web.ipv4().to_string())?;
    // Control: the client reaches the other pod of the node, whose entry in the directory is right.
    let server = Application::start(honest, SocketAddr::new(honest.ipv4().into(), fresh_port()), &["echo"])?;
    Client::echo(mesh.pod("client")?, server.address(), "honest")
}

fn refused(name: &str, change: impl FnOnce(Leaf) -> Leaf, options: TlsOptions, reason: &str) -> Result<()> {
    let mesh = mesh()?;
    let before = observe::refused(mesh.agent("a")?, reason)?;
    let fake = start(mesh, name, change, options)?;
    reset_without_a_byte(mesh, name)?;
    assert_eq!(fake.requested_flows(), 0, "the client requested a flow");
    observe::wait_refused(mesh.agent("a")?, reason, before, &mesh.pod(name)?.ipv4().to_string())
}

fn start(mesh: &Mesh, name: &str, change: impl FnOnce(Leaf) -> Leaf, options: TlsOptions) -> Result<Server> {
    let roots = Roots::open(mesh.agent("a")?.files().issuer())?;
    let leaf = change(Leaf::valid(&format!("spiffe://cluster.local/ns/shop/sa/{name}")));
    Server::start(mesh.pod(name)?.netns(), Script::Tls(roots.sign(&leaf)?, options))
}

fn reset_without_a_byte(mesh: &Mesh, name: &str) -> Result<()> {
    let events = connect(mesh, name)?;
    ensure!(is_reset(&events), "not reset: {events:?}");
    Ok(())
}

fn is_reset(events: &[serde_json::Value]) -> bool {
    // A reset can arrive before connect() returns.
    let at_connect = |event: &serde_json::Value| {
        event["step"] == "connect"
            && (event["error"] == "ConnectionRefused" || event["error"] == "ConnectionReset")
    };
    events.iter().any(at_connect)
        || events.iter().any(|event| event["end"] == "ConnectionReset" && event["bytes"] == 0)
}

fn connect(mesh: &Mesh, name: &str) -> Result<Vec<serde_json::Value>> {
    let address = SocketAddr::new(mesh.pod(name)?.ipv4().into(), fresh_port());
    Client::run(mesh.pod("client")?, address, &["read-end"])
}

fn mesh() -> Result<&'static Mesh> {
    static MESH: OnceLock<Result<Mesh, String>> = OnceLock::new();
    Mesh::shared(&MESH, || {
        let plan = Plan::new("servers").pod("a", "shop", "client");
        let plan = FAKES.iter().fold(plan, |plan, name| plan.outside("b", "shop", name));
        plan.with_directories(|node, mesh| {
            let mut directory = mesh.directory();
            for name in FAKES.iter().filter(|_| node == "a") {
                directory.push(WorkloadEntry::of(mesh.pod(name).context("pod of a fake")?));
            }
            Ok(directory)
        })
    })
}

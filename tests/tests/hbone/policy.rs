//! Policy, and what a request may not ask for.

use crate::{
    client::{Answer, Connection, connect, run, tls, tls_as},
    mesh, plan, servers,
};
use anyhow::{Result, ensure};
use bytes::Bytes;
use http::{Method, Request};
use std::net::SocketAddr;
use tacit_abi::tcp_port;
use tacit_tests::{Mesh, fresh_port, observe};

fn deny(port: u16) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: deny, namespace: shop}}\n\
         spec: {{action: DENY, rules: [{{from: [{{source: {{principals: [cluster.local/ns/shop/sa/peer]}}}}], to: [{{operation: {{ports: [\"{port}\"]}}}}]}}]}}\n"
    )
}

#[test]
#[ignore = "needs root"]
fn policy_denies_with_401_and_resets_open_flows() -> Result<()> {
    let mesh = plan("hpolicy").with_agents()?;
    let agent = mesh.agent("b")?;
    for family in 0..2 {
        // Of a port of its own, which the policy before does not name.
        let server = &servers(mesh.pod("web")?, &["read-end"])?[family];
        run(async {
            let mut connection = Connection::open(&mesh, server.address().ip()).await?;
            let mut flow = connection.flow(server.address()).await?;
            flow.send(Bytes::from_static(b"allowed")).await?;
            agent.files().set_policy(&deny(server.address().port()))?;
            flow.reset().await?;
            ensure!(server.events().first("end")?["end"] != "eof");
            let before = observe::refused(agent, "denied_by_policy")?;
            let denied = connection.connect(server.address()).await?;
            ensure!(matches!(denied, Answer::Status(401, true)), "{denied:?}");
            observe::wait_refused(agent, "denied_by_policy", before, crate::PEER)
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_request_for_what_is_not_there_has_its_status() -> Result<()> {
    let mesh = mesh()?;
    let web = mesh.pod("web")?;
    let [server, v6] = servers(web, &["echo"])?;
    let at = |port| SocketAddr::new(web.ipv4().into(), port).to_string();
    let port = server.address().port();
    let mapped = format!("[::ffff:{}]:{port}", web.ipv4());
    let bad = |authority: String| (connect(&authority), 400, None);
    let unavailable = |authority: String, reason| (connect(&authority), 503, reason);
    let cases = [
        // Another pod, the other family, loopback, a name for the same address, a service's name, no port.
        (connect(&format!("{}:{port}", mesh.pod("peer")?.ipv4())), 400, Some("forged_destination")),
        bad(v6.address().to_string()),
        bad(format!("127.0.0.1:{port}")),
        bad(mapped),
        bad(format!("web.shop.svc.cluster.local:{port}")),
        bad(web.ipv4().to_string()),
        (
            Request::builder().method(Method::GET).uri(format!("https://{}/", server.address())),
            400,
            Some("protocol"),
        ),
        unavailable(at(fresh_port()), Some("connection_refused")),
        unavailable(at(0), None),
        unavailable(at(tcp_port::CAPTURE), Some("reserved_port")),
        unavailable(at(tcp_port::PLAINTEXT), Some("reserved_port")),
        unavailable(at(tcp_port::TUNNEL), Some("reserved_port")),
    ];
    run(async {
        let mut connection = Connection::open(mesh, web.ipv4().into()).await?;
        for (request, status, reason) in cases {
            let text = format!("{:?} {:?}", request.method_ref(), request.uri_ref());
            let before = reason.map(|reason| observe::refused(mesh.agent("b")?, reason)).transpose()?;
            let answer = connection.ask(request).await?;
            ensure!(matches!(answer, Answer::Status(is, true) if is == status), "{text}: {answer:?}");
            if let (Some(reason), Some(before)) = (reason, before) {
                observe::wait_refused(mesh.agent("b")?, reason, before, crate::PEER)?;
            }
        }
        // The connection is none the worse for it.
        connection.flow(server.address()).await?.echo("after all").await
    })?;
    ensure!(server.accepted()? == 1 && v6.accepted()? == 0);
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_client_with_other_protocols_or_names_is_refused() -> Result<()> {
    let mesh = mesh()?;
    let other = "spiffe://cluster.local/ns/shop/sa/other";
    let h2 = b"h2".as_slice();
    let cases = [
        (vec![], vec![crate::PEER], "alpn"),
        (vec![b"http/1.1".as_slice()], vec![crate::PEER], "alpn"),
        (vec![h2], vec![crate::PEER, other], "uri_names"),
        (vec![h2], vec![], "uri_names"),
        (vec![h2], vec!["spiffe://other.domain/ns/shop/sa/peer"], "other_trust_domain"),
    ];
    for (alpn, uris, reason) in cases {
        let before = observe::refused(mesh.agent("b")?, reason)?;
        run(async {
            // A client can finish the handshake before the server has looked at its certificate.
            if let Ok(mut tls) = tls_as(mesh, mesh.pod("web")?.ipv4().into(), &alpn, &uris).await {
                use tokio::io::AsyncReadExt as _;
                let read = tls.read(&mut [0; 64]).await;
                ensure!(matches!(read, Err(_) | Ok(0)), "{read:?}");
            }
            Ok(())
        })?;
        observe::wait_refused(mesh.agent("b")?, reason, before, &mesh.pod("peer")?.ipv4().to_string())?;
    }
    prefers_tacit(mesh)
}

/// Two agents keep their own wire format.
fn prefers_tacit(mesh: &Mesh) -> Result<()> {
    run(async {
        let web = mesh.pod("web")?.ipv4().into();
        for offered in [[&b"h2"[..], b"tacit/1.1"], [b"tacit/1.1", b"h2"]] {
            let tls = tls(mesh, web, &offered).await?;
            ensure!(tls.get_ref().1.alpn_protocol() == Some(&b"tacit/1.1"[..]));
        }
        Ok(())
    })
}

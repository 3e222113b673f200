//! A peer of a federated trust domain whose root is removed.

use crate::{
    certificates::OtherRoot,
    client::{Connection, run, tls_with},
    plan, servers,
};
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use std::fs;
use tacit_tests::observe;

const PARTNER: &str = "spiffe://partner.example/ns/shop/sa/peer";

#[test]
#[ignore = "needs root"]
fn a_federated_root_that_is_removed_ends_its_live_flows_and_no_others() -> Result<()> {
    let (partner, next) = (OtherRoot::new()?, OtherRoot::new()?);
    let plan = plan("hpartner")
        .config("federation: [{trustDomain: partner.example, rootFile: partner.pem}]\n")
        .with_directories(|node, mesh| {
            let file = mesh.topology().node(node)?.files()?.join("partner.pem");
            fs::write(&file, &partner.pem).with_context(|| format!("write {}", file.display()))?;
            Ok(mesh.directory())
        });
    let mesh = plan?;
    let agent = mesh.agent("b")?;
    let servers = servers(mesh.pod("web")?, &["echo"])?;
    let (server, folder) = (&servers[0], agent.files().issuer());
    run(async {
        let connect = async |root: &OtherRoot| {
            let credentials = root.sign(folder, PARTNER)?;
            Connection::over(tls_with(&mesh, server.address().ip(), &[b"h2"], credentials).await?).await
        };
        let mut federated = connect(&partner).await?;
        let mut cut = federated.flow(server.address()).await?;
        cut.send(Bytes::from_static(b"by the partner's root")).await?;
        let mut own = Connection::open(&mesh, server.address().ip()).await?;
        let other = own.flow(server.address()).await?;
        // While both are there, nothing ends.
        agent.files().set_partner(&(partner.pem.clone() + &next.pem))?;
        observe::wait_status(agent, "both roots", |status| loads(status, 2))?;
        cut.send(Bytes::from_static(b"still")).await?;
        agent.files().set_partner(&next.pem)?;
        cut.cut().await?;
        let before = observe::refused(agent, "unknown_issuer")?;
        // A client can finish the handshake before the server has looked at its certificate.
        if let Ok(mut refused) = connect(&partner).await {
            ensure!(refused.connect(server.address()).await.is_err(), "a stream was opened");
        }
        let peer = mesh.pod("peer")?.ipv4().to_string();
        observe::wait_refused(agent, "unknown_issuer", before, &peer)?;
        other.echo("of the own trust domain").await?;
        connect(&next).await?.flow(server.address()).await?.echo("by the next root").await
    })
}

fn loads(status: &serde_json::Value, expected: u64) -> Option<()> {
    let sources = status["sources"].as_array()?;
    let roots = sources.iter().find(|source| source["kind"] == "federation")?;
    (roots["loads"] == expected).then_some(())
}

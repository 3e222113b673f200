//! A peer whose certificate is revoked, while its connection has streams and after.

use crate::{
    PEER,
    certificates::{Intermediate, SERIAL},
    client::{Connection, run, tls_with},
    plan, servers,
};
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use tacit_tests::{
    crl::{self, Expiry},
    observe,
};
use tacit_topology::until;
use tokio::time::timeout;

#[test]
#[ignore = "needs root"]
fn a_revoked_peer_loses_its_streams_and_its_connection_and_gets_no_other() -> Result<()> {
    let mesh = crl::mesh(plan("hrevoke"))?;
    let agent = mesh.agent("b")?;
    let servers = servers(mesh.pod("web")?, &["read-end"])?;
    let server = &servers[0];
    run(async {
        let mut connection = Connection::open(&mesh, server.address().ip()).await?;
        let idle = Connection::open(&mesh, server.address().ip()).await?;
        let mut flow = connection.flow(server.address()).await?;
        flow.send(Bytes::from_static(b"allowed")).await?;
        crl::set(agent, &["77"], Expiry::Later)?;
        flow.send(Bytes::from_static(b"another is revoked")).await?;
        crl::set(agent, &[SERIAL], Expiry::Later)?;
        ensure!(server.events().first("end")?["end"] != "eof");
        let counted = || {
            let labels = [("reason", "certificate_revoked")];
            observe::metric(agent, "tacit_connections_revoked_total", &labels)
        };
        until("the cut flow counted", || Ok((counted()? == 1).then_some(())))?;
        for connection in [connection, idle] {
            let ended = timeout(crate::client::LIMIT, connection.driver).await;
            ended.context("a connection goes on")?.context("the driver panicked")?.ok();
        }
        let before = observe::refused(agent, "certificate_revoked")?;
        // A client can finish the handshake before the server has looked at its certificate.
        if let Ok(mut refused) = Connection::open(&mesh, server.address().ip()).await {
            ensure!(refused.connect(server.address()).await.is_err(), "a stream was opened");
        }
        let peer = mesh.pod("peer")?.ipv4().to_string();
        observe::wait_refused(agent, "certificate_revoked", before, &peer)
    })
}

/// The intermediate and the peer's certificate have the same serial number, of different issuers.
#[test]
#[ignore = "needs root"]
fn a_peer_below_a_revoked_intermediate_is_cut_and_refused() -> Result<()> {
    let mesh = crl::mesh(plan("hbetween"))?;
    let agent = mesh.agent("b")?;
    let servers = servers(mesh.pod("web")?, &["echo"])?;
    let server = &servers[0];
    let folder = agent.files().issuer();
    let between = Intermediate::new(folder)?;
    let publish = |by_root: &[&str], by_between: &[&str]| {
        let of_root = crl::of_root(agent, by_root, Expiry::Later)?;
        crl::publish(agent, &(of_root + &crl::signed(&between.issuer, by_between, Expiry::Later)?))
    };
    publish(&[], &[])?;
    run(async {
        let connect = async || {
            let credentials = between.sign(folder, PEER)?;
            Connection::over(tls_with(&mesh, server.address().ip(), &[b"h2"], credentials).await?).await
        };
        for (by_root, by_between) in [(&[SERIAL][..], &[][..]), (&[], &[SERIAL])] {
            let mut connection = connect().await?;
            let mut cut = connection.flow(server.address()).await?;
            cut.send(Bytes::from_static(b"below the intermediate")).await?;
            publish(by_root, by_between)?;
            cut.cut().await?;
            let before = observe::refused(agent, "certificate_revoked")?;
            // A client can finish the handshake before the server has looked at its certificate.
            if let Ok(mut refused) = connect().await {
                ensure!(refused.connect(server.address()).await.is_err(), "a stream was opened");
            }
            let peer = mesh.pod("peer")?.ipv4().to_string();
            observe::wait_refused(agent, "certificate_revoked", before, &peer)?;
            publish(&[], &[])?;
            connect().await?.flow(server.address()).await?.echo("again").await?;
        }
        Ok(())
    })
}

//! A peer whose certificate is revoked, while its connection has streams and after.

use crate::{
    certificates::SERIAL,
    client::{Connection, run},
    plan, servers,
};
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use tacit_tests::{
    crl::{self, Expiry},
    observe,
};
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

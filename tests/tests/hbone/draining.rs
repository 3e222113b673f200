//! The end of an agent, and of a connection.

use crate::{
    client::{Connection, LIMIT, run},
    plan, servers,
};
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use h2::Reason;
use tokio::time::timeout;

#[test]
#[ignore = "needs root"]
fn an_agent_that_ends_lets_flows_finish_and_takes_no_others() -> Result<()> {
    let mut mesh = plan("hdrain").config("drainTimeout: 60s\n").with_agents()?;
    let [server, _v6] = servers(mesh.pod("web")?, &["echo"])?;
    run(async {
        let mut connection = Connection::open(&mesh, server.address().ip()).await?;
        let flow = connection.flow(server.address()).await?;
        mesh.agent("b")?.send_sigterm()?;
        goes_away(&connection).await?;
        flow.echo("to the end").await?;
        timeout(LIMIT, connection.driver).await.context("the connection goes on")??.context("no clean end")
    })?;
    let status = mesh.agent_mut("b")?.wait_end()?;
    ensure!(status.success(), "{status}");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_flow_that_does_not_finish_is_cut_at_the_deadline_and_reset_on_both_sides() -> Result<()> {
    let mut mesh = plan("hcut").config("drainTimeout: 2s\n").with_agents()?;
    let [server, _v6] = servers(mesh.pod("web")?, &["read-end"])?;
    run(async {
        let mut connection = Connection::open(&mesh, server.address().ip()).await?;
        let mut flow = connection.flow(server.address()).await?;
        flow.send(Bytes::from_static(b"unfinished")).await?;
        mesh.agent("b")?.send_sigterm()?;
        goes_away(&connection).await?;
        ensure!(flow.rest().await.is_err(), "a clean end");
        let end = server.events().first("end")?;
        ensure!(end["text"] == "unfinished" && end["end"] != "eof", "{end}");
        Ok(())
    })?;
    mesh.agent_mut("b")?.wait_end()?;
    Ok(())
}

/// Waits for GOAWAY, after which the client opens no stream.
async fn goes_away(connection: &Connection) -> Result<()> {
    let away = async {
        loop {
            match connection.requests.clone().ready().await {
                Ok(_) => tokio::task::yield_now().await,
                Err(error) => return error.reason(),
            }
        }
    };
    let reason = timeout(LIMIT, away).await.context("no GOAWAY")?;
    ensure!(reason == Some(Reason::NO_ERROR), "{reason:?}");
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_pod_that_is_no_longer_enrolled_keeps_its_flows_and_gets_no_others() -> Result<()> {
    let mesh = plan("hgone").with_agents()?;
    let [server, _v6] = servers(mesh.pod("web")?, &["echo"])?;
    run(async {
        let mut connection = Connection::open(&mesh, server.address().ip()).await?;
        let flow = connection.flow(server.address()).await?;
        mesh.agent("b")?.files().set_directory(&[])?;
        goes_away(&connection).await?;
        flow.echo("to the end").await?;
        timeout(LIMIT, connection.driver).await.context("the connection goes on")??.context("no clean end")
    })
}

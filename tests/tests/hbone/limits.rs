//! Many flows, and flows that hold each other up.

use crate::{
    client::{Answer, Connection, run},
    mesh, servers,
};
use anyhow::{Result, ensure};
use bytes::Bytes;
use h2::Reason;
use tacit_tests::observe;

#[test]
#[ignore = "needs root"]
fn a_thousand_flows_over_ten_connections_are_open_at_once() -> Result<()> {
    const CONNECTIONS: usize = 10;
    const STREAMS: usize = 100;
    let mesh = mesh()?;
    for server in servers(mesh.pod("web")?, &["echo"])? {
        run(async {
            let (mut connections, mut flows) = (Vec::new(), Vec::new());
            for _ in 0..CONNECTIONS {
                connections.push(Connection::open(mesh, server.address().ip()).await?);
            }
            for connection in &mut connections {
                for _ in 0..STREAMS {
                    flows.push(connection.flow(server.address()).await?);
                }
            }
            // Each is echoed while all others are open.
            for (number, flow) in flows.iter_mut().enumerate() {
                flow.send(Bytes::from(format!("{number};"))).await?;
                let mut got = Vec::new();
                while !got.ends_with(b";") {
                    got.extend_from_slice(&flow.receive.data().await.expect("open")?);
                }
                ensure!(got == format!("{number};").as_bytes(), "{got:?} instead of {number}");
            }
            for mut flow in flows {
                flow.end()?;
                ensure!(flow.rest().await?.is_empty());
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_stream_beyond_two_hundred_is_refused_until_another_ends() -> Result<()> {
    let mesh = mesh()?;
    let [server, _v6] = servers(mesh.pod("web")?, &["echo"])?;
    run(async {
        let mut connection = Connection::open(mesh, server.address().ip()).await?;
        let mut flows = vec![connection.flow(server.address()).await?];
        // h2 keeps to the limit of the server by itself.
        ensure!(connection.requests.current_max_send_streams() == 200);
        while flows.len() < 200 {
            flows.push(connection.flow(server.address()).await?);
        }
        flows.pop().expect("200 of them").echo("room").await?;
        flows.push(connection.flow(server.address()).await?);
        Ok(())
    })
}

/// A peer that does not read, and an application that does not, each hold up their own flow alone.
#[test]
#[ignore = "needs root"]
fn a_stalled_flow_holds_up_no_other_of_its_connection() -> Result<()> {
    let mesh = mesh()?;
    let [filler, _v6] = servers(mesh.pod("web")?, &["fill"])?;
    let [deaf, _v6] = servers(mesh.pod("web")?, &["pause"])?;
    let [echo, _v6] = servers(mesh.pod("web")?, &["echo"])?;
    run(async {
        let mut connection = Connection::open(mesh, echo.address().ip()).await?;
        let unread = connection.flow(filler.address()).await?;
        ensure!(filler.events().first("filled")?["bytes"].as_u64() > Some(4 << 20), "it was not filled");
        let mut untaken = connection.flow(deaf.address()).await?;
        let piece = Bytes::from(vec![7; 1 << 20]);
        let filling = async {
            loop {
                untaken.send(piece.clone()).await?;
            }
        };
        let full: Result<Result<()>, _> =
            tokio::time::timeout(std::time::Duration::from_secs(2), filling).await;
        ensure!(full.is_err(), "nothing bounds the flow");
        for _ in 0..20 {
            connection.flow(echo.address()).await?.echo(&"bytes ".repeat(10_000)).await?;
        }
        drop(unread);
        Ok(())
    })
}

#[test]
#[ignore = "needs root"]
fn more_flows_than_the_share_of_a_source_are_refused_and_counted() -> Result<()> {
    // 14/16 of the descriptors are 224 connections, of which a source has 4/9.
    let plan = crate::plan("hshare").descriptors(512);
    let mesh = plan.with_agents()?;
    let [server, _v6] = servers(mesh.pod("web")?, &["echo"])?;
    let agent = mesh.agent("b")?;
    let before = observe::refused(agent, "source_connections")?;
    run(async {
        let mut connection = Connection::open(&mesh, server.address().ip()).await?;
        let mut flows = Vec::new();
        let answer = loop {
            match connection.connect(server.address()).await? {
                Answer::Flow(flow) => flows.push(flow),
                other => break other,
            }
            ensure!(flows.len() < 200, "not refused");
        };
        ensure!(matches!(answer, Answer::Status(503, true)), "{answer:?}");
        observe::wait_refused(agent, "source_connections", before, &mesh.pod("peer")?.ipv4().to_string())?;
        flows.pop().expect("some").echo("room").await?;
        connection.flow(server.address()).await?.echo("room").await?;
        ensure!(flows.len() > 50, "{} flows", flows.len());
        Ok(())
    })
}

#[test]
#[ignore = "needs root"]
fn a_stream_of_a_client_that_ignores_the_limit_is_reset() -> Result<()> {
    crate::faults::refused_stream(Reason::REFUSED_STREAM)
}

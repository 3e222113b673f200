//! Flows that peers open to a pod.

use crate::{
    client::{Connection, connect, run},
    mesh, servers,
};
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use h2::Reason;
use std::net::SocketAddr;
use tacit_tests::observe;

#[test]
#[ignore = "needs root"]
fn a_flow_is_delivered_as_its_client_and_described_on_both_families() -> Result<()> {
    let mesh = mesh()?;
    let (web, peer) = (mesh.pod("web")?, mesh.pod("peer")?);
    for (server, own) in servers(web, &["echo"])?.iter().zip([peer.ipv4().into(), peer.ipv6().into()]) {
        run(async {
            let mut connection = Connection::open(mesh, server.address().ip()).await?;
            let client = SocketAddr::new(own, 4711);
            let stranger = SocketAddr::from(([10, 77, 1, 200], 4711));
            // The port of `forwarded` counts if its address is that of the connection. The trace id is for the logs.
            for (claimed, seen) in [(client, client), (stranger, connection.local)] {
                let request = connect(&server.address().to_string())
                    .header("forwarded", format!("for=\"{claimed}\";host=web.shop"))
                    .header("traceparent", "00-0123456789abcdef0123456789abcdef-0123456789abcdef-00")
                    .header("baggage", "k8s.namespace.name=shop");
                let skip = usize::from(claimed == stranger);
                let flow = connection.ask(request).await?.flow()?;
                let baggage = "k8s.namespace.name=shop,k8s.pod.name=web,service.name=web";
                ensure!(flow.fields["baggage"] == baggage, "{:?}", flow.fields);
                let accepted = server.events().nth("accepted", skip)?;
                ensure!(accepted["peer"] == seen.to_string(), "{accepted}");
                let trace = "0123456789abcdef0123456789abcdef";
                observe::wait_status(mesh.agent("b")?, "the flow", |status| {
                    let flows = status["flows"]["list"].as_array()?;
                    let flow = flows.iter().find(|flow| {
                        flow["source"]["address"] == seen.to_string() && flow["trace"] == trace
                    })?;
                    (flow["wire"] == "h2" && flow["source"]["identity"] == crate::PEER).then_some(())
                })?;
                flow.echo("over h2").await?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn each_direction_ends_alone() -> Result<()> {
    let mesh = mesh()?;
    // One answers after the end of what it reads, the other ends first and reads on.
    for server in servers(mesh.pod("web")?, &["read-end", "send:late", "shut"])? {
        run(async {
            let mut flow =
                Connection::open(mesh, server.address().ip()).await?.flow(server.address()).await?;
            flow.send(Bytes::from_static(b"question")).await?;
            flow.end()?;
            ensure!(server.events().first("end")?["text"] == "question");
            ensure!(flow.rest().await? == b"late\n");
            Ok(())
        })?;
    }
    for server in servers(mesh.pod("web")?, &["send:first", "shut", "read-end"])? {
        run(async {
            let mut flow =
                Connection::open(mesh, server.address().ip()).await?.flow(server.address()).await?;
            ensure!(flow.rest().await? == b"first\n");
            flow.send(Bytes::from_static(b"late")).await?;
            flow.end()?;
            let end = server.events().first("end")?;
            ensure!(end["text"] == "late" && end["end"] == "eof", "{end}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn a_reset_stays_a_reset_in_both_directions() -> Result<()> {
    let mesh = mesh()?;
    let [server, _v6] = servers(mesh.pod("web")?, &["read-end"])?;
    for (skip, reason) in [Reason::CANCEL, Reason::NO_ERROR, Reason::INTERNAL_ERROR].into_iter().enumerate() {
        run(async {
            let mut connection = Connection::open(mesh, server.address().ip()).await?;
            let mut flow = connection.flow(server.address()).await?;
            flow.send(Bytes::from_static(b"cut off")).await?;
            flow.send.send_reset(reason);
            // The reset goes out with the connection's next turn.
            let _other = connection.flow(server.address()).await?;
            let end = server.events().nth("end", skip)?;
            ensure!(end["end"] != "eof", "{reason}: {end}");
            Ok(())
        })?;
    }
    let [server, _v6] = servers(mesh.pod("web")?, &["line", "reset"])?;
    run(async {
        let mut flow = Connection::open(mesh, server.address().ip()).await?.flow(server.address()).await?;
        flow.send(Bytes::from_static(b"go\n")).await?;
        let reason = flow.reset().await?;
        ensure!(reason == Reason::CONNECT_ERROR, "{reason}");
        Ok(())
    })
}

#[test]
#[ignore = "needs root"]
fn a_hundred_mib_pass_intact_both_ways_at_once() -> Result<()> {
    const PIECE: usize = 1_048_573;
    const PIECES: usize = 100;
    let mesh = mesh()?;
    let piece: Bytes = (0..PIECE).map(|at| (at * 131 % 253) as u8).collect();
    for server in servers(mesh.pod("web")?, &["echo"])? {
        run(async {
            let mut flow =
                Connection::open(mesh, server.address().ip()).await?.flow(server.address()).await?;
            let (mut receive, sent) = (flow.receive, piece.clone());
            let expected = piece.clone();
            let receiving = tokio::spawn(async move {
                let mut at = 0;
                while let Some(bytes) = receive.data().await {
                    let bytes = bytes?;
                    for chunk in bytes.chunks(64 << 10) {
                        let mut rest = chunk;
                        while !rest.is_empty() {
                            let here = &expected[at % PIECE..];
                            let (now, later) = rest.split_at(rest.len().min(here.len()));
                            ensure!(now == &here[..now.len()], "other bytes at {at}");
                            at += now.len();
                            rest = later;
                        }
                    }
                    receive.flow_control().release_capacity(bytes.len())?;
                }
                Ok(at)
            });
            for _ in 0..PIECES {
                let mut bytes = sent.clone();
                while !bytes.is_empty() {
                    flow.send.reserve_capacity(bytes.len());
                    let room =
                        std::future::poll_fn(|cx| flow.send.poll_capacity(cx)).await.context("closed")??;
                    flow.send.send_data(bytes.split_to(room.min(bytes.len())), false)?;
                }
            }
            flow.send.send_data(Bytes::new(), true)?;
            let received = receiving.await??;
            ensure!(received == PIECE * PIECES, "{received} bytes");
            Ok(())
        })?;
    }
    Ok(())
}

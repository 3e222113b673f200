//! Urgent data (MSG_OOB), in both directions: the rows are what one side sends, and how the other one receives.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tacit_tests::{Client, Mesh, Server, fresh_port};

use super::{Family, V4, V6, address, with_tacit, without_tacit};

/// Steps of a sender. All end their direction, so that the receiver knows when everything has come. No urgent byte follows another
/// at once: the receiver's kernel drops the first of them if they come in two segments.
const ALONE: &[&str] = &["urgent:!", "shut", "read-end"];
const LAST: &[&str] = &["send:before", "urgent:!", "shut", "read-end"];
const FIRST: &[&str] = &["urgent:!", "send:behind", "shut", "read-end"];
const INSIDE: &[&str] = &["send:before", "urgent:!", "send:behind", "shut", "read-end"];
const LONG: &[&str] = &["send:before", "urgent:text!", "send:behind", "shut", "read-end"];
const THREE: &[&str] =
    &["send:a", "urgent:1", "send:b", "urgent:2", "send:c", "urgent:3", "shut", "read-end"];

/// Bytes before and behind an urgent one: more than a socket keeps.
const BULK: usize = 1_000_000;

/// The side of a connection that sends.
#[derive(Debug, Clone, Copy)]
enum Sender {
    Client,
    Server,
}

#[test]
#[ignore = "needs root"]
fn urgent_data_is_received_as_sent() -> Result<()> {
    let mut differences = Vec::new();
    for (pod, family) in [("far", V4), ("far", V6), ("near", V4)] {
        for sender in [Sender::Client, Sender::Server] {
            for sent in [ALONE, LAST, FIRST, INSIDE, LONG, THREE] {
                for how in ["receive:beside", "receive:inline", "receive:never"] {
                    let run = |mesh| exchange(mesh, (pod, family), sender, sent, how);
                    let without = run(without_tacit()?).context("without Tacit")?;
                    let with = run(with_tacit()?).context("with Tacit")?;
                    if with != without {
                        let name = format!("{pod} {family:?} {sender:?} {sent:?} {how}");
                        differences.push(format!("{name}\nwithout Tacit: {without}\n   with Tacit: {with}"));
                    }
                }
            }
        }
    }
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn urgent_data_inside_a_transfer_is_marked_and_nothing_is_lost() -> Result<()> {
    let (send, receive) = (format!("urgent-bulk:{BULK}"), format!("receive-bulk:{BULK}"));
    for mesh in [without_tacit()?, with_tacit()?] {
        for pod in ["far", "near"] {
            for sender in [Sender::Client, Sender::Server] {
                let sent = [&send, "shut", "read-end"];
                let seen = exchange(mesh, (pod, V4), sender, &sent, &receive)?;
                let is_whole =
                    seen["bytes"] == 2 * BULK + 1 && seen["intact"] == true && seen["marked"] == true;
                ensure!(is_whole, "{pod} {sender:?}, Tacit {}: {seen}", mesh.has_tacit());
            }
        }
    }
    Ok(())
}

/// Makes one connection to `pod` and returns what the receiver has seen.
fn exchange(
    mesh: &Mesh,
    (pod, family): (&str, Family),
    sender: Sender,
    sent: &[&str],
    receive: &str,
) -> Result<Value> {
    let to = SocketAddr::new(address(mesh.pod(pod)?, family), fresh_port());
    let (client, server) = match sender {
        Sender::Client => (sent, &[receive][..]),
        Sender::Server => (&[receive][..], sent),
    };
    let server = Server::start(mesh.pod(pod)?, to, server)?;
    let events = Client::run(mesh.pod("client")?, to, client)?;
    let seen = match sender {
        Sender::Client => {
            server.events().first("closed")?;
            server.events().so_far()
        }
        Sender::Server => events,
    };
    let seen =
        seen.iter().find(|event| event["event"].as_str().is_some_and(|name| name.ends_with("received")));
    seen.cloned().with_context(|| format!("nothing was received: {:?}", server.events().so_far()))
}

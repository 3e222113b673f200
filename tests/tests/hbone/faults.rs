//! Peers that break HTTP/2. Each costs its own connection, and is reported.

use crate::{
    client::{Answer, Connection, LIMIT, connect, run, tls},
    mesh, servers,
};
use anyhow::{Context, Result, ensure};
use h2::Reason;
use std::net::SocketAddr;
use tacit_tests::observe;
use tacit_topology::until;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// One frame.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short frame").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

fn preface() -> Vec<u8> {
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(SETTINGS, 0, 0, &[])].concat()
}

/// A literal field without a place in the table. The names of the table of HPACK have numbers.
fn field(name: &[u8], value: &[u8]) -> Vec<u8> {
    let text = |text: &[u8]| [&[u8::try_from(text.len()).expect("short")], text].concat();
    [vec![0], text(name), text(value)].concat()
}

fn request(stream: u32, authority: SocketAddr, more: &[u8]) -> Vec<u8> {
    let fields = [
        field(b":method", b"CONNECT"),
        field(b":authority", authority.to_string().as_bytes()),
        more.to_vec(),
    ];
    frame(HEADERS, END_HEADERS, stream, &fields.concat())
}

/// Frames that come until `is_last`, or until the end.
async fn frames(
    tls: &mut (impl tokio::io::AsyncRead + Unpin),
    mut is_last: impl FnMut(u8, u32) -> bool,
) -> Result<Vec<(u8, u32, Vec<u8>)>> {
    let mut all = Vec::new();
    let reading = async {
        loop {
            let mut head = [0; 9];
            if tls.read_exact(&mut head).await.is_err() {
                return;
            }
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            let mut payload = vec![0; length];
            if tls.read_exact(&mut payload).await.is_err() {
                return;
            }
            all.push((head[3], stream, payload));
            if is_last(head[3], stream) {
                return;
            }
        }
    };
    timeout(LIMIT, reading).await.context("the connection goes on")?;
    Ok(all)
}

#[test]
#[ignore = "needs root"]
fn broken_frames_end_their_connection_with_goaway_and_are_reported() -> Result<()> {
    let mesh = mesh()?;
    let [server, _v6] = servers(mesh.pod("web")?, &["read-end"])?;
    let at = server.address();
    let upper = field(b"Forwarded", b"for=x");
    let cases: [(&str, Vec<u8>); 7] = [
        ("no HTTP/2", b"GET / HTTP/1.1\r\nHost: web\r\n\r\n........".to_vec()),
        (
            "a window that overflows",
            [preface(), frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff])].concat(),
        ),
        ("CONTINUATION without HEADERS", [preface(), frame(CONTINUATION, END_HEADERS, 1, b"x")].concat()),
        ("DATA of no stream", [preface(), frame(DATA, 0, 9, b"x")].concat()),
        ("SETTINGS of five bytes", [preface(), frame(SETTINGS, 0, 0, b"short")].concat()),
        ("a frame above 16 KiB", [preface(), request(1, at, &[]), frame(DATA, 0, 1, &[0; 20_000])].concat()),
        ("an upper-case name", [preface(), request(1, at, &upper)].concat()),
    ];
    run(async {
        let mut other = Connection::open(mesh, at.ip()).await?;
        let mut flow = other.flow(at).await?;
        for (what, bytes) in cases {
            let before = observe::refused(mesh.agent("b")?, "protocol")?;
            let mut tls = tls(mesh, at.ip(), &[b"h2"]).await?;
            tls.write_all(&bytes).await?;
            tls.flush().await?;
            let all = frames(&mut tls, |kind, _| kind == GOAWAY).await?;
            let kinds: Vec<_> = all.iter().map(|(kind, ..)| *kind).collect();
            ensure!(what == "no HTTP/2" || kinds.contains(&GOAWAY), "{what}: {kinds:?}");
            observe::wait_refused(
                mesh.agent("b")?,
                "protocol",
                before,
                &mesh.pod("peer")?.ipv4().to_string(),
            )
            .context(what)?;
        }
        flow.send(bytes::Bytes::from_static(b"untouched")).await?;
        flow.end()?;
        ensure!(flow.rest().await?.is_empty());
        Ok(())
    })?;
    until("the clean end of the other flow", || {
        let events = server.events().so_far();
        Ok(events.iter().any(|event| event["text"] == "untouched" && event["end"] == "eof").then_some(()))
    })
}

#[test]
#[ignore = "needs root"]
fn a_malformed_request_costs_its_stream() -> Result<()> {
    let mesh = mesh()?;
    let [server, _v6] = servers(mesh.pod("web")?, &["echo"])?;
    let at = server.address();
    run(async {
        for (name, value) in [(&b":scheme"[..], &b"https"[..]), (b":path", b"/"), (b"connection", b"close")] {
            let mut tls = tls(mesh, at.ip(), &[b"h2"]).await?;
            // Pseudo-fields come before the others.
            let fields = [
                field(b":method", b"CONNECT"),
                field(b":authority", at.to_string().as_bytes()),
                field(name, value),
            ];
            let wrong = frame(HEADERS, END_HEADERS, 1, &fields.concat());
            tls.write_all(&[preface(), wrong, request(3, at, &[])].concat()).await?;
            tls.flush().await?;
            let all = frames(&mut tls, |kind, stream| kind == HEADERS && stream == 3).await?;
            let reset = all.iter().find(|(kind, stream, _)| (*kind, *stream) == (RST_STREAM, 1));
            let code = reset.map(|(.., code)| code.as_slice());
            ensure!(code == Some(&[0, 0, 0, 1]), "{name:?}: {all:?}");
            // 200, by its place in the table of HPACK.
            ensure!(
                all.last()
                    .is_some_and(|(kind, stream, fields)| (*kind, *stream, fields[0]) == (HEADERS, 3, 0x88))
            );
        }
        Ok(())
    })
}

#[test]
#[ignore = "needs root"]
fn too_many_fields_are_answered_with_431() -> Result<()> {
    let mesh = mesh()?;
    let [server, _v6] = servers(mesh.pod("web")?, &["echo"])?;
    run(async {
        let mut connection = Connection::open(mesh, server.address().ip()).await?;
        // The client's limit is the server's: the settings have come by the second request.
        connection.flow(server.address()).await?.echo("settings").await?;
        let mut request = connect(&server.address().to_string());
        for number in 0..80 {
            request = request.header(format!("x-field-{number}"), "x".repeat(1000));
        }
        let answer = connection.ask(request).await?;
        ensure!(matches!(answer, Answer::Status(431, true)), "{answer:?}");
        connection.flow(server.address()).await?.echo("after all").await
    })
}

/// Opens 201 streams whatever the server's limit is, and checks how the last one is refused.
pub(crate) fn refused_stream(reason: Reason) -> Result<()> {
    let mesh = mesh()?;
    let [server, _v6] = servers(mesh.pod("web")?, &["echo"])?;
    let last = 1 + 2 * 200;
    run(async {
        let mut tls = tls(mesh, server.address().ip(), &[b"h2"]).await?;
        let requests: Vec<u8> =
            (0..=200).flat_map(|number| request(1 + 2 * number, server.address(), &[])).collect();
        tls.write_all(&[preface(), requests].concat()).await?;
        tls.flush().await?;
        let mut answered = 0;
        let all = frames(&mut tls, |kind, _| {
            answered += usize::from(kind == HEADERS || kind == RST_STREAM);
            answered == 201
        })
        .await?;
        let resets: Vec<_> = all.iter().filter(|(kind, ..)| *kind == RST_STREAM).collect();
        let code = u32::from(reason).to_be_bytes().to_vec();
        ensure!(resets == [&(RST_STREAM, last, code)], "{resets:?}");
        Ok(())
    })
}

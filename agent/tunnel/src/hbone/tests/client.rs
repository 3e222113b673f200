//! Tests of a client: against the agent's own server, and against a server of another TLS stack and HTTP/2.

use h2::server;
use http::{Response, request::Parts};
use rustls::ServerConfig;
use std::future::Future as _;
use tacit_core::refusal::RefusalReason;

use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::{Outgoing, testing::open, tls::server_config};

fn connect_of_flow() -> Connect {
    let open = open();
    Connect { destination: open.destination, client: Some(open.client), trace: open.trace }
}

async fn connected(tcp: TcpStream) -> (Client, JoinHandle<Result<(), TunnelError>>) {
    let (client, mut connection) = begun_client(tcp).await;
    soon(connection.settled()).await.expect("SETTINGS");
    (client, tokio::spawn(async move { connection.run().await }))
}

async fn begun_client(tcp: TcpStream) -> (Client, Connection) {
    match Outgoing::connect(tcp, &credentials("web"), &identity("db")).await.expect("accepted") {
        Outgoing::Hbone(connected) => connected.begin(WINDOW).await.expect("HTTP/2"),
        Outgoing::Tacit(_) => panic!("another wire format"),
    }
}

/// A request as a server of h2 sees it.
struct Asked {
    parts: Parts,
    body: RecvStream,
    respond: server::SendResponse<Bytes>,
}

/// A command for a server.
#[derive(Debug)]
enum Do {
    Drain,
    /// The connection stays open, and is not served any more.
    Hang,
}

/// An HTTP/2 server as ztunnel's.
struct Other {
    requests: UnboundedReceiver<Asked>,
    commands: UnboundedSender<Do>,
    task: JoinHandle<()>,
}

/// Serves `tcp` with a limit of streams.
async fn other(tcp: TcpStream, streams_max: u32) -> Other {
    let mut config = ServerConfig::clone(&server_config(&credentials("db")));
    config.alpn_protocols = vec![ALPN_HBONE.to_vec()];
    let tls = TlsAcceptor::from(Arc::new(config)).accept(tcp).await.expect("accepted");
    let (tell, requests) = unbounded_channel();
    let (commands, mut told) = unbounded_channel();
    let task = tokio::spawn(async move {
        let mut builder = server::Builder::new();
        builder.initial_window_size(4 << 20).initial_connection_window_size(16 << 20);
        builder.max_concurrent_streams(streams_max).max_frame_size(1 << 20);
        let mut connection: server::Connection<_, Bytes> = builder.handshake(tls).await.expect("HTTP/2");
        loop {
            tokio::select! {
                next = connection.accept() => match next {
                    Some(Ok((request, respond))) => {
                        let (parts, body) = request.into_parts();
                        if tell.send(Asked { parts, body, respond }).is_err() {
                            return;
                        }
                    }
                    _ => return,
                },
                Some(told) = told.recv() => match told {
                    Do::Drain => connection.graceful_shutdown(),
                    Do::Hang => std::future::pending().await,
                },
            }
        }
    });
    Other { requests, commands, task }
}

async fn with_other(streams_max: u32) -> (Client, JoinHandle<Result<(), TunnelError>>, Other) {
    let (near, far) = connection().await;
    let ((client, task), other) = tokio::join!(connected(near), other(far, streams_max));
    (client, task, other)
}

async fn ask(client: &Client) -> (Place, super::super::Asked) {
    let place = client.place(WINDOW).expect("room");
    let asked = soon(place.ask(&connect_of_flow(), "k8s.namespace.name=shop")).await.expect("open");
    (place, asked)
}

impl Other {
    async fn next(&mut self) -> Asked {
        soon(self.requests.recv()).await.expect("a connection")
    }
}

#[tokio::test]
async fn two_agents_agree_on_their_own_format_and_hbone_is_for_others() {
    let (near, far) = connection().await;
    let (web, db) = (credentials("web"), credentials("db"));
    let expected = identity("db");
    let (client, server) = tokio::join!(Outgoing::connect(near, &web, &expected), Incoming::accept(far, &db));
    assert!(matches!((client, server), (Ok(Outgoing::Tacit(_)), Ok(Incoming::Tacit(_)))));
}

#[tokio::test]
async fn a_server_of_hbone_gets_the_request_of_ztunnel() {
    let (client, _task, mut other) = with_other(200).await;
    assert_eq!(client.peer().identity(), &identity("db"));
    let (_place, mut asked) = ask(&client).await;
    let mut seen = other.next().await;
    let connect = connect_of_flow();
    assert_eq!(
        (&seen.parts.method, seen.parts.uri.to_string()),
        (&Method::CONNECT, "10.77.2.3:80".to_owned())
    );
    assert!(seen.parts.uri.scheme().is_none() && seen.parts.uri.path().is_empty());
    let field = |name: &str| seen.parts.headers[name].to_str().expect("text").to_owned();
    assert_eq!(field("forwarded"), "for=\"10.77.1.2:40000\"");
    assert_eq!(field("baggage"), "k8s.namespace.name=shop");
    let trace = field("traceparent");
    assert_eq!((trace.len(), &trace[..3], &trace[52..]), (55, "00-", "-00"));
    assert!(!seen.body.is_end_stream());
    // The agent's own reader takes it too.
    let request = Request::from_parts(seen.parts, ());
    let read = Connect::parse(&request).expect("valid");
    assert_eq!((read.destination, read.client), (connect.destination, connect.client));

    let mut send = seen.respond.send_response(Response::new(()), false).expect("open");
    let stream = soon(asked.acknowledged()).await.expect("200");
    let (mut app, agent) = app_connection().await;
    let end = tokio::spawn(relayed_by(agent, stream, Role::Client));
    app.write_all(&pattern(300_000)).await.expect("open");
    app.shutdown().await.expect("open");
    assert!(receive_all(&mut seen.body).await.expect("a clean end") == pattern(300_000));
    send_all(&mut send, pattern(2 << 20)).await;
    send.send_data(Bytes::new(), true).expect("open");
    let mut got = Vec::new();
    soon(app.read_to_end(&mut got)).await.expect("a clean end");
    assert!(got == pattern(2 << 20));
    assert!(matches!(soon(end).await.expect("no panic"), FlowEnd::Clean));
}

#[tokio::test]
async fn each_refusal_of_a_server_is_an_error_and_the_connection_carries_on() {
    let (client, _task, mut other) = with_other(200).await;
    for (status, reason) in [
        (400, RefusalReason::UnknownDestination),
        (401, RefusalReason::Policy),
        (503, RefusalReason::ConnectionRefused),
    ] {
        let (place, mut asked) = ask(&client).await;
        let mut seen = other.next().await;
        let response = Response::builder().status(status).body(()).expect("valid");
        seen.respond.send_response(response, true).expect("open");
        let refused = soon(asked.acknowledged()).await.err().expect("refused");
        assert_eq!(refused.reason(), reason, "{refused}");
        drop(place);
    }
    let (_place, mut asked) = ask(&client).await;
    other.next().await.respond.send_reset(Reason::INTERNAL_ERROR);
    let refused = soon(asked.acknowledged()).await.err().expect("reset");
    assert!(matches!(refused, OpenError::Reset(Reason::INTERNAL_ERROR)), "{refused}");
    assert!(client.is_open() && client.place(WINDOW).is_some());
}

#[tokio::test]
async fn a_stream_beyond_the_servers_limit_has_no_place() {
    let (client, _task, _other) = with_other(2).await;
    let held = [client.place(WINDOW).expect("room"), client.place(WINDOW).expect("room")];
    assert!(client.place(WINDOW).is_none(), "a stream that would wait");
    drop(held);
    assert!(!client.is_used() && client.place(WINDOW).is_some());

    let (client, _task, _other) = with_other(1000).await;
    let held: Vec<_> = (0..).map_while(|_| client.place(WINDOW)).collect();
    assert_eq!(held.len(), CLIENT_STREAMS_MAX);
}

#[tokio::test]
async fn after_goaway_flows_open_on_another_connection_and_live_ones_go_on() {
    let (client, task, mut other) = with_other(200).await;
    let (place, mut asked) = ask(&client).await;
    let mut seen = other.next().await;
    let mut send = seen.respond.send_response(Response::new(()), false).expect("open");
    let stream = soon(asked.acknowledged()).await.expect("200");
    other.commands.send(Do::Drain).expect("served");
    // Requests that the server has seen before are answered; then one is not taken.
    let refuse = |seen: Asked| {
        let (mut respond, response) = (seen.respond, Response::builder().status(503).body(()));
        respond.send_response(response.expect("valid"), true).expect("open");
    };
    let refused = soon(async {
        loop {
            let place = client.place(WINDOW).expect("room");
            let mut asked = match place.ask(&connect_of_flow(), "").await {
                Err(error) => break error,
                Ok(asked) => asked,
            };
            let answer = tokio::select! {
                answer = asked.acknowledged() => answer,
                Some(seen) = other.requests.recv() => {
                    refuse(seen);
                    asked.acknowledged().await
                }
            };
            match answer.err().expect("refused") {
                OpenError::Refused(_) => {}
                error => break error,
            }
        }
    })
    .await;
    assert!(refused.is_of_connection(), "{refused:?}");
    assert!(!client.is_open());
    let (mut app, agent) = app_connection().await;
    let end = tokio::spawn(relayed_by(agent, stream, Role::Client));
    send_all(&mut send, pattern(1000)).await;
    send.send_data(Bytes::new(), true).expect("open");
    let mut got = Vec::new();
    soon(app.read_to_end(&mut got)).await.expect("a clean end");
    assert!(got == pattern(1000));
    app.shutdown().await.expect("open");
    assert_eq!(receive_all(&mut seen.body).await.expect("a clean end"), b"");
    assert!(matches!(soon(end).await.expect("no panic"), FlowEnd::Clean));
    drop((place, asked, client));
    soon(task).await.expect("no panic").expect("a clean end");
    soon(other.task).await.expect("no panic");
}

#[tokio::test]
async fn a_connection_that_nothing_uses_ends_in_order() {
    let (client, task, other) = with_other(200).await;
    let place = client.place(WINDOW).expect("room");
    drop(client);
    assert!(!task.is_finished());
    drop(place);
    soon(task).await.expect("no panic").expect("a clean end");
    soon(other.task).await.expect("no panic");
}

#[tokio::test]
async fn a_server_that_does_not_answer_ping_is_given_up() {
    let limit = Duration::from_millis(100);
    let (near, far) = connection().await;
    let ((client, mut connection), other) = tokio::join!(begun_client(near), other(far, 200));
    soon(connection.settled()).await.expect("SETTINGS");
    connection.hasten_pings(limit);
    other.commands.send(Do::Hang).expect("served");
    let error = soon(connection.run()).await.expect_err("given up");
    assert_eq!(error.reason(), RefusalReason::Timeout, "{error}");
    assert!(!client.is_open() && client.place(WINDOW).is_none());
}

#[tokio::test]
async fn the_end_of_a_connection_before_the_answer_may_be_tried_again() {
    let (client, _task, mut other) = with_other(200).await;
    let (_place, mut asked) = ask(&client).await;
    let seen = other.next().await;
    other.task.abort();
    drop(seen);
    let error = soon(asked.acknowledged()).await.err().expect("ended");
    assert!(matches!(error, OpenError::Stale(_)), "{error}");
    assert!(client.place(WINDOW).is_none());
}

#[tokio::test]
async fn a_reset_of_either_end_stays_a_reset() {
    let (client, _task, mut other) = with_other(200).await;
    for by_server in [true, false] {
        let (_place, mut asked) = ask(&client).await;
        let mut seen = other.next().await;
        let mut send = seen.respond.send_response(Response::new(()), false).expect("open");
        let stream = soon(asked.acknowledged()).await.expect("200");
        let (mut app, agent) = app_connection().await;
        let end = tokio::spawn(relayed_by(agent, stream, Role::Client));
        if by_server {
            send.send_reset(Reason::CONNECT_ERROR);
            assert!(is_reset(&mut app).await);
            assert!(matches!(soon(end).await.expect("no panic"), FlowEnd::Reset(App::Destination)));
        } else {
            socket2::SockRef::from(&app).set_linger(Some(Duration::ZERO)).expect("open");
            drop(app);
            assert!(matches!(soon(end).await.expect("no panic"), FlowEnd::Reset(App::Source)));
            let reset = receive_all(&mut seen.body).await.expect_err("no end");
            assert_eq!(reset.reason(), Some(Reason::CANCEL));
        }
    }
}

#[tokio::test]
async fn a_server_that_rejects_the_certificate_is_told_apart_from_one_that_is_gone() {
    let (near, far) = connection().await;
    // The server is of the same mesh, and trusts other roots.
    let stranger = crate::testing::TestIssuer::new();
    let credentials_of_stranger =
        stranger.any(&identity("db"), std::time::SystemTime::now(), Duration::from_secs(600));
    let mut config = ServerConfig::clone(&server_config(&credentials_of_stranger));
    config.alpn_protocols = vec![ALPN_HBONE.to_vec()];
    config.cert_resolver = server_config(&credentials("db")).cert_resolver.clone();
    let accept = TlsAcceptor::from(Arc::new(config)).accept(far);
    let (outgoing, accepted) = tokio::join!(
        async {
            let (client, mut connection) = begun_client(near).await;
            let place = client.place(WINDOW);
            (soon(connection.settled()).await, client, place)
        },
        accept
    );
    assert!(accepted.is_err(), "the server took the certificate");
    let (ended, client, place) = outgoing;
    assert_eq!(ended.expect_err("ended").reason(), RefusalReason::RefusedByPeer);
    let asked = match place.expect("room").ask(&connect_of_flow(), "").await {
        Err(error) => error,
        Ok(mut asked) => asked.acknowledged().await.err().expect("no answer"),
    };
    assert!(asked.to_string().contains("TLS alert"), "{asked}");
    assert!(!client.is_open());
}

#[tokio::test]
async fn a_server_that_acknowledges_no_smaller_window_costs_no_turns() {
    let (near, far) = connection().await;
    let ((client, mut connection), other) = tokio::join!(begun_client(near), other(far, 200));
    soon(connection.settled()).await.expect("SETTINGS");
    other.commands.send(Do::Hang).expect("served");
    // The first change waits for its acknowledgement, and the second one for the first.
    let windows = [WINDOW / 4, WINDOW / 16];
    let mut turns = 0;
    for window in windows {
        let _place = client.place(window).expect("room");
        let mut run = std::pin::pin!(connection.run());
        let counted = std::future::poll_fn(|cx| {
            turns += 1;
            run.as_mut().poll(cx)
        });
        let ended = tokio::time::timeout(Duration::from_millis(100), counted).await;
        assert!(ended.is_err(), "the connection has ended");
    }
    assert!(turns < 50, "{turns} turns");
}

#[tokio::test]
async fn a_stream_that_a_server_refuses_lowers_the_number_of_places() {
    let (client, _task, mut other) = with_other(200).await;
    let (_held, _first) = ask(&client).await;
    other.next().await;
    let (place, mut asked) = ask(&client).await;
    other.next().await.respond.send_reset(Reason::REFUSED_STREAM);
    let refused = soon(asked.acknowledged()).await.err().expect("refused");
    assert!(matches!(refused, OpenError::Full), "{refused}");
    drop(place);
    assert!(client.is_open() && client.place(WINDOW).is_none(), "more than the server takes");
}

//! Tests of a server against a client of another TLS stack and HTTP/2.

mod client;
mod wire;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, client::SendRequest};
use http::{Method, Request, StatusCode};
use rustls::{ClientConfig, pki_types::ServerName};
use tacit_core::{shares::STREAM_WINDOW_MIN, wire::Role};
use tacit_kernel::socket::AppStream;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc::{UnboundedReceiver, unbounded_channel},
    task::JoinHandle,
};
use tokio_rustls::TlsConnector;

use super::*;
use crate::{
    Incoming, TunnelError,
    relay::{
        App, FlowCounters, FlowEnd, Watch,
        testing::{is_reset, soon, unasked},
    },
    socket,
    testing::{app_connection, connection, credentials, identity},
    tls::{ALPN_HBONE, client_config},
};

const WINDOW: u32 = 256 << 10;

/// A client, and the server of its connection.
struct Pair {
    client: SendRequest<Bytes>,
    /// The client's connection.
    driver: JoinHandle<Result<(), h2::Error>>,
    /// The client's socket.
    socket: std::net::TcpStream,
    /// The requests that the server's connection has received, until its end.
    requests: UnboundedReceiver<Result<FlowRequest, TunnelError>>,
    commands: tokio::sync::mpsc::UnboundedSender<Command>,
}

enum Command {
    Drain,
    Window(u32),
    HastenPings(Duration),
}

async fn pair() -> Pair {
    let (near, far) = connection().await;
    let (web, db) = (credentials("web"), credentials("db"));
    let mut config = ClientConfig::clone(&client_config(&web, &identity("db")));
    config.alpn_protocols = vec![ALPN_HBONE.to_vec()];
    let name = ServerName::try_from("10.77.2.3").expect("an address");
    let connect = async {
        let tls = TlsConnector::from(Arc::new(config)).connect(name, near).await.expect("accepted");
        let socket = duplicate(tls.get_ref().0);
        // As ztunnel.
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(4 << 20).initial_connection_window_size(16 << 20).max_frame_size(1 << 20);
        let (client, driver) = builder.handshake(tls).await.expect("HTTP/2");
        (client, tokio::spawn(driver), socket)
    };
    let (client, accepted) = tokio::join!(connect, async { begun(Incoming::accept(far, &db).await).await });
    let Ok(server) = accepted else { panic!("another wire format") };
    let (client, driver, socket) = client;
    let (requests, commands) = serve(server);
    Pair { client, driver, socket, requests, commands }
}

async fn begun(accepted: Result<Incoming, TunnelError>) -> Result<Box<Server>, TunnelError> {
    match accepted? {
        Incoming::Hbone(accepted) => accepted.begin(WINDOW).await,
        Incoming::Tacit(_) => panic!("another wire format"),
    }
}

fn duplicate(tcp: &TcpStream) -> std::net::TcpStream {
    use std::os::fd::AsFd as _;
    tcp.as_fd().try_clone_to_owned().expect("descriptors").into()
}

/// Polls a server's connection to its end.
fn serve(
    mut server: Box<Server>,
) -> (UnboundedReceiver<Result<FlowRequest, TunnelError>>, tokio::sync::mpsc::UnboundedSender<Command>) {
    let (tell, told) = unbounded_channel();
    let (command, mut commands) = unbounded_channel();
    tokio::spawn(async move {
        loop {
            let next = tokio::select! {
                next = server.next() => next,
                Some(command) = commands.recv() => {
                    match command {
                        Command::Drain => server.drain(),
                        Command::Window(bytes) => drop(server.set_window(bytes)),
                        Command::HastenPings(limit) => server.hasten_pings(limit),
                    }
                    continue;
                }
            };
            let Some(next) = next.transpose() else { return };
            let is_over = next.is_err();
            if tell.send(next).is_err() || is_over {
                return;
            }
        }
    });
    (told, command)
}

impl Pair {
    async fn ask(&mut self) -> (h2::client::ResponseFuture, SendStream<Bytes>, FlowRequest) {
        let (response, send) = self.request(connect());
        let request = soon(self.requests.recv()).await.expect("a connection").expect("in order");
        (response, send, request)
    }

    fn request(&mut self, request: Request<()>) -> (h2::client::ResponseFuture, SendStream<Bytes>) {
        self.client.send_request(request, false).expect("open")
    }

    /// Opens a flow and relays it. Returns the client's stream, the application, and the end of the relay.
    async fn flow(&mut self) -> (SendStream<Bytes>, RecvStream, TcpStream, JoinHandle<FlowEnd>) {
        let (response, send, request) = self.ask().await;
        let stream = request.accept("k8s.namespace.name=shop").expect("open");
        let response = soon(response).await.expect("answered");
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["baggage"], "k8s.namespace.name=shop");
        let (app, agent) = app_connection().await;
        (send, response.into_body(), app, tokio::spawn(relayed(agent, stream)))
    }
}

async fn relayed(app: AppStream, stream: FlowStream) -> FlowEnd {
    relayed_by(app, stream, Role::Server).await
}

async fn relayed_by(app: AppStream, stream: FlowStream, role: Role) -> FlowEnd {
    socket::reset_if_dropped(&app);
    relay(app, stream, role, &FlowCounters::default(), unasked(&Watch::default())).await
}

fn connect() -> Request<()> {
    Request::builder().method(Method::CONNECT).uri("10.77.2.3:80").body(()).expect("valid")
}

/// Sends all of `bytes` as the window permits.
async fn send_all(send: &mut SendStream<Bytes>, mut bytes: Bytes) {
    while !bytes.is_empty() {
        send.reserve_capacity(bytes.len());
        let room =
            soon(std::future::poll_fn(|cx| send.poll_capacity(cx))).await.expect("open").expect("open");
        send.send_data(bytes.split_to(room.min(bytes.len())), false).expect("open");
    }
}

async fn receive_all(receive: &mut RecvStream) -> Result<Vec<u8>, h2::Error> {
    let mut all = Vec::new();
    while let Some(bytes) = soon(receive.data()).await {
        let bytes = bytes?;
        receive.flow_control().release_capacity(bytes.len()).expect("received");
        all.extend_from_slice(&bytes);
    }
    Ok(all)
}

fn pattern(bytes: usize) -> Bytes {
    (0..bytes).map(|at| (at * 31 % 251) as u8).collect()
}

#[tokio::test]
async fn bytes_pass_both_ways_and_each_direction_ends_alone() {
    for (there, back) in [(10, 3 << 20), (3 << 20, 10), (0, 0)] {
        let mut pair = pair().await;
        let (mut send, mut receive, mut app, end) = pair.flow().await;
        send_all(&mut send, pattern(there)).await;
        send.send_data(Bytes::new(), true).expect("open");
        let mut got = Vec::new();
        soon(app.read_to_end(&mut got)).await.expect("a clean end");
        assert!(got == pattern(there), "{} of {there} bytes, or others", got.len());
        // The other direction goes on.
        let answer = pattern(back);
        let (sent, got) = tokio::join!(app.write_all(&answer), async {
            let mut got = Vec::new();
            while got.len() < back {
                let bytes = soon(receive.data()).await.expect("open").expect("open");
                receive.flow_control().release_capacity(bytes.len()).expect("received");
                got.extend_from_slice(&bytes);
            }
            got
        });
        sent.expect("open");
        assert!(got == pattern(back));
        assert!(!receive.is_end_stream());
        app.shutdown().await.expect("open");
        assert_eq!(receive_all(&mut receive).await.expect("a clean end"), b"");
        assert!(matches!(soon(end).await.expect("no panic"), FlowEnd::Clean));
    }
}

#[tokio::test]
async fn a_reset_of_the_stream_resets_the_application() {
    for reason in [Reason::NO_ERROR, Reason::CANCEL, Reason::INTERNAL_ERROR] {
        for ended in [false, true] {
            let mut pair = pair().await;
            let (mut send, _receive, mut app, end) = pair.flow().await;
            if ended {
                send.send_data(Bytes::new(), true).expect("open");
                assert_eq!(soon(app.read(&mut [0])).await.expect("open"), 0);
            }
            send.send_reset(reason);
            let end = soon(end).await.expect("no panic");
            assert!(matches!(end, FlowEnd::Reset(App::Source)), "{reason}: {end:?}");
            if !ended {
                assert!(is_reset(&mut app).await, "{reason}");
            }
        }
    }
}

#[tokio::test]
async fn an_application_that_resets_resets_the_stream_also_after_its_end() {
    for ended in [false, true] {
        let mut pair = pair().await;
        let (mut send, mut receive, mut app, end) = pair.flow().await;
        if ended {
            app.shutdown().await.expect("open");
            assert_eq!(receive_all(&mut receive).await.expect("a clean end"), b"");
        }
        socket::reset(&app);
        drop(app);
        let reason = soon(std::future::poll_fn(|cx| send.poll_reset(cx))).await.expect("a reset");
        assert_eq!(reason, Reason::CONNECT_ERROR);
        let end = soon(end).await.expect("no panic");
        assert!(matches!(end, FlowEnd::Reset(App::Destination)), "{end:?}");
    }
}

#[tokio::test]
async fn a_connection_that_breaks_inside_a_flow_resets_the_application() {
    for ends in [false, true] {
        let mut pair = pair().await;
        let (_send, _receive, mut app, end) = pair.flow().await;
        if ends {
            // FIN without close_notify: a truncation.
            pair.socket.shutdown(std::net::Shutdown::Write).expect("open");
        } else {
            pair.driver.abort();
            socket::reset(&pair.socket);
        }
        drop(pair);
        let end = soon(end).await.expect("no panic");
        assert!(matches!(end, FlowEnd::TunnelLost(_)), "{end:?}");
        assert!(is_reset(&mut app).await);
    }
}

#[tokio::test]
async fn an_application_that_does_not_read_holds_its_window_and_no_other_flow() {
    let mut pair = pair().await;
    let (mut stalled, _receive, app, _end) = pair.flow().await;
    // Frames of one byte fill the window.
    let sent_bytes = {
        let mut sent = 0;
        loop {
            stalled.reserve_capacity(1);
            let room = std::future::poll_fn(|cx| stalled.poll_capacity(cx));
            match tokio::time::timeout(Duration::from_millis(500), room).await {
                Ok(room) => assert!(room.expect("open").expect("open") > 0),
                Err(_) => break sent,
            }
            stalled.send_data(Bytes::from_static(b"x"), false).expect("open");
            sent += 1;
            assert!(sent < 64 << 20, "nothing bounds the stream");
        }
    };
    assert!(sent_bytes >= WINDOW as usize, "{sent_bytes} bytes");
    let (mut send, mut receive, mut other, _end) = pair.flow().await;
    send_all(&mut send, pattern(3 << 20)).await;
    send.send_data(Bytes::new(), true).expect("open");
    let mut got = Vec::new();
    soon(other.read_to_end(&mut got)).await.expect("a clean end");
    assert!(got == pattern(3 << 20));
    drop(other);
    assert_eq!(receive_all(&mut receive).await.expect("a clean end"), b"");
    drop(app);
}

#[tokio::test]
async fn the_window_of_open_streams_follows_the_share() {
    let mut pair = pair().await;
    let (mut send, _receive, app, _end) = pair.flow().await;
    pair.commands.send(Command::Window(STREAM_WINDOW_MIN)).expect("served");
    // The answer to another request comes behind the change.
    let (_other, ..) = pair.flow().await;
    send.reserve_capacity(WINDOW as usize);
    let room = soon(std::future::poll_fn(|cx| send.poll_capacity(cx))).await.expect("open").expect("open");
    assert!(room <= STREAM_WINDOW_MIN as usize, "{room}");
    drop(app);
}

#[tokio::test]
async fn each_refusal_has_its_status_and_ends_the_stream() {
    for (answer, status) in [(Refused::BadRequest, 400), (Refused::Policy, 401), (Refused::Unavailable, 503)]
    {
        let mut pair = pair().await;
        let (response, _send, request) = pair.ask().await;
        request.refuse(answer);
        let response = soon(response).await.expect("answered");
        assert_eq!((response.status().as_u16(), response.body().is_end_stream()), (status, true));
        // The connection carries others.
        let _flow = pair.flow().await;
    }
}

#[tokio::test]
async fn claims_of_a_request_are_read_and_others_are_bad() {
    let mut pair = pair().await;
    let (_response, _send, request) = pair.ask().await;
    assert_eq!(
        request.connect().expect("valid").destination,
        "10.77.2.3:80".parse::<SocketAddr>().expect("valid")
    );
    let get = Request::builder().uri("https://10.77.2.3:80/").body(()).expect("valid");
    let (_response, _send) = pair.request(get);
    let request = soon(pair.requests.recv()).await.expect("a connection").expect("in order");
    assert_eq!(request.connect(), Err(BadRequest::Method(Method::GET)));
}

#[tokio::test]
async fn a_request_that_is_given_up_is_noticed_before_its_answer() {
    let mut pair = pair().await;
    let (_response, mut send, mut request) = pair.ask().await;
    send_all(&mut send, pattern(1000)).await;
    send.send_reset(Reason::CANCEL);
    soon(request.abandoned()).await;
}

#[tokio::test]
async fn bytes_before_the_answer_are_kept_for_the_application() {
    let mut pair = pair().await;
    let (_response, mut send, mut request) = pair.ask().await;
    send_all(&mut send, pattern(1000)).await;
    let waited = tokio::time::timeout(Duration::from_millis(50), request.abandoned()).await;
    assert!(waited.is_err(), "given up");
    let stream = request.accept("").expect("open");
    let (mut app, agent) = app_connection().await;
    let _end = tokio::spawn(relayed(agent, stream));
    let mut got = vec![0; 1000];
    soon(app.read_exact(&mut got)).await.expect("open");
    assert!(got == pattern(1000));
}

#[tokio::test]
async fn a_drained_connection_ends_with_its_last_flow() {
    let mut pair = pair().await;
    let (mut send, mut receive, mut app, end) = pair.flow().await;
    pair.commands.send(Command::Drain).expect("served");
    // GOAWAY has come when no stream can be opened any more.
    soon(async {
        loop {
            match pair.client.clone().ready().await {
                Ok(_) => tokio::task::yield_now().await,
                Err(error) => break assert!(error.is_go_away() && error.reason() == Some(Reason::NO_ERROR)),
            }
        }
    })
    .await;
    send_all(&mut send, pattern(1000)).await;
    send.send_data(Bytes::new(), true).expect("open");
    let mut got = Vec::new();
    soon(app.read_to_end(&mut got)).await.expect("a clean end");
    assert!(got == pattern(1000));
    app.shutdown().await.expect("open");
    assert_eq!(receive_all(&mut receive).await.expect("a clean end"), b"");
    assert!(matches!(soon(end).await.expect("no panic"), FlowEnd::Clean));
    assert!(soon(pair.requests.recv()).await.is_none(), "the connection goes on");
    // close_notify came: another end is an error of the client.
    soon(pair.driver).await.expect("no panic").expect("a clean end");
}

#[tokio::test]
async fn a_client_that_does_not_answer_ping_is_given_up() {
    let limit = Duration::from_millis(100);
    let mut pair = pair().await;
    let (_send, _receive, mut app, end) = pair.flow().await;
    pair.commands.send(Command::HastenPings(limit)).expect("served");
    tokio::time::sleep(5 * limit).await;
    assert!(pair.requests.try_recv().is_err(), "a client that answers was given up");
    // The connection stays open, and nobody answers any more.
    pair.driver.abort();
    let error = soon(pair.requests.recv()).await.expect("an end").err().expect("no request");
    assert_eq!(error.reason().label(), "timeout", "{error}");
    assert!(is_reset(&mut app).await);
    assert!(matches!(soon(end).await.expect("no panic"), FlowEnd::TunnelLost(_)));
}

//! Tests of sessions.

use std::{future::Future, sync::Arc};

use tacit_kernel::socket::{
    AppStream, Polled as _,
    peer::{resume_receiving, stop_receiving},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::{
    opening::{OPEN_ACKNOWLEDGED, patience},
    *,
};
use crate::{
    buffers::Size,
    testing::{app_connection, connection, credentials, identity, open, open_flow, sessions},
};

const SOON: Duration = Duration::from_secs(5);

async fn frame(session: &mut Session) -> Result<Received, TunnelError> {
    timeout(SOON, poll_fn(|cx| session.poll_received(cx))).await.expect("in time")
}

async fn send(session: &mut Session, frame: &Control) {
    session.send(frame).expect("in turn");
    poll_fn(|cx| session.poll_flush(cx)).await.expect("sent");
}

/// Polls for `condition`, because no event reports it.
async fn until<F: Future<Output = bool>>(condition: impl Fn() -> F) {
    let work = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, work).await.expect("in time");
}

#[tokio::test]
async fn both_sides_know_each_other_and_what_was_negotiated() {
    let (client, server) = sessions().await;
    assert_eq!((client.peer(), server.peer()), (&identity("db"), &identity("web")));
    for session in [&client, &server] {
        let TlsInfo { version, cipher, key_exchange, alpn, has_urgent } = *session.tls();
        assert_eq!((version, key_exchange), ("TLSv1.3", "X25519MLKEM768"));
        assert_eq!((cipher, alpn, has_urgent), ("TLS13_AES_256_GCM_SHA384", "tacit/1.1", true));
        assert!(session.peer_not_after() > SystemTime::now());
    }
    assert_eq!(client.local_addr().expect("open"), server.peer_addr().expect("open"));
}

#[tokio::test]
async fn a_session_carries_one_flow_after_another() {
    let (mut client, mut server) = sessions().await;
    for _ in 0..3 {
        assert!(client.is_idle_alive());
        open_flow(&mut client, &mut server).await;
        assert!(!client.is_idle_alive());
        send(&mut client, &Control::Fin).await;
        send(&mut server, &Control::Fin).await;
        assert_eq!(frame(&mut server).await.expect("FIN"), Received::Control(Control::Fin));
        assert_eq!(frame(&mut client).await.expect("FIN"), Received::Control(Control::Fin));
        send(&mut server, &Control::Done).await;
        assert_eq!(frame(&mut client).await.expect("DONE"), Received::Control(Control::Done));
    }
}

#[tokio::test]
async fn a_denied_flow_leaves_the_session_usable() {
    let (mut client, mut server) = sessions().await;
    let serve = async {
        let open = server.next(SOON).await.expect("no error").expect("not closed");
        server.deny(&open, DenyReason::Policy).await.expect("sent");
    };
    let asked = open();
    let (denied, ()) = tokio::join!(client.open(&asked, None), serve);
    assert!(matches!(denied, Err(OpenError::Denied(DenyReason::Policy))));
    assert!(client.is_idle_alive());
    open_flow(&mut client, &mut server).await;
}

/// Returns an application that has sent `text`, and its agent's socket, which has received it.
async fn app_that_sent(text: &[u8]) -> (TcpStream, AppStream) {
    let (mut app, ours) = app_connection().await;
    app.write_all(text).await.expect("open");
    timeout(SOON, poll_fn(|cx| ours.poll_read_ready(cx))).await.expect("in time").expect("open");
    (app, ours)
}

/// Returns the client's data on `server`, up to `length` bytes or the end.
async fn received_data(server: &mut Session, length: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < length && frame(server).await.expect("a frame") == Received::Data {
        let mut slices = [IoSlice::new(&[]); FRAMES_MAX];
        let used = server.payloads(&mut slices);
        all.extend(slices[..used].iter().flat_map(|slice| slice.iter().copied()));
        server.consume(usize::MAX);
    }
    all
}

#[tokio::test]
async fn optimistic_data_arrives_after_the_flow_is_accepted() {
    let (mut client, mut server) = sessions().await;
    let (_app, ours) = app_that_sent(b"early").await;
    let mut optimistic = OptimisticData::new(&ours);
    let serve = async {
        let asked = server.next(SOON).await.expect("no error").expect("not closed");
        assert_eq!(asked.optimistic_data, OptimisticMode::On);
        server.accept_flow(&asked).expect("in turn");
        poll_fn(|cx| server.poll_flush(cx)).await.expect("sent");
    };
    let asked = open();
    let (opened, ()) = tokio::join!(client.open(&asked, Some(&mut optimistic)), serve);
    opened.expect("accepted");
    assert_eq!((optimistic.taken_bytes, received_data(&mut server, 5).await), (5, b"early".to_vec()));
}

#[tokio::test]
async fn a_client_keeps_sending_while_it_waits_for_the_answer() {
    let (mut client, mut server) = sessions().await;
    let (mut app, ours) = app_that_sent(b"early").await;
    let mut optimistic = OptimisticData::new(&ours);
    let serve = async {
        let asked = server.next(SOON).await.expect("no error").expect("not closed");
        // ACCEPT is queued, and sent only after all data has arrived.
        server.accept_flow(&asked).expect("in turn");
        assert_eq!(received_data(&mut server, 5).await, b"early");
        app.write_all(b"more").await.expect("open");
        assert_eq!(received_data(&mut server, 4).await, b"more");
        app.shutdown().await.expect("open");
        assert_eq!(frame(&mut server).await.expect("FIN"), Received::Control(Control::Fin));
        poll_fn(|cx| server.poll_flush(cx)).await.expect("sent");
    };
    let asked = open();
    let (opened, ()) = tokio::join!(client.open(&asked, Some(&mut optimistic)), serve);
    opened.expect("accepted");
    assert_eq!((optimistic.taken_bytes, client.client_ended(), server.client_ended()), (9, true, true));
}

#[tokio::test]
async fn a_reset_before_the_answer_is_not_a_clean_end() {
    let (mut client, mut server) = sessions().await;
    let (app, ours) = app_that_sent(b"early").await;
    let mut optimistic = OptimisticData::new(&ours);
    let serve = async {
        let asked = server.next(SOON).await.expect("no error").expect("not closed");
        server.accept_flow(&asked).expect("in turn");
        assert_eq!(received_data(&mut server, 5).await, b"early");
        crate::socket::reset(app);
        assert_eq!(frame(&mut server).await.expect("RESET"), Received::Control(Control::Reset));
    };
    let asked = open();
    let (opened, ()) = tokio::join!(client.open(&asked, Some(&mut optimistic)), serve);
    assert!(matches!(opened, Err(OpenError::Abandoned)), "{opened:?}");
    assert!(!client.is_idle());
}

#[tokio::test]
async fn bytes_taken_by_a_failed_session_are_counted() {
    let (mut client, _server) = sessions().await;
    let (_app, ours) = app_that_sent(b"early").await;
    let mut optimistic = OptimisticData::new(&ours);
    // A session that fails before anything is sent.
    client.state = FlowState::Closed;
    assert!(client.open(&open(), Some(&mut optimistic)).await.is_err());
    assert_eq!(optimistic.taken_bytes, 5, "no other session can carry the flow");
}

#[tokio::test]
async fn a_flow_denied_with_data_ahead_ends_its_session_with_the_reason() {
    let (mut client, mut server) = sessions().await;
    let serve = async {
        let asked = server.next(SOON).await.expect("no error").expect("not closed");
        // Returns after the client has closed and its data was discarded.
        server.deny(&asked, DenyReason::Policy).await.expect("sent");
        server
    };
    let ask = async {
        let (_app, ours) = app_that_sent(b"early").await;
        let denied = client.open(&open(), Some(&mut OptimisticData::new(&ours))).await;
        assert!(matches!(denied, Err(OpenError::Denied(DenyReason::Policy))), "{denied:?}");
        assert!(!client.is_idle());
        client.close();
    };
    let (server, ()) = timeout(SOON, async { tokio::join!(serve, ask) }).await.expect("in time");
    assert!(!server.is_idle());
}

#[tokio::test]
async fn a_client_without_data_waits_for_the_answer() {
    let (mut client, mut server) = sessions().await;
    let (mut app, ours) = app_connection().await;
    let mut optimistic = OptimisticData::new(&ours);
    let serve = async {
        let asked = server.next(SOON).await.expect("no error").expect("not closed");
        assert_eq!(asked.optimistic_data, OptimisticMode::Off);
        app.write_all(b"late").await.expect("open");
        server.deny(&asked, DenyReason::ConnectionRefused).await.expect("sent");
    };
    let asked = open();
    let (denied, ()) = tokio::join!(client.open(&asked, Some(&mut optimistic)), serve);
    assert!(matches!(denied, Err(OpenError::Denied(_))));
    assert!(client.is_idle_alive() && optimistic.taken_bytes == 0, "another try may be made");
}

#[test]
fn a_session_goes_on_when_another_runtime_polls_it() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (first, second) = (runtime(), runtime());
    let (client, mut server) = first.block_on(sessions());
    let mut client = second.block_on(async { client.moved_to_this_thread().expect("a descriptor") });
    std::thread::scope(|scope| {
        scope.spawn(|| {
            first.block_on(async {
                let asked = server.next(SOON).await.expect("no error").expect("not closed");
                server.accept_flow(&asked).expect("in turn");
                poll_fn(|cx| server.poll_flush(cx)).await.expect("sent");
            });
        });
        second.block_on(client.open(&open(), None)).expect("accepted");
    });
}

#[tokio::test]
async fn frames_out_of_turn_end_the_session() {
    let (mut client, mut server) = sessions().await;
    open_flow(&mut client, &mut server).await;
    // The client under test cannot break the order, so its state is forced.
    client.state = FlowState::Idle;
    send(&mut client, &Control::Open(open())).await;
    assert!(matches!(frame(&mut server).await, Err(TunnelError::UnexpectedFrame(_))));

    let (mut client, mut server) = sessions().await;
    client.state = FlowState::Flow { client_ended: false, server_ended: false };
    client.send_data(Buffer::take(Size::Small), 1).expect("in turn");
    poll_fn(|cx| client.poll_flush(cx)).await.expect("sent");
    let refused = server.next(SOON).await.expect_err("DATA before OPEN");
    assert_eq!(refused.reason().label(), "protocol");
}

#[tokio::test]
async fn invalid_frames_end_the_session() {
    let (mut client, mut server) = sessions().await;
    client.tls.queue(&[99, 0, 0, 0]).expect("queued");
    poll_fn(|cx| client.poll_flush(cx)).await.expect("sent");
    let refused = server.next(SOON).await.expect_err("no frame");
    assert!(matches!(refused, TunnelError::Frame(_)), "{refused}");
}

#[tokio::test]
async fn a_closed_session_is_no_longer_alive_and_opening_on_it_is_stale() {
    let (client, mut server) = sessions().await;
    client.close();
    assert!(server.next(SOON).await.expect("a proper goodbye").is_none());

    let (mut client, server) = sessions().await;
    assert!(client.is_idle_alive());
    server.close();
    until(|| async { !client.is_idle_alive() }).await;
    let asked = open();
    assert!(matches!(client.open(&asked, None).await, Err(OpenError::Stale(_))));

    let (mut client, server) = sessions().await;
    drop(server);
    assert!(matches!(client.open(&asked, None).await, Err(OpenError::Stale(_))));
}

#[tokio::test]
async fn an_idle_session_ends() {
    let (_client, mut server) = sessions().await;
    assert!(server.next(Duration::from_millis(10)).await.expect("no error").is_none());
}

#[tokio::test]
async fn a_rejected_client_certificate_is_reported_at_open() {
    let (client, server) = connection().await;
    let stranger = crate::testing::TestIssuer::new();
    let mut web = stranger.any(&identity("web"), SystemTime::now(), SOON * 60);
    let db = credentials("db");
    // Trust the server's root, so that the client does not reject the server first.
    web.roots = db.roots.clone();
    let web = Arc::new(web);
    let expected = identity("db");
    let (client, server) =
        tokio::join!(Session::connect(client, &web, &expected), Session::accept(server, &db));
    assert_eq!(server.err().expect("refused").reason().label(), "unknown_issuer");
    let asked = open();
    let refused = client.expect("TLS 1.3 lets the client finish first").open(&asked, None).await;
    assert_eq!(refused.expect_err("refused").reason().label(), "refused_by_peer");
}

#[tokio::test]
async fn one_frame_fills_one_record() {
    use tacit_core::wire::frame::PAYLOAD_MAX_BYTES;
    // A proxy that records the bytes on the wire.
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let (near, mut near_wire) = connection().await;
    let mut far_wire = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("connected");
    let (far, _) = listener.accept().await.expect("accepted");
    let wire = tokio::spawn(async move {
        let mut from_client = Vec::new();
        let (mut a, mut b) = ([0; 4096], [0; 4096]);
        loop {
            tokio::select! {
                read = near_wire.read(&mut a) => match read { Ok(n) if n > 0 => {
                    from_client.extend(&a[..n]);
                    far_wire.write_all(&a[..n]).await.expect("open");
                } _ => return from_client },
                read = far_wire.read(&mut b) => match read { Ok(n) if n > 0 => {
                    near_wire.write_all(&b[..n]).await.expect("open");
                } _ => return from_client },
            }
        }
    });
    let (web, db, expected) = (credentials("web"), credentials("db"), identity("db"));
    let (client, server) = tokio::join!(Session::connect(near, &web, &expected), Session::accept(far, &db));
    let (mut client, mut server) = (client.expect("connected"), server.expect("accepted"));
    open_flow(&mut client, &mut server).await;
    client.send_data(Buffer::take(Size::Small), 2 * PAYLOAD_MAX_BYTES + 100).expect("in turn");
    poll_fn(|cx| client.poll_flush(cx)).await.expect("sent");
    assert_eq!(frame(&mut server).await.expect("DATA"), Received::Data);
    client.close();
    let bytes = timeout(SOON, wire).await.expect("in time").expect("no panic");
    let (mut rest, mut records) = (&bytes[..], Vec::new());
    while rest.len() > 5 {
        let length = usize::from(u16::from_be_bytes([rest[3], rest[4]]));
        records.push((rest[0], length));
        rest = &rest[(5 + length).min(rest.len())..];
    }
    // Inner content type and tag: 17 bytes more than the frame.
    let data = [(23, 16_384 + 17), (23, 16_384 + 17), (23, 104 + 17)];
    assert!(records.windows(3).any(|window| window == data), "{records:?}");
}

#[test]
fn a_lost_packet_is_repeated_and_acknowledged_before_the_peer_is_silent() {
    let repeated_after = |round_trip| round_trip + Duration::from_millis(200);
    let delayed = Duration::from_millis(40);
    for round_trip in [0, 1, 20, 50, 75, 100, 200, 500].map(Duration::from_millis) {
        assert!(patience(round_trip) > repeated_after(round_trip) + round_trip + delayed, "{round_trip:?}");
    }
}

#[tokio::test]
async fn open_is_given_up_only_if_the_peer_does_not_acknowledge_it() {
    let (mut client, server) = sessions().await;
    let wait = 4 * OPEN_ACKNOWLEDGED;
    assert!(timeout(wait, client.open(&open(), None)).await.is_err(), "the server's application is slow");
    drop(server);

    let (mut client, server) = sessions().await;
    stop_receiving(server.tcp()).expect("attached");
    let given_up = timeout(SOON, client.open(&open(), None)).await.expect("in time");
    assert!(matches!(given_up, Err(OpenError::Silent)), "{given_up:?}");
    let asked = timeout(SOON, client.answered_if_received()).await.expect("in time");
    assert!(matches!(asked, Err(OpenError::Silent)), "{asked:?}");
}

#[tokio::test]
async fn an_answer_after_a_silence_is_taken() {
    for is_asked in [false, true] {
        let (mut client, mut server) = sessions().await;
        stop_receiving(server.tcp()).expect("attached");
        let given_up = timeout(SOON, client.open(&open(), None)).await.expect("in time");
        assert!(matches!(given_up, Err(OpenError::Silent)), "{given_up:?}");
        resume_receiving(server.tcp()).expect("detached");
        let serve = async {
            let opened = server.next(SOON).await.expect("OPEN").expect("a flow");
            server.deny(&opened, DenyReason::Policy).await.expect("sent");
        };
        let answer =
            async { if is_asked { client.answered_if_received().await } else { client.answered().await } };
        let (answer, ()) = tokio::join!(timeout(SOON, answer), serve);
        let answer = answer.expect("in time");
        assert!(matches!(answer, Err(OpenError::Denied(DenyReason::Policy))), "{answer:?}");
        assert!(client.is_idle(), "the session carries others");
    }
}

/// The kernel repeats bytes of a connection that was closed, but not of one that was reset.
#[tokio::test]
async fn an_open_that_is_given_up_does_not_arrive_later() {
    let (mut client, mut server) = sessions().await;
    stop_receiving(server.tcp()).expect("attached");
    let given_up = timeout(SOON, client.open(&open(), None)).await.expect("in time");
    assert!(matches!(given_up, Err(OpenError::Silent)), "{given_up:?}");
    drop(client);
    resume_receiving(server.tcp()).expect("detached");
    let next = timeout(SOON, server.next(SOON)).await.expect("in time");
    assert!(!matches!(next, Ok(Some(_))), "{next:?}");
}

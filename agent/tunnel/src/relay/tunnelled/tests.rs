//! Tests of the relay between an application and a tunnel.

use tacit_core::wire::open::{Open, OptimisticMode};
use tacit_kernel::socket::Polled as _;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    relay::{
        bulk::tests::share,
        testing::{
            DEADLINE, Threads, Watched, answer_in_silence, duplicate, exchange, is_reset, soon, unasked,
        },
        watch::Watch,
    },
    session::OptimisticData,
    testing::{app_connection, open, open_flow, sessions},
};

type Relayed = JoinHandle<(FlowEnd, Option<Box<Session>>, u64, u64)>;

fn relay(app: AppStream, session: Box<Session>) -> Relayed {
    tokio::spawn(async move {
        let counters = FlowCounters::default();
        crate::socket::reset_if_dropped(&app);
        let watch = Watch::default();
        let (end, session) = tunnelled(app, session, &counters, &share(10).of(1), unasked(&watch)).await;
        (end, session, counters.sent.load(Relaxed), counters.received.load(Relaxed))
    })
}

/// The source application, both agents' relays and the destination application.
struct Path {
    source: TcpStream,
    near: Relayed,
    far: Relayed,
    destination: TcpStream,
}

impl Path {
    async fn new() -> Self {
        let (client, server) = sessions().await;
        Self::over(client, server).await
    }

    async fn over(mut client: Box<Session>, mut server: Box<Session>) -> Self {
        open_flow(&mut client, &mut server).await;
        let ((source, near), (destination, far)) = (app_connection().await, app_connection().await);
        Self { source, near: relay(near, client), far: relay(far, server), destination }
    }

    /// Returns how each relay saw the flow end.
    async fn ends(near: Relayed, far: Relayed) -> (&'static str, &'static str) {
        let near = soon(near).await.expect("no panic");
        let far = soon(far).await.expect("no panic");
        assert!(near.1.is_none() && far.1.is_none(), "a broken flow must not leave a session");
        (near.0.label(), far.0.label())
    }
}

#[tokio::test]
async fn a_clean_flow_leaves_both_sessions_for_the_next() {
    let (mut client, mut server) = sessions().await;
    for round in 0..3 {
        let Path { mut source, near, far, mut destination } = Path::over(client, server).await;
        // Alternate the side that ends first.
        let (first, second) =
            if round % 2 == 0 { (&mut source, &mut destination) } else { (&mut destination, &mut source) };
        let mut text = String::new();
        first.write_all(b"question").await.expect("open");
        first.shutdown().await.expect("open");
        soon(second.read_to_string(&mut text)).await.expect("open");
        assert_eq!(text, "question");
        second.write_all(b"answer!").await.expect("open");
        second.shutdown().await.expect("open");
        soon(first.read_to_string(&mut text)).await.expect("open");
        assert_eq!(text, "questionanswer!");
        let (near, far) = (soon(near).await.expect("no panic"), soon(far).await.expect("no panic"));
        assert_eq!((near.0.label(), far.0.label()), ("clean", "clean"));
        let counted = if round % 2 == 0 { (8, 7) } else { (7, 8) };
        assert_eq!(((near.2, near.3), (far.2, far.3)), (counted, counted));
        (client, server) = (near.1.expect("reusable"), far.1.expect("reusable"));
        assert!(client.is_idle_alive());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_goes_on_at_another_thread_and_its_session_comes_back() {
    let threads = Threads::start();
    let (mut client, mut server) = sessions().await;
    for (bytes, moves) in [(1 << 10, 0), (20 << 20, 4), (1 << 10, 4), (20 << 20, 8)] {
        open_flow(&mut client, &mut server).await;
        let ((source, near), (destination, far)) = (app_connection().await, app_connection().await);
        let relayed = |app: AppStream, session: Box<Session>| {
            threads.run(async move {
                let counters = FlowCounters::default();
                crate::socket::reset_if_dropped(&app);
                let watch = Watch::default();
                let (end, session) =
                    tunnelled(app, session, &counters, &share(10).of(1), unasked(&watch)).await;
                (end.label(), session, counters.sent.load(Relaxed), counters.received.load(Relaxed))
            })
        };
        let (near, far) = (relayed(near, client), relayed(far, server));
        exchange(source, destination, bytes).await;
        let (near, far) = (soon(near).await.expect("no panic"), soon(far).await.expect("no panic"));
        let counted = ("clean", bytes as u64, bytes as u64);
        assert_eq!([(near.0, near.2, near.3), (far.0, far.2, far.3)], [counted; 2]);
        // Each of two flows moves there and back.
        assert_eq!(threads.moves(), moves, "{bytes} bytes");
        let back = |session: Box<Session>| session.moved_to_this_thread().expect("registered");
        (client, server) = (back(near.1.expect("reusable")), back(far.1.expect("reusable")));
        assert!(client.is_idle_alive());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_reaches_a_flow_that_has_moved() {
    let threads = Threads::start();
    let (mut client, mut server) = sessions().await;
    open_flow(&mut client, &mut server).await;
    let ((mut source, near), (mut destination, far)) = (app_connection().await, app_connection().await);
    let relayed = |app: AppStream, session: Box<Session>| {
        threads.run(async move {
            crate::socket::reset_if_dropped(&app);
            let (counters, watch) = (FlowCounters::default(), Watch::default());
            tunnelled(app, session, &counters, &share(10).of(1), unasked(&watch)).await.0.label()
        })
    };
    let (near, far) = (relayed(near, client), relayed(far, server));
    // A flow moves after one of its turns, which may be the last one of what was sent.
    let moved = async {
        let (bytes, mut got) = (vec![7; 1 << 20], vec![0; 1 << 20]);
        while threads.moves() < 2 {
            let both = tokio::join!(source.write_all(&bytes), destination.read_exact(&mut got));
            assert!(both.0.is_ok() && both.1.is_ok(), "{both:?}");
        }
    };
    soon(moved).await;
    crate::socket::reset(source);
    assert!(is_reset(&mut destination).await);
    assert_eq!(soon(near).await.expect("no panic"), "reset_by_source");
    assert_eq!(soon(far).await.expect("no panic"), "reset_by_source");
}

/// Returns a session on which the server has accepted a flow whose client does not wait for ACCEPT.
async fn accepted_with_optimistic_data() -> (Box<Session>, Box<Session>) {
    let (mut client, mut server) = sessions().await;
    client.send(&Control::Open(Open { optimistic_data: OptimisticMode::On, ..open() })).expect("in turn");
    soon(poll_fn(|cx| client.poll_flush(cx))).await.expect("sent");
    let got = soon(server.next(DEADLINE)).await.expect("no error").expect("not closed");
    server.accept_flow(&got).expect("in turn");
    (client, server)
}

/// Waits for ACCEPT; returns true if more arrived with it.
async fn accepted_with_more(client: &mut Session) -> bool {
    let received = soon(poll_fn(|cx| client.poll_received(cx))).await;
    assert!(matches!(received, Ok(Received::Control(Control::Accept))), "{received:?}");
    client.has_received()
}

/// Starts two flows together. The second application sends bytes late, or never. Returns for each client whether more
/// arrived with ACCEPT.
async fn started_together(sends: bool) -> [bool; 2] {
    let ((mut first, first_server), (mut second, second_server)) =
        (accepted_with_optimistic_data().await, accepted_with_optimistic_data().await);
    let ((_silent, first_app), (mut second_sender, second_app)) =
        (app_connection().await, app_connection().await);
    let _relays = [relay(first_app, first_server), relay(second_app, second_server)];
    // Give the thread several chances to send.
    for _ in 0..10 {
        yield_now().await;
    }
    if sends {
        second_sender.write_all(b"late").await.expect("open");
    }
    [accepted_with_more(&mut first).await, accepted_with_more(&mut second).await]
}

#[tokio::test]
async fn accept_leaves_with_the_first_bytes_of_flows_that_start_together() {
    // Retry, because the application may get no CPU time on a loaded machine.
    for _ in 0..20 {
        match started_together(true).await {
            [true, _] => panic!("the first application has sent nothing"),
            [false, true] => return,
            [false, false] => {}
        }
    }
    panic!("ACCEPT always came alone");
}

#[tokio::test]
async fn a_silent_application_does_not_hold_back_accept() {
    assert_eq!(started_together(false).await, [false, false]);
}

#[tokio::test]
async fn a_session_that_ends_with_its_flow_is_never_taken_for_another() {
    let (client, mut server) = sessions().await;
    let draining = CancellationToken::new();
    server.end_with_flow_after(draining.clone());
    let mut pair = (client, server);
    for ends in [false, true] {
        let Path { mut source, near, far, mut destination } = Path::over(pair.0, pair.1).await;
        if ends {
            draining.cancel();
        }
        source.shutdown().await.expect("open");
        destination.shutdown().await.expect("open");
        let (near, far) = (soon(near).await.expect("no panic"), soon(far).await.expect("no panic"));
        assert_eq!((near.0.label(), far.0.label()), ("clean", "clean"));
        pair = (near.1.expect("DONE received"), far.1.expect("still open"));
        // close_notify arrives with DONE.
        assert_eq!(pair.0.is_idle_alive(), !ends);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_sides_write_much_at_once_and_nothing_is_lost() {
    let Path { source, near, far, destination } = Path::new().await;
    exchange(source, destination, 20 << 20).await;
    let (near, far) = (soon(near).await.expect("no panic"), soon(far).await.expect("no panic"));
    assert_eq!((near.0.label(), near.2, near.3), ("clean", 20 << 20, 20 << 20));
    assert_eq!((far.0.label(), far.2, far.3), ("clean", 20 << 20, 20 << 20));
    assert!(near.1.is_some_and(|session| session.is_idle_alive()) && far.1.is_some());
}

#[tokio::test]
async fn an_answer_during_a_bulk_transfer_loses_nothing() {
    let (mut client, mut server) = sessions().await;
    let ((mut source, near), (mut destination, far)) = (app_connection().await, app_connection().await);
    let mut sent: Vec<u8> = Vec::new();
    // More than all buffers on the path hold, while nobody reads. ACCEPT arrives when a batch cannot be sent.
    let write = async {
        let chunk: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
        while let Ok(written) = timeout(Duration::from_millis(300), source.write(&chunk)).await {
            sent.extend_from_slice(&chunk[..written.expect("open")]);
        }
        let got = soon(server.next(DEADLINE)).await.expect("no error").expect("not closed");
        assert_eq!(got.optimistic_data, OptimisticMode::On);
        server.accept_flow(&got).expect("in turn");
        soon(poll_fn(|cx| server.poll_flush(cx))).await.expect("sent");
    };
    let ask = async {
        poll_fn(|cx| near.poll_read_ready(cx)).await.expect("open");
        let mut optimistic = OptimisticData::new(&near);
        client.open(&open(), Some(&mut optimistic)).await.expect("accepted");
        optimistic.taken_bytes
    };
    let ((), optimistic_bytes) = tokio::join!(write, ask);
    assert!(client.unsent() && optimistic_bytes > 1 << 20, "{optimistic_bytes}");
    let relays = [relay(near, client), relay(far, server)];
    let mut received = Vec::new();
    let read = destination.read_to_end(&mut received);
    let (read, ended) = soon(async { tokio::join!(read, source.shutdown()) }).await;
    read.expect("a clean end");
    ended.expect("open");
    assert!(received == sent, "{} of {} bytes, or others", received.len(), sent.len());
    destination.shutdown().await.expect("open");
    for relay in relays {
        assert_eq!(soon(relay).await.expect("no panic").0.label(), "clean");
    }
}

#[tokio::test]
async fn a_reset_of_either_application_resets_the_other() {
    let Path { source, near, far, mut destination } = Path::new().await;
    socket::reset(source);
    assert!(is_reset(&mut destination).await);
    assert_eq!(Path::ends(near, far).await, ("reset_by_source", "reset_by_source"));

    let Path { mut source, near, far, destination } = Path::new().await;
    socket::reset(destination);
    assert!(is_reset(&mut source).await);
    assert_eq!(Path::ends(near, far).await, ("reset_by_destination", "reset_by_destination"));
}

#[tokio::test]
async fn a_reset_after_the_end_of_a_direction_is_still_noticed() {
    let Path { mut source, near, far, mut destination } = Path::new().await;
    source.shutdown().await.expect("open");
    assert_eq!(soon(destination.read(&mut [0; 1])).await.expect("an end, not a reset"), 0);
    socket::reset(source);
    assert_eq!(Path::ends(near, far).await, ("reset_by_source", "reset_by_source"));
    assert!(destination.write_all(b"x").await.is_err() || is_reset(&mut destination).await);
}

#[tokio::test]
async fn data_before_a_reset_arrives_first() {
    let Path { mut source, near, far, mut destination } = Path::new().await;
    source.write_all(b"last words").await.expect("open");
    let mut words = [0; 10];
    soon(destination.read_exact(&mut words)).await.expect("arrives");
    assert_eq!(&words, b"last words");
    socket::reset(source);
    assert!(is_reset(&mut destination).await);
    assert_eq!(Path::ends(near, far).await, ("reset_by_source", "reset_by_source"));
}

#[tokio::test]
async fn a_tunnel_that_is_cut_resets_the_application() {
    for goodbye in [true, false] {
        let (mut client, mut server) = sessions().await;
        open_flow(&mut client, &mut server).await;
        let (mut source, app) = app_connection().await;
        let near = relay(app, client);
        source.write_all(b"x").await.expect("open");
        let received = soon(poll_fn(|cx| server.poll_received(cx))).await;
        assert!(matches!(received, Ok(Received::Data)));
        server.consume(1);
        if goodbye {
            server.close()
        } else {
            drop(server)
        }
        assert!(is_reset(&mut source).await, "goodbye: {goodbye}");
        let (end, session, ..) = soon(near).await.expect("no panic");
        assert!(session.is_none());
        assert_eq!(end.label(), "tunnel_lost");
    }
}

#[tokio::test]
async fn a_tunnel_closed_after_one_fin_is_not_a_clean_end() {
    let (mut client, mut server) = sessions().await;
    open_flow(&mut client, &mut server).await;
    let (mut source, app) = app_connection().await;
    let near = relay(app, client);
    server.send(&Control::Fin).expect("in turn");
    poll_fn(|cx| server.poll_flush(cx)).await.expect("sent");
    assert_eq!(soon(source.read(&mut [0; 1])).await.expect("an end"), 0);
    server.close();
    assert_eq!(soon(near).await.expect("no panic").0.label(), "tunnel_lost");
    assert!(source.write_all(b"x").await.is_err() || is_reset(&mut source).await);
}

#[tokio::test]
async fn a_destination_that_reads_late_still_gets_everything() {
    let Path { mut source, near, far, mut destination } = Path::new().await;
    destination.shutdown().await.expect("open");
    assert_eq!(soon(source.read(&mut [0; 1])).await.expect("an end"), 0);
    // More than all buffers on the path hold (a few MiB each), to a destination that does not read.
    let mut written_bytes = 0_usize;
    let chunk = vec![7; 1 << 20];
    while let Ok(outcome) = timeout(Duration::from_millis(300), source.write(&chunk)).await {
        written_bytes += outcome.expect("open");
    }
    source.shutdown().await.expect("open");
    let mut read = Vec::new();
    soon(destination.read_to_end(&mut read)).await.expect("open");
    assert_eq!(read.len(), written_bytes);
    let (near, far) = (soon(near).await.expect("no panic"), soon(far).await.expect("no panic"));
    assert_eq!((near.0.label(), far.0.label()), ("clean", "clean"));
    assert!(near.1.is_some());
}

#[tokio::test]
async fn a_missing_done_ends_the_session_and_not_the_flow() {
    let (mut client, mut server) = sessions().await;
    open_flow(&mut client, &mut server).await;
    let (mut source, app) = app_connection().await;
    let near = relay(app, client);
    server.send(&Control::Fin).expect("in turn");
    poll_fn(|cx| server.poll_flush(cx)).await.expect("sent");
    source.shutdown().await.expect("open");
    let (end, session, ..) = timeout(DEADLINE, near).await.expect("in time").expect("no panic");
    assert_eq!(end.label(), "clean");
    assert!(session.is_none());
}

#[tokio::test]
async fn an_answer_that_ends_while_the_peer_acknowledges_nothing_arrives_whole() {
    let (mut client, mut server) = sessions().await;
    open_flow(&mut client, &mut server).await;
    let ((source, app), (destination, far)) = (app_connection().await, app_connection().await);
    let (watched, mut news) = Watched::new();
    let on = watched.clone();
    let near = tokio::spawn(async move {
        let counters = FlowCounters::default();
        tunnelled(app, client, &counters, &share(10).of(1), on.watching()).await.0.label()
    });
    let peer = duplicate(server.tcp());
    let _far = relay(far, server);
    answer_in_silence((source, destination), peer, (&watched, &mut news)).await;
    assert_eq!(soon(near).await.expect("no panic"), "clean");
}

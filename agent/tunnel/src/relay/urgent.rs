//! Urgent data through both relays: every byte arrives in its place, and the last mark at its byte.

use std::{
    future::poll_fn,
    io::{self, IoSliceMut},
    mem::MaybeUninit,
};

use socket2::SockRef;
use tacit_kernel::socket::{AppStream, Polled as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinHandle,
};

use super::{
    FlowCounters,
    bulk::tests::share,
    plain,
    testing::{soon, unasked},
    tunnelled,
    watch::Watch,
};
use crate::{
    Session,
    session::OptimisticData,
    socket::{self, ReadBytes, try_read_app},
    testing::{app_connection, app_stream, connection, open, open_flow, sessions},
};

/// Bytes that an application sends in one call.
#[derive(Debug, Clone)]
enum Part {
    Plain(Vec<u8>),
    /// The last byte is urgent.
    Urgent(Vec<u8>),
}

fn plain_part(bytes: usize) -> Part {
    Part::Plain((0..bytes).map(|at| (at % 251) as u8).collect())
}

fn urgent(text: &str) -> Part {
    Part::Urgent(text.as_bytes().to_vec())
}

/// Data directly before, at and after the mark; at the ends of buffers; several marks.
fn streams() -> Vec<Vec<Part>> {
    let mut all = vec![
        vec![urgent("!")],
        vec![urgent("ab!")],
        vec![plain_part(3), urgent("!")],
        vec![urgent("!"), plain_part(3)],
        vec![plain_part(3), urgent("!"), plain_part(3)],
        vec![urgent("1"), urgent("2")],
        vec![plain_part(1), urgent("1"), plain_part(1), urgent("2"), plain_part(1)],
    ];
    for before in [16_379, 16_380, 16_381, 65_520, 65_536, 70_000] {
        all.push(vec![plain_part(before), urgent("!"), plain_part(before)]);
    }
    all
}

fn bytes_of(parts: &[Part]) -> Vec<u8> {
    let bytes = parts.iter().map(|part| match part {
        Part::Plain(bytes) | Part::Urgent(bytes) => bytes.as_slice(),
    });
    bytes.collect::<Vec<_>>().concat()
}

/// Positions of the urgent bytes.
fn marks_of(parts: &[Part]) -> Vec<usize> {
    let mut end = 0;
    let ends = parts.iter().map(|part| match part {
        Part::Plain(bytes) => {
            end += bytes.len();
            None
        }
        Part::Urgent(bytes) => {
            end += bytes.len();
            Some(end - 1)
        }
    });
    ends.flatten().collect()
}

async fn send(app: &mut TcpStream, parts: &[Part]) {
    for part in parts {
        match part {
            Part::Plain(bytes) => app.write_all(bytes).await.expect("open"),
            Part::Urgent(bytes) => {
                let mut left = bytes.as_slice();
                while !left.is_empty() {
                    app.writable().await.expect("open");
                    match SockRef::from(&*app).send_out_of_band(left) {
                        Ok(sent) => left = &left[sent..],
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            tokio::task::yield_now().await;
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
            }
        }
    }
}

/// Reads to the end as an application with SO_OOBINLINE. Returns the bytes and the positions of marks.
async fn read_inline(app: &AppStream) -> (Vec<u8>, Vec<usize>) {
    let (mut bytes, mut marks) = (Vec::new(), Vec::new());
    let mut buffer = vec![0; 9000];
    loop {
        soon(poll_fn(|cx| app.poll_read_ready(cx))).await.expect("open");
        match try_read_app(app, &mut [IoSliceMut::new(&mut buffer)]) {
            None => {}
            Some(read) => {
                let ReadBytes { count, is_urgent } = read.expect("open");
                if count == 0 {
                    return (bytes, marks);
                }
                if is_urgent {
                    marks.push(bytes.len());
                }
                bytes.extend(&buffer[..count]);
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Way {
    Plain,
    Tunnelled,
}

/// Starts the relay between the agents' ends of two applications' connections.
async fn relay(way: Way, near: AppStream, far: AppStream) -> JoinHandle<()> {
    let (mut client, mut server) = sessions().await;
    open_flow(&mut client, &mut server).await;
    tokio::spawn(async move {
        let bulk = share(10).of(1);
        let counters = [FlowCounters::default(), FlowCounters::default()];
        let watches = [Watch::default(), Watch::default()];
        match way {
            Way::Plain => drop(plain(near, far, &counters[0], &bulk, None).await),
            Way::Tunnelled => {
                tokio::join!(
                    tunnelled(near, client, &counters[0], &bulk, unasked(&watches[0])),
                    tunnelled(far, server, &counters[1], &bulk, unasked(&watches[1]))
                );
            }
        }
    })
}

/// Sends `parts` before the relay starts, if they fit, so that it finds all at once; or after.
async fn through(
    way: Way,
    parts: &[Part],
    in_one_burst: bool,
    destination: TcpStream,
    far: AppStream,
) -> TcpStream {
    let (mut source, near) = app_connection().await;
    if in_one_burst {
        send(&mut source, parts).await;
        source.shutdown().await.expect("open");
        let _relay = relay(way, near, far).await;
    } else {
        let _relay = relay(way, near, far).await;
        send(&mut source, parts).await;
        source.shutdown().await.expect("open");
    }
    drop(source);
    destination
}

#[tokio::test]
async fn urgent_data_keeps_its_place_in_the_stream_and_its_mark() {
    for parts in streams() {
        for way in [Way::Plain, Way::Tunnelled] {
            for in_one_burst in [true, false] {
                let (destination, far) = app_connection().await;
                let destination = through(way, &parts, in_one_burst, destination, far).await;
                let (bytes, marks) = read_inline(&app_stream(destination)).await;
                let name = format!("{way:?}, in one burst: {in_one_burst}, marks at {:?}", marks_of(&parts));
                assert!(
                    bytes == bytes_of(&parts),
                    "{} of {} bytes, {name}",
                    bytes.len(),
                    bytes_of(&parts).len()
                );
                let expected = marks_of(&parts);
                assert!(marks.iter().all(|mark| expected.contains(mark)), "{marks:?}, {name}");
                assert_eq!(marks.last(), expected.last(), "{name}");
            }
        }
    }
}

/// An application without SO_OOBINLINE gets the byte beside the stream.
#[tokio::test]
async fn urgent_data_is_received_beside_the_stream() {
    for way in [Way::Plain, Way::Tunnelled] {
        for in_one_burst in [true, false] {
            let parts = [plain_part(3), urgent("x!"), plain_part(3)];
            let (destination, far) = app_connection().await;
            let mut destination = through(way, &parts, in_one_burst, destination, far).await;
            let receive = async {
                // The call fails until the byte has come.
                while !matches!(
                    SockRef::from(&destination).recv_out_of_band(&mut [MaybeUninit::uninit()]),
                    Ok(1)
                ) {
                    tokio::task::yield_now().await;
                }
            };
            soon(receive).await;
            let mut bytes = Vec::new();
            soon(destination.read_to_end(&mut bytes)).await.expect("open");
            assert_eq!(bytes, [0, 1, 2, b'x', 0, 1, 2], "{way:?}");
        }
    }
}

/// Data that is sent before the answer to OPEN.
#[tokio::test]
async fn urgent_data_before_the_answer_is_whole() {
    for parts in streams() {
        let ((mut client, mut server), (mut source, near)) = (sessions().await, app_connection().await);
        send(&mut source, &parts).await;
        source.shutdown().await.expect("open");
        let (destination, far) = app_connection().await;
        let serve = async {
            let asked = server.next(super::testing::DEADLINE).await.expect("no error").expect("not closed");
            server.accept_flow(&asked).expect("in turn");
            let (counters, bulk) = (FlowCounters::default(), share(10).of(1));
            let watch = Watch::default();
            tunnelled(far, server, &counters, &bulk, unasked(&watch)).await;
        };
        let ask = async {
            let mut optimistic = OptimisticData::new(&near);
            client.open(&open(), Some(&mut optimistic)).await.expect("accepted");
            let (counters, bulk) = (FlowCounters::default(), share(10).of(1));
            let watch = Watch::default();
            tunnelled(near, client, &counters, &bulk, unasked(&watch)).await;
        };
        let destination = app_stream(destination);
        let read = async {
            let (bytes, _) = read_inline(&destination).await;
            socket::finish(&destination).expect("open");
            bytes
        };
        let ((), (), bytes) = soon(async { tokio::join!(serve, ask, read) }).await;
        assert!(bytes == bytes_of(&parts), "{} of {} bytes", bytes.len(), bytes_of(&parts).len());
    }
}

/// A peer of an earlier version gets the byte as any other.
#[tokio::test]
async fn urgent_data_to_an_earlier_agent_is_whole() {
    for parts in streams() {
        let ((mut client, mut server), (mut source, near)) = (sessions().await, app_connection().await);
        Session::forget_urgent(&mut client);
        open_flow(&mut client, &mut server).await;
        let (destination, far) = app_connection().await;
        let relays = tokio::spawn(async move {
            let counters = [FlowCounters::default(), FlowCounters::default()];
            let watches = [Watch::default(), Watch::default()];
            let bulk = share(10).of(1);
            tokio::join!(
                tunnelled(near, client, &counters[0], &bulk, unasked(&watches[0])),
                tunnelled(far, server, &counters[1], &bulk, unasked(&watches[1]))
            );
        });
        send(&mut source, &parts).await;
        source.shutdown().await.expect("open");
        let (bytes, marks) = read_inline(&app_stream(destination)).await;
        assert!(bytes == bytes_of(&parts), "{} of {} bytes", bytes.len(), bytes_of(&parts).len());
        assert_eq!(marks, []);
        relays.abort();
    }
    // A control: the connection itself has marks.
    let (mut source, ours) = connection().await;
    send(&mut source, &[urgent("!")]).await;
    drop(source);
    assert_eq!(read_inline(&app_stream(ours)).await, (b"!".to_vec(), vec![0]));
}

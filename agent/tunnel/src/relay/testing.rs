//! Helpers for the tests of both relays.

use std::{
    future::Future,
    io,
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use tacit_kernel::socket::{
    AppStream,
    peer::{peer_state, stop_receiving},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::Handle,
    sync::{
        mpsc::{UnboundedReceiver, unbounded_channel},
        oneshot,
    },
    time::{sleep, timeout},
};

use super::{
    threads::{ThreadKind, until_move},
    watch::{News, Watch, Watching},
};

/// Limit of every wait in a test.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// Awaits `work` with the limit.
pub(crate) async fn soon<T>(work: impl Future<Output = T>) -> T {
    timeout(DEADLINE, work).await.expect("in time")
}

/// Watches a peer of which nothing is asked.
pub(crate) fn unasked(watch: &Watch) -> Watching<'_> {
    Watching { watch, silence_max: DEADLINE, tell: &|_, _| {} }
}

type Tell = dyn Fn(&AppStream, News) + Send + Sync;

/// A watch of a peer, and where its news go.
pub(crate) struct Watched {
    watch: Watch,
    tell: Box<Tell>,
}

impl Watched {
    /// Returns a watch and its news.
    pub(crate) fn new() -> (Arc<Self>, UnboundedReceiver<News>) {
        let (sender, news) = unbounded_channel();
        let tell = Box::new(move |_: &AppStream, told| {
            let _ = sender.send(told);
        });
        (Arc::new(Self { watch: Watch::default(), tell }), news)
    }

    pub(crate) fn watching(&self) -> Watching<'_> {
        Watching { watch: &self.watch, silence_max: DEADLINE, tell: &*self.tell }
    }
}

/// Returns a second descriptor of a connection.
pub(crate) fn duplicate(tcp: &impl AsFd) -> OwnedFd {
    tcp.as_fd().try_clone_to_owned().expect("descriptors")
}

/// `source` has sent everything when `peer`, the socket of the other node, stops to acknowledge. Only then, `destination` sends the
/// last part of its answer. Returns when `source` has read all of it.
pub(crate) async fn answer_in_silence(
    (mut source, mut destination): (TcpStream, TcpStream),
    peer: OwnedFd,
    (watched, news): (&Watched, &mut UnboundedReceiver<News>),
) {
    // Each is below the first window of a connection, and both together are above it.
    const PART: usize = 50_000;
    destination.write_all(&[7; PART]).await.expect("open");
    let mut unread = vec![0; PART];
    soon(async {
        // An acknowledgement can be delayed, and the peer then has less of the window.
        while source.peek(&mut unread).await.expect("open") < PART
            || peer_state(&peer).expect("open").is_asked
        {
            sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    stop_receiving(&peer).expect("attached");
    source.write_all(b"question").await.expect("open");
    source.shutdown().await.expect("open");
    soon(async {
        while timeout(Duration::from_millis(20), news.recv()).await.is_err() {
            watched.watch.look();
        }
    })
    .await;
    destination.write_all(&[7; PART]).await.expect("open");
    destination.shutdown().await.expect("open");
    let mut answer = Vec::new();
    soon(source.read_to_end(&mut answer)).await.expect("a clean end");
    assert_eq!(answer.len(), 2 * PART);
    assert_eq!(soon(news.recv()).await, Some(News::Alive));
}

/// Returns true if the connection ends with RST, false if it ends with FIN.
pub(crate) async fn is_reset(tcp: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    match soon(tcp.read_to_end(&mut rest)).await {
        Ok(_) => false,
        Err(e) => e.kind() == io::ErrorKind::ConnectionReset,
    }
}

/// Both applications write `bytes` at once, end, and check the received bytes.
pub(crate) async fn exchange(source: TcpStream, destination: TcpStream, bytes: usize) {
    let one = tokio::spawn(talk(source, 1, 2, bytes));
    let other = tokio::spawn(talk(destination, 2, 1, bytes));
    soon(one).await.expect("no panic");
    soon(other).await.expect("no panic");
}

async fn talk(tcp: TcpStream, ours: u32, theirs: u32, bytes: usize) {
    let (mut read, mut write) = tcp.into_split();
    let sent = pattern(ours, bytes);
    let writing = tokio::spawn(async move {
        write.write_all(&sent).await.expect("open");
        write.shutdown().await.expect("open");
        write
    });
    let mut received = Vec::with_capacity(bytes);
    read.read_to_end(&mut received).await.expect("a clean end");
    let _write = writing.await.expect("no panic");
    assert!(received == pattern(theirs, bytes), "{} of {bytes} bytes, or others", received.len());
}

/// Returns bytes that depend on the seed and the position.
fn pattern(seed: u32, bytes: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..bytes).map(|_| next()).collect()
}

/// A thread of each kind, and the number of moves between them.
pub(crate) struct Threads {
    handles: [Handle; 2],
    _running: [oneshot::Sender<()>; 2],
    moves: AtomicUsize,
}

impl Threads {
    pub(crate) fn start() -> Arc<Self> {
        let start = || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let (running, ended) = oneshot::channel();
            let handle = runtime.handle().clone();
            thread::spawn(move || runtime.block_on(ended));
            (handle, running)
        };
        let ((quick, quick_runs), (bulk, bulk_runs)) = (start(), start());
        Arc::new(Self {
            handles: [quick, bulk],
            _running: [quick_runs, bulk_runs],
            moves: AtomicUsize::new(0),
        })
    }

    pub(crate) fn moves(&self) -> usize {
        self.moves.load(Relaxed)
    }

    /// Runs a flow where it wants to run, from a quick thread on.
    pub(crate) fn run<T: Send + 'static>(
        self: &Arc<Self>,
        flow: impl Future<Output = T> + Send + 'static,
    ) -> oneshot::Receiver<T> {
        let (tell, told) = oneshot::channel();
        let flow = async move {
            // The test has ended, if nobody hears it.
            let _ = tell.send(flow.await);
        };
        self.go_on(ThreadKind::Quick, Box::pin(flow));
        told
    }

    fn go_on(self: &Arc<Self>, on: ThreadKind, mut flow: Pin<Box<dyn Future<Output = ()> + Send>>) {
        let threads = self.clone();
        let handle = &self.handles[usize::from(on == ThreadKind::Bulk)];
        handle.spawn(async move {
            if let Some(kind) = until_move(on, &mut flow).await {
                threads.moves.fetch_add(1, Relaxed);
                threads.go_on(kind, flow);
            }
        });
    }
}

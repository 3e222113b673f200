//! Relay between two sockets, for same-node flows and for plaintext flows that policy allows.

use std::{
    future::{Future, poll_fn},
    io::{IoSlice, IoSliceMut},
    ops::ControlFlow,
    pin::pin,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    task::{Context, Poll, ready},
    time::Instant,
};

use tacit_kernel::socket::{AppStream, Polled as _};

use super::{App, FlowEnd};
use crate::{
    buffers::{Buffer, Size},
    relay::{
        FlowCounters, PodBulk,
        bulk::{Grown, Growth, Rate, Stall},
        busy_poll::BusyPoll,
        threads::{ThreadKind, can_move_to, move_to},
        watch::{PeerWatch, Watching},
    },
    socket::{self, ReadBytes},
};

/// The application that is on another node, and the watch of its peer.
pub type Remote<'a> = (App, Watching<'a>);

/// Forwards bytes between `source`, the client, and `destination`. Both connections are reset if the future is dropped.
pub async fn plain(
    source: AppStream,
    destination: AppStream,
    counters: &FlowCounters,
    bulk: &PodBulk,
    remote: Option<Remote<'_>>,
) -> FlowEnd {
    let (mut source, mut destination, mut kept) = (source, destination, None);
    let ending = loop {
        match run(&source, &destination, kept, (counters, bulk), remote).await {
            Ran::ToTheEnd(ending) => break ending,
            Ran::UntilBulk(until_now) => {
                move_to(ThreadKind::Bulk).await;
                // One that is dropped here is reset.
                match (source.moved_to_this_thread(), destination.moved_to_this_thread()) {
                    (Ok(there), Ok(back)) => (source, destination) = (there, back),
                    (Err(_), _) => return FlowEnd::Reset(App::Source),
                    (_, Err(_)) => return FlowEnd::Reset(App::Destination),
                }
                kept = Some(until_now);
            }
        }
    };
    match ending {
        Ending::Finished => {
            socket::deliver_if_dropped(&source);
            socket::deliver_if_dropped(&destination);
            FlowEnd::Clean
        }
        Ending::Reset(app) => {
            socket::reset(source);
            socket::reset(destination);
            FlowEnd::Reset(app)
        }
        Ending::Silent => {
            socket::reset(source);
            socket::reset(destination);
            FlowEnd::PeerSilent
        }
    }
}

enum Ending {
    Finished,
    /// This application has reset its connection.
    Reset(App),
    Silent,
}

/// The result of a part of a flow.
enum Ran<'k> {
    /// The flow has ended.
    ToTheEnd(Ending),
    /// It is bulk, and goes on at another thread.
    UntilBulk(Box<Kept<'k>>),
}

/// The part of a flow that goes with it to another thread.
struct Kept<'k> {
    there: Direction<'k>,
    back: Direction<'k>,
    peer: PeerWatch<'k>,
}

/// Runs both directions to their ends, or until the flow has to move to another thread. `kept` is what it was before it moved.
async fn run<'k>(
    source: &AppStream,
    destination: &AppStream,
    kept: Option<Box<Kept<'k>>>,
    (counters, bulk): (&FlowCounters, &'k PodBulk),
    remote: Option<Remote<'k>>,
) -> Ran<'k> {
    let (far, watching) = remote.unzip();
    let (upstream, app) = match far {
        Some(App::Source) => (source, destination),
        _ => (destination, source),
    };
    let new =
        || Kept { there: Direction::new(bulk), back: Direction::new(bulk), peer: PeerWatch::new(watching) };
    let Kept { there, back, mut peer } = kept.map_or_else(new, |kept| *kept);
    let mut seen_bytes = 0;
    let towards_peer = if far == Some(App::Source) { &counters.received } else { &counters.sent };
    let mut there = Half::new(source, destination, App::Source, &counters.sent, there);
    let mut back = Half::new(destination, source, App::Destination, &counters.received, back);
    let mut source_broken = pin!(source.broken());
    let mut destination_broken = pin!(destination.broken());
    let (mut busy_poll, mut rate) = (BusyPoll::new(), Rate::default());
    let ending = poll_fn(|cx| {
        if let Poll::Ready(reset) = poll_both(&mut there, &mut back, cx) {
            return Poll::Ready(Some(reset.map_or(Ending::Finished, Ending::Reset)));
        }
        let is_bulk = [&there, &back].iter().any(|half| half.kept.growth.is_bulk());
        if is_bulk && can_move_to(ThreadKind::Bulk) {
            let moved_bytes = counters.sent.load(Relaxed) + counters.received.load(Relaxed);
            if rate.is_high(Instant::now(), moved_bytes) {
                return Poll::Ready(None);
            }
        }
        busy_poll.pending(counters.sent.load(Relaxed) + counters.received.load(Relaxed));
        // After an application has ended its direction, reads no longer report a reset.
        for (half, broken) in [(&mut there, &mut source_broken), (&mut back, &mut destination_broken)] {
            if half.kept.ended && !half.error_checked && broken.as_mut().poll(cx).is_ready() {
                half.error_checked = true;
                if matches!(half.from.take_error(), Ok(Some(_)) | Err(_)) {
                    return Poll::Ready(Some(Ending::Reset(half.app)));
                }
            }
        }
        let sent_bytes = towards_peer.load(Relaxed);
        if sent_bytes != seen_bytes {
            seen_bytes = sent_bytes;
            peer.sent();
        }
        peer.poll(cx, upstream, app).map(|()| Some(Ending::Silent))
    })
    .await;
    let Some(ending) = ending else {
        peer.moves();
        return Ran::UntilBulk(Box::new(Kept { there: there.kept, back: back.kept, peer }));
    };
    if matches!(ending, Ending::Finished) {
        peer.release(app);
    }
    Ran::ToTheEnd(ending)
}

/// Steps both directions in alternation until both are blocked.
fn poll_both(there: &mut Half<'_, '_>, back: &mut Half<'_, '_>, cx: &mut Context<'_>) -> Poll<Option<App>> {
    loop {
        let steps = [there.step(cx), back.step(cx)];
        for step in &steps {
            if let Poll::Ready(ControlFlow::Break(app)) = step {
                return Poll::Ready(Some(*app));
            }
        }
        if there.kept.ended && back.kept.ended {
            return Poll::Ready(None);
        }
        if steps.iter().all(Poll::is_pending) {
            return Poll::Pending;
        }
    }
}

/// Bytes from `start` to `end` of a buffer.
struct Unwritten {
    buffer: Buffer,
    start: usize,
    end: usize,
    /// One byte that was sent as urgent data.
    is_urgent: bool,
}

/// One direction.
struct Half<'a, 'k> {
    from: &'a AppStream,
    to: &'a AppStream,
    /// The application that sends on `from`.
    app: App,
    counter: &'a AtomicU64,
    /// The error readiness of `from` was consumed.
    error_checked: bool,
    kept: Direction<'k>,
}

/// The part of a direction that goes with the flow to another thread.
struct Direction<'k> {
    size: Size,
    growth: Growth<'k>,
    stall: Stall,
    /// Bytes that are read and not yet written.
    unwritten: Option<Unwritten>,
    /// The end of the sender was forwarded.
    ended: bool,
}

impl<'k> Direction<'k> {
    fn new(bulk: &'k PodBulk) -> Self {
        Self {
            size: Size::default(),
            growth: Growth::new(bulk),
            stall: Stall::default(),
            unwritten: None,
            ended: false,
        }
    }
}

impl<'a, 'k> Half<'a, 'k> {
    fn new(
        from: &'a AppStream,
        to: &'a AppStream,
        app: App,
        counter: &'a AtomicU64,
        kept: Direction<'k>,
    ) -> Self {
        Self { from, to, app, counter, error_checked: false, kept }
    }

    /// Reads or writes once; breaks with the application that reset.
    fn step(&mut self, cx: &mut Context<'_>) -> Poll<ControlFlow<App>> {
        if self.kept.ended {
            return Poll::Pending;
        }
        let moved =
            if self.kept.unwritten.is_some() { ready!(self.write(cx)) } else { ready!(self.read(cx)) };
        Poll::Ready(moved.map_or_else(ControlFlow::Break, ControlFlow::Continue))
    }

    fn read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), App>> {
        loop {
            // An idle flow takes no buffer.
            let Ok(()) = ready!(self.from.poll_read_ready(cx)) else { return Poll::Ready(Err(self.app)) };
            let mut buffer = Buffer::take(self.kept.size);
            let room_bytes = buffer.len();
            let Some(read) = socket::try_read_app(self.from, &mut [IoSliceMut::new(&mut buffer)]) else {
                continue;
            };
            return Poll::Ready(match read {
                Ok(ReadBytes { count: 0, .. }) => {
                    self.kept.ended = true;
                    socket::finish(self.to).map_err(|_| self.other())
                }
                Ok(ReadBytes { count, is_urgent }) => {
                    if !is_urgent {
                        self.kept.size = self.next_size(count, room_bytes);
                    }
                    self.kept.unwritten = Some(Unwritten { buffer, start: 0, end: count, is_urgent });
                    Ok(())
                }
                Err(_) => Err(self.app),
            });
        }
    }

    fn next_size(&mut self, read_bytes: usize, room_bytes: usize) -> Size {
        let next = self.kept.size.after(read_bytes, room_bytes);
        // A bounded receive buffer may keep reads from ever being full.
        if next != Size::Large && !self.kept.stall.is_bounded() {
            return next;
        }
        match self.kept.growth.ask(self.counter.load(Relaxed)) {
            Grown::Before => next,
            Grown::No => next.small(),
            Grown::Now => {
                // Both connections end with the flow.
                socket::limit_unsent(self.to, true);
                if self.kept.stall.is_bounded() {
                    socket::widen_unread(self.from);
                }
                next
            }
        }
    }

    fn write(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), App>> {
        let Some(Unwritten { buffer, start, end, is_urgent }) = &mut self.kept.unwritten else {
            return Poll::Ready(Ok(()));
        };
        let bytes = &buffer[*start..*end];
        let written = match bytes {
            [byte] if *is_urgent => socket::poll_write_urgent(self.to, cx, *byte).map_ok(|()| 1),
            _ => socket::poll_write(self.to, cx, &[IoSlice::new(bytes)]),
        };
        let Poll::Ready(written) = written else {
            self.kept.stall.stalled(&self.kept.growth, || socket::bound_unread(self.from));
            return Poll::Pending;
        };
        let Ok(written_bytes) = written else {
            return Poll::Ready(Err(self.other()));
        };
        self.counter.fetch_add(written_bytes as u64, Relaxed);
        *start += written_bytes;
        if start == end {
            self.kept.unwritten = None;
        }
        Poll::Ready(Ok(()))
    }

    /// Returns the application on `to`.
    fn other(&self) -> App {
        match self.app {
            App::Source => App::Destination,
            App::Destination => App::Source,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
        task::JoinHandle,
    };

    use super::*;
    use crate::{
        relay::{
            bulk::tests::share,
            testing::{Threads, Watched, answer_in_silence, duplicate, exchange, is_reset, soon},
        },
        testing::app_connection,
    };

    async fn path() -> (TcpStream, JoinHandle<(&'static str, u64, u64)>, TcpStream) {
        let ((source, near), (destination, far)) = (app_connection().await, app_connection().await);
        let relay = tokio::spawn(async move {
            let counters = FlowCounters::default();
            socket::reset_if_dropped(&near);
            socket::reset_if_dropped(&far);
            let bulk = share(10).of(1);
            let end = plain(near, far, &counters, &bulk, None).await;
            (end.label(), counters.sent.load(Relaxed), counters.received.load(Relaxed))
        });
        (source, relay, destination)
    }

    #[tokio::test]
    async fn each_direction_ends_on_its_own() {
        let (mut source, relay, mut destination) = path().await;
        let mut text = String::new();
        source.write_all(b"question").await.expect("open");
        source.shutdown().await.expect("open");
        soon(destination.read_to_string(&mut text)).await.expect("open");
        destination.write_all(b"answer!").await.expect("open");
        destination.shutdown().await.expect("open");
        soon(source.read_to_string(&mut text)).await.expect("open");
        assert_eq!(text, "questionanswer!");
        assert_eq!(soon(relay).await.expect("no panic"), ("clean", 8, 7));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn both_sides_write_much_at_once_and_nothing_is_lost() {
        let (source, relay, destination) = path().await;
        exchange(source, destination, 20 << 20).await;
        assert_eq!(soon(relay).await.expect("no panic"), ("clean", 20 << 20, 20 << 20));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn bulk_goes_on_at_another_thread() {
        for (bytes, moves) in [(1 << 10, 0), (20 << 20, 1)] {
            let threads = Threads::start();
            let ((source, near), (destination, far)) = (app_connection().await, app_connection().await);
            let relay = threads.run(async move {
                let counters = FlowCounters::default();
                socket::reset_if_dropped(&near);
                socket::reset_if_dropped(&far);
                let end = plain(near, far, &counters, &share(10).of(1), None).await;
                (end.label(), counters.sent.load(Relaxed), counters.received.load(Relaxed))
            });
            exchange(source, destination, bytes).await;
            assert_eq!(soon(relay).await.expect("no panic"), ("clean", bytes as u64, bytes as u64));
            assert_eq!(threads.moves(), moves);
        }
    }

    #[tokio::test]
    async fn a_reset_of_either_side_resets_the_other() {
        let (source, relay, mut destination) = path().await;
        socket::reset(source);
        assert!(is_reset(&mut destination).await);
        assert_eq!(soon(relay).await.expect("no panic").0, "reset_by_source");

        let (mut source, relay, destination) = path().await;
        socket::reset(destination);
        assert!(is_reset(&mut source).await);
        assert_eq!(soon(relay).await.expect("no panic").0, "reset_by_destination");
    }

    #[tokio::test]
    async fn a_reset_after_the_end_of_a_direction_is_still_noticed() {
        let (mut source, relay, mut destination) = path().await;
        source.shutdown().await.expect("open");
        assert_eq!(soon(destination.read(&mut [0; 1])).await.expect("an end"), 0);
        socket::reset(source);
        assert_eq!(soon(relay).await.expect("no panic").0, "reset_by_source");
        assert!(destination.write_all(b"x").await.is_err() || is_reset(&mut destination).await);
    }

    #[tokio::test]
    async fn an_answer_that_ends_while_the_peer_acknowledges_nothing_arrives_whole() {
        let ((source, near), (destination, far)) = (app_connection().await, app_connection().await);
        let (watched, mut news) = Watched::new();
        let on = watched.clone();
        let relay = tokio::spawn(async move {
            let remote = Some((App::Destination, on.watching()));
            plain(near, far, &FlowCounters::default(), &share(10).of(1), remote).await.label()
        });
        let peer = duplicate(&destination);
        answer_in_silence((source, destination), peer, (&watched, &mut news)).await;
        assert_eq!(soon(relay).await.expect("no panic"), "clean");
    }
}

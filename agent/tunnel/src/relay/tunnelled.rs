//! Relay between an application's socket and a tunnel session.
//!
//! | event | action |
//! |---|---|
//! | application sends urgent data (MSG_OOB) | URGENT frame, or DATA to a peer that does not know it |
//! | application ends its direction | FIN frame |
//! | application resets, also after its end | RESET frame, session closed |
//! | URGENT frame | the agent sends the byte as urgent data |
//! | FIN frame | the agent ends its direction to the application |
//! | RESET frame, session broken or closed early | application reset, session closed |
//! | the peer's kernel is silent for the limit | application reset, session closed |
//! | FIN forwarded in both directions | the server sends DONE; the session is free for the next flow |

#[cfg(test)]
mod tests;

use std::{
    future::{Future, poll_fn},
    io::IoSlice,
    ops::ControlFlow,
    pin::pin,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use tacit_core::wire::{flow_state::Role, frame::Control};
use tacit_kernel::socket::AppStream;
use tokio::{task::yield_now, time::timeout};

use super::{App, Ending, FlowEnd};
use crate::{
    Session, TunnelError,
    app_read::poll_app_read,
    batch::FRAMES_MAX,
    buffers::{Size, TRIM},
    receive_buffer::Received,
    relay::{
        FlowCounters, PodBulk,
        bulk::{Grown, Growth, Rate, Stall},
        busy_poll::BusyPoll,
        delayed_accept::DelayedAccept,
        threads::{ThreadKind, can_move_to, move_to},
        watch::{PeerWatch, Watching},
    },
    socket,
};

/// Limit for a client's wait for DONE, normally one round trip. Nothing depends on this wait, so the limit is longer than
/// [`TRIM`], at which timers are cheapest.
const DONE_MAX: Duration = TRIM.saturating_add(Duration::from_secs(1));
/// Limit for sending RESET over a tunnel that is full. Closing the session afterwards has the same effect.
const RESET_MAX: Duration = Duration::from_secs(5);

/// Forwards bytes between `app`, which is reset when dropped, and the open flow of `session`. Returns the session if it can
/// carry another flow. A client may then open one, and a server waits for the next. `watching` is the watch of the session's peer.
#[expect(clippy::manual_async_fn, reason = "an async fn keeps its arguments twice, and idle flows are many")]
pub fn tunnelled(
    app: AppStream,
    mut session: Box<Session>,
    counters: &FlowCounters,
    bulk: &PodBulk,
    watching: Watching<'_>,
) -> impl Future<Output = (FlowEnd, Option<Box<Session>>)> + Send {
    async move {
        let (ours, theirs) = match session.role() {
            Role::Client => (App::Source, App::Destination),
            Role::Server => (App::Destination, App::Source),
        };
        let (mut app, mut kept) = (app, None);
        let ending = loop {
            match run(&app, &mut session, kept, (counters, bulk), watching).await {
                Ran::ToTheEnd(ending) => break ending,
                Ran::UntilBulk(until_now) => {
                    move_to(ThreadKind::Bulk).await;
                    match app.moved_to_this_thread() {
                        Ok(moved) => app = moved,
                        Err(error) => {
                            session.close();
                            return (FlowEnd::TunnelLost(error.into()), None);
                        }
                    }
                    match session.moved_to_this_thread() {
                        Ok(moved) => session = moved,
                        Err(error) => {
                            socket::reset(app);
                            return (FlowEnd::TunnelLost(error.into()), None);
                        }
                    }
                    kept = Some(until_now);
                }
            }
        };
        // The futures after the flow are boxed, so a running flow reserves no space for them.
        match ending {
            Ending::Finished => {
                socket::deliver_if_dropped(&app);
                drop(app);
                (FlowEnd::Clean, Box::pin(reusable(session)).await)
            }
            Ending::ResetByApp => {
                socket::reset(app);
                Box::pin(send_reset(session)).await;
                (FlowEnd::Reset(ours), None)
            }
            Ending::ResetByPeer => {
                socket::reset(app);
                session.close();
                (FlowEnd::Reset(theirs), None)
            }
            Ending::Lost(error) => {
                socket::reset(app);
                session.close();
                (FlowEnd::TunnelLost(error), None)
            }
            Ending::Silent => {
                socket::reset(app);
                session.close();
                (FlowEnd::PeerSilent, None)
            }
        }
    }
}

/// The result of a part of a flow.
enum Ran<'a> {
    /// The flow has ended.
    ToTheEnd(Ending),
    /// It is bulk, and goes on at another thread.
    UntilBulk(Box<Kept<'a>>),
}

/// Runs the flow to its end, or until it has to move to another thread. `kept` is what it was before it moved.
async fn run<'k>(
    app: &AppStream,
    session: &mut Session,
    kept: Option<Box<Kept<'k>>>,
    (counters, bulk): (&FlowCounters, &'k PodBulk),
    watching: Watching<'k>,
) -> Ran<'k> {
    let mut flow = match kept {
        None => Flow::new(app, session, counters, Kept::new(bulk, watching)),
        Some(kept) => Flow::resumed(app, session, counters, *kept),
    };
    let mut broken = pin!(app.broken());
    let mut other_tasks = pin!(yield_now());
    let (mut watch_errors, mut busy_poll) = (true, BusyPoll::new());
    let ending = poll_fn(|cx| {
        let mut ending = flow.poll(cx);
        if ending.is_pending() && flow.accept_pending {
            match &mut flow.delayed_accept {
                Some(delayed_accept) if delayed_accept.is_crowded() => ready!(delayed_accept.poll(cx)),
                _ => ready!(other_tasks.as_mut().poll(cx)),
            }
            flow.accept_pending = false;
            ending = flow.poll(cx);
        }
        if ending.is_pending() && flow.must_move() {
            return Poll::Ready(None);
        }
        if ending.is_pending() {
            busy_poll.pending(flow.up.load(Relaxed) + flow.down.load(Relaxed));
        }
        // After the application has ended its direction, reads no longer report a reset.
        if ending.is_pending() && flow.kept.app_ended && watch_errors && broken.as_mut().poll(cx).is_ready() {
            watch_errors = false;
            if matches!(app.take_error(), Ok(Some(_)) | Err(_)) {
                return Poll::Ready(Some(Ending::ResetByApp));
            }
        }
        if ending.is_pending() && flow.kept.peer.poll(cx, flow.session.tcp(), app).is_ready() {
            return Poll::Ready(Some(Ending::Silent));
        }
        ending.map(Some)
    })
    .await;
    let Some(ending) = ending else {
        let mut kept = flow.kept;
        kept.peer.moves();
        return Ran::UntilBulk(Box::new(kept));
    };
    if matches!(ending, Ending::Finished) {
        flow.kept.peer.release(app);
    }
    flow.shrink();
    Ran::ToTheEnd(ending)
}

/// Returns the session after all frames of the flow have arrived, on a thread on which the next flow can begin.
async fn reusable(mut session: Box<Session>) -> Option<Box<Session>> {
    if move_to(ThreadKind::Quick).await {
        session = session.moved_to_this_thread().ok()?;
    }
    if session.role() == Role::Server {
        return Some(session);
    }
    match timeout(DONE_MAX, poll_fn(|cx| session.poll_received(cx))).await {
        Ok(Ok(Received::Control(Control::Done))) => Some(session),
        _ => {
            session.close();
            None
        }
    }
}

async fn send_reset(mut session: Box<Session>) {
    if session.send(&Control::Reset).is_ok() {
        // The session is closed in any case, and the peer treats a closed session as a reset.
        let _ = timeout(RESET_MAX, poll_fn(|cx| session.poll_flush(cx))).await;
    }
    session.close();
}

/// The result of one step of one direction. Pending if the direction is blocked.
type Step = Poll<ControlFlow<Ending>>;

const CONTINUE: Step = Poll::Ready(ControlFlow::Continue(()));

const fn finish_with(ending: Ending) -> Step {
    Poll::Ready(ControlFlow::Break(ending))
}

struct Flow<'f, 'k> {
    app: &'f AppStream,
    session: &'f mut Session,
    /// Bytes from the application into the tunnel.
    up: &'f AtomicU64,
    /// Bytes from the tunnel to the application.
    down: &'f AtomicU64,
    /// ACCEPT is queued and not sent yet, for a client that sends without waiting for it. The thread first runs its other tasks
    /// once, so that ACCEPT can leave with the application's first bytes.
    accept_pending: bool,
    /// A longer delay of ACCEPT, for clients that send without waiting for it. `None` after the application's first bytes.
    delayed_accept: Option<DelayedAccept>,
    /// The error after which nothing can be sent. Received bytes are still read, because a RESET in them is more specific.
    lost: Option<TunnelError>,
    rate: Rate,
    kept: Kept<'k>,
}

/// The part of a flow that goes with it to another thread.
struct Kept<'k> {
    /// Size of the next read from the application.
    size: Size,
    up_growth: Growth<'k>,
    down_growth: Growth<'k>,
    down_stall: Stall,
    /// FIN is queued or sent.
    app_ended: bool,
    /// FIN is written to the tunnel's socket.
    fin_sent: bool,
    /// A byte that was received as urgent data, and is not written yet.
    urgent: Option<u8>,
    /// FIN was received, and everything before it was written to the application.
    peer_ended: bool,
    peer: PeerWatch<'k>,
}

impl<'k> Kept<'k> {
    fn new(bulk: &'k PodBulk, watching: Watching<'k>) -> Self {
        Self {
            size: Size::default(),
            up_growth: Growth::new(bulk),
            down_growth: Growth::new(bulk),
            down_stall: Stall::default(),
            app_ended: false,
            fin_sent: false,
            urgent: None,
            peer_ended: false,
            peer: PeerWatch::new(Some(watching)),
        }
    }
}

impl<'f, 'k> Flow<'f, 'k> {
    fn new(app: &'f AppStream, session: &'f mut Session, counters: &'f FlowCounters, kept: Kept<'k>) -> Self {
        let (app_ended, accept_pending) = match session.role() {
            // The application may have ended before the answer. Unsent bytes are then payload and are not delayed.
            Role::Client => (session.client_ended(), false),
            Role::Server => (false, session.unsent() && session.accept_can_wait()),
        };
        let flow = Self::resumed(app, session, counters, Kept { app_ended, ..kept });
        Self { accept_pending, delayed_accept: accept_pending.then(DelayedAccept::new), ..flow }
    }

    /// Returns a flow that goes on with what was kept of it.
    fn resumed(
        app: &'f AppStream,
        session: &'f mut Session,
        counters: &'f FlowCounters,
        kept: Kept<'k>,
    ) -> Self {
        let (up, down) = match session.role() {
            Role::Client => (&counters.sent, &counters.received),
            Role::Server => (&counters.received, &counters.sent),
        };
        Self {
            app,
            session,
            up,
            down,
            accept_pending: false,
            delayed_accept: None,
            lost: None,
            rate: Rate::default(),
            kept,
        }
    }

    /// Returns true for bulk that can go on at a thread for it.
    fn must_move(&mut self) -> bool {
        let is_bulk = self.kept.up_growth.is_bulk() || self.kept.down_growth.is_bulk();
        if !is_bulk || self.lost.is_some() || !can_move_to(ThreadKind::Bulk) {
            return false;
        }
        self.rate.is_high(Instant::now(), self.up.load(Relaxed) + self.down.load(Relaxed))
    }

    /// Steps both directions in alternation, so that neither starves the other, until both are blocked. A direction that has
    /// registered with the poller is not stepped again.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ending> {
        let (mut down_waits, mut up_waits) = (false, false);
        loop {
            // Down first, so that data sent with OPEN reaches a server's application before ACCEPT leaves.
            if !down_waits {
                match self.step_down(cx) {
                    Poll::Ready(ControlFlow::Break(ending)) => return Poll::Ready(ending),
                    Poll::Ready(ControlFlow::Continue(())) => {}
                    Poll::Pending => down_waits = true,
                }
                // DONE, or a KeyUpdate that the peer requested.
                up_waits &= !self.session.unsent();
            }
            if !up_waits {
                match self.step_up(cx) {
                    Poll::Ready(ControlFlow::Break(ending)) => return Poll::Ready(ending),
                    Poll::Ready(ControlFlow::Continue(())) => {}
                    Poll::Pending => up_waits = true,
                }
            }
            if self.both_ended() && !self.session.unsent() {
                return Poll::Ready(Ending::Finished);
            }
            if down_waits {
                if let Some(error) = self.lost.take() {
                    // A client may close without waiting for DONE.
                    let complete = self.kept.fin_sent && self.kept.peer_ended;
                    return Poll::Ready(if complete { Ending::Finished } else { Ending::Lost(error) });
                }
                if up_waits {
                    return Poll::Pending;
                }
            }
        }
    }

    /// Moves one batch from the application to the tunnel.
    fn step_up(&mut self, cx: &mut Context<'_>) -> Step {
        if self.lost.is_some() {
            return Poll::Pending;
        }
        if !self.accept_pending
            && let Err(error) = ready!(self.session.poll_flush(cx))
        {
            self.lost = Some(error);
            return CONTINUE;
        }
        if self.kept.app_ended {
            self.kept.fin_sent = true;
            return Poll::Pending;
        }
        let Ok(read) = ready!(poll_app_read(self.app, cx, self.kept.size)) else {
            return finish_with(Ending::ResetByApp);
        };
        let before = self.up.fetch_add(read.payload_bytes as u64, Relaxed);
        self.kept.size = read.next;
        if read.next == Size::Large {
            match self.kept.up_growth.ask(before) {
                Grown::Before => {}
                Grown::Now => self.session.set_large_sends(true),
                Grown::No => self.kept.size = Size::Small,
            }
        }
        match self.session.send_app_read(read) {
            Ok(Ok(ends)) => self.kept.app_ended = ends,
            Ok(Err(_)) => return finish_with(Ending::ResetByApp),
            Err(error) => return finish_with(Ending::Lost(error)),
        }
        if let Err(error) = self.done() {
            return finish_with(Ending::Lost(error));
        }
        (self.accept_pending, self.delayed_accept) = (false, None);
        self.kept.peer.sent();
        // Send at once. The next step sends the rest.
        if let Poll::Ready(Err(error)) = self.session.poll_flush(cx) {
            self.lost = Some(error);
        }
        CONTINUE
    }

    /// Moves one write or one frame from the tunnel to the application.
    fn step_down(&mut self, cx: &mut Context<'_>) -> Step {
        if self.both_ended() {
            return Poll::Pending;
        }
        if self.session.has_payload() {
            let mut slices = [IoSlice::new(&[]); FRAMES_MAX];
            let used = self.session.payloads(&mut slices);
            let write = if self.session.fin_follows() { socket::poll_write_last } else { socket::poll_write };
            let Poll::Ready(written) = write(self.app, cx, &slices[..used]) else {
                self.kept.down_stall.stalled(&self.kept.down_growth, || self.session.bound_unread());
                return Poll::Pending;
            };
            return match written {
                Ok(written_bytes) => {
                    self.session.consume(written_bytes);
                    self.down.fetch_add(written_bytes as u64, Relaxed);
                    CONTINUE
                }
                Err(_) => finish_with(Ending::ResetByApp),
            };
        }
        if let Some(byte) = self.kept.urgent {
            let Poll::Ready(written) = socket::poll_write_urgent(self.app, cx, byte) else {
                self.kept.down_stall.stalled(&self.kept.down_growth, || self.session.bound_unread());
                return Poll::Pending;
            };
            self.kept.urgent = None;
            self.down.fetch_add(1, Relaxed);
            return written.map_or_else(|_| finish_with(Ending::ResetByApp), |()| CONTINUE);
        }
        match ready!(self.session.poll_received(cx)) {
            Ok(Received::Data) => {
                // A bounded receive buffer may keep reads from ever being full.
                let is_bounded = self.kept.down_stall.is_bounded();
                if (self.session.is_receive_short() || is_bounded)
                    && self.kept.down_growth.ask(self.down.load(Relaxed)) == Grown::Now
                {
                    self.session.set_large_receives(true);
                    socket::limit_unsent(self.app, true);
                    if is_bounded {
                        self.session.widen_unread();
                    }
                }
                CONTINUE
            }
            Ok(Received::Control(Control::Fin)) => self.peer_fin(),
            Ok(Received::Control(Control::Urgent(byte))) => {
                self.kept.urgent = Some(byte);
                CONTINUE
            }
            // `flow_state` accepts only RESET here.
            Ok(Received::Control(_)) => finish_with(Ending::ResetByPeer),
            Err(error) => finish_with(Ending::Lost(error)),
        }
    }

    /// Gives back large buffers, which the session's next flow may not need, and bounds of this flow.
    fn shrink(&mut self) {
        if self.kept.up_growth.is_large() {
            self.session.set_large_sends(false);
        }
        if self.kept.down_growth.is_large() {
            self.session.set_large_receives(false);
        }
        if self.kept.down_stall.is_bounded() {
            self.session.unbound_unread();
        }
    }

    fn peer_fin(&mut self) -> Step {
        // If the application has ended too, closing the socket sends FIN.
        if !self.kept.app_ended && socket::finish(self.app).is_err() {
            return finish_with(Ending::ResetByApp);
        }
        self.kept.peer_ended = true;
        self.done().map_or_else(|error| finish_with(Ending::Lost(error)), |()| CONTINUE)
    }

    /// Queues DONE on a server after both directions have ended, directly behind its FIN if possible.
    fn done(&mut self) -> Result<(), TunnelError> {
        match self.session.role() {
            Role::Server if self.both_ended() => self.session.done(),
            _ => Ok(()),
        }
    }

    fn both_ended(&self) -> bool {
        self.kept.app_ended && self.kept.peer_ended
    }
}

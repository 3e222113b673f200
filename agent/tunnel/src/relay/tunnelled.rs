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
    time::Duration,
};

use tacit_core::wire::{flow_state::Role, frame::Control};
use tacit_kernel::socket::AppStream;
use tokio::{task::yield_now, time::timeout};

use super::{App, FlowEnd};
use crate::{
    Session, TunnelError,
    app_read::poll_app_read,
    batch::FRAMES_MAX,
    buffers::{Size, TRIM},
    receive_buffer::Received,
    relay::{
        FlowCounters, PodBulk,
        bulk::{Grown, Growth, Stall},
        busy_poll::BusyPoll,
        delayed_accept::DelayedAccept,
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
        // The futures after the flow are boxed, so a running flow reserves no space for them.
        match run(&app, &mut session, (counters, bulk), watching).await {
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

/// Runs the flow to its end.
async fn run(
    app: &AppStream,
    session: &mut Session,
    (counters, bulk): (&FlowCounters, &PodBulk),
    watching: Watching<'_>,
) -> Ending {
    let mut flow = Flow::new(app, session, counters, bulk, watching);
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
        if ending.is_pending() {
            busy_poll.pending(flow.up.load(Relaxed) + flow.down.load(Relaxed));
        }
        // After the application has ended its direction, reads no longer report a reset.
        if ending.is_pending() && flow.app_ended && watch_errors && broken.as_mut().poll(cx).is_ready() {
            watch_errors = false;
            if matches!(app.take_error(), Ok(Some(_)) | Err(_)) {
                return Poll::Ready(Ending::ResetByApp);
            }
        }
        if ending.is_pending() && flow.peer.poll(cx, flow.session.tcp(), app).is_ready() {
            return Poll::Ready(Ending::Silent);
        }
        ending
    })
    .await;
    if matches!(ending, Ending::Finished) {
        flow.peer.release(app);
    }
    flow.shrink();
    ending
}

/// Returns the session after all frames of the flow have arrived.
async fn reusable(mut session: Box<Session>) -> Option<Box<Session>> {
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

enum Ending {
    Finished,
    ResetByApp,
    ResetByPeer,
    Lost(TunnelError),
    Silent,
}

/// The result of one step of one direction. Pending if the direction is blocked.
type Step = Poll<ControlFlow<Ending>>;

const CONTINUE: Step = Poll::Ready(ControlFlow::Continue(()));

const fn finish_with(ending: Ending) -> Step {
    Poll::Ready(ControlFlow::Break(ending))
}

struct Flow<'a> {
    app: &'a AppStream,
    session: &'a mut Session,
    /// Bytes from the application into the tunnel.
    up: &'a AtomicU64,
    /// Bytes from the tunnel to the application.
    down: &'a AtomicU64,
    /// Size of the next read from the application.
    size: Size,
    up_growth: Growth<'a>,
    down_growth: Growth<'a>,
    down_stall: Stall,
    /// ACCEPT is queued and not sent yet, for a client that sends without waiting for it. The thread first runs its other tasks
    /// once, so that ACCEPT can leave with the application's first bytes.
    accept_pending: bool,
    /// A longer delay of ACCEPT, for clients that send without waiting for it. `None` after the application's first bytes.
    delayed_accept: Option<DelayedAccept>,
    /// FIN is queued or sent.
    app_ended: bool,
    /// FIN is written to the tunnel's socket.
    fin_sent: bool,
    /// A byte that was received as urgent data, and is not written yet.
    urgent: Option<u8>,
    /// FIN was received, and everything before it was written to the application.
    peer_ended: bool,
    /// The error after which nothing can be sent. Received bytes are still read, because a RESET in them is more specific.
    lost: Option<TunnelError>,
    peer: PeerWatch<'a>,
}

impl<'a> Flow<'a> {
    fn new(
        app: &'a AppStream,
        session: &'a mut Session,
        counters: &'a FlowCounters,
        bulk: &'a PodBulk,
        watching: Watching<'a>,
    ) -> Self {
        let (up, down) = match session.role() {
            Role::Client => (&counters.sent, &counters.received),
            Role::Server => (&counters.received, &counters.sent),
        };
        let (app_ended, accept_pending) = match session.role() {
            // The application may have ended before the answer. Unsent bytes are then payload and are not delayed.
            Role::Client => (session.client_ended(), false),
            Role::Server => (false, session.unsent() && session.accept_can_wait()),
        };
        let delayed_accept = accept_pending.then(DelayedAccept::new);
        Self {
            app,
            session,
            up,
            down,
            size: Size::default(),
            up_growth: Growth::new(bulk),
            down_growth: Growth::new(bulk),
            down_stall: Stall::default(),
            accept_pending,
            delayed_accept,
            app_ended,
            fin_sent: false,
            urgent: None,
            peer_ended: false,
            lost: None,
            peer: PeerWatch::new(Some(watching)),
        }
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
                    let complete = self.fin_sent && self.peer_ended;
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
        if self.app_ended {
            self.fin_sent = true;
            return Poll::Pending;
        }
        let Ok(read) = ready!(poll_app_read(self.app, cx, self.size)) else {
            return finish_with(Ending::ResetByApp);
        };
        let before = self.up.fetch_add(read.payload_bytes as u64, Relaxed);
        self.size = read.next;
        if read.next == Size::Large {
            match self.up_growth.ask(before) {
                Grown::Before => {}
                Grown::Now => self.session.set_large_sends(true),
                Grown::No => self.size = Size::Small,
            }
        }
        match self.session.send_app_read(read) {
            Ok(Ok(ends)) => self.app_ended = ends,
            Ok(Err(_)) => return finish_with(Ending::ResetByApp),
            Err(error) => return finish_with(Ending::Lost(error)),
        }
        if let Err(error) = self.done() {
            return finish_with(Ending::Lost(error));
        }
        (self.accept_pending, self.delayed_accept) = (false, None);
        self.peer.sent();
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
                self.down_stall.stalled(&self.down_growth, || self.session.bound_unread());
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
        if let Some(byte) = self.urgent {
            let Poll::Ready(written) = socket::poll_write_urgent(self.app, cx, byte) else {
                self.down_stall.stalled(&self.down_growth, || self.session.bound_unread());
                return Poll::Pending;
            };
            self.urgent = None;
            self.down.fetch_add(1, Relaxed);
            return written.map_or_else(|_| finish_with(Ending::ResetByApp), |()| CONTINUE);
        }
        match ready!(self.session.poll_received(cx)) {
            Ok(Received::Data) => {
                // A bounded receive buffer may keep reads from ever being full.
                let is_bounded = self.down_stall.is_bounded();
                if (self.session.is_receive_short() || is_bounded)
                    && self.down_growth.ask(self.down.load(Relaxed)) == Grown::Now
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
                self.urgent = Some(byte);
                CONTINUE
            }
            // `flow_state` accepts only RESET here.
            Ok(Received::Control(_)) => finish_with(Ending::ResetByPeer),
            Err(error) => finish_with(Ending::Lost(error)),
        }
    }

    /// Gives back large buffers, which the session's next flow may not need, and bounds of this flow.
    fn shrink(&mut self) {
        if self.up_growth.is_large() {
            self.session.set_large_sends(false);
        }
        if self.down_growth.is_large() {
            self.session.set_large_receives(false);
        }
        if self.down_stall.is_bounded() {
            self.session.unbound_unread();
        }
    }

    fn peer_fin(&mut self) -> Step {
        // If the application has ended too, closing the socket sends FIN.
        if !self.app_ended && socket::finish(self.app).is_err() {
            return finish_with(Ending::ResetByApp);
        }
        self.peer_ended = true;
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
        self.app_ended && self.peer_ended
    }
}

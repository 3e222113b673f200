//! An application's socket on one side, a tunnel session on the other.
//!
//! | what happens | what follows |
//! |---|---|
//! | application ends its direction | FIN frame |
//! | application resets, also after its end | RESET frame, session closed |
//! | FIN frame | our direction to the application ends |
//! | RESET frame, session broken or closed early | application reset, session closed |
//! | both FINs passed | DONE from the server; the session is free for the next flow |

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
use tokio::{io::Interest, net::TcpStream, task::yield_now, time::timeout};

use super::{App, FlowEnd};
use crate::{
    Session, TunnelError,
    app_read::poll_app_read,
    batch::FRAMES_MAX,
    buffers::{Size, TRIM},
    receive_buffer::Received,
    relay::{FlowCounters, busy_poll::BusyPoll, delayed_accept::DelayedAccept},
    socket,
};

/// How long a client waits for DONE before it gives up the session: a round trip if the destination reads what it got. Nobody
/// waits for this, so it is as long as costs least.
const DONE_MAX: Duration = TRIM.saturating_add(Duration::from_secs(1));
/// How long to try to get RESET out over a tunnel that is full. Closing the session then says the same.
const RESET_MAX: Duration = Duration::from_secs(5);

/// Moves bytes between `app`, which is reset when dropped, and the open flow of `session`. Returns the session if it can
/// carry another flow: a client may open, a server wait for the next.
#[expect(clippy::manual_async_fn, reason = "an async fn keeps its arguments twice, and idle flows are many")]
pub fn tunnelled(
    app: TcpStream,
    mut session: Box<Session>,
    counters: &FlowCounters,
) -> impl Future<Output = (FlowEnd, Option<Box<Session>>)> + Send {
    async move {
        let (ours, theirs) = match session.role() {
            Role::Client => (App::Source, App::Destination),
            Role::Server => (App::Destination, App::Source),
        };
        // What may come behind the flow is boxed: it keeps no room for that.
        match run(&app, &mut session, counters).await {
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
        }
    }
}

/// Runs the flow to its end.
async fn run(app: &TcpStream, session: &mut Session, counters: &FlowCounters) -> Ending {
    let mut flow = Flow::new(app, session, counters);
    let mut broken = pin!(app.ready(Interest::ERROR));
    let mut others = pin!(yield_now());
    let (mut watched, mut busy) = (true, BusyPoll::new());
    poll_fn(|cx| {
        let mut ending = flow.poll(cx);
        if ending.is_pending() && flow.holds_answer {
            match &mut flow.held {
                Some(held) if held.is_crowded() => ready!(held.poll(cx)),
                _ => ready!(others.as_mut().poll(cx)),
            }
            flow.holds_answer = false;
            ending = flow.poll(cx);
        }
        if ending.is_pending() {
            busy.pending(flow.up.load(Relaxed) + flow.down.load(Relaxed));
        }
        // Once the application has ended its direction, reads no longer show that it resets.
        if ending.is_pending() && flow.app_ended && watched && broken.as_mut().poll(cx).is_ready() {
            watched = false;
            if matches!(app.take_error(), Ok(Some(_)) | Err(_)) {
                return Poll::Ready(Ending::ResetByApp);
            }
        }
        ending
    })
    .await
}

/// The session, once nothing of the flow is left in it.
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
        // Whether it got out or not, the session closes now, and the peer takes a closed one for a reset.
        let _ = timeout(RESET_MAX, poll_fn(|cx| session.poll_flush(cx))).await;
    }
    session.close();
}

enum Ending {
    Finished,
    ResetByApp,
    ResetByPeer,
    Lost(TunnelError),
}

/// One step of one direction: pending when it can do nothing now.
type Step = Poll<ControlFlow<Ending>>;

const GO_ON: Step = Poll::Ready(ControlFlow::Continue(()));

const fn end(ending: Ending) -> Step {
    Poll::Ready(ControlFlow::Break(ending))
}

struct Flow<'a> {
    app: &'a TcpStream,
    session: &'a mut Session,
    /// Bytes from the application into the tunnel.
    up: &'a AtomicU64,
    /// Bytes from the tunnel to the application.
    down: &'a AtomicU64,
    /// How much to read from the application at once.
    size: Size,
    /// ACCEPT waits for the application's first bytes, to leave with them: at least while the thread sees to its other flows
    /// once.
    holds_answer: bool,
    /// And it may wait longer, as the client does not. Until the application has spoken.
    held: Option<DelayedAccept>,
    /// FIN is queued or sent.
    app_ended: bool,
    /// FIN has left this node for sure.
    end_sent: bool,
    /// FIN has come, and all before it has reached the application.
    peer_ended: bool,
    /// Why nothing can be sent any more. What has been received may still say RESET, which tells more.
    lost: Option<TunnelError>,
}

impl<'a> Flow<'a> {
    fn new(app: &'a TcpStream, session: &'a mut Session, counters: &'a FlowCounters) -> Self {
        let (up, down) = match session.role() {
            Role::Client => (&counters.sent, &counters.received),
            Role::Server => (&counters.received, &counters.sent),
        };
        let (app_ended, holds_answer) = match session.role() {
            // It may have ended ahead of the answer. What is unsent then are bytes of it, which wait for nothing.
            Role::Client => (session.client_ended(), false),
            Role::Server => (false, session.unsent()),
        };
        let held = (holds_answer && session.answer_can_wait()).then(DelayedAccept::new);
        Self {
            app,
            session,
            up,
            down,
            size: Size::default(),
            holds_answer,
            held,
            app_ended,
            end_sent: false,
            peer_ended: false,
            lost: None,
        }
    }

    /// Steps both directions by turns, so that neither starves the other, until neither can go on. One that waits for its
    /// socket has told the poller, and is not asked again meanwhile.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ending> {
        let (mut down_waits, mut up_waits) = (false, false);
        loop {
            // Down first: what came with OPEN reaches a server's application before ACCEPT leaves.
            if !down_waits {
                match self.step_down(cx) {
                    Poll::Ready(ControlFlow::Break(ending)) => return Poll::Ready(ending),
                    Poll::Ready(ControlFlow::Continue(())) => {}
                    Poll::Pending => down_waits = true,
                }
                // DONE, or new keys that the peer asked for.
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
                    // A client may go without waiting for DONE.
                    let complete = self.end_sent && self.peer_ended;
                    return Poll::Ready(if complete { Ending::Finished } else { Ending::Lost(error) });
                }
                if up_waits {
                    return Poll::Pending;
                }
            }
        }
    }

    /// Application to tunnel: one batch.
    fn step_up(&mut self, cx: &mut Context<'_>) -> Step {
        if self.lost.is_some() {
            return Poll::Pending;
        }
        if !self.holds_answer
            && let Err(error) = ready!(self.session.poll_flush(cx))
        {
            self.lost = Some(error);
            return GO_ON;
        }
        if self.app_ended {
            self.end_sent = true;
            return Poll::Pending;
        }
        let Ok(read) = ready!(poll_app_read(self.app, cx, self.size)) else { return end(Ending::ResetByApp) };
        self.up.fetch_add(read.payload_bytes as u64, Relaxed);
        self.size = read.next;
        match self.session.send_app_read(read) {
            Ok(Ok(ends)) => self.app_ended = ends,
            Ok(Err(_)) => return end(Ending::ResetByApp),
            Err(error) => return end(Ending::Lost(error)),
        }
        if let Err(error) = self.done() {
            return end(Ending::Lost(error));
        }
        (self.holds_answer, self.held) = (false, None);
        // At once; what does not fit now goes with the next step.
        if let Poll::Ready(Err(error)) = self.session.poll_flush(cx) {
            self.lost = Some(error);
        }
        GO_ON
    }

    /// Tunnel to application: one write, or one frame.
    fn step_down(&mut self, cx: &mut Context<'_>) -> Step {
        if self.both_ended() {
            return Poll::Pending;
        }
        if self.session.has_payload() {
            let mut slices = [IoSlice::new(&[]); FRAMES_MAX];
            let used = self.session.payloads(&mut slices);
            let write = if self.session.ends_behind() { socket::poll_write_last } else { socket::poll_write };
            return match ready!(write(self.app, cx, &slices[..used])) {
                Ok(written_bytes) => {
                    self.session.consume(written_bytes);
                    self.down.fetch_add(written_bytes as u64, Relaxed);
                    GO_ON
                }
                Err(_) => end(Ending::ResetByApp),
            };
        }
        match ready!(self.session.poll_received(cx)) {
            Ok(Received::Data) => GO_ON,
            Ok(Received::Control(Control::Fin)) => self.peer_fin(),
            // Of the others, `flow_state` lets only RESET come here.
            Ok(Received::Control(_)) => end(Ending::ResetByPeer),
            Err(error) => end(Ending::Lost(error)),
        }
    }

    fn peer_fin(&mut self) -> Step {
        // When the application has ended too, closing says the same.
        if !self.app_ended && socket::finish(self.app).is_err() {
            return end(Ending::ResetByApp);
        }
        self.peer_ended = true;
        self.done().map_or_else(|error| end(Ending::Lost(error)), |()| GO_ON)
    }

    /// The server says DONE as soon as both directions have ended, if it can behind its FIN.
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

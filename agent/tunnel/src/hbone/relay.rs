//! Relay between an application's socket and a stream: see the table of ends in `hbone`.
//!
//! Bytes are read from the application only when the stream and its connection have room for them, and room is asked for only when
//! there are bytes, since the window of the connection is shared. Received bytes leave the window when the application's socket has
//! them.

use std::{
    future::{Future, poll_fn},
    io::{IoSlice, IoSliceMut},
    pin::pin,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    task::{Context, Poll, ready},
};

use h2::Reason;
use tacit_core::wire::Role;
use tacit_kernel::socket::{AppStream, Polled as _};

use super::{FlowStream, UNSENT_PIECES_MAX};
use crate::{
    TunnelError,
    buffers::{Buffer, Size},
    relay::{App, Ending, FlowCounters, FlowEnd, PeerWatch, Watching},
    socket,
};

/// Forwards bytes between `app`, which is reset when dropped, and `stream`. `role` is that of this agent. `watching` is the watch of
/// the connection's peer.
pub async fn relay(
    app: AppStream,
    mut stream: FlowStream,
    role: Role,
    counters: &FlowCounters,
    watching: Watching<'_>,
) -> FlowEnd {
    let (ours, theirs, reset) = match role {
        Role::Client => (App::Source, App::Destination, Reason::CANCEL),
        Role::Server => (App::Destination, App::Source, Reason::CONNECT_ERROR),
    };
    match run(&app, &mut stream, ours, counters, watching).await {
        Ending::Finished => {
            socket::deliver_if_dropped(&app);
            FlowEnd::Clean
        }
        Ending::ResetByApp => {
            socket::reset(app);
            stream.send.send_reset(reset);
            FlowEnd::Reset(ours)
        }
        Ending::ResetByPeer => {
            socket::reset(app);
            FlowEnd::Reset(theirs)
        }
        Ending::Lost(error) => {
            socket::reset(app);
            FlowEnd::TunnelLost(error)
        }
        Ending::Silent => {
            socket::reset(app);
            stream.send.send_reset(Reason::CANCEL);
            FlowEnd::PeerSilent
        }
    }
}

impl From<h2::Error> for Ending {
    fn from(error: h2::Error) -> Self {
        if error.is_reset() && error.is_remote() { Self::ResetByPeer } else { Self::Lost(error.into()) }
    }
}

async fn run(
    app: &AppStream,
    stream: &mut FlowStream,
    ours: App,
    counters: &FlowCounters,
    watching: Watching<'_>,
) -> Ending {
    let (sent, received) = match ours {
        App::Source => (&counters.sent, &counters.received),
        App::Destination => (&counters.received, &counters.sent),
    };
    let peer = stream.peer.clone();
    let mut watch = PeerWatch::new(Some(watching));
    let mut broken = pin!(app.broken());
    let mut is_error_checked = false;
    let mut flow = Flow {
        app,
        stream,
        sent,
        received,
        to_app_ended: false,
        from_app_ended: false,
        waits_for_room: false,
        seen_bytes: 0,
    };
    let ending = poll_fn(|cx| {
        if let Poll::Ready(ending) = flow.poll_both(cx) {
            return Poll::Ready(ending);
        }
        // After its end, and while it is not read, the application's reads report no reset.
        let is_read = !flow.from_app_ended && !flow.waits_for_room;
        if !is_read && !is_error_checked && broken.as_mut().poll(cx).is_ready() {
            is_error_checked = true;
            if matches!(app.take_error(), Ok(Some(_)) | Err(_)) {
                return Poll::Ready(Ending::ResetByApp);
            }
        }
        if flow.has_sent() {
            watch.sent();
        }
        watch.poll(cx, peer.socket(), app).map(|()| Ending::Silent)
    })
    .await;
    if matches!(ending, Ending::Finished) {
        watch.release(app);
    }
    ending
}

/// Both directions of a flow.
struct Flow<'a> {
    app: &'a AppStream,
    stream: &'a mut FlowStream,
    /// Bytes from the application.
    sent: &'a AtomicU64,
    /// Bytes to the application.
    received: &'a AtomicU64,
    to_app_ended: bool,
    from_app_ended: bool,
    /// The stream takes no more bytes of the application for now.
    waits_for_room: bool,
    seen_bytes: u64,
}

impl Flow<'_> {
    /// Steps both directions in alternation until both are blocked.
    fn poll_both(&mut self, cx: &mut Context<'_>) -> Poll<Ending> {
        loop {
            let steps = [self.write_to_app(cx), self.read_from_app(cx)];
            let is_blocked = steps.iter().all(Poll::is_pending);
            for step in steps {
                if let Poll::Ready(Err(ending)) = step {
                    return Poll::Ready(ending);
                }
            }
            if self.to_app_ended && self.from_app_ended {
                // What is left is lost with the stream or its connection.
                if let Poll::Ready(lost) = self.stream.send.poll_reset(cx) {
                    return Poll::Ready(lost.map_or_else(Ending::from, |_| Ending::ResetByPeer));
                }
                return self.stream.unsent.poll_at_most(0, cx).map(|()| Ending::Finished);
            }
            if is_blocked {
                return self.poll_reset(cx);
            }
        }
    }

    /// Ready if the peer has reset the stream after its end. Before it, the stream's bytes end with the reset.
    fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<Ending> {
        if !self.stream.received.has_ended() || self.from_app_ended {
            return Poll::Pending;
        }
        self.stream.send.poll_reset(cx).map(|reset| reset.map_or_else(Ending::from, |_| Ending::ResetByPeer))
    }

    /// Writes once what the peer has sent.
    fn write_to_app(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Ending>> {
        if self.to_app_ended {
            return Poll::Pending;
        }
        let failed = self.stream.received.take(cx).is_err();
        if !self.stream.received.is_empty() {
            let bytes = [IoSlice::new(self.stream.received.bytes())];
            match socket::poll_write(self.app, cx, &bytes) {
                Poll::Ready(Ok(written_bytes)) => {
                    self.received.fetch_add(written_bytes as u64, Relaxed);
                    self.stream.received.consume(written_bytes);
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Err(_)) => return Poll::Ready(Err(Ending::ResetByApp)),
                // What the application does not take at once is lost with the flow.
                Poll::Pending if !failed => return Poll::Pending,
                Poll::Pending => {}
            }
        }
        if failed {
            let error = self.stream.received.error();
            return Poll::Ready(Err(error.map_or(Ending::Lost(TunnelError::Closed), Ending::from)));
        }
        if !self.stream.received.has_ended() {
            return Poll::Pending;
        }
        self.to_app_ended = true;
        Poll::Ready(socket::finish(self.app).map_err(|_| Ending::ResetByApp))
    }

    /// Reads once what the application has sent.
    fn read_from_app(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Ending>> {
        if self.from_app_ended {
            return Poll::Pending;
        }
        loop {
            if ready!(self.app.poll_read_ready(cx)).is_err() {
                return Poll::Ready(Err(Ending::ResetByApp));
            }
            self.waits_for_room = true;
            ready!(self.stream.unsent.poll_at_most(UNSENT_PIECES_MAX - 1, cx));
            let mut buffer = Buffer::take(Size::Small);
            let room = ready!(self.poll_room(cx, buffer.len()))?;
            self.waits_for_room = false;
            let read = socket::try_read_app(self.app, &mut [IoSliceMut::new(&mut buffer[..room])]);
            let Some(read) = read else {
                self.stream.send.reserve_capacity(0);
                continue;
            };
            let Ok(read) = read else { return Poll::Ready(Err(Ending::ResetByApp)) };
            self.from_app_ended = read.count == 0;
            let bytes = self.stream.unsent.piece(&buffer[..read.count]);
            let queued = self.stream.send.send_data(bytes, self.from_app_ended);
            if !self.from_app_ended {
                // The rest of the room is left to other streams.
                self.stream.send.reserve_capacity(0);
            }
            self.sent.fetch_add(read.count as u64, Relaxed);
            return Poll::Ready(queued.map_err(Ending::from));
        }
    }

    /// Returns the bytes that the stream has room for, at most `wanted`.
    fn poll_room(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<Result<usize, Ending>> {
        let send = &mut self.stream.send;
        send.reserve_capacity(wanted);
        match ready!(send.poll_capacity(cx)) {
            Some(Ok(room)) => Poll::Ready(Ok(room.min(wanted))),
            Some(Err(error)) => Poll::Ready(Err(error.into())),
            None => Poll::Ready(Err(match send.poll_reset(cx) {
                Poll::Ready(Ok(_)) => Ending::ResetByPeer,
                Poll::Ready(Err(error)) => error.into(),
                Poll::Pending => Ending::Lost(TunnelError::Closed),
            })),
        }
    }

    /// Returns true if bytes of the application were sent since the last call.
    fn has_sent(&mut self) -> bool {
        let sent_bytes = self.sent.load(Relaxed);
        std::mem::replace(&mut self.seen_bytes, sent_bytes) != sent_bytes
    }
}

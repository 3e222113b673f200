//! Two sockets: flows within a node, and flows in clear where policy allows them.

use std::{
    future::{Future, poll_fn},
    io::{IoSlice, IoSliceMut},
    ops::ControlFlow,
    pin::pin,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    task::{Context, Poll, ready},
};

use tokio::{io::Interest, net::TcpStream};

use super::{FlowEnd, Party};
use crate::{
    telemetry::flows::FlowCounters,
    tunnel::{buffers::Buffer, socket},
};

/// Moves bytes between `source`, which connected, and `destination`.
pub async fn plain(source: TcpStream, destination: TcpStream, counters: &FlowCounters) -> FlowEnd {
    match run(&source, &destination, counters).await {
        None => FlowEnd::Clean,
        Some(party) => {
            socket::reset(source);
            socket::reset(destination);
            FlowEnd::Reset(party)
        }
    }
}

/// Runs both directions to their ends; the party that reset, if one did.
async fn run(source: &TcpStream, destination: &TcpStream, counters: &FlowCounters) -> Option<Party> {
    let mut there = Half::new(source, destination, Party::Source, &counters.sent);
    let mut back = Half::new(destination, source, Party::Destination, &counters.received);
    let mut source_broken = pin!(source.ready(Interest::ERROR));
    let mut destination_broken = pin!(destination.ready(Interest::ERROR));
    poll_fn(|cx| {
        if let Poll::Ready(ending) = poll_both(&mut there, &mut back, cx) {
            return Poll::Ready(ending);
        }
        // Once a party has ended its direction, reads no longer show that it resets.
        for (half, broken) in [
            (&mut there, &mut source_broken),
            (&mut back, &mut destination_broken),
        ] {
            if half.ended && !half.looked && broken.as_mut().poll(cx).is_ready() {
                half.looked = true;
                if matches!(half.from.take_error(), Ok(Some(_)) | Err(_)) {
                    return Poll::Ready(Some(half.party));
                }
            }
        }
        Poll::Pending
    })
    .await
}

/// Steps both directions by turns until neither can go on.
fn poll_both(there: &mut Half<'_>, back: &mut Half<'_>, cx: &mut Context<'_>) -> Poll<Option<Party>> {
    loop {
        let steps = [there.step(cx), back.step(cx)];
        for step in &steps {
            if let Poll::Ready(ControlFlow::Break(party)) = step {
                return Poll::Ready(Some(*party));
            }
        }
        if there.ended && back.ended {
            return Poll::Ready(None);
        }
        if steps.iter().all(Poll::is_pending) {
            return Poll::Pending;
        }
    }
}

/// One direction.
struct Half<'a> {
    from: &'a TcpStream,
    to: &'a TcpStream,
    /// The application behind `from`.
    party: Party,
    counter: &'a AtomicU64,
    /// What was read and not yet written.
    held: Option<(Buffer, usize, usize)>,
    /// The end of `from` was passed on.
    ended: bool,
    /// The error readiness of `from` was used up.
    looked: bool,
}

impl<'a> Half<'a> {
    fn new(from: &'a TcpStream, to: &'a TcpStream, party: Party, counter: &'a AtomicU64) -> Self {
        Self {
            from,
            to,
            party,
            counter,
            held: None,
            ended: false,
            looked: false,
        }
    }

    /// One read or one write; `Break` with the party that reset.
    fn step(&mut self, cx: &mut Context<'_>) -> Poll<ControlFlow<Party>> {
        if self.ended {
            return Poll::Pending;
        }
        let moved = if self.held.is_some() {
            ready!(self.write(cx))
        } else {
            ready!(self.read(cx))
        };
        Poll::Ready(moved.map_or_else(ControlFlow::Break, ControlFlow::Continue))
    }

    fn read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Party>> {
        // Before a buffer is taken.
        let _ = ready!(self.from.poll_read_ready(cx));
        let mut buffer = Buffer::take();
        Poll::Ready(
            match ready!(socket::poll_read(
                self.from,
                cx,
                &mut [IoSliceMut::new(&mut buffer)]
            )) {
                Ok(0) => {
                    self.ended = true;
                    socket::finish(self.to).map_err(|_| self.other())
                }
                Ok(read_bytes) => {
                    self.held = Some((buffer, 0, read_bytes));
                    Ok(())
                }
                Err(_) => Err(self.party),
            },
        )
    }

    fn write(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Party>> {
        let Some((buffer, start, end)) = &mut self.held else {
            return Poll::Ready(Ok(()));
        };
        let Ok(written_bytes) = ready!(socket::poll_write(
            self.to,
            cx,
            &[IoSlice::new(&buffer[*start..*end])]
        )) else {
            return Poll::Ready(Err(self.other()));
        };
        self.counter.fetch_add(written_bytes as u64, Relaxed);
        *start += written_bytes;
        if start == end {
            self.held = None;
        }
        Poll::Ready(Ok(()))
    }

    /// The application behind `to`.
    fn other(&self) -> Party {
        match self.party {
            Party::Source => Party::Destination,
            Party::Destination => Party::Source,
        }
    }
}

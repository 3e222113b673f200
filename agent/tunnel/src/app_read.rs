//! What an application says: its bytes in batches, and its end.

use std::{
    io::{self, IoSliceMut},
    task::{Context, Poll, ready},
};

use tokio::net::TcpStream;

use super::{
    batch::{FRAMES_MAX, payload_slots},
    buffers::{Buffer, Size},
    socket,
};

/// What was read at once.
pub(crate) struct AppRead {
    /// Payload in its slots.
    pub batch: Buffer,
    /// How much; 0 when there is only the end.
    pub payload_bytes: usize,
    /// How much to read next time.
    pub next: Size,
    /// Whether that was all. An end that is known by now goes with the last bytes; a reset keeps its place behind them.
    pub ends: io::Result<bool>,
}

/// Reads what there is, at most `size`.
///
/// # Errors
/// When the connection was reset, and nothing was read before.
pub(crate) fn poll_app_read(app: &TcpStream, cx: &mut Context<'_>, size: Size) -> Poll<io::Result<AppRead>> {
    loop {
        // Before a buffer is taken.
        ready!(app.poll_read_ready(cx))?;
        let mut batch = Buffer::take(size);
        let (mut slots, room_bytes) = slots(&mut batch, size);
        if let Some(outcome) = socket::try_read(app, &mut slots) {
            let payload_bytes = outcome?;
            let next = size.after(payload_bytes, room_bytes);
            return Poll::Ready(Ok(app_read(app, batch, payload_bytes, next, room_bytes)));
        }
    }
}

/// What `app` has said already. Does not ask the poller, which may not have looked yet; `None` also for an end or a reset
/// without bytes, which are to be found later.
pub(crate) fn app_read_now(app: &TcpStream) -> Option<AppRead> {
    let size = Size::default();
    let mut batch = Buffer::take(size);
    let (mut slots, room_bytes) = slots(&mut batch, size);
    match socket::read_now(app, &mut slots) {
        0 => None,
        payload_bytes => {
            let next = size.after(payload_bytes, room_bytes);
            Some(app_read(app, batch, payload_bytes, next, room_bytes))
        }
    }
}

/// Where a read of `size` goes, and its bytes. A large one may have been given a small buffer.
fn slots(batch: &mut Buffer, size: Size) -> ([IoSliceMut<'_>; FRAMES_MAX], usize) {
    let shown_bytes = size.bytes().min(batch.len());
    payload_slots(&mut batch[..shown_bytes])
}

fn app_read(app: &TcpStream, batch: Buffer, payload_bytes: usize, next: Size, room_bytes: usize) -> AppRead {
    let ends = match payload_bytes {
        0 => Ok(true),
        // The end can only be known once everything before it is read.
        _ if payload_bytes == room_bytes => Ok(false),
        _ => socket::is_at_end(app),
    };
    AppRead { batch, payload_bytes, next, ends }
}

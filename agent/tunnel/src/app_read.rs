//! Reads an application's socket in batches, together with the end of the stream.

use std::{
    io::{self, IoSliceMut},
    task::{Context, Poll, ready},
};

use tacit_kernel::socket::{AppStream, Polled as _};

use super::{
    batch::{FRAMES_MAX, payload_slots},
    buffers::{Buffer, Size},
    socket::{self, ReadBytes},
};

/// The result of one read.
pub(crate) struct AppRead {
    /// Payload in its slots.
    pub batch: Buffer,
    /// Number of payload bytes; 0 if the stream ended without more bytes.
    pub payload_bytes: usize,
    /// True for one byte that the application sent as urgent data.
    pub is_urgent: bool,
    /// Size of the next read.
    pub next: Size,
    /// True if the stream has ended. An end that is already known is sent with the last bytes. A reset is reported after them.
    pub ends: io::Result<bool>,
}

/// Reads the available bytes, at most `size`.
///
/// # Errors
/// If the connection was reset before any byte was read.
pub(crate) fn poll_app_read(app: &AppStream, cx: &mut Context<'_>, size: Size) -> Poll<io::Result<AppRead>> {
    loop {
        // An idle flow takes no buffer.
        ready!(app.poll_read_ready(cx))?;
        let mut batch = Buffer::take(size);
        let (mut slots, room_bytes) = slots(&mut batch, size);
        if let Some(outcome) = socket::try_read_app(app, &mut slots) {
            return Poll::Ready(Ok(app_read(app, batch, outcome?, (size, room_bytes))));
        }
    }
}

/// Reads the bytes that `app` has already sent, without asking the poller, which may lag behind the socket. Returns `None`
/// if there are none. An end or a reset without bytes also returns `None` and is found by a later read. An urgent byte that comes
/// first is taken for any other.
pub(crate) fn app_read_now(app: &AppStream) -> Option<AppRead> {
    let size = Size::default();
    let mut batch = Buffer::take(size);
    let (mut slots, room_bytes) = slots(&mut batch, size);
    match socket::read_now(app, &mut slots) {
        0 => None,
        count => Some(app_read(app, batch, ReadBytes { count, is_urgent: false }, (size, room_bytes))),
    }
}

/// Returns the slots for a read of `size` and their total bytes. A large read may have been given a small buffer.
fn slots(batch: &mut Buffer, size: Size) -> ([IoSliceMut<'_>; FRAMES_MAX], usize) {
    let shown_bytes = size.bytes().min(batch.len());
    payload_slots(&mut batch[..shown_bytes])
}

fn app_read(app: &AppStream, batch: Buffer, read: ReadBytes, (size, room_bytes): (Size, usize)) -> AppRead {
    let ReadBytes { count: payload_bytes, is_urgent } = read;
    let next = if is_urgent { size } else { size.after(payload_bytes, room_bytes) };
    let ends = match payload_bytes {
        0 => Ok(true),
        // The end is visible only after everything before it is read.
        _ if payload_bytes == room_bytes => Ok(false),
        _ => socket::is_at_end(app),
    };
    AppRead { batch, payload_bytes, is_urgent, next, ends }
}

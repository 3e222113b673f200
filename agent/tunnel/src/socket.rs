//! TCP socket operations of tunnel and relay. Scattered reads and gathered writes are polled through a shared reference, so
//! that one task moves both directions. A connection ends with FIN or RST.

use std::{
    io::{self, IoSlice, IoSliceMut, Read},
    mem::MaybeUninit,
    net::Shutdown,
    os::fd::AsFd,
    task::{Context, Poll, ready},
    time::Duration,
};

use socket2::SockRef;
use tacit_core::shares::UNREAD_BYTES_MAX;
use tacit_kernel::socket::{
    AppStream, Polled, bound_unread_bytes, limit_unsent_bytes, send, send_urgent, unbound_unread_bytes,
    widen_unread_bytes,
};
use tokio::io::Interest;

/// Unsent bytes of a tunnel's socket, unless it carries bulk. Two batches of a flow that is not bulk: the next one is sealed while
/// the first is sent.
const UNSENT_MAX_BYTES: u32 = 128 << 10;

/// Bytes that an application has sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReadBytes {
    /// Number of bytes; 0 is the end of the stream.
    pub count: usize,
    /// True for one byte that the application sent as urgent data.
    pub is_urgent: bool,
}

/// Reads the available bytes of an application into `slices`, in order, after the poller has reported readiness. Returns `None`
/// if nothing is there. An urgent byte is read by itself.
pub(crate) fn try_read_app(app: &AppStream, slices: &mut [IoSliceMut<'_>]) -> Option<io::Result<ReadBytes>> {
    let count = if app.has_urgent() {
        match app.is_at_urgent() {
            Ok(true) => return try_read_urgent(app, slices),
            // A read ends before the urgent byte, so a short one has not emptied the socket.
            Ok(false) => try_read_available(app, slices),
            Err(error) => Some(Err(error)),
        }
    } else {
        try_read(app, slices)
    };
    count.map(|count| count.map(|count| ReadBytes { count, is_urgent: false }))
}

fn try_read_urgent(app: &AppStream, slices: &mut [IoSliceMut<'_>]) -> Option<io::Result<ReadBytes>> {
    let first = slices.first_mut()?.get_mut(..1)?;
    let read = try_read_available(app, &mut [IoSliceMut::new(first)])?;
    if matches!(read, Ok(1)) {
        app.forget_urgent();
    }
    Some(read.map(|count| ReadBytes { count, is_urgent: count == 1 }))
}

/// Reads once, and looks again later unless the kernel says that nothing is left.
fn try_read_available(app: &AppStream, slices: &mut [IoSliceMut<'_>]) -> Option<io::Result<usize>> {
    match app.try_io(Interest::READABLE, || read_into(app, used(slices))) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        outcome => Some(outcome),
    }
}

/// Reads the available bytes into `slices`, in order, after the poller has reported readiness. `Ok(0)` is the end of the stream.
/// Returns `None` if nothing is there. The stream has no urgent data, as far as the poller has reported.
pub(crate) fn try_read(tcp: &impl Polled, slices: &mut [IoSliceMut<'_>]) -> Option<io::Result<usize>> {
    let slices = used(slices);
    let room: usize = slices.iter().map(|slice| slice.len()).sum();
    let mut read = None;
    let outcome = tcp.try_io(Interest::READABLE, || {
        let read_bytes = read_into(tcp, slices)?;
        read = Some(read_bytes);
        // A short read has emptied the socket (epoll(7), "Questions and answers", 9), or has ended before an urgent byte that came
        // since the poller reported, and reports again. Returning WouldBlock saves the next read. tokio keeps an end of stream or a reset behind the bytes as "closed".
        if read_bytes > 0 && read_bytes < room { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    });
    match (read, outcome) {
        (Some(read_bytes), _) => Some(Ok(read_bytes)),
        (None, Err(e)) if e.kind() == io::ErrorKind::WouldBlock => None,
        (None, outcome) => Some(outcome.map(|()| 0)),
    }
}

/// Returns the slices that are not empty. For more than eight slices the kernel allocates memory on each call.
fn used<'s, 'b>(slices: &'s mut [IoSliceMut<'b>]) -> &'s mut [IoSliceMut<'b>] {
    let used = slices.iter().take_while(|slice| !slice.is_empty()).count();
    &mut slices[..used]
}

/// Reads the available bytes without waiting and without asking the poller, which may lag behind the socket. Returns 0 if
/// there are none. An end or an error also returns 0 and is found by a later read.
pub(crate) fn read_now(tcp: &impl AsFd, slices: &mut [IoSliceMut<'_>]) -> usize {
    read_into(tcp, slices).unwrap_or(0)
}

/// Makes one system call. The call for one slice is cheaper, because the kernel copies no list of slices.
fn read_into(tcp: &impl AsFd, slices: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
    let socket = SockRef::from(tcp);
    match slices {
        [slice] => (&*socket).read(slice),
        _ => (&*socket).read_vectored(slices),
    }
}

/// Returns true if the peer has ended its direction and no bytes are left. Makes a system call only if the poller has
/// reported an end.
///
/// # Errors
/// If the connection was reset. The kernel reports a reset once, and a later read would return an end of stream.
pub(crate) fn is_at_end(tcp: &impl Polled) -> io::Result<bool> {
    if !tcp.reported(Interest::READABLE).is_read_closed() {
        return Ok(false);
    }
    match SockRef::from(tcp).peek(&mut [MaybeUninit::uninit()]) {
        Ok(peeked_bytes) => Ok(peeked_bytes == 0),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(e) => Err(e),
    }
}

/// Writes as much of `slices` as fits.
pub(crate) fn poll_write(
    tcp: &impl Polled,
    cx: &mut Context<'_>,
    slices: &[IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    poll_send(tcp, cx, slices, false)
}

/// As [`poll_write`], for the last bytes before [`finish`]. The bytes leave with FIN in one segment.
pub(crate) fn poll_write_last(
    tcp: &impl Polled,
    cx: &mut Context<'_>,
    slices: &[IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    poll_send(tcp, cx, slices, true)
}

fn poll_send(
    tcp: &impl Polled,
    cx: &mut Context<'_>,
    slices: &[IoSlice<'_>],
    more: bool,
) -> Poll<io::Result<usize>> {
    let socket = SockRef::from(tcp);
    loop {
        ready!(tcp.poll_write_ready(cx))?;
        match tcp.try_io(Interest::WRITABLE, || send(&socket, slices, more)) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            outcome => return Poll::Ready(outcome),
        }
    }
}

/// Sends one byte as urgent data.
pub(crate) fn poll_write_urgent(app: &AppStream, cx: &mut Context<'_>, byte: u8) -> Poll<io::Result<()>> {
    loop {
        ready!(app.poll_write_ready(cx))?;
        match app.try_io(Interest::WRITABLE, || send_urgent(app, byte)) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            outcome => return Poll::Ready(outcome),
        }
    }
}

/// Has the kernel keep few unsent bytes of a connection outside loopback, until it carries bulk. `unread_bytes` bounds the bytes
/// for the reader too, for the rest of the connection: the kernel grows no buffer whose size was set.
pub fn begin_small(tcp: &impl AsFd, unread_bytes: Option<u32>) {
    limit_unsent(tcp, false);
    if let Some(bytes) = unread_bytes {
        // An error leaves the buffer to the kernel, which grows it with the rate of reading.
        let _ = SockRef::from(tcp).set_recv_buffer_size(bytes as usize);
    }
}

/// Bounds the bytes that the kernel keeps unsent, beside those in flight, or leaves them to the kernel for bulk.
pub(crate) fn limit_unsent(tcp: &impl AsFd, is_bulk: bool) {
    // An error leaves the kernel's own bounds.
    let _ = limit_unsent_bytes(tcp, (!is_bulk).then_some(UNSENT_MAX_BYTES));
}

/// Bounds the bytes that the kernel keeps for the reader, because the other end of the flow does not take what was read. Returns
/// true unless they have a bound already.
pub(crate) fn bound_unread(tcp: &impl AsFd) -> bool {
    // An error leaves the buffer to the kernel.
    bound_unread_bytes(tcp, UNREAD_BYTES_MAX).unwrap_or(false)
}

/// Ends what [`bound_unread`] has set, for bulk.
pub(crate) fn widen_unread(tcp: &impl AsFd) {
    // An error leaves the small buffer.
    let _ = widen_unread_bytes(tcp);
}

/// Ends what [`bound_unread`] or [`widen_unread`] has set, for the next flow.
pub(crate) fn unbound_unread(tcp: &impl AsFd) {
    // As above.
    let _ = unbound_unread_bytes(tcp);
}

/// Ends the local direction. The peer reads the end of the stream after all written bytes.
pub(crate) fn finish(tcp: &impl AsFd) -> io::Result<()> {
    SockRef::from(tcp).shutdown(Shutdown::Write)
}

/// Ends the connection with RST. Unsent bytes are lost.
pub fn reset(tcp: impl AsFd) {
    // Fails only if the connection is already closed.
    let _ = SockRef::from(&tcp).set_linger(Some(Duration::ZERO));
}

/// Makes this connection end with RST however it is closed, for example on an early return, a dropped task or a crash.
/// Otherwise the kernel would send FIN, and a truncated flow would look complete. Accepted connections inherit this setting
/// from their listener.
pub fn reset_if_dropped(tcp: &impl AsFd) {
    // Fails only if the connection is already closed.
    let _ = SockRef::from(tcp).set_linger(Some(Duration::ZERO));
}

/// Reverts [`reset_if_dropped`] after all bytes are forwarded, so that the kernel delivers bytes in transit.
pub(crate) fn deliver_if_dropped(tcp: &impl AsFd) {
    // Fails only if the connection is already closed.
    let _ = SockRef::from(tcp).set_linger(None);
}

/// Returns true if the connection is open and no bytes are readable.
pub(crate) fn is_quiet(tcp: &impl AsFd) -> bool {
    let mut byte = [MaybeUninit::uninit()];
    match SockRef::from(tcp).peek(&mut byte) {
        Err(e) => e.kind() == io::ErrorKind::WouldBlock,
        // The end of the stream, or unexpected bytes.
        Ok(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncWriteExt as _, net::TcpStream, task::yield_now};

    use super::*;
    use crate::{relay::testing::soon, testing::connection};

    /// Reads "last" byte by byte after the poller has reported the end. Returns `is_at_end` after each byte.
    async fn ends_of(how: impl AsyncFnOnce(TcpStream)) -> Vec<io::Result<bool>> {
        let (tcp, mut peer) = connection().await;
        assert!(!is_at_end(&tcp).expect("open"), "of an open connection");
        peer.write_all(b"last").await.expect("open");
        how(peer).await;
        while !soon(tcp.ready(Interest::READABLE)).await.expect("polled").is_read_closed() {
            yield_now().await;
        }
        let read_one = |_| {
            assert_eq!(read_now(&tcp, &mut [IoSliceMut::new(&mut [0])]), 1);
            is_at_end(&tcp)
        };
        (0..4).map(read_one).collect()
    }

    #[tokio::test]
    async fn an_end_is_reported_after_everything_before_it_is_read() {
        let ends = ends_of(async |mut peer| peer.shutdown().await.expect("open")).await;
        assert!(matches!(ends[..], [Ok(false), Ok(false), Ok(false), Ok(true)]), "{ends:?}");
    }

    #[tokio::test]
    async fn a_reset_is_not_an_end() {
        let ends = ends_of(async |peer| reset(peer)).await;
        let last = ends.last().expect("four");
        assert!(last.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::ConnectionReset), "{ends:?}");
    }

    #[tokio::test]
    async fn last_bytes_arrive_with_the_end_and_also_without() {
        for ends in [true, false] {
            let (tcp, mut peer) = connection().await;
            let sent = std::future::poll_fn(|cx| poll_write_last(&tcp, cx, &[IoSlice::new(b"last")]));
            assert_eq!(soon(sent).await.expect("open"), 4);
            if ends {
                finish(&tcp).expect("open");
            }
            let mut read = [0; 5];
            let all = if ends { 5 } else { 4 };
            let outcome = soon(tokio::io::AsyncReadExt::read_exact(&mut peer, &mut read[..all])).await;
            assert_eq!((&read[..4], outcome.is_err()), (b"last".as_slice(), ends));
        }
    }
}

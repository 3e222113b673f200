//! TCP sockets the way tunnel and relay use them: polled scattered reads and gathered writes through a shared reference,
//! so that one task moves both directions, and the two ways a connection ends, FIN and RST.

use std::{
    io::{self, IoSlice, IoSliceMut, Read},
    mem::MaybeUninit,
    net::Shutdown,
    task::{Context, Poll, ready},
};

use socket2::SockRef;
use tokio::{io::Interest, net::TcpStream};

/// Reads what is there into `slices`, in their order. `Ok(0)` is the end of the stream.
pub(crate) fn poll_read(
    tcp: &TcpStream,
    cx: &mut Context<'_>,
    slices: &mut [IoSliceMut<'_>],
) -> Poll<io::Result<usize>> {
    let room: usize = slices.iter().map(|slice| slice.len()).sum();
    loop {
        ready!(tcp.poll_read_ready(cx))?;
        let mut read = None;
        let outcome = tcp.try_io(Interest::READABLE, || {
            let read_bytes = (&*SockRef::from(tcp)).read_vectored(slices)?;
            read = Some(read_bytes);
            // A short read has emptied the socket (epoll(7), "Questions and answers", 9): saying so here saves the next
            // read, which would find nothing. An end of stream or reset behind it is kept by tokio as "closed".
            if read_bytes > 0 && read_bytes < room { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        match (read, outcome) {
            (Some(read_bytes), _) => return Poll::Ready(Ok(read_bytes)),
            (None, Err(e)) if e.kind() == io::ErrorKind::WouldBlock => {}
            (None, outcome) => return Poll::Ready(outcome.map(|()| 0)),
        }
    }
}

/// Reads what is there right now, without waiting and without asking the poller, which may not have looked yet; 0 when there
/// is nothing, or an end or error that is to be found later.
pub(crate) fn read_now(tcp: &TcpStream, slices: &mut [IoSliceMut<'_>]) -> usize {
    (&*SockRef::from(tcp)).read_vectored(slices).unwrap_or(0)
}

/// Writes as much of `slices` as fits.
pub(crate) fn poll_write(
    tcp: &TcpStream,
    cx: &mut Context<'_>,
    slices: &[IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    loop {
        ready!(tcp.poll_write_ready(cx))?;
        match tcp.try_write_vectored(slices) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            outcome => return Poll::Ready(outcome),
        }
    }
}

/// Ends our direction: the peer reads the end of the stream after all that was written.
pub(crate) fn finish(tcp: &TcpStream) -> io::Result<()> {
    SockRef::from(tcp).shutdown(Shutdown::Write)
}

/// Ends the connection with RST; what was written and not yet sent is lost, and the peer knows it.
pub(crate) fn reset(tcp: TcpStream) {
    // Fails only when the connection is gone already, and then there is nobody to tell.
    let _ = tcp.set_zero_linger();
}

/// From now on this connection ends with RST however it is closed: on an early return, a dropped task, or the death of
/// this process. Without it the kernel would end it with FIN, and a flow cut short would look complete. Connections that
/// were accepted have it from their listener.
pub(crate) fn reset_if_dropped(tcp: &TcpStream) {
    // Fails only when the connection is gone already.
    let _ = tcp.set_zero_linger();
}

/// Takes [`reset_if_dropped`] back: everything was passed on, and what is still on its way must arrive.
pub(crate) fn deliver_if_dropped(tcp: &TcpStream) {
    // As above.
    let _ = SockRef::from(tcp).set_linger(None);
}

/// True when the connection stands and nothing waits to be read.
pub(crate) fn is_quiet(tcp: &TcpStream) -> bool {
    let mut byte = [MaybeUninit::uninit()];
    match SockRef::from(tcp).peek(&mut byte) {
        Err(e) => e.kind() == io::ErrorKind::WouldBlock,
        // The end of the stream, or bytes nobody asked for.
        Ok(_) => false,
    }
}

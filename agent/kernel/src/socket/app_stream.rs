//! A connection with an application, or with a peer that sends plaintext. The runtime polls it for urgent data too.
//!
//! Urgent data (`MSG_OOB`, RFC 6093) is one marked byte of the stream. With SO_OOBINLINE the byte stays in its place, and a read
//! ends before it. The poller reports that urgent data has come, so that a flow without any makes no system call for it.

use std::{
    fmt,
    future::Future as _,
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    pin::pin,
    task::{Context, Poll, Waker},
};

use socket2::{SockRef, Socket};
use tokio::{
    io::{Interest, Ready, unix::AsyncFd},
    net::TcpStream,
};

/// `SIOCATMARK` of linux/sockios.h, which the libc crate lacks: whether the next byte is the urgent one.
const SIOCATMARK: libc::Ioctl = 0x8905;

/// A connection that the calling thread's runtime polls.
pub trait Polled: AsFd + Sized {
    /// Registers a socket that does not block.
    ///
    /// # Errors
    /// If the poller has no descriptors or memory left.
    fn of(socket: Socket) -> io::Result<Self>;

    /// Pending until the socket may have bytes, or an end.
    ///
    /// # Errors
    /// If the runtime ends.
    fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Pending until the socket may accept bytes.
    ///
    /// # Errors
    /// If the runtime ends.
    fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Runs `operation` if the poller has reported `interest`. WouldBlock ends that.
    ///
    /// # Errors
    /// That of `operation`, or WouldBlock.
    fn try_io<R>(&self, interest: Interest, operation: impl FnOnce() -> io::Result<R>) -> io::Result<R>;

    /// Returns what the poller has reported of `interest`, and waits for nothing.
    fn reported(&self, interest: Interest) -> Ready;
}

/// A connection with an application.
pub struct AppStream(AsyncFd<std::net::TcpStream>);

impl AppStream {
    /// Moves the connection to the calling thread's runtime.
    ///
    /// # Errors
    /// If the poller has no descriptors or memory left. The connection is then closed.
    pub fn moved_to_this_thread(self) -> io::Result<Self> {
        Self::of(self.0.into_inner().into())
    }

    /// Returns the local address.
    ///
    /// # Errors
    /// The kernel's.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.get_ref().local_addr()
    }

    /// Returns the peer's address of the connection.
    ///
    /// # Errors
    /// The kernel's.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.0.get_ref().peer_addr()
    }

    /// Returns and clears the error of the connection.
    ///
    /// # Errors
    /// The kernel's.
    pub fn take_error(&self) -> io::Result<Option<io::Error>> {
        self.0.get_ref().take_error()
    }

    /// Waits until the poller reports an error of the connection.
    ///
    /// # Errors
    /// If the runtime ends.
    pub async fn broken(&self) -> io::Result<()> {
        self.0.ready(Interest::ERROR).await.map(drop)
    }

    /// Returns true if urgent data has come that was not read yet, as far as the poller has reported. Makes no system call.
    #[inline]
    #[must_use]
    pub fn has_urgent(&self) -> bool {
        self.reported(Interest::READABLE | Interest::PRIORITY).is_priority()
    }

    /// Returns true if the next byte is the urgent one. Call it after [`Self::has_urgent`]: if no urgent data is left, that returns
    /// false from now on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn is_at_urgent(&self) -> io::Result<bool> {
        let mut is_at_mark: libc::c_int = 0;
        // SAFETY: the descriptor is open, and the request writes one int.
        if unsafe { libc::ioctl(self.as_raw_fd(), SIOCATMARK, &raw mut is_at_mark) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if is_at_mark == 0 && !self.is_urgent_unread()? {
            self.forget_urgent();
        }
        Ok(is_at_mark != 0)
    }

    /// Has [`Self::has_urgent`] return false until urgent data comes again.
    pub fn forget_urgent(&self) {
        let ready = pin!(self.0.ready(Interest::PRIORITY)).poll(&mut Context::from_waker(Waker::noop()));
        if let Poll::Ready(Ok(mut guard)) = ready {
            guard.clear_ready_matching(Ready::PRIORITY);
        }
    }

    fn is_urgent_unread(&self) -> io::Result<bool> {
        let mut polled = libc::pollfd { fd: self.as_raw_fd(), events: libc::POLLPRI, revents: 0 };
        // SAFETY: one entry, which lives through the call. It does not wait.
        if unsafe { libc::poll(&raw mut polled, 1, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(polled.revents & libc::POLLPRI != 0)
    }
}

impl fmt::Debug for AppStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.get_ref().fmt(f)
    }
}

impl AsFd for AppStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

impl AsRawFd for AppStream {
    fn as_raw_fd(&self) -> RawFd {
        self.0.get_ref().as_raw_fd()
    }
}

impl Polled for AppStream {
    fn of(socket: Socket) -> io::Result<Self> {
        let interest = Interest::READABLE | Interest::WRITABLE | Interest::PRIORITY;
        // SAFETY: the stream owns its descriptor, is owned by the registration, and is never replaced.
        let registered = unsafe { AsyncFd::register_with_interest(socket.into(), interest) };
        Ok(Self(registered?))
    }

    #[inline]
    fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_read_ready(cx).map_ok(drop)
    }

    #[inline]
    fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_write_ready(cx).map_ok(drop)
    }

    #[inline]
    fn try_io<R>(&self, interest: Interest, operation: impl FnOnce() -> io::Result<R>) -> io::Result<R> {
        self.0.try_io(interest, |_| operation())
    }

    #[inline]
    fn reported(&self, interest: Interest) -> Ready {
        match pin!(self.0.ready(interest)).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(guard)) => guard.ready(),
            _ => Ready::EMPTY,
        }
    }
}

impl Polled for TcpStream {
    fn of(socket: Socket) -> io::Result<Self> {
        Self::from_std(socket.into())
    }

    #[inline]
    fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Self::poll_read_ready(self, cx)
    }

    #[inline]
    fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Self::poll_write_ready(self, cx)
    }

    #[inline]
    fn try_io<R>(&self, interest: Interest, operation: impl FnOnce() -> io::Result<R>) -> io::Result<R> {
        Self::try_io(self, interest, operation)
    }

    #[inline]
    fn reported(&self, interest: Interest) -> Ready {
        match pin!(self.ready(interest)).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(ready)) => ready,
            _ => Ready::EMPTY,
        }
    }
}

/// Keeps urgent data of `socket` in the stream. Accepted connections inherit this from their listener.
///
/// # Errors
/// The kernel's.
pub(super) fn keep_urgent_inline(socket: &Socket) -> io::Result<()> {
    socket.set_out_of_band_inline(true)
}

/// Sends one byte as urgent data.
///
/// # Errors
/// The kernel's; WouldBlock if the byte does not fit.
pub fn send_urgent<'s>(socket: impl Into<SockRef<'s>>, byte: u8) -> io::Result<()> {
    socket.into().send_with_flags(&[byte], libc::MSG_OOB | libc::MSG_NOSIGNAL).map(drop)
}

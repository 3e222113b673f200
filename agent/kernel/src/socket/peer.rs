//! The peer of a TCP connection: signs that it is alive, and the time after which it is given up.

use std::{io, os::fd::AsRawFd as _, time::Duration};

use socket2::{SockFilter, SockRef, Socket, TcpKeepalive};

use super::{option, set_option};
use crate::inject::Numbers;

/// An idle connection is probed after this time, or after the limit of its peer's silence, if that is shorter.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
/// Probes until an idle connection ends. The last one leaves after the limit, so an outage that is shorter ends no connection.
const KEEPALIVE_PROBES: u32 = 8;

/// `TCP_REPAIR_OFF` in `linux/tcp.h`: the kernel sends a probe when it leaves repair mode.
const REPAIR_OFF: libc::c_int = 0;
const REPAIR_ON: libc::c_int = 1;
/// `TCP_REPAIR_OFF_NO_WP`: without a probe.
const REPAIR_OFF_SILENTLY: libc::c_int = -1;
/// Queues of a connection in repair mode (`TCP_NO_QUEUE` and others).
const NO_QUEUE: libc::c_int = 0;
const RECEIVE_QUEUE: libc::c_int = 1;
const SEND_QUEUE: libc::c_int = 2;

/// `TCP_ESTABLISHED` in `net/tcp_states.h`.
const ESTABLISHED: u8 = 1;

/// State of a peer, as the local kernel knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerState {
    /// Time since the peer's last acknowledgement.
    pub heard: Duration,
    /// Bytes are sent and not acknowledged, or the peer's window is closed for bytes that are to be sent.
    pub is_asked: bool,
    /// Consecutive retransmissions and window probes without an answer.
    pub repeats: u32,
    /// Smoothed round-trip time.
    pub round_trip: Duration,
}

/// Returns what the kernel knows of the peer of `socket`.
///
/// # Errors
/// The kernel's.
pub fn peer_state<'s>(socket: impl Into<SockRef<'s>>) -> io::Result<PeerState> {
    let info = info(&socket.into())?;
    Ok(PeerState {
        heard: Duration::from_millis(info.tcpi_last_ack_recv.into()),
        is_asked: info.tcpi_unacked > 0 || info.tcpi_probes > 0,
        repeats: u32::from(info.tcpi_retransmits) + u32::from(info.tcpi_probes),
        round_trip: Duration::from_micros(info.tcpi_rtt.into()),
    })
}

fn info(socket: &Socket) -> io::Result<libc::tcp_info> {
    // SAFETY: `tcp_info` has integers only, for which zero is valid.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut size = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the descriptor is open, and `info` and `size` live through the call; `size` is that of `info`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut size,
        )
    };
    if result == 0 { Ok(info) } else { Err(io::Error::last_os_error()) }
}

/// Sends a probe to the peer, whose kernel answers it at most twice a second. The probe carries nothing, and changes neither
/// timers nor counters of the connection.
///
/// # Errors
/// [`io::ErrorKind::NotConnected`] if an end of the connection has sent FIN: the kernel then sends no probe, and reports no error.
/// Others are the kernel's.
pub fn ask_peer<'s>(socket: impl Into<SockRef<'s>>) -> io::Result<()> {
    let socket = socket.into();
    if info(&socket)?.tcpi_state != ESTABLISHED {
        return Err(io::ErrorKind::NotConnected.into());
    }
    let is_reused = option(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
    set_option(&socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, REPAIR_ON)?;
    set_option(&socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, REPAIR_OFF)?;
    // Repair mode clears this option, without which the next agent could not listen on the port of an accepted connection.
    if is_reused != 0 {
        set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    }
    Ok(())
}

/// Returns the numbers of the connection.
///
/// # Errors
/// The kernel's.
pub fn numbers<'s>(socket: impl Into<SockRef<'s>>) -> io::Result<Numbers> {
    let socket = socket.into();
    let is_reused = option(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
    let set = |name, value| set_option(&socket, libc::IPPROTO_TCP, name, value);
    let of_queue = |queue| {
        set(libc::TCP_REPAIR_QUEUE, queue)?;
        Ok(option(&socket, libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ)?.cast_unsigned())
    };
    set(libc::TCP_REPAIR, REPAIR_ON)?;
    let numbers = of_queue(SEND_QUEUE).and_then(|end| {
        let next = end.wrapping_sub(unsent_bytes(&socket)?);
        of_queue(RECEIVE_QUEUE).map(|expected| Numbers { next, expected })
    });
    set(libc::TCP_REPAIR_QUEUE, NO_QUEUE)?;
    set(libc::TCP_REPAIR, REPAIR_OFF_SILENTLY)?;
    if is_reused != 0 {
        set_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    }
    numbers
}

/// Returns the bytes behind the next one that is sent.
fn unsent_bytes(socket: &Socket) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is open, and `bytes` lives through the call, which writes an int.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCOUTQNSD, &raw mut bytes) };
    if result == 0 { Ok(bytes.cast_unsigned()) } else { Err(io::Error::last_os_error()) }
}

/// Lets the connection receive nothing but a reset until [`resume_receiving`]: the sender's kernel gets no answer, as from a peer
/// that is gone, and its timers run.
///
/// # Errors
/// The kernel's.
pub fn stop_receiving<'s>(socket: impl Into<SockRef<'s>>) -> io::Result<()> {
    const FLAGS: u32 = 13;
    const RST: u32 = 0x04;
    let step = |code: u32, jump_true, jump_false, operand| {
        SockFilter::new(code as u16, jump_true, jump_false, operand)
    };
    // The filter of a TCP socket reads from the TCP header.
    let filter = [
        step(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, FLAGS),
        step(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 0, 1, RST),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ];
    socket.into().attach_filter(&filter)
}

/// Ends [`stop_receiving`]. The sender's kernel repeats what was dropped.
///
/// # Errors
/// The kernel's.
pub fn resume_receiving<'s>(socket: impl Into<SockRef<'s>>) -> io::Result<()> {
    socket.into().detach_filter()
}

/// Ends a connection that is idle and whose peer is silent for longer than `limit`, which is at least a second. Of a listener, sets this
/// for the connections that it accepts.
///
/// # Errors
/// The kernel's.
pub fn limit_silence<'s>(socket: impl Into<SockRef<'s>>, limit: Duration) -> io::Result<()> {
    let (idle, interval) = keepalive(limit);
    let keepalive =
        TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(KEEPALIVE_PROBES);
    socket.into().set_tcp_keepalive(&keepalive)
}

/// Returns the time before the first probe and the time between two probes, in whole seconds.
fn keepalive(limit: Duration) -> (Duration, Duration) {
    let seconds = limit.as_secs().max(1);
    let interval = seconds.div_ceil(u64::from(KEEPALIVE_PROBES - 1));
    (KEEPALIVE_IDLE.min(Duration::from_secs(seconds)), Duration::from_secs(interval))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{Shutdown, TcpListener, TcpStream},
        thread::sleep,
        time::Instant,
    };

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("listening");
        (client, listener.accept().expect("connected").0)
    }

    #[test]
    fn the_last_probe_of_an_idle_connection_leaves_after_the_limit() {
        for seconds in [1, 2, 7, 30, 59, 60, 61, 900] {
            let limit = Duration::from_secs(seconds);
            let (idle, interval) = keepalive(limit);
            assert!(idle <= limit && idle <= KEEPALIVE_IDLE && !idle.is_zero(), "{seconds}: {idle:?}");
            assert!(interval * (KEEPALIVE_PROBES - 1) >= limit, "{seconds}: {interval:?}");
        }
    }

    #[test]
    fn a_connection_inherits_the_limit_of_its_listener() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let limit = Duration::from_secs(21);
        limit_silence(&listener, limit).expect("open");
        let _client = TcpStream::connect(listener.local_addr().expect("bound")).expect("listening");
        let accepted = listener.accept().expect("connected").0;
        let accepted = SockRef::from(&accepted);
        assert!(accepted.keepalive().expect("open"));
        let (idle, interval) = (accepted.tcp_keepalive_time(), accepted.tcp_keepalive_interval());
        assert_eq!((idle.expect("open"), interval.expect("open")), keepalive(limit));
        assert_eq!(accepted.tcp_keepalive_retries().expect("open"), KEEPALIVE_PROBES);
    }

    #[test]
    fn the_peer_of_a_half_closed_connection_cannot_be_asked() {
        let (ended, mut other) = pair();
        ended.shutdown(Shutdown::Write).expect("open");
        assert_eq!(other.read(&mut [0; 1]).expect("open"), 0);
        for end in [&ended, &other] {
            assert_eq!(ask_peer(end).expect_err("half-closed").kind(), io::ErrorKind::NotConnected);
        }
    }

    #[test]
    #[ignore = "needs root"]
    fn the_next_number_is_that_of_the_first_byte_that_does_not_fit_into_the_window() {
        let (mut sender, receiver) = pair();
        sender.set_nonblocking(true).expect("open");
        while sender.write(&[0; 1 << 16]).is_ok() {}
        let end = Instant::now() + Duration::from_secs(30);
        while numbers(&sender).expect("root").next != numbers(&receiver).expect("root").expected {
            assert!(Instant::now() < end, "{:?} {:?}", numbers(&sender), numbers(&receiver));
            sleep(Duration::from_millis(10));
        }
        assert!(unsent_bytes(&SockRef::from(&sender)).expect("open") > 0);
    }

    #[test]
    fn a_connection_that_stops_to_receive_leaves_its_peer_without_answers() {
        let (mut sender, mut receiver) = pair();
        stop_receiving(&receiver).expect("attached");
        sender.write_all(b"x").expect("open");
        let end = Instant::now() + Duration::from_secs(30);
        while peer_state(&sender).expect("open").repeats < 2 {
            assert!(Instant::now() < end, "{:?}", peer_state(&sender));
            sleep(Duration::from_millis(10));
        }
        assert!(peer_state(&sender).expect("open").is_asked);
        resume_receiving(&receiver).expect("attached");
        receiver.set_read_timeout(Some(Duration::from_secs(30))).expect("open");
        assert_eq!(receiver.read(&mut [0; 2]).expect("sent again"), 1);
    }
}

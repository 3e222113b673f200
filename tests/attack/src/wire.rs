//! The recorder: every packet that crosses a node is searched for markers, on all its interfaces, with its direction.
//!
//! A packet socket sees a frame before the guard on that interface does, and after whatever the sender's own hooks let
//! through. The kernel counts what it could not queue; a recording with losses is an error.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, FromRawFd as _, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result, bail};
use nix::net::if_::if_nameindex;
use tacit_topology::{Node, until};

/// Prefix of every marker.
pub(crate) const PREFIX: &str = "tacit-attack-";
/// Bytes of a whole marker.
pub(crate) const MARKER: usize = PREFIX.len() + 8;
/// Room for packets that wait to be searched, in bytes.
const QUEUE: libc::c_int = 64 << 20;
/// The largest frame on a veth pair, with segmentation left to the receiver.
const FRAME: usize = 80 * 1024;

/// A place where a marker was seen.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Sighting {
    /// On the wire between the nodes.
    Wire,
    /// Leaving a node towards a pod, on the host end of its link.
    ToPod(String),
    /// Coming from a pod, on the host end of its link: before the guard there has its say.
    FromPod(String),
}

impl Sighting {
    /// As it stands in results.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Wire => "wire".to_owned(),
            Self::ToPod(link) => format!("to {link}"),
            Self::FromPod(link) => format!("from {link}"),
        }
    }
}

type Seen = Arc<Mutex<BTreeMap<String, BTreeSet<Sighting>>>>;

/// The recorder of one node.
pub(crate) struct Recorder {
    seen: Seen,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Recorder {
    pub(crate) fn start(node: &Node) -> Result<Self> {
        let (socket, names) = node.netns().enter(|| -> Result<_> {
            let socket = packet_socket().context("packet socket")?;
            let names: BTreeMap<u32, String> = if_nameindex()
                .context("interfaces")?
                .iter()
                .map(|i| (i.index(), i.name().to_string_lossy().into_owned()))
                .collect();
            Ok((socket, names))
        })??;
        let (seen, stop) = (Seen::default(), Arc::new(AtomicBool::new(false)));
        let (theirs, halt) = (seen.clone(), stop.clone());
        let thread = std::thread::spawn(move || record(&socket, &names, &theirs, &halt));
        Ok(Self { seen, stop, thread: Some(thread) })
    }

    /// Returns the places where `marker` was seen so far.
    pub(crate) fn sightings(&self, marker: &str) -> BTreeSet<Sighting> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(marker).cloned().unwrap_or_default()
    }

    /// Waits until `fence` has been seen.
    pub(crate) fn wait_for(&self, fence: &str) -> Result<()> {
        until("the recorder seeing the fence", || Ok((!self.sightings(fence).is_empty()).then_some(())))
    }

    /// Ends the recording.
    ///
    /// # Errors
    /// Fails if packets were lost.
    pub(crate) fn finish(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().map_err(|_| anyhow::anyhow!("the recorder panicked"))?
    }
}

fn record(socket: &OwnedFd, names: &BTreeMap<u32, String>, seen: &Seen, stop: &AtomicBool) -> Result<()> {
    let mut frame = vec![0; FRAME];
    while !stop.load(Ordering::Relaxed) {
        let Some((len, from)) = receive(socket, &mut frame).context("receive")? else { continue };
        let Some(name) = names.get(&(from.sll_ifindex as u32)) else { continue };
        let is_outgoing = from.sll_pkttype == libc::PACKET_OUTGOING;
        let place = match name.as_str() {
            // Frames across the bridge are seen on its ports.
            "lo" | "cni0" => continue,
            link if link.starts_with("pod") && is_outgoing => Sighting::ToPod(link.to_owned()),
            link if link.starts_with("pod") => Sighting::FromPod(link.to_owned()),
            _ => Sighting::Wire,
        };
        for marker in markers(frame.get(..len).unwrap_or_default()) {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.entry(marker).or_default().insert(place.clone());
        }
    }
    match lost(socket)? {
        0 => Ok(()),
        packets => bail!("the recording lost {packets} packets: it proves nothing"),
    }
}

/// Every marker in a frame.
fn markers(frame: &[u8]) -> Vec<String> {
    let prefix = PREFIX.as_bytes();
    let starts = frame.windows(MARKER).enumerate().filter(|(_, window)| window.starts_with(prefix));
    starts.map(|(_, window)| String::from_utf8_lossy(window).into_owned()).collect()
}

fn packet_socket() -> io::Result<OwnedFd> {
    let all = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: takes no pointer.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(all)) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor to us.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &QUEUE)?;
    // A look at the stop flag now and then.
    let pause = libc::timeval { tv_sec: 0, tv_usec: 20_000 };
    set(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &pause)?;
    Ok(socket)
}

fn set<T>(socket: &OwnedFd, level: i32, name: i32, value: &T) -> io::Result<()> {
    let size = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is of the size given and lives through the call.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), size) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// One frame and where it was; `None` when none came for a while.
pub(crate) fn receive(
    socket: &impl AsRawFd,
    frame: &mut [u8],
) -> io::Result<Option<(usize, libc::sockaddr_ll)>> {
    let mut from = MaybeUninit::<libc::sockaddr_ll>::zeroed();
    let mut size = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the buffer and the address are of the sizes given and live through the call.
    let len = unsafe {
        libc::recvfrom(
            socket.as_raw_fd(),
            frame.as_mut_ptr().cast(),
            frame.len(),
            0,
            from.as_mut_ptr().cast(),
            &raw mut size,
        )
    };
    if len < 0 {
        let error = io::Error::last_os_error();
        let is_pause = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
        // A link that goes down says so once.
        let is_down = error.raw_os_error() == Some(libc::ENETDOWN);
        return if is_pause || is_down { Ok(None) } else { Err(error) };
    }
    // SAFETY: zeroed before, plain integers, and filled by the kernel.
    Ok(Some((len as usize, unsafe { from.assume_init() })))
}

/// Packets that the kernel could not queue since the last question.
fn lost(socket: &OwnedFd) -> io::Result<u32> {
    const PACKET_STATISTICS: i32 = 6;
    let mut counts = [0_u32; 2];
    let mut size = size_of_val(&counts) as libc::socklen_t;
    // SAFETY: `counts` is of the size given and lives through the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            PACKET_STATISTICS,
            counts.as_mut_ptr().cast(),
            &raw mut size,
        )
    };
    if result == 0 { Ok(counts[1]) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_found_wherever_they_stand() {
        let frame = b"\0\x01tacit-attack-00000001tacit-attack-0000000\xfftacit-attack-0000000";
        let found = markers(frame);
        assert_eq!(found[0], "tacit-attack-00000001");
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(markers(b"tacit-attack-").is_empty());
    }
}

//! Records of held connections that the programs hand over: the SYN of a captured connection, the end of one that nobody
//! has accepted, and the probes of applications' connections.
//!
//! A record that is lost in a full ring costs time, not the connection: the application's kernel sends its SYN again.

use std::net::SocketAddr;

use aya::maps::{MapData, RingBuf};
use tacit_abi::{HELD_RINGS, HeldEnd, HeldSyn, Tuple, held_kind};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    Kernel, KernelError,
    inject::{Probe, Syn},
    maps::ip,
};

/// Names of the rings, by index.
const RINGS: [&str; HELD_RINGS as usize] = ["HELD_0", "HELD_1", "HELD_2", "HELD_3"];

/// A ring of records, not yet polled by any runtime.
pub struct HeldRing(RingBuf<MapData>);

/// The ends of a held connection, as its application's kernel sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HeldEnds {
    /// The application's end. The address is a loopback address unless the application has bound its socket.
    pub client: SocketAddr,
    /// The agent's end.
    pub target: SocketAddr,
}

/// A connection that was held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldConnect {
    /// The pod's slot.
    pub slot: u32,
    /// Cookie of the pod's network namespace.
    pub netns_cookie: u64,
    /// The destination that the application asked for.
    pub destination: SocketAddr,
    /// The SYN.
    pub syn: Syn,
    /// True if the SYN was sent before.
    pub is_repeated: bool,
}

/// A record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Held {
    /// A SYN was held: for the first time, or again.
    Connect(HeldConnect),
    /// A captured connection that the agent has not accepted has ended.
    Ended {
        /// The pod's slot.
        slot: u32,
        /// Cookie of the pod's network namespace.
        netns_cookie: u64,
        /// Its ends.
        ends: HeldEnds,
    },
    /// A probe was held.
    Probe {
        /// The pod's slot.
        slot: u32,
        /// Cookie of the pod's network namespace.
        netns_cookie: u64,
        /// The probe. Its client is the application's end, whichever side opened the connection.
        probe: Probe,
    },
}

/// Records that are handled before other tasks of the thread get their turn.
const RECORDS_PER_TURN: u32 = 64;

impl Kernel {
    /// Takes the rings of the programs that this agent has loaded, by index.
    ///
    /// # Errors
    /// [`KernelError::Map`] if they were taken before.
    pub fn held_rings(&self) -> Result<Vec<HeldRing>, KernelError> {
        let mut programs = self.programs();
        let mut take = |name| {
            let problem = |problem: String| KernelError::Map { map: name, problem };
            let map =
                programs.ebpf().take_map(name).ok_or_else(|| problem("not in the object".to_owned()))?;
            RingBuf::try_from(map).map(HeldRing).map_err(|error| problem(error.to_string()))
        };
        RINGS.into_iter().map(&mut take).collect()
    }
}

impl HeldRing {
    /// Passes every record to `handle`, until polling fails. Runs on the calling thread's runtime.
    pub async fn forward(self, handle: impl Fn(Held)) {
        #[expect(
            deprecated,
            reason = "its successor is unsafe; the ring owns its descriptor for as long as it lives"
        )]
        let polled: Result<AsyncFd<RingBuf<MapData>>, _> = AsyncFd::with_interest(self.0, Interest::READABLE);
        let Ok(mut ring) = polled else {
            return tracing::error!(
                "a queue of held connections cannot be polled: their connect() times out; restart the agent"
            );
        };
        loop {
            let Ok(mut ready) = ring.readable_mut().await else { return };
            let mut left = RECORDS_PER_TURN;
            while let Some(record) = ready.get_inner_mut().next() {
                if let Some(held) = parse(&record) {
                    handle(held);
                }
                left -= 1;
                if left == 0 {
                    break;
                }
            }
            if left == 0 {
                // The thread carries flows of other pods too.
                tokio::task::yield_now().await;
            } else {
                ready.clear_ready();
            }
        }
    }
}

/// Returns the record in `bytes`; `None` for one that is not understood, which only another version of the programs makes.
fn parse(bytes: &[u8]) -> Option<Held> {
    let kind = u32::from_ne_bytes(*bytes.first_chunk()?);
    match kind {
        held_kind::SYN => {
            let held: HeldSyn = read_plain(bytes)?;
            let port = u16::try_from(held.destination.port).ok()?;
            Some(Held::Connect(HeldConnect {
                slot: held.slot,
                netns_cookie: held.netns_cookie,
                destination: SocketAddr::new(ip(&held.destination.address), port),
                is_repeated: held.repeated != 0,
                syn: Syn::parse(held.packet.get(..held.length as usize)?)?,
            }))
        }
        held_kind::PROBE => {
            let held: HeldSyn = read_plain(bytes)?;
            let probe = Probe::parse(held.packet.get(..held.length as usize)?)?;
            Some(Held::Probe { slot: held.slot, netns_cookie: held.netns_cookie, probe })
        }
        held_kind::END => {
            let HeldEnd { slot, tuple, .. } = read_plain(bytes)?;
            Some(Held::Ended { slot, netns_cookie: tuple.netns_cookie, ends: ends(&tuple)? })
        }
        _ => None,
    }
}

fn ends(tuple: &Tuple) -> Option<HeldEnds> {
    let at = |address, port: u32| u16::try_from(port).ok().map(|port| SocketAddr::new(ip(address), port));
    Some(HeldEnds {
        client: at(&tuple.local, tuple.local_port)?,
        target: at(&tuple.remote, tuple.remote_port)?,
    })
}

/// Returns the value whose bytes these are.
fn read_plain<T: aya::Pod>(bytes: &[u8]) -> Option<T> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: there are enough bytes, and every bit pattern is a valid `T`.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

#[cfg(test)]
mod tests {
    use tacit_abi::{Address, Destination, HELD_PACKET_MAX};

    use super::*;
    use crate::inject::testing::{SYN_V4, address};

    fn bytes_of<T: aya::Pod>(value: &T) -> Vec<u8> {
        // SAFETY: plain data without padding, asserted by size where it is declared.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }.to_vec()
    }

    fn mapped(text: &str) -> Address {
        let std::net::IpAddr::V4(v4) = address(text) else { panic!("{text}") };
        Address::from_octets(v4.to_ipv6_mapped().octets())
    }

    fn held_syn(length: usize) -> HeldSyn {
        let mut packet = [0xee; HELD_PACKET_MAX];
        packet[..SYN_V4.len()].copy_from_slice(&SYN_V4);
        HeldSyn {
            kind: held_kind::SYN,
            slot: 3,
            netns_cookie: 7,
            destination: Destination { address: mapped("10.77.2.3"), port: 80, slot: 3 },
            length: u32::try_from(length).expect("small"),
            repeated: 1,
            packet,
        }
    }

    #[test]
    fn a_held_syn_is_read_with_its_destination_and_ends() {
        let Some(Held::Connect(held)) = parse(&bytes_of(&held_syn(SYN_V4.len()))) else {
            panic!("no record")
        };
        assert_eq!((held.slot, held.netns_cookie, held.is_repeated), (3, 7, true));
        assert_eq!(held.destination, "10.77.2.3:80".parse().expect("literal"));
        assert_eq!(held.syn.ends().target, "127.100.1.2:15056".parse().expect("literal"));
    }

    #[test]
    fn a_probe_is_read_with_its_ends() {
        let mut held = HeldSyn { kind: held_kind::PROBE, ..held_syn(SYN_V4.len()) };
        assert_eq!(parse(&bytes_of(&held)), None, "a SYN is no probe");
        // ACK instead of SYN.
        held.packet[33] = 0x10;
        let Some(Held::Probe { slot: 3, netns_cookie: 7, probe }) = parse(&bytes_of(&held)) else {
            panic!("no record")
        };
        assert_eq!(probe.ends().target, "127.100.1.2:15056".parse().expect("literal"));
    }

    #[test]
    fn the_end_of_a_connection_is_read() {
        let tuple = Tuple {
            netns_cookie: 7,
            local: mapped("127.0.0.1"),
            remote: mapped("127.100.1.2"),
            local_port: 40_000,
            remote_port: 15056,
        };
        let ended = parse(&bytes_of(&HeldEnd { kind: held_kind::END, slot: 3, tuple }));
        let ends = HeldEnds {
            client: "127.0.0.1:40000".parse().expect("literal"),
            target: "127.100.1.2:15056".parse().expect("literal"),
        };
        assert_eq!(ended, Some(Held::Ended { slot: 3, netns_cookie: 7, ends }));
    }

    #[test]
    fn records_that_are_cut_or_unknown_are_skipped() {
        let whole = bytes_of(&held_syn(SYN_V4.len()));
        for length in 0..whole.len() {
            assert_eq!(parse(&whole[..length]), None, "{length} bytes");
        }
        for length in [0, 39, HELD_PACKET_MAX + 1, usize::from(u16::MAX)] {
            assert_eq!(parse(&bytes_of(&held_syn(length))), None, "a packet of {length} bytes");
        }
        assert_eq!(parse(&[9; 200]), None);
    }
}

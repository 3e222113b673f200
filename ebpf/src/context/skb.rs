//! Access to the raw context of the guard's programs.

use aya_ebpf::{
    bindings::{__sk_buff, tcphdr},
    helpers::generated::{
        bpf_map_lookup_elem, bpf_sk_fullsock, bpf_sk_release, bpf_skb_ancestor_cgroup_id, bpf_skb_cgroup_id,
        bpf_skb_load_bytes, bpf_skb_load_bytes_relative, bpf_tcp_check_syncookie, bpf_tcp_sock,
    },
    programs::SkBuffContext,
};
use core::mem::MaybeUninit;
use tacit_abi::{HELD_PACKET_MAX, HELD_PACKET_MIN, Names, SegmentHead, hardware_address};

use super::names_of;
use crate::{
    maps::{CAPTURERS, LISTENERS},
    packet::{ETH_P_IP, ETH_P_IPV6},
};

const SOCK_STREAM: u32 = 1;
/// State of a socket whose SYN is not answered yet.
const BPF_TCP_SYN_SENT: u32 = 2;

/// Context of the guard's programs: a packet, and its socket if it has one.
pub struct Skb<'a>(pub &'a SkBuffContext);

/// Offsets count from the link's header, or from the network header.
const BPF_HDR_START_MAC: u32 = 0;
const BPF_HDR_START_NET: u32 = 1;

impl Skb<'_> {
    #[inline(always)]
    fn raw(&self) -> *mut __sk_buff {
        self.0.skb.skb
    }

    /// Returns the length of the packet in bytes, from the start of the program's view.
    #[inline(always)]
    pub fn len(&self) -> u32 {
        load!(self.raw(), len)
    }

    /// Returns the EtherType in host order.
    #[inline(always)]
    pub fn ethertype(&self) -> u16 {
        u16::from_be(load!(self.raw(), protocol) as u16)
    }

    /// Returns the id of the packet's outer VLAN tag, which the kernel keeps outside its bytes.
    #[inline(always)]
    pub fn vlan(&self) -> Option<u16> {
        let (present, tag) = (load!(self.raw(), vlan_present), load!(self.raw(), vlan_tci));
        if present != 0 { Some(tag as u16 & 0x0fff) } else { None }
    }

    /// Returns the index of the interface on which the program runs.
    #[inline(always)]
    pub fn interface(&self) -> u32 {
        load!(self.raw(), ifindex)
    }

    /// Returns the packet's mark, which a socket sets by `SO_MARK`.
    #[inline(always)]
    pub fn mark(&self) -> u32 {
        load!(self.raw(), mark)
    }

    /// Reads a plain value at `offset` from the start of the network header; `None` if the packet ends before its end.
    #[inline(always)]
    pub fn read<T: Copy>(&self, offset: u32) -> Option<T> {
        self.read_from(BPF_HDR_START_NET, offset)
    }

    /// Returns destination and source of the Ethernet header, as read by `hardware_address`.
    #[inline(always)]
    pub fn hardware(&self) -> Option<(u64, u64)> {
        let words: [u16; 6] = self.read_from(BPF_HDR_START_MAC, 0)?;
        let number = |at: usize| {
            let (a, b, c) =
                (words[at].to_ne_bytes(), words[at + 1].to_ne_bytes(), words[at + 2].to_ne_bytes());
            hardware_address([a[0], a[1], b[0], b[1], c[0], c[1]])
        };
        Some((number(0), number(3)))
    }

    #[inline(always)]
    fn read_from<T: Copy>(&self, start: u32, offset: u32) -> Option<T> {
        let mut value = MaybeUninit::<T>::uninit();
        let to = value.as_mut_ptr().cast();
        // SAFETY: `to` has room for the size given.
        let failed = unsafe {
            bpf_skb_load_bytes_relative(self.raw().cast(), offset, to, size_of::<T>() as u32, start)
        };
        if failed != 0 {
            return None;
        }
        // SAFETY: filled by the helper; every `T` used here is an array of integers.
        Some(unsafe { value.assume_init() })
    }

    /// Returns the id of the cgroup of the packet's socket; 0 without a socket.
    #[inline(always)]
    pub fn cgroup(&self) -> u64 {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_skb_cgroup_id(self.raw()) }
    }

    /// Returns the id of the ancestor at `level` of the socket's cgroup; 0 if there is none at that level.
    #[inline(always)]
    pub fn ancestor_cgroup(&self, level: u32) -> u64 {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_skb_ancestor_cgroup_id(self.raw(), level as i32) }
    }

    /// Returns true if the packet belongs to a TCP socket. A socket that is not full belongs to a connection that is being
    /// opened or closed, which only TCP has.
    #[inline(always)]
    pub fn is_tcp_socket(&self) -> bool {
        // SAFETY: aligned load of a context field.
        let sk = unsafe { (*self.raw()).__bindgen_anon_2.sk };
        if sk.is_null() {
            return false;
        }
        // SAFETY: `sk` is the context's socket, not null.
        let full = unsafe { bpf_sk_fullsock(sk) };
        if full.is_null() {
            return true;
        }
        load!(full, type_) == SOCK_STREAM
    }

    /// Returns true if the packet's socket has sent a SYN that is not answered: the packet is this SYN.
    #[inline(always)]
    pub fn is_connecting(&self) -> bool {
        // SAFETY: aligned load of a context field.
        let sk = unsafe { (*self.raw()).__bindgen_anon_2.sk };
        !sk.is_null() && load!(sk, state) == BPF_TCP_SYN_SENT
    }

    /// Returns true if the packet's TCP socket has sent a segment again.
    #[inline(always)]
    pub fn is_repeated(&self) -> bool {
        // SAFETY: aligned load of a context field.
        let sk = unsafe { (*self.raw()).__bindgen_anon_2.sk };
        if sk.is_null() {
            return false;
        }
        // SAFETY: `sk` is the context's socket, not null.
        let tcp = unsafe { bpf_tcp_sock(sk) };
        !tcp.is_null() && load!(tcp, total_retrans) != 0
    }

    /// Returns the number of the next byte that the packet's TCP socket sends, if everything before is acknowledged.
    #[inline(always)]
    pub fn next_of_idle(&self) -> Option<u32> {
        // SAFETY: aligned load of a context field.
        let sk = unsafe { (*self.raw()).__bindgen_anon_2.sk };
        if sk.is_null() {
            return None;
        }
        // SAFETY: `sk` is the context's socket, not null.
        let tcp = unsafe { bpf_tcp_sock(sk) };
        if tcp.is_null() {
            return None;
        }
        let next = load!(tcp, snd_nxt);
        if load!(tcp, snd_una) == next { Some(next) } else { None }
    }

    /// Returns the head of the packet's TCP segment. Its IP header has no options.
    #[inline(always)]
    pub fn segment_head(&self) -> Option<SegmentHead> {
        const IPV4_HEADER: u32 = 20;
        const IPV6_HEADER: u32 = 40;
        let (start, head): (u32, [u32; 4]) = match self.ethertype() {
            ETH_P_IP => (IPV4_HEADER, self.read(IPV4_HEADER)?),
            ETH_P_IPV6 => (IPV6_HEADER, self.read(IPV6_HEADER)?),
            _ => return None,
        };
        Some(SegmentHead::new(&head, self.len().wrapping_sub(start)))
    }

    /// Copies the packet's first bytes to `to` and returns their number; 0 if the packet is shorter than a SYN.
    ///
    /// # Safety
    /// `to` points to live memory of its type, which need not be initialised.
    #[inline(always)]
    pub unsafe fn copy_packet(&self, to: *mut [u8; HELD_PACKET_MAX]) -> u32 {
        let mut length = self.len();
        if length > HELD_PACKET_MAX as u32 {
            length = HELD_PACKET_MAX as u32;
        }
        if length < HELD_PACKET_MIN as u32 {
            return 0;
        }
        // SAFETY: `to` has room for `length` bytes, which is at most its size.
        let failed = unsafe { bpf_skb_load_bytes(self.raw().cast(), 0, to.cast(), length) };
        if failed == 0 { length } else { 0 }
    }

    /// Returns the names stored in the packet's socket.
    #[inline(always)]
    pub fn names(&self) -> Option<Names> {
        // SAFETY: aligned load of a context field.
        names_of(unsafe { (*self.raw()).__bindgen_anon_2.sk })
    }
}

/// Returns true if an agent listens for captured connections of this slot.
#[inline(always)]
pub fn has_capture_listener(slot: u32) -> bool {
    let map = (&raw const CAPTURERS).cast_mut().cast();
    // SAFETY: the map's key is the slot.
    let sk = unsafe { bpf_map_lookup_elem(map, (&raw const slot).cast()) };
    if sk.is_null() {
        return false;
    }
    // SAFETY: the lookup took a reference.
    unsafe { bpf_sk_release(sk) };
    true
}

/// Asks the kernel whether a client's acknowledgement carries a SYN cookie of a listener of the agent, by its index in the
/// map. `ip` is the acknowledgement's IP header.
#[inline(always)]
pub fn is_syn_cookie<const IP_WORDS: usize>(
    listener: u32,
    ip: &mut [u32; IP_WORDS],
    tcp: &mut [u32; 5],
) -> bool {
    let map = (&raw const LISTENERS).cast_mut().cast();
    // SAFETY: the map's key is the index.
    let sk = unsafe { bpf_map_lookup_elem(map, (&raw const listener).cast()) };
    if sk.is_null() {
        return false;
    }
    let (ip_bytes, tcp_bytes) = (size_of_val(ip) as u32, size_of_val(tcp) as u32);
    // SAFETY: `sk` is a socket of the map, and both headers are of the sizes given.
    let found = unsafe {
        bpf_tcp_check_syncookie(
            sk,
            ip.as_mut_ptr().cast(),
            ip_bytes,
            tcp.as_mut_ptr().cast::<tcphdr>(),
            tcp_bytes,
        )
    };
    // SAFETY: the lookup took a reference.
    unsafe { bpf_sk_release(sk) };
    found == 0
}

//! The raw context of the guard's programs.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{
        bpf_sk_fullsock, bpf_skb_ancestor_cgroup_id, bpf_skb_cgroup_id, bpf_skb_load_bytes_relative,
    },
    programs::SkBuffContext,
};
use core::mem::MaybeUninit;
use tacit_abi::Names;

use super::names_of;

const SOCK_STREAM: u32 = 1;

/// Context of the guard's programs: a packet, and the socket it belongs to, if any.
pub struct Skb<'a>(pub &'a SkBuffContext);

/// Offsets count from the network header.
const BPF_HDR_START_NET: u32 = 1;

impl Skb<'_> {
    #[inline(always)]
    fn raw(&self) -> *mut __sk_buff {
        self.0.skb.skb
    }

    /// Bytes of the packet, counted from where the program's view begins.
    #[inline(always)]
    pub fn len(&self) -> u32 {
        load!(self.raw(), len)
    }

    /// EtherType in host order.
    #[inline(always)]
    pub fn ethertype(&self) -> u16 {
        u16::from_be(load!(self.raw(), protocol) as u16)
    }

    /// Does it carry a VLAN's tag beside its bytes?
    #[inline(always)]
    pub fn has_vlan(&self) -> bool {
        load!(self.raw(), vlan_present) != 0
    }

    /// Index of the interface it is seen on.
    #[inline(always)]
    pub fn interface(&self) -> u32 {
        load!(self.raw(), ifindex)
    }

    /// A plain value at `offset` behind the start of the network header; `None` when the packet ends before.
    #[inline(always)]
    pub fn read<T: Copy>(&self, offset: u32) -> Option<T> {
        let mut value = MaybeUninit::<T>::uninit();
        let to = value.as_mut_ptr().cast();
        // SAFETY: `to` has room for the size given.
        let failed = unsafe {
            bpf_skb_load_bytes_relative(
                self.raw().cast(),
                offset,
                to,
                size_of::<T>() as u32,
                BPF_HDR_START_NET,
            )
        };
        if failed != 0 {
            return None;
        }
        // SAFETY: filled by the helper; all `T` used here are arrays of integers.
        Some(unsafe { value.assume_init() })
    }

    /// Id of the cgroup of the packet's socket; 0 when it has none.
    #[inline(always)]
    pub fn cgroup(&self) -> u64 {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_skb_cgroup_id(self.raw()) }
    }

    /// Id of that cgroup's ancestor at `level`; 0 when there is none so deep.
    #[inline(always)]
    pub fn ancestor_cgroup(&self, level: u32) -> u64 {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_skb_ancestor_cgroup_id(self.raw(), level as i32) }
    }

    /// Does the packet belong to a TCP socket? One without a full socket belongs to a connection that begins or ends:
    /// only TCP has such.
    #[inline(always)]
    pub fn is_of_tcp(&self) -> bool {
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

    /// Names kept in the packet's socket.
    #[inline(always)]
    pub fn names(&self) -> Option<Names> {
        // SAFETY: aligned load of a context field.
        names_of(unsafe { (*self.raw()).__bindgen_anon_2.sk })
    }
}

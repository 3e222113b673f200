//! The only file that touches raw contexts. Loads and stores are single aligned words and volatile: LLVM merges
//! neighbouring 4-byte accesses into one of 8 bytes, which the verifier refuses for contexts.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_addr, sockaddr},
    btf_maps::lpm_trie::Key,
    helpers::generated::{
        bpf_bind, bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_netns_cookie,
        bpf_ktime_get_ns, bpf_set_retval, bpf_setsockopt, bpf_sk_storage_delete, bpf_sk_storage_get,
        bpf_sock_ops_cb_flags_set,
    },
    programs::{SkLookupContext, SockAddrContext, SockOpsContext},
};
use core::{ffi::c_void, ptr};
use tacit_abi::{Address, ClearKey, Inbound, Mode, Names, PortKey, Tuple};

use crate::maps::{AGENTS, CLEAR, MESH, NAMES, NODE, PORT_MODES, STATE};

/// Of the kernel's headers.
const IPPROTO_TCP: i32 = 6;
const TCP_CONGESTION: i32 = 13;

/// Loads a word of a context.
macro_rules! load {
    ($ctx:expr, $field:ident) => {
        // SAFETY: aligned word of a context that this program type may read.
        unsafe { (&raw const (*$ctx).$field).read_volatile() }
    };
}

/// Loads a context's field of four words, word by word.
macro_rules! load_words {
    ($ctx:expr, $field:ident) => {
        [load_words!(@ $ctx, $field, 0), load_words!(@ $ctx, $field, 1), load_words!(@ $ctx, $field, 2), load_words!(@ $ctx, $field, 3)]
    };
    (@ $ctx:expr, $field:ident, $index:literal) => {
        // SAFETY: as for `load!`.
        unsafe { (&raw const (*$ctx).$field[$index]).read_volatile() }
    };
}

/// Stores a word into a context.
macro_rules! store {
    ($ctx:expr, $($field:tt)+) => { store!(@ $ctx, () $($field)+) };
    (@ $ctx:expr, ($($f:tt)*) = $value:expr) => {
        // SAFETY: aligned word of a context that this program type may write.
        unsafe { (&raw mut (*$ctx).$($f)*).write_volatile($value) }
    };
    (@ $ctx:expr, ($($f:tt)*) $t:tt $($rest:tt)+) => { store!(@ $ctx, ($($f)* $t) $($rest)+) };
}

const AF_INET: u32 = 2;
const AF_INET6: u16 = 10;

/// `struct sockaddr_in6`; all of it in network order.
#[repr(C)]
struct SocketAddressV6 {
    family: u16,
    port: u16,
    flow: u32,
    address: [u32; 4],
    scope: u32,
}

mod skb;

pub use skb::Skb;

/// Bits of a full address in the mesh's map.
const FULL_PREFIX: u32 = 128;

/// Which hook runs: the address stands in another field.
#[derive(Clone, Copy)]
pub enum Family {
    V4,
    V6,
}

/// Id of the calling process' ancestor cgroup at `level`; 0 when there is none so deep.
#[inline(always)]
pub fn current_ancestor_cgroup(level: u32) -> u64 {
    // SAFETY: takes no pointer.
    unsafe { bpf_get_current_ancestor_cgroup_id(level as i32) }
}

/// Id of the calling process' own cgroup.
#[inline(always)]
pub fn current_cgroup() -> u64 {
    // SAFETY: takes no pointer.
    unsafe { bpf_get_current_cgroup_id() }
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: takes no pointer.
    unsafe { bpf_ktime_get_ns() }
}

/// Makes the system call fail with `error` instead of EPERM, once the program has denied it.
#[inline(always)]
pub fn set_error(error: i32) {
    // SAFETY: takes no pointer.
    unsafe { bpf_set_retval(-error) };
}

/// Does the agent give no sign of life? Without an entry: it gives none.
#[inline(always)]
pub fn is_stale() -> bool {
    STATE.get(0).is_none_or(|state| state.is_stale(now()))
}

/// Are pods without an entry held to STRICT? Without a state nothing was ever enforced here.
#[inline(always)]
pub fn default_is_strict() -> bool {
    STATE.get(0).is_some_and(|state| state.default_mode == Mode::Strict as u32)
}

/// Is it the cgroup of an agent?
#[inline(always)]
pub fn is_agent_cgroup(id: u64) -> bool {
    // SAFETY: only presence is read.
    unsafe { AGENTS.get(&id) }.is_some()
}

/// Is it one of the node's own addresses?
#[inline(always)]
pub fn is_node(address: &Address) -> bool {
    // SAFETY: only presence is read.
    unsafe { NODE.get(address) }.is_some()
}

/// The mode of one port of a pod, when it has its own.
#[inline(always)]
pub fn port_mode(slot: u32, port: u16) -> Option<u32> {
    // SAFETY: copied at once; the agent replaces entries whole.
    unsafe { PORT_MODES.get(&PortKey { slot, port: u32::from(port) }) }.copied()
}

/// May strict pods reach this end in clear?
#[inline(always)]
pub fn is_allowed_clear(address: &Address, port: u16, protocol: u32) -> bool {
    // SAFETY: only presence is read.
    unsafe { CLEAR.get(&ClearKey { address: *address, port: u32::from(port), protocol }) }.is_some()
}

/// Is the address inside the mesh's ranges?
#[inline(always)]
pub fn in_mesh(address: &Address) -> bool {
    MESH.get(&Key::new(FULL_PREFIX, address.0)).is_some()
}

/// The map as the helpers want it: its symbol's address, which the loader replaces.
#[inline(always)]
fn names_map() -> *mut c_void {
    (&raw const NAMES).cast_mut().cast()
}

/// Names kept in `sk`, copied.
#[inline(always)]
fn names_of(sk: *mut bpf_sock) -> Option<Names> {
    if sk.is_null() {
        return None;
    }
    // SAFETY: `sk` is the context's socket, not null; without the create flag nothing is written.
    let found = unsafe { bpf_sk_storage_get(names_map(), sk.cast(), ptr::null_mut(), 0) }.cast::<Names>();
    // SAFETY: null or a live storage of this size.
    unsafe { found.as_ref() }.copied()
}

/// Keeps `names` in `sk`; false when there was no memory.
#[inline(always)]
fn keep_names(sk: *mut bpf_sock, mut names: Names) -> bool {
    if sk.is_null() {
        return false;
    }
    let flags = BPF_SK_STORAGE_GET_F_CREATE.into();
    // SAFETY: `sk` is the context's socket, not null; `names` is of the map's value size.
    let kept = unsafe { bpf_sk_storage_get(names_map(), sk.cast(), (&raw mut names).cast(), flags) };
    if kept.is_null() {
        return false;
    }
    // SAFETY: a live storage of this size. Written again: an existing storage is returned as it was.
    unsafe { *kept.cast::<Names>() = names };
    true
}

/// Context of connect, getpeername and getsockname hooks.
pub struct SockAddr<'a>(pub &'a SockAddrContext);

impl SockAddr<'_> {
    #[inline(always)]
    fn raw(&self) -> *mut bpf_sock_addr {
        self.0.sock_addr
    }

    #[inline(always)]
    fn sk(&self) -> *mut bpf_sock {
        // SAFETY: aligned load of a context field.
        unsafe { (*self.raw()).__bindgen_anon_1.sk }
    }

    #[inline(always)]
    pub fn address(&self, family: Family) -> Address {
        match family {
            Family::V4 => Address::from_v4_be(load!(self.raw(), user_ip4)),
            Family::V6 => Address(load_words!(self.raw(), user_ip6)),
        }
    }

    #[inline(always)]
    pub fn set_address(&self, family: Family, address: &Address) {
        match family {
            Family::V4 => store!(self.raw(), user_ip4 = address.v4_be()),
            Family::V6 => {
                store!(self.raw(), user_ip6[0] = address.0[0]);
                store!(self.raw(), user_ip6[1] = address.0[1]);
                store!(self.raw(), user_ip6[2] = address.0[2]);
                store!(self.raw(), user_ip6[3] = address.0[3]);
            }
        }
    }

    /// The socket's own end, as the kernel knows it.
    #[inline(always)]
    pub fn own_address(&self, family: Family) -> Option<Address> {
        let sk = self.sk();
        if sk.is_null() {
            return None;
        }
        Some(match family {
            Family::V4 => Address::from_v4_be(load!(sk, src_ip4)),
            Family::V6 => Address(load_words!(sk, src_ip6)),
        })
    }

    /// Makes the IPv6 address `own` the socket's own end, the port still to be chosen by the kernel; true also when it is
    /// that already. It would be chosen anyway, if the connection left the pod. The socket keeps it when it is connected
    /// again elsewhere.
    #[inline(always)]
    pub fn stand_at(&self, own: &Address) -> bool {
        if own.is_none() {
            return false;
        }
        if self.own_address(Family::V6).is_some_and(|bound| bound.same(own)) {
            return true;
        }
        let mut name = SocketAddressV6 { family: AF_INET6, port: 0, flow: 0, address: own.0, scope: 0 };
        let bytes = size_of::<SocketAddressV6>() as i32;
        // SAFETY: the helper takes the program's own context and reads as many bytes as it is told.
        unsafe { bpf_bind(self.raw(), (&raw mut name).cast::<sockaddr>(), bytes) == 0 }
    }

    #[inline(always)]
    pub fn port(&self) -> u16 {
        u16::from_be(load!(self.raw(), user_port) as u16)
    }

    #[inline(always)]
    pub fn set_port(&self, port: u16) {
        store!(self.raw(), user_port = u32::from(port.to_be()));
    }

    #[inline(always)]
    pub fn protocol(&self) -> u32 {
        load!(self.raw(), protocol)
    }

    #[inline(always)]
    pub fn socket_type(&self) -> u32 {
        load!(self.raw(), type_)
    }

    #[inline(always)]
    pub fn netns_cookie(&self) -> u64 {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_get_netns_cookie(self.0.as_ptr()) }
    }

    #[inline(always)]
    pub fn names(&self) -> Option<Names> {
        names_of(self.sk())
    }

    #[inline(always)]
    pub fn remember_names(&self, names: Names) -> bool {
        keep_names(self.sk(), names)
    }

    #[inline(always)]
    pub fn forget_names(&self) {
        let sk = self.sk();
        if !sk.is_null() {
            // SAFETY: `sk` is the context's socket, not null.
            unsafe { bpf_sk_storage_delete(names_map(), sk.cast()) };
        }
    }
}

/// Context of sock_ops.
pub struct SockOps<'a>(pub &'a SockOpsContext);

impl SockOps<'_> {
    #[inline(always)]
    fn sk(&self) -> *mut bpf_sock {
        // SAFETY: aligned load of a context field.
        unsafe { (*self.0.ops).__bindgen_anon_2.sk }
    }

    #[inline(always)]
    pub fn names(&self) -> Option<Names> {
        names_of(self.sk())
    }

    #[inline(always)]
    pub fn remember_names(&self, names: Names) -> bool {
        keep_names(self.sk(), names)
    }

    #[inline(always)]
    pub fn watch_state(&self, flag: i32) {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_sock_ops_cb_flags_set(self.0.ops, flag) };
    }

    /// Tells the kernel that this connection ends on loopback, where nothing is lost and nobody else is in the way: it
    /// sends by `reno`, whatever the node prefers for its network. BBR paces packets by a timer, here too: one stream through
    /// the tunnel reached 0.60 of the direct throughput with it, and reaches 0.75. Where it fails nothing is lost but that.
    #[inline(always)]
    pub fn ends_on_loopback(&self) {
        let mut name = *b"reno\0";
        // SAFETY: the helper takes the program's own context and reads the five bytes.
        let _ = unsafe {
            bpf_setsockopt(self.0.as_ptr(), IPPROTO_TCP, TCP_CONGESTION, name.as_mut_ptr().cast(), 5)
        };
    }

    #[inline(always)]
    pub fn netns_cookie(&self) -> u64 {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_get_netns_cookie(self.0.as_ptr()) }
    }

    /// Addresses and ports of the connection. To be called before any branch: of loads in several branches LLVM makes
    /// one with a computed offset, which the verifier refuses for contexts.
    #[inline(always)]
    pub fn ends(&self) -> Ends {
        let ops = self.0.ops;
        let v4 = load!(ops, family) == AF_INET;
        Ends {
            local: pick(v4, load!(ops, local_ip4), load_words!(ops, local_ip6)),
            remote: pick(v4, load!(ops, remote_ip4), load_words!(ops, remote_ip6)),
            local_port: load!(ops, local_port),
            // In network order in the upper half.
            remote_port: u32::from_be(load!(ops, remote_port)),
        }
    }
}

/// Both ends of a connection, seen from one socket.
pub struct Ends {
    local: Address,
    remote: Address,
    local_port: u32,
    remote_port: u32,
}

impl Ends {
    /// Key of the connection when this socket connects.
    #[inline(always)]
    pub fn connecting(&self, netns_cookie: u64) -> Tuple {
        Tuple {
            netns_cookie,
            local: self.local,
            remote: self.remote,
            local_port: self.local_port,
            remote_port: self.remote_port,
        }
    }

    /// Key of the connection when this socket accepts.
    #[inline(always)]
    pub fn accepting(&self, netns_cookie: u64) -> Tuple {
        Tuple {
            netns_cookie,
            local: self.remote,
            remote: self.local,
            local_port: self.remote_port,
            remote_port: self.local_port,
        }
    }
}

#[inline(always)]
fn pick(v4: bool, four: u32, six: [u32; 4]) -> Address {
    if v4 { Address::from_v4_be(four) } else { Address(six) }
}

/// Context of sk_lookup.
pub struct SkLookup<'a>(pub &'a SkLookupContext);

impl SkLookup<'_> {
    /// Protocol of the packet.
    #[inline(always)]
    pub fn protocol(&self) -> u32 {
        load!(self.0.lookup, protocol)
    }

    /// The connection asked for. As with [`SockOps::ends`], all is loaded before any branch.
    #[inline(always)]
    pub fn inbound(&self) -> Inbound {
        let raw = self.0.lookup;
        let v4 = load!(raw, family) == AF_INET;
        Inbound {
            local: pick(v4, load!(raw, local_ip4), load_words!(raw, local_ip6)),
            remote: pick(v4, load!(raw, remote_ip4), load_words!(raw, remote_ip6)),
            port: load!(raw, local_port) as u16,
            remote_port: u16::from_be(load!(raw, remote_port)),
        }
    }
}

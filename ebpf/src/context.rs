//! Access to raw contexts; no other file has it. Loads and stores are single aligned words and volatile: LLVM merges
//! neighbouring 4-byte accesses into one of 8 bytes, which the verifier rejects for contexts.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_CURRENT_NETNS, BPF_RB_CONS_POS, BPF_RB_PROD_POS, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock,
        bpf_sock_addr, sockaddr,
    },
    helpers::generated::{
        bpf_bind, bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_netns_cookie,
        bpf_getsockopt, bpf_ktime_get_ns, bpf_ringbuf_query, bpf_set_retval, bpf_setsockopt, bpf_sk_release,
        bpf_sk_storage_delete, bpf_sk_storage_get, bpf_skc_lookup_tcp, bpf_skc_to_tcp6_sock,
        bpf_sock_ops_cb_flags_set,
    },
    programs::{SkLookupContext, SockAddrContext, SockOpsContext},
};
use core::{ffi::c_void, ptr};
use tacit_abi::{Address, Inbound, LOOPBACK_UNSENT_BYTES, Names, Tuple};

use crate::maps::{HeldRing, NAMES};

/// From the kernel's headers, as are the constants below.
const IPPROTO_TCP: i32 = 6;
const SOL_SOCKET: i32 = 1;
const SO_MARK: i32 = 36;
const TCP_CONGESTION: i32 = 13;
const TCP_NOTSENT_LOWAT: i32 = 25;

/// Loads a word of a context.
macro_rules! load {
    ($ctx:expr, $field:ident) => {
        // SAFETY: aligned word of a context, readable for this program type.
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
        // SAFETY: aligned word of a context, writable for this program type.
        unsafe { (&raw mut (*$ctx).$($f)*).write_volatile($value) }
    };
    (@ $ctx:expr, ($($f:tt)*) $t:tt $($rest:tt)+) => { store!(@ $ctx, ($($f)* $t) $($rest)+) };
}

/// Index of the loopback interface, which the kernel gives to no other interface of a namespace.
pub const LOOPBACK_INDEX: u32 = 1;

/// Offset in `struct sock_common` of the byte with its bit fields, and the field `skc_ipv6only` in it. The verifier checks the offset.
const BIT_FIELDS: usize = 19;
const IPV6_ONLY: u8 = if cfg!(target_endian = "little") { 1 << 5 } else { 1 << 2 };

const AF_INET: u32 = 2;
const AF_INET6: u16 = 10;

/// `struct sockaddr_in6`, in network order but for `family`.
#[repr(C)]
struct SocketAddressV6 {
    family: u16,
    port: u16,
    flow: u32,
    address: [u32; 4],
    scope: u32,
}

/// Both ends of an IPv6 connection, in network order, as a packet to the local end has them: `ipv6` of `struct bpf_sock_tuple`.
#[repr(C)]
struct SocketTupleV6 {
    remote: [u32; 4],
    local: [u32; 4],
    remote_port: u16,
    local_port: u16,
}

mod skb;
mod timers;

pub use skb::{Skb, has_capture_listener, is_syn_cookie};
pub use timers::TimerOption;

/// Family of the hook, which decides the context field that holds the address.
#[derive(Clone, Copy)]
pub enum Family {
    V4,
    V6,
}

/// Returns the id of the calling process' ancestor cgroup at `level`; 0 if there is none at that level.
#[inline(always)]
pub fn current_ancestor_cgroup(level: u32) -> u64 {
    // SAFETY: takes no pointer.
    unsafe { bpf_get_current_ancestor_cgroup_id(level as i32) }
}

/// Returns the id of the calling process' cgroup.
#[inline(always)]
pub fn current_cgroup() -> u64 {
    // SAFETY: takes no pointer.
    unsafe { bpf_get_current_cgroup_id() }
}

/// Returns the time in nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: takes no pointer.
    unsafe { bpf_ktime_get_ns() }
}

/// Sets the error of a denied system call, which is EPERM otherwise.
#[inline(always)]
pub fn set_error(error: i32) {
    // SAFETY: takes no pointer.
    unsafe { bpf_set_retval(-error) };
}

/// A position in a ring, in bytes since it was made.
#[derive(Clone, Copy)]
pub enum RingPosition {
    /// The agent has read up to here.
    Consumed,
    /// Records were added up to here.
    Produced,
}

/// Returns a position in `ring`.
#[inline(always)]
pub fn ring_position(ring: &'static HeldRing, position: RingPosition) -> u64 {
    let which = match position {
        RingPosition::Consumed => BPF_RB_CONS_POS,
        RingPosition::Produced => BPF_RB_PROD_POS,
    };
    // SAFETY: the address of a map's symbol, which the loader replaces.
    unsafe { bpf_ringbuf_query(ptr::from_ref(ring).cast_mut().cast(), which.into()) }
}

/// Returns the map as the helpers expect it: its symbol's address, which the loader replaces.
#[inline(always)]
fn names_map() -> *mut c_void {
    (&raw const NAMES).cast_mut().cast()
}

/// Returns a copy of the names stored in `sk`.
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

/// Stores `names` in `sk`; false without memory.
#[inline(always)]
fn store_names(sk: *mut bpf_sock, mut names: Names) -> bool {
    if sk.is_null() {
        return false;
    }
    let flags = BPF_SK_STORAGE_GET_F_CREATE.into();
    // SAFETY: `sk` is the context's socket, not null; `names` is of the map's value size.
    let kept = unsafe { bpf_sk_storage_get(names_map(), sk.cast(), (&raw mut names).cast(), flags) };
    if kept.is_null() {
        return false;
    }
    // SAFETY: a live storage of this size. The helper does not overwrite an existing storage, so it is written here.
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

    /// Returns the socket's own address in the kernel.
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

    /// Binds the socket to the IPv6 address `own` without a port; true if it already is. The kernel would choose the same
    /// address for a connection that leaves the pod. The socket stays bound to it if it is connected elsewhere later.
    #[inline(always)]
    pub fn bind_to(&self, own: &Address) -> bool {
        if own.is_none() {
            return false;
        }
        if self.own_address(Family::V6).is_some_and(|bound| bound.same(own)) {
            return true;
        }
        let mut name = SocketAddressV6 { family: AF_INET6, port: 0, flow: 0, address: own.0, scope: 0 };
        let bytes = size_of::<SocketAddressV6>() as i32;
        // SAFETY: the helper takes the program's own context and reads `bytes` bytes of `name`.
        unsafe { bpf_bind(self.raw(), (&raw mut name).cast::<sockaddr>(), bytes) == 0 }
    }

    /// Returns true if the application has bound the socket to a port, which a connection from `own` to this port of `::1` uses.
    #[inline(always)]
    pub fn is_port_in_use(&self, own: &Address, remote_port: u16) -> bool {
        let sk = self.sk();
        if sk.is_null() {
            return false;
        }
        let local_port = load!(sk, src_port) as u16;
        if local_port == 0 {
            return false;
        }
        let mut ends = SocketTupleV6 {
            remote: Address::LOOPBACK_V6.0,
            local: own.0,
            remote_port: remote_port.to_be(),
            local_port: local_port.to_be(),
        };
        let bytes = size_of::<SocketTupleV6>() as u32;
        let ends = (&raw mut ends).cast();
        // SAFETY: the helper takes the program's own context and reads `bytes` bytes of `ends`.
        let found =
            unsafe { bpf_skc_lookup_tcp(self.0.as_ptr(), ends, bytes, BPF_F_CURRENT_NETNS as u64, 0) };
        if found.is_null() {
            return false;
        }
        // SAFETY: the helper gave a reference to this socket.
        unsafe { bpf_sk_release(found.cast()) };
        true
    }

    /// Returns true for an IPv6 socket that is bound to no address, and accepts v4-mapped destinations (IPV6_V6ONLY).
    #[inline(always)]
    pub fn takes_v4_mapped(&self) -> bool {
        if !self.own_address(Family::V6).is_some_and(|own| own.is_none()) {
            return false;
        }
        // SAFETY: the context's socket, not null.
        let socket = unsafe { bpf_skc_to_tcp6_sock(self.sk().cast()) };
        if socket.is_null() {
            return false;
        }
        // SAFETY: the verifier knows the type of `socket`, which begins with a `struct sock_common`.
        let bits = unsafe { socket.cast::<u8>().add(BIT_FIELDS).read_volatile() };
        bits & IPV6_ONLY == 0
    }

    /// Returns true if the socket is bound to a device other than the loopback.
    #[inline(always)]
    pub fn is_bound_to_link(&self) -> bool {
        let sk = self.sk();
        if sk.is_null() {
            return false;
        }
        let device = load!(sk, bound_dev_if);
        device != 0 && device != LOOPBACK_INDEX
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
    pub fn store_names(&self, names: Names) -> bool {
        store_names(self.sk(), names)
    }

    #[inline(always)]
    pub fn delete_names(&self) {
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
    pub fn store_names(&self, names: Names) -> bool {
        store_names(self.sk(), names)
    }

    /// Sets a callback flag. Flags of other programs stay: the helper replaces all.
    #[inline(always)]
    pub fn add_callback_flag(&self, flag: u32) {
        let flags = load!(self.0.ops, bpf_sock_ops_cb_flags) | flag;
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_sock_ops_cb_flags_set(self.0.ops, flags as i32) };
    }

    /// Sets the congestion control of a loopback connection to `reno`, regardless of the node's default.
    ///
    /// BBR paces packets by a timer, which costs throughput on loopback. An error changes nothing else and is ignored.
    #[inline(always)]
    pub fn use_reno(&self) {
        let mut name = *b"reno\0";
        // SAFETY: the helper takes the program's own context and reads the five bytes.
        let _ = unsafe {
            bpf_setsockopt(self.0.as_ptr(), IPPROTO_TCP, TCP_CONGESTION, name.as_mut_ptr().cast(), 5)
        };
    }

    /// Sets the mark of the connection's packets, from the first SYN on.
    #[inline(always)]
    pub fn set_mark(&self, mark: u32) {
        let mut mark = mark;
        // An error leaves the mark as it is. The agent reads it back.
        // SAFETY: the helper takes the program's own context and reads the four bytes.
        let _ = unsafe { bpf_setsockopt(self.0.as_ptr(), SOL_SOCKET, SO_MARK, (&raw mut mark).cast(), 4) };
    }

    /// Bounds the bytes that the connection keeps unsent, beside those that its reader has. On loopback the kernel would keep
    /// some 2.5 MiB, since it allows ten of the largest segments. A bound that the application chose stays, and so does one that
    /// cannot be read (before Linux 6.1). An error changes nothing else and is ignored.
    #[inline(always)]
    pub fn limit_unsent(&self) {
        let mut chosen = 0_u32;
        // SAFETY: the helper takes the program's own context and writes the four bytes.
        let failed = unsafe {
            bpf_getsockopt(self.0.as_ptr(), IPPROTO_TCP, TCP_NOTSENT_LOWAT, (&raw mut chosen).cast(), 4)
        };
        if failed != 0 || chosen != 0 {
            return;
        }
        let mut most = LOOPBACK_UNSENT_BYTES;
        // SAFETY: the helper takes the program's own context and reads the four bytes.
        let _ = unsafe {
            bpf_setsockopt(self.0.as_ptr(), IPPROTO_TCP, TCP_NOTSENT_LOWAT, (&raw mut most).cast(), 4)
        };
    }

    #[inline(always)]
    pub fn netns_cookie(&self) -> u64 {
        // SAFETY: the helper takes the program's own context.
        unsafe { bpf_get_netns_cookie(self.0.as_ptr()) }
    }

    /// Loads both ends of the connection. Call it before any branch: LLVM merges loads of several branches into one with a
    /// computed offset, which the verifier rejects for contexts.
    #[inline(always)]
    pub fn load_ends(&self) -> BothFamilies {
        let ops = self.0.ops;
        BothFamilies {
            is_v4: load!(ops, family) == AF_INET,
            v4: (Address::from_v4_be(load!(ops, local_ip4)), Address::from_v4_be(load!(ops, remote_ip4))),
            v6: (Address(load_words!(ops, local_ip6)), Address(load_words!(ops, remote_ip6))),
            local_port: load!(ops, local_port),
            // The kernel stores the port in network order in the upper half of the word.
            remote_port: u32::from_be(load!(ops, remote_port)),
        }
    }
}

/// Ends of a connection as the context has them: addresses of both families, and which of them hold.
pub struct BothFamilies {
    is_v4: bool,
    /// Local and remote.
    v4: (Address, Address),
    v6: (Address, Address),
    local_port: u32,
    remote_port: u32,
}

impl BothFamilies {
    /// Returns the ends of a connection.
    #[inline(always)]
    pub fn ends(&self) -> Ends {
        let (local, remote) = if self.is_v4 { self.v4 } else { self.v6 };
        Ends { local, remote, local_port: self.local_port, remote_port: self.remote_port }
    }

    /// Returns the ends in a handshake that the kernel has just made a socket for, by IPv4 and by IPv6. The socket's family is its
    /// listener's, so it does not say which of them hold.
    #[inline(always)]
    pub fn of_handshake(&self) -> [Inbound; 2] {
        [self.v4, self.v6].map(|(local, remote)| Inbound {
            local,
            remote,
            port: self.local_port as u16,
            remote_port: self.remote_port as u16,
        })
    }
}

/// Both ends of a connection, as one socket sees them.
pub struct Ends {
    local: Address,
    remote: Address,
    local_port: u32,
    remote_port: u32,
}

impl Ends {
    /// Returns the key of a connection that this socket opens.
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

    /// Returns the connection that this socket opens, as it arrives at its other end.
    #[inline(always)]
    pub fn arriving(&self) -> Inbound {
        Inbound {
            local: self.remote,
            remote: self.local,
            port: self.remote_port as u16,
            remote_port: self.local_port as u16,
        }
    }

    /// Returns the key of a connection that this socket accepts.
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
    /// Returns the packet's IP protocol number.
    #[inline(always)]
    pub fn protocol(&self) -> u32 {
        load!(self.0.lookup, protocol)
    }

    /// Returns the inbound connection. As in [`SockOps::load_ends`], all fields are loaded before any branch.
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

//! Options of a socket that decide when its kernel gives the peer up, and what the agent tells of the peer.

use aya_ebpf::{
    bindings::BPF_SK_STORAGE_GET_F_CREATE,
    helpers::generated::{
        bpf_getsockopt, bpf_load_hdr_opt, bpf_setsockopt, bpf_sk_storage_delete, bpf_sk_storage_get,
    },
};
use core::{ffi::c_void, ptr};
use tacit_abi::{Limits, TOLD_BYTES, TOLD_KIND, TOLD_MAGIC, Told};

use super::{IPPROTO_TCP, SOL_SOCKET, SockOps};
use crate::maps::SILENCES;

/// From the kernel's headers.
const SO_KEEPALIVE: i32 = 9;
const TCP_KEEPIDLE: i32 = 4;
const TCP_KEEPINTVL: i32 = 5;
const TCP_KEEPCNT: i32 = 6;
const TCP_USER_TIMEOUT: i32 = 18;

/// An option.
#[derive(Clone, Copy)]
pub enum TimerOption {
    KeepAlive,
    Idle,
    Interval,
    Count,
    UserTimeout,
}

impl TimerOption {
    #[inline(always)]
    const fn place(self) -> (i32, i32) {
        match self {
            Self::KeepAlive => (SOL_SOCKET, SO_KEEPALIVE),
            Self::Idle => (IPPROTO_TCP, TCP_KEEPIDLE),
            Self::Interval => (IPPROTO_TCP, TCP_KEEPINTVL),
            Self::Count => (IPPROTO_TCP, TCP_KEEPCNT),
            Self::UserTimeout => (IPPROTO_TCP, TCP_USER_TIMEOUT),
        }
    }
}

#[inline(always)]
fn silences_map() -> *mut c_void {
    (&raw const SILENCES).cast_mut().cast()
}

impl SockOps<'_> {
    /// Returns what the agent tells in the segment that is being handled.
    #[inline(always)]
    pub fn told(&self) -> Option<Told> {
        let mut option = [0_u8; TOLD_BYTES];
        // The helper searches for kind and magic, in an option of this length.
        (option[0], option[1], option[2], option[3]) = (TOLD_KIND, 4, TOLD_MAGIC[0], TOLD_MAGIC[1]);
        // SAFETY: the helper takes the program's own context and writes at most the bytes given.
        let length =
            unsafe { bpf_load_hdr_opt(self.0.ops, option.as_mut_ptr().cast(), TOLD_BYTES as u32, 0) };
        if length == TOLD_BYTES as i64 { Told::decode(&option) } else { None }
    }

    /// Returns the value of an option; `None` where it cannot be read.
    #[inline(always)]
    pub fn timer(&self, option: TimerOption) -> Option<u32> {
        let (level, name) = option.place();
        let mut value = 0_u32;
        // SAFETY: the helper takes the program's own context and writes the four bytes.
        let failed = unsafe { bpf_getsockopt(self.0.ops.cast(), level, name, (&raw mut value).cast(), 4) };
        if failed == 0 { Some(value) } else { None }
    }

    /// Sets an option. An error leaves it as it is.
    #[inline(always)]
    pub fn set_timer(&self, option: TimerOption, value: u32) {
        let (level, name) = option.place();
        let mut value = value;
        // SAFETY: the helper takes the program's own context and reads the four bytes.
        let _ = unsafe { bpf_setsockopt(self.0.ops.cast(), level, name, (&raw mut value).cast(), 4) };
    }

    /// Returns the options that the socket had before its peer was silent.
    #[inline(always)]
    pub fn limits(&self) -> Option<Limits> {
        let sk = self.sk();
        if sk.is_null() {
            return None;
        }
        // SAFETY: `sk` is the context's socket, not null; without the create flag nothing is written.
        let found =
            unsafe { bpf_sk_storage_get(silences_map(), sk.cast(), ptr::null_mut(), 0) }.cast::<Limits>();
        // SAFETY: null or a live storage of this size.
        unsafe { found.as_ref() }.copied()
    }

    /// Stores these options; false without memory.
    #[inline(always)]
    pub fn store_limits(&self, mut limits: Limits) -> bool {
        let sk = self.sk();
        if sk.is_null() {
            return false;
        }
        let flags = BPF_SK_STORAGE_GET_F_CREATE.into();
        // SAFETY: `sk` is the context's socket, not null; `limits` is of the map's value size.
        let kept = unsafe { bpf_sk_storage_get(silences_map(), sk.cast(), (&raw mut limits).cast(), flags) };
        !kept.is_null()
    }

    /// Deletes these options.
    #[inline(always)]
    pub fn delete_limits(&self) {
        let sk = self.sk();
        if !sk.is_null() {
            // SAFETY: `sk` is the context's socket, not null.
            unsafe { bpf_sk_storage_delete(silences_map(), sk.cast()) };
        }
    }
}

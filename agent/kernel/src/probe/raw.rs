//! Hand-assembled BPF programs and the bpf(2) commands that the trials need, below what aya offers.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

use super::super::link::{bpf, update_raw};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_BTF_LOAD: libc::c_long = 18;
const BPF_LINK_CREATE: libc::c_long = 28;

/// The name of the probe's programs and maps in the kernel, while they live.
const NAME: [u8; 16] = *b"tacit_probe\0\0\0\0\0";

/// A descriptor that cannot be: commands that know their job say so with EBADF.
const NOWHERE: RawFd = -1;

/// A program type with the place its programs are attached to; numbers of linux/bpf.h.
#[derive(Clone, Copy)]
pub(crate) struct Hook {
    program_type: u32,
    attach_type: u32,
}

impl Hook {
    pub(super) const CONNECT4: Self = Self::sock_addr(10);
    pub(super) const CONNECT6: Self = Self::sock_addr(11);
    pub(super) const GETPEERNAME4: Self = Self::sock_addr(29);
    pub(super) const GETPEERNAME6: Self = Self::sock_addr(30);
    pub(super) const GETSOCKNAME4: Self = Self::sock_addr(31);
    pub(super) const GETSOCKNAME6: Self = Self::sock_addr(32);
    pub(super) const SOCK_OPS: Self = Self { program_type: 13, attach_type: 3 };
    pub(super) const SK_LOOKUP: Self = Self { program_type: 30, attach_type: 36 };
    pub(super) const SKB_EGRESS: Self = Self { program_type: 8, attach_type: 1 };
    pub(super) const SKB_INGRESS: Self = Self { program_type: 8, attach_type: 0 };
    pub(super) const CLASSIFIER: Self = Self { program_type: 3, attach_type: 0 };
    pub(crate) const RAW_TRACEPOINT: Self = Self { program_type: 17, attach_type: 0 };
    pub(super) const TCX_INGRESS: Self = Self { program_type: 3, attach_type: 46 };

    const fn sock_addr(attach_type: u32) -> Self {
        Self { program_type: 18, attach_type }
    }
}

/// One instruction, as `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Insn {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl Insn {
    const fn new(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> Self {
        // Bit fields in C: their order follows the byte order.
        let registers = if cfg!(target_endian = "big") { dst << 4 | src } else { src << 4 | dst };
        Self { code, registers, offset, immediate }
    }

    /// `dst = value`
    pub(super) const fn set(dst: u8, value: i32) -> Self {
        Self::new(0xb7, dst, 0, 0, value)
    }

    /// `dst = src`
    pub(crate) const fn copy(dst: u8, src: u8) -> Self {
        Self::new(0xbf, dst, src, 0, 0)
    }

    /// `dst = value`, which takes two instructions.
    pub(super) const fn set_wide(dst: u8, value: u64) -> [Self; 2] {
        [Self::new(0x18, dst, 0, 0, value as i32), Self::new(0, 0, 0, 0, (value >> 32) as i32)]
    }

    /// `*(u32 *)(dst + offset) = src`
    pub(super) const fn store(dst: u8, offset: i16, src: u8) -> Self {
        Self::new(0x63, dst, src, offset, 0)
    }

    /// `if left != right, skip`
    pub(super) const fn skip_unless_equal(left: u8, right: u8, skip: i16) -> Self {
        Self::new(0x5d, left, right, skip, 0)
    }

    /// `dst = *(u64 *)(src + offset)`
    pub(crate) const fn load_wide(dst: u8, src: u8, offset: i16) -> Self {
        Self::new(0x79, dst, src, offset, 0)
    }

    /// `dst >>= src`
    pub(crate) const fn shift_right(dst: u8, src: u8) -> Self {
        Self::new(0x7f, dst, src, 0, 0)
    }

    /// `r0 = helper(r1, ..)`
    pub(crate) const fn call(helper: i32) -> Self {
        Self::new(0x85, 0, 0, 0, helper)
    }

    /// `return r0`
    pub(crate) const fn exit() -> Self {
        Self::new(0x95, 0, 0, 0, 0)
    }
}

/// Lets everything pass: 1 means so for every hook here.
pub(super) const NEUTRAL: [Insn; 2] = [Insn::set(0, 1), Insn::exit()];

#[repr(C)]
struct ProgramAttr {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
struct MapAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    entries_max: u32,
    flags: u32,
    inner_map: u32,
    numa_node: u32,
    name: [u8; 16],
    interface: u32,
    btf: u32,
    key_type: u32,
    value_type: u32,
}

#[repr(C)]
struct BtfAttr {
    btf: u64,
    log_buffer: u64,
    btf_size: u32,
    log_size: u32,
    log_level: u32,
    pad: u32,
}

#[repr(C)]
struct LinkAttr {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// Loads a program; it goes with its descriptor.
pub(crate) fn load(hook: Hook, program: &[Insn]) -> io::Result<OwnedFd> {
    let mut attr = ProgramAttr {
        program_type: hook.program_type,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
        name: NAME,
        interface: 0,
        attach_type: hook.attach_type,
    };
    bpf(BPF_PROG_LOAD, &mut attr).map(owned)
}

/// Loads type information that knows one integer.
pub(super) fn load_btf() -> io::Result<OwnedFd> {
    // struct btf_header; struct btf_type of kind INT and its encoding; strings. See Documentation/bpf/btf.rst.
    const MAGIC_AND_VERSION: u32 = if cfg!(target_endian = "big") { 0xeb9f_0100 } else { 0x0001_eb9f };
    const WORDS: [u32; 11] =
        [MAGIC_AND_VERSION, 24, 0, 16, 16, 4, 1, 1 << 24, 4, 32, u32::from_ne_bytes(*b"\0u4\0")];
    let mut attr = BtfAttr {
        btf: WORDS.as_ptr() as u64,
        log_buffer: 0,
        btf_size: size_of_val(&WORDS) as u32,
        log_size: 0,
        log_level: 0,
        pad: 0,
    };
    bpf(BPF_BTF_LOAD, &mut attr).map(owned)
}

/// Makes a map that stores one integer in sockets; `btf` is what [`load_btf`] loads.
pub(super) fn make_socket_storage(btf: &OwnedFd) -> io::Result<OwnedFd> {
    const SK_STORAGE: u32 = 24;
    const NO_PREALLOC: u32 = 1;
    /// The integer's number in the type information.
    const INTEGER: u32 = 1;
    let mut attr = MapAttr {
        map_type: SK_STORAGE,
        key_size: 4,
        value_size: 4,
        entries_max: 0,
        flags: NO_PREALLOC,
        inner_map: 0,
        numa_node: 0,
        name: NAME,
        interface: 0,
        btf: btf.as_raw_fd() as u32,
        key_type: INTEGER,
        value_type: INTEGER,
    };
    bpf(BPF_MAP_CREATE, &mut attr).map(owned)
}

/// Attaches `program`, until the answer is dropped.
pub(super) fn attach(program: &OwnedFd, hook: Hook, target: RawFd) -> io::Result<OwnedFd> {
    let mut attr = LinkAttr {
        program: program.as_raw_fd() as u32,
        target: target as u32,
        attach_type: hook.attach_type,
        flags: 0,
    };
    bpf(BPF_LINK_CREATE, &mut attr).map(owned)
}

/// Asks for a link of `program` to nowhere: the error, which tells whether the kernel knows such links.
pub(super) fn attach_nowhere(program: &OwnedFd, hook: Hook) -> io::Error {
    attach(program, hook, NOWHERE).err().unwrap_or_else(|| io::Error::other("a link to nowhere was made"))
}

/// Asks for another program in a link that is none: the error, as above.
pub(super) fn update_nothing(program: &OwnedFd) -> io::Error {
    update_raw(NOWHERE, program.as_fd())
        .err()
        .unwrap_or_else(|| io::Error::other("a link that is none was changed"))
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: bpf(2) just returned this descriptor to us; only its successful answers get here.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Before 5.11 what BPF needs counts as locked memory, of which a process may have little. Best effort: where the limit
/// cannot be raised, the trials say so.
pub(super) fn lift_memory_limit() {
    let all = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: `all` lives through the call.
    let _ = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const all) };
}

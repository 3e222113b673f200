//! Programs of others at the connect hooks of a cgroup, such as those of a network plugin, and the system call that loads them.

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
/// Programs that see the address of a socket call.
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
const LICENSE: &CStr = c"GPL";

/// A hook of a cgroup at which a program sees the address of a socket call.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Hook {
    /// `connect()` over IPv4.
    Connect4 = 10,
    /// Datagrams without `connect()` over IPv4.
    SendMsg4 = 14,
}

/// An instruction of BPF.
pub(crate) type Instruction = [u8; 8];

/// Encodes an instruction. `registers` has the destination in its lower half, and the source in its upper half.
pub(crate) fn instruction(code: u8, registers: u8, offset: i16, immediate: u32) -> Instruction {
    let mut bytes = [code, registers, 0, 0, 0, 0, 0, 0];
    bytes[2..4].copy_from_slice(&offset.to_ne_bytes());
    bytes[4..].copy_from_slice(&immediate.to_ne_bytes());
    bytes
}

/// Loads a program and attaches it to `cgroup`. It is detached when the returned link is closed.
///
/// # Errors
/// The kernel's.
pub(crate) fn attach(
    cgroup: &File,
    hook: Hook,
    name: [u8; 16],
    instructions: &[Instruction],
) -> io::Result<OwnedFd> {
    let mut load = LoadAttr {
        program_type: BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: LICENSE.as_ptr() as u64,
        name,
        attach_type: hook as u32,
        ..LoadAttr::default()
    };
    let program = descriptor(bpf(BPF_PROG_LOAD, &mut load)?);
    let mut link = LinkAttr {
        program: program.as_raw_fd() as u32,
        target: cgroup.as_raw_fd() as u32,
        attach_type: hook as u32,
        flags: 0,
    };
    Ok(descriptor(bpf(BPF_LINK_CREATE, &mut link)?))
}

#[repr(C)]
#[derive(Default)]
struct LoadAttr {
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
struct LinkAttr {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// The system call. `attr` must be laid out as the kernel's for `command`.
pub(crate) fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<RawFd> {
    // SAFETY: `attr` is a live prefix of `union bpf_attr` of the size given; pointers in it are valid for the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as RawFd) }
}

/// Takes ownership of a descriptor that [`bpf`] has returned.
pub(crate) fn descriptor(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel just returned this descriptor to us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

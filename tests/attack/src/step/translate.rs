//! A program of others at the connect hooks, such as the socket load balancer of a network plugin: it replaces one address by another.

use std::{
    fs::File,
    io,
    net::IpAddr,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, bail};

use super::{Given, Told, wait_for_go};

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
/// Programs that see the address of a socket call.
const SOCK_ADDR: u32 = 18;
/// `connect()`, and datagrams without one, over IPv4.
const HOOKS: [u32; 2] = [10, 14];
const NAME: [u8; 16] = *b"others_balancer\0";

#[repr(C)]
struct LoadAttr {
    program_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log: [u64; 2],
    kernel: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
struct LinkAttr {
    program: u32,
    cgroup: u32,
    attach_type: u32,
    flags: u32,
}

/// Translates the step's target address into the marker's, for processes of the cgroup that is the first extra argument, until it is
/// told to end.
pub(super) fn run(given: &Given) -> Result<Told> {
    let to = std::str::from_utf8(&given.marker)?.parse().context("the address to translate into")?;
    let (IpAddr::V4(from), IpAddr::V4(to)) = (given.target.ip(), to) else { bail!("addresses of IPv4") };
    let [from, to] = [from, to].map(|ip| u32::from_ne_bytes(ip.octets()));
    let cgroup = File::open(given.extra(0)?)?;
    let attached: Vec<OwnedFd> =
        HOOKS.iter().map(|hook| attach(&cgroup, *hook, from, to)).collect::<io::Result<_>>()?;
    wait_for_go()?;
    drop(attached);
    Ok(Told::Sent)
}

fn attach(cgroup: &File, attach_type: u32, from: u32, to: u32) -> io::Result<OwnedFd> {
    // code, destination and source register, offset, immediate
    let instruction = |code: u8, registers: u8, offset: i16, immediate: u32| {
        u64::from(code)
            | u64::from(registers) << 8
            | u64::from(offset as u16) << 16
            | u64::from(immediate) << 32
    };
    let program = [
        // r2 = the address; r3 = `from`; if they differ, skip two
        instruction(0x61, 0x12, 4, 0),
        instruction(0xb4, 0x03, 0, from),
        instruction(0x5d, 0x32, 2, 0),
        // the address = `to`
        instruction(0xb4, 0x02, 0, to),
        instruction(0x63, 0x21, 4, 0),
        // return 1
        instruction(0xb7, 0x00, 0, 1),
        instruction(0x95, 0x00, 0, 0),
    ];
    let mut load = LoadAttr {
        program_type: SOCK_ADDR,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"MIT".as_ptr() as u64,
        log: [0; 2],
        kernel: 0,
        flags: 0,
        name: NAME,
        interface: 0,
        attach_type,
    };
    let program = bpf(BPF_PROG_LOAD, &mut load)?;
    let (program, cgroup) = (program.as_raw_fd() as u32, cgroup.as_raw_fd() as u32);
    bpf(BPF_LINK_CREATE, &mut LinkAttr { program, cgroup, attach_type, flags: 0 })
}

fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: `attr` is an attribute of `command` of the size given, and what it points to lives through the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

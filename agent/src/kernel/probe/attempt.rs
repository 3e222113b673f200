//! Tries one feature. What the kernel answers becomes a [`Presence`]; a refusal for lack of rights is not an answer.

use std::{fs, io, os::fd::OwnedFd, path::Path};

use aya::{
    programs::ProgramError,
    sys::{SyscallError, is_helper_supported, is_map_supported},
};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::{
    super::{cgroup::Cgroup, netns::netns_cookie},
    Presence,
    features::Trial,
    raw::{self, Hook},
    seat,
};

/// The kernel's own type information.
const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";
/// ENOTSUPP of the kernel, which libc does not know.
const ENOTSUPP: i32 = 524;

pub(super) fn attempt(trial: &Trial, pin_path: &Path) -> Presence {
    match trial {
        Trial::Hook(hook) => made(raw::load(*hook, &raw::NEUTRAL)),
        Trial::Helper(program, helper) => supported(
            is_helper_supported(*program, *helper).map_err(system_error),
            "unknown to programs of this type",
        ),
        Trial::Map(kind) => supported(
            is_map_supported(*kind).map_err(|SyscallError { io_error, .. }| io_error),
            "unknown map type",
        ),
        // Not by aya's check, whose failing request costs the kernel some 20 ms of waiting.
        Trial::SocketStorage => made(raw::load_btf().and_then(|btf| raw::make_socket_storage(&btf))),
        Trial::Btf => made(raw::load_btf()),
        Trial::CgroupLink => {
            on_nothing(Hook::CONNECT4, libc::EBADF, |p| raw::attach_nowhere(p, Hook::CONNECT4))
        }
        Trial::NetnsLink => {
            on_nothing(Hook::SK_LOOKUP, libc::EBADF, |p| raw::attach_nowhere(p, Hook::SK_LOOKUP))
        }
        Trial::LinkUpdate => on_nothing(Hook::CONNECT4, libc::EBADF, raw::update_nothing),
        Trial::Tcx => {
            on_nothing(Hook::TCX_INGRESS, libc::ENODEV, |p| raw::attach_nowhere(p, Hook::TCX_INGRESS))
        }
        Trial::Bpffs => bpffs(pin_path),
        Trial::Cgroup2 => cgroup2(),
        Trial::SocketCgroup => seat::sockets_in_their_cgroup(),
        Trial::NetnsCookie => netns_cookie().map_or_else(|e| refused(&e), |_| Presence::Present),
        Trial::KernelFunction(name) => kernel_function(name),
        Trial::Ktls => ktls(),
    }
}

/// What an error of the kernel says about what was asked for.
pub(super) fn refused(error: &io::Error) -> Presence {
    match error.raw_os_error() {
        Some(libc::EINVAL | libc::E2BIG | libc::ENOPROTOOPT | libc::EOPNOTSUPP | ENOTSUPP) => {
            Presence::Absent(error.to_string())
        }
        Some(libc::EPERM | libc::EACCES) => Presence::Unknown(format!("{error}; run as root")),
        _ => Presence::Unknown(error.to_string()),
    }
}

/// Something that exists for this moment only.
fn made(result: io::Result<OwnedFd>) -> Presence {
    result.map_or_else(|e| refused(&e), |_| Presence::Present)
}

fn supported(answer: io::Result<bool>, why_not: &str) -> Presence {
    match answer {
        Ok(true) => Presence::Present,
        Ok(false) => Presence::Absent(why_not.to_owned()),
        Err(error) => refused(&error),
    }
}

fn system_error(error: ProgramError) -> io::Error {
    match error {
        ProgramError::SyscallError(SyscallError { io_error, .. }) => io_error,
        other => io::Error::other(other),
    }
}

/// Asks for something on a target that cannot be. A kernel that knows the thing misses the target, with
/// `missing_target`; one that does not calls the request invalid. So nothing is attached for a trial.
fn on_nothing(hook: Hook, missing_target: i32, ask: impl FnOnce(&OwnedFd) -> io::Error) -> Presence {
    let program = match raw::load(hook, &raw::NEUTRAL) {
        Ok(program) => program,
        Err(error) => return refused(&error),
    };
    let error = ask(&program);
    if error.raw_os_error() == Some(missing_target) { Presence::Present } else { refused(&error) }
}

fn bpffs(pin_path: &Path) -> Presence {
    let there = pin_path.ancestors().find(|p| p.exists()).unwrap_or(pin_path);
    match statfs(there) {
        Ok(found) if found.filesystem_type() == BPF_FS_MAGIC => Presence::Present,
        Ok(_) => Presence::Absent(format!("{} is not on a BPF file system", pin_path.display())),
        Err(error) => Presence::Unknown(format!("{}: {error}", there.display())),
    }
}

fn cgroup2() -> Presence {
    Cgroup::of_self().map_or_else(|e| Presence::Absent(e.to_string()), |_| Presence::Present)
}

/// Functions that programs may call stand in the kernel's type information by name.
fn kernel_function(name: &str) -> Presence {
    let btf = match fs::read(KERNEL_BTF) {
        Ok(btf) => btf,
        Err(error) => return Presence::Absent(format!("{KERNEL_BTF}: {error}")),
    };
    let entry = [b"\0", name.as_bytes(), b"\0"].concat();
    if btf.windows(entry.len()).any(|window| window == entry) {
        Presence::Present
    } else {
        Presence::Absent(format!("not in {KERNEL_BTF}"))
    }
}

fn ktls() -> Presence {
    let Err(error) = raw::ask_for_ktls() else { return Presence::Present };
    match error.raw_os_error() {
        // It exists, and wants a connected socket.
        Some(libc::ENOTCONN | ENOTSUPP) => Presence::Present,
        Some(libc::ENOENT) => Presence::Absent("the kernel has no TLS, and no module for it".to_owned()),
        _ => refused(&error),
    }
}

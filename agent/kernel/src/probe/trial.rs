//! Tries one feature. What the kernel answers becomes a [`Presence`]; a refusal for lack of rights is not an answer.

use std::{io, os::fd::OwnedFd, path::Path};

use aya::{
    programs::ProgramError,
    sys::{SyscallError, is_helper_supported, is_map_supported},
};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::{
    super::{
        cgroup::{Cgroup, ancestors, mount_point},
        inject::Injector,
        netlink,
        netns::netns_cookie,
    },
    Presence, cgroup_probe,
    features::{self, Trial},
    raw::{self, Hook},
};

pub(super) fn run(trial: &Trial, pin_path: &Path) -> Presence {
    match trial {
        Trial::Hook(hook) => made(raw::load(*hook, &raw::NEUTRAL)),
        Trial::Helper(program, helper) => supported(
            is_helper_supported(*program, *helper).map_err(system_error),
            "unknown to programs of this type",
        ),
        Trial::HelperOfType(program, helper) => supported(
            is_helper_supported(*program, *helper)
                .map(|is_known| is_known && Path::new(features::KERNEL_BTF).exists())
                .map_err(system_error),
            "unknown to programs of this type, or no type information of the kernel",
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
        Trial::CgroupLevels => ancestors().map_or_else(|e| Presence::refused(&e), |_| Presence::Present),
        Trial::SocketCgroup => cgroup_probe::sockets_in_their_cgroup(),
        Trial::NetnsCookie => netns_cookie().map_or_else(|e| Presence::refused(&e), |_| Presence::Present),
        Trial::RawSockets => {
            Injector::open_here().map_or_else(|e| Presence::refused(&e), |_| Presence::Present)
        }
        Trial::ConnectionReset => connection_reset(),
    }
}

/// Something that exists for this moment only.
fn made(result: io::Result<OwnedFd>) -> Presence {
    result.map_or_else(|e| Presence::refused(&e), |_| Presence::Present)
}

fn supported(answer: io::Result<bool>, why_not: &str) -> Presence {
    match answer {
        Ok(true) => Presence::Present,
        Ok(false) => Presence::Absent(why_not.to_owned()),
        Err(error) => Presence::refused(&error),
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
        Err(error) => return Presence::refused(&error),
    };
    let error = ask(&program);
    if error.raw_os_error() == Some(missing_target) { Presence::Present } else { Presence::refused(&error) }
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
    // The thread's own cgroup is looked for only if the kernel says which one it is, which has a row of its own.
    let found =
        mount_point().and_then(|_| if ancestors().is_ok() { Cgroup::of_self().map(drop) } else { Ok(()) });
    found.map_or_else(|e| Presence::Absent(e.to_string()), |()| Presence::Present)
}

fn connection_reset() -> Presence {
    match netlink::reset_own() {
        Ok(()) => Presence::Present,
        // Neither there nor to be had as a module.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
            Presence::Absent("no CONFIG_INET_TCP_DIAG, and no module tcp_diag for it".to_owned())
        }
        Err(error) => Presence::refused(&error),
    }
}

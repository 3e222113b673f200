//! Programs at the connect hooks of a cgroup, Tacit's and others', in the order in which they run.

use std::{
    fs::File,
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::Path,
};

use crate::link::bpf;

const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
/// With the programs of the cgroups above, in the order in which the kernel runs all of them.
const EFFECTIVE: u32 = 1;
/// The kernel's bound for one cgroup is 64 programs; cgroups are a few levels deep.
const PROGRAMS_MAX: usize = 512;
const CONNECT4: u32 = 10;
const CONNECT6: u32 = 11;

/// A program at a hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HookProgram {
    /// The hook, as Tacit's program there is named.
    pub hook: &'static str,
    /// Its id in the kernel.
    pub id: u32,
    /// Its name, of at most 15 bytes; empty if it has none.
    pub name: String,
}

#[repr(C)]
struct QueryAttr {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    pad: u32,
}

#[repr(C)]
struct ByIdAttr {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}

/// The first fields of `struct bpf_prog_info`, up to the name.
#[repr(C)]
struct ProgramInfo {
    skipped: [u64; 8],
    name: [u8; 16],
}

/// Returns the programs at the connect hooks of processes in `cgroup`, in the order in which they run. Programs of cgroups below it run
/// before these and are not listed.
///
/// # Errors
/// The kernel's.
pub fn connect_programs(cgroup: &Path) -> io::Result<Vec<HookProgram>> {
    let folder = File::open(cgroup)?;
    let mut found = Vec::new();
    for (hook, attach_type) in [("connect4", CONNECT4), ("connect6", CONNECT6)] {
        for id in query(&folder, attach_type)? {
            // One may have gone since.
            found.extend(name(id).ok().map(|name| HookProgram { hook, id, name }));
        }
    }
    Ok(found)
}

/// Returns the ids of the programs at one hook of processes in `cgroup`, in the order in which they run.
pub(super) fn query(cgroup: &File, attach_type: u32) -> io::Result<Vec<u32>> {
    let mut ids = vec![0_u32; PROGRAMS_MAX];
    let mut attr = QueryAttr {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_type,
        query_flags: EFFECTIVE,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: PROGRAMS_MAX as u32,
        pad: 0,
    };
    bpf(BPF_PROG_QUERY, &mut attr)?;
    ids.truncate(attr.count as usize);
    Ok(ids)
}

fn name(id: u32) -> io::Result<String> {
    let fd = bpf(BPF_PROG_GET_FD_BY_ID, &mut ByIdAttr { id, next_id: 0, open_flags: 0 })?;
    // SAFETY: the kernel just returned this descriptor to us.
    let program = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut info = MaybeUninit::<ProgramInfo>::zeroed();
    let mut attr = InfoAttr {
        fd: program.as_raw_fd() as u32,
        length: size_of::<ProgramInfo>() as u32,
        info: info.as_mut_ptr() as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    // SAFETY: zeroed before, plain integers, and filled by the kernel.
    let info = unsafe { info.assume_init() };
    let end = info.name.iter().position(|byte| *byte == 0).unwrap_or(info.name.len());
    Ok(String::from_utf8_lossy(&info.name[..end]).into_owned())
}

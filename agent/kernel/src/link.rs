//! The bpf(2) commands that aya 0.14 keeps private: open a pin, make one, read what a link is attached to, swap its program
//! atomically, and read an entry of a map.

use std::{
    ffi::CString,
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya::Pod;

const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_UPDATE: libc::c_long = 29;

#[repr(C)]
struct ElemAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ObjAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
struct LinkUpdateAttr {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// Head of the kernel's `bpf_link_info` for links to a cgroup (`target` is its id), a network namespace (`target`'s low
/// half is its inode number) or, by tcx, an interface (its index).
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct LinkInfo {
    kind: u32,
    /// The link's id.
    pub(super) id: u32,
    /// Id of the program it runs.
    pub(super) program_id: u32,
    pad: u32,
    target: u64,
    attach_type: u32,
    pad2: u32,
}

const LINK_TYPE_NETNS: u32 = 5;
const LINK_TYPE_TCX: u32 = 11;

impl LinkInfo {
    /// Cgroup id, namespace inode or interface index; 0 when the target is gone.
    pub(super) fn target(&self) -> u64 {
        match self.kind {
            LINK_TYPE_NETNS | LINK_TYPE_TCX => self.target & u64::from(u32::MAX),
            _ => self.target,
        }
    }
}

/// The system call. `attr` must be laid out as the kernel's for `command`.
pub(super) fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<RawFd> {
    // SAFETY: `attr` is a live prefix of `union bpf_attr` of the size given; pointers in it are valid for the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as RawFd) }
}

/// Opens a pinned link or map.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjAttr { pathname: name.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    let fd = bpf(BPF_OBJ_GET, &mut attr)?;
    // SAFETY: the kernel just returned this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Pins a link or map at `path`, where nothing may be.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut attr =
        ObjAttr { pathname: name.as_ptr() as u64, bpf_fd: object.as_raw_fd() as u32, file_flags: 0 };
    bpf(BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Returns the attachment and the program of a link.
pub(super) fn info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = MaybeUninit::<LinkInfo>::zeroed();
    let mut attr = InfoAttr {
        bpf_fd: link.as_raw_fd() as u32,
        info_len: size_of::<LinkInfo>() as u32,
        info: info.as_mut_ptr() as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    // SAFETY: zeroed before, plain integers, and filled by the kernel.
    Ok(unsafe { info.assume_init() })
}

/// Makes `link` run `program` from its next event on, without a moment in which neither runs.
pub(super) fn update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    update_raw(link.as_raw_fd(), program)
}

/// As [`update`], for a number that need not be a descriptor.
pub(super) fn update_raw(link: RawFd, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdateAttr {
        link_fd: link as u32,
        new_prog_fd: program.as_raw_fd() as u32,
        flags: 0,
        old_prog_fd: 0,
    };
    bpf(BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Reads the entry of `key` in a map whose keys are `K` and whose values are `V`; `None` when there is none.
pub(super) fn read<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K) -> Option<V> {
    let mut value = MaybeUninit::<V>::zeroed();
    let mut attr = ElemAttr {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: std::ptr::from_ref(key) as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    bpf(BPF_MAP_LOOKUP_ELEM, &mut attr).ok()?;
    // SAFETY: zeroed before, plain data, and filled by the kernel.
    Some(unsafe { value.assume_init() })
}

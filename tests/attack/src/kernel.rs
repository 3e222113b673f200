//! Attacks on the kernel side from the node: a foreign program beside Tacit's, a full map.

use std::{
    ffi::CString,
    fs::File,
    io,
    net::SocketAddrV4,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use anyhow::{Context as _, Result};

use crate::{
    connect_hook::{self, Hook, bpf, descriptor, instruction},
    world::World,
};

const BPF_OBJ_GET: libc::c_long = 7;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;
const BPF_MAP_DELETE_BATCH: libc::c_long = 27;
/// Sizes of the map of pending connections; it is filled until the kernel says that it is full.
const KEY: usize = 48;
const VALUE: usize = 24;
/// Far more entries than the map has.
const PENDING_MAX: u32 = 1 << 22;
/// Entries of one system call.
const BATCH: u32 = 1 << 14;

/// A program at connect4 that sends every connection of a cgroup elsewhere. Detached when dropped.
pub(crate) struct Redirect {
    _link: OwnedFd,
}

impl Redirect {
    pub(crate) fn attach(cgroup: &Path, to: SocketAddrV4) -> Result<Self> {
        let address = u32::from_ne_bytes(to.ip().octets());
        let port = u32::from(to.port().to_be());
        // user_ip4 is at 4, user_port at 24; 1 lets the call go on.
        let instructions = [
            instruction(0xb4, 2, 0, address),
            instruction(0x63, 0x21, 4, 0),
            instruction(0xb4, 2, 0, port),
            instruction(0x63, 0x21, 24, 0),
            instruction(0xb7, 0, 0, 1),
            instruction(0x95, 0, 0, 0),
        ];
        let target = File::open(cgroup).with_context(|| format!("open {}", cgroup.display()))?;
        let link =
            connect_hook::attach(&target, Hook::Connect4, [0; 16], &instructions).context("redirect")?;
        Ok(Self { _link: link })
    }
}

/// The near agent's map of pending connections, full of entries that nobody waits for.
pub(crate) struct CapturedMap {
    map: Option<OwnedFd>,
    entries: u32,
}

impl CapturedMap {
    /// Fills it; without an agent there is nothing to fill.
    pub(crate) fn fill(world: &World) -> Result<Self> {
        let Some(agent) = world.agents.first() else { return Ok(Self { map: None, entries: 0 }) };
        let folders = std::fs::read_dir(agent.files().pin_path())?.filter_map(Result::ok);
        let maps =
            folders.map(|f| f.path()).find(|p| p.join("CAPTURED").exists()).context("no pinned maps")?;
        let name = CString::new(maps.join("CAPTURED").as_os_str().as_bytes())?;
        let mut get = GetAttr { path: name.as_ptr() as u64, ..GetAttr::default() };
        let map = descriptor(bpf(BPF_OBJ_GET, &mut get).context("open the pinned map")?);
        for first in (0..PENDING_MAX).step_by(BATCH as usize) {
            match batch(&map, BPF_MAP_UPDATE_BATCH, first, BATCH) {
                (_, Ok(())) => {}
                (added, Err(error)) if error.raw_os_error() == Some(libc::E2BIG) => {
                    return Ok(Self { map: Some(map), entries: first + added });
                }
                (_, Err(error)) => return Err(error).context("fill the map"),
            }
        }
        anyhow::bail!("the map took {PENDING_MAX} entries: it is not bounded")
    }

    /// Takes the entries out again.
    pub(crate) fn empty(self) -> Result<()> {
        let Some(map) = self.map else { return Ok(()) };
        let mut firsts = (0..self.entries).step_by(BATCH as usize);
        firsts.try_for_each(|first| {
            let (_, result) = batch(&map, BPF_MAP_DELETE_BATCH, first, BATCH.min(self.entries - first));
            result.context("empty the map")
        })
    }
}

/// Adds or deletes `count` entries from number `first` on. Returns also how many the kernel has done.
fn batch(map: &OwnedFd, command: libc::c_long, first: u32, count: u32) -> (u32, io::Result<()>) {
    let key = |number: u32| {
        let mut key = [0xee_u8; KEY];
        key[..4].copy_from_slice(&number.to_ne_bytes());
        key
    };
    let keys: Vec<[u8; KEY]> = (first..first + count).map(key).collect();
    // A deletion ignores them.
    let zeroes = vec![[0_u8; VALUE]; count as usize];
    let (keys, values, map) = (keys.as_ptr() as u64, zeroes.as_ptr() as u64, map.as_raw_fd() as u32);
    let mut attr = BatchAttr { keys, values, count, map, ..BatchAttr::default() };
    let result = bpf(command, &mut attr).map(drop);
    (attr.count, result)
}

#[repr(C)]
#[derive(Default)]
struct GetAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    input: u64,
    output: u64,
    keys: u64,
    values: u64,
    /// In: entries to do. Out: entries done.
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

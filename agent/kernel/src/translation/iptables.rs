//! Rules of the older iptables, which no nf_tables dump lists. They are read only where the table exists: to ask for it would make it.

use std::{fs, io, os::fd::AsRawFd as _};

use socket2::{Domain, Socket, Type};

/// `IPT_SO_GET_INFO` and `IPT_SO_GET_ENTRIES`, the same for both families.
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;
/// Length of a table's name in the structures.
const NAME: usize = 32;
/// Number of hooks.
const HOOKS: usize = 5;
const PREROUTING: usize = 0;
const OUTPUT: usize = 3;
/// Size of `struct ipt_getinfo`.
const INFO: usize = NAME + 4 * (1 + HOOKS + HOOKS + 1 + 1);
/// Offset of the entries in `struct ipt_get_entries`, which are aligned to eight bytes.
const ENTRIES: usize = 40;
/// Most bytes of a table that are read; the kernel's own bound is far higher. A larger table counts as one that rewrites.
const TABLE_MAX: usize = 4 << 20;

/// Returns true if the table `nat` of either family rewrites the destination of what arrives in the calling thread's namespace.
pub(super) fn rewrites_arrivals() -> io::Result<bool> {
    let families = [
        ("/proc/thread-self/net/ip_tables_names", Domain::IPV4, libc::SOL_IP),
        ("/proc/thread-self/net/ip6_tables_names", Domain::IPV6, libc::SOL_IPV6),
    ];
    for (names, domain, level) in families {
        // Without the module there is no such file.
        let names = fs::read_to_string(names).unwrap_or_default();
        if names.lines().any(|name| name == "nat") && is_rewriting(domain, level)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn is_rewriting(domain: Domain, level: libc::c_int) -> io::Result<bool> {
    let socket = Socket::new(domain, Type::DGRAM, None)?;
    let mut info = [0; INFO];
    info[..3].copy_from_slice(b"nat");
    option(&socket, level, GET_INFO, &mut info)?;
    let Some(layout) = Layout::read(&info) else { return Ok(true) };
    if !layout.has_rules(PREROUTING) {
        return Ok(false);
    }
    if layout.size > TABLE_MAX {
        return Ok(true);
    }
    let mut entries = vec![0; ENTRIES + layout.size];
    entries[..3].copy_from_slice(b"nat");
    entries[NAME..NAME + 4].copy_from_slice(&(layout.size as u32).to_ne_bytes());
    option(&socket, level, GET_ENTRIES, &mut entries)?;
    Ok(layout.rewrites(&entries[ENTRIES..]))
}

/// Offsets of a table's hooks in its entries.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    first: [usize; HOOKS],
    /// The policy of each hook, which is its last entry.
    last: [usize; HOOKS],
    size: usize,
}

impl Layout {
    fn read(info: &[u8; INFO]) -> Option<Self> {
        let number = |index: usize| {
            let at = NAME + 4 * index;
            Some(u32::from_ne_bytes(info.get(at..at + 4)?.try_into().ok()?) as usize)
        };
        let mut layout = Self { first: [0; HOOKS], last: [0; HOOKS], size: number(2 + 2 * HOOKS)? };
        for hook in 0..HOOKS {
            layout.first[hook] = number(1 + hook)?;
            layout.last[hook] = number(1 + HOOKS + hook)?;
        }
        Some(layout)
    }

    fn has_rules(&self, hook: usize) -> bool {
        self.first[hook] != self.last[hook]
    }

    /// Returns true if a rule rewrites, but for the rules of OUTPUT itself. Chains of the pod count whoever jumps to them.
    fn rewrites(&self, entries: &[u8]) -> bool {
        let names: [&[u8]; 3] = [b"DNAT\0", b"REDIRECT\0", b"NETMAP\0"];
        let has =
            |part: &[u8]| names.iter().any(|name| part.windows(name.len()).any(|window| window == *name));
        let (from, to) = (self.first[OUTPUT].min(entries.len()), self.last[OUTPUT].min(entries.len()));
        has(&entries[..from]) || has(&entries[to.max(from)..])
    }
}

fn option(socket: &Socket, level: libc::c_int, name: libc::c_int, value: &mut [u8]) -> io::Result<()> {
    let mut size = value.len() as libc::socklen_t;
    // SAFETY: `value` and `size` live through the call, and `size` is the length of `value`.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut size)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_counts_outside_output_alone() {
        let layout = Layout { first: [0, 300, 0, 100, 200], last: [50, 300, 0, 150, 200], size: 400 };
        assert!(layout.has_rules(PREROUTING) && !layout.has_rules(1));
        for (at, expected) in [(0, true), (110, false), (350, true)] {
            let mut entries = vec![0; 400];
            entries[at..at + 9].copy_from_slice(b"REDIRECT\0");
            assert_eq!(layout.rewrites(&entries), expected, "{at}");
        }
        assert!(!layout.rewrites(&[0; 400]) && !layout.rewrites(&[]));
    }

    #[test]
    fn the_offsets_are_read_as_the_kernel_writes_them() {
        let mut info = [0; INFO];
        for index in 0..13_u32 {
            let at = NAME + 4 * index as usize;
            info[at..at + 4].copy_from_slice(&index.to_ne_bytes());
        }
        let expected = Layout { first: [1, 2, 3, 4, 5], last: [6, 7, 8, 9, 10], size: 12 };
        assert_eq!(Layout::read(&info), Some(expected));
    }
}

//! The cgroups that a thread is in, by their level, as the kernel counts.
//!
//! A program that the kernel runs once, in the context of the calling thread, returns the id of one of them. It is attached nowhere.

use std::{io, os::fd::AsRawFd as _};

use aya::sys::BpfHelper;

use crate::{
    link::bpf,
    probe::raw::{self, Hook, Insn},
};

const BPF_PROG_TEST_RUN: libc::c_long = 10;
/// More levels than a node has.
const LEVELS_MAX: u64 = 256;

#[repr(C)]
struct RunAttr {
    program: u32,
    returned: u32,
    data_size: [u32; 2],
    data: [u64; 2],
    repeat: u32,
    duration: u32,
    context_size: [u32; 2],
    context: [u64; 2],
    flags: u32,
    cpu: u32,
}

/// Returns the ids of the cgroups that the calling thread is in, from the root of the hierarchy, which has level 0, to its own.
///
/// # Errors
/// The kernel's.
pub(crate) fn ancestors() -> io::Result<Vec<u64>> {
    let program = raw::load(Hook::RAW_TRACEPOINT, &ancestor_id())?;
    // A program returns 32 bits.
    let part = |level: u64, shift: u64| -> io::Result<u64> {
        let arguments = [level, shift];
        let mut attr = RunAttr {
            program: program.as_raw_fd() as u32,
            returned: 0,
            data_size: [0; 2],
            data: [0; 2],
            repeat: 0,
            duration: 0,
            context_size: [size_of_val(&arguments) as u32, 0],
            context: [arguments.as_ptr() as u64, 0],
            flags: 0,
            cpu: 0,
        };
        bpf(BPF_PROG_TEST_RUN, &mut attr)?;
        Ok(u64::from(attr.returned))
    };
    let mut found = Vec::new();
    for level in 0..LEVELS_MAX {
        let id = part(level, 0)? | part(level, 32)? << 32;
        if id == 0 {
            break;
        }
        found.push(id);
    }
    Ok(found)
}

/// A program that takes a level and a number of bits, and returns the id of the thread's cgroup at this level, shifted right by them; 0
/// if the thread's own cgroup is above.
fn ancestor_id() -> [Insn; 6] {
    [
        Insn::copy(6, 1),
        Insn::load_wide(1, 6, 0),
        Insn::call(BpfHelper::BPF_FUNC_get_current_ancestor_cgroup_id as i32),
        Insn::load_wide(1, 6, 8),
        Insn::shift_right(0, 1),
        Insn::exit(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::Cgroup;

    #[test]
    #[ignore = "needs root"]
    fn the_last_cgroup_is_the_threads_own() {
        let found = ancestors().expect("known");
        assert_eq!(found.first(), Some(&1), "the root");
        let own = Cgroup::of_self().expect("cgroup v2 is mounted");
        assert_eq!(found.last(), Some(&own.id()));
        assert_eq!(own.level().expect("known") as usize, found.len() - 1);
    }
}

//! A program of others at the connect hooks, such as the socket load balancer of a network plugin: it replaces one address by another.

use std::{fs::File, io, net::IpAddr, os::fd::OwnedFd};

use anyhow::{Context as _, Result, bail};

use super::{Given, Told, wait_for_go};
use crate::connect_hook::{Hook, Instruction, attach, instruction};

const NAME: [u8; 16] = *b"others_balancer\0";

/// Translates the step's target address into the marker's, for processes of the cgroup that is the first extra argument, until it is
/// told to end.
pub(super) fn run(given: &Given) -> Result<Told> {
    let to = std::str::from_utf8(&given.marker)?.parse().context("the address to translate into")?;
    let (IpAddr::V4(from), IpAddr::V4(to)) = (given.target.ip(), to) else { bail!("addresses of IPv4") };
    let [from, to] = [from, to].map(|ip| u32::from_ne_bytes(ip.octets()));
    let cgroup = File::open(given.extra(0)?)?;
    let program = translation(from, to);
    let attached: Vec<OwnedFd> = [Hook::Connect4, Hook::SendMsg4]
        .into_iter()
        .map(|hook| attach(&cgroup, hook, NAME, &program))
        .collect::<io::Result<_>>()?;
    wait_for_go()?;
    drop(attached);
    Ok(Told::Sent)
}

/// Replaces the address `from` by `to`. Both are in network order.
fn translation(from: u32, to: u32) -> [Instruction; 7] {
    [
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
    ]
}

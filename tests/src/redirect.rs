//! Rules of a pod that translate addresses: redirection of a port, and masquerading of containers inside the pod.
//!
//! A redirection is what `nft add rule inet own arrivals tcp dport A redirect to :B` makes.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};
use tacit_topology::{
    Pod,
    nf_tables::{
        Batch, Family, Header, Hook, Register, equals, expression, load, load_packet, load_protocol, register,
    },
};

const TABLE: &str = "own";
const CHAIN: &str = "arrivals";

/// Sends what arrives at port `from` of `pod` to its port `to`, until [`remove`] or the end of the pod.
///
/// # Errors
/// The kernel's, for example without nf_tables.
pub fn add(pod: &Pod, from: u16, to: u16) -> Result<()> {
    const TCP: u8 = 6;
    let destination_port = load_packet(Header::Transport, 2, 2);
    let mut batch = arrivals();
    batch.rule(
        TABLE,
        CHAIN,
        &[
            load_protocol(),
            equals(&[TCP]),
            destination_port,
            equals(&from.to_be_bytes()),
            load(Register::One, &to.to_be_bytes()),
            expression("redir", &[register(1, Register::One)]),
        ],
    );
    apply(pod, batch)
}

/// Adds `count` rules that only count what arrives, to the chain that [`add`] makes.
///
/// # Errors
/// As [`add`].
pub fn add_without_effect(pod: &Pod, count: usize) -> Result<()> {
    /// Few enough for the buffer of a socket.
    const AT_ONCE: usize = 200;
    let mut left = count;
    while left > 0 {
        let mut batch = arrivals();
        let rules = left.min(AT_ONCE);
        for _ in 0..rules {
            batch.rule(TABLE, CHAIN, &[expression("counter", &[])]);
        }
        apply(pod, batch)?;
        left -= rules;
    }
    Ok(())
}

/// Returns a batch that makes the chain of the rules for what arrives, unless it exists.
fn arrivals() -> Batch {
    let mut batch = Batch::new(Family::Inet);
    batch.table(TABLE);
    batch.chain(TABLE, CHAIN, Hook::Prerouting);
    batch
}

/// Has what leaves `pod` from the /24 network of `inner` leave with the pod's own address, as for containers inside the pod.
///
/// # Errors
/// As [`add`].
pub fn masquerade(pod: &Pod, inner: Ipv4Addr) -> Result<()> {
    let (table, chain) = ("inner", "leaving");
    let network_of_source = load_packet(Header::Network, 12, 3);
    let mut batch = Batch::new(Family::Inet);
    batch.table(table);
    batch.chain(table, chain, Hook::Postrouting);
    let is_inner = equals(&inner.octets()[..3]);
    batch.rule(table, chain, &[network_of_source, is_inner, expression("masq", &[])]);
    apply(pod, batch)
}

/// Removes the rules that [`add`] has made.
///
/// # Errors
/// The kernel's.
pub fn remove(pod: &Pod) -> Result<()> {
    let mut batch = Batch::new(Family::Inet);
    batch.delete_table(TABLE);
    apply(pod, batch)
}

fn apply(pod: &Pod, batch: Batch) -> Result<()> {
    batch.apply(pod.netns())?.map(drop).context("rules of nf_tables")
}

//! Address translation in a network namespace: what a pod with NET_ADMIN does to its own packets, and what kube-proxy does to
//! those that it forwards.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
};

use anyhow::Result;
use tacit_topology::{
    Netns,
    nf_tables::{
        Batch, Family, Header, Hook, Register, equals, expression, load, load_packet, number, register,
    },
};

/// Name of the table. The kernel removes it when its owner's socket is closed.
const TABLE: &str = "tacit-attack";
const TO: &str = "to";
const FROM: &str = "from";

/// Rules in a namespace, removed when dropped.
pub(crate) struct Nat {
    _owner: OwnedFd,
}

impl Nat {
    /// Sends packets `from` an address (their destination) to another one, with or without the address of this node as
    /// their source.
    ///
    /// # Errors
    /// As [`Batch::apply`].
    pub(crate) fn redirect(
        netns: &Netns,
        hook: Hook,
        rules: &[(IpAddr, SocketAddr)],
        is_masqueraded: bool,
    ) -> Result<io::Result<Self>> {
        let is_v4 = rules.iter().all(|(_, to)| to.is_ipv4());
        let mut batch = Batch::new(if is_v4 { Family::Ipv4 } else { Family::Ipv6 });
        batch.owned_table(TABLE);
        batch.chain(TABLE, TO, hook);
        for (from, to) in rules {
            batch.rule(TABLE, TO, &destination_rule(*from, *to));
        }
        if is_masqueraded {
            batch.chain(TABLE, FROM, Hook::Postrouting);
            batch.rule(TABLE, FROM, &[expression("masq", &[])]);
        }
        Ok(batch.apply(netns)?.map(|owner| Self { _owner: owner }))
    }
}

/// Matches the destination address, and replaces it and the port.
fn destination_rule(from: IpAddr, to: SocketAddr) -> [Vec<u8>; 5] {
    const DESTINATION: u32 = 1;
    let (offset, length, family) =
        if from.is_ipv4() { (16, 4, Family::Ipv4) } else { (24, 16, Family::Ipv6) };
    let translate = [
        number(1, DESTINATION),
        number(2, family as u32),
        register(3, Register::One),
        register(5, Register::Two),
    ];
    [
        load_packet(Header::Network, offset, length),
        equals(&octets(from)),
        load(Register::One, &octets(to.ip())),
        load(Register::Two, &to.port().to_be_bytes()),
        expression("nat", &translate),
    ]
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

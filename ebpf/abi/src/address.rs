//! [`Address`], one type for both families: 16 bytes, with IPv4 as v4-mapped IPv6 (`::ffff:a.b.c.d`).

use crate::tcp_port;

/// Third word of a v4-mapped address, in network byte order.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

/// An IP address as four words in network byte order; IPv4 is v4-mapped.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Address(pub [u32; 4]);

impl Address {
    /// The unspecified address. As a pod's address, the pod has none of that family.
    pub const NONE: Self = Self([0; 4]);
    /// `::1`.
    pub const LOOPBACK_V6: Self = Self([0, 0, 0, 1_u32.to_be()]);

    /// Makes an address from an IPv4 address in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn from_v4_be(ip: u32) -> Self {
        Self([0, 0, MAPPED, ip])
    }

    /// Makes an address from the 16 bytes of an IPv6 or v4-mapped address.
    #[must_use]
    pub const fn from_octets(o: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ])
    }

    /// Returns the 16 bytes in network order.
    #[inline(always)]
    #[must_use]
    pub const fn octets(&self) -> [u8; 16] {
        let [a, b, c, d] = [
            self.0[0].to_ne_bytes(),
            self.0[1].to_ne_bytes(),
            self.0[2].to_ne_bytes(),
            self.0[3].to_ne_bytes(),
        ];
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
    }

    /// Returns true for an IPv4 address.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }

    /// Returns the IPv4 address in network byte order. Valid only if [`Self::is_v4`].
    #[inline(always)]
    #[must_use]
    pub const fn v4_be(&self) -> u32 {
        self.0[3]
    }

    /// Returns true for [`Self::NONE`].
    #[inline(always)]
    #[must_use]
    pub const fn is_none(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0 && self.0[3] == 0
    }

    /// Returns true for 127.0.0.0/8 and `::1`.
    #[inline(always)]
    #[must_use]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            u32::from_be(self.0[3]) >> 24 == 127
        } else {
            self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0 && self.0[3] == Self::LOOPBACK_V6.0[3]
        }
    }

    /// Returns true for fe80::/10.
    #[inline(always)]
    #[must_use]
    pub const fn is_link_local(&self) -> bool {
        u32::from_be(self.0[0]) >> 22 == 0xfe80_0000 >> 22
    }

    /// Returns true for the unspecified address of either family.
    #[inline(always)]
    #[must_use]
    pub const fn is_none_of_family(&self) -> bool {
        self.is_none() || (self.is_v4() && self.0[3] == 0)
    }

    /// Returns the unspecified address of the same family.
    #[inline(always)]
    #[must_use]
    pub const fn unspecified(&self) -> Self {
        if self.is_v4() { Self::from_v4_be(0) } else { Self::NONE }
    }

    /// Returns true for multicast addresses of both families and for the limited broadcast address.
    #[inline(always)]
    #[must_use]
    pub const fn is_multicast(&self) -> bool {
        let first = u32::from_be(self.0[0]);
        let v4 = u32::from_be(self.0[3]);
        first >> 24 == 0xff || (self.is_v4() && (v4 >> 28 == 0xe || v4 == u32::MAX))
    }

    /// Compares word by word. The derived equality compiles to a `memcmp` call, which BPF does not have.
    #[inline(always)]
    #[must_use]
    pub const fn same(&self, other: &Self) -> bool {
        self.0[0] == other.0[0]
            && self.0[1] == other.0[1]
            && self.0[2] == other.0[2]
            && self.0[3] == other.0[3]
    }

    /// Returns the address that the agent dials an application from, for a client with this `hash`.
    ///
    /// IPv4 addresses lie in 127.64.0.0/12, apart from the targets of captured connections. IPv6 has one loopback address.
    #[must_use]
    pub const fn dial_source(v4: bool, hash: u32) -> Self {
        if v4 {
            Self::from_v4_be((DIAL_RANGE | (hash >> DIAL_RANGE_BITS)).to_be())
        } else {
            Self::LOOPBACK_V6
        }
    }

    /// Returns true if getpeername may report `self` to a socket that has no stored names and whose own address is `own`.
    ///
    /// It may not if the agent may have dialled the connection. The peer is then a client, and an application would trust
    /// it as a process of its own pod.
    #[inline(always)]
    #[must_use]
    pub const fn may_be_reported_to(&self, own: &Self) -> bool {
        let dialled = if self.is_v4() {
            u32::from_be(self.0[3]) >> (32 - DIAL_RANGE_BITS) == DIAL_RANGE >> (32 - DIAL_RANGE_BITS)
        } else {
            self.is_loopback()
        };
        !dialled || own.is_loopback()
    }

    /// Returns the loopback address that a captured connection to `self:port` is redirected to.
    ///
    /// IPv4 addresses lie in 127.96.0.0/12 and depend on the destination, the port and the pod's `secret`, so that no other pod
    /// foresees the ends of its connections. Each target has its own source
    /// ports, so a pod has 28,000 concurrent flows (the kernel's default) to each destination, and not to all together.
    /// The (address, port) pair that the server sees stays unique among concurrent flows, as without Tacit.
    ///
    /// IPv6 has one loopback address, so connections are spread over ports: [`Self::capture_port_v6`].
    #[inline(always)]
    #[must_use]
    pub const fn capture_target(&self, port: u16, secret: u32) -> Self {
        if self.is_v4() { self.capture_target_v4(port, secret) } else { Self::LOOPBACK_V6 }
    }

    /// Returns the IPv4 loopback address that a captured connection to `self:port` is redirected to, for a destination of either
    /// family.
    #[inline(always)]
    #[must_use]
    pub const fn capture_target_v4(&self, port: u16, secret: u32) -> Self {
        let folded = if self.is_v4() { self.0[3] } else { self.folded() };
        // Fibonacci hashing: the high bits of the product depend on every bit of the input.
        let mixed = (folded ^ secret ^ ((port as u32) << 16 | port as u32)).wrapping_mul(0x9e37_79b9);
        let host = 0x7f60_0000 | (mixed >> 12);
        Self::from_v4_be(host.to_be())
    }

    /// The words are rotated so that equal differences in two of them do not cancel out.
    #[inline(always)]
    const fn folded(&self) -> u32 {
        let [a, b, c, d] = self.0;
        a ^ b.rotate_left(8) ^ c.rotate_left(16) ^ d.rotate_left(24)
    }

    /// Returns the port of `::1` that a captured connection to the IPv6 address `self` and `port` is redirected to.
    ///
    /// The port depends on the destination address and port alone. The destinations of one of the
    /// [`tcp_port::CAPTURE_V6_COUNT`] targets share its source ports (28,000 by default).
    #[inline(always)]
    #[must_use]
    pub const fn capture_port_v6(&self, port: u16) -> u16 {
        let mixed = (self.folded() ^ ((port as u32) << 16 | port as u32)).wrapping_mul(0x9e37_79b9);
        tcp_port::CAPTURE_V6_FIRST + (mixed >> CAPTURE_V6_SHIFT) as u16
    }
}

/// 127.64.0.0/12, the agent's source addresses when it dials applications.
const DIAL_RANGE: u32 = 0x7f40_0000;
const DIAL_RANGE_BITS: u32 = 12;

/// Shift that leaves as many bits of a word as are needed to number the ports.
const CAPTURE_V6_SHIFT: u32 = 32 - tcp_port::CAPTURE_V6_COUNT.ilog2();
const _: () = assert!(tcp_port::CAPTURE_V6_COUNT.is_power_of_two());

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::{Ipv4Addr, Ipv6Addr};
    use std::collections::HashSet;

    fn v4(a: u8, b: u8, c: u8, d: u8) -> Address {
        Address::from_octets(Ipv4Addr::new(a, b, c, d).to_ipv6_mapped().octets())
    }

    #[test]
    fn octets_round_trip_and_families_differ() {
        let six = Address::from_octets("fd00::7".parse::<Ipv6Addr>().expect("literal").octets());
        assert!(!six.is_v4() && v4(10, 0, 0, 1).is_v4());
        assert_eq!(Address::from_octets(six.octets()), six);
        assert_eq!(v4(10, 0, 0, 1), Address::from_v4_be(u32::from_ne_bytes([10, 0, 0, 1])));
    }

    #[test]
    fn loopback_is_127_slash_8_and_one_v6_address() {
        assert!(v4(127, 0, 0, 1).is_loopback() && v4(127, 255, 3, 4).is_loopback());
        assert!(Address::LOOPBACK_V6.is_loopback());
        assert!(
            !v4(126, 255, 255, 255).is_loopback()
                && !v4(128, 0, 0, 1).is_loopback()
                && !Address::NONE.is_loopback()
        );
    }

    #[test]
    fn link_local_is_fe80_slash_10() {
        let six = |text: &str| Address::from_octets(text.parse::<Ipv6Addr>().expect("literal").octets());
        assert!(six("fe80::1").is_link_local() && six("febf::1").is_link_local());
        assert!(!six("fec0::1").is_link_local() && !six("fd77::1").is_link_local());
        assert!(!v4(10, 0, 0, 1).is_link_local());
    }

    #[test]
    fn multicast_and_unspecified_addresses_are_of_either_family() {
        let six = |words: [u16; 8]| Address::from_octets(Ipv6Addr::from(words).octets());
        let table = [
            (v4(224, 0, 0, 0), true, false),
            (v4(239, 255, 255, 255), true, false),
            (v4(255, 255, 255, 255), true, false),
            (v4(223, 255, 255, 255), false, false),
            (v4(240, 0, 0, 1), false, false),
            (six([0xff02, 0, 0, 0, 0, 0, 0, 1]), true, false),
            (six([0xfeff, 0, 0, 0, 0, 0, 0, 0xe000]), false, false),
            // The words of multicast and of 255.255.255.255, outside of v4-mapped addresses.
            (six([0xfd77, 0, 0, 0, 0, 0, 0xe000, 1]), false, false),
            (six([0xfd77, 0, 0, 0, 0, 0, 0xffff, 0xffff]), false, false),
            (v4(0, 0, 0, 0), false, true),
            (v4(0, 0, 0, 1), false, false),
            (Address::NONE, false, true),
            (six([0xfd77, 0, 0, 0, 0, 0, 0, 0]), false, false),
            (six([0, 0, 1, 0, 0, 0, 0, 0]), false, false),
            (six([0, 0, 0, 0, 1, 0, 0, 0]), false, false),
            (six([0, 0, 0, 0, 0, 0, 0, 1]), false, false),
        ];
        for (address, is_multicast, is_unspecified) in table {
            let found = (address.is_multicast(), address.is_none_of_family());
            assert_eq!(found, (is_multicast, is_unspecified), "{:?}", address.octets());
            assert_eq!(address.is_none(), address == Address::NONE, "{:?}", address.octets());
        }
        assert_eq!(v4(10, 77, 1, 2).v4_be().to_ne_bytes(), [10, 77, 1, 2]);
    }

    #[test]
    fn a_client_that_the_agent_may_have_dialled_for_is_not_reported_as_loopback() {
        let (pod, local) = (v4(10, 77, 1, 2), v4(127, 0, 0, 1));
        let pod6 = Address::from_octets(Ipv6Addr::new(0xfd77, 1, 0, 0, 0, 0, 0, 2).octets());
        for hash in [0, 1, 0x1234_5678, u32::MAX] {
            let source = Address::dial_source(true, hash);
            assert!(source.is_loopback() && (64..80).contains(&source.octets()[13]), "{:?}", source.octets());
            assert!(!source.may_be_reported_to(&pod));
            assert!(source.may_be_reported_to(&local), "a connection inside the pod");
            assert!(!source.same(&pod.capture_target(80, 5)));
            assert_eq!(source.unspecified(), v4(0, 0, 0, 0));
        }
        let source = Address::dial_source(false, 7);
        assert!(
            source.is_loopback() && !source.may_be_reported_to(&pod6) && source.may_be_reported_to(&source)
        );
        assert_eq!(source.unspecified(), Address::NONE);
        for peer in [v4(10, 77, 2, 2), v4(127, 0, 0, 1), v4(127, 63, 0, 1), v4(127, 80, 0, 1)] {
            assert!(peer.may_be_reported_to(&pod));
        }
        assert!(pod6.may_be_reported_to(&pod6));
    }

    #[test]
    fn capture_targets_are_loopback_and_spread() {
        let mut seen = HashSet::new();
        for host in 0..=255_u8 {
            for port in [80_u16, 443, 3306, 8080] {
                let target = v4(10, 77, 1, host).capture_target(port, 5);
                assert!(target.is_loopback() && target.octets()[13] >= 96, "{:?}", target.octets());
                seen.insert(target);
            }
        }
        assert!(seen.len() > 1000, "only {} targets for 1024 destinations", seen.len());
        assert_eq!(v4(10, 77, 1, 1).capture_target(80, 5), v4(10, 77, 1, 1).capture_target(80, 5));
        assert_ne!(v4(10, 77, 1, 1).capture_target(80, 5), v4(10, 77, 1, 1).capture_target(80, 6));
        let six = |last| Address::from_octets(Ipv6Addr::new(0xfd77, 1, 0, 0, 0, 0, 0, last).octets());
        let targets: HashSet<_> = (0..1000).map(|last| six(last).capture_target_v4(80, 5)).collect();
        assert!(targets.len() > 950 && targets.iter().all(|target| target.octets()[13] >= 96), "{targets:?}");
        assert_eq!(v4(10, 77, 1, 1).capture_target_v4(80, 5), v4(10, 77, 1, 1).capture_target(80, 5));
    }

    #[test]
    fn ipv6_destinations_are_spread_evenly_over_all_capture_ports() {
        type Destination = fn(u16) -> ([u16; 8], u16);
        let count = usize::from(tcp_port::CAPTURE_V6_COUNT);
        let kinds: [(&str, Destination); 6] = [
            ("addresses", |n| ([0xfd77, 1, 0, 0, 0, 0, 0, n], 80)),
            ("sites", |n| ([0xfd77, n, 0, 0, 0, 0, 0, 2], 80)),
            ("subnets", |n| ([0xfd77, 1, 0, n, 0, 0, 0, 2], 80)),
            ("interfaces", |n| ([0xfd77, 1, 0, 7, 0, n, 0, 2], 80)),
            ("random hosts", |n| ([0xfd77, 1, 0, 0, n.wrapping_mul(40_503), !n, 7, n.rotate_left(5)], 443)),
            ("ports", |n| ([0xfd77, 1, 0, 0, 0, 0, 0, 2], n)),
        ];
        for (kind, of) in kinds {
            let mut flows = std::vec![0_usize; count];
            for n in 0..1024 {
                let (words, port) = of(n);
                let address = Address::from_octets(Ipv6Addr::from(words).octets());
                let target = address.capture_port_v6(port);
                assert_eq!(target, address.capture_port_v6(port), "a function of the destination");
                assert_eq!(address.capture_target(port, 5), Address::LOOPBACK_V6);
                flows[usize::from(target - tcp_port::CAPTURE_V6_FIRST)] += 1;
            }
            let even = 1024 / count;
            assert!(flows.iter().all(|n| (even / 2..=even * 2).contains(n)), "{kind}: {flows:?}");
        }
    }
}

//! One address range of the mesh: a CIDR in which no address is special. What an operator writes has to be exact; what
//! the API tells is taken without the bits after its prefix.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Ranges in which no pod address lies, with what they are. Capturing them would take traffic that must stay
/// as it is.
const SPECIAL: [(&str, &str); 9] = [
    ("0.0.0.0/8", "unspecified"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local"),
    ("224.0.0.0/4", "multicast"),
    ("::/128", "unspecified"),
    ("::1/128", "loopback"),
    ("::ffff:0:0/96", "IPv4-mapped; write the IPv4 range instead"),
    ("fe80::/10", "link-local"),
    ("ff00::/8", "multicast"),
];

/// Shortest prefix of a discovered IPv4 range, in bits. A private network is at most this large (RFC 1918: 10.0.0.0/8), and a
/// range from the API may be written by a compromised node.
pub const DISCOVERED_IPV4_BITS: u8 = 8;
/// Shortest prefix of a discovered IPv6 range, in bits. A provider gets at least this much (RFC 6177), a cluster gets less.
pub const DISCOVERED_IPV6_BITS: u8 = 32;

/// The mistake of a text that is no range of mesh addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// Neither an IPv4 nor an IPv6 CIDR.
    #[error("no address range: write an IPv4 or IPv6 CIDR such as 10.77.0.0/16 or \"fd77::/16\"")]
    Form,
    /// An address without a prefix length.
    #[error("no prefix length: write {0} for this one address, or the range you mean")]
    NoPrefix(IpNet),
    /// Bits set after the prefix: the range or the prefix length is not what was meant.
    #[error("bits are set after the prefix: write {0}")]
    HostBits(IpNet),
    /// Prefix length 0.
    #[error("prefix length 0 covers every address: write the ranges the pods' addresses are taken from")]
    Everything,
    /// Larger than a range may be that nobody configured.
    #[error(
        "larger than a detected range may be (/{DISCOVERED_IPV4_BITS} for IPv4, /{DISCOVERED_IPV6_BITS} for IPv6): \
         write it in meshRanges or serviceRanges if it is meant"
    )]
    TooWide,
    /// Overlaps addresses that are never a pod's.
    #[error("overlaps {range} ({what}): write the ranges the pods' addresses are taken from")]
    Special {
        /// The special range.
        range: &'static str,
        /// The use of the special range.
        what: &'static str,
    },
}

/// Parses a range of mesh addresses.
pub fn mesh_range(text: &str) -> Result<IpNet, RangeError> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Err(RangeError::NoPrefix(address.into()));
    }
    let net: IpNet = text.parse().map_err(|_| RangeError::Form)?;
    if net.prefix_len() == 0 {
        return Err(RangeError::Everything);
    }
    if net != net.trunc() {
        return Err(RangeError::HostBits(net.trunc()));
    }
    match SPECIAL.iter().find(|(special, _)| overlaps(&net, special)) {
        Some((range, what)) => Err(RangeError::Special { range, what }),
        None => Ok(net),
    }
}

/// Parses a range that a source found. Bits after the prefix are cleared, and the prefix has at least
/// [`DISCOVERED_IPV4_BITS`] or [`DISCOVERED_IPV6_BITS`].
pub fn discovered_range(text: &str) -> Result<IpNet, RangeError> {
    let range = match mesh_range(text) {
        Err(RangeError::HostBits(net)) => mesh_range(&net.to_string()),
        other => other,
    }?;
    let shortest = if range.addr().is_ipv4() { DISCOVERED_IPV4_BITS } else { DISCOVERED_IPV6_BITS };
    if range.prefix_len() < shortest { Err(RangeError::TooWide) } else { Ok(range) }
}

/// Returns the kind of an address that no workload and no service has.
#[must_use]
pub fn special_address(address: IpAddr) -> Option<&'static str> {
    let (link_local, broadcast) = match address {
        IpAddr::V4(address) => (address.is_link_local(), address.is_broadcast()),
        IpAddr::V6(address) => (address.is_unicast_link_local(), false),
    };
    let special = [
        (address.is_unspecified(), "unspecified"),
        (address.is_loopback(), "loopback"),
        (address.is_multicast(), "multicast"),
        (link_local, "link-local"),
        (broadcast, "broadcast"),
    ];
    special.iter().find(|(is, _)| *is).map(|(_, what)| *what)
}

fn overlaps(net: &IpNet, special: &str) -> bool {
    match net {
        IpNet::V4(net) => special.parse().is_ok_and(|s: Ipv4Net| net.contains(&s) || s.contains(net)),
        IpNet::V6(net) => special.parse().is_ok_and(|s: Ipv6Net| net.contains(&s) || s.contains(net)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_pods_are_accepted() {
        for text in [
            "10.77.0.0/16",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "1.2.3.4/32",
            "fd77::/16",
            "2000::/3",
            "fd77::1/128",
        ] {
            assert_eq!(mesh_range(text).expect(text).to_string(), text);
        }
    }

    #[test]
    fn host_bits_and_a_missing_prefix_are_refused_with_the_correction() {
        for (text, correction) in [
            ("10.77.0.1/16", "write 10.77.0.0/16"),
            ("10.77.128.0/16", "write 10.77.0.0/16"),
            ("fd77::1/16", "write fd77::/16"),
            ("10.77.0.1", "write 10.77.0.1/32"),
            ("fd77::1", "write fd77::1/128"),
        ] {
            let message = mesh_range(text).expect_err(text).to_string();
            assert!(message.contains(correction), "{text}: {message}");
        }
    }

    #[test]
    fn ranges_with_special_addresses_are_refused() {
        for (text, special) in [
            ("127.0.0.0/8", "127.0.0.0/8"),
            ("127.0.0.1/32", "127.0.0.0/8"),
            ("0.0.0.0/1", "0.0.0.0/8"),
            ("0.0.0.0/32", "0.0.0.0/8"),
            ("128.0.0.0/1", "169.254.0.0/16"),
            ("169.254.1.0/24", "169.254.0.0/16"),
            ("224.0.0.0/4", "224.0.0.0/4"),
            ("239.1.0.0/16", "224.0.0.0/4"),
            ("::1/128", "::1/128"),
            ("::/128", "::/128"),
            ("::/8", "::/128"),
            ("::ffff:10.77.0.0/112", "::ffff:0:0/96"),
            ("fe80::/64", "fe80::/10"),
            ("8000::/1", "fe80::/10"),
            ("ff02::/16", "ff00::/8"),
        ] {
            match mesh_range(text) {
                Err(RangeError::Special { range, .. }) => assert_eq!(range, special, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
        for text in ["0.0.0.0/0", "::/0", "10.77.0.0/0"] {
            assert_eq!(mesh_range(text), Err(RangeError::Everything), "{text}");
        }
    }

    #[test]
    fn of_what_is_told_bits_after_the_prefix_are_cleared_and_nothing_else_is_let_pass() {
        assert_eq!(
            discovered_range("10.77.3.7/24").map(|range| range.to_string()),
            Ok("10.77.3.0/24".to_owned())
        );
        assert_eq!(discovered_range("fd77::1/64").map(|range| range.to_string()), Ok("fd77::/64".to_owned()));
        for text in ["0.0.0.0/0", "127.0.0.1/8", "129.0.0.0/1", "fe80::1/64", "10.77.0.0", "pods"] {
            assert!(discovered_range(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_discovered_range_has_a_bounded_size() {
        for (text, is_too_wide) in [
            ("10.0.0.0/8", false),
            ("10.0.0.0/7", true),
            ("192.0.0.0/3", true),
            ("fd77::/32", false),
            ("fd77::/31", true),
            ("2000::/3", true),
        ] {
            let result = discovered_range(text);
            let special = matches!(result, Err(RangeError::Special { .. }));
            assert_eq!(result == Err(RangeError::TooWide) || special, is_too_wide, "{text}: {result:?}");
        }
        assert!(mesh_range("2000::/3").is_ok(), "what an operator writes has no bound");
    }

    #[test]
    fn the_special_ranges_are_ranges() {
        for (range, _) in SPECIAL {
            let net: IpNet = range.parse().expect(range);
            assert_eq!(net, net.trunc(), "{range}");
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "10.77.0.0/33",
            "10.77.0.0/",
            "10.77/16",
            "10.77.0.0/16 ",
            "fd77::/129",
            "pods",
            "10.77.0.0-10.77.9.9",
        ] {
            assert_eq!(mesh_range(text), Err(RangeError::Form), "{text:?}");
        }
    }
}

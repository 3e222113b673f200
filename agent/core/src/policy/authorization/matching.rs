//! Matching of rule values: lists with their negations, patterns with `*`, service accounts.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};

use crate::spiffe::SpiffeId;

/// Values of which one must match (`values`), and values of which none may (`notValues`). Absent lists ask for nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ValueMatch<T> {
    pub(super) any: Vec<T>,
    pub(super) none: Vec<T>,
}

impl<T> Default for ValueMatch<T> {
    fn default() -> Self {
        Self { any: Vec::new(), none: Vec::new() }
    }
}

impl<T> ValueMatch<T> {
    /// Returns true if the flow satisfies both lists. `is(v)` reports whether the flow has value `v`.
    pub(super) fn holds(&self, is: impl Fn(&T) -> bool) -> bool {
        (self.any.is_empty() || self.any.iter().any(&is)) && !self.none.iter().any(&is)
    }
}

/// A text as Istio matches it: `a` exactly, `a*` by prefix, `*a` by suffix, `*` whatever is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Pattern {
    Present,
    Prefix(String),
    Suffix(String),
    Exact(String),
}

impl Pattern {
    /// Of a `*` at both ends only the first counts, as in Istio; one in the middle is a letter like others.
    pub(super) fn of(text: &str) -> Self {
        if text == "*" {
            return Self::Present;
        }
        match (text.strip_prefix('*'), text.strip_suffix('*')) {
            (Some(suffix), _) => Self::Suffix(suffix.to_owned()),
            (None, Some(prefix)) => Self::Prefix(prefix.to_owned()),
            (None, None) => Self::Exact(text.to_owned()),
        }
    }

    pub(super) fn matches(&self, value: &str) -> bool {
        match self {
            Self::Present => !value.is_empty(),
            Self::Prefix(prefix) => value.starts_with(prefix.as_str()),
            Self::Suffix(suffix) => value.ends_with(suffix.as_str()),
            Self::Exact(exact) => value == exact,
        }
    }
}

/// A service account of any trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ServiceAccount {
    pub(super) namespace: String,
    pub(super) name: String,
}

impl ServiceAccount {
    pub(super) fn is(&self, identity: &SpiffeId) -> bool {
        identity.namespace() == self.namespace && identity.service_account() == self.name
    }
}

/// An address or a range of addresses; bits after the prefix are ignored, as Istio does.
pub(super) fn block(text: &str) -> Option<IpNet> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(address.to_canonical().into());
    }
    let net: IpNet = text.parse().ok()?;
    // Addresses of flows are never v4-mapped, so a mapped range is the IPv4 range.
    let mapped = match net {
        IpNet::V6(v6) if v6.prefix_len() >= 96 => {
            v6.addr().to_ipv4_mapped().map(|v4| (v4, v6.prefix_len() - 96))
        }
        _ => None,
    };
    Some(mapped.and_then(|(v4, bits)| Ipv4Net::new(v4, bits).ok()).map_or(net, IpNet::V4).trunc())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_match_exactly_by_prefix_by_suffix_and_by_presence() {
        for (pattern, yes, no) in [
            ("abc", &["abc"][..], &["", "ab", "abcd", "xabc"][..]),
            ("abc*", &["abc", "abcd"], &["", "ab", "xabc"]),
            ("*abc", &["abc", "xabc"], &["", "bc", "abcx"]),
            ("*", &["a", "*"], &[""]),
            ("a*c", &["a*c"], &["abc"]),
            ("*b*", &["ab*"], &["abc", "b"]),
        ] {
            let parsed = Pattern::of(pattern);
            for value in yes {
                assert!(parsed.matches(value), "{pattern} {value}");
            }
            for value in no {
                assert!(!parsed.matches(value), "{pattern} {value}");
            }
        }
    }

    #[test]
    fn a_list_holds_when_one_of_it_matches_and_none_of_its_negation() {
        let listed = |any: &[u8], none: &[u8]| ValueMatch { any: any.to_vec(), none: none.to_vec() };
        for (list, has, expected) in [
            (listed(&[], &[]), vec![], true),
            (listed(&[1, 2], &[]), vec![2], true),
            (listed(&[1, 2], &[]), vec![3], false),
            (listed(&[1, 2], &[]), vec![], false),
            (listed(&[], &[1]), vec![], true),
            (listed(&[], &[1]), vec![2], true),
            (listed(&[], &[1, 2]), vec![2], false),
            (listed(&[1], &[2]), vec![1, 2], false),
            (listed(&[1], &[2]), vec![1, 3], true),
        ] {
            assert_eq!(list.holds(|value| has.contains(value)), expected, "{list:?} {has:?}");
        }
    }

    #[test]
    fn blocks_are_addresses_and_ranges_of_both_families() {
        for (text, canonical) in [
            ("10.1.2.3", Some("10.1.2.3/32")),
            ("10.1.2.3/8", Some("10.0.0.0/8")),
            ("fd77::1", Some("fd77::1/128")),
            ("fd77::1/16", Some("fd77::/16")),
            ("::ffff:10.1.2.3", Some("10.1.2.3/32")),
            ("::ffff:10.1.2.3/104", Some("10.0.0.0/8")),
            ("0.0.0.0/0", Some("0.0.0.0/0")),
            ("10.1.2", None),
            ("10.1.2.3/33", None),
            ("10.1.2.*", None),
            ("", None),
        ] {
            assert_eq!(block(text).map(|net| net.to_string()).as_deref(), canonical, "{text}");
        }
    }
}

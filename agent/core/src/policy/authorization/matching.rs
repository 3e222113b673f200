//! The values of a rule: lists with their negations, patterns with `*`, service accounts, addresses and ports.
//!
//! A list becomes an index when it is read. The cost of a match does not depend on the number of values in the list: it is
//! the number of *lookups*, one for all exact values, and one for each length that a prefix, suffix or address range has.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
};

use ipnet::{IpNet, Ipv4Net};

use crate::spiffe::SpiffeId;

/// An index of the values of a list.
pub(super) trait ValueSet: FromIterator<Self::Value> {
    /// A value of the list.
    type Value;

    /// Adds the values of another list.
    fn extend(&mut self, other: Self);

    /// Returns the number of lookups of one match.
    fn lookups(&self) -> usize;
}

/// Values of which one must match (`any`), and values of which none may (`none`). Absent lists ask for nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ValueMatch<S> {
    any: Option<S>,
    none: Option<S>,
}

impl<S> Default for ValueMatch<S> {
    fn default() -> Self {
        Self { any: None, none: None }
    }
}

impl<S: ValueSet> ValueMatch<S> {
    /// Indexes two lists. An empty list is an absent one.
    pub(super) fn of(any: Vec<S::Value>, none: Vec<S::Value>) -> Self {
        let index = |list: Vec<S::Value>| (!list.is_empty()).then(|| list.into_iter().collect());
        Self { any: index(any), none: index(none) }
    }

    /// Returns true if the flow satisfies both lists. `has_one_of` reports whether the flow has a value of a list.
    pub(super) fn holds(&self, has_one_of: impl Fn(&S) -> bool) -> bool {
        self.any.as_ref().is_none_or(&has_one_of) && !self.none.as_ref().is_some_and(&has_one_of)
    }

    /// Returns true if the flow has a value of the list that it must have one of, if there is one.
    pub(super) fn holds_any(&self, has_one_of: impl Fn(&S) -> bool) -> bool {
        self.any.as_ref().is_none_or(has_one_of)
    }

    /// Returns true if nothing is asked for.
    pub(super) fn is_absent(&self) -> bool {
        self.any.is_none() && self.none.is_none()
    }

    /// Returns true if one of a list is asked for.
    pub(super) fn asks(&self) -> bool {
        self.any.is_some()
    }

    /// Returns true if one of a list is asked for, and nothing is excluded.
    pub(super) fn is_one_of(&self) -> bool {
        self.any.is_some() && self.none.is_none()
    }

    /// Returns the lists that are not absent.
    pub(super) fn lists(&self) -> impl Iterator<Item = &S> {
        self.any.iter().chain(&self.none)
    }

    /// Adds values that also match. Both ask for one of a list, or for nothing, and exclude nothing.
    pub(super) fn widen(&mut self, other: Self) {
        debug_assert!(
            self.none.is_none() && other.none.is_none() && self.any.is_some() == other.any.is_some()
        );
        match (&mut self.any, other.any) {
            (Some(any), Some(more)) => any.extend(more),
            (any, more) => *any = any.take().or(more),
        }
    }

    pub(super) fn lookups(&self) -> usize {
        self.lists().map(ValueSet::lookups).sum()
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
}

/// Texts at one end of a value.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Affixes {
    texts: HashSet<Box<str>>,
    /// Their lengths, in bytes.
    lengths: BTreeSet<usize>,
}

impl Affixes {
    fn insert(&mut self, text: String) {
        self.lengths.insert(text.len());
        self.texts.insert(text.into());
    }

    fn extend(&mut self, other: Self) {
        self.texts.extend(other.texts);
        self.lengths.extend(other.lengths);
    }

    /// `end` returns the part of the value that has a length, or `None` if the value has no such part.
    fn has<'a>(&self, end: impl Fn(usize) -> Option<&'a str>) -> bool {
        self.lengths.iter().any(|length| end(*length).is_some_and(|part| self.texts.contains(part)))
    }
}

/// An index of patterns.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Patterns {
    is_presence: bool,
    exact: HashSet<Box<str>>,
    prefixes: Affixes,
    suffixes: Affixes,
}

impl Patterns {
    /// Returns true if a pattern of the list matches `value`.
    pub(super) fn matches(&self, value: &str) -> bool {
        self.is_presence && !value.is_empty()
            || self.exact.contains(value)
            || self.prefixes.has(|length| value.get(..length))
            || self.suffixes.has(|length| value.get(value.len().checked_sub(length)?..))
    }
}

impl FromIterator<Pattern> for Patterns {
    fn from_iter<I: IntoIterator<Item = Pattern>>(patterns: I) -> Self {
        let mut index = Self::default();
        for pattern in patterns {
            match pattern {
                Pattern::Present => index.is_presence = true,
                Pattern::Exact(text) => _ = index.exact.insert(text.into()),
                Pattern::Prefix(text) => index.prefixes.insert(text),
                Pattern::Suffix(text) => index.suffixes.insert(text),
            }
        }
        index
    }
}

impl ValueSet for Patterns {
    type Value = Pattern;

    fn extend(&mut self, other: Self) {
        self.is_presence |= other.is_presence;
        self.exact.extend(other.exact);
        self.prefixes.extend(other.prefixes);
        self.suffixes.extend(other.suffixes);
    }

    fn lookups(&self) -> usize {
        1 + self.prefixes.lengths.len() + self.suffixes.lengths.len()
    }
}

/// A service account of any trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ServiceAccount {
    pub(super) namespace: String,
    pub(super) name: String,
}

/// An index of service accounts: the names in each namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ServiceAccounts(HashMap<Box<str>, HashSet<Box<str>>>);

impl ServiceAccounts {
    pub(super) fn has(&self, identity: &SpiffeId) -> bool {
        self.0.get(identity.namespace()).is_some_and(|names| names.contains(identity.service_account()))
    }
}

impl FromIterator<ServiceAccount> for ServiceAccounts {
    fn from_iter<I: IntoIterator<Item = ServiceAccount>>(accounts: I) -> Self {
        let mut index = Self::default();
        for ServiceAccount { namespace, name } in accounts {
            index.0.entry(namespace.into()).or_default().insert(name.into());
        }
        index
    }
}

impl ValueSet for ServiceAccounts {
    type Value = ServiceAccount;

    fn extend(&mut self, other: Self) {
        for (namespace, names) in other.0 {
            self.0.entry(namespace).or_default().extend(names);
        }
    }

    fn lookups(&self) -> usize {
        1
    }
}

/// An index of address ranges.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Blocks {
    blocks: HashSet<IpNet>,
    /// Prefix lengths of the IPv4 and of the IPv6 ranges, in bits.
    lengths: [BTreeSet<u8>; 2],
}

impl Blocks {
    pub(super) fn contain(&self, address: IpAddr) -> bool {
        let around =
            |bits: &u8| IpNet::new(address, *bits).is_ok_and(|net| self.blocks.contains(&net.trunc()));
        self.lengths[usize::from(address.is_ipv6())].iter().any(around)
    }
}

impl FromIterator<IpNet> for Blocks {
    fn from_iter<I: IntoIterator<Item = IpNet>>(blocks: I) -> Self {
        let mut index = Self::default();
        for block in blocks {
            index.lengths[usize::from(block.addr().is_ipv6())].insert(block.prefix_len());
            index.blocks.insert(block.trunc());
        }
        index
    }
}

impl ValueSet for Blocks {
    type Value = IpNet;

    fn extend(&mut self, other: Self) {
        self.blocks.extend(other.blocks);
        self.lengths.iter_mut().zip(other.lengths).for_each(|(own, lengths)| own.extend(lengths));
    }

    fn lookups(&self) -> usize {
        self.lengths.iter().map(BTreeSet::len).max().unwrap_or(0)
    }
}

/// An index of ports.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct PortSet(HashSet<u16>);

impl PortSet {
    pub(super) fn has(&self, port: u16) -> bool {
        self.0.contains(&port)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = u16> + use<'_> {
        self.0.iter().copied()
    }
}

impl FromIterator<u16> for PortSet {
    fn from_iter<I: IntoIterator<Item = u16>>(ports: I) -> Self {
        Self(ports.into_iter().collect())
    }
}

impl ValueSet for PortSet {
    type Value = u16;

    fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    fn lookups(&self) -> usize {
        1
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
            ("*ß", &["ß", "groß"], &["", "s", "ßx"]),
            ("ß*", &["ß", "ßx"], &["", "s", "xß"]),
        ] {
            let parsed: Patterns = [Pattern::of(pattern)].into_iter().collect();
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
        let listed = |any: &[u16], none: &[u16]| ValueMatch::<PortSet>::of(any.to_vec(), none.to_vec());
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
            let has_one = |set: &PortSet| has.iter().any(|port| set.has(*port));
            assert_eq!(list.holds(has_one), expected, "{list:?} {has:?}");
        }
    }

    #[test]
    fn the_lookups_of_a_list_depend_on_its_kinds_of_values_and_not_on_their_number() {
        let patterns = |texts: &[String]| texts.iter().map(|text| Pattern::of(text)).collect::<Patterns>();
        let exact: Vec<String> = (0..10_000).map(|i| format!("cluster.local/ns/shop/sa/a{i}")).collect();
        assert_eq!((patterns(&exact).lookups(), patterns(&exact[..1]).lookups()), (1, 1));
        let prefixes: Vec<String> = (1000..9000).map(|i| format!("cluster.local/ns/ns-{i}/*")).collect();
        assert_eq!(patterns(&prefixes).lookups(), 2, "all of one length");
        assert!(patterns(&prefixes).matches("cluster.local/ns/ns-4711/sa/web"));
        let ranges = (0..=255).map(|i| block(&format!("10.{i}.0.0/16")).expect("a range"));
        let ranges: Blocks = ranges.chain(block("fd77::/16")).collect();
        assert_eq!(ranges.lookups(), 1, "an address is of one family");
        assert!(ranges.contain([10, 7, 1, 1].into()) && !ranges.contain([11, 7, 1, 1].into()));
        let accounts = (0..1000).map(|i| ServiceAccount { namespace: "n".to_owned(), name: format!("a{i}") });
        assert_eq!(accounts.collect::<ServiceAccounts>().lookups(), 1);
    }

    #[test]
    fn a_widened_list_has_the_values_of_both() {
        let mut list = ValueMatch::<PortSet>::of(vec![1], Vec::new());
        list.widen(ValueMatch::of(vec![2], Vec::new()));
        let has = |port: u16| list.holds(|set| set.has(port));
        assert_eq!([1, 2, 3].map(has), [true, true, false]);
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

//! Durations, ranges of addresses, SPIFFE ids, labels: parsers and sets against simple models.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
    path::Path,
    time::Duration,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proptest::{collection::vec, prelude::*};
use tacit_core::{
    directory::{
        DISCOVERED_IPV4_BITS, DISCOVERED_IPV6_BITS, Labels, RangeAddition, RangeError, Ranges,
        discovered_range, mesh_range,
    },
    spiffe::{SpiffeId, TrustDomain},
    yaml,
};

/// Reads `text` as the value of a field that takes durations of `range`.
fn duration(text: &str, range: RangeInclusive<Duration>) -> Result<Duration, String> {
    let file = format!("wait: {text:?}\n");
    let read = yaml::decode(&file, Path::new("file.yaml"), |root| {
        root.fields(&["wait"])?.required("wait", "a duration")?.duration(range)
    });
    read.map_err(|mistakes| mistakes.to_string())
}

/// Milliseconds in the units d, h, m, s and ms.
fn written(ms: u64) -> String {
    let parts = [("d", ms / 86_400_000), ("h", ms / 3_600_000 % 24), ("m", ms / 60_000 % 60)];
    let rest = [("s", ms / 1_000 % 60), ("ms", ms % 1_000)];
    let text: String = parts
        .into_iter()
        .chain(rest)
        .filter(|(_, number)| *number > 0)
        .map(|(unit, number)| format!("{number}{unit}"))
        .collect();
    if text.is_empty() { "0s".to_owned() } else { text }
}

fn milliseconds() -> impl Strategy<Value = u64> {
    prop_oneof![0..5_000_u64, 0..10_000_000_000_u64, (0..40_u64).prop_map(|days| days * 86_400_000)]
}

fn net() -> impl Strategy<Value = IpNet> {
    let v4 =
        (any::<Ipv4Addr>(), 0..=32_u8).prop_map(|(ip, len)| IpNet::V4(Ipv4Net::new(ip, len).expect("a net")));
    let v6 = (any::<Ipv6Addr>(), 0..=128_u8)
        .prop_map(|(ip, len)| IpNet::V6(Ipv6Net::new(ip, len).expect("a net")));
    prop_oneof![v4, v6]
}

/// Ranges inside 10.77.0.0/24 and fd77::/120, which have 256 addresses each.
fn small_net() -> impl Strategy<Value = IpNet> {
    (any::<bool>(), any::<u8>(), 0..=8_u8).prop_map(|(is_v4, last, bits)| {
        let net = if is_v4 {
            IpNet::new(small_v4(last), 24 + bits)
        } else {
            IpNet::new(small_v6(last), 120 + bits)
        };
        net.expect("a net").trunc()
    })
}

fn small_v4(last: u8) -> IpAddr {
    Ipv4Addr::new(10, 77, 0, last).into()
}

fn small_v6(last: u8) -> IpAddr {
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, last.into()).into()
}

fn small_addresses() -> impl Iterator<Item = IpAddr> {
    (0..=255).flat_map(|last| [small_v4(last), small_v6(last)])
}

/// Returns true if no pod can have the address, by the classes of the standard library.
fn is_special(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.octets()[0] == 0 || v4.is_loopback() || v4.is_link_local() || v4.is_multicast(),
        IpAddr::V6(v6) => {
            v6.is_unspecified()
                || v6.is_loopback()
                || v6.is_unicast_link_local()
                || v6.is_multicast()
                || v6.to_ipv4_mapped().is_some()
        }
    }
}

proptest! {
    #![proptest_config(crate::config())]

    #[test]
    fn a_written_duration_is_read_as_the_same(ms in milliseconds()) {
        let all = Duration::ZERO..=Duration::MAX;
        prop_assert_eq!(duration(&written(ms), all), Ok(Duration::from_millis(ms)));
    }

    #[test]
    fn a_duration_outside_its_range_is_refused_with_both_ends(
        ms in milliseconds(), one in milliseconds(), other in milliseconds(),
    ) {
        let (from, to) = (one.min(other), one.max(other));
        let read = duration(&written(ms), Duration::from_millis(from)..=Duration::from_millis(to));
        if (from..=to).contains(&ms) {
            prop_assert_eq!(read, Ok(Duration::from_millis(ms)));
        } else {
            let error = read.expect_err("outside");
            let ends = format!("from {} to {}", written(from), written(to));
            prop_assert!(error.ends_with(&ends), "{}", error);
        }
    }

    #[test]
    fn any_text_is_a_duration_of_its_form_or_refused(text in "[0-9dhms .-]{0,8}") {
        let all = Duration::ZERO..=Duration::MAX;
        if let Ok(read) = duration(&text, all) {
            let units = ["ms", "d", "h", "m", "s"];
            prop_assert!(units.iter().any(|unit| text.ends_with(unit)), "{} is {:?}", text, read);
            prop_assert!(text.starts_with(|first: char| first.is_ascii_digit()));
        }
    }

    #[test]
    fn a_mesh_range_is_written_as_it_was_read_and_holds_no_special_address(net in net()) {
        match mesh_range(&net.to_string()) {
            Ok(read) => {
                prop_assert_eq!(read, net);
                prop_assert_eq!(read, read.trunc());
                prop_assert!(!is_special(read.network()) && !is_special(read.broadcast()), "{}", read);
            }
            Err(RangeError::HostBits(correction)) => {
                prop_assert_ne!(net, net.trunc());
                prop_assert_eq!(correction, net.trunc());
            }
            Err(RangeError::Everything) => prop_assert_eq!(net.prefix_len(), 0),
            Err(RangeError::Special { range, .. }) => {
                let special: IpNet = range.parse().expect("a range");
                prop_assert!(special.contains(&net) || net.contains(&special), "{} {}", net, special);
            }
            Err(error) => prop_assert!(false, "{}: {}", net, error),
        }
        let shortest = if net.addr().is_ipv4() { DISCOVERED_IPV4_BITS } else { DISCOVERED_IPV6_BITS };
        let expected = match mesh_range(&net.trunc().to_string()) {
            Ok(range) if range.prefix_len() < shortest => Err(RangeError::TooWide),
            other => other,
        };
        prop_assert_eq!(discovered_range(&net.to_string()), expected);
    }

    #[test]
    fn any_text_is_a_range_or_refused(text in "[0-9a-f:./]{0,24}|\\PC{0,24}") {
        if let Ok(read) = mesh_range(&text) {
            prop_assert_eq!(text.parse::<IpNet>().ok(), Some(read));
        }
    }

    #[test]
    fn a_set_of_ranges_holds_the_addresses_of_each(nets in vec(small_net(), 0..12), found in vec(small_net(), 0..12)) {
        let mut ranges = Ranges::configured(&nets);
        let mut held = nets;
        for net in found {
            let is_held = |address: IpAddr| held.iter().any(|held| held.contains(&address));
            let is_known = small_addresses().filter(|address| net.contains(address)).all(is_held);
            prop_assert_eq!(ranges.covers(&net), is_known, "{} in {:?}", net, held);
            prop_assert_eq!(ranges.add(net), if is_known { RangeAddition::Known } else { RangeAddition::New });
            held.push(net);
        }
        for address in small_addresses() {
            let is_held = held.iter().any(|net| net.contains(&address));
            prop_assert_eq!(ranges.contains(address), is_held, "{}", address);
        }
        let list: Vec<IpNet> = ranges.iter().copied().collect();
        for (at, one) in list.iter().enumerate() {
            let rest = &list[at + 1..];
            prop_assert!(rest.iter().all(|other| one < other && !one.contains(other)), "{:?}", list);
        }
        prop_assert_eq!(IpNet::aggregate(&list).len(), list.len(), "{:?}", list);
    }

    #[test]
    fn a_spiffe_id_is_written_as_it_was_read(
        domain in "[a-z0-9._-]{1,12}", namespace in "[a-z0-9]([a-z0-9.-]{0,9}[a-z0-9])?",
        account in "[a-z0-9]([a-z0-9.-]{0,9}[a-z0-9])?",
    ) {
        let domain = TrustDomain::parse(&domain).expect("a trust domain");
        let id = SpiffeId::new(&domain, &namespace, &account).expect("names");
        let text = format!("spiffe://{domain}/ns/{namespace}/sa/{account}");
        prop_assert_eq!(id.to_string(), text.as_str());
        prop_assert_eq!(SpiffeId::parse(&text), Ok(id));
    }

    #[test]
    fn a_text_is_a_spiffe_id_of_one_spelling_or_refused(
        text in "spiffe://[a-zA-Z0-9._%/-]{0,12}/ns/[a-zA-Z0-9.%/-]{0,8}/sa/[a-zA-Z0-9.%/?#-]{0,8}|\\PC{0,40}",
    ) {
        if let Ok(id) = SpiffeId::parse(&text) {
            prop_assert_eq!(id.to_string(), text);
        }
    }

    #[test]
    fn labels_are_a_map_in_which_the_later_counts(pairs in vec(("[ab]{0,2}", "[xy]{0,1}"), 0..12), name in "[ab]{0,2}") {
        let model: BTreeMap<String, String> = pairs.iter().cloned().collect();
        let labels: Labels = pairs.into_iter().collect();
        prop_assert_eq!(labels.get(&name), model.get(&name).map(String::as_str));
        let all = labels.iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
        prop_assert_eq!(all.collect::<Vec<_>>(), model.into_iter().collect::<Vec<_>>());
    }
}

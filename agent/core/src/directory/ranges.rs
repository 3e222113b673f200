//! All ranges of the mesh, as one value: the configured ranges and those that a source found. Configured ranges always stay.
//! A source may build the ranges anew without some that it found before.
//!
//! They are kept without overlaps and joined where two make a whole, so there are few however they came, and a lookup is
//! a binary search. Each takes an entry of a kernel map.

use std::net::IpAddr;

use ipnet::IpNet;

/// Most ranges, a number. Half of the kernel's map: new ranges enter it before those go that they replace, at a restart
/// all of them. Above the sum of both configured lists, which therefore always fit.
const RANGES_MAX: usize = tacit_abi::limits::MESH_RANGES as usize / 2;

/// The ranges of the mesh. [`Default`] has none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges {
    /// Sorted; no two overlap, no two can be joined.
    list: Vec<IpNet>,
    configured: usize,
    detected: usize,
    generation: u64,
}

/// The result of adding a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeAddition {
    /// All of it was there.
    Known,
    /// It is there now.
    New,
    /// There is no room for it.
    Full,
}

impl Ranges {
    /// The configured ranges alone.
    #[must_use]
    pub fn configured(ranges: &[IpNet]) -> Self {
        let mut all = Self { configured: ranges.len(), ..Self::default() };
        ranges.iter().for_each(|range| all.put(*range));
        all
    }

    /// Returns true if `address` is in a range.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.covers(&address.into())
    }

    /// The ranges as the kernel is told them: joined, in order.
    pub fn iter(&self) -> impl Iterator<Item = &IpNet> {
        self.list.iter()
    }

    /// Returns the number of configured ranges.
    #[must_use]
    pub fn count_configured(&self) -> usize {
        self.configured
    }

    /// Returns the number of detected ranges that no other range covered.
    #[must_use]
    pub fn count_detected(&self) -> usize {
        self.detected
    }

    /// Number of changes since the start. Of two values the one with the higher number is the later one.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Returns `self` as the successor of `before`, or `None` if both have the same ranges.
    #[must_use]
    pub fn succeeding(mut self, before: &Self) -> Option<Self> {
        self.generation = before.generation + 1;
        (self.list != before.list).then_some(self)
    }

    /// Adds a range that was found.
    pub fn add(&mut self, range: IpNet) -> RangeAddition {
        if self.covers(&range) {
            return RangeAddition::Known;
        }
        if self.list.len() >= RANGES_MAX && !self.replaces(&range) {
            return RangeAddition::Full;
        }
        self.put(range);
        self.detected += 1;
        self.generation += 1;
        RangeAddition::New
    }

    /// Takes out a single address that was added, which no other range contains.
    pub fn remove_address(&mut self, address: IpAddr) {
        let single = IpNet::from(address);
        let after = self.list.partition_point(|other| *other <= single);
        let Some(at) = after.checked_sub(1).filter(|at| self.list[*at].contains(&single)) else { return };
        // The single address may have been joined with others.
        let mut rest = Vec::new();
        let mut whole = self.list[at];
        while whole != single
            && let Ok(halves) = whole.subnets(whole.prefix_len() + 1)
        {
            for half in halves {
                if half.contains(&single) { whole = half } else { rest.push(half) }
            }
        }
        rest.sort_unstable();
        self.list.splice(at..=at, rest);
        self.detected = self.detected.saturating_sub(1);
        self.generation += 1;
    }

    /// All of `range` lies in one range: where it lies in several, they would have been joined.
    pub fn covers(&self, range: &IpNet) -> bool {
        let after = self.list.partition_point(|other| other <= range);
        self.list[..after].last().is_some_and(|before| before.contains(range))
    }

    fn put(&mut self, range: IpNet) {
        if self.covers(&range) {
            return;
        }
        let mut at = self.list.partition_point(|other| *other < range);
        let inside = self.inside(&range);
        self.list.splice(at..at + inside, [range]);
        while let Some((half, whole)) = halves(&self.list[at])
            && let Ok(other) = self.list.binary_search(&half)
        {
            at = at.min(other);
            self.list.splice(at..at + 2, [whole]);
        }
    }

    /// Returns true if `range` replaces other ranges.
    fn replaces(&self, range: &IpNet) -> bool {
        let is_joined = halves(range).is_some_and(|(half, _)| self.list.binary_search(&half).is_ok());
        is_joined || self.inside(range) > 0
    }

    /// Returns the number of ranges inside `range`. They follow its position in the list.
    fn inside(&self, range: &IpNet) -> usize {
        let at = self.list.partition_point(|other| other < range);
        self.list[at..].iter().take_while(|other| range.contains(*other)).count()
    }
}

/// The other half of what `range` is half of, and the whole.
fn halves(range: &IpNet) -> Option<(IpNet, IpNet)> {
    let whole = range.supernet()?;
    let half = whole.subnets(range.prefix_len()).ok()?.find(|half| half != range)?;
    Some((half, whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().expect("a range")
    }

    fn texts(ranges: &Ranges) -> Vec<String> {
        ranges.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn ranges_are_joined_and_swallow_what_lies_in_them() {
        let mut ranges = Ranges::configured(&[net("10.77.1.0/24"), net("fd77::/16"), net("10.77.1.128/25")]);
        assert_eq!(texts(&ranges), ["10.77.1.0/24", "fd77::/16"]);
        for (range, added, expected) in [
            ("10.77.1.7/32", RangeAddition::Known, &["10.77.1.0/24", "fd77::/16"][..]),
            ("10.77.2.0/24", RangeAddition::New, &["10.77.1.0/24", "10.77.2.0/24", "fd77::/16"]),
            ("10.77.3.0/24", RangeAddition::New, &["10.77.1.0/24", "10.77.2.0/23", "fd77::/16"]),
            ("10.77.0.0/24", RangeAddition::New, &["10.77.0.0/22", "fd77::/16"]),
            ("10.76.0.0/14", RangeAddition::New, &["10.76.0.0/14", "fd77::/16"]),
            ("fd77:1::/32", RangeAddition::Known, &["10.76.0.0/14", "fd77::/16"]),
            ("10.96.0.1/32", RangeAddition::New, &["10.76.0.0/14", "10.96.0.1/32", "fd77::/16"]),
            ("10.96.0.0/32", RangeAddition::New, &["10.76.0.0/14", "10.96.0.0/31", "fd77::/16"]),
        ] {
            assert_eq!(ranges.add(net(range)), added, "{range}");
            assert_eq!(texts(&ranges), expected, "{range}");
        }
        assert_eq!((ranges.count_configured(), ranges.count_detected()), (3, 6));
    }

    #[test]
    fn an_address_is_found_in_whichever_range_it_lies() {
        let all =
            ["10.0.0.0/30", "10.0.0.8/29", "10.0.0.20/32", "192.168.0.0/16", "fd77::/64", "fd77:0:0:5::/64"];
        let ranges = Ranges::configured(&all.map(net));
        let near = (0..=255).map(|last| IpAddr::from([10, 0, 0, last]));
        let others =
            ["9.255.255.255", "192.168.3.4", "192.169.0.0", "fd77::9", "fd77:0:0:4::", "fd77:0:0:5::1", "::"];
        for address in near.chain(others.map(|text| text.parse().expect("an address"))) {
            let expected = all.iter().any(|range| net(range).contains(&address));
            assert_eq!(ranges.contains(address), expected, "{address}");
        }
        assert!(!Ranges::default().contains([10, 0, 0, 1].into()));
    }

    #[test]
    fn an_address_that_is_taken_out_leaves_the_others() {
        let mut ranges = Ranges::configured(&[net("10.77.1.0/24")]);
        let single = |last: u8| IpNet::from(IpAddr::from([10, 78, 0, last]));
        for last in 0..=255 {
            ranges.add(single(last));
        }
        assert_eq!(texts(&ranges), ["10.77.1.0/24", "10.78.0.0/24"]);
        let mut generation = ranges.generation();
        for last in (1..=255).step_by(2) {
            ranges.remove_address(single(last).addr());
            assert!(ranges.generation() > generation);
            generation = ranges.generation();
        }
        for last in 0..=255 {
            assert_eq!(ranges.contains(single(last).addr()), last % 2 == 0, "{last}");
            ranges.remove_address(single(last).addr());
        }
        assert_eq!((texts(&ranges), ranges.count_detected()), (vec!["10.77.1.0/24".to_owned()], 0));
    }

    #[test]
    fn what_does_not_fit_leaves_the_others_as_they_are() {
        let mut ranges = Ranges::configured(&[net("fd77::/16")]);
        let every_other = |i: usize| IpNet::from(IpAddr::from((0x0a00_0000 + 2 * i as u32).to_be_bytes()));
        for i in 0..RANGES_MAX - 1 {
            assert_eq!(ranges.add(every_other(i)), RangeAddition::New, "{i}");
        }
        let full = ranges.clone();
        assert_eq!(ranges.add(every_other(RANGES_MAX)), RangeAddition::Full);
        assert_eq!(ranges, full);
        // A range that joins others needs no room, and may free some.
        assert_eq!(ranges.add(net("10.0.0.1/32")), RangeAddition::New);
        assert_eq!(ranges.add(every_other(RANGES_MAX)), RangeAddition::Full);
        assert_eq!(ranges.add(net("10.0.0.3/32")), RangeAddition::New);
        assert_eq!(ranges.add(every_other(RANGES_MAX)), RangeAddition::New);
        assert_eq!(ranges.add(net("10.0.0.0/8")), RangeAddition::New);
        assert_eq!(texts(&ranges), ["10.0.0.0/8", "fd77::/16"]);
    }

    #[test]
    fn ranges_in_any_order_are_those_that_ipnet_makes_of_them() {
        // Numbers without a pattern; the seed is of no importance.
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = |bound: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % bound
        };
        for _ in 0..500 {
            let all: Vec<IpNet> = (0..next(40))
                .map(|_| {
                    let last = u8::try_from(next(64)).expect("small");
                    let bits = 26 + u8::try_from(next(7)).expect("small");
                    IpNet::new([10, 0, 0, last].into(), bits).expect("a prefix").trunc()
                })
                .collect();
            let mut expected = IpNet::aggregate(&all);
            expected.sort_unstable();
            assert_eq!(Ranges::configured(&all).list, expected, "{all:?}");
        }
    }
}

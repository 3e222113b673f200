//! Counts the units of every holder of one resource.

use std::{collections::HashMap, hash::Hash};

use super::{Bounds, GREED, ShareUse};

/// The units of all holders. Holders without units have no entry, so the table is no larger than the total.
#[derive(Debug)]
pub struct Ledger<H> {
    bounds: Bounds,
    used: u64,
    held: HashMap<H, u64>,
    refused: u64,
}

/// The holder has its share. The refusal is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{held} of {each} are held, and {free} of {total} are free")]
pub struct Full {
    /// Units of the holder.
    pub held: u64,
    /// The holder's share.
    pub each: u64,
    /// Units that nobody holds.
    pub free: u64,
    /// Units of the node.
    pub total: u64,
}

impl<H: Eq + Hash + Clone> Ledger<H> {
    /// Returns a ledger in which nobody holds a unit.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, used: 0, held: HashMap::new(), refused: 0 }
    }

    /// Takes a unit for `holder`. Release it with [`Ledger::release`].
    ///
    /// # Errors
    /// [`Full`], which is counted.
    pub fn take(&mut self, holder: H) -> Result<(), Full> {
        if let Err(full) = self.check(&holder) {
            self.refused += 1;
            return Err(full);
        }
        self.used += 1;
        *self.held.entry(holder).or_default() += 1;
        Ok(())
    }

    /// Returns whether `holder` may take a unit, without counting a refusal.
    ///
    /// # Errors
    /// [`Full`].
    pub fn check(&self, holder: &H) -> Result<(), Full> {
        let Bounds { total, each } = self.bounds;
        let (held, free) = (self.held(holder), total.saturating_sub(self.used));
        let is_admitted = held < each && held < free.saturating_mul(GREED);
        if is_admitted { Ok(()) } else { Err(Full { held, each, free, total }) }
    }

    /// Counts a refusal that another ledger or a time limit decided.
    pub fn refuse(&mut self) {
        self.refused += 1;
    }

    /// Releases a unit of `holder`.
    pub fn release(&mut self, holder: &H) {
        let Some(units) = self.held.get_mut(holder) else { return };
        *units -= 1;
        self.used -= 1;
        if *units == 0 {
            self.held.remove(holder);
        }
    }

    /// Returns the units of `holder`.
    #[must_use]
    pub fn held(&self, holder: &H) -> u64 {
        self.held.get(holder).copied().unwrap_or_default()
    }

    /// Returns the units of all holders.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Returns the bounds.
    #[must_use]
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Returns every holder that has units, with their number.
    pub fn holders(&self) -> impl Iterator<Item = (H, u64)> + '_ {
        self.held.iter().map(|(holder, units)| (holder.clone(), *units))
    }

    /// Returns the number of refusals.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Returns the holder with the most units.
    #[must_use]
    pub fn fullest(&self) -> Option<(H, u64)> {
        self.held.iter().max_by_key(|(_, units)| **units).map(|(holder, units)| (holder.clone(), *units))
    }

    /// Returns the use as of now, under the name `resource`.
    #[must_use]
    pub fn usage(&self, resource: &'static str) -> ShareUse<H> {
        ShareUse {
            resource,
            bounds: self.bounds,
            used: self.used,
            fullest: self.fullest(),
            refused: self.refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes units for each holder in turn until none of them gets one, and returns the units of each.
    fn greedy(ledger: &mut Ledger<u32>, holders: u32) -> Vec<u64> {
        let mut is_admitted = true;
        while is_admitted {
            is_admitted = (0..holders).filter(|holder| ledger.take(*holder).is_ok()).count() > 0;
        }
        (0..holders).map(|holder| ledger.held(&holder)).collect()
    }

    #[test]
    fn greedy_holders_leave_units_for_others() {
        for holders in 1..200 {
            let mut ledger = Ledger::new(Bounds { total: 1000, each: 1000 });
            let units = greedy(&mut ledger, holders);
            let free = 1000 - units.iter().sum::<u64>();
            assert!(free >= 1000 / (2 * u64::from(holders) + 1) - 1, "{holders} leave {free}");
            assert!(units.iter().max() <= units.iter().min().map(|least| least + 1).as_ref(), "{units:?}");
            assert!(ledger.take(u32::MAX).is_ok(), "{holders} holders keep a newcomer out");
        }
    }

    #[test]
    fn a_holder_alone_gets_two_thirds_or_its_share() {
        let mut ledger = Ledger::new(Bounds { total: 900, each: 900 });
        assert_eq!(greedy(&mut ledger, 1), [600]);
        let mut ledger = Ledger::new(Bounds { total: 900, each: 64 });
        assert_eq!(greedy(&mut ledger, 1), [64]);
        assert_eq!(ledger.take(0), Err(Full { held: 64, each: 64, free: 836, total: 900 }));
    }

    #[test]
    fn released_units_can_be_taken_again_and_empty_holders_are_forgotten() {
        let mut ledger = Ledger::new(Bounds { total: 3, each: 2 });
        assert!(ledger.take("a").is_ok() && ledger.take("a").is_ok());
        assert!(ledger.take("a").is_err());
        ledger.release(&"a");
        assert!(ledger.take("a").is_ok());
        ledger.release(&"a");
        ledger.release(&"a");
        ledger.release(&"a");
        assert_eq!((ledger.used(), ledger.held.len()), (0, 0), "a release too many counts nothing");
    }

    #[test]
    fn the_fullest_holder_and_the_refusals_are_shown() {
        let mut ledger = Ledger::new(Bounds { total: 100, each: 2 });
        for holder in ["a", "b", "b", "b"] {
            let _ = ledger.take(holder);
        }
        let bounds = Bounds { total: 100, each: 2 };
        let expected = ShareUse { resource: "x", bounds, used: 3, fullest: Some(("b", 2)), refused: 1 };
        assert!(expected.is_full());
        assert_eq!(ledger.usage("x"), expected);
        let mut ledger = Ledger::new(Bounds { total: 3, each: 3 });
        assert!(!ledger.usage("x").is_full(), "nobody has any");
        for holder in ["a", "b"] {
            assert!(ledger.take(holder).is_ok() && !ledger.usage("x").is_full());
        }
        assert!(ledger.take("a").is_ok() && ledger.usage("x").is_full(), "nothing is left");
    }
}

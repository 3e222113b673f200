//! A resource whose newcomers wait for their turn, such as handshakes.
//!
//! A free unit goes to the waiting holder that has the fewest units, and there to the longest waiting newcomer. A holder whose
//! units are all in use so waits behind every other holder.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use super::{
    Bounds, Ledger,
    connections::{Connection, PodId},
    ledger::Full,
};

/// The units in use, and the newcomers `W` that wait. Newcomers are bounded by the share of connections that each has.
#[derive(Debug)]
pub struct Queue<W> {
    pods: Ledger<PodId>,
    sources: Ledger<IpAddr>,
    /// By holder, in the order of arrival. No map is empty.
    waiting: HashMap<Connection, BTreeMap<u64, W>>,
    next_ticket: u64,
}

/// The answer to a newcomer.
#[derive(Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It has a unit, until [`Queue::leave`].
    Admitted,
    /// It waits until [`Queue::admit_next`] returns it, or until [`Queue::forget`].
    Waits(u64),
}

impl<W> Queue<W> {
    /// Returns a queue in which nobody holds a unit. `sources` bounds only newcomers that have a source address.
    #[must_use]
    pub fn new(pods: Bounds, sources: Bounds) -> Self {
        Self {
            pods: Ledger::new(pods),
            sources: Ledger::new(sources),
            waiting: HashMap::new(),
            next_ticket: 0,
        }
    }

    /// Admits a newcomer, or keeps `waiter` until there is a unit for it.
    pub fn arrive(&mut self, holder: Connection, waiter: W) -> Arrival {
        if !self.waiting.contains_key(&holder) && self.check(&holder).is_ok() {
            self.admit(holder);
            return Arrival::Admitted;
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.waiting.entry(holder).or_default().insert(ticket, waiter);
        Arrival::Waits(ticket)
    }

    /// Removes a newcomer that waits no longer, and counts that it was refused. Returns the full share, or `None` if the
    /// newcomer does not wait: it has a unit by now.
    pub fn forget(&mut self, holder: &Connection, ticket: u64) -> Option<Full> {
        let waiters = self.waiting.get_mut(holder)?;
        waiters.remove(&ticket)?;
        if waiters.is_empty() {
            self.waiting.remove(holder);
        }
        let full_source = holder.source.and_then(|source| self.sources.check(&source).err());
        match full_source {
            Some(full) => {
                self.sources.refuse();
                Some(full)
            }
            None => {
                self.pods.refuse();
                let Bounds { total, each } = self.pods.bounds();
                let (held, free) = (self.pods.held(&holder.pod), total.saturating_sub(self.pods.used()));
                Some(Full { held, each, free, total })
            }
        }
    }

    /// Releases a unit. Call [`Queue::admit_next`] until it returns `None`.
    pub fn leave(&mut self, holder: &Connection) {
        self.pods.release(&holder.pod);
        if let Some(source) = &holder.source {
            self.sources.release(source);
        }
    }

    /// Admits the newcomer whose turn it is, if there is a unit for one.
    pub fn admit_next(&mut self) -> Option<(Connection, W)> {
        let admissible = self.waiting.iter().filter(|(holder, _)| self.check(holder).is_ok());
        let turn = |(holder, waiters): &(&Connection, &BTreeMap<u64, W>)| {
            let held = holder
                .source
                .map_or_else(|| self.pods.held(&holder.pod), |source| self.sources.held(&source));
            (held, waiters.first_key_value().map(|(ticket, _)| *ticket))
        };
        let holder = *admissible.min_by_key(turn)?.0;
        let waiters = self.waiting.get_mut(&holder)?;
        let (_, waiter) = waiters.pop_first()?;
        if waiters.is_empty() {
            self.waiting.remove(&holder);
        }
        self.admit(holder);
        Some((holder, waiter))
    }

    fn check(&self, holder: &Connection) -> Result<(), Full> {
        self.pods.check(&holder.pod)?;
        holder.source.map_or(Ok(()), |source| self.sources.check(&source))
    }

    fn admit(&mut self, holder: Connection) {
        // Checked by the caller.
        let _ = self.pods.take(holder.pod);
        if let Some(source) = holder.source {
            let _ = self.sources.take(source);
        }
    }

    /// Returns the number of newcomers that wait.
    #[must_use]
    pub fn count_waiting(&self) -> usize {
        self.waiting.values().map(BTreeMap::len).sum()
    }

    /// Returns the units by pod.
    #[must_use]
    pub fn pods(&self) -> &Ledger<PodId> {
        &self.pods
    }

    /// Returns the units by source.
    #[must_use]
    pub fn sources(&self) -> &Ledger<IpAddr> {
        &self.sources
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue() -> Queue<u32> {
        Queue::new(Bounds { total: 12, each: 8 }, Bounds { total: 12, each: 4 })
    }

    fn from(last: u8, pod: PodId) -> Connection {
        Connection { pod, source: Some([10, 77, 2, last].into()) }
    }

    #[test]
    fn a_source_that_holds_its_share_keeps_nobody_else_out() {
        let mut queue = queue();
        let arrivals: Vec<_> = (0..40).map(|waiter| queue.arrive(from(9, 1), waiter)).collect();
        assert_eq!(arrivals.iter().filter(|arrival| **arrival == Arrival::Admitted).count(), 4);
        assert_eq!(queue.count_waiting(), 36);
        assert_eq!(queue.arrive(from(3, 1), 100), Arrival::Admitted, "another source at the same pod");
        assert_eq!(queue.arrive(from(4, 2), 101), Arrival::Admitted, "at another pod");
        assert!(queue.admit_next().is_none());
    }

    #[test]
    fn a_pod_that_many_sources_attack_keeps_no_other_pod_out() {
        let mut queue = queue();
        let admitted = (0..200).filter(|last| queue.arrive(from(*last, 1), 0) == Arrival::Admitted).count();
        assert_eq!(admitted, 8);
        assert_eq!(queue.arrive(from(250, 2), 1), Arrival::Admitted);
    }

    #[test]
    fn a_free_unit_goes_to_the_holder_with_the_fewest() {
        let mut queue = Queue::new(Bounds { total: 3, each: 3 }, Bounds { total: 3, each: 2 });
        for waiter in 0..4 {
            queue.arrive(from(9, 1), waiter);
        }
        queue.arrive(from(3, 2), 10);
        // Nothing is free now.
        assert_eq!(queue.arrive(from(4, 3), 20), Arrival::Waits(2));
        queue.leave(&from(9, 1));
        assert_eq!(
            queue.admit_next(),
            Some((from(4, 3), 20)),
            "the other source waits longer and holds more"
        );
        queue.leave(&from(4, 3));
        assert_eq!(queue.admit_next(), Some((from(9, 1), 2)), "in the order of arrival");
        assert_eq!(queue.admit_next(), None);
    }

    #[test]
    fn a_newcomer_that_gave_up_is_counted_and_gets_no_unit() {
        let mut queue = queue();
        let arrivals: Vec<_> = (0..6).map(|waiter| queue.arrive(from(9, 1), waiter)).collect();
        let Arrival::Waits(ticket) = arrivals[4] else { panic!("{arrivals:?}") };
        assert_eq!(queue.forget(&from(9, 1), ticket).map(|full| (full.held, full.each)), Some((4, 4)));
        assert_eq!(queue.forget(&from(9, 1), ticket), None);
        assert_eq!(queue.sources().usage("x").refused, 1);
        queue.leave(&from(9, 1));
        assert_eq!(queue.admit_next(), Some((from(9, 1), 5)));
        assert_eq!((queue.count_waiting(), queue.sources().used()), (0, 4));
    }

    #[test]
    fn a_pod_without_source_is_bounded_by_its_own_share() {
        let mut queue = queue();
        let own = Connection { pod: 1, source: None };
        let admitted = (0..20).filter(|waiter| queue.arrive(own, *waiter) == Arrival::Admitted).count();
        assert_eq!((admitted, queue.sources().used()), (8, 0));
    }
}

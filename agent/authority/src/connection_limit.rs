//! Limits the connections of each address. A permit is released when its connection ends.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The connections of all addresses. Addresses without connections have no entry.
#[derive(Debug)]
pub(super) struct ConnectionLimit {
    most: usize,
    taken: Mutex<HashMap<IpAddr, usize>>,
}

/// The permit of one connection, released when dropped.
#[derive(Debug)]
pub(super) struct Permit {
    address: IpAddr,
    limit: Arc<ConnectionLimit>,
}

impl ConnectionLimit {
    /// Creates a limit of `most` connections per address.
    pub(super) fn new(most: usize) -> Self {
        Self { most, taken: Mutex::default() }
    }

    /// Returns a permit for a connection of `address`, or `None` if the address has reached the limit.
    pub(super) fn take(self: &Arc<Self>, address: IpAddr) -> Option<Permit> {
        let mut taken = self.taken();
        let number = taken.get(&address).copied().unwrap_or_default();
        if number >= self.most {
            return None;
        }
        taken.insert(address, number + 1);
        Some(Permit { address, limit: self.clone() })
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut taken = self.limit.taken();
        match taken.get_mut(&self.address) {
            Some(number) if *number > 1 => *number -= 1,
            _ => drop(taken.remove(&self.address)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_its_own_permits_and_gets_them_back() {
        let limit = Arc::new(ConnectionLimit::new(2));
        let (a, b) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let held = [limit.take(a), limit.take(a)];
        assert!(held.iter().all(Option::is_some));
        assert!(limit.take(a).is_none(), "all of its own are taken");
        assert!(limit.take(b).is_some(), "another address has its own");
        drop(held);
        assert!(limit.take(a).is_some());
        assert!(limit.taken().is_empty(), "who has none is forgotten");
    }
}

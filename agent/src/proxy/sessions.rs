//! The tunnel sessions of a node: pools of idle sessions for the next flows.
//!
//! Each worker has a pool of its own, behind a lock of its own. A flow takes from the pool of its worker first. Only a flow
//! that finds nothing there looks into the pools of the other workers, and a session found there moves to the flow's thread.
//! No session is tested, closed or dropped while a lock is held, since each of these makes a system call.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Instant, SystemTime},
};

use tacit_core::{
    pool::Pool,
    shares::{Bounds, IDLE_SESSIONS, ShareUse, connections::PodId},
    spiffe::SpiffeId,
};
use tacit_tunnel::Session;

use crate::proxy::workers::Workers;

/// Sessions are interchangeable for flows of the same pod to the same server under the same identities.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// Cgroup id of the source pod, for its share.
    pub pod: u64,
    /// Cookie of the source pod's network namespace, which the session belongs to. A pod whose sandbox is made anew keeps its cgroup.
    pub netns: u64,
    /// Address of the destination pod.
    pub server: IpAddr,
    /// Identity the server proved.
    pub identity: SpiffeId,
    /// Serial number of the certificate the client showed.
    pub serial: Arc<str>,
}

type Idle = Pool<PoolKey, PodId, Box<Session>>;

/// The idle sessions of every worker.
pub struct Sessions {
    bounds: Bounds,
    /// One for each worker, by its index.
    pools: Vec<Mutex<Idle>>,
}

impl Sessions {
    /// Empty pools for `workers` threads. The threads divide `bounds` equally, so the share of a pod holds for each thread.
    #[must_use]
    pub fn new(workers: usize, bounds: Bounds) -> Self {
        let part = |units: u64| (units / workers.max(1) as u64).max(1);
        let of_worker = Bounds { total: part(bounds.total), each: part(bounds.each) };
        Self {
            bounds,
            pools: (0..workers.max(1))
                .map(|_| Mutex::new(Pool::new(of_worker, |key: &PoolKey| key.pod)))
                .collect(),
        }
    }

    /// Takes an idle session for a flow of the calling worker. A session of another worker moves to the calling thread.
    #[must_use]
    pub fn take(&self, key: &PoolKey) -> Option<Box<Session>> {
        let own = self.own();
        if let Some(session) = self.take_from(own, key) {
            return Some(session);
        }
        let mut others = (0..self.pools.len()).filter(|worker| *worker != own);
        let session = others.find_map(|worker| self.take_from(worker, key))?;
        session
            .moved_to_this_thread()
            .inspect_err(|error| tracing::debug!(%error, "idle session lost on its way"))
            .ok()
    }

    fn take_from(&self, worker: usize, key: &PoolKey) -> Option<Box<Session>> {
        loop {
            // The lock is released at the end of this statement.
            let session = self.pool(worker).take(key, Instant::now())?;
            if is_usable(&session) {
                return Some(session);
            }
        }
    }

    /// Keeps a session of the calling worker for the next flow, or closes one if the pool is full.
    pub fn keep(&self, key: PoolKey, session: Box<Session>) {
        let no_room = self.pool(self.own()).put(key, session, Instant::now());
        if let Some(session) = no_room {
            session.close();
        }
    }

    /// Closes sessions that were idle too long, and sessions of network namespaces for which `is_enrolled(cgroup, cookie)` is false.
    /// Such a session would keep its namespace alive.
    pub fn close_unused(&self, is_enrolled: impl Fn(u64, u64) -> bool) {
        let now = Instant::now();
        self.close_removed(|pool| {
            let mut unused = pool.expire(now);
            unused.extend(pool.clear_where(|key, _| !is_enrolled(key.pod, key.netns)));
            unused
        });
    }

    /// Closes the idle sessions of a pod to a server that does not answer any more. Another pod may reach the server. Sessions under
    /// another certificate of the pod stay: no flow takes them after a renewal.
    pub fn close_to(&self, key: &PoolKey) {
        self.close_removed(|pool| pool.clear(key));
    }

    /// Closes the idle sessions whose peers are not trusted any more: by revocation lists, or by the roots of a federated domain.
    pub fn close_untrusted(&self) {
        let now = SystemTime::now();
        self.close_removed(|pool| pool.clear_where(|_, session| session.peer_chain().check(now).is_err()));
    }

    /// Closes all idle sessions.
    pub fn close_all(&self) {
        self.close_removed(|pool| pool.clear_where(|_, _| true));
    }

    /// Returns the number of idle sessions of the node.
    #[must_use]
    pub fn count_idle(&self) -> usize {
        (0..self.pools.len()).map(|worker| self.pool(worker).len()).sum()
    }

    /// Returns the use by pod.
    #[must_use]
    pub fn usage(&self) -> ShareUse<PodId> {
        let (mut held, mut refused) = (HashMap::new(), 0);
        for worker in 0..self.pools.len() {
            let pool = self.pool(worker);
            refused += pool.refused();
            pool.owners().for_each(|(pod, units)| *held.entry(pod).or_default() += units);
        }
        ShareUse {
            resource: IDLE_SESSIONS.resource,
            bounds: self.bounds,
            used: held.values().sum(),
            fullest: held.into_iter().max_by_key(|(_, units)| *units),
            refused,
        }
    }

    fn close_removed(&self, remove: impl Fn(&mut Idle) -> Vec<Box<Session>>) {
        for worker in 0..self.pools.len() {
            let removed = remove(&mut self.pool(worker));
            removed.into_iter().for_each(Session::close);
        }
    }

    /// The index of the calling worker.
    fn own(&self) -> usize {
        Workers::current() % self.pools.len()
    }

    fn pool(&self, worker: usize) -> MutexGuard<'_, Idle> {
        self.pools[worker].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_usable(session: &Session) -> bool {
    let now = SystemTime::now();
    session.peer_not_after() > now && session.peer_chain().check(now).is_ok() && session.is_idle_alive()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_of_the_node_is_shared_by_its_workers() {
        for workers in [1, 2, 3, 64] {
            let bounds = Bounds { total: 8192, each: 5462 };
            let sessions = Sessions::new(workers, bounds);
            let totals: u64 = (0..workers).map(|worker| sessions.pool(worker).bounds().total).sum();
            assert!(totals <= 8192 && totals > 8192 - workers as u64, "{totals} for {workers} workers");
            assert_eq!(sessions.usage().bounds, bounds);
        }
    }
}

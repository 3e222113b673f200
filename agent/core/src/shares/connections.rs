//! The connections that an agent carries: by pod, by source address, and by source address at a pod.

use std::{collections::HashMap, net::IpAddr};

use super::{
    Bounds, CONNECTIONS, Capacity, Full, Ledger, SOURCE_CONNECTIONS, SOURCE_CONNECTIONS_AT_POD, ShareUse,
};
use crate::refusal::RefusalReason;

/// Cgroup id of a pod.
pub type PodId = u64;

/// A connection that is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Connection {
    /// The pod of this node.
    pub pod: PodId,
    /// The remote address of a connection to the pod; `None` for a connection that the pod opens.
    pub source: Option<IpAddr>,
}

/// A refused connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    /// The reason.
    pub reason: RefusalReason,
    /// The figures of the full share.
    pub full: Full,
}

/// The ledgers of connections.
#[derive(Debug)]
pub struct Connections {
    pods: Ledger<PodId>,
    sources: Ledger<IpAddr>,
    /// The sources of each pod that has some.
    at_pods: HashMap<PodId, Ledger<IpAddr>>,
    refused_at_pods: u64,
}

impl Connections {
    /// Returns ledgers for a node with `capacity`.
    #[must_use]
    pub fn new(capacity: Capacity) -> Self {
        Self {
            pods: Ledger::new(CONNECTIONS.bounds(capacity)),
            sources: Ledger::new(SOURCE_CONNECTIONS.bounds(capacity)),
            at_pods: HashMap::new(),
            refused_at_pods: 0,
        }
    }

    /// Counts a connection until [`Connections::close`], and returns the number of connections of its pod.
    ///
    /// # Errors
    /// [`Refused`] if a share is full; nothing is counted then but the refusal.
    pub fn open(&mut self, connection: Connection) -> Result<u64, Refused> {
        let Connection { pod, source } = connection;
        if let Some(source) = source {
            self.open_from(pod, source)?;
        }
        self.pods.take(pod).map_err(|full| {
            self.close_from(pod, source);
            Refused { reason: RefusalReason::PodConnections, full }
        })?;
        Ok(self.held(pod))
    }

    /// Returns the number of connections of a pod.
    #[must_use]
    pub fn held(&self, pod: PodId) -> u64 {
        self.pods.held(&pod)
    }

    fn open_from(&mut self, pod: PodId, source: IpAddr) -> Result<(), Refused> {
        let refused = |full| Refused { reason: RefusalReason::SourceConnections, full };
        // The share of the pod is the total of its sources.
        let total = self.pods.bounds().each;
        let bounds = Bounds { total, each: super::alone(total) };
        let at_pod = self.at_pods.entry(pod).or_insert_with(|| Ledger::new(bounds));
        at_pod.take(source).map_err(|full| {
            self.refused_at_pods += 1;
            refused(full)
        })?;
        self.sources.take(source).map_err(|full| {
            self.release_at_pod(pod, source);
            refused(full)
        })
    }

    fn close_from(&mut self, pod: PodId, source: Option<IpAddr>) {
        let Some(source) = source else { return };
        self.sources.release(&source);
        self.release_at_pod(pod, source);
    }

    fn release_at_pod(&mut self, pod: PodId, source: IpAddr) {
        if let Some(at_pod) = self.at_pods.get_mut(&pod) {
            at_pod.release(&source);
            if at_pod.used() == 0 {
                self.at_pods.remove(&pod);
            }
        }
    }

    /// Ends the count of an open connection.
    pub fn close(&mut self, connection: Connection) {
        self.pods.release(&connection.pod);
        self.close_from(connection.pod, connection.source);
    }

    /// Returns the use by pod.
    #[must_use]
    pub fn by_pod(&self) -> ShareUse<PodId> {
        self.pods.usage(CONNECTIONS.resource)
    }

    /// Returns the use by source address.
    #[must_use]
    pub fn by_source(&self) -> ShareUse<IpAddr> {
        self.sources.usage(SOURCE_CONNECTIONS.resource)
    }

    /// Returns the use by source address at a pod.
    #[must_use]
    pub fn by_source_at_pod(&self) -> ShareUse<(PodId, IpAddr)> {
        let of_pod = |(pod, sources): (&PodId, &Ledger<IpAddr>)| {
            let (source, held) = sources.fullest()?;
            Some(((*pod, source), held, sources.used()))
        };
        let fullest = self.at_pods.iter().filter_map(of_pod).max_by_key(|(_, held, _)| *held);
        let total = self.pods.bounds().each;
        ShareUse {
            resource: SOURCE_CONNECTIONS_AT_POD.resource,
            bounds: Bounds { total, each: super::alone(total) },
            used: fullest.map_or(0, |(_, _, used)| used),
            fullest: fullest.map(|(holder, held, _)| (holder, held)),
            refused: self.refused_at_pods,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ATTACKER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 2, 9));
    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 2, 3));

    fn connections() -> Connections {
        Connections::new(Capacity { descriptors: 20_000 })
    }

    fn to(pod: PodId, source: IpAddr) -> Connection {
        Connection { pod, source: Some(source) }
    }

    fn fill(all: &mut Connections, connection: Connection) -> (u64, RefusalReason) {
        let mut opened = 0;
        loop {
            match all.open(connection) {
                Ok(_) => opened += 1,
                Err(refused) => return (opened, refused.reason),
            }
        }
    }

    #[test]
    fn a_pod_that_opens_all_it_can_leaves_a_third_to_others() {
        let mut all = connections();
        let (opened, reason) = fill(&mut all, Connection { pod: 1, source: None });
        assert_eq!((opened, reason), (5834, RefusalReason::PodConnections));
        assert!(all.open(Connection { pod: 2, source: None }).is_ok());
        assert_eq!(fill(&mut all, to(3, CLIENT)).1, RefusalReason::PodConnections);
    }

    #[test]
    fn a_source_that_opens_all_it_can_leaves_the_server_room_for_other_clients() {
        let mut all = connections();
        let (opened, reason) = fill(&mut all, to(1, ATTACKER));
        assert_eq!((opened, reason), (3890, RefusalReason::SourceConnections));
        for _ in 0..500 {
            all.open(to(1, CLIENT)).expect("the server's share has room");
        }
        assert!(all.open(to(2, ATTACKER)).is_ok(), "the source has room at other pods");
        assert_eq!(all.by_source_at_pod().fullest, Some(((1, ATTACKER), 3890)));
    }

    #[test]
    fn a_source_at_many_pods_leaves_them_room() {
        let mut all = connections();
        let opened: u64 = (1..=20).map(|pod| fill(&mut all, to(pod, ATTACKER)).0).sum();
        assert_eq!(opened, 5834);
        assert!((1..=20).all(|pod| (0..50).all(|_| all.open(to(pod, CLIENT)).is_ok())));
    }

    #[test]
    fn a_refused_connection_leaves_no_count_and_a_closed_one_neither() {
        let mut all = connections();
        let inbound = to(1, ATTACKER);
        let (opened, _) = fill(&mut all, inbound);
        let (more, _) = fill(&mut all, Connection { pod: 1, source: None });
        assert_eq!(all.open(to(1, CLIENT)).expect_err("full").reason, RefusalReason::PodConnections);
        assert_eq!(all.by_source().used, opened);
        (0..opened).for_each(|_| all.close(inbound));
        (0..more).for_each(|_| all.close(Connection { pod: 1, source: None }));
        assert_eq!((all.by_pod().used, all.by_source().used, all.at_pods.len()), (0, 0, 0));
    }
}

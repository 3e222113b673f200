//! The shares of a running agent: permits that a connection or a handshake holds until it ends. `tacit_core::shares` has the
//! bounds and the rule.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tacit_core::{
    refusal::{Refusal, RefusalReason},
    shares::{
        self, Capacity, ShareUse,
        connections::{Connection, Connections, PodId},
        ledger::Full,
        queue::{Arrival, Queue},
    },
};
use tacit_tunnel::relay::BulkShare;
use tokio::{sync::oneshot, time::timeout};

/// The longest wait for the turn of a handshake: the longest time that a handshake may take. Every earlier handshake has ended
/// by then.
pub const HANDSHAKE_WAIT: Duration = Duration::from_secs(10);

/// The shares that flows use.
pub struct Shares {
    connections: Arc<Mutex<Connections>>,
    handshakes: Turns,
    outgoing_handshakes: Turns,
    /// Directions of flows with large buffers.
    pub bulk: Arc<BulkShare>,
}

impl Shares {
    /// Nothing is used yet.
    #[must_use]
    pub fn new(capacity: Capacity) -> Self {
        let bounds = |share: &shares::Share| share.bounds(capacity);
        let outgoing = bounds(&shares::OUTGOING_HANDSHAKES);
        let incoming = Queue::new(bounds(&shares::POD_HANDSHAKES), bounds(&shares::HANDSHAKES));
        Self {
            connections: Arc::new(Mutex::new(Connections::new(capacity))),
            handshakes: Turns::new(incoming),
            outgoing_handshakes: Turns::new(Queue::new(outgoing, outgoing)),
            bulk: Arc::new(BulkShare::new(bounds(&shares::BULK_DIRECTIONS))),
        }
    }

    /// Counts a connection until the permit is dropped.
    ///
    /// # Errors
    /// [`Refusal`] if the pod or the source has its share.
    pub fn connection(&self, connection: Connection) -> Result<ConnectionPermit, Refusal> {
        lock(&self.connections).open(connection).map_err(|refused| {
            let whose = match (refused.reason, connection.source) {
                (RefusalReason::SourceConnections, Some(source)) => source.to_string(),
                _ => "the pod".to_owned(),
            };
            Refusal::new(refused.reason, format!("connections of {whose}: {}", refused.full))
        })?;
        Ok(ConnectionPermit { connections: self.connections.clone(), connection })
    }

    /// Waits for the turn of a handshake with `source`, which connected to `pod`.
    ///
    /// # Errors
    /// [`Refusal`] if the turn does not come within [`HANDSHAKE_WAIT`].
    pub async fn handshake(&self, pod: PodId, source: IpAddr) -> Result<Turn, Refusal> {
        self.handshakes.turn(Connection { pod, source: Some(source) }).await
    }

    /// Waits for the turn of a handshake that `pod` begins.
    ///
    /// # Errors
    /// As [`Shares::handshake`].
    pub async fn outgoing_handshake(&self, pod: PodId) -> Result<Turn, Refusal> {
        self.outgoing_handshakes.turn(Connection { pod, source: None }).await
    }

    /// Returns the use of every share, with `pod_name` for the names of pods.
    pub fn usage(&self, pod_name: &dyn Fn(PodId) -> String) -> Vec<ShareUse<String>> {
        let connections = lock(&self.connections);
        let at_pod = |(pod, source): (PodId, IpAddr)| format!("{source} at {}", pod_name(pod));
        let mut all = vec![
            connections.by_pod().named(pod_name),
            connections.by_source().named(|source| source.to_string()),
            connections.by_source_at_pod().named(at_pod),
        ];
        drop(connections);
        let incoming = lock(&self.handshakes.0);
        all.push(incoming.sources().usage(shares::HANDSHAKES.resource).named(|source| source.to_string()));
        all.push(incoming.pods().usage(shares::POD_HANDSHAKES.resource).named(pod_name));
        drop(incoming);
        let outgoing = lock(&self.outgoing_handshakes.0);
        all.push(outgoing.pods().usage(shares::OUTGOING_HANDSHAKES.resource).named(pod_name));
        drop(outgoing);
        all.push(self.bulk.usage().named(pod_name));
        all
    }
}

/// One counted connection.
pub struct ConnectionPermit {
    connections: Arc<Mutex<Connections>>,
    connection: Connection,
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        lock(&self.connections).close(self.connection);
    }
}

/// Handshakes, and those that wait for their turn.
#[derive(Clone)]
struct Turns(Arc<Mutex<Queue<oneshot::Sender<()>>>>);

impl Turns {
    fn new(queue: Queue<oneshot::Sender<()>>) -> Self {
        Self(Arc::new(Mutex::new(queue)))
    }

    async fn turn(&self, holder: Connection) -> Result<Turn, Refusal> {
        let (tell, told) = oneshot::channel();
        let arrival = lock(&self.0).arrive(holder, tell);
        let mut turn = Turn { turns: self.clone(), holder, ticket: None };
        let Arrival::Waits(ticket) = arrival else { return Ok(turn) };
        turn.ticket = Some(ticket);
        if timeout(HANDSHAKE_WAIT, told).await.is_ok() {
            turn.ticket = None;
            return Ok(turn);
        }
        match turn.give_up() {
            Some(full) => {
                let detail = format!("no turn within {HANDSHAKE_WAIT:?}: {full}");
                Err(Refusal::new(RefusalReason::HandshakeLimit, detail))
            }
            // It came at the last moment.
            None => Ok(turn),
        }
    }
}

/// The turn of one handshake, or a place in the queue for it. The queue says which: a message about a turn may be late.
pub struct Turn {
    turns: Turns,
    holder: Connection,
    /// The place in the queue; `None` once the turn has come.
    ticket: Option<u64>,
}

impl Turn {
    /// Leaves the queue. Returns `None` if the turn has come meanwhile.
    fn give_up(&mut self) -> Option<Full> {
        let ticket = self.ticket.take()?;
        lock(&self.turns.0).forget(&self.holder, ticket)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let waits = self.ticket.is_some();
        if waits && self.give_up().is_some() {
            return;
        }
        let mut queue = lock(&self.turns.0);
        queue.leave(&self.holder);
        while let Some((_, tell)) = queue.next() {
            // One that does not listen any more releases its unit itself.
            let _ = tell.send(());
        }
    }
}

/// A panic under a lock leaves at most one unit counted, so a poisoned lock is still good.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ATTACKER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 2, 9));
    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 2, 3));

    fn shares() -> Shares {
        Shares::new(Capacity { descriptors: 20_000 })
    }

    fn used(shares: &Shares, resource: &str) -> (u64, u64) {
        let all = shares.usage(&|pod| format!("pod {pod}"));
        let found = all.iter().find(|usage| usage.resource == resource).expect("a row");
        (found.used, found.refused)
    }

    #[tokio::test(start_paused = true)]
    async fn handshakes_of_one_source_wait_and_end_and_others_do_not_notice() {
        let shares = shares();
        let each = shares::HANDSHAKES.bounds(Capacity { descriptors: 0 }).each;
        let mut held = Vec::new();
        for _ in 0..each {
            held.push(shares.handshake(1, ATTACKER).await.expect("its share"));
        }
        let refused = shares.handshake(1, ATTACKER).await.err().expect("no turn");
        assert_eq!(refused.reason, RefusalReason::HandshakeLimit);
        assert!(shares.handshake(1, CLIENT).await.is_ok());
        assert_eq!(used(&shares, "handshakes"), (each, 1));
        let (waiting, _) = tokio::join!(shares.handshake(1, ATTACKER), async { held.pop() });
        assert!(waiting.is_ok(), "its turn has come");
        drop((waiting, held));
        assert_eq!(used(&shares, "handshakes"), (0, 1));
        assert_eq!(used(&shares, "pod_handshakes"), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_goes_while_it_waits_leaves_nothing_behind() {
        let shares = shares();
        let mut held = Vec::new();
        for _ in 0..128 {
            held.push(shares.handshake(1, ATTACKER).await.expect("its share"));
        }
        let gone = timeout(HANDSHAKE_WAIT / 2, shares.handshake(1, ATTACKER)).await;
        assert!(gone.is_err(), "it waited");
        assert_eq!(lock(&shares.handshakes.0).count_waiting(), 0);
        drop(held);
        assert_eq!(used(&shares, "handshakes").0, 0);
    }

    #[test]
    fn a_pod_beyond_its_share_is_refused_until_one_of_its_connections_ends() {
        let shares = shares();
        let own = Connection { pod: 1, source: None };
        let mut held = Vec::new();
        let refusal = loop {
            match shares.connection(own) {
                Ok(permit) => held.push(permit),
                Err(refusal) => break refusal,
            }
        };
        assert_eq!(refusal.reason, RefusalReason::PodConnections);
        assert!(refusal.detail.contains("5834 of 5834 are held"), "{}", refusal.detail);
        assert!(shares.connection(Connection { pod: 2, source: Some(CLIENT) }).is_ok());
        held.pop();
        assert!(shares.connection(own).is_ok());
        assert_eq!(used(&shares, "connections"), (5833, 1));
    }
}

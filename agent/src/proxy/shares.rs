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

/// Longest wait of an incoming handshake for its turn: half of the time that the client, which has connected, gives it.
const INCOMING_WAIT: Duration = Duration::from_secs(5);
/// Longest wait of an outgoing handshake for its turn, before its connection is opened: the longest time of a handshake.
const OUTGOING_WAIT: Duration = Duration::from_secs(10);

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
        Self::with_waits(capacity, INCOMING_WAIT, OUTGOING_WAIT)
    }

    fn with_waits(capacity: Capacity, incoming_wait: Duration, outgoing_wait: Duration) -> Self {
        let bounds = |share: &shares::Share| share.bounds(capacity);
        let outgoing = bounds(&shares::OUTGOING_HANDSHAKES);
        let incoming = Queue::new(bounds(&shares::POD_HANDSHAKES), bounds(&shares::HANDSHAKES));
        Self {
            connections: Arc::new(Mutex::new(Connections::new(capacity))),
            handshakes: Turns::new(incoming, incoming_wait),
            outgoing_handshakes: Turns::new(Queue::new(outgoing, outgoing), outgoing_wait),
            bulk: Arc::new(BulkShare::new(bounds(&shares::BULK_DIRECTIONS))),
        }
    }

    /// Counts a connection until the permit is dropped.
    ///
    /// # Errors
    /// [`Refusal`] if the pod or the source has its share.
    pub fn connection(&self, connection: Connection) -> Result<ConnectionPermit, Refusal> {
        let held = lock(&self.connections).open(connection).map_err(|refused| {
            let whose = match (refused.reason, connection.source) {
                (RefusalReason::SourceConnections, Some(source)) => source.to_string(),
                _ => "the pod".to_owned(),
            };
            Refusal::new(refused.reason, format!("connections of {whose}: {}", refused.full))
        })?;
        Ok(ConnectionPermit { connections: self.connections.clone(), connection, held })
    }

    /// Returns the bytes that one more socket for a connection of `pod` may have unread; `None` leaves that to the kernel.
    pub fn unread_bytes(&self, pod: PodId) -> Option<u32> {
        shares::unread_bytes(lock(&self.connections).held(pod))
    }

    /// Returns the window of a stream of one more flow of `pod` over HBONE.
    pub fn stream_window_bytes(&self, pod: PodId) -> u32 {
        shares::stream_window_bytes(lock(&self.connections).held(pod))
    }

    /// Waits for the turn of a handshake with `source`, which connected to `pod`.
    ///
    /// # Errors
    /// [`Refusal`] if the turn does not come in time.
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
        let incoming = lock(&self.handshakes.queue);
        all.push(incoming.sources().usage(shares::HANDSHAKES.resource).named(|source| source.to_string()));
        all.push(incoming.pods().usage(shares::POD_HANDSHAKES.resource).named(pod_name));
        drop(incoming);
        let outgoing = lock(&self.outgoing_handshakes.queue);
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
    /// Connections of the pod when this one was opened.
    held: u64,
}

impl ConnectionPermit {
    /// Returns the bytes that the connection's socket may have unread; `None` leaves what the listener has set.
    pub fn unread_bytes(&self) -> Option<u32> {
        shares::unread_bytes(self.held)
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        lock(&self.connections).close(self.connection);
    }
}

/// Handshakes, and those that wait for their turn.
#[derive(Clone)]
struct Turns {
    queue: Arc<Mutex<Queue<oneshot::Sender<()>>>>,
    /// Longest wait.
    wait: Duration,
}

impl Turns {
    fn new(queue: Queue<oneshot::Sender<()>>, wait: Duration) -> Self {
        Self { queue: Arc::new(Mutex::new(queue)), wait }
    }

    async fn turn(&self, holder: Connection) -> Result<Turn, Refusal> {
        let (tell, told) = oneshot::channel();
        let arrival = lock(&self.queue).arrive(holder, tell);
        let place = match arrival {
            Arrival::Admitted => Place::Unit,
            Arrival::Waits(ticket) => Place::Queue(ticket),
        };
        let mut turn = Turn { turns: self.clone(), holder, place };
        let Arrival::Waits(_) = arrival else { return Ok(turn) };
        if matches!(timeout(self.wait, told).await, Ok(Ok(()))) {
            turn.place = Place::Unit;
            return Ok(turn);
        }
        match turn.leave_queue() {
            Some(full) => {
                let detail = format!("no turn within {:?}: {full}", self.wait);
                Err(Refusal::new(RefusalReason::HandshakeLimit, detail))
            }
            // It came at the last moment.
            None => Ok(turn),
        }
    }
}

/// The turn of one handshake, or a place in the queue for it.
pub struct Turn {
    turns: Turns,
    holder: Connection,
    place: Place,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In the queue, or by now with a unit: the message about it may be late.
    Queue(u64),
    /// With a unit.
    Unit,
    /// Nowhere.
    Gone,
}

impl Turn {
    /// Leaves the queue. Returns `None` if the turn has come meanwhile.
    fn leave_queue(&mut self) -> Option<Full> {
        let Place::Queue(ticket) = self.place else { return None };
        let full = lock(&self.turns.queue).forget(&self.holder, ticket);
        self.place = if full.is_some() { Place::Gone } else { Place::Unit };
        full
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.leave_queue();
        if self.place != Place::Unit {
            return;
        }
        let mut queue = lock(&self.turns.queue);
        queue.leave(&self.holder);
        let admitted: Vec<_> = std::iter::from_fn(|| queue.admit_next()).collect();
        drop(queue);
        // Waking a task of another worker is a system call.
        for (_, tell) in admitted {
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

    const CAPACITY: Capacity = Capacity { descriptors: 20_000 };

    fn shares() -> Shares {
        Shares::new(CAPACITY)
    }

    fn used(shares: &Shares, resource: &str) -> (u64, u64) {
        let all = shares.usage(&|pod| format!("pod {pod}"));
        let found = all.iter().find(|usage| usage.resource == resource).expect("a row");
        (found.used, found.refused)
    }

    #[tokio::test]
    async fn handshakes_of_one_source_wait_and_end_and_others_do_not_notice() {
        let shares = Shares::with_waits(CAPACITY, Duration::from_millis(20), OUTGOING_WAIT);
        let each = shares::HANDSHAKES.bounds(Capacity { descriptors: 0 }).each;
        let mut held = Vec::new();
        for _ in 0..each {
            held.push(shares.handshake(1, ATTACKER).await.expect("its share"));
        }
        let refused = shares.handshake(1, ATTACKER).await.err().expect("no turn");
        assert_eq!(refused.reason, RefusalReason::HandshakeLimit);
        assert!(shares.handshake(1, CLIENT).await.is_ok());
        assert_eq!(used(&shares, "handshakes"), (each, 1));
        // The first is polled before the second ends a handshake.
        let (waiting, _) = tokio::join!(shares.handshake(1, ATTACKER), async { drop(held.pop()) });
        assert!(waiting.is_ok(), "its turn has come");
        drop((waiting, held));
        assert_eq!(used(&shares, "handshakes"), (0, 1));
        assert_eq!(used(&shares, "pod_handshakes"), (0, 0));
    }

    #[tokio::test]
    async fn one_that_goes_while_it_waits_leaves_nothing_behind() {
        let shares = shares();
        let mut held = Vec::new();
        for _ in 0..128 {
            held.push(shares.handshake(1, ATTACKER).await.expect("its share"));
        }
        let gone = timeout(Duration::from_millis(20), shares.handshake(1, ATTACKER)).await;
        assert!(gone.is_err(), "it waited");
        assert_eq!(lock(&shares.handshakes.queue).count_waiting(), 0);
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

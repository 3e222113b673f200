//! Connections that the kernel holds while the agent connects to their destinations.
//!
//! ```text
//! SYN held ──> an entry, and a task that connects ──> SYN delivered ──> the listener accepts ──> the task has both ends
//!    │ again: the entry is found                        │ again: delivered again
//!    └ the application closes, or gives up ──> the entry is removed, which ends the task
//! ```
//! An entry is what its task waits on: removing the entry cancels the task, wherever it is. The kernel keeps nothing of a held
//! connection but its socket, so nothing is lost when an agent ends: the application's kernel sends the SYN again.

use std::{
    collections::{HashMap, VecDeque},
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use tacit_abi::{Told, limits, tcp_port};
use tacit_core::refusal::ConnectEnd;
use tacit_kernel::{
    held::{HeldConnect, HeldEnds},
    inject::{Injector, Probe, Syn, Unreachable},
    socket::{self, AppStream, peer},
};
use tacit_tunnel::relay::News;
use tokio::sync::{Notify, oneshot};

use crate::enrol::Pod;

/// Connections of one pod that are opened at a time. The kernel side captures no more at a time, because a held connection
/// stays in its table of pending ones: `connect()` then fails with ENOBUFS. This bound holds also where ends of connections
/// were not handed over. Further SYNs are not answered, as with a full backlog, and the application's kernel sends them again.
pub const OPENINGS_MAX: usize = limits::CAPTURED_PER_POD as usize;
/// SYNs of one pod that this agent does not serve yet. The oldest make room, and are sent again.
const PARKED_PER_POD: usize = 64;

/// The connections of one pod that are being opened.
#[derive(Debug)]
pub struct PodOpenings {
    /// The pod.
    pub pod: Arc<Pod>,
    injector: Injector,
    /// The listener for captured connections. It is closed when its own task ends.
    listener: Weak<TcpListener>,
    table: Mutex<Table>,
    /// Notified when the table becomes empty.
    emptied: Notify,
}

/// Result of taking in a held SYN.
#[derive(Debug)]
pub enum Hold {
    /// It opens a connection.
    New(ToOpen),
    /// It repeats one that is being opened, or comes after the end of the pod.
    Known,
    /// It is not answered, because the pod opens too many.
    Full,
}

/// A connection to open.
#[derive(Debug)]
pub struct ToOpen {
    /// Its ends in the pod.
    pub ends: HeldEnds,
    /// Distinguishes connections with the same ends.
    pub id: u64,
    /// Receives the application's connection; an error if the connection is no longer wanted.
    pub accepted: oneshot::Receiver<TcpStream>,
}

impl PodOpenings {
    /// No openings of `pod`, whose held connections `injector` answers and `listener` accepts.
    #[must_use]
    pub fn new(pod: Arc<Pod>, injector: Injector, listener: &Arc<TcpListener>) -> Self {
        let listener = Arc::downgrade(listener);
        Self { pod, injector, listener, table: Mutex::default(), emptied: Notify::new() }
    }

    /// Accepts a connection that is there already. The kernel shakes hands on loopback while a SYN is delivered, so this finds the
    /// delivered one, unless others came first.
    #[must_use]
    pub fn accept_now(&self) -> Option<(TcpStream, SocketAddr)> {
        // The listener's own task sees an error too, and logs it.
        socket::accept(&*self.listener.upgrade()?).ok()
    }

    /// Returns true if a connection with these ends is being opened.
    #[must_use]
    pub fn has(&self, ends: &HeldEnds) -> bool {
        self.table().openings.contains_key(ends)
    }

    /// Takes in a held SYN of which this agent is the target.
    pub fn hold(&self, syn: Syn) -> Hold {
        let (hold, again) = self.table().hold(syn);
        if let Some(again) = again {
            self.log_failure(self.injector.deliver(&again));
        }
        hold
    }

    /// Returns true for a target on which this agent accepts the pod's connections. Others are those of an agent that this one
    /// has taken over from.
    #[must_use]
    pub fn is_own_target(&self, ends: &HeldEnds) -> bool {
        ends.target.port() == self.pod.capture_port() || is_spread(ends)
    }

    /// Lets the other agent accept a connection that it has no opening for: it connects to the destination then.
    pub fn pass_foreign(&self, syn: &Syn) {
        self.log_failure(self.injector.deliver(syn));
    }

    /// Has the kernel of the agent's end answer a probe of an application.
    pub fn answer_probe(&self, probe: &Probe) {
        self.log_failure(self.injector.deliver_probe(probe));
    }

    /// Reports the state of the peer to the kernel of the application at `ends`. `app` is the agent's end of the connection.
    pub fn tell(&self, ends: &HeldEnds, app: &AppStream, news: News) {
        let told = match news {
            News::Silent(limit) => Told::Silent(u32::try_from(limit.as_millis()).unwrap_or(u32::MAX)),
            News::Alive => Told::Alive,
        };
        self.log_failure(peer::numbers(app).and_then(|numbers| self.injector.tell(ends, numbers, told)));
    }

    /// Refuses a connection that no opening is for.
    pub fn refuse_unknown(&self, syn: &Syn) {
        self.log_failure(self.injector.refuse(syn));
    }

    /// Delivers the SYN of an opening, whose destination has accepted. Returns false if the connection is no longer wanted.
    pub fn deliver(&self, ends: &HeldEnds, id: u64) -> bool {
        let Some(syn) = self.table().deliver(ends, id) else { return false };
        self.log_failure(self.injector.deliver(&syn));
        true
    }

    /// Ends an opening whose destination has not accepted, and answers the SYN with `end`.
    pub fn refuse(&self, ends: &HeldEnds, id: u64, end: ConnectEnd) {
        let Some(opening) = self.remove_if(ends, |opening| opening.id == id) else { return };
        let answered = match end {
            ConnectEnd::Refused => self.injector.refuse(&opening.syn),
            ConnectEnd::NetworkUnreachable => self.injector.unreachable(&opening.syn, Unreachable::Network),
            ConnectEnd::HostUnreachable => self.injector.unreachable(&opening.syn, Unreachable::Host),
            ConnectEnd::Unanswered => Ok(()),
        };
        self.log_failure(answered);
    }

    /// Gives an accepted connection to its opening. Returns it if there is none.
    pub fn join(&self, ends: &HeldEnds, connection: TcpStream) -> Result<(), TcpStream> {
        match self.remove_if(ends, |_| true) {
            Some(opening) => opening.accepted.send(connection),
            None => Err(connection),
        }
    }

    /// Cancels the opening of a connection that its application has closed.
    pub fn cancel(&self, ends: &HeldEnds) {
        drop(self.remove_if(ends, |_| true));
    }

    /// Forgets an opening that is given up.
    pub fn forget(&self, ends: &HeldEnds, id: u64) {
        drop(self.remove_if(ends, |opening| opening.id == id));
    }

    /// Cancels all openings, and lets no other begin.
    pub fn close(&self) {
        let mut table = self.table();
        table.is_closed = true;
        let openings = std::mem::take(&mut table.openings);
        drop(table);
        drop(openings);
        self.emptied.notify_waiters();
    }

    /// Cancels the openings of spread connections. The kernel gives those to the agent that takes over, which opens them anew.
    pub fn cancel_spread(&self) {
        let mut table = self.table();
        table.openings.retain(|ends, _| !is_spread(ends));
        let is_empty = table.openings.is_empty();
        drop(table);
        if is_empty {
            self.emptied.notify_waiters();
        }
    }

    /// Returns the number of connections that are being opened.
    #[must_use]
    pub fn count(&self) -> usize {
        self.table().openings.len()
    }

    /// Waits until nothing is being opened.
    pub async fn until_empty(&self) {
        loop {
            let emptied = self.emptied.notified();
            tokio::pin!(emptied);
            emptied.as_mut().enable();
            if self.count() == 0 {
                return;
            }
            emptied.await;
        }
    }

    fn remove_if(&self, ends: &HeldEnds, is: impl Fn(&Opening) -> bool) -> Option<Opening> {
        let mut table = self.table();
        let removed = table.remove_if(ends, is)?;
        if table.openings.is_empty() {
            self.emptied.notify_waiters();
        }
        Some(removed)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A packet that is not sent costs a retransmission of the SYN.
    fn log_failure(&self, sent: io::Result<()>) {
        if let Err(error) = sent {
            tracing::debug!(pod = %self.pod.workload.name, %error, "a held connection is not answered");
        }
    }
}

/// The openings of one pod. Pure.
#[derive(Debug, Default)]
struct Table {
    openings: HashMap<HeldEnds, Opening>,
    /// Number of openings so far, which distinguishes them.
    started: u64,
    /// No opening begins any more.
    is_closed: bool,
}

#[derive(Debug)]
struct Opening {
    id: u64,
    /// As it was sent last.
    syn: Syn,
    is_delivered: bool,
    accepted: oneshot::Sender<TcpStream>,
}

impl Table {
    /// Takes in a SYN for this agent. Returns also a SYN that was lost on its way to the listener, and is delivered again.
    fn hold(&mut self, syn: Syn) -> (Hold, Option<Syn>) {
        let ends = syn.ends();
        if let Some(known) = self.openings.get_mut(&ends)
            && known.syn.sequence() == syn.sequence()
        {
            known.syn = syn;
            return (Hold::Known, known.is_delivered.then(|| known.syn.clone()));
        }
        if self.is_closed {
            return (Hold::Known, None);
        }
        if self.openings.len() >= OPENINGS_MAX {
            return (Hold::Full, None);
        }
        self.started += 1;
        let (id, (accept, accepted)) = (self.started, oneshot::channel());
        // One that is replaced was closed by its application.
        self.openings.insert(ends, Opening { id, syn, is_delivered: false, accepted: accept });
        (Hold::New(ToOpen { ends, id, accepted }), None)
    }

    /// Returns the SYN to deliver, if it is still wanted.
    fn deliver(&mut self, ends: &HeldEnds, id: u64) -> Option<Syn> {
        let opening = self.openings.get_mut(ends).filter(|opening| opening.id == id)?;
        opening.is_delivered = true;
        Some(opening.syn.clone())
    }

    fn remove_if(&mut self, ends: &HeldEnds, is: impl Fn(&Opening) -> bool) -> Option<Opening> {
        if self.openings.get(ends).is_some_and(is) { self.openings.remove(ends) } else { None }
    }
}

/// The openings of all pods, by slot.
#[derive(Debug, Default)]
pub struct Openings(Mutex<Pods>);

#[derive(Debug, Default)]
struct Pods {
    by_slot: HashMap<u32, Arc<PodOpenings>>,
    /// SYNs of pods that are not served yet, by slot: the programs of an agent run before it has looked at all pods.
    parked: HashMap<u32, VecDeque<HeldConnect>>,
}

impl Openings {
    /// Serves the held connections of a pod from now on. Returns those that were held before.
    pub fn add(&self, openings: &Arc<PodOpenings>) -> Vec<HeldConnect> {
        let mut pods = self.lock();
        pods.by_slot.insert(openings.pod.slot(), Arc::clone(openings));
        let mut parked = pods.parked.remove(&openings.pod.slot()).unwrap_or_default();
        // Another pod may have had the slot before.
        parked.retain(|held| held.netns_cookie == openings.pod.netns.cookie());
        parked.into()
    }

    /// No longer serves a pod, and cancels what is being opened. Returns true if the pod was served by these openings.
    pub fn remove(&self, openings: &Arc<PodOpenings>) -> bool {
        let mut pods = self.lock();
        let current = pods.by_slot.get(&openings.pod.slot());
        let is_current = current.is_some_and(|current| Arc::ptr_eq(current, openings));
        if is_current {
            pods.by_slot.remove(&openings.pod.slot());
        }
        drop(pods);
        openings.close();
        is_current
    }

    /// Returns the openings of the pod with this slot and network namespace.
    #[must_use]
    pub fn get(&self, slot: u32, netns_cookie: u64) -> Option<Arc<PodOpenings>> {
        let found = self.lock().by_slot.get(&slot).map(Arc::clone)?;
        (found.pod.netns.cookie() == netns_cookie).then_some(found)
    }

    /// Returns the openings of the pod that a held connection is of. Keeps the connection if its pod is not served yet.
    pub fn of(&self, held: HeldConnect) -> Option<(Arc<PodOpenings>, HeldConnect)> {
        let mut pods = self.lock();
        if let Some(openings) = pods.by_slot.get(&held.slot) {
            // Another pod may have the slot by now.
            let is_same = openings.pod.netns.cookie() == held.netns_cookie;
            return is_same.then(|| (Arc::clone(openings), held));
        }
        let parked = pods.parked.entry(held.slot).or_default();
        if !parked.iter().any(|other| is_same_syn(other, &held)) {
            if parked.len() >= PARKED_PER_POD {
                parked.pop_front();
            }
            parked.push_back(held);
        }
        None
    }

    /// Cancels the opening of a connection that has ended, of the pod with this slot and network namespace.
    pub fn cancel(&self, (slot, netns_cookie): (u32, u64), ends: &HeldEnds) {
        let mut pods = self.lock();
        let Some(openings) = pods.by_slot.get(&slot).map(Arc::clone) else {
            if let Some(parked) = pods.parked.get_mut(&slot) {
                parked.retain(|held| held.netns_cookie != netns_cookie || held.syn.ends() != *ends);
            }
            return;
        };
        drop(pods);
        if openings.pod.netns.cookie() == netns_cookie {
            openings.cancel(ends);
        }
    }

    /// Returns the number of connections that are being opened.
    #[must_use]
    pub fn count(&self) -> usize {
        let pods: Vec<_> = self.lock().by_slot.values().cloned().collect();
        pods.iter().map(|openings| openings.count()).sum()
    }

    fn lock(&self) -> MutexGuard<'_, Pods> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns true for a connection that is spread over ports of `::1`: the kernel gives it to the agent that serves the pod now.
fn is_spread(ends: &HeldEnds) -> bool {
    ends.target.is_ipv6() && !tcp_port::is_reserved(ends.target.port())
}

fn is_same_syn(one: &HeldConnect, other: &HeldConnect) -> bool {
    one.netns_cookie == other.netns_cookie
        && one.syn.ends() == other.syn.ends()
        && one.syn.sequence() == other.syn.sequence()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A SYN from `port` of the pod's loopback, with this sequence number.
    fn syn(port: u16, sequence: u32) -> Syn {
        let mut packet = [0; 40];
        packet[0] = 0x45;
        packet[9] = 6;
        packet[12..16].copy_from_slice(&[127, 0, 0, 1]);
        packet[16..20].copy_from_slice(&[127, 100, 1, 2]);
        packet[20..22].copy_from_slice(&port.to_be_bytes());
        packet[22..24].copy_from_slice(&tcp_port::CAPTURE.to_be_bytes());
        packet[24..28].copy_from_slice(&sequence.to_be_bytes());
        packet[32] = 0x50;
        packet[33] = 2;
        Syn::parse(&packet).expect("a SYN")
    }

    fn begin(table: &mut Table, syn: Syn) -> ToOpen {
        match table.hold(syn) {
            (Hold::New(to_open), None) => to_open,
            other => panic!("{other:?}"),
        }
    }

    fn is_cancelled(to_open: &mut ToOpen) -> bool {
        matches!(to_open.accepted.try_recv(), Err(oneshot::error::TryRecvError::Closed))
    }

    #[test]
    fn a_repeated_syn_opens_nothing_and_is_delivered_again_if_it_was() {
        let mut table = Table::default();
        let mut opening = begin(&mut table, syn(1, 7));
        assert!(matches!(table.hold(syn(1, 7)), (Hold::Known, None)));
        assert_eq!(table.deliver(&opening.ends, opening.id), Some(syn(1, 7)));
        assert!(matches!(table.hold(syn(1, 7)), (Hold::Known, Some(_))));
        assert!(!is_cancelled(&mut opening));
    }

    #[test]
    fn a_new_connection_from_the_same_port_replaces_one_that_was_closed() {
        let mut table = Table::default();
        let mut first = begin(&mut table, syn(1, 7));
        let mut second = begin(&mut table, syn(1, 8));
        assert!(is_cancelled(&mut first) && !is_cancelled(&mut second));
        assert_eq!(table.deliver(&first.ends, first.id), None, "no longer wanted");
        assert!(table.remove_if(&first.ends, |opening| opening.id == first.id).is_none());
        assert!(table.remove_if(&second.ends, |opening| opening.id == second.id).is_some());
        assert!(is_cancelled(&mut second));
    }

    #[test]
    fn a_pod_opens_a_bounded_number_at_a_time() {
        let mut table = Table::default();
        let mut open: Vec<_> = (0..OPENINGS_MAX)
            .map(|port| begin(&mut table, syn(u16::try_from(port).expect("small"), 7)))
            .collect();
        assert!(matches!(table.hold(syn(u16::MAX, 7)), (Hold::Full, None)));
        assert!(matches!(table.hold(syn(0, 7)), (Hold::Known, None)), "one of them is still known");
        let ended = open.pop().expect("one").ends;
        assert!(table.remove_if(&ended, |_| true).is_some());
        begin(&mut table, syn(u16::MAX, 7));
    }
}

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
    net::TcpStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tacit_abi::tcp_port;
use tacit_core::refusal::ConnectEnd;
use tacit_kernel::{
    held::{HeldConnect, HeldEnds},
    inject::{Injector, Syn, Unreachable},
};
use tokio::sync::{Notify, oneshot};

use crate::enrol::Pod;

/// Connections of one pod that are opened at a time: as many as its listener would accept. Further SYNs are not answered, as
/// with a full backlog, and the application's kernel sends them again.
pub const OPENINGS_MAX: usize = 4096;
/// SYNs of pods that this agent does not serve yet, over all pods. The oldest make room, and are sent again.
const PARKED_MAX: usize = 1024;

/// The connections of one pod that are being opened.
#[derive(Debug)]
pub struct PodOpenings {
    /// The pod.
    pub pod: Arc<Pod>,
    injector: Injector,
    table: Mutex<Table>,
    /// Notified when the table becomes empty.
    emptied: Notify,
}

#[derive(Debug, Default)]
struct Table {
    openings: HashMap<HeldEnds, Opening>,
    /// Number of openings so far, which tells them apart.
    count: u64,
}

#[derive(Debug)]
struct Opening {
    id: u64,
    /// As it was sent last.
    syn: Syn,
    is_delivered: bool,
    accepted: oneshot::Sender<TcpStream>,
}

/// A connection to open.
#[derive(Debug)]
pub struct ToOpen {
    /// Its ends in the pod.
    pub ends: HeldEnds,
    /// Tells it from others with the same ends.
    pub id: u64,
    /// Receives the application's connection; an error if the connection is no longer wanted.
    pub accepted: oneshot::Receiver<TcpStream>,
}

impl PodOpenings {
    /// No openings of `pod`, whose held connections `injector` answers.
    #[must_use]
    pub fn new(pod: Arc<Pod>, injector: Injector) -> Self {
        Self { pod, injector, table: Mutex::default(), emptied: Notify::new() }
    }

    /// Takes in a held SYN. Returns the connection to open if it is a new one.
    pub fn hold(&self, syn: Syn) -> Option<ToOpen> {
        let ends = syn.ends();
        if !self.is_own_target(&ends) {
            // The listener of another agent, which takes over or is taken over: that agent connects when it accepts.
            self.log_failure(self.injector.deliver(&syn));
            return None;
        }
        let mut table = self.table();
        if let Some(known) = table.openings.get_mut(&ends)
            && known.syn.sequence() == syn.sequence()
        {
            known.syn = syn;
            if known.is_delivered {
                let again = known.syn.clone();
                drop(table);
                self.log_failure(self.injector.deliver(&again));
            }
            return None;
        }
        if table.openings.len() >= OPENINGS_MAX {
            return None;
        }
        table.count += 1;
        let (id, (accept, accepted)) = (table.count, oneshot::channel());
        // One that is replaced was closed by its application.
        table.openings.insert(ends, Opening { id, syn, is_delivered: false, accepted: accept });
        Some(ToOpen { ends, id, accepted })
    }

    /// Returns true for a target on which this agent accepts the pod's connections.
    fn is_own_target(&self, ends: &HeldEnds) -> bool {
        let port = ends.target.port();
        port == self.pod.capture_port || (ends.target.is_ipv6() && !tcp_port::is_reserved(port))
    }

    /// Delivers the SYN of an opening, whose destination has accepted. Returns false if the connection is no longer wanted.
    pub fn deliver(&self, ends: &HeldEnds, id: u64) -> bool {
        let syn = {
            let mut table = self.table();
            let Some(opening) = table.openings.get_mut(ends).filter(|opening| opening.id == id) else {
                return false;
            };
            opening.is_delivered = true;
            opening.syn.clone()
        };
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

    /// Cancels all openings.
    pub fn cancel_all(&self) {
        let openings = std::mem::take(&mut self.table().openings);
        drop(openings);
        self.emptied.notify_waiters();
    }

    /// Returns true if nothing is being opened.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table().openings.is_empty()
    }

    /// Returns the number of connections that are being opened.
    fn count(&self) -> usize {
        self.table().openings.len()
    }

    /// Waits until nothing is being opened.
    pub async fn until_empty(&self) {
        loop {
            let emptied = self.emptied.notified();
            tokio::pin!(emptied);
            emptied.as_mut().enable();
            if self.is_empty() {
                return;
            }
            emptied.await;
        }
    }

    fn remove_if(&self, ends: &HeldEnds, is: impl Fn(&Opening) -> bool) -> Option<Opening> {
        let mut table = self.table();
        if !table.openings.get(ends).is_some_and(is) {
            return None;
        }
        let removed = table.openings.remove(ends);
        if table.openings.is_empty() {
            self.emptied.notify_waiters();
        }
        removed
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

/// The openings of all pods, by slot.
#[derive(Debug, Default)]
pub struct Openings(Mutex<Pods>);

#[derive(Debug, Default)]
struct Pods {
    by_slot: HashMap<u32, Arc<PodOpenings>>,
    /// SYNs of pods that are not served yet: the programs of an agent run before it has looked at all pods.
    parked: VecDeque<HeldConnect>,
}

impl Openings {
    /// Serves the held connections of a pod from now on. Returns those that were held before.
    pub fn add(&self, openings: &Arc<PodOpenings>) -> Vec<HeldConnect> {
        let mut pods = self.lock();
        pods.by_slot.insert(openings.pod.slot, Arc::clone(openings));
        let (own, others) = std::mem::take(&mut pods.parked).into_iter().partition(|held| held.slot == openings.pod.slot);
        pods.parked = others;
        Vec::from(own)
    }

    /// No longer serves a pod, and cancels what is being opened.
    pub fn remove(&self, openings: &Arc<PodOpenings>) {
        let mut pods = self.lock();
        if pods.by_slot.get(&openings.pod.slot).is_some_and(|current| Arc::ptr_eq(current, openings)) {
            pods.by_slot.remove(&openings.pod.slot);
        }
        drop(pods);
        openings.cancel_all();
    }

    /// Returns the openings of the pod that a held connection is of. Keeps the connection if its pod is not served yet.
    pub fn of(&self, held: HeldConnect) -> Option<(Arc<PodOpenings>, HeldConnect)> {
        let mut pods = self.lock();
        if let Some(openings) = pods.by_slot.get(&held.slot) {
            // Another pod may have the slot by now.
            let is_same = openings.pod.netns.cookie() == held.netns_cookie;
            return is_same.then(|| (Arc::clone(openings), held));
        }
        if pods.parked.len() >= PARKED_MAX {
            pods.parked.pop_front();
        }
        let is_new = !pods.parked.iter().any(|parked| is_same_syn(parked, &held));
        if is_new {
            pods.parked.push_back(held);
        }
        None
    }

    /// Cancels the opening of a connection that has ended.
    pub fn cancel(&self, slot: u32, ends: &HeldEnds) {
        let mut pods = self.lock();
        let Some(openings) = pods.by_slot.get(&slot).map(Arc::clone) else {
            pods.parked.retain(|parked| parked.slot != slot || parked.syn.ends() != *ends);
            return;
        };
        drop(pods);
        openings.cancel(ends);
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

fn is_same_syn(one: &HeldConnect, other: &HeldConnect) -> bool {
    one.netns_cookie == other.netns_cookie
        && one.syn.ends() == other.syn.ends()
        && one.syn.sequence() == other.syn.sequence()
}

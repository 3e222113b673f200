//! The watches of live flows whose peer is on another node, by the ends of the application's connection.
//!
//! ```text
//! probe of an application, held by the kernel side ─ its flow's watch ─ the relay asks the peer ─ answered: deliver the probe
//! every second                                     ─ all watches      ─ the relays of flows that have sent look at the peer
//! ```
//! A probe of any other connection is delivered at once: the peer is on this node, or another agent relays the flow.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tacit_kernel::{held::HeldEnds, inject::Probe, socket::AppStream};
use tacit_tunnel::relay::{News, Watch, Watching};
use tokio::time::interval;

use crate::proxy::openings::PodOpenings;

/// Time between two looks at flows that have sent. With that of two retransmissions it bounds the time until a stall is noticed.
const LOOK: Duration = Duration::from_millis(500);
/// Parts of the table, each with a lock of its own. A power of two.
const PARTS: usize = 16;

/// A connection of an application: the cookie of its network namespace, and its ends.
type Key = (u64, HeldEnds);

/// A report of a peer's state to the kernel of the application at the other end of a connection.
type Tell = Box<dyn Fn(&AppStream, News) + Send + Sync>;

/// All watches.
#[derive(Default)]
pub struct Watches {
    parts: [Mutex<HashMap<Key, Arc<Watch>>>; PARTS],
}

/// The watch of a flow, which others find as long as this lives.
pub struct Watched {
    all: Arc<Watches>,
    /// `None` for a connection that has ended before its ends were known.
    key: Option<Key>,
    watch: Arc<Watch>,
    silence_max: Duration,
    tell: Tell,
}

impl Watched {
    /// Returns the watch for the relay.
    pub fn watching(&self) -> Watching<'_> {
        Watching { watch: &self.watch, silence_max: self.silence_max, tell: &*self.tell }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let mut part = self.all.part(&key);
        if part.get(&key).is_some_and(|watch| Arc::ptr_eq(watch, &self.watch)) {
            part.remove(&key);
        }
    }
}

impl Watches {
    /// Adds a watch for the flow of the application's connection with these ends in this network namespace. The flow ends when its
    /// peer is silent for `silence_max`.
    pub fn add(
        self: &Arc<Self>,
        netns_cookie: u64,
        ends: Option<HeldEnds>,
        silence_max: Duration,
        tell: impl Fn(HeldEnds, &AppStream, News) + Send + Sync + 'static,
    ) -> Watched {
        let key = ends.map(|ends| (netns_cookie, ends));
        let tell: Tell = Box::new(move |app, news| {
            if let Some((_, ends)) = key {
                tell(ends, app, news);
            }
        });
        let watch = Arc::new(Watch::default());
        if let Some(key) = key {
            self.part(&key).insert(key, watch.clone());
        }
        Watched { all: self.clone(), key, watch, silence_max, tell }
    }

    /// Answers a probe of an application of this pod as soon as the peer's kernel has answered one.
    pub fn probed(&self, openings: &Arc<PodOpenings>, probe: Probe) {
        let key = (openings.pod.netns.cookie(), probe.ends());
        let watch = self.part(&key).get(&key).cloned();
        match watch {
            Some(watch) => {
                let openings = openings.clone();
                watch.ask(Box::new(move || openings.answer_probe(&probe)));
            }
            None => openings.answer_probe(&probe),
        }
    }

    /// Has flows that have sent look at their peers, for ever.
    pub async fn look(&self) {
        let mut tick = interval(LOOK);
        loop {
            tick.tick().await;
            for part in &self.parts {
                lock(part).values().for_each(|watch| watch.look());
            }
        }
    }

    fn part(&self, (_, ends): &Key) -> MutexGuard<'_, HashMap<Key, Arc<Watch>>> {
        // The application's port tells the clients of a pod apart, and the agent's port the clients of a server.
        let part = usize::from(ends.client.port()) ^ usize::from(ends.target.port());
        lock(&self.parts[part % PARTS])
    }
}

fn lock<T>(part: &Mutex<T>) -> MutexGuard<'_, T> {
    part.lock().unwrap_or_else(PoisonError::into_inner)
}

//! An agent that serves, and its end: it hands over if a successor stands by, drains, and removes its entry from the
//! maps of the kernel side.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tacit_kernel::{Kernel, KernelError};

use crate::{
    app::{
        admin_servers::AdminServers,
        attachment::Attachment,
        state::{Event, State},
        succession::{self, Ending, await_successor, hand_over},
        tasks::Tasks,
    },
    proxy::{Proxy, drain::Drained},
};

/// An agent that serves.
pub(super) struct Agent {
    pub(super) kernel: Arc<Kernel>,
    pub(super) proxy: Arc<Proxy>,
    pub(super) state: State,
    pub(super) servers: AdminServers,
    pub(super) tasks: Tasks,
    pub(super) pin_path: PathBuf,
    pub(super) drain_timeout: Duration,
    pub(super) attachment: Attachment,
}

impl Agent {
    /// Waits until the programs are not attached to the pods' cgroup any more, and another one is there to attach them to.
    pub(super) async fn must_attach_again(&self) {
        self.attachment.lost(&self.kernel, &self.state).await;
    }

    /// Waits until a task has failed that the agent cannot do without.
    pub(super) async fn has_failed(&self) {
        self.proxy.workers_failed().cancelled().await;
    }

    /// Serves on until another agent stands by, for at most `limit`.
    pub(super) async fn await_successor(&self, limit: Duration) {
        tracing::info!(?limit, "serving on until another agent stands by");
        tokio::select! {
            waited = await_successor(&self.pin_path, limit) => {
                if let Err(error) = waited {
                    tracing::error!(%error, "not waiting for another agent");
                }
            }
            // Nothing is served any more.
            () = self.must_attach_again() => {}
        }
    }

    /// Ends the agent in good order.
    pub(super) async fn shut_down(mut self) {
        let ending = hand_over(&self.kernel, &self.pin_path, async || self.tasks.settle().await);
        let ending = ending.await.unwrap_or_else(|error| {
            tracing::error!(%error, "ending as if no agent stood by");
            Ending::Alone(None)
        });
        // Matched by reference: the lock that `ending` holds is released last.
        match &ending {
            Ending::Alone(_) => {
                self.proxy.drain.alone.cancel();
                drain(&self.proxy, &self.state, self.drain_timeout, Duration::ZERO).await;
                self.tasks.stop().await;
                log_failure(self.kernel.maps.clear_heartbeat());
                self.tasks.enrolment_ended().await;
                self.servers.close().await;
            }
            Ending::TakenOver(_) => {
                self.tasks.stop_heart().await;
                // The next agent waits for the port of the metrics.
                self.servers.close().await;
                drain(&self.proxy, &self.state, self.drain_timeout, succession::LINGER).await;
                self.tasks.stop().await;
                log_failure(self.kernel.maps.remove_agent(self.kernel.cgroup));
            }
        }
    }
}

/// Lets flows end within `limit`, then resets the rest and closes the idle sessions.
async fn drain(proxy: &Proxy, state: &State, limit: Duration, linger: Duration) {
    tracing::info!(?limit, "draining: no new flows, open ones may finish");
    state.apply(Event::Drains);
    match proxy.drain.run(limit, linger).await {
        Drained::Finished => tracing::info!("drained"),
        Drained::Cut(tasks) => tracing::warn!(tasks, "drain deadline passed; the rest was reset"),
    }
    proxy.sessions.close_all();
}

fn log_failure(written: Result<(), KernelError>) {
    if let Err(error) = written {
        tracing::error!(%error, "the kernel takes this agent for alive until it is noticed otherwise");
    }
}

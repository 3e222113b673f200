//! The state of the agent: one watched value. Start-up, enrolment and shutdown change it; status and readiness show it.
//!
//! ```text
//! Starting ── StandsBy ──> StandingBy ── TakesOver ──> Starting ── Reconciled ──> Ready
//! Starting, Ready ── Detached ──> Detached, until this process starts again
//! every state ── Drains ──> Draining, the last one
//! ```

use tokio::sync::watch;

use crate::telemetry::status::AgentState;

/// Something that happens to the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// The start waits only for the end of another agent.
    StandsBy,
    /// This agent holds the pins and has a proxy.
    TakesOver,
    /// All pods have been looked at once.
    Reconciled,
    /// The programs are not attached to the pods' cgroup any more.
    Detached,
    /// No new flows from now on.
    Drains,
}

/// The watched state; a clone shares it.
#[derive(Debug, Clone)]
pub(super) struct State(watch::Sender<AgentState>);

impl Default for State {
    fn default() -> Self {
        Self(watch::Sender::new(AgentState::Starting))
    }
}

impl State {
    pub(super) fn current(&self) -> AgentState {
        *self.0.borrow()
    }

    pub(super) fn apply(&self, event: Event) {
        self.0.send_if_modified(|state| {
            let before = std::mem::replace(state, next(*state, event));
            before != *state
        });
    }
}

fn next(state: AgentState, event: Event) -> AgentState {
    match (state, event) {
        (_, Event::Drains) | (AgentState::Draining, _) => AgentState::Draining,
        (_, Event::Detached) => AgentState::Detached,
        (AgentState::Starting, Event::StandsBy) => AgentState::StandingBy,
        (AgentState::StandingBy, Event::TakesOver) => AgentState::Starting,
        (AgentState::Starting, Event::Reconciled) => AgentState::Ready,
        (same, _) => same,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_in_every_state_has_one_outcome() {
        use AgentState::{Detached, Draining, Ready, StandingBy, Starting};
        use Event::{self as E, Drains, Reconciled, StandsBy, TakesOver};
        let events = [StandsBy, TakesOver, Reconciled, E::Detached, Drains];
        for (state, outcomes) in [
            (Starting, [StandingBy, Starting, Ready, Detached, Draining]),
            (StandingBy, [StandingBy, Starting, StandingBy, Detached, Draining]),
            (Ready, [Ready, Ready, Ready, Detached, Draining]),
            (Detached, [Detached, Detached, Detached, Detached, Draining]),
            (Draining, [Draining; 5]),
        ] {
            assert_eq!(events.map(|event| next(state, event)), outcomes, "{state:?}");
        }
    }

    #[test]
    fn a_clone_shares_the_state() {
        let state = State::default();
        state.clone().apply(Event::Reconciled);
        assert_eq!(state.current(), AgentState::Ready);
    }
}

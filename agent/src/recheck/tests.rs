//! Tests of rechecks. Costs are counted in checks. The thread is not started: each test takes the turns itself.

use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    task::Waker,
};

use tacit_core::refusal::RefusalReason;

use super::*;

/// Flows of some pods, with the number of their checks.
#[derive(Default)]
struct Flows {
    rechecks: Arc<Rechecks>,
    checks: Arc<AtomicUsize>,
    /// True if checks deny.
    denies: Arc<AtomicBool>,
}

impl Flows {
    fn open(&self, pod: u64, depends: Depends) -> Revoked {
        self.open_decided(pod, depends, false)
    }

    /// `is_decided` if the last decision on the flow is that of the state of now.
    fn open_decided(&self, pod: u64, depends: Depends, is_decided: bool) -> Revoked {
        let (checks, denies) = (Arc::clone(&self.checks), Arc::clone(&self.denies));
        let is_decided = || is_decided;
        self.rechecks.revoked((pod, depends), is_decided, move || {
            checks.fetch_add(1, Relaxed);
            denies.load(Relaxed).then(|| Refusal::new(RefusalReason::PlaintextInStrict, "denied"))
        })
    }

    /// Takes all turns. Returns the number of checks.
    fn run(&self) -> usize {
        let before = self.checks.load(Relaxed);
        while !self.rechecks.lock().queue.is_empty() {
            self.rechecks.turn(TURN);
        }
        self.checks.load(Relaxed) - before
    }
}

/// Returns the refusal, if the flow was told.
fn told(flow: &mut Revoked) -> Option<Refusal> {
    match Pin::new(flow).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(refusal) => Some(refusal),
        Poll::Pending => None,
    }
}

#[test]
fn only_the_flows_are_checked_that_depend_on_the_change() {
    let flows = Flows::default();
    let open = |pod, depends| (0..10).map(|_| flows.open(pod, depends)).collect::<Vec<_>>();
    let (inbound, clear) = (open(1, Depends::OnPolicy), open(1, Depends::OnDirectory));
    let others = (open(2, Depends::OnPolicy), open(2, Depends::OnDirectory));
    assert_eq!((flows.checks.load(Relaxed), flows.run()), (40, 0), "once at the start");
    flows.rechecks.policy_changed(1);
    assert_eq!(flows.run(), 20, "all of the pod");
    flows.rechecks.directory_changed();
    assert_eq!(flows.run(), 20, "all plaintext");
    flows.rechecks.policy_changed(3);
    assert_eq!(flows.run(), 0);
    drop((inbound, clear, others));
    assert!(flows.rechecks.lock().lists.is_empty(), "nothing is left of flows that ended");
}

#[test]
fn a_denied_flow_is_told_and_others_do_not_notice() {
    let flows = Flows::default();
    let mut flow = flows.open(1, Depends::OnPolicy);
    flows.rechecks.policy_changed(1);
    flows.run();
    assert!(told(&mut flow).is_none());
    flows.denies.store(true, Relaxed);
    assert!(told(&mut flow).is_none(), "nothing has changed");
    flows.rechecks.policy_changed(1);
    flows.run();
    assert_eq!(told(&mut flow).map(|refusal| refusal.reason), Some(RefusalReason::PlaintextInStrict));
    let mut late = flows.open(1, Depends::OnDirectory);
    assert!(told(&mut late).is_some(), "asked at once: the change may have come before");
}

#[test]
fn a_flow_whose_last_decision_is_current_is_not_decided_on_again() {
    let flows = Flows::default();
    let mut flow = flows.open_decided(1, Depends::OnPolicy, true);
    assert_eq!(flows.checks.load(Relaxed), 0);
    flows.denies.store(true, Relaxed);
    flows.rechecks.policy_changed(1);
    assert_eq!(flows.run(), 1);
    assert!(told(&mut flow).is_some());
}

#[test]
fn pods_take_turns_and_changes_during_a_round_are_one_more_round() {
    let flows = Flows::default();
    let many: Vec<_> = (0..10 * BATCH).map(|_| flows.open(1, Depends::OnPolicy)).collect();
    let one = flows.open(2, Depends::OnPolicy);
    flows.rechecks.policy_changed(1);
    flows.rechecks.policy_changed(2);
    let before = flows.checks.load(Relaxed);
    let checks = || flows.checks.load(Relaxed) - before;
    flows.rechecks.turn(Duration::ZERO);
    assert_eq!(checks(), 1, "the time of a turn ends after any check");
    flows.rechecks.turn(Duration::ZERO);
    assert_eq!(checks(), 2, "the other pod's turn");
    while !flows.rechecks.lock().queue.is_empty() {
        flows.rechecks.turn(Duration::ZERO);
    }
    assert_eq!(checks(), 10 * BATCH + 1, "each flow once");
    flows.rechecks.policy_changed(1);
    flows.rechecks.policy_changed(2);
    flows.rechecks.turn(Duration::ZERO);
    for _ in 0..5 {
        flows.rechecks.policy_changed(1);
    }
    flows.run();
    assert_eq!(checks(), 2 * (10 * BATCH + 1) + 10 * BATCH, "one more round of the first pod");
    drop((many, one));
}

#[test]
fn a_change_after_the_last_batch_was_taken_is_one_more_round() {
    let flows = Flows::default();
    let few: Vec<_> = (0..5).map(|_| flows.open(1, Depends::OnPolicy)).collect();
    let before = flows.checks.load(Relaxed);
    let key = (1, Depends::OnPolicy);
    let take = || {
        let mut table = flows.rechecks.lock();
        assert_eq!(table.queue.pop_front(), Some(key));
        table.next_batch(key)
    };
    flows.rechecks.policy_changed(1);
    let (batch, has_more) = take();
    assert_eq!((batch.len(), has_more), (5, false));
    let second = batch[1].0;
    flows.rechecks.policy_changed(1);
    flows.rechecks.lock().end_turn(key, second, has_more);
    assert_eq!(flows.run(), 4 + 5, "the rest of the first round, and the second");
    // Flows that end between their batch and the end of the turn leave nothing.
    flows.rechecks.policy_changed(1);
    let (batch, has_more) = take();
    drop((few, batch));
    flows.rechecks.lock().end_turn(key, second, has_more);
    assert!(flows.rechecks.lock().lists.is_empty() && flows.rechecks.lock().queue.is_empty());
    assert_eq!(flows.checks.load(Relaxed) - before, 9);
}

#[tokio::test]
async fn the_thread_checks_until_it_is_closed() {
    let flows = Flows::default();
    let running = tokio::spawn(Arc::clone(&flows.rechecks).run());
    let flow = flows.open(1, Depends::OnPolicy);
    flows.denies.store(true, Relaxed);
    flows.rechecks.policy_changed(1);
    let told = tokio::time::timeout(Duration::from_secs(60), flow).await;
    assert!(told.is_ok(), "told before the deadline");
    flows.rechecks.close();
    assert!(running.await.expect("no panic").is_ok());
}

#[test]
fn a_change_of_trust_checks_tunnels_and_no_plaintext() {
    let flows = Flows::default();
    let open = |pod, depends| (0..10).map(|_| flows.open(pod, depends)).collect::<Vec<_>>();
    let mut tunnels = open(1, Depends::OnTrust);
    let (inbound, clear) = (open(2, Depends::OnPolicy), open(1, Depends::OnDirectory));
    flows.run();
    flows.rechecks.trust_changed();
    assert_eq!(flows.run(), 20, "outbound and inbound tunnels");
    flows.rechecks.policy_changed(1);
    assert_eq!(flows.run(), 10, "policy does not decide on an outbound tunnel");
    flows.denies.store(true, Relaxed);
    flows.rechecks.trust_changed();
    flows.run();
    assert!(tunnels.iter_mut().all(|flow| told(flow).is_some()));
    drop((inbound, clear));
}

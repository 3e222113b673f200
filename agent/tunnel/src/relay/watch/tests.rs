//! Tests of the questions to a peer, with the time as an argument.

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

fn seen(heard: Duration, repeats: u32) -> PeerState {
    PeerState { heard, is_asked: repeats > 0, repeats, round_trip: Duration::from_millis(1) }
}

/// Looks at a peer that was last heard at `heard`, until the inquiry ends. Returns the end, its time, and the number of probes.
fn run(
    inquiry: Inquiry,
    begin: Instant,
    heard: impl Fn(Duration) -> (Duration, u32),
) -> (Step, Duration, u32) {
    run_up_to(LIMIT, inquiry, begin, heard)
}

/// As [`run`], of a flow that ends after `limit`.
fn run_up_to(
    limit: Duration,
    mut inquiry: Inquiry,
    begin: Instant,
    heard: impl Fn(Duration) -> (Duration, u32),
) -> (Step, Duration, u32) {
    let (mut now, mut probes) = (begin + LOOK_FIRST, 0);
    loop {
        let (silence, repeats) = heard(now - begin);
        let after = match inquiry.next(now, &seen(silence, repeats), limit) {
            Step::Look(after) => after,
            Step::Ask(after) | Step::Stall(after) => {
                probes += 1;
                after
            }
            end => return (end, now - begin, probes),
        };
        assert!(after <= intervals(now - begin).0, "{after:?} after {:?}", now - begin);
        now += after;
    }
}

#[test]
fn a_peer_that_answers_is_noticed_at_once() {
    let now = Instant::now();
    let minute = Duration::from_secs(60);
    let (end, after, probes) =
        run(Inquiry::new(now), now, |passed| (passed.saturating_sub(Duration::from_millis(1)), 0));
    assert_eq!((end, probes), (Step::Answered, 0));
    assert!(after <= LOOK_FIRST, "{after:?}");
    let late = Duration::from_secs(2);
    let answers = |passed: Duration| if passed < late { (minute + passed, 0) } else { (passed - late, 0) };
    let (end, after, probes) = run(Inquiry::new(now), now, answers);
    assert_eq!((end, probes), (Step::Answered, 2));
    assert!(after <= late + LOOK_LAST, "{after:?}");
}

#[test]
fn a_peer_that_is_silent_and_owes_nothing_is_asked_for_a_while() {
    let now = Instant::now();
    let (end, after, _) = run(Inquiry::new(now), now, |passed| (Duration::from_secs(60) + passed, 0));
    assert_eq!(end, Step::GiveUp);
    assert!(after >= ASKED_MAX && after <= ASKED_MAX + LOOK_LAST, "{after:?}");
}

#[test]
fn a_peer_that_owes_an_acknowledgement_ends_the_flow_after_the_limit() {
    let now = Instant::now();
    let silent = |passed| (Duration::from_secs(1) + passed, 3);
    let (end, after, probes) = run(Inquiry::of_stalled(now), now, silent);
    assert_eq!(end, Step::Dead);
    assert!(after >= LIMIT + ENDED_BY && after <= LIMIT + ENDED_BY + 3 * LOOK_LAST, "{after:?}");
    assert!(probes > 20, "{probes}");
    let mut inquiry = Inquiry::new(now);
    assert_eq!(
        inquiry.next(now + LOOK_FIRST, &seen(Duration::from_secs(1), 2), LIMIT),
        Step::Stall(LOOK_FIRST * 2)
    );
    assert!(inquiry.is_stalled());
}

#[test]
fn a_peer_that_is_silent_for_long_is_asked_less_and_less() {
    let now = Instant::now();
    let limit = Duration::from_secs(900);
    let silent = |passed| (Duration::from_secs(1) + passed, 3);
    let (end, after, probes) = run_up_to(limit, Inquiry::of_stalled(now), now, silent);
    assert_eq!(end, Step::Dead);
    assert!(after <= limit + ENDED_BY + LOOK_STALLED_MAX, "{after:?}");
    assert!((100..200).contains(&probes), "{probes}");
    let late = Duration::from_secs(600);
    let answers = |passed: Duration| if passed < late { silent(passed) } else { (passed - late, 0) };
    let (end, after, _) = run_up_to(limit, Inquiry::of_stalled(now), now, answers);
    assert_eq!(end, Step::Answered);
    assert!(after <= late + LOOK_STALLED_MAX, "{after:?}");
}

#[test]
fn bytes_of_a_peer_that_was_silent_for_long_have_it_asked_at_once() {
    let (now, minute) = (Instant::now(), Duration::from_secs(60));
    let mut inquiry = Inquiry::of_stalled(now);
    inquiry.pause = LOOK_STALLED_MAX;
    let silent = |passed| seen(minute + passed, 3);
    assert_eq!(inquiry.woken(now + ASK_AGAIN / 2, &silent(ASK_AGAIN / 2)), Step::Look(LOOK_STALLED_MAX));
    assert_eq!(inquiry.woken(now + minute, &silent(minute)), Step::Ask(LOOK_FIRST));
    let answered = seen(Duration::ZERO, 3);
    assert_eq!(inquiry.woken(now + minute + LOOK_FIRST, &answered), Step::Answered);
}

#[test]
fn a_stall_needs_more_than_a_lost_packet() {
    for (repeats, millis, expected) in [(0, 5000, false), (1, 5000, false), (2, 599, false), (2, 600, true)] {
        assert_eq!(is_stalled(&seen(Duration::from_millis(millis), repeats)), expected, "{repeats} {millis}");
    }
}

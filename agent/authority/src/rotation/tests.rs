//! Tests of the rotation: the time of each step, and mutual trust of all certificates in use.

use super::*;

const WAITS: Waits = Waits { leaf: 100, slack: 10 };

fn rotation() -> Rotation {
    Rotation::adopt(true, "one".to_owned(), "ONE".to_owned(), None, WAITS, 0)
}

fn observed<'a>(rotation: Option<&'a Rotation>, fingerprint: &'a str) -> Observed<'a> {
    Observed { fingerprint, not_before: 0, not_after: 10_000, rotation, request: None }
}

fn begun(now: u64) -> Rotation {
    rotation().begin("TWO".to_owned(), "KEY".to_owned(), None, now)
}

#[test]
fn each_step_comes_at_its_time() {
    let (fresh, begun) = (rotation(), begun(5000));
    let promoted = begun.promote("two".to_owned(), WAITS, 5111);
    for (rotation, fingerprint, now, published, step) in [
        (None, "one", 0, true, Step::Adopt),
        (Some(&fresh), "other", 0, true, Step::Adopt),
        (Some(&fresh), "one", 0, true, Step::Keep),
        (Some(&fresh), "one", 4999, true, Step::Keep),
        (Some(&fresh), "one", 5000, true, Step::Begin),
        (Some(&begun), "one", 5000, true, Step::Keep),
        (Some(&begun), "one", 5110, true, Step::Keep),
        (Some(&begun), "one", 5111, false, Step::Keep),
        (Some(&begun), "one", 5111, true, Step::Promote),
        (Some(&begun), "one", 0, true, Step::Keep),
        // Past half of the old root's life, but only one rotation at a time.
        (Some(&promoted), "two", 5222, true, Step::Keep),
        (Some(&promoted), "two", 5223, true, Step::Forget),
    ] {
        assert_eq!(
            decide(&observed(rotation, fingerprint), WAITS, now, published),
            step,
            "{fingerprint} at {now}"
        );
    }
}

#[test]
fn a_request_is_followed_once_and_never_for_a_root_that_was_brought() {
    let own = rotation();
    let asked = |rotation: &Rotation, request| {
        let observed = Observed { request, ..observed(Some(rotation), "one") };
        decide(&observed, WAITS, 10, true)
    };
    assert_eq!(asked(&own, None), Step::Keep);
    assert_eq!(asked(&own, Some("now")), Step::Begin);
    let followed = Rotation { next: None, ..own.begin("TWO".to_owned(), "KEY".to_owned(), Some("now"), 10) };
    assert_eq!(asked(&followed, Some("now")), Step::Keep);
    assert_eq!(asked(&followed, Some("again")), Step::Begin);
    let brought = Rotation { own: false, ..own };
    assert_eq!(asked(&brought, Some("now")), Step::Keep);
    assert_eq!(decide(&observed(Some(&brought), "one"), WAITS, 9999, true), Step::Keep);
}

/// Certificates as (signer, delivered roots, time), issued every second by two replicas. One replica sees each change of the
/// store up to `slack` late. Any two certificates in use must trust each other.
#[test]
fn certificates_in_use_at_once_always_trust_each_other() {
    for late in [0, 1, WAITS.slack] {
        let mut stored = rotation();
        let mut history = vec![(0, stored.clone())];
        let mut leaves: Vec<(&str, String, u64)> = Vec::new();
        for now in 4900..5700 {
            let root = if stored.anchors == "ONE" { "one" } else { "two" };
            let changed = match decide(&observed(Some(&stored), root), WAITS, now, true) {
                Step::Begin if root == "one" => Some(stored.begin("TWO".into(), "KEY".into(), None, now)),
                Step::Promote => Some(stored.promote("two".to_owned(), WAITS, now)),
                Step::Forget => Some(stored.forget(now)),
                _ => None,
            };
            if let Some(changed) = changed {
                stored = changed;
                history.push((now, stored.clone()));
            }
            for delay in [0, late] {
                let seen = history.iter().rev().find(|(since, _)| since + delay <= now);
                let (_, seen) = seen.expect("the first is always seen");
                leaves.push((if seen.anchors == "ONE" { "ONE" } else { "TWO" }, seen.bundle(), now));
            }
            leaves.retain(|(.., issued)| issued + WAITS.leaf >= now);
            for (signer, ..) in &leaves {
                assert!(
                    leaves.iter().all(|(_, roots, _)| roots.contains(signer)),
                    "{signer} at {now}, late {late}"
                );
            }
        }
        assert_eq!((stored.anchors.as_str(), stored.retired.len()), ("TWO", 0));
    }
}

#[test]
fn a_root_that_somebody_replaced_is_used_only_when_everybody_trusts_it() {
    let adopted = Rotation::adopt(false, "two".to_owned(), "TWO".to_owned(), Some(&rotation()), WAITS, 1000);
    assert_eq!(adopted.signs_from, 1111);
    assert_eq!(adopted.bundle(), "TWO\nONE\n");
    assert_eq!(adopted.forget(1222).retired.len(), 1);
    assert_eq!(adopted.forget(1223).retired.len(), 0);
}

#[test]
fn waits_follow_the_life_of_a_leaf() {
    assert_eq!(Waits::new(Duration::from_secs(10)), Waits { leaf: 10, slack: 2 });
    assert_eq!(Waits::new(Duration::from_secs(86_400)), Waits { leaf: 86_400, slack: 600 });
}

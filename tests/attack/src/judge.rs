//! From what was seen to a verdict.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::{
    Family,
    catalogue::{Attack, Stopped},
    wire::Sighting,
};

/// What a step reports of which the system took everything.
pub(crate) const SENT: &str = "sent";

/// Beginning of what a step reports that the system refused.
const REFUSED: &str = "refused: ";

/// The result of one run of an attack.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outcome {
    /// The places where its marker was seen.
    pub(crate) seen: BTreeSet<Sighting>,
    /// The kernel lacks what the attack needs; its words.
    pub(crate) absent: Option<String>,
    /// The attacker's result.
    pub(crate) told: String,
    /// True if the application of the other end received the marker.
    pub(crate) delivered: bool,
    /// The only sighting that counts, of a marker that crosses other links where it should.
    pub(crate) only: Option<Sighting>,
    /// The attacker's side of an attack on a share. `told` and `delivered` are then the victim's.
    pub(crate) fill: Option<Fill>,
}

/// The attacker's side of an attack on a share.
#[derive(Debug, Clone)]
pub(crate) struct Fill {
    /// The result of the attacker's next use of the resource.
    pub(crate) next: String,
    /// The attacker's share, as it was when it was full.
    pub(crate) share: Share,
}

/// The state of the attacker's share before its next use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Share {
    /// Full: the figures of the agent.
    Full(String),
    /// Never full.
    Open,
    /// No agent shows it: there is none, or the kernel alone has it.
    Unseen,
}

/// The verdict on an attack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Held,
    Leaked,
    /// The attacker used up what the victim needed.
    Starved,
    NotProven,
    Absent,
}

impl Verdict {
    fn text(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Leaked => "LEAKED",
            Self::Starved => "STARVED",
            Self::NotProven => "NOT PROVEN",
            Self::Absent => "absent here",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Leaked => "leaked",
            Self::Starved => "starved",
            Self::NotProven => "not proven",
            Self::Absent => "absent here",
        }
    }
}

/// An attack with its verdict.
#[derive(Debug)]
pub(crate) struct Judged {
    name: &'static str,
    group: &'static str,
    family: Family,
    pub(crate) verdict: Verdict,
    detail: String,
    control: BTreeSet<Sighting>,
    protected: BTreeSet<Sighting>,
    /// Without Tacit, and with it.
    delivered: (bool, bool),
}

impl Judged {
    pub(crate) fn of(attack: &Attack, family: Family, without: &Outcome, with: &Outcome) -> Self {
        let (verdict, detail) = decide(attack, without, with);
        Self {
            name: attack.name,
            group: attack.group,
            family,
            verdict,
            detail,
            control: without.seen.clone(),
            protected: with.seen.clone(),
            delivered: (without.delivered, with.delivered),
        }
    }

    /// The attack ended with an error of the suite.
    pub(crate) fn not_run(attack: &Attack, family: Family, error: &anyhow::Error) -> Self {
        let nothing = Outcome::default();
        let mut judged = Self::of(attack, family, &nothing, &nothing);
        judged.verdict = Verdict::NotProven;
        judged.detail = format!("{error:#}");
        judged
    }

    pub(crate) fn line(&self) -> String {
        let detail = if self.detail.is_empty() { String::new() } else { format!("  {}", self.detail) };
        let verdict = self.verdict.text();
        format!("{:<10} {:<26} {:<7} {verdict:<11}{detail}", self.group, self.name, self.family.label())
    }

    fn value(&self) -> Value {
        let places = |seen: &BTreeSet<Sighting>| seen.iter().map(Sighting::text).collect::<Vec<_>>();
        json!({
            "attack": self.name,
            "group": self.group,
            "family": self.family.label(),
            "verdict": self.verdict.name(),
            "detail": self.detail,
            "control_seen_on": places(&self.control),
            "seen_on": places(&self.protected),
            "control_delivered": self.delivered.0,
            "delivered": self.delivered.1,
        })
    }
}

fn decide(attack: &Attack, without: &Outcome, with: &Outcome) -> (Verdict, String) {
    if let Some(why) = without.absent.as_ref().or(with.absent.as_ref()) {
        return (Verdict::Absent, why.clone());
    }
    match attack.stopped {
        Stopped::BeforeApplication if with.delivered => {
            return (Verdict::Leaked, format!("the application got it; attacker: {}", with.told));
        }
        Stopped::BeforeApplication | Stopped::Nowhere if !without.delivered => {
            return (Verdict::NotProven, format!("did not arrive without Tacit: {}", without.told));
        }
        Stopped::BeforeApplication => return (Verdict::Held, with.told.clone()),
        Stopped::Nowhere if !with.delivered || with.told != SENT => {
            return (Verdict::NotProven, format!("the flow did not arrive with Tacit: {}", with.told));
        }
        Stopped::Nowhere => return (Verdict::Held, with.told.clone()),
        Stopped::AtShare => return decide_share(without, with),
        Stopped::AtSocket | Stopped::OnLink => {}
    }
    let leaks: Vec<String> =
        with.seen.iter().filter(|place| is_leak(attack, place)).map(Sighting::text).collect();
    if !leaks.is_empty() {
        return (Verdict::Leaked, format!("seen {}; attacker: {}", leaks.join(", "), with.told));
    }
    // The control must show it where it counts: beyond the attacker's own link.
    if !without.seen.iter().any(|place| !matches!(place, Sighting::FromPod(_))) {
        return (Verdict::NotProven, format!("not seen without Tacit; attacker: {}", without.told));
    }
    if attack.must_arrive && !with.delivered {
        return (Verdict::NotProven, format!("the flow did not arrive through Tacit: {}", with.told));
    }
    (Verdict::Held, with.told.clone())
}

/// Decides on an attack on a share. The attacker's next use succeeds without Tacit and fails with it: that alone proves that
/// the share was full.
fn decide_share(without: &Outcome, with: &Outcome) -> (Verdict, String) {
    let arrived = |outcome: &Outcome| outcome.delivered && outcome.told == SENT;
    if !arrived(without) {
        return (Verdict::NotProven, format!("the victim failed without Tacit: {}", without.told));
    }
    let (Some(control), Some(fill)) = (&without.fill, &with.fill) else {
        return (Verdict::NotProven, "no attack took place".to_owned());
    };
    if control.next != SENT {
        return (Verdict::NotProven, format!("the attacker is refused without Tacit: {}", control.next));
    }
    if !fill.next.starts_with(REFUSED) {
        return (Verdict::NotProven, format!("no share was full, the attacker's next use: {}", fill.next));
    }
    let share = match &fill.share {
        Share::Full(figures) => format!("; {figures}"),
        Share::Open => {
            return (Verdict::NotProven, format!("the share was never full; attacker: {}", fill.next));
        }
        Share::Unseen => String::new(),
    };
    if !arrived(with) {
        return (Verdict::Starved, format!("victim: {}; attacker: {}{share}", with.told, fill.next));
    }
    (Verdict::Held, format!("victim: {}; attacker: {}{share}", with.told, fill.next))
}

/// Returns true if a sighting is a leak. The recorder on the attacker's link sees packets before the guard does, so a
/// packet that the guard stops there is no leak.
fn is_leak(attack: &Attack, place: &Sighting) -> bool {
    !(matches!(place, Sighting::FromPod(_)) && attack.stopped == Stopped::OnLink)
}

pub(crate) fn json(results: &[Judged]) -> String {
    format!("{:#}", Value::Array(results.iter().map(Judged::value).collect()))
}

pub(crate) fn summary(results: &[Judged]) -> String {
    let count = |verdict| results.iter().filter(|judged| judged.verdict == verdict).count();
    format!(
        "{} held, {} leaked, {} starved, {} not proven, {} absent here",
        count(Verdict::Held),
        count(Verdict::Leaked),
        count(Verdict::Starved),
        count(Verdict::NotProven),
        count(Verdict::Absent)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::{Attack, Driver};

    fn attack(stopped: Stopped) -> Attack {
        Attack {
            name: "x",
            group: "g",
            families: &[],
            driver: Driver::Step("udp"),
            stopped,
            must_arrive: false,
        }
    }

    fn seen(places: &[Sighting]) -> Outcome {
        Outcome { seen: places.iter().cloned().collect(), ..Outcome::default() }
    }

    #[test]
    fn a_verdict_needs_a_control_that_leaks() {
        let socket = attack(Stopped::AtSocket);
        let verdict = |without: &Outcome, with: &Outcome| decide(&socket, without, with).0;
        let (nothing, wire) = (seen(&[]), seen(&[Sighting::Wire]));
        assert_eq!(verdict(&wire, &nothing), Verdict::Held);
        assert_eq!(verdict(&wire, &wire), Verdict::Leaked);
        assert_eq!(verdict(&nothing, &nothing), Verdict::NotProven);
        assert_eq!(verdict(&nothing, &wire), Verdict::Leaked);
        let near = seen(&[Sighting::FromPod("pod2".to_owned())]);
        assert_eq!(verdict(&near, &nothing), Verdict::NotProven);
        assert_eq!(verdict(&wire, &near), Verdict::Leaked);
        let absent = Outcome { absent: Some("no such protocol".to_owned()), ..seen(&[]) };
        assert_eq!(verdict(&absent, &nothing), Verdict::Absent);
    }

    #[test]
    fn what_dies_on_the_attackers_link_has_not_left() {
        let link = attack(Stopped::OnLink);
        let (near, wire) = (seen(&[Sighting::FromPod("pod2".to_owned())]), seen(&[Sighting::Wire]));
        assert_eq!(decide(&link, &wire, &near).0, Verdict::Held);
        assert_eq!(decide(&link, &wire, &seen(&[Sighting::ToPod("pod3".to_owned())])).0, Verdict::Leaked);
    }

    #[test]
    fn of_an_attack_on_an_application_only_its_delivery_counts() {
        let inbound = attack(Stopped::BeforeApplication);
        let seen = seen(&[Sighting::Wire]);
        let delivered = Outcome { delivered: true, ..seen.clone() };
        assert_eq!(decide(&inbound, &delivered, &seen).0, Verdict::Held);
        assert_eq!(decide(&inbound, &delivered, &delivered).0, Verdict::Leaked);
        assert_eq!(decide(&inbound, &seen, &seen).0, Verdict::NotProven);
    }

    #[test]
    fn what_is_allowed_in_clear_must_arrive_as_without_tacit() {
        let allowed = attack(Stopped::Nowhere);
        let lost = seen(&[Sighting::Wire]);
        let sent = Outcome { delivered: true, told: "sent".to_owned(), ..lost.clone() };
        assert_eq!(decide(&allowed, &sent, &sent).0, Verdict::Held);
        assert_eq!(decide(&allowed, &sent, &lost).0, Verdict::NotProven);
        assert_eq!(decide(&allowed, &lost, &sent).0, Verdict::NotProven);
    }

    #[test]
    fn an_attack_on_a_share_needs_an_attacker_that_is_refused_and_a_victim_that_is_not() {
        let attack = attack(Stopped::AtShare);
        let run = |victim: &str, next: &str, share: Share| Outcome {
            told: victim.to_owned(),
            delivered: victim == SENT,
            fill: Some(Fill { next: next.to_owned(), share }),
            ..Outcome::default()
        };
        let full = || Share::Full("connections 3 of 3".to_owned());
        let control = run(SENT, SENT, Share::Unseen);
        let refused = "refused: no buffer space";
        let verdict = |without: &Outcome, with: &Outcome| decide(&attack, without, with).0;
        assert_eq!(verdict(&control, &run(SENT, refused, full())), Verdict::Held);
        assert_eq!(verdict(&control, &run(SENT, refused, Share::Unseen)), Verdict::Held);
        assert_eq!(verdict(&control, &run("refused: timed out", refused, full())), Verdict::Starved);
        let lost = Outcome { delivered: false, ..run(SENT, refused, full()) };
        assert_eq!(verdict(&control, &lost), Verdict::Starved);
        // The share was not full, or nothing was used up.
        assert_eq!(verdict(&control, &run(SENT, SENT, full())), Verdict::NotProven);
        assert_eq!(verdict(&control, &run(SENT, "", full())), Verdict::NotProven);
        assert_eq!(verdict(&control, &run(SENT, refused, Share::Open)), Verdict::NotProven);
        let nobody = Outcome { fill: None, ..run(SENT, refused, full()) };
        assert_eq!(verdict(&control, &nobody), Verdict::NotProven);
        // The control shows no difference.
        assert_eq!(
            verdict(&run(SENT, refused, Share::Unseen), &run(SENT, refused, full())),
            Verdict::NotProven
        );
        assert_eq!(
            verdict(&run(refused, SENT, Share::Unseen), &run(SENT, refused, full())),
            Verdict::NotProven
        );
    }

    #[test]
    fn a_flow_that_must_arrive_must() {
        let attack = Attack { must_arrive: true, ..attack(Stopped::AtSocket) };
        let (wire, nothing) = (seen(&[Sighting::Wire]), seen(&[]));
        assert_eq!(decide(&attack, &wire, &nothing).0, Verdict::NotProven);
        let arrived = Outcome { delivered: true, ..nothing };
        assert_eq!(decide(&attack, &wire, &arrived).0, Verdict::Held);
    }
}

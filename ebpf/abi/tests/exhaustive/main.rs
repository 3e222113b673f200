//! Exhaustive check of the kernel side's decisions against a specification that does not share their code.
//!
//! ```text
//! every pod x every kind of packet x every combination of facts --> decision
//!                                                               --> specification      both must agree
//! ```
//! The specification of each decision is a list of exceptions, one a line, in the words of the security model. All else is
//! refused. A new fact, flag or variant cannot stay unseen:
//!
//! - A new fact is a new method of a trait, which the tests implement. The tests enumerate all values of each fact.
//! - A new flag is part of `pod_flag::ALL` or `steer_flag::ALL`, whose subsets are enumerated.
//! - A new variant of an enumeration does not compile before `facts` lists it.
//!
//! Facts are enumerated as they are asked for. A fact that neither decision nor specification asks for cannot change the
//! outcome, so one run stands for all its values. `Facts::each` verifies that the runs cover all combinations.

mod arrival;
mod claims;
mod connect;
mod egress;
mod facts;
mod held;
mod inbound;
mod ingress;
mod packets;

use std::sync::atomic::{AtomicBool, Ordering};

use tacit_abi::{EXCEPTION_COUNTERS, Exception, ExceptionHook, Verdict};

/// One row of a specification: what is let through, and when.
struct Row<Case, Outcome> {
    text: &'static str,
    applies: fn(&Case) -> bool,
    outcome: fn(&Case) -> Outcome,
    /// True after the line decided on a case. A line without cases is dead.
    used: AtomicBool,
}

impl<Case, Outcome> Row<Case, Outcome> {
    const fn new(text: &'static str, applies: fn(&Case) -> bool, outcome: fn(&Case) -> Outcome) -> Self {
        Self { text, applies, outcome, used: AtomicBool::new(false) }
    }
}

/// Returns the outcome of the first line that applies.
fn first<Case, Outcome>(lines: &[Row<Case, Outcome>], case: &Case) -> Option<Outcome> {
    let line = lines.iter().find(|line| (line.applies)(case))?;
    line.used.store(true, Ordering::Relaxed);
    Some((line.outcome)(case))
}

/// Fails if a line never decided.
fn assert_no_dead_line<Case, Outcome>(lines: &[Row<Case, Outcome>]) {
    for line in lines {
        assert!(line.used.load(Ordering::Relaxed), "no case for {:?}", line.text);
    }
}

/// The exceptions by which verdicts let something pass. A verdict by an exception at a hook that the exception does not list has
/// no series in the metrics, and a listed hook without a verdict is dead.
struct Excepted([AtomicBool; EXCEPTION_COUNTERS]);

impl Excepted {
    const fn new() -> Self {
        Self([const { AtomicBool::new(false) }; EXCEPTION_COUNTERS])
    }

    fn note(&self, verdict: Verdict, hook: ExceptionHook) {
        if let Verdict::Except(exception) | Verdict::Ask(exception) = verdict {
            self.0[exception.counter(hook) as usize].store(true, Ordering::Relaxed);
        }
    }

    /// Fails unless the exceptions at these hooks are those that list them.
    fn assert_all_at(&self, hooks: &[ExceptionHook]) {
        for (exception, hook) in
            Exception::ALL.iter().flat_map(|all| hooks.iter().map(move |hook| (*all, *hook)))
        {
            let is_used = self.0[exception.counter(hook) as usize].load(Ordering::Relaxed);
            assert_eq!(is_used, exception.text().hooks.contains(&hook), "{exception:?} at {hook:?}");
        }
    }
}

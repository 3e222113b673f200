//! Enumeration: all values of a type, and all combinations of facts.

use std::{cell::Cell, fmt};

use tacit_abi::{Accepted, Hook, Listener, Marked, Mode, Segment};

/// A type with few values.
pub(crate) trait Every: Copy {
    /// Number of values.
    const COUNT: usize;
    /// Returns the value with this number.
    fn nth(index: usize) -> Self;
    /// Returns all values.
    fn all() -> impl Iterator<Item = Self> {
        (0..Self::COUNT).map(Self::nth)
    }
}

/// Lists the variants of enumerations. A missing variant does not compile.
macro_rules! every {
    ($($type:ident { $($variant:ident),+ $(,)? })+) => { $(
        impl Every for $type {
            const COUNT: usize = [$(stringify!($variant)),+].len();
            fn nth(index: usize) -> Self {
                [$(Self::$variant),+][index]
            }
        }
        const _: fn($type) = |value| match value { $($type::$variant)|+ => {} };
    )+ };
}

every! {
    Accepted { Node, Other }
    Hook { Socket, Link }
    Listener { Tunnel, Plaintext }
    Marked { Tunnel, Disabled }
    Mode { Disable, Permissive, Strict }
    Segment { Syn, SynAck, Data, Bare }
}

impl Every for bool {
    const COUNT: usize = 2;
    fn nth(index: usize) -> Self {
        index == 1
    }
}

impl<T: Every> Every for Option<T> {
    const COUNT: usize = T::COUNT + 1;
    fn nth(index: usize) -> Self {
        index.checked_sub(1).map(T::nth)
    }
}

/// The number of a mode in a map: those of all modes, the number of none, and a later version's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawMode(pub(crate) u32);

impl Every for RawMode {
    const COUNT: usize = Mode::COUNT + 2;
    fn nth(index: usize) -> Self {
        Self(match index {
            0 => 0,
            1 => 99,
            _ => Mode::nth(index - 2) as u32,
        })
    }
}

impl RawMode {
    /// Returns true for the modes that take plaintext. Every other number is read as STRICT.
    pub(crate) fn takes_plaintext(self) -> bool {
        self.0 == Mode::Disable as u32 || self.0 == Mode::Permissive as u32
    }
}

/// Returns all unions of `bits`.
pub(crate) fn subsets(bits: &'static [u32]) -> impl Iterator<Item = u32> + Clone {
    let union = move |choice: u32| {
        bits.iter().enumerate().filter(|(bit, _)| choice >> bit & 1 == 1).map(|(_, flag)| flag).sum()
    };
    (0..1 << bits.len()).map(union)
}

/// Most facts of a table.
const FACTS_MAX: usize = 16;
const NOT_ASKED: u8 = u8::MAX;

/// Values of the facts that were asked for in a run, in the order of the questions.
#[derive(Default)]
pub(crate) struct Answers {
    values: [Cell<u8>; FACTS_MAX],
    counts: [Cell<u8>; FACTS_MAX],
    order: [Cell<u8>; FACTS_MAX],
    asked: Cell<usize>,
}

impl Answers {
    pub(crate) fn new() -> Self {
        let answers = Self::default();
        answers.values.iter().for_each(|value| value.set(NOT_ASKED));
        answers
    }

    /// Returns the value of `fact` in this run. A fact that is asked for first has its first value.
    #[inline]
    pub(crate) fn ask(&self, fact: usize, count: usize) -> usize {
        if self.values[fact].get() == NOT_ASKED {
            let asked = self.asked.get();
            self.order[asked].set(fact as u8);
            self.counts[fact].set(count as u8);
            self.values[fact].set(0);
            self.asked.set(asked + 1);
        }
        self.values[fact].get().into()
    }

    /// Moves on to the next run: the last fact that has another value gets it. False after the last run.
    #[inline]
    pub(crate) fn next_run(&self) -> bool {
        while let Some(last) = self.asked.get().checked_sub(1) {
            let fact = usize::from(self.order[last].get());
            let value = self.values[fact].get() + 1;
            if value < self.counts[fact].get() {
                self.values[fact].set(value);
                return true;
            }
            self.values[fact].set(NOT_ASKED);
            self.asked.set(last);
        }
        false
    }

    /// Returns the number of combinations of the facts that were asked for.
    #[inline]
    pub(crate) fn combinations_asked(&self) -> u64 {
        let asked = self.order.iter().take(self.asked.get());
        asked.map(|fact| u64::from(self.counts[usize::from(fact.get())].get())).product()
    }
}

/// Defines a table of facts: each with its type, of which all values are enumerated.
macro_rules! facts {
    ($(#[$doc:meta])* $name:ident of $subject:ty { $($fact:ident: $type:ty,)+ }) => {
        $(#[$doc])*
        pub(crate) struct $name {
            /// The subject of the facts.
            pub(crate) subject: $subject,
            answers: $crate::facts::Answers,
        }

        /// Numbers of the facts.
        #[expect(non_camel_case_types, reason = "named as the facts")]
        enum Index { $($fact),+ }

        impl $name {
            const COUNTS: &[usize] = &[$(<$type as $crate::facts::Every>::COUNT),+];

            $(
                #[inline]
                fn $fact(&self) -> $type {
                    let count = <$type as $crate::facts::Every>::COUNT;
                    $crate::facts::Every::nth(self.answers.ask(Index::$fact as usize, count))
                }
            )+

            /// Runs `check` for all combinations of facts about `subject`. Returns the number of combinations.
            pub(crate) fn each(subject: $subject, mut check: impl FnMut(&Self)) -> u64 {
                let total: u64 = Self::COUNTS.iter().map(|count| *count as u64).product();
                let facts = Self { subject, answers: $crate::facts::Answers::new() };
                let mut covered = 0;
                loop {
                    check(&facts);
                    covered += total / facts.answers.combinations_asked();
                    if !facts.answers.next_run() {
                        break;
                    }
                }
                assert_eq!(covered, total, "a run is missing");
                total
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                writeln!(out, "{:?}", self.subject)?;
                let names = [$(stringify!($fact)),+];
                $crate::facts::write_answers(out, &names, &self.answers)
            }
        }
    };
}
pub(crate) use facts;

/// Writes the facts that were asked for, with the numbers of their values.
pub(crate) fn write_answers(out: &mut fmt::Formatter<'_>, names: &[&str], answers: &Answers) -> fmt::Result {
    for (name, value) in names.iter().zip(&answers.values) {
        if value.get() != NOT_ASKED {
            write!(out, "{name} = {}, ", value.get())?;
        }
    }
    Ok(())
}

#[test]
fn all_combinations_of_facts_are_run() {
    facts! {
        /// Three facts.
        Three of () { one: bool, two: Option<bool>, three: RawMode, }
    }
    let mut runs = Vec::new();
    let total = Three::each((), |facts| runs.push((facts.one(), facts.two(), facts.three().0)));
    runs.dedup();
    assert_eq!((total, runs.len()), (30, 30));
    // Where `two` and `three` are not asked for, one run stands for 15 combinations.
    let mut runs = 0;
    let total = Three::each((), |facts| {
        runs += 1;
        if facts.one() {
            facts.two();
        }
    });
    assert_eq!((total, runs), (30, 4));
}

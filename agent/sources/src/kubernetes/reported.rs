//! The part of a list of problems that is logged and shown in the status. Pure.
//!
//! Every namespace, and every node, can fill a list. So each owner has a share of the lines.

use std::collections::BTreeMap;

/// Maximum number of problems in a report. The rest is counted.
pub(crate) const REPORTED_MAX: usize = 20;

/// A problem, with the namespace or the object that caused it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    /// The namespace, or an object without namespace.
    pub(crate) owner: String,
    /// Text for the operator.
    pub(crate) line: String,
}

/// Returns [`REPORTED_MAX`] lines in order, as evenly from all owners as they have them, and the number of other lines.
pub(crate) fn reported(problems: &[Problem]) -> (Vec<String>, usize) {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    problems.iter().for_each(|problem| *counts.entry(&problem.owner).or_default() += 1);
    let mut shares: BTreeMap<&str, usize> = BTreeMap::new();
    let mut room = REPORTED_MAX.min(problems.len());
    while room > 0 {
        for (owner, count) in &counts {
            let share = shares.entry(owner).or_default();
            if room > 0 && *share < *count {
                *share += 1;
                room -= 1;
            }
        }
    }
    let lines = problems.iter().filter(|problem| {
        let share = shares.get_mut(&*problem.owner).filter(|share| **share > 0);
        share.map(|share| *share -= 1).is_some()
    });
    let lines: Vec<String> = lines.map(|problem| problem.line.clone()).collect();
    let more = problems.len() - lines.len();
    (lines, more)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(owners: &[(&str, usize)]) -> Vec<Problem> {
        let of = |(owner, count): &(&str, usize)| {
            let owner = (*owner).to_owned();
            (0..*count).map(move |i| Problem { owner: owner.clone(), line: format!("{owner} {i}") })
        };
        owners.iter().flat_map(of).collect()
    }

    #[test]
    fn one_owner_does_not_hide_the_problems_of_others() {
        let (lines, more) = reported(&problems(&[("false", 1000), ("shop", 2), ("web", 1)]));
        assert_eq!((lines.len(), more), (REPORTED_MAX, 983));
        let of = |owner: &str| lines.iter().filter(|line| line.starts_with(owner)).count();
        assert_eq!((of("false"), of("shop"), of("web")), (17, 2, 1));
        assert_eq!((&*lines[0], &*lines[16], &*lines[17]), ("false 0", "false 16", "shop 0"));
    }

    #[test]
    fn a_short_list_is_reported_as_it_is() {
        for count in [0, 1, REPORTED_MAX] {
            let all = problems(&[("shop", count)]);
            let expected: Vec<String> = all.iter().map(|problem| problem.line.clone()).collect();
            assert_eq!(reported(&all), (expected, 0));
        }
        let many: Vec<(String, usize)> = (0..100).map(|i| (format!("n{i}"), 1)).collect();
        let many: Vec<(&str, usize)> = many.iter().map(|(owner, count)| (&**owner, *count)).collect();
        assert_eq!(reported(&problems(&many)).1, 80);
    }
}

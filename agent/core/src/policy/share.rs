//! The share of one namespace in the policies of a mesh. Pure. `shares` has the figures.
//!
//! Everybody who may write policies in a namespace can write as many as etcd takes. Every agent of the mesh reads them, and
//! its workers evaluate them for each flow to a pod of the namespace. The share bounds both costs.

use std::{fmt, iter::Sum, ops::AddAssign};

use crate::shares::{POLICIES, POLICY_BYTES, POLICY_LOOKUPS};

/// Use of the share of one namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PolicyUsage {
    /// Policy objects.
    pub objects: u64,
    /// Bytes of their texts, as far as the source counts them for each object.
    pub bytes: u64,
    /// Lookups of one decision, at most.
    pub lookups: u64,
}

impl PolicyUsage {
    /// Returns the part of the share that is exceeded, with use and bound. `None` if the policies are within their share.
    #[must_use]
    pub fn excess(&self) -> Option<String> {
        let bounds = [
            (self.objects, POLICIES.fixed(), "policies"),
            (self.bytes, POLICY_BYTES.fixed(), "bytes of policies"),
            (self.lookups, POLICY_LOOKUPS.fixed(), "lookups for one connection"),
        ];
        let exceeded = bounds.into_iter().find(|(used, bound, _)| used > bound)?;
        let (used, bound, what) = exceeded;
        Some(format!(
            "{used} {what}, and a namespace has a share of {bound}; remove policies or shorten them"
        ))
    }
}

impl AddAssign for PolicyUsage {
    fn add_assign(&mut self, other: Self) {
        self.objects = self.objects.saturating_add(other.objects);
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.lookups = self.lookups.saturating_add(other.lookups);
    }
}

impl Sum for PolicyUsage {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        let mut sum = Self::default();
        all.for_each(|one| sum += one);
        sum
    }
}

impl fmt::Display for PolicyUsage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { objects, bytes, lookups } = self;
        write!(f, "{objects} policies, {bytes} bytes, {lookups} lookups")
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::policy::{Flow, FlowSource, Mode, Policies, PolicyVerdict, decide, tests::workload};

    const POLICIES_MAX: usize = 2048;
    const LOOKUPS_MAX: usize = 8192;

    fn document(namespace: &str, name: &str, rules: &str) -> String {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
             metadata: {{name: {name}, namespace: {namespace}}}\nspec: {{rules: [{rules}]}}\n"
        )
    }

    fn read(text: &str) -> Policies {
        Policies::parse(text, Path::new("policy.yaml"), "istio-system").expect("valid")
    }

    fn principal(number: usize) -> String {
        format!("cluster.local/ns/jobs/sa/a{number}")
    }

    fn allows(policies: &Policies, namespace: &str, account: &str) -> bool {
        let web = workload(namespace, &[]);
        let id = format!("spiffe://cluster.local/ns/jobs/sa/{account}");
        let flow = Flow {
            source: FlowSource::Tunnel(crate::spiffe::SpiffeId::parse(&id).expect("valid")),
            client: [10, 77, 1, 9].into(),
            destination: ([10, 77, 2, 2], 80).into(),
        };
        decide(&policies.modes(&web), &policies.authorization(&web), &flow) == PolicyVerdict::Allow
    }

    fn lookups(policies: &Policies, namespace: &str) -> usize {
        policies.authorization(&workload(namespace, &[])).lookups()
    }

    #[test]
    fn the_share_is_shown_with_its_fullest_namespace() {
        let policies = read(
            &(document("shop", "p", "{}") + &document("jobs", "p", "{}") + &document("jobs", "q", "{}")),
        );
        let uses = policies.share_uses();
        let shown: Vec<_> =
            uses.iter().map(|usage| (usage.resource, usage.used, usage.fullest.clone())).collect();
        let jobs = |units| Some(("jobs".to_owned(), units));
        assert_eq!(
            shown,
            [("policies", 3, jobs(2)), ("policy_bytes", 0, None), ("policy_lookups", 6, jobs(4))]
        );
        assert!(uses.iter().all(|usage| !usage.is_full() && usage.refused == 0));
        let beyond = "{}, ".repeat(LOOKUPS_MAX);
        let uses = read(&document("jobs", "p", &beyond)).share_uses();
        assert!(uses[2].is_full() && uses[2].refused == 1, "{uses:?}");
    }

    #[test]
    fn a_decision_costs_the_same_for_one_principal_and_for_many() {
        let list = |count| (0..count).map(principal).collect::<Vec<_>>();
        let one_list =
            |count| format!("{{from: [{{source: {{principals: [{}]}}}}]}}", list(count).join(", "));
        let sources = |count| {
            let sources: Vec<_> = list(count)
                .iter()
                .map(|principal| format!("{{source: {{principals: [{principal}]}}}}"))
                .collect();
            format!("{{from: [{}]}}", sources.join(", "))
        };
        let of = |rule: String| read(&document("shop", "p", &rule));
        assert_eq!(lookups(&of(one_list(1)), "shop"), 3, "the policy, the rule, and one list");
        for policies in [of(one_list(5000)), of(sources(5000))] {
            assert_eq!(lookups(&policies, "shop"), 3);
            assert!(allows(&policies, "shop", "a0") && allows(&policies, "shop", "a4999"));
            assert!(!allows(&policies, "shop", "a5000"));
        }
        let domains = "{from: [{source: {trustDomains: [a]}}, {source: {trustDomains: [b, cluster.local]}}]}";
        let policies = of(domains.to_owned());
        assert_eq!(lookups(&policies, "shop"), 3);
        assert!(allows(&policies, "shop", "a0"));
        let ports = "{to: [{operation: {ports: ['80']}}, {operation: {ports: ['81']}}]}";
        assert_eq!(lookups(&of(ports.to_owned()), "shop"), 3);
    }

    #[test]
    fn the_policies_of_other_namespaces_cost_nothing() {
        let own = document("shop", "p", "{}");
        let before = lookups(&read(&own), "shop");
        let others: String = (0..POLICIES_MAX).map(|i| document("jobs", &format!("p{i}"), "{}")).collect();
        assert_eq!(lookups(&read(&(own + &others)), "shop"), before);
    }

    #[test]
    fn policies_beyond_the_share_are_not_applied_and_deny_to_their_namespace_alone() {
        let many = |count: usize| -> String {
            (0..count).map(|i| document("jobs", &format!("p{i}"), "{}")).collect()
        };
        let within = read(&many(POLICIES_MAX));
        assert!(allows(&within, "jobs", "a0") && within.not_applied().next().is_none());
        let rules = "{}, ".repeat(LOOKUPS_MAX);
        for text in [many(POLICIES_MAX + 1), document("jobs", "p", &rules)] {
            let policies = read(&text);
            assert!(!allows(&policies, "jobs", "a0") && allows(&policies, "shop", "a0"));
            assert_eq!(policies.modes(&workload("jobs", &[])).default, Mode::Strict);
            assert_eq!(policies.mesh_default(), Mode::Permissive);
            assert!(policies.may_be_strict());
            let not_applied: Vec<_> = policies.not_applied().collect();
            assert_eq!(not_applied.len(), 1);
            assert!(not_applied[0].1.contains("a namespace has a share of"), "{not_applied:?}");
            let authorization = policies.authorization(&workload("jobs", &[]));
            assert_eq!(authorization.len(), 1, "what is not applied costs nothing");
        }
    }

    #[test]
    fn the_root_namespace_beyond_its_share_denies_everywhere() {
        let rules = "{}, ".repeat(LOOKUPS_MAX);
        let policies = read(&document("istio-system", "p", &rules));
        assert!(!allows(&policies, "jobs", "a0") && !allows(&policies, "shop", "a0"));
        assert_eq!(policies.mesh_default(), Mode::Strict);
        assert!(policies.why_not_applied("shop").is_some());
    }

    #[test]
    fn a_change_of_one_namespace_leaves_the_policies_of_others_as_they_are() {
        let before = read(&(document("shop", "p", "{}") + &document("jobs", "p", "{}")));
        let mut after = before.clone();
        after.set_namespace("jobs", &[]);
        assert!(after.is_same_for("shop", &before) && after.is_same_for("empty", &before));
        assert!(!after.is_same_for("jobs", &before));
        assert!(!before.is_same_for("shop", &before.clone().with_minimum(Mode::Strict)));
        after.set_namespace("istio-system", &[]);
        assert!(!after.is_same_for("shop", &before), "those of the root namespace hold everywhere");
    }
}

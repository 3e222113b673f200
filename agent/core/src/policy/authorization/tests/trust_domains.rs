//! Rules against sources of the own trust domain, of its aliases, and of a federated one.

use super::*;

/// Returns true if a rule with this source matches a flow of `source` in a mesh with the alias `old.example`, as an ALLOW and as a DENY
/// rule.
fn matches_by(rule_source: &str, source: &FlowSource) -> [bool; 2] {
    let aliases = [TrustDomain::parse("old.example").expect("valid")];
    ["ALLOW", "DENY"].map(|action| {
        let spec = format!("{{action: {action}, rules: [{{from: [{{source: {{{rule_source}}}}}]}}]}}");
        let policies = policies(&[&spec]).with_aliases(aliases.to_vec().into());
        let authorization = policies.authorization(&workload("shop", &[("app", "web")]));
        let permissive = modes(crate::policy::Mode::Permissive);
        let is_allowed = decide(&permissive, &authorization, &flow(source.clone())) == PolicyVerdict::Allow;
        is_allowed == (action == "ALLOW")
    })
}

#[test]
fn the_trust_domain_goes_by_its_aliases_and_a_federated_one_by_its_own_name_alone() {
    let parse = |uri: &str| SpiffeId::parse(uri).expect("valid");
    // The tunnel has replaced an alias by the mesh's own domain.
    let own = FlowSource::Tunnel(parse("spiffe://prod.example/ns/shop/sa/cart"));
    let partner = FlowSource::Federated(parse("spiffe://partner.example/ns/shop/sa/cart"));
    let (both, neither) = ([true, true], [false, false]);
    for (rule, of_own, of_partner) in [
        ("principals: [prod.example/ns/shop/sa/cart]", both, neither),
        ("principals: [old.example/ns/shop/sa/cart]", both, neither),
        ("principals: [cluster.local/ns/shop/sa/cart]", both, neither),
        ("principals: [partner.example/ns/shop/sa/cart]", neither, both),
        ("principals: ['*/ns/shop/sa/cart']", both, both),
        ("principals: [other.example/ns/shop/sa/cart]", neither, neither),
        ("notPrincipals: [old.example/ns/shop/sa/cart]", neither, both),
        ("notPrincipals: [partner.example/*]", both, neither),
        ("trustDomains: [prod.example]", both, neither),
        ("trustDomains: [old.example]", both, neither),
        ("trustDomains: [partner.example]", neither, both),
        ("trustDomains: ['*']", both, both),
        ("notTrustDomains: [prod.example]", neither, both),
        ("notTrustDomains: [old.example]", neither, both),
        ("notTrustDomains: [partner.example]", both, neither),
        // A namespace or account of the same name in the other domain is not meant, unless a rule names that.
        ("namespaces: [shop]", both, [false, true]),
        ("serviceAccounts: [shop/cart]", both, [false, true]),
        ("namespaces: [shop], trustDomains: [partner.example]", neither, both),
        ("namespaces: [shop], principals: [partner.example/*]", neither, both),
        ("namespaces: [shop], notTrustDomains: [prod.example]", neither, [false, true]),
        ("namespaces: [bank]", neither, neither),
        // An ALLOW rule that leaves names out admits no source of another domain. A DENY rule denies them, whatever they are called.
        ("notNamespaces: [bank]", both, [false, true]),
        ("notNamespaces: [shop]", neither, [false, true]),
        ("notServiceAccounts: [shop/cart]", neither, [false, true]),
        ("notNamespaces: [shop], trustDomains: [partner.example]", neither, neither),
        ("notNamespaces: [bank], trustDomains: [partner.example]", neither, both),
        // A pattern of principals that the own domain has too names no domain.
        ("namespaces: [shop], principals: ['*']", both, [false, true]),
        ("namespaces: [shop], principals: ['*/ns/shop/sa/cart']", both, [false, true]),
    ] {
        assert_eq!((matches_by(rule, &own), matches_by(rule, &partner)), (of_own, of_partner), "{rule}");
    }
}

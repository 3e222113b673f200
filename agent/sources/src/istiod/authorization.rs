//! `istio.security.Authorization` as a policy. Pure.
//!
//! A part that is not understood makes the policy unreadable, and an unreadable policy denies: a list whose value is left out would
//! match more or less than its author wrote. Only conditions of whole kinds that are not known here are handled otherwise, see
//! [`ReducedMatch::has_unknown`].

use std::net::IpAddr;

use ipnet::IpNet;
use prost::Message as _;
use tacit_core::policy::{
    Listed, ReducedAction, ReducedMatch, ReducedPolicy, ReducedRules, ReducedScope, TextMatch,
};

use super::messages::{
    Action, Authorization, Block, Match, MatchType, Rule, Scope, ServiceAccountMatch, StringMatch,
};

/// Reads the message of the policy that the resource `name`, `<namespace>/<name>`, has.
///
/// # Errors
/// The field, its value and the expected one.
pub(super) fn policy(name: &str, bytes: &[u8]) -> Result<ReducedPolicy, String> {
    let message =
        Authorization::decode(bytes).map_err(|error| format!("no istio.security.Authorization: {error}"))?;
    let own_name = format!("{}/{}", message.namespace, message.name);
    if own_name != name {
        return Err(format!("namespace and name are {own_name:?}: expected {name:?}"));
    }
    let scope = match Scope::try_from(message.scope) {
        Ok(Scope::Global) => ReducedScope::Global,
        Ok(Scope::Namespace) => ReducedScope::Namespace,
        Ok(Scope::WorkloadSelector) => ReducedScope::Listed,
        Err(_) => return Err(format!("scope is {}: expected 0, 1 or 2", message.scope)),
    };
    let action = match Action::try_from(message.action) {
        Ok(Action::Allow) => ReducedAction::Allow,
        Ok(Action::Deny) => ReducedAction::Deny,
        Err(_) => return Err(format!("action is {}: expected 0 (ALLOW) or 1 (DENY)", message.action)),
    };
    let has_extensions = !message.extensions.is_empty();
    let rules = rules(message.rules, has_extensions)?;
    Ok(ReducedPolicy::new(own_name, (scope, action), message.dry_run, rules, bytes.len()))
}

fn rules(rules: Vec<Rule>, has_extensions: bool) -> Result<ReducedRules, String> {
    let mut read = Vec::with_capacity(rules.len());
    for (r, rule) in rules.into_iter().enumerate() {
        let mut clauses = Vec::with_capacity(rule.clauses.len());
        for (c, clause) in rule.clauses.into_iter().enumerate() {
            let matches = clause.matches.into_iter().enumerate();
            let matches = matches.map(|(m, one)| {
                reduced(one).map_err(|problem| format!("rules[{r}].clauses[{c}].matches[{m}].{problem}"))
            });
            clauses.push(matches.collect::<Result<Vec<_>, _>>()?);
        }
        if has_extensions {
            // A condition on the whole policy, of a kind that is not known here.
            clauses.push(vec![ReducedMatch { has_unknown: true, ..ReducedMatch::default() }]);
        }
        read.push(clauses);
    }
    Ok(read)
}

fn reduced(one: Match) -> Result<ReducedMatch, String> {
    Ok(ReducedMatch {
        namespaces: listed("namespaces", one.namespaces, "notNamespaces", one.not_namespaces, text)?,
        service_accounts: listed(
            "serviceAccounts",
            one.service_accounts,
            "notServiceAccounts",
            one.not_service_accounts,
            account,
        )?,
        principals: listed("principals", one.principals, "notPrincipals", one.not_principals, text)?,
        source_ips: listed("sourceIps", one.source_ips, "notSourceIps", one.not_source_ips, block)?,
        destination_ips: listed(
            "destinationIps",
            one.destination_ips,
            "notDestinationIps",
            one.not_destination_ips,
            block,
        )?,
        destination_ports: listed(
            "destinationPorts",
            one.destination_ports,
            "notDestinationPorts",
            one.not_destination_ports,
            port,
        )?,
        has_unknown: !one.extensions.is_empty(),
    })
}

fn listed<M, T>(
    any_name: &str,
    any: Vec<M>,
    none_name: &str,
    none: Vec<M>,
    read: fn(M) -> Result<T, String>,
) -> Result<Listed<T>, String> {
    let list = |name: &str, list: Vec<M>| {
        let items = list.into_iter().enumerate();
        let items = items.map(|(i, item)| read(item).map_err(|problem| format!("{name}[{i}]: {problem}")));
        items.collect::<Result<Vec<T>, String>>()
    };
    Ok(Listed { any: list(any_name, any)?, none: list(none_name, none)? })
}

fn text(value: StringMatch) -> Result<TextMatch, String> {
    match value.match_type {
        Some(MatchType::Exact(text)) => Ok(TextMatch::Exact(text)),
        Some(MatchType::Prefix(text)) => Ok(TextMatch::Prefix(text)),
        Some(MatchType::Suffix(text)) => Ok(TextMatch::Suffix(text)),
        Some(MatchType::Presence(())) => Ok(TextMatch::Presence),
        None => Err("no match type that is known: expected exact, prefix, suffix or presence".to_owned()),
    }
}

fn account(value: ServiceAccountMatch) -> Result<(String, String), String> {
    Ok((value.namespace, value.service_account))
}

fn port(value: u32) -> Result<u16, String> {
    u16::try_from(value).map_err(|_| format!("{value} is no port: expected 0 to 65535"))
}

fn block(value: Block) -> Result<IpNet, String> {
    let address = address(&value.address)?;
    let bits = u8::try_from(value.length).ok();
    let net = bits.and_then(|bits| IpNet::new(address, bits).ok());
    let net =
        net.ok_or_else(|| format!("{} bits of {address}: expected the length of a prefix", value.length))?;
    // Addresses of flows are never v4-mapped, so a mapped range is the IPv4 range.
    Ok(match (net, address.to_canonical()) {
        (IpNet::V6(v6), IpAddr::V4(v4)) if v6.prefix_len() >= 96 => {
            IpNet::new(v4.into(), v6.prefix_len() - 96).unwrap_or(net).trunc()
        }
        _ => net.trunc(),
    })
}

/// Returns the address in 4 or 16 bytes.
pub(super) fn address(bytes: &[u8]) -> Result<IpAddr, String> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(v4.into());
    }
    match <[u8; 16]>::try_from(bytes) {
        Ok(v6) => Ok(v6.into()),
        Err(_) => Err(format!("{} bytes are no address: expected 4 or 16", bytes.len())),
    }
}

#[cfg(test)]
mod tests {
    use tacit_core::policy::PolicyUsage;

    use super::*;
    use crate::istiod::messages::{Clause, Extension};

    fn read(message: &Authorization) -> Result<ReducedPolicy, String> {
        policy("shop/p", &message.encode_to_vec())
    }

    fn named() -> Authorization {
        Authorization {
            name: "p".to_owned(),
            namespace: "shop".to_owned(),
            scope: 2,
            action: 1,
            ..Default::default()
        }
    }

    fn with(one: Match) -> Authorization {
        let rule = Rule { clauses: vec![Clause { matches: vec![one] }] };
        Authorization { rules: vec![rule], ..named() }
    }

    fn principal(match_type: Option<MatchType>) -> Match {
        Match { not_principals: vec![StringMatch { match_type }], ..Match::default() }
    }

    #[test]
    fn a_policy_that_is_not_understood_is_refused_with_the_field() {
        let bytes = |address: &[u8], length| Block { address: address.to_vec(), length };
        let source = |block| Match { source_ips: vec![block], ..Match::default() };
        for (message, problem) in [
            (Authorization { scope: 3, ..named() }, "scope is 3: expected 0, 1 or 2"),
            (Authorization { action: 2, ..named() }, "action is 2: expected 0 (ALLOW) or 1 (DENY)"),
            (
                Authorization { namespace: "other".to_owned(), ..named() },
                "namespace and name are \"other/p\": expected \"shop/p\"",
            ),
            (
                with(principal(None)),
                "rules[0].clauses[0].matches[0].notPrincipals[0]: no match type that is known: expected exact, prefix, suffix or presence",
            ),
            (
                with(Match { destination_ports: vec![80, 65_536], ..Match::default() }),
                "rules[0].clauses[0].matches[0].destinationPorts[1]: 65536 is no port: expected 0 to 65535",
            ),
            (
                with(source(bytes(&[10, 0, 0], 8))),
                "rules[0].clauses[0].matches[0].sourceIps[0]: 3 bytes are no address: expected 4 or 16",
            ),
            (
                with(source(bytes(&[10, 0, 0, 0], 33))),
                "rules[0].clauses[0].matches[0].sourceIps[0]: 33 bits of 10.0.0.0: expected the length of a prefix",
            ),
        ] {
            assert_eq!(read(&message).expect_err("refused"), problem);
        }
        assert!(
            policy("shop/p", &[0xff]).expect_err("no message").starts_with("no istio.security.Authorization")
        );
    }

    #[test]
    fn a_strict_policy_of_istiod_is_read() {
        let strict = read(&with(principal(Some(MatchType::Presence(()))))).expect("valid");
        assert!(strict.is_strict() && strict.scope == ReducedScope::Listed);
        let PolicyUsage { objects, bytes, lookups } = strict.usage();
        assert_eq!((objects, lookups), (1, 3), "the policy, its rule and one list");
        assert!(bytes > 0);
        let dry = Authorization { dry_run: true, ..with(principal(Some(MatchType::Presence(())))) };
        assert!(!read(&dry).expect("valid").is_strict());
    }

    #[test]
    fn extensions_widen_a_deny_policy_and_close_an_allow_policy() {
        let extension = || vec![Extension { name: "later".to_owned(), config: None }];
        let deny = Match { extensions: extension(), ..Match::default() };
        assert!(read(&with(deny)).expect("valid").is_strict(), "it denies always");
        let whole =
            Authorization { extensions: extension(), ..with(principal(Some(MatchType::Presence(())))) };
        assert!(read(&whole).expect("valid").is_strict());
    }

    #[test]
    fn ranges_are_kept_by_their_prefix() {
        for (address, length, expected) in [
            (vec![10, 1, 2, 3], 8, "10.0.0.0/8"),
            (vec![10, 1, 2, 3], 32, "10.1.2.3/32"),
            (
                "::ffff:10.1.2.3".parse::<std::net::Ipv6Addr>().expect("valid").octets().to_vec(),
                104,
                "10.0.0.0/8",
            ),
            ("fd77::1".parse::<std::net::Ipv6Addr>().expect("valid").octets().to_vec(), 16, "fd77::/16"),
        ] {
            assert_eq!(block(Block { address, length }).expect("valid").to_string(), expected);
        }
    }
}

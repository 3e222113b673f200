//! Rules of a network namespace that rewrite the destination of what arrives: `REDIRECT`, `DNAT`, of nf_tables or of the older
//! iptables.
//!
//! The agent delivers on the namespace's loopback, where such rules do not run. Rules that a table lists and that never match count
//! too.

mod iptables;

use std::{
    collections::{HashMap, HashSet},
    io,
    ops::ControlFlow,
};

use nix::sys::socket::SockProtocol;

use crate::{
    netlink::{NLM_F_DUMP, Netlink, attributes},
    netns::{HostNetns, Netns},
};

/// Subsystem of nf_tables, in the upper byte of its messages.
const SUBSYSTEM: u16 = 10 << 8;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const GET_CHAIN: u16 = SUBSYSTEM | 4;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const GET_RULE: u16 = SUBSYSTEM | 7;
/// `struct nfgenmsg`.
const NFGENMSG: usize = 4;
/// The bits of an attribute's type, without flags.
const TYPE: u16 = 0x3fff;
const PREROUTING: u32 = 0;

/// Most chains, and most rules of a table, that are read: a pod can make any number. More count as rules that rewrite.
const MESSAGES_MAX: usize = 4096;

/// A chain: family, table and name.
type Chain = (u8, Vec<u8>, Vec<u8>);

/// Returns true if rules of `netns` rewrite the destination of connections that arrive.
///
/// # Errors
/// When the namespace cannot be entered, or the kernel does not answer.
pub fn rewrites_arrivals(netns: &Netns, host: &HostNetns) -> io::Result<bool> {
    host.run_in(netns.file(), || Ok(nf_tables()? || iptables::rewrites_arrivals()?))?
}

/// Rules of nf_tables, those of `iptables-nft` among them.
fn nf_tables() -> io::Result<bool> {
    let netlink = match Netlink::open(SockProtocol::NetlinkNetFilter) {
        // A kernel without netfilter.
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(false),
        opened => opened?,
    };
    let mut bases = Vec::new();
    let dumped = dump(&netlink, GET_CHAIN, &[0; NFGENMSG], |kind, body| {
        if kind == NEW_CHAIN {
            bases.extend(translating_base(body));
        }
    });
    match dumped {
        // A kernel without nf_tables.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
            return Ok(false);
        }
        dumped => {
            if dumped?.is_break() {
                return Ok(true);
            }
        }
    }
    // Most pods have none. A chain leads to others of its table alone.
    let tables: HashSet<(u8, Vec<u8>)> =
        bases.iter().map(|(family, table, _)| (*family, table.clone())).collect();
    let mut rules: HashMap<Chain, Vec<Rule>> = HashMap::new();
    for (family, table) in tables {
        let dumped = dump(&netlink, GET_RULE, &of_table(family, &table), |kind, body| {
            if kind == NEW_RULE
                && let Some((chain, rule)) = rule(body)
                && rule != Rule::default()
            {
                rules.entry(chain).or_default().push(rule);
            }
        });
        if dumped?.is_break() {
            return Ok(true);
        }
    }
    Ok(reaches_rewrite(bases, &rules))
}

/// Asks for all objects, and hands at most [`MESSAGES_MAX`] to `each`. Breaks if there are more.
fn dump(
    netlink: &Netlink,
    kind: u16,
    body: &[u8],
    mut each: impl FnMut(u16, &[u8]),
) -> io::Result<ControlFlow<()>> {
    let mut left = MESSAGES_MAX;
    netlink.ask_until(kind, NLM_F_DUMP, body, |kind, body| {
        if left == 0 {
            return ControlFlow::Break(());
        }
        left -= 1;
        each(kind, body);
        ControlFlow::Continue(())
    })
}

/// A request for what is in one table.
fn of_table(family: u8, name: &[u8]) -> Vec<u8> {
    const TABLE: u16 = 1;
    [vec![family, 0, 0, 0], attribute(TABLE, name)].concat()
}

/// An attribute of netlink, padded to four bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A rule, as far as address translation depends on it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Rule {
    rewrites: bool,
    /// The chains that it jumps or goes to.
    jumps: Vec<Vec<u8>>,
    /// A map chooses the chain.
    leads_anywhere: bool,
}

fn reaches_rewrite(mut from: Vec<Chain>, rules: &HashMap<Chain, Vec<Rule>>) -> bool {
    let mut seen: HashSet<Chain> = HashSet::new();
    while let Some(chain) = from.pop() {
        if !seen.insert(chain.clone()) {
            continue;
        }
        for rule in rules.get(&chain).into_iter().flatten() {
            if rule.rewrites {
                return true;
            }
            let (family, table) = (chain.0, &chain.1);
            from.extend(rule.jumps.iter().map(|name| (family, table.clone(), name.clone())));
            if rule.leads_anywhere {
                from.extend(rules.keys().filter(|other| (other.0, &other.1) == (family, table)).cloned());
            }
        }
    }
    false
}

/// Attributes by type.
fn by_type(bytes: &[u8]) -> HashMap<u16, &[u8]> {
    attributes(bytes).map(|(kind, value)| (kind & TYPE, value)).collect()
}

/// A number in network order.
fn number(value: Option<&&[u8]>) -> Option<u32> {
    Some(u32::from_be_bytes((*value?).try_into().ok()?))
}

/// The chain that a message describes, if it translates what arrives.
fn translating_base(body: &[u8]) -> Option<Chain> {
    const TABLE: u16 = 1;
    const NAME: u16 = 3;
    const HOOK: u16 = 4;
    const KIND: u16 = 7;
    let parts = by_type(body.get(NFGENMSG..)?);
    let hook = number(by_type(parts.get(&HOOK)?).get(&1))?;
    let is_nat = parts.get(&KIND)?.starts_with(b"nat\0");
    let chain = (*body.first()?, parts.get(&TABLE)?.to_vec(), parts.get(&NAME)?.to_vec());
    (is_nat && hook == PREROUTING).then_some(chain)
}

fn rule(body: &[u8]) -> Option<(Chain, Rule)> {
    const TABLE: u16 = 1;
    const CHAIN: u16 = 2;
    const EXPRESSIONS: u16 = 4;
    let parts = by_type(body.get(NFGENMSG..)?);
    let chain = (*body.first()?, parts.get(&TABLE)?.to_vec(), parts.get(&CHAIN)?.to_vec());
    let mut rule = Rule::default();
    for (_, element) in attributes(parts.get(&EXPRESSIONS).copied().unwrap_or_default()) {
        expression(element, &mut rule);
    }
    Some((chain, rule))
}

/// Reads one expression of a rule.
fn expression(element: &[u8], rule: &mut Rule) {
    const NAME: u16 = 1;
    const DATA: u16 = 2;
    let parts = by_type(element);
    let data = by_type(parts.get(&DATA).copied().unwrap_or_default());
    let name = parts.get(&NAME).copied().unwrap_or_default();
    match name.strip_suffix(&[0]).unwrap_or(name) {
        b"redir" => rule.rewrites = true,
        // 1 is of destinations.
        b"nat" => rule.rewrites |= number(data.get(&1)) == Some(1),
        // Of `iptables-nft`.
        b"target" => rule.rewrites |= data.get(&1).is_some_and(|name| is_rewriting(name)),
        b"immediate" => rule.jumps.extend(jump(&data)),
        // Into the register of verdicts, which has the number 0.
        b"lookup" => rule.leads_anywhere |= number(data.get(&3)) == Some(0),
        _ => {}
    }
}

fn is_rewriting(target: &[u8]) -> bool {
    target.starts_with(b"DNAT\0") || target.starts_with(b"REDIRECT\0") || target.starts_with(b"NETMAP\0")
}

/// The chain that an `immediate` leads to.
fn jump(data: &HashMap<u16, &[u8]>) -> Option<Vec<u8>> {
    const VALUE: u16 = 2;
    const VERDICT: u16 = 2;
    const CHAIN: u16 = 2;
    let value = by_type(data.get(&VALUE)?);
    let verdict = by_type(value.get(&VERDICT)?);
    Some(verdict.get(&CHAIN)?.to_vec())
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;

    fn message(parts: &[Vec<u8>]) -> Vec<u8> {
        [vec![2, 0, 0, 0], parts.concat()].concat()
    }

    fn chain(name: &str, hook: u32, kind: &[u8]) -> Vec<u8> {
        let hook = attribute(0x8000 | 4, &attribute(1, &hook.to_be_bytes()));
        message(&[attribute(1, b"nat\0"), attribute(3, name.as_bytes()), hook, attribute(7, kind)])
    }

    fn of_rule(chain: &str, expressions: &[(&[u8], Vec<u8>)]) -> (Chain, Rule) {
        let each = expressions
            .iter()
            .map(|(name, data)| attribute(0x8001, &[attribute(1, name), attribute(0x8002, data)].concat()));
        let list = attribute(0x8004, &each.collect::<Vec<_>>().concat());
        rule(&message(&[attribute(1, b"nat\0"), attribute(2, chain.as_bytes()), list])).expect("a rule")
    }

    fn jump_to(name: &str) -> (&'static [u8], Vec<u8>) {
        let verdict = attribute(0x8002, &attribute(2, name.as_bytes()));
        (b"immediate\0", [attribute(1, &0_u32.to_be_bytes()), attribute(0x8002, &verdict)].concat())
    }

    #[test]
    fn only_base_chains_that_translate_arrivals_count() {
        assert!(translating_base(&chain("pre", 0, b"nat\0")).is_some());
        assert!(translating_base(&chain("out", 3, b"nat\0")).is_none());
        assert!(translating_base(&chain("pre", 0, b"filter\0")).is_none());
        assert!(translating_base(&message(&[attribute(1, b"nat\0"), attribute(3, b"x")])).is_none());
        for length in 0..40 {
            let cut = chain("pre", 0, b"nat\0");
            assert!(translating_base(&cut[..length.min(cut.len())]).is_none(), "{length}");
        }
    }

    #[test]
    fn a_rewrite_counts_where_arrivals_reach_it() {
        let number = |value: u32| attribute(1, &value.to_be_bytes());
        let redirect: (&[u8], Vec<u8>) = (b"redir\0", Vec::new());
        let to: (&[u8], Vec<u8>) = (b"nat\0", number(1));
        let from: (&[u8], Vec<u8>) = (b"nat\0", number(0));
        let target = |name: &[u8]| (&b"target\0"[..], attribute(1, name));
        let map: (&[u8], Vec<u8>) = (b"lookup\0", attribute(3, &0_u32.to_be_bytes()));
        for (rules, expected) in [
            (vec![of_rule("pre", from_ref(&redirect))], true),
            (vec![of_rule("pre", from_ref(&to))], true),
            (vec![of_rule("pre", &[from])], false),
            (vec![of_rule("pre", &[target(b"DNAT\0")])], true),
            (vec![of_rule("pre", &[target(b"REDIRECT\0")])], true),
            (vec![of_rule("pre", &[target(b"RETURN\0")])], false),
            (vec![of_rule("out", from_ref(&redirect))], false),
            (vec![of_rule("pre", &[jump_to("own")]), of_rule("own", from_ref(&redirect))], true),
            (vec![of_rule("pre", &[jump_to("own")]), of_rule("other", from_ref(&redirect))], false),
            (vec![of_rule("pre", &[jump_to("pre")])], false),
            (vec![of_rule("pre", &[map]), of_rule("other", &[to])], true),
            (Vec::new(), false),
        ] {
            let mut all: HashMap<Chain, Vec<Rule>> = HashMap::new();
            for (chain, rule) in rules {
                all.entry(chain).or_default().push(rule);
            }
            let base = translating_base(&chain("pre", 0, b"nat\0")).expect("a base");
            assert_eq!(reaches_rewrite(vec![base], &all), expected, "{all:?}");
        }
    }
}

//! The tokens of the nodes of a standalone mesh. The file holds SHA-256 hashes, so that it reveals no token.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use aws_lc_rs::digest;
use tacit_core::yaml::{self, Mistakes, Value};

const HASH_BYTES: usize = 32;

/// Nodes by the hash of their token.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Tokens(HashMap<[u8; HASH_BYTES], String>);

impl Tokens {
    /// Parses the text of `file`.
    ///
    /// # Errors
    /// All [`Mistakes`] of the text.
    pub(super) fn parse(text: &str, file: &Path) -> Result<Self, Mistakes> {
        yaml::decode(text, file, |root| {
            let list = root.fields(&["agents"])?.required("agents", "a list of {node, tokenSha256}")?;
            let agents: Vec<_> =
                list.items()?.iter().map(|item| agent(item).map(|it| (it, item.clone()))).collect();
            let (mut by_hash, mut nodes) = (HashMap::new(), HashSet::new());
            for ((hash, node), item) in agents.into_iter().collect::<Option<Vec<_>>>()? {
                if !nodes.insert(node.clone()) {
                    item.refuse(format_args!("node {node} has two entries; keep one token for each node"));
                }
                if by_hash.insert(hash, node).is_some() {
                    item.refuse("this token belongs to two nodes; create one for each node");
                }
            }
            Some(Self(by_hash))
        })
    }

    /// Returns the node of `token`. The lookup uses hashes, so its timing reveals nothing about tokens.
    pub(super) fn node(&self, token: &str) -> Option<&str> {
        let hash = digest::digest(&digest::SHA256, token.as_bytes());
        self.0.get(hash.as_ref()).map(String::as_str)
    }
}

fn agent(value: &Value<'_>) -> Option<([u8; HASH_BYTES], String)> {
    let mut fields = value.fields(&["node", "tokenSha256"])?;
    let node = fields.required("node", "the node's name").and_then(|value| value.name().map(str::to_owned));
    let hash = fields.required("tokenSha256", "what `sha256sum` prints for the token without a line end");
    let hash = hash.and_then(|value| value.parse(hash_bytes));
    Some((hash?, node?))
}

fn hash_bytes(text: &str) -> Result<[u8; HASH_BYTES], &'static str> {
    const RULE: &str = "invalid SHA-256: expected 64 hexadecimal digits";
    if text.len() != 2 * HASH_BYTES || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(RULE);
    }
    let mut bytes = [0; HASH_BYTES];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).map_err(|_| RULE)?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hash of `abc` (FIPS 180-2 appendix B.1).
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn parse(text: &str) -> Result<Tokens, Vec<String>> {
        let mistakes = |m: Mistakes| m.list.iter().map(ToString::to_string).collect();
        Tokens::parse(text, Path::new("agents.yaml")).map_err(mistakes)
    }

    #[test]
    fn a_token_is_known_by_its_hash() {
        let tokens = parse(&format!("agents: [{{node: a, tokenSha256: \"{ABC}\"}}]")).expect("valid");
        assert_eq!(tokens.node("abc"), Some("a"));
        for other in ["", "abd", "abc\n", ABC] {
            assert_eq!(tokens.node(other), None, "{other:?}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let line = |node: &str, hash: &str| format!("  - {{node: {node}, tokenSha256: \"{hash}\"}}\n");
        for (text, problem) in [
            (String::new(), "mapping"),
            ("agents: []\nnodes: []\n".to_owned(), "unknown field"),
            (format!("agents:\n{}", line("a", "ba78")), "invalid SHA-256"),
            (format!("agents:\n{}", line("A", ABC)), "no Kubernetes name"),
            (format!("agents:\n{}{}", line("a", ABC), line("b", ABC)), "belongs to two nodes"),
            (
                format!("agents:\n{}{}", line("a", ABC), line("a", &ABC.replace('b', "c"))),
                "node a has two entries",
            ),
        ] {
            let problems = parse(&text).expect_err(&text);
            assert!(problems.iter().any(|found| found.contains(problem)), "{problem}: {problems:?}");
        }
    }
}

//! Entry points of the fuzz targets in `tests/fuzz`. The tests replay the committed corpus.
//!
//! Each entry point takes any bytes and panics when a promise is broken: a value that is decoded and encoded again is the
//! same, a parser returns the same result twice, and every mistake names its line. Nothing else calls this module.

use std::path::Path;

use crate::{
    directory::Directory,
    policy::{Origin, Policies, PolicyObject},
    spiffe::TrustDomain,
    wire::frame::{Control, FrameHeader, HEADER_BYTES, PAYLOAD_MAX_BYTES, header},
    yaml::Mistakes,
};

/// Longest text that is looked at, in bytes: files of an operator are shorter, and a fuzzer should not spend its time on
/// length alone.
const TEXT_MAX: usize = 1 << 16;

/// The frames of a stream, one after the other, until one is wrong or incomplete.
pub fn frames(mut input: &[u8]) {
    while let Ok(Some(FrameHeader { kind, payload_bytes })) = header(input) {
        assert!(payload_bytes <= PAYLOAD_MAX_BYTES, "{kind:?} of {payload_bytes} bytes");
        let Some((frame, rest)) = input.split_at_checked(HEADER_BYTES + payload_bytes) else { return };
        if let Ok(Some(control)) = Control::decode(kind, &frame[HEADER_BYTES..]) {
            assert_eq!(control.kind(), kind);
            let mut again = Vec::new();
            control.encode(&mut again);
            let read = Control::decode(kind, &again[HEADER_BYTES..]);
            assert_eq!(read, Ok(Some(control)), "{again:?}");
        }
        input = rest;
    }
}

/// A policy file, and the same text as one object.
pub fn policy(input: &[u8]) {
    let Some(text) = text(input) else { return };
    policy_object(text);
    let parse = || Policies::parse(text, Path::new("policy.yaml"), "istio-system");
    let parsed = parse();
    assert_eq!(parsed, parse());
    mistakes(text, parsed.err());
}

/// An object that does not parse counts all the same, and holds somebody to something.
fn policy_object(text: &str) {
    let origin = Origin { name: "object", namespace: None, kind: None };
    let (object, wrong) = PolicyObject::read(text, origin);
    assert_eq!(PolicyObject::read(text, origin), (object.clone(), wrong.clone()));
    if wrong.is_some() {
        assert_ne!(Policies::of(&[object], "istio-system"), Policies::empty("istio-system"), "{wrong:?}");
    }
    mistakes(text, wrong);
}

/// A directory file.
pub fn directory(input: &[u8]) {
    let Some(text) = text(input) else { return };
    let domain = TrustDomain::parse("cluster.local").unwrap_or_else(|error| panic!("{error}"));
    let parse = || Directory::parse(text, Path::new("directory.yaml"), &domain);
    let parsed = parse();
    match (&parsed, parse()) {
        (Ok(one), Ok(other)) => {
            assert_eq!(one.len(), other.len());
            assert!(
                one.iter().all(|workload| other.named(&workload.namespace, &workload.name) == Some(workload))
            );
            let services = |all: &Directory| all.services().cloned().collect::<Vec<_>>();
            assert!(services(one).iter().all(|s| other.service_named(&s.namespace, &s.name) == Some(s)));
            for workload in one.iter() {
                for address in &workload.addresses {
                    assert!(one.at(*address).is_some_and(|found| found == workload), "{address}");
                }
            }
        }
        (Err(one), Err(other)) => assert_eq!(*one, other),
        (one, _) => panic!("taken once only: {one:?}"),
    }
    mistakes(text, parsed.err());
}

fn text(input: &[u8]) -> Option<&str> {
    std::str::from_utf8(input).ok().filter(|text| text.len() <= TEXT_MAX)
}

/// A refusal says something, and about lines that there are.
fn mistakes(text: &str, mistakes: Option<Mistakes>) {
    let Some(mistakes) = mistakes else { return };
    assert!(!mistakes.list.is_empty());
    // To YAML a carriage return alone ends a line as well.
    let lines = text.split_terminator(['\n', '\r']).count() + 1;
    for mistake in &mistakes.list {
        assert!((1..=lines).contains(&mistake.line), "{mistake} of {lines} lines");
        assert!(!mistake.problem.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replay(target: &str, run: fn(&[u8])) {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus");
        tacit_testing::replay(&corpus.join(target), run);
    }

    #[test]
    fn the_corpus_of_frames_is_replayed() {
        replay("frames", frames);
    }

    #[test]
    fn the_corpus_of_policies_is_replayed() {
        replay("policy", policy);
    }

    #[test]
    fn the_corpus_of_directories_is_replayed() {
        replay("directory", directory);
    }
}

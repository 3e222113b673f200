//! Tests of revocation lists against chains that webpki has verified, and of files. Handshakes are tested in `tacit_tunnel`.

use std::time::{Duration, UNIX_EPOCH};

use rcgen::{CrlDistributionPoint, CrlIssuingDistributionPoint, CrlScope, Issuer, KeyPair, SerialNumber};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, UnixTime},
};
use tacit_testing::pki::{authority, revocation_list};
use webpki::{EndEntityCert, KeyUsage};

use super::*;
use crate::template::leaf_params;

const HOUR: Duration = Duration::from_secs(3600);

/// A certificate authority: a root, or below one.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

impl Authority {
    fn root(name: &str) -> Self {
        let (params, key) = authority(name, 0);
        let certificate = params.self_signed(&key).expect("signed").der().clone();
        Self { issuer: Issuer::new(params, key), certificate }
    }

    fn below(&self, name: &str, serial: u8) -> Self {
        let (params, key) = authority(name, serial);
        let certificate = params.signed_by(&key, &self.issuer).expect("signed").der().clone();
        Self { issuer: Issuer::new(params, key), certificate }
    }

    fn leaf(&self, serial: u8) -> CertificateDer<'static> {
        let uris = ["spiffe://cluster.local/ns/shop/sa/web".to_owned()];
        let mut params = leaf_params(&uris, SystemTime::now(), HOUR).expect("ascii");
        params.serial_number = Some(SerialNumber::from_slice(&[serial]));
        let key = KeyPair::generate().expect("a key");
        params.signed_by(&key, &self.issuer).expect("signed").der().clone()
    }

    /// A list in PEM that has expired `expired` ago, or else is current.
    fn list(&self, revoked: &[u8], expired: Option<Duration>) -> Vec<u8> {
        self.list_of(None, revoked, expired)
    }

    /// A current list of a part of the certificates: with an issuing distribution point.
    fn part(&self, scope: Option<CrlScope>, revoked: &[u8]) -> Vec<u8> {
        let uris = vec!["http://crl.example/1".to_owned()];
        let point = CrlIssuingDistributionPoint { distribution_point: CrlDistributionPoint { uris }, scope };
        self.list_of(Some(point), revoked, None)
    }

    fn list_of(
        &self,
        part: Option<CrlIssuingDistributionPoint>,
        revoked: &[u8],
        expired: Option<Duration>,
    ) -> Vec<u8> {
        let now = SystemTime::now();
        let next_update = expired.map_or(now + HOUR, |ago| now - ago);
        let serials: Vec<[u8; 1]> = revoked.iter().map(|serial| [*serial]).collect();
        revocation_list(&self.issuer, &serials, next_update, part).into_bytes()
    }
}

fn der_of(pem: &[u8]) -> Vec<u8> {
    CertificateRevocationListDer::from_pem_slice(pem).expect("a list").as_ref().to_vec()
}

/// Lists that can be replaced, and a chain that is checked against them.
struct Checked {
    lists: watch::Sender<Arc<RevocationLists>>,
    chain: CertificateChain,
}

impl Checked {
    /// `between` leads from the leaf to `root`.
    fn new(
        leaf: &CertificateDer<'static>,
        between: &[&Authority],
        root: &Authority,
        unknown: UnknownStatus,
    ) -> Self {
        let first = Authority::root("first").list(&[], None);
        let (lists, watched) = watch::channel(Arc::new(RevocationLists::parse(&first).expect("a list")));
        let check = RevocationCheck::Lists(Arc::new(Revocation::new(watched, unknown)));
        let mut roots = RootCertStore::empty();
        roots.add(root.certificate.clone()).expect("a root");
        let between: Vec<_> = between.iter().map(|authority| authority.certificate.clone()).collect();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
        let leaf = EndEntityCert::try_from(leaf).expect("a certificate");
        let path = leaf.verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &roots.roots,
            &between,
            UnixTime::since_unix_epoch(now),
            KeyUsage::client_auth(),
            None,
            None,
        );
        let chain = check.chain_of(&path.expect("a path"));
        Self { lists, chain }
    }

    /// Replaces the lists and returns the outcome for a new flow and whether a live one ends.
    fn with(&self, files: &[Vec<u8>]) -> (&'static str, bool) {
        let lists = RevocationLists::parse(&files.concat()).expect("lists");
        self.lists.send_replace(Arc::new(lists));
        let now = SystemTime::now();
        let outcome = match self.chain.check(now) {
            Ok(()) => "good",
            Err(Unaccepted { unknown: None, is_leaf: true, .. }) => "leaf revoked",
            Err(Unaccepted { unknown: None, is_leaf: false, .. }) => "intermediate revoked",
            Err(Unaccepted { unknown: Some(UnknownCause::NoList), .. }) => "no list",
            Err(Unaccepted { unknown: Some(UnknownCause::NotSigned), .. }) => "not signed",
            Err(Unaccepted { unknown: Some(UnknownCause::Partitioned), .. }) => "partitioned",
            Err(Unaccepted { unknown: Some(UnknownCause::Expired), .. }) => "expired",
        };
        (outcome, self.chain.check(now).is_err_and(|found| found.unknown.is_none()))
    }
}

#[test]
fn a_leaf_and_an_intermediate_can_be_revoked_each_by_its_own_issuer() {
    let root = Authority::root("root");
    let (upper, lower) = (root.below("upper", 7), root.below("other", 9));
    let lower_of_upper = upper.below("lower", 8);
    let leaf = lower_of_upper.leaf(42);
    let checked = Checked::new(&leaf, &[&lower_of_upper, &upper], &root, UnknownStatus::Deny);
    let by = |of_lower: &[u8], of_upper: &[u8], of_root: &[u8]| {
        let lists = [
            root.list(of_root, None),
            upper.list(of_upper, None),
            lower_of_upper.list(of_lower, None),
            lower.list(&[42, 8, 7], None),
        ];
        checked.with(&lists)
    };
    assert_eq!(by(&[], &[], &[]), ("good", false));
    assert_eq!(by(&[41, 42], &[], &[]), ("leaf revoked", true));
    assert_eq!(by(&[], &[8], &[]), ("intermediate revoked", true));
    assert_eq!(by(&[], &[], &[7]), ("intermediate revoked", true));
    // The serial numbers of another issuer's certificates.
    assert_eq!(by(&[8, 7], &[42, 7], &[42, 8, 9]), ("good", false));
}

#[test]
fn a_list_counts_only_if_the_issuers_key_has_signed_it() {
    let (root, namesake) = (Authority::root("root"), Authority::root("root"));
    let leaf = root.leaf(42);
    let strict = Checked::new(&leaf, &[], &root, UnknownStatus::Deny);
    assert_eq!(strict.with(&[namesake.list(&[42], None)]), ("not signed", false));
    // A root that was replaced by one of the same name, in either order.
    let (own, other) = (root.list(&[], None), namesake.list(&[42], None));
    assert_eq!(strict.with(&[own.clone(), other.clone()]), ("good", false));
    assert_eq!(strict.with(&[other, own]), ("good", false));
    let lists = [namesake.list(&[], None), root.list(&[42], None)];
    assert_eq!(strict.with(&lists), ("leaf revoked", true));

    let mut forged = der_of(&root.list(&[], None));
    let last = forged.len() - 1;
    forged[last] ^= 1;
    assert_eq!(strict.with(&[forged]), ("not signed", false));
}

#[test]
fn an_issuer_without_a_current_list_is_denied_unless_allowed() {
    let root = Authority::root("root");
    let between = root.below("between", 7);
    let leaf = between.leaf(42);
    let (other, hour) = (Authority::root("other"), Some(HOUR));
    for (lists, denied, allowed) in [
        (vec![other.list(&[42, 7], None)], ("no list", false), ("good", false)),
        (vec![root.list(&[], None)], ("no list", false), ("good", false)),
        (vec![between.list(&[], None)], ("no list", false), ("good", false)),
        (vec![root.list(&[], None), between.list(&[], hour)], ("expired", false), ("good", false)),
        (vec![root.list(&[], hour), between.list(&[], None)], ("expired", false), ("good", false)),
        // What an expired list has revoked stays so, whatever is unknown beside.
        (vec![between.list(&[42], hour)], ("leaf revoked", true), ("leaf revoked", true)),
        (vec![root.list(&[7], hour)], ("intermediate revoked", true), ("intermediate revoked", true)),
        // The newest list of an issuer counts, and all that any of them has revoked.
        (
            vec![root.list(&[], None), between.list(&[], hour), between.list(&[], None)],
            ("good", false),
            ("good", false),
        ),
        (
            vec![root.list(&[], None), between.list(&[42], hour), between.list(&[], None)],
            ("leaf revoked", true),
            ("leaf revoked", true),
        ),
    ] {
        for (unknown, expected) in [(UnknownStatus::Deny, denied), (UnknownStatus::Allow, allowed)] {
            let checked = Checked::new(&leaf, &[&between], &root, unknown);
            assert_eq!(checked.with(&lists), expected, "{unknown:?}");
        }
    }
}

#[test]
fn a_list_of_a_part_of_the_certificates_revokes_and_makes_none_good() {
    let root = Authority::root("root");
    let between = root.below("between", 7);
    let leaf = between.leaf(42);
    let checked = Checked::new(&leaf, &[&between], &root, UnknownStatus::Deny);
    let whole = || vec![root.list(&[], None), between.list(&[], None)];
    for scope in [None, Some(CrlScope::UserCertsOnly), Some(CrlScope::CaCertsOnly)] {
        let (leaves, authorities) = (between.part(scope, &[]), root.part(scope, &[]));
        for (lists, expected) in [
            (vec![root.list(&[], None), leaves.clone()], ("partitioned", false)),
            (vec![authorities.clone(), between.list(&[], None)], ("partitioned", false)),
            // A list of all certificates that has expired is not made current by a part.
            (vec![root.list(&[], None), between.list(&[], Some(HOUR)), leaves.clone()], ("expired", false)),
            ([whole(), vec![leaves, authorities]].concat(), ("good", false)),
            ([whole(), vec![between.part(scope, &[42])]].concat(), ("leaf revoked", true)),
            ([whole(), vec![root.part(scope, &[7])]].concat(), ("intermediate revoked", true)),
        ] {
            assert_eq!(checked.with(&lists), expected, "{scope:?}");
        }
    }
}

#[test]
fn without_lists_nothing_is_checked() {
    assert!(CertificateChain::default().is_unchecked());
    assert_eq!(CertificateChain::default().check(SystemTime::now()), Ok(()));
}

#[test]
fn lists_are_read_as_pem_and_as_der() {
    let (one, two) = (Authority::root("one"), Authority::root("two"));
    let (first, second) = (one.list(&[1, 2, 3], None), two.list(&[], None));
    let text = b"Certificate Revocation List (CRL):\n".to_vec();
    for file in [
        [text, first.clone(), second.clone()].concat(),
        [der_of(&first), der_of(&second)].concat(),
        [pem_of_certificate(&one), first, second].concat(),
    ] {
        let states = RevocationLists::parse(&file).expect("two lists").states();
        let states: Vec<_> = states.iter().map(|list| (list.issuer.as_str(), list.revoked)).collect();
        assert_eq!(states, [("CN=one", 3), ("CN=two", 0)]);
    }
}

fn pem_of_certificate(authority: &Authority) -> Vec<u8> {
    pem::encode(&pem::Pem::new("CERTIFICATE", authority.certificate.to_vec())).into_bytes()
}

#[test]
fn a_long_list_is_read() {
    let one = Authority::root("one");
    // Each entry has at least 20 bytes, so that the list has more than 64 KiB.
    let serials: Vec<u8> = (0..4000u32).map(|at| u8::try_from(at % 128).expect("small")).collect();
    let state = RevocationLists::parse(&one.list(&serials, None)).expect("a list").states().remove(0);
    assert_eq!(state.revoked, 4000);
}

#[test]
fn a_file_with_anything_else_is_refused_whole() {
    let one = Authority::root("one");
    let good = one.list(&[1], None);
    let der = der_of(&good);
    let parse = |file: &[u8]| RevocationLists::parse(file).map(|lists| lists.states().len());
    assert_eq!(parse(&good), Ok(1));
    assert_eq!(parse(b""), Err(ListError::Empty));
    assert_eq!(parse(&pem_of_certificate(&one)), Err(ListError::Empty));
    let many: Vec<u8> = std::iter::repeat_n(der.clone(), LISTS_MAX + 1).flatten().collect();
    assert_eq!(parse(&many), Err(ListError::Long));
    assert!(matches!(parse(b"no list at all"), Err(ListError::List { number: 1, .. })));
    let second =
        [good.clone(), b"-----BEGIN X509 CRL-----\nMAA=\n-----END X509 CRL-----\n".to_vec()].concat();
    assert!(matches!(parse(&second), Err(ListError::List { number: 2, .. })));
    let broken = [good, b"-----BEGIN X509 CRL-----\n!\n-----END X509 CRL-----\n".to_vec()].concat();
    assert!(matches!(parse(&broken), Err(ListError::Pem(_))));
    for cut in 1..der.len() {
        assert!(parse(&der[..cut]).is_err(), "cut to {cut} bytes");
    }
    // The extension with the number of the list becomes that of a delta list.
    let number = der.windows(3).position(|oid| oid == [0x55, 0x1d, 0x14]).expect("a number");
    let mut delta = der;
    delta[number + 2] = 0x1b;
    let error = parse(&delta).expect_err("a delta list");
    assert!(error.to_string().contains("Delta"), "{error}");
}

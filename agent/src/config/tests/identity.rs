//! Tests of what concerns identities: issuers, trust domains, revocation lists.

use tacit_identity::{revocation::UnknownStatus, spire::SpireApi};

use super::*;

#[test]
fn trust_domains_beside_the_own_one_are_named_once() {
    let with = |text: &str| format!("{MINIMAL}{text}\n");
    let domain = |name| TrustDomain::parse(name).expect("valid");
    let config = parse(&with(
        "trustDomainAliases: [old.example]\nfederation: [{trustDomain: partner.example, rootFile: partner.pem}]",
    ))
    .expect("valid");
    assert_eq!(config.trust_domain_aliases, [domain("old.example")]);
    let root_file = "/etc/tacit/conf/partner.pem".into();
    assert_eq!(config.federation, [FederationConfig { trust_domain: domain("partner.example"), root_file }]);
    for (text, problem) in [
        ("trustDomainAliases: [cluster.local]", "cluster.local is trustDomain"),
        ("trustDomainAliases: [old.example, old.example]", "named twice"),
        ("trustDomainAliases: [Old]", "trustDomainAliases[0]"),
        ("federation: [{trustDomain: cluster.local, rootFile: a}]", "cluster.local is trustDomain"),
        ("federation: [{trustDomain: a.example}]", "federation[0].rootFile"),
        ("federation: [{rootFile: a}]", "federation[0].trustDomain"),
        (
            "trustDomainAliases: [a.example]\nfederation: [{trustDomain: a.example, rootFile: a}]",
            "named twice",
        ),
        (
            "federation: [{trustDomain: a.example, rootFile: a}, {trustDomain: a.example, rootFile: b}]",
            "named twice",
        ),
    ] {
        let problems = problems(&with(text));
        assert!(problems.iter().any(|found| found.contains(problem)), "{text}: {problems:?}");
    }
    let own = with("federation: [{trustDomain: cluster.local, rootFile: a}]")
        .replace("trustDomain: cluster.local\n", "trustDomain: prod.example\n");
    let problems = problems(&own);
    assert!(problems.iter().any(|found| found.contains("stands for the own trust domain")), "{problems:?}");
}

#[test]
fn revocation_lists_are_a_file_and_deny_what_they_do_not_know() {
    let with = |crl: &str| format!("{MINIMAL}crl: {crl}\n");
    let read = |crl: &str| parse(&with(crl)).expect("valid").crl.expect("lists");
    let file = PathBuf::from("/etc/tacit/conf/crl.pem");
    assert_eq!(read("{file: crl.pem}"), CrlConfig { file: file.clone(), unknown: UnknownStatus::Deny });
    let allow = read("{file: crl.pem, unknownStatus: ALLOW}");
    assert_eq!(allow, CrlConfig { file, unknown: UnknownStatus::Allow });
    for (crl, field) in
        [("{}", "crl.file"), ("{file: a, unknownStatus: MAYBE}", "crl.unknownStatus"), ("{files: a}", "crl")]
    {
        let problems = problems(&with(crl));
        assert!(problems.iter().any(|problem| problem.contains(field)), "{problems:?}");
    }
}

#[test]
fn an_authority_is_named_by_address_root_and_token() {
    let issuer = |text: &str| {
        parse(&MINIMAL.replace("{embedded: {directory: issuer}}", text)).map(|config| config.issuer)
    };
    let minimal =
        "{istio: {address: \"istiod.istio-system.svc:15012\", rootFile: roots.pem, tokenFile: /run/token}}";
    let expected = IstioConfig {
        address: "istiod.istio-system.svc:15012".to_owned(),
        server_name: "istiod.istio-system.svc".to_owned(),
        root_file: "/etc/tacit/conf/roots.pem".into(),
        token_file: "/run/token".into(),
        cluster_id: None,
        lifetime: tacit_identity::issuer::LEAF_LIFETIME,
    };
    assert_eq!(issuer(minimal), Ok(IssuerConfig::Istio(expected.clone(), None)));
    let with_roots = minimal
        .replace("tokenFile", "rootConfigMap: {namespace: mesh, name: roots, key: root.pem}, tokenFile");
    let key =
        ConfigMapKey { namespace: "mesh".to_owned(), name: "roots".to_owned(), key: "root.pem".to_owned() };
    assert_eq!(issuer(&with_roots), Ok(IssuerConfig::Istio(expected, Some(key))));
    let refused = |text: &str| problems(&MINIMAL.replace("{embedded: {directory: issuer}}", text));
    assert!(refused("{}")[0].contains("not exactly one issuer"));
    assert!(refused("{embedded: {directory: a}, istio: {}}")[0].contains("not exactly one issuer"));
    let missing = refused("{istio: {address: \"istiod\"}}");
    for problem in ["address: \"istiod\": no host with a port", "rootFile: missing", "tokenFile: missing"] {
        assert!(missing.iter().any(|found| found.contains(problem)), "{problem}: {missing:?}");
    }
}

#[test]
fn a_spire_agent_is_named_by_its_socket() {
    let issuer = |text: &str| {
        parse(&MINIMAL.replace("{embedded: {directory: issuer}}", text)).map(|config| config.issuer)
    };
    let spire = |socket: &str, api| Ok(IssuerConfig::Spire(SpireConfig { socket: socket.into(), api }));
    assert_eq!(
        issuer("{spire: {socket: /run/spire/admin.sock}}"),
        spire("/run/spire/admin.sock", SpireApi::Delegated)
    );
    assert_eq!(
        issuer("{spire: {socket: w.sock, api: workload}}"),
        spire("/etc/tacit/conf/w.sock", SpireApi::Workload)
    );
    let refused = |text: &str| problems(&MINIMAL.replace("{embedded: {directory: issuer}}", text));
    for (text, problem) in [
        ("{spire: {}}".to_owned(), "issuer.spire.socket: missing"),
        (format!("{{spire: {{socket: /{}}}}}", "x".repeat(107)), "longer than 107 bytes"),
        ("{spire: {socket: a, api: admin}}".to_owned(), "no API of SPIRE"),
        ("{spire: {socket: a, path: b}}".to_owned(), "path"),
        ("{spire: {socket: a}, embedded: {directory: a}}".to_owned(), "not exactly one issuer"),
    ] {
        let found = refused(&text);
        assert!(found[0].contains(problem), "{found:?}");
    }
}

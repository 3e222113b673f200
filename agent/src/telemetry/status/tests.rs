//! Tests of the status as data, and a status with something in every part for the tests around.

use tacit_core::shares::Bounds;

use super::*;

#[test]
fn a_status_survives_json() {
    let status = sample();
    let json = serde_json::to_string_pretty(&status).expect("serialisable");
    assert_eq!(serde_json::from_str::<Status>(&json).expect("readable"), status);
    insta::with_settings!({ omit_expression => true }, { insta::assert_snapshot!("json", json) });
}

#[test]
fn an_agent_is_ready_when_it_takes_flows_though_a_pod_may_wait() {
    let mut status = sample();
    assert!(status.pods.iter().any(|pod| matches!(pod.state, PodState::Waiting(_))));
    assert!(status.unready().is_empty());
    for (state, reason) in
        [(AgentState::Starting, "agent is starting"), (AgentState::Draining, "agent is draining")]
    {
        status.state = state;
        assert_eq!(status.unready(), [reason]);
    }
}

#[test]
fn an_agent_that_waits_for_a_source_says_for_what() {
    let mut status = sample();
    status.state = AgentState::Starting;
    assert_eq!(status.unready(), ["agent is starting"], "what is in force is no reason");
    status.sources[0].loads = 0;
    assert_eq!(status.unready(), ["agent is starting", "line 3: mode: STRICTER is no mode"]);
    let text = render(&status, false);
    assert!(text.contains("policy.yaml not read since 61 s, no pod is served before it was:"), "{text}");
}

pub(in crate::telemetry) fn sample() -> Status {
    Status {
        version: "0.1.0".to_owned(),
        node: "a".to_owned(),
        trust_domain: "cluster.local".to_owned(),
        pid: 4711,
        uptime_seconds: 3700,
        state: AgentState::Ready,
        pods: vec![
            pod("web", PodState::Enrolled),
            pod("api", PodState::Waiting("no certificate yet".to_owned())),
        ],
        programs: vec![ProgramStatus {
            name: "connect4".to_owned(),
            attached_to: "/cgroup/pods".to_owned(),
            id: 12,
            pinned: Some("/bpf/tacit/connect4".to_owned()),
        }],
        connect_hooks: [(9, "cil_sock4_connect", false), (12, "connect4", true), (13, "late", false)]
            .map(|(id, name, is_tacit)| HookProgramStatus {
                hook: "connect4".to_owned(),
                id,
                name: name.to_owned(),
                is_tacit,
            })
            .to_vec(),
        kernel: vec![CounterStatus {
            name: "deny_stale_agent".to_owned(),
            help: "Refused in STRICT because the agent is gone".to_owned(),
            value: 3,
        }],
        exceptions: vec![ExceptionStatus {
            name: "allow_clear".to_owned(),
            hook: "egress".to_owned(),
            help: "To or from a destination of allowClear".to_owned(),
            value: 9,
        }],
        guard: GuardStatus {
            resets_at_enrolment: 2,
            drops: vec![DropStatus {
                pod: "shop/web".to_owned(),
                remote: [10, 77, 2, 9].into(),
                protocol: 17,
                reason: "guard_udp".to_owned(),
                packets: 41,
            }],
        },
        node_state: NodeStateStatus {
            folder: "/var/lib/tacit".to_owned(),
            origin: "the kept state".to_owned(),
            read_error: None,
            write_error: Some("cannot create /var/lib/tacit/x: no space".to_owned()),
        },
        cni: Some(CniStatus {
            is_enabled: true,
            configuration: None,
            error: Some("cannot read /etc/cni/net.d: denied".to_owned()),
        }),
        announced: Some(AnnounceStatus {
            pods: 3,
            pending: 1,
            patches: 5,
            failures: 7,
            last_error: Some("pod shop/web: pods \"web\" is forbidden".to_owned()),
        }),
        unnamed: UnnamedStatus {
            held: 2,
            left_alone: 1,
            limit_seconds: 60,
            example: Some("/cgroup/pods/other".to_owned()),
        },
        mesh: MeshStatus {
            configured: 1,
            detected: 2,
            ranges: ["10.77.0.0/16", "10.96.0.10/31"].map(str::to_owned).to_vec(),
        },
        uncovered: UncoveredStatus {
            pods: 0,
            services: 1,
            example: Some("service shop/web (10.96.0.1)".to_owned()),
        },
        nodes: NodesStatus {
            addresses_not_applied: None,
            ports_not_applied: Some(
                "map NODE_SERVICES: it holds 16384 entries, and 3 more are wanted".to_owned(),
            ),
        },
        issuer: IssuerStatus {
            address: "authority.tacit:15012".to_owned(),
            last_answer: Some(timestamp("2026-01-01T03:04:05Z")),
            clock_ahead_ms: Some(-7500),
        },
        certificates: vec![
            certificate("web", 72_000, None),
            certificate("api", 600, Some("issuer is\u{1b}[31m away")),
        ],
        revocation_lists: vec![
            revocation_list("CN=root", 2_592_000, Some(true)),
            revocation_list("CN=between", -60, None),
            revocation_list("CN=old", 600, Some(false)),
        ],
        sources: vec![SourceStatus {
            kind: SourceKind::Policy,
            file: "policy.yaml".to_owned(),
            loaded_at: timestamp("2026-01-01T03:04:05Z"),
            loads: 2,
            refusals: 1,
            last_error: Some("line 3: mode: STRICTER is no mode".to_owned()),
            stale_seconds: 61,
            unreadable: vec!["AuthorizationPolicy shop/p: spec: is a list".to_owned()],
            connection: Some(ConnectionStatus {
                connected_since: Some(timestamp("2026-01-01T03:04:05Z")),
                connections: 2,
                resources: vec![ResourcesStatus {
                    kind: "Address".to_owned(),
                    count: 12,
                    services: 3,
                    version: "2026-01-01T03:04:05Z/7".to_owned(),
                    nonce: "5f1e".to_owned(),
                }],
                rejections: 1,
                last_rejection: Some(RejectionStatus {
                    at: timestamp("2026-01-01T03:04:05Z"),
                    error: "shop/p: scope is 7".to_owned(),
                }),
            }),
        }],
        flows: FlowsStatus { live: 1200, opening: 2, list: vec![flow()] },
        pool: PoolStatus { idle_sessions: 5 },
        shares: vec![share("connections", Some("shop/web"), 64), share("handshakes", None, 0)],
    }
}

fn revocation_list(issuer: &str, seconds_left: i64, is_signed: Option<bool>) -> RevocationListStatus {
    RevocationListStatus {
        issuer: issuer.to_owned(),
        revoked: 3,
        this_update: timestamp("2026-01-01T00:00:00Z"),
        next_update: timestamp("2026-01-31T00:00:00Z"),
        seconds_left,
        is_signed,
    }
}

fn share(resource: &'static str, fullest: Option<&str>, used: u64) -> ShareStatus {
    let bounds = Bounds { total: 90, each: 64 };
    let fullest = fullest.map(|holder| (holder.to_owned(), used));
    ShareStatus::of(ShareUse { resource, bounds, used, fullest, refused: 7 })
}

fn pod(name: &str, state: PodState) -> PodStatus {
    PodStatus {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        cgroup: format!("shop_{name}"),
        addresses: vec![[10, 77, 1, 2].into()],
        identity: format!("spiffe://cluster.local/ns/shop/sa/{name}"),
        mode: "strict".to_owned(),
        port_modes: BTreeMap::from([(9090, "permissive".to_owned())]),
        policies: vec!["shop/allow".to_owned()],
        in_clear: "nothing".to_owned(),
        guarded_links: vec!["pod2 (tcx)".to_owned()],
        policy_not_applied: None,
        rewrites_arrivals: false,
        raised_by_minimum: name == "api",
        state,
        flows: 1,
    }
}

fn certificate(name: &str, seconds_left: i64, last_error: Option<&str>) -> CertificateStatus {
    CertificateStatus {
        identity: format!("spiffe://cluster.local/ns/shop/sa/{name}"),
        serial: "0a1b".to_owned(),
        not_before: timestamp("2026-01-01T03:04:05Z"),
        not_after: timestamp("2026-01-02T03:04:05Z"),
        seconds_left,
        last_renewal: Some(timestamp("2026-01-01T03:04:05Z")),
        renewal_failures: u64::from(last_error.is_some()),
        last_error: last_error.map(str::to_owned),
    }
}

fn flow() -> FlowStatus {
    FlowStatus {
        reporter: "source".to_owned(),
        source: PartyStatus {
            address: ([10, 77, 1, 2], 40_000).into(),
            workload: Some("shop/web".to_owned()),
            identity: Some("spiffe://cluster.local/ns/shop/sa/web".to_owned()),
        },
        destination: PartyStatus { address: ([10, 77, 2, 3], 80).into(), workload: None, identity: None },
        security: "plaintext".to_owned(),
        key_exchange: None,
        wire: None,
        trace: None,
        age_seconds: 75,
        sent_bytes: 1536,
        received_bytes: 12,
    }
}

fn timestamp(text: &str) -> Timestamp {
    text.parse().expect("valid")
}

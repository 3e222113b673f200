//! Clients of an alias and of a federated trust domain, with certificates of either root, and the policies that they meet.

use crate::{
    certificates::{Credentials, FederatedRoot, Leaf, Roots},
    fake::{FlowRequest, Response, VALID_OPTIONS, request_flow},
};
use anyhow::{Context, Result, ensure};
use std::{fs, net::SocketAddr};
use tacit_tests::{Mesh, Plan, Server, fresh_port, observe};
use tacit_topology::TUNNEL_PORT;

const OWN: &str = "cluster.local";
const ALIAS: &str = "old.example";
const PARTNER: &str = "partner.example";

/// A mesh with an alias and a federated trust domain, and the roots of both.
struct Federation {
    mesh: Mesh,
    roots: Roots,
    partner: FederatedRoot,
}

impl Federation {
    fn new(tag: &str) -> Result<Self> {
        let partner = FederatedRoot::new(PARTNER)?;
        let plan = Plan::new(tag).pod("b", "shop", "web").outside("a", "shop", "attacker").config(&format!(
            "trustDomainAliases: [{ALIAS}]\nfederation: [{{trustDomain: {PARTNER}, rootFile: partner.pem}}]\n"
        ));
        let mesh = plan.with_directories(|node, mesh| {
            let file = mesh.topology().node(node)?.files()?.join("partner.pem");
            fs::write(&file, partner.pem()).with_context(|| format!("write {}", file.display()))?;
            Ok(mesh.directory())
        })?;
        let roots = Roots::open(mesh.agent("b")?.files().issuer())?;
        Ok(Self { mesh, roots, partner })
    }

    fn by_mesh(&self, domain: &str) -> Result<Credentials> {
        self.roots.sign(&leaf(domain))
    }

    fn by_partner(&self, domain: &str) -> Result<Credentials> {
        self.partner.sign(&leaf(domain))
    }

    /// Asks for a flow to an application of `web`.
    fn ask(&self, credentials: Credentials) -> Result<Response> {
        let (web, attacker) = (self.mesh.pod("web")?, self.mesh.pod("attacker")?);
        let server = Server::start(web, SocketAddr::new(web.ipv4().into(), fresh_port()), &["echo"])?;
        let client = SocketAddr::new(attacker.ipv4().into(), 4000);
        let request = FlowRequest { destination: server.address(), client };
        let at = SocketAddr::new(web.ipv4().into(), TUNNEL_PORT);
        Ok(request_flow(attacker.netns(), at, Some(credentials), VALID_OPTIONS, request)?.1)
    }

    fn is_accepted(&self, credentials: Credentials) -> Result<()> {
        let response = self.ask(credentials)?;
        ensure!(response == Response::Accepted, "{response:?}");
        Ok(())
    }

    /// Checks that the handshake fails.
    fn is_refused(&self, credentials: Credentials, reason: &str) -> Result<()> {
        let agent = self.mesh.agent("b")?;
        let before = observe::refused(agent, reason)?;
        let response = self.ask(credentials)?;
        ensure!(matches!(response, Response::Ended(_)), "{response:?}");
        observe::wait_refused(agent, reason, before, &self.mesh.pod("attacker")?.ipv4().to_string())
    }

    /// Checks that policy denies the flow.
    fn is_denied(&self, credentials: Credentials) -> Result<()> {
        let response = self.ask(credentials)?;
        ensure!(matches!(response, Response::Denied(_)), "{response:?}");
        Ok(())
    }

    /// Has `web` admit only what this source of a rule matches.
    fn allow(&self, name: &str, source: &str) -> Result<()> {
        let agent = self.mesh.agent("b")?;
        agent.files().set_policy(&format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{rules: [{{from: [{{source: {{{source}}}}}]}}]}}\n"
        ))?;
        let name = format!("shop/{name}");
        observe::wait_status(agent, "the policy", |status| {
            let pod = status["pods"].as_array()?.iter().find(|pod| pod["name"] == "web")?;
            pod["policies"].as_array()?.iter().any(|policy| *policy == *name).then_some(())
        })
    }
}

fn leaf(domain: &str) -> Leaf {
    Leaf::valid(&format!("spiffe://{domain}/ns/shop/sa/client"))
}

#[test]
#[ignore = "needs root"]
fn each_root_vouches_for_its_own_trust_domain_alone() -> Result<()> {
    let federation = Federation::new("feder")?;
    for domain in [OWN, ALIAS] {
        federation.is_accepted(federation.by_mesh(domain)?).context(domain)?;
        federation.is_refused(federation.by_partner(domain)?, "unknown_issuer").context(domain)?;
    }
    federation.is_accepted(federation.by_partner(PARTNER)?)?;
    federation.is_refused(federation.by_mesh(PARTNER)?, "unknown_issuer")?;
    federation.is_refused(federation.by_mesh("other.example")?, "other_trust_domain")?;
    federation.is_refused(federation.by_partner("other.example")?, "unknown_issuer")?;
    // Another root takes the place of the partner's.
    let agent = federation.mesh.agent("b")?;
    let next = FederatedRoot::new(PARTNER)?;
    agent.files().set_partner(next.pem())?;
    observe::wait_status(agent, "the other root", |status| {
        let sources = status["sources"].as_array()?;
        let roots = sources.iter().find(|source| source["kind"] == "federation")?;
        (roots["loads"] == 2).then_some(())
    })?;
    federation.is_refused(federation.by_partner(PARTNER)?, "unknown_issuer")?;
    federation.is_accepted(next.sign(&leaf(PARTNER))?)?;
    federation.is_accepted(federation.by_mesh(OWN)?)
}

#[test]
#[ignore = "needs root"]
fn policies_tell_trust_domains_apart_and_take_an_alias_for_the_own_one() -> Result<()> {
    let federation = Federation::new("fpolicy")?;
    let own = [(OWN, true), (ALIAS, true), (PARTNER, false)];
    let partner = [(OWN, false), (ALIAS, false), (PARTNER, true)];
    for (name, source, expected) in [
        ("own", "principals: [cluster.local/ns/shop/sa/client]", own),
        ("alias", "principals: [old.example/ns/shop/sa/client]", own),
        ("partner", "principals: [partner.example/ns/shop/sa/client]", partner),
        ("domain", "trustDomains: [partner.example]", partner),
        ("others", "notTrustDomains: [partner.example]", own),
        ("namespace", "namespaces: [shop]", own),
    ] {
        federation.allow(name, source)?;
        for (domain, is_allowed) in expected {
            let credentials = if domain == PARTNER {
                federation.by_partner(domain)?
            } else {
                federation.by_mesh(domain)?
            };
            let checked = match is_allowed {
                true => federation.is_accepted(credentials),
                false => federation.is_denied(credentials),
            };
            checked.with_context(|| format!("{domain} by {source}"))?;
        }
    }
    Ok(())
}

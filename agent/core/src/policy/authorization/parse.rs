//! The `spec` of an AuthorizationPolicy, field by field as Istio's API defines it.
//!
//! Refused are unknown fields and what Istio's own validation refuses: empty lists and texts, addresses and ports that
//! are none, unknown attributes, service accounts beside principals or namespaces, DENY without rules. An empty list of values is refused
//! too, where Istio reads it as "any". What is accepted but does less, or more, than its author may think becomes a
//! note.

use std::fmt::Display;

use ipnet::IpNet;

use super::{
    Action, Attachment, AuthorizationPolicy, Enforcement,
    matching::{Pattern, ServiceAccount, ValueMatch, ValueSet, block},
    rule::{Applicability, Condition, OperationMatch, Rule, SourceMatch},
};
use crate::{
    policy::metadata::ObjectMeta,
    yaml::{Fields, Value},
};

const SPEC_FIELDS: [&str; 6] = ["selector", "targetRef", "targetRefs", "action", "provider", "rules"];
const ACTIONS: [(&str, ParsedAction); 4] = [
    ("ALLOW", ParsedAction::Allow),
    ("DENY", ParsedAction::Deny),
    ("AUDIT", ParsedAction::Audit),
    ("CUSTOM", ParsedAction::Custom),
];
const SOURCE_FIELDS: [&str; 14] = [
    "principals",
    "notPrincipals",
    "namespaces",
    "notNamespaces",
    "serviceAccounts",
    "notServiceAccounts",
    "trustDomains",
    "notTrustDomains",
    "ipBlocks",
    "notIpBlocks",
    "requestPrincipals",
    "notRequestPrincipals",
    "remoteIpBlocks",
    "notRemoteIpBlocks",
];
const SOURCE_HTTP: [&str; 4] =
    ["requestPrincipals", "notRequestPrincipals", "remoteIpBlocks", "notRemoteIpBlocks"];
const OPERATION_FIELDS: [&str; 8] =
    ["ports", "notPorts", "hosts", "notHosts", "methods", "notMethods", "paths", "notPaths"];
const OPERATION_HTTP: [&str; 6] = ["hosts", "notHosts", "methods", "notMethods", "paths", "notPaths"];
/// Attributes of `when` that need HTTP or TLS of the application; those with `[` take a name in brackets.
const HTTP_ATTRIBUTES: [&str; 8] = [
    "request.headers[",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "request.auth.claims[",
    "remote.ip",
    "connection.sni",
    "experimental.envoy.filters.",
];

/// Maximum number of notes on one policy, and of fields in one note. A policy may have thousands of rules.
const NOTES_MAX: usize = 5;

#[derive(Clone, Copy, PartialEq, Eq)]
enum ParsedAction {
    Allow,
    Deny,
    Audit,
    Custom,
}

/// One policy as read.
pub(in crate::policy) struct AuthorizationSpec {
    pub(in crate::policy) policy: AuthorizationPolicy,
    pub(in crate::policy) attachment: Attachment,
    pub(in crate::policy) notes: Vec<String>,
}

/// Reads `spec`; `None` (and mistakes) when something in it is wrong.
pub(in crate::policy) fn spec(
    header: &ObjectMeta<'_>,
    spec: Option<&Value<'_>>,
) -> Option<AuthorizationSpec> {
    let mut reader = RuleParser {
        namespace: header.namespace,
        action: ParsedAction::Allow,
        notes: Vec::new(),
        more_notes: 0,
    };
    let enforcement = if header.dry_run { Enforcement::DryRun } else { Enforcement::Enforced };
    let id = format!("{}/{}", header.namespace, header.name);
    let policy = |action, rules| AuthorizationPolicy::new(id.clone(), action, enforcement, rules);
    let Some(spec) = spec else {
        let policy = policy(Action::Allow, Vec::new());
        return Some(AuthorizationSpec { policy, attachment: Attachment::Workloads, notes: Vec::new() });
    };
    let mut fields = spec.fields(&SPEC_FIELDS)?;
    let (selector, targets) = (fields.optional("selector"), targets(&mut fields));
    if let (Some(_), Some(targets)) = (&selector, &targets) {
        targets.refuse("a policy has a selector or targets, not both: remove one of them");
    }
    let action = fields.optional("action").map_or(Some(ParsedAction::Allow), |value| value.choice(&ACTIONS));
    reader.action = action.unwrap_or(ParsedAction::Allow);
    provider(&mut fields, reader.action, spec);
    if targets.is_some() {
        // Its rules are another proxy's to read.
        reader.note("its targetRefs belong to a waypoint or gateway: it holds for no workload here");
        let policy = policy(Action::Audit, Vec::new());
        return Some(AuthorizationSpec {
            policy,
            attachment: Attachment::Elsewhere,
            notes: reader.finish(&id),
        });
    }
    let rules = fields.optional("rules").map_or(Some(Vec::new()), |value| reader.rules(&value));
    let action = match action? {
        ParsedAction::Allow => Action::Allow,
        ParsedAction::Deny => Action::Deny,
        ParsedAction::Audit => Action::Audit,
        ParsedAction::Custom => Action::Custom,
    };
    let policy = policy(action, rules?);
    reader.remark(&policy, spec);
    Some(AuthorizationSpec { policy, attachment: Attachment::Workloads, notes: reader.finish(&id) })
}

fn targets<'a>(fields: &mut Fields<'a>) -> Option<Value<'a>> {
    let one = fields.optional("targetRef");
    let many = fields.optional("targetRefs");
    // An empty list targets nothing: the policy holds for its namespace.
    many.filter(|value| value.items().is_none_or(|items| !items.is_empty())).or(one)
}

fn provider(fields: &mut Fields<'_>, action: ParsedAction, spec: &Value<'_>) {
    match (fields.optional("provider"), action) {
        (Some(provider), ParsedAction::Custom) => {
            let name = provider.fields(&["name"]);
            name.and_then(|mut fields| fields.required("name", "the provider's name"))
                .map(|name| name.text());
        }
        (Some(provider), _) => provider.refuse("only a CUSTOM policy has a provider: remove it"),
        (None, ParsedAction::Custom) => {
            spec.refuse("a CUSTOM policy needs a provider: write `provider: {name: <name>}`")
        }
        (None, _) => {}
    }
}

/// Reads rules, and collects what their author should know.
struct RuleParser<'a> {
    /// The policy's own, which service accounts without one are of.
    namespace: &'a str,
    action: ParsedAction,
    notes: Vec<String>,
    /// Number of notes that are left out.
    more_notes: usize,
}

impl RuleParser<'_> {
    fn note(&mut self, text: impl Display) {
        if self.notes.len() < NOTES_MAX {
            self.notes.push(text.to_string());
        } else {
            self.more_notes += 1;
        }
    }

    /// On a policy as a whole.
    fn remark(&mut self, policy: &AuthorizationPolicy, spec: &Value<'_>) {
        match policy.action {
            Action::Deny if policy.rules.is_empty() => spec.refuse(
                "a DENY policy without rules denies nothing: write `rules: [{}]` to deny everything, or remove it",
            ),
            Action::Audit if policy.rules.is_empty() => self.note("it has no rules, so it never matches"),
            Action::Custom => {
                // Before the notes on rules, which may be left out.
                let note = "its provider is not supported: it denies all flows to the workloads it selects";
                self.notes.insert(0, note.to_owned());
            }
            _ => {}
        }
    }

    fn finish(self, id: &str) -> Vec<String> {
        let more = (self.more_notes > 0).then(|| format!("and {} more notes on its rules", self.more_notes));
        self.notes.into_iter().chain(more).map(|note| format!("AuthorizationPolicy {id}: {note}")).collect()
    }

    fn rules(&mut self, value: &Value<'_>) -> Option<Vec<Rule>> {
        all(value.items()?.iter().enumerate().map(|(index, item)| self.rule(index, item)))
    }

    fn rule(&mut self, index: usize, value: &Value<'_>) -> Option<Rule> {
        let mut fields = value.fields(&["from", "to", "when"])?;
        let mut unseen: Vec<String> = Vec::new();
        let from = filled(fields.written("from"));
        let sources = from.and_then(|items| all(items.iter().map(|item| self.source(item, &mut unseen))));
        let to = filled(fields.written("to"));
        let operations = to.and_then(|items| all(items.iter().map(|item| operation(item, &mut unseen))));
        let when = filled(fields.written("when"));
        let conditions =
            when.and_then(|items| all(items.iter().map(|item| self.condition(item, &mut unseen))));
        let (sources, operations, conditions) = (sources?, operations?, conditions?);
        let mut reach = Applicability::Evaluated;
        if !unseen.is_empty() {
            let more = if unseen.len() > NOTES_MAX { ", ..." } else { "" };
            unseen.truncate(NOTES_MAX);
            let (rule, fields) = (index + 1, unseen.join(", ") + more);
            if self.action == ParsedAction::Allow {
                reach = Applicability::NeverMatches;
                self.note(format_args!("rule {rule} needs HTTP ({fields}): it never matches"));
            } else {
                self.note(format_args!(
                    "rule {rule} needs HTTP ({fields}): it holds without that, so it matches more"
                ));
            }
        }
        let conditions = conditions.into_iter().flatten().collect();
        Some(Rule::new(sources, operations, conditions, reach))
    }

    fn source(&mut self, item: &Value<'_>, unseen: &mut Vec<String>) -> Option<SourceMatch> {
        let value = item.fields(&["source"])?.required("source", "{principals: [...]} or another field")?;
        let mut fields = value.fields(&SOURCE_FIELDS)?;
        not_empty(&value, &SOURCE_FIELDS);
        let http = unseen_fields(&mut fields, &SOURCE_HTTP, unseen);
        let names = ["principals", "notPrincipals", "namespaces", "notNamespaces"];
        let has = |names: &[&str]| names.iter().any(|name| value.peek(name).is_some_and(|v| !v.is_null()));
        if has(&["serviceAccounts", "notServiceAccounts"]) && has(&names) {
            value.refuse("service accounts stand beside principals or namespaces: write one kind of them");
        }
        let principals = listed(&mut fields, ["principals", "notPrincipals"], |value| self.principal(value));
        let namespaces = listed(&mut fields, ["namespaces", "notNamespaces"], |value| self.pattern(value));
        let accounts = ["serviceAccounts", "notServiceAccounts"];
        let service_accounts = listed(&mut fields, accounts, |value| self.account(value));
        let domains = ["trustDomains", "notTrustDomains"];
        let trust_domains = listed(&mut fields, domains, |value| self.pattern(value));
        let blocks = listed(&mut fields, ["ipBlocks", "notIpBlocks"], address_block);
        http?;
        let (principals, namespaces) = (principals?, namespaces?);
        let (service_accounts, trust_domains) = (service_accounts?, trust_domains?);
        Some(SourceMatch { principals, namespaces, service_accounts, trust_domains, blocks: blocks? })
    }

    /// `None` inside: an attribute that cannot be seen, which only rules other than ALLOW survive.
    fn condition(&mut self, item: &Value<'_>, unseen: &mut Vec<String>) -> Option<Option<Condition>> {
        let mut fields = item.fields(&["key", "values", "notValues"])?;
        let key = fields.required("key", "an attribute such as source.principal")?;
        if ["values", "notValues"].iter().all(|name| item.peek(name).is_none_or(|value| value.is_null())) {
            item.refuse("has neither values nor notValues: write at least one of them");
        }
        let lists = ["values", "notValues"];
        let name = key.text()?;
        Some(Some(match name {
            "source.ip" => Condition::SourceIp(listed(&mut fields, lists, address_block)?),
            "destination.ip" => Condition::DestinationIp(listed(&mut fields, lists, address_block)?),
            "destination.port" => Condition::DestinationPort(listed(&mut fields, lists, port)?),
            "source.namespace" => {
                Condition::SourceNamespace(listed(&mut fields, lists, |value| self.pattern(value))?)
            }
            "source.serviceAccount" => {
                Condition::SourceAccount(listed(&mut fields, lists, |value| self.account(value))?)
            }
            "source.principal" => {
                Condition::SourcePrincipal(listed(&mut fields, lists, |value| self.principal(value))?)
            }
            "source.trustDomain" => {
                Condition::SourceTrustDomain(listed(&mut fields, lists, |value| self.pattern(value))?)
            }
            _ if HTTP_ATTRIBUTES.iter().any(|known| is_attribute(name, known)) => {
                all(lists.into_iter().map(|list| {
                    let items = filled(fields.written(list))?;
                    all(items.iter().map(|item| item.text().map(drop))).map(drop)
                }))?;
                unseen.push(name.to_owned());
                return Some(None);
            }
            _ => {
                key.refuse(
                    "is no attribute of Istio's: write source.ip, source.namespace, source.serviceAccount, source.principal, source.trustDomain, destination.ip or destination.port",
                );
                return None;
            }
        }))
    }

    fn principal(&mut self, value: &Value<'_>) -> Option<Pattern> {
        let text = value.text()?;
        if text.starts_with("spiffe:") {
            self.note(format_args!("principal {text:?} never matches: write it without spiffe://"));
        }
        self.pattern(value)
    }

    fn pattern(&mut self, value: &Value<'_>) -> Option<Pattern> {
        let text = value.text()?;
        let inner = text.strip_prefix('*').or_else(|| text.strip_suffix('*')).unwrap_or(text);
        if inner.contains('*') {
            self.note(format_args!("in {text:?} only a `*` at one end stands for something"));
        }
        Some(Pattern::of(text))
    }

    /// `<namespace>/<name>`, or a name in the policy's own namespace.
    fn account(&mut self, value: &Value<'_>) -> Option<ServiceAccount> {
        let text = value.text()?;
        let (namespace, name) = text.split_once('/').unwrap_or((self.namespace, text));
        if namespace.is_empty() || name.is_empty() || name.contains('/') || text.contains('*') {
            value.refuse(format_args!("{text:?} is no service account: write <namespace>/<name> or <name>"));
            return None;
        }
        Some(ServiceAccount { namespace: namespace.to_owned(), name: name.to_owned() })
    }
}

fn operation(item: &Value<'_>, unseen: &mut Vec<String>) -> Option<OperationMatch> {
    let value = item.fields(&["operation"])?.required("operation", "{ports: [...]} or another field")?;
    let mut fields = value.fields(&OPERATION_FIELDS)?;
    not_empty(&value, &OPERATION_FIELDS);
    let http = unseen_fields(&mut fields, &OPERATION_HTTP, unseen);
    let ports = listed(&mut fields, ["ports", "notPorts"], port);
    http?;
    Some(OperationMatch { ports: ports? })
}

/// A source or operation that says nothing would match everything; Istio refuses it too.
fn not_empty(value: &Value<'_>, known: &[&str]) {
    if known.iter().all(|name| value.peek(name).is_none()) {
        value.refuse("says nothing: write at least one field, or leave the whole list out to match any");
    }
}

/// Records which of the fields that need HTTP are there. They are read no further than being lists of texts.
fn unseen_fields(fields: &mut Fields<'_>, names: &[&str], unseen: &mut Vec<String>) -> Option<()> {
    let mut readable = Some(());
    for name in names {
        let Some(value) = fields.written(name) else { continue };
        unseen.push((*name).to_owned());
        let texts = filled(Some(value)).and_then(|items| all(items.iter().map(|item| item.text().map(drop))));
        readable = readable.and(texts.map(drop));
    }
    readable
}

/// A list and its negation.
fn listed<S: ValueSet>(
    fields: &mut Fields<'_>,
    [any, none]: [&str; 2],
    mut item: impl FnMut(&Value<'_>) -> Option<S::Value>,
) -> Option<ValueMatch<S>> {
    let mut list = |name| {
        let items = filled(fields.written(name))?;
        all(items.iter().map(&mut item))
    };
    let (any, none) = (list(any), list(none));
    Some(ValueMatch::of(any?, none?))
}

/// The items of a list that has some, or none when the field is absent. An empty list, and a name with nothing behind it,
/// are refused: Istio reads them as an absent one, which matches everything.
fn filled<'a>(value: Option<Value<'a>>) -> Option<Vec<Value<'a>>> {
    let Some(value) = value else { return Some(Vec::new()) };
    let items = value.items()?;
    if items.is_empty() {
        value.refuse("the list is empty, which would match anything: write an item, or remove the field");
        return None;
    }
    Some(items)
}

/// Every item, so that all mistakes are found; `None` when one is wrong.
fn all<T>(items: impl Iterator<Item = Option<T>>) -> Option<Vec<T>> {
    let read: Vec<_> = items.collect();
    read.into_iter().collect()
}

fn address_block(value: &Value<'_>) -> Option<IpNet> {
    let read = block(value.text()?);
    if read.is_none() {
        value.refuse("is no address and no range: write one such as 10.1.2.3 or 10.1.0.0/16");
    }
    read
}

/// Ports are texts in Istio's API.
fn port(value: &Value<'_>) -> Option<u16> {
    let text = value.text()?;
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    let port = text.parse().ok().filter(|_| digits);
    if port.is_none() {
        value.refuse(format_args!("{text:?} is no port: write a number from 0 to 65535, in quotes"));
    }
    port
}

fn is_attribute(name: &str, known: &str) -> bool {
    if known.ends_with('[') {
        // A name stands between the brackets.
        return name
            .strip_prefix(known)
            .and_then(|rest| rest.strip_suffix(']'))
            .is_some_and(|key| !key.is_empty());
    }
    if known.ends_with('.') { name.starts_with(known) } else { name == known }
}

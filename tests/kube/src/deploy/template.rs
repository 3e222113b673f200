//! The part of Helm's templates that the chart uses, evaluated as Helm does. Anything else is an error.
//!
//! | construct | meaning |
//! |---|---|
//! | `{{ .Values.a.b }}`, `{{ .Release.Namespace }}` | the value, which must be there |
//! | `{{ .. \| quote }}` | as a quoted string |
//! | `{{ .. \| toJson }}` | lists and mappings, as JSON, which is YAML too |
//! | `{{ if .. }} .. {{ else }} .. {{ end }}` | by truth: false, 0, "", empty and absent are false |
//! | `{{- .. -}}` | white space before or after goes |
//! | `{{- /* .. */ -}}` | a comment |

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

/// A stretch of a template.
#[derive(Debug, PartialEq)]
enum Part<'t> {
    Text(&'t str),
    Action(&'t str),
}

/// Renders `template` with `scope` as the dot.
pub(super) fn render(template: &str, scope: &Value) -> Result<String> {
    let mut output = String::new();
    // For each open `if`: is its present branch taken?
    let mut branches: Vec<bool> = Vec::new();
    for part in parts(template)? {
        let shown = branches.iter().all(|taken| *taken);
        match part {
            Part::Text(text) if shown => output.push_str(text),
            Part::Text(_) => {}
            Part::Action(action) if action.starts_with("/*") => {}
            Part::Action("end") => {
                branches.pop().context("`end` without `if`")?;
            }
            Part::Action("else") => {
                let taken = branches.last_mut().context("`else` without `if`")?;
                *taken = !*taken;
            }
            Part::Action(action) => match action.strip_prefix("if ") {
                Some(condition) => branches.push(is_true(lookup(condition.trim(), scope)?)),
                None if shown => output.push_str(&evaluate(action, scope)?),
                None => {}
            },
        }
    }
    ensure!(branches.is_empty(), "`if` without `end`");
    Ok(output)
}

fn parts(template: &str) -> Result<Vec<Part<'_>>> {
    let mut parts = Vec::new();
    let mut rest = template;
    let mut trim = false;
    while let Some((text, after)) = rest.split_once("{{") {
        let (action, next) = after.split_once("}}").context("`{{` without `}}`")?;
        let text = if trim { text.trim_start() } else { text };
        let (text, action) = match action.strip_prefix("- ") {
            Some(action) => (text.trim_end(), action),
            None => (text, action),
        };
        let (action, trims) = action.strip_suffix(" -").map_or((action, false), |action| (action, true));
        parts.push(Part::Text(text));
        parts.push(Part::Action(action.trim()));
        (rest, trim) = (next, trims);
    }
    parts.push(Part::Text(if trim { rest.trim_start() } else { rest }));
    Ok(parts)
}

fn evaluate(action: &str, scope: &Value) -> Result<String> {
    let mut steps = action.split('|').map(str::trim);
    let path = steps.next().unwrap_or_default();
    let value = lookup(path, scope)?;
    match (steps.next(), steps.next()) {
        (None, _) => plain(value).with_context(|| format!("`{path}` is no single value: `toJson` writes it")),
        (Some("quote"), None) => Ok(Value::String(plain(value)?).to_string()),
        (Some("toJson"), None) => Ok(value.to_string()),
        _ => bail!("`{action}` is more than the chart's tests can evaluate"),
    }
}

fn lookup<'s>(path: &str, scope: &'s Value) -> Result<&'s Value> {
    let names = path.strip_prefix('.').with_context(|| format!("`{path}` is not evaluated here"))?;
    let mut value = scope;
    for name in names.split('.') {
        value = value.get(name).with_context(|| format!("`{path}`: there is no `{name}`"))?;
    }
    Ok(value)
}

fn plain(value: &Value) -> Result<String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(_) | Value::Bool(_) => Ok(value.to_string()),
        _ => bail!("nothing, a list or a mapping"),
    }
}

fn is_true(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(truth) => *truth,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rendered(template: &str) -> String {
        let scope = json!({"Values": {"on": true, "off": false, "name": "a b", "list": ["x", 1]}});
        render(template, &scope).unwrap_or_else(|error| format!("error: {error:#}"))
    }

    #[test]
    fn values_are_put_in() {
        assert_eq!(rendered("n: {{ .Values.name }}!"), "n: a b!");
        assert_eq!(rendered("n: {{ .Values.name | quote }}"), "n: \"a b\"");
        assert_eq!(rendered("n: {{ .Values.list | toJson }}"), "n: [\"x\",1]");
    }

    #[test]
    fn one_branch_is_taken() {
        let template =
            "{{ if .Values.on }}yes{{ else }}no{{ end }} {{ if .Values.off }}yes{{ else }}no{{ end }}";
        assert_eq!(rendered(template), "yes no");
        assert_eq!(
            rendered("{{ if .Values.off }}{{ if .Values.on }}x{{ end }}{{ .Values.none }}{{ end }}."),
            "."
        );
    }

    #[test]
    fn dashes_take_white_space_away() {
        assert_eq!(rendered("a\n{{- if .Values.on }}\nb\n{{- end }}\nc"), "a\nb\nc");
        assert_eq!(rendered("{{- /* why */ -}}\na"), "a");
    }

    #[test]
    fn what_is_not_known_is_an_error() {
        let strange = [
            "{{ .Values.none }}",
            "{{ .Values.list }}",
            "{{ include \"x\" . }}",
            "{{ .Values.name | upper }}",
            "{{ .Values.name | quote | upper }}",
            "{{ range .Values.list }}{{ end }}",
            "{{ if .Values.on }}",
            "{{ end }}",
            "{{ .Values.name",
        ];
        for template in strange {
            assert!(rendered(template).starts_with("error: "), "{template}");
        }
    }
}

//! Changes the text of a CNI network configuration. Pure.
//!
//! A list (`.conflist`) names the plugins that a runtime calls in turn. An old configuration (`.conf` or `.json`) is one plugin, and
//! becomes a list. Everything else in the text keeps its meaning; keys come in alphabetical order.

use serde_json::{Map, Value, json};

/// Name of the plugin's program.
pub(super) const PLUGIN: &str = "tacit-cni";

/// A configuration that a runtime uses.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Network(Map<String, Value>);

impl Network {
    /// Parses a list, or one plugin as a list of one.
    ///
    /// # Errors
    /// The reason for which a runtime does not use the text either.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let root: Value = serde_json::from_str(text).map_err(|error| format!("invalid JSON: {error}"))?;
        let Value::Object(mut root) = root else { return Err("expected a JSON object".to_owned()) };
        if !root.get("name").is_some_and(Value::is_string) {
            return Err("no `name`".to_owned());
        }
        match root.get("plugins") {
            Some(Value::Array(plugins)) if plugins.iter().any(|plugin| type_of(plugin).is_some()) => {
                Ok(Self(root))
            }
            Some(_) => Err("no plugin in `plugins`".to_owned()),
            None if root.get("type").is_some_and(Value::is_string) => {
                let mut list = Map::new();
                for key in ["cniVersion", "name"] {
                    if let Some(value) = root.remove(key) {
                        list.insert(key.to_owned(), value);
                    }
                }
                list.insert("plugins".to_owned(), json!([root]));
                Ok(Self(list))
            }
            None => Err("neither `plugins` nor `type`".to_owned()),
        }
    }

    /// Returns the same network with the plugin `entry` at the end, once.
    pub(super) fn with(&self, entry: &Value) -> Self {
        let mut changed = self.without();
        changed.plugins().push(entry.clone());
        changed
    }

    /// Returns the same network without the plugin.
    pub(super) fn without(&self) -> Self {
        let mut changed = self.clone();
        changed.plugins().retain(|plugin| type_of(plugin) != Some(PLUGIN));
        changed
    }

    /// Returns the types of the other plugins, which are the names of their programs.
    pub(super) fn types(&self) -> impl Iterator<Item = &str> {
        let plugins = self.0.get("plugins").and_then(Value::as_array);
        plugins.into_iter().flatten().filter_map(type_of).filter(|plugin| *plugin != PLUGIN)
    }

    /// Returns the text of the list.
    pub(super) fn text(&self) -> String {
        format!("{:#}\n", Value::Object(self.0.clone()))
    }

    fn plugins(&mut self) -> &mut Vec<Value> {
        let plugins = self.0.entry("plugins").or_insert_with(|| json!([]));
        if !plugins.is_array() {
            *plugins = json!([]);
        }
        plugins.as_array_mut().expect("made an array above")
    }
}

fn type_of(plugin: &Value) -> Option<&str> {
    plugin.get("type")?.as_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = r#"{"cniVersion": "1.0.0", "name": "pods", "disableCheck": true, "plugins": [
        {"type": "bridge", "ipam": {"type": "host-local"}, "x-unknown": [1, 2]}, {"type": "portmap"}]}"#;

    fn entry(socket: &str) -> Value {
        json!({"type": PLUGIN, "socket": socket})
    }

    fn value(network: &Network) -> Value {
        serde_json::from_str(&network.text()).expect("JSON")
    }

    #[test]
    fn the_plugin_is_last_and_once_and_nothing_else_changes() {
        let before: Value = serde_json::from_str(LIST).expect("JSON");
        let network = Network::parse(LIST).expect("a list");
        let chained = network.with(&entry("/a"));
        let mut wanted = before.clone();
        wanted["plugins"].as_array_mut().expect("a list").push(entry("/a"));
        assert_eq!(value(&chained), wanted);
        assert_eq!(chained.with(&entry("/a")), chained);
        wanted["plugins"][2] = entry("/b");
        assert_eq!(value(&chained.with(&entry("/b"))), wanted);
        assert_eq!(value(&chained.without()), before);
        assert_eq!(network.without(), network);
    }

    #[test]
    fn a_plugin_that_others_put_behind_it_stays_before_it() {
        let mut list = Network::parse(LIST).expect("a list").with(&entry("/a"));
        list.plugins().push(json!({"type": "bandwidth"}));
        let types: Vec<_> = value(&list.with(&entry("/a")))["plugins"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|plugin| plugin["type"].as_str().expect("text").to_owned())
            .collect();
        assert_eq!(types, ["bridge", "portmap", "bandwidth", PLUGIN]);
    }

    #[test]
    fn one_plugin_becomes_a_list() {
        let text = r#"{"cniVersion": "0.3.1", "name": "pods", "type": "multus", "delegates": []}"#;
        let list = value(&Network::parse(text).expect("one plugin").with(&entry("/a")));
        assert_eq!(
            list,
            json!({"cniVersion": "0.3.1", "name": "pods", "plugins": [{"type": "multus", "delegates": []}, entry("/a")]})
        );
    }

    #[test]
    fn what_a_runtime_does_not_use_is_refused() {
        for text in [
            "",
            "[]",
            "{",
            r#"{"name": "pods"}"#,
            r#"{"plugins": [{"type": "bridge"}]}"#,
            r#"{"name": "pods", "plugins": []}"#,
            r#"{"name": "pods", "plugins": {}}"#,
            r#"{"name": "pods", "plugins": ["bridge"]}"#,
            r#"{"name": "pods", "type": 1}"#,
        ] {
            assert!(Network::parse(text).is_err(), "{text}");
        }
    }
}

//! Labels of a workload. Pods of one template have the same ones: a source may give all of them one copy.

use std::sync::Arc;

/// Labels, sorted by name. A clone shares its content.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Labels(Arc<[(Arc<str>, Arc<str>)]>);

impl Labels {
    /// The value of the label `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        let index = self.0.binary_search_by(|(known, _)| (**known).cmp(name)).ok()?;
        self.0.get(index).map(|(_, value)| &**value)
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (&**name, &**value))
    }

    /// Returns true if there is another handle of this copy.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

/// Of two labels of one name the later counts.
impl<T: Into<Arc<str>>> FromIterator<(T, T)> for Labels {
    fn from_iter<I: IntoIterator<Item = (T, T)>>(labels: I) -> Self {
        let mut sorted: Vec<(Arc<str>, Arc<str>)> = Vec::new();
        for (name, value) in labels {
            let (name, value) = (name.into(), value.into());
            match sorted.binary_search_by(|(known, _)| known.cmp(&name)) {
                Ok(index) => sorted[index].1 = value,
                Err(index) => sorted.insert(index, (name, value)),
            }
        }
        Self(sorted.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_found_whatever_their_order() {
        let labels: Labels =
            [("tier", "web"), ("app", "old"), ("version", "v1"), ("app", "shop")].into_iter().collect();
        let all: Vec<_> = labels.iter().collect();
        assert_eq!(all, [("app", "shop"), ("tier", "web"), ("version", "v1")]);
        assert_eq!(
            all.iter().map(|(name, _)| labels.get(name)).collect::<Vec<_>>(),
            [Some("shop"), Some("web"), Some("v1")]
        );
        assert_eq!((labels.get("ap"), labels.get(""), Labels::default().get("app")), (None, None, None));
        let again = [("app", "shop"), ("version", "v1"), ("tier", "web")].into_iter().collect();
        assert_eq!(labels, again);
    }
}

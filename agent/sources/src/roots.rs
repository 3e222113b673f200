//! The authority's roots from the Kubernetes API.

use std::path::Path;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};

use crate::kubernetes::{KubernetesError, access};

/// A key of a ConfigMap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigMapKey {
    /// Namespace of the ConfigMap.
    pub namespace: String,
    /// Name of the ConfigMap.
    pub name: String,
    /// The key.
    pub key: String,
}

/// Reads one key of a ConfigMap. Cheap to clone.
#[derive(Clone)]
pub struct ConfigMapReader {
    api: Api<ConfigMap>,
    name: String,
    key: String,
}

impl ConfigMapReader {
    /// Nothing is read yet.
    ///
    /// # Errors
    /// [`KubernetesError`] if the API cannot be used at all.
    pub async fn open(kubeconfig: Option<&Path>, at: &ConfigMapKey) -> Result<Self, KubernetesError> {
        Self::new(access(kubeconfig).await?, at)
    }

    fn new(config: kube::Config, at: &ConfigMapKey) -> Result<Self, KubernetesError> {
        let client = Client::try_from(config).map_err(|error| KubernetesError::Client(Box::new(error)))?;
        let api = Api::namespaced(client, &at.namespace);
        Ok(Self { api, name: at.name.clone(), key: at.key.clone() })
    }

    /// Returns the text of the key; none if there is no such ConfigMap, or no such key in it.
    ///
    /// # Errors
    /// The API's answer, as text.
    pub async fn read(&self) -> Result<Option<String>, String> {
        let found = self.api.get_opt(&self.name).await.map_err(|error| error.to_string())?;
        Ok(found.and_then(|map| map.data).and_then(|mut data| data.remove(&self.key)))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::kubernetes::testing::Server;

    const PATH: &str = "/api/v1/namespaces/tacit-system/configmaps/tacit-root";

    #[tokio::test]
    async fn the_text_of_a_key_is_read_once_it_is_there() {
        let server = Server::start();
        let url = format!("http://{}", server.address()).parse().expect("a URL");
        let at = ConfigMapKey {
            namespace: "tacit-system".to_owned(),
            name: "tacit-root".to_owned(),
            key: "root-cert.pem".to_owned(),
        };
        let root = ConfigMapReader::new(kube::Config::new(url), &at).expect("a client");
        server.without(PATH);
        assert_eq!(root.read().await, Ok(None));
        server.with(PATH);
        server.single(PATH, json!({"metadata": {"name": "tacit-root"}, "data": {"root-cert.pem": "PEM"}}));
        assert_eq!(root.read().await, Ok(Some("PEM".to_owned())));
        let other = ConfigMapReader { key: "other".to_owned(), ..root };
        assert_eq!(other.read().await, Ok(None));
    }
}

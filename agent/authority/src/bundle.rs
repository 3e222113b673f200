//! Publishes the current roots for the agents' `rootFile`, in a ConfigMap or a file.
//!
//! Each replica publishes the content that it has read from the store. A replica that reads before a change and writes after it
//! restores the old content until the next reconciliation. The waits of a rotation are much longer.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use k8s_openapi::{api::core::v1::ConfigMap, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Api, api::PostParams};
use tacit_identity::atomic_file::{self, FileError};
use tokio::task::spawn_blocking;

use super::store::{Written, written};

/// The reason why the bundle could not be published.
#[derive(Debug, thiserror::Error)]
pub(super) enum BundleError {
    #[error("cannot {what} ConfigMap {name}: {source}")]
    Kubernetes {
        what: &'static str,
        name: String,
        #[source]
        source: Box<kube::Error>,
    },
    #[error(transparent)]
    File(#[from] FileError),
}

/// The target of the bundle.
#[derive(Clone)]
pub(super) enum Bundle {
    ConfigMap { api: Box<Api<ConfigMap>>, name: String, key: String },
    File(PathBuf),
}

impl Bundle {
    /// Publishes `pem`, unless another replica has changed the target meanwhile.
    pub(super) async fn publish(&self, pem: &str) -> Result<Written, BundleError> {
        match self {
            Self::ConfigMap { api, name, key } => publish(api, name, key, pem).await,
            Self::File(path) => {
                let (owned, pem) = (path.clone(), pem.to_owned());
                let work = spawn_blocking(move || write(&owned, &pem));
                let panicked = |panic| Err(FileError::of("write", path)(io::Error::other(panic)));
                Ok(work.await.unwrap_or_else(panicked).map(|()| Written::Done)?)
            }
        }
    }
}

async fn publish(api: &Api<ConfigMap>, name: &str, key: &str, pem: &str) -> Result<Written, BundleError> {
    let failed = |what| {
        move |source| BundleError::Kubernetes { what, name: name.to_owned(), source: Box::new(source) }
    };
    let Some(mut found) = api.get_opt(name).await.map_err(failed("read"))? else {
        let made = config_map(name, key, pem);
        return written(api.create(&PostParams::default(), &made).await).map_err(failed("create"));
    };
    let data = found.data.get_or_insert_default();
    if data.get(key).is_some_and(|published| published == pem) {
        return Ok(Written::Done);
    }
    data.insert(key.to_owned(), pem.to_owned());
    // The API server rejects the write if the resource version has changed. The next attempt reads the new content.
    written(api.replace(name, &PostParams::default(), &found).await).map_err(failed("replace"))
}

fn config_map(name: &str, key: &str, pem: &str) -> ConfigMap {
    let labels = BTreeMap::from([
        ("app.kubernetes.io/managed-by".to_owned(), "tacit".to_owned()),
        ("app.kubernetes.io/part-of".to_owned(), "tacit".to_owned()),
    ]);
    ConfigMap {
        metadata: ObjectMeta { name: Some(name.to_owned()), labels: Some(labels), ..ObjectMeta::default() },
        data: Some(BTreeMap::from([(key.to_owned(), pem.to_owned())])),
        ..ConfigMap::default()
    }
}

fn write(path: &Path, pem: &str) -> Result<(), FileError> {
    match std::fs::read(path) {
        Ok(published) if published == pem.as_bytes() => return Ok(()),
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(FileError::of("read", path)(e));
        }
        _ => {}
    }
    atomic_file::replace(path, 0o644, pem.as_bytes())
}

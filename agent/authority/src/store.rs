//! Storage of the root and its rotation, in a Secret or a folder. A store holds named texts and is replaced as a whole. A write
//! succeeds only if the store has not changed since it was read. Of several replicas one succeeds, and the others read again.
//!
//! The folder holds one file, `root.json` (mode 0600). It is written beside and renamed into place under a lock, so that a crash
//! leaves the old or the new content. A file `rotate-root` requests a rotation, like the annotation `tacit.io/rotate-root` of the
//! Secret. Each new text in it is one request.

use std::{
    collections::BTreeMap,
    fs::{DirBuilder, OpenOptions},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use k8s_openapi::{ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Api, api::PostParams};
use tacit_identity::atomic_file::{self, FileError};
use tokio::task::spawn_blocking;

/// Annotation that requests a rotation.
const ROTATE: &str = "tacit.io/rotate-root";
const FILE: &str = "root.json";
const LOCK_FILE: &str = ".lock";
const ROTATE_FILE: &str = "rotate-root";
/// Kubernetes allows 1 MiB for a Secret.
const FILE_MAX_BYTES: u64 = 1024 * 1024;
/// Maximum length of a rotation request, which is stored.
const REQUEST_MAX_CHARS: usize = 256;

/// The named texts of a store.
pub(super) type Fields = BTreeMap<String, String>;

/// The reason why a store cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreError {
    #[error("cannot {what} Secret {secret}: {source}")]
    Kubernetes {
        what: &'static str,
        secret: String,
        #[source]
        source: Box<kube::Error>,
    },
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{} has mode {mode:03o} and is readable by other users; check that nobody has read it, then run chmod 600", path.display())]
    Exposed { path: PathBuf, mode: u32 },
    #[error("invalid content of {0}: {1}; restore it")]
    Content(String, String),
}

/// The storage of the root.
#[derive(Clone)]
pub(super) enum Store {
    Secret { api: Box<Api<Secret>>, name: String },
    Directory(PathBuf),
}

/// The content of a store.
pub(super) struct StoreContent {
    pub(super) fields: Fields,
    /// A rotation request. An invalid request does not stop signing.
    pub(super) request: Result<Option<String>, StoreError>,
    version: Version,
}

impl StoreContent {
    /// Returns the rotation request, if it is valid.
    pub(super) fn rotation_request(&self) -> Option<&str> {
        self.request.as_ref().ok()?.as_deref()
    }
}

/// The version that a writer replaces.
enum Version {
    Secret(Box<Secret>),
    File(String),
}

/// The result of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    Done,
    /// Another writer was faster. Read again.
    Conflict,
}

impl Store {
    /// Returns the content, or `None` if the store is empty.
    pub(super) async fn load(&self) -> Result<Option<StoreContent>, StoreError> {
        match self {
            Self::Secret { api, name } => {
                let found = api.get_opt(name).await.map_err(|e| failed("read", name, e))?;
                found.map(|secret| read_secret(secret, name)).transpose()
            }
            Self::Directory(directory) => {
                let directory = directory.clone();
                blocking(move || read_directory(&directory)).await
            }
        }
    }

    /// Creates the first content.
    pub(super) async fn create(&self, fields: Fields) -> Result<Written, StoreError> {
        match self {
            Self::Secret { api, name } => {
                let outcome = api.create(&PostParams::default(), &secret(name, fields)).await;
                written(outcome).map_err(|e| failed("create", name, e))
            }
            Self::Directory(directory) => {
                let directory = directory.clone();
                blocking(move || write_directory(&directory, &fields, None)).await
            }
        }
    }

    /// Replaces `fields` of `stored` and keeps the other fields.
    pub(super) async fn replace(&self, stored: StoreContent, fields: Fields) -> Result<Written, StoreError> {
        match (self, stored.version) {
            (Self::Secret { api, name }, Version::Secret(mut secret)) => {
                let bytes = fields.into_iter().map(|(field, text)| (field, ByteString(text.into_bytes())));
                secret.data.get_or_insert_default().extend(bytes);
                // The API server rejects the write if the resource version has changed.
                let outcome = api.replace(name, &PostParams::default(), &secret).await;
                written(outcome).map_err(|e| failed("replace", name, e))
            }
            (Self::Directory(directory), Version::File(before)) => {
                let (directory, mut all) = (directory.clone(), stored.fields);
                all.extend(fields);
                blocking(move || write_directory(&directory, &all, Some(&before))).await
            }
            _ => Ok(Written::Conflict),
        }
    }
}

fn failed(what: &'static str, secret: &str, source: kube::Error) -> StoreError {
    StoreError::Kubernetes { what, secret: secret.to_owned(), source: Box::new(source) }
}

/// Maps status 409, a concurrent write, to [`Written::Conflict`].
pub(super) fn written<T>(outcome: Result<T, kube::Error>) -> Result<Written, kube::Error> {
    match outcome {
        Ok(_) => Ok(Written::Done),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(Written::Conflict),
        Err(e) => Err(e),
    }
}

fn secret(name: &str, fields: Fields) -> Secret {
    let labels = [("app.kubernetes.io/managed-by", "tacit"), ("app.kubernetes.io/part-of", "tacit")];
    let labels = labels.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    Secret {
        metadata: ObjectMeta { name: Some(name.to_owned()), labels: Some(labels), ..ObjectMeta::default() },
        data: Some(fields.into_iter().map(|(field, text)| (field, ByteString(text.into_bytes()))).collect()),
        type_: Some("kubernetes.io/tls".to_owned()),
        ..Secret::default()
    }
}

fn read_secret(secret: Secret, name: &str) -> Result<StoreContent, StoreError> {
    let mut fields = Fields::new();
    for (field, ByteString(bytes)) in secret.data.iter().flatten() {
        let text = String::from_utf8(bytes.clone()).map_err(|_| {
            StoreError::Content(format!("Secret {name}"), format!("{field} is not UTF-8 text"))
        })?;
        fields.insert(field.clone(), text);
    }
    let request = secret.metadata.annotations.as_ref().and_then(|all| all.get(ROTATE)).cloned();
    let request = Ok(request.as_deref().map(shortened));
    Ok(StoreContent { fields, request, version: Version::Secret(Box::new(secret)) })
}

fn shortened(request: &str) -> String {
    request.chars().take(REQUEST_MAX_CHARS).collect()
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let panicked = |panic| StoreError::Content("the store".to_owned(), format!("a bug of Tacit: {panic}"));
    spawn_blocking(work).await.unwrap_or_else(|panic| Err(panicked(panic)))
}

fn read_directory(directory: &Path) -> Result<Option<StoreContent>, StoreError> {
    let path = directory.join(FILE);
    let Some(text) = read_private(&path)? else { return Ok(None) };
    let fields: Fields = serde_json::from_str(&text)
        .map_err(|e| StoreError::Content(path.display().to_string(), e.to_string()))?;
    let request = read_request(&directory.join(ROTATE_FILE));
    Ok(Some(StoreContent { fields, request, version: Version::File(text) }))
}

fn read_request(path: &Path) -> Result<Option<String>, StoreError> {
    let Some(file) = atomic_file::open(path)? else { return Ok(None) };
    Ok(Some(shortened(atomic_file::text(&file, path, FILE_MAX_BYTES)?.trim())))
}

/// Returns the text of a file that only its owner may access, or `None` if the file is absent.
fn read_private(path: &Path) -> Result<Option<String>, StoreError> {
    let Some(file) = atomic_file::open(path)? else { return Ok(None) };
    let mode = file.metadata().map_err(FileError::of("stat", path))?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(StoreError::Exposed { path: path.into(), mode });
    }
    Ok(Some(atomic_file::text(&file, path, FILE_MAX_BYTES)?))
}

/// Writes the file if its content still is `before`.
fn write_directory(directory: &Path, fields: &Fields, before: Option<&str>) -> Result<Written, StoreError> {
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700).create(directory).map_err(FileError::of("create", directory))?;
    let lock_path = directory.join(LOCK_FILE);
    let mut options = OpenOptions::new();
    let lock = options.create(true).truncate(false).write(true).mode(0o600).open(&lock_path);
    let lock = lock.map_err(FileError::of("open", &lock_path))?;
    // Another writer holds the lock for milliseconds. The caller reads again, as after any conflict.
    if lock.try_lock().is_err() {
        return Ok(Written::Conflict);
    }
    let path = directory.join(FILE);
    if read_private(&path)?.as_deref() != before {
        return Ok(Written::Conflict);
    }
    let text = serde_json::to_string_pretty(fields)
        .map_err(|e| StoreError::Content(path.display().to_string(), e.to_string()))?;
    atomic_file::replace(&path, 0o600, text.as_bytes())?;
    Ok(Written::Done)
}

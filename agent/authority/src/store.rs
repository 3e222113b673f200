//! Where the root and its rotation are kept: a Secret, or a folder on disk. A store is a set of named texts that is
//! replaced as a whole, and only by a writer that knows what it replaces: of several replicas one wins, and the others
//! read again.
//!
//! The folder holds one file, `root.json` (mode 0600), written beside and renamed into place under a lock, so that a
//! crash leaves the old or the new. A file `rotate-root` beside it asks for the next root, as the annotation
//! `tacit.io/rotate-root` of the Secret does; each new text in it asks once.

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

/// Asks for the next root.
const ROTATE: &str = "tacit.io/rotate-root";
const FILE: &str = "root.json";
const LOCK_FILE: &str = ".lock";
const ROTATE_FILE: &str = "rotate-root";
/// Kubernetes allows 1 MiB for a Secret.
const FILE_MAX_BYTES: u64 = 1024 * 1024;
/// Longest request to rotate, in characters; it is remembered.
const REQUEST_MAX_CHARS: usize = 256;

/// The named texts of a store.
pub(super) type Fields = BTreeMap<String, String>;

/// Why a store cannot be read or written.
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
    #[error("{} has mode {mode:03o} and would be readable by others; make sure nobody has read it, then run chmod 600", path.display())]
    Exposed { path: PathBuf, mode: u32 },
    #[error("{0} is not as it was written: {1}; restore it")]
    Content(String, String),
}

/// Where the root is kept.
#[derive(Clone)]
pub(super) enum Store {
    Secret { api: Box<Api<Secret>>, name: String },
    Directory(PathBuf),
}

/// What a store holds.
pub(super) struct Stored {
    pub(super) fields: Fields,
    /// A request to rotate; one that cannot be read is no reason to stop signing.
    pub(super) request: Result<Option<String>, StoreError>,
    version: Version,
}

impl Stored {
    /// The request to rotate, if there is one that can be read.
    pub(super) fn asked(&self) -> Option<&str> {
        self.request.as_ref().ok()?.as_deref()
    }
}

/// What a writer must know of what it replaces.
enum Version {
    Secret(Box<Secret>),
    File(String),
}

/// What became of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    Done,
    /// Somebody else was faster: read again.
    Conflict,
}

impl Store {
    /// What it holds; `None` when there is nothing yet.
    pub(super) async fn load(&self) -> Result<Option<Stored>, StoreError> {
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

    /// Writes the first content.
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

    /// Writes `fields` over those of `stored`; other fields stay.
    pub(super) async fn replace(&self, stored: Stored, fields: Fields) -> Result<Written, StoreError> {
        match (self, stored.version) {
            (Self::Secret { api, name }, Version::Secret(mut secret)) => {
                let bytes = fields.into_iter().map(|(field, text)| (field, ByteString(text.into_bytes())));
                secret.data.get_or_insert_default().extend(bytes);
                // The resource version in it makes the API refuse when somebody was faster.
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

/// 409 means that the object was created or changed by somebody else.
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

fn read_secret(secret: Secret, name: &str) -> Result<Stored, StoreError> {
    let mut fields = Fields::new();
    for (field, ByteString(bytes)) in secret.data.iter().flatten() {
        let text = String::from_utf8(bytes.clone())
            .map_err(|_| StoreError::Content(format!("Secret {name}"), format!("{field} is no text")))?;
        fields.insert(field.clone(), text);
    }
    let request = secret.metadata.annotations.as_ref().and_then(|all| all.get(ROTATE)).cloned();
    let request = Ok(request.as_deref().map(shortened));
    Ok(Stored { fields, request, version: Version::Secret(Box::new(secret)) })
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

fn read_directory(directory: &Path) -> Result<Option<Stored>, StoreError> {
    let path = directory.join(FILE);
    let Some(text) = read_private(&path)? else { return Ok(None) };
    let fields: Fields = serde_json::from_str(&text)
        .map_err(|e| StoreError::Content(path.display().to_string(), e.to_string()))?;
    let request = read_request(&directory.join(ROTATE_FILE));
    Ok(Some(Stored { fields, request, version: Version::File(text) }))
}

fn read_request(path: &Path) -> Result<Option<String>, StoreError> {
    let Some(file) = atomic_file::open(path)? else { return Ok(None) };
    Ok(Some(shortened(atomic_file::text(&file, path, FILE_MAX_BYTES)?.trim())))
}

/// The text of a file that only its owner may touch; `None` when there is none.
fn read_private(path: &Path) -> Result<Option<String>, StoreError> {
    let Some(file) = atomic_file::open(path)? else { return Ok(None) };
    let mode = file.metadata().map_err(FileError::of("stat", path))?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(StoreError::Exposed { path: path.into(), mode });
    }
    Ok(Some(atomic_file::text(&file, path, FILE_MAX_BYTES)?))
}

/// Writes when what is there is still `before`.
fn write_directory(directory: &Path, fields: &Fields, before: Option<&str>) -> Result<Written, StoreError> {
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700).create(directory).map_err(FileError::of("create", directory))?;
    let lock_path = directory.join(LOCK_FILE);
    let mut options = OpenOptions::new();
    let lock = options.create(true).truncate(false).write(true).mode(0o600).open(&lock_path);
    let lock = lock.map_err(FileError::of("open", &lock_path))?;
    // Held by others for milliseconds; whoever comes meanwhile reads again, as after any other conflict.
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

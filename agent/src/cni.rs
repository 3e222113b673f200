//! The CNI plugin of the node: with it a container runtime makes the sandbox of a pod only when the agent covers the pod.
//!
//! ```text
//! kubelet ─> container runtime ─> plugins of the CNI configuration, in turn ─> the pod's containers start
//!                                     the last one, tacit-cni ── asks ──> socket of the agent
//! ```
//! The plugin and its place in the configuration stay on the node when the agent ends, so they hold pods back after a reboot
//! until this boot's agent covers them. The agent puts the plugin back when others write the configuration anew.

mod conflist;
mod folder;

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tacit_identity::atomic_file::{self, FileError};
use tacit_sources::reload::folder::Folder;
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{sleep, timeout},
};

use crate::telemetry::status::CniStatus;
use conflist::PLUGIN;
use folder::Chained;

/// Time after which the folders are looked at without an event: a folder can be made later, and inotify can be missing.
const RESCAN: Duration = Duration::from_secs(10);
/// Pause between an event in the folder and the next look.
const SETTLE: Duration = Duration::from_millis(250);
/// Another program fights for its configuration if it has to be changed more often than [`FIGHT_WRITES`] times in this time.
const FIGHT: Duration = Duration::from_secs(60);
const FIGHT_WRITES: usize = 10;
/// Pause between two changes while it does.
const FIGHT_PAUSE: Duration = Duration::from_secs(10);
const FOUGHT: &str = "another program takes the plugin out of its CNI configuration again and again; with Cilium set cni.exclusive to false";
/// Folder in which the library of container runtimes keeps the results of plugins.
const RESULTS: &str = "/var/lib/cni/results";
/// Permissions of the program.
const PROGRAM_MODE: u32 = 0o755;

/// The configuration of the plugin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniConfig {
    /// False: the agent takes the plugin out of the configurations.
    pub is_enabled: bool,
    /// Folder of the node's CNI configurations.
    pub config_folder: PathBuf,
    /// Folder of the node's CNI plugins.
    pub program_folder: PathBuf,
    /// Namespaces whose pods do not wait for the agent.
    pub exempt_namespaces: Vec<String>,
    /// Time for which the plugin waits for the agent, 1 s to 20 s.
    pub timeout: Duration,
}

/// An error of the plugin's files.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// A file or folder of the system.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// The operation.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The error of the system.
        #[source]
        source: io::Error,
    },
    /// A file that is written whole.
    #[error(transparent)]
    Write(#[from] FileError),
    /// The runtime has its programs elsewhere.
    #[error(
        "no plugin of {} is in {}: write the folder of the container runtime's plugins as cni.programFolder",
        configuration.display(), programs.display()
    )]
    OtherPrograms {
        /// The configuration in use.
        configuration: PathBuf,
        /// The configured folder of programs.
        programs: PathBuf,
    },
    /// The program is not where the agent's is.
    #[error("{} is missing: build it with `cargo build -p tacit-cni`, or use the image of `cargo xtask image`", _0.display())]
    NoProgram(PathBuf),
}

impl CniError {
    fn file<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Self + 'a {
        move |source| Self::Io { what, path: path.to_owned(), source }
    }
}

/// Keeps the plugin in the CNI configuration of the node, or takes it out if it is not enabled, and reports both.
pub async fn keep(config: CniConfig, socket: PathBuf, status: watch::Sender<CniStatus>) {
    let mut changes = Folder::at(config.config_folder.clone());
    let mut writes = Vec::new();
    loop {
        let (wanted, socket) = (config.clone(), socket.clone());
        let done = spawn_blocking(move || apply(&wanted, &socket)).await;
        let failed = CniError::file("look at", &config.config_folder);
        let mut done = done.unwrap_or_else(|panic| Err(failed(io::Error::other(panic))));
        let now = Instant::now();
        writes.retain(|at| now.duration_since(*at) < FIGHT);
        if done.as_ref().is_ok_and(|applied| applied.is_written) {
            writes.push(now);
        }
        let is_fought = writes.len() > FIGHT_WRITES;
        if let (true, Ok(applied)) = (is_fought, &mut done) {
            applied.problem = Some(FOUGHT.to_owned());
        }
        report(&status, config.is_enabled, done);
        if is_fought {
            // Each write has the container runtime read its configuration again.
            sleep(FIGHT_PAUSE).await;
        } else {
            let _ = timeout(RESCAN, changes.changed()).await;
            // Programs write their configuration in several steps.
            sleep(SETTLE).await;
        }
        changes.watch_again();
    }
}

/// Puts the plugin into the CNI configuration before anything else answers, if this node had it before: other programs write their
/// configuration anew when they start.
pub fn restore(config: &CniConfig, socket: &Path) {
    if !config.is_enabled || !config.program_folder.join(PLUGIN).exists() {
        return;
    }
    if let Err(error) = apply(config, socket) {
        tracing::error!(%error, "the CNI plugin is not in place yet");
    }
}

/// State of the plugin after a look at the folders.
#[derive(Debug, Default)]
struct Applied {
    /// The configuration that names the plugin.
    configuration: Option<PathBuf>,
    /// It did not name it before.
    is_written: bool,
    /// A problem that does not keep the plugin from its work.
    problem: Option<String>,
}

/// Installs the plugin and puts it into the configuration in use, or takes it out of all.
fn apply(config: &CniConfig, socket: &Path) -> Result<Applied, CniError> {
    if !config.is_enabled {
        // The program stays: a container runtime can still name it for pods that it made before.
        folder::unchain(&config.config_folder)?;
        return Ok(Applied::default());
    }
    // The program first: a configuration that names a missing one lets no pod start.
    let problem = match install(&config.program_folder) {
        Ok(()) => None,
        // An older program does the same work.
        Err(error) if config.program_folder.join(PLUGIN).exists() => Some(error.to_string()),
        Err(error) => return Err(error),
    };
    let chained = folder::chain(&config.config_folder, &config.program_folder, &entry(config, socket))?;
    let (configuration, is_written) = chained.map(|Chained { path, is_written }| (path, is_written)).unzip();
    Ok(Applied { configuration, is_written: is_written.unwrap_or(false), problem })
}

fn entry(config: &CniConfig, socket: &Path) -> Value {
    json!({
        "type": PLUGIN,
        "socket": socket,
        "timeoutSeconds": config.timeout.as_secs(),
        "exemptNamespaces": config.exempt_namespaces,
    })
}

/// Copies the program from beside the agent's, unless the same one is there.
fn install(program_folder: &Path) -> Result<(), CniError> {
    let own = std::env::current_exe().map_err(CniError::file("find", Path::new("/proc/self/exe")))?;
    let program = own.with_file_name(PLUGIN);
    let wanted = match fs::read(&program) {
        Ok(wanted) => wanted,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(CniError::NoProgram(program)),
        Err(error) => return Err(CniError::file("read", &program)(error)),
    };
    let installed = program_folder.join(PLUGIN);
    if fs::read(&installed).is_ok_and(|found| found == wanted) {
        return Ok(());
    }
    fs::create_dir_all(program_folder).map_err(CniError::file("make", program_folder))?;
    Ok(atomic_file::replace(&installed, PROGRAM_MODE, &wanted)?)
}

/// Result of [`remove`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removed {
    /// Nothing of the plugin was there.
    Nothing,
    /// It is gone.
    All,
    /// It is out of the configurations. Its program stays, because the container runtime would call it when it removes pods of which
    /// this folder has results.
    ProgramInUse(PathBuf),
}

/// Removes the plugin from the node: from the configurations, then its program.
///
/// # Errors
/// [`CniError`].
pub fn remove(config_folder: &Path, program_folder: &Path) -> Result<Removed, CniError> {
    let changed = folder::unchain(config_folder)?;
    let program = program_folder.join(PLUGIN);
    let results = Path::new(RESULTS);
    if program.exists() && is_named_in(results) {
        return Ok(Removed::ProgramInUse(results.to_owned()));
    }
    match fs::remove_file(&program) {
        Ok(()) => Ok(Removed::All),
        Err(error) if error.kind() == io::ErrorKind::NotFound && changed == 0 => Ok(Removed::Nothing),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Removed::All),
        Err(error) => Err(CniError::file("remove", &program)(error)),
    }
}

/// Returns true if a file in the folder names the plugin, or may do so because it cannot be read. The folder is absent where no
/// runtime keeps results.
fn is_named_in(folder: &Path) -> bool {
    let is_absent = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => return !is_absent(&error),
    };
    entries.into_iter().any(|entry| match entry.and_then(|entry| fs::read(entry.path())) {
        Ok(bytes) => is_named(&String::from_utf8_lossy(&bytes)),
        Err(error) => !is_absent(&error),
    })
}

/// Returns true if a result names the plugin. The configuration is in it as base64, in which the name has three forms.
fn is_named(text: &str) -> bool {
    const ENCODED: [&str; 3] = ["dGFjaXQtY25p", "RhY2l0LWNua", "0YWNpdC1jbm"];
    text.contains(PLUGIN) || ENCODED.iter().any(|encoded| text.contains(encoded))
}

/// Logs a change once. A configuration that is known stays known after an error.
fn report(status: &watch::Sender<CniStatus>, is_enabled: bool, done: Result<Applied, CniError>) {
    status.send_if_modified(|status| {
        let (configuration, error) = match done {
            Ok(Applied { configuration, problem, .. }) => {
                (configuration.map(|path| path.display().to_string()), problem)
            }
            Err(error) => (status.configuration.clone(), Some(error.to_string())),
        };
        let now = CniStatus { is_enabled, configuration, error };
        if *status == now {
            return false;
        }
        match (&now.configuration, &now.error) {
            (_, Some(error)) => {
                tracing::error!(
                    error,
                    "the CNI plugin is not in place: pods may start before the agent after a reboot"
                );
            }
            (Some(configuration), None) => tracing::info!(configuration, "the CNI plugin is in place"),
            (None, None) => tracing::info!("no CNI configuration names the plugin"),
        }
        *status = now;
        true
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_that_names_the_plugin_keeps_its_program() {
        // The configuration of each is `{"plugins":[{"type":"tacit-cni"}]}` with none, one and two spaces before it.
        for config in [
            "eyJwbHVnaW5zIjpbeyJ0eXBlIjoidGFjaXQtY25pIn1dfQ==",
            "IHsicGx1Z2lucyI6W3sidHlwZSI6InRhY2l0LWNuaSJ9XX0=",
            "ICB7InBsdWdpbnMiOlt7InR5cGUiOiJ0YWNpdC1jbmkifV19",
        ] {
            let text = format!("{{\"kind\": \"cniCacheV1\", \"config\": \"{config}\"}}");
            assert!(is_named(&text), "{text}");
        }
        assert!(!is_named(
            "{\"kind\": \"cniCacheV1\", \"config\": \"eyJwbHVnaW5zIjpbeyJ0eXBlIjoiYnJpZGdlIn1dfQ==\"}"
        ));
    }
}

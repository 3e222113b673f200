//! The state of the mesh that the agent keeps on the node for its start after a reboot: the last known mode and ranges.
//!
//! After a reboot nothing is pinned, and a source may not answer for long. The agent loads its programs first, with what it
//! kept. A state that was never kept, and one that cannot be used, are different facts: without a state the configuration
//! applies; with an unusable one pods are held as in a STRICT mesh.
//!
//! The file is written whole or not at all, in a folder of the agent's own below `statePath`. Only root has access to that folder.
//! `statePath` itself is the operator's: the agent does not change it.

use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use tacit_core::{
    directory::{Directory, Ranges, mesh_range},
    policy::{Mode, Policies},
    yaml::{self, Mistakes, Value},
};
use tacit_identity::atomic_file;
use tacit_sources::reload::Watched;
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{sleep, timeout},
};

use crate::telemetry::status::NodeStateStatus;

/// Name of the agent's folder in `statePath`.
const FOLDER: &str = "state";
/// Name of the file in that folder.
const FILE: &str = "node-state.yaml";
/// Version of the format. Another version is not used.
const VERSION: u32 = 1;
const FIELDS: [&str; 4] = ["version", "meshMode", "strictWorkloads", "ranges"];
const MODES: [(&str, Mode); 3] =
    [("DISABLE", Mode::Disable), ("PERMISSIVE", Mode::Permissive), ("STRICT", Mode::Strict)];
/// Most bytes of the file: the kernel's map of ranges, full, in 2 MiB.
const FILE_MAX_BYTES: u64 = 4 << 20;
/// The ranges that clusters take pod addresses from: RFC 1918, RFC 6598 and RFC 4193 (ULA). They stand in under STRICT, where no
/// range is configured or kept, so that a mode without a range does not let everything pass.
const PRIVATE_RANGES: [&str; 5] =
    ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"];

/// Shortest time between two writes. A change that comes sooner is written with the next one.
const WRITE_PAUSE: Duration = Duration::from_secs(1);
/// Time after which a failed write is tried again without a change.
const RETRY: Duration = Duration::from_secs(30);

/// Returns the agent's folder in `statePath`.
pub(super) fn folder(state_path: &Path) -> PathBuf {
    state_path.join(FOLDER)
}

/// Writes the state of the mesh to `folder` whenever it changes. `known` is the state on disk.
pub(super) async fn keep(
    folder: PathBuf,
    mut known: Option<NodeState>,
    directory: Arc<Watched<Directory>>,
    policies: Arc<Watched<Policies>>,
    status: watch::Sender<NodeStateStatus>,
) {
    let (mut directory, mut policies) = (directory.subscribe(), policies.subscribe());
    loop {
        let ranges = Arc::clone(directory.borrow_and_update().ranges());
        let current = NodeState::of(&policies.borrow_and_update(), &ranges);
        if known.as_ref() != Some(&current) {
            let (folder, state) = (folder.clone(), current.clone());
            let written = spawn_blocking(move || state.write(&folder)).await;
            let error = written.unwrap_or_else(|panic| Err(panic.to_string())).err();
            known = error.is_none().then_some(current);
            report(&status, error);
        }
        sleep(WRITE_PAUSE).await;
        let changed = async {
            tokio::select! {
                _ = directory.changed() => {}
                _ = policies.changed() => {}
            }
        };
        match known {
            Some(_) => changed.await,
            // Late or not, the state is looked at again.
            None => drop(timeout(RETRY, changed).await),
        }
    }
}

/// Reports the result of a write. An error that lasts is logged once. A state that could not be read is gone once another one is
/// in its place.
fn report(status: &watch::Sender<NodeStateStatus>, error: Option<String>) {
    status.send_if_modified(|status| {
        let is_new = status.write_error != error;
        if let Some(error) = error.as_ref().filter(|_| is_new) {
            tracing::error!(
                error,
                "state of the mesh not kept: after a reboot an older one applies until the sources answer"
            );
        }
        let is_replaced = error.is_none() && status.read_error.take().is_some();
        status.write_error = error;
        is_new || is_replaced
    });
}

/// The state of the mesh as the agent last knew it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NodeState {
    /// The mode of the mesh, for pods that no source has named.
    mesh_mode: Mode,
    /// True if a policy makes a namespace, a workload or a port STRICT.
    strict_workloads: bool,
    /// The ranges of the mesh.
    ranges: Vec<IpNet>,
}

/// The result of reading the kept state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kept {
    /// It was read.
    State(NodeState),
    /// No agent has kept one on this node.
    Nothing,
    /// There is one that cannot be used, for this reason.
    Unusable(String),
}

/// The mode and the ranges that apply until the sources answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Initial {
    /// The mode for pods that no source has named.
    pub mode: Mode,
    /// The ranges of the mesh.
    pub ranges: Vec<IpNet>,
}

impl NodeState {
    pub(super) fn of(policies: &Policies, ranges: &Ranges) -> Self {
        Self {
            mesh_mode: policies.mesh_default(),
            strict_workloads: policies.may_be_strict(),
            ranges: ranges.iter().copied().collect(),
        }
    }

    fn parse(text: &str, file: &Path) -> Result<Self, Mistakes> {
        yaml::decode(text, file, Self::decode)
    }

    fn decode(root: &Value<'_>) -> Option<Self> {
        let f = &mut root.fields(&FIELDS)?;
        let version = f.required("version", "1").and_then(|v| v.parse(version));
        let mesh_mode = f.required("meshMode", "STRICT").and_then(|v| v.choice(&MODES));
        let strict_workloads = f.required("strictWorkloads", "true");
        let strict_workloads = strict_workloads.and_then(|v| v.choice(&[("true", true), ("false", false)]));
        let ranges = f.required("ranges", "[]").and_then(|v| ranges(&v));
        version?;
        Some(Self { mesh_mode: mesh_mode?, strict_workloads: strict_workloads?, ranges: ranges? })
    }

    fn text(&self) -> String {
        let mode = MODES.iter().find(|(_, mode)| *mode == self.mesh_mode).map_or("STRICT", |(name, _)| name);
        let ranges: Vec<String> = self.ranges.iter().map(|range| format!("\"{range}\"")).collect();
        format!(
            "# Written by tacit agent. It applies after a reboot, until the sources answer.\nversion: {VERSION}\n\
             meshMode: {mode}\nstrictWorkloads: {}\nranges: [{}]\n",
            self.strict_workloads,
            ranges.join(", ")
        )
    }

    /// Reads the state in `folder`. A file that others than this user can change is not used.
    pub(super) fn read(folder: &Path) -> Kept {
        let path = file(folder);
        match Self::read_file(&path) {
            Ok(Some(state)) => Kept::State(state),
            Ok(None) => Kept::Nothing,
            Err(problem) => Kept::Unusable(problem),
        }
    }

    fn read_file(path: &Path) -> Result<Option<Self>, String> {
        let Some(file) = atomic_file::open(path).map_err(|error| error.to_string())? else {
            return Ok(None);
        };
        let found = file.metadata().map_err(|error| format!("{}: {error}", path.display()))?;
        let (owner, mode) = (found.uid(), found.mode() & 0o777);
        if !found.is_file() || owner != nix::unistd::geteuid().as_raw() || mode & 0o077 != 0 {
            return Err(format!(
                "{} has owner {owner} and mode {mode:04o}: expected a file of the agent's user with mode 0600; remove it",
                path.display()
            ));
        }
        let text = atomic_file::text(&file, path, FILE_MAX_BYTES).map_err(|error| error.to_string())?;
        Self::parse(&text, path).map(Some).map_err(|mistakes| mistakes.to_string())
    }

    /// Writes the state to `folder`. It is on disk when this returns.
    ///
    /// # Errors
    /// The failed operation with its path.
    pub(super) fn write(&self, folder: &Path) -> Result<(), String> {
        make_private(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let written = atomic_file::replace(&file(folder), 0o600, self.text().as_bytes());
        written.map_err(|error| error.to_string())
    }
}

impl Kept {
    /// Returns what applies until the sources answer: the kept state, the `configured` ranges, and no mode below `minimum`.
    pub(super) fn initial(&self, configured: &[IpNet], minimum: Mode) -> Initial {
        let (mode, ranges) = match self {
            // The pods of a STRICT namespace are not known yet, so all are held.
            Self::State(state) if state.strict_workloads => (Mode::Strict, &state.ranges[..]),
            Self::State(state) => (state.mesh_mode, &state.ranges[..]),
            // Istio's default.
            Self::Nothing => (Mode::Permissive, &[][..]),
            Self::Unusable(_) => (Mode::Strict, &[][..]),
        };
        let mode = mode.max(minimum);
        Initial { mode, ranges: ranges_under(mode, [configured, ranges].concat()) }
    }
}

/// Returns `known`, or [`PRIVATE_RANGES`] if no range is known and `mode` is STRICT: without a range it would hold nobody.
pub(super) fn ranges_under(mode: Mode, known: Vec<IpNet>) -> Vec<IpNet> {
    if mode == Mode::Strict && known.is_empty() {
        return PRIVATE_RANGES.iter().filter_map(|range| range.parse().ok()).collect();
    }
    known
}

fn file(folder: &Path) -> PathBuf {
    folder.join(FILE)
}

/// Makes the folder, or takes the access of others from it. A folder that somebody else made is not used.
pub(super) fn make_private(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let found = fs::symlink_metadata(folder)?;
    let (owner, mode) = (found.uid(), found.mode() & 0o777);
    if !found.is_dir() || owner != nix::unistd::geteuid().as_raw() {
        let problem =
            format!("has owner {owner} or is a link: expected a folder of the agent's user; remove it");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, problem));
    }
    if mode == 0o700 { Ok(()) } else { fs::set_permissions(folder, Permissions::from_mode(0o700)) }
}

fn version(text: &str) -> Result<(), String> {
    if text == VERSION.to_string() {
        Ok(())
    } else {
        Err(format!("no version of this agent: expected {VERSION}"))
    }
}

fn ranges(value: &Value<'_>) -> Option<Vec<IpNet>> {
    let ranges: Vec<_> = value.items()?.iter().map(|item| item.parse(mesh_range)).collect();
    ranges.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    use tacit_testing::Scratch;

    fn net(text: &str) -> IpNet {
        text.parse().expect("a range")
    }

    fn state() -> NodeState {
        let ranges = vec![net("10.77.0.0/16"), net("fd77::/16")];
        NodeState { mesh_mode: Mode::Permissive, strict_workloads: true, ranges }
    }

    #[test]
    fn what_was_kept_is_read_again() {
        let scratch = Scratch::new();
        let folder = folder(&scratch.path().join("a"));
        assert_eq!(NodeState::read(&folder), Kept::Nothing);
        let other = NodeState { mesh_mode: Mode::Strict, ranges: Vec::new(), ..state() };
        for state in [state(), other] {
            state.write(&folder).expect("written");
            assert_eq!(NodeState::read(&folder), Kept::State(state));
        }
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!((mode(&folder), mode(&folder.join(FILE))), (0o700, 0o600));
        fs::set_permissions(&folder, Permissions::from_mode(0o755)).expect("set");
        state().write(&folder).expect("written");
        assert_eq!(mode(&folder), 0o700, "the agent's folder is closed");
    }

    #[test]
    fn the_agent_changes_nothing_of_the_state_path_but_its_own_folder() {
        let scratch = Scratch::new();
        for open in [0o755, 0o1777] {
            fs::set_permissions(scratch.path(), Permissions::from_mode(open)).expect("set");
            state().write(&folder(scratch.path())).expect("written");
            let mode = fs::metadata(scratch.path()).expect("there").permissions().mode() & 0o7777;
            assert_eq!(mode, open, "others may keep their files there");
        }
        let others = scratch.path().join("others");
        fs::create_dir(&others).expect("made");
        std::os::unix::fs::symlink(&others, folder(&others)).expect("linked");
        let problem = state().write(&folder(&others)).expect_err("a link");
        assert!(problem.contains("expected a folder of the agent's user"), "{problem}");
        assert!(!others.join(FILE).exists());
    }

    #[test]
    fn a_read_error_is_shown_until_a_state_is_written() {
        let read_error = Some("broken".to_owned());
        let status =
            watch::Sender::new(NodeStateStatus { read_error: read_error.clone(), ..Default::default() });
        let mut seen = status.subscribe();
        report(&status, Some("no space".to_owned()));
        assert_eq!(seen.borrow_and_update().read_error, read_error, "the broken one is still there");
        report(&status, None);
        assert!(seen.has_changed().expect("open"));
        let shown = seen.borrow_and_update();
        assert_eq!((&shown.read_error, &shown.write_error), (&None, &None));
        drop(shown);
        report(&status, None);
        assert!(!seen.has_changed().expect("open"));
    }

    #[test]
    fn a_file_that_others_can_change_is_not_used() {
        let scratch = Scratch::new();
        state().write(scratch.path()).expect("written");
        let path = scratch.path().join(FILE);
        for mode in [0o644, 0o620, 0o666] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).expect("set");
            let Kept::Unusable(problem) = NodeState::read(scratch.path()) else { panic!("used: {mode:o}") };
            assert!(problem.contains(&format!("mode {mode:04o}")), "{problem}");
        }
    }

    #[test]
    fn what_is_not_exactly_a_state_is_not_used() {
        let text = state().text();
        let parse = |text: &str| NodeState::parse(text, Path::new("node-state.yaml"));
        assert_eq!(parse(&text), Ok(state()));
        for (from, to, problem) in [
            ("version: 1", "version: 2", "version: \"2\": no version of this agent: expected 1"),
            ("version: 1\n", "", "version: missing"),
            ("meshMode: PERMISSIVE", "meshMode: OPEN", "\"OPEN\" is none of DISABLE, PERMISSIVE, STRICT"),
            ("meshMode: PERMISSIVE\n", "", "meshMode: missing"),
            ("strictWorkloads: true", "strictWorkloads: maybe", "\"maybe\" is none of true, false"),
            ("strictWorkloads: true\n", "", "strictWorkloads: missing"),
            ("10.77.0.0/16", "10.77.0.0/0", "prefix length 0 covers every address"),
            ("ranges:", "mode: STRICT\nranges:", "mode: unknown field"),
        ] {
            assert!(text.contains(from), "{from}");
            let mistakes = parse(&text.replace(from, to)).expect_err(to).to_string();
            assert!(mistakes.contains(problem), "{to}: {mistakes}");
        }
        for cut in 1..text.len() - 1 {
            let known = parse(&text[..cut]);
            assert!(known.is_err() || known == Ok(state()), "{}", &text[..cut]);
        }
    }

    #[test]
    fn until_the_sources_answer_the_stricter_of_what_is_known_applies() {
        let configured = [net("10.1.0.0/16")];
        let known =
            |strict_workloads, mesh_mode| Kept::State(NodeState { mesh_mode, strict_workloads, ..state() });
        let broken = Kept::Unusable("broken".to_owned());
        for (kept, minimum, mode) in [
            (known(false, Mode::Permissive), Mode::Disable, Mode::Permissive),
            (known(false, Mode::Disable), Mode::Permissive, Mode::Permissive),
            (known(false, Mode::Permissive), Mode::Strict, Mode::Strict),
            (known(false, Mode::Strict), Mode::Disable, Mode::Strict),
            (known(true, Mode::Permissive), Mode::Disable, Mode::Strict),
            (Kept::Nothing, Mode::Disable, Mode::Permissive),
            (Kept::Nothing, Mode::Strict, Mode::Strict),
            (broken.clone(), Mode::Disable, Mode::Strict),
        ] {
            assert_eq!(kept.initial(&configured, minimum).mode, mode, "{kept:?} {minimum:?}");
        }
        let ranges = |kept: &Kept, configured: &[IpNet]| kept.initial(configured, Mode::Disable).ranges;
        assert_eq!(ranges(&Kept::Nothing, &configured), configured);
        assert_eq!(ranges(&Kept::State(state()), &configured).len(), 3);
        assert_eq!(ranges(&broken, &configured), configured);
        assert_eq!(ranges(&broken, &[]).len(), PRIVATE_RANGES.len(), "none is known, so all that may be one");
        let without_ranges =
            |mesh_mode| Kept::State(NodeState { mesh_mode, strict_workloads: false, ranges: Vec::new() });
        for (kept, minimum, is_held) in [
            (without_ranges(Mode::Strict), Mode::Disable, true),
            (without_ranges(Mode::Permissive), Mode::Strict, true),
            (Kept::Nothing, Mode::Strict, true),
            (without_ranges(Mode::Permissive), Mode::Disable, false),
            (Kept::Nothing, Mode::Permissive, false),
        ] {
            let initial = kept.initial(&[], minimum);
            let expected = if is_held { PRIVATE_RANGES.len() } else { 0 };
            assert_eq!(initial.ranges.len(), expected, "{kept:?} {minimum:?}");
        }
    }
}

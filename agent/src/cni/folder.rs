//! The folder of a node's CNI configurations, and which of them a runtime uses.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tacit_identity::atomic_file;

use super::{CniError, conflist::Network};

/// Most bytes of a configuration.
const MAX_BYTES: u64 = 1 << 20;
/// Configurations of one plugin. A list is made of the one in use, and the original is kept beside it under another name.
const SINGLE: [&str; 2] = ["conf", "json"];
const LIST: &str = "conflist";
/// Ending of an original, which runtimes do not read.
const ORIGINAL: &str = "tacit-original";

/// A configuration in the folder.
struct Found {
    path: PathBuf,
    network: Network,
    /// Permissions of the file, which a new version keeps.
    mode: u32,
}

/// Puts the plugin `entry` into the configuration that a runtime uses: the first one by name that is valid. Returns its path, or
/// `None` if there is none yet.
///
/// # Errors
/// [`CniError`] if the folder cannot be read or written.
pub(super) fn chain(folder: &Path, entry: &Value) -> Result<Option<PathBuf>, CniError> {
    let Some(found) = configurations(folder)?.into_iter().next() else { return Ok(None) };
    let chained = found.network.with(entry);
    if is_list(&found.path) {
        if found.network != chained {
            write(&found.path, &chained, found.mode)?;
        }
        return Ok(Some(found.path));
    }
    let list = found.path.with_extension(LIST);
    write(&list, &chained, found.mode)?;
    // Only now: the runtime must not find a folder without a network.
    let original = original(&found.path);
    fs::rename(&found.path, &original).map_err(CniError::file("rename to", &original))?;
    Ok(Some(list))
}

/// Removes the plugin from all configurations. Returns the number of changed ones.
///
/// # Errors
/// As [`chain`].
pub(super) fn unchain(folder: &Path) -> Result<usize, CniError> {
    let mut changed = 0;
    for Found { path, network, mode } in configurations(folder)? {
        let without = network.without();
        if !is_list(&path) || without == network {
            continue;
        }
        changed += 1;
        let restored = SINGLE.map(|extension| path.with_extension(extension));
        let restored =
            restored.into_iter().map(|path| (original(&path), path)).find(|(kept, _)| kept.exists());
        let Some((kept, single)) = restored else {
            write(&path, &without, mode)?;
            continue;
        };
        // A runtime that reads the folder meanwhile finds the same network in both.
        fs::rename(&kept, &single).map_err(CniError::file("rename to", &single))?;
        fs::remove_file(&path).map_err(CniError::file("remove", &path))?;
    }
    Ok(changed)
}

/// Returns the valid configurations, the one in use first: containerd and CRI-O sort by name.
fn configurations(folder: &Path) -> Result<Vec<Found>, CniError> {
    let failed = CniError::file("read", folder);
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let paths: io::Result<Vec<PathBuf>> = entries.map(|entry| Ok(entry?.path())).collect();
    let mut paths = paths.map_err(&failed)?;
    paths.retain(|path| is_list(path) || SINGLE.iter().any(|extension| has_extension(path, extension)));
    paths.sort();
    let mut found = Vec::new();
    for path in paths {
        match read(&path) {
            Ok(Some((network, mode))) => found.push(Found { path, network, mode }),
            Ok(None) => {}
            Err(reason) => tracing::debug!(path = %path.display(), reason, "no CNI configuration"),
        }
    }
    Ok(found)
}

/// Returns `None` if the file is gone.
fn read(path: &Path) -> Result<Option<(Network, u32)>, String> {
    let Some(file) = atomic_file::open(path).map_err(|error| error.to_string())? else { return Ok(None) };
    let text = atomic_file::text(&file, path, MAX_BYTES).map_err(|error| error.to_string())?;
    let mode = file.metadata().map_err(|error| error.to_string())?.mode() & 0o777;
    Ok(Some((Network::parse(&text)?, mode)))
}

fn write(path: &Path, network: &Network, mode: u32) -> Result<(), CniError> {
    atomic_file::replace(path, mode, network.text().as_bytes()).map_err(CniError::Write)
}

fn is_list(path: &Path) -> bool {
    has_extension(path, LIST)
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found == extension)
}

fn original(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(ORIGINAL);
    name.into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use serde_json::json;
    use tacit_testing::Scratch;

    use super::*;

    const LIST: &str = r#"{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}]}"#;
    const CONF: &str = r#"{"cniVersion": "0.3.1", "name": "meta", "type": "multus"}"#;

    fn entry() -> Value {
        json!({"type": "tacit-cni", "socket": "/run/a"})
    }

    fn types(path: &Path) -> Vec<String> {
        let root: Value = serde_json::from_str(&fs::read_to_string(path).expect("there")).expect("JSON");
        let plugins = root["plugins"].as_array().expect("a list");
        plugins.iter().map(|plugin| plugin["type"].as_str().expect("text").to_owned()).collect()
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).expect("a folder");
        let mut names: Vec<_> =
            entries.map(|entry| entry.expect("there").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_configuration_in_use_is_changed_and_restored() {
        let scratch = Scratch::new();
        let folder = scratch.path();
        assert_eq!(chain(&folder.join("absent"), &entry()).expect("no error"), None);
        assert_eq!(chain(folder, &entry()).expect("no error"), None, "no network yet");
        for (name, text) in
            [("00-broken.conflist", "{"), ("10-b.conflist", LIST), ("20-c.conflist", LIST), ("1.txt", LIST)]
        {
            fs::write(folder.join(name), text).expect("written");
        }
        let used = folder.join("10-b.conflist");
        fs::set_permissions(&used, fs::Permissions::from_mode(0o600)).expect("changed");
        assert_eq!(chain(folder, &entry()).expect("chained").as_ref(), Some(&used));
        assert_eq!(types(&used), ["bridge", "tacit-cni"]);
        assert_eq!(fs::metadata(&used).expect("there").permissions().mode() & 0o777, 0o600);
        assert_eq!(types(&folder.join("20-c.conflist")), ["bridge"]);
        let written = fs::metadata(&used).expect("there").ino();
        chain(folder, &entry()).expect("no error");
        assert_eq!(fs::metadata(&used).expect("there").ino(), written, "not written again");

        let earlier = folder.join("05-a.conflist");
        fs::write(&earlier, LIST).expect("written");
        assert_eq!(chain(folder, &entry()).expect("chained"), Some(earlier));
        assert_eq!(unchain(folder).expect("restored"), 2);
        assert_eq!(types(&used), ["bridge"]);
        assert_eq!(unchain(folder).expect("nothing to do"), 0);
        assert_eq!(fs::read_to_string(folder.join("00-broken.conflist")).expect("there"), "{");
    }

    #[test]
    fn one_plugin_becomes_a_list_and_comes_back() {
        let scratch = Scratch::new();
        let folder = scratch.path();
        let single = folder.join("00-multus.conf");
        for _ in 0..2 {
            // Its owner writes it again.
            fs::write(&single, CONF).expect("written");
            let list = chain(folder, &entry()).expect("chained").expect("in use");
            assert_eq!(types(&list), ["multus", "tacit-cni"]);
            assert_eq!(names(folder), ["00-multus.conf.tacit-original", "00-multus.conflist"]);
        }
        assert_eq!(unchain(folder).expect("restored"), 1);
        assert_eq!(names(folder), ["00-multus.conf"]);
        assert_eq!(fs::read_to_string(&single).expect("there"), CONF);
    }
}

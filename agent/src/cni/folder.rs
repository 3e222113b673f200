//! The folder of a node's CNI configurations, and which of them a runtime uses.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, RenameFlags, renameat2},
};
use serde_json::Value;
use tacit_identity::atomic_file;

use super::{CniError, conflist::Network};

/// Most bytes of a configuration.
const MAX_BYTES: u64 = 1 << 20;
/// Endings of configurations of one plugin.
const SINGLE: [&str; 2] = ["conf", "json"];
const LIST: &str = "conflist";
/// Ending of a list that is made of a configuration of one plugin. `-` sorts before `.`, so a runtime uses the list.
const MADE: &str = "-tacit.conflist";

/// A configuration in the folder.
struct Found {
    path: PathBuf,
    text: String,
    network: Network,
}

/// The configuration that has the plugin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chained {
    pub(super) path: PathBuf,
    /// It did not have the plugin before.
    pub(super) is_written: bool,
}

/// Puts the plugin `entry` into the configuration that a runtime uses: the first one by name that is valid. Returns the
/// configuration that has it, or `None` if there is none yet. `programs` is the folder of the plugins' programs.
///
/// # Errors
/// [`CniError`] if a folder cannot be read or written, or if `programs` is not the folder that the runtime uses.
pub(super) fn chain(folder: &Path, programs: &Path, entry: &Value) -> Result<Option<Chained>, CniError> {
    let (found, made) = configurations(folder)?;
    let Some(first) = found.first() else { return Ok(None) };
    if !first.network.types().any(|plugin| programs.join(plugin).exists()) {
        return Err(CniError::OtherPrograms {
            configuration: first.path.clone(),
            programs: programs.to_owned(),
        });
    }
    let chained = first.network.with(entry);
    let (path, is_written) = if is_list(&first.path) {
        let is_other = first.network != chained;
        if is_other && !write_over(first, &chained)? {
            // The event of the other version leads to the next look.
            return Ok(None);
        }
        (first.path.clone(), is_other)
    } else {
        let list = made_of(&first.path);
        let is_other = read(&list).ok().flatten().is_none_or(|(_, current)| current != chained);
        if is_other {
            atomic_file::replace(&list, mode_of(&first.path), chained.text().as_bytes())?;
        }
        (list, is_other)
    };
    for other in made.iter().filter(|other| **other != path) {
        fs::remove_file(other).map_err(CniError::file("remove", other))?;
    }
    Ok(Some(Chained { path, is_written }))
}

/// Removes the plugin from all configurations. Returns the number of changed ones.
///
/// # Errors
/// As [`chain`].
pub(super) fn unchain(folder: &Path) -> Result<usize, CniError> {
    let (found, made) = configurations(folder)?;
    let mut changed = made.len();
    for list in &made {
        fs::remove_file(list).map_err(CniError::file("remove", list))?;
    }
    for found in found.iter().filter(|found| is_list(&found.path)) {
        let without = found.network.without();
        if without != found.network && write_over(found, &without)? {
            changed += 1;
        }
    }
    Ok(changed)
}

/// Returns the valid configurations of others, the one in use first: containerd and CRI-O sort by name. Then the lists that were
/// made here.
fn configurations(folder: &Path) -> Result<(Vec<Found>, Vec<PathBuf>), CniError> {
    let failed = CniError::file("read", folder);
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), Vec::new())),
        Err(error) => return Err(failed(error)),
    };
    let paths: io::Result<Vec<PathBuf>> = entries.map(|entry| Ok(entry?.path())).collect();
    let mut paths = paths.map_err(&failed)?;
    paths.retain(|path| is_list(path) || SINGLE.iter().any(|extension| has_extension(path, extension)));
    paths.sort();
    let (made, others): (Vec<_>, Vec<_>) = paths.into_iter().partition(|path| is_made(path));
    let mut found = Vec::new();
    for path in others {
        match read(&path) {
            Ok(Some((text, network))) => found.push(Found { path, text, network }),
            // A link whose target is not visible here is in use all the same.
            Ok(None) if path.is_symlink() => {
                tracing::debug!(path = %path.display(), "the target of this CNI configuration is not visible to the agent");
            }
            Ok(None) => {}
            Err(reason) => tracing::debug!(path = %path.display(), reason, "no CNI configuration"),
        }
    }
    Ok((found, made))
}

/// Returns `None` if the file is gone.
fn read(path: &Path) -> Result<Option<(String, Network)>, String> {
    let Some(file) = atomic_file::open(path).map_err(|error| error.to_string())? else { return Ok(None) };
    let text = atomic_file::text(&file, path, MAX_BYTES).map_err(|error| error.to_string())?;
    let network = Network::parse(&text)?;
    Ok(Some((text, network)))
}

/// Replaces a configuration. Returns false if its owner has written another version since it was read, or has removed it: that
/// stays so.
fn write_over(found: &Found, network: &Network) -> Result<bool, CniError> {
    // What a link leads to is changed, and the link stays.
    let path = &found.path.canonicalize().unwrap_or_else(|_| found.path.clone());
    let new = path.with_extension(format!("{LIST}.tacit-{}", std::process::id()));
    atomic_file::replace(&new, mode_of(path), network.text().as_bytes())?;
    if let Ok(owner) = fs::metadata(path) {
        // The file of another user stays that user's, where that is allowed.
        let _ = std::os::unix::fs::chown(&new, Some(owner.uid()), Some(owner.gid()));
    }
    let put_in_place = || fs::rename(&new, path).map_err(CniError::file("rename to", path));
    let done = match renameat2(AT_FDCWD, &new, AT_FDCWD, path, RenameFlags::RENAME_EXCHANGE) {
        // Any content but the one that was read is the owner's.
        Ok(()) if fs::read(&new).ok().as_deref() != Some(found.text.as_bytes()) => {
            return put_in_place().map(|()| false);
        }
        Ok(()) => Ok(true),
        Err(Errno::ENOENT) => Ok(false),
        // The file system cannot exchange.
        Err(Errno::EINVAL | Errno::ENOSYS) => return put_in_place().map(|()| true),
        Err(error) => Err(CniError::file("rename to", path)(error.into())),
    };
    fs::remove_file(&new).map_err(CniError::file("remove", &new)).and(done)
}

/// Permissions of a configuration, which its new version keeps.
fn mode_of(path: &Path) -> u32 {
    fs::metadata(path).map_or(0o600, |found| found.mode() & 0o777)
}

fn is_list(path: &Path) -> bool {
    has_extension(path, LIST)
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found == extension)
}

fn is_made(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(MADE))
}

/// Returns the list that is made of the configuration of one plugin at `path`.
fn made_of(path: &Path) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(MADE);
    path.with_file_name(name)
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

    /// A folder with the programs of the lists.
    fn programs() -> Scratch {
        let folder = Scratch::new();
        for program in ["bridge", "multus"] {
            fs::write(folder.path().join(program), "").expect("written");
        }
        folder
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
        let (scratch, programs) = (Scratch::new(), programs());
        let (folder, programs) = (scratch.path(), programs.path());
        let chain = |folder: &Path| {
            chain(folder, programs, &entry()).map(|chained| chained.map(|chained| chained.path))
        };
        assert_eq!(chain(&folder.join("absent")).expect("no error"), None);
        assert_eq!(chain(folder).expect("no error"), None, "no network yet");
        for (name, text) in
            [("00-broken.conflist", "{"), ("10-b.conflist", LIST), ("20-c.conflist", LIST), ("1.txt", LIST)]
        {
            fs::write(folder.join(name), text).expect("written");
        }
        let used = folder.join("10-b.conflist");
        fs::set_permissions(&used, fs::Permissions::from_mode(0o600)).expect("changed");
        assert_eq!(chain(folder).expect("chained").as_ref(), Some(&used));
        assert_eq!(types(&used), ["bridge", "tacit-cni"]);
        assert_eq!(fs::metadata(&used).expect("there").permissions().mode() & 0o777, 0o600);
        assert_eq!(types(&folder.join("20-c.conflist")), ["bridge"]);
        let written = fs::metadata(&used).expect("there").ino();
        chain(folder).expect("no error");
        assert_eq!(fs::metadata(&used).expect("there").ino(), written, "not written again");

        let earlier = folder.join("05-a.conflist");
        fs::write(&earlier, LIST).expect("written");
        assert_eq!(chain(folder).expect("chained"), Some(earlier));
        assert_eq!(unchain(folder).expect("restored"), 2);
        assert_eq!(types(&used), ["bridge"]);
        assert_eq!(unchain(folder).expect("nothing to do"), 0);
        assert_eq!(fs::read_to_string(folder.join("00-broken.conflist")).expect("there"), "{");
    }

    #[test]
    fn of_one_plugin_a_list_is_made_and_the_original_stays() {
        let (scratch, programs) = (Scratch::new(), programs());
        let (folder, programs) = (scratch.path(), programs.path());
        let chain = |folder: &Path| {
            chain(folder, programs, &entry()).map(|chained| chained.map(|chained| chained.path))
        };
        let single = folder.join("00-multus.conf");
        fs::write(&single, CONF).expect("written");
        let list = chain(folder).expect("chained").expect("in use");
        assert!(list < single, "a runtime uses the first by name");
        assert_eq!(types(&list), ["multus", "tacit-cni"]);
        let written = fs::metadata(&list).expect("there").ino();
        chain(folder).expect("no error");
        assert_eq!(fs::metadata(&list).expect("there").ino(), written, "not written again");
        // Its owner changes it, which the list follows.
        fs::write(&single, CONF.replace("meta", "other")).expect("written");
        chain(folder).expect("chained");
        assert!(fs::read_to_string(&list).expect("there").contains("other"));
        assert_eq!(names(folder), ["00-multus-tacit.conflist", "00-multus.conf"]);
        // Its owner removes it.
        fs::rename(&single, folder.join("05-x.conf")).expect("renamed");
        chain(folder).expect("chained");
        assert_eq!(names(folder), ["05-x-tacit.conflist", "05-x.conf"]);
        assert_eq!(unchain(folder).expect("restored"), 1);
        assert_eq!(names(folder), ["05-x.conf"]);
    }

    #[test]
    fn a_version_that_its_owner_writes_meanwhile_stays() {
        let scratch = Scratch::new();
        let path = scratch.path().join("10-a.conflist");
        let network = Network::parse(LIST).expect("a list");
        let found =
            |text: &str| Found { path: path.clone(), text: text.to_owned(), network: network.clone() };
        fs::write(&path, "newer").expect("written");
        assert!(!write_over(&found("older"), &network).expect("no error"));
        assert_eq!(fs::read_to_string(&path).expect("there"), "newer");
        fs::write(&path, [0xff]).expect("written");
        assert!(!write_over(&found("older"), &network).expect("no error"), "not even text");
        fs::write(&path, "newer").expect("written");
        assert!(write_over(&found("newer"), &network).expect("no error"));
        assert_eq!(fs::read_to_string(&path).expect("there"), network.text());
        fs::remove_file(&path).expect("removed");
        assert!(!write_over(&found("newer"), &network).expect("no error"));
        assert!(names(scratch.path()).is_empty(), "what its owner has removed stays away");
    }

    #[test]
    fn a_list_whose_programs_are_elsewhere_is_not_changed() {
        let (scratch, programs) = (Scratch::new(), Scratch::new());
        fs::write(scratch.path().join("10-a.conflist"), LIST).expect("written");
        let error =
            chain(scratch.path(), programs.path(), &entry()).expect_err("no plugin of the list is there");
        assert!(error.to_string().contains("programFolder"), "{error}");
        assert_eq!(types(&scratch.path().join("10-a.conflist")), ["bridge"]);
    }
}

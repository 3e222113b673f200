//! Tar archives that depend on their contents alone: sorted by the caller, owned by root, as old as the epoch.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context as _, Result};
use tar::{Builder, EntryType, Header};

/// Mode of programs and libraries.
pub(super) const PROGRAM_MODE: u32 = 0o755;
const FOLDER_MODE: u32 = 0o755;
const DATA_MODE: u32 = 0o644;

/// A file of an archive.
pub(super) struct Entry {
    /// Without a slash in front.
    pub(super) path: String,
    pub(super) bytes: Vec<u8>,
    pub(super) mode: u32,
}

impl Entry {
    /// A program or a library, read through symbolic links.
    pub(super) fn program(path: &str, from: &Path) -> Result<Self> {
        let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        Ok(Self { path: path.to_owned(), bytes, mode: PROGRAM_MODE })
    }

    /// A file that is read only.
    pub(super) fn data(path: impl Into<String>, bytes: impl Into<Vec<u8>>) -> Self {
        Self { path: path.into(), bytes: bytes.into(), mode: DATA_MODE }
    }
}

/// The archive of the entries in their order, each folder before its first file.
pub(super) fn tar(entries: &[Entry]) -> Result<Vec<u8>> {
    let mut builder = Builder::new(Vec::new());
    let mut folders = BTreeSet::new();
    for entry in entries {
        for (at, _) in entry.path.match_indices('/') {
            let folder = &entry.path[..=at];
            if folders.insert(folder.to_owned()) {
                append(&mut builder, folder, EntryType::Directory, FOLDER_MODE, &[])?;
            }
        }
        append(&mut builder, &entry.path, EntryType::Regular, entry.mode, &entry.bytes)?;
    }
    builder.into_inner().context("the archive cannot be ended")
}

fn append(
    builder: &mut Builder<Vec<u8>>,
    path: &str,
    kind: EntryType,
    mode: u32,
    bytes: &[u8],
) -> Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(bytes.len() as u64);
    builder.append_data(&mut header, path, bytes).with_context(|| format!("cannot add {path} to the archive"))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn folders_come_before_their_files_and_once() {
        let entries =
            [Entry::data("usr/bin/a", "A"), Entry::data("usr/bin/b", "B"), Entry::data("usr/c", "C")];
        let bytes = tar(&entries).expect("archive");
        let mut archive = tar::Archive::new(bytes.as_slice());
        let found: Vec<String> = archive
            .entries()
            .expect("entries")
            .map(|entry| entry.expect("entry").path().expect("path").to_string_lossy().into_owned())
            .collect();
        assert_eq!(found, ["usr/", "usr/bin/", "usr/bin/a", "usr/bin/b", "usr/c"]);
    }

    #[test]
    fn nothing_but_the_contents_decides_the_bytes() {
        let make = || tar(&[Entry::data("x", "same")]).expect("archive");
        assert_eq!(make(), make());
        let bytes = make();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut entry = archive.entries().expect("entries").next().expect("one").expect("entry");
        let header = entry.header();
        let owner = (header.uid().expect("uid"), header.gid().expect("gid"), header.mtime().expect("mtime"));
        assert_eq!(owner, (0, 0, 0));
        let mut text = String::new();
        entry.read_to_string(&mut text).expect("text");
        assert_eq!(text, "same");
    }
}

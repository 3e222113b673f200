//! Helpers that the unit tests of several crates share. Only tests depend on this crate.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod pki;

use std::{
    env,
    fs::{self, DirBuilder},
    hash::{BuildHasher as _, Hasher as _, RandomState},
    os::unix::fs::DirBuilderExt as _,
    panic::catch_unwind,
    path::{Path, PathBuf},
};

/// A folder that is removed when the test ends.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes a new, empty folder below the temporary folder.
    ///
    /// # Panics
    /// If the folder cannot be made.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "a default value should not make a folder")]
    pub fn new() -> Self {
        let name = RandomState::new().build_hasher().finish();
        let path = env::temp_dir().join(format!("tacit-test-{name:016x}"));
        // Whatever the umask: agents trust no socket in a folder that others can write.
        DirBuilder::new().mode(0o755).create(&path).expect("a new folder");
        Self(path)
    }

    /// Returns the path of the folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs `run` on the content of each file in `folder`, such as the corpus of a fuzz target.
///
/// # Panics
/// If `run` panics, with the name of the file. If the folder cannot be read or has fewer than five files.
pub fn replay(folder: &Path, run: fn(&[u8])) {
    let mut files = 0;
    for entry in fs::read_dir(folder).expect("the corpus is committed") {
        let file = entry.expect("readable").path();
        let input = fs::read(&file).expect("readable");
        let outcome = catch_unwind(|| run(&input));
        assert!(outcome.is_ok(), "{}", file.display());
        files += 1;
    }
    assert!(files >= 5, "only {files} files in {}", folder.display());
}

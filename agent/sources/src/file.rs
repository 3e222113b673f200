//! Reads files of bounded size.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use tacit_core::yaml::Mistakes;

/// Maximum file size in bytes, enough for a directory of 40,000 workloads with 200 bytes each.
pub const FILE_MAX_BYTES: u64 = 8 << 20;

/// The reason why a file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A system call failed.
    #[error("cannot read {}: {source}; check the path and the permissions", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        #[source]
        source: io::Error,
    },
    /// A directory, device or pipe.
    #[error("{} is not a regular file; configure the path of a file", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// Larger than [`FILE_MAX_BYTES`].
    #[error("{} is larger than {FILE_MAX_BYTES} bytes; reduce its size", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Not UTF-8.
    #[error("{} is not valid UTF-8; save the file as UTF-8", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
    },
}

/// The reason why a file could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The file is invalid.
    #[error(transparent)]
    Invalid(#[from] Mistakes),
    /// The file is invalid, and has no lines that could be named.
    #[error("{}: {problem}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// Reads `path` and parses its text with `parse`.
///
/// # Errors
/// [`LoadError`] if the file cannot be read or is invalid.
pub fn load<T>(path: &Path, parse: impl FnOnce(&str) -> Result<T, Mistakes>) -> Result<T, LoadError> {
    Ok(parse(&read(path)?)?)
}

/// Returns the text of a regular file of at most [`FILE_MAX_BYTES`].
///
/// # Errors
/// [`ReadError`] with the path.
pub(crate) fn read(path: &Path) -> Result<String, ReadError> {
    text(path, read_bytes(path)?)
}

/// Returns `content`, which was read from `path`, as text.
///
/// # Errors
/// [`ReadError::NotText`].
pub(crate) fn text(path: &Path, content: Vec<u8>) -> Result<String, ReadError> {
    String::from_utf8(content).map_err(|_| ReadError::NotText { path: path.to_owned() })
}

/// Returns the content of a regular file of at most [`FILE_MAX_BYTES`].
///
/// # Errors
/// [`ReadError`] with the path.
pub(crate) fn read_bytes(path: &Path) -> Result<Vec<u8>, ReadError> {
    let io = |source| ReadError::Io { path: path.to_owned(), source };
    // Checked before opening, because opening a pipe waits for a writer.
    if !fs::metadata(path).map_err(io)?.is_file() {
        return Err(ReadError::NotAFile { path: path.to_owned() });
    }
    let mut bytes = Vec::new();
    File::open(path).map_err(io)?.take(FILE_MAX_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > FILE_MAX_BYTES {
        return Err(ReadError::TooLarge { path: path.to_owned() });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_readable_regular_utf8_files_are_read() {
        let folder = std::env::temp_dir().join(format!("tacit-yaml-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for the test");
        let file = |name: &str, bytes: &[u8]| {
            let path = folder.join(name);
            std::fs::write(&path, bytes).expect("a file for the test");
            path
        };
        assert_eq!(read(&file("good", "größe".as_bytes())).expect("readable"), "größe");
        let huge = vec![b' '; usize::try_from(FILE_MAX_BYTES).expect("fits") + 1];
        assert!(matches!(read(&file("huge", &huge)), Err(ReadError::TooLarge { .. })));
        assert!(matches!(read(&file("binary", &[0xff])), Err(ReadError::NotText { .. })));
        assert!(matches!(read(&folder), Err(ReadError::NotAFile { .. })));
        assert!(matches!(read(&folder.join("absent")), Err(ReadError::Io { .. })));
        std::fs::remove_dir_all(&folder).expect("removable");
    }
}

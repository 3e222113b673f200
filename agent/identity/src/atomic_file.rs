//! Small files, read whole and written whole or not at all.
//!
//! A file is written beside its place and renamed into it, so that readers, and a process that starts after a crash, find
//! the old content or the new. Each writer has a temporary file of its own: of several at once the last one stays. Who
//! must know what it replaces holds a lock meanwhile.

use std::{
    fs::{self, File, OpenOptions},
    hash::{BuildHasher as _, Hasher as _, RandomState},
    io::{self, Read, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

/// Why a file cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}: {source}", path.display())]
pub struct FileError {
    /// The operation.
    pub what: &'static str,
    /// On which file.
    pub path: PathBuf,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

impl FileError {
    /// For `map_err`: what was tried on `path`.
    pub fn of<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Self + 'a {
        move |source| Self { what, path: path.into(), source }
    }
}

/// Opens `path`; `None` when there is no such file.
pub fn open(path: &Path) -> Result<Option<File>, FileError> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(FileError::of("open", path)(e)),
    }
}

/// The text of `file`, which was opened at `path`. More than `max_bytes` is an error, not a part of it.
pub fn text(file: &File, path: &Path, max_bytes: u64) -> Result<String, FileError> {
    let text = at_most(file, max_bytes)
        .and_then(|bytes| String::from_utf8(bytes).map_err(|_| io::ErrorKind::InvalidData.into()));
    text.map_err(FileError::of("read", path))
}

/// All that can be read, when that is not more than `max_bytes`.
pub fn at_most(from: impl Read, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(max_bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes {
        let problem = format!("it is larger than {max_bytes} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, problem));
    }
    Ok(bytes)
}

/// Puts `content` at `path`, on disk when this returns.
pub fn replace(path: &Path, mode: u32, content: &[u8]) -> Result<(), FileError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary = temporary(path);
    let written = write_new(&temporary, mode, content)
        .and_then(|()| fs::rename(&temporary, path).map_err(FileError::of("rename to", path)));
    if written.is_err() {
        // The caller gets the first error.
        let _ = fs::remove_file(&temporary);
    }
    written?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(FileError::of("sync", folder))
}

/// A name beside `path` that nobody else uses.
fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{:016x}.new", RandomState::new().build_hasher().finish()))
}

fn write_new(path: &Path, mode: u32, content: &[u8]) -> Result<(), FileError> {
    let mut file = OpenOptions::new();
    let file = file.create_new(true).write(true).mode(mode).open(path);
    let mut file = file.map_err(FileError::of("create", path))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(FileError::of("write", path))
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt as _, thread};

    use super::*;
    use tacit_testing::Scratch;

    #[test]
    fn of_several_writers_one_stays_whole_and_nothing_else_is_left() {
        let folder = Scratch::new();
        let path = folder.path().join("file");
        thread::scope(|scope| {
            for writer in 0..8u8 {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..50 {
                        replace(path, 0o600, &[writer; 4096]).expect("written");
                    }
                });
            }
        });
        let content = fs::read(&path).expect("there");
        assert_eq!(content, vec![content[0]; 4096]);
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1);
    }

    #[test]
    fn a_file_that_cannot_be_replaced_leaves_nothing_behind() {
        let folder = Scratch::new();
        let path = folder.path().join("file");
        fs::create_dir(&path).expect("made");
        let error = replace(&path, 0o600, b"content").expect_err("a folder is in its place");
        assert_eq!((error.what, error.path), ("rename to", path));
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1);
    }

    #[test]
    fn a_file_is_read_whole_or_not_at_all() {
        let folder = Scratch::new();
        let path = folder.path().join("file");
        assert!(open(&path).expect("no error").is_none());
        fs::write(&path, "12345").expect("written");
        let file = || open(&path).expect("no error").expect("there");
        assert_eq!(text(&file(), &path, 5).expect("fits"), "12345");
        let error = text(&file(), &path, 4).expect_err("too long");
        assert!(error.to_string().ends_with("file: it is larger than 4 bytes"), "{error}");
        fs::write(&path, [0xff]).expect("written");
        text(&file(), &path, 5).expect_err("no text");
    }
}

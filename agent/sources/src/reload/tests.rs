//! Tests with real files. Each test waits for a state with a deadline, and none sleeps.

use std::{fs, os::unix::fs::symlink};

use tacit_core::yaml::Mistake;

use super::*;

/// Longer than a busy machine needs.
const DEADLINE: Duration = Duration::from_secs(30);
/// Disables re-reads, so that only inotify reports changes.
const NEVER: Duration = Duration::from_secs(3600);

/// A folder for one test, removed at the end.
struct TempFolder(PathBuf);

impl TempFolder {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tacit-reload-{}-{test}", std::process::id()));
        fs::create_dir_all(&path).expect("a folder for the test");
        Self(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).expect("a file for the test");
        path
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// Parses a version. Text that contains `bad` is invalid.
fn parse(text: &str) -> Result<String, Mistakes> {
    if text.contains("bad") {
        let mistake = Mistake { line: 1, field: "field".to_owned(), problem: text.to_owned() };
        return Err(Mistakes { file: "file.yaml".to_owned(), list: vec![mistake] });
    }
    Ok(text.to_owned())
}

/// As [`Watched::open`], with another re-read interval.
fn open(path: &Path, reread: Duration) -> Watched<String> {
    let text = file::read(path).expect("readable");
    let initial = parse(&text).expect("good");
    let hasher = RandomState::new();
    let loaded = digest(&hasher, &Ok(text.into_bytes()));
    let named = path.to_owned();
    let parse = move |content| Ok(parse(&file::text(&named, content)?)?);
    Watched::run(path.to_owned(), initial, Arc::new(parse), (hasher, loaded), reread)
}

#[tokio::test]
async fn a_file_that_is_no_text_can_be_watched() {
    let folder = TempFolder::new("content");
    let file = folder.0.join("file.der");
    fs::write(&file, [0x30, 0xff]).expect("written");
    let even = |content: &[u8]| match content.len() % 2 {
        0 => Ok(content.to_vec()),
        _ => Err("an odd number of bytes".to_owned()),
    };
    let watched = Watched::open_content(&file, even).expect("even");
    let mut states = watched.states();
    fs::write(&file, [0x30]).expect("written");
    let refused = states.wait_for(|state| state.refusals == 1).await.expect("watched").last_error.clone();
    assert!(refused.expect("an error").contains("file.der: an odd number of bytes"));
    assert_eq!(*watched.current(), [0x30, 0xff]);
    fs::write(&file, [0x30, 0xfe, 1, 2]).expect("written");
    states.wait_for(|state| state.loads == 2).await.expect("watched");
    assert_eq!(*watched.current(), [0x30, 0xfe, 1, 2]);
    let error = Watched::open_content(folder.0.join("none"), even).expect_err("there is none");
    assert!(error.to_string().contains("none"), "{error}");
}

async fn until(
    watched: &Watched<String>,
    what: &str,
    condition: impl Fn(&ReloadState) -> bool,
) -> ReloadState {
    let mut state = watched.state.clone();
    let reached = tokio::time::timeout(DEADLINE, state.wait_for(|state| condition(state))).await;
    let reached =
        reached.unwrap_or_else(|_| panic!("{what}: not before the deadline: {:?}", watched.state()));
    reached.expect("the task lives as long as the watched file").clone()
}

#[test]
fn a_new_content_counts_when_read_twice_in_a_row() {
    for (checked, last, digest, expected) in [
        (1, None, 1, Settle::Unchanged),
        (1, Some(2), 1, Settle::Unchanged),
        (1, None, 2, Settle::ReadAgain),
        (1, Some(2), 2, Settle::Settled),
        (1, Some(2), 3, Settle::ReadAgain),
    ] {
        assert_eq!(settle(checked, last, digest), expected, "{checked} {last:?} {digest}");
    }
}

#[tokio::test]
async fn a_good_version_is_published_and_a_bad_one_refused() {
    let folder = TempFolder::new("versions");
    let path = folder.write("file.yaml", "one");
    let watched = open(&path, NEVER);
    let mut values = watched.subscribe();
    assert_eq!(*watched.current(), "one");

    folder.write("file.yaml", "two");
    let state = until(&watched, "second version", |state| state.loads == 2).await;
    assert_eq!((state.refusals, state.last_error), (0, None));
    assert_eq!(**values.borrow_and_update(), "two");

    folder.write("file.yaml", "bad three");
    let state = until(&watched, "bad version", |state| state.refusals == 1).await;
    assert_eq!(state.last_error.as_deref(), Some("file.yaml:1: field: bad three"));
    assert_eq!(state.loads, 2);
    assert_eq!(*watched.current(), "two");
    assert!(!values.has_changed().expect("the sender lives"));

    // The same invalid content counts once.
    folder.write("file.yaml", "bad three");
    folder.write("file.yaml", "four");
    let state = until(&watched, "good version", |state| state.loads == 3).await;
    assert_eq!((state.refusals, state.last_error), (1, None));
    assert_eq!(*watched.current(), "four");
}

#[tokio::test]
async fn going_back_to_the_version_in_use_clears_the_error_without_a_load() {
    let folder = TempFolder::new("back");
    let path = folder.write("file.yaml", "one");
    let watched = open(&path, NEVER);
    folder.write("file.yaml", "bad");
    until(&watched, "bad version", |state| state.last_error.is_some()).await;
    folder.write("file.yaml", "one");
    let state = until(&watched, "back", |state| state.last_error.is_none()).await;
    assert_eq!((state.loads, state.refusals), (1, 1));
}

#[tokio::test]
async fn a_file_renamed_over_the_old_one_is_noticed() {
    let folder = TempFolder::new("rename");
    let path = folder.write("file.yaml", "one");
    let watched = open(&path, NEVER);
    for round in 2..5 {
        let new = folder.write(".file.yaml.tmp", &format!("version {round}"));
        fs::rename(new, &path).expect("renamed");
        until(&watched, "renamed version", |state| state.loads == round).await;
        assert_eq!(*watched.current(), format!("version {round}"));
    }
}

#[tokio::test]
async fn a_deleted_file_leaves_the_last_good_version() {
    let folder = TempFolder::new("delete");
    let path = folder.write("file.yaml", "one");
    let watched = open(&path, NEVER);
    fs::remove_file(&path).expect("removed");
    let state = until(&watched, "deleted", |state| state.refusals == 1).await;
    assert!(state.last_error.is_some_and(|error| error.starts_with("cannot read ")));
    assert_eq!(*watched.current(), "one");
    folder.write("file.yaml", "two");
    until(&watched, "written again", |state| state.loads == 2).await;
    assert_eq!(*watched.current(), "two");
}

#[tokio::test]
async fn a_swapped_data_link_is_noticed() {
    let folder = TempFolder::new("configmap");
    for (version, text) in [("..1", "one"), ("..2", "two")] {
        fs::create_dir(folder.0.join(version)).expect("a folder of a version");
        folder.write(&format!("{version}/file.yaml"), text);
    }
    symlink("..1", folder.0.join("..data")).expect("linked");
    let path = folder.0.join("file.yaml");
    symlink("..data/file.yaml", &path).expect("linked");
    let watched = open(&path, NEVER);

    symlink("..2", folder.0.join("..data_tmp")).expect("linked");
    fs::rename(folder.0.join("..data_tmp"), folder.0.join("..data")).expect("swapped");
    fs::remove_dir_all(folder.0.join("..1")).expect("removed");
    until(&watched, "swapped version", |state| state.loads == 2).await;
    assert_eq!(*watched.current(), "two");
    assert_eq!(watched.state().refusals, 0);
}

#[tokio::test]
async fn changes_without_an_inotify_event_are_re_read() {
    let (folder, elsewhere) = (TempFolder::new("link"), TempFolder::new("elsewhere"));
    let target = elsewhere.write("file.yaml", "one");
    let path = folder.0.join("file.yaml");
    symlink(&target, &path).expect("linked");
    let watched = open(&path, Duration::from_millis(20));
    elsewhere.write("file.yaml", "two");
    until(&watched, "re-read version", |state| state.loads == 2).await;
    assert_eq!(*watched.current(), "two");
}

#[tokio::test]
async fn a_replaced_folder_is_watched_again() {
    let folder = TempFolder::new("folder");
    fs::create_dir(folder.0.join("conf")).expect("a folder");
    let path = folder.write("conf/file.yaml", "one");
    let watched = open(&path, Duration::from_millis(20));
    fs::rename(folder.0.join("conf"), folder.0.join("old")).expect("renamed");
    until(&watched, "gone", |state| state.refusals == 1).await;
    fs::create_dir(folder.0.join("conf")).expect("a folder");
    folder.write("conf/file.yaml", "two");
    until(&watched, "second version", |state| state.loads == 2).await;
}

#[tokio::test]
async fn the_first_version_must_be_good() {
    let folder = TempFolder::new("first");
    let bad = folder.write("bad.yaml", "bad");
    assert!(matches!(Watched::open(&bad, parse), Err(LoadError::Invalid(_))));
    assert!(matches!(Watched::open(folder.0.join("absent.yaml"), parse), Err(LoadError::Read(_))));
    let good = folder.write("good.yaml", "good");
    assert_eq!(*Watched::open(&good, parse).expect("good").current(), "good");
}

#[tokio::test]
async fn a_parser_that_panics_refuses_the_version() {
    let folder = TempFolder::new("panic");
    let path = folder.write("file.yaml", "one");
    let watched = Watched::open(&path, |text: &str| {
        assert!(!text.contains("panic"), "a bug");
        parse(text)
    });
    let watched = watched.expect("good");
    folder.write("file.yaml", "panic");
    until(&watched, "panic", |state| state.refusals == 1).await;
    folder.write("file.yaml", "two");
    until(&watched, "recovered", |state| state.loads == 2).await;
}

#[tokio::test]
async fn a_dropped_watch_ends_its_task() {
    let folder = TempFolder::new("drop");
    let watched = open(&folder.write("file.yaml", "one"), NEVER);
    let mut values = watched.subscribe();
    drop(watched);
    let ended = tokio::time::timeout(DEADLINE, values.changed()).await.expect("before the deadline");
    assert!(ended.is_err(), "the sender is gone with the task");
}

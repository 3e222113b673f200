//! The kernel's verifier checks the programs, and its refusal becomes readable.
//!
//! The error carries the last lines of the verifier's log, where the cause stands. The whole log has up to megabytes:
//! it goes to a file, when asked for.

use std::{
    fs::OpenOptions,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{CgroupSkb, CgroupSockAddr, Program, ProgramError, SchedClassifier, SkLookup, SockOps},
};
use tacit_core::error_chain::format_chain;

use super::KernelError;
use crate::host;

/// Lines of a log that an error shows.
const TAIL_LINES: usize = 12;

/// The destination of a rejected program's log, beyond the lines in the error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VerifierLog {
    /// It is dropped.
    Tail,
    /// It is written to a new file in this folder, which the error names.
    Folder(PathBuf),
}

/// Makes the verifier check one program of the object.
pub(super) fn verify(ebpf: &mut Ebpf, name: &str, log: &VerifierLog) -> Result<(), KernelError> {
    let result = match ebpf.program_mut(name) {
        Some(Program::CgroupSockAddr(p)) => CgroupSockAddr::load(p),
        Some(Program::SockOps(p)) => SockOps::load(p),
        Some(Program::SkLookup(p)) => SkLookup::load(p),
        Some(Program::CgroupSkb(p)) => CgroupSkb::load(p),
        Some(Program::SchedClassifier(p)) => SchedClassifier::load(p),
        _ => Err(ProgramError::UnexpectedProgramType),
    };
    result.map_err(|error| match &error {
        ProgramError::LoadError { io_error, verifier_log } => {
            refused(name, io_error, excerpt(name, &verifier_log.to_string(), log))
        }
        other => refused(name, other, String::new()),
    })
}

/// The error about `program`, or about the whole object.
pub(super) fn refused(program: &str, problem: &dyn std::error::Error, log: String) -> KernelError {
    KernelError::Refused {
        program: program.to_owned(),
        release: host::kernel_release(),
        problem: format_chain(problem),
        log,
    }
}

/// The log's end, and where all of it is.
fn excerpt(program: &str, text: &str, log: &VerifierLog) -> String {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let tail = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n");
    let whole = match log {
        VerifierLog::Tail => format!("{} lines of verifier log; -v writes them to a file", lines.len()),
        VerifierLog::Folder(folder) => match write(folder, program, text) {
            Ok(file) => format!("the whole verifier log is in {}", file.display()),
            Err(error) => {
                format!("the whole verifier log could not be written to {}: {error}", folder.display())
            }
        },
    };
    format!("{tail}\n{whole}")
}

/// Writes a file that must not exist, so that another writer of the folder cannot redirect the write with a link.
fn write(folder: &Path, program: &str, text: &str) -> io::Result<PathBuf> {
    let (pid, mut attempt) = (std::process::id(), 0);
    loop {
        let file = folder.join(format!("tacit-verifier-{program}-{pid}.{attempt}.log"));
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&file) {
            Ok(mut open) => return open.write_all(text.as_bytes()).map(|()| file),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && attempt < FILES_MAX => attempt += 1,
            Err(error) => return Err(error),
        }
    }
}

/// Logs of one process about one program; an agent that starts again is another process.
const FILES_MAX: u32 = 8;

#[cfg(test)]
mod tests {
    use std::fs;

    use aya::EbpfLoader;

    use super::{super::object, *};

    const REFUSED: &str = "steer";
    const REFUSED_SECTION: &str = "sk_lookup";

    #[test]
    fn an_excerpt_is_the_end_of_the_log() {
        let log: String = (1..=40).map(|n| format!("line {n}\n\n")).collect();
        let text = excerpt("connect4", &log, &VerifierLog::Tail);
        assert!(text.starts_with("line 29\nline 30\n"), "{text}");
        assert!(text.ends_with("line 40\n40 lines of verifier log; -v writes them to a file"), "{text}");
        assert_eq!(excerpt("p", "", &VerifierLog::Tail).lines().count(), 2);
    }

    #[test]
    fn the_whole_log_goes_to_a_file_of_its_own() {
        let folder = Folder::new("excerpt");
        let log: String = (1..=40).map(|n| format!("line {n}\n")).collect();
        for _ in 0..2 {
            let text = excerpt("connect4", &log, &VerifierLog::Folder(folder.0.clone()));
            assert_eq!(fs::read_to_string(named_file(&text)).expect("written"), log);
        }
        assert_eq!(fs::read_dir(&folder.0).expect("a folder").count(), 2);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_said_so() {
        let text = excerpt("p", "why", &VerifierLog::Folder("/proc/none".into()));
        assert!(
            text.starts_with("why\nthe whole verifier log could not be written to /proc/none:"),
            "{text}"
        );
    }

    #[test]
    #[ignore = "needs root"]
    fn a_program_that_the_verifier_refuses_is_named_with_kernel_and_cause() {
        // The first instruction is replaced by a return, before anything was put into the return value.
        let broken = object::with_first_instruction(
            super::super::programs::OBJECT,
            REFUSED_SECTION,
            [0x95, 0, 0, 0, 0, 0, 0, 0],
        );
        let mut ebpf = EbpfLoader::new().load(&broken).expect("maps and type information are good");
        let folder = Folder::new("refused");

        let error = verify(&mut ebpf, REFUSED, &VerifierLog::Folder(folder.0.clone()))
            .expect_err("no value to return");

        let text = error.to_string();
        let first = format!("kernel {} refused program {REFUSED}: ", host::kernel_release());
        assert!(text.starts_with(&first), "{text}");
        let whole = fs::read_to_string(named_file(&text)).expect("written");
        assert!(whole.contains("unreachable insn 1") || whole.contains("R0 !read_ok"), "{whole}");
        assert!(text.contains(whole.lines().rfind(|l| !l.is_empty()).expect("not empty")), "{text}");
    }

    fn named_file(text: &str) -> PathBuf {
        let last = text.lines().last().expect("not empty");
        last.strip_prefix("the whole verifier log is in ").expect(last).into()
    }

    struct Folder(PathBuf);

    impl Folder {
        fn new(test: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("tacit-test-verifier-{test}-{}", std::process::id()));
            fs::create_dir_all(&path).expect("the temporary folder can be written");
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

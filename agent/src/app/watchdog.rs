//! Ends an agent whose control runtime is stuck, or whose start is. It takes the place of a liveness probe.
//!
//! A thread sends a byte over a socket pair to a task of the runtime, which sends it back. An answer needs a thread of the runtime
//! and its poller, as an answer of the operator's socket does. Nothing outside the process takes part, so an agent is never judged
//! by the answer of another agent of its node ([ADR 19](../../docs/adr/0019-probes.md)).
//!
//! | the agent | ends after |
//! |---|---|
//! | does not answer | [`UNANSWERED_MAX`] questions in a row |
//! | answers, but has not opened the operator's socket | [`STARTING_MAX`] questions |
//!
//! Questions are counted, not time: a process that was stopped or had no CPU gets all of them again. The end is an exit without a
//! drain. The kernel side stays as after a crash. Threads that carry flows are not asked.

use std::{
    fmt,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Pause after an answer.
const PERIOD: Duration = Duration::from_secs(5);
/// Longest wait for an answer. The next question follows at once, so a stuck agent ends after a minute.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Questions in a row without an answer. With [`ANSWER_MAX`] a minute: a node without free CPU or memory is late by seconds.
const UNANSWERED_MAX: u32 = 12;
/// Questions during the start. With [`PERIOD`] two minutes: loading the programs took up to 10 s, on an emulated machine.
const STARTING_MAX: u32 = 24;
/// Time for the thread of the log to write the last line. It gathers lines for 10 ms, and may be stuck itself.
const LAST_LINE: Duration = Duration::from_millis(500);
/// Exit code of a process that has to be started again.
const EXIT_CODE: i32 = 1;

/// A running watch. Dropping it ends the watch, before the agent shuts down.
pub(super) struct Watchdog {
    has_started: Arc<AtomicBool>,
    _stop: Sender<()>,
}

impl Watchdog {
    /// Starts to watch the current runtime. Requires one.
    ///
    /// # Errors
    /// The system has no socket or no thread.
    pub(super) fn start() -> io::Result<Self> {
        let (asking, answering) = pair(ANSWER_MAX)?;
        answering.set_nonblocking(true)?;
        tokio::spawn(answer(tokio::net::UnixStream::from_std(answering)?));
        let has_started = Arc::<AtomicBool>::default();
        let (stop, stopped) = mpsc::channel();
        let started = has_started.clone();
        thread::Builder::new().name("tacit-watchdog".to_owned()).spawn(move || {
            let mut questions = Questions { stream: asking, number: 0 };
            if let Some(stuck) =
                watch(|| questions.ask_for(ANSWER_MAX), || started.load(Ordering::Relaxed), &stopped, PERIOD)
            {
                end(stuck);
            }
        })?;
        Ok(Self { has_started, _stop: stop })
    }

    /// Ends the limit for the start.
    pub(super) fn started(&self) {
        self.has_started.store(true, Ordering::Relaxed);
    }
}

/// The state of an agent that has to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stuck {
    Silent,
    Starting,
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Silent => "the control threads of this agent do not run",
            Self::Starting => "the start of this agent is stuck before its operator socket",
        })
    }
}

/// The questions of this watch so far.
#[derive(Debug, Default)]
struct Patience {
    unanswered: u32,
    starting: u32,
}

impl Patience {
    /// Counts a question. Returns a value if the agent has to end.
    fn count(&mut self, is_answered: bool, has_started: bool) -> Option<Stuck> {
        self.unanswered = if is_answered { 0 } else { self.unanswered + 1 };
        self.starting = if has_started { 0 } else { self.starting + 1 };
        match (self.unanswered, self.starting) {
            (UNANSWERED_MAX.., _) => Some(Stuck::Silent),
            (_, STARTING_MAX..) => Some(Stuck::Starting),
            _ => None,
        }
    }
}

/// Asks until the agent has to end, or until the other end of `stopped` is dropped.
fn watch(
    mut ask: impl FnMut() -> bool,
    has_started: impl Fn() -> bool,
    stopped: &Receiver<()>,
    period: Duration,
) -> Option<Stuck> {
    let mut patience = Patience::default();
    loop {
        let is_answered = ask();
        let stuck = patience.count(is_answered, has_started());
        let is_stopped = if is_answered {
            matches!(stopped.recv_timeout(period), Err(RecvTimeoutError::Disconnected))
        } else {
            matches!(stopped.try_recv(), Err(TryRecvError::Disconnected))
        };
        if is_stopped {
            return None;
        }
        if stuck.is_some() {
            return stuck;
        }
    }
}

/// The asking end of the socket pair.
struct Questions {
    stream: UnixStream,
    number: u8,
}

impl Questions {
    /// Asks, and takes all the time for an answer: an error at once is none either.
    fn ask_for(&mut self, limit: Duration) -> bool {
        let begun = Instant::now();
        let is_answered = self.ask();
        if !is_answered {
            thread::sleep(limit.saturating_sub(begun.elapsed()));
        }
        is_answered
    }

    /// Returns true if the task answers this very question in time. Late answers to earlier ones are skipped.
    fn ask(&mut self) -> bool {
        self.number = self.number.wrapping_add(1);
        if self.stream.write_all(&[self.number]).is_err() {
            return false;
        }
        let mut answer = [0; 1];
        while self.stream.read_exact(&mut answer).is_ok() {
            if answer == [self.number] {
                return true;
            }
        }
        false
    }
}

/// Returns a pair of sockets. A read of the first ends after `limit`.
fn pair(limit: Duration) -> io::Result<(UnixStream, UnixStream)> {
    let (asking, answering) = UnixStream::pair()?;
    asking.set_read_timeout(Some(limit))?;
    Ok((asking, answering))
}

/// Sends back what arrives. Ends with the watch.
async fn answer(mut stream: tokio::net::UnixStream) {
    let mut question = [0; 1];
    while stream.read_exact(&mut question).await.is_ok() && stream.write_all(&question).await.is_ok() {}
}

fn end(stuck: Stuck) -> ! {
    tracing::error!("{stuck}; it ends itself, to be started again");
    // Nothing tells when the line is written.
    thread::sleep(LAST_LINE);
    std::process::exit(EXIT_CODE);
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Longer than any answer takes here.
    const SOON: Duration = Duration::from_secs(60);

    #[test]
    fn an_agent_ends_after_questions_in_a_row_without_an_answer() {
        let mut patience = Patience::default();
        for _ in 1..UNANSWERED_MAX {
            assert_eq!(patience.count(false, true), None);
        }
        assert_eq!(patience.count(true, true), None, "one answer begins anew");
        for _ in 1..UNANSWERED_MAX {
            assert_eq!(patience.count(false, true), None);
        }
        assert_eq!(patience.count(false, true), Some(Stuck::Silent));
    }

    #[test]
    fn a_start_has_a_limit_of_its_own() {
        let mut patience = Patience::default();
        for _ in 1..STARTING_MAX {
            assert_eq!(patience.count(true, false), None);
        }
        assert_eq!(patience.count(true, false), Some(Stuck::Starting));
        assert_eq!(Patience { starting: STARTING_MAX - 1, unanswered: 0 }.count(true, true), None);
    }

    #[test]
    fn a_watch_ends_with_the_agent_that_shuts_down_and_not_by_its_silence() {
        let (stop, stopped) = mpsc::channel();
        let asked = Cell::new(0);
        let silent = || {
            asked.set(asked.get() + 1);
            false
        };
        assert_eq!(watch(silent, || true, &stopped, Duration::ZERO), Some(Stuck::Silent));
        assert_eq!(asked.get(), UNANSWERED_MAX);
        drop(stop);
        assert_eq!(watch(|| false, || true, &stopped, Duration::ZERO), None);
        assert_eq!(watch(|| true, || true, &stopped, SOON), None, "also during the pause");
    }

    #[test]
    fn a_runtime_answers_while_its_threads_run_and_not_while_they_are_stuck() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let (asking, answering) = pair(SOON).expect("sockets");
        answering.set_nonblocking(true).expect("a socket");
        runtime
            .spawn(async { answer(tokio::net::UnixStream::from_std(answering).expect("a runtime")).await });
        let mut questions = Questions { stream: asking, number: u8::MAX };
        assert!(questions.ask(), "it runs");
        // The only thread waits, as for a lock that is never released.
        let (release, held) = mpsc::channel::<()>();
        let (tell, stuck) = mpsc::channel();
        runtime.spawn(async move {
            tell.send(()).expect("awaited");
            let _ = held.recv();
        });
        stuck.recv().expect("the task runs");
        questions.stream.set_read_timeout(Some(Duration::from_millis(50))).expect("a socket");
        assert!(!questions.ask(), "it is stuck");
        drop(release);
        questions.stream.set_read_timeout(Some(SOON)).expect("a socket");
        assert!(questions.ask(), "it runs again");
    }
}

//! The peer of a flow on another node: does it still answer?
//!
//! An application's connection ends at its agent, whose kernel acknowledges everything. So the kernel of the application would
//! not notice that the peer is gone. Two events make the relay ask the peer's kernel, by a probe on the connection between the nodes:
//!
//! | event | peer answers | peer is silent |
//! |---|---|---|
//! | the application's kernel probes its connection ([`Watch::ask`]) | so does the agent: the probe is delivered | nothing: the application's kernel counts its own probes |
//! | bytes that were sent are not acknowledged ([`Watch::look`]) | nothing | until the peer answers, the agent receives nothing from the application, and has told its kernel ([`Watching::tell`]) |
//!
//! The peer of a half-closed plaintext connection cannot be asked. Probes of the application are delivered at once then.
//!
//! A flow whose peer is silent for the limit of the agent ends.

use std::{
    future::Future as _,
    os::fd::AsFd,
    pin::Pin,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use tacit_kernel::socket::{
    AppStream,
    peer::{PeerState, ask_peer, peer_state, resume_receiving, stop_receiving},
};
use tokio::time::{Instant, Sleep, sleep};

/// Time between the first two looks for an answer. Later ones are further apart.
const LOOK_FIRST: Duration = Duration::from_millis(2);
/// Longest time between two looks. A peer that answers again is noticed by then.
const LOOK_LAST: Duration = Duration::from_millis(250);
/// Time between two probes. The peer's kernel answers one in half a second.
const ASK_AGAIN: Duration = Duration::from_millis(600);
/// In a stall, both times are doubled after this time, tripled after twice this time, and so on.
const LONG_STALL: Duration = Duration::from_secs(10);
/// Longest time between two looks in a stall.
const LOOK_STALLED_MAX: Duration = Duration::from_secs(2);
/// Longest time between two probes in a stall.
const ASK_STALLED_MAX: Duration = Duration::from_secs(10);
/// Time after which an application's probe is no longer answered. It has sent another one by then, or does not want one.
const ASKED_MAX: Duration = Duration::from_secs(10);
/// Silence of a peer after which bytes without an acknowledgement are not a matter of a lost packet.
const STALLED_MIN: Duration = Duration::from_millis(600);
/// Retransmissions without an answer by then.
const STALLED_REPEATS: u32 = 2;
/// Time after the limit in which the application's kernel ends the connection by itself.
const ENDED_BY: Duration = Duration::from_secs(4);
/// The kernel notes the time of an acknowledgement in ticks of up to this length.
const TICK: Duration = Duration::from_millis(10);

/// Called when the peer has answered.
pub type Answer = Box<dyn FnOnce() + Send>;

/// Requests to the task that relays a flow.
#[derive(Default)]
pub struct Watch {
    /// `asked` has changed.
    is_asked: AtomicBool,
    /// Bytes were sent to the peer since the last look.
    has_sent: AtomicBool,
    asked: Mutex<Asked>,
}

#[derive(Default)]
struct Asked {
    task: Option<Waker>,
    answer: Option<Answer>,
}

impl Watch {
    /// Asks the peer, and calls `answer` if its kernel answers. Replaces an earlier call.
    pub fn ask(&self, answer: Answer) {
        let mut asked = self.lock();
        let replaced = asked.answer.replace(answer);
        self.is_asked.store(true, Relaxed);
        if let Some(task) = &asked.task {
            task.wake_by_ref();
        }
        drop(asked);
        drop(replaced);
    }

    /// Has the task look at the peer's acknowledgements if bytes were sent since the last call.
    pub fn look(&self) {
        if self.has_sent.load(Relaxed) && self.has_sent.swap(false, Relaxed) {
            let asked = self.lock();
            self.is_asked.store(true, Relaxed);
            if let Some(task) = &asked.task {
                task.wake_by_ref();
            }
        }
    }

    /// Notes that bytes were sent to the peer.
    pub(crate) fn sent(&self) {
        // A store alone would take the cache line from the thread that looks, each time.
        if !self.has_sent.load(Relaxed) {
            self.has_sent.store(true, Relaxed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A message about the peer, for the kernel of the application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// The peer is silent. The flow ends after so long.
    Silent(Duration),
    /// The peer answers again.
    Alive,
}

/// A report of a peer's state to the kernel of the application whose connection is given.
pub type Tell<'a> = &'a (dyn Fn(&AppStream, News) + Sync);

/// A watch, and the silence of the peer after which the flow ends.
#[derive(Clone, Copy)]
pub struct Watching<'a> {
    /// The watch.
    pub watch: &'a Watch,
    /// The limit.
    pub silence_max: Duration,
    /// Called when the peer is silent, and when it answers again.
    pub tell: Tell<'a>,
}

/// The relay's side of a watch.
pub(crate) struct PeerWatch<'a> {
    watching: Option<Watching<'a>>,
    is_registered: bool,
    inquiry: Option<Box<Running>>,
}

struct Running {
    inquiry: Inquiry,
    answer: Option<Answer>,
    timer: Pin<Box<Sleep>>,
}

impl<'a> PeerWatch<'a> {
    pub(crate) fn new(watching: Option<Watching<'a>>) -> Self {
        Self { watching, is_registered: false, inquiry: None }
    }

    /// The flow's task ends, and another one goes on with the flow.
    pub(crate) fn moves(&mut self) {
        self.is_registered = false;
    }

    /// Notes that bytes were sent to the peer.
    pub(crate) fn sent(&self) {
        if let Some(watching) = self.watching {
            watching.watch.sent();
        }
    }

    /// Does what was asked. Ready if the peer on `upstream` was silent for the limit. Called whenever the flow of `app` waits.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, upstream: &impl AsFd, app: &AppStream) -> Poll<()> {
        let Some(watching @ Watching { watch, silence_max, .. }) = self.watching else {
            return Poll::Pending;
        };
        if !self.is_registered {
            self.is_registered = true;
            watch.lock().task = Some(cx.waker().clone());
        }
        if watch.is_asked.load(Relaxed) {
            let answer = {
                let mut asked = watch.lock();
                watch.is_asked.store(false, Relaxed);
                asked.answer.take()
            };
            self.asked(watching, answer, upstream, app);
        }
        // Bytes of the peer can have woken the task.
        let mut may_have_heard = true;
        while let Some(running) = &mut self.inquiry {
            let is_early = running.timer.as_mut().poll(cx).is_pending();
            if is_early && !(may_have_heard && running.inquiry.is_stalled()) {
                return Poll::Pending;
            }
            may_have_heard = false;
            let now = Instant::now();
            let Ok(seen) = peer_state(upstream) else {
                self.inquiry = None;
                return Poll::Pending;
            };
            let step = match is_early {
                true => running.inquiry.woken(now, &seen),
                false => running.inquiry.next(now, &seen, silence_max),
            };
            match step {
                // The timer that runs is not put off by the next wake.
                Step::Look(_) if is_early => {}
                Step::Look(after) => running.timer.as_mut().reset(now + after),
                Step::Ask(after) => {
                    let asked = ask_peer(upstream);
                    if running.inquiry.is_stalled() {
                        // An application that has given up answers with a reset.
                        let _ = ask_peer(app);
                    } else if asked.is_err() {
                        // An end has sent FIN since the last probe.
                        let answer = running.answer.take();
                        self.inquiry = None;
                        call(answer);
                        return Poll::Pending;
                    }
                    running.timer.as_mut().reset(now + after);
                }
                Step::Stall(after) => {
                    stall(watching, app);
                    let _ = ask_peer(upstream);
                    running.timer.as_mut().reset(now + after);
                }
                Step::Answered => {
                    let is_stalled = running.inquiry.is_stalled();
                    let answer = running.answer.take();
                    self.inquiry = None;
                    if is_stalled {
                        unstall(watching, app);
                    }
                    if seen.is_asked {
                        watch.sent();
                    }
                    call(answer);
                }
                Step::GiveUp => self.inquiry = None,
                Step::Dead => return Poll::Ready(()),
            }
        }
        Poll::Pending
    }

    /// Ends a stall before the connection of `app` is closed. What the application has not acknowledged is still delivered then.
    pub(crate) fn release(&mut self, app: &AppStream) {
        if let (Some(watching), Some(running)) = (self.watching, self.inquiry.take())
            && running.inquiry.is_stalled()
        {
            unstall(watching, app);
        }
    }

    /// Begins an inquiry, or goes on with the one that runs.
    fn asked(
        &mut self,
        watching: Watching<'_>,
        answer: Option<Answer>,
        upstream: &impl AsFd,
        app: &AppStream,
    ) {
        let now = Instant::now();
        if let Some(running) = &mut self.inquiry {
            if answer.is_some() {
                running.answer = answer;
                running.inquiry.extend(now);
            }
            return;
        }
        let Ok(seen) = peer_state(upstream) else { return };
        let inquiry = if is_stalled(&seen) {
            stall(watching, app);
            Inquiry::of_stalled(now)
        } else if answer.is_some() {
            Inquiry::new(now)
        } else {
            if seen.is_asked {
                watching.watch.sent();
            }
            return;
        };
        match (ask_peer(upstream), answer) {
            // The peer cannot be asked, as of a half-closed connection. A connection that is in order must not end.
            (Err(_), Some(answer)) if !inquiry.is_stalled() => answer(),
            (_, answer) => {
                let timer = Box::pin(sleep(LOOK_FIRST));
                self.inquiry = Some(Box::new(Running { inquiry, answer, timer }));
            }
        }
    }
}

fn call(answer: Option<Answer>) {
    if let Some(answer) = answer {
        answer();
    }
}

/// Has the application's kernel see the peer as it is: it gets no answers, and ends the connection in time.
fn stall(watching: Watching<'_>, app: &AppStream) {
    // An error leaves the connection as it is, and the agent ends it later.
    let _ = stop_receiving(app);
    (watching.tell)(app, News::Silent(watching.silence_max));
}

/// Ends [`stall`].
fn unstall(watching: Watching<'_>, app: &AppStream) {
    // Before the application's kernel goes on to send: the message has the numbers of the connection.
    (watching.tell)(app, News::Alive);
    let _ = resume_receiving(app);
}

/// Returns true if the peer does not acknowledge what was sent, by several retransmissions.
fn is_stalled(seen: &PeerState) -> bool {
    seen.is_asked && seen.repeats >= STALLED_REPEATS && seen.heard >= STALLED_MIN
}

/// A question to the peer, until its answer. Pure.
#[derive(Debug)]
struct Inquiry {
    begun: Instant,
    /// Time of the last probe.
    asked: Instant,
    /// Time from which on an idle peer is asked no more.
    until: Instant,
    /// Begin of a stall.
    stalled: Option<Instant>,
    /// Time between two looks.
    pause: Duration,
}

/// The next step after a look at the peer.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Look again.
    Look(Duration),
    /// Ask, and look again.
    Ask(Duration),
    /// The peer does not acknowledge what was sent. Ask, and look again.
    Stall(Duration),
    Answered,
    /// Nobody waits for the answer any more.
    GiveUp,
    /// The peer was silent for the limit.
    Dead,
}

impl Inquiry {
    /// A peer that was asked at `now`.
    fn new(now: Instant) -> Self {
        Self { begun: now, asked: now, until: now + ASKED_MAX, stalled: None, pause: LOOK_FIRST }
    }

    /// As [`Inquiry::new`], of a peer that is stalled.
    fn of_stalled(now: Instant) -> Self {
        Self { stalled: Some(now), ..Self::new(now) }
    }

    fn is_stalled(&self) -> bool {
        self.stalled.is_some()
    }

    /// Somebody waits for the answer since `now`.
    fn extend(&mut self, now: Instant) {
        self.until = now + ASKED_MAX;
        self.pause = LOOK_FIRST;
    }

    fn is_answered(&self, now: Instant, seen: &PeerState) -> bool {
        seen.heard <= now.duration_since(self.begun) + TICK
    }

    /// Returns the next step when bytes of the peer may have come in a stall. The peer is asked then as at the begin of a stall, since
    /// bytes need not acknowledge anything.
    fn woken(&mut self, now: Instant, seen: &PeerState) -> Step {
        if self.is_answered(now, seen) {
            return Step::Answered;
        }
        if now.duration_since(self.asked) < ASK_AGAIN {
            return Step::Look(self.pause);
        }
        (self.asked, self.pause) = (now, LOOK_FIRST);
        Step::Ask(self.pause)
    }

    fn next(&mut self, now: Instant, seen: &PeerState, silence_max: Duration) -> Step {
        if self.is_answered(now, seen) {
            return Step::Answered;
        }
        let (look_last, ask_again) =
            self.stalled.map_or((LOOK_LAST, ASK_AGAIN), |since| intervals(now.duration_since(since)));
        self.pause = (self.pause * 2).min(look_last);
        match self.stalled {
            Some(since) if now.duration_since(since) >= silence_max + ENDED_BY => return Step::Dead,
            Some(_) => {}
            None if is_stalled(seen) => {
                (self.stalled, self.asked) = (Some(now), now);
                return Step::Stall(self.pause);
            }
            None if now >= self.until => return Step::GiveUp,
            None => {}
        }
        if now.duration_since(self.asked) < ask_again {
            return Step::Look(self.pause);
        }
        self.asked = now;
        Step::Ask(self.pause)
    }
}

/// Returns the longest time between two looks, and the time between two probes, after so long a stall.
fn intervals(stalled_for: Duration) -> (Duration, Duration) {
    let times = 1 + u32::try_from(stalled_for.as_secs() / LONG_STALL.as_secs()).unwrap_or(u32::MAX - 1);
    (
        LOOK_LAST.saturating_mul(times).min(LOOK_STALLED_MAX),
        ASK_AGAIN.saturating_mul(times).min(ASK_STALLED_MAX),
    )
}

#[cfg(test)]
mod tests;

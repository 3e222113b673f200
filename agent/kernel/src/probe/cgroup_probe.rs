//! Do the programs at a cgroup see the sockets of its processes? Tried for real, with one link and one socket.
//!
//! Before Linux 5.15 a socket had room for either its cgroup or cgroup v1's net_cls and net_prio: their first use took
//! all later sockets out of their cgroups, silently and until the next boot. So the version proves nothing (the
//! correction was carried back, to Debian's 5.10 for one), empty files prove nothing (they were not always so), and a
//! mounted hierarchy proves nothing (it may be unused). The trial takes the cgroup of a thread, attaches a program to
//! it that answers `getsockname` of exactly one socket, by its cookie, with a port it has not, and asks that socket.
//!
//! ```text
//! in a cgroup below the root      the link is made there
//! in the root                     everything belongs to the root: a thread moves into a new cgroup for the trial
//! own cgroup is out of sight      not tried; fine unless net_cls or net_prio are in a version 1 hierarchy
//! ```

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
    thread,
};

use nix::unistd::gettid;
use socket2::{Domain, Socket, Type};

use super::{
    super::{cgroup::Cgroup, link},
    Presence,
    raw::{self, Hook, Insn},
};

/// Id of the root of the cgroup v2 hierarchy.
const ROOT: u64 = 1;
/// The port that only the trial's program answers. Any port but 0, the port of an unbound socket, works.
const ANSWER: u16 = 15007;
const BPF_FUNC_GET_SOCKET_COOKIE: i32 = 46;
/// Offset of `user_port` in `struct bpf_sock_addr`.
const USER_PORT: i16 = 24;
/// Controllers of cgroup v1 that mark sockets.
const MARKERS: [&str; 2] = ["net_cls", "net_prio"];

pub(super) fn sockets_in_their_cgroup() -> Presence {
    // On a thread of its own: it may move.
    let tried = thread::spawn(|| match ProbeCgroup::take() {
        Ok(Some(probe)) => probe.sees_its_sockets(),
        Ok(None) => Ok(without_trial()),
        Err(error) => Err(error),
    });
    match tried.join() {
        Ok(Ok(presence)) => presence,
        Ok(Err(error)) => untried(&error),
        Err(_) => Presence::Unknown("the trial panicked, which is a bug".to_owned()),
    }
}

/// An error that stopped the trial. It proves nothing about sockets.
fn untried(error: &io::Error) -> Presence {
    match Presence::refused(error) {
        Presence::Absent(why) => Presence::Unknown(why),
        other => other,
    }
}

/// A cgroup below the root that the calling thread is in.
struct ProbeCgroup {
    cgroup: PathBuf,
    /// The root, when the cgroup was made for the trial.
    made_in: Option<PathBuf>,
}

impl ProbeCgroup {
    /// `None` when the thread's cgroup cannot be seen from here, as in a cgroup namespace with the node's hierarchy
    /// mounted.
    fn take() -> io::Result<Option<Self>> {
        let Ok(own) = Cgroup::of_self() else { return Ok(None) };
        if own.id() != ROOT {
            return Ok(Some(Self { cgroup: own.path().to_owned(), made_in: None }));
        }
        let cgroup = own.path().join(format!("tacit-probe-{}", gettid()));
        // Left behind by a thread of the same number that was killed: empty, or this fails and the next call says why.
        let _ = fs::remove_dir(&cgroup);
        fs::create_dir(&cgroup)?;
        let probe = Self { cgroup, made_in: Some(own.path().to_owned()) };
        fs::write(probe.cgroup.join("cgroup.type"), "threaded")?;
        move_to(&probe.cgroup)?;
        Ok(Some(probe))
    }

    fn sees_its_sockets(&self) -> io::Result<Presence> {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
        let neutral = raw::load(Hook::GETSOCKNAME4, &raw::NEUTRAL)?;
        let answering = raw::load(Hook::GETSOCKNAME4, &answer_for(socket.cookie()?))?;
        let link = raw::attach(&neutral, Hook::GETSOCKNAME4, File::open(&self.cgroup)?.as_raw_fd())?;
        link::update(link.as_fd(), answering.as_fd())?;
        let name = socket.local_addr()?.as_socket();
        Ok(if name.is_some_and(|name| name.port() == ANSWER) {
            Presence::Present
        } else {
            Presence::Absent("new sockets do not belong to the cgroup of their process".to_owned())
        })
    }
}

impl Drop for ProbeCgroup {
    fn drop(&mut self) {
        let Some(root) = &self.made_in else { return };
        let left = move_to(root).and_then(|()| fs::remove_dir(&self.cgroup));
        if let Err(error) = left {
            tracing::warn!(%error, cgroup = %self.cgroup.display(), "an empty cgroup stays behind; remove it");
        }
    }
}

/// Moves the calling thread.
fn move_to(cgroup: &Path) -> io::Result<()> {
    // 0 is whoever writes.
    fs::write(cgroup.join("cgroup.threads"), "0")
}

/// A program at getsockname that answers [`ANSWER`] as the port of the socket with `cookie`, and changes nothing else.
fn answer_for(cookie: u64) -> Vec<Insn> {
    let [wide, wide_rest] = Insn::set_wide(1, cookie);
    vec![
        Insn::copy(6, 1),
        Insn::call(BPF_FUNC_GET_SOCKET_COOKIE),
        wide,
        wide_rest,
        Insn::skip_unless_equal(0, 1, 2),
        Insn::set(2, i32::from(ANSWER.to_be())),
        Insn::store(6, USER_PORT, 2),
        Insn::set(0, 1),
        Insn::exit(),
    ]
}

fn without_trial() -> Presence {
    match fs::read_to_string("/proc/cgroups") {
        Ok(text) => judge_controllers(&text),
        Err(error) => Presence::Unknown(format!("/proc/cgroups: {error}")),
    }
}

/// From /proc/cgroups: its second column is 0 for what no version 1 hierarchy has.
fn judge_controllers(cgroups: &str) -> Presence {
    let in_version_1 = |line: &&str| {
        let mut fields = line.split_whitespace();
        fields.next().is_some_and(|name| MARKERS.contains(&name)) && fields.next() != Some("0")
    };
    match cgroups.lines().find(in_version_1).and_then(|line| line.split_whitespace().next()) {
        None => Presence::Present,
        Some(name) => Presence::Unknown(format!(
            "{name} is in a cgroup v1 hierarchy, and the agent's own cgroup is out of its sight: run it in the node's \
             cgroup namespace, or unmount {name}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "#subsys_name\thierarchy\tnum_cgroups\tenabled\n";

    #[test]
    fn markers_count_only_in_a_version_1_hierarchy() {
        let judge = |rows: &str| judge_controllers(&format!("{HEAD}{rows}"));
        assert_eq!(judge("cpu\t1\t1\t1\nnet_cls\t0\t7\t1\nnet_prio\t0\t7\t1\n"), Presence::Present);
        assert_eq!(judge("cpu\t1\t1\t1\n"), Presence::Present);
        assert!(matches!(judge("net_prio\t4\t7\t1\n"), Presence::Unknown(why) if why.contains("net_prio")));
        assert!(matches!(judge("net_cls\n"), Presence::Unknown(_)));
    }

    #[test]
    #[ignore = "needs root"]
    fn this_kernel_keeps_sockets_in_their_cgroup() {
        assert_eq!(sockets_in_their_cgroup(), Presence::Present);
    }

    #[test]
    #[ignore = "needs root"]
    fn a_cgroup_made_for_the_trial_does_not_stay() {
        let taken = thread::spawn(|| {
            ProbeCgroup::take().map(|probe| probe.map(|s| (s.cgroup.clone(), s.made_in.is_some())))
        });
        let (cgroup, made) =
            taken.join().expect("no panic").expect("cgroups can be made").expect("own cgroup is in sight");
        assert_ne!(cgroup.exists(), made, "{}", cgroup.display());
    }

    /// Control: what the trial must say where the protection is off.
    #[test]
    #[ignore = "needs root"]
    fn a_socket_that_is_not_in_the_cgroup_is_noticed() {
        let own = Cgroup::of_self().expect("cgroup v2 is mounted");
        let elsewhere = own.path().join(format!("tacit-test-probe-{}", std::process::id()));
        fs::create_dir(&elsewhere).expect("cgroups can be made");
        let probe = ProbeCgroup { cgroup: elsewhere.clone(), made_in: None };
        let seen = probe.sees_its_sockets();
        fs::remove_dir(&elsewhere).expect("it is empty");
        assert!(matches!(seen, Ok(Presence::Absent(_))), "{seen:?}");
    }
}

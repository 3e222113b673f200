//! The table: every feature of the kernel that Tacit uses, what for, since when it exists and how it is tried.
//!
//! Releases name the first of Linux' own; a distribution's may have the feature earlier, and the trial finds it.

use aya::{maps::MapType, programs::ProgramType, sys::BpfHelper};

use super::{Need, Release, Remedy, raw::Hook};

/// One row of the table.
pub(super) struct Feature {
    pub(super) name: &'static str,
    pub(super) needed_for: &'static str,
    pub(super) since: Release,
    pub(super) need: Need,
    pub(super) remedy: Remedy,
    pub(super) trial: Trial,
}

/// The trial of a feature.
pub(super) enum Trial {
    /// A program that does nothing is accepted for the hook.
    Hook(Hook),
    /// A call of the helper is accepted in programs of the type.
    Helper(ProgramType, BpfHelper),
    /// A map of the type can be made.
    Map(MapType),
    /// A socket storage map can be made.
    SocketStorage,
    /// Type information is accepted.
    Btf,
    /// Links to cgroups can be made.
    CgroupLink,
    /// Links to network namespaces can be made.
    NetnsLink,
    /// A link's program can be replaced.
    LinkUpdate,
    /// The pin path is, or would be, on bpffs.
    Bpffs,
    /// A cgroup v2 hierarchy is mounted.
    Cgroup2,
    /// A program returns the cgroups of a thread.
    CgroupLevels,
    /// The programs of a cgroup see the sockets of its processes.
    SocketCgroup,
    /// Sockets tell the cookie of their network namespace.
    NetnsCookie,
    /// Raw sockets can be opened.
    RawSockets,
    /// tcx links can be made.
    Tcx,
    /// A connection of another socket can be found and reset.
    ConnectionReset,
    /// The helper is accepted, and the kernel has the type information of what it returns.
    HelperOfType(ProgramType, BpfHelper),
}

const BIND: BpfHelper = BpfHelper::BPF_FUNC_bind;
const SKB_ANCESTOR_CGROUP: BpfHelper = BpfHelper::BPF_FUNC_skb_ancestor_cgroup_id;
const SKB_CGROUP: BpfHelper = BpfHelper::BPF_FUNC_skb_cgroup_id;
const FULL_SOCKET: BpfHelper = BpfHelper::BPF_FUNC_sk_fullsock;
const TCP_SOCKET: BpfHelper = BpfHelper::BPF_FUNC_tcp_sock;
const SKB_COPY: BpfHelper = BpfHelper::BPF_FUNC_skb_load_bytes;
const SKB_LOAD: BpfHelper = BpfHelper::BPF_FUNC_skb_load_bytes_relative;
const CURRENT_CGROUP: BpfHelper = BpfHelper::BPF_FUNC_get_current_cgroup_id;
const ANCESTOR_CGROUP: BpfHelper = BpfHelper::BPF_FUNC_get_current_ancestor_cgroup_id;
const NETNS_COOKIE: BpfHelper = BpfHelper::BPF_FUNC_get_netns_cookie;
const RINGBUF_QUERY: BpfHelper = BpfHelper::BPF_FUNC_ringbuf_query;
const RINGBUF_RESERVE: BpfHelper = BpfHelper::BPF_FUNC_ringbuf_reserve;
const SET_RETVAL: BpfHelper = BpfHelper::BPF_FUNC_set_retval;
const TCP6_SOCK: BpfHelper = BpfHelper::BPF_FUNC_skc_to_tcp6_sock;
const SK_ASSIGN: BpfHelper = BpfHelper::BPF_FUNC_sk_assign;
const SK_RELEASE: BpfHelper = BpfHelper::BPF_FUNC_sk_release;
const CHECK_SYNCOOKIE: BpfHelper = BpfHelper::BPF_FUNC_tcp_check_syncookie;
const SKC_LOOKUP: BpfHelper = BpfHelper::BPF_FUNC_skc_lookup_tcp;
const STORAGE_DELETE: BpfHelper = BpfHelper::BPF_FUNC_sk_storage_delete;
const STORAGE_GET: BpfHelper = BpfHelper::BPF_FUNC_sk_storage_get;
const SET_SOCKET_OPTION: BpfHelper = BpfHelper::BPF_FUNC_setsockopt;
const GET_SOCKET_OPTION: BpfHelper = BpfHelper::BPF_FUNC_getsockopt;
const LOAD_HDR_OPT: BpfHelper = BpfHelper::BPF_FUNC_load_hdr_opt;
const CB_FLAGS_SET: BpfHelper = BpfHelper::BPF_FUNC_sock_ops_cb_flags_set;

const CGROUP_SKB: ProgramType = ProgramType::CgroupSkb;
const CLASSIFIER: ProgramType = ProgramType::SchedClassifier;
const SOCK_ADDR: ProgramType = ProgramType::CgroupSockAddr;
const CGROUP_BPF: &str = "CONFIG_CGROUP_BPF";
const BPF_SYSCALL: &str = "CONFIG_BPF_SYSCALL and CONFIG_INET";

/// Type information of the kernel, which the verifier reads for pointers to its types.
pub(super) const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";
/// Row that the loader asks for by name.
pub(super) const TCP6_SOCK_IN_SOCK_ADDR: &str = "bpf_skc_to_tcp6_sock in sock_addr";
/// Row that the loader asks for by name.
pub(super) const SET_RETVAL_IN_SOCK_ADDR: &str = "bpf_set_retval in sock_addr";
const CAPTURE: &str = "taking over connections of pods";
const NAMES: &str = "showing applications the addresses they expect";
const UNPACED: &str = "loopback without the pacing of a network";
const STEER: &str = "taking over connections to pods";
const HOLD: &str = "letting connect() of pods wait for the destination";
const SILENCE: &str = "ending connections of pods to dead peers";
const HANDOVER: &str = "telling the agent where a connection wanted to go";
const GUARD: &str = "dropping what must not be plaintext";
const LOG: &str = "the programs' log lines";
const STATE: &str = "what the agent tells the programs";

const fn required(
    name: &'static str,
    needed_for: &'static str,
    since: Release,
    option: &'static str,
    trial: Trial,
) -> Feature {
    Feature { name, needed_for, since, need: Need::Required, remedy: Remedy::Kernel(option), trial }
}

const fn of_node(
    name: &'static str,
    needed_for: &'static str,
    since: Release,
    todo: &'static str,
    trial: Trial,
) -> Feature {
    Feature { name, needed_for, since, need: Need::Required, remedy: Remedy::Node(todo), trial }
}

const fn optional(
    name: &'static str,
    needed_for: &'static str,
    since: Release,
    fallback: &'static str,
    option: &'static str,
    trial: Trial,
) -> Feature {
    Feature { name, needed_for, since, need: Need::Fallback(fallback), remedy: Remedy::Kernel(option), trial }
}

const fn helper(
    name: &'static str,
    needed_for: &'static str,
    since: Release,
    program: ProgramType,
    helper: BpfHelper,
) -> Feature {
    required(name, needed_for, since, BPF_SYSCALL, Trial::Helper(program, helper))
}

const fn map(name: &'static str, needed_for: &'static str, since: Release, kind: MapType) -> Feature {
    required(name, needed_for, since, BPF_SYSCALL, Trial::Map(kind))
}

const fn hook(name: &'static str, needed_for: &'static str, since: Release, hook: Hook) -> Feature {
    required(name, needed_for, since, CGROUP_BPF, Trial::Hook(hook))
}

/// All features, in the order an operator reads them. Helpers older than the oldest program type here (map look-ups,
/// clocks) are not listed: no kernel has one without the other.
pub(super) static FEATURES: &[Feature] = &[
    of_node(
        "cgroup v2",
        "covering pods by their cgroup",
        Release(4, 5),
        "mount it: mount -t cgroup2 none /sys/fs/cgroup/unified",
        Trial::Cgroup2,
    ),
    of_node(
        "sockets in their cgroup",
        "seeing every socket of a pod",
        Release(5, 15),
        "a use of cgroup v1's net_cls or net_prio did that, which lasts until the next boot: reboot without them, or \
         boot Linux 5.15 or newer, where they do no harm",
        Trial::SocketCgroup,
    ),
    required(
        "BPF_PROG_TEST_RUN of raw_tracepoint",
        "finding the level of the pods' cgroup",
        Release(5, 15),
        "CONFIG_BPF_EVENTS",
        Trial::CgroupLevels,
    ),
    of_node(
        "bpffs",
        "programs that outlive the agent",
        Release(4, 4),
        "mount it: mount -t bpf bpf /sys/fs/bpf, or correct pinPath",
        Trial::Bpffs,
    ),
    hook("cgroup/connect4", CAPTURE, Release(4, 17), Hook::CONNECT4),
    hook("cgroup/connect6", CAPTURE, Release(4, 17), Hook::CONNECT6),
    hook("cgroup/getpeername4", NAMES, Release(5, 8), Hook::GETPEERNAME4),
    hook("cgroup/getpeername6", NAMES, Release(5, 8), Hook::GETPEERNAME6),
    hook("cgroup/getsockname4", NAMES, Release(5, 8), Hook::GETSOCKNAME4),
    hook("cgroup/getsockname6", NAMES, Release(5, 8), Hook::GETSOCKNAME6),
    hook("sock_ops", HANDOVER, Release(4, 13), Hook::SOCK_OPS),
    required("sk_lookup", STEER, Release(5, 9), BPF_SYSCALL, Trial::Hook(Hook::SK_LOOKUP)),
    required("links to cgroups", CAPTURE, Release(5, 7), CGROUP_BPF, Trial::CgroupLink),
    required("links to network namespaces", STEER, Release(5, 8), BPF_SYSCALL, Trial::NetnsLink),
    required("BPF_LINK_UPDATE", "upgrades without a gap", Release(5, 7), BPF_SYSCALL, Trial::LinkUpdate),
    helper(
        "bpf_get_current_ancestor_cgroup_id in sock_addr",
        CAPTURE,
        Release(5, 7),
        SOCK_ADDR,
        ANCESTOR_CGROUP,
    ),
    helper("bpf_get_netns_cookie in sock_addr", CAPTURE, Release(5, 7), SOCK_ADDR, NETNS_COOKIE),
    helper("bpf_bind in sock_addr", CAPTURE, Release(4, 17), SOCK_ADDR, BIND),
    helper("bpf_sk_storage_get in sock_addr", NAMES, Release(5, 3), SOCK_ADDR, STORAGE_GET),
    helper("bpf_sk_storage_delete in sock_addr", NAMES, Release(5, 3), SOCK_ADDR, STORAGE_DELETE),
    helper("bpf_ringbuf_reserve in sock_addr", LOG, Release(5, 8), SOCK_ADDR, RINGBUF_RESERVE),
    helper("bpf_get_netns_cookie in sock_ops", HANDOVER, Release(5, 15), ProgramType::SockOps, NETNS_COOKIE),
    helper("bpf_sk_storage_get in sock_ops", HANDOVER, Release(5, 3), ProgramType::SockOps, STORAGE_GET),
    helper(
        "bpf_sock_ops_cb_flags_set in sock_ops",
        HANDOVER,
        Release(4, 16),
        ProgramType::SockOps,
        CB_FLAGS_SET,
    ),
    helper("bpf_setsockopt in sock_ops", UNPACED, Release(4, 13), ProgramType::SockOps, SET_SOCKET_OPTION),
    helper("bpf_getsockopt in sock_ops", UNPACED, Release(4, 15), ProgramType::SockOps, GET_SOCKET_OPTION),
    helper("bpf_ringbuf_reserve in sock_ops", HOLD, Release(5, 8), ProgramType::SockOps, RINGBUF_RESERVE),
    helper("bpf_ringbuf_query in sock_ops", HOLD, Release(5, 8), ProgramType::SockOps, RINGBUF_QUERY),
    helper("bpf_load_hdr_opt in sock_ops", SILENCE, Release(5, 10), ProgramType::SockOps, LOAD_HDR_OPT),
    helper("bpf_sk_storage_delete in sock_ops", SILENCE, Release(5, 3), ProgramType::SockOps, STORAGE_DELETE),
    helper("bpf_sk_assign in sk_lookup", STEER, Release(5, 9), ProgramType::SkLookup, SK_ASSIGN),
    helper("bpf_sk_release in sk_lookup", STEER, Release(5, 9), ProgramType::SkLookup, SK_RELEASE),
    helper("bpf_skc_lookup_tcp in sock_addr", CAPTURE, Release(5, 2), SOCK_ADDR, SKC_LOOKUP),
    helper("bpf_sk_release in sock_addr", CAPTURE, Release(4, 20), SOCK_ADDR, SK_RELEASE),
    helper("bpf_get_current_cgroup_id in sock_addr", CAPTURE, Release(5, 7), SOCK_ADDR, CURRENT_CGROUP),
    hook("cgroup_skb/egress", GUARD, Release(4, 10), Hook::SKB_EGRESS),
    hook("cgroup_skb/ingress", GUARD, Release(4, 10), Hook::SKB_INGRESS),
    required("programs on links", GUARD, Release(4, 1), "CONFIG_NET_CLS_BPF", Trial::Hook(Hook::CLASSIFIER)),
    helper("bpf_skb_cgroup_id in cgroup_skb", GUARD, Release(5, 8), CGROUP_SKB, SKB_CGROUP),
    helper("bpf_skb_ancestor_cgroup_id in cgroup_skb", GUARD, Release(5, 8), CGROUP_SKB, SKB_ANCESTOR_CGROUP),
    helper("bpf_skb_load_bytes_relative in cgroup_skb", GUARD, Release(5, 0), CGROUP_SKB, SKB_LOAD),
    helper("bpf_sk_storage_get in cgroup_skb", GUARD, Release(5, 2), CGROUP_SKB, STORAGE_GET),
    helper("bpf_sk_fullsock in cgroup_skb", GUARD, Release(5, 1), CGROUP_SKB, FULL_SOCKET),
    helper("bpf_skb_load_bytes in cgroup_skb", HOLD, Release(4, 10), CGROUP_SKB, SKB_COPY),
    helper("bpf_tcp_sock in cgroup_skb", HOLD, Release(5, 1), CGROUP_SKB, TCP_SOCKET),
    helper("bpf_sk_release in cgroup_skb", HOLD, Release(4, 20), CGROUP_SKB, SK_RELEASE),
    helper("bpf_ringbuf_query in cgroup_skb", HOLD, Release(5, 8), CGROUP_SKB, RINGBUF_QUERY),
    helper("bpf_ringbuf_reserve in cgroup_skb", LOG, Release(5, 8), CGROUP_SKB, RINGBUF_RESERVE),
    helper("bpf_skb_cgroup_id on links", GUARD, Release(4, 18), CLASSIFIER, SKB_CGROUP),
    helper("bpf_skb_ancestor_cgroup_id on links", GUARD, Release(4, 19), CLASSIFIER, SKB_ANCESTOR_CGROUP),
    helper("bpf_skb_load_bytes_relative on links", GUARD, Release(4, 18), CLASSIFIER, SKB_LOAD),
    helper("bpf_sk_storage_get on links", GUARD, Release(5, 2), CLASSIFIER, STORAGE_GET),
    helper("bpf_sk_fullsock on links", GUARD, Release(5, 1), CLASSIFIER, FULL_SOCKET),
    helper("bpf_tcp_check_syncookie on links", GUARD, Release(5, 2), CLASSIFIER, CHECK_SYNCOOKIE),
    helper("bpf_sk_release on links", GUARD, Release(4, 20), CLASSIFIER, SK_RELEASE),
    helper("bpf_ringbuf_reserve on links", LOG, Release(5, 8), CLASSIFIER, RINGBUF_RESERVE),
    required("BTF of programs and maps", STATE, Release(4, 18), BPF_SYSCALL, Trial::Btf),
    map("array maps", STATE, Release(3, 19), MapType::Array),
    map("hash maps", STATE, Release(3, 19), MapType::Hash),
    map("LPM trie maps", "the mesh's ranges", Release(4, 11), MapType::LpmTrie),
    map("sockmaps", STEER, Release(4, 14), MapType::SockMap),
    required("socket storage maps", NAMES, Release(5, 2), BPF_SYSCALL, Trial::SocketStorage),
    map("per-CPU array maps", "counting verdicts", Release(4, 6), MapType::PerCpuArray),
    map("ring buffer maps", LOG, Release(5, 8), MapType::RingBuf),
    required(
        "SO_NETNS_COOKIE",
        "knowing pods' network namespaces",
        Release(5, 14),
        "CONFIG_NET",
        Trial::NetnsCookie,
    ),
    of_node("raw sockets", HOLD, Release(2, 6), "give the agent CAP_NET_RAW", Trial::RawSockets),
    optional(
        "tcx",
        "guarding pods' links beside other programs",
        Release(6, 6),
        "filters of clsact",
        "CONFIG_NET_XGRESS",
        Trial::Tcx,
    ),
    optional(
        SET_RETVAL_IN_SOCK_ADDR,
        "refusing connections with a telling error",
        Release(5, 18),
        "refused with EPERM",
        CGROUP_BPF,
        Trial::Helper(SOCK_ADDR, SET_RETVAL),
    ),
    optional(
        TCP6_SOCK_IN_SOCK_ADDR,
        "several IPv6 connections from one bound port",
        Release(5, 9),
        "one at a time",
        "CONFIG_DEBUG_INFO_BTF",
        Trial::HelperOfType(SOCK_ADDR, TCP6_SOCK),
    ),
    optional(
        "SOCK_DESTROY",
        "resetting plaintext connections at enrolment and when policy changes",
        Release(4, 9),
        "none: the guard drops what a STRICT pod sends, other connections stay until they end",
        "CONFIG_INET_DIAG_DESTROY and CONFIG_INET_TCP_DIAG",
        Trial::ConnectionReset,
    ),
];

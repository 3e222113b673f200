# Removes everything that carries a topology's prefix. Safe to run again; says what it could not remove.
# $1 prefix, $2 mount point of cgroup v2, $3 the topology's directory of files
trap '' HUP INT TERM
prefix=$1 mount=$2 files=$3
[ "$4" = wait ] && cat >/dev/null   # ends when the owner lets go of the pipe, or dies

# One at a time: a later run may find the leftovers before the guard is done with them.
[ -d "$files" ] && exec 9<"$files" && flock 9

left=0
for tree in "$mount/$prefix" "$mount/$prefix-host"; do
    tries=0
    # Again and again: a program that was just started moves into its cgroup at any moment, until that is gone.
    while [ -d "$tree" ] && [ $tries -lt 200 ]; do
        [ $tries -eq 0 ] || sleep 0.02
        tries=$((tries + 1))
        echo 1 >"$tree/cgroup.kill"
        find "$tree" -depth -type d -exec rmdir {} \; 2>/dev/null
    done
    [ -d "$tree" ] && { echo "cgroup $tree is still in use"; left=1; } >&2
done
for pins in "/sys/fs/bpf/$prefix"-*; do
    [ -e "$pins" ] && { rm -rf "$pins" || left=1; }
done
for name in "/run/netns/$prefix"-*; do
    [ -e "$name" ] && { ip netns delete "${name##*/}" || left=1; }
done
rm -rf "$files" || left=1

# bpffs that a topology mounted goes with the last topology; the lock is the one taken for mounting.
if [ -d /run/netns ]; then
    flock /run/netns sh -c '
        grep -q "^tacit-topology /sys/fs/bpf bpf " /proc/mounts || exit 0
        # The kernel puts two iterators there itself.
        [ -z "$(ls -A -I maps.debug -I progs.debug /sys/fs/bpf)" ] || exit 0
        for name in /run/netns/tacit-*; do [ -e "$name" ] && exit 0; done
        umount /sys/fs/bpf' || left=1
fi
exit $left

# Removes every resource with a topology's prefix. Safe to run again. Prints resources that it could not remove.
# $1 prefix, $2 mount point of cgroup v2, $3 the topology's directory of files
trap '' HUP INT TERM
prefix=$1 mount=$2 files=$3
[ "$4" = wait ] && cat >/dev/null   # returns when the owner closes the pipe or dies

# One at a time, because a later run can find the resources before the sweeper process has removed them.
[ -d "$files" ] && exec 9<"$files" && flock 9

left=0
for tree in "$mount/$prefix" "$mount/$prefix-host"; do
    tries=0
    # Repeated, because a program that was just started can join its cgroup until the cgroup is removed.
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

# The last topology unmounts a bpffs that a topology mounted. Mounting takes the same lock.
if [ -d /run/netns ]; then
    flock /run/netns sh -c '
        grep -q "^tacit-topology /sys/fs/bpf bpf " /proc/mounts || exit 0
        # The kernel creates two iterators in every bpffs.
        [ -z "$(ls -A -I maps.debug -I progs.debug /sys/fs/bpf)" ] || exit 0
        for name in /run/netns/tacit-*; do [ -e "$name" ] && exit 0; done
        umount /sys/fs/bpf' || left=1
fi
exit $left

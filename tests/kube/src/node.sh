# The first process of a node: makes the place in which a container runtime and a kubelet find what they expect, and
# touches $folder/ready. Everything is in namespaces of its own and goes with this process, but for the cgroups.
# $1 name of the node, $2 its folder
set -e
name=$1 folder=$2
mount --make-rprivate /
hostname "$name"
ip link set lo up

# Only cgroup v2, also on a machine that has both versions. The root is the node's own: this shell started in it.
! mountpoint -q /sys/fs/cgroup || umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo $$ >/sys/fs/cgroup/daemons/cgroup.procs

# Its own state, so that nothing is made or left in the machine's.
mkdir -p "$folder"/kubelet "$folder"/cni "$folder"/pods "$folder"/net.d "$folder"/plugins
mount -t tmpfs tmpfs /run
mkdir -p /run/netns /run/lock /run/containerd
mount -t tmpfs tmpfs /var/log
for top in /var/lib /etc /opt; do
    layer=$folder/layers$top
    mkdir -p "$layer/upper" "$layer/work"
    mount -t overlay overlay -o "lowerdir=$top,upperdir=$layer/upper,workdir=$layer/work" "$top"
done
mkdir -p /var/lib/kubelet /var/lib/cni /var/log/pods /var/log/containers /etc/cni/net.d /opt/cni/bin
mount --bind "$folder/net.d" /etc/cni/net.d
mount --bind "$folder/plugins" /opt/cni/bin
mount --bind "$folder/kubelet" /var/lib/kubelet
mount --make-rshared /var/lib/kubelet
mount --bind "$folder/cni" /var/lib/cni
mount --bind "$folder/pods" /var/log/pods
mount -t bpf bpf /sys/fs/bpf

# The kubelet insists on these and would write them: it is given look-alikes, and the machine's stay as they are.
mkdir -p "$folder/sysctl"
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
    kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
    file=$folder/sysctl/$(echo "${setting%=*}" | tr / .)
    echo "${setting#*=}" >"$file"
    mount --bind "$file" "/proc/sys/${setting%=*}"
done
echo 1 >/proc/sys/net/ipv4/ip_forward

touch "$folder/ready"
sleep infinity &
wait $!

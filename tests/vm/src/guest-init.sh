#!/bin/busybox sh
# Process 1 of the guest: mounts what a node has, runs /payload/run, and tells its exit code on the second serial port.
export PATH=/payload:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp TERM=dumb
mount -t devtmpfs dev /dev; mkdir -p /dev/pts /dev/shm
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs run /run; mount -t tmpfs tmp /tmp
mount -t devpts devpts /dev/pts; mount -t tmpfs shm /dev/shm
mount -t cgroup2 cg /sys/fs/cgroup; mount -t bpf bpf /sys/fs/bpf
mkdir -p /run/netns; rm -rf /var/run; mkdir -p /var; ln -s /run /var/run
ln -sf /proc/self/fd /dev/fd; ln -sf /proc/self/fd/0 /dev/stdin; ln -sf /proc/self/fd/1 /dev/stdout
ln -sf /proc/self/fd/2 /dev/stderr
ip link set lo up
for module in $(cat /payload/modules); do modprobe $module 2>/dev/null; done
stty -F /dev/ttyS0 -onlcr -echo 2>/dev/null
cd /payload; ulimit -l unlimited; ulimit -n 65536
echo "vm: booted $(uname -r) in $(cut -d' ' -f1 /proc/uptime) s"
if [ -e /payload/shell ]; then setsid cttyhack sh </dev/console >/dev/console 2>&1; else
setsid /bin/sh /payload/run </dev/null; fi
echo "EXIT $?" > /dev/ttyS1
sync; poweroff -f

# One of two nodes that are machines of their own, on one wire (eth0). Node 1 tests, node 2 serves.
N=@NUMBER@ O=@OTHER@ MARKER=tacit-pair-marker-7d31
release() { for port in 9001 9002; do nc -w 1 10.76.0.$O $port </dev/null; done; } # node 2 waits at no door any more
fail() { [ $N = 2 ] || release; echo "pair: $1"; cat /tmp/agent.log /tmp/*.pcap.log 2>/dev/null; echo 'test two_machines_talk_through_both_agents ... FAILED'
    echo 'test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s'; exit 1; }
# Tries a command until it succeeds; five minutes are for hangs.
await() { what=$1; shift; end=$(($(date +%s) + 300))
    until "$@" >/dev/null 2>&1; do [ "$(date +%s)" -lt $end ] || fail "$what"; sleep 0.2; done; }

ip addr add 10.76.0.$N/24 dev eth0; ip link set eth0 up
ip netns add pod; ip link add pod0 type veth peer name eth0 netns pod
ip addr add 10.77.$N.1/24 dev pod0; ip link set pod0 up
ip -n pod addr add 10.77.$N.2/24 dev eth0; ip -n pod link set eth0 up; ip -n pod link set lo up
ip -n pod route add default via 10.77.$N.1
echo 1 > /proc/sys/net/ipv4/ip_forward; ip route add 10.77.$O.0/24 via 10.76.0.$O
mkdir -p /sys/fs/cgroup/pods/shop_p$N
in_pod() { sh -c 'echo $$ > /sys/fs/cgroup/pods/shop_p'$N'/cgroup.procs; exec nsenter --net=/run/netns/pod "$@"' sh "$@"; }
in_pod sleep 1000 &
cd /tmp
cat > tacit.yaml <<CONFIG
trustDomain: cluster.local
node: n$N
podsCgroup: /sys/fs/cgroup/pods
meshRanges: [10.77.0.0/16]
directory: {file: directory.yaml}
policy: {file: policy.yaml}
issuer: {embedded: {directory: issuer}}
CONFIG
cat > directory.yaml <<DIRECTORY
workloads:
  - {name: p1, namespace: shop, serviceAccount: one, addresses: [10.77.1.2], node: n1}
  - {name: p2, namespace: shop, serviceAccount: two, addresses: [10.77.2.2], node: n2}
DIRECTORY
: > policy.yaml
start_agent() {
    /t/tacit agent --config /tmp/tacit.yaml > /tmp/agent.log 2>&1 &
    await "agent of node $N is not ready" sh -c '/t/tacit status -o json | grep -q "\"enrolled\""'
}
if [ $N = 2 ]; then
    in_pod nc -ll -p 8080 -e cat &
    # The two agents of a standalone mesh share one root: it comes from node 1.
    await 'no root from node 1' sh -c 'sleep 3 | nc 10.76.0.1 9000 | tar x -C /tmp && [ -s /tmp/issuer/root-cert.pem ] && [ -s /tmp/issuer/root-key.pem ]'
    start_agent
    nc -l -p 9001 </dev/null >/dev/null      # tells node 1 that this one is ready
    nc -l -p 9002 </dev/null >/dev/null      # node 1 has finished
    exit 0
fi
echo 'Running pair (@LABEL@:pair-0)'
await 'node 2 does not answer' ping -c1 -W1 10.76.0.2
record() { tcpdump -i eth0 -n -U --immediate-mode -Z root -w $1 2>$1.log & dump=$!; await 'tcpdump does not record' grep -q 'listening on' $1.log; }
say() { [ "$(echo $MARKER | in_pod nc -w 10 10.77.2.2 8080)" = $MARKER ]; }
found() { grep -a -c $MARKER $1; }

record control.pcap; await 'pods do not reach each other without Tacit' say
await 'the control shows nothing: the marker was not on the wire without Tacit' grep -a -q $MARKER control.pcap
kill $dump; wait $dump

mkdir -p issuer; start_agent
( while tar c issuer | nc -l -p 9000; do :; done ) >/dev/null 2>&1 &
await 'node 2 is not ready' nc -w 2 10.76.0.2 9001 </dev/null
record tunnel.pcap; say || fail 'pods do not reach each other through Tacit'
# Ends node 2; when it has been recorded, so has all before it.
echo last-words | nc -w 5 10.76.0.2 9002
await 'the recording has no end' grep -a -q last-words tunnel.pcap; kill $dump; wait $dump
[ "$(found tunnel.pcap)" = 0 ] || fail 'the marker was on the wire'
tunnelled=$(tcpdump -n -Z root -r tunnel.pcap 'tcp port 15008' 2>/dev/null | grep -c 15008)
[ "$tunnelled" -gt 8 ] || fail "only $tunnelled packets to the tunnel port"
echo "pair: marker found $(found control.pcap) times without Tacit, 0 times with it; $tunnelled packets of the tunnel"
echo 'test two_machines_talk_through_both_agents ... ok'
echo 'test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s'
exit 0

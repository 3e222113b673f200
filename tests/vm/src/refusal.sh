# On a kernel that is too old the agent must end with 78, name what is missing, and leave nothing behind.
echo 'Running refusal (@LABEL@:refusal-0)'
mkdir -p /sys/fs/cgroup/pods /tmp/issuer
cat > /tmp/tacit.yaml <<CONFIG
trustDomain: cluster.local
node: a
podsCgroup: /sys/fs/cgroup/pods
meshRanges: [10.77.0.0/16]
directory: {file: directory.yaml}
policy: {file: policy.yaml}
issuer: {embedded: {directory: issuer}}
socket: /run/tacit/agent.sock
CONFIG
printf 'workloads: []\n' > /tmp/directory.yaml
: > /tmp/policy.yaml
ls -A /sys/fs/bpf > /tmp/before
timeout 60 /t/tacit agent --config /tmp/tacit.yaml > /tmp/log 2>&1
code=$?
cat /tmp/log
ls -A /sys/fs/bpf > /tmp/after
problem=
[ "$code" = 78 ] || problem="exit code $code instead of 78"
grep -q bpf_get_netns_cookie /tmp/log || problem="$problem; the missing feature is not named"
cmp -s /tmp/before /tmp/after || problem="$problem; pins were left"
[ -e /run/tacit/agent.sock ] && problem="$problem; a socket was left"
if [ -z "$problem" ]; then
    echo 'test the_agent_refuses_to_start_and_leaves_nothing ... ok'
    echo 'test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s'
    exit 0
fi
echo "$problem"
echo 'test the_agent_refuses_to_start_and_leaves_nothing ... FAILED'
echo 'test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s'
exit 1

# Builds Kubernetes 1.20 from Debian's source package with Debian's Go, without any network.
# $1 work folder: gopath/src/k8s.io/kubernetes is the patched source, root/usr/lib/go-1.19 is Go. $2 where programs go.
set -e
work=$1 bin=$2
export GOROOT=$work/root/usr/lib/go-1.19 GOPATH=$work/gopath GOCACHE=$work/gocache HOME=$work
export GO111MODULE=off CGO_ENABLED=0 GOFLAGS= PATH=$GOROOT/bin:$PATH
mkdir -p "$bin"
cd "$GOPATH/src/k8s.io/kubernetes"

# The one generated file that the source package lacks, from every package that asks for it outside the examples.
generated=pkg/generated/openapi/zz_generated.openapi.go
if [ ! -s $generated ]; then
    go build -o "$work/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
    packages=$(grep -l '+k8s:openapi-gen=' -r --include=*.go pkg cmd plugin staging/src/k8s.io |
        grep -vE '/testdata/|_examples|sample-|/_output/|code-generator|kube-aggregator/pkg/generated' |
        xargs -n1 dirname | sort -u |
        sed -e 's#^staging/src/#k8s.io/kubernetes/vendor/#; t; s#^#k8s.io/kubernetes/#' | paste -sd,)
    "$work/openapi-gen" -i "$packages" -p k8s.io/kubernetes/pkg/generated/openapi -O zz_generated.openapi \
        --go-header-file hack/boilerplate/boilerplate.generatego.txt -r "$work/openapi-violations.txt"
fi

flags="-s -w"
for package in component-base/version client-go/pkg/version; do
    name=k8s.io/kubernetes/vendor/k8s.io/$package
    flags="$flags -X $name.gitVersion=v1.20.2 -X $name.gitMajor=1 -X $name.gitMinor=20"
done
for program in kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl; do
    echo "building $program"
    go build -tags providerless,dockerless,selinux,notest -ldflags "$flags" -o "$bin/$program" ./cmd/$program
done

# Certificates of a cluster that lives for an hour. $1 folder, $2 address of the API server, $3.. NODE=ADDRESS
set -e
folder=$1 server=$2
shift 2
mkdir -p "$folder"
cd "$folder"
key="-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
openssl req -x509 $key -days 7 -subj /CN=kube-ca -keyout ca.key -out ca.crt

make() { # name, subject, more extensions
    openssl req -new $key -subj "$2" -keyout "$1.key" -out "$1.csr"
    printf 'extendedKeyUsage=serverAuth,clientAuth\n%s\n' "$3" >"$1.ext"
    openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 7 -out "$1.crt" -extfile "$1.ext"
}
config() { # name
    cat >"$1.kubeconfig" <<K
{"apiVersion": "v1", "kind": "Config", "current-context": "c",
 "clusters": [{"name": "c", "cluster": {"server": "https://$server:6443", "certificate-authority": "$folder/ca.crt"}}],
 "users": [{"name": "u", "user": {"client-certificate": "$folder/$1.crt", "client-key": "$folder/$1.key"}}],
 "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}]}
K
}

make apiserver /CN=kube-apiserver \
    "subjectAltName=IP:127.0.0.1,IP:$server,IP:10.96.0.1,DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc"
make apiserver-kubelet /O=system:masters/CN=apiserver-kubelet-client ""
make admin /O=system:masters/CN=admin ""
make controller-manager /CN=system:kube-controller-manager ""
make scheduler /CN=system:kube-scheduler ""
make proxy /CN=system:kube-proxy ""
for name in admin controller-manager scheduler proxy; do config $name; done
for node; do
    make "${node%=*}" "/O=system:nodes/CN=system:node:${node%=*}" "subjectAltName=IP:${node#*=},DNS:${node%=*}"
    config "${node%=*}"
done
openssl genrsa -out sa.key 2048
openssl rsa -in sa.key -pubout -out sa.pub

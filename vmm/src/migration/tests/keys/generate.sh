#!/bin/bash
# Makes the keys of the migration tests: `good` and `other` have different authorities; the certificates of `expired` are
# of `good`'s authority and were valid for one day; the server of `elsewhere` has another address.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
forever="-startdate 20200101000000Z -enddate 21200101000000Z"
past="-startdate 20200101000000Z -enddate 20200102000000Z"

authority() {
    mkdir -p "$work/$1" "$1"
    openssl ecparam -name prime256v1 -genkey -noout -out "$work/$1/ca-key.pem"
    : > "$work/$1/index.txt"
    openssl req -new -key "$work/$1/ca-key.pem" -subj "/CN=$1 authority" -out "$work/csr"
    sign "$1" "$1/ca-cert.pem" "$forever" "basicConstraints=critical,CA:TRUE" -selfsign
}

# sign AUTHORITY FILE DATES EXTENSIONS OPTIONS…: signs the request in $work/csr.
sign() {
    local authority=$work/$1 file=$2 dates=$3 extensions=$4
    shift 4
    printf '[ca]\ndefault_ca=d\n[d]\ndatabase=%s/index.txt\nnew_certs_dir=%s\nrand_serial=yes\nunique_subject=no\ndefault_md=sha256\npolicy=p\n[p]\ncommonName=supplied\n[x]\n%b\n' \
        "$authority" "$authority" "$extensions" > "$work/conf"
    # shellcheck disable=SC2086
    openssl ca -batch -notext -config "$work/conf" -extensions x -in "$work/csr" -out "$file" $dates \
        -keyfile "$authority/ca-key.pem" "$@" ${CERT:+-cert "$CERT"} 2> "$work/log" || { cat "$work/log"; exit 1; }
}

# pair FOLDER AUTHORITY ROLE DATES EXTENSIONS
pair() {
    mkdir -p "$1"
    openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out "$1/$3-key.pem"
    openssl req -new -key "$1/$3-key.pem" -subj "/CN=$3" -out "$work/csr"
    CERT=$2/ca-cert.pem sign "$2" "$1/$3-cert.pem" "$4" "$5"
    [ "$1" = "$2" ] || cp "$2/ca-cert.pem" "$1/"
}

client="extendedKeyUsage=clientAuth"
server="extendedKeyUsage=serverAuth\nsubjectAltName=IP:127.0.0.1,IP:::1"
for folder in good other; do
    authority $folder
    pair $folder $folder client "$forever" "$client"
    pair $folder $folder server "$forever" "$server"
done
pair expired good client "$past" "$client"
pair expired good server "$past" "$server"
pair elsewhere good client "$forever" "$client"
pair elsewhere good server "$forever" "extendedKeyUsage=serverAuth\nsubjectAltName=IP:192.0.2.7"

#!/bin/sh
# Makes the certificates of tests/test_tls.py anew: an authority, and a server and a client that it signed.
# The keys protect nothing and are good for a hundred years.
set -eu
cd "$(dirname "$0")"
new_key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1.key"; }

new_key ca
openssl req -new -x509 -days 36500 -key ca.key -subj "/CN=mxgpt test authority" -out ca.pem
for name in server client; do
    new_key "$name"
    printf 'subjectAltName=DNS:localhost,DNS:%s.example\n' "$name" > extensions
    openssl req -new -key "$name.key" -subj "/CN=$name.example" |
        openssl x509 -req -days 36500 -CA ca.pem -CAkey ca.key -CAcreateserial -extfile extensions -out "$name.pem"
done
rm -f ca.key ca.srl extensions

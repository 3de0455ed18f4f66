#!/bin/sh
# Makes the certificates of the tests anew: an authority; a server, the same server's next certificate, a client and a
# peer that it signed; and another authority with a client of its own. The keys protect nothing and are good for a
# hundred years.
set -eu
cd "$(dirname "$0")"
new_key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1.key"; }

# new_authority NAME
new_authority() {
    new_key "$1"
    openssl req -new -x509 -days 36500 -key "$1.key" -subj "/CN=mxgpt test $1" -out "$1.pem"
}

# new_certificate NAME AUTHORITY
new_certificate() {
    new_key "$1"
    printf 'subjectAltName=DNS:localhost,DNS:%s.example\n' "${1%-next}" > extensions
    openssl req -new -key "$1.key" -subj "/CN=$1.example" |
        openssl x509 -req -days 36500 -CA "$2.pem" -CAkey "$2.key" -CAcreateserial -extfile extensions -out "$1.pem"
}

new_authority ca
new_authority other-ca
for name in server server-next client peer; do new_certificate "$name" ca; done
new_certificate other-client other-ca
rm -f ca.key other-ca.key ./*.srl extensions

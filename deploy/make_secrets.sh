#!/bin/sh
# Makes what docker-compose.yml wants: a certificate of an authority of your own, and tokens. `make secrets` runs it; run again, it
# renews the certificate, for the hosts that it was for and those that are new, and leaves tokens as they are.
#
#   deploy/make_secrets.sh IMAGE FOLDER HOST...      HOST: every name and address that clients reach the server by
#
# FOLDER is for its owner alone. What lies in it can be read by any user: a container's user is another than its owner, and engines
# mount these folders past the one that is closed.
set -euf # a host may be *.lab
[ $# -ge 3 ] || { echo "usage: make_secrets.sh IMAGE FOLDER HOST..." >&2; exit 2; }
image=$1
folder=$2
shift 2

# Here, and not pulled: it sees the authority's key.
docker image inspect "$image" >/dev/null || { echo "error: $image has to be built first: make image" >&2; exit 1; }

mkdir -p "$folder"
chmod 700 "$folder"
folder=$(cd "$folder" && pwd)
mkdir -p "$folder/authority" "$folder/server" "$folder/client"

ome_tensor() {
  docker run --rm --interactive --network none --read-only --user "$(id -u):$(id -g)" --volume "$folder:/secrets" "$image" "$@"
}

place() { # place FILE FOLDER: there whole or not at all
  cp "$1" "$2/.new"
  chmod 644 "$2/.new"
  mv "$2/.new" "$2/$(basename "$1")"
}

# What clients trust is the authority of somebody else: so is the certificate, and its key is nowhere else.
if [ -e "$folder/client/ca.pem" ] && ! cmp -s "$folder/client/ca.pem" "$folder/authority/ca.pem"; then
  echo "$folder/client/ca.pem is another authority's: it stays, and so does the certificate in $folder/server (remove it for one of your own)" >&2
else
  hosts=$folder/authority/hosts
  { cat "$hosts" 2>/dev/null || true; printf '%s\n' "$@"; } | awk '!seen[$0]++' >"$hosts.new"
  # Names have no spaces, or they are refused. In the container's words the folder is another: say nothing of it.
  # shellcheck disable=SC2046
  ome_tensor certificate /secrets/authority $(cat "$hosts.new") >/dev/null 2>"$folder/authority/said" ||
    { cat "$folder/authority/said" >&2; exit 1; }
  mv "$hosts.new" "$hosts"
  rm "$folder/authority/said"
  place "$folder/authority/server.key" "$folder/server"
  place "$folder/authority/server.pem" "$folder/server"
  place "$folder/authority/ca.pem" "$folder/client"
  echo "the certificate is for $(paste -s -d ' ' "$hosts")" >&2
fi

token() { # token NAME SCOPE FILE
  [ -s "$3" ] || ome_tensor token create --tokens /secrets/server/tokens.json --scope "$2" --name "$1" --expires 365d >"$3"
  chmod 644 "$3"
}

token reader 'read:*' "$folder/client/reader.token"
token admin 'admin:*' "$folder/admin.token"
chmod 600 "$folder/admin.token"
chmod 644 "$folder/server/tokens.json"

[ -s "$folder/grafana_password" ] || head -c 18 /dev/urandom | base64 >"$folder/grafana_password"
chmod 644 "$folder/grafana_password"
chmod 755 "$folder/server" "$folder/client"

echo "in $folder: client/ca.pem and client/reader.token are for clients, admin.token for you, authority/ca.key for nobody else" >&2

#!/bin/sh
# Imports a deployment of MOSIP that was made up, with KEYS base keys, into a private kmsd, and says how long that took and in how much
# memory: what "make migration" runs. BIN has kmsd, kmsctl and generate.
set -eu
: "${BIN:?}" "${KEYS:=10000}"
PATH=$BIN:$PATH
dir=$(mktemp -d)
pid=
cleanup() {
	[ -z "$pid" ] || { kill "$pid" && wait "$pid" || true; }
	rm -rf "$dir"
}
trap cleanup EXIT
export HOME="$dir" XDG_RUNTIME_DIR="$dir" KMSD_SOCKET="$dir/run"
mkdir "$dir/d"
generate -out "$dir/d" -keys "$KEYS"
printf 'keystore password' >"$dir/password"
kmsd init --state-dir "$dir/state" --enclave keyring:file --no-recovery >/dev/null
kmsd run --state-dir "$dir/state" --runtime-dir "$dir/run" 2>"$dir/log" &
pid=$!
while ! kmsctl ping >/dev/null 2>&1; do
	kill -0 "$pid" || { cat "$dir/log"; exit 1; }
	sleep 0.1
done
import() {
	began=$(date +%s.%N)
	kmsctl mosip import --from "$dir/d/dump.sql" --keystore "$dir/d/keystore.p12" --password-file "$dir/password" "$@" | tail -n 4
	echo "$(date +%s.%N) $began" | awk '{ printf "  in %.1f s\n", $1 - $2 }'
}
echo "dry run:"
import --dry-run
echo "import:"
import
awk '/VmHWM/ { printf "  kmsd took at most %d MiB\n", $2 / 1024 }' "/proc/$pid/status"
echo "again:"
import
du -k "$dir/d/dump.sql" "$dir/state/store.db" | awk '{ n = split($2, path, "/"); printf "  %s: %d MiB\n", path[n], $1 / 1024 }'

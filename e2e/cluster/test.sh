#!/usr/bin/env bash
# Runs the tests that stand on package framework, and those of the cluster itself, in one cluster brought up for them
# (or in the one that is up), and takes it down. RUN chooses tests by regexp; counts
# what was skipped and why.
#
# test.sh prepare builds the image and the tests: a cluster is not kept up while a
# compiler runs. test.sh run runs them.
set -uo pipefail
cd "$(dirname "$0")/.."
export CGO_ENABLED=0
# Those packages need a cluster; one at a time, as they share it.
mapfile -t packages < <(go list -f '{{range .XTestImports}}{{if eq . "github.com/varve-io/varve/e2e/framework"}}{{$.ImportPath}}{{end}}{{end}}{{range .TestImports}}{{if eq . "github.com/varve-io/varve/e2e/framework"}}{{$.ImportPath}}{{end}}{{end}}' ./... | sort -u)
packages=(./cluster/... ./csidriver/... "${packages[@]}")
case "${1:-}" in
prepare)
	VERSION=e2e make --no-print-directory -C .. image IMAGE=localhost/varve:e2e || exit 1
	go vet "${packages[@]}" && go test -count=1 -run '^$' "${packages[@]}" >/dev/null
	exit
	;;
run) ;;
*)
	echo "test.sh: prepare or run?" >&2
	exit 2
	;;
esac
log=$(mktemp)
own=
finish() {
	rc=$?
	if [ -n "$own" ]; then
		go run ./cluster/cmd/e2e-cluster down || rc=1
	fi
	rm -f "$log"
	exit $rc
}
trap finish EXIT
trap 'exit 130' INT TERM
if ! go run ./cluster/cmd/e2e-cluster exec true 2>/dev/null; then
	own=yes
	go run ./cluster/cmd/e2e-cluster up || exit 1
fi
go run ./cluster/cmd/e2e-cluster image ../bin/image/varve.tar || exit 1
export VARVE_E2E_IMAGE=localhost/varve:e2e VARVE_E2E_KILLS=${VARVE_E2E_KILLS:-all}
rc=0
VARVE_E2E_UP=1 go test -p 1 -count=1 -timeout 90m -v -run "${RUN:-.}" "${packages[@]}" 2>&1 | tee "$log" |
	grep --line-buffered -E '^(ok|FAIL|panic:)|^ *--- (FAIL|PASS)'
[ "${PIPESTATUS[0]}" -eq 0 ] || rc=1
if [ $rc -ne 0 ]; then
	echo "--- what failed said:"
	grep -vE '^(=== |--- PASS| *--- PASS|ok|\?|PASS)' "$log" | tail -n 200
fi
passed=$(grep -cE '^ *--- PASS' "$log")
failed=$(grep -cE '^ *--- FAIL' "$log")
skipped=$(grep -cE '^ *--- SKIP' "$log")
grep -A3 -E '^ *--- SKIP' "$log"
echo "e2e: $passed passed, $failed failed, $skipped skipped"
exit $rc

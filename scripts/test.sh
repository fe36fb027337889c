#!/usr/bin/env bash
# All tests of the main module, then those of e2e beside real peers. The race detector
# runs where there are goroutines: everywhere but in the parsers of PARSERS, of which
# only the tests of concurrent readers get it. VARVE_RACE=all has it everywhere.
# Prints the 40 slowest tests, those that were skipped and why, and the totals.
set -uo pipefail
: "${CACHE:?names the directory of built tools}" "${GOTESTSUM:?names the gotestsum binary}"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
rc=0
PARSERS='/(api/v1alpha1|internal/probe|fusefs/diskfs(/.*)?|backup/cbt|nbdserver/proto)$'

# run NAME ARGUMENTS... runs "go test" and keeps what it says in $out/NAME.json.
run() {
	local name=$1
	shift
	"$GOTESTSUM" --format pkgname --format-hide-empty-pkg --hide-summary=skipped --jsonfile "$out/$name.json" -- "$@" || rc=1
}

# One varve for all tests that run the program.
export VARVE=$out/varve
CGO_ENABLED=0 go build -o "$VARVE" ./cmd/varve || exit 1

# The tag is Kopia's own: repositories that tests make derive their key from the
# password at once, which otherwise takes seconds each under the race detector.
common=(-tags testing -timeout 40m)
mapfile -t parsers < <(go list ./... | grep -E "$PARSERS")
mapfile -t others < <(go list ./... | grep -vE "$PARSERS")
# Tests wait for disks and processes as well: more packages at once than processors.
if [ "${VARVE_RACE:-}" = all ]; then
	run all -race -p 3 "${common[@]}" ./...
else
	run concurrent -race -p 3 "${common[@]}" "${others[@]}"
	run parsers -p 3 "${common[@]}" "${parsers[@]}"
	# Memory is measured without the race detector, which takes several times as much.
	run memory "${common[@]}" -run '^TestMemory$' ./populator
	run readers -race -p 3 "${common[@]}" -run 'Concurren|Parallel|Race' "${parsers[@]}"
fi
packages=()
for p in kopia faults nbd bench; do
	[ -d "e2e/$p" ] && packages+=("./$p/...")
done
# Not from the cache: they run the program, whose source it does not look at.
cd e2e || exit 1
# The kernel's client, in a virtual machine, has a target of its own: make e2e-nbd.
run peers -count=1 -p 2 -timeout 40m -skip '^TestKernel' "${packages[@]}"
cd chart || exit 1
run chart -count=1 ./...
cd ../.. || exit 1
cat "$out"/*.json >"$out/all"
[ -z "${VARVE_TEST_JSON:-}" ] || cp "$out/all" "$VARVE_TEST_JSON"
scripts/test-report.sh "$out/all"
exit $rc

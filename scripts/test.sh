#!/usr/bin/env bash
# All tests of the main module with the race detector, then those of e2e beside
# real peers. Counts the tests that were skipped and why.
set -uo pipefail
log=$(mktemp)
trap 'rm -f "$log"' EXIT
rc=0
what_failed_said() {
	echo "--- what failed said:"
	grep -vE '^(=== | *--- (PASS|SKIP)|ok|\?|PASS)' "$1" | grep -B40 -A3 -E 'FAIL|panic:|DATA RACE' | tail -n 300
}
# The tag is Kopia's own: repositories that tests make derive their key from the
# password at once, which otherwise takes seconds each under the race detector.
go test -race -tags testing -timeout 40m -v ./... >"$log" 2>&1 || rc=1
grep -E '^(ok|FAIL|panic:)|^--- FAIL|^    --- FAIL|DATA RACE' "$log" || true
if [ $rc -ne 0 ]; then
	what_failed_said "$log"
fi
packages=()
for p in kopia faults nbd bench; do
	[ -d "e2e/$p" ] && packages+=("./$p/...")
done
# Not from the cache: they build and run the program, whose source it does not look at.
(cd e2e && go test -count=1 -timeout 40m -v "${packages[@]}") >"$log.e2e" 2>&1 || rc=1
(cd e2e/chart && go test -count=1 -v ./...) >>"$log.e2e" 2>&1 || rc=1
grep -E '^(ok|FAIL|panic:)|^--- FAIL|^    --- FAIL' "$log.e2e" || true
if [ $rc -ne 0 ]; then
	what_failed_said "$log.e2e"
fi
cat "$log.e2e" >>"$log"
rm -f "$log.e2e"
passed=$(grep -cE '^ *--- PASS' "$log")
failed=$(grep -cE '^ *--- FAIL' "$log")
skipped=$(grep -cE '^ *--- SKIP' "$log")
if [ "$skipped" -gt 0 ]; then
	echo "--- skipped:"
	grep -A3 -E '^ *--- SKIP' "$log" | head -n 60
fi
echo "$passed passed, $failed failed, $skipped skipped"
exit $rc

#!/usr/bin/env bash
# test-cpu.sh INPUTS TEST ARGUMENTS... runs the test binary of a package, for "go test -exec", and adds a line to the
# file $TEST_CPU: the seconds that it and its children were on a processor, and the package's directory.
# INPUTS is for go, which takes a result from its cache only if the command of -exec is the same: test-inputs.sh.
test=$2
shift 2
# Go asks tests for the files and variables that they read, for its cache, but not through -exec. It looks there for
# the answer all the same, and without one does not use its cache.
log=()
[[ $test != */go-build*/b*/*.test ]] || log=(-test.testlogfile="${test%/*}/testlog.txt")
# Tests make much garbage and keep little. Those that measure memory measure it as users have it.
unset GOGC GOMEMLIMIT
grep -qsE 'MemStats|SetGCPercent|SetMemoryLimit|GOGC|GOMEMLIMIT|axrss|VmHWM|VmRSS|runtime/metrics|runtime\.GC\(' ./*_test.go ||
	export GOGC=400 GOMEMLIMIT=1GiB
spent=$(mktemp)
TIMEFORMAT='%U %S'
{ time "$test" "${log[@]}" "$@" 2>&3; } 3>&2 2>"$spent"
rc=$?
awk -v dir="$PWD" '{ printf "%.0f %s\n", $1 + $2, dir }' "$spent" >>"${TEST_CPU:?names a file}"
rm -f "$spent"
exit "$rc"

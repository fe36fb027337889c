#!/usr/bin/env bash
# test-report.sh FILE
# Reads the output of "go test -json" and prints the 40 slowest tests, those that were
# skipped with their reasons, and the totals.
set -euo pipefail
echo "--- slowest tests:"
"${GOTESTSUM:?names the gotestsum binary}" tool slowest --num 40 --threshold 100ms --jsonfile "$1"
# Lines of one test in their order: the last one before its end says why it was skipped.
jq -rn '
	reduce (inputs | select(.Test)) as $e ({said: {}, ended: {pass: 0, fail: 0, skip: 0}, skipped: []};
		"\($e.Package) \($e.Test)" as $test
		| if $e.Action == "output" then
			if $e.Output | test("^ *(=== |--- )") then . else .said[$test] = $e.Output end
		elif .ended[$e.Action] != null then
			.ended[$e.Action] += 1
			| if $e.Action == "skip" then .skipped += ["\($test): \(.said[$test] // "without a word" | gsub("^\\s+|\\s+$"; ""))"] else . end
			| del(.said[$test])
		else . end)
	| (if .skipped == [] then empty else "--- skipped:", .skipped[] end),
	"\(.ended.pass) passed, \(.ended.fail) failed, \(.ended.skip) skipped"' "$1"

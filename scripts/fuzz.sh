#!/usr/bin/env bash
# Fuzzes every FuzzXxx of the main module for the time given, one after another.
set -euo pipefail
time=${1:-30s}
for dir in $(grep -rlE '^func Fuzz' --include='*_test.go' . | grep -v '^./e2e/' | xargs -n1 dirname | sort -u); do
	for target in $(grep -hoE '^func Fuzz[A-Za-z0-9_]+' "$dir"/*_test.go | sed 's/^func //' | sort -u); do
		echo "== $dir $target"
		go test "$dir" -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 10x
	done
done

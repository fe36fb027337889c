#!/usr/bin/env bash
# count-lines.sh WHAT
# Shows how many lines come by standard input, as a sign of life; prints those that look
# like errors. It fails if any did.
set -uo pipefail
n=0 failed=0
while IFS= read -r line; do
	case "$line" in
	*": "* | "# "* | make*Error*) printf '%s\n' "$line" >&2; failed=1 ;;
	*) n=$((n + 1)) ;;
	esac
	[ $((n % 25)) -ne 0 ] || printf '\r%d %s' "$n" "$1"
done
printf '\r%d %s\n' "$n" "$1"
exit $failed

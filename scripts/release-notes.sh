#!/usr/bin/env bash
# release-notes.sh [VERSION]
# Prints the changes in changelog/unreleased, one file each, as the notes of a release.
# A file's text begins with its kind: "Added: ", "Changed: ", "Fixed: " or "Security: ".
# With a VERSION, the files move to changelog/VERSION first, and those are printed.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=changelog/unreleased
if [ $# -gt 0 ]; then
	dir=changelog/$1
	git mv changelog/unreleased "$dir"
fi
shopt -s nullglob
files=("$dir"/*)
for f in "${files[@]}"; do
	case "$f" in *.md) ;; *) echo "$f: not a .md file" >&2; exit 1 ;; esac
	head -n 1 "$f" | grep -qE '^(Added|Changed|Fixed|Security): .' ||
		{ echo "$f: begin the text with Added:, Changed:, Fixed: or Security:" >&2; exit 1; }
done
echo "# ${1:-Unreleased}"
for kind in Security Added Changed Fixed; do
	title="## $kind"
	for f in "${files[@]}"; do
		[ "$(head -n 1 "$f" | cut -d: -f1)" = "$kind" ] || continue
		[ -z "$title" ] || printf '\n%s\n\n' "$title"
		title=
		sed -e '1s/^[A-Za-z]*: /- /' -e '1!s/^\(.\)/  \1/' "$f"
	done
done

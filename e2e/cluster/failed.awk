# What failed tests said, complete and first, then what belongs to no test: of the output of
# "go test -v", given twice. With -v each test's lines are printed as they come, below a line that
# names the test if that is another one than before.
function name(line) { sub(/^ *(=== [A-Z]+ +|--- [A-Z]+: )/, "", line); sub(/[ \t].*$/, "", line); return line }
NR == FNR {
	if ($0 ~ /^ *--- FAIL: /) failed[name($0)] = 1
	else if ($0 ~ /^=== /) started[name($0)] = 1
	if ($0 ~ /^ *--- /) ended[name($0)] = 1
	next
}
# A test without an end was at work when its process ended.
FNR == 1 { for (t in started) if (!(t in ended)) failed[t] = 1 }
/^=== / { at = name($0); next }
/^ *--- / { at = name($0); if (/ FAIL: /) said[at] = said[at] $0 "\n"; next }
/^(PASS|FAIL|ok |\?|exit status|panic: |fatal error: |goroutine )/ { at = "" }
at != "" && !(at in failed) { next }
at != "" { said[at] = said[at] $0 "\n"; next }
!/^(PASS|ok |\?)/ { rest[++lines] = $0 }
END {
	for (t in failed) printf "%s", said[t]
	# A crash's reason comes first, then its stacks.
	for (i = 1; i <= lines && i <= 400; i++) print rest[i]
	if (lines > 400) printf "(and %d more lines)\n", lines - 400
}

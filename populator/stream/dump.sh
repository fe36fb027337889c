# The program that runs a command in an application's pod and counts what it prints. POSIX sh with
# sleep, tee and wc; it is run with dash and BusyBox in stream's tests.
#
# Set before it: nonce, command, and limit, silence and pace (seconds).
#
#   top - runner -+- work -+- shell - command   its output goes to tee, and from there to fd 5 and to wc
#                 |        +- tee, wc
#                 |        `- relay, ticker      lines of the client, and one each pace, for the keeper
#                 `- keeper   ends the command: the client is gone, or the time is over
#
# Fd 4 is the client, fd 5 the output, fd 3 the facts about it, fd 8 the keeper's lines. The last line on standard
# error reports how the command ended; without it the client rejects the output.
#
# The first process of the container may be PostgreSQL, which inherits processes whose parents
# ended, and treats one that ends by a signal, or with a status above 1, as a crash of the database.
# So a process that is killed here has a parent that waits for it, one that may be orphaned ends
# with 0, and none ends by a pipe without a reader. Only top may be killed by the container
# runtime, its parent. Processes that the command started are not killed: their output has no
# reader any more, since tee is killed.
#
# Top keeps all streams open to its end: containerd ends the standard input of an exec as soon as one
# of its outputs is closed.
exec 4<&0 5>&1 </dev/null >&2
trap '' HUP INT TERM PIPE
# The output may lack its last end of line.
say() { printf '\n%s %s\n' "$nonce" "$*" >&2; }

for tool in sleep tee wc; do
	command -v "$tool" >/dev/null 2>&1 || {
		say "failed there is no $tool command in the container"
		exit 127
	}
done

# A shell keeps a function's redirected files open, so these two close those of others.
relay() {
	exec 2>/dev/null 3>&- 5>&- 8>&-
	while IFS= read -r line <&4; do printf 'c\n' || exit 0; done
	printf 'e\n'
	exit 0
}

ticker() {
	exec 2>/dev/null 3>&- 4<&- 5>&- 8>&-
	while sleep "$pace"; do printf 't\n' || exit 0; done
	exit 0
}

# keeper ends the command and what is left of it.
keeper() {
	age=0 idle=0 why='' command='' tee=''
	# Both pids are known before a kill.
	while [ -z "$why" ] || [ -z "$command" ] || [ -z "$tee" ]; do
		IFS= read -r event || exit 0
		case $event in
		d) exit 0 ;;
		'p '*) command=${event#p } ;;
		'k '*) tee=${event#k } ;;
		c) idle=0 ;;
		e) [ -n "$why" ] || why=gone ;;
		t) age=$((age + pace)) idle=$((idle + pace)) ;;
		esac
		[ -n "$why" ] || [ "$age" -lt "$limit" ] || why=limit
		[ -n "$why" ] || [ "$idle" -lt "$silence" ] || why=silence
	done
	printf 'w %s\n' "$why" >&3
	kill -TERM "$command"
	for _ in 1 2 3; do
		sleep 1
		kill -0 "$tee" || exit 0
	done
	kill -9 "$command"
	sleep 1
	kill -9 "$tee"
	exit 0
} 2>/dev/null

counted() {
	n=$(wc -c)
	# shellcheck disable=SC2086 # some pad it
	printf 'n %s\n' $n >&3
}

# started has a parent that waits for it, and reports its pid first.
started() {
	(
		trap - HUP INT TERM
		# shellcheck disable=SC2016 # the inner shell's
		exec sh -c 'printf "p %s\n" "$$" >&8; exec 8>&-; exec sh -c "$0"' "$command" </dev/null 3>&- 4<&- 5>&-
	)
	printf 'c %s\n' "$?" >&3
}

work() {
	exec 8>&1
	relay &
	exec 4<&-
	ticker &
	{
		started 5>&- | (exec tee /dev/fd/6 6>&1 >&5 3>&- 8>&-) &
		tee=$!
		printf 'k %s\n' "$tee" >&8
		wait "$tee" 2>/dev/null
		printf 't %s\n' "$?" >&3
	} | counted 5>&- 8>&-
	printf 'd\n'
}

runner() {
	result=$(
		exec 3>&1
		work | keeper 4<&- 5>&-
	)
	code='' passed='' bytes='' why=none
	while read -r name value; do
		case $name in
		c) code=$value ;;
		t) passed=$value ;;
		n) bytes=$value ;;
		w) why=$value ;;
		esac
	done <<END
$result
END
	say "ended ${code:-none} ${passed:-none} ${bytes:-none} $why"
	exit 0
}

runner &
wait
exit 0

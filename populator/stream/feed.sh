# The program that feeds a stream to a command in a pod. The command sees its end only if it is whole.
# POSIX sh with dd (iflag=fullblock), sleep and wc; it is run with dash and BusyBox in stream's tests.
#
# Set before it: nonce, command, and limit, silence and pace (seconds).
#
#   top - runner -+- work -+- left - feeder - dd    frames of the client, to the command's standard input
#                 |        +- started - command
#                 |        `- ticker, relay         a line each pace, and of the client, for the keeper
#                 `- keeper   ends the command: the stream was cut, or the time is over
#
# Fd 4 is the client, fd 5 the replies to it (standard output), fd 2 the command's output, fd 3 the facts about
# its end, fd 8 the keeper's lines. The client writes lines:
#
#   b            a beat
#   d N          N bytes follow
#   e N NONCE    the end, after N bytes
#   x            it cancels
#
# and reads "NONCE took N" for each piece that was written to the command's pipe, and last how the command ended.
# It sends no piece before the previous one was written. So data for a slow command waits in the memory of a dd, and
# no stream blocks: a WebSocket that blocks answers no pings, and is cut after a minute.
#
# A pipe ends in the same way whether its writer finished or was killed, and a database client commits at
# the end of its input. So the command's input ends only after the line "e"; in all other cases each process of
# the command is stopped, then killed, while feeder and left hold its input open.
#
# As in dump.sh, the first process of the container inherits no killed process: PostgreSQL treats that
# as a crash. Of the command's processes those without children are killed, while the others
# wait for them; what those start then is killed too. The command's shell has -e, so that it starts
# nothing after a killed process.
exec 4<&0 5>&1 </dev/null >&2
trap '' HUP INT TERM PIPE
say() { printf '%s %s\n' "$nonce" "$*" >&5; }

for tool in sleep dd wc; do
	command -v "$tool" >/dev/null 2>&1 || {
		say "failed there is no $tool command in the container"
		exit 127
	}
done
[ "$(printf abcd | dd bs=4 count=1 iflag=fullblock 2>/dev/null)" = abcd ] || {
	say 'failed the dd command of the container knows no iflag=fullblock'
	exit 127
}
[ -r /proc/self/stat ] || {
	say 'failed the container has no /proc'
	exit 127
}

# Read the client also after the last byte.
relay() {
	exec >/dev/null 2>/dev/null 3>&- 5>&-
	why=gone
	while IFS=' ' read -r word _ <&4; do
		case $word in
		b) printf 'c\n' >&8 || exit 0 ;;
		x) why=left && break ;;
		esac
	done
	printf 'e %s\n' "$why" >&8
	exit 0
}

ticker() {
	exec 2>/dev/null 3>&- 4<&- 5>&-
	while sleep "$pace"; do printf 't\n' || exit 0; done
	exit 0
}

# family sets kin to a process and its descendants, and parents to those of them with children.
family() {
	kin=" $1 " parents=' ' table='' more=1
	for stat in /proc/[0-9]*/stat; do
		IFS= read -r line <"$stat" || continue
		rest=${line##*) }
		state=${rest%% *} rest=${rest#* }
		[ "$state" = Z ] || table="$table ${line%% *}:${rest%% *}"
	done
	while [ -n "$more" ]; do
		more=''
		for pair in $table; do
			case $kin in *" ${pair%:*} "*) continue ;; esac
			case $kin in *" ${pair#*:} "*) kin="$kin${pair%:*} " parents="$parents${pair#*:} " more=1 ;; esac
		done
	done
} 2>/dev/null

# finish kills a process and its descendants. It stops all first, so that none reads the end of
# another as the end of its input. It returns after all have ended.
finish() {
	rounds=0
	while kill -0 "$1"; do
		was=''
		while family "$1" && [ "$kin" != "$was" ]; do
			was=$kin
			# shellcheck disable=SC2086 # several pids
			kill -STOP $kin
		done
		for pid in $kin; do
			case $parents in
			*" $pid "*) [ "$rounds" -lt 10 ] || kill -9 "$pid" ;; # it starts more and more
			*) kill -9 "$pid" ;;
			esac
		done
		for pid in $parents; do kill -CONT "$pid"; done
		rounds=$((rounds + 1))
		[ "$rounds" -lt 20 ] || sleep 1
	done
} 2>/dev/null

keeper() {
	age=0 idle=0 busy='' why='' command='' feeder='' known='' ended=''
	# Both pids are known before a kill.
	while [ -z "$known" ] || { [ -z "$ended" ] && { [ -z "$why" ] || [ -z "$command" ]; }; }; do
		IFS= read -r event || exit 0
		case $event in
		'p '*) command=${event#p } ;;
		'k '*) feeder=${event#k } known=1 ;;
		f) feeder='' ;;
		q) ended=1 ;;
		r) busy=1 ;; # the command reads a piece, at any pace
		c) busy='' idle=0 ;;
		'e '*) why=${event#e } ;;
		t) age=$((age + pace)) idle=$((idle + pace)) ;;
		esac
		[ -z "$busy" ] || idle=0
		[ -n "$why" ] || [ "$age" -lt "$limit" ] || why=limit
		[ -n "$why" ] || [ "$idle" -lt "$silence" ] || why=silence
	done
	if [ -z "$ended" ]; then
		printf 'w %s\n' "$why" >&3
		finish "$command"
	fi
	[ -z "$feeder" ] || finish "$feeder"
	exit 0
} 2>/dev/null

# feeder copies the pieces. One dd reads all of a piece, then another writes it, so that the keeper knows
# which side blocks.
feeder() {
	exec 2>/dev/null
	sum=0 why=gone
	while IFS=' ' read -r word size rest <&4; do
		why=garbled
		case $word in
		b) printf 'c\n' >&8 ;;
		d)
			case $size in '' | *[!0-9]*) break ;; esac
			{ dd bs="$size" count=1 iflag=fullblock <&4 && printf 'r\n' >&8; } | dd bs="$size" count=1 iflag=fullblock || {
				printf 'n %s\n' "$sum" >&3 # there is no reader
				exit 0
			}
			sum=$((sum + size))
			say "took $sum"
			printf 'c\n' >&8
			;;
		e)
			[ "$size" = "$sum" ] && [ "$rest" = "$nonce" ] || break
			printf 'n %s\n' "$sum" >&3
			relay &
			exit 0
			;;
		x)
			why=left
			break
			;;
		*) break ;;
		esac
		why=gone
	done
	printf 'n %s\n' "$sum" >&3
	printf 'e %s\n' "$why" >&8
	while sleep 60; do :; done
}

left() {
	feeder &
	feeder=$!
	printf 'k %s\n' "$feeder" >&8
	exec >/dev/null 2>/dev/null 3>&- 4<&- 5>&-
	wait "$feeder"
	printf 'f\n' >&8
}

# started has a parent that waits for it, and reports its pid first. Bytes that a successful command did not read
# are reported.
started() {
	(
		trap - HUP INT TERM
		# shellcheck disable=SC2016 # the inner shell's
		exec sh -c 'printf "p %s\n" "$$" >&8; exec 8>&-; exec sh -ec "$0"' "$command" >&2 3>&- 4<&- 5>&-
	)
	code=$?
	unread=0
	[ "$code" != 0 ] || unread=$(dd bs=1 count=1 2>/dev/null | wc -c)
	# shellcheck disable=SC2086 # some pad it
	printf 'c %s\nu %s\n' "$code" $unread >&3
	printf 'q\n' >&8
}

work() {
	exec 8>&1
	ticker &
	left | started 4<&- 5>&-
}

runner() {
	result=$(
		exec 3>&1
		work | keeper 4<&- 5>&-
	)
	code='' bytes='' unread='' why=none
	while read -r name value; do
		case $name in
		c) code=$value ;;
		n) bytes=$value ;;
		u) unread=$value ;;
		w) why=$value ;;
		esac
	done <<END
$result
END
	say "ended ${code:-none} ${bytes:-none} ${unread:-none} $why"
	exit 0
}

runner &
wait
exit 0

package v1alpha1

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/robfig/cron/v3"
)

// parseCron returns why the controller would reject a cron, as package policies does.
func parseCron(text string) error {
	if zone, _, spaced := strings.Cut(text, " "); !spaced && strings.Contains(zone, "TZ=") {
		return errors.New("a time zone only") // the parser panics
	}
	c, err := cron.ParseStandard(text)
	if err != nil {
		return err
	}
	s, ok := c.(*cron.SpecSchedule)
	switch {
	case !ok:
		return errors.New("not a schedule of times")
	case s.Next(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)).IsZero():
		return errors.New("it never comes")
	}
	return nil
}

func (d *definition) refusesCron(t *testing.T, text string) error {
	t.Helper()
	return d.refuses(t, d.with(t, []string{"schedule", "cron"}, fmt.Sprintf("%q", text)))
}

// A cron that the parser accepts is admitted. The API server refuses any other, and says what
// is wrong.
func TestCronOfUsers(t *testing.T) {
	d := definitions(t)["BackupPolicy"]
	for text, wrong := range map[string]string{
		"0 */6 * * *": "", "* * * * *": "", "*/15 * * * *": "", "0 0 1 1 *": "", "30 2 * * 1-5": "", "0 22 * * mon-fri": "", "0 0 1 JAN-mar,Dec ?": "",
		"0,15,30,45 8-17 * * *": "", "5/10 2-22/4 1,15 */2 Sun,Sat": "", "  0 1\t* * *  ": "", "00 01 01 01 00": "", "0 0 30 2 0": "", "0 0 29 2 *": "", "0 0 29-31 2 *": "",
		"0 0 31 * *": "", "0 0 31 4,5 *": "", "0 0 * * 1-sat": "", "+5 +1 * * *": "", "0,15, ,3 * * *": "", "*-x/5 * * * *": "", "0 1-1 * * *": "", "0/90 * * * *": "",
		"@yearly": "", "@annually": "", "@monthly": "", "@weekly": "", "@daily": "", "@midnight": "", "@hourly": "",
		"TZ=Europe/Berlin 0 3 * * *": "", "CRON_TZ=UTC  0 3 * * *": "", "TZ= 0 3 * * *": "", "TZ=Asia/Tokyo @daily": "", "TZ=Etc/GMT-5 0 0 * * *": "", "0\u00a03\u2003* *\u3000*": "",

		"hourly": "five fields", "* * * *": "five fields", "0 0 */6 * * *": "five fields", "0 0 0 * * * *": "five fields", " ": "five fields",
		"@every 5m": "five fields", "@Daily": "five fields", "@reboot": "five fields", "TZ=UTC": "five fields", "TZ=UTC @every 1h": "five fields", "TZ=UTC * * * *": "five fields", "UTC 0 3 * * *": "five fields",
		"60 * * * *": "minute", "-1 * * * *": "minute", "*/0 * * * *": "minute", "5- * * * *": "minute", "1-2-3 * * * *": "minute", "1/2/3 * * * *": "minute", "0x5 * * * *": "minute", ", * * * *": "minute", "55* * * * *": "minute", "a * * * *": "minute",
		"*/-5 * * * *": "minute", "jan * * * *": "minute", "TZ=UTC 61 * * * *": "minute", "0,60 * * * *": "minute", "1-60 * * * *": "minute", "** * * * *": "minute", "1.5 * * * *": "minute", "*/5,*/x * * * *": "minute",
		"0 24 * * *": "hour", "0 2pm * * *": "hour", "0 2:30 * * *": "hour", "TZ=UTC 5 99 * * *": "hour", "0 1–5 * * *": "hour", "0 8-24 * * *": "hour",
		"0 0 0 * *": "day of the month", "0 0 32 * *": "day of the month", "0 0 L * *": "day of the month", "0 0 1-32 * *": "day of the month", "0 0 mon * *": "day of the month",
		"0 0 * 0 *": "month, the fourth", "0 0 * 13 *": "month, the fourth", "0 0 * january *": "month, the fourth", "0 0 * mon *": "month, the fourth",
		"0 0 * * 7": "with Sunday as 0", "0 0 * * 5L": "with Sunday as 0", "0 0 * * 1#2": "with Sunday as 0", "0 0 * * jan": "with Sunday as 0", "0 0 * * fri,7": "with Sunday as 0",
		"0 22-5 * * *": "begins with its lower value", "30-10/5 * * * *": "begins with its lower value", "0 0 * nov-feb *": "begins with its lower value", "0 0 * * fri-mon": "begins with its lower value", "0 0 * * sat-0": "begins with its lower value", "0 0 * * 5-MON": "begins with its lower value",
		"0 1-2,9-8 * * *": "begins with its lower value", "0 10-9 * * *": "begins with its lower value", "0 +5-+4 * * *": "begins with its lower value", "TZ=UTC 5-4 * * * *": "begins with its lower value",
		"0 0 30 2 *": "no such day", "0 0 30,31 feb ?": "no such day", "0 0 30-31 FEB *": "no such day", "0 0 31 4 *": "no such day", "0 0 31 nov *": "no such day",
		"TZ=Berlin 0 3 * * *": "not the name of a time zone", "CRON_TZ=Europe/Nowhere @daily": "not the name of a time zone", "TZ=../../etc/passwd 0 0 * * *": "not the name of a time zone",
		"TZ=+02:00 0 3 * * *": "not the name of a time zone",
	} {
		parsed, admitted := parseCron(text), d.refusesCron(t, text)
		switch {
		case (parsed == nil) != (wrong == ""):
			t.Errorf("%q: the parser says %v", text, parsed)
		case (admitted == nil) != (wrong == ""):
			t.Errorf("%q: the API server says %v", text, admitted)
		case wrong != "" && !strings.Contains(admitted.Error(), wrong):
			t.Errorf("%q: %v, which does not say %q", text, admitted, wrong)
		case wrong != "" && strings.Count(admitted.Error(), "Invalid value") > 1:
			t.Errorf("%q: %v, which is more than one thing", text, admitted)
		}
	}
	for zone, good := range map[string]bool{"": true, "UTC": true, "Europe/Berlin": true, "Asia/Kolkata": true, "Berlin": false, "+02:00": false, "../UTC": false, "CET/x": false} {
		_, err := time.LoadLocation(zone)
		refused := d.refuses(t, d.with(t, []string{"schedule", "timeZone"}, fmt.Sprintf("%q", zone)))
		if (err == nil) != good || (refused == nil) != good {
			t.Errorf("time zone %q: the controller says %v, the API server %v", zone, err, refused)
		}
		if refused != nil && !strings.Contains(refused.Error(), "such as Europe/Berlin") {
			t.Errorf("time zone %q: %v", zone, refused)
		}
	}
}

// Crons composed of pieces: the API server and the parser agree.
func TestCronRulesAreTheParser(t *testing.T) {
	d := definitions(t)["BackupPolicy"]
	rng := rand.New(rand.NewPCG(1, 2))
	of := func(list ...string) string { return list[rng.IntN(len(list))] }
	value := func(field int) string {
		names := [][]string{{"7"}, {"7"}, {"7"}, {"Jan", "DEC", "jun"}, {"sun", "Wed", "SAT"}}[field]
		switch rng.IntN(10) {
		case 0:
			return of("60", "-", "x", "mon", "feb", "100", "0")
		case 1:
			return of(names...)
		case 2:
			return of("0", "+", "00", "+0") + fmt.Sprint(rng.IntN(7))
		}
		return fmt.Sprint(rng.IntN([]int{60, 24, 32, 13, 7}[field]))
	}
	item := func(field int) string {
		var b strings.Builder
		switch rng.IntN(6) {
		case 0, 1:
			b.WriteString(of("*", "*", "?", "*-", "*-9"))
		case 2:
			b.WriteString(value(field) + "-" + value(field))
		default:
			b.WriteString(value(field))
		}
		if rng.IntN(4) == 0 {
			b.WriteString("/" + of("1", "2", "5", "05", "+3", "70", "0", "x", ""))
		}
		return b.String()
	}
	taken, refused := 0, 0
	for range 4000 {
		text := of("", "", "", "", " ", "\t", "TZ=UTC ", "CRON_TZ=Asia/Tokyo ", "TZ=UTC")
		for field := range 5 {
			text += item(field)
			for rng.IntN(4) == 0 {
				text += of(",", ",", ",", ",,", "") + item(field)
			}
			text += of(" ", " ", " ", " ", "  ", "\t", ", ", "\u00a0")
		}
		parsed, admitted := parseCron(text), d.refusesCron(t, text)
		switch {
		case parsed == nil && admitted == nil:
			taken++
		case parsed == nil:
			t.Fatalf("%q: the parser takes it, the API server says %v", text, admitted)
		case admitted == nil && parsed.Error() != "it never comes":
			t.Fatalf("%q is admitted, the parser says %v", text, parsed)
		default:
			refused++
		}
	}
	if taken < 500 || refused < 500 {
		t.Errorf("%d were taken and %d refused", taken, refused)
	}
}

package main

import (
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func someCurve() curve {
	c := curve{id: "size", title: "Time over size", over: "size", steps: []string{"1 GiB", "1 TiB", "10 TiB"}, note: "Some <note>."}
	c.add("open & read", secondsText, []float64{0.5, 0.5, 1})
	c.add("increment", secondsText, []float64{math.NaN(), 2, 20})
	return c
}

func TestCurveText(t *testing.T) {
	want := "" +
		"  size  open & read\n" +
		" 1 GiB  " + strings.Repeat("#", 20) + strings.Repeat(" ", 20) + " 500 ms\n" +
		" 1 TiB  " + strings.Repeat("#", 20) + strings.Repeat(" ", 20) + " 500 ms\n" +
		"10 TiB  " + strings.Repeat("#", 40) + " 1.00 s\n" +
		"\n" +
		"  size  increment\n" +
		" 1 TiB  " + strings.Repeat("#", 4) + strings.Repeat(" ", 36) + " 2.00 s\n" +
		"10 TiB  " + strings.Repeat("#", 40) + " 20.00 s\n"
	c := someCurve()
	if got := c.text(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestCurvePictureIsXML(t *testing.T) {
	c := someCurve()
	one := curve{title: "one", steps: []string{"1"}}
	one.add("level", secondsText, []float64{1})
	for _, picture := range []string{c.svg(), one.svg()} {
		if strings.Contains(picture, "NaN") || strings.Contains(picture, "Inf") {
			t.Errorf("a value that is none is drawn:\n%s", picture)
		}
		for d := xml.NewDecoder(strings.NewReader(picture)); ; {
			_, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%v:\n%s", err, picture)
			}
		}
	}
}

// The table and the curves are measured apart, and each keeps the other.
func TestReportKeepsBoth(t *testing.T) {
	report := filepath.Join(t.TempDir(), "benchmarks.md")
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(writeTable(report, "# Benchmarks\n\nfirst\n"))
	check(writeCurves(report, "Measured so.\n", []curve{someCurve()}))
	check(writeTable(report, "# Benchmarks\n\nsecond\n"))
	other := someCurve()
	other.id, other.title, other.note = "chain", "Time over the chain", "Another."
	check(writeCurves(report, "Measured more.\n", []curve{other}))
	check(writeCurves(report, "", []curve{other})) // with the method that is there
	again := someCurve()
	again.note = "Once more."
	check(writeCurves(report, "Measured again.\n", []curve{again}))
	check(writeCurves(report, "", []curve{other}))
	text, err := os.ReadFile(report)
	check(err)
	for want, n := range map[string]int{"first": 0, "second": 1, "Measured so.": 0, "Measured again.": 1, curvesHead: 1, "curves/size.svg": 1,
		"Measured more.": 0, "Some <note>.": 0, "Once more.": 1, "Another.": 1, "\n### ": 2} {
		if got := strings.Count(string(text), want); got != n {
			t.Errorf("%q is there %d times, not %d:\n%s", want, got, n, text)
		}
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(report), "curves", "size.svg")); err != nil {
		t.Error(err)
	}
}

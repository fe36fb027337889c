package main

import (
	"cmp"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"
)

// curve is what some work costs as one thing grows: values of one unit for each step.
type curve struct {
	id    string // of its picture
	title string
	over  string   // what grows
	steps []string // its values, in order
	lines []line
	note  string // how it was measured
}

// line is one kind of work; NaN where it was not measured.
type line struct {
	name   string
	values []float64
	format func(float64) string
}

func (c *curve) add(name string, format func(float64) string, values []float64) {
	c.lines = append(c.lines, line{name, values, format})
}

// text draws bars, those of each line in proportion to its largest value.
func (c *curve) text() string {
	const width = 40
	var s strings.Builder
	column := utf8.RuneCountInString(c.over)
	for _, step := range c.steps {
		column = max(column, utf8.RuneCountInString(step))
	}
	for i, l := range c.lines {
		if i > 0 {
			s.WriteByte('\n')
		}
		fmt.Fprintf(&s, "%*s  %s\n", column, c.over, l.name)
		_, most := bounds(l.values)
		for k, v := range l.values {
			if math.IsNaN(v) {
				continue
			}
			bar := strings.Repeat("#", max(1, int(math.Round(v/most*width))))
			fmt.Fprintf(&s, "%*s  %-*s %s\n", column, c.steps[k], width, bar, l.format(v))
		}
	}
	return s.String()
}

// bounds returns the least and the largest value.
func bounds(values ...[]float64) (lo, hi float64) {
	lo, hi = math.Inf(1), math.Inf(-1)
	for _, line := range values {
		for _, v := range line {
			if !math.IsNaN(v) {
				lo, hi = min(lo, v), max(hi, v)
			}
		}
	}
	return lo, hi
}

// The picture's measures. Steps are evenly spaced, and values on a logarithmic scale: what does not
// depend on what grows is level, what is proportional to it rises from corner to corner.
const (
	pictureWidth, pictureHeight = 760, 360
	plotLeft, plotRight         = 70, 500
	plotTop, plotBottom         = 50, 310
)

var lineColours = []string{"#2a6fb0", "#c0562b", "#3d8a57", "#7d4fa3", "#8a7420"}

// svg draws the curve.
func (c *curve) svg() string {
	var s strings.Builder
	values := make([][]float64, len(c.lines))
	for i := range c.lines {
		values[i] = c.lines[i].values
	}
	lo, hi := bounds(values...)
	low, high := math.Floor(math.Log10(lo)), math.Ceil(math.Log10(hi))
	if high == low {
		high++
	}
	x := func(k int) float64 {
		return plotLeft + 15 + float64(k)*(plotRight-plotLeft-30)/float64(max(1, len(c.steps)-1))
	}
	y := func(v float64) float64 {
		return plotBottom - (math.Log10(v)-low)/(high-low)*(plotBottom-plotTop)
	}
	fmt.Fprintf(&s, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="Helvetica, Arial, sans-serif" font-size="12" role="img" aria-labelledby="t">`+"\n", pictureWidth, pictureHeight)
	fmt.Fprintf(&s, `  <title id="t">%s</title>`+"\n", escape(c.title))
	fmt.Fprintf(&s, `  <rect width="%d" height="%d" fill="#fff"/>`+"\n", pictureWidth, pictureHeight)
	fmt.Fprintf(&s, `  <text x="%d" y="28" font-size="16" font-weight="bold" fill="#234">%s</text>`+"\n", plotLeft, escape(c.title))
	for e := low; e <= high; e++ {
		at := y(math.Pow(10, e))
		fmt.Fprintf(&s, `  <path d="M%d %.1fH%d" stroke="#dde3ea"/><text x="%d" y="%.1f" text-anchor="end" fill="#456">%s</text>`+"\n",
			plotLeft, at, plotRight, plotLeft-8, at+4, escape(c.lines[0].format(math.Pow(10, e))))
	}
	every := (len(c.steps) + 9) / 10
	for k, step := range c.steps {
		if k%every == 0 {
			fmt.Fprintf(&s, `  <text x="%.1f" y="%d" text-anchor="middle" fill="#456">%s</text>`+"\n", x(k), plotBottom+20, escape(step))
		}
	}
	fmt.Fprintf(&s, `  <text x="%d" y="%d" text-anchor="middle" fill="#234">%s</text>`+"\n", (plotLeft+plotRight)/2, plotBottom+40, escape(c.over))
	for i, l := range c.lines {
		colour := lineColours[i%len(lineColours)]
		var path, dots strings.Builder
		for k, v := range l.values {
			if math.IsNaN(v) {
				continue
			}
			verb := "L"
			if path.Len() == 0 {
				verb = "M"
			}
			fmt.Fprintf(&path, "%s%.1f %.1f", verb, x(k), y(v))
			if every == 1 {
				fmt.Fprintf(&dots, `<circle cx="%.1f" cy="%.1f" r="3.5"><title>%s: %s</title></circle>`, x(k), y(v), escape(c.steps[k]), escape(l.format(v)))
			}
		}
		fmt.Fprintf(&s, `  <g stroke="%s" fill="none" stroke-width="2"><path d="%s"/></g><g fill="%s">%s</g>`+"\n", colour, path.String(), colour, dots.String())
		row := plotTop + 10 + 52*i
		fmt.Fprintf(&s, `  <path d="M%d %dh20" stroke="%s" stroke-width="3"/><text x="%d" y="%d" fill="#234">%s</text>`, plotRight+20, row, colour, plotRight+46, row+4, escape(l.name))
		first, last := edge(l.values)
		fmt.Fprintf(&s, `<text x="%d" y="%d" fill="#678">%s to %s</text>`+"\n", plotRight+46, row+20, escape(l.format(first)), escape(l.format(last)))
	}
	s.WriteString("</svg>\n")
	return s.String()
}

// edge returns the first and the last value that was measured.
func edge(values []float64) (first, last float64) {
	known := slices.DeleteFunc(slices.Clone(values), math.IsNaN)
	if len(known) == 0 {
		return math.NaN(), math.NaN()
	}
	return known[0], known[len(known)-1]
}

func escape(s string) string {
	return strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;").Replace(s)
}

// curvesHead begins the part of the report that the curves are.
const curvesHead = "## Cost curves\n"

// writeCurves draws the curves, and puts them into the report in place of those with their titles. An empty method keeps
// the one that is there.
func writeCurves(report, method string, curves []curve) error {
	table, old, err := splitReport(report)
	if err != nil {
		return err
	}
	parts := strings.Split(old, "\n### ")
	before, parts := strings.TrimPrefix(parts[0], curvesHead+"\n"), parts[1:]
	method = cmp.Or(method, before)
	for _, c := range curves {
		if err := c.draw(report); err != nil {
			return err
		}
		part := fmt.Sprintf("%s\n\n%s\n\n![%s](curves/%s.svg)\n\n```text\n%s```\n", c.title, c.note, c.title, c.id, c.text())
		at := slices.IndexFunc(parts, func(p string) bool { return strings.HasPrefix(p, c.title+"\n") })
		if at < 0 {
			parts = append(parts, part)
		} else {
			parts[at] = part
		}
	}
	text := curvesHead + "\n" + method
	for _, part := range parts {
		text += "\n### " + part
	}
	return os.WriteFile(report, []byte(table+text), 0o644)
}

// draw writes the picture, in the folder "curves" beside the report.
func (c *curve) draw(report string) error {
	pictures := filepath.Join(filepath.Dir(report), "curves")
	if err := os.MkdirAll(pictures, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(pictures, c.id+".svg"), []byte(c.svg()), 0o644)
}

// writeTable writes the table in place of the one before, and keeps the curves.
func writeTable(report, table string) error {
	_, curves, err := splitReport(report)
	if err != nil {
		return err
	}
	if curves != "" {
		table += "\n" + curves
	}
	return os.WriteFile(report, []byte(table), 0o644)
}

// splitReport returns the table of a report, and its curves; a report that is not there has neither.
func splitReport(report string) (table, curves string, err error) {
	text, err := os.ReadFile(report)
	if os.IsNotExist(err) {
		return "", "", nil
	}
	before, after, found := strings.Cut(string(text), curvesHead)
	if found {
		after = curvesHead + after
	}
	return before, after, err
}

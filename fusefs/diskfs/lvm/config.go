package lvm

import (
	"fmt"
	"strconv"
	"strings"
)

// Metadata is text (lvm2's libdaemon configuration format): sections "name { … }",
// settings "name = value", values strings, numbers or arrays "[a, b]", and
// comments from "#" to the end of the line.

// maxDepth is how deep sections may nest; real metadata needs four.
const maxDepth = 16

// section is a parsed section. Its values are string, int64, []any or section.
type section map[string]any

func (s section) section(name string) section {
	sub, _ := s[name].(section)
	return sub
}

func (s section) text(name string) string {
	v, _ := s[name].(string)
	return v
}

// number gives a number that is not negative; -1 stands for none.
func (s section) number(name string) int64 {
	if v, ok := s[name].(int64); ok && v >= 0 {
		return v
	}
	return -1
}

func (s section) list(name string) []any {
	v, _ := s[name].([]any)
	return v
}

// parser reads a text once, from front to back.
type parser struct {
	text string
	at   int
}

// parseConfig reads a whole text.
func parseConfig(text string) (section, error) {
	p := &parser{text: strings.TrimRight(text, "\x00")}
	return p.section(0)
}

func (p *parser) fail(format string, args ...any) error {
	return fmt.Errorf("metadata line %d: %s", 1+strings.Count(p.text[:min(p.at, len(p.text))], "\n"), fmt.Sprintf(format, args...))
}

// skip moves over white space and comments and gives the next byte; 0 at the end.
func (p *parser) skip() byte {
	for p.at < len(p.text) {
		switch c := p.text[p.at]; c {
		case ' ', '\t', '\n', '\r':
			p.at++
		case '#':
			if end := strings.IndexByte(p.text[p.at:], '\n'); end >= 0 {
				p.at += end
			} else {
				p.at = len(p.text)
			}
		default:
			return c
		}
	}
	return 0
}

// section reads settings up to a closing brace, or to the end at depth 0.
func (p *parser) section(depth int) (section, error) {
	if depth > maxDepth {
		return nil, p.fail("sections nest too deep")
	}
	s := section{}
	for {
		switch c := p.skip(); {
		case c == 0 && depth == 0:
			return s, nil
		case c == 0:
			return nil, p.fail("a section has no end")
		case c == '}' && depth > 0:
			p.at++
			return s, nil
		}
		name := p.word()
		if name == "" {
			return nil, p.fail("unexpected %q", p.text[p.at])
		}
		if _, ok := s[name]; ok {
			return nil, p.fail("%q stands twice", name)
		}
		var err error
		switch p.skip() {
		case '{':
			p.at++
			s[name], err = p.section(depth + 1)
		case '=':
			p.at++
			s[name], err = p.value(true)
		default:
			err = p.fail("no value for %q", name)
		}
		if err != nil {
			return nil, err
		}
	}
}

// word reads a name.
func (p *parser) word() string {
	start := p.at
	for p.at < len(p.text) && isWord(p.text[p.at]) {
		p.at++
	}
	return p.text[start:p.at]
}

func isWord(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' ||
		c == '_' || c == '-' || c == '+' || c == '.' || c == '/'
}

func (p *parser) value(arrays bool) (any, error) {
	switch c := p.skip(); {
	case c == '"':
		return p.quoted()
	case c == '[' && arrays:
		p.at++
		list := []any{}
		for {
			switch p.skip() {
			case ']':
				p.at++
				return list, nil
			case ',':
				p.at++
			default:
				v, err := p.value(false)
				if err != nil {
					return nil, err
				}
				list = append(list, v)
			}
		}
	}
	word := p.word()
	if word == "" {
		return nil, p.fail("no value")
	}
	if n, err := strconv.ParseInt(word, 10, 64); err == nil {
		return n, nil
	}
	return word, nil
}

// quoted reads a string; a backslash takes the next byte as it is.
func (p *parser) quoted() (string, error) {
	var b strings.Builder
	for p.at++; p.at < len(p.text); p.at++ {
		switch c := p.text[p.at]; c {
		case '"':
			p.at++
			return b.String(), nil
		case '\\':
			if p.at++; p.at < len(p.text) {
				b.WriteByte(p.text[p.at])
			}
		default:
			b.WriteByte(c)
		}
	}
	return "", p.fail("a string has no end")
}

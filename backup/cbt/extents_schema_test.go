package cbt_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/varve-io/varve/backup/cbt"
)

// The schema and the parser agree on each line, as far as a schema can tell: it does not see
// a repeated field, nor whether a whole number was written as 1.0.
func TestExtentsSchema(t *testing.T) {
	schema, err := jsonschema.NewCompiler().Compile("../../docs/cbt-extents.schema.json")
	if err != nil {
		t.Fatal(err)
	}

	const header, extent, end = 0, 1, 2

	good := [3]string{strings.TrimSpace(goodHeader), strings.TrimSpace(goodExtent), strings.TrimSpace(goodEnd)}

	for place, lines := range map[int][]string{
		header: {
			good[header],
			`{"base":"b","target":"t","size":1000}`,
			`{"base":"b","target":"t","size":1000,"trailer":true,"volume":"v"}`,
			`{"base":"b","target":"t","size":1000,"made-by":{"x":[1]}}`,
			`{"base":"","target":"t","size":1000}`,
			`{"base":7,"target":"t","size":1000}`,
			`{"base":"b","target":"","size":1000}`,
			`{"base":"b","target":null,"size":1000}`,
			`{"target":"t","size":1000}`,
			`{"base":"b","size":1000}`,
			`{"base":"b","target":"t"}`,
			`{"base":"b","target":"t","size":-1}`,
			`{"base":"b","target":"t","size":9223372036854775808}`,
			`{"base":"b","target":"t","size":"1000"}`,
			`{"base":"b","target":"t","size":1000,"trailer":"no"}`,
			`{"base":"b","target":"t","size":1000,"volume":1}`,
			`{"base":"b","target":"t","size":1000,"offset":0}`,
			`{"format":"varve-extents/2","base":"b","target":"t","size":1000}`,
			`[]`,
			`"header"`,
		},
		extent: {
			good[extent],
			`{"length":10,"offset":0}`,
			`{"offset":0,"length":10,"zero":true}`,
			`{"offset":0,"length":10,"zero":false}`,
			`{"offset":0,"length":0}`,
			`{"offset":0,"length":-1}`,
			`{"offset":-1,"length":1}`,
			`{"offset":0}`,
			`{"length":1}`,
			`{}`,
			`{"offset":0,"length":9223372036854775808}`,
			`{"offset":"0","length":1}`,
			`{"offset":0,"length":1.5}`,
			`{"offset":0,"length":1,"zero":1}`,
			`{"offset":0,"length":1,"zero":null}`,
			`{"Offset":0,"length":1}`,
			`{"offset":0,"length":1,"more":1}`,
			`{"offset":0,"length":1,"end":true}`,
			`[0,10]`,
			`null`,
		},
		end: {
			good[end],
			`{"count":1,"end":true}`,
			`{"end":false,"count":1}`,
			`{"end":true}`,
			`{"count":1}`,
			`{"end":true,"count":-1}`,
			`{"end":true,"count":"1"}`,
			`{"end":true,"count":1,"more":1}`,
		},
	} {
		for _, line := range lines {
			value, err := jsonschema.UnmarshalJSON(strings.NewReader(line))
			if err != nil {
				t.Fatalf("%s: %v", line, err)
			}

			text := good
			text[place] = line
			_, _, parsed := list(t, strings.Join(text[:], "\n"))

			if valid := schema.Validate(value); (valid == nil) != (parsed == nil) {
				t.Errorf("%s: the schema says %v, the parser %v", line, valid, parsed)
			}
		}
	}

	var written bytes.Buffer

	w, err := cbt.NewExtentsWriter(&written, cbt.ExtentsHeader{Base: "b", Target: "t", Size: 1000, Volume: "v"})
	if err != nil {
		t.Fatal(err)
	}

	for _, e := range []cbt.Extent{{Length: 10}, {Offset: 20, Length: 5, Zero: true}} {
		if err := w.Add(e); err != nil {
			t.Fatal(err)
		}
	}

	if err := w.Close(); err != nil {
		t.Fatal(err)
	}

	for line := range strings.Lines(written.String()) {
		if value, err := jsonschema.UnmarshalJSON(strings.NewReader(line)); err != nil || schema.Validate(value) != nil {
			t.Errorf("the writer's line %s%v, %v", line, err, schema.Validate(value))
		}
	}
}

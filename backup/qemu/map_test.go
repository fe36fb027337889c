package qemu

import (
	"reflect"
	"testing"
)

// TestParseMap takes runs that lie in the file as they are, and rejects an answer to another question.
func TestParseMap(t *testing.T) {
	t.Parallel()
	got, err := parseMap([]byte(`[
{ "start": 100, "length": 50, "depth": 0, "present": true, "zero": false, "data": true, "compressed": false, "offset": 327680},
{ "start": 150, "length": 10, "depth": 0, "present": true, "zero": true, "data": false, "offset": 5},
{ "start": 160, "length": 10, "depth": 0, "present": true, "zero": true, "data": true, "offset": 5},
{ "start": 170, "length": 10, "depth": 1, "present": true, "zero": false, "data": true, "offset": 5},
{ "start": 180, "length": 10, "depth": 0, "present": true, "zero": false, "data": true, "compressed": true, "offset": 5},
{ "start": 190, "length": 5, "depth": 0, "present": true, "zero": false, "data": true},
{ "start": 196, "length": 4, "depth": 0, "present": true, "zero": false, "data": true, "offset": 512}]`), 100, 100)
	if want := []Run{{100, 50, 327680}, {196, 4, 512}}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	for name, text := range map[string]string{
		"before":   `[{"start":99,"length":2}]`,
		"behind":   `[{"start":150,"length":51}]`,
		"overflow": `[{"start":9223372036854775807,"length":9223372036854775807}]`,
		"negative": `[{"start":100,"length":-1}]`,
		"order":    `[{"start":120,"length":10},{"start":110,"length":10}]`,
		"overlap":  `[{"start":120,"length":10},{"start":129,"length":10}]`,
		"not JSON": `Offset Length`,
	} {
		if runs, err := parseMap([]byte(text), 100, 100); err == nil {
			t.Errorf("%s: %v", name, runs)
		}
	}
}

package main

import (
	"fmt"
	"io"
	"time"
)

type report struct{ b *bench }

func newReport(b *bench, args []string, at time.Time) *report { return &report{b} }

func (r *report) write(w io.Writer) error {
	for _, c := range r.b.cases {
		fmt.Fprintln(w, c.scenario.name, c.size)
		for _, p := range r.b.peers {
			fmt.Fprintln(w, "  ", p.name, c.found[p.name])
		}
	}
	return nil
}
func (r *report) writeFiles(dir string) error { return nil }

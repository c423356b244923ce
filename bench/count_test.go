package main

import (
	"strings"
	"testing"
)

func TestRequestsAreCountedHoweverTheyAreCut(t *testing.T) {
	for _, c := range []struct {
		sent string
		want int64
	}{
		{"", 0},
		{"*1\r\n$4\r\nPING\r\n", 1},
		{"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n", 1},
		{"*2\r\n$3\r\nGET\r\n$0\r\n\r\n*1\r\n$4\r\nPING\r\n", 2},
		{"*2\r\n$4\r\nEVAL\r\n$14\r\n*1\r\n$4\r\nPING\r\n\r\n*1\r\n$4\r\nPING\r\n", 2},
		{"PING\r\n*1\r\n$4\r\nPING\r\nPING\r\n", 3},
		{strings.Repeat("*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$12\r\n012345678901\r\n", 100), 100},
	} {
		for _, piece := range []int{1, 2, 3, 7, 1 << 20} {
			var s stream
			got := int64(0)
			for sent := []byte(c.sent); len(sent) > 0; {
				n := min(piece, len(sent))
				got += s.read(sent[:n])
				sent = sent[n:]
			}
			if got != c.want {
				t.Errorf("%.40q in pieces of %d: %d requests, not %d", c.sent, piece, got, c.want)
			}
		}
	}
}

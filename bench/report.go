package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// column is a figure that a table shows.
type column struct {
	figure string
	head   string
	unit   float64 // what a figure of 1 is divided by to be shown
	better order
}

// order tells which of two figures is better.
type order int

const (
	less order = -1
	more order = +1
)

func (o order) better(a, b float64) bool {
	return o == less && a < b || o == more && a > b
}

var (
	micro   = float64(time.Microsecond)
	milli   = float64(time.Millisecond)
	kilo    = 1000.0
	perCent = 0.01

	toAnother   = column{"share", "to another, %", perCent, more}
	longestWait = column{"longest", "longest wait, ms", milli, less}
	fairness    = column{"fairness", "most/fewest turns", 1, less}
	perHandOver = column{"per hand-over", "requests per hand-over", 1, less}
	halfOfThem  = column{"p50", "p50, µs", micro, less}
)

// chapter is what the report says about a scenario.
type chapter struct {
	title   string
	sizes   string // what there are several of; "" if that is always the same
	text    string
	columns []column
}

var chapters = map[string]chapter{
	"uncontended": {
		title: "Nobody else wants it",
		text: `One goroutine locks and unlocks one key, with context.Background(). Client and server share
one core, as it depends on chance else whether both are on the same; so the time is what both
work, one after the other. CPU is that of the client's process and of the server's. The peers
take turns every 0.3 s.`,
		columns: []column{
			{"time", "time per pair, µs", micro, less},
			{"allocations", "allocations", 1, less},
			{"bytes", "bytes", 1, less},
			{"requests", "requests", 1, less},
			{"client CPU", "client CPU, µs", micro, less},
			{"server CPU", "server CPU, µs", micro, less},
		},
	},
	"many keys": {
		title:   "Many keys",
		sizes:   "goroutines: pairs per second",
		text:    `Goroutines of one process share a client, and each locks and unlocks a key of its own.`,
		columns: []column{{"turns", "pairs per second", 1, more}},
	},
	"one process": {
		title: "One process",
		sizes: "goroutines",
		text: `Goroutines of one process share a client and want one lock, again and again. "To another" is
the share of cycles in which another goroutine got the lock than had it before. The longest
wait is that of any goroutine for one turn, and counts also if it had not ended. ∞ stands where
a goroutine had no turn at all.`,
		columns: []column{
			{"turns", "cycles per second", 1, more},
			toAnother,
			longestWait,
			fairness,
		},
	},
	"processes": {
		title: "Processes",
		sizes: "processes",
		text: `Processes want one lock, again and again, and hold it for nothing. A hand-over takes from when
a process, which got the lock from another, first calls Unlock until Lock has returned in
another; what it takes for itself again in between, past those who wait, is part of that, and
its share is "to another" less than all. Nobody waits for longer than was measured.`,
		columns: []column{
			halfOfThem,
			{"p99", "p99, µs", micro, less},
			{"hand-overs", "hand-overs per second", 1, more},
			toAnother,
			perHandOver,
			longestWait,
			fairness,
		},
	},
	"idle": {
		title: "Waiting while nothing happens",
		sizes: "waiters",
		text: `A lock is held all the time, and goroutines of one process, sharing a client, wait for it.
Memory is that per waiter, connections and their buffers included: heap and stacks of the
client's process after a garbage collection, and all that the server has allocated.`,
		columns: []column{
			{"rate", "requests per second", 1, less},
			{"connections", "connections", 1, less},
			{"client memory", "client, kB", kilo, less},
			{"server memory", "server, kB", kilo, less},
		},
	},
	"flat": {
		title: "Requests per hand-over",
		sizes: "waiting",
		text: `One holds the lock and so many wait for it, all in one process, but each with a client of its
own. All requests are counted, also those in vain, for each time that the lock goes to another
than had it before.`,
		columns: []column{perHandOver},
	},
}

// head is what stands over a table or column for a size.
func (ch chapter) head(size int) string {
	return strings.TrimSpace(thousands(int64(size)) + " " + ch.sizes)
}

// over returns a figure of a peer over all rounds; NaN if there were too few hand-overs
// to say.
func (m *measured) over(p peer, c column) spread {
	if p.uncounted && slices.Contains([]string{"requests", "per hand-over"}, c.figure) {
		return spreadOf(nil)
	}
	var values []float64
	handOvers := 0.0
	for _, f := range m.found[p.name] {
		if value, ok := f[c.figure]; ok && !math.IsNaN(value) {
			values = append(values, value/c.unit)
		}
		handOvers += f["hand-overs counted"]
	}
	if slices.Contains([]string{"p50", "p99", "per hand-over"}, c.figure) && handOvers < fewHandOvers {
		return spreadOf(nil)
	}
	return spreadOf(values)
}

// fewHandOvers is how many there have to be for a figure about them to mean anything.
const fewHandOvers = 5

// table is what is to be shown: a row for each peer, and in each column one figure of one
// case.
type table struct {
	peers []peer
	heads []string
	cells [][]spread // by column, then peer
	order []order    // by column
}

func (t *table) add(head string, m *measured, c column) {
	cells := make([]spread, len(t.peers))
	for i, p := range t.peers {
		cells[i] = m.over(p, c)
	}
	t.heads = append(t.heads, head)
	t.cells = append(t.cells, cells)
	t.order = append(t.order, c.better)
}

// best returns the best median of a column among the peers that are allowed.
func (t *table) best(column int, allowed func(peer) bool) float64 {
	best := math.NaN()
	for i, p := range t.peers {
		median := t.cells[column][i].median
		if allowed(p) && !math.IsNaN(median) && (math.IsNaN(best) || t.order[column].better(median, best)) {
			best = median
		}
	}
	return best
}

func anyPeer(peer) bool       { return true }
func otherPeer(p peer) bool   { return p.name != "dmutex" && p.name != "floor" }
func floorItself(p peer) bool { return p.name == "floor" }

// emphasized is a median, bold if it is the best of its column.
func (t *table) emphasized(column, row int) string {
	text := number(t.cells[column][row].median)
	if text == number(t.best(column, anyPeer)) && text != number(math.NaN()) {
		return "**" + text + "**"
	}
	return text
}

// write writes the medians with the range of the rounds.
func (t *table) write(w io.Writer) {
	t.rows(w, func(column, row int) string {
		cell, text := t.cells[column][row], t.emphasized(column, row)
		if least, greatest := number(cell.least), number(cell.greatest); least != greatest {
			text += fmt.Sprintf(" (%s–%s)", least, greatest)
		}
		return text
	})
}

// writeRatios writes the medians as multiples of others.
func (t *table) writeRatios(w io.Writer) {
	t.rows(w, func(column, row int) string {
		median := t.cells[column][row].median
		return fmt.Sprintf("%s / %s",
			number(median/t.best(column, floorItself)),
			number(median/t.best(column, otherPeer)))
	})
}

func (t *table) rows(w io.Writer, cell func(column, row int) string) {
	fmt.Fprintf(w, "| | %s |\n|---|%s\n", strings.Join(t.heads, " | "), strings.Repeat("--:|", len(t.heads)))
	for row, p := range t.peers {
		fmt.Fprintf(w, "| %s |", p.name)
		for column := range t.heads {
			fmt.Fprintf(w, " %s |", cell(column, row))
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintln(w)
}

// writeTransposed writes the medians alone, a column for each peer.
func (t *table) writeTransposed(w io.Writer) {
	names := make([]string, len(t.peers))
	for i, p := range t.peers {
		names[i] = p.name
	}
	fmt.Fprintf(w, "| | %s |\n|---|%s\n", strings.Join(names, " | "), strings.Repeat("--:|", len(names)))
	for column, head := range t.heads {
		fmt.Fprintf(w, "| %s |", head)
		for row := range t.peers {
			fmt.Fprintf(w, " %s |", t.emphasized(column, row))
		}
		fmt.Fprintln(w)
	}
}

// number shows a figure with three digits that count.
func number(v float64) string {
	switch {
	case math.IsNaN(v):
		return "–"
	case math.IsInf(v, 0):
		return "∞"
	case v == 0:
		return "0"
	}
	digits := max(0, 2-int(math.Floor(math.Log10(math.Abs(v)))))
	text := strconv.FormatFloat(v, 'f', min(digits, 4), 64)
	if digits > 0 {
		return strings.TrimRight(strings.TrimRight(text, "0"), ".")
	}
	unit := math.Pow10(int(math.Floor(math.Log10(math.Abs(v)))) - 2)
	return thousands(int64(math.Round(v/unit) * unit))
}

// thousands shows a number with its digits in groups.
func thousands(n int64) string {
	text := strconv.FormatInt(n, 10)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// writeReport writes all tables.
func (b *bench) writeReport(w io.Writer) {
	last := ""
	for i := 0; i < len(b.cases); i++ {
		m := &b.cases[i]
		ch := chapters[m.scenario.name]
		if m.scenario.name != last {
			fmt.Fprintf(w, "## %s\n\n%s\n\n", ch.title, ch.text)
		}
		last = m.scenario.name
		t, shown := table{peers: b.in(m.scenario)}, b.cases[i:i+1]
		if len(ch.columns) == 1 { // then the columns are the sizes
			for ; i+1 < len(b.cases) && b.cases[i+1].scenario.name == last; i++ {
				shown = shown[:len(shown)+1]
			}
			for j := range shown {
				t.add(ch.head(shown[j].size), &shown[j], ch.columns[0])
			}
		} else {
			if ch.sizes != "" {
				fmt.Fprintf(w, "### %s\n\n", ch.head(m.size))
			}
			for _, c := range ch.columns {
				t.add(c.head, m, c)
			}
		}
		t.write(w)
		b.writeNotes(w, shown)
		fmt.Fprint(w, "The medians as multiples of the floor's / of the best other library's:\n\n")
		t.writeRatios(w)
	}
}

// writeNotes tells what went wrong while it was measured, and what was left out.
func (b *bench) writeNotes(w io.Writer, shown []measured) {
	for i := range shown {
		m := &shown[i]
		for _, p := range b.peers {
			sum := figures{}
			for _, f := range m.found[p.name] {
				for name, value := range f {
					sum[name] += value
				}
			}
			where := ""
			if len(shown) > 1 {
				where = fmt.Sprintf(" with %s waiting", thousands(int64(m.size)))
			}
			if n := sum["gave up"]; n > 0 {
				fmt.Fprintf(w, "Waits that %s gave up%s, and that were begun again: %s.\n\n", p.name, where, thousands(int64(n)))
			}
			if n := sum["lost"]; n > 0 {
				fmt.Fprintf(w, "Unlocks of %s that failed%s: %s.\n\n", p.name, where, thousands(int64(n)))
			}
			if n, ok := sum["hand-overs counted"]; ok && n < fewHandOvers && m.scenario.name != "many keys" {
				fmt.Fprintf(w, "Hand-overs of %s in all rounds%s: %.0f, too few to say what one costs.\n\n", p.name, where, n)
			}
		}
	}
}

// headlines are the figures of the summary.
var headlines = []struct {
	scenario string
	size     int
	column   column
	head     string
}{
	{"uncontended", 1, column{"time", "", micro, less}, "lock and unlock, nobody waits, µs"},
	{"uncontended", 1, column{"allocations", "", 1, less}, "… allocations"},
	{"many keys", 64, column{"turns", "", 1, more}, "64 goroutines, a key each: pairs per second"},
	{"one process", 16, column{"turns", "", 1, more}, "16 goroutines, one key: cycles per second"},
	{"one process", 16, longestWait, "… longest wait, ms"},
	{"one process", 16, fairness, "… most/fewest turns"},
	{"processes", 2, halfOfThem, "2 processes: p50 of a hand-over, µs"},
	{"processes", 2, perHandOver, "… requests per hand-over"},
	{"processes", 128, halfOfThem, "128 processes: p50 of a hand-over, µs"},
	{"processes", 128, perHandOver, "… requests per hand-over"},
	{"processes", 128, longestWait, "… longest wait, ms"},
	{"idle", 1000, column{"rate", "", 1, less}, "1,000 wait, nothing happens: requests per second"},
	{"idle", 1000, column{"connections", "", 1, less}, "… connections"},
}

// writeSummary writes the headlines of what was measured.
func (b *bench) writeSummary(w io.Writer) {
	t := table{peers: b.peers}
	for _, h := range headlines {
		for i := range b.cases {
			if m := &b.cases[i]; m.scenario.name == h.scenario && m.size == h.size {
				t.add(h.head, m, h.column)
			}
		}
	}
	t.writeTransposed(w)
}

// writeHeader tells what was measured where, when and how.
func (b *bench) writeHeader(w io.Writer, args []string, at time.Time) {
	var kernel unix.Utsname
	_ = unix.Uname(&kernel)
	fmt.Fprint(w, "# dmutex beside other mutexes on Redis\n\n")
	fmt.Fprintf(w, "Made on %s by\n\n    go -C bench run .%s\n\n", at.Format("2 January 2006"), shownArgs(args))
	fmt.Fprintf(w, "on %s shared cores, Linux %s, %s, Redis %s.\n\n",
		inWords(runtime.NumCPU()), unix.ByteSliceToString(kernel.Release[:]), runtime.Version(), b.version)
	fmt.Fprintf(w, `In each of %d rounds, each peer was measured once in each case, in another order. A cell is
the median of the rounds, and in brackets their least and greatest; the best of a column is
bold. That no two held a lock at once was checked all the while. Requests are counted at the
clients, one for each command that is sent.

`, b.rounds)
	for _, p := range b.peers {
		fmt.Fprintf(w, "- **%s**: %s (%s)\n", p.name, p.about, version(p.module))
	}
	fmt.Fprintf(w, "\ndmutex, redsync and the floor use go-redis %s, redislock %s, rueidislock its own client.\n\n",
		version("github.com/go-redis/redis/v8"), version("github.com/redis/go-redis/v9"))
}

// shownArgs are the arguments, without what only this machine has.
func shownArgs(args []string) string {
	var text strings.Builder
	for _, arg := range args {
		if filepath.IsAbs(arg) {
			arg = "DIR"
		}
		if strings.Contains(arg, " ") {
			arg = strconv.Quote(arg)
		}
		text.WriteString(" " + arg)
	}
	return text.String()
}

// inWords is a small number in words.
func inWords(n int) string {
	words := []string{"no", "one", "two", "three", "four", "five", "six", "seven", "eight"}
	if n < len(words) {
		return words[n]
	}
	return strconv.Itoa(n)
}

// version is that of a module that this program was built with.
func version(module string) string {
	built, ok := debug.ReadBuildInfo()
	if !ok {
		return "version unknown"
	}
	for _, m := range built.Deps {
		if m.Path == module && m.Replace == nil {
			return m.Version
		}
	}
	return "of this repository"
}

// writeFiles writes the report, its summary, and the plots.
func (b *bench) writeFiles(dir string, args []string, at time.Time) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var results, summary bytes.Buffer
	b.writeHeader(&results, args, at)
	b.writeReport(&results)
	for _, d := range drawings {
		if b.has(d.scenario) {
			fmt.Fprintf(&results, "![%s](%s)\n\n", d.title, d.file)
		}
	}
	b.writeSummary(&summary)
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "results.md"), results.Bytes(), 0o644),
		os.WriteFile(filepath.Join(dir, "summary.md"), summary.Bytes(), 0o644),
		b.plot(dir),
	)
}

// writeInto puts the summary in a page, between two lines that mark its place.
func (b *bench) writeInto(path string) error {
	const from, to = "<!-- summary -->\n", "<!-- end of summary -->\n"
	page, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, begun := bytes.Cut(page, []byte(from))
	_, after, ended := bytes.Cut(rest, []byte(to))
	if !begun || !ended {
		return fmt.Errorf("%s has no place for the summary", path)
	}
	var summary bytes.Buffer
	b.writeSummary(&summary)
	return os.WriteFile(path, slices.Concat(before, []byte(from+"\n"), summary.Bytes(), []byte("\n"+to), after), 0o644)
}

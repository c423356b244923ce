package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// history shows what happens while it happens, and judges it at the end.
type history struct {
	out    io.Writer
	noLock bool
	begun  time.Time

	lanes   [workers]string // what each worker does, as shown
	inside  []int           // who holds the lock
	lastEnd event           // of a hold

	written   []string // jobs whose entry must be in the ledger
	holds     int
	overlaps  int
	handOvers []time.Duration

	stuck    event         // when the victim began to hang
	death    event         // when it was killed
	takeOver time.Duration // from its death to the next hold
	early    time.Duration // by how much that came before its ttl was over
	told     map[string]int
	faults   []string
}

func newHistory(out io.Writer, noLock bool) *history {
	h := &history{out: out, noLock: noLock, begun: time.Now(), told: map[string]int{}}
	for i := range h.lanes {
		h.lanes[i] = " "
	}
	guard := fmt.Sprintf("one lock with a ttl of %v", ttl)
	if noLock {
		guard = "no lock"
	}
	_, _ = fmt.Fprintf(out, "%d processes write one ledger, with %s\n", workers, guard)
	_, _ = fmt.Fprint(out, "   time  ")
	for i := range h.lanes {
		_, _ = fmt.Fprint(out, i+1, " ")
	}
	_, _ = fmt.Fprintln(out, "  · waits  █ holds  ✗ dead")
	return h
}

func (h *history) add(e event) {
	switch e.What {
	case waiting:
		h.lanes[e.Who-1] = "·" // shown with the next line
	case holding:
		h.enter(e)
	case hanging:
		h.stuck = e
	case leaving:
		h.written = append(h.written, jobName(e.Who, e.Job))
		h.leave(e, " ")
	case killed:
		h.death = e
		h.leave(e, "✗")
		h.show(e, fmt.Sprintf("%d is killed in the middle of its job", e.Who))
	case released, expired:
		h.told[e.What]++
		if e.What == expired && h.death.Who == 0 {
			h.faults = append(h.faults, "the bystander was told of an expiry before there was one")
		}
		h.show(e, "bystander: the holder I saw has "+map[string]string{
			released: "released", expired: "run out of time",
		}[e.What])
	case failed:
		h.faults = append(h.faults, fmt.Sprintf("process %d: %s", e.Who, e.Text))
	}
}

func (h *history) enter(e event) {
	h.holds++
	h.lanes[e.Who-1] = "█"
	text := fmt.Sprintf("%d holds", e.Who)
	switch {
	case len(h.inside) > 0:
		h.overlaps++
		text += ", together with " + strings.Trim(fmt.Sprint(h.inside), "[]")
	case h.noLock || h.lastEnd.Who == 0:
	case h.lastEnd.What == killed:
		h.takeOver = e.At.Sub(h.lastEnd.At)
		h.early = h.stuck.At.Add(ttl).Sub(e.At)
		text += fmt.Sprintf(", %v after the death of %d", h.takeOver.Round(time.Millisecond), h.lastEnd.Who)
	default:
		wait := e.At.Sub(h.lastEnd.At)
		h.handOvers = append(h.handOvers, wait)
		text += fmt.Sprintf(", %v after %d let go", wait.Round(10*time.Microsecond), h.lastEnd.Who)
	}
	h.inside = append(h.inside, e.Who)
	h.show(e, text)
}

func (h *history) leave(e event, lane string) {
	h.lastEnd = e
	h.lanes[e.Who-1] = lane
	h.inside = slices.DeleteFunc(h.inside, func(who int) bool { return who == e.Who })
}

func (h *history) show(e event, text string) {
	_, _ = fmt.Fprintf(h.out, "%6.2fs  %s   %s\n",
		e.At.Sub(h.begun).Seconds(), strings.Join(h.lanes[:], " "), text)
}

// verdict says what became of the ledger and of the promises of the lock; an error
// if any was broken.
func (h *history) verdict(ledger string) error {
	found, disorder := map[string]bool{}, 0
	for i, line := range strings.Split(strings.TrimSuffix(ledger, "\n"), "\n") {
		var (
			number int
			job    string
		)
		if _, err := fmt.Sscanf(line, "%d %s", &number, &job); err != nil || number != i+1 || found[job] {
			disorder++
		}
		found[job] = true
	}
	lost := 0
	for _, job := range h.written {
		if !found[job] {
			lost++
		}
	}
	say := func(name, format string, args ...any) {
		_, _ = fmt.Fprintf(h.out, "%-10s "+format+"\n", append([]any{name}, args...)...)
	}
	_, _ = fmt.Fprintln(h.out)
	say("ledger", "%d entries written, %d lost, %d out of order", len(h.written), lost, disorder)
	say("exclusion", "%d holds, %d overlaps", h.holds, h.overlaps)

	broken := h.faults
	expect := func(kept bool, otherwise string) {
		if !kept {
			broken = append(broken, otherwise)
		}
	}
	expect(len(h.written) > 0, "nothing was written")
	expect(lost == 0, "entries were lost")
	expect(disorder == 0, "the ledger is out of order")
	expect(h.overlaps == 0, "holds overlapped")
	if !h.noLock {
		if slices.Sort(h.handOvers); len(h.handOvers) > 0 {
			say("hand-over", "%d times, median %v, longest %v", len(h.handOvers),
				h.handOvers[len(h.handOvers)/2].Round(10*time.Microsecond),
				h.handOvers[len(h.handOvers)-1].Round(10*time.Microsecond))
		}
		if h.takeOver > 0 {
			say("the dead", "%d was killed while it held; the next got the lock %v later, when the ttl was over",
				h.death.Who, h.takeOver.Round(time.Millisecond))
		}
		say("bystander", "saw holds end: %d by release, %d by expiry", h.told[released], h.told[expired])
		expect(len(h.handOvers) > 0, "nothing was handed over")
		expect(h.takeOver > 0, "the dead holder's lock was not taken over")
		expect(h.early < 20*time.Millisecond, "the dead holder's lock was taken before its ttl was over")
		expect(h.told[expired] == 1, "the bystander was not told just once of an expiry")
	}
	if len(broken) > 0 {
		say("verdict", "BAD: %s", strings.Join(broken, "; "))
		return errors.New("bad verdict")
	}
	say("verdict", "good")
	return nil
}

package main

import (
	"image/color"
	"math"
	"path/filepath"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	_ "gonum.org/v1/plot/vg/vgsvg" // for .svg
)

// The colours are Okabe and Ito's, which the colour-blind can tell apart; the dashes and
// the marks are for those who print.
var styles = map[string]struct {
	colour color.RGBA
	dashes []vg.Length
	mark   draw.GlyphDrawer
}{
	"dmutex":       {color.RGBA{0x00, 0x72, 0xB2, 0xFF}, nil, draw.CircleGlyph{}},
	"redsync":      {color.RGBA{0xD5, 0x5E, 0x00, 0xFF}, nil, draw.SquareGlyph{}},
	"redsync 1 ms": {color.RGBA{0xE6, 0x9F, 0x00, 0xFF}, nil, draw.TriangleGlyph{}},
	"redislock":    {color.RGBA{0x00, 0x9E, 0x73, 0xFF}, nil, draw.PyramidGlyph{}},
	"rueidislock":  {color.RGBA{0xCC, 0x79, 0xA7, 0xFF}, nil, draw.BoxGlyph{}},
	"floor":        {color.RGBA{0x55, 0x55, 0x55, 0xFF}, []vg.Length{4, 3}, draw.CrossGlyph{}},
}

// plot draws what can be drawn of what was measured.
func (b *bench) plot(dir string) error {
	for _, d := range []struct {
		file, title, x, y string
		scenario          string
		column            column
	}{
		{
			"handover.svg", "Hand-over to another process, median", "processes that want the lock",
			"from Unlock to Lock, µs", "processes", halfOfThem,
		},
		{
			"waits.svg", "Longest wait for the lock", "processes that want the lock",
			"longest wait for one turn, ms", "processes", longestWait,
		},
		{
			"requests.svg", "Requests for each hand-over", "waiters, each with a client of its own",
			"requests per hand-over", "flat", perHandOver,
		},
	} {
		lines, sizes := b.lines(d.scenario, d.column)
		if len(lines) == 0 {
			continue
		}
		p := chart(d.title, d.x, d.y, sizes)
		if err := b.draw(p, lines); err != nil {
			return err
		}
		if err := p.Save(17*vg.Centimeter, 11*vg.Centimeter, filepath.Join(dir, d.file)); err != nil {
			return err
		}
	}
	return nil
}

// lines returns the medians of a figure by peer, and the sizes of the scenario's cases.
func (b *bench) lines(scenario string, c column) (lines map[string]plotter.XYs, sizes []int) {
	lines = map[string]plotter.XYs{}
	for i := range b.cases {
		m := &b.cases[i]
		if m.scenario.name != scenario {
			continue
		}
		sizes = append(sizes, m.size)
		for _, p := range b.peers {
			if y := m.over(p, c).median; y > 0 && !math.IsInf(y, 0) {
				lines[p.name] = append(lines[p.name], plotter.XY{X: float64(m.size), Y: y})
			}
		}
	}
	return lines, sizes
}

// chart is an empty plot with logarithmic axes.
func chart(title, x, y string, sizes []int) *plot.Plot {
	const face = "Sans"
	p := plot.New()
	p.BackgroundColor = color.White // it is to be read on a dark page, too
	for _, s := range []struct {
		style *text.Style
		size  vg.Length
	}{
		{&p.Title.TextStyle, 14},
		{&p.X.Label.TextStyle, 12},
		{&p.Y.Label.TextStyle, 12},
		{&p.X.Tick.Label, 11},
		{&p.Y.Tick.Label, 11},
		{&p.Legend.TextStyle, 11},
	} {
		s.style.Font = font.From(font.Font{Typeface: "Liberation", Variant: face}, s.size)
	}
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, x, y
	p.Title.Padding, p.X.Label.Padding, p.Y.Label.Padding = 8, 4, 4
	p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
	p.X.Tick.Marker = plot.TickerFunc(func(float64, float64) (ticks []plot.Tick) {
		for _, size := range sizes {
			ticks = append(ticks, plot.Tick{Value: float64(size), Label: thousands(int64(size))})
		}
		return ticks
	})
	p.Y.Tick.Marker = plot.TickerFunc(decades)
	return p
}

// decades marks the powers of ten with numbers, and what is between them without.
func decades(least, greatest float64) (ticks []plot.Tick) {
	for unit := math.Pow10(int(math.Floor(math.Log10(least)))); unit <= greatest; unit *= 10 {
		for n := 1.0; n < 10; n++ {
			tick := plot.Tick{Value: n * unit}
			if n == 1 {
				tick.Label = number(unit)
			}
			if tick.Value >= least && tick.Value <= greatest {
				ticks = append(ticks, tick)
			}
		}
	}
	return ticks
}

// draw adds the lines, and the names of the peers at their right ends.
func (b *bench) draw(p *plot.Plot, lines map[string]plotter.XYs) error {
	grid := plotter.NewGrid()
	grid.Horizontal.Color, grid.Vertical.Color = color.Gray{0xE4}, color.Gray{0xE4}
	p.Add(grid)
	for _, peer := range b.peers {
		points := lines[peer.name]
		if len(points) == 0 {
			continue
		}
		line, marks, err := plotter.NewLinePoints(points)
		if err != nil {
			return err
		}
		style := styles[peer.name]
		line.Color, line.Width, line.Dashes = style.colour, 1.5, style.dashes
		if peer.name == "dmutex" {
			line.Width = 3
		}
		marks.Color, marks.Radius, marks.Shape = style.colour, 3.5, style.mark
		p.Add(line, marks)
		p.Legend.Add(peer.name, line, marks)
	}
	// Whole decades, so that each line can be read off a number.
	p.Y.Min = math.Pow10(int(math.Floor(math.Log10(p.Y.Min))))
	p.Y.Max = math.Pow10(int(math.Ceil(math.Log10(p.Y.Max))))
	return nil
}

package main

import (
	"bytes"
	"cmp"
	"image/color"
	"math"
	"os"
	"path/filepath"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// The colours are Okabe and Ito's, which the colour-blind can tell apart; the marks are
// for those who print.
var styles = map[string]draw.GlyphStyle{
	"dmutex":       {Color: color.RGBA{0x00, 0x72, 0xB2, 0xFF}, Shape: draw.CircleGlyph{}},
	"redsync":      {Color: color.RGBA{0xD5, 0x5E, 0x00, 0xFF}, Shape: draw.SquareGlyph{}},
	"redsync 1 ms": {Color: color.RGBA{0xB8, 0x7E, 0x00, 0xFF}, Shape: draw.TriangleGlyph{}},
	"redislock":    {Color: color.RGBA{0x00, 0x9E, 0x73, 0xFF}, Shape: draw.PyramidGlyph{}},
	"rueidislock":  {Color: color.RGBA{0xCC, 0x79, 0xA7, 0xFF}, Shape: draw.BoxGlyph{}},
	"etcd":         {Color: color.RGBA{0x56, 0xA4, 0xD9, 0xFF}, Shape: draw.RingGlyph{}},
	"floor":        {Color: color.RGBA{0x55, 0x55, 0x55, 0xFF}, Shape: draw.CrossGlyph{}},
}

// drawings are the plots, each of one figure over the sizes of a scenario.
var drawings = []struct {
	file, title, x, y string
	scenario          string
	column            column
}{
	{
		"handover.svg", "Hand-over to another process, median",
		"processes that want the lock", "from Unlock to Lock in another, µs", "processes", halfOfThem,
	},
	{
		"waits.svg", "Longest wait for one turn",
		"processes that want the lock", "longest wait, ms", "processes", longestWait,
	},
	{
		"requests.svg", "Requests for each hand-over",
		"waiters, each with a client of its own", "requests per hand-over", "flat", perHandOver,
	},
}

// has tells whether a scenario was measured.
func (b *bench) has(scenario string) bool {
	return slices.ContainsFunc(b.cases, func(m measured) bool { return m.scenario.name == scenario })
}

// plot draws what can be drawn of what was measured.
func (b *bench) plot(dir string) error {
	for _, d := range drawings {
		c := curves{}
		for _, p := range b.peers {
			c = append(c, curve{peer: p.name})
		}
		var sizes []int
		for i := range b.cases {
			m := &b.cases[i]
			if m.scenario.name != d.scenario {
				continue
			}
			sizes = append(sizes, m.size)
			for j, p := range b.peers {
				if y := m.over(p, d.column).median; y > 0 && !math.IsInf(y, 0) {
					c[j].points = append(c[j].points, plotter.XY{X: math.Log10(float64(m.size)), Y: math.Log10(y)})
				}
			}
		}
		if c = slices.DeleteFunc(c, func(c curve) bool { return len(c.points) == 0 }); len(c) == 0 {
			continue
		}
		p := chart(d.title, d.x, d.y, sizes)
		p.Add(c)
		p.Y.Min, p.Y.Max = math.Floor(p.Y.Min), math.Ceil(p.Y.Max)
		if err := save(p, filepath.Join(dir, d.file)); err != nil {
			return err
		}
	}
	return nil
}

// chart is an empty plot of logarithms, with axes that tell of what.
func chart(title, x, y string, sizes []int) *plot.Plot {
	p := plot.New()
	for style, size := range map[*text.Style]vg.Length{
		&p.Title.TextStyle: 14, &p.X.Label.TextStyle: 12, &p.Y.Label.TextStyle: 12,
		&p.X.Tick.Label: 11, &p.Y.Tick.Label: 11,
	} {
		style.Font = typeface(size)
	}
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, x, y
	p.Title.Padding, p.X.Label.Padding, p.Y.Label.Padding = 10, 4, 4
	p.X.Tick.Marker = plot.TickerFunc(func(float64, float64) (ticks []plot.Tick) {
		for _, size := range sizes {
			ticks = append(ticks, plot.Tick{Value: math.Log10(float64(size)), Label: thousands(int64(size))})
		}
		return ticks
	})
	p.Y.Tick.Marker = plot.TickerFunc(decades)
	grid := plotter.NewGrid()
	grid.Horizontal.Color, grid.Vertical.Color = color.Gray{0xDD}, color.Gray{0xEE}
	p.Add(grid)
	return p
}

func typeface(size vg.Length) font.Font {
	return font.From(font.Font{Typeface: "Liberation", Variant: "Sans"}, size)
}

// decades marks the powers of ten with numbers, and what is between them without.
func decades(least, greatest float64) (ticks []plot.Tick) {
	for decade := math.Floor(least); decade <= greatest; decade++ {
		ticks = append(ticks, plot.Tick{Value: decade, Label: number(math.Pow10(int(decade)))})
		for n := 2.0; n < 10 && decade < greatest; n++ {
			ticks = append(ticks, plot.Tick{Value: decade + math.Log10(n)})
		}
	}
	return ticks
}

// save draws a plot with room for the names at the right, on white, as it is to be read
// on a dark page too.
func save(p *plot.Plot, path string) error {
	const width, height = 17 * vg.Centimeter, 11 * vg.Centimeter
	canvas := vgsvg.New(width, height)
	whole := draw.New(canvas)
	whole.FillPolygon(color.White, []vg.Point{{}, {X: width}, {X: width, Y: height}, {Y: height}})
	p.BackgroundColor = color.Transparent
	p.Draw(draw.Crop(whole, 10, -100, 8, -10))
	var svg bytes.Buffer
	if _, err := canvas.WriteTo(&svg); err != nil {
		return err
	}
	// Few have the face that the text was measured with, but many have one of the same width.
	drawn := bytes.ReplaceAll(svg.Bytes(), []byte("Liberation Sans"), []byte("Liberation Sans,Arial,Helvetica,sans-serif"))
	return os.WriteFile(path, drawn, 0o644)
}

// curve is what is drawn of one peer, in logarithms.
type curve struct {
	peer   string
	points plotter.XYs
}

// curves draws itself, with the name of each at the right, close to where it ends.
type curves []curve

func (cs curves) DataRange() (xmin, xmax, ymin, ymax float64) {
	var all plotter.XYs
	for _, c := range cs {
		all = append(all, c.points...)
	}
	return plotter.XYRange(all)
}

func (cs curves) Plot(canvas draw.Canvas, p *plot.Plot) {
	const rowHeight = 15
	x, y := p.Transforms(&canvas)
	end := func(c curve) vg.Length { return y(c.points[len(c.points)-1].Y) }
	byEnd := slices.SortedStableFunc(slices.Values(cs), func(a, b curve) int { return cmp.Compare(end(a), end(b)) })
	name := text.Style{Font: typeface(11), XAlign: text.XLeft, YAlign: text.YCenter, Handler: p.TextHandler}
	lowest := canvas.Min.Y
	for i, c := range byEnd {
		style := styles[c.peer]
		style.Radius = 3.5
		line := draw.LineStyle{Color: style.Color, Width: 1.5}
		if c.peer == "dmutex" {
			line.Width = 3
		}
		points := make([]vg.Point, len(c.points))
		for i, at := range c.points {
			points[i] = vg.Point{X: x(at.X), Y: y(at.Y)}
		}
		canvas.StrokeLines(line, points)
		for _, at := range points {
			canvas.DrawGlyph(style, at)
		}
		// Not on the one below, and with room for those above.
		highest := canvas.Max.Y - rowHeight*vg.Length(len(byEnd)-1-i)
		beside := vg.Point{X: canvas.Max.X + 16, Y: min(max(end(c), lowest), highest)}
		lowest = beside.Y + rowHeight
		style.Shape.DrawGlyph(&canvas, style, beside) // DrawGlyph of canvas leaves out what is not on it
		name.Color = style.Color
		canvas.FillText(name, beside.Add(vg.Point{X: 8}), c.peer)
	}
}

package evict

import (
	"sync"
	"testing"

	"vacate/internal/evict/pageset"
)

// TestArrivalsAtOnce: the tasks that ask how far the pages are meet restock, which counts anew and
// gives done another channel. The race detector sees a field that is read without the lock.
func TestArrivalsAtOnce(t *testing.T) {
	const pages, rounds = 512, 200
	l := layout{{Name: "ram", Pages: pages, PageSize: 4096}}
	var p arrivals
	p.begin(l)

	var readers sync.WaitGroup
	end := make(chan struct{})
	for range 2 {
		readers.Go(func() {
			for {
				select {
				case <-end:
					return
				default:
				}
				done := p.done()
				placed, total, _ := p.progress()
				if placed < 0 || placed > total || total != pages {
					t.Errorf("%d of %d pages placed, of %d", placed, total, pages)
					return
				}
				select {
				case <-done: // of this round, or of one before
				default:
				}
				p.left()
				p.lack()
				p.awaited()
				p.summary()
			}
		})
	}
	for i := range rounds {
		there := i * pages / (rounds - 1)
		err := p.restock(func() ([]*pageset.Set, error) {
			set := pageset.New(pages)
			set.AddRun(0, there)
			return []*pageset.Set{set}, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-p.done():
			t.Fatalf("done is closed by restock, with %d pages left", p.left())
		default:
		}
		p.recount()
		if p.left() != pages-there {
			t.Fatalf("%d pages left, want %d", p.left(), pages-there)
		}
	}
	select {
	case <-p.done():
	default:
		t.Error("done is open though no page is left")
	}
	close(end)
	readers.Wait()
}

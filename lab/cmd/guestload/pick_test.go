package main

import "testing"

func TestPickerReachesEveryPageOnce(t *testing.T) {
	for _, n := range []int{1, 2, 3, 7, 8, 1000, 4096, 5000} {
		p := newPicker(uint64(n)*77, n, true)
		seen := make([]bool, n)
		for rank := range n {
			page := p.page(uint64(rank))
			if page < 0 || page >= n || seen[page] {
				t.Fatalf("%d pages: rank %d is page %d, seen before or out of range", n, rank, page)
			}
			seen[page] = true
		}
	}
}

func TestPickerShares(t *testing.T) {
	const n, picks = 4096, 1 << 20
	for _, zipf := range []bool{false, true} {
		p := newPicker(1, n, zipf)
		var count [n]int
		for range picks {
			count[p.next()]++
		}
		// A share of all picks that falls on a share of all pages.
		var half, eighth int
		for rank := range n {
			c := count[p.page(uint64(rank))]
			if rank < n/8 {
				eighth += c
			}
			if rank < n/2 {
				half += c
			}
		}
		wantEighth, wantHalf := picks/8, picks/2
		if zipf { // of 12 and a bit shares of equal weight, 9 and 11
			wantEighth, wantHalf = picks*9/12, picks*11/12
		}
		if d := eighth - wantEighth; d > picks/50 || d < -picks/50 {
			t.Errorf("zipf %v: %d of %d picks on the first eighth of ranks, want about %d", zipf,
				eighth, picks, wantEighth)
		}
		if d := half - wantHalf; d > picks/50 || d < -picks/50 {
			t.Errorf("zipf %v: %d of %d picks on the first half of ranks, want about %d", zipf,
				half, picks, wantHalf)
		}
		// The hot pages are scattered: any half of the addresses has near half of the picks.
		if zipf {
			ranked := 0
			for rank := range n / 8 {
				if p.page(uint64(rank)) < n/2 {
					ranked++
				}
			}
			if ranked < n/16*8/10 || ranked > n/16*12/10 {
				t.Errorf("of the %d hottest pages %d are in the lower half", n/8, ranked)
			}
		}
	}
}

package main

import (
	"net/netip"
	"reflect"
	"testing"
)

func TestParseParams(t *testing.T) {
	p, err :=
		parseParams("console=ttyS0 vacate.hot=200M vacate.idle=4K ro vacate.other=1G " +
			"vacate.cache=4096 vacate.file=0 vacate.workers=3 vacate.others=4 " +
			"vacate.access=zipf vacate.place=mixed vacate.free=stale vacate.mode=idle " +
			"vacate.pace=slow vacate.seed=18446744073709551615 vacate.run=/a vacate.port=b " +
			"vacate.run=/c vacate.addr=10.77.1.9/16 vacate.serve=999,/usr/bin/s,-a,,b=c\n")
	want := params{hot: 51200, idle: 1, other: 262144, cache: 1, file: 0, workers: 3, others: 4,
		zipf: true, scatter: true, stale: true, work: false, slow: true, seed: 1<<64 - 1,
		run: []string{"/a", "/c"}, ports: []string{"b"},
		addr:  netip.MustParsePrefix("10.77.1.9/16"),
		serve: &server{999, []string{"/usr/bin/s", "-a", "", "b=c"}}}
	if err != nil || !reflect.DeepEqual(p, want) {
		t.Errorf("got %+v, %v; want %+v", p, err, want)
	}
	for _, bad := range []string{"hot", "hot=M", "hot=-1", "hot=1T", "hot=99999999999G",
		"workers=0", "others=0", "access=no", "place=", "free=1", "mode=fast", "pace=idle",
		"speed=1", "seed=x", "addr=10.77.1.9", "addr=::1/64", "addr=10.77.1.9/33", "serve=",
		"serve=999", "serve=x,/a", "serve=999,a", "serve=-1,/a"} {
		if _, err := parseParams("vacate." + bad); err == nil {
			t.Errorf("vacate.%s was accepted", bad)
		}
	}
}

func FuzzParseParams(f *testing.F) {
	f.Add("console=ttyS0 vacate.hot=200M vacate.mode=work")
	f.Add("vacate.idle=4294967295G vacate.workers=9")
	f.Fuzz(func(t *testing.T, cmdline string) {
		p, err := parseParams(cmdline)
		if err != nil {
			return
		}
		for _, n := range []int{p.hot, p.idle, p.other, p.cache, p.file} {
			if n < 0 || n*4096 < 0 {
				t.Errorf("%q: %+v", cmdline, p)
			}
		}
	})
}

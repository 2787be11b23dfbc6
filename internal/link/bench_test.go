package link

import (
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkThroughput sends frames as a push does, over the loopback. CPU-s/GB is what this process
// used for both ends, the kernel's share included.
func BenchmarkThroughput(b *testing.B) {
	for _, c := range []struct {
		name string
		pair func(testing.TB) (*Session, *Session)
	}{{"plain", pair}, {"TLS", securePair}} {
		for _, size := range []struct {
			name  string
			pages int
		}{{"4KiB", 1}, {"64KiB", 16}, {"512KiB", 128}} {
			b.Run(c.name+"/"+size.name, func(b *testing.B) {
				out, in := c.pair(b)
				page := make([]byte, 4096)
				for i := range page {
					page[i] = byte(i * 7)
				}
				parts := [][]byte{make([]byte, 20)}
				for range size.pages {
					parts = append(parts, page)
				}
				n := 20 + size.pages*len(page)
				b.SetBytes(int64(n))
				done := make(chan error, 1)
				before := cpu(b)
				b.ResetTimer()
				go func() {
					var err error
					buf := make([]byte, n)
					for range b.N {
						if _, _, err = in.Lane(Push).Read(buf, n); err != nil {
							break
						}
					}
					done <- err
				}()
				for range b.N {
					if err := out.Lane(Push).Write(64, parts...); err != nil {
						b.Fatal(err)
					}
				}
				if err := <-done; err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				b.ReportMetric((cpu(b)-before)/(float64(b.N)*float64(n)/1e9), "CPU-s/GB")
			})
		}
	}
}

// BenchmarkSession makes sessions of three lanes.
func BenchmarkSession(b *testing.B) {
	ca := newAuthority(b)
	hostA, hostB := ca.identity("hosta"), ca.identity("hostb")
	for name, o := range map[string]struct {
		listen ListenOptions
		dial   Dialer
	}{"plain": {}, "TLS": {ListenOptions{TLS: hostB.Server()},
		Dialer{TLS: hostA.Client("hostb")}}} {
		b.Run(name, func(b *testing.B) {
			l, addr := server(b, o.listen)
			o.dial.Addr = addr
			for b.Loop() {
				s, err := o.dial.Session(b.Context())
				if err != nil {
					b.Fatal(err)
				}
				other, err := l.Accept(b.Context())
				if err != nil {
					b.Fatal(err)
				}
				s.Close()
				other.Close()
			}
		})
	}
}

// cpu is the seconds of CPU that this process used.
func cpu(b *testing.B) float64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}

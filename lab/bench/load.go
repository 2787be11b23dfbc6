package bench

import (
	"fmt"
	"strings"

	"vacate/lab"
)

// loads are what a guest may do, by name, each in a VM that fits it.
var loads = []struct {
	name string
	spec lab.Spec
}{
	// Half of what it holds it works on.
	{"hot", lab.Spec{MemoryMiB: 1024, Load: lab.Load{HotMiB: 200, IdleMiB: 200}}},
	{"idle", lab.Spec{MemoryMiB: 1024, Load: lab.Load{HotMiB: 200, IdleMiB: 200, Sleep: true}}},
	// One process works among many that do not, their memory mixed.
	{"hot-process", lab.Spec{MemoryMiB: 2048, Devices: lab.Full,
		Load: lab.Load{HotMiB: 200, OtherMiB: 600, Others: 4, CacheMiB: 200, Mixed: true}}},
	// Some pages are much hotter than others.
	{"zipf", lab.Spec{MemoryMiB: 1536, Load: lab.Load{HotMiB: 1024, Zipf: true}}},
	// All memory is alike: no order can win.
	{"uniform", lab.Spec{MemoryMiB: 1024, Load: lab.Load{HotMiB: 700}}},
	// Most memory is free, and was never used.
	{"fresh-boot", lab.Spec{MemoryMiB: 2048, Load: lab.Load{HotMiB: 64}}},
	// Most memory is free, but was used.
	{"freed", lab.Spec{MemoryMiB: 2048, Load: lab.Load{HotMiB: 64, Stale: true}}},
}

// Loads are the names of all loads.
func Loads() []string {
	names := make([]string, len(loads))
	for i, l := range loads {
		names[i] = l.name
	}
	return names
}

// Spec returns the VM of a load; what it leaves open is the lab's default.
func Spec(load string) (lab.Spec, error) {
	for _, l := range loads {
		if l.name == load {
			l.spec.Load.Seed = 1
			return l.spec, nil
		}
	}
	return lab.Spec{}, fmt.Errorf("no load %q: there are %s", load, strings.Join(Loads(), ", "))
}

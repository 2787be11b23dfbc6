package evict

import (
	"errors"
	"testing"
)

// An operator elsewhere learns whose "here" it is.
func TestSaidBy(t *testing.T) {
	why := errors.New("start the QEMU here with memory of another kind")
	e := Destination{Host: "hostb"}.engine(Waiting)
	defer e.close()
	if got := e.named(why); got.Error() != "host hostb: "+why.Error() || !errors.Is(got, why) {
		t.Error(got)
	}
	alone := Destination{}.engine(Waiting)
	defer alone.close()
	if got := alone.named(why); got != why {
		t.Error(got)
	}
}

package evict_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"

	"vacate/internal/evict"
	"vacate/internal/link"
)

// The source's host evicts a VM to a host that listens at hostb:7601.
func ExampleSource_Evict() {
	s := evict.Source{
		QMP:     "/run/web1.qmp",
		Connect: link.Dialer{Addr: "hostb:7601"}.Session,
		Show:    func(p evict.Progress) { fmt.Println(p.State, p.Pages, "of", p.Total) },
	}
	report, err := s.Evict(context.Background())
	var failed *evict.Error
	switch {
	case errors.Is(err, evict.ErrLost):
		log.Fatal(err) // it says where the VM is, and what to do
	case errors.As(err, &failed):
		log.Fatal("the VM runs on here: ", err)
	}
	fmt.Println("sent", report.LinkBytes, "bytes")
}

// The destination's host takes the first VM that fits the QEMU which waits there.
func ExampleDestination_Receive() {
	ctx, fail := context.WithCancelCause(context.Background())
	defer fail(nil)
	listener, err := net.Listen("tcp", ":7601")
	if err != nil {
		log.Fatal(err)
	}
	turnedAway := func(peer string, err error) { log.Println("refused", peer, err) }
	sessions := link.NewListener(listener, link.ListenOptions{TurnedAway: turnedAway})
	defer sessions.Close()
	requests, stop := evict.Requests(ctx, sessions.Accept, turnedAway, fail)
	defer stop()

	// QEMU was started with -S -incoming defer.
	d := evict.Destination{QMP: "/run/twin.qmp", Patient: true}
	received, err := d.Receive(ctx, requests)
	if err != nil {
		log.Print(err)
		return
	}
	fmt.Println("the VM is whole here;", received.Duplicate, "pages came twice")
}

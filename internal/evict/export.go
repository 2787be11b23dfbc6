package evict

import (
	"context"
	"errors"

	"vacate/internal/qemu/export"
)

// Export writes the memory and devices of a frozen VM to a new file. QEMU can start the VM from it
// in its state at the freeze; see export.VM.WriteFile. No engine may be at work on the eviction.
func (s Source) Export(ctx context.Context, file string) error {
	e := s.engine(InDoubt)
	e.mark = MarkMayRun // or lost, which makes no difference
	err := e.export(ctx, file)
	e.done(err)
	return err
}

func (e *source) export(ctx context.Context, file string) error {
	if err := e.whole(); err != nil {
		return err
	}
	switch here, err := e.find(ctx); {
	case err != nil:
		return err
	case here == copyGone:
		return errQEMUGone
	case here == copyRunning:
		return errors.New("the VM is not frozen here: it runs")
	}
	head, err := e.recall()
	if err != nil {
		return err
	}
	load, err := e.kept(keptLoad)
	if err != nil {
		return err
	}
	vm := export.VM{Memory: e.mem, Head: head, Load: load}
	return vm.WriteFile(ctx, file, nil)
}

package guestmem

import (
	"fmt"
	"slices"
)

// ParseBlocks reads the answer to HMP "info ramblock": the blocks that QEMU migrates, in its order.
// Where they lie is not told.
func ParseBlocks(text string) ([]Block, error) {
	listed, err := parseRAMBlocks(text)
	if err != nil {
		return nil, err
	}
	var blocks []Block
	for _, b := range listed {
		if b.name != "" {
			blocks = append(blocks, Block{Name: b.name, Size: b.used, PageSize: b.pageSize})
		}
	}
	return blocks, nil
}

// Map tells a reopened Memory where the guest sees it, as the Mappings of the earlier one told.
func (m *Memory) Map(mappings []Mapping) error {
	if len(mappings) > maxRows {
		return fmt.Errorf("map guest memory: more than %d rows", maxRows)
	}
	rows := make([]mapped, len(mappings))
	end := uint64(0)
	for i, p := range mappings {
		if p.Block < 0 || p.Block >= len(m.blocks) || p.GPA < end || p.GPA >= 1<<52 ||
			p.Size == 0 || p.Size >= 1<<52 || p.Offset >= 1<<52 {
			return fmt.Errorf("map guest memory: bad row at %#x", p.GPA)
		}
		end = p.GPA + p.Size
		rows[i] = mapped{row{gpa: p.GPA, size: p.Size, offset: p.Offset}, p.Block}
	}
	m.rows = slices.Clip(rows)
	return nil
}

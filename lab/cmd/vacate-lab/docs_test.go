package main

import (
	"testing"

	"vacate/internal/cli/clitest"
)

func TestDocsCommands(t *testing.T) { clitest.Check(t, "vacate-lab", rootCommand) }

# vacate: `make help` lists what there is.
#
# Variables: RACE=1 (race detector), TESTFLAGS (more flags for go test), PKG (packages to
# test), FUZZTIME (per fuzz target), CHAOS and DOMAINS (rounds), WORKERS (at a time), GUEST (of chaos:
# linux, or kvm: the bare guest under KVM), ONLY (of domains: words in names of states and events,
# with ; between), REFUSALS, KVM, MOVES, CARRIES, STOPS and RUNS (rounds), RELEASES (of Debian:
# 12 13), PARTS (of a night), OUT (for results: .lab), VACATE_SEED (of tests with chance; a failure
# prints it), BENCHFLAGS (for vacate-lab bench), JOBS (packages tested at a time), LINTED=1 (test:
# lint has run), LIBVIRT=1, FLEET=1 (demo).

SHELL    := /bin/bash
GO       ?= go
PKG      ?= ./...
FUZZTIME ?= 10s
CHAOS    ?= 1
DOMAINS  ?= 1
WORKERS  ?= 5
GUEST    ?= linux
REFUSALS ?= 50
KVM      ?= 4
MOVES    ?= 50
CARRIES  ?= 20
RELEASES ?= 12 13
STOPS    ?= 1000
RUNS     ?= 23
JOBS     ?= 1
OUT      ?= .lab

export PATH := $(PATH):/usr/local/go/bin

# A checkout that git does not trust, or a copy without git, builds without a version stamp.
export GOFLAGS := -buildvcs=$(shell git rev-parse HEAD >/dev/null 2>&1 && echo auto || echo false) $(GOFLAGS)

# No tests: TestRecord rewrites what others compare with; TestBrowser* need a browser, and the others
# are campaigns, each with a target of its own.
NOTESTS = TestRecord|TestKVM|TestKVMSpeed|TestEvictDomainMoreKinds|TestDomainOtherCPU|TestDomainCampaign|TestBrowser.*|TestCarryCampaign|TestCarryResumed|TestCarryOverCut
# What follows names tests, and the packages that have them: others must not have one of that name.

# Cases with other QEMUs and kernels than Debian 12's, other servers, and much memory: `make variants`
# has these, and so has `make nightly`.
VARYING = vacate/internal/evict vacate/internal/guest/linux vacate/lab
VARIANTS = ^TestExport$$/^(newest|debian)|^TestAfterwards$$/^newest|^TestStanding$$/^(newest|debian)|^TestMatrix$$/^5_GB$$|^TestVariants$$/^5_GB$$|^TestBackports$$|^TestAbortsBackports$$|^TestSwitchesDebian12$$|^TestMigrateBackports$$|^TestKernels$$/^(5.10|6.12|sid|backports)$$|^TestServers$$/^(redis|postgresql)$$
# $(call skip,|MORE TESTS)
skip = -skip '^($(NOTESTS)$(if $(LINTED),|$(PROSE))$(1))$$|$(VARIANTS)'
TEST = $(GO) test $(call skip) $(if $(LINTED),-vet=off) $(TESTFLAGS)

# `make lint` has these, and go vet. With LINTED=1 `make test` leaves both to it.
PROSE = TestDocs(Links|Style|States|Tour|Picture)|TestCommentStyle|TestCodeColumns

# These compute much, and one thing at a time: the race detector would find little, slowly. Others
# are tested with it.
UNRACED = internal/guest/inspect internal/guest/linux internal/guest/pageclass internal/host/relief internal/fleet/place lab/churn lab/fleetsim lab/loadproto
race = $(if $(RACE),-race $(UNRACED:%=-gcflags=vacate/%=-race=false))
# Of them, these have no VMs, and are tested without it, beside the others.
LIGHT = vacate/internal/guest/inspect vacate/internal/guest/pageclass vacate/internal/host/relief vacate/internal/fleet/place vacate/lab/fleetsim vacate/lab/loadproto
# So do these tests: the checks of models, paths in simulated time, what takes turns of chance, and
# peers and VMs of gigabytes.
COMPUTERS = vacate/internal/evict vacate/internal/fleet/orders vacate/internal/ui
COMPUTING = TestModel|TestModelMutants|TestMemoryOfTheSource|TestYield|TestWindowFindsThePath|TestWindowOpens|TestPathIsShared|TestPathIsNotHeldUp|TestSkip|TestPlacer|TestHostileBrain|TestHostileHost
# This measures how busy the machine is: nothing else may run meanwhile.
QUIET = vacate/internal/sys/pressure
# So do these.
MEASURERS = vacate/internal/host
MEASURING = TestRelieveVMs|TestRelieveDomains|TestGuardVMs

# $(call alltests,PACKAGES,FLAGS,PACKAGES AT A TIME)
alltests = $(if $(strip $(1)),$(TEST) -count=1 -p $(or $(3),1) -timeout 60m $(2) $(1))

QEMU = qemu-system-x86_64

.PHONY: help build test unit demo deps fuzz lint alerts generate chaos domains refusals kvm kvmspeed kvmbench domainkinds domaincampaign carrycampaign carryresumed domainbench carrybench uitest nightly overwrite churn nomemory variants configurations bench growth package package-test clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## bin/: vacate, vacated, vacate-fleet, vacate-guest; and vacate-lab, guestload, which are not installed; all static
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/ ./cmd/... ./lab/cmd/vacate-lab ./lab/cmd/guestload

# The longest packages come first, and others run beside them: most tests wait most of the time.
# What only computes takes the time that they leave.
test: deps ## all tests but variants, those with real VMs included (root; minutes)
	$(eval PACKAGES := $(shell $(GO) list $(PKG)))
	$(eval LONGEST := $(filter vacate/internal/evict,$(PACKAGES)) $(filter vacate/internal/host,$(PACKAGES)))
	@mkdir -p .lab
	{ renice -n 19 $$BASHPID >/dev/null; $(or $(call alltests,$(filter $(COMPUTERS),$(PACKAGES)),-run '^($(COMPUTING))$$'),true) && \
		$(or $(call alltests,$(filter $(LIGHT),$(PACKAGES))),true); } >.lab/computing.log 2>&1 & computing=$$!; \
	$(or $(call alltests,$(LONGEST) $(filter-out $(LONGEST) $(QUIET) $(LIGHT),$(PACKAGES)),$(race) $(call skip,|$(MEASURING)|$(COMPUTING)),$(JOBS)),true); status=$$?; \
	wait $$computing || status=1; cat .lab/computing.log; exit $$status
	$(call alltests,$(filter $(QUIET),$(PACKAGES)),$(race))
	$(call alltests,$(filter $(MEASURERS),$(PACKAGES)),$(race) -run '^($(MEASURING))$$')

variants: deps ## the cases that `make test` leaves out: other QEMUs and guest kernels, more evictions, much memory (root; 20 minutes)
	VACATE_REQUIRE=1 $(GO) test -count=1 -p 1 -timeout 1h $(TESTFLAGS) -run '$(VARIANTS)' $(VARYING)
	VACATE_REQUIRE=1 $(GO) test -count=1 -timeout 1h $(TESTFLAGS) -run '^TestTwenty$$' ./internal/evict -journeys 4
	VACATE_REQUIRE=1 $(GO) test -count=1 -timeout 1h $(TESTFLAGS) -run '^Test(Survey|Census)$$' ./internal/guest/linux -kernel all

unit: ## the tests that need neither root nor QEMU (seconds)
	$(TEST) -short $(PKG)

demo: deps build ## evict a real VM on this machine, and compare; with LIBVIRT=1 a domain of libvirt's, with FLEET=1 a fleet of five hosts (root; under 6 minutes)
	@bin/vacate-lab demo $(if $(LIBVIRT),--libvirt) $(if $(FLEET),--fleet)

deps: ## install the Debian packages that are missing
	@scripts/deps $(if $(RACE),race) $(if $(LIBVIRT),libvirt)

fuzz: ## every fuzz target for FUZZTIME (10s)
	@$(GO) test -list '^Fuzz' ./... | \
	awk '/^Fuzz/ { f[++n] = $$1 } /^ok/ { while (n) print $$2, f[n--] }' | \
	while read -r pkg target; do \
		echo "$$pkg $$target"; \
		$(GO) test "$$pkg" -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) || exit 1; \
	done

MISSPELL = misspell -error

# Linters that bring modules with them have a go.mod of their own.
TOOL = $(GO) tool -modfile=tools/go.mod

lint: ## gofmt, go vet, staticcheck, gosec, length of lines, and of prose: links, phrases, spelling
	@files=$$(find . -name '*.go' -not -path './.lab/*' | xargs gofmt -l) && \
	if [ -n "$$files" ]; then echo "not formatted, run gofmt -w on:"; echo "$$files"; exit 1; fi
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	@mkdir -p .lab
	$(GO) -C tools build -o ../.lab/gosec ./gosec
	.lab/gosec $$($(GO) list -f '{{.Dir}}' ./... | grep -vE '/(lab|bench|testdata|cmd/guest)')
	$(GO) test -count=1 -run '^($(PROSE))$$' .
	find . -name '*.md' -not -path './.lab/*' -exec $(TOOL) $(MISSPELL) {} +
	find . -name '*.go' -not -path './.lab/*' -exec $(TOOL) $(MISSPELL) -source go {} +

alerts: ## promtool on the alert rules and on what the dashboard asks (takes Debian's promtool, 19 MB, if there is none)
	@scripts/check-alerts

generate: ## the Go code of the two files of api/v1 (needs Debian's protobuf-compiler and libprotobuf-dev)
	@command -v protoc >/dev/null || { echo "missing: protobuf-compiler. As root, run: apt-get install protobuf-compiler libprotobuf-dev" >&2; exit 1; }
	protoc --plugin=$$($(GO) tool -n protoc-gen-go) --plugin=$$($(GO) tool -n protoc-gen-connect-go) \
		--go_out=. --go_opt=paths=source_relative \
		--connect-go_out=. --connect-go_opt=paths=source_relative,package_suffix \
		internal/host/api/v1/host.proto internal/fleet/api/v1/fleet.proto

chaos: deps ## have every fault happen in every state of an eviction, alone and followed by a second one, CHAOS (1) times, WORKERS (5) at a time, with GUEST (linux, or kvm) (root; under an hour)
	rm -rf $(OUT)/chaos
	VACATE_REQUIRE=1 VACATE_CHAOS=$(CHAOS) VACATE_CHAOS_WORKERS=$(WORKERS) VACATE_CHAOS_GUEST=$(GUEST) VACATE_CHAOS_RESULT=$(abspath $(OUT))/faults$(if $(filter kvm,$(GUEST)),-kvm).md $(GO) test -count=1 -timeout 5h -run '^TestChaos$$' -v ./internal/host

domains: deps ## the same for a domain of libvirt and all that its operator may type, DOMAINS (1) times, WORKERS (5) at a time; with ONLY="vacate abort" that alone (root; hours)
	rm -rf $(OUT)/domainfaults $(OUT)/domains.md.json
	VACATE_REQUIRE=1 VACATE_DOMAINS=$(DOMAINS) VACATE_DOMAINS_WORKERS=$(WORKERS) VACATE_DOMAINS_ONLY="$(ONLY)" VACATE_DOMAINS_RESULT=$(abspath $(OUT))/domains.md $(GO) test -count=1 -timeout 12h -run '^TestDomainFaults$$' -v ./internal/host

refusals: deps ## have evictions disturbed at random moments while the VM is being frozen, REFUSALS (50) times with each of QEMU's versions (root; 10 minutes)
	@mkdir -p $(OUT)
	set -o pipefail; VACATE_REQUIRE=1 VACATE_REFUSALS=$(REFUSALS) $(GO) test -count=1 -timeout 1h -run '^TestAborts|^TestSwitches' -v ./internal/evict 2>&1 | \
	tee $(OUT)/refusals.txt | grep -vE '^=== |^        '
	@grep 'ran on at the source' $(OUT)/refusals.txt

kvm: deps ## evict the bare guest, under KVM where that works, KVM (4) times with each QEMU and configuration (root; 15 minutes)
	@mkdir -p $(OUT)
	set -o pipefail; VACATE_REQUIRE=1 VACATE_KVM=$(KVM) VACATE_KVM_RESULT=$(abspath $(OUT))/kvm.md $(GO) test -count=1 -timeout 2h -run '^TestKVM$$' -v ./internal/evict >$(OUT)/kvm.txt 2>&1 || { grep -E '^ *--- FAIL' $(OUT)/kvm.txt; false; }
	@cat $(OUT)/kvm.md

kvmspeed: deps ## compare the bare guest's speed before and after it moved, KVM (4) times (root; 8 minutes)
	@mkdir -p $(OUT)
	VACATE_REQUIRE=1 VACATE_KVM_SPEED=$(KVM) VACATE_KVM_SPEED_RESULT=$(abspath $(OUT))/kvmspeed.md $(GO) test -count=1 -timeout 1h -run '^TestKVMSpeed$$' ./internal/evict
	@cat $(OUT)/kvmspeed.md

domainkinds: deps ## evict domains of libvirt that have huge pages, UEFI, a TPM, or another user (root; 5 minutes, and 100 MB once)
	VACATE_REQUIRE=1 $(GO) test -count=1 -timeout 1h -run '^TestEvictDomainMoreKinds$$|^TestDomainOtherCPU$$' -v ./internal/host

domaincampaign: deps ## evict domains under load, there and back, MOVES (50) times for libvirt of Debian 12, of 13, and from 12 to 13 (root; an hour)
	VACATE_REQUIRE=1 VACATE_MOVES=$(MOVES) VACATE_MOVES_RESULT=$(abspath $(OUT))/moves.md $(GO) test -count=1 -timeout 6h -run '^TestDomainCampaign$$' ./internal/host
	@cat $(OUT)/moves.md

carrycampaign: deps ## have libvirt itself move domains through the daemons, CARRIES (20) times for libvirt of each of RELEASES (12 13) (root; an hour)
	@scripts/deps libvirt
	VACATE_REQUIRE=1 VACATE_MOVES=$(CARRIES) VACATE_RELEASES="$(RELEASES)" VACATE_MOVES_RESULT=$(abspath $(OUT))/carried.md $(GO) test -count=1 -timeout 6h -run '^TestCarryCampaign$$' -v ./internal/host >$(OUT)/carried.txt 2>&1 || { grep -E '^ *--- FAIL' $(OUT)/carried.txt; false; }
	@cat $(OUT)/carried.md

carryresumed: deps ## have daemons die and the link fail while libvirt's own migration passes, for libvirt of Debian 12 and of 13, and resume it (root; half an hour)
	@scripts/deps libvirt
	VACATE_REQUIRE=1 $(GO) test -count=1 -timeout 2h -run '^TestCarry(Resumed|OverCut)$$' -v ./internal/host

uitest: ## the page of vacate ui in a Chromium: each button with real VMs, hostile names, 1,000 hosts (root; 2 minutes, and 100 MB once)
	@scripts/deps browser
	VACATE_REQUIRE=1 $(GO) test -count=1 -timeout 30m -run '^TestBrowser' -v ./internal/ui ./internal/host

kvmbench: deps build ## compare ways to move the bare guest under KVM, and write docs/results/kvm-bench.md (root; half an hour on a machine that does nothing else)
	scripts/kvm-bench docs/results/kvm-bench.md

domainbench: deps build ## compare ways to move a domain of libvirt, and write docs/results/domain-bench.md (root; an hour on a machine that does nothing else)
	@scripts/deps libvirt
	scripts/domain-bench docs/results/domain-bench.md

carrybench: deps build ## compare the stalls of a domain that the daemons carry with those of libvirt's own post-copy, and write docs/results/carry-bench.md (root; half an hour on a machine that does nothing else)
	@scripts/deps libvirt
	scripts/carry-bench docs/results/carry-bench.md

.PHONY: fleetsim
fleetsim: build ## simulate fleets of 100, 1,000 and 10,000 hosts, and compare balancers; results in .lab/fleetsim (an hour of CPU)
	@mkdir -p .lab/fleetsim
	bin/vacate-lab fleetsim --hosts 100 >.lab/fleetsim/100.md
	bin/vacate-lab fleetsim --hosts 100 --load 1 >.lab/fleetsim/100-light.md
	bin/vacate-lab fleetsim --hosts 1000 >.lab/fleetsim/1000.md
	bin/vacate-lab fleetsim --hosts 10000 --step 30s >.lab/fleetsim/10000.md
	@cat .lab/fleetsim/*.md

.PHONY: fleetfaults fleetdrain
fleetfaults: deps build ## have leaders, members, disks, clocks and daemons of a fleet fail while it moves VMs, RUNS (23) times, WORKERS (2) fleets at a time (root; 10 minutes)
	@scripts/deps strace
	@mkdir -p $(OUT)
	bin/vacate-lab fleetfaults --runs $(RUNS) --workers $(if $(filter command environment,$(origin WORKERS)),$(WORKERS),2) --log $(OUT)/fleetfaults.json --logs $(OUT)/fleetfaults.logs >$(OUT)/fleetfaults.md || { cat $(OUT)/fleetfaults.md; false; }
	@cat $(OUT)/fleetfaults.md

fleetdrain: deps build ## drain a host of six VMs, three times, and compare what came with the forecast (root; 5 minutes)
	@mkdir -p $(OUT)
	bin/vacate-lab fleetdrain >$(OUT)/fleetdrain.md
	@cat $(OUT)/fleetdrain.md

nightly: deps ## what takes a night, with new turns of chance: variants, fuzzing, faults, campaigns; PARTS (all) are targets; results in .lab/nightly (root)
	scripts/nightly $(PARTS)

overwrite: deps ## overwrite what counts as free in guests of all kernels, STOPS (1000) times each (root; hours)
	@mkdir -p $(OUT)
	VACATE_REQUIRE=1 $(GO) test -count=1 -timeout 6h ./lab/churn -run '^TestOverwrite$$' -kernel all -stops $(STOPS) -out $(abspath $(OUT))

churn: deps ## evict guests of all kernels that verify every byte, MOVES (50) times each (root; hours)
	@mkdir -p $(OUT)
	VACATE_REQUIRE=1 $(GO) test -count=1 -timeout 6h ./internal/evict -run '^TestChurn$$' -kernel all -evictions $(MOVES) -out $(abspath $(OUT))

nomemory: deps ## evict a VM to a host that lacks memory for 200 s (root; 15 minutes)
	VACATE_REQUIRE=1 $(GO) test -count=1 -timeout 1h ./internal/evict -run '^TestNoMemory$$' -without-memory 200s

configurations: ## try every configuration of docs/configurations.md with QEMU=path, and print the table (minutes)
	$(GO) test -count=1 -timeout 30m -run '^TestConfigurations$$' ./internal/evict -configurations -qemu $(QEMU)

growth: ## what the engines' own work takes as a VM grows, from 1 to 64 GiB: see docs/results/growth.md (2 GiB of memory; minutes)
	$(GO) test -count=1 -timeout 30m -run '^$$' -bench '^BenchmarkGrowth$$' -benchtime 1x ./internal/guest/linux ./internal/evict

bench: deps build ## compare the ways to move a VM (root; see docs/bench.md)
	bin/vacate-lab bench $(BENCHFLAGS)

package: build ## bin/vacate_VERSION_amd64.deb (VERSION: by default that of git)
	@GO="$(GO)" packaging/build

package-test: ## install, upgrade and remove the package on a fresh Debian 12 and 13, and evict a VM between them (root; 15 minutes)
	scripts/try-package

clean: ## remove what was built and downloaded
	rm -rf bin .lab

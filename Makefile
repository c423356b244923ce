GOFUMPT     := mvdan.cc/gofumpt@v0.9.2
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.7.0
FUZZTIME    ?= 30s
BENCHSTAT   := golang.org/x/perf/cmd/benchstat@v0.0.0-20260908200009-22c9c6c9d4da
OLD         ?= HEAD
COUNT       ?= 6
BENCH       ?= .
BENCHTIME   ?= 0.5s
CHAOS_TIME  ?= 1m

.PHONY: help
help: ## Show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

.PHONY: test
test: ## Run the tests; without a redis-server, those that need one are left out
	go test ./...

.PHONY: race
race: ## Run the tests under the race detector
	go test -race ./...

.PHONY: real
real: ## Run the tests, and fail where there is no redis-server
	DMUTEX_REAL=required go test ./...

.PHONY: tidy
tidy: ## Fail if a go.mod or go.sum would change
	go mod tidy -diff
	go -C bench mod tidy -diff

.PHONY: lint
lint: tidy ## Check the form of the code
	@unformatted="$$(go run $(GOFUMPT) -l .)"; test -z "$$unformatted" || { echo "not gofumpt-ed:"; echo "$$unformatted"; exit 1; }
	for module in . bench; do (cd $$module && go vet ./... && go run $(STATICCHECK) ./...) || exit 1; done

.PHONY: fuzz
fuzz: ## Fuzz each target for FUZZTIME
	go test -run '^$$' -fuzz '^FuzzKey$$' -fuzztime $(FUZZTIME) .

.PHONY: chaos
chaos: ## Processes and faults let loose, for CHAOS_TIME each on three kinds of server
	CHAOS_TIME=$(CHAOS_TIME) DMUTEX_REAL=required go test -run '^TestChaos' -timeout 0 -v .

# Old and new take turns, as a machine has good and bad moments.
.PHONY: bench
bench: ## Run the benchmarks of revision OLD and of the working tree, and compare them
	@mkdir -p bin && rm -rf bin/old && git worktree prune && git worktree add --quiet --detach bin/old $(OLD)
	cd bin/old && go test -c -o ../old.test .
	go test -c -o bin/new.test .
	@rm -f bin/old.txt bin/new.txt
	for i in $$(seq $(COUNT)); do for which in old new; do \
		bin/$$which.test -test.run '^$$' -test.bench $(BENCH) -test.benchtime $(BENCHTIME) -test.benchmem >>bin/$$which.txt || exit 1; \
	done; done
	@git worktree remove --force bin/old
	go run $(BENCHSTAT) bin/old.txt bin/new.txt

.PHONY: compare
compare: ## Measure dmutex beside other libraries, for ten minutes, and write docs/bench and the README's table
	go -C bench run . -out ../docs/bench -page ../README.md

.PHONY: demo
demo: ## Run the demo: about ten seconds, no Redis needed
	go run ./examples/jobworkers

.PHONY: ci
ci: ## What has to pass before a change lands; installs redis-server with apt
	.ci/run

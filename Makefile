GOFUMPT     := mvdan.cc/gofumpt@v0.9.2
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.7.0
FUZZTIME    ?= 30s
BENCHTIME   ?= 1s
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
tidy: ## Fail if go.mod or go.sum would change
	go mod tidy -diff

.PHONY: lint
lint: tidy ## Check the form of the code
	@unformatted="$$(go run $(GOFUMPT) -l .)"; test -z "$$unformatted" || { echo "not gofumpt-ed:"; echo "$$unformatted"; exit 1; }
	go vet ./...
	go run $(STATICCHECK) ./...

.PHONY: fuzz
fuzz: ## Fuzz each target for FUZZTIME
	go test -run '^$$' -fuzz '^FuzzKey$$' -fuzztime $(FUZZTIME) .

.PHONY: chaos
chaos: ## Processes and faults let loose, for CHAOS_TIME each on three kinds of server
	CHAOS_TIME=$(CHAOS_TIME) DMUTEX_REAL=required go test -run '^TestChaos' -timeout 0 -v .

.PHONY: bench
bench: ## Run the benchmarks on a redis-server of their own
	go test -run '^$$' -bench . -benchtime $(BENCHTIME) -benchmem .

.PHONY: demo
demo: ## Run the demo: about ten seconds, no Redis needed
	go run ./examples/jobworkers

.PHONY: ci
ci: ## What has to pass before a change lands; installs redis-server with apt
	.ci/run
